#!/usr/bin/env python3
"""Honest PyTorch FSDP2 training steps, timed, one process a GPU.

    NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node 4 fsdp2_pytorch.py --model olmoe-1b-7b --context 4096 --sequences 1

Common to both blocks: one FSDP group a block, bf16 gather, bf16 reduce, fp32 sharded parameters, a real top-k router over
torch._grouped_mm, fused AdamW, clipping by global norm every step.

--block plain, the peer that the `fsdp2` plan must predict (default but for gpt-oss): eager unless --compile; one root group
(embedding, final norm, untied head), all resharded after forward; block-level non-reentrant checkpointing; loss in checkpointed
chunks of 4096 tokens with fp32 logits; cuDNN attention; torch's clip_grad_norm_. RMSNorm, RoPE and SwiGLU are written as Hugging
Face's modelling code writes them. Attention is full and without sinks in every family.

--block strong, the peer that our executor must beat (default for gpt-oss): fsdp2_strong.py, with gpt-oss's windows, sinks and YaRN.
Embedding and head are groups of their own; the last block and the head stay gathered for the backward pass. Clipping costs one
pass over the gradients: AdamW divides them by the factor as it reads them. With --offload not even that: FSDP2's hook takes the norm
on the GPU, where the reduced gradients are before they travel, and that also moves the copies to the host off the stream of the
reductions. Each rank's CPU threads keep to its share of the cores; host memory is pinned (gradients and parameters, no copy between)
and in huge pages (AdamW's moments).

One JSON line a run goes to stdout and, with --out, to DIR/fsdp2_runs.jsonl; --profile adds one to DIR/fsdp2_profiles.jsonl.
"""
import argparse
import bisect
import collections
import contextlib
import datetime
import json
import os
import re
import statistics
import sys
import time

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def default_block(model):
    return "strong" if "oss" in model else "plain"


