#!/usr/bin/env bash
# `mpirun -np 2 mmfree train` gives the losses and weights of one process, and goes on what one process began.
# Argument: the program, built with the feature `mpi`.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1
directory=$(mktemp -d)
trap 'rm -r "$directory"' EXIT

train() { # NAME COMMAND...
    local name=$1
    shift
    "$@" train configs/tiny.toml --resume --set run.threads=1 --set "run.directory=$directory/$name" \
        --set "data.cache=$directory/data" --set data.tokenizer_vocab_size=300 --set model.hidden_size=32 \
        --set model.num_hidden_layers=2 --set batch.sequence_length=32 --set batch.sequences=8 \
        --set batch.micro_batch=2 --set run.steps=24 --set evaluation.every=6 --set checkpoint.every=8
}
together() { mpirun --allow-run-as-root --oversubscribe -np 2 "$program" "$@"; }
curve() { python3 -c '
import json, sys
for line in open(sys.argv[1]):
    record = json.loads(line)
    print([record.get(key) for key in ("step", "loss", "validation_loss", "gradient_norm")])' "$1/log.jsonl"; }
same() {
    diff <(curve "$directory/$1") <(curve "$directory/one")
    cmp "$directory/$1/model/model.safetensors" "$directory/one/model/model.safetensors"
}

train one "$program"
train two together
same two
# One process goes on from step 16 of two, and two from step 16 of one.
cp -r "$directory/one" "$directory/three"
rm -r "$directory"/{two,three}/checkpoints/step-00000024
train two "$program"
same two
train three together
same three
echo "test result: ok. 3 passed: one and two MPI processes have the same bits"
