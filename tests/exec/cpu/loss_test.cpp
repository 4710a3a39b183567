#include <algorithm>

#include "tests/error_of.h"
#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

// All of a vocabulary's logits, (rows, vocab), cut into blocks of columns; the last one is padded.
struct Problem {
  int64_t p, t, vocab, blocks, columns;
  Values logits, targets;
  int64_t rows() const { return p * t; }
  double logit(int64_t r, int64_t c) const { return logits[static_cast<size_t>(r * vocab + c)]; }
  int64_t target(int64_t r) const { return static_cast<int64_t>(targets[static_cast<size_t>(r)]); }
};

Problem any_problem(int64_t p, int64_t t, int64_t vocab, int64_t blocks, Type type, double scale = 3) {
  Problem problem{p, t, vocab, blocks, (vocab + blocks - 1) / blocks, normal(p * t * vocab, scale), {}};
  for (double& value : problem.logits) value = round_to(value, type);
  for (int64_t i = 0; i < p * t; ++i)
    problem.targets.push_back(uniform(0, 3) == 0 ? -100 : static_cast<double>(uniform(0, vocab - 1)));
  return problem;
}

Tensor block(const Problem& problem, int64_t b, Type type) {
  Values values;
  for (int64_t r = 0; r < problem.rows(); ++r) {
    for (int64_t c = b * problem.columns; c < (b + 1) * problem.columns; ++c)
      values.push_back(c < problem.vocab ? problem.logit(r, c) : 50);  // padding that would show
  }
  return Tensor::of(problem.rows(), problem.columns, values, type);
}

double log_sum(const Problem& problem, int64_t r) {
  double highest = -1e300, sum = 0;
  for (int64_t c = 0; c < problem.vocab; ++c) highest = std::max(highest, problem.logit(r, c));
  for (int64_t c = 0; c < problem.vocab; ++c) sum += std::exp(problem.logit(r, c) - highest);
  return highest + std::log(sum);
}

double losses(const Problem& problem, int64_t first, int64_t last) {
  double sum = 0;
  for (int64_t r = first; r < last; ++r)
    if (problem.target(r) != -100) sum += log_sum(problem, r) - problem.logit(r, problem.target(r));
  return sum;
}

Values gradient(const Problem& problem, int64_t b, double valid) {
  Values result;
  for (int64_t r = 0; r < problem.rows(); ++r) {
    const double all = log_sum(problem, r);
    for (int64_t c = b * problem.columns; c < (b + 1) * problem.columns; ++c) {
      const bool counts = problem.target(r) != -100 && c < problem.vocab;
      const double one_hot = c == problem.target(r) ? 1 : 0;
      result.push_back(counts ? (std::exp(problem.logit(r, c) - all) - one_hot) / valid : 0);
    }
  }
  return result;
}

Setting at(const Problem& problem, int index) {
  Setting setting;
  setting.model.vocab = problem.vocab;
  setting.index = index;
  setting.size = static_cast<int>(problem.blocks);
  return setting;
}

// Tokens move: every rank has its own block; statistics of all of them are merged in backward.
TEST(CrossEntropy, OwnBlocks) {
  for (const Type type : kReals) {
    for (const int64_t blocks : {1, 3, 4}) {
      const Problem problem = any_problem(blocks, 5, 1301, blocks, type);  // more than one piece of columns
      const double valid = 17;
      Tensor targets = Tensor::of(problem.p, problem.t, problem.targets, Type::i32);
      Values all_statistics;
      for (int64_t b = 0; b < blocks; ++b) {
        Tensor logits = block(problem, b, type), statistics(problem.rows(), 3);
        run_op(OpKind::cross_entropy, {}, {&logits, &targets}, {&statistics},
               at(problem, static_cast<int>(b)));
        const Values own = statistics.values();
        all_statistics.insert(all_statistics.end(), own.begin(), own.end());
      }
      Tensor gathered = Tensor::of(problem.rows(), 3, all_statistics, Type::f32, blocks);
      Tensor count = Tensor::of(1, 1, {valid}, Type::f64);
      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        Tensor logits = block(problem, b, type), loss = Tensor::of(1, 1, {10}, Type::f64);
        Does does;
        does.accumulate = true;
        does.c = 1;  // rows of this rank only
        does.b = static_cast<int32_t>(problem.t);
        run_op(OpKind::cross_entropy_bwd, does, {&logits, &gathered, &targets, &count}, {&logits, &loss},
               at(problem, static_cast<int>(b)));
        expect_close(logits, gradient(problem, b, valid), 1e-6);
        EXPECT_NEAR(loss.at(0), 10 + losses(problem, b * problem.t, (b + 1) * problem.t) / valid, 1e-5);
        total += loss.at(0) - 10;
      }
      EXPECT_NEAR(total, losses(problem, 0, problem.rows()) / valid, 1e-5);
    }
  }
}

