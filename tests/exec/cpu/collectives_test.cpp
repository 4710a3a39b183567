#include <gtest/gtest.h>

#include <cmath>

#include "sim/base/error.h"
#include "tests/exec/cpu/routing_support.h"

namespace mop::cpu::test {
namespace {

using program::Exchange;

constexpr int kRanks = 8;

int64_t pick(std::mt19937_64& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Every rank's x and y of one collective, run by all ranks. in_place: y is x.
struct Exchanged {
  std::vector<std::vector<Tensor>> x, y;

  void run(OpKind kind, program::Does does, bool in_place = false) {
    const int size = static_cast<int>(x.size());
    Group group(size);
    group.run([&](int rank) {
      Workspace workspace(1024);
      std::vector<Operand> in, out;
      for (const Tensor& t : x[rank]) in.push_back(t.operand());
      for (const Tensor& t : in_place ? x[rank] : y[rank]) out.push_back(t.operand());
      group.collective({kind, does, in, out, rank, size}, workspace);
    });
  }
};

double tolerance(Type type) {
  return type == Type::bf16 ? 1.0 / 128 : type == Type::f32 ? 1e-6 : 1e-14;
}

TEST(Collectives, AllGather) {
  std::mt19937_64 random(1);
  for (const Type type : {Type::bf16, Type::f32, Type::f64, Type::i32}) {
    for (const int64_t gap : {0, 3}) {
      Exchanged e;
      const int64_t r = pick(random, 1, 5), c = pick(random, 1, 900);
      for (int rank = 0; rank < kRanks; ++rank) {
        e.x.emplace_back().emplace_back(type, r, c, 1, gap);
        e.y.emplace_back().emplace_back(type, 1, kRanks * r * c);
        for (int64_t i = 0; i < r * c; ++i) e.x[rank][0].set(i, static_cast<double>(pick(random, -100, 100)));
      }
      e.run(OpKind::all_gather, {});
      for (int rank = 0; rank < kRanks; ++rank)
        for (int64_t i = 0; i < kRanks * r * c; ++i)
          ASSERT_EQ(e.y[rank][0].at(i), e.x[i / (r * c)][0].at(i % (r * c)));
    }
  }
}

TEST(Collectives, AllGatherOfAPartInPlace) {
  std::vector<Tensor> y;
  for (int rank = 0; rank < kRanks; ++rank) {
    y.emplace_back(Type::f32, 1, kRanks * 5);
    for (int64_t i = 0; i < 5; ++i) y[rank].set(rank * 5 + i, static_cast<double>(10 * rank + i));
  }
  Group group(kRanks);
  group.run([&](int rank) {
    Workspace workspace(1024);
    Operand part = y[rank].operand();
    part.data += rank * 5 * 4;
    part.view.cols = part.view.ld = 5;
    group.collective({OpKind::all_gather, {}, {part}, {y[rank].operand()}, rank, kRanks}, workspace);
  });
  for (int rank = 0; rank < kRanks; ++rank)
    for (int64_t i = 0; i < kRanks * 5; ++i)
      ASSERT_EQ(y[rank].at(i), static_cast<double>(10 * (i / 5) + i % 5));
}

TEST(Collectives, ReduceScatter) {
  std::mt19937_64 random(2);
  for (const Type from : {Type::bf16, Type::f32, Type::f64}) {
    for (const Type to : {Type::bf16, Type::f32, Type::f64}) {
      for (const bool accumulate : {false, true}) {
        for (const int64_t n : {1, 7, 1200}) {
          Exchanged e;
          std::vector<std::vector<double>> before(kRanks);
          for (int rank = 0; rank < kRanks; ++rank) {
            e.x.emplace_back().emplace_back(from, kRanks, n, 1, accumulate ? 2 : 0);
            e.y.emplace_back().emplace_back(to, 1, n);
            e.x[rank][0].randomise(random);
            e.y[rank][0].randomise(random);
            for (int64_t i = 0; i < n; ++i) before[rank].push_back(e.y[rank][0].at(i));
          }
          e.run(OpKind::reduce_scatter, {.accumulate = accumulate});
          for (int rank = 0; rank < kRanks; ++rank) {
            for (int64_t i = 0; i < n; ++i) {
              double sum = accumulate ? before[rank][i] : 0, size = std::abs(sum);
              for (int peer = 0; peer < kRanks; ++peer) {
                sum += e.x[peer][0].at(rank, i);
                size = std::max(size, std::abs(sum));
              }
              // One rounding, of the result: bf16 was not added up in bf16.
              ASSERT_NEAR(e.y[rank][0].at(i), sum, tolerance(to) * std::abs(sum) + 1e-15 * size + 1e-30);
            }
          }
        }
      }
    }
  }
}

TEST(Collectives, AllReduceIsTheSameEverywhere) {
  std::mt19937_64 random(3);
  for (const Type type : {Type::bf16, Type::f32, Type::f64, Type::i32}) {
    for (const int64_t n : {1, 5, 8, 13, 3000}) {
      Exchanged e;
      std::vector<double> sums(static_cast<size_t>(n));
      for (int rank = 0; rank < kRanks; ++rank) {
        e.x.emplace_back().emplace_back(type, 1, n);
        e.y.emplace_back();
        for (int64_t i = 0; i < n; ++i) {
          e.x[rank][0].set(i, type == Type::i32 ? static_cast<double>(pick(random, 0, 1 << 27))
                                                : std::uniform_real_distribution<double>(-1, 1)(random));
          sums[i] += e.x[rank][0].at(i);
        }
      }
      e.run(OpKind::all_reduce, {}, true);
      for (int rank = 0; rank < kRanks; ++rank) {
        for (int64_t i = 0; i < n; ++i) {
          ASSERT_NEAR(e.x[rank][0].at(i), sums[i],
                      type == Type::i32 ? 0 : tolerance(type) * std::abs(sums[i]) + 1e-15);
          ASSERT_EQ(e.x[rank][0].at(i), e.x[0][0].at(i));
        }
      }
    }
  }
}

TEST(Collectives, SendRecvIsARing) {
  Exchanged e;
  for (int rank = 0; rank < kRanks; ++rank) {
    e.x.emplace_back().emplace_back(Type::bf16, 3, 4, 1, 1);
    e.y.emplace_back().emplace_back(Type::bf16, 3, 4);
    e.x[rank][0].fill(rank);
  }
  e.run(OpKind::send_recv, {});
  for (int rank = 0; rank < kRanks; ++rank)
    for (int64_t i = 0; i < 12; ++i) ASSERT_EQ(e.y[rank][0].at(i), (rank + kRanks - 1) % kRanks);
}

// Blocks: (columns of x, columns c of a block, the block of each rank; -1: none).
struct Blocks {
  int64_t columns, c;
  std::vector<int> of;
};

const std::vector<Blocks> kBlocks = {
    {24, 3, {0, 1, 2, 3, 4, 5, 6, 7}},    {23, 3, {0, 1, 2, 3, 4, 5, 6, 7}},  // the last is narrower
    {10, 2, {0, 1, 2, 3, 4, -1, -1, -1}},  // padding: nothing is left for the last ranks
    {12, 3, {0, 0, 1, 1, 2, 2, 3, 3}},     // replicated
    {11, 3, {0, 0, 1, 1, 2, 2, 3, 3}},    {5, 5, {0, 0, 0, 0, 0, 0, 0, 0}},
};

TEST(Collectives, ColumnsToRows) {
  std::mt19937_64 random(4);
  for (const Blocks& blocks : kBlocks) {
    SCOPED_TRACE(blocks.columns);
    const int64_t n = 3;
    Exchanged e;
    for (int rank = 0; rank < kRanks; ++rank) {
      e.x.emplace_back(), e.y.emplace_back();
      // Two matrices travel together, the second in other shapes and types.
      e.x[rank].emplace_back(Type::bf16, n, blocks.columns, 1, 2);
      e.x[rank].emplace_back(Type::f32, 1, kRanks * 2);
      e.y[rank].emplace_back(Type::bf16, kRanks * n, blocks.c);
      e.y[rank].emplace_back(Type::f32, kRanks, 2);
      for (Tensor& x : e.x[rank]) x.randomise(random);
      for (Tensor& y : e.y[rank]) y.fill(7);
    }
    e.run(OpKind::all_to_all, {.exchange = Exchange::columns_to_rows});
    for (int rank = 0; rank < kRanks; ++rank) {
      for (int source = 0; source < kRanks; ++source) {
        for (int64_t r = 0; r < n; ++r) {
          for (int64_t c = 0; c < blocks.c; ++c) {
            const int64_t col = blocks.of[rank] * blocks.c + c;
            const bool there = blocks.of[rank] >= 0 && col < blocks.columns;
            ASSERT_EQ(e.y[rank][0].at(source * n + r, c), there ? e.x[source][0].at(r, col) : 0);
          }
        }
        for (int64_t c = 0; c < 2; ++c)
          ASSERT_EQ(e.y[rank][1].at(source, c), e.x[source][1].at(0, rank * 2 + c));
      }
    }
  }
}

TEST(Collectives, RowsToColumns) {
  std::mt19937_64 random(5);
  const int64_t n = 3, c = 4;
  for (const int64_t columns : {kRanks * c, kRanks * c - 3, kRanks * c - 9}) {
    Exchanged e;
    for (int rank = 0; rank < kRanks; ++rank) {
      e.x.emplace_back().emplace_back(Type::f32, kRanks * n, c, 1, 1);
      e.y.emplace_back().emplace_back(Type::f32, n, columns, 1, 2);
      e.x[rank][0].randomise(random);
    }
    e.run(OpKind::all_to_all, {.exchange = Exchange::rows_to_columns});
    for (int rank = 0; rank < kRanks; ++rank)
      for (int64_t r = 0; r < n; ++r)
        for (int64_t col = 0; col < columns; ++col)
          ASSERT_EQ(e.y[rank][0].at(r, col), e.x[col / c][0].at(rank * n + r, col % c));
  }
}

TEST(Collectives, Errors) {
  const auto run_alone = [](OpKind kind, program::Does does, std::vector<Operand> in,
                            std::vector<Operand> out) {
    Group group(1);
    Workspace workspace(1024);
    group.collective({kind, does, std::move(in), std::move(out)}, workspace);
  };
  const Tensor three(Type::f32, 1, 3), four(Type::f32, 1, 4);
  EXPECT_THROW(run_alone(OpKind::all_gather, {}, {three.operand()}, {four.operand()}), InternalError);
  EXPECT_THROW(run_alone(OpKind::reduce_scatter, {}, {three.operand()}, {four.operand()}), InternalError);
  EXPECT_THROW(run_alone(OpKind::all_reduce, {}, {three.operand()}, {four.operand()}), InternalError);
  EXPECT_THROW(run_alone(OpKind::send_recv, {}, {three.operand()}, {four.operand()}), InternalError);
  EXPECT_THROW(run_alone(OpKind::all_gather, {}, {}, {four.operand()}), InternalError);
  EXPECT_THROW(run_alone(OpKind::gemm, {}, {four.operand()}, {four.operand()}), InternalError);
  EXPECT_THROW(run_alone(OpKind::all_to_all, {.exchange = Exchange::rows_to_columns}, {three.operand()},
                         {four.operand()}),
               InternalError);
  EXPECT_THROW(run_alone(OpKind::all_to_all, {.exchange = Exchange::columns_to_rows}, {four.operand()},
                         {three.operand()}),
               InternalError);
}

}  // namespace
}  // namespace mop::cpu::test
