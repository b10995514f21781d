#!/usr/bin/env python3
"""Makes tests/fixtures/transformer: a small Llama of transformers with random weights, and what PyTorch computes
from it in f64 (logits, loss, gradients). Made with torch 2.15.0 and transformers 5.24.0:

    python3 tests/python/make_transformer_fixture.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from check_gradients import llama_config, randomize
from reference_model import next_token_loss

OUT = Path(__file__).parent.parent / "fixtures" / "transformer"


def main():
    config = llama_config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(7)
    randomize(model, generator)
    OUT.mkdir(exist_ok=True)
    (OUT / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, OUT / "model.safetensors", {"format": "pt"})
    ids = torch.randint(config["vocab_size"], (2, 9), generator=generator)
    model = model.double()
    logits = model(ids).logits
    loss = next_token_loss(logits, ids)
    loss.backward()
    expected = {name: p.grad.float() for name, p in model.named_parameters()}
    expected |= {"input_ids": ids.int(), "logits": logits.detach().float(), "loss": loss.detach().float()[None]}
    save_file(expected, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
