#!/usr/bin/env python3
"""PyTorch's fused AdamW on one large CPU tensor: the yardstick beside build/release/bin/bench_adam.

    python3 adam_pytorch.py [--parameters 1e9] [--threads N] [--repeat 7]

PyTorch takes gradients in the parameters' type, so bf16 gradients are widened first and weights are narrowed after: passes
of their own, timed apart. The step itself moves 28 bytes a parameter (weight, gradient, both moments read; weight, both
moments written), as many as bench_adam's pass, which does all of it. Memory: 24 bytes a parameter.
"""
import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("--parameters", type=float, default=1e9)
parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
parser.add_argument("--repeat", type=int, default=7)
args = parser.parse_args()
os.environ.setdefault("OMP_PROC_BIND", "close")  # as bench_adam pins its threads
os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))

import torch  # noqa: E402  reads the variables

torch.set_num_threads(args.threads)
n = int(args.parameters)
weights = torch.nn.Parameter(torch.empty(n).uniform_(-1, 1))
gradient = torch.empty(n, dtype=torch.bfloat16).uniform_(-1, 1)  # as it comes from the GPU
narrow = torch.empty(n, dtype=torch.bfloat16)                    # as it goes there
weights.grad = torch.empty(n)
optimizer = torch.optim.AdamW([weights], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
parts = {
    "bf16 gradient to fp32": (6, lambda: weights.grad.copy_(gradient)),
    "fused AdamW": (28, optimizer.step),
    "fp32 weights to bf16": (6, lambda: narrow.copy_(weights.detach())),
}
times = {name: [] for name in parts}
for repeat in range(args.repeat + 2):
    for name, (_, run) in parts.items():
        begin = time.perf_counter()
        run()
        if repeat >= 2:  # the first ones touch the states' pages
            times[name].append(time.perf_counter() - begin)

print(f"PyTorch {torch.__version__}, {n} parameters, {args.threads} threads")
for name, (size, _) in parts.items():
    t = statistics.median(times[name])
    print(f"{name:>24}: {t * 1e3:8.2f} ms (best {min(times[name]) * 1e3:.2f}), {n / t * 1e-9:.2f} G parameters/s, "
          f"{size * n / t * 1e-9:.1f} GB/s counted as {size} B")
total = sum(statistics.median(t) for t in times.values())
print(f"{'all three':>24}: {total * 1e3:8.2f} ms, {n / total * 1e-9:.2f} G parameters/s")
