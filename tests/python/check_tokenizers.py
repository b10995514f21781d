#!/usr/bin/env python3
"""Compares the ids and texts of a tokenizer file with those of the Python packages.

    pip install -r tests/python/requirements.txt zstandard
    tests/python/check_tokenizers.py TOKENIZER TEXT [--lines N] [--program PATH]

TOKENIZER is a tokenizer.json (package `tokenizers`) or a SentencePiece model (package
`sentencepiece`). TEXT is a text file, or JSON lines with a `text` field, plain or .zst. Its lines are
checked one by one, then every document (or stretch of 200 lines) as a stream cut into parts of 1, 7,
64 and 1000 bytes, then a set of hostile strings, then the decoding of all ids and of random ones.
Exit code 0 if all agree, 1 if any differs.
"""

import argparse
import io
import json
import random
import subprocess
import sys
from pathlib import Path

from nasty_lines import NASTY

ROOT = Path(__file__).resolve().parents[2]


def read_documents(path):
    data = path.read_bytes()
    if path.suffix == ".zst":
        import zstandard
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    text = data.decode()
    if ".jsonl" in path.name:
        return [json.loads(line)["text"] for line in text.split("\n") if line]
    lines = text.split("\n")
    return ["\n".join(lines[i:i + 200]) for i in range(0, len(lines), 200)]


class Reference:
    """The Python package that defines the answers."""

    def __init__(self, path):
        if path.suffix == ".json":
            import tokenizers
            self.inner = tokenizers.Tokenizer.from_file(str(path))
            self.inner.no_truncation()
            self.inner.no_padding()
            self.encode = lambda text: self.inner.encode(text, add_special_tokens=False).ids
            self.decode = self.inner.decode
            self.size = self.inner.get_vocab_size()
        else:
            import sentencepiece
            self.inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.encode = self.inner.encode
            self.decode = self.inner.decode
            self.size = self.inner.get_piece_size()


def run_ours(program, tokenizer, lines, *flags):
    command = [*program, str(tokenizer), *flags]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(lines) + "\n", capture_output=True,
                          encoding="utf-8")
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr}")
    answers = done.stdout.split("\n")[:-1]
    if len(answers) != len(lines):
        sys.exit(f"{len(answers)} answers to {len(lines)} lines")
    return answers


def compare(name, inputs, expected, actual):
    wrong = [i for i, (e, a) in enumerate(zip(expected, actual, strict=True)) if e != a]
    for i in wrong[:5]:
        at = next((j for j, (e, a) in enumerate(zip(expected[i], actual[i])) if e != a), "the end")
        print(f"{name}: {inputs[i][:80]!r} differs at {at}:\n  expected {expected[i][:60]!r}\n"
              f"  found    {actual[i][:60]!r}")
    print(f"{name}: {len(inputs) - len(wrong)} of {len(inputs)} agree")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--lines", type=int, default=5000, help="lines of text to check (default 5000)")
    parser.add_argument("--program", type=Path,
                        help="example 02-tokenize-lines as built (default: cargo builds it)")
    arguments = parser.parse_args()

    if arguments.program:
        program = [arguments.program.resolve()]
    else:
        program = ["cargo", "run", "--quiet", "--release", "-p", "mmfree", "--example", "02-tokenize-lines", "--"]
    reference = Reference(arguments.tokenizer)
    documents = read_documents(arguments.text)
    lines = [line for document in documents for line in document.split("\n")][:arguments.lines]
    tokenizer = arguments.tokenizer.resolve()
    fine = True

    def check_encoding(name, texts, *flags):
        answers = run_ours(program, tokenizer, [json.dumps(text) for text in texts], "--json", *flags)
        actual = [json.loads(f"[{answer}]") for answer in answers]
        return compare(name, texts, [reference.encode(text) for text in texts], actual)

    fine &= check_encoding("lines", lines)
    fine &= check_encoding("hostile strings", NASTY)
    joined = ["".join(NASTY), " ".join(NASTY), "\n".join(NASTY)]
    chosen, size = [], 0
    for document in documents:
        chosen.append(document[:200_000])
        size += len(chosen[-1])
        if size > 1_000_000:
            break
    joined.append("\n".join(chosen))
    for chunk_bytes in (1, 7, 64, 1000):
        fine &= check_encoding(f"streams of {chunk_bytes} bytes", NASTY + joined + chosen,
                               "--chunk-bytes", str(chunk_bytes))

    generator = random.Random(1)
    ids = [reference.encode(text) for text in lines + NASTY]
    ids += [[generator.randrange(reference.size) for _ in range(generator.randrange(40))] for _ in range(3000)]
    few = [generator.randrange(reference.size) for _ in range(8)] + list(range(min(300, reference.size)))
    ids += [[generator.choice(few) for _ in range(generator.randrange(12))] for _ in range(3000)]
    answers = run_ours(program, tokenizer, [",".join(map(str, line)) for line in ids], "--decode")
    fine &= compare("decoding", ids, [reference.decode(line) for line in ids], list(map(json.loads, answers)))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
