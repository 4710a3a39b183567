// Closed forms of an operation's work: query-key pairs, FLOPs and bytes.
#include <gtest/gtest.h>

#include <set>

#include "sim/program/program.h"

namespace mop::program {
namespace {

TEST(AttentionShape, PairsEqualBruteForce) {
  for (int64_t q = 1; q <= 14; ++q)
    for (int64_t kv = q; kv <= 24; ++kv)
      for (int64_t window = 0; window <= 26; ++window) {
        int64_t pairs = 0;
        for (int64_t j = 0; j < q; ++j) {
          const int64_t at = kv - q + j;  // the query is the key's position `at`
          for (int64_t key = 0; key <= at; ++key) pairs += window == 0 || at - key < window;
        }
        const AttentionShape shape{3, q, kv, 4, 2, 8, 16, 1, window};
        ASSERT_DOUBLE_EQ(shape.pairs(), static_cast<double>(pairs)) << q << " " << kv << " " << window;
      }
}

TEST(AttentionShape, WithoutCausalityAllPairs) {
  EXPECT_DOUBLE_EQ((AttentionShape{1, 5, 7, 1, 1, 8, 8, 0, 0}.pairs()), 35);
  EXPECT_DOUBLE_EQ((AttentionShape{1, 7, 5, 1, 1, 8, 8, 0, 0}.pairs()), 35);
}

TEST(AttentionShape, DoesNotOverflow) {
  const double s = 1 << 24;
  EXPECT_DOUBLE_EQ((AttentionShape{1, 1 << 24, 1 << 24, 1, 1, 8, 8, 1, 0}.pairs()), s * (s + 1) / 2);
}

TEST(AttentionShape, RoundTripsThroughAShape) {
  const AttentionShape a{1, 2, 3, 4, 5, 6, 7, 1, 9}, b = AttentionShape::of(a.shape());
  EXPECT_EQ(a.shape(), b.shape());
  EXPECT_EQ(b.window, 9);
  EXPECT_EQ(b.kv_heads, 5);
}

TEST(Work, FlopsOfMatmulsAndAttention) {
  EXPECT_DOUBLE_EQ(flops(OpKind::gemm, {{3, 5, 7}}), 2 * 3 * 5 * 7);
  EXPECT_DOUBLE_EQ(flops(OpKind::grouped_gemm, {{3, 5, 7, 2}}),
                   2 * 3 * 5 * 7);  // rows are spread, not repeated
  const AttentionShape a{2, 4, 4, 3, 1, 8, 16, 1, 0};
  // Scores: 2 x 8 a pair; values: 2 x 16 a pair; 10 pairs, 3 heads, 2 sequences.
  EXPECT_DOUBLE_EQ(flops(OpKind::attention_fwd, a.shape()), 2.0 * 3 * 10 * 2 * (8 + 16));
  EXPECT_DOUBLE_EQ(flops(OpKind::attention_bwd, a.shape()), 2.5 * 2.0 * 3 * 10 * 2 * (8 + 16));
  EXPECT_DOUBLE_EQ(flops(OpKind::gemm, {{1 << 24, 1 << 20, 1 << 16}}),
                   2.0 * (1LL << 24) * (1LL << 20) * (1LL << 16));
  EXPECT_EQ(flops(OpKind::rms_norm, {{1000, 2000, 2000}}), 0);
  EXPECT_EQ(flops(OpKind::all_gather, {{1000}}), 0);
}

TEST(Work, Bytes) {
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::gemm, {{3, 5, 7}}), 2 * (3 * 7 + 7 * 5 + 3 * 5));
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::grouped_gemm, {{3, 5, 7, 2}}), 2 * (3 * 7 + 2 * 7 * 5 + 3 * 5));
  const AttentionShape a{2, 4, 6, 3, 1, 8, 16, 1, 0};
  const double q_and_o = 2 * 2.0 * 4 * 3 * (8 + 16), k_and_v = 2 * 2.0 * 6 * 1 * (8 + 16);
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::attention_fwd, a.shape()), q_and_o + k_and_v);
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::attention_bwd, a.shape()),
                   2 * (q_and_o + k_and_v));  // and their gradients
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::swiglu, {{10, 40, 20}}), 60);
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::copy_h2d, {{123}}), 123);
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::all_to_all, {{100, 50}}), 150);
  EXPECT_DOUBLE_EQ(hbm_bytes(OpKind::adam_host, {{100, 2800}}), 0);  // of the host, not of HBM
}

TEST(Names, AreDistinct) {
  std::set<std::string> names;
  for (int k = 0; k <= static_cast<int>(OpKind::next_batch); ++k)
    EXPECT_TRUE(names.insert(name(static_cast<OpKind>(k))).second) << name(static_cast<OpKind>(k));
  EXPECT_STREQ(name(OpKind::gemm), "gemm");
  EXPECT_STREQ(name(OpKind::all_to_all), "all_to_all");
  EXPECT_STREQ(name(OpKind::adam), "adam");
  EXPECT_STREQ(name(OpKind::plan_routing), "plan_routing");
  EXPECT_STREQ(name(OpKind::next_batch), "next_batch");
  names.clear();
  for (int s = 0; s < kStreams; ++s) EXPECT_TRUE(names.insert(name(static_cast<Stream>(s))).second);
  for (int c = 0; c < kComponents; ++c) EXPECT_STRNE(name(static_cast<Component>(c)), "");
  for (int h = 0; h < kHolds; ++h) EXPECT_STRNE(name(static_cast<Holds>(h)), "");
}

TEST(Names, KindsOfOperations) {
  for (const OpKind kind : {OpKind::all_gather, OpKind::reduce_scatter, OpKind::all_reduce,
                            OpKind::all_to_all, OpKind::send_recv}) {
    EXPECT_TRUE(is_collective(kind)) << name(kind);
    EXPECT_FALSE(is_memory_bound(kind)) << name(kind);
  }
  for (const OpKind kind :
       {OpKind::gemm, OpKind::grouped_gemm, OpKind::attention_fwd, OpKind::attention_bwd, OpKind::copy_h2d,
        OpKind::copy_d2h, OpKind::adam_host, OpKind::norm_host, OpKind::scale_host, OpKind::plan_routing}) {
    EXPECT_FALSE(is_collective(kind)) << name(kind);
    EXPECT_FALSE(is_memory_bound(kind)) << name(kind);
  }
  for (const OpKind kind :
       {OpKind::rms_norm, OpKind::rope_bwd, OpKind::square_sum, OpKind::adam, OpKind::scale, OpKind::permute})
    EXPECT_TRUE(is_memory_bound(kind)) << name(kind);
}

}  // namespace
}  // namespace mop::program
