"""PyTorch's rates at the shapes of tests/kernels/bench_matmul.cpp, to run beside it on the same GPU: what a GPU does depends on its clock.

kernels_pytorch.py [grouped] [attention] (default: both), TFLOP/s, medians of single runs after a rest as there:
grouped: experts (E, k, n, rows), equal rows, by torch._grouped_mm (CUTLASS), in bursts/in a row: forward (rows, k) x (E, k, n), the gradient of the input
(rows, n) x (E, n, k) and that of the weights, a product an expert.
attention: causal (context, heads, key heads, width) by cuDNN: forward, and backward counted as 2.5 times as many operations.
"""
import contextlib
import statistics
import sys
import time
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

EXPERTS = [(128, 2048, 1536, 65536), (32, 2048, 1536, 65536), (32, 2048, 1536, 262144), (32, 2880, 5760, 32768), (64, 7168, 4096, 65536)]
ATTENTION = [(s, *heads) for heads in ((32, 4, 128), (64, 8, 64), (8, 1, 128)) for s in (4096, 16384, 65536)] + [(s, 128, 128, (192, 128)) for s in (4096, 8192)]


def milliseconds(runs, work):
    """Of so many runs, one after the other."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def burst(work):
    """Milliseconds: the median of 3 to 15 single runs after a rest, which end before the power limit is felt, some 50 ms later."""
    torch.cuda.synchronize()
    time.sleep(0.3)
    times, spent = [], milliseconds(3, work)
    while len(times) < 3 or (len(times) < 15 and spent < 40):
        times.append(milliseconds(1, work))
        spent += times[-1]
    return statistics.median(times)


def rates(flops, work):
    """In bursts, and in a row, within the power limit, which has settled after 0.4 s."""
    ms = burst(work)
    milliseconds(max(1, int(400 / ms)), work)
    runs = max(1, int(300 / ms))
    return f"{flops / ms * 1e-9:5.0f}/{flops * runs / milliseconds(runs, work) * 1e-9:.0f}"


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def grouped():
    print("experts (E, k, n, rows): forward, input gradient, weight gradient; PyTorch", torch.__version__)
    for experts, k, n, rows in EXPERTS:
        x, dy, w = random(rows, k), random(rows, n), random(experts, n, k)
        ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
        flops = 2 * rows * k * n
        of = [rates(flops, work) for work in (
            lambda: torch._grouped_mm(x, w.transpose(1, 2), ends),
            lambda: torch._grouped_mm(dy, w, ends),
            lambda: torch._grouped_mm(dy.t(), x, ends))]
        print(f"  {str((experts, k, n, rows)):>26}", *of, flush=True)
        del x, dy, w


@contextlib.contextmanager
def cudnn_attention(batch, context, heads, kv_heads, width):
    """Causal, by cuDNN: operations of forward (backward counts 2.5 times as many), and what runs either. width: of queries and keys, and of values, or both."""
    qk, v_width = width if isinstance(width, tuple) else (width, width)
    q, k, v = random(batch, heads, context, qk), random(batch, kv_heads, context, qk), random(batch, kv_heads, context, v_width)
    for t in (q, k, v):
        t.requires_grad_()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        def forward():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        out = forward()
        gradient = torch.randn_like(out)
        yield batch * context * (context + 1) * heads * (qk + v_width), forward, lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)


def attention():
    print("attention (context, heads, key heads, width): forward, backward; cuDNN", torch.backends.cudnn.version())
    for context, heads, kv_heads, width in ATTENTION:
        with cudnn_attention(1, context, heads, kv_heads, width) as (flops, forward, backward):
            of = [flops / burst(forward) * 1e-9, 2.5 * flops / burst(backward) * 1e-9]
        print(f"  {str((context, heads, kv_heads, width)):>32} {of[0]:5.0f} {of[1]:5.0f}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("grouped", "attention"):
        try:
            {"grouped": grouped, "attention": attention}[name]()
        except KeyError:
            sys.exit(f"no benchmark is called {name}: grouped, attention")
