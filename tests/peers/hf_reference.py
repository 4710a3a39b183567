#!/usr/bin/env python3
"""Losses and gradients by Hugging Face transformers, for the tests of the executor: tests/data/hf/<family>/reference.safetensors.

    pip install torch transformers safetensors numpy        # written with torch 2.15, transformers 5.23; deepseek_* with 5.24
    tests/peers/hf_reference.py                             # every family under tests/data/hf; or name some

For each tests/data/hf/<family>/config.json: weights by the formula of exec/weights/init.cpp (seed SEED, standard deviation STD,
Vectors::random: also norms, biases, sinks and correction biases are random, so that no gradient vanishes), rounded to fp32; eager
attention and experts; everything in fp64, also where the modelling code says fp32. What is written, all little-endian, integers I32:

    tokens, targets (2, 64)             next tokens; a target of -100 does not count
    plain.positions, plain.starts       (2, 64); starts: first row that a row's attention sees, rows counted over both sequences
    packed.positions, packed.starts     the same tokens, the second sequence two documents, the first three
    <case>.loss (1)                     F64; mean cross entropy over the valid targets, of all documents together
    <case>.gradient.<tensor>            F32; names and layouts as in a checkpoint; zero for an expert that no token chose
    balanced.auxiliary (1)              F64; the load-balancing loss, before its coefficient

Cases: plain; packed; balanced = plain with output_router_logits=True, where the family has router_aux_loss_coef: its .loss and gradients
include the coefficient times the auxiliary loss. A choice of experts that rounding could change would make the reference useless: the
script fails unless every choice is clear by MARGIN.

    tests/peers/hf_reference.py names                       # tests/data/hf/names.json: tensor names and shapes

of what save_pretrained writes for these models and for scenarios/models/tiny-*.
"""
import contextlib
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SEED = 7
STD = 0.2
MARGIN = 2e-5
SEQUENCES, CONTEXT = 2, 64
DOCUMENTS = [[0, 9, 41], [0, 30]]  # where documents start in the packed case
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "tests" / "data" / "hf"

U64 = np.uint64
GAMMA = U64(0x9E3779B97F4A7C15)


def mix(z):
    z = np.asarray(z, U64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        return z ^ (z >> U64(31))


def random_tensor(name, shape):
    """The values that RandomSource(model, SEED, STD, Vectors::random) gives to the tensor `name` of a checkpoint."""
    code = 0xCBF29CE484222325
    for byte in name.encode():
        code = ((code ^ byte) * 0x100000001B3) % 2**64
    with np.errstate(over="ignore"):
        key = mix(U64(code) ^ mix(U64(SEED) + GAMMA))
        bits = mix(key + np.arange(np.prod(shape), dtype=U64) * GAMMA)
    u = ((bits >> U64(32)).astype(np.float64) + 0.5) * 2.0**-32
    v = ((bits & U64(0xFFFFFFFF)).astype(np.float64) + 0.5) * 2.0**-32
    normal = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    return (mean + STD * normal).reshape(shape).astype(np.float32)


@contextlib.contextmanager
def double_precision():
    """fp64 also where the modelling code converts to fp32 by name."""
    single, method = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = method
        torch.set_default_dtype(single)


def checkpoint(config, folder):
    """A folder with the config and random weights (fp32 values stored as fp64), named as save_pretrained names them."""
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: random_tensor(name, t.shape).astype(np.float64) for name, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return {name: list(tensors[name].shape) for name in sorted(tensors)}


def batch(vocab):
    rng = np.random.default_rng(SEED)
    text = rng.integers(0, vocab, (SEQUENCES, CONTEXT + 1))
    tokens, targets = text[:, :-1].copy(), text[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.15] = -100
    return tokens.astype(np.int32), targets.astype(np.int32)


def positions_and_starts(documents):
    """(SEQUENCES, CONTEXT) each; starts count from the front of each sequence."""
    starts = np.zeros((SEQUENCES, CONTEXT), np.int32)
    for sequence, firsts in enumerate(documents):
        for first in firsts:
            starts[sequence, first:] = first
    return np.arange(CONTEXT, dtype=np.int32) - starts, starts


def masks(config, starts):
    """Additive (SEQUENCES, 1, CONTEXT, CONTEXT) masks by layer type, or one for all layers."""
    query, key = np.arange(CONTEXT)[:, None], np.arange(CONTEXT)[None, :]
    causal = (key <= query) & (key[None] >= starts[:, :, None])

    def mask(window):
        seen = causal & (key > query - window) if window else causal
        return torch.from_numpy(np.where(seen, 0.0, np.finfo(np.float64).min))[:, None]

    window = getattr(config, "sliding_window", None)
    if config.model_type == "gpt_oss":
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(window)


def watch_routers(model, config, margins):
    """Collects by how much each choice of experts or groups was clear."""
    def clear(scores, chosen):
        ranked = np.sort(scores, axis=-1)[..., ::-1]
        if chosen < scores.shape[-1]:
            margins.append((ranked[..., chosen - 1] - ranked[..., chosen]).min())

    def hook(router, _, output):
        logits = output[0].detach()
        k = config.num_experts_per_tok
        correction = getattr(router, "e_score_correction_bias", None)
        scores = (logits.sigmoid() + correction if correction is not None else logits.softmax(-1)).numpy()
        groups = getattr(config, "n_group", 1) or 1
        if groups > 1:
            grouped = scores.reshape(len(scores), groups, -1)
            best = np.sort(grouped, axis=-1)
            group_scores = best[..., -2:].sum(-1) if correction is not None else best[..., -1]
            clear(group_scores, config.topk_group)
            worst = np.argsort(group_scores, axis=-1)[:, : groups - config.topk_group]
            np.put_along_axis(grouped, worst[..., None], -np.inf, axis=1)
            scores = grouped.reshape(len(scores), -1)
        clear(scores, k)

    found = [m.register_forward_hook(hook) for name, m in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]
    assert found, "no router found"


def run(model, config, tokens, targets, positions, starts, balanced):
    """Loss, auxiliary loss or None, gradients by the name of the parameter in the running model. The auxiliary loss takes an
    attention mask for one of padding, so a balanced run leaves causality to the model."""
    model.zero_grad(set_to_none=True)
    output = model(input_ids=torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(positions).long(),
                   attention_mask=None if balanced else masks(config, starts), output_router_logits=True if balanced else None, use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), torch.from_numpy(targets).long().flatten(), ignore_index=-100)
    auxiliary = output.aux_loss if balanced else None
    if balanced:
        loss = loss + config.router_aux_loss_coef * auxiliary
    assert loss.dtype == torch.float64, loss.dtype
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} has no gradient"
        gradients[name] = parameter.grad
    return loss.item(), auxiliary.item() if balanced else None, gradients


