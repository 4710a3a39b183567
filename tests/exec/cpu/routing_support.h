// Tensors of tests, and groups of ranks as threads.
#pragma once
#include <algorithm>
#include <barrier>
#include <cstddef>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "exec/cpu/kernels.h"
#include "exec/cpu/tensor.h"
#include "exec/cpu/workspace.h"

namespace mop::cpu::test {

using program::OpKind;
using program::Type;

// An operand with its memory; elements by their place in the order of the view.
class Tensor {
 public:
  Tensor() = default;
  // `gap`: elements between rows, and between matrices, that belong to nobody.
  Tensor(Type type, int64_t rows, int64_t cols, int64_t count = 1, int64_t gap = 0) {
    view_.type = type;
    view_.rows = rows, view_.cols = cols, view_.ld = cols + gap;
    view_.count = count, view_.stride = rows * view_.ld + gap;
    const size_t bytes = static_cast<size_t>(count * view_.stride * program::size_of(type));
    memory_ = std::make_unique<int64_t[]>(bytes / sizeof(int64_t) + 1);
  }
  Operand operand() const { return {reinterpret_cast<std::byte*>(memory_.get()), view_}; }
  int64_t elements() const { return view_.elements(); }

  double at(int64_t i) const {
    double value = 0;
    convert(element(i), wide(value));
    return value;
  }
  double at(int64_t row, int64_t col) const { return at(row * view_.cols + col); }
  void set(int64_t i, double value) { convert(wide(value), element(i)); }
  void set(int64_t row, int64_t col, double value) { set(row * view_.cols + col, value); }
  void fill(double value) {
    for (int64_t i = 0; i < elements(); ++i) set(i, value);
  }
  template <class Random>
  void randomise(Random& random) {
    std::uniform_real_distribution<double> values(-1, 1);
    for (int64_t i = 0; i < elements(); ++i) set(i, values(random));
  }

 private:
  static Run wide(double& value) { return {reinterpret_cast<std::byte*>(&value), 1, Type::f64}; }
  Run element(int64_t i) const { return row(operand(), i / view_.cols).part(i % view_.cols, 1); }

  program::View view_;
  std::unique_ptr<int64_t[]> memory_;
};

// A call and what it points to.
class TestCall {
 public:
  TestCall(OpKind kind, program::Does does, std::vector<Operand> in, std::vector<Operand> out, int index = 0,
           int size = 1, int64_t round = 0)
      : in_(std::move(in)), out_(std::move(out)) {
    op_.kind = kind;
    op_.does = does;
    call_ = {0, &op_, in_, out_, index, size, round};
  }
  TestCall(const TestCall&) = delete;
  TestCall& operator=(const TestCall&) = delete;
  const Call& get() const { return call_; }

 private:
  program::Op op_{};
  std::vector<Operand> in_, out_;
  Call call_;
};

// A communicator of threads.
class Group {
 public:
  explicit Group(int size) : calls_(static_cast<size_t>(size)), barrier_(size) {}

  // body(rank) on a thread of its own each.
  void run(const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (size_t r = 0; r < calls_.size(); ++r) threads.emplace_back(body, static_cast<int>(r));
    for (std::thread& thread : threads) thread.join();
  }

  // Called by every rank.
  void collective(const Call& call, Workspace& workspace) {
    calls_[static_cast<size_t>(call.index)] = &call;
    barrier_.arrive_and_wait();
    Seat seat(*this);
    run_collective(call, seat, workspace);
  }
  void collective(const TestCall& call, Workspace& workspace) { collective(call.get(), workspace); }

 private:
  struct Seat final : Meeting {
    explicit Seat(Group& g) : group(g) {}
    std::span<const Call* const> calls() const override { return group.calls_; }
    void barrier() override { group.barrier_.arrive_and_wait(); }
    Group& group;
  };
  std::vector<const Call*> calls_;
  std::barrier<> barrier_;
};

}  // namespace mop::cpu::test
