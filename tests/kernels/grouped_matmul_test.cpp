#include "kernels/grouped_matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/kernels/device_array.h"

namespace mop::kernels {
namespace {

struct Problem {
  std::vector<ExpertGroup> experts;
  int64_t own = 0, slots = 0;  // matrices
  int64_t rows = 0;            // of all operands; the last ones may belong to nobody
  int64_t n = 0, k = 0;
  Type type = Type::bf16;
};

// Rows in the order of the counts; every third expert is a borrowed one.
Problem problem(const std::vector<int>& counts, int64_t n, int64_t k, Type type = Type::bf16) {
  Problem p;
  p.n = n, p.k = k, p.type = type;
  int32_t row = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const bool borrowed = i % 3 == 2;
    p.experts.push_back({row, row + counts[i], borrowed ? -1 : static_cast<int32_t>(p.own++),
                         borrowed ? static_cast<int32_t>(p.slots++) : -1});
    row += counts[i];
  }
  p.rows = row + 5;
  return p;
}

double dot(const Values& a, int64_t a_first, int64_t a_step, const Values& b, int64_t b_first, int64_t b_step,
           int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += a[static_cast<size_t>(a_first + i * a_step)] * b[static_cast<size_t>(b_first + i * b_step)];
  return sum;
}

class GroupedMatmulTest : public testing::TestWithParam<bool> {  // by expert
 protected:
  void SetUp() override {
    if (const std::string reason = no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  }

  void expect_multiplied(const Problem& p, bool transpose, bool with_bias) {
    GroupedMatmul grouped(GetParam());
    DeviceBytes workspace(grouped.workspace_bytes());
    const int64_t lda = p.k + 16, ldc = p.n + 8, each = p.n * p.k + 24, ldw = transpose ? p.k : p.n;
    const Values a = random_values(p.rows * lda, p.type, random_);
    const Values own = random_values(p.own * each, p.type, random_),
                 lent = random_values(p.slots * each, p.type, random_),
                 bias = random_values(p.own * each, p.type, random_),
                 lent_bias = random_values(p.slots * each, p.type, random_);
    const DeviceArray da(a, p.type), d_own(own, p.type), d_lent(lent, p.type), d_bias(bias, p.type),
        d_lent_bias(lent_bias, p.type), dc = DeviceArray::poisoned(p.rows * ldc, p.type);
    const ExpertMatrices w{d_own.get(), d_lent.get(), ldw, each, each};
    const ExpertMatrices b{d_bias.get(), d_lent_bias.get(), p.n, each, each};
    grouped.multiply(p.experts, {da.get(), p.type, p.rows, p.k, lda}, w, transpose,
                     with_bias ? b : ExpertMatrices{}, {dc.get(), p.type, p.rows, p.n, ldc}, workspace.get(),
                     nullptr);
    const Values all = dc.values();
    Values expected, actual, untouched(all.size(), DeviceArray::kPoison);
    for (const ExpertGroup& e : p.experts) {
      const Values& weights = e.own >= 0 ? own : lent;
      const int64_t at = (e.own >= 0 ? e.own : e.slot) * each;
      for (int64_t row = e.first; row < e.last; ++row)
        for (int64_t col = 0; col < p.n; ++col) {
          double sum =
              dot(a, row * lda, 1, weights, at + (transpose ? col * ldw : col), transpose ? 1 : ldw, p.k);
          if (with_bias) sum += (e.own >= 0 ? bias : lent_bias)[static_cast<size_t>(at + col)];
          const auto i = static_cast<size_t>(row * ldc + col);
          expected.push_back(sum);
          actual.push_back(all[i]);
          untouched[i] = all[i];
        }
    }
    EXPECT_LT(relative_error(actual, expected), bound(p.type))
        << p.experts.size() << " experts, transposed " << transpose;
    EXPECT_EQ(all, untouched) << "rows of nobody were written";
  }

  // Written over NaN, and added to numbers. gap: elements between rows.
  void expect_weight_gradients(const Problem& p, Type out, int64_t gap = 0) {
    for (const bool accumulate : {false, true}) expect_weight_gradients(p, out, gap, accumulate);
  }

  void expect_weight_gradients(const Problem& p, Type out, int64_t gap, bool accumulate) {
    SCOPED_TRACE(accumulate ? "added" : "written");
    GroupedMatmul grouped(GetParam());
    DeviceBytes workspace(grouped.workspace_bytes());
    const int64_t m = p.k, n = p.n, lda = m + 8, ldb = n + 16, ld = n + gap, each = m * ld + 24;
    const Values a = random_values(p.rows * lda, p.type, random_),
                 b = random_values(p.rows * ldb, p.type, random_);
    const auto before = [&](int64_t matrices) {
      return accumulate ? random_values(matrices * each, out, random_)
                        : Values(static_cast<size_t>(matrices * each), std::nan(""));
    };
    const Values own = before(p.own), lent = before(p.slots);
    const DeviceArray da(a, p.type), db(b, p.type), d_own(own, out), d_lent(lent, out);
    grouped.weight_gradient(p.experts, {da.get(), p.type, p.rows, m, lda}, {db.get(), p.type, p.rows, n, ldb},
                            {d_own.get(), d_lent.get(), ld, each, each}, out, accumulate, workspace.get(),
                            nullptr);
    Values exact_own = own, exact_lent = lent;  // beside products: gaps, and experts without rows
    const Values actual_own = d_own.values(), actual_lent = d_lent.values();
    Values expected, actual;
    for (const ExpertGroup& e : p.experts) {
      const Values& all = e.own >= 0 ? actual_own : actual_lent;
      Values& exact = e.own >= 0 ? exact_own : exact_lent;
      const int64_t at = (e.own >= 0 ? e.own : e.slot) * each;
      for (int64_t row = 0; row < m; ++row)
        for (int64_t col = 0; col < n; ++col) {
          const auto i = static_cast<size_t>(at + row * ld + col);
          const double there = accumulate ? exact[i] : 0;
          exact[i] = e.first == e.last ? there : all[i];
          if (e.first == e.last) continue;
          expected.push_back(there +
                             dot(a, e.first * lda + row, lda, b, e.first * ldb + col, ldb, e.last - e.first));
          actual.push_back(all[i]);
        }
    }
    EXPECT_LT(relative_error(actual, expected), bound(out));
    const auto same = [](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); };
    EXPECT_TRUE(std::ranges::equal(actual_own, exact_own, same));
    EXPECT_TRUE(std::ranges::equal(actual_lent, exact_lent, same));
  }

