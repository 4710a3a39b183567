#!/usr/bin/env python3
"""Rates of the memory-bound operations that eager PyTorch runs between matmuls, each as the peer (fsdp2_pytorch.py) writes
it: elements/s of the whole operation (all its kernels, back to back) against the number of elements. One GPU.

Usage: python3 tests/peers/microbench_eager.py --out microbench_eager.json
"""
import argparse
import datetime
import json

import torch
import torch.nn.functional as F

dev = torch.device("cuda")
bf16 = torch.bfloat16


def median_us(fn, reps=15, warm=3):
    for _ in range(warm):
        fn()
    torch.cuda.synchronize()
    # Launches are hidden behind a long first kernel, so that only device time is read.
    times = []
    for _ in range(reps):
        torch.cuda._sleep(4_000_000)
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        fn()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3)
    return sorted(times)[len(times) // 2]


def rand(*shape, dtype=bf16):
    return torch.randn(*shape, device=dev, dtype=torch.float32).to(dtype)


def backward_of(make):
    """Time of backward alone: grads with respect to the inputs of a fresh forward."""
    out, inputs, grad = make()
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def rms_norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def tests(rows):
    """(name, elements, fn): rows = tokens x top_k for the expert operations, tokens = rows / 8 elsewhere."""
    h, i, k, e = 2048, 768, 8, 128
    tokens = max(512, rows // k)
    x, w = rand(tokens, h), rand(h)
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    yield "rms_norm", tokens * h, lambda: rms_norm(x, w)
    yield "rms_norm_bwd", tokens * h, backward_of(lambda: (rms_norm(xg, wg), (xg, wg), x))
    q = rand(1, tokens, 32, 128).transpose(1, 2)
    cos, sin = rand(tokens, 128), rand(tokens, 128)
    qg = q.clone().requires_grad_()
    yield "rope", q.numel(), lambda: rope(q, cos, sin)
    yield "rope_bwd", q.numel(), backward_of(lambda: (rope(qg, cos, sin), (qg,), q))
    yield "add", tokens * h, lambda: x + x
    index = torch.randint(0, tokens, (rows,), device=dev)
    gate_up, act, out, gates = rand(rows, 2 * i), rand(rows, i), rand(rows, h), rand(rows, 1)
    yield "gather", rows * h, lambda: x[index]
    yield "index_add", rows * h, lambda: torch.zeros(tokens, h, device=dev, dtype=bf16).index_add_(0, index, out)
    yield "gate_multiply", rows * h, lambda: out * gates
    og, gg = out.clone().requires_grad_(), gates.clone().requires_grad_()
    yield "gate_multiply_bwd", rows * h, backward_of(lambda: (og * gg, (og, gg), out))

    def swiglu(z):
        g, u = z.chunk(2, -1)
        return F.silu(g) * u

    zg = gate_up.clone().requires_grad_()
    yield "swiglu", rows * i, lambda: swiglu(gate_up)
    yield "swiglu_bwd", rows * i, backward_of(lambda: (swiglu(zg), (zg,), act))
    bias = rand(e, 2 * i)
    of_row = torch.sort(torch.randint(0, e, (rows,), device=dev)).values
    bg, sg = bias.clone().requires_grad_(), gate_up.clone().requires_grad_()
    yield "expert_bias", rows * 2 * i, lambda: gate_up + bias.index_select(0, of_row)
    yield "expert_bias_bwd", rows * 2 * i, backward_of(lambda: (sg + bg.index_select(0, of_row), (sg, bg), gate_up))

    def clamped_swiglu(z):
        g, u = z[:, ::2].clamp(max=7.0), z[:, 1::2].clamp(min=-7.0, max=7.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.702))

    yield "clamped_swiglu", rows * i, lambda: clamped_swiglu(gate_up)
    yield "clamped_swiglu_bwd", rows * i, backward_of(lambda: (clamped_swiglu(zg), (zg,), act))
    logits = rand(tokens, e)
    lg = logits.clone().requires_grad_()

    def route(z):
        p = F.softmax(z.float(), -1)
        v, ids = torch.topk(p, k, -1)
        return v / v.sum(-1, keepdim=True), ids

    yield "router", tokens * e, lambda: route(logits)
    v = rand(tokens, k, dtype=torch.float32)
    yield "router_bwd", tokens * e, backward_of(lambda: (route(lg)[0], (lg,), v))
    ids = torch.randint(0, e, (tokens * k,), device=dev)

    def order():
        o = torch.argsort(ids, stable=True)
        return o // k, torch.cumsum(torch.histc(ids.float(), e, 0, e - 1).to(torch.int32), 0)

    yield "sort", tokens * k, order


def loss_tests():
    for vocab in (50304, 151936, 201088):
        z = rand(4096, vocab)
        target = torch.randint(0, vocab, (4096,), device=dev)
        yield "cross_entropy", z.numel(), lambda: F.cross_entropy(z.float(), target)
        zg = z.clone().requires_grad_()
        one = torch.ones((), device=dev)
        yield "cross_entropy_bwd", z.numel(), backward_of(lambda: (F.cross_entropy(zg.float(), target), (zg,), one))
        del z, zg
        ids = torch.randint(0, vocab, (4096,), device=dev)
        g = rand(4096, 2048)
        yield "embedding_bwd", vocab * 2048, lambda: torch.ops.aten.embedding_dense_backward(g, ids, vocab, -1, False)


def shard_tests():
    """FSDP2's copies and the optimizer, over a list like one block's: a few small tensors and two large ones."""
    for n in (10_000_000, 100_000_000, 400_000_000):
        sizes = [n // 3, n - n // 3 - 4 * (n // 200)] + [n // 200] * 4
        fp32 = [torch.randn(s, device=dev) for s in sizes]
        narrow = [torch.empty(s, device=dev, dtype=bf16) for s in sizes]
        flat = torch.empty(n, device=dev, dtype=bf16)
        views = list(flat.split(sizes))

        def copy_in():
            cast = [t.to(bf16) for t in fp32]
            torch._foreach_copy_(views, cast)

        yield "shard_copy_in", n, copy_in
        yield "unsharded_copy_out", n, lambda: torch._foreach_copy_(narrow, views)
        yield "gradient_cast", n, lambda: flat.to(torch.float32)
        yield "gradient_norm", n, lambda: torch.stack(torch._foreach_norm(fp32)).norm()
        yield "gradient_scale", n, lambda: torch._foreach_mul_(fp32, 1.0)
        params = [torch.nn.Parameter(t) for t in fp32]
        for p in params:
            p.grad = torch.randn_like(p)
        opt = torch.optim.AdamW(params, lr=0.0, fused=True)
        opt.step()
        yield "adamw", n, opt.step
        del params, opt, fp32, narrow, flat, views


ap = argparse.ArgumentParser()
ap.add_argument("--out", default="microbench_eager.json")
ap.add_argument("--machine", default="4 x NVIDIA H200 SXM in one host, 64 cores, 512 GiB (one GPU used)")
args = ap.parse_args()
rows_out = []


def run(generator):
    for name, elements, fn in generator:
        us = median_us(fn)
        rows_out.append({"op": name, "elements": elements, "time_us": round(us, 2), "elements_per_s": elements / us * 1e6})
        print(rows_out[-1], flush=True)


for r in (4096, 32768, 262144):
    run(tests(r))
    torch.cuda.empty_cache()
run(loss_tests())
run(shard_tests())
with open(args.out, "w") as f:
    json.dump({"provenance": {"command": "python3 tests/peers/microbench_eager.py", "machine": args.machine,
                              "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                              "torch": torch.__version__, "gpu": torch.cuda.get_device_name()},
               "what": "whole eager operations, device time, launches hidden; median of 15", "rows": rows_out}, f, indent=1)
