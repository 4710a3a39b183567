#include <fstream>
#include <thread>

#include "tests/exec/checkpoint/support.h"

namespace mop::checkpoint {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ReaderTest : public Folder {
 protected:
  void flip(const std::filesystem::path& file, int64_t byte, int bit) {
    std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
    stream.seekg(byte);
    const int before = stream.get();
    stream.seekp(byte);
    stream.put(static_cast<char>(before ^ 1 << bit));
  }
};

TEST_F(ReaderTest, ReadsWhatAnyNumberOfRanksWrote) {
  Writer writer(folder);
  int64_t step = 0;
  for (const size_t ranks : {1, 2, 3, 5, 8, 16})
    for (int trial = 0; trial < 4; ++trial) {
      save(writer, ++step, ranks);
      const Newest newest = open_newest(folder);
      ASSERT_TRUE(newest.reader);
      EXPECT_THAT(newest.skipped, IsEmpty());
      expect_contents(*newest.reader, step);

      std::mt19937_64 random(static_cast<uint64_t>(step));
      for (int range = 0; range < 200; ++range) {
        const Group& group = some_groups()[random() % some_groups().size()];
        const auto what = static_cast<What>(random() % 4);
        const int64_t first = static_cast<int64_t>(random() % static_cast<uint64_t>(group.elements));
        const uint64_t count = random() % static_cast<uint64_t>(group.elements - first + 1);
        std::vector<float> found(count);
        newest.reader->read(group.flat, what, first, found);
        for (size_t i = 0; i < count; ++i)
          ASSERT_EQ(found[i], value(group.flat, what, first + static_cast<int64_t>(i), step));
      }
    }
}

TEST_F(ReaderTest, KeepsFloatsBitByBit) {
  const std::vector<uint32_t> bits{0, 0x80000000, 1, 0x7f800000, 0x7fc00123, 0x3f800001, 0xff7fffff};
  const std::vector<uint16_t> halves{0, 0x8000, 1, 0x7f80, 0x7fc1, 0x3f81, 0xff7f};
  Snapshot snapshot{state_of(1), {{}}};
  const program::FlatGroup flat{program::FlatPart::head, 2};
  snapshot.ranks[0] = {{flat, What::master, program::Type::f32, 10, std::as_bytes(std::span(bits))},
                       {flat, What::weights, program::Type::bf16, 10, std::as_bytes(std::span(halves))}};
  Writer writer(folder);
  writer.begin(snapshot);
  writer.wait();
  const Reader reader(folder / "step-000001");
  std::vector<float> found(7);
  reader.read(flat, What::master, 10, found);
  for (size_t i = 0; i < 7; ++i) EXPECT_EQ(std::bit_cast<uint32_t>(found[i]), bits[i]);
  reader.read(flat, What::weights, 10, found);
  for (size_t i = 0; i < 7; ++i) EXPECT_EQ(std::bit_cast<uint32_t>(found[i]), uint32_t{halves[i]} << 16);
}

TEST_F(ReaderTest, SaysWhatIsNotThere) {
  Filled memory(state_of(3), 2);
  const Value zero = [](auto...) { return 0.0f; };
  const program::FlatGroup flat{program::FlatPart::dense, 4};
  memory.add(0, flat, What::m, 5, 10, zero);
  memory.add(1, flat, What::m, 12, 20, zero);
  Writer writer(folder);
  writer.begin(memory.snapshot());
  writer.wait();
  const Reader reader(folder / "step-000003");
  EXPECT_TRUE(reader.has(flat, What::m));
  EXPECT_FALSE(reader.has(flat, What::v));
  EXPECT_FALSE(reader.has({program::FlatPart::dense, 5}, What::m));
  const auto error = [&](What what, int64_t first, size_t count) {
    std::vector<float> out(count);
    return error_of([&] { reader.read(flat, what, first, out); });
  };
  EXPECT_THAT(error(What::m, 5, 8), HasSubstr("step-000003 lacks elements 10 to 13 of the m of dense.4"));
  EXPECT_THAT(error(What::m, 4, 2), HasSubstr("lacks elements 4 to 6"));
  EXPECT_THAT(error(What::m, 15, 6), HasSubstr("lacks elements 20 to 21"));
  EXPECT_THAT(error(What::m, 30, 1), HasSubstr("lacks elements 30 to 31"));
  EXPECT_THAT(error(What::v, 5, 1), HasSubstr("lacks elements 5 to 6 of the v of dense.4"));
  std::vector<float> out(8);
  EXPECT_NO_THROW(reader.read(flat, What::m, 12, out));
}

TEST_F(ReaderTest, ThreadsReadAtOnce) {
  Writer writer(folder);
  save(writer, 1, 4);
  const Reader reader(folder / "step-000001");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) threads.emplace_back([&] { expect_contents(reader, 1); });
  for (std::thread& thread : threads) thread.join();
}

// Any flipped bit is an error that names its file and the checkpoint before, or lies where nothing is read.
TEST_F(ReaderTest, FindsDamageInRankFiles) {
  Writer writer(folder);
  save(writer, 1, 3);
  save(writer, 2, 3);
  std::mt19937_64 random(1);
  int found = 0;
  for (int trial = 0; trial < 100; ++trial) {
    const std::string rank = rank_name(random() % 3);
    const std::filesystem::path file = folder / "step-000002" / rank;
    const auto byte = static_cast<int64_t>(random() % std::filesystem::file_size(file));
    const auto bit = static_cast<int>(random() % 8);
    flip(file, byte, bit);
    const Reader reader(folder / "step-000002");
    try {
      expect_contents(reader, 2);
      ASSERT_FALSE(HasFatalFailure()) << "byte " << byte << " of " << file;
    } catch (const UserError& error) {
      ++found;
      EXPECT_THAT(error.what(), HasSubstr((folder / "step-000002" / rank).string() + " is damaged"));
      EXPECT_THAT(error.what(), HasSubstr("go on from the one before, " + (folder / "step-000001").string()));
    }
    flip(file, byte, bit);
  }
  EXPECT_GT(found, 50);  // the others hit a superfluous copy or the space between entries
  expect_contents(Reader(folder / "step-000002"), 2);
}

