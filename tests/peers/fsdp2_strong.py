"""The model of the strong FSDP2 peer (fsdp2_pytorch.py --block strong): the same mathematics as Hugging Face's, arranged so
that PyTorch's own kernels run it fast. test_fsdp2_peer.py compares loss and gradients with transformers.

- Tokens reach experts and return by gathers in both directions: neither pass adds with atomics.
- Routing weights scale the input of the down projection, so no backward needs that projection's output again.
- Attention is causal or windowed, with or without sinks; each kind of layer takes the fastest exact path that runs
  (choose_attention measures them), and a path that fails is named, never replaced in silence.
- Checkpointing is selective, within the compiled block, in two halves: what enters a half is kept, and attention, top-k and sort;
  in the last `gate_up_blocks` blocks also the experts' first product (their gradients fill the memory that it leaves).
- The loss makes its gradient in the forward pass, chunk by chunk: logits exist once, in bf16.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
mark = lambda tag, layer=-1: None                       # fsdp2_pytorch.py puts its own here
note = lambda name: contextlib.nullcontext()

# ------------------------------------------------------------------ attention
# q [B, Hq, S, D], k and v [B, Hk, S, D]; window: keys that a query sees, itself included, or None; lse [B, Hq, S], natural logarithm.


def cudnn_forward(q, k, v, window):
    assert window is None, "PyTorch's cuDNN attention has no windows"
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    return out, lse.view(lse.shape[:3]), seed, offset


def cudnn_backward(g, q, k, v, out, lse, seed, offset, window):
    s = q.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(g, q, k, v, out, lse.unsqueeze(-1), seed, offset, None, None, None, s, s, 0.0, True)


def flash_forward(q, k, v, window):
    s = q.shape[2]
    left, right = (None, None) if window is None else (window - 1, 0)
    out, lse, seed, offset, _ = aten._flash_attention_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, s, s, 0.0, True,
                                                              False, window_size_left=left, window_size_right=right)
    return out.transpose(1, 2), lse, seed, offset


def flash_backward(g, q, k, v, out, lse, seed, offset, window):
    s = q.shape[2]
    left, right = (None, None) if window is None else (window - 1, 0)
    grads = aten._flash_attention_backward(g.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2), lse,
                                           None, None, s, s, 0.0, True, seed, offset, window_size_left=left, window_size_right=right)
    return tuple(t.transpose(1, 2) for t in grads)


def additive_mask(q, window):
    i = torch.arange(q.shape[2], device=q.device)
    seen = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - (window or q.shape[2]))
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))


def cpu_forward(q, k, v, window):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=additive_mask(q, window))
    nothing = q.new_empty(0)
    return out, lse, nothing, nothing


def cpu_backward(g, q, k, v, out, lse, seed, offset, window):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, lse, 0.0, False, attn_mask=additive_mask(q, window))


KERNELS = {"cudnn": (cudnn_forward, cudnn_backward), "flash": (flash_forward, flash_backward), "cpu": (cpu_forward, cpu_backward)}


def cast(t, dtype):
    """Not t.to(dtype) where that does nothing: within a compiled autograd.Function it cuts the gradient off (torch 2.11)."""
    return t if t.dtype == dtype else t.to(dtype)


class SinkAttention(torch.autograd.Function):
    """Softmax over the keys and one more logit, the head's sink, whose value is zero.

    With l the log-sum-exp over the keys and s the sink, every probability is the one without a sink times sigmoid(l - s), so
    out = out_without * sigmoid(l - s), and the log-sum-exp with the sink is L = logaddexp(l, s). The backward kernels form
    P = exp(score - L), D = rowsum(g * out) and dScore = P * (g V^T - D): given out and L they are exact with the sink.
    The sink's own score has g . 0 - D in place of g V^T - D: ds = -sum exp(s - L) * D.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, path, window):
        out, lse, seed, offset = KERNELS[path][0](q, k, v, window)
        ctx.sink_dtype = sink.dtype
        sink = cast(sink, lse.dtype).view(1, -1, 1)
        out = cast(out * torch.sigmoid(lse - sink).unsqueeze(-1), q.dtype)
        lse = torch.logaddexp(lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink, seed, offset)
        ctx.path, ctx.window = path, window
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, lse, sink, seed, offset = ctx.saved_tensors
        dq, dk, dv = KERNELS[ctx.path][1](g, q, k, v, out, lse, seed, offset, ctx.window)
        of_row = (cast(g, lse.dtype) * cast(out, lse.dtype)).sum(-1)
        dsink = -(torch.exp(sink - lse) * of_row).sum((0, 2))
        return dq, dk, dv, cast(dsink, ctx.sink_dtype), None, None


