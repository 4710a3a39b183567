// A grouped product as its kernels get it: arrays on the device with an entry a group, of which there is one
// for each expert that has rows.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace mop::kernels {

struct GroupedArrays {
  struct Shape {
    int m, n, k;
  };
  Shape* shapes;
  const void **a, **b, **bias;
  void** c;
  int64_t *a_stride, *b_stride, *c_stride;  // elements between rows
};

struct GroupedProblem {
  static constexpr size_t kScratchBytes = size_t{1} << 20;  // for the tensor maps of every multiprocessor

  int groups;
  GroupedArrays arrays;
  bool bias;
  int processors;
  void* scratch;
  bool adds = false;       // to C; only weight gradients do
  bool down_rows = false;  // the order of an expert's tiles: down its rows, else along its columns
};

// The instances, all of bf16 operands. few_rows: with the tiles for experts of few rows.
// C = A W^T + bias
void grouped_forward(const GroupedProblem& problem, bool few_rows, cudaStream_t stream);
// C = A W
void grouped_data_gradient(const GroupedProblem& problem, bool few_rows, cudaStream_t stream);
// C = A^T B, or C += A^T B
void grouped_weight_gradient_bf16(const GroupedProblem& problem, bool few_rows, cudaStream_t stream);
void grouped_weight_gradient_f32(const GroupedProblem& problem, bool few_rows, cudaStream_t stream);

}  // namespace mop::kernels
