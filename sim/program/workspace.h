// HBM that operations of a program that runs need beside their operands. A stream has one workspace, as large
// as the largest need of its operations.
#pragma once
#include <cstdint>
#include <functional>

#include "sim/program/program.h"

namespace mop::program {

inline constexpr int64_t kProductWorkspace = int64_t{32} << 20;  // of cuBLASLt and the grouped kernels

// What an all_to_all packs before it sends, or unpacks after it has received: bytes, each matrix on a
// boundary of 256.
int64_t exchange_workspace(const StepProgram& program, const Op& op);

// Where NCCL leaves a reduce_scatter's sum that has yet to be converted or added.
int64_t reduction_workspace(const StepProgram& program, const Op& op);

// Of all streams on a GPU: the two above; what cuDNN's attention backward takes (queries' gradients and a sum
// a row in fp32, with grouped queries also bf16 gradients of keys and values; to the MiB what 21 runs of four
// models took, reports/executor-h200x4.md); cuBLASLt's. Kernels of ours that need less are left out. copied:
// whether NCCL is left out of an operation.
int64_t workspace_bytes(const StepProgram& program, const std::function<bool(const Op&)>& copied);

}  // namespace mop::program
