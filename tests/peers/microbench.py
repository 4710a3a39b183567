#!/usr/bin/env python3
"""Micro-benchmark tables of one host's GPUs, as the simulator's cost tables read them.

One process a GPU, all GPUs run each test at once unless a row says otherwise:

    NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node 4 microbench.py --out microbench.json

The file is rewritten after every table, so an interrupted run keeps what it measured. Every time is device time
between two CUDA events around a batch of launches that were queued behind a sleeping kernel (the launches are
therefore hidden), unless the field's name says `synchronised` or `cpu`. A value is the median over the GPUs of each
GPU's median batch; `_max` fields are the slowest GPU. Operands rotate through a large pool of random data, so nothing
is found in the L2 cache by accident; fields named `hot` reuse the same operands.
"""
import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast stays off on shared hosts

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16, FP32 = torch.bfloat16, torch.float32
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 1e9
RANK, WORLD, LOCAL = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
DEV = torch.device("cuda", LOCAL)
ARGS = None
RESULT = {}
GLOO = None


# ---------------------------------------------------------------- harness

def sh(cmd):
    try:
        return subprocess.run(cmd, shell=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except Exception as e:  # provenance only
        return f"unavailable: {e}"


def save():
    if RANK == 0:
        tmp = ARGS.out + ".tmp"
        with open(tmp, "w") as f:
            f.write(dump_tables(RESULT))
        os.replace(tmp, ARGS.out)


def dump_tables(obj):
    """JSON with one row of a table a line."""
    def table(t):
        if isinstance(t, dict) and isinstance(t.get("rows"), list):
            head = json.dumps({k: v for k, v in t.items() if k != "rows"}, indent=2)[:-2]
            rows = ",\n".join("    " + json.dumps(r) for r in t["rows"])
            return head + (",\n" if len(t) > 1 else "\n") + '  "rows": [\n' + rows + "\n  ]\n}"
        return json.dumps(t, indent=2)
    return "{\n" + ",\n".join(json.dumps(k) + ": " + table(v) for k, v in obj.items()) + "\n}\n"


def meet(flag=0):
    """Host barrier that also tells whether any rank raised `flag`."""
    if WORLD == 1:
        return bool(flag)
    t = torch.tensor([int(flag)])
    dist.all_reduce(t, op=dist.ReduceOp.MAX, group=GLOO)
    return bool(t.item())


def agreed(x):
    """The largest of the ranks' values, so that all ranks launch the same number of collectives."""
    if WORLD == 1:
        return x
    t = torch.tensor([float(x)], dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX, group=GLOO)
    return t.item()


def gathered(value):
    if WORLD == 1:
        return [value]
    out = [None] * WORLD
    dist.all_gather_object(out, value, group=GLOO)
    return out


def spin(us):
    torch.cuda._sleep(int(us * 1900))  # about 1.9 cycles a nanosecond


def batch_us(fn, n, sleep_us, stream=None):
    s = stream or torch.cuda.current_stream()
    e0, e1 = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(s):
        if sleep_us:
            spin(sleep_us)
        e0.record(s)
        for i in range(n):
            fn(i)
        e1.record(s)
    e1.synchronize()
    return e0.elapsed_time(e1) * 1e3 / n


def bench(fn, batch_ms=25.0, max_n=200, min_n=3, reps=3, warm=2):
    """Microseconds a call, launches hidden. `fn(i)` launches call number i."""
    for i in range(warm):
        fn(i)
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    fn(0)
    cpu_us = (time.perf_counter() - t0) * 1e6
    torch.cuda.synchronize()
    est = batch_us(fn, 2, 3 * cpu_us + 20)
    n = max(min_n, min(max_n, math.ceil(batch_ms * 1e3 / est)))
    if est > 60e3:
        n, reps = max(2, min_n - 1), 1
    elif est > 15e3:
        reps = min(reps, 2)
    return statistics.median(batch_us(fn, n, min(n * cpu_us * 1.5 + 50, 2e5)) for _ in range(reps))


def each(points, fn, budget_s, key=None):
    """Run fn(point) -> dict of measurements (microseconds) on all ranks; merge to rows on rank 0."""
    rows, start = [], time.time()
    for p in points:
        if meet(time.time() - start > budget_s):
            rows.append({"note": "time budget reached, remaining points not measured"})
            break
        try:
            r = fn(p)
        except Exception as e:
            r = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
        torch.cuda.synchronize()
        rows.append(r)
    everyone = gathered(rows)
    out = []
    for i, r in enumerate(rows):
        vals = [o[i] for o in everyone if i < len(o)]
        m = dict(r)
        bad = [v for v in vals if "error" in v]
        if bad:
            m = dict(bad[0], **{k: v for k, v in r.items() if k != "error"})
        else:
            for k, v in r.items():
                if isinstance(v, float) and k.endswith("_us"):
                    xs = [o[k] for o in vals if o.get(k) is not None]
                    m[k] = round(statistics.median(xs), 3)
                    if len(xs) > 1:
                        m[k[:-3] + "_max_us"] = round(max(xs), 3)
                elif isinstance(v, float):
                    m[k] = round(statistics.median([o[k] for o in vals if isinstance(o.get(k), float)]), 4)
        out.append(m)
    return out


class Sampler(threading.Thread):
    """SM clock and power of GPU 0 while a table runs."""
    def __init__(self):
        super().__init__(daemon=True)
        self.rows, self.stop = [], False
        try:
            import pynvml
            pynvml.nvmlInit()
            self.h, self.n = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml
        except Exception:
            self.h = None

    def run(self):
        while not self.stop and self.h is not None:
            try:
                self.rows.append((self.n.nvmlDeviceGetClockInfo(self.h, 1), self.n.nvmlDeviceGetPowerUsage(self.h) / 1e3,
                                  self.n.nvmlDeviceGetTemperature(self.h, 0)))
            except Exception:
                pass
            time.sleep(0.1)

    def summary(self):
        if not self.rows:
            return None
        c, p, t = zip(*self.rows)
        q = lambda x: [min(x), round(statistics.median(x), 1), max(x)]
        return {"sm_clock_mhz_min_median_max": q(c), "power_w_min_median_max": q(p), "temperature_c_max": max(t)}


# ---------------------------------------------------------------- pools

class Pool:
    """Random bf16 operands at rotating offsets."""
    def __init__(self, nbytes):
        self.t = torch.empty(nbytes // 2, dtype=BF16, device=DEV)
        for c in self.t.split(1 << 30):
            c.normal_()

    def views(self, shape, rotate_bytes=256 * MIB, cap=64):
        n = math.prod(shape)
        step = (n + 127) // 128 * 128
        k = max(1, min(cap, self.t.numel() // step, math.ceil(rotate_bytes / (2 * n))))
        return [self.t[i * step:i * step + n].view(shape) for i in range(k)]


X = W = Y = O = None   # X, W, Y stay random; results go to O


def pools():
    global X, W, Y, O
    if X is None:
        big = 1 if not ARGS.smoke else 16
        X, W, Y, O = Pool(17 * GIB // big), Pool(12 * GIB // big), Pool(17 * GIB // big), Pool(17 * GIB // big)


def rot(views):
    n = len(views)
    return lambda i: views[i % n]


# ---------------------------------------------------------------- tables

def dense_point(p):
    kind, M, N, K = p["layout"], p["M"], p["N"], p["K"]
    r = dict(p)
    nbytes = 2 * (M * K + N * K + M * N)
    flops = 2.0 * M * N * K
    if nbytes > 24 * GB or flops / 650e12 > 0.3:
        return dict(r, skipped="over 24 GB or 300 ms")
    x, w, dy = rot(X.views((M, K))), rot(W.views((N, K))), rot(Y.views((M, N)))
    out = rot(O.views({"forward": (M, N), "dgrad": (M, K), "wgrad": (N, K)}[kind]))
    if kind == "forward":      # y[M,N] = x[M,K] . w[N,K]^T
        fn = lambda i: torch.mm(x(i), w(i).t(), out=out(i))
    elif kind == "dgrad":      # dx[M,K] = dy[M,N] . w[N,K]
        fn = lambda i: torch.mm(dy(i), w(i), out=out(i))
    else:                      # dw[N,K] = dy[M,N]^T . x[M,K]
        fn = lambda i: torch.mm(dy(i).t(), x(i), out=out(i))
    t = bench(fn)
    return dict(r, time_us=t, tflops=flops / t / 1e6, operand_bytes=nbytes)


def t_dense(budget):
    pools()
    Ms, Ns, Ks = [128, 512, 2048, 8192, 32768, 131072], [128, 512, 2048, 8192, 32768], [128, 512, 2048, 8192, 32768]
    extra = [(8192, 8192, 8192), (4096, 4096, 2048), (8192, 2048, 4096), (16384, 5120, 2048), (65536, 4096, 2048),
             (4096, 151936, 2048), (8192, 18432, 7168), (32768, 151936, 2048), (4096, 201088, 2880), (4096, 129280, 7168)]
    if ARGS.smoke:
        Ms, Ns, Ks, extra = [128], [128], [128, 2048], extra[:1]
    pts = [dict(layout="forward", M=m, N=n, K=k) for m, n, k in extra]
    pts += [dict(layout="forward", M=m, N=n, K=k) for m in Ms for n in Ns for k in Ks]
    co = [(m, n, k) for m in Ms[1::2] + Ms[4:5] for n in Ns[1:4] for k in Ks[1:4]] + extra
    for kind in ("dgrad", "wgrad"):
        pts += [dict(layout=kind, M=m, N=n, K=k) for m, n, k in co]
    return {"what": "bf16 matmul, fp32 accumulate, cuBLAS through torch.mm; forward y[M,N]=x[M,K].w[N,K]^T, dgrad "
                    "dx[M,K]=dy[M,N].w[N,K], wgrad dw[N,K]=dy[M,N]^T.x[M,K]; operands rotate over at least 256 MiB each "
                    "(so they come from HBM); FLOPs 2MNK", "rows": each(pts, dense_point, budget)}


def grouped_point(p):
    kind, E, R, K, N = p["layout"], p["experts"], p["rows_per_expert"], p["K"], p["N"]
    T = E * R
    nbytes = 2 * (T * K + E * K * N + T * N)
    flops = 2.0 * T * K * N
    if nbytes > 24 * GB or flops / 500e12 > 0.2 or 2 * E * K * N > W.t.numel() * 2:
        return dict(p, skipped="over 24 GB or 200 ms")
    offs = torch.arange(R, T + 1, R, dtype=torch.int32, device=DEV)
    x, w, dy = rot(X.views((T, K))), rot(W.views((E, N, K))), rot(Y.views((T, N)))
    if kind == "forward":            # y[T,N] = x[T,K] . w[E,N,K]^T, the layout of a Linear an expert
        fn = lambda i: torch._grouped_mm(x(i), w(i).transpose(-2, -1), offs=offs)
    elif kind == "forward_kn":       # weights stored [E,K,N], as gpt-oss stores them
        v = rot(W.views((E, K, N)))
        fn = lambda i: torch._grouped_mm(x(i), v(i), offs=offs)
    elif kind == "dgrad":            # dx[T,K] = dy[T,N] . w[E,N,K]
        fn = lambda i: torch._grouped_mm(dy(i), w(i), offs=offs)
    else:                            # dw[E,N,K] = dy[T,N]^T . x[T,K], groups along T
        fn = lambda i: torch._grouped_mm(dy(i).t(), x(i), offs=offs)
    t = bench(fn, batch_ms=20)
    return dict(p, time_us=t, tflops=flops / t / 1e6, operand_bytes=nbytes)


def t_grouped(budget):
    pools()
    KN = [(2048, 1536), (768, 2048), (2880, 5760), (2880, 2880), (7168, 4096), (2048, 7168), (4096, 14336)]
    Es, Rs = [4, 16, 64, 128], [16, 64, 256, 1024, 4096, 16384]
    if ARGS.smoke:
        KN, Es, Rs = KN[:1], [4], [64]
    pts = [dict(layout="forward", experts=e, K=k, N=n, rows_per_expert=r) for k, n in KN for e in Es for r in Rs]
    named = [(128, 2048, 1536, 512), (32, 2048, 1536, 2048), (32, 2048, 1536, 8192), (32, 2880, 5760, 1024),
             (64, 7168, 4096, 1024), (64, 2048, 2048, 512), (64, 1024, 2048, 512), (128, 768, 2048, 256),
             (128, 768, 2048, 2048), (128, 2048, 1536, 256), (128, 2048, 1536, 2048), (32, 2880, 5760, 512),
             (32, 2880, 2880, 512), (32, 2880, 5760, 2048), (32, 2880, 2880, 2048)]
    if not ARGS.smoke:
        pts = [dict(layout="forward", experts=e, K=k, N=n, rows_per_expert=r) for e, k, n, r in named] + pts
        for kind in ("wgrad", "dgrad"):
            pts += [dict(layout=kind, experts=e, K=k, N=n, rows_per_expert=r) for e, k, n, r in named]
            pts += [dict(layout=kind, experts=e, K=k, N=n, rows_per_expert=r) for k, n in KN for e in (16, 128)
                    for r in (64, 256, 1024, 4096)]
        pts += [dict(layout="forward_kn", experts=e, K=k, N=n, rows_per_expert=r) for e, k, n, r in named[:5]]
    else:
        pts += [dict(p, layout=k) for p in pts[:1] for k in ("wgrad", "dgrad", "forward_kn")]
    return {"what": "bf16 grouped matmul, CUTLASS through torch._grouped_mm, equal rows an expert; includes the small kernel "
                    "that prepares the problem list, and the output's allocation from the caching allocator; FLOPs 2*E*rows*K*N",
            "rows": each(pts, grouped_point, budget)}


def attn_point(p):
    B, S, hq, hk, dqk, dv = (p[k] for k in ("batch", "S", "heads", "kv_heads", "d_qk", "d_v"))
    fl = float(B) * S * S * hq * (dqk + dv)
    if fl / 350e12 > 1.0:
        return dict(p, skipped="over 1 s")
    mk = lambda h, d: torch.randn(B, S, h, d, device=DEV, dtype=BF16).transpose(1, 2).requires_grad_()
    q, k, v = mk(hq, dqk), mk(hk, dqk), mk(hk, dv)
    do = torch.randn(B, S, hq, dv, device=DEV, dtype=BF16).transpose(1, 2)
    backend = SDPBackend.CUDNN_ATTENTION if p["backend"] == "cudnn" else SDPBackend.FLASH_ATTENTION
    r = dict(p)
    with sdpa_kernel(backend):
        gqa = hq != hk
        how = "native (enable_gqa)" if gqa else "none"
        run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        try:
            o = run()
        except RuntimeError as e:
            if dqk != dv:      # refused: pad V to the width of K, FLOPs still count the true width
                r["error_unpadded"] = str(e)[:200]
                r["v_padded_to"] = dqk
                v = F.pad(v.detach(), (0, dqk - dv)).requires_grad_()
                do = F.pad(do, (0, dqk - dv))
            elif not gqa:
                raise
            if gqa:
                r["gqa_error"] = str(e)[:200]
                how = "expanded KV"
                k, v = (t.detach().repeat_interleave(hq // hk, 1).requires_grad_() for t in (k, v))
            run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
            o = run()
        r["gqa"] = how
        tf = bench(lambda i: run(), batch_ms=30, max_n=50)
        r.update(forward_us=tf, forward_tflops=fl / tf / 1e6)
        if 2.5 * fl / 400e12 < 1.0:
            tb = bench(lambda i: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), batch_ms=30, max_n=40, min_n=2)
            r.update(backward_us=tb, backward_tflops=2.5 * fl / tb / 1e6)
    return r


def t_attention(budget):
    shapes = [(32, 4, 128, 128), (8, 1, 128, 128), (2, 1, 128, 128), (64, 8, 64, 64), (8, 1, 64, 64), (16, 16, 128, 128),
              (16, 16, 192, 128), (4, 4, 192, 128)]
    Ss = [1024, 4096, 16384, 65536, 131072]
    pts = []
    if ARGS.smoke:
        shapes, Ss = [shapes[0], shapes[6]], [1024]
    else:
        pts = [dict(backend="cudnn", batch=8, S=4096, heads=32, kv_heads=4, d_qk=128, d_v=128)]
    for s in Ss:
        for h, k, dq, dv in shapes:
            b = ["cudnn"] + (["flash"] if dq == 192 and s in (1024, 4096, 16384) else [])
            pts += [dict(backend=x, batch=1, S=s, heads=h, kv_heads=k, d_qk=dq, d_v=dv) for x in b]
    # the values of tensors do not survive between points: release them before the pools are made again
    return {"what": "torch scaled_dot_product_attention, causal, bf16, q/k/v laid out [batch, S, heads, d]; forward as in training "
                    "(keeps the log-sum-exp); causal FLOPs S*S*heads*(d_qk+d_v) forward, 2.5 times that backward; backward is "
                    "autograd of the one op", "rows": each(pts, attn_point, budget)}


def mem_point(p):
    kind, nb = p["kernel"], p["bytes"]
    r = dict(p)
    if kind == "rmsnorm_hf":
        T, H = p["rows"], p["width"]
        xs, w = rot(X.views((T, H))), torch.ones(H, device=DEV, dtype=BF16)

        def norm(x):
            h = x.to(FP32)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return w * h.to(BF16)
        t = bench(lambda i: norm(xs(i)), max_n=60)
        # float: 2+4, pow: 4+4, mean: 4, mul: 4+4, cast: 4+2, weight mul: 2+2
        return dict(r, time_us=t, moved_bytes=T * H * 36, rw_gb_per_s=T * H * 36 / t / 1e3,
                    kernels="to, pow, mean, add, rsqrt, mul, to, mul")
    if kind == "rmsnorm_fused":
        T, H = p["rows"], p["width"]
        xs, w = rot(X.views((T, H))), torch.ones(H, device=DEV, dtype=BF16)
        t = bench(lambda i: F.rms_norm(xs(i), (H,), w, 1e-6), max_n=60)
        return dict(r, time_us=t, moved_bytes=T * H * 4, rw_gb_per_s=T * H * 4 / t / 1e3)
    n = nb // 2
    if kind == "copy":
        a, o, moved = X.views((n,)), O.views((n,)), 2 * nb
        mk = lambda a, o, b: (lambda i: o(i).copy_(a(i)))
        b = a
    elif kind == "add":
        a, b, o, moved = X.views((n,)), W.views((n,)), O.views((n,)), 3 * nb
        mk = lambda a, o, b: (lambda i: torch.add(a(i), b(i), out=o(i)))
    elif kind == "cast_fp32_to_bf16":   # bytes counts the fp32 source
        a = [v.view(FP32) for v in X.views((n,))]
        o = O.views((n // 2,))
        b, moved = a, nb + nb // 2
        mk = lambda a, o, b: (lambda i: o(i).copy_(a(i)))
    elif kind == "silu_mul_eager":      # two kernels: silu then multiply
        a, b, o, moved = X.views((n,)), W.views((n,)), O.views((n,)), 5 * nb
        mk = lambda a, o, b: (lambda i: torch.mul(F.silu(a(i)), b(i), out=o(i)))
    elif kind == "fill":
        a = b = o = O.views((n,))
        moved = nb
        mk = lambda a, o, b: (lambda i: o(i).zero_())
    t = bench(mk(rot(a), rot(o), rot(b)))
    r.update(time_us=t, moved_bytes=moved, rw_gb_per_s=moved / t / 1e3)
    if nb <= 16 * MIB:
        h = bench(mk(rot(a[:1]), rot(o[:1]), rot(b[:1])))
        r.update(hot_us=h, hot_rw_gb_per_s=moved / h / 1e3)
    return r


def t_memory(budget):
    pools()
    sizes = [64 * KIB * 4 ** i for i in range(9)]
    if ARGS.smoke:
        sizes = [64 * KIB, MIB]
    pts = [dict(kernel=k, bytes=b) for k in ("copy", "add", "cast_fp32_to_bf16", "silu_mul_eager", "fill") for b in sizes]
    for rows in ([32768, 4096] if not ARGS.smoke else [512]):
        pts += [dict(kernel=k, bytes=rows * 2048 * 2, rows=rows, width=2048) for k in ("rmsnorm_hf", "rmsnorm_fused")]
    return {"what": "memory-bound eager kernels; `bytes` is the size of one bf16 operand (of the fp32 source for the cast); "
                    "rates count every byte read and written by every kernel of the row (silu_mul_eager: two kernels, 5 times "
                    "`bytes`; rmsnorm_hf: all its kernels, 36 B an element)", "rows": each(pts, mem_point, budget)}


def eager_factories():
    """name, shape fields, factory -> (call, bytes that must move): the operations that an eager FSDP2 step of an MoE is made of."""
    rnd = lambda *sh, dt=BF16: torch.randn(*sh, device=DEV, dtype=dt)
    out = []
    small = ARGS.smoke
    add = lambda name, fields, f: out.append((name, fields, f))

    def routing(T, k, E):
        idx = torch.stack([torch.randperm(E, device=DEV)[:k] for _ in range(64)]).repeat(T // 64, 1)
        flat = idx.view(-1)
        order = torch.argsort(flat, stable=True)
        return flat, order, order // k

    for T in ([64] if small else [4096, 32768]):
        for H, k, E, I in ((2048, 8, 128, 768), (2880, 4, 32, 2880)):
            R = T * k
            f = dict(tokens=T, rows=R, width=H, experts=E, top_k=k)

            def gather(T=T, H=H, k=k, E=E):
                _, _, rows = routing(T, k, E)
                x = rnd(T, H)
                return (lambda i: x.index_select(0, rows)), 4 * H * T * k
            add("index_select_rows", f, gather)

            def scatter(T=T, H=H, k=k, E=E):
                _, _, rows = routing(T, k, E)
                y, o = rnd(T * k, H), torch.zeros(T, H, device=DEV, dtype=BF16)
                return (lambda i: o.index_add_(0, rows, y)), 2 * H * T * k + 4 * H * T
            add("index_add_rows", f, scatter)

            def scale(R=R, H=H):
                y, w = rnd(R, H), rnd(R, 1)
                return (lambda i: y * w), 4 * R * H
            add("scale_rows", f, scale)

            def scale_grad(R=R, H=H):
                y, g = rnd(R, H), rnd(R, H)
                return (lambda i: (y * g).sum(-1, keepdim=True)), 8 * R * H
            add("scale_rows_weight_gradient (mul, sum)", f, scale_grad)

            def swiglu(R=R, I=I):
                g = rnd(R, 2 * I)
                a, b = g.chunk(2, -1)
                return (lambda i: F.silu(a) * b), 10 * R * I
            add("silu_mul_of_halves (2 kernels)", dict(f, half_width=I), swiglu)

            def swiglu_b(R=R, I=I):
                g = rnd(R, 2 * I).requires_grad_()
                a, b = g.chunk(2, -1)
                y, dy = F.silu(a) * b, rnd(R, I)
                return (lambda i: torch.autograd.grad(y, g, dy, retain_graph=True)), 26 * R * I
            add("silu_mul_of_halves backward", dict(f, half_width=I), swiglu_b)
        for rows, w in ((T, 2048), (T * 32, 128), (T * 4, 128), (T, 2880)):
            f = dict(rows=rows, width=w)

            def hf(x, wt):
                h = x.to(FP32)
                h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
                return wt * h.to(BF16)
            for nm, fn in (("rmsnorm_hf", hf), ("rmsnorm_fused", lambda x, wt: F.rms_norm(x, (x.shape[-1],), wt, 1e-6))):
                def fw(rows=rows, w=w, fn=fn, nm=nm):
                    x, wt = rnd(rows, w), torch.ones(w, device=DEV, dtype=BF16)
                    return (lambda i: fn(x, wt)), rows * w * (36 if nm == "rmsnorm_hf" else 4)
                add(nm + " forward", f, fw)

                def bw(rows=rows, w=w, fn=fn, nm=nm):
                    x, wt = rnd(rows, w).requires_grad_(), torch.ones(w, device=DEV, dtype=BF16, requires_grad=True)
                    y, dy = fn(x, wt), rnd(rows, w)
                    return (lambda i: torch.autograd.grad(y, (x, wt), dy, retain_graph=True)), rows * w * 6
                add(nm + " backward", f, bw)
        for hq in (32, 4):
            def rope(T=T, hq=hq):
                x, c, s_ = rnd(1, T, hq, 128).transpose(1, 2), rnd(T, 128), rnd(T, 128)

                def f(i):
                    a, b = x.chunk(2, dim=-1)
                    return x * c + torch.cat((-b, a), dim=-1) * s_
                return f, T * hq * 128 * 2 * 11
            add("rope_hf (mul, neg, cat, mul, add)", dict(tokens=T, heads=hq, d=128), rope)

            def rope_b(T=T, hq=hq):
                x, c, s_ = rnd(1, T, hq, 128).transpose(1, 2).requires_grad_(), rnd(T, 128), rnd(T, 128)
                a, b = x.chunk(2, dim=-1)
                y = x * c + torch.cat((-b, a), dim=-1) * s_
                dy = torch.randn_like(y)
                return (lambda i: torch.autograd.grad(y, x, dy, retain_graph=True)), T * hq * 128 * 2 * 12
            add("rope_hf backward", dict(tokens=T, heads=hq, d=128), rope_b)
        for E, k in ((128, 8), (64, 8), (32, 4)):
            f = dict(tokens=T, experts=E, top_k=k)

            def top(T=T, E=E, k=k):
                x = rnd(T, E, dt=FP32)
                return (lambda i: torch.topk(x, k, -1)), T * E * 4
            add("topk", f, top)

            def sort(T=T, E=E, k=k):
                flat, _, _ = routing(T, k, E)
                return (lambda i: torch.argsort(flat, stable=True)), T * k * 16
            add("argsort", f, sort)

            def hist(T=T, E=E, k=k):
                flat, _, _ = routing(T, k, E)
                return (lambda i: torch.cumsum(torch.histc(flat.int(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)), T * k * 12
            add("histc_and_cumsum", f, hist)

            def soft(T=T, E=E):
                x = rnd(T, E)
                return (lambda i: torch.softmax(x, -1, dtype=FP32)), T * E * 6
            add("softmax_fp32_of_bf16", f, soft)
        for N in (2048,):
            def resid(T=T, N=N):
                a, b = rnd(T, N), rnd(T, N)
                return (lambda i: a + b), T * N * 6
            add("add", dict(rows=T, width=N), resid)
    for V, H in ([(512, 64)] if small else [(151936, 2048), (50304, 2048), (201088, 2880)]):
        T = 64 if small else 4096
        f = dict(tokens=T, vocabulary=V)

        def ce(T=T, V=V):
            x, y = rnd(T, V, dt=FP32), torch.randint(0, V, (T,), device=DEV)
            return (lambda i: F.cross_entropy(x, y, reduction="sum")), T * V * 8
        add("cross_entropy_fp32 forward", f, ce)

        def ce_b(T=T, V=V):
            x, y = rnd(T, V, dt=FP32).requires_grad_(), torch.randint(0, V, (T,), device=DEV)
            l = F.cross_entropy(x, y, reduction="sum")
            return (lambda i: torch.autograd.grad(l, x, retain_graph=True)), T * V * 12
        add("cross_entropy_fp32 backward (fill, nll, softmax)", f, ce_b)

        def up(T=T, V=V):
            x = rnd(T, V)
            return (lambda i: x.float()), T * V * 6
        add("logits_bf16_to_fp32", f, up)

        def emb(T=T, V=V, H=H):
            w, t = rnd(V, H), torch.randint(0, V, (T,), device=DEV)
            return (lambda i: F.embedding(t, w)), T * H * 4
        add("embedding forward", dict(f, width=H), emb)

        def emb_b(T=T, V=V, H=H):
            w, t = rnd(V, H).requires_grad_(), torch.randint(0, V, (T,), device=DEV)
            y, dy = F.embedding(t, w), rnd(T, H)
            return (lambda i: torch.autograd.grad(y, w, dy, retain_graph=True)), V * H * 2
        add("embedding backward (dense gradient)", dict(f, width=H), emb_b)
    # FSDP2's own copies and the optimizer, for one block: local shard sizes of 4 ranks
    blocks = {"qwen3-30b-a3b": [512, 512, 2 ** 21, 2 ** 18, 2 ** 18, 2 ** 21, 32, 32, 65536, 100663296, 50331648],
              "olmoe-1b-7b": [512, 512, 2 ** 20, 2 ** 20, 2 ** 20, 2 ** 20, 512, 512, 32768, 67108864, 33554432],
              "gpt-oss-20b": [720, 720, 2949120, 1024, 368640, 128, 368640, 128, 2949120, 720, 23040, 8, 132710400, 66355200, 46080, 23040]}
    for name, sh in blocks.items():
        if small:
            sh = [max(8, n >> 12) for n in sh]
        n = sum(sh)
        f = dict(model=name, shard_elements=n, tensors=len(sh))

        def cast_in(sh=sh, n=n):
            src = [rnd(m, dt=FP32) for m in sh]
            dst = torch.empty(n, device=DEV, dtype=BF16).split(sh)
            return (lambda i: torch._foreach_copy_(dst, src)), 6 * n
        add("fsdp: cast shards fp32 to bf16 (foreach)", f, cast_in)

        def copy_in(sh=sh, n=n):
            src = rnd(n).split(sh)
            dst = torch.empty(n, device=DEV, dtype=BF16).split(sh)
            return (lambda i: torch._foreach_copy_(dst, src)), 4 * n
        add("fsdp: copy shards into the gather buffer (foreach)", f, copy_in)

        def copy_out(sh=sh, n=n):
            src = rnd(4 * n).view(4, n)
            dst = [torch.empty(4, m, device=DEV, dtype=BF16) for m in sh]
            return (lambda i: torch.split_with_sizes_copy(src, sh, dim=1, out=dst)), 16 * n
        add("fsdp: copy gathered weights out (split_with_sizes_copy)", f, copy_out)

        def cat(sh=sh, n=n):
            g = [rnd(4, m) for m in sh]
            o = torch.empty(4, n, device=DEV, dtype=BF16)
            return (lambda i: torch._chunk_cat(g, dim=0, num_chunks=4, out=o)), 16 * n
        add("fsdp: copy gradients into the reduce buffer (chunk_cat)", f, cat)

        def cast_out(n=n):
            g = rnd(n)
            return (lambda i: g.to(FP32)), 6 * n
        add("fsdp: cast reduced gradient bf16 to fp32", f, cast_out)

        def adam(sh=sh, n=n):
            ps = [rnd(m, dt=FP32).requires_grad_() for m in sh]
            for q in ps:
                q.grad = torch.randn_like(q)
            o = torch.optim.AdamW(ps, fused=True)
            return (lambda i: o.step()), 28 * n
        add("adamw_fused on the GPU, fp32", f, adam)

        def norm(sh=sh, n=n):
            g = [rnd(m, dt=FP32) for m in sh]
            return (lambda i: torch._foreach_norm(g)), 4 * n
        add("clip: foreach_norm fp32", f, norm)

        def mul(sh=sh, n=n):
            g, c = [rnd(m, dt=FP32) for m in sh], torch.ones((), device=DEV)
            return (lambda i: torch._foreach_mul_(g, c)), 8 * n
        add("clip: foreach_mul_ fp32", f, mul)
    return out


def t_eager(budget):
    fs = eager_factories()

    def point(p):
        f, moved = fs[p["i"]][2]()
        t = bench(f, batch_ms=15, max_n=40)
        r = {"op": fs[p["i"]][0], **fs[p["i"]][1], "time_us": t, "bytes_counted": moved, "gb_per_s": moved / t / 1e3}
        return r
    return {"what": "eager operations of an FSDP2 MoE step, each as PyTorch's own kernels; bytes_counted: every byte each kernel of the row "
                    "reads and writes (a lower bound for the backward rows); routing is balanced", "rows": each(
                        [dict(i=i) for i in range(len(fs))], point, budget)}


def t_grouped_uneven(budget):
    pools()

    def point(p):
        E, T, K, N = p["experts"], p["rows"], p["K"], p["N"]
        g = torch.Generator().manual_seed(7)
        if p["distribution"] == "equal":
            c = torch.full((E,), T // E)
        elif p["distribution"] == "uniform random":
            c = torch.bincount(torch.randint(0, E, (T,), generator=g), minlength=E)
        else:       # Zipf, exponent as named
            w = 1.0 / torch.arange(1, E + 1).double() ** float(p["distribution"].split()[1])
            c = torch.bincount(torch.multinomial(w[torch.randperm(E, generator=g)], T, replacement=True, generator=g), minlength=E)
        offs = torch.cumsum(c, 0).to(torch.int32).to(DEV)
        x, w, dy = rot(X.views((T, K))), rot(W.views((E, N, K))), rot(Y.views((T, N)))
        r = dict(p, rows_max=int(c.max()), rows_min=int(c.min()))
        for nm, f in (("forward", lambda i: torch._grouped_mm(x(i), w(i).transpose(-2, -1), offs=offs)),
                      ("dgrad", lambda i: torch._grouped_mm(dy(i), w(i), offs=offs)),
                      ("wgrad", lambda i: torch._grouped_mm(dy(i).t(), x(i), offs=offs))):
            t = bench(f, batch_ms=15)
            r[nm + "_us"] = t
            r[nm + "_tflops"] = 2.0 * T * K * N / t / 1e6
        return r
    shapes = [(128, 2048, 1536), (128, 768, 2048), (64, 2048, 2048), (64, 1024, 2048), (32, 2880, 5760), (32, 2880, 2880)]
    rows = [16384, 32768, 131072, 262144]
    if ARGS.smoke:
        shapes, rows = shapes[:1], [1024]
    pts = [dict(experts=E, K=K, N=N, rows=T, distribution=d) for E, K, N in shapes for T in rows
           for d in ("equal", "uniform random", "zipf 0.5", "zipf 1.0")]
    return {"what": "grouped matmul (torch._grouped_mm, weights [E,N,K]) with uneven rows an expert", "rows": each(pts, point, budget)}


def t_copies(budget):
    top = GIB if not ARGS.smoke else 4 * MIB
    hu, hd = (torch.empty(top, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    hu.random_(0, 255) if ARGS.smoke else hu.view(torch.int64).fill_(0x123456789ABCDEF)
    du, dd = (torch.empty(top, dtype=torch.uint8, device=DEV) for _ in range(2))
    up_s, dn_s = torch.cuda.Stream(), torch.cuda.Stream()
    sizes = [s for s in [64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB] if s <= top]

    def run(kind, nb, n):
        per = top // nb
        ev = []
        torch.cuda.synchronize()
        for s, on, f in ((up_s, kind != "down", lambda i: du[i % per * nb:(i % per + 1) * nb].copy_(
                hu[i % per * nb:(i % per + 1) * nb], non_blocking=True)),
                         (dn_s, kind != "up", lambda i: hd[i % per * nb:(i % per + 1) * nb].copy_(
                             dd[i % per * nb:(i % per + 1) * nb], non_blocking=True))):
            if on:
                e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                ev.append((s, e, f))
        for s, e, f in ev:
            with torch.cuda.stream(s):
                spin(n * 12 * len(ev) + 50)
                e[0].record(s)
        for i in range(n):
            for s, e, f in ev:
                with torch.cuda.stream(s):
                    f(i)
        for s, e, f in ev:
            e[1].record(s)
        torch.cuda.synchronize()
        return [e[0].elapsed_time(e[1]) * 1e3 / n for _, e, _ in ev]

    def point(p):
        kind, nb = p["direction"], p["bytes"]
        rate = {"up": 43, "down": 33, "both": 23}[kind] * 1e3  # bytes a microsecond, for the batch length only
        n = max(3, min(400, int(60e3 * rate / nb)))
        if p["gpus"] == 1 and RANK != 0 and WORLD > 1:
            return dict(p)
        run(kind, nb, 2)
        ts = [run(kind, nb, n) for _ in range(2)]
        t = ts[-1]
        r = dict(p)
        for d, x in zip({"up": ["up"], "down": ["down"], "both": ["up", "down"]}[kind], t):
            r[d + "_us"] = x
            r[d + "_gb_per_s"] = nb / x / 1e3
        # a lone copy, synchronised: what one small transfer costs
        if kind != "both" and nb <= 16 * MIB:
            s, xs = (up_s, []) if kind == "up" else (dn_s, [])
            for i in range(20):
                torch.cuda.synchronize()
                t0 = time.perf_counter()
                with torch.cuda.stream(s):
                    (du[:nb].copy_(hu[:nb], non_blocking=True) if kind == "up" else hd[:nb].copy_(dd[:nb], non_blocking=True))
                s.synchronize()
                xs.append((time.perf_counter() - t0) * 1e6)
            r["synchronised_us"] = statistics.median(xs)
        return r

    rows = []
    for gpus in ([1, WORLD] if WORLD > 1 else [1]):
        pts = [dict(gpus=gpus, direction=d, bytes=b) for d in ("up", "down", "both") for b in sizes]
        got = each(pts, point, budget / 2)
        rows += got
    return {"what": "pinned host (cudaHostAlloc) to and from device, copies back to back on one stream a direction; gpus=1: GPU 0 "
                    "alone, else all GPUs at once and the figure is each GPU's; synchronised_us is one copy, submitted and waited for",
            "rows": rows}


def t_pinned_alloc(budget):
    rows = []
    for nb in ([256 * MIB, 2 * GIB] if not ARGS.smoke else [MIB]):
        meet()
        t0 = time.perf_counter()
        x = torch.empty(nb, dtype=torch.uint8, pin_memory=True)
        rows.append(dict(bytes=nb, seconds=time.perf_counter() - t0))
        del x
    return {"what": "first pinned allocation of this size in a process, all processes at once", "rows": [
        dict(r, seconds=round(max(o[i]["seconds"] for o in all_), 4), gb_per_s_each=round(
            r["bytes"] / GB / max(o[i]["seconds"] for o in all_), 3)) for all_ in [gathered(rows)] for i, r in enumerate(rows)]}


GROUPS = {}


def group_of(n):
    """The group of n GPUs that this rank is in: {0,1} and {2,3} run at once when n = 2."""
    if n not in GROUPS:
        if n == WORLD:
            GROUPS[n] = dist.group.WORLD
        else:
            for i in range(0, WORLD, n):
                g = dist.new_group(list(range(i, min(i + n, WORLD))))
                if i <= RANK < i + n:
                    GROUPS[n] = g
    return GROUPS[n]


def coll(op, nbytes, dtype, g, n):
    """A function that launches one collective whose full buffer is nbytes."""
    el = nbytes // (4 if dtype == FP32 else 2)
    full = torch.empty(el, device=DEV, dtype=dtype).normal_()
    if op == "all_reduce":
        full.zero_()
        return lambda i: dist.all_reduce(full, group=g)
    if op == "all_gather":
        part = torch.empty(el // n, device=DEV, dtype=dtype).normal_()
        return lambda i: dist.all_gather_into_tensor(full, part, group=g)
    if op == "reduce_scatter":
        part = torch.empty(el // n, device=DEV, dtype=dtype)
        return lambda i: dist.reduce_scatter_tensor(part, full, op=dist.ReduceOp.AVG, group=g)
    out = torch.empty_like(full)
    return lambda i: dist.all_to_all_single(out, full, group=g)


def t_nccl(budget):
    sizes = [64 * KIB * 4 ** i for i in range(9)]
    if ARGS.smoke:
        sizes = [64 * KIB, MIB]
    ops = [("all_gather", BF16), ("reduce_scatter", BF16), ("all_to_all", BF16), ("all_reduce", BF16),
           ("reduce_scatter", FP32), ("all_reduce", FP32), ("all_gather", FP32)]

    def point(p):
        n, op, nb = p["gpus"], p["op"], p["bytes"]
        dt = BF16 if p["dtype"] == "bf16" else FP32
        g = group_of(n)
        f = coll(op, nb, dt, g, n)
        for i in range(3):
            f(i)
        torch.cuda.synchronize()
        meet()
        guess = max(30.0, nb / 250e3)
        k = max(4, min(200, int(30e3 / guess)))
        ts = []
        for _ in range(2):
            meet()
            ts.append(batch_us(f, k, k * 40 + 100))
        t = ts[-1] if nb > 64 * MIB else min(ts)
        xs = []
        meet()
        for i in range(max(4, min(30, k))):
            torch.cuda.synchronize()
            t0 = time.perf_counter()
            f(i)
            torch.cuda.synchronize()
            xs.append((time.perf_counter() - t0) * 1e6)
        s = statistics.median(xs)
        factor = (n - 1) / n * (2 if op == "all_reduce" else 1)
        return dict(p, time_us=t, bus_gb_per_s=nb * factor / t / 1e3, synchronised_us=s, synchronised_bus_gb_per_s=nb * factor / s / 1e3)

    gpus = [n for n in (2, 4) if n <= WORLD]
    pts = [dict(gpus=n, op=o, dtype="bf16" if d == BF16 else "fp32", bytes=b) for n in gpus for o, d in ops for b in sizes]
    return {"what": "torch.distributed on NCCL, NVLS off; `bytes` is the full buffer (all-to-all: each rank's buffer); bus bandwidth = "
                    "bytes*(n-1)/n / time, all-reduce twice that; time_us back to back on one stream, synchronised_us each iteration "
                    "submitted and waited for; gpus=2: the pairs {0,1} and {2,3} run at once; reduce-scatter averages",
            "rows": each(pts, point, budget)}


def t_interference(budget):
    pools()
    n = 8192 if not ARGS.smoke else 512
    a, b, c = X.views((n, n)), W.views((n, n)), O.views((n, n))
    ra, rb, rc = rot(a), rot(b), rot(c)
    mm = lambda i: torch.mm(ra(i), rb(i).t(), out=rc(i))
    cpn = GIB // 2 if not ARGS.smoke else MIB
    ca, co = X.views((cpn,), rotate_bytes=0)[0], O.views((cpn,), rotate_bytes=0)[0]
    cp = lambda i: co.copy_(ca)
    g = group_of(WORLD)
    top = 256 * MIB if not ARGS.smoke else 4 * MIB
    hu, hd = (torch.empty(top, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    du, dd = (torch.empty(top, dtype=torch.uint8, device=DEV) for _ in range(2))
    hi, lo = torch.cuda.Stream(priority=-1), torch.cuda.Stream()
    s2, s3, s4 = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1), torch.cuda.Stream()
    big = GIB if not ARGS.smoke else MIB
    mid = 128 * MIB if not ARGS.smoke else MIB
    jobs = {"matmul_8192": (lambda: mm), "device_copy_1GiB": (lambda: cp)}
    if not ARGS.smoke:
        sa, sb, sc = rot(X.views((4096, 2048))), rot(W.views((4096, 2048))), rot(O.views((4096, 4096)))
        jobs["matmul_4096x4096x2048"] = lambda: (lambda i: torch.mm(sa(i), sb(i).t(), out=sc(i)))
        ga, gb = rot(X.views((32768, 2048))), rot(W.views((64, 2048, 2048)))
        offs = torch.arange(512, 32769, 512, dtype=torch.int32, device=DEV)
        jobs["grouped_matmul_64x512x2048x2048"] = lambda: (lambda i: torch._grouped_mm(ga(i), gb(i).transpose(-2, -1), offs=offs))
        ea, eo_ = rot(X.views((8 * MIB,))), rot(O.views((8 * MIB,)))
        jobs["device_copy_16MiB"] = lambda: (lambda i: eo_(i).copy_(ea(i)))
    for o in ("all_gather", "reduce_scatter", "all_to_all"):
        for nm, nb in (("1GiB", big), ("128MiB", mid)):
            jobs[f"{o}_{nm}"] = (lambda o=o, nb=nb: coll(o, nb, BF16, g, WORLD))
    up = lambda i: du.copy_(hu, non_blocking=True)
    dn = lambda i: hd.copy_(dd, non_blocking=True)
    rows = []
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = {"h2d_256MiB": (lambda: up), "d2h_256MiB": (lambda: dn)}.get(name, jobs.get(name))()
        return cache[name]

    alone = {}

    def measure(name, f, s, others, ms=30.0, cover=6.0):
        """Time `name` on stream s while every (job, stream) of others keeps running for longer (`cover` times the batch alone)."""
        for _, of, os_, ot in others:
            with torch.cuda.stream(os_):
                of(0)
        with torch.cuda.stream(s):
            f(0)
        torch.cuda.synchronize()
        meet()
        est = alone.get(name)
        if est is None:
            est = agreed(batch_us(f, 3, 200, s))
        k = max(4, min(150, int(ms * 1e3 / est)))
        meet()
        gate = torch.cuda.Event()
        with torch.cuda.stream(s3):
            spin(6000)
            gate.record(s3)
        e0, e1, eo = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        for _, of, os_, ot in others:
            os_.wait_event(gate)
            with torch.cuda.stream(os_):
                for i in range(max(3, min(900, int(cover * k * est / ot)))):
                    of(i)
                eo.record(os_)
        s.wait_event(gate)
        with torch.cuda.stream(s):
            f(0)
            e0.record(s)
            for i in range(k):
                f(i)
            e1.record(s)
        torch.cuda.synchronize()
        # if the others ended first, the batch was only partly disturbed
        return e0.elapsed_time(e1) * 1e3 / k, (e0.elapsed_time(eo) >= e0.elapsed_time(e1) if others else None)

    def point(p):
        name, others = p["measured"], p["against"]
        high = p.get("collective_stream_priority", "high") == "high"
        fixed = {"h2d_256MiB": s2, "d2h_256MiB": s3}

        def stream_of(nm, used):
            s = fixed.get(nm) or (lo if nm.startswith(("matmul", "device")) else hi if high else s4)
            return s2 if s in used else s
        s = stream_of(name, ())
        olist = []
        used = {s}
        for o in others:
            so = stream_of(o, used) if not (o.startswith("device") and s is lo) else s4
            used.add(so)
            olist.append((o, get(o), so, alone.get(o, 1000.0)))
        t, covered = measure(name, get(name), s, olist)
        if not others:
            alone[name] = agreed(t)
        r = dict(p, time_us=t)
        if others:
            r["slowdown"] = t / alone[name] if name in alone else None
            r["covered"] = covered
        return r

    second = dist.new_group(list(range(WORLD)))

    def pair(p):
        ag = coll("all_gather", p["bytes_each"], BF16, g, WORLD)
        rs = coll("reduce_scatter", p["bytes_each"], BF16, g if p["communicators"] == 1 else second, WORLD)
        n = 12
        for warm in (True, False):
            torch.cuda.synchronize()
            meet()
            a0, a1, b1 = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            with torch.cuda.stream(hi):
                spin(1500)
                a0.record(hi)
            s2.wait_event(a0)
            for i in range(n):
                with torch.cuda.stream(hi):
                    ag(i)
                with torch.cuda.stream(s2):
                    rs(i)
            a1.record(hi)
            b1.record(s2)
            torch.cuda.synchronize()
        return dict(p, time_us=max(a0.elapsed_time(a1), a0.elapsed_time(b1)) * 1e3 / n)

    pts = [dict(measured=m, against=[]) for m in list(jobs) + ["h2d_256MiB", "d2h_256MiB"]]
    for o in ("all_gather", "reduce_scatter", "all_to_all"):
        for nm in ("1GiB", "128MiB"):
            pts += [dict(measured="matmul_8192", against=[f"{o}_{nm}"]), dict(measured=f"{o}_{nm}", against=["matmul_8192"])]
    if not ARGS.smoke:
        for j in ("matmul_4096x4096x2048", "grouped_matmul_64x512x2048x2048", "device_copy_16MiB"):
            for o in ("all_gather_128MiB", "reduce_scatter_128MiB"):
                pts += [dict(measured=j, against=[o]), dict(measured=o, against=[j])]
    pts += [dict(measured="matmul_8192", against=["all_gather_1GiB"], collective_stream_priority="normal"),
            dict(measured="all_gather_1GiB", against=["matmul_8192"], collective_stream_priority="normal"),
            dict(measured="matmul_8192", against=["h2d_256MiB", "d2h_256MiB"]),
            dict(measured="h2d_256MiB", against=["matmul_8192", "d2h_256MiB"]),
            dict(measured="d2h_256MiB", against=["matmul_8192", "h2d_256MiB"]),
            dict(measured="device_copy_1GiB", against=["all_gather_1GiB"]),
            dict(measured="all_gather_1GiB", against=["device_copy_1GiB"]),
            dict(measured="all_gather_128MiB", against=["device_copy_1GiB"]),
            dict(measured="device_copy_1GiB", against=["h2d_256MiB", "d2h_256MiB"]),
            dict(measured="all_gather_1GiB", against=["h2d_256MiB", "d2h_256MiB"]),
            dict(measured="h2d_256MiB", against=["all_gather_1GiB"])]
    return {"what": "one job alone and beside others on other streams of the same GPU, all GPUs at once; slowdown = time beside / time "
                    "alone; covered = the others were still running when the measured batch ended; collectives on a high-priority "
                    "stream unless said. The pair rows launch one all-gather and one reduce-scatter alternately on two streams: the time "
                    "is that of one pair",
            "rows": each(pts, point, budget) + each([dict(pair="all_gather and reduce_scatter", bytes_each=b, communicators=c)
                                                     for c in (1, 2) for b in (mid, big)], pair, budget)}


def t_cpu(budget):
    cores = os.cpu_count() or 1
    from torch.optim import AdamW
    rows = []
    small = 1 << 20 if ARGS.smoke else None

    def adam(tensors, threads, pin, reps=3):
        torch.set_num_threads(threads)
        ps = []
        for n in tensors:
            p = torch.empty(n, pin_memory=pin).fill_(0.01).requires_grad_()
            p.grad = torch.empty(n, pin_memory=pin).fill_(0.001)
            ps.append(p)
        o = AdamW(ps, lr=1e-4, fused=True)
        o.step()
        o.step()
        meet()
        ts = []
        for _ in range(reps):
            t0 = time.perf_counter()
            o.step()
            ts.append(time.perf_counter() - t0)
        return statistics.median(ts)

    def dram(n, threads, pin, reps=4):
        torch.set_num_threads(threads)
        a, b = (torch.empty(n, pin_memory=pin).fill_(v) for v in (1.0, 0.0))
        b.copy_(a)
        meet()
        ts = []
        for _ in range(reps):
            t0 = time.perf_counter()
            b.copy_(a)
            ts.append(time.perf_counter() - t0)
        return statistics.median(ts)

    def clip(tensors, threads, pin, reps=3):
        torch.set_num_threads(threads)
        gs = [torch.empty(n, pin_memory=pin).fill_(0.001) for n in tensors]
        f = lambda: torch.stack([torch.linalg.vector_norm(x) for x in gs]).norm()   # what clip_grad_norm_ does on the CPU
        f()
        meet()
        a, b = [], []
        for _ in range(reps):
            t0 = time.perf_counter()
            f()
            t1 = time.perf_counter()
            [x.mul_(0.999) for x in gs]
            a.append(t1 - t0)
            b.append(time.perf_counter() - t1)
        return statistics.median(a), statistics.median(b)

    th = max(1, cores // max(WORLD, 1))
    one = small or 200_000_000
    lst = [small // 8] * 8 if small else [8_388_608] * 50
    plan = [("adamw_fused", "one tensor", WORLD, th, [one], False), ("adamw_fused", "one tensor", 1, cores, [one * 4], False),
            ("adamw_fused", "one tensor", 1, th, [one], False),
            ("adamw_fused", "list of 8.4M-element tensors", WORLD, th, lst, False),
            ("adamw_fused", "list of 8.4M-element tensors", 1, cores, lst * 2, False),
            ("adamw_fused", "list of 8.4M-element tensors, parameters and gradients pinned", WORLD, th, lst[:25], True),
            ("dram_copy", "fp32 copy_", WORLD, th, [one], False), ("dram_copy", "fp32 copy_", 1, cores, [one * 4], False),
            ("dram_copy", "fp32 copy_", 1, th, [one], False),
            ("dram_copy", "fp32 copy_, pinned", WORLD, th, [one], True),
            ("foreach_norm_and_scale", "list of 8.4M-element tensors", WORLD, th, lst[:25], False),
            ("foreach_norm_and_scale", "list of 8.4M-element tensors, pinned", WORLD, th, lst[:25], True),
            ("foreach_norm_and_scale", "list of 8.4M-element tensors", 1, cores, lst[:25], False)]
    for what, data, procs, threads, tens, pin in plan:
        meet()
        t = None
        try:
            if procs == WORLD or RANK == 0:
                real_meet = globals()["meet"]
                if procs != WORLD:
                    globals()["meet"] = lambda flag=0: False
                try:
                    t = adam(tens, threads, pin) if what == "adamw_fused" else dram(tens[0], threads, pin) if what == "dram_copy" \
                        else clip(tens, threads, pin)
                finally:
                    globals()["meet"] = real_meet
        except Exception as e:
            t = None
            rows.append(dict(what=what, error=str(e)[:200]))
        ts = [x for x in gathered(t) if x is not None]
        if not ts:
            continue
        n = sum(tens)
        r = dict(what=what, data=data, processes=procs, threads_each=threads, elements_each=n, tensors_each=len(tens))
        if what == "foreach_norm_and_scale":
            r.update(norm_s=round(max(x[0] for x in ts), 5), scale_in_place_s=round(max(x[1] for x in ts), 5))
            r.update(norm_gb_per_s_all=round(4 * n * procs / GB / r["norm_s"], 1), scale_gb_per_s_all=round(8 * n * procs / GB / r["scale_in_place_s"], 1))
        else:
            tm = max(ts)
            r["seconds"] = round(tm, 5)
            if what == "adamw_fused":
                r.update(parameters_per_s_all=round(n * procs / tm), gb_per_s_all_at_28_bytes=round(28 * n * procs / tm / GB, 1))
            else:
                r.update(rw_gb_per_s_all=round(8 * n * procs / tm / GB, 1))
        rows.append(r)
    torch.set_num_threads(th)
    return {"what": "CPU optimizer step (torch.optim.AdamW(fused=True), fp32) and host memory rates; seconds is the slowest process's "
                    "median; 28 B a parameter moved by AdamW; foreach_norm_and_scale is the clipping of gradients, its norm and its in-place scaling apart; no thread binding, memory first touched by the same threads", "rows": rows}


def t_launch(budget):
    x = torch.zeros(256, device=DEV)
    rows = {}

    def loop(n, f):
        f(50)
        torch.cuda.synchronize()
        meet()
        t0 = time.perf_counter()
        f(n)
        t1 = time.perf_counter()
        torch.cuda.synchronize()
        t2 = time.perf_counter()
        return (t1 - t0) * 1e6 / n, (t2 - t0) * 1e6 / n

    def add(n):
        with torch.no_grad():
            for _ in range(n):
                x.add_(1)
    a, b = loop(3000, add)
    rows["x_add_no_grad"] = dict(cpu_us_per_op=a, cpu_and_gpu_us_per_op=b)
    # GPU-side rate of tiny kernels: queued behind a sleeping kernel
    with torch.no_grad():
        t = batch_us(lambda i: x.add_(1), 900, 12000)
    rows["tiny_kernel_gpu_side"] = dict(gpu_us_per_kernel=t)
    g = torch.cuda.CUDAGraph()
    with torch.no_grad():
        s = torch.cuda.Stream()
        with torch.cuda.stream(s):
            x.add_(1)
        torch.cuda.synchronize()
        with torch.cuda.graph(g):
            for _ in range(500):
                x.add_(1)
    g.replay()
    torch.cuda.synchronize()
    rows["tiny_kernel_in_cuda_graph"] = dict(gpu_us_per_kernel=batch_us(lambda i: g.replay(), 4, 500) / 500)

    def new(n):
        with torch.no_grad():
            for _ in range(n):
                x + 1
    a, b = loop(3000, new)
    rows["x_plus_1_allocating_no_grad"] = dict(cpu_us_per_op=a, cpu_and_gpu_us_per_op=b)
    w = torch.randn(64, 64, device=DEV, dtype=BF16, requires_grad=True)
    bias = torch.randn(64, device=DEV, dtype=BF16, requires_grad=True)
    inp = torch.randn(64, 64, device=DEV, dtype=BF16, requires_grad=True)

    def fwd(layers):
        h = inp
        for _ in range(layers):
            h = F.linear(h, w) * 0.5 + bias
        return h
    fwd(50).sum().backward()
    L = 300
    fs, fg, bs, bg = [], [], [], []
    for _ in range(3):
        torch.cuda.synchronize()
        meet()
        t0 = time.perf_counter()
        out = fwd(L)
        t1 = time.perf_counter()
        torch.cuda.synchronize()
        t2 = time.perf_counter()
        go = torch.ones_like(out)
        torch.cuda.synchronize()
        t3 = time.perf_counter()
        out.backward(go)
        t4 = time.perf_counter()
        torch.cuda.synchronize()
        t5 = time.perf_counter()
        fs.append((t1 - t0) * 1e6 / L / 3)
        fg.append((t2 - t0) * 1e6 / L / 3)
        bs.append((t4 - t3) * 1e6 / L)
        bg.append((t5 - t3) * 1e6 / L)
    med = statistics.median
    rows["autograd_linear_mul_add"] = dict(forward_cpu_us_per_op=med(fs), forward_cpu_and_gpu_us_per_op=med(fg),
                                           backward_cpu_us_per_forward_op=med(bs) / 3, backward_cpu_and_gpu_us_per_forward_op=med(bg) / 3,
                                           backward_kernels_per_layer="2 matmuls, mul, bias sum, 2 gradient accumulations")
    # the cost of single calls that an FSDP2 step is made of
    big, acc = (torch.randn(512, 64, device=DEV, dtype=BF16) for _ in range(2))
    q = torch.randn(1, 4, 256, 64, device=DEV, dtype=BF16)
    offs = torch.arange(32, 513, 32, dtype=torch.int32, device=DEV)
    we = torch.randn(16, 64, 64, device=DEV, dtype=BF16)
    lg = torch.randn(512, 64, device=DEV)
    idx = torch.randint(0, 512, (512,), device=DEV)
    outb, part = torch.empty(4096 * WORLD, device=DEV), torch.empty(4096, device=DEV)
    singles = {
        "linear": lambda: F.linear(big, w), "mul": lambda: big * big, "grouped_mm": lambda: torch._grouped_mm(big, we, offs=offs),
        "topk": lambda: torch.topk(lg, 8), "argsort": lambda: torch.argsort(idx, stable=True), "index_select": lambda: big.index_select(0, idx),
        "index_add_": lambda: acc.index_add_(0, idx, big), "softmax": lambda: torch.softmax(lg, -1), "cat": lambda: torch.cat((big, big), 1),
        "all_gather_into_tensor": (lambda: dist.all_gather_into_tensor(outb, part)) if WORLD > 1 else (lambda: None),
        "sdpa_cudnn": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)}
    for k, f in singles.items():
        try:
            with torch.no_grad(), (sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if k == "sdpa_cudnn" else torch.no_grad()):
                a, b = loop(300, lambda n: [f() for _ in range(n)] and None)
            rows["call_" + k] = dict(cpu_us_per_op=a, cpu_and_gpu_us_per_op=b)
        except Exception as e:
            rows["call_" + k] = dict(error=str(e)[:200])
    al = gathered(rows)
    out = []
    for k, v in rows.items():
        out.append(dict(what=k, **{f: (round(med([o[k][f] for o in al]), 3) if isinstance(x, float) else x) for f, x in v.items()}))
    return {"what": "CPU cost of submitting small eager operations from one Python thread a GPU, all GPUs at once; cpu_us stops when the "
                    "last launch returned, cpu_and_gpu_us when the device was idle", "rows": out}


MEMLOG = []


def memlog(step):
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    st = torch.cuda.memory_reserved()
    used = total - free
    MEMLOG.append(dict(after=step, used_bytes=used, torch_reserved_bytes=st, outside_torch_bytes=used - st, total_bytes=total,
                       delta_outside_bytes=(used - st) - (MEMLOG[-1]["outside_torch_bytes"] if MEMLOG else 0)))


def t_constants(_):
    """Must run first: a fresh process."""
    global GLOO
    torch.cuda.set_device(DEV)
    torch.cuda.init()
    torch.cuda.synchronize()
    memlog("CUDA context creation")
    x = torch.zeros(1024, device=DEV)
    x.add_(1)
    memlog("first element-wise kernel")
    y = torch.randn(512, 512, device=DEV, dtype=BF16)
    memlog("random-number kernel")
    y @ y
    memlog("first cuBLAS matmul (bf16)")
    F.linear(y, y, y[0])
    memlog("linear with bias (cuBLASLt epilogue)")
    q = torch.randn(1, 4, 1024, 128, device=DEV, dtype=BF16, requires_grad=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        o = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        memlog("cuDNN attention forward")
        o.sum().backward()
    memlog("cuDNN attention backward")
    offs = torch.arange(128, 513, 128, dtype=torch.int32, device=DEV)
    torch._grouped_mm(y, torch.randn(4, 512, 512, device=DEV, dtype=BF16), offs=offs)
    memlog("grouped matmul")
    torch.topk(y.float(), 8), torch.argsort(y.view(-1)[:4096]), torch.softmax(y.float(), -1)
    F.cross_entropy(y.float().requires_grad_(), torch.zeros(512, dtype=torch.long, device=DEV)).backward()
    memlog("sort, top-k, softmax, cross-entropy")
    p = torch.zeros(1 << 20, device=DEV, requires_grad=True)
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], fused=True).step()
    memlog("fused AdamW")
    del x, y, q, o, p
    torch.cuda.empty_cache()
    memlog("empty_cache (what torch keeps: cuBLAS workspaces)")
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=datetime.timedelta(seconds=180))
        GLOO = dist.new_group(backend="gloo")
        meet()
        memlog("process groups made, no NCCL communicator yet")
        b = torch.zeros(1 << 20, device=DEV)
        out = torch.zeros((1 << 20) * WORLD, device=DEV)

        def use(g, n, tag):
            dist.all_gather_into_tensor(out[:n << 20], b, group=g)
            memlog(f"{tag}: first all-gather")
            dist.reduce_scatter_tensor(b, out[:n << 20], group=g)
            memlog(f"{tag}: first reduce-scatter")
            dist.all_reduce(b, group=g)
            memlog(f"{tag}: first all-reduce")
            dist.all_to_all_single(out[:n << 20], out[:n << 20].clone(), group=g)
            memlog(f"{tag}: first all-to-all (point-to-point connections)")
        use(dist.group.WORLD, WORLD, f"communicator 1, {WORLD} GPUs")
        for i in (2, 3):
            use(dist.new_group(list(range(WORLD))), WORLD, f"communicator {i}, {WORLD} GPUs")
        if WORLD > 2:
            use(group_of(2), 2, "communicator 4, 2 GPUs")
        bo = torch.zeros(64 << 20, device=DEV)
        dist.all_reduce(bo)
        memlog("large all-reduce on communicator 1 (256 MiB)")
    everyone = gathered(MEMLOG)
    rows = [dict(r, outside_torch_max_bytes=max(o[i]["outside_torch_bytes"] for o in everyone)) for i, r in enumerate(MEMLOG)]
    return {"what": "cudaMemGetInfo of GPU 0 after each step of one process, nothing else on the GPU; outside_torch = used minus what "
                    "torch's caching allocator holds: the CUDA context, loaded kernels and library allocations", "rows": rows}


TABLES = {"hbm_constants": (t_constants, 60), "dense_matmul": (t_dense, 90), "grouped_matmul": (t_grouped, 90),
          "grouped_matmul_uneven": (t_grouped_uneven, 40), "attention": (t_attention, 110), "eager_ops": (t_eager, 60), "memory_bound": (t_memory, 40), "nccl": (t_nccl, 70), "host_copies": (t_copies, 60),
          "launch": (t_launch, 20), "cpu": (t_cpu, 90), "interference": (t_interference, 50), "pinned_allocation": (t_pinned_alloc, 20)}


def provenance():
    smi = "nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,pcie.link.gen.max," \
          "pcie.link.width.max,memory.total --format=csv"
    return dict(date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                machine=ARGS.machine, command=" ".join(["NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node", str(WORLD)] + [
                    "tests/peers/microbench.py"] + sys.argv[1:]),
                gpus=WORLD, cpu=sh("lscpu | grep -E 'Model name|^CPU\\(s\\)|Socket|NUMA|Thread|L3' | sed 's/  */ /g'").split("\n"),
                host_memory=sh("grep -E 'MemTotal|MemAvailable|HugePages_Total|AnonHuge' /proc/meminfo").split("\n"),
                transparent_hugepage=sh("cat /sys/kernel/mm/transparent_hugepage/enabled"),
                nvidia_smi_idle=sh(smi).split("\n"), topology=sh("nvidia-smi topo -m | head -12").split("\n"),
                torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
                nccl=".".join(map(str, torch.cuda.nccl.version())), python=sys.version.split()[0],
                environment={k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "CUDA_", "PYTORCH_", "OMP_", "TORCH_"))
                             and "TORCHELASTIC" not in k}, kernel=sh("uname -r"))


def main():
    global ARGS
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", default="microbench.json")
    ap.add_argument("--tables", default="", help="comma-separated subset, hbm_constants always included")
    ap.add_argument("--machine", default="4 x NVIDIA H200 SXM in one host, 64 cores, 512 GiB")
    ap.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    ap.add_argument("--budget-scale", type=float, default=1.0)
    ARGS = ap.parse_args()
    names = ["hbm_constants"] + [t for t in (ARGS.tables.split(",") if ARGS.tables else TABLES) if t in TABLES and t != "hbm_constants"]
    began = time.time()
    for name in names:
        fn, budget = TABLES[name]
        s = Sampler() if RANK == 0 else None
        if s:
            s.start()
        t0 = time.time()
        try:
            tab = fn(budget * ARGS.budget_scale)
        except Exception as e:
            traceback.print_exc()
            tab = {"error": f"{type(e).__name__}: {str(e)[:500]}"}
        if s:
            s.stop = True
            s.join()
            if s.summary():
                tab["gpu0_while_running"] = s.summary()
            if "provenance" not in RESULT:
                RESULT["provenance"] = provenance()
        tab["seconds_taken"] = round(time.time() - t0, 1)
        if "rows" in tab:
            tab["rows"] = tab.pop("rows")
        RESULT[name] = tab
        if RANK == 0:
            RESULT["provenance"]["seconds_taken_all"] = round(time.time() - began, 1)
            errs = [r.get("error") for r in tab.get("rows", []) if r.get("error")]
            print(f"[microbench] {name}: {tab['seconds_taken']} s, {len(tab.get('rows', []))} rows, {len(errs)} errors"
                  + (f", first: {errs[0][:160]}" if errs else "") + (f" TABLE ERROR {tab['error']}" if "error" in tab else ""), flush=True)
        save()
        if name in ("attention", "nccl", "interference"):
            torch.cuda.empty_cache()
    meet()
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
