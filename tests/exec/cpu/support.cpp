#include "tests/exec/cpu/support.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "tests/exec/support/allocations.h"

namespace mop::cpu {
namespace {

constexpr std::byte kGap{0xA5};
int64_t last_allocations = 0;

void write(std::byte* to, double value, Type type) {
  const double rounded = round_to(value, type);
  switch (type) {
    case Type::bf16: {
      const auto bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(rounded)) >> 16);
      std::memcpy(to, &bits, 2);
      break;
    }
    case Type::f32: {
      const auto single = static_cast<float>(rounded);
      std::memcpy(to, &single, 4);
      break;
    }
    case Type::f64:
      std::memcpy(to, &rounded, 8);
      break;
    case Type::i32: {
      const auto whole = static_cast<int32_t>(value);
      std::memcpy(to, &whole, 4);
      break;
    }
  }
}

double read(const std::byte* from, Type type) {
  switch (type) {
    case Type::bf16: {
      uint16_t bits = 0;
      std::memcpy(&bits, from, 2);
      return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    }
    case Type::f32: {
      float value = 0;
      std::memcpy(&value, from, 4);
      return value;
    }
    case Type::f64: {
      double value = 0;
      std::memcpy(&value, from, 8);
      return value;
    }
    case Type::i32: {
      int32_t value = 0;
      std::memcpy(&value, from, 4);
      return value;
    }
  }
  return 0;
}

}  // namespace

double round_to(double value, Type type) {
  if (type == Type::f32) return static_cast<float>(value);
  if (type != Type::bf16 || value == 0 || !std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);  // in [0.5, 1) x 2^exponent: 8 bits of mantissa
  const double unit = std::ldexp(1.0, exponent - 8);
  return std::nearbyint(value / unit) * unit;
}

Tensor::Tensor(const program::View& view, int64_t first) : view_(view) {
  const int64_t end = first + (view.count - 1) * view.stride + (view.rows - 1) * view.ld + view.cols;
  memory_.assign(static_cast<size_t>((end + 3) * program::size_of(view.type)), kGap);
  view_.offset = first * program::size_of(view.type);
}

Tensor::Tensor(int64_t rows, int64_t cols, Type type, int64_t count)
    : Tensor(
          [&] {
            program::View v{0, 0, rows, cols, cols + (rows > 1 ? uniform(0, 3) : 0), count, 0, type};
            v.stride = rows * v.ld + uniform(0, 5);
            return v;
          }(),
          uniform(0, 4)) {}

Tensor Tensor::of(int64_t rows, int64_t cols, const Values& values, Type type, int64_t count) {
  Tensor tensor(rows, cols, type, count);
  tensor.set(values);
  return tensor;
}

Tensor Tensor::contiguous(int64_t rows, int64_t cols, const Values& values, Type type) {
  Tensor tensor(program::View{0, 0, rows, cols, cols, 1, rows * cols, type}, 0);
  tensor.set(values);
  return tensor;
}

int64_t Tensor::position(int64_t i) const {
  const int64_t col = i % view_.cols, row = i / view_.cols % view_.rows,
                matrix = i / (view_.cols * view_.rows);
  return view_.offset + (matrix * view_.stride + row * view_.ld + col) * program::size_of(view_.type);
}

double Tensor::at(int64_t i) const {
  return read(memory_.data() + position(i), view_.type);
}

Values Tensor::values() const {
  Values result;
  for (int64_t i = 0; i < size(); ++i) result.push_back(at(i));
  return result;
}

void Tensor::set(const Values& values) {
  ASSERT_EQ(std::ssize(values), size());
  for (int64_t i = 0; i < size(); ++i)
    write(memory_.data() + position(i), values[static_cast<size_t>(i)], view_.type);
}

Operand Tensor::operand() {
  if (memory_.empty()) return {};
  return {memory_.data() + view_.offset, view_};
}

bool Tensor::gaps_intact() const {
  std::vector<std::byte> copy = memory_;
  for (int64_t i = 0; i < size(); ++i)
    std::fill_n(copy.begin() + position(i), program::size_of(view_.type), kGap);
  return std::all_of(copy.begin(), copy.end(), [](std::byte b) { return b == kGap; });
}

void run_op(OpKind kind, const Does& does, std::vector<Tensor*> in, std::vector<Tensor*> out,
            const Setting& setting) {
  program::StepProgram program;
  program::Op op{};
  op.kind = kind;
  op.layer = setting.layer;
  op.does = does;
  program.shapes.push_back(setting.shape);
  std::vector<Operand> reads, writes;
  std::vector<Values> before;
  for (Tensor* tensor : in) {
    reads.push_back(tensor == nullptr ? Operand{} : tensor->operand());
    before.push_back(tensor == nullptr ? Values{} : tensor->values());
    program.uses.push_back({0, false, reads.back().view});
  }
  for (Tensor* tensor : out) {
    writes.push_back(tensor == nullptr ? Operand{} : tensor->operand());
    program.uses.push_back({0, true, writes.back().view});
  }
  op.use_count = static_cast<uint32_t>(program.uses.size());
  program.ops.push_back(op);

  const Constants constants{setting.model, setting.rope, setting.least_loaded, setting.round_rows,
                            setting.spill_slots};
  Workspace workspace(workspace_bytes(program));
  const Call call{0, &op, reads, writes, setting.index, setting.size, setting.round};
  const int64_t allocations = test::allocations_of_thread();
  run(call, constants, setting.step, workspace);
  last_allocations = test::allocations_of_thread() - allocations;

  for (size_t i = 0; i < in.size(); ++i) {
    if (in[i] == nullptr) continue;
    EXPECT_TRUE(in[i]->gaps_intact()) << name(kind) << ": gaps of operand " << i;
    if (std::find(out.begin(), out.end(), in[i]) == out.end()) {
      EXPECT_EQ(in[i]->values(), before[i]) << name(kind) << ": operand " << i << " was only to be read";
    }
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != nullptr) {
      EXPECT_TRUE(out[i]->gaps_intact()) << name(kind) << ": gaps of output " << i;
    }
  }
  EXPECT_EQ(last_allocations, 0) << name(kind) << " allocates";
}

int64_t allocations_of_last_run() {
  return last_allocations;
}

void expect_close(const Tensor& got, const Values& want, double tolerance) {
  ASSERT_EQ(got.size(), std::ssize(want));
  double scale = 1;
  for (const double value : want) scale = std::max(scale, std::abs(value));
  for (int64_t i = 0; i < got.size(); ++i) {
    const double expected = want[static_cast<size_t>(i)];
    const double allowed =
        tolerance * scale + (got.view().type == Type::bf16 ? std::ldexp(std::abs(expected), -8) : 0);
    const double value = got.at(i);
    ASSERT_TRUE(std::abs(value - expected) <= allowed)
        << "element " << i << " is " << value << ", wanted " << expected << " within " << allowed;
  }
}

Values numeric_gradient(const std::function<double(const Values&)>& f, const Values& x, double h) {
  Values result, moved = x;
  for (size_t i = 0; i < x.size(); ++i) {
    moved[i] = x[i] + h;
    const double above = f(moved);
    moved[i] = x[i] - h;
    result.push_back((above - f(moved)) / (2 * h));
    moved[i] = x[i];
  }
  return result;
}

}  // namespace mop::cpu
