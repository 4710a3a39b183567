// The kernels behind run(), one function a kind of operation; what each computes: sim/program/ops.h.
#pragma once
#include "exec/cpu/kernels.h"
#include "exec/cpu/workspace.h"

namespace mop::cpu {

inline constexpr int32_t kNoTarget = -100;  // a row that does not count in the loss

void gemm(const Call& call, Workspace& workspace);
void column_sum(const Call& call);

void rms_norm(const Call& call, const Constants& constants, Workspace& workspace);
void rms_norm_bwd(const Call& call, const Constants& constants, Workspace& workspace);

void rope(const Call& call, const Constants& constants, Workspace& workspace);
void rope_bwd(const Call& call, const Constants& constants, Workspace& workspace);
void mla_keys(const Call& call);
void mla_keys_bwd(const Call& call, Workspace& workspace);

int64_t attention_bytes(int64_t qk_dim, int64_t v_dim);  // of the workspace
void attention_fwd(const Call& call, const Constants& constants, Workspace& workspace);
void attention_bwd(const Call& call, const Constants& constants, Workspace& workspace);

void swiglu(const Call& call, const Constants& constants);  // and clamped_swiglu, by the kind
void swiglu_bwd(const Call& call, const Constants& constants);

void add(const Call& call);
void sum_replicas(const Call& call);
void copy(const Call& call);  // and cast
void clear(const Call& call);
void scale(const Call& call);
void copy_bytes(const Call& call);
void square_sum(const Call& call);

void embedding(const Call& call, const Constants& constants);
void embedding_bwd(const Call& call, Workspace& workspace);
void next_batch(const Call& call, const interpreter::Step& step);

void cross_entropy(const Call& call, const Constants& constants);
void cross_entropy_bwd(const Call& call, const Constants& constants);

void clip_factor(const Call& call, const interpreter::Step& step);
void adam(const Call& call, const interpreter::Step& step);

}  // namespace mop::cpu
