#include "exec/cpu/kernels.h"

#include "exec/cpu/operations.h"
#include "exec/cpu/routing.h"
#include "sim/base/error.h"

namespace mop::cpu {

void run(const Call& call, const Constants& constants, const interpreter::Step& step, Workspace& workspace) {
  using enum program::OpKind;
  const Workspace::Scope scope(workspace);
  switch (call.op->kind) {
    case gemm:
      return cpu::gemm(call, workspace);
    case column_sum:
      return cpu::column_sum(call);
    case rms_norm:
      return cpu::rms_norm(call, constants, workspace);
    case rms_norm_bwd:
      return cpu::rms_norm_bwd(call, constants, workspace);
    case rope:
      return cpu::rope(call, constants, workspace);
    case rope_bwd:
      return cpu::rope_bwd(call, constants, workspace);
    case mla_keys:
      return cpu::mla_keys(call);
    case mla_keys_bwd:
      return cpu::mla_keys_bwd(call, workspace);
    case attention_fwd:
      return cpu::attention_fwd(call, constants, workspace);
    case attention_bwd:
      return cpu::attention_bwd(call, constants, workspace);
    case swiglu:
    case clamped_swiglu:
      return cpu::swiglu(call, constants);
    case swiglu_bwd:
    case clamped_swiglu_bwd:
      return cpu::swiglu_bwd(call, constants);
    case add:
      return cpu::add(call);
    case sum_replicas:
      return cpu::sum_replicas(call);
    case cast:
    case copy:
      return cpu::copy(call);
    case clear:
      return cpu::clear(call);
    case scale:
      return cpu::scale(call);
    case copy_h2d:
    case copy_d2h:
      return cpu::copy_bytes(call);
    case square_sum:
      return cpu::square_sum(call);
    case embedding:
      return cpu::embedding(call, constants);
    case embedding_bwd:
      return cpu::embedding_bwd(call, workspace);
    case next_batch:
      return cpu::next_batch(call, step);
    case cross_entropy:
      return cpu::cross_entropy(call, constants);
    case cross_entropy_bwd:
      return cpu::cross_entropy_bwd(call, constants);
    case clip_factor:
      return cpu::clip_factor(call, step);
    case adam:
    case adam_host:
      return cpu::adam(call, step);
    case sort:
    case plan_routing:
    case permute:
    case unpermute:
    case unpermute_bwd:
    case topk:
    case topk_bwd:
    case balance_loss:
    case grouped_gemm:
    case expert_bias_bwd:
      return run_routed(call, constants, workspace);
    default:
      ensure(false, "every local operation of a program that runs has a kernel");
  }
}

}  // namespace mop::cpu