def reference(family):
    config = AutoConfig.from_pretrained(DATA / family)
    assert config.pad_token_id is None, "the embedding's row of padding gets no gradient"
    with tempfile.TemporaryDirectory() as scratch, double_precision():
        scratch = pathlib.Path(scratch)
        names = checkpoint(config, scratch / "weights")
        model = AutoModelForCausalLM.from_pretrained(scratch / "weights", dtype=torch.float64, attn_implementation="eager",
                                                     experts_implementation="eager")
        margins = []
        watch_routers(model, model.config, margins)

        tokens, targets = batch(config.vocab_size)
        result = {"tokens": tokens, "targets": targets}
        cases = [("plain", [[0]] * SEQUENCES, False), ("packed", DOCUMENTS, False)]
        if hasattr(config, "router_aux_loss_coef"):
            cases.append(("balanced", [[0]] * SEQUENCES, True))
        for case, documents, balanced in cases:
            positions, starts = positions_and_starts(documents)
            if not balanced:
                result[f"{case}.positions"] = positions
                result[f"{case}.starts"] = starts + CONTEXT * np.arange(SEQUENCES, dtype=np.int32)[:, None]
            loss, auxiliary, gradients = run(model, model.config, tokens, targets, positions, starts, balanced)
            result[f"{case}.loss"] = np.array([loss])
            if balanced:
                result[f"{case}.auxiliary"] = np.array([auxiliary])
            # save_pretrained gives gradients the names and layouts that it gives weights.
            folder = scratch / case
            state = model.state_dict()
            model.save_pretrained(folder, state_dict={name: gradients.get(name, torch.zeros_like(t)) for name, t in state.items()})
            on_disk = load_file(folder / "model.safetensors")
            assert sorted(on_disk) == list(names)
            for name, gradient in on_disk.items():
                if not name.endswith("e_score_correction_bias"):
                    result[f"{case}.gradient.{name}"] = gradient.astype(np.float32)
        margin = float(min(margins))
        assert margin > MARGIN, f"{family}: experts chosen by {margin}: choose another seed"
        if "balanced.loss" in result:  # also: our masks are those of the model
            expected = result["plain.loss"] + model.config.router_aux_loss_coef * result["balanced.auxiliary"]
            assert abs(result["balanced.loss"] - expected) < 1e-12
    path = DATA / family / "reference.safetensors"
    save_file(result, path)
    path.chmod(0o644)
    return {"family": family, "margin": margin} | {case: float(result[f"{case}.loss"][0]) for case, _, _ in cases}


def names():
    """By the folder of each config.json, relative to the root."""
    result = {}
    for path in sorted([*DATA.glob("*/config.json"), *ROOT.glob("scenarios/models/tiny-*/config.json")]):
        with tempfile.TemporaryDirectory() as scratch:
            result[str(path.parent.relative_to(ROOT))] = checkpoint(AutoConfig.from_pretrained(path.parent), pathlib.Path(scratch))
    lines = [f"{json.dumps(model)}: {json.dumps(tensors)}" for model, tensors in result.items()]
    (DATA / "names.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["names"]:
        names()
        sys.exit()
    for family in sys.argv[1:] or sorted(path.parent.name for path in DATA.glob("*/config.json")):
        print(json.dumps(reference(family)))
