#include "kernels/grouped_sm90.cuh"

namespace mop::kernels {

void grouped_weight_gradient_bf16(const GroupedProblem& problem, bool few_rows, cudaStream_t stream) {
  using sm90::Adds, sm90::Element, sm90::Grouped;
  if (few_rows) return Grouped<Element, true, false, Adds::output, sm90::ShortProducts>::run(problem, stream);
  Grouped<Element, true, false, Adds::output, sm90::LongProducts>::run(problem, stream);
}

}  // namespace mop::kernels
