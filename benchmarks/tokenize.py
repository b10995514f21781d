"""Measures `mmfree tokenize` against the Python package `tokenizers` on the same text and the same tokenizer.

    python3 benchmarks/tokenize.py TEXT.jsonl --tokenizer tokenizer.json --mmfree target/release/mmfree

Both read the file, encode every document and write the ids as 16-bit numbers; the package does that in batches of
1000 documents, which it spreads over all cores by itself. Each round runs both in turn; figures are medians of the
rounds with the least and the largest, in megabytes (10^6 bytes) of text a second. The ids must be the same.
"""

import argparse
import array
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time


def with_package(text, tokenizer, output):
    import tokenizers

    pipeline = tokenizers.Tokenizer.from_file(tokenizer)
    eos = pipeline.token_to_id("</s>")
    batch, tokens = [], 0
    with open(text, encoding="utf-8") as lines, open(output, "wb") as out:
        def flush():
            nonlocal tokens
            for encoding in pipeline.encode_batch_fast(batch):
                ids = array.array("H", encoding.ids)
                ids.append(eos)
                tokens += len(ids)
                ids.tofile(out)
            batch.clear()

        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == 1000:
                flush()
        flush()
    return tokens


def timed(command, environment=None):
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    return time.perf_counter() - start, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--mmfree", default="target/release/mmfree")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--package-only", metavar="OUTPUT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.package_only:
        print(with_package(arguments.text, arguments.tokenizer, arguments.package_only))
        return
    with open(arguments.text, encoding="utf-8") as lines:
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
    speeds = {}
    work = tempfile.mkdtemp()
    for _ in range(arguments.rounds):
        for threads in arguments.threads:
            shards = os.path.join(work, "shards")
            shutil.rmtree(shards, ignore_errors=True)
            seconds, out = timed([arguments.mmfree, "tokenize", arguments.text, "-o", shards, "--json",
                                  "--tokenizer", arguments.tokenizer, "--threads", str(threads)])
            ours = json.loads(out)["tokens"]
            speeds.setdefault(("mmfree", threads), []).append(megabytes / seconds)
            seconds, out = timed([sys.executable, __file__, arguments.text, "--tokenizer", arguments.tokenizer,
                                  "--package-only", os.path.join(work, "ids")],
                                 {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"})
            theirs = int(out)
            speeds.setdefault(("tokenizers", threads), []).append(megabytes / seconds)
            if ours != theirs:
                sys.exit(f"{ours} tokens here, {theirs} there")
    shutil.rmtree(work)
    print(f"{megabytes:.1f} MB of text, {ours} tokens; megabytes a second, median (least to largest) of {arguments.rounds}")
    for threads in arguments.threads:
        for engine in ("mmfree", "tokenizers"):
            values = speeds[engine, threads]
            print(f"{engine}, {threads} threads: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        ratios = [a / b for a, b in zip(speeds["mmfree", threads], speeds["tokenizers", threads])]
        print(f"ratio, {threads} threads: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
