#include <fmt/core.h>

#include <bit>
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
  const auto master = static_cast<program::Master>(does.b);
  const int64_t bucket = does.a, block_bytes = bucket * program::state_bytes(master),
                bytes = states_operand.view.elements() * program::size_of(Type::f32);
  ensure(states_out.data == states_operand.data && states_operand.view.type == Type::f32 &&
             (states_operand.view.rows == 1 || states_operand.view.ld == states_operand.view.cols) &&
             states_operand.view.count == 1,
         "optimizer states are contiguous fp32, updated in place");
  ensure(bucket > 0 && bytes % block_bytes == 0 && block_bytes % 4 == 0, "optimizer states are whole blocks");
  ensure(call.in.size() == call.out.size() + 1, "gradients and weights come in pairs");

  const Update update(does.deferred ? step.deferred : step.adam, factor ? scalar(factor) : 1.0);
  int64_t element = 0;  // of the states
  Piece gradients, weights;
  for (size_t pair = 0; pair + 1 < call.out.size(); ++pair) {
    const Operand &gradient = required(call.in, 2 + pair), &weight = required(call.out, 1 + pair);
    const bool narrow = weight.view.type == Type::bf16;
    ensure(master != program::Master::weights || !narrow, "weights that are their own master are fp32");
    ensure(master != program::Master::low || narrow, "low bits are of bf16 weights");
    ensure(element + weight.view.elements() <= bytes / block_bytes * bucket,
           "every element has optimizer states");
    for_each_piece(
        [&](const Run& from, const Run& to) {
          load(from, gradients.data());
          if (master != program::Master::states) load(to, weights.data());
          for (size_t i = 0; i < static_cast<size_t>(to.n); ++i, ++element) {
            std::byte* const block = states_operand.data + element / bucket * block_bytes;
            const int64_t inner = element % bucket;
            float* const first = reinterpret_cast<float*>(block) + inner;
            float* const moments = master == program::Master::states ? first + bucket : first;
            auto& low = reinterpret_cast<uint16_t*>(block + 8 * bucket)[inner];
            float& w = weights[i];
            if (master == program::Master::states) w = *first;
            if (master == program::Master::low)
              w = std::bit_cast<float>(
                  program::whole(static_cast<uint16_t>(std::bit_cast<uint32_t>(w) >> 16), low));
            update.apply(w, moments[0], moments[bucket], gradients[i]);
            if (narrow) w = std::bit_cast<float>(program::settled(std::bit_cast<uint32_t>(w)));
            if (master == program::Master::states) *first = w;
            if (master == program::Master::low) low = program::low_part(std::bit_cast<uint32_t>(w));
          }
          store(weights.data(), to);
        },
        gradient, weight);
  }
}

}  // namespace mop::cpu
