#include "kernels/grouped_sm90.cuh"

namespace mop::kernels {

void grouped_weight_gradient_f32(const GroupedProblem& problem, bool few_rows, cudaStream_t stream) {
  using sm90::Adds, sm90::Grouped;
  if (few_rows) return Grouped<float, true, false, Adds::output, sm90::ShortProducts>::run(problem, stream);
  Grouped<float, true, false, Adds::output, sm90::LongProducts>::run(problem, stream);
}

}  // namespace mop::kernels