compiled_flex = torch.compile(flex_attention, dynamic=False)


def block_mask(window, s, device):
    if window is None:
        return create_block_mask(lambda b, h, q, k: q >= k, None, None, s, s, device=device)
    return create_block_mask(lambda b, h, q, k: (q >= k) & (k > q - window), None, None, s, s, device=device)


def attend(q, k, v, sink, path, window, mask):
    """[B, Hq, S, D]. mask: a BlockMask of the same window, for the path flex."""
    if path == "math":                   # every probability in memory: for tests
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        score = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + additive_mask(q, window)
        if sink is not None:
            score = torch.cat((score, sink.view(1, -1, 1, 1).expand(*q.shape[:3], 1)), -1)
        return score.softmax(-1)[..., :q.shape[2]] @ v
    if path == "flex":
        f = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else compiled_flex
        if sink is None:
            return f(q, k, v, block_mask=mask, enable_gqa=True)
        out, aux = f(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return (out * torch.sigmoid(aux.lse - sink.to(aux.lse.dtype).view(1, -1, 1)).unsqueeze(-1)).to(q.dtype)
    if sink is None:                     # the backends that are not enabled cannot run
        assert window is None, "windows without sinks: use flex"
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return SinkAttention.apply(q, k, v, sink, path, window)


CANDIDATES = {"sliding": ("flash", "flex"), "full": ("cudnn", "flash", "flex")}


def measure_attention(path, window, batch, hq, hk, s, d, device):
    """(seconds forward and backward, largest error relative to the largest value), compiled as within a block. The error is that
    of one group of heads of the first sequence against fp32, for which the gradient of the rest is zero."""
    torch.manual_seed(7)
    n = hq // hk
    leaf = lambda heads: torch.randn(batch, s, heads, d, device=device, dtype=torch.bfloat16).requires_grad_()
    q, k, v, sink = leaf(hq), leaf(hk), leaf(hk), torch.randn(hq, device=device, dtype=torch.bfloat16).requires_grad_()
    g = torch.zeros(batch, s, hq, d, device=device, dtype=torch.bfloat16).transpose(1, 2)
    g[0, :n].normal_()
    mask = block_mask(window, s, device) if path == "flex" else None

    def f(q, k, v, sink):
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), sink, path, window, mask)

    f = torch.compile(f, fullgraph=True, dynamic=False)
    times = []
    for i in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for t in (q, k, v, sink):
            t.grad = None
        begin.record()
        out = f(q, k, v, sink)
        out.backward(g)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    own = [t[:1, :, :m].detach().float().requires_grad_() for t, m in ((q, n), (k, 1), (v, 1))] + [sink[:n].detach().float().requires_grad_()]
    expected = attend(*(t.transpose(1, 2) for t in own[:3]), own[3], "math", window, None)
    expected.backward(g[:1, :n].float())
    pairs = [(out[0, :n], expected[0])] + [(t.grad[0, :, :m], o.grad[0]) for t, m, o in ((q, n, own[0]), (k, 1, own[1]), (v, 1, own[2]))]
    pairs.append((sink.grad[:n], own[3].grad))
    error = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return sorted(times[2:])[1], error


