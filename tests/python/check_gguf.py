#!/usr/bin/env python3
"""Compares packed GGUF files with the Hugging Face directories that they were made from.

    pip install -r tests/python/requirements.txt
    check_gguf.py PACKED.gguf DIRECTORY [PACKED.gguf DIRECTORY ...]
    check_gguf.py --generate DIRECTORY --hidden-size D --vocab-size V [...]

The file is read by the `gguf` package and the trits are dequantised by it. Trits and scales are then
recomputed from the source with numpy and must be equal exactly:

    gamma = max(mean |W|, 1e-5), summed in f64, kept as f32
    t = clamp(round_half_even(W * (1 / gamma)), -1, 1) in f32

Exit code 0: everything is equal. 1: something differs. `--generate` writes a random directory to pack.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

TERNARY = ("TQ1_0", "TQ2_0")


def read_safetensors(path):
    """Every tensor of a file as (f32 values, dtype name, raw bytes). bf16 is widened by hand: numpy has none."""
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        data, dtype = raw[begin:end], entry["dtype"]
        if dtype == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
        tensors[name] = (values.reshape(entry["shape"]), dtype, data)
    return tensors


def read_directory(directory):
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        tensors.update(read_safetensors(path))
    return tensors


def quantise(weights):
    total = math.fsum(np.abs(weights.astype(np.float64)).ravel())
    scale = max(np.float32(total / weights.size), np.float32(1e-5))
    trits = np.clip(np.round(weights * (np.float32(1) / scale)), -1, 1)
    return scale, trits


def check(packed, directory):
    """A list of differences."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(packed)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    source = read_directory(directory)
    config = json.loads((directory / "config.json").read_text())
    problems = []

    def expect(what, found, expected):
        if found != expected:
            problems.append(f"{what}: found {found!r}, expected {expected!r}")

    def field(key):
        found = reader.get_field(key)
        return None if found is None else found.contents()

    expect("architecture", field("general.architecture"), "hgrn_bit")
    expect("hidden size", field("hgrn_bit.embedding_length"), config["hidden_size"])
    expect("layers", field("hgrn_bit.block_count"), config["num_hidden_layers"])
    expect("vocabulary", field("hgrn_bit.vocab_size"), config["vocab_size"])
    for key, name in (
        ("tokenizer.huggingface.json", "tokenizer.json"),
        ("tokenizer.huggingface.config", "tokenizer_config.json"),
    ):
        path = directory / name
        expect(key, field(key), path.read_text(encoding="utf-8") if path.exists() else None)

    used = set()
    for name, (values, dtype, raw) in source.items():
        tensor = stored.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
            continue
        used.add(name)
        kind = tensor.tensor_type.name
        if kind in TERNARY:
            scale, trits = quantise(values)
            scale_name = name.removesuffix("weight") + "scale"
            used.add(scale_name)
            found_scale = stored[scale_name].data
            if found_scale.tobytes() != scale.tobytes():
                problems.append(f"{scale_name} is {found_scale}, expected {scale!r}")
            found = dequantize(tensor.data, tensor.tensor_type)
            rows, cols = values.shape
            expect(f"{name} shape", found.shape, (rows, -(-cols // 256) * 256))
            wrong = int((found[:, :cols] != trits).sum() + (found[:, cols:] != 0).sum())
            if wrong:
                problems.append(f"{name}: {wrong} of {found.size} trits differ")
        elif name == "model.embeddings.weight":
            expect(f"{name} type", kind, dtype)
            if tensor.data.tobytes() != raw:
                problems.append(f"{name}: bytes differ from the source")
        else:
            expect(f"{name} type", kind, "F32")
            if tensor.data.reshape(values.shape).tobytes() != values.tobytes():
                problems.append(f"{name}: values differ")
    problems += [f"{name} is not in the source" for name in stored.keys() - used]
    ternary = sum(tensor.tensor_type.name in TERNARY for tensor in reader.tensors)
    expect("ternary tensors", ternary, 6 * config["num_hidden_layers"] + 1)
    return problems, ternary


def generate(directory, args):
    """Writes a directory with random weights."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(args.seed)
    d, f, v, layers = args.hidden_size, args.intermediate_size, args.vocab_size, args.layers
    dtype = {"f32": np.float32, "f16": np.float16}[args.dtype]
    tensors = {}

    def put(name, *shape):
        tensors[name] = (random.standard_normal(shape) * 0.02).astype(dtype)

    def bit_linear(name, outputs, inputs):
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.norm.weight", inputs)

    put("model.embeddings.weight", v, d)
    put("model.lower_bounds", layers, d)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("attn_norm", "mlp_norm", "attn.g_norm"):
            put(f"{block}.{name}.weight", d)
        for name in ("i_proj", "f_proj", "g_proj", "o_proj"):
            bit_linear(f"{block}.attn.{name}", d, d)
        bit_linear(f"{block}.mlp.gate_proj", 2 * f, d)
        bit_linear(f"{block}.mlp.down_proj", d, f)
    put("model.norm.weight", d)
    bit_linear("lm_head", v, d)
    config = {
        "model_type": "hgrn_bit",
        "vocab_size": v,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="pairs of a packed file and its source")
    parser.add_argument("--generate", type=Path, metavar="DIRECTORY", help="write a random source")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=300)
    parser.add_argument("--vocab-size", type=int, default=509)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("f32", "f16"), default="f32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.generate:
        generate(args.generate, args)
        return 0
    if not args.paths or len(args.paths) % 2:
        parser.error("expected pairs of a packed file and its source directory")
    failed = False
    for packed, directory in zip(args.paths[::2], args.paths[1::2]):
        problems, ternary = check(packed, directory)
        for problem in problems:
            print(f"{packed}: {problem}")
        failed |= bool(problems)
        print(f"{packed}: {'differs' if problems else f'equal, {ternary} ternary tensors'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
