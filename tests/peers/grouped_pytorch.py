"""Rates of PyTorch's grouped products (torch._grouped_mm, CUTLASS) at the shapes of tests/kernels/bench_matmul.cpp, to run beside it on the same GPU.

grouped_pytorch.py: experts (E, k, n, rows), equal rows; TFLOP/s of forward (rows, k) x (E, k, n), the gradient of the input (rows, n) x (E, n, k) and
that of the weights, a product an expert (which PyTorch writes; bench_matmul adds to what is there). Medians of 15 single runs, as there.
"""
import statistics
import torch

SHAPES = [(128, 2048, 1536, 65536), (32, 2048, 1536, 65536), (32, 2048, 1536, 262144), (32, 2880, 5760, 32768), (64, 7168, 4096, 65536)]


def milliseconds(work):
    for _ in range(3):
        work()
    times = []
    for _ in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main():
    print("experts (E, k, n, rows), TFLOP/s: forward, input gradient, weight gradient; PyTorch", torch.__version__)
    for experts, k, n, rows in SHAPES:
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)
        ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
        flops = 2 * rows * k * n
        of = [flops / milliseconds(work) * 1e-9 for work in (
            lambda: torch._grouped_mm(x, w.transpose(1, 2), ends),
            lambda: torch._grouped_mm(dy, w, ends),
            lambda: torch._grouped_mm(dy.t(), x, ends))]
        print(f"  {str((experts, k, n, rows)):>26} {of[0]:5.0f} {of[1]:5.0f} {of[2]:5.0f}", flush=True)
        del x, dy, w


if __name__ == "__main__":
    main()
