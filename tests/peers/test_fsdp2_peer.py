#!/usr/bin/env python3
"""The strong FSDP2 peer (fsdp2_strong.py) against Hugging Face transformers, on the CPU: loss and every gradient.

    pip install torch transformers        # written with torch 2.11, transformers 5.17
    tests/peers/test_fsdp2_peer.py        # or names of checks: hf kernels choice graphs compiled fsdp

hf        fp64, eager: whole models with windows, sinks, YaRN, biases and clamps, for each attention path that runs here and each
          setting of checkpointing. The sinks' gradients through the log-sum-exp are those that cuDNN and flash attention use.
compiled  fp32: the block compiled with checkpointing inside, against the same reference
graphs    what the compiled backward runs again: neither attention, top-k, sort nor the down projection; no scattered additions
kernels   the calls of cuDNN and flash attention: shapes and strides with fake CUDA tensors; exactness, eager and compiled, with
          the operators replaced by what their schemas say
choice    choose_attention with those operators: a path that fails is reported, one whose window is one key too wide is rejected
fsdp      fsdp2_pytorch.py itself on 2 processes over gloo: the clipped step of the strong peer, with and without offload, against
          torch's own clipping and AdamW of the same gradients; the norm as FSDP2's hook saw it against the gradients' own
"""
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import fsdp2_strong as strong  # noqa: E402

BATCH, CONTEXT = 2, 64
OSS = dict(model_type="gpt_oss", num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
           num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, vocab_size=96, rope_theta=150000.0, rms_norm_eps=1e-5,
           swiglu_limit=1.0, sliding_window=8,
           rope_scaling=dict(factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0))
QWEN3 = dict(model_type="qwen3_moe", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
             num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True, vocab_size=96, rope_theta=1e4, rms_norm_eps=1e-6)
OLMOE = dict(QWEN3, model_type="olmoe", num_key_value_heads=4, head_dim=8, norm_topk_prob=False)
RESULTS = []


def report(name, value, limit):
    RESULTS.append(value <= limit)
    print(f"{'ok' if value <= limit else 'FAILED':7}{name}: {value:.3g} (limit {limit:g})", flush=True)


# ------------------------------------------------------------------ transformers

