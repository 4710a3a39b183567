#include <gmock/gmock.h>

#include "exec/data/tokens.h"
#include "tests/error_of.h"
#include "tests/exec/data/write_megatron.h"

namespace mop::data {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<int32_t> all(const Tokens& tokens) {
  std::vector<int32_t> ids(static_cast<size_t>(tokens.begin(tokens.documents())));
  tokens.read(0, ids);
  return ids;
}

std::vector<int64_t> begins(const Tokens& tokens) {
  std::vector<int64_t> found;
  for (int64_t d = 0; d <= tokens.documents(); ++d) found.push_back(tokens.begin(d));
  return found;
}

using TextTest = Folder;
using MegatronTest = Folder;

TEST_F(TextTest, AFileIsADocumentOfBytes) {
  write_file(folder / "a.txt", std::string("h\0\xff", 3));
  const auto tokens = open_tokens(folder / "a.txt");
  EXPECT_THAT(all(*tokens), ElementsAre('h', 0, 255));
  EXPECT_THAT(begins(*tokens), ElementsAre(0, 3));
}

TEST_F(TextTest, AFolderIsItsFilesByPath) {
  std::filesystem::create_directories(folder / "b" / ".git");
  write_file(folder / "c.txt", "c");
  write_file(folder / "b" / "2", "22");
  write_file(folder / "b" / "1", "111");
  write_file(folder / "a", "");  // no document
  write_file(folder / ".hidden", "x");
  write_file(folder / "b" / ".git" / "y", "y");
  const auto tokens = open_tokens(folder);
  EXPECT_THAT(all(*tokens), ElementsAre('1', '1', '1', '2', '2', 'c'));
  EXPECT_THAT(begins(*tokens), ElementsAre(0, 3, 5, 6));
  std::vector<int32_t> middle(3);
  tokens->read(2, middle);
  EXPECT_THAT(middle, ElementsAre('1', '2', '2'));
}

TEST_F(TextTest, Errors) {
  EXPECT_THAT(error_of([&] { open_tokens(folder / "no.txt"); }), HasSubstr("no.txt: No such file"));
  write_file(folder / "shard.idx", "");
  EXPECT_THAT(error_of([&] { open_tokens(folder); }), HasSubstr("shard.idx; give one .idx file"));
  EXPECT_THAT(error_of([&] { open_tokens("/dev/null"); }), HasSubstr("not a regular file"));
}

TEST_F(MegatronTest, ReadsTheFormatByteByByte) {
  const std::string idx(
      "MMIDIDX\0\0"       // magic
      "\1\0\0\0\0\0\0\0"  // version
      "\x08"              // u16
      "\2\0\0\0\0\0\0\0"  // sequences
      "\3\0\0\0\0\0\0\0"  // entries of the document list
      "\2\0\0\0\1\0\0\0"  // lengths
      "\0\0\0\0\0\0\0\0"  // offsets
      "\4\0\0\0\0\0\0\0"  //
      "\0\0\0\0\0\0\0\0"  // documents
      "\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0",
      9 + 8 + 1 + 8 + 8 + 2 * 4 + 2 * 8 + 3 * 8);
  write_file(folder / "x.idx", idx);
  write_file(folder / "x.bin", std::string("\1\0\xff\xff\0\x80", 6));
  for (const char* name : {"x", "x.bin", "x.idx"}) {
    const auto tokens = open_tokens(folder / name);
    EXPECT_THAT(all(*tokens), ElementsAre(1, 65535, 32768));
    EXPECT_THAT(begins(*tokens), ElementsAre(0, 2, 3));
  }
}

TEST_F(MegatronTest, ReadsEveryTypeOfIds) {
  for (const int code : {1, 2, 3, 4, 5, 8}) {
    // Documents of several sequences, of none, and with empty ones.
    write_megatron(folder / "x", code, {{{1, 2}, {3}}, {}, {{}}, {{127}, {}, {5, 6, 7}}, {}});
    const auto tokens = open_tokens(folder / "x");
    EXPECT_THAT(all(*tokens), ElementsAre(1, 2, 3, 127, 5, 6, 7)) << code;
    EXPECT_THAT(begins(*tokens), ElementsAre(0, 3, 3, 3, 7, 7)) << code;
  }
  write_megatron(folder / "x", 2, {{{-1, -128}}});
  EXPECT_THAT(all(*open_tokens(folder / "x")), ElementsAre(-1, -128));
  write_megatron(folder / "x", 5, {{{int64_t{1} << 40, -(int64_t{1} << 40)}}});
  EXPECT_THAT(all(*open_tokens(folder / "x")), ElementsAre(INT32_MAX, INT32_MIN));
}

TEST_F(MegatronTest, ErrorsOfTheHeader) {
  const auto error = [&](auto change) {
    write_megatron(folder / "x", 4, {{{1, 2, 3}}, {{4}}});
    std::string idx;
    {
      std::ifstream in(folder / "x.idx", std::ios::binary);
      idx.assign(std::istreambuf_iterator<char>(in), {});
    }
    change(idx);
    write_file(folder / "x.idx", idx);
    return error_of([&] { open_tokens(folder / "x.idx"); });
  };
  EXPECT_THAT(error([](std::string& idx) { idx[0] = 'X'; }), HasSubstr("x.idx is not a Megatron index"));
  EXPECT_THAT(error([](std::string& idx) { idx[8] = 1; }), HasSubstr("x.idx is not a Megatron index"));
  EXPECT_THAT(error([](std::string& idx) { idx.clear(); }), HasSubstr("x.idx is not a Megatron index"));
  EXPECT_THAT(error([](std::string& idx) { idx[9] = 2; }), HasSubstr("version 2"));
  EXPECT_THAT(error([](std::string& idx) { idx[17] = 6; }), HasSubstr("type code 6 (floats)"));
  EXPECT_THAT(error([](std::string& idx) { idx[17] = 7; }), HasSubstr("type code 7 (floats)"));
  EXPECT_THAT(error([](std::string& idx) { idx[17] = 0; }), HasSubstr("type code 0;"));
  EXPECT_THAT(error([](std::string& idx) { idx[17] = 9; }), HasSubstr("type code 9;"));
  for (const size_t byte : {18, 25, 26, 33})  // counts beyond the file, and beyond what can be multiplied
    EXPECT_THAT(error([&](std::string& idx) { idx[byte] = '\x7f'; }), HasSubstr("x.idx is truncated"))
        << byte;
  for (size_t cut = 1; cut < 40; ++cut)
    EXPECT_THAT(error([&](std::string& idx) { idx.resize(idx.size() - cut); }),
                HasSubstr("x.idx is truncated"));
}

TEST_F(MegatronTest, ErrorsOfTheContents) {
  const auto error = [&](size_t byte, char value) {
    write_megatron(folder / "x", 4, {{{1, 2, 3}}, {{4}}});
    std::fstream(folder / "x.idx", std::ios::binary | std::ios::in | std::ios::out)
        .seekp(static_cast<std::streamoff>(byte))
        .put(value);
    return error_of([&] { open_tokens(folder / "x.idx"); });
  };
  EXPECT_THAT(error(34, 2), HasSubstr("sequence 1 does not begin where"));       // its length
  EXPECT_THAT(error(37, '\xff'), HasSubstr("sequence 0 does not begin where"));  // a negative length
  EXPECT_THAT(error(50, 8), HasSubstr("sequence 1 does not begin where"));       // its offset
  EXPECT_THAT(error(38, 2), HasSubstr("x.bin has 16 bytes, but"));               // last length
  EXPECT_THAT(error(58, 1), HasSubstr("do not cover its 2 sequences"));          // first document
  EXPECT_THAT(error(66, 3), HasSubstr("do not cover its 2 sequences"));          // beyond the end
  EXPECT_THAT(error(74, 1), HasSubstr("do not cover its 2 sequences"));          // end

  write_megatron(folder / "x", 4, {{{1, 2, 3}}});
  std::filesystem::resize_file(folder / "x.bin", 11);
  EXPECT_THAT(error_of([&] { open_tokens(folder / "x"); }), HasSubstr("truncated"));
  std::filesystem::resize_file(folder / "x.bin", 16);
  EXPECT_THAT(error_of([&] { open_tokens(folder / "x"); }), HasSubstr("another data set"));
  std::filesystem::remove(folder / "x.bin");
  EXPECT_THAT(error_of([&] { open_tokens(folder / "x"); }), HasSubstr("x.bin: No such file"));
  EXPECT_THAT(error_of([&] { open_tokens(folder / "y.bin"); }), HasSubstr("No such file"));
}

}  // namespace
}  // namespace mop::data