def choose_attention(c, batch, s, device, say, only=None):
    """{kind: path} and the measurements. Raises if a kind of layer has no path that works."""
    chosen, measured = {}, {}
    for kind in ("sliding", "full"):
        window = c["sliding_window"] if kind == "sliding" else None
        best = None
        for path in CANDIDATES[kind]:
            if only and path not in only:
                continue
            try:
                seconds, error = measure_attention(path, window, batch, c["num_attention_heads"], c["num_key_value_heads"], s, c["head_dim"], device)
                good = error < 0.03
                measured[f"{kind} {path}"] = dict(ms=round(seconds * 1e3, 3), error=round(error, 5), **({} if good else {"rejected": "wrong"}))
                if good and (best is None or seconds < best):
                    best, chosen[kind] = seconds, path
            except Exception as e:
                text = f"{type(e).__name__}: {e}"
                measured[f"{kind} {path}"] = dict(failed=text if len(text) < 500 else text[:200] + " ... " + text[-300:])
            say(f"attention, {kind} layers, {path}: {measured[f'{kind} {path}']}")
            torch.cuda.empty_cache()
        if best is None:
            raise RuntimeError(f"no attention path works for {kind} layers: {measured}")
    return chosen, measured


# ------------------------------------------------------------------ experts

class Dispatch(torch.autograd.Function):
    """x[rows]; `back` holds, k to a row of x, where its copies went: the gradient gathers them instead of adding with atomics."""

    @staticmethod
    def forward(ctx, x, rows, back):
        ctx.save_for_backward(back)
        ctx.k = rows.shape[0] // x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, g):
        back, = ctx.saved_tensors
        return g.index_select(0, back).view(-1, ctx.k, g.shape[-1]).sum(1), None, None


class Combine(torch.autograd.Function):
    """The transpose of Dispatch: sums the k copies of each token."""

    @staticmethod
    def forward(ctx, y, rows, back, k):
        ctx.save_for_backward(rows)
        return y.index_select(0, back).view(-1, k, y.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, g):
        rows, = ctx.saved_tensors
        return g.index_select(0, rows), None, None, None


class RowOfExpert(torch.autograd.Function):
    """table[expert] for sorted experts; the gradient of the few rows is a product with a one-hot matrix, not atomics."""

    @staticmethod
    def forward(ctx, table, expert):
        ctx.save_for_backward(expert)
        ctx.n = table.shape[0]
        return table.index_select(0, expert)

    @staticmethod
    def backward(ctx, g):
        expert, = ctx.saved_tensors
        one_hot = (torch.arange(ctx.n, device=g.device).unsqueeze(1) == expert.unsqueeze(0)).to(g.dtype)
        return one_hot @ g, None


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

    def forward(self, x):                               # x [T, H]
        logits = self.router(x)
        if self.oss:                                    # softmax over the top-k logits
            w, idx = torch.topk(logits, self.k, dim=-1)
            w = torch.softmax(w, dim=-1, dtype=torch.float32)
        else:
            w, idx = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), self.k, dim=-1)
            if self.renorm:
                w = w / w.sum(-1, keepdim=True)
        expert, order = torch.sort(idx.view(-1).to(torch.int32), stable=True)     # copies of tokens in expert order
        ends = torch.searchsorted(expert, torch.arange(self.E, device=x.device, dtype=torch.int32), right=True, out_int32=True)
        rows = order // self.k
        back = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=x.device))
        weight = Dispatch.apply(w.view(-1, 1), order, back)
        xs = Dispatch.apply(x, rows, back)
        g = torch._grouped_mm(xs, self.gate_up.transpose(-2, -1), offs=ends)
        if self.oss:
            g = g + RowOfExpert.apply(self.gate_up_bias, expert)
            gate, up = g[:, ::2].clamp(max=self.limit), g[:, 1::2].clamp(min=-self.limit, max=self.limit)
            y = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        else:
            gate, up = g.chunk(2, dim=-1)
            y = F.silu(gate) * up
        y = torch._grouped_mm((y * weight).to(x.dtype), self.down.transpose(-2, -1), offs=ends)
        y = Combine.apply(y, rows, back, self.k)
        if self.oss:                                    # sum of w * bias, as a product [T, E] x [E, H]
            share = torch.zeros(logits.shape, dtype=x.dtype, device=x.device).scatter(1, idx, w.to(x.dtype))
            y = torch.addmm(y, share, self.down_bias)
        return y