TEST_F(ReaderTest, ChecksOnlyWhatItReads) {
  const int64_t piece = kChecked / 4;  // elements
  Filled memory(state_of(1), 1);
  const program::FlatGroup flat{program::FlatPart::experts, 0};
  memory.add(0, flat, What::v, 0, 2 * piece + 100,
             [](program::FlatGroup, What, int64_t i) { return static_cast<float>(i % 1000); });
  Writer writer(folder);
  writer.begin(memory.snapshot());
  writer.wait();
  flip(folder / "step-000001" / rank_name(0), kChecked + 5, 3);
  const Reader reader(folder / "step-000001");
  const auto read = [&](int64_t first, int64_t count) {
    std::vector<float> out(static_cast<size_t>(count));
    reader.read(flat, What::v, first, out);
    for (int64_t i = 0; i < count; ++i)
      ASSERT_EQ(out[static_cast<size_t>(i)], static_cast<float>((first + i) % 1000)) << first << " " << i;
  };
  read(0, piece);
  read(2 * piece, 100);
  EXPECT_THAT(error_of([&] { read(piece, 1); }), HasSubstr("there is no checkpoint before it"));
  EXPECT_THAT(error_of([&] { read(piece - 1, 2); }), HasSubstr("damaged"));
  EXPECT_THAT(error_of([&] { read(2 * piece - 1, 2); }), HasSubstr("damaged"));
}

// A damaged manifest is an error, or says the same as before.
TEST_F(ReaderTest, FindsDamageInTheManifest) {
  Writer writer(folder);
  save(writer, 1, 2);
  const std::filesystem::path file = folder / "step-000001" / kManifestName;
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file));
  int found = 0;
  for (int64_t byte = 0; byte < size; byte += 7) {
    flip(file, byte, static_cast<int>(byte % 8));
    try {
      const Reader reader(folder / "step-000001");
      expect_contents(reader, 1);
      ASSERT_FALSE(HasFatalFailure()) << "byte " << byte;
    } catch (const UserError&) {
      ++found;
    }
    flip(file, byte, static_cast<int>(byte % 8));
  }
  EXPECT_GT(found, size / 7 * 9 / 10);
}

TEST_F(ReaderTest, PassesOverWhatIsIncomplete) {
  Writer writer(folder, 6);
  for (int64_t step = 1; step <= 6; ++step) save(writer, step, 2);
  const auto path = [&](int64_t step) { return folder / step_name(step); };
  std::filesystem::resize_file(path(6) / rank_name(1), 100);
  std::filesystem::remove(path(5) / rank_name(0));
  std::filesystem::remove(path(4) / kManifestName);
  std::filesystem::resize_file(path(3) / kManifestName, 50);
  std::filesystem::rename(path(2), folder / "step-000007.tmp-1");
  std::filesystem::create_directory(folder / "step-x");
  std::filesystem::create_directory(folder / "step-8x");
  const Newest newest = open_newest(folder);
  ASSERT_TRUE(newest.reader);
  expect_contents(*newest.reader, 1);
  EXPECT_THAT(newest.skipped, ElementsAre(HasSubstr("step-000006/rank-00001.bin has 100 bytes instead of"),
                                          HasSubstr("step-000005/rank-00000.bin: No such file"),
                                          HasSubstr("step-000004/manifest.json: No such file"),
                                          HasSubstr("step-000003/manifest.json is damaged")));
  EXPECT_THAT(error_of([&] { Reader(path(6)); }),
              HasSubstr("go on from the one before, " + path(5).string()));
}

TEST_F(ReaderTest, FindsNothingWhereNothingIs) {
  EXPECT_FALSE(open_newest(folder).reader);
  EXPECT_FALSE(open_newest(folder / "none").reader);
  EXPECT_THAT(error_of([&] { Reader(folder / "none"); }), HasSubstr("No such file"));
}

TEST_F(ReaderTest, StepsAreOrderedAsNumbers) {
  Writer writer(folder, 3);
  for (const int64_t step : {9, 999999, 1000000}) save(writer, step, 1);
  EXPECT_THAT(names_in(folder), ElementsAre("step-000009", "step-1000000", "step-999999"));
  EXPECT_EQ(open_newest(folder).reader->state().step, 1000000);
}

TEST_F(ReaderTest, RefusesANewerFormat) {
  EXPECT_THAT(error_of([] { parse_manifest(R"({"format": "mop checkpoint", "version": 2})", "m.json"); }),
              HasSubstr("m.json: written by a newer mop"));
  for (const char* text : {"", "[]", "{}", "null", R"({"format": 3})", R"({"format": "mop checkpoint"})",
                           R"({"format": "mop checkpoint", "version": "1"})"})
    EXPECT_THAT(error_of([&] { parse_manifest(text, "m.json"); }), HasSubstr("m.json is damaged")) << text;
}

}  // namespace
}  // namespace mop::checkpoint