def environment(arguments):
    """What PyTorch reads when it is loaded."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--model", default="")
    p.add_argument("--block")
    p.add_argument("--offload", action="store_true")
    o, _ = p.parse_known_args(arguments)
    if (o.block or default_block(o.model)) == "strong":
        pinned = ",pinned_use_cuda_host_register:True,pinned_num_register_threads:8" if o.offload else ""
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True" + pinned)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


if __name__ == "__main__":
    environment(sys.argv[1:])

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import fsdp2_strong as strong

# ------------------------------------------------------------------ models: fields as in the published config.json
CONFIGS = {
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048, num_attention_heads=32,
                          num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
                          norm_topk_prob=True, vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6),
    "olmoe-1b-7b": dict(model_type="olmoe", num_hidden_layers=16, hidden_size=2048, num_attention_heads=16, num_key_value_heads=16,
                        head_dim=128, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024, norm_topk_prob=False,
                        vocab_size=50304, rope_theta=1e4, rms_norm_eps=1e-5),
    "gpt-oss-20b": dict(model_type="gpt_oss", num_hidden_layers=24, hidden_size=2880, num_attention_heads=64, num_key_value_heads=8,
                        head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=2880, norm_topk_prob=True,
                        vocab_size=201088, rope_theta=150000.0, rms_norm_eps=1e-5, swiglu_limit=7.0, sliding_window=128,
                        rope_scaling=dict(factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0)),
    "mixtral-8x7b": dict(model_type="mixtral", num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
                         head_dim=128, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=14336, norm_topk_prob=True,
                         vocab_size=32000, rope_theta=1e6, rms_norm_eps=1e-5),
    "tiny": dict(model_type="qwen3_moe", num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                 num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, vocab_size=512, rope_theta=1e4,
                 rms_norm_eps=1e-6),
    "tiny-oss": dict(model_type="gpt_oss", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                     num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, vocab_size=512,
                     rope_theta=1e4, rms_norm_eps=1e-6, swiglu_limit=7.0, sliding_window=16,
                     rope_scaling=dict(factor=32.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0)),
    "tiny-olmoe": dict(model_type="olmoe", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                       num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=False, vocab_size=512,
                       rope_theta=1e4, rms_norm_eps=1e-6),
}

PROFILING = False      # annotate for the profiler
MARKS = None           # (tag, layer, host time, allocated bytes, peak bytes since the last mark)
MARK_MEMORY = False


def mark(tag, layer=-1):
    if MARKS is None:
        return
    if MARK_MEMORY:
        MARKS.append((tag, layer, time.perf_counter(), torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        torch.cuda.reset_peak_memory_stats()
    else:
        MARKS.append((tag, layer, time.perf_counter()))


def note(name):
    return torch.profiler.record_function(name) if PROFILING else contextlib.nullcontext()


class RMSNorm(nn.Module):
    def __init__(self, n, eps, fused):
        super().__init__()
        self.weight, self.eps, self.fused = nn.Parameter(torch.empty(n)), eps, fused

    def forward(self, x):
        if self.fused:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    def __init__(self, c, o):
        super().__init__()
        h, d, self.hq, self.hk, self.d = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        bias = c["model_type"] == "gpt_oss"
        self.q_proj, self.k_proj = nn.Linear(h, self.hq * d, bias=bias), nn.Linear(h, self.hk * d, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(h, self.hk * d, bias=bias), nn.Linear(self.hq * d, h, bias=bias)
        self.head_norm, self.full_norm = c["model_type"] == "qwen3_moe", c["model_type"] == "olmoe"
        if self.head_norm or self.full_norm:
            self.q_norm = RMSNorm(d if self.head_norm else self.hq * d, c["rms_norm_eps"], o.fused_norm)
            self.k_norm = RMSNorm(d if self.head_norm else self.hk * d, c["rms_norm_eps"], o.fused_norm)

    def forward(self, x, cos, sin):                     # x [B, S, H]
        B, S, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.full_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(B, S, self.hq, self.d), k.view(B, S, self.hk, self.d), v.view(B, S, self.hk, self.d)
        if self.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.hq != self.hk)
        return self.o_proj(a.transpose(1, 2).reshape(B, S, self.hq * self.d))


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, i, self.E, self.k = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"], c["num_experts_per_tok"]
        self.oss, self.renorm, self.limit = c["model_type"] == "gpt_oss", c["norm_topk_prob"], c.get("swiglu_limit")
        self.router = nn.Linear(h, self.E, bias=self.oss)
        self.gate_up = nn.Parameter(torch.empty(self.E, 2 * i, h))
        self.down = nn.Parameter(torch.empty(self.E, h, i))
        if self.oss:
            self.gate_up_bias, self.down_bias = nn.Parameter(torch.empty(self.E, 2 * i)), nn.Parameter(torch.empty(self.E, h))

    def forward(self, x):                               # x [B, S, H]
        shape = x.shape
        x = x.view(-1, shape[-1])
        logits = self.router(x)
        if self.oss:                                    # softmax over the top-k logits
            w, idx = torch.topk(logits, self.k, dim=-1)
            w = torch.softmax(w, dim=-1, dtype=torch.float32)
        else:
            w, idx = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), self.k, dim=-1)
            if self.renorm:
                w = w / w.sum(-1, keepdim=True)
        w = w.to(x.dtype)
        flat = idx.view(-1)
        order = torch.argsort(flat, stable=True)        # copies of tokens in expert order
        rows = order // self.k
        if x.is_cuda:
            counts = torch.histc(flat.int(), bins=self.E, min=0, max=self.E - 1)
        else:
            counts = torch.bincount(flat, minlength=self.E)
        offs = torch.cumsum(counts, 0, dtype=torch.int32)
        xs = x.index_select(0, rows)
        g = torch._grouped_mm(xs, self.gate_up.transpose(-2, -1), offs=offs)
        if self.oss:
            e = flat.index_select(0, order)
            g = g + self.gate_up_bias.index_select(0, e)
            gate, up = g[:, ::2].clamp(max=self.limit), g[:, 1::2].clamp(min=-self.limit, max=self.limit)
            y = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        else:
            gate, up = g.chunk(2, dim=-1)
            y = F.silu(gate) * up
        y = torch._grouped_mm(y, self.down.transpose(-2, -1), offs=offs)
        if self.oss:
            y = y + self.down_bias.index_select(0, e)
        y = y * w.view(-1).index_select(0, order).unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, rows, y).view(shape)


class Block(nn.Module):
    def __init__(self, c, i, o):
        super().__init__()
        self.layer, self.opts = i, o
        self.norm1, self.norm2 = (RMSNorm(c["hidden_size"], c["rms_norm_eps"], o.fused_norm) for _ in range(2))
        self.attn, self.moe = Attention(c, o), MoE(c)
        self.body = self.core
        if o.compile == "inner":         # checkpointing outside: the whole compiled forward is run again
            self.body = torch.compile(self.core, fullgraph=True, dynamic=False)
        elif o.compile == "outer":       # checkpointing inside: the compiler sees and prunes the recompute
            self.body = torch.compile(self.core_checkpointed, fullgraph=True, dynamic=False)

    def core(self, x, cos, sin):
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.moe(self.norm2(x))

    def core_checkpointed(self, x, cos, sin):
        return checkpoint(self.core, x, cos, sin, use_reentrant=False, preserve_rng_state=False)

    def run(self, x, cos, sin):
        mark("run", self.layer)
        try:
            with note(f"P/run/{self.layer}"):
                return self.body(x, cos, sin)
        finally:                          # recompute leaves through an exception once nothing more is needed
            mark("ran", self.layer)

    def forward(self, x, cos, sin):
        if self.opts.no_checkpoint or self.opts.compile == "outer":
            return self.run(x, cos, sin)
        return checkpoint(self.run, x, cos, sin, use_reentrant=False, preserve_rng_state=False)


class Model(nn.Module):
    def __init__(self, c, o):
        super().__init__()
        self.c, self.o = c, o
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.blocks = nn.ModuleList(Block(c, i, o) for i in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"], o.fused_norm)
        self.head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def chunk_loss(self, h, y):
        with note("P/loss_chunk"):
            return F.cross_entropy(self.head(h).float(), y, reduction="sum")

    def forward(self, tokens, labels):
        B, S = tokens.shape
        x = self.embed(tokens)
        d = self.c["head_dim"]
        inv = 1.0 / self.c["rope_theta"] ** (torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
        f = torch.outer(torch.arange(S, device=x.device, dtype=torch.float32), inv)
        f = torch.cat((f, f), dim=-1)
        cos, sin = f.cos().to(x.dtype), f.sin().to(x.dtype)
        for i, b in enumerate(self.blocks):
            mark("block", i)
            with note(f"P/block/{i}"):
                x = b(x, cos, sin)
        mark("blocks_done")
        h = self.norm(x).view(-1, x.shape[-1])
        y = labels.view(-1)
        n = self.o.loss_chunk
        loss = 0.0
        for i in range(0, h.shape[0], n):
            loss = loss + checkpoint(self.chunk_loss, h[i:i + n], y[i:i + n], use_reentrant=False, preserve_rng_state=False)
        return loss / h.shape[0]


def counts(c):
    """(all parameters, active parameters without the input embedding)"""
    h, d = c["hidden_size"], c["head_dim"]
    att = h * d * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    ex = 3 * h * c["moe_intermediate_size"]
    per_all = att + h * c["num_experts"] + ex * c["num_experts"]
    per_act = att + h * c["num_experts"] + ex * c["num_experts_per_tok"]
    L, V = c["num_hidden_layers"], c["vocab_size"] * h
    return L * per_all + 2 * V, L * per_act + V


def flops_per_token(c, S, windows):
    """Model FLOPs forward + backward: 6 a weight used, attention to the keys that are seen, no input embedding, no recompute."""
    _, act = counts(c)
    L, W = c["num_hidden_layers"], min(S, c.get("sliding_window", S)) if windows else S
    keys = sum(W * (S - W / 2) / S if windows and strong.layer_kind(c, i) == "sliding" else S / 2 for i in range(L))
    return 6 * act + 12 * keys * c["num_attention_heads"] * c["head_dim"]


# ------------------------------------------------------------------ analysis of one profiled step

def category(name, in_fsdp, phase):
    n = name.lower()
    if "ncclde" in n or "nccl" in n:
        return "nccl " + ("all-gather" if "allgather" in n else "reduce-scatter" if "reducescatter" in n else "all-reduce" if "allreduce" in n else "other")
    if phase in ("clip", "optimizer"):
        return phase
    if in_fsdp:
        return "fsdp copy/cast"
    if n.startswith("triton"):
        return "fused (compiled)"
    if "sdpa" in n or "flash" in n or "fmha" in n or "cudnn" in n:
        return "attention backward" if re.search("bprop|bwd|backward|dot_do_o|convert_dq|reduce_head", n) else "attention forward"
    if "groupproblemshape" in n or "gemmuniversalins5_17gr" in n or "grouped" in n:
        return "grouped gemm"
    if re.search("nvjet|gemm|cutlass|splitk|gemv|xmma", n):
        return "gemm"
    if re.search("sort|topk|radix|scan|histogram|bitonic|fill_reverse_indices", n):
        return "sort/top-k/scan"
    if "softmax" in n or "nll" in n or "cross" in n:
        return "softmax/loss"
    if re.search("index|gather|scatter|embedding", n):
        return "index/scatter"
    if "catarray" in n:
        return "cat"
    if "reduce_kernel" in n or "reduce" in n:
        return "reduction"
    if "elementwise" in n or "vectorized" in n or "fill" in n or "copy" in n:
        return "elementwise"
    return "other"


def short(name):
    if "GemmUniversalINS5_17Gr" in name or "GroupProblemShape" in name:
        return "cutlass grouped GemmUniversal"
    n = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    m = re.search(r"(\w+Functor\w*|\w*_kernel_cuda\w*|direct_copy_kernel\w*|bfloat16_copy_kernel\w*|\w*silu\w*|sigmoid\w*|pow_tensor\w*|rsqrt_kernel\w*|neg_kernel\w*|clamp\w*|MeanOps|NormTwoOps|sum_functor|FillFunctor)", n)
    head = re.split(r"[<(]", n)[0].replace("at::native::", "")
    return (head + (":" + m.group(1) if m and m.group(1) not in head else ""))[:110]


def union(iv):
    total, end = 0.0, -1e30
    for a, b in sorted(iv):
        if b > end:
            total += b - max(a, end)
            end = b
    return total


def analyse(path, layers):
    with open(path) as f:
        ev = json.load(f)["traceEvents"]
    launches, gpu, notes, syncs = {}, [], [], []
    for e in ev:
        if e.get("ph") != "X":
            continue
        cat = e.get("cat", "")
        if cat in ("cuda_runtime", "cuda_driver"):
            c = e.get("args", {}).get("correlation")
            if c is not None:
                launches[c] = e
            if "Synchronize" in e["name"]:
                syncs.append(e)
        elif cat in ("kernel", "gpu_memcpy", "gpu_memset"):
            gpu.append(e)
        elif cat in ("user_annotation", "cpu_op") and (e["name"].startswith(("P/", "FSDP::"))):
            notes.append(e)
    notes.sort(key=lambda e: e["ts"])
    phases = {e["name"][8:]: (e["ts"], e["ts"] + e["dur"]) for e in notes if e["name"].startswith("P/phase/")}
    fsdp = collections.defaultdict(list)
    for e in notes:
        if e["name"].startswith("FSDP::"):
            fsdp[e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    starts = {t: [a for a, _ in v] for t, v in fsdp.items()}

    def in_fsdp(tid, ts):
        v = fsdp.get(tid)
        if not v:
            return False
        i = bisect.bisect_right(starts[tid], ts)
        return any(a <= ts <= b for a, b in v[max(0, i - 6):i])

    rows = []
    for e in gpu:
        l = launches.get(e["args"].get("correlation"))
        ts, tid = (l["ts"], l["tid"]) if l else (None, None)
        ph = next((p for p, (a, b) in phases.items() if ts is not None and a <= ts <= b), "none")
        infs = ts is not None and in_fsdp(tid, ts)
        if e["cat"] == "kernel":
            cat = category(e["name"], infs, ph)
        else:
            kind = re.search(r"HtoD|DtoH|DtoD|PtoP", e["name"])
            cat = ("memcpy " + kind.group(0)) if kind else "memset"
            if cat in ("memcpy DtoD", "memset"):
                cat = "fsdp copy/cast" if infs else cat
        rows.append(dict(name=e["name"], cat=cat, ts=e["ts"], end=e["ts"] + e["dur"], dur=e["dur"], stream=e["args"].get("stream"), launch=ts, phase=ph,
                         bytes=e["args"].get("bytes")))
    rows.sort(key=lambda r: r["launch"] if r["launch"] is not None else r["ts"])
    t0, t1 = min(r["ts"] for r in rows), max(r["end"] for r in rows)
    cats = collections.defaultdict(lambda: [0, 0.0])
    for r in rows:
        cats[r["cat"]][0] += 1
        cats[r["cat"]][1] += r["dur"]
    is_comm = lambda r: r["cat"].startswith(("nccl", "memcpy HtoD", "memcpy DtoH"))
    busy, comp = union([(r["ts"], r["end"]) for r in rows]), union([(r["ts"], r["end"]) for r in rows if not is_comm(r)])
    out = dict(step_span_us=round(t1 - t0, 1), gpu_busy_us=round(busy, 1), gpu_idle_us=round(t1 - t0 - busy, 1),
               compute_busy_us=round(comp, 1), only_communication_busy_us=round(busy - comp, 1), kernels=sum(1 for r in rows),
               by_category={k: dict(count=v[0], gpu_us=round(v[1], 1)) for k, v in sorted(cats.items(), key=lambda x: -x[1][1])},
               copies_bytes={k: sum(r["bytes"] or 0 for r in rows if r["cat"] == k) for k in cats if k.startswith("memcpy")})
    ph = {}
    for p, (a, b) in phases.items():
        sel = [r for r in rows if r["phase"] == p]
        pc = collections.defaultdict(lambda: [0, 0.0])
        for r in sel:
            pc[r["cat"]][0] += 1
            pc[r["cat"]][1] += r["dur"]
        a_, b_ = (min(r["ts"] for r in sel), max(r["end"] for r in sel)) if sel else (0, 0)
        al, co = union([(r["ts"], r["end"]) for r in sel]), union([(r["ts"], r["end"]) for r in sel if not is_comm(r)])
        durs = {c: sorted(r["dur"] for r in sel if r["cat"] == c) for c in pc if c.startswith("nccl")}
        ph[p] = dict(gpu_span_us=round(b_ - a_, 1), gpu_busy_us=round(al, 1), compute_busy_us=round(co, 1), nccl_us_min_median_max={
            c: [round(v[0], 1), round(statistics.median(v), 1), round(v[-1], 1)] for c, v in durs.items()}, cpu_us_profiled=round(b - a, 1), kernels=len(sel), by_category={
            k: dict(count=v[0], gpu_us=round(v[1], 1)) for k, v in sorted(pc.items(), key=lambda x: -x[1][1])},
            cpu_waits=dict(count=sum(a <= e["ts"] <= b for e in syncs), us=round(sum(e["dur"] for e in syncs if a <= e["ts"] <= b), 1)))
    out["phases"] = ph
    for p in ("clip", "optimizer"):
        if p in ph:
            names = collections.Counter(short(r["name"]) for r in rows if r["phase"] == p)
            ph[p]["kernel_names"] = dict(names.most_common(12))
    # one block in the middle
    runs = [(int(e["name"].split("/")[2]), e["ts"], e["ts"] + e["dur"]) for e in notes if e["name"].startswith("P/run/")]
    blocks = {int(e["name"].split("/")[2]): (e["ts"], e["ts"] + e["dur"]) for e in notes if e["name"].startswith("P/block/")}
    fwd = {l: (a, b) for l, a, b in runs if "forward" in phases and a < phases["forward"][1]}
    rec = sorted([(a, b, l) for l, a, b in runs if "backward" in phases and a >= phases["backward"][0]])

    def table(a, b, listing=False):
        sel = [r for r in rows if r["launch"] is not None and a <= r["launch"] < b]
        cs = collections.defaultdict(lambda: [0, 0.0])
        for r in sel:
            cs[r["cat"]][0] += 1
            cs[r["cat"]][1] += r["dur"]
        d = dict(kernels=len(sel), gpu_us=round(sum(r["dur"] for r in sel), 1), cpu_us_profiled=round(b - a, 1),
                 by_category={k: [v[0], round(v[1], 1)] for k, v in sorted(cs.items(), key=lambda x: -x[1][1])})
        if listing:
            d["launch_order"] = [[short(r["name"]), r["cat"], round(r["dur"], 1)] for r in sel]
        return d

    mid = layers // 2
    spans = collections.defaultdict(list)
    for l, (a, b) in blocks.items():
        spans["forward with FSDP hooks"].append((l, a, b))
    for l, (a, b) in fwd.items():
        spans["forward body"].append((l, a, b))
    for i, (a, b, l) in enumerate(rec):
        spans["recompute body"].append((l, a, b))
        nxt = rec[i + 1][0] if i + 1 < len(rec) else None
        if nxt is not None:
            spans["backward with FSDP hooks (to the next block's recompute)"].append((l, b, nxt))
    out["per_block"] = {}
    for k, v in spans.items():
        ns = [sum(1 for r in rows if r["launch"] is not None and a <= r["launch"] < b) for _, a, b in v]
        d = dict(kernels_min_median_max=[min(ns), statistics.median(ns), max(ns)])
        sel = [x for x in v if x[0] == mid]
        if sel:
            d["middle_block"] = table(sel[0][1], sel[0][2], listing=True)
        out["per_block"][k] = d
    loss = [(e["ts"], e["ts"] + e["dur"]) for e in notes if e["name"] == "P/loss_chunk"]
    if loss:
        out["loss_chunk_first_forward"] = table(*loss[0], listing=True)
    names = collections.defaultdict(lambda: [0, 0.0])
    for r in rows:
        k = (r["cat"], short(r["name"]))
        names[k][0] += 1
        names[k][1] += r["dur"]
    out["top_kernels"] = [[c, n, v[0], round(v[1], 1)] for (c, n), v in sorted(names.items(), key=lambda x: -x[1][1])[:45]]
    return out


def live_at_peak(trace, base):
    """Replays allocator events of one step: what was allocated when the total was highest."""
    cur, peak, at = base, base, -1
    live = {}
    for i, e in enumerate(trace):
        if e["action"] == "alloc":
            live[e["addr"]] = e["size"]
            cur += e["size"]
            if cur > peak:
                peak, at = cur, i
        elif e["action"] == "free_requested":
            cur -= live.pop(e["addr"], e["size"])
    live, old_freed = {}, 0
    for e in trace[:at + 1]:
        if e["action"] == "alloc":
            live[e["addr"]] = e
        elif e["action"] == "free_requested":
            if live.pop(e["addr"], None) is None:
                old_freed += e["size"]

    def site(e):
        fr = e.get("frames") or []
        py = [f for f in fr if f["filename"].endswith(".py")]
        own = next((f for f in py if f["filename"].endswith("fsdp2_pytorch.py")), None)
        lib = next((f for f in py if "_fully_shard" in f["filename"] or "optim" in f["filename"] or "clip_grad" in f["filename"]), None)
        if lib:
            return f"{os.path.basename(lib['filename'])}:{lib['line']} {lib['name']}"
        if own:
            return f"{os.path.basename(own['filename'])}:{own['line']} {own['name']}"
        return "autograd engine (no Python frame)" if not py else f"{os.path.basename(py[0]['filename'])}:{py[0]['line']} {py[0]['name']}"
    g = collections.defaultdict(lambda: [0, 0])
    for e in live.values():
        k = (site(e), e["size"])
        g[k][0] += 1
        g[k][1] += e["size"]
    by_site = collections.defaultdict(int)
    for (s, _), v in g.items():
        by_site[s] += v[1]
    return dict(peak_bytes=peak, allocated_before_step_bytes=base, of_which_freed_before_peak_bytes=old_freed,
                allocated_in_step_and_live_bytes=sum(e["size"] for e in live.values()), event_index=at, events=len(trace),
                allocation_that_made_the_peak=(dict(site=site(trace[at]), bytes=trace[at]["size"]) if at >= 0 else None),
                by_site={k: v for k, v in sorted(by_site.items(), key=lambda x: -x[1])[:20]},
                groups=[dict(site=s, bytes_each=b, count=v[0], bytes=v[1]) for (s, b), v in sorted(g.items(), key=lambda x: -x[1][1])[:30]])


# ------------------------------------------------------------------ run

class ClippedAdamW:
    """Fused AdamW over the local shards after clipping by the global norm: torch.nn.utils.clip_grad_norm_ and AdamW in one pass.

    A norm that FSDP2's hook took (offload) is of the reduced bf16 gradients, the very values that AdamW gets.
    """

    def __init__(self, model, lr, max_norm, offload, divide=1):
        self.params, self.max_norm, self.offload, self.squares = list(model.parameters()), max_norm, offload, []
        with torch.no_grad():
            self.shards = [nn.Parameter(p.to_local()) for p in self.params]
        self.adam = torch.optim.AdamW(self.shards, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        if offload:
            def hook(reduced):           # on the hook's stream; what is reduced was allocated on another
                if reduced.is_cuda:
                    reduced.record_stream(torch.cuda.current_stream())
                self.squares.append(torch.linalg.vector_norm(reduced, dtype=torch.float32).div(divide).square())
            for m in model.modules():
                if isinstance(m, FSDPModule):
                    m.set_all_reduce_hook(hook)

    def norm(self):
        grads = [p.grad.to_local() for p in self.params]
        for shard, p, g in zip(self.shards, self.params, grads):
            assert shard.data_ptr() == p._local_tensor.data_ptr()
            shard.grad = g
        square = (torch.stack(self.squares) if self.offload else torch.stack(torch._foreach_norm(grads)).square()).sum()
        self.squares.clear()
        dist.all_reduce(square)
        self.total = square.sqrt()
        return self.total

    def step(self):
        scale = ((self.total + 1e-6) / self.max_norm).clamp(min=1.0)
        self.adam.grad_scale = scale.cpu() if self.offload else scale       # AdamW divides by it
        self.adam.step()
        for shard, p in zip(self.shards, self.params):
            shard.grad = p.grad = None


def read_tokens(path):
    kind = torch.int32 if path.endswith(".bin") else torch.uint8
    return torch.from_file(path, size=os.path.getsize(path) // kind.itemsize, dtype=kind)


class Batches:
    """Tokens and labels of a step: the bytes of a file, sequences in an order that a seed shuffles; without a file random, the same each step."""

    def __init__(self, path, vocab, context, sequences, rank, world, device):
        self.context, self.sequences, self.rank, self.world, self.device = context, sequences, rank, world, device
        self.data = read_tokens(path) if path else None
        if path:
            self.order = torch.randperm((len(self.data) - 1) // context, generator=torch.Generator().manual_seed(0)).tolist()
        else:
            self.rows = torch.randint(0, vocab, (sequences, context + 1), device=device)

    def __call__(self, step):
        if self.data is None:
            rows = self.rows
        else:
            first = (step * self.world + self.rank) * self.sequences
            at = [self.order[i % len(self.order)] * self.context for i in range(first, first + self.sequences)]
            rows = torch.stack([self.data[i:i + self.context + 1] for i in at]).long()
            if self.device.type == "cuda":
                rows = rows.pin_memory().to(self.device, non_blocking=True)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def attention_paths(o, c, dev, rank, gloo):
    """{kind: path} for the strong block, the same on all ranks, and what was measured."""
    def say(text):
        if rank == 0:
            print(text, flush=True)

    kinds = sorted({strong.layer_kind(c, i) for i in range(c["num_hidden_layers"])})
    if dev.type == "cpu":
        paths, measured = {k: "cpu" for k in kinds}, {}
    elif c["model_type"] != "gpt_oss":
        paths, measured = {"full": "cudnn"}, {}          # scaled_dot_product_attention with the other backends off
    elif "=" in o.attention:
        paths, measured = dict(x.split("=") for x in o.attention.split(",")), {}
    else:
        got = [None]
        if rank == 0:
            try:
                got = [strong.choose_attention(c, o.sequences, o.context, dev, say, None if o.attention == "auto" else o.attention.split(","))]
            except Exception as e:
                got = [e]
        dist.broadcast_object_list(got, src=0, group=gloo)
        if isinstance(got[0], Exception):
            raise got[0]
        paths, measured = got[0]
    assert set(kinds) <= set(paths), (kinds, paths)
    for k in kinds:
        say(f"attention of {k} layers: {paths[k]}")
    return paths, measured


def versions():
    import triton
    return dict(torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), nccl=".".join(map(str, torch.cuda.nccl.version())),
                triton=triton.__version__, python=sys.version.split()[0], driver=driver())


def driver():
    try:
        return re.search(r"(\d+\.\d+(\.\d+)?)", open("/proc/driver/nvidia/version").read()).group(1)
    except Exception:
        return None


def mean_over_ranks(losses, gloo):
    t = torch.stack([x.float() for x in losses]).cpu()
    dist.all_reduce(t, group=gloo)
    return [round(x, 6) for x in (t / dist.get_world_size()).tolist()]


def machine(world, cuda):
    gib = next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("MemTotal")) / 2**20
    return f"{world} x {torch.cuda.get_device_name() if cuda else 'CPU process'} in one host, {os.cpu_count()} cores, {gib:.0f} GiB seen"


def huge_pages():
    try:
        return open("/sys/kernel/mm/transparent_hugepage/enabled").read().strip() + ", THP_MEM_ALLOC_ENABLE=" + os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    except OSError as e:
        return str(e)


def host_rss():
    out = {}
    with open("/proc/self/status") as f:
        for l in f:
            if l.startswith(("VmRSS", "VmHWM", "RssAnon", "RssShmem", "VmLck", "VmPin")):
                out[l.split(":")[0]] = int(l.split()[1]) * 1024
    return out


def meminfo():
    d = {l.split(":")[0]: int(l.split()[1]) * 1024 for l in open("/proc/meminfo")}
    return d["MemTotal"] - d["MemAvailable"]


def main():
    global PROFILING, MARKS, MARK_MEMORY
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", choices=list(CONFIGS), required=True)
    ap.add_argument("--layers", type=int, help="override the number of layers")
    ap.add_argument("--context", type=int, default=4096)
    ap.add_argument("--sequences", type=int, default=1, help="sequences a GPU a step")
    ap.add_argument("--offload", action="store_true", help="CPUOffloadPolicy with pinned memory, optimizer on the CPU")
    ap.add_argument("--block", choices=["plain", "strong"], help="default: strong for gpt-oss, plain for the others")
    ap.add_argument("--compile", choices=["inner", "outer", "no"], help="compile each block, checkpointing outside or inside of it; "
                    "default: no for plain, outer for strong, which has no other")
    ap.add_argument("--no-checkpoint", action="store_true")
    ap.add_argument("--gate-up-blocks", type=int, default=0, help="strong: last blocks that keep the experts' first product")
    ap.add_argument("--attention", default="auto", help="strong gpt-oss: auto measures all paths and takes the fastest; a list as flash,flex only those; "
                    "sliding=flash,full=cudnn measures nothing")
    ap.add_argument("--no-reshard", action="store_true", help="strong: blocks stay gathered between forward and backward")
    ap.add_argument("--nccl-buffers", action="store_true", help="strong: FSDP2's buffers from NCCL's allocator (zero copy)")
    ap.add_argument("--data", help="file whose bytes (of a .bin: 32-bit integers) are the tokens; default: random tokens, the same each step")
    ap.add_argument("--lr", type=float, default=1e-5)
    ap.add_argument("--clip-norm", type=float, default=1.0)
    ap.add_argument("--fused-norm", action="store_true", help="F.rms_norm in place of the separate eager kernels")
    ap.add_argument("--loss-chunk", type=int, default=4096)
    ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--drop", type=int, default=3, help="first steps left out of the figures")
    ap.add_argument("--report-last", type=int, help="steps that the figures are of: --drop is all but these")
    ap.add_argument("--profile", action="store_true")
    ap.add_argument("--out", help="folder for the JSON lines")
    ap.add_argument("--label", default="")
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: dry run over gloo")
    o = ap.parse_args()
    o.block = o.block or default_block(o.model)
    is_strong = o.block == "strong"
    if o.compile is None and is_strong:
        o.compile = "outer"
    o.compile = None if o.compile == "no" else o.compile
    if o.report_last:
        o.drop = o.steps - o.report_last
    if not 0 <= o.drop < o.steps:
        ap.error("no step is left to report")
    if is_strong and o.compile == "inner":
        ap.error("the strong block checkpoints inside")
    if not is_strong and (o.gate_up_blocks or o.no_reshard or o.nccl_buffers):
        ap.error("--gate-up-blocks, --no-reshard and --nccl-buffers are for --block strong")
    c = dict(CONFIGS[o.model])
    if o.layers:
        c["num_hidden_layers"] = o.layers
    rank, world, local = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cuda = o.device == "cuda"
    began = time.time()
    threads = max(1, (os.cpu_count() or 1) // world)
    if is_strong:                        # each rank's threads on cores of their own, before there are any
        cores = sorted(os.sched_getaffinity(0))
        threads = max(1, len(cores) // world)
        if len(cores) >= world:
            os.sched_setaffinity(0, cores[local * threads:(local + 1) * threads])
    torch.set_num_threads(threads)
    mem_before = meminfo()
    if cuda:
        torch.cuda.set_device(local)
        dev = torch.device("cuda", local)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=datetime.timedelta(seconds=240))
        # cuDNN attention or an error, never a silent fallback
        for f in ("flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{f}_sdp")(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        sync = torch.cuda.synchronize
    else:
        dev = torch.device("cpu")
        dist.init_process_group("gloo")
        sync = lambda: None
    gloo = dist.new_group(backend="gloo")
    if rank == 0:
        print(f"{world} ranks with {torch.get_num_threads()} CPU threads each on cores of their own: {is_strong}; PYTORCH_CUDA_ALLOC_CONF="
              f"{os.environ.get('PYTORCH_CUDA_ALLOC_CONF')}; huge pages: {huge_pages()}", flush=True)
    mesh = init_device_mesh(o.device, (world,))
    paths, measured = attention_paths(o, c, dev, rank, gloo) if is_strong else (None, None)
    attention_s = time.time() - began
    with torch.device("meta"):
        model = strong.Model(c, checkpointing="none" if o.no_checkpoint else "selective", gate_up_blocks=o.gate_up_blocks,
                             compiled=o.compile is not None, loss_chunk=o.loss_chunk) if is_strong else Model(c, o)
    n_params = sum(p.numel() for p in model.parameters())
    kw = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16), reshard_after_forward=True,
              offload_policy=CPUOffloadPolicy(pin_memory=cuda) if o.offload else OffloadPolicy())
    if is_strong:
        strong.mark, strong.note = mark, note
        model.set_attention(paths, o.context, dev)
        fully_shard(model.embed, **kw)
        for b in model.blocks:
            fully_shard(b, **dict(kw, reshard_after_forward=b is not model.blocks[-1] and not o.no_reshard))
        fully_shard(model.head, **dict(kw, reshard_after_forward=False))
    else:
        for b in model.blocks:
            fully_shard(b, **kw)
    fully_shard(model, **kw)
    if o.nccl_buffers:
        for m in model.modules():
            if isinstance(m, FSDPModule):
                m.set_allocate_memory_from_process_group_for_comm(True)
    if not cuda:
        for m in model.modules():
            if isinstance(m, FSDPModule):
                m.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu" if o.offload else dev)
    if o.offload and cuda:       # pin before the pages are written, one group at a time
        for m in model.modules():
            if isinstance(m, FSDPModule) and (group := m._get_fsdp_state()._fsdp_param_group):
                for p in group.fsdp_params:
                    p.reset_sharded_param()
    torch.manual_seed(1 + rank)
    with torch.no_grad():
        for name, p in model.named_parameters():
            t = p.to_local()
            if "norm" in name:
                t.fill_(1.0)
            elif name.endswith("bias"):
                t.zero_()
            elif t.device != dev:
                t.copy_(torch.empty(t.shape, device=dev).normal_(std=0.02))
            else:
                t.normal_(std=0.02)
    if is_strong:
        opt = ClippedAdamW(model, o.lr, o.clip_norm, o.offload, divide=1 if cuda else world)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = Batches(o.data, c["vocab_size"], o.context, o.sequences, rank, world, dev)
    sync()
    init_s = time.time() - began

    def phase(name):
        return note(f"P/phase/{name}")

    losses, norms = [], []

    def step(ev=None):
        rec = (lambda i: ev[i].record()) if ev else (lambda i: None)
        mark("step")
        rec(0)
        with phase("forward"):
            tokens, labels = batch(len(losses))
            loss = model(tokens, labels)
        mark("forward_done")
        rec(1)
        with phase("backward"):
            loss.backward()
        mark("backward_done")
        rec(2)
        with phase("clip"):
            norm = opt.norm() if is_strong else torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        mark("clip_done")
        rec(3)
        with phase("optimizer"):
            opt.step()
            if not is_strong:
                opt.zero_grad(set_to_none=True)
        mark("optimizer_done")
        rec(4)
        losses.append(loss.detach())
        norms.append(norm.detach())

    result = dict(model=o.model, label=o.label, command="NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node %d tests/peers/fsdp2_pytorch.py %s" % (
        world, " ".join(a for i, a in enumerate(sys.argv[1:]) if a != "--out" and (i == 0 or sys.argv[i] != "--out"))),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine(world, cuda), torch=torch.__version__, versions=versions() if cuda else None, gpus=world, layers=c["num_hidden_layers"],
        context=o.context, sequences=o.sequences, offload=o.offload, compile=o.compile or "no", checkpoint=not o.no_checkpoint,
        rmsnorm="fused" if o.fused_norm else "separate kernels", parameters=n_params, cpu_threads_each=threads, block=o.block,
        attention=paths or "full, without sinks", attention_measured=measured, gate_up_blocks=o.gate_up_blocks, reshard=not o.no_reshard,
        nccl_buffers=o.nccl_buffers, data=o.data or "random", lr=o.lr, clip_norm=o.clip_norm, steps=o.steps, median_of_last=o.steps - o.drop,
        alloc_conf=os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), huge_pages=huge_pages() if is_strong else None)

    def emit(name, obj):
        if rank == 0 and o.out:
            os.makedirs(o.out, exist_ok=True)
            with open(os.path.join(o.out, name), "a") as f:
                f.write(json.dumps(obj) + "\n")

    try:
        n = o.steps - o.drop
        evs = [[torch.cuda.Event(enable_timing=True) for _ in range(5)] if cuda else None for _ in range(o.steps)]
        begins, marks = [], []
        for i in range(o.drop):
            begins.append(time.perf_counter())
            step(evs[i])
            sync()
            if rank == 0:
                print(f"step {i + 1}: {time.perf_counter() - begins[-1]:.3f} s, loss {losses[-1].item():.4f}", flush=True)
        warm_s = time.time() - began - init_s
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier(gloo)
        t0 = time.perf_counter()
        for i in range(o.drop, o.steps):  # no synchronisation between steps but FSDP2's own
            MARKS = []
            begins.append(time.perf_counter())
            step(evs[i])
            marks.append(MARKS)
        MARKS = None
        sync()
        begins.append(time.perf_counter())
        wall = (begins[-1] - t0) / n
        if cuda:
            last = (o.drop - 1, o.steps - 1)                 # nothing follows, or a barrier
            every = [(e[0].elapsed_time(e[4]) if i in last else e[0].elapsed_time(evs[i + 1][0])) / 1e3 for i, e in enumerate(evs)]
            split = {k: statistics.median(e[i].elapsed_time(e[i + 1]) / 1e3 for e in evs[o.drop:]) for i, k in enumerate(
                ("forward_s", "backward_s", "clip_s", "optimizer_s"))}
        else:
            every, split = [b - a for a, b in zip(begins, begins[1:])], {}
        ends = every[o.drop:]
        tokens_gpu = o.sequences * o.context
        med = statistics.median(ends)
        fl = flops_per_token(c, o.context, is_strong)
        result.update(step_s_median=med, step_s_min=min(ends), step_s_mean_wall=wall, step_s_all=[round(x, 4) for x in every],
                      tokens_per_s_per_gpu=tokens_gpu / med, model_flops_per_token=fl, model_tflops_per_gpu=fl * tokens_gpu / med / 1e12,
                      split_on_compute_stream={k: round(v, 4) for k, v in split.items()}, init_s=round(init_s, 1), warm_up_s=round(warm_s, 1),
                      attention_choice_s=round(attention_s, 1), losses=mean_over_ranks(losses, gloo),
                      grad_norms=[round(float(x.full_tensor() if hasattr(x, "full_tensor") else x), 6) for x in norms])
        result.update(loss_first=result["losses"][0], loss_last=result["losses"][-1], grad_norm_last=result["grad_norms"][-1])
        if cuda:
            s = torch.cuda.memory_stats()
            free, total = torch.cuda.mem_get_info()
            peaks = [None] * world
            dist.all_gather_object(peaks, (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()), group=gloo)
            result["peak_allocated_and_reserved_by_rank"] = peaks
            result.update(max_memory_allocated_bytes=torch.cuda.max_memory_allocated(), max_memory_reserved_bytes=torch.cuda.max_memory_reserved(),
                          allocated_between_steps_bytes=torch.cuda.memory_allocated(), device_used_bytes=total - free,
                          device_outside_torch_bytes=total - free - torch.cuda.memory_reserved(), alloc_retries=s.get("num_alloc_retries"))
            try:
                result["pinned_host_bytes"] = {k: v for k, v in torch.cuda.host_memory_stats().items() if k in (
                    "allocated_bytes.current", "allocated_bytes.peak", "active_bytes.current", "active_bytes.peak", "segment.current")}
            except Exception as e:
                result["pinned_host_bytes"] = str(e)[:100]
        rss = [None] * world
        dist.all_gather_object(rss, host_rss(), group=gloo)
        result.update(host_rank0=rss[0], host_rss_sum_bytes=sum(r["VmRSS"] for r in rss), host_used_growth_bytes=meminfo() - mem_before)
        # CPU time of submitting, from the last timed step: blocks in the middle
        m = marks[-1]
        ts = {t: x for t, _, x in m if t in ("step", "blocks_done", "forward_done", "backward_done", "clip_done", "optimizer_done")}
        cpu = dict(forward_us=ts["forward_done"] - ts["step"], backward_us=ts["backward_done"] - ts["forward_done"],
                   clip_us=ts["clip_done"] - ts["backward_done"], optimizer_us=ts["optimizer_done"] - ts["clip_done"])
        fb = [x for t, l, x in m if t == "block"] + [ts["blocks_done"]]
        per = dict(forward_with_hooks=[b - a for a, b in zip(fb, fb[1:])])
        runs, open_ = [], None
        for t, l, x in m:
            if t == "run":
                open_ = (l, x)
            elif t == "ran" and open_:
                runs.append((open_[0], open_[1], x))
        f = [r for r in runs if r[1] < ts["forward_done"]]
        b = [r for r in runs if r[1] >= ts["forward_done"]]
        per["forward_body"] = [y - x for _, x, y in f]
        per["recompute_body"] = [y - x for _, x, y in b]
        per["backward_with_hooks"] = [b[i + 1][1] - b[i][2] for i in range(len(b) - 1)]
        result["cpu_submit"] = dict({k: round(v * 1e6, 1) for k, v in cpu.items()}, per_block_median_us={
            k: round(statistics.median(v) * 1e6, 1) for k, v in per.items() if v},
            note="host time between submissions; equals launch cost only where the GPU is not the limit")
        if cuda and (not is_strong or o.profile):            # one step with a look at memory at every mark
            emit("fsdp2_runs.partial.jsonl", result)
            dist.barrier(gloo)
            sync()
            torch.cuda.reset_peak_memory_stats()
            MARKS, MARK_MEMORY = [], True
            step()
            sync()
            m, MARKS, MARK_MEMORY = MARKS, None, False
            order = dict(forward=("step", "forward_done"), backward=("forward_done", "backward_done"), clip=("backward_done", "clip_done"),
                         optimizer=("clip_done", "optimizer_done"))
            pk = {}
            for k, (a, b_) in order.items():
                i, j = (next(i for i, x in enumerate(m) if x[0] == y) for y in (a, b_))
                pk[k] = max(x[4] for x in m[i + 1:j + 1])
            alloc = {t: x for t, _, _, x, _ in m if t in ("step", "blocks_done", "forward_done", "backward_done", "clip_done", "optimizer_done")}
            mid = c["num_hidden_layers"] // 2
            result["memory_in_one_step"] = dict(peak_in_phase_bytes=pk, allocated_at_bytes=alloc, middle_block_and_next=[
                dict(mark=t, layer=l, allocated_bytes=a, peak_since_last_mark_bytes=p) for t, l, _, a, p in m if l in (mid, mid - 1, mid + 1)],
                last_block=[dict(mark=t, layer=l, allocated_bytes=a, peak_since_last_mark_bytes=p) for t, l, _, a, p in m
                            if l == c["num_hidden_layers"] - 1 or t == "blocks_done"],
                first_block=[dict(mark=t, layer=l, allocated_bytes=a, peak_since_last_mark_bytes=p) for t, l, _, a, p in m if l == 0])
        emit("fsdp2_runs.jsonl", result)
        if rank == 0:
            print("RESULT " + json.dumps({k: v for k, v in result.items() if k != "memory_in_one_step"}), flush=True)

        if o.profile and cuda:
            prof_out = dict(model=o.model, label=o.label, command=result["command"], machine=result["machine"], date=result["date"],
                            unprofiled_step_s=med)
            dist.barrier(gloo)
            sync()
            PROFILING = True
            ctx = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) if rank == 0 \
                else contextlib.nullcontext()
            with ctx as prof:
                step()
                sync()
            dist.barrier(gloo)
            PROFILING = False
            trace = []
            if rank == 0:
                path = f"/tmp/trace_{os.getpid()}.json"
                prof.export_chrome_trace(path)
                try:
                    prof_out.update(analyse(path, c["num_hidden_layers"]))
                except Exception as e:
                    import traceback
                    traceback.print_exc()
                    prof_out["analysis_error"] = repr(e)[:300]
                    if o.out:            # keep the raw trace only when it could not be read
                        import gzip
                        with open(path, "rb") as f, gzip.open(os.path.join(o.out, "trace_unread.json.gz"), "wb") as g:
                            g.write(f.read())
                os.unlink(path)
                del prof
                emit("fsdp2_profiles.partial.jsonl", prof_out)
                torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=600000)
            dist.barrier(gloo)
            base = torch.cuda.memory_allocated()
            step()
            sync()
            if rank == 0:
                try:
                    trace = torch.cuda.memory._snapshot()["device_traces"][local]
                    torch.cuda.memory._record_memory_history(None)
                    prof_out["memory_at_peak"] = live_at_peak([e for e in trace if e["action"] in ("alloc", "free_requested")], base)
                except Exception as e:
                    import traceback
                    traceback.print_exc()
                    prof_out["memory_error"] = repr(e)[:300]
                emit("fsdp2_profiles.jsonl", prof_out)
                print("PROFILE " + json.dumps({k: prof_out.get(k) for k in ("step_span_us", "gpu_busy_us", "gpu_idle_us", "kernels", "by_category",
                                                                          "analysis_error", "memory_error")}), flush=True)
    except torch.OutOfMemoryError as e:
        result["error"] = "out of memory: " + str(e)[:300]
        emit("fsdp2_runs.jsonl", result)
        print("RESULT " + json.dumps(result), flush=True)
        os._exit(3)                      # the other ranks are inside a collective
    dist.barrier(gloo)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
