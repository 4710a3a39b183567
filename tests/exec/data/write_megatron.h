// Writes indexed datasets as Megatron-LM does, for the tests; and a folder of their own for these.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace mop::data {

using Document = std::vector<std::vector<int64_t>>;  // its sequences

template <typename T>
void append(std::string& to, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  to.append(bytes, sizeof(T));
}

inline void append_token(std::string& to, int code, int64_t value) {
  switch (code) {
    case 1:
      return append(to, static_cast<uint8_t>(value));
    case 2:
      return append(to, static_cast<int8_t>(value));
    case 3:
      return append(to, static_cast<int16_t>(value));
    case 4:
      return append(to, static_cast<int32_t>(value));
    case 5:
      return append(to, value);
    case 6:
      return append(to, static_cast<double>(value));
    case 7:
      return append(to, static_cast<float>(value));
    default:
      return append(to, static_cast<uint16_t>(value));
  }
}

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::remove(path);  // ext4 flushes a file that is written over, to the disk
  std::ofstream(path, std::ios::binary) << bytes;
}

inline void write_megatron(const std::filesystem::path& prefix, int code,
                           const std::vector<Document>& documents) {
  std::string bin, lengths, offsets, firsts;
  uint64_t sequences = 0;
  append<int64_t>(firsts, 0);
  for (const Document& document : documents) {
    for (const auto& sequence : document) {
      append(lengths, static_cast<int32_t>(sequence.size()));
      append(offsets, static_cast<int64_t>(bin.size()));
      for (const int64_t token : sequence) append_token(bin, code, token);
      ++sequences;
    }
    append(firsts, static_cast<int64_t>(sequences));
  }
  std::string idx("MMIDIDX\0\0", 9);
  append<uint64_t>(idx, 1);
  append(idx, static_cast<uint8_t>(code));
  append(idx, sequences);
  append(idx, static_cast<uint64_t>(documents.size() + 1));
  write_file(prefix.string() + ".idx", idx + lengths + offsets + firsts);
  write_file(prefix.string() + ".bin", bin);
}

class Folder : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "mop-data-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  std::filesystem::path folder;
};

}  // namespace mop::data
