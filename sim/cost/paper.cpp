// Constants fitted to the MoP paper's table up to 512K (mop.md section 7). What they do not name takes no
// time: MoP hides it, and the baseline's communication is not what the paper's numbers show.
#include <cmath>

#include "sim/cost/models.h"

namespace mop::cost {
namespace {

using program::OpKind;

// MoP
constexpr double kExchange = 7e9;            // routed all-to-all, bytes/s a GPU, one of five one-ways
constexpr double kAttentionWide = 530e12;    // FLOP/s, head width 192/128
constexpr double kAttentionNarrow = 285e12;  // head width 64, all layers full
// FSDP baseline
constexpr double kSlowAttention = 38e12;      // at 4.5 x forward FLOPs
constexpr double kLinear = 250e12;            // at 8 FLOPs a parameter
constexpr double kCpuAdam = 8e-3 / 1e6;       // seconds a parameter of the rank
constexpr double kOffloadCopy = 12.0 / 50e9;  // seconds a parameter of the rank: 12 bytes over 50 GB/s

class Paper : public CostModel {
 public:
  explicit Paper(const plan::Plan& plan) : mop_(plan.family == plan::Family::mop) {}

  Price price(const program::Op& op, const program::Shape& s, const program::Group*) const override {
    double seconds = 0;
    const double flops = program::flops(op.kind, s);
    switch (op.kind) {
      case OpKind::attention_fwd:
      case OpKind::attention_bwd:
        seconds = flops / (!mop_ ? kSlowAttention : s.v[5] == 64 ? kAttentionNarrow : kAttentionWide);
        break;
      case OpKind::gemm:
      case OpKind::grouped_gemm:
        if (!mop_) seconds = flops / kLinear;
        break;
      case OpKind::all_to_all:
        if (mop_ && op.component == program::Component::experts && op.routed != program::Routed::spill)
          seconds = static_cast<double>(std::max(s.v[0], s.v[1])) / kExchange;
        break;
      case OpKind::adam_host:
        if (!mop_) seconds = static_cast<double>(s.v[0]) * (kCpuAdam + kOffloadCopy);
        break;
      default:
        break;
    }
    Price p;
    p.demand.duration = static_cast<engine::Time>(std::llround(seconds * 1e9));
    return p;
  }

 private:
  bool mop_;
};

}  // namespace

std::unique_ptr<CostModel> make_paper(const plan::Plan& plan) {
  return std::make_unique<Paper>(plan);
}

}  // namespace mop::cost
