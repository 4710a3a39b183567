#include <fmt/core.h>

#include <cmath>

#include "exec/cpu/operations.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {
namespace {

// One AdamW step's constants.
class Update {
 public:
  explicit Update(const interpreter::AdamW& adam, double factor)
      : factor_(factor),
        beta1_(adam.beta1),
        beta2_(adam.beta2),
        keep_(1 - adam.learning_rate * adam.weight_decay),
        step_size_(adam.learning_rate / (1 - std::pow(adam.beta1, static_cast<double>(adam.step)))),
        inverse_root_(1 / std::sqrt(1 - std::pow(adam.beta2, static_cast<double>(adam.step)))),
        eps_(adam.eps) {}

  void apply(float& weight, float& m, float& v, float raw_gradient) const {
    const double gradient = raw_gradient * factor_;
    m = static_cast<float>(beta1_ * m + (1 - beta1_) * gradient);
    v = static_cast<float>(beta2_ * v + (1 - beta2_) * gradient * gradient);
    weight = static_cast<float>(weight * keep_ - step_size_ * m / (std::sqrt(v) * inverse_root_ + eps_));
  }

 private:
  double factor_, beta1_, beta2_, keep_, step_size_, inverse_root_, eps_;
};

}  // namespace

void clip_factor(const Call& call, const interpreter::Step& step) {
  const double norm = std::sqrt(scalar(required(call.in, 0)));
  if (!std::isfinite(norm)) {
    throw UserError(
        fmt::format("the gradient norm of step {} is {}: lower the learning rate, or continue from "
                    "an earlier checkpoint",
                    step.number + 1, norm));
  }
  set_scalar(required(call.out, 0), std::min(1.0, step.max_norm / (norm + 1e-6)));
}

void adam(const Call& call, const interpreter::Step& step) {
  const program::Does& does = call.op->does;
  const Operand factor = optional(call.in, 0);
  const Operand& states_operand = required(call.in, 1);
  const Operand& states_out = required(call.out, 0);
  const bool master = does.b == 0;
  const int64_t bucket = does.a, parts = master ? 3 : 2, elements = states_operand.view.elements();
  ensure(states_out.data == states_operand.data && states_operand.view.type == Type::f32 &&
             (states_operand.view.rows == 1 || states_operand.view.ld == states_operand.view.cols) &&
             states_operand.view.count == 1,
         "optimizer states are contiguous fp32, updated in place");
  ensure(bucket > 0 && elements % (bucket * parts) == 0, "optimizer states are whole blocks");
  ensure(call.in.size() == call.out.size() + 1, "gradients and weights come in pairs");

  const Update update(does.deferred ? step.deferred : step.adam, factor ? scalar(factor) : 1.0);
  auto* const states = reinterpret_cast<float*>(states_operand.data);
  int64_t element = 0;  // of the states
  Piece gradients, weights;
  for (size_t pair = 0; pair + 1 < call.out.size(); ++pair) {
    const Operand &gradient = required(call.in, 2 + pair), &weight = required(call.out, 1 + pair);
    ensure(master || weight.view.type == Type::f32, "weights that are their own master are fp32");
    ensure(element + weight.view.elements() <= elements / parts, "every element has optimizer states");
    for_each_piece(
        [&](const Run& from, const Run& to) {
          load(from, gradients.data());
          if (!master) load(to, weights.data());
          for (size_t i = 0; i < static_cast<size_t>(to.n); ++i, ++element) {
            float* const block = states + element / bucket * bucket * parts + element % bucket;
            float* const moments = master ? block + bucket : block;
            float& kept = master ? block[0] : weights[i];
            update.apply(kept, moments[0], moments[bucket], gradients[i]);
            weights[i] = kept;
          }
          store(weights.data(), to);
        },
        gradient, weight);
  }
}

}  // namespace mop::cpu
