// Checkpoints with contents that are functions of the place and the step, for the tests of this folder.
#pragma once
#include <gmock/gmock.h>
#include <stdlib.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "exec/checkpoint/folder.h"
#include "exec/checkpoint/reader.h"
#include "exec/checkpoint/writer.h"
#include "tests/error_of.h"

namespace mop::checkpoint {

class Folder : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "mop-checkpoint-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  std::filesystem::path folder;
};

struct Group {
  program::FlatGroup flat;
  int64_t elements = 0;
};

inline const std::vector<Group>& some_groups() {
  using program::FlatPart;
  static const std::vector<Group> groups{{{FlatPart::embedding, -1}, 1000}, {{FlatPart::dense, 0}, 777},
                                         {{FlatPart::experts, 0}, 4096},    {{FlatPart::dense, 12}, 1},
                                         {{FlatPart::router_bias, 0}, 8},   {{FlatPart::head, 13}, 1000}};
  return groups;
}

// A whole number below 256: exact in bf16 too. Element `index` of a group.
inline float value(program::FlatGroup flat, What what, int64_t index, int64_t step) {
  uint64_t x = static_cast<uint64_t>(index) * 0x9e3779b97f4a7c15 +
               static_cast<uint64_t>(step) * 0xbf58476d1ce4e5b9 +
               static_cast<uint64_t>(flat.layer + 1) * 1013 + static_cast<uint64_t>(flat.part) * 101 +
               static_cast<uint64_t>(what) * 7;
  x ^= x >> 31;
  x *= 0x94d049bb133111eb;
  return static_cast<float>(x >> 56);
}

inline program::Type type_of(What what) {
  return what == What::weights ? program::Type::bf16 : program::Type::f32;
}

using Value = std::function<float(program::FlatGroup, What, int64_t index)>;

// A snapshot with the memory that its parts lie in.
class Filled {
 public:
  Filled(const State& state, size_t ranks) : snapshot_{state, std::vector<std::vector<Part>>(ranks)} {}

  void add(size_t rank, program::FlatGroup flat, What what, int64_t first, int64_t last, const Value& value) {
    const program::Type type = type_of(what);
    auto& memory = memory_.emplace_back(static_cast<size_t>((last - first) * program::size_of(type)));
    std::byte* to = memory.data();
    for (int64_t i = first; i < last; ++i, to += program::size_of(type)) {
      const auto bits = std::bit_cast<uint32_t>(value(flat, what, i));
      const auto upper = static_cast<uint16_t>(bits >> 16);
      if (type == program::Type::f32)
        std::memcpy(to, &bits, 4);
      else
        std::memcpy(to, &upper, 2);
    }
    snapshot_.ranks[rank].push_back({flat, what, type, first, memory});
  }

  const Snapshot& snapshot() const { return snapshot_; }

 private:
  Snapshot snapshot_;
  std::vector<std::vector<std::byte>> memory_;
};

// Everything of the groups, dealt to the ranks in random ranges, in random parts, some of them several times.
inline Filled random_shards(const State& state, size_t ranks, const std::vector<Group>& groups,
                            const Value& value, std::mt19937_64& random) {
  Filled filled(state, ranks);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  for (const Group& group : groups)
    for (const What what : {What::weights, What::master, What::m, What::v}) {
      std::vector<int64_t> cuts{0, group.elements};
      for (int64_t i = below(2 * static_cast<int64_t>(ranks)); i > 0; --i)
        cuts.push_back(below(group.elements + 1));
      std::ranges::sort(cuts);
      for (size_t i = 1; i < cuts.size(); ++i) {  // some are empty
        const auto rank = static_cast<size_t>(below(static_cast<int64_t>(ranks)));
        filled.add(rank, group.flat, what, cuts[i - 1], cuts[i], value);
        if (below(3) > 0) continue;
        const int64_t first = below(cuts[i] + 1), last = first + below(group.elements - first + 1);
        filled.add((rank + 1) % ranks, group.flat, what, first, last, value);
      }
    }
  return filled;
}

inline State state_of(int64_t step) {
  return {.step = step,
          .optimizer_step = step - 1,
          .data = {step / 7, step % 7},
          .seed = 0xfedcba9876543210 + static_cast<uint64_t>(step),
          .plan = "mop:ep=4",
          .ranks = 4,
          .model = "tiny",
          .fingerprint = 0xdeadbeef01234567};
}

inline Filled filled(int64_t step, size_t ranks, const std::vector<Group>& groups = some_groups()) {
  std::mt19937_64 random(static_cast<uint64_t>(step));
  return random_shards(
      state_of(step), ranks, groups,
      [step](program::FlatGroup flat, What what, int64_t index) { return value(flat, what, index, step); },
      random);
}

inline void save(Writer& writer, int64_t step, size_t ranks,
                 const std::vector<Group>& groups = some_groups()) {
  const Filled memory = filled(step, ranks, groups);
  writer.begin(memory.snapshot());
  writer.wait();
}

// The checkpoint is that of the step, all of it.
inline void expect_contents(const Reader& reader, int64_t step,
                            const std::vector<Group>& groups = some_groups()) {
  ASSERT_EQ(reader.state(), state_of(step));
  for (const Group& group : groups)
    for (const What what : {What::weights, What::master, What::m, What::v}) {
      ASSERT_TRUE(reader.has(group.flat, what));
      std::vector<float> found(static_cast<size_t>(group.elements), -1);
      reader.read(group.flat, what, 0, found);
      for (int64_t i = 0; i < group.elements; ++i)
        ASSERT_EQ(found[static_cast<size_t>(i)], value(group.flat, what, i, step))
            << name(group.flat) << " " << i;
    }
}

inline std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    names.push_back(entry.path().filename());
  std::ranges::sort(names);
  return names;
}

}  // namespace mop::checkpoint
