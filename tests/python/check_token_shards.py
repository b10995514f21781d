"""Compares what `mmfree tokenize` and `mmfree tokenizer train` write with what the package `tokenizers` makes of the
same text. The shards are read here from their description in docs/token-shards.md, checksums included.

    check_token_shards.py ids SHARDS CORPUS.jsonl
    check_token_shards.py training TOKENIZER_DIRECTORY CORPUS.jsonl
"""

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path

import tokenizers
import xxhash


def texts(corpus):
    with open(corpus, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines if line.strip()]


def read_shard(path):
    """Documents of a shard, and its header."""
    data = path.read_bytes()
    assert data[:8] == b"MMTOKENS", path
    version, width, vocab_size, block = struct.unpack("<4I", data[8:24])
    tokens, documents = struct.unpack("<2Q", data[24:40])
    sha256, (tables_sum,), (header_sum,) = data[40:72], struct.unpack("<Q", data[72:80]), struct.unpack("<Q", data[120:128])
    assert version == 1 and width == (2 if vocab_size <= 65536 else 4)
    assert xxhash.xxh3_64_intdigest(data[:120]) == header_sum, "header"
    ids = struct.unpack(f"<{tokens}{'H' if width == 2 else 'I'}", data[128 : 128 + tokens * width])
    tables = -(-(128 + tokens * width) // 8) * 8
    assert xxhash.xxh3_64_intdigest(data[tables:]) == tables_sum, "tables"
    blocks = -(-tokens * width // block)
    assert len(data) == tables + 8 * (documents + blocks), "length"
    ends = struct.unpack(f"<{documents}Q", data[tables : tables + 8 * documents])
    sums = struct.unpack(f"<{blocks}Q", data[tables + 8 * documents :])
    for number, expected in enumerate(sums):
        start = 128 + number * block
        assert xxhash.xxh3_64_intdigest(data[start : min(start + block, 128 + tokens * width)]) == expected, number
    starts = (0, *ends[:-1])
    return [list(ids[start:end]) for start, end in zip(starts, ends)], sha256, header_sum


def check_ids(shards, corpus):
    directory = Path(shards)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    file = directory / manifest["tokenizer"]["file"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha256 == manifest["tokenizer"]["sha256"], "hash of the tokenizer"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    found = []
    for shard in manifest["shards"]:
        documents, shard_sha256, checksum = read_shard(directory / shard["file"])
        assert shard_sha256.hex() == sha256 and f"{checksum:016x}" == shard["checksum"]
        assert (len(documents), sum(map(len, documents))) == (shard["documents"], shard["tokens"])
        found += documents
    expected = [tokenizer.encode(text).ids + [manifest["tokenizer"]["eos"]] for text in texts(corpus)]
    assert len(found) == len(expected) == manifest["documents"]
    for number, (ids, reference) in enumerate(zip(found, expected)):
        if ids != reference:
            at = next((i for i, pair in enumerate(zip(ids, reference)) if pair[0] != pair[1]), min(len(ids), len(reference)))
            sys.exit(f"document {number} differs from token {at}: {ids[at:at + 5]}, expected {reference[at:at + 5]}")
    print(f"{sum(map(len, found))} ids of {len(found)} documents in {len(manifest['shards'])} shards are the same")


def check_training(directory, corpus):
    written = json.loads((Path(directory) / "tokenizer.json").read_text(encoding="utf-8"))
    special = [token["content"] for token in written["added_tokens"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(written["model"]["vocab"]),
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    reference = json.loads(tokenizer.to_str())["model"]
    for part in ("vocab", "merges"):
        if written["model"][part] != reference[part]:
            sys.exit(f"the {part} differ")
    print(f"{len(reference['vocab'])} tokens and {len(reference['merges'])} merges are the same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ids", "training"])
    parser.add_argument("made")
    parser.add_argument("corpus")
    arguments = parser.parse_args()
    (check_ids if arguments.what == "ids" else check_training)(arguments.made, arguments.corpus)
