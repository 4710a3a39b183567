// Small programs with random operands that the CPU and a GPU run alike, each operation through the
// interpreter as in a training step: what one leaves has to be what the other leaves.
#pragma once
#include <array>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <ostream>
#include <random>
#include <vector>

#include "exec/interpreter/step.h"
#include "sim/model/config.h"
#include "sim/model/rope.h"
#include "sim/plan/rounds.h"
#include "sim/program/native/views.h"

namespace mop::cuda::testing {

using program::Does;
using program::Operand;
using program::OpKind;
using program::Space;
using program::Stream;
using program::Type;
using Values = std::vector<double>;  // NaN: what nobody wrote

// How far apart two backends may be. Whole numbers are the same.
struct Tolerance {
  // Of an element, or of the root mean square of all where that is more. Of fp32 numbers and sums in fp32
  // that differ in their order: 2^-24 grows with the square root of the terms, which are at most some
  // thousand here.
  double noise = 2e-5;
  double ulps = 1;   // of a bf16 element: both round the same number, which may lie beside the middle of two
  double norm = 0;   // |difference| / |expected|, all elements; 0: not looked at
  double floor = 0;  // of an element, whatever its size
  static constexpr Tolerance exact() { return {0, 0, 0, 0}; }
};
// Sums that are rounded to bf16 `times` on the way: by a library that adds parts, or round by round. Each
// costs a unit of what is typical, 2^-8.
constexpr Tolerance rounded(int times) {
  return {.noise = times * 4e-3};
}

struct Layout {
  int64_t count = 1;
  bool dense = false;  // rows and matrices follow one another
  int64_t ld = 0;      // 0: any
  double scale = 1;    // of random values
  Space space = Space::hbm;
};

class Sample final : public interpreter::BatchSource {
 public:
  // Twelve seeds: sizes and addresses that allow wide accesses, the same with gaps between rows, and odd
  // ones; bf16 and fp32; twice each with other choices.
  static constexpr int kSeeds = 12;
  explicit Sample(int seed);

  // ---- choices
  int64_t number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  int64_t size(int64_t least, int64_t most);  // a multiple of 8 where accesses are to be wide
  bool coin() { return number(0, 1) == 1; }
  template <class T>
  T one_of(std::initializer_list<T> all) {
    return *(all.begin() + number(0, static_cast<int64_t>(all.size()) - 1));
  }
  Type real() const { return real_; }  // the compute type
  Type real_or_f32() { return coin() ? real_ : Type::f32; }
  void aligned() { odd_ = false; }
  void narrow() { real_ = Type::bf16; }
  Values normal_values(int64_t n, double scale = 1);
  Values whole_values(int64_t n, int64_t least, int64_t most);

  // ---- operands, each in a buffer of its own
  Operand of(Type type, int64_t rows, int64_t cols, Values values, Layout layout = {});
  Operand normal(Type type, int64_t rows, int64_t cols, Layout layout = {}) {
    return of(type, rows, cols, normal_values(rows * cols * layout.count, layout.scale), layout);
  }
  // What the operations are to write: full of NaN.
  Operand blank(Type type, int64_t rows, int64_t cols, Layout layout = {}) {
    return of(type, rows, cols, Values(static_cast<size_t>(rows * cols * layout.count), std::nan("")),
              layout);
  }
  // What they add to if `accumulate`.
  Operand target(bool accumulate, Type type, int64_t rows, int64_t cols, Layout layout = {}) {
    return accumulate ? normal(type, rows, cols, layout) : blank(type, rows, cols, layout);
  }
  Operand whole(int64_t rows, int64_t cols, Values values) {
    return of(Type::i32, rows, cols, std::move(values), {.dense = true});
  }
  Operand number_of(Type type, double value) { return of(type, 1, 1, {value}, {.dense = true}); }

  void expect(const Operand& output, Tolerance tolerance);
  void opaque(const Operand& output);  // the backends' own business
  // A GPU's attention without documents has its logarithms as (batch, heads, context).
  void heads_first(const Operand& lse, int64_t context);

  // ---- operations
  void group(int64_t ranks, int rank);  // of the operations that follow; rank: of this one
  program::OpId op(OpKind kind, Does does, std::vector<Operand> reads, std::vector<Operand> writes,
                   Stream stream = Stream::compute, program::Shape shape = {});
  template <class Body>
  void repeat(program::OpId plan, Body body) {
    builder_.begin_repeat(0, plan);
    body();
    builder_.end_repeat();
  }
  void finish();

  // ---- what the operations know beside their operands
  model::ModelConfig model;
  model::Rope rope;
  plan::LeastLoadedOptions least_loaded;
  int64_t round_rows = 1;
  int spill_slots = 1;
  interpreter::Step step;
  std::vector<std::array<std::vector<int32_t>, 4>>
      batches;  // by micro-batch: ids, targets, positions, starts
  void fill(int64_t micro, const interpreter::Batch& batch) override;

  bool widens = true;       // what is bf16 may be fp32
  bool fixed_order = true;  // two runs give the same bits

  // ---- for those who run it
  struct Tensor {
    Operand operand;
    Values values;
    Tolerance tolerance;
    bool written = false, opaque = false;
    int64_t context = 0;  // above 0: heads_first
  };
  const program::StepProgram& program() const { return program_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }  // by buffer
  int rank() const { return rank_; }

 private:
  std::mt19937_64 random_;
  bool odd_ = false, gaps_ = false;
  Type real_ = Type::bf16;
  int rank_ = 0;
  uint16_t group_ = program::kNoGroup;
  program::Builder builder_;
  program::StepProgram program_;
  std::vector<Tensor> tensors_;
};

using Outcome = std::vector<Values>;  // by tensor

// Failures of the test: whatever has changed beside what the operations write. wide: in fp32 what is bf16.
Outcome run_on_cpu(Sample& sample, bool wide = false);
Outcome run_on_gpu(Sample& sample);

// more_ulps: of bf16 elements, beyond the sample's tolerances.
void expect_alike(const Sample& sample, const Outcome& expected, const Outcome& actual, double more_ulps = 0);

// Routed copies of one rank of a group, and the rounds that they move in.
struct Routed {
  int64_t ranks = 1, experts = 1, tokens = 1, k = 1;
  Operand order, rounds;
  program::OpId plan = 0;
  int64_t capacity = 1;            // rows of a round's buffers
  int64_t sent = 0, computed = 0;  // most rows in any round
  int times = 0;                   // rounds
  int64_t own() const { return experts / ranks; }
};
// one_round: for what works in place.
Routed route(Sample& sample, bool one_round = false);

struct Case {
  const char* name;
  void (*build)(Sample&);
  int seeds = Sample::kSeeds;
};
inline void PrintTo(const Case& one, std::ostream* to) {
  *to << one.name;
}
const std::vector<Case>& cases();

}  // namespace mop::cuda::testing