def hf_model(c):
    from transformers import AutoConfig, AutoModelForCausalLM
    same = {k: c[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "num_experts_per_tok",
                              "rms_norm_eps", "rope_theta")} | dict(pad_token_id=None, tie_word_embeddings=False, max_position_embeddings=CONTEXT)
    if c["model_type"] == "gpt_oss":
        config = AutoConfig.for_model("gpt_oss", **same, head_dim=c["head_dim"], num_local_experts=c["num_experts"],
                                      intermediate_size=c["moe_intermediate_size"], sliding_window=c["sliding_window"], swiglu_limit=c["swiglu_limit"],
                                      rope_scaling=dict(c["rope_scaling"], rope_type="yarn", truncate=False), attention_bias=True)
        assert config.layer_types == [f"{strong.layer_kind(c, i)}_attention" for i in range(c["num_hidden_layers"])]
    elif c["model_type"] == "qwen3_moe":
        config = AutoConfig.for_model("qwen3_moe", **same, head_dim=c["head_dim"], num_experts=c["num_experts"], decoder_sparse_step=1, mlp_only_layers=[],
                                      moe_intermediate_size=c["moe_intermediate_size"], norm_topk_prob=c["norm_topk_prob"])
    else:
        config = AutoConfig.for_model("olmoe", **same, num_experts=c["num_experts"], intermediate_size=c["moe_intermediate_size"],
                                      norm_topk_prob=c["norm_topk_prob"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for m in model.modules():
        if type(m).__name__ == "GptOssExperts":
            m.limit = c["swiglu_limit"]
    return model


def as_peer(t, c):
    """Tensors by the names of transformers -> by the names of the peer: of weights as of gradients."""
    oss = c["model_type"] == "gpt_oss"
    out = {"embed.weight": t["model.embed_tokens.weight"], "head.norm.weight": t["model.norm.weight"], "head.weight": t["lm_head.weight"]}
    for i in range(c["num_hidden_layers"]):
        a, b = f"model.layers.{i}.", f"blocks.{i}."
        for s in ("weight", "bias") if oss else ("weight",):
            out[f"{b}attn.qkv.{s}"] = torch.cat([t[f"{a}self_attn.{n}_proj.{s}"] for n in "qkv"])
            out[f"{b}attn.o_proj.{s}"] = t[f"{a}self_attn.o_proj.{s}"]
            out[f"{b}moe.router.{s}"] = t[f"{a}mlp.{'router' if oss else 'gate'}.{s}"]
        for n in ("q_norm", "k_norm"):
            if f"{a}self_attn.{n}.weight" in t:
                out[f"{b}attn.{n}.weight"] = t[f"{a}self_attn.{n}.weight"]
        out[f"{b}norm1.weight"], out[f"{b}norm2.weight"] = t[f"{a}input_layernorm.weight"], t[f"{a}post_attention_layernorm.weight"]
        for n, m in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            w = t[f"{a}mlp.experts.{m}"]
            out[f"{b}moe.{n}"] = w.transpose(1, 2) if oss else w
            if oss:
                out[f"{b}moe.{n}_bias"] = t[f"{a}mlp.experts.{m}_bias"]
        if oss:
            out[f"{b}attn.sinks"] = t[f"{a}self_attn.sinks"]
    return out


def reference(c):
    """Weights, tokens, labels, loss and gradients by transformers in fp64."""
    from hf_reference import double_precision
    torch.manual_seed(3)
    with double_precision():
        model = hf_model(c).double()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
        text = torch.randint(0, c["vocab_size"], (BATCH, CONTEXT + 1))
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        clamped = []
        for m in model.modules():
            if type(m).__name__ == "GptOssExperts":
                apply = m._apply_gate
                m._apply_gate = lambda g, m=m, apply=apply: (clamped.append((g.abs() > m.limit).double().mean().item()), apply(g))[1]
        loss = F.cross_entropy(model(input_ids=tokens, use_cache=False).logits.flatten(0, 1), labels.flatten())
        loss.backward()
    assert loss.dtype == torch.float64
    if clamped:
        assert 0.01 < sum(clamped) / len(clamped) < 0.9, clamped
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())
    return as_peer({n: p.detach() for n, p in model.named_parameters()}, c), tokens, labels, loss.item(), as_peer(grads, c)


def looped_grouped_mm(a, b, offs=None):
    ends = offs.tolist()
    return torch.cat([a[i:j] @ b[e] for e, (i, j) in enumerate(zip([0] + ends[:-1], ends))])


@torch.library.custom_op("peer_test::grouped_mm", mutates_args=())
def compilable_grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """PyTorch compiles its own in bf16 only."""
    return looped_grouped_mm(a, b, offs)


@torch.library.custom_op("peer_test::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(a: torch.Tensor, g: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    ends = offs.tolist()
    return torch.stack([a[i:j].t() @ g[i:j] for i, j in zip([0] + ends[:-1], ends)])


compilable_grouped_mm.register_fake(lambda a, b, offs: a.new_empty(a.shape[0], b.shape[2]))
grouped_weight_gradient.register_fake(lambda a, g, offs: a.new_empty(offs.shape[0], a.shape[1], g.shape[1]))
def grouped_mm_backward(ctx, g):
    a, b, offs = ctx.saved_tensors
    return compilable_grouped_mm(g, b.transpose(1, 2), offs), grouped_weight_gradient(a, g, offs), None


compilable_grouped_mm.register_autograd(grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def peer(c, weights, dtype, paths, **kw):
    model = strong.Model(c, **kw).to(dtype)
    model.set_attention(paths, CONTEXT, "cpu")
    own = dict(model.named_parameters())
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(weights[n])
    return model


def largest_error(model, loss, expected_loss, expected):
    """Of loss and gradients, each relative to its largest value."""
    errors = {n: ((p.grad.double() - expected[n]).abs().max() / expected[n].abs().max()).item() for n, p in model.named_parameters()}
    errors["loss"] = abs(loss.item() - expected_loss) / abs(expected_loss)
    return max(errors.values()), max(errors, key=errors.get)


def flex_on_cpu(stack):
    """PyTorch runs its backward on the CPU only uncompiled, and refuses by default."""
    import torch.nn.attention.flex_attention as flex
    stack.enter_context(mock.patch.object(flex, "_validate_device", lambda *a: None))
    stack.enter_context(mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True))


def check_hf():
    from hf_reference import double_precision
    for c in (OSS, QWEN3, OLMOE):
        weights, tokens, labels, loss, grads = reference(c)
        settings = [(path, dict(checkpointing="selective", gate_up_blocks=1)) for path in ("math", "cpu", "flex")]
        settings.append(("cpu", dict(checkpointing="none")))
        for path, kw in settings:
            with contextlib.ExitStack() as stack:
                stack.enter_context(double_precision())
                stack.enter_context(mock.patch.object(torch, "_grouped_mm", looped_grouped_mm))
                if path == "flex":
                    flex_on_cpu(stack)
                model = peer(c, weights, torch.float64, dict(sliding=path, full=path), loss_chunk=48, **kw)
                got = model(tokens, labels)
                got.backward()
            value, where = largest_error(model, got, loss, grads)
            report(f"hf {c['model_type']}, attention {path}, checkpointing {kw}, worst {where}", value, 1e-9)
    # no windows or no sinks would be seen
    weights, tokens, labels, loss, grads = reference(OSS)
    for name, other in (("windows", dict(OSS, sliding_window=CONTEXT)), ("YaRN", {k: v for k, v in OSS.items() if k != "rope_scaling"})):
        with double_precision(), mock.patch.object(torch, "_grouped_mm", looped_grouped_mm):
            got = peer(other, weights, torch.float64, dict(sliding="math", full="math"))(tokens, labels)
        report(f"hf without {name} the loss differs (1 / difference)", 1e-4 / abs(got.item() - loss), 1.0)


def check_compiled():
    for c in (OSS, QWEN3):
        weights, tokens, labels, loss, grads = reference(c)
        for kw in (dict(checkpointing="selective", gate_up_blocks=1), dict(checkpointing="none")):
            torch.compiler.reset()
            model = peer(c, weights, torch.float32, dict(sliding="cpu", full="cpu"), compiled=True, loss_chunk=64, **kw)
            with mock.patch.object(torch, "_grouped_mm", compilable_grouped_mm):
                got = model(tokens, labels)
                got.backward()
            value, where = largest_error(model, got, loss, grads)
            report(f"compiled {c['model_type']}, {kw}, worst {where}", value, 2e-4)


    torch.manual_seed(5)                 # bf16 with torch._grouped_mm, against the same uncompiled
    moe, attention = strong.MoE(OSS).bfloat16(), strong.Attention(OSS, 0).bfloat16()
    attention.path = "cpu"
    x = torch.randn(BATCH, CONTEXT, OSS["hidden_size"], dtype=torch.bfloat16)
    for name, module, arguments in (("experts", moe, (x.view(-1, x.shape[-1]),)),
                                    ("attention", attention, (x, *strong.rope_tables(OSS, CONTEXT, "cpu", torch.bfloat16)))):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.3)
        torch.compiler.reset()
        got = []
        for f in (module, torch.compile(module, fullgraph=True, dynamic=False)):
            module.zero_grad()
            out = f(*arguments)
            out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).bfloat16())
            got.append([out.detach()] + [p.grad for p in module.parameters()])
        report(f"compiled {name} in bf16", max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*got)), 0.05)


