// The families of benchmarks, one a file. Collective over the ranks of the run; what does not fit into a
// family's time is left out (Bench::more).
#pragma once
#include "exec/calibrate/bench.h"

namespace mop::calibrate {

void memory(Bench& bench);  // the first: it sees libraries and communicators come
void memory_of_network(Bench& bench);
void matmul(Bench& bench);
void grouped(Bench& bench);
void attention(Bench& bench);
void kernels_of_memory(Bench& bench);
void launches(Bench& bench);
void host_adam(Bench& bench);
void collectives(Bench& bench, bool emulated);
void copy_engines(Bench& bench);
void host_copies(Bench& bench);
void interference(Bench& bench);
void power(Bench& bench);

// Shared by families.
enum class Collective { all_gather, reduce_scatter, all_reduce, all_to_all, send };
const char* name(Collective collective);
// By NCCL among `size` neighbours, `bytes` of the full buffer: of everyone's, for all-to-all of each rank's
// own, and what each of the first half sends to one of the second.
Work by_nccl(Bench& bench, Collective collective, int size, int64_t bytes);
// Among all of `comm`, from `in` to `out`, each of `bytes`.
Work by_nccl(ncclComm_t comm, Collective collective, std::byte* in, std::byte* out, int64_t bytes);
Work by_copy_engines(Bench& bench, Collective collective, int size,
                     int64_t bytes);  // all_gather, reduce_scatter
// Of `shape`, on memory that it takes.
Work dense_product(Bench& bench, int64_t m, int64_t n, int64_t k, bool gradient);
enum class OfExperts { forward, gradient, added_gradient };
Work experts_product(Bench& bench, int experts, int64_t k, int64_t n, int64_t rows,
                     OfExperts what = OfExperts::forward);
kernels::AttentionShape attention_shape(int64_t width, int64_t value_width, int64_t parallel, int64_t context,
                                        int64_t window);
struct AttentionWork {
  Work forward, backward;  // backward: on what forward left
};
// Errors: kernels::CudaError for a shape that cuDNN has no kernel for.
AttentionWork attention_work(Bench& bench, const kernels::AttentionShape& shape);

}  // namespace mop::calibrate