# ------------------------------------------------------------------ blocks

class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(n)), eps

    def forward(self, x):
        h = x.to(torch.float32)
        return (self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        h, self.d, self.hq, self.hk = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
        oss = c["model_type"] == "gpt_oss"
        self.qkv = nn.Linear(h, (self.hq + 2 * self.hk) * self.d, bias=oss)
        self.o_proj = nn.Linear(self.hq * self.d, h, bias=oss)
        self.sinks = nn.Parameter(torch.empty(self.hq)) if oss else None
        self.head_norm, self.full_norm = c["model_type"] == "qwen3_moe", c["model_type"] == "olmoe"
        if self.head_norm or self.full_norm:
            self.q_norm = RMSNorm(self.d if self.head_norm else self.hq * self.d, c["rms_norm_eps"])
            self.k_norm = RMSNorm(self.d if self.head_norm else self.hk * self.d, c["rms_norm_eps"])
        self.kind = layer_kind(c, layer)
        self.window = c["sliding_window"] if self.kind == "sliding" else None
        self.path, self.mask = None, None               # set by Model.set_attention

    def forward(self, x, cos, sin):                     # x [B, S, H]
        B, S, _ = x.shape
        q, k, v = self.qkv(x).split([self.hq * self.d, self.hk * self.d, self.hk * self.d], dim=-1)
        if self.full_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(B, S, self.hq, self.d), k.view(B, S, self.hk, self.d), v.view(B, S, self.hk, self.d)
        if self.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        a = attend(q, k, v, self.sinks, self.path, self.window, self.mask)
        return self.o_proj(a.transpose(1, 2).reshape(B, S, self.hq * self.d))


KEPT = {aten._scaled_dot_product_cudnn_attention.default, aten._flash_attention_forward.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops.higher_order.flex_attention,
        aten.topk.default, aten.sort.default, aten.sort.stable, aten.searchsorted.Tensor}


def keep(gate_up, ctx, op, *args, **kwargs):
    """Policy of selective checkpointing; gate_up: (rows, columns) of the experts' first weights if their product is kept too."""
    if op in KEPT or (gate_up and op == aten._grouped_mm.default and tuple(args[1].shape[1:]) == gate_up):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """checkpointing: "none", "selective" or "gate-up" (selective, and the experts' first product is kept)."""

    def __init__(self, c, layer, checkpointing, compiled):
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = RMSNorm(c["hidden_size"], c["rms_norm_eps"]), RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.attn, self.moe = Attention(c, layer), MoE(c)
        self.checkpointing = checkpointing
        shape = (c["hidden_size"], 2 * c["moe_intermediate_size"]) if checkpointing == "gate-up" else None
        self.contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(keep, shape))
        self.body = torch.compile(self.core, fullgraph=True, dynamic=False) if compiled else self.core

    def first(self, x, cos, sin):
        return x + self.attn(self.norm1(x), cos, sin)

    def second(self, x):
        return x + self.moe(self.norm2(x).view(-1, x.shape[-1])).view(x.shape)

    def core(self, x, cos, sin):
        if self.checkpointing == "none":
            return self.second(self.first(x, cos, sin))
        kw = dict(use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts)
        return checkpoint(self.second, checkpoint(self.first, x, cos, sin, **kw), **kw)

    def forward(self, x, cos, sin):
        mark("run", self.layer)
        try:
            with note(f"P/run/{self.layer}"):
                return self.body(x, cos, sin)
        finally:
            mark("ran", self.layer)


# ------------------------------------------------------------------ loss and model

