#include "kernels/grouped_sm90.cuh"

namespace mop::kernels {

void grouped_forward(const GroupedProblem& problem, bool few_rows, cudaStream_t stream) {
  using sm90::Adds, sm90::Element, sm90::Grouped;
  if (few_rows) return Grouped<Element, false, true, Adds::bias, sm90::FewRows>::run(problem, stream);
  Grouped<Element, false, true, Adds::bias, sm90::ManyRows>::run(problem, stream);
}

}  // namespace mop::kernels
