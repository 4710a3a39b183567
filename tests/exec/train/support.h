// Helpers of the training tests: data in memory, a job and its trainer, comparisons of parameters.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "exec/train/trainer.h"
#include "tests/plan_text.h"

namespace mop::train::testing {

// Sequences of pseudo-random tokens with documents inside, and targets that do not count.
class RandomSequences final : public data::Sequences {
 public:
  RandomSequences(int64_t context, int64_t vocab) : context_(context), vocab_(vocab) {}
  int64_t context() const override { return context_; }
  int64_t at(data::Position p) const override { return p.sequence; }
  data::Position advance(data::Position p, int64_t n) const override { return {p.epoch, p.sequence + n}; }
  void rows(int64_t sequence, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
            std::span<int32_t> positions) const override {
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t row = first + static_cast<int64_t>(i);
      ids[i] = token(sequence, row);
      const bool last = row + 1 < context_ && start(sequence, row + 1) == row + 1;
      targets[i] = last || row % 11 == 5 ? -100 : token(sequence, row + 1);
      positions[i] = static_cast<int32_t>(row - start(sequence, row));
    }
  }
  void starts(int64_t sequence, std::span<int32_t> starts) const override {
    for (size_t i = 0; i < starts.size(); ++i)
      starts[i] = static_cast<int32_t>(start(sequence, static_cast<int64_t>(i)));
  }

 private:
  // Frequent and rare tokens, as in text.
  int32_t token(int64_t sequence, int64_t row) const {
    uint64_t h = static_cast<uint64_t>(sequence * 1000003 + row) * 0x9E3779B97F4A7C15ULL;
    h ^= h >> 31;
    h *= 0xBF58476D1CE4E5B9ULL;
    const double u = static_cast<double>(h >> 40) / static_cast<double>(1 << 24);
    return static_cast<int32_t>(u * u * static_cast<double>(vocab_));
  }
  int64_t start(int64_t sequence, int64_t row) const {
    const int64_t cut = context_ / 2 + sequence % 7;  // every other sequence holds two documents
    return sequence % 2 == 1 && row >= cut ? cut : 0;
  }
  int64_t context_, vocab_;
};

// The same sequence for ever: something to learn by heart.
class OneSequence final : public data::Sequences {
 public:
  OneSequence(int64_t context, int64_t vocab) : inner_(context, vocab) {}
  int64_t context() const override { return inner_.context(); }
  int64_t at(data::Position) const override { return 0; }
  data::Position advance(data::Position p, int64_t n) const override { return {p.epoch, p.sequence + n}; }
  void rows(int64_t, int64_t first, std::span<int32_t> ids, std::span<int32_t> targets,
            std::span<int32_t> positions) const override {
    inner_.rows(0, first, ids, targets, positions);
  }
  void starts(int64_t, std::span<int32_t> starts) const override { inner_.starts(0, starts); }

 private:
  RandomSequences inner_;
};

struct Trial {
  std::string model = "tiny-qwen3-moe", plan = "fsdp2:runtime=native";
  int64_t ranks = 1, sequences = 1, accumulate = 1, context = 32;
  plan::Precision precision = plan::Precision::fp32;
  bool balance_loss = false;
  std::string text() const {
    return model + " " + plan + " on " + std::to_string(ranks) + ", " + std::to_string(sequences) + " x " +
           std::to_string(accumulate);
  }
  Job job() const {
    Job j;
    j.model = model::read_config(model);
    j.plan = plan::parse_plan(plan);
    j.ranks = ranks;
    j.workload.context = context;
    j.workload.sequences = sequences;
    j.workload.accumulate = accumulate;
    j.workload.precision = precision;
    j.workload.balance_loss = balance_loss;
    return j;
  }
};

inline TrainerOptions options(double rate = 1e-3, double eps = 1e-8) {
  TrainerOptions o;
  o.hyper.schedule.peak = rate;
  o.hyper.schedule.decay = Decay::constant;
  o.hyper.schedule.steps = 1000;
  o.hyper.eps = eps;
  return o;
}

using Parameters = std::vector<std::vector<float>>;  // in the order of model::parameters

inline Parameters read_all(const Trainer& trainer, const model::ModelConfig& model, What what) {
  Parameters all;
  for (const model::ParameterId id : model::parameters(model)) {
    const model::MatrixShape shape = model::shape(model, id);
    std::vector<float>& values = all.emplace_back(static_cast<size_t>(shape.rows * shape.cols));
    const bool fixed = id.role == model::Role::correction_bias;
    if (!fixed || what == What::weights) trainer.shards().read(id, what, values.data());
  }
  return all;
}

// |a - b| / |b|, 2-norms.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

// The largest distance of any parameter, and whose it is.
inline double farthest(const model::ModelConfig& model, const Parameters& a, const Parameters& b,
                       std::string* where) {
  const std::vector<model::ParameterId> ids = model::parameters(model);
  double most = 0;
  for (size_t i = 0; i < ids.size(); ++i)
    if (const double d = distance(a[i], b[i]); !(d <= most)) {
      most = d;
      *where = std::string(model::name(ids[i].role)) + " of layer " + std::to_string(ids[i].layer) +
               ", expert " + std::to_string(ids[i].expert);
    }
  return most;
}

// Weights with one value that is not a number.
class Poisoned final : public weights::Source {
 public:
  Poisoned(const model::ModelConfig& model, model::ParameterId where) : inner_(model, 3), where_(where) {}
  void read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
            int64_t ld) const override {
    inner_.read(id, row, col, rows, cols, out, ld);
    if (id == where_ && row <= 1 && row + rows > 1 && col <= 1 && col + cols > 1)
      out[(1 - row) * ld + 1 - col] = std::numeric_limits<float>::quiet_NaN();
  }

 private:
  weights::RandomSource inner_;
  model::ParameterId where_;
};

}  // namespace mop::train::testing