  std::mt19937 random_{11};
};

TEST_P(GroupedMatmulTest, RandomRowsWithZerosAmongThem) {
  for (const bool transpose : {false, true}) {
    expect_multiplied(problem({0, 300, 1, 0, 129, 257, 64, 0}, 264, 328), transpose, false);
    expect_multiplied(problem({5, 0, 17, 128, 3}, 64, 72), transpose, false);
  }
}

TEST_P(GroupedMatmulTest, Biases) {
  expect_multiplied(problem({0, 300, 1, 0, 129, 257, 64}, 264, 136), true, true);
}

TEST_P(GroupedMatmulTest, OneHotExpertOthersWithout) {
  for (const bool transpose : {false, true})
    expect_multiplied(problem({0, 0, 0, 0, 777, 0, 0, 0}, 512, 256), transpose, transpose);
  expect_weight_gradients(problem({0, 0, 0, 0, 777, 0, 0, 0}, 264, 136), Type::bf16);
}

TEST_P(GroupedMatmulTest, NoRowsAtAll) {
  expect_multiplied(problem({0, 0, 0}, 64, 64), true, false);
  for (const Type out : {Type::bf16, Type::f32})
    for (const int64_t gap : {0, 16, 1}) {
      expect_weight_gradients(problem({0, 0, 0}, 64, 64), out, gap);
      expect_weight_gradients(problem({0, 0, 0, 0}, 21, 35), out, gap);
      expect_weight_gradients(problem({0, 0}, 1000, 520), out, gap);
    }
}

TEST_P(GroupedMatmulTest, ManyExpertsOfFewRows) {
  std::vector<int> counts(512);
  std::uniform_int_distribution<int> rows(0, 6);
  for (int& count : counts) count = rows(random_);
  expect_multiplied(problem(counts, 64, 64), true, false);
  expect_multiplied(problem(counts, 64, 64), false, false);
  expect_weight_gradients(problem(counts, 24, 40), Type::bf16);
  expect_weight_gradients(problem(std::vector<int>(512, 0), 24, 40), Type::bf16);
}

TEST_P(GroupedMatmulTest, WeightGradientsInBothTypes) {
  for (const Type out : {Type::bf16, Type::f32})
    for (const int64_t gap : {0, 8, 3})
      expect_weight_gradients(problem({0, 300, 1, 0, 129, 257, 64, 7, 0}, 264, 200), out, gap);
}

TEST_P(GroupedMatmulTest, ExpertsThatFillTheDeviceAmongOthers) {
  const Problem wide = problem({3, 700, 0, 129, 777}, 5632, 16);
  for (const bool transpose : {false, true}) expect_multiplied(wide, transpose, false);
  expect_multiplied(wide, true, true);
  for (const Type out : {Type::bf16, Type::f32})
    expect_weight_gradients(problem({500, 4100, 0, 5000, 9}, 48, 40), out);
}

// Their tiles go down the rows.
TEST_P(GroupedMatmulTest, WeightsThatTheL2DoesNotKeep) {
  expect_multiplied(problem({130, 0, 3}, 4608, 4608), true, false);
}

TEST_P(GroupedMatmulTest, WidthsOffTheBoundaryAndFp32) {
  expect_multiplied(problem({3, 20, 0, 9}, 21, 35), true, true);
  expect_multiplied(problem({3, 20, 0, 9}, 64, 40, Type::f32), true, true);
  expect_multiplied(problem({3, 20, 0, 9}, 64, 40, Type::f32), false, false);
  expect_weight_gradients(problem({3, 20, 0, 9}, 21, 35), Type::f32);
  expect_weight_gradients(problem({3, 20, 0, 9}, 64, 40, Type::f32), Type::f32);
}

// A kernel that is run first is loaded, and loading waits for all that the device has been given.
TEST_P(GroupedMatmulTest, PreparedProductsWaitForNoCopies) {
  constexpr int64_t kRows = 6000, kWide = 1536, kNarrow = 520, kBytes = int64_t{256} << 20;
  constexpr int kCopies = 60;  // 0.3 s
  GroupedMatmul grouped(GetParam());
  DeviceBytes workspace(grouped.workspace_bytes()), from(kBytes);
  const Values zeros(static_cast<size_t>(kRows * kWide), 0);
  const DeviceArray a(zeros, Type::bf16), c(zeros, Type::bf16), w(zeros, Type::bf16);
  const ExpertMatrices weights{w.get(), nullptr, kNarrow, 0, 0}, gradients{w.get(), nullptr, kWide, 0, 0};
  const ConstMatrix narrow{a.get(), Type::bf16, kRows, kNarrow, kNarrow};
  const Matrix wide{c.get(), Type::bf16, kRows, kWide, kWide};
  grouped.prepare_multiply(narrow, weights, true, {}, wide, workspace.get(), nullptr);
  grouped.prepare_weight_gradient(narrow, wide, gradients, Type::bf16, workspace.get(), nullptr);
  EXPECT_EQ(c.values(), zeros);
  void* to = nullptr;
  check(cudaMallocHost(&to, kBytes), "pinned memory");
  cudaStream_t copies = nullptr, products = nullptr;
  for (cudaStream_t* stream : {&copies, &products})
    check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "a stream");
  for (int i = 0; i < kCopies; ++i)
    check(cudaMemcpyAsync(to, from.get(), kBytes, cudaMemcpyDeviceToHost, copies), "a copy");
  for (int32_t rows = 1; rows < kRows; rows += rows / 3 + 1) {
    const ExpertGroup expert{0, rows, 0, -1};
    grouped.multiply({&expert, 1}, narrow, weights, true, {}, wide, workspace.get(), products);
    for (const ExpertGroup& one : {expert, ExpertGroup{0, 0, 0, -1}})
      for (const bool accumulate : {false, true})
        grouped.weight_gradient({&one, 1}, narrow, wide, gradients, Type::bf16, accumulate, workspace.get(),
                                products);
  }
  check(cudaStreamSynchronize(products), "products");
  EXPECT_EQ(cudaStreamQuery(copies), cudaErrorNotReady);
  check(cudaStreamSynchronize(copies), "copies");
  for (cudaStream_t stream : {copies, products}) cudaStreamDestroy(stream);
  cudaFreeHost(to);
}

TEST_P(GroupedMatmulTest, TooManyExpertsAreAnError) {
  GroupedMatmul grouped(GetParam());
  const Problem p = problem(std::vector<int>(GroupedMatmul::kMostGroups + 1, 1), 8, 8);
  DeviceBytes memory(1 << 20), workspace(grouped.workspace_bytes());
  EXPECT_THROW(grouped.multiply(p.experts, {memory.get(), Type::bf16, p.rows, 8, 8},
                                {memory.get(), memory.get(), 8, 64, 64}, true, {},
                                {memory.get(), Type::bf16, p.rows, 8, 8}, workspace.get(), nullptr),
               CudaError);
}

INSTANTIATE_TEST_SUITE_P(All, GroupedMatmulTest, testing::Bool(),
                         [](const auto& test) { return test.param ? "ByExpert" : "Grouped"; });

}  // namespace
}  // namespace mop::kernels
