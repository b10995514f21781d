#!/usr/bin/env bash
# Compares packed files and token ids with what the Python packages make of them, for the repository's
# fixtures. Wants requirements.txt installed.
# Each comparison must also reject something wrong.
set -euo pipefail
cd "$(dirname "$0")/../.."
mmfree=target/debug/mmfree
tokenize=target/debug/examples/02-tokenize-lines
# As the tests are built, so that nothing is built twice.
cargo build --profile test --workspace --bin mmfree --example 02-tokenize-lines
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

must_reject() {
    if "$@" >"$work/rejected.log" 2>&1; then
        echo "accepted, but should have been rejected: $*"
        exit 1
    fi
    grep -qE 'differ' "$work/rejected.log" || { cat "$work/rejected.log"; exit 1; }
    echo "rejected, as it must be: $(grep -m1 differ "$work/rejected.log")"
}

cp -r tests/fixtures/tiny "$work/tiny"
cp tests/fixtures/tokenizers/byte-level.json "$work/tiny/tokenizer.json"
python3 tests/python/check_gguf.py --generate "$work/odd" --hidden-size 192 --vocab-size 509 --dtype f16
python3 tests/python/check_gguf.py --generate "$work/other" --hidden-size 192 --vocab-size 509 --dtype f16 --seed 1
for format in tq1_0 tq2_0; do
    for source in tiny odd; do
        "$mmfree" pack "$work/$source" -o "$work/$source.gguf" --format "$format"
        python3 tests/python/check_gguf.py "$work/$source.gguf" "$work/$source"
    done
    must_reject python3 tests/python/check_gguf.py "$work/odd.gguf" "$work/other"
done

fixtures=tests/fixtures/tokenizers
for tokenizer in "$fixtures"/*.json "$fixtures"/*.model; do
    echo "$tokenizer"
    python3 tests/python/check_tokenizers.py "$tokenizer" "$fixtures/pinocchio.txt" --program "$tokenize"
done
printf '#!/bin/sh\nshift\nexec %q %q "$@"\n' "$PWD/$tokenize" "$PWD/$fixtures/unigram.model" >"$work/wrong"
chmod +x "$work/wrong"
must_reject python3 tests/python/check_tokenizers.py "$fixtures/bpe-byte-fallback.model" "$fixtures/pinocchio.txt" --program "$work/wrong"

# Token shards and trained tokenizers, on text of this repository.
python3 - "$work/corpus.jsonl" "$work/other.jsonl" <<'END'
import json, pathlib, sys
pages = sorted(pathlib.Path(".").glob("docs/*.md")) + [pathlib.Path("tests/fixtures/tokenizers/pinocchio.txt")]
texts = [part for page in pages for part in page.read_text(encoding="utf-8").split("\n\n") if part.strip()]
for path, texts in zip(sys.argv[1:], (texts, [text.upper() for text in texts])):
    pathlib.Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
END
"$mmfree" tokenizer train "$work/corpus.jsonl" -o "$work/tokenizer" --vocab-size 1500
python3 tests/python/check_token_shards.py training "$work/tokenizer" "$work/corpus.jsonl"
must_reject python3 tests/python/check_token_shards.py training "$work/tokenizer" "$work/other.jsonl"
for tokenizer in "$work/tokenizer" "$fixtures/llama-3.json"; do
    rm -rf "$work/shards"
    end=$([ -d "$tokenizer" ] && echo "</s>" || echo "<|end|>")
    "$mmfree" tokenize "$work/corpus.jsonl" -o "$work/shards" --tokenizer "$tokenizer" --shard-tokens 5000 \
        --eos-token "$end"
    python3 tests/python/check_token_shards.py ids "$work/shards" "$work/corpus.jsonl"
    must_reject python3 tests/python/check_token_shards.py ids "$work/shards" "$work/other.jsonl"
done