def graphs(c, weights, tokens, labels, path, **kw):
    """Operator counts of the distinct compiled blocks, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    seen = {"forward": [], "backward": []}

    def count(kind):
        def compiler(gm, inputs):
            ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
            seen[kind].append({o: ops.count(o) for o in ops})
            return gm.forward
        return compiler

    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"), partition_fn=min_cut_rematerialization_partition)
    torch.compiler.reset()
    model = peer(c, weights, torch.bfloat16, dict(sliding=path, full=path), **kw)
    for b in model.blocks:
        b.body = torch.compile(b.core, fullgraph=True, dynamic=False, backend=backend)
    with contextlib.ExitStack() as stack:
        if path == "flex":
            flex_on_cpu(stack)
        model(tokens, labels).backward()
    return seen


def check_graphs():
    weights, tokens, labels, _, _ = reference(OSS)
    kept = ("aten._scaled_dot_product_flash_attention_for_cpu.default", "flex_attention", "aten.topk.default", "aten.sort.stable")
    for name, path, kw, products in (("selective", "cpu", dict(checkpointing="selective"), 5),
                                     ("gate-up", "cpu", dict(checkpointing="selective", gate_up_blocks=4), 4),
                                     ("selective", "flex", dict(checkpointing="selective"), 5), ("none", "cpu", dict(checkpointing="none"), 4)):
        seen = graphs(OSS, weights, tokens, labels, path, **kw)
        report(f"graphs {name}, {path}: kinds of block compiled", len(seen["backward"]), 2)
        for forward, backward in zip(seen["forward"], seen["backward"]):
            report(f"graphs {name}, {path}: kept operators that forward lacks", 3 - sum(o in forward for o in kept), 0)
            report(f"graphs {name}, {path}: kept operators run again", sum(backward.get(o, 0) for o in kept), 0)
            report(f"graphs {name}, {path}: grouped products in backward", backward.get("aten._grouped_mm.default", 0), products)
            report(f"graphs {name}, {path}: scattered additions", sum(v for o, v in backward.items() if "index_add" in o or "index_put" in o or "scatter_add" in o), 0)


@contextlib.contextmanager
def emulated_kernels():
    """The CUDA operators as their schemas describe them, in fp64 or fp32 on the CPU."""
    def cudnn(q, k, v, bias, want_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert bias is None and want_lse and dropout == 0 and causal and not debug and scale is None
        out, lse, _, _ = strong.cpu_forward(q, k, v, None)
        zero = torch.zeros((), dtype=torch.long)
        return out, lse.contiguous().unsqueeze(-1), None, None, q.shape[2], k.shape[2], zero, zero, None

    def cudnn_backward(g, q, k, v, out, lse, seed, offset, bias, starts_q, starts_k, max_q, max_k, dropout, causal, *, scale=None):
        assert lse.shape == (*q.shape[:3], 1) and seed.shape == offset.shape == () and (max_q, max_k, dropout, causal, scale) == (q.shape[2], q.shape[2], 0, True, None)
        return strong.cpu_backward(g, q, k, v, out, lse.squeeze(-1), None, None, None)

    def window(q, causal, left, right):
        assert causal and (left is None) == (right is None) and right in (None, 0)
        return None if left is None else left + 1

    def flash(q, k, v, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None, window_size_right=None,
              seqused_k=None, alibi_slopes=None):
        assert starts_q is None and starts_k is None and dropout == 0 and not debug and max_q == max_k == q.shape[1] and scale is None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, _, _ = strong.cpu_forward(q, k, v, window(q, causal, window_size_left, window_size_right))
        return out.transpose(1, 2).contiguous(), lse.contiguous(), torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)

    def flash_backward(g, q, k, v, out, lse, starts_q, starts_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None, window_size_left=None,
                       window_size_right=None):
        assert dropout == 0 and max_q == max_k == q.shape[1] and rng.dtype == torch.uint64 and rng.shape == (2,)
        g, q, k, v, out = (t.transpose(1, 2) for t in (g, q, k, v, out))
        grads = strong.cpu_backward(g, q, k, v, out, lse, None, None, window(q, causal, window_size_left, window_size_right))
        return tuple(t.transpose(1, 2).contiguous() for t in grads)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def check_kernels():
    from hf_reference import double_precision
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        for path, window in (("cudnn", None), ("flash", None), ("flash", 128)):
            q, k, v = (torch.empty(2, 256, h, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2, 2))
            out, lse, *state = strong.KERNELS[path][0](q, k, v, window)
            grads = strong.KERNELS[path][1](torch.empty_like(out), q, k, v, out, lse, *state, window)
            wrong = sum(a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype for a, b in zip((out, *grads), (q, q, k, v)))
            report(f"kernels {path}, window {window}: wrong shapes and strides", wrong + (lse.shape != (2, 8, 256)), 0)
    weights, tokens, labels, loss, grads = reference(OSS)
    with emulated_kernels():
        for full in ("cudnn", "flash"):
            paths = dict(sliding="flash", full=full)
            with double_precision(), mock.patch.object(torch, "_grouped_mm", looped_grouped_mm):
                model = peer(OSS, weights, torch.float64, paths)
                got = model(tokens, labels)
                got.backward()
            value, where = largest_error(model, got, loss, grads)
            report(f"kernels emulated {paths}, worst {where}", value, 1e-9)
            torch.compiler.reset()
            model = peer(OSS, weights, torch.float32, paths, compiled=True)
            with mock.patch.object(torch, "_grouped_mm", compilable_grouped_mm):
                got = model(tokens, labels)
                got.backward()
            value, where = largest_error(model, got, loss, grads)
            report(f"kernels emulated {paths}, compiled, worst {where}", value, 2e-4)


class Clock:
    """In place of torch.cuda.Event."""
    def __init__(self, enable_timing):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


def check_choice():
    forward, backward = strong.KERNELS["flash"]
    other = lambda w: None if w is None else w + 1
    one_more = (lambda q, k, v, w: forward(q, k, v, other(w)), lambda *a: backward(*a[:-1], other(a[-1])))
    c = dict(OSS, sliding_window=16)
    with emulated_kernels(), mock.patch.object(torch.cuda, "Event", Clock):
        paths, measured = strong.choose_attention(c, 2, 128, "cpu", print)
        report("choice: kinds of layer without one", len({"sliding", "full"} - set(paths)) + (paths["sliding"] != "flash"), 0)
        report("choice: flex cannot run here and is not reported", sum("failed" not in measured[f"{k} flex"] for k in ("sliding", "full")), 0)
        torch.compiler.reset()
        with mock.patch.dict(strong.KERNELS, flash=one_more):
            try:
                strong.choose_attention(c, 2, 128, "cpu", print)
                report("choice: a window of one key more is taken", 1, 0)
            except RuntimeError as e:
                report("choice: a window of one key more is taken", int("rejected" not in str(e)), 0)


def fsdp_worker():
    """Within torchrun: fsdp2_pytorch.py with each clipped step made again by torch's own functions on whole parameters."""
    import fsdp2_pytorch as run
    whole, adam, errors = [], [], {"norm": 0.0, "parameters": 0.0}
    own_norm, own_step = run.ClippedAdamW.norm, run.ClippedAdamW.step

    def norm(self):
        if not whole:
            whole.extend(torch.nn.Parameter(p.full_tensor().detach().clone()) for p in self.params)
            adam.append(torch.optim.AdamW(whole, lr=self.adam.param_groups[0]["lr"], betas=(0.9, 0.95), weight_decay=0.1))
        for w, p in zip(whole, self.params):
            w.grad = p.grad.full_tensor().clone()
        expected = torch.nn.utils.clip_grad_norm_(whole, self.max_norm)
        got = own_norm(self)
        assert self.max_norm > 1e6 or got > self.max_norm, "nothing is clipped"
        errors["norm"] = max(errors["norm"], abs(got / expected - 1).item())
        return got

    def step(self):
        own_step(self)
        adam[0].step()
        for w, p in zip(whole, self.params):
            errors["parameters"] = max(errors["parameters"], ((w - p.full_tensor()).abs().max() / w.abs().max()).item())

    run.ClippedAdamW.norm, run.ClippedAdamW.step = norm, step
    run.main()
    if int(os.environ["RANK"]) == 0:
        print("CHECK " + json.dumps(errors), flush=True)


