#!/usr/bin/env python3
"""Compares `mmfree gradients` with PyTorch, in f64, on configurations of awkward sizes.

Wants torch, transformers and safetensors. The MatMul-free model is reference_model.py, the Transformer++ is
the Llama of transformers.

    check_gradients.py --program target/release/mmfree
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reference_model import MatMulFree, next_token_loss

# Where PyTorch itself, in f32, is further from f64 than this, four times its distance is allowed.
BUDGET = 1e-5
# Rounding an activation to 8 bits may go the other way when f32 and f64 differ in the last bit. One such flip
# changes the gradients behind it by about 1 %, so larger cases are compared coarsely. Over many seeds errors are
# either 1e-6 or about 1e-2, for mmfree as for PyTorch in f32: docs/numerics.md, section 7.
BUDGET_WITH_FLIPS = 5e-2


def hgrn_config(**changes):
    config = dict(
        model_type="hgrn_bit", vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        rms_norm_eps=1e-6, use_lower_bound=True, num_heads=1, expand_ratio=1, use_short_conv=False,
        tie_word_embeddings=False, hidden_act="swish",
    )
    return config | changes


def llama_config(**changes):
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=97, hidden_size=48,
        intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=512, tie_word_embeddings=False,
        hidden_act="silu", attention_bias=False, mlp_bias=False,
    )
    return config | changes


CASES = {
    "tiny sizes": (hgrn_config(num_hidden_layers=1, hidden_size=16, intermediate_size=24), 1, 5, BUDGET),
    "one layer": (hgrn_config(num_hidden_layers=1), 3, 7, BUDGET),
    "no lower bound": (hgrn_config(use_lower_bound=False, rms_norm_eps=1e-5, hidden_size=33), 2, 11, BUDGET),
    "odd": (hgrn_config(hidden_size=192, vocab_size=509, intermediate_size=512), 3, 57, BUDGET_WITH_FLIPS),
    "odd width": (hgrn_config(hidden_size=37, vocab_size=101, intermediate_size=53), 2, 33, BUDGET_WITH_FLIPS),
    "llama": (llama_config(), 2, 19, BUDGET),
    "llama, blocks of attention": (llama_config(vocab_size=509, hidden_size=64, num_attention_heads=4,
                                                num_key_value_heads=4), 3, 151, BUDGET),
    "llama, one head": (llama_config(hidden_size=26, num_attention_heads=1, num_key_value_heads=1,
                                     rope_theta=5e5, rms_norm_eps=1e-5), 1, 65, BUDGET),
}


def build(config):
    if config["model_type"] == "hgrn_bit":
        return MatMulFree(config)
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager"))


def randomize(model, generator):
    """Weights in f32 that leave no gradient trivial."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.3 * noise)


def reference(model, ids):
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    loss = next_token_loss(logits, ids)
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.double().clone() for name, p in model.named_parameters()}


def relative_errors(found, expected):
    return {k: ((found[k] - e).norm() / max(e.norm(), 1e-9)).item() for k, e in expected.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True)
    arguments = parser.parse_args()
    failed = False
    for name, (config, batch, length, budget) in CASES.items():
        generator = torch.Generator().manual_seed(len(name))
        model = build(config)
        randomize(model, generator)
        ids = torch.randint(config["vocab_size"], (batch, length), generator=generator)
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            (work / "config.json").write_text(json.dumps(config))
            save_file({k: v.detach().clone() for k, v in model.named_parameters()},
                      work / "model.safetensors", {"format": "pt"})
            (work / "ids.json").write_text(json.dumps(ids.tolist()))
            subprocess.run(
                [arguments.program, "gradients", work, "--backend", "cpu", "--token-ids-file", work / "ids.json",
                 "-o", work / "gradients.safetensors"], check=True, stdout=subprocess.DEVNULL)
            found = load_file(work / "gradients.safetensors")
        _, in_f32 = reference(model, ids)
        loss, expected = reference(model.double(), ids)
        errors = {"loss": abs(found.pop("loss").item() / loss - 1)}
        if found.keys() != expected.keys():
            sys.exit(f"{name}: the tensors differ: {found.keys() ^ expected.keys()}")
        errors |= relative_errors(found, expected)
        worst = max(errors, key=errors.get)
        pytorch = max(relative_errors(in_f32, expected).values())
        budget = max(budget, 4 * pytorch)
        verdict = "fine" if errors[worst] < budget else "differs"
        failed |= verdict != "fine"
        print(f"{name}: {verdict}: loss {loss:.6f}, worst relative error {errors[worst]:.1e} ({worst}), "
              f"PyTorch in f32 {pytorch:.1e}, budget {budget:.0e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
