// The instruction set: what each kind of operation computes, for the programs that run
// (StepProgram::runnable). An executor needs this file, the model's constants (ModelConfig) and nothing of
// plans.
//
//   kind: what is read -> what is written. (r, c): rows and columns of a view; [x]: may be missing; x*: x is
//   updated in place (also among what is read, or written over its input). acc: Does::accumulate adds to the
//   outputs marked +, otherwise they are overwritten. ct: the compute type, bf16 or fp32; ids, positions and
//   counts are i32. Sums run in fp32 or better, whatever the operands' types, and in a fixed order.
//   index, size: this rank's position in the operation's group, and the group's size. Groups of local
//   operations only give the index.
//
// gemm: A, B, [bias (1, n)] -> C(m, n)+
//     C = op(A) op(B) + bias; op is the transpose by Does::transpose_a / _b. count > 1: that many products.
// column_sum: X(r, n) -> s(1, n)+                        gradient of a bias
// rms_norm: x, w(1, d), [residual] -> y, [sum]
//     sum = x + residual (y normalises the sum). Columns are normalised in groups of d: heads, or all of
//     them.
// rms_norm_bwd: dy, x, w(1, d), [d_sum] -> dx, dw(1, d)+  x: what was normalised; dx = gradient + d_sum
// rope: x(t, heads x a), positions(1, t), [w(1, d)] -> y
//     elements [b, b + c) of each head of width a are rotated; with w first normalised, as rms_norm.
//     a, b, c: Does::a, b, c. Frequencies, scaling and pairing: model/rope.h. y may be x.
// rope_bwd: dy, positions, [x], [w] -> dx, [dw+]           x: what entered rope; dx may be dy
// mla_keys: kv(t, heads x (nope + v)), k_rope(t, c) -> k(t, heads x (nope + c)), v(t, heads x v)
//     a, b, c: nope, v, rotary widths; every head's key ends with the token's (rotated) k_rope.
// mla_keys_bwd: dk, dv -> dkv, dk_rope(t, c)+              sum over heads
// attention_fwd: q(t, heads x qk), k(t, kv x qk), v(t, kv x vd), starts(1, t), [sinks(1, n)] -> o, lse(t,
// heads)
//     t = batch x context rows; query i sees the keys max(starts[i], i - window + 1) .. i. Query head h uses
//     key head h / (heads / kv). b: window, 0 = none. Scale: model/rope.h. sinks: logits that take part in
//     the softmax only; of them this rank's are [index x heads, + heads). lse: natural logarithm, sinks
//     included.
// attention_bwd: q, k, v, o, do, lse, starts, [sinks] -> dq, dk+, dv+, [d_sinks(1, n)]
//     d_sinks: zero for the other ranks' heads. acc: dk and dv only; a = 1: d_sinks is added to.
// swiglu, clamped_swiglu: gate_up(r, 2 i), [rounds] -> act(r, i)            gate left, up right
// swiglu_bwd, clamped_swiglu_bwd: gate_up, d_act, [rounds, weights(1, r), act, dy(r, h), down_bias(e, h),
//                                 spilled down_bias(s, h)] -> d_gate_up, [act, d_weights(1, r)]
//     d_gate_up may be gate_up. Routed: d_act is the gradient before the gate weight: d_weights[j] = act[j]
//     . d_act[j] + bias . dy[j]; then act[j] *= weights[j] and d_gate_up from weights[j] d_act[j].
// topk: logits(n, E), [correction(1, E)] -> ids(n, k), weights(n, k), [load(1, 2 E)+]
//     load: rows of each expert, then sums of its probabilities (softmax over all experts).
// topk_bwd: d_weights(n, k), ids, weights, logits, [load] -> d_logits(n, E)
//     load: of all ranks, added up: adds the balance loss (model/balance.h), over `a` MoE layers and b tokens
//     each; weighted by 1 / c (c micro-batches a step).
// balance_loss: load -> sums+ (1, 1)                    the loss itself, on rank 0 of the group
// sort: ids(n, k) -> order(1, n k), counts(1, E)
//     order: routed copies (token x k + choice) by expert, then token; counts: copies of each expert.
// plan_routing: counts(ranks, E) -> rounds
//     rounds: a RoundPlan of the group, in the executor's representation.
// permute: x(n, h), order, rounds, [dy(n, h)], [weights(n, k)] -> x'(R, h), [dy'(R, h)], [weights'(1, R)]
//     the rows that this rank sends in the round, by destination, then in the destination's order of work.
// unpermute: rows(R, h), order, rounds, weights(n, k) -> y(n, h)+     y[token] += weight x row (always acc)
// unpermute_bwd: rows(R, h), order, rounds, d_weights'(1, R) -> dx(n, h)+, d_weights(n, k)
// grouped_gemm: A(R, k), rounds, W(e, ., .), [spilled W(s, ., .)], [bias(e, 1, n)], [spilled bias] -> C(R, n)
//     rows by expert in order of work: own experts by W[expert], borrowed ones by spilled W[slot].
//   transpose_a: A(R, m), B(R, n), rounds -> dW(e, m, n)+, [spilled dW(s, m, n)]
//     summed over the rounds: the first overwrites all own experts' (zeros where one has no rows in it)
//     unless acc, the later ones add. Of slots, the first round of each pass overwrites those that the pass
//     borrows, acc or not; the others are left as they are.
// expert_bias_bwd: dY(R, n), rounds, [weights'(1, R)] -> db(e, 1, n)+, [spilled db(s, 1, n)]   (likewise)
// add: a, [b] -> c+                                     elementwise
// cast, copy: a -> b                                    equal element counts, converted
// clear: -> x                                           zeros
// scale: x, factor(1, 1) -> x*                          times the factor
// sum_replicas: x(t, heads x a x d) -> y(t, heads x d); a: replicas, b: d
// embedding: ids(1, t), table(V, c) -> x(t, c)
// embedding_bwd: ids, dx(t, c) -> d_table(V, c)+        without acc cleared first
// cross_entropy: logits(m, columns), targets(p, t) -> statistics(m, 3)+
//     per row: maximum, sum of exp(logit - maximum), the target's logit if it is in this block (else 0),
//     fp32; acc: merged with what is there. m = p t; target -100: no target. The block's columns are those
//     from B x columns on, B = (index - a) mod size (a: Does::a); columns beyond the vocabulary are left out.
// cross_entropy_bwd: logits*, statistics(q, m, 3), targets, valid(1, 1) -> logits = gradient, [loss(1, 1)+]
//     statistics of q blocks are merged; gradient (softmax - one-hot) / valid, zero rows without target and
//     beyond the vocabulary. loss += the losses / valid of rows b x t .. (b + 1) x t only, b = index if c
//     (Does::c) is set, else of all rows.
// next_batch: -> ids(1, t), targets(1, t), positions(1, t), starts(1, T), valid(1, 1)+
//     micro-batch a's part for this rank: t tokens of the T that its sequence group works on; starts: first
//     visible row of each of T rows; valid: targets that are not -100 (acc: all micro-batches of the step).
// square_sum: x -> sum(1, 1)+                           sum of squares / a (a: replicas)
// clip_factor: sum of squares(1, 1) -> factor(1, 1)
//     min(1, max_norm / (sqrt(sum) + 1e-6)), 1 without clipping; a norm that is not finite is an error.
// adam, adam_host: [factor], states, gradient, ... -> states*, weights, ...
//     gradient and weights come in pairs that follow one another in the states: blocks of `a` elements,
//     [master,] m, v [, low bits] (Shard::states_bucket); b: where the master is (Master).
// copy_h2d, copy_d2h: a, ... -> b, ...   what is read, end to end, is what is written
//
// Collectives. Ranks of the group by index; sums in order of the index.
// all_gather: x -> y                                    y = everyone's x, one after the other
// reduce_scatter: x -> y+                               y = part `index` of the sum of everyone's x
// all_reduce: x -> x*
// send_recv: x -> y                                     y = x of rank index - 1 (a ring)
// all_to_all, by Does::exchange. Several matrices travel together: x_1, ..., x_k -> y_1, ..., y_k.
//   columns_to_rows: x(n, blocks x c) -> y(size x n, c)
//     rank j gets a column block of everyone's rows: block j x blocks / size where the number of blocks
//     divides the group's size (a block goes to several ranks), else block j; the last block may be narrower
//     than c, and ranks beyond it get none: y's remaining columns are zero.
//   rows_to_columns: x(size x n, c) -> y(n, size x c)    the way back; y narrower than size x c: cut
//   dispatch: rounds, x_1(R, .), ... -> y_1(R, .), ...   rows as permute left them -> by expert in order of
//   work,
//     then by source
//   combine: rounds, x_1, ... -> y_1, ...                 the way back
//   spill_weights: rounds, W(e, ., .) -> slots(s, ., .)   what the pass borrows
//   spill_gradients: rounds, slots(s, ., .) -> staging, dW(e, ., .)+      added in order of the lender's
//   index
#pragma once