// Weights move: one rank sees block after block, a step later each time, and merges the statistics as they
// come.
TEST(CrossEntropy, VisitingBlocks) {
  const int64_t blocks = 3;
  const Problem problem = any_problem(1, 6, 40, blocks, Type::f32);
  const int index = 1;
  Tensor targets = Tensor::of(1, problem.t, problem.targets, Type::i32), statistics(problem.rows(), 3),
         count = Tensor::of(1, 1, {5}, Type::f32);
  const auto visitor = [&](int32_t step) { return (index - step + blocks) % blocks; };
  for (int32_t step = 0; step < blocks; ++step) {
    Tensor logits = block(problem, visitor(step), Type::f32);
    Does does;
    does.a = step;
    does.accumulate = step > 0;
    run_op(OpKind::cross_entropy, does, {&logits, &targets}, {&statistics}, at(problem, index));
  }
  for (int64_t r = 0; r < problem.rows(); ++r) {
    EXPECT_NEAR(statistics.at(3 * r) + std::log(statistics.at(3 * r + 1)), log_sum(problem, r), 1e-5);
    if (problem.target(r) != -100) {
      EXPECT_NEAR(statistics.at(3 * r + 2), problem.logit(r, problem.target(r)), 1e-6);
    }
  }
  for (int32_t step = 0; step < blocks; ++step) {
    Tensor logits = block(problem, visitor(step), Type::f32), loss(1, 1);
    Does does;
    does.a = step;
    run_op(OpKind::cross_entropy_bwd, does, {&logits, &statistics, &targets, &count},
           {&logits, step == 0 ? &loss : nullptr}, at(problem, index));
    expect_close(logits, gradient(problem, visitor(step), 5), 1e-6);
    if (step == 0) {
      EXPECT_NEAR(loss.at(0), losses(problem, 0, problem.rows()) / 5, 1e-5);
    }
  }
}

TEST(CrossEntropy, IsStable) {
  const Problem problem = any_problem(1, 8, 30, 2, Type::f32, 1000);
  Tensor targets = Tensor::of(1, 8, problem.targets, Type::i32), count = Tensor::of(1, 1, {1});
  Values all;
  for (const int b : {0, 1}) {
    Tensor logits = block(problem, b, Type::f32), statistics(8, 3);
    run_op(OpKind::cross_entropy, {}, {&logits, &targets}, {&statistics}, at(problem, b));
    const Values own = statistics.values();
    all.insert(all.end(), own.begin(), own.end());
  }
  Tensor gathered = Tensor::of(8, 3, all, Type::f32, 2), loss(1, 1, Type::f64),
         logits = block(problem, 0, Type::f32);
  run_op(OpKind::cross_entropy_bwd, {}, {&logits, &gathered, &targets, &count}, {&logits, &loss},
         at(problem, 0));
  EXPECT_NEAR(loss.at(0), losses(problem, 0, 8), 1e-3);
  expect_close(logits, gradient(problem, 0, 1), 1e-4);
}

// Blocks may lie wholly beyond the vocabulary, and a step may have no target at all.
TEST(CrossEntropy, NothingToCount) {
  Problem problem = any_problem(1, 3, 4, 1, Type::f32);
  problem.targets = {-100, -100, -100};
  Tensor logits = Tensor::random(3, 4), targets = Tensor::of(1, 3, problem.targets, Type::i32),
         statistics(3, 3), count = Tensor::of(1, 1, {0}), loss(1, 1);
  Setting beyond = at(problem, 1);
  beyond.size = 2;
  run_op(OpKind::cross_entropy, {}, {&logits, &targets}, {&statistics}, beyond);
  for (int64_t r = 0; r < 3; ++r) EXPECT_EQ(statistics.at(3 * r + 1), 0);
  Does merge;
  merge.accumulate = true;
  run_op(OpKind::cross_entropy, merge, {&logits, &targets}, {&statistics}, at(problem, 0));
  for (int64_t r = 0; r < 3; ++r) EXPECT_GE(statistics.at(3 * r + 1), 1);
  run_op(OpKind::cross_entropy_bwd, {}, {&logits, &statistics, &targets, &count}, {&logits, &loss},
         at(problem, 0));
  EXPECT_EQ(logits.values(), Values(12));
  EXPECT_EQ(loss.at(0), 0);
}

TEST(CrossEntropy, NamesATargetBeyondTheVocabulary) {
  const Problem problem = any_problem(1, 3, 4, 1, Type::f32);
  Tensor logits = Tensor::random(3, 4), statistics(3, 3);
  for (const double bad : {4.0, -1.0}) {
    Tensor targets = Tensor::of(1, 3, {0, bad, 1}, Type::i32);
    const std::string message = error_of([&] {
      run_op(OpKind::cross_entropy, {}, {&logits, &targets}, {&statistics}, at(problem, 0));
    });
    EXPECT_NE(message.find("target " + std::to_string(static_cast<int>(bad)) + " at position 1"),
              std::string::npos)
        << message;
  }
}

}  // namespace
}  // namespace mop::cpu
