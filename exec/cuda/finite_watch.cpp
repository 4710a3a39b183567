#include "exec/cuda/finite_watch.h"

#include <cmath>

#include "exec/cuda/operands.h"
#include "exec/interpreter/interpreter.h"
#include "kernels/check.h"
#include "kernels/elementwise.h"

namespace mop::cuda {

using interpreter::Launch;
using kernels::check;
using program::Type;

FiniteWatch::FiniteWatch(const program::StepProgram& program, int rank)
    : program_(program),
      rank_(rank),
      room_(interpreter::most_launches(program)),
      sums_(device_bytes(static_cast<int64_t>(room_ * sizeof(double)), "sums of what operations wrote")) {}

void FiniteWatch::after(const Launch& launch, std::byte* scratch, cudaStream_t stream) {
  const interpreter::Call& call = launch.call;
  const auto uses = program_.operands(*call.op).last(call.out.size());
  for (size_t o = 0; o < call.out.size() && watched_.size() < room_; ++o) {
    const Operand& out = call.out[o];
    if (!interpreter::tells(program_, launch, o) ||
        (out.view.type != Type::bf16 && out.view.type != Type::f32) ||
        program_.buffers[uses[o].buffer].space == program::Space::host)
      continue;
    auto* const sum = reinterpret_cast<double*>(sums_.get()) + watched_.size();
    for (int64_t i = 0; i < out.view.count; ++i) {
      Operand one = out;
      one.data += i * out.view.stride * program::size_of(out.view.type);
      one.view.count = 1;
      kernels::square_sum({matrix(one), 1, sum, i > 0, reinterpret_cast<double*>(scratch)}, stream);
    }
    watched_.push_back(interpreter::not_finite(program_, rank_, launch, o));
  }
}

void FiniteWatch::look() {
  std::vector<double> sums(watched_.size());
  check(cudaMemcpy(sums.data(), sums_.get(), sums.size() * sizeof(double), cudaMemcpyDeviceToHost),
        "sums of what operations wrote");
  for (size_t i = 0; i < sums.size(); ++i)
    if (!std::isfinite(sums[i]) && (!first_ || watched_[i].issue < first_->issue)) first_ = watched_[i];
  watched_.clear();
}

}  // namespace mop::cuda
