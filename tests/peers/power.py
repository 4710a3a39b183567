#!/usr/bin/env python3
"""Watts and clock of work in a row, two seconds each, through PyTorch on one GPU: power.py [rows] [attention] (default: both; 40 s each)

rows: bf16 products (rows, k) x (k, n) whose rows are alike, as those of experts are once routing has collapsed.
attention: causal attention by cuDNN, forward alone and backward alone, by width of heads and length of sequences (batch, heads, key heads, context, width).
TFLOP/s, mean W, the median clock of the multiprocessors in the second half (MHz), and TFLOP/s per GHz.
"""
import sys
import time

import pynvml
import torch

from kernels_pytorch import cudnn_attention

SECONDS = 2.0


def run(name, flops, work, at_once=20):
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    work()
    torch.cuda.synchronize()
    done, clocks = 0, []
    joules, begin = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, time.time()
    while time.time() < begin + SECONDS:
        for _ in range(at_once):
            work()
        torch.cuda.synchronize()
        done += at_once
        clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    took = time.time() - begin
    watts = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 - joules) / took
    clocks = sorted(clocks[len(clocks) // 2:])
    clock, rate = clocks[len(clocks) // 2], flops * done / took / 1e12
    print(f"{name:60s} {rate:6.0f} TFLOP/s {watts:5.0f} W {clock} MHz {1000 * rate / clock:5.0f}", flush=True)


def rows():
    for rows, width in ((65536, 2048), (8192, 8192)):
        b = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) * 0.02
        a = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        c = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)

        def product(name, a):
            run(f"({rows}, {width}, {width}) {name}", 2 * rows * width * width, lambda: torch.matmul(a, b, out=c))

        product("random", a)
        for kinds in (4096, 256, 16, 1):
            order = torch.randint(0, kinds, (rows,), device="cuda")
            product(f"{kinds} kinds of rows, shuffled", a[:kinds][order].contiguous())
        product("16 kinds of rows, sorted", a[:16].repeat_interleave(rows // 16, 0).contiguous())
        product("one row and 10 % of noise", (a[:1] + 0.1 * torch.randn(rows, width, device="cuda")).bfloat16())
        product("random again", a)


def attention():
    for batch, heads, kv_heads, context, width in ((3, 32, 4, 4096, 128), (1, 32, 4, 16384, 128), (1, 8, 1, 65536, 128), (1, 8, 1, 262144, 128),
                                                  (2, 64, 8, 4096, 64), (1, 64, 8, 16384, 64), (1, 16, 2, 131072, 64)):
        name = f"attention {(batch, heads, kv_heads, context, width)}"
        with cudnn_attention(batch, context, heads, kv_heads, width) as (flops, forward, backward):
            at_once = max(1, round(2e13 / flops))
            run(f"{name}, forward", flops, forward, at_once)
            run(f"{name}, backward", 2.5 * flops, backward, at_once)


if __name__ == "__main__":
    pynvml.nvmlInit()
    torch.manual_seed(0)
    for name in sys.argv[1:] or ("rows", "attention"):
        if name not in ("rows", "attention"):
            sys.exit(f"nothing is called {name}: rows, attention")
        {"rows": rows, "attention": attention}[name]()
