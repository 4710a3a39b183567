#!/usr/bin/env python3
"""Loads a folder of weights with Hugging Face transformers and prints the loss of given tokens, as JSON: {"loss": 5.160105223}.

    pip install torch transformers safetensors
    tests/peers/hf_roundtrip.py FOLDER TOKENS.json [--dtype float64]

TOKENS.json: {"tokens": [[3, 1, 4, ...], ...], "targets": [[1, 4, -100, ...], ...]}, sequences of equal length; a target of -100 does not
count, and without targets they are the next tokens. The loss is the mean cross entropy over the valid targets, without an auxiliary loss.
Fails when the folder lacks a weight, has one too many or one of another shape.
"""
import argparse
import json
import pathlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config


def config_of(folder):
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] != "kimi_k2":
        return AutoConfig.from_pretrained(folder)
    # transformers has no class for it; its own code is DeepSeek-V3's.
    return DeepseekV3Config(**{name: value for name, value in fields.items() if name not in ("model_type", "auto_map", "architectures")})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("--dtype", default="float32", help="to compute in")
    arguments = parser.parse_args()

    model, report = AutoModelForCausalLM.from_pretrained(
        arguments.folder, config=config_of(arguments.folder), dtype=getattr(torch, arguments.dtype), attn_implementation="eager",
        experts_implementation="eager", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise SystemExit(f"{arguments.folder}: {problem}: {sorted(report[problem])[:5]}")

    data = json.loads(arguments.tokens.read_text())
    tokens = torch.tensor(data["tokens"])
    targets = torch.tensor(data["targets"]) if "targets" in data else torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=-100)
    print(json.dumps({"loss": round(loss.item(), 9)}))


if __name__ == "__main__":
    main()