def loss_and_gradient(logits, labels, scale):
    x = logits.to(torch.float32)
    lse = torch.logsumexp(x, -1, keepdim=True)
    loss = (lse - x.gather(1, labels.unsqueeze(1))).sum() * scale
    hit = torch.arange(x.shape[1], device=x.device).unsqueeze(0) == labels.unsqueeze(1)
    return loss, ((torch.exp(x - lse) - hit.to(x.dtype)) * scale).to(logits.dtype)


compiled_loss = torch.compile(loss_and_gradient, fullgraph=True, dynamic=False)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of h @ weight^T. The gradients are made here, so no chunk of logits is computed twice."""

    @staticmethod
    def forward(ctx, h, weight, labels, chunk, compiled):
        f = compiled_loss if compiled else loss_and_gradient
        loss, dh, dw = 0.0, torch.empty_like(h), None
        for i in range(0, h.shape[0], chunk):
            part = h[i:i + chunk]
            term, d = f(part @ weight.t(), labels[i:i + chunk], 1.0 / h.shape[0])
            loss = loss + term
            torch.mm(d, weight, out=dh[i:i + chunk])
            dw = d.t() @ part if dw is None else dw.addmm_(d.t(), part)
            del d
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    def backward(ctx, g):
        dh, dw = ctx.saved_tensors
        return dh * g.to(dh.dtype), dw * g.to(dw.dtype), None, None, None


class Head(nn.Module):
    """Final norm, output projection and loss: one FSDP group."""

    def __init__(self, c, chunk, compiled):
        super().__init__()
        self.norm, self.chunk, self.compiled = RMSNorm(c["hidden_size"], c["rms_norm_eps"]), chunk, compiled
        self.weight = nn.Parameter(torch.empty(c["vocab_size"], c["hidden_size"]))

    def forward(self, x, labels):
        return LinearCrossEntropy.apply(self.norm(x).view(-1, x.shape[-1]), self.weight, labels.view(-1), self.chunk, self.compiled)


def layer_kind(c, layer):
    return "sliding" if c.get("sliding_window") and layer % 2 == 0 else "full"


def rope_tables(c, s, device, dtype):
    """cos and sin [S, D]; YaRN where the config says so, as transformers' modeling_rope_utils."""
    d, base = c["head_dim"], c["rope_theta"]
    inv = 1.0 / base ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    scale, yarn = 1.0, c.get("rope_scaling")
    if yarn:
        at = lambda turns: d * math.log(yarn["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
        low, high = max(at(yarn["beta_fast"]), 0), min(at(yarn["beta_slow"]), d - 1)
        ramp = ((torch.arange(d // 2, device=device, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        inv = inv / yarn["factor"] * ramp + inv * (1 - ramp)
        scale = 0.1 * math.log(yarn["factor"]) + 1.0
    f = torch.outer(torch.arange(s, device=device, dtype=torch.float32), inv)
    f = torch.cat((f, f), dim=-1)
    return (f.cos() * scale).to(dtype), (f.sin() * scale).to(dtype)


class Model(nn.Module):
    def __init__(self, c, checkpointing="selective", gate_up_blocks=0, compiled=False, loss_chunk=4096):
        super().__init__()
        self.c, n = c, c["num_hidden_layers"]
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.blocks = nn.ModuleList(Block(c, i, "gate-up" if checkpointing == "selective" and i >= n - gate_up_blocks else checkpointing, compiled)
                                    for i in range(n))
        self.head = Head(c, loss_chunk, compiled)

    def set_attention(self, paths, s, device):
        """paths: {"sliding": path, "full": path}"""
        masks = {}
        for b in self.blocks:
            a = b.attn
            a.path = paths[a.kind]
            if a.path == "flex":
                if a.kind not in masks:
                    masks[a.kind] = block_mask(a.window, s, device)
                a.mask = masks[a.kind]

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        cos, sin = rope_tables(self.c, tokens.shape[1], x.device, x.dtype)
        for i, b in enumerate(self.blocks):
            mark("block", i)
            with note(f"P/block/{i}"):
                x = b(x, cos, sin)
        mark("blocks_done")
        return self.head(x, labels)
