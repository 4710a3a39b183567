// The first operation of a GPU rank that made a number that is not finite: behind each a kernel reads what it
// wrote.
#pragma once
#include <cuda_runtime_api.h>

#include <optional>
#include <vector>

#include "exec/cuda/memory.h"
#include "exec/interpreter/checks.h"

namespace mop::cuda {

class FiniteWatch {
 public:
  FiniteWatch(const program::StepProgram& program, int rank);

  // Behind the operation on its stream. scratch: kernels::kSquareSumScratch bytes that nothing else uses
  // meanwhile.
  void after(const interpreter::Launch& launch, std::byte* scratch, cudaStream_t stream);
  // When all that was launched has ended.
  void look();

  const std::optional<interpreter::NotFinite>& first() const { return first_; }

 private:
  const program::StepProgram& program_;
  const int rank_;
  size_t room_;
  DeviceBytes sums_;                             // of squares, fp64: finite if all numbers are
  std::vector<interpreter::NotFinite> watched_;  // by sum
  std::optional<interpreter::NotFinite> first_;
};

}  // namespace mop::cuda