def check_fsdp():
    for arguments in (["--block", "strong", "--clip-norm", "0.5"], ["--block", "strong", "--clip-norm", "0.5", "--offload"], ["--block", "strong", "--clip-norm", "1e9"], ["--block", "plain"]):
        with tempfile.TemporaryDirectory() as out:
            data = pathlib.Path(out, "text")
            data.write_bytes(pathlib.Path(__file__).read_bytes())
            script = [str(HERE / "fsdp2_pytorch.py")] if "plain" in arguments else [__file__, "worker"]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script, "--model", "tiny-oss",
                       "--context", "64", "--device", "cpu", "--compile", "no", "--steps", "4", "--report-last", "2", "--out", out, "--data", str(data), "--lr", "1e-3"]
            done = subprocess.run(command + arguments, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
            report(f"fsdp {arguments}: exit status", abs(done.returncode), 0)
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-3000:])
                continue
            r = json.loads(pathlib.Path(out, "fsdp2_runs.jsonl").read_text())
            report(f"fsdp {arguments}: losses, norms and times of 4 steps are missing", sum(len(r[k]) != 4 for k in ("losses", "grad_norms", "step_s_all")), 0)
            report(f"fsdp {arguments}: loss does not fall", r["losses"][-1] - r["losses"][0], 0)
            for line in done.stdout.splitlines():
                if line.startswith("CHECK "):
                    errors = json.loads(line[6:])
                    report(f"fsdp {arguments}: norm", errors["norm"], 1e-5)
                    report(f"fsdp {arguments}: parameters", errors["parameters"], 1e-5)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        del sys.argv[1]
        fsdp_worker()
        sys.exit()
    torch.set_num_threads(2)
    for name in sys.argv[1:] or ("hf", "kernels", "choice", "graphs", "compiled", "fsdp"):
        globals()[f"check_{name}"]()
    print(f"{sum(RESULTS)} passed, {len(RESULTS) - sum(RESULTS)} failed")
    sys.exit(not all(RESULTS))
