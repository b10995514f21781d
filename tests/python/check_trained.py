#!/usr/bin/env python3
"""Loads what `mmfree train` wrote into other people's code and compares what both compute.

A MatMul-free model goes into reference_model.py, whose parameters have the names and shapes of the authors' modules
(their kernels want a GPU), and its config.json must have the keys of one that the authors' code wrote. A Transformer++
goes into the LlamaForCausalLM of transformers. The tokenizer goes into transformers' AutoTokenizer. Wants torch,
transformers and safetensors.

    check_trained.py --program target/release/mmfree runs/tiny/model runs/tiny-transformer/model
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from check_gradients import BUDGET, BUDGET_WITH_FLIPS, relative_errors
from reference_model import MatMulFree, next_token_loss

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny" / "config.json"
# Keys of the library that wrote the fixture, not of the model.
NOT_OF_THE_MODEL = {"_attn_implementation_autoset", "transformers_version"}
TEXT = "Once upon a time there was a king's daughter, and she had 12 ravens.\n\nWell!"


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "hgrn_bit":
        missing = json.loads(FIXTURE.read_text()).keys() - NOT_OF_THE_MODEL - config.keys()
        if missing:
            sys.exit(f"{directory}: config.json has no {', '.join(sorted(missing))}")
        weights = load_file(directory / "model.safetensors")
        model = MatMulFree(config)
        model.load_state_dict(weights, strict=True)
        return model, weights
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager")
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[what]:
            sys.exit(f"{directory}: {what}: {loading[what]}")
    return model, load_file(directory / "model.safetensors")


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], check=True, text=True, stdout=subprocess.PIPE).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("directories", nargs="+", type=Path)
    arguments = parser.parse_args()
    failed = False
    for directory in arguments.directories:
        model, weights = load(directory)
        if {tensor.dtype for tensor in weights.values()} != {torch.float32}:
            sys.exit(f"{directory}: tensors that are not f32")
        ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
        errors = {}
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            ids_file, out = work / "ids.json", work / "out.safetensors"
            batch = torch.tensor([ids, ids[::-1]])
            ids_file.write_text(json.dumps(batch.tolist()))
            run(arguments.program, "gradients", directory, "--token-ids-file", ids_file, "-o", out)
            found = load_file(out)
            output = model(batch)
            logits = getattr(output, "logits", output)
            loss = next_token_loss(logits, batch)
            loss.backward()
            errors["loss"] = abs(found.pop("loss").item() / loss.item() - 1)
            gradients = relative_errors(found, {name: p.grad for name, p in model.named_parameters()})
            errors["gradients"] = max(gradients.values())
            is_ternary = isinstance(model, MatMulFree)
            if is_ternary:
                run(arguments.program, "logits", directory, "--token-ids-file", ids_file, "-o", out)
                error = load_file(out)["logits"].reshape(logits.shape) - logits.detach()
                errors["logits"] = (error.norm() / logits.norm()).item()
        budget = BUDGET_WITH_FLIPS if is_ternary else BUDGET
        worst = max(errors, key=errors.get)
        verdict = "fine" if errors[worst] < budget else "differs"
        failed |= verdict != "fine"
        print(f"{directory}: {verdict}: {len(weights)} tensors, {len(ids)} tokens, loss {loss.item():.6f}, "
              + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    sys.exit(failed)


if __name__ == "__main__":
    main()
