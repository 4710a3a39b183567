#include <algorithm>

#include "exec/cpu/operations.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {

void next_batch(const Call& call, const interpreter::Step& step) {
  ensure(step.data != nullptr, "a step has data");
  const std::span<int32_t> targets = integers(required(call.out, 1));
  step.data->fill(call.op->does.a, {integers(required(call.out, 0)), targets, integers(required(call.out, 2)),
                                    integers(required(call.out, 3))});
  const auto none = std::count(targets.begin(), targets.end(), kNoTarget);
  set_scalar(required(call.out, 4), static_cast<double>(std::ssize(targets) - none),
             call.op->does.accumulate);
}

}  // namespace mop::cpu
