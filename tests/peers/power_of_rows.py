#!/usr/bin/env python3
"""Watts and clock of bf16 products whose rows are alike, as those of experts are once routing has collapsed: power_of_rows.py (one GPU, 40 s).

Two seconds each of (rows, k) x (k, n) in a row, through PyTorch: TFLOP/s, mean W, and the median clock of the multiprocessors in the second half.
"""
import time

import pynvml
import torch

SECONDS = 2.0


def run(handle, name, a, b):
    c = torch.empty(a.shape[0], b.shape[1], device="cuda", dtype=torch.bfloat16)
    torch.matmul(a, b, out=c)
    torch.cuda.synchronize()
    products, clocks = 0, []
    joules, begin = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, time.time()
    while time.time() < begin + SECONDS:
        for _ in range(20):
            torch.matmul(a, b, out=c)
        torch.cuda.synchronize()
        products += 20
        clocks.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    took = time.time() - begin
    watts = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 - joules) / took
    clocks = sorted(clocks[len(clocks) // 2:])
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1] * products / took
    print(f"({a.shape[0]}, {b.shape[1]}, {a.shape[1]}) {name:30s} {flops / 1e12:6.0f} TFLOP/s {watts:5.0f} W {clocks[len(clocks) // 2]} MHz", flush=True)


def main():
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    torch.manual_seed(0)
    for rows, width in ((65536, 2048), (8192, 8192)):
        b = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) * 0.02
        a = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        run(handle, "random", a, b)
        for kinds in (4096, 256, 16, 1):
            order = torch.randint(0, kinds, (rows,), device="cuda")
            run(handle, f"{kinds} kinds of rows, shuffled", a[:kinds][order].contiguous(), b)
        run(handle, "16 kinds of rows, sorted", a[:16].repeat_interleave(rows // 16, 0).contiguous(), b)
        run(handle, "one row and 10 % of noise", (a[:1] + 0.1 * torch.randn(rows, width, device="cuda")).bfloat16(), b)
        run(handle, "random again", a, b)


if __name__ == "__main__":
    main()
