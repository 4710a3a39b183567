#include <gtest/gtest.h>

#include <random>

#include "exec/data/batches.h"
#include "exec/data/dataset.h"
#include "sim/base/error.h"
#include "tests/exec/data/write_megatron.h"
#include "tests/exec/support/allocations.h"

namespace mop::data {
namespace {

using Rows = std::vector<int32_t>;

struct Filled {
  Rows ids, targets, positions, starts;
  Filled(int64_t tokens, int64_t group_rows)
      : ids(static_cast<size_t>(tokens), -7),
        targets(ids),
        positions(ids),
        starts(static_cast<size_t>(group_rows), -7) {}
  interpreter::Batch batch() { return {ids, targets, positions, starts}; }
};

class BatchesTest : public Folder {
 protected:
  // Random documents, so that no two places look alike.
  void SetUp() override {
    Folder::SetUp();
    std::vector<Document> documents;
    for (int64_t d = 0; d < 40; ++d) {
      auto& tokens = documents.emplace_back().emplace_back();
      for (int64_t i = below(60); i > 0; --i) tokens.push_back(below(1000));
    }
    write_megatron(folder / "x", 4, documents);
  }

  int64_t below(uint64_t n) { return static_cast<int64_t>(random_() % n); }

  std::mt19937_64 random_{11};
};

// However a micro-batch is divided, its ranks have its sequences, in order, between them.
TEST_F(BatchesTest, RanksTogetherHaveTheMicroBatch) {
  for (int trial = 0; trial < 100; ++trial) {
    const int64_t context = 1 + below(32), micro_sequences = 1 + below(6), accumulate = 1 + below(3);
    const Dataset data(folder / "x",
                       {.context = context, .vocab = 1000, .seed = 5, .shuffle = below(2) == 1});
    std::vector<int64_t> divisors;
    for (int64_t b = 1; b <= micro_sequences; ++b)
      if (micro_sequences % b == 0) divisors.push_back(b);
    const int64_t group_sequences = divisors[static_cast<size_t>(below(divisors.size()))];
    const int64_t group_rows = group_sequences * context;
    std::vector<int64_t> degrees;
    for (int64_t d = 1; d <= group_rows; ++d)
      if (group_rows % d == 0) degrees.push_back(d);
    const int64_t ranks = degrees[static_cast<size_t>(below(degrees.size()))], tokens = group_rows / ranks;
    const Position first{below(3), below(static_cast<uint64_t>(data.sequences()))};

    Position place = first;
    for (int64_t micro = 0; micro < accumulate; ++micro) {
      for (int64_t group = 0; group < micro_sequences / group_sequences; ++group) {
        Filled whole(group_rows, group_rows);  // sequence by sequence, from the data
        for (int64_t s = 0; s < group_sequences; ++s) {
          const auto part = [&](Rows& rows) {
            return std::span(rows).subspan(static_cast<size_t>(s * context), static_cast<size_t>(context));
          };
          data.sequence(data.at(place), part(whole.ids), part(whole.targets), part(whole.positions),
                        part(whole.starts));
          for (int32_t& start : part(whole.starts)) start += static_cast<int32_t>(s * context);
          place = data.advance(place, 1);
        }
        Filled all(0, 0);
        for (int64_t rank = 0; rank < ranks; ++rank) {
          Batches batches(data, {.micro_sequences = micro_sequences,
                                 .accumulate = accumulate,
                                 .group = group,
                                 .group_sequences = group_sequences,
                                 .rank = rank,
                                 .tokens = tokens});
          batches.begin_step(first);
          Filled own(tokens, group_rows);
          batches.fill(micro, own.batch());
          all.ids.insert(all.ids.end(), own.ids.begin(), own.ids.end());
          all.targets.insert(all.targets.end(), own.targets.begin(), own.targets.end());
          all.positions.insert(all.positions.end(), own.positions.begin(), own.positions.end());
          EXPECT_EQ(own.starts, whole.starts);
        }
        ASSERT_EQ(all.ids, whole.ids);
        EXPECT_EQ(all.targets, whole.targets);
        EXPECT_EQ(all.positions, whole.positions);
      }
    }
    Batches batches(data, {.micro_sequences = micro_sequences, .accumulate = accumulate, .tokens = context});
    batches.begin_step(first);
    EXPECT_EQ(batches.end_of_step(), place);
  }
}

TEST_F(BatchesTest, FillAllocatesNothing) {
  if (!test::Allocations::counted()) GTEST_SKIP() << "a sanitizer's malloc is not counted";
  const Dataset data(folder / "x", {.context = 64, .vocab = 1000, .end_of_document = 0});
  Batches batches(
      data,
      {.micro_sequences = 4, .accumulate = 2, .group = 1, .group_sequences = 2, .rank = 1, .tokens = 32});
  Filled own(32, 128);
  const interpreter::Batch batch = own.batch();
  const test::Allocations allocations;
  batches.begin_step({0, 3});
  batches.fill(0, batch);
  batches.fill(1, batch);
  EXPECT_EQ(allocations.count(), 0);
}

TEST_F(BatchesTest, RefusesWhatDoesNotFit) {
  const Dataset data(folder / "x", {.context = 8, .vocab = 1000});
  EXPECT_THROW(Batches(data, {.micro_sequences = 2, .group = 2, .tokens = 8}), InternalError);
  EXPECT_THROW(Batches(data, {.micro_sequences = 2, .rank = 1, .tokens = 8}), InternalError);
  EXPECT_THROW(Batches(data, {.micro_sequences = 2, .tokens = 0}), InternalError);
  Batches batches(data, {.micro_sequences = 2, .tokens = 4});
  Filled good(4, 8), narrow(3, 8), bare(4, 4);
  EXPECT_NO_THROW(batches.fill(0, good.batch()));
  EXPECT_THROW(batches.fill(1, good.batch()), InternalError);
  EXPECT_THROW(batches.fill(0, narrow.batch()), InternalError);
  EXPECT_THROW(batches.fill(0, bare.batch()), InternalError);
}

}  // namespace
}  // namespace mop::data
