#!/usr/bin/env bash
# Two processes of `mmfree train` give the losses and weights of one, and go on what one process began.
# Arguments: the program, and how the processes are joined: `mpi` (mpirun, a program built with that feature), `cuda` (torchrun
# if it is there, two GPUs and NCCL) or `tcp` (the same on the CPU).
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1 joined=$2
directory=$(mktemp -d)
trap 'rm -r "$directory"' EXIT
backend=auto
[ "$joined" != cuda ] || backend=cuda

train() { # NAME COMMAND...
    local name=$1
    shift
    "$@" train configs/tiny.toml --resume --backend "$backend" --set run.threads=1 \
        --set "run.directory=$directory/$name" --set "data.cache=$directory/data" \
        --set data.tokenizer_vocab_size=300 --set model.hidden_size=32 --set model.num_hidden_layers=2 \
        --set batch.sequence_length=32 --set batch.sequences=8 --set batch.micro_batch=2 --set run.steps=24 \
        --set evaluation.every=6 --set checkpoint.every=8
}
together() {
    if [ "$joined" = mpi ]; then
        mpirun --allow-run-as-root --oversubscribe -np 2 "$program" "$@"
    elif command -v torchrun >/dev/null; then
        torchrun --no-python --nproc-per-node 2 "$program" "$@"
    else
        local rank pids=() failed=0
        for rank in 0 1; do
            RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 \
                MASTER_PORT=29471 "$program" "$@" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
        return "$failed"
    fi
}
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
echo "test result: ok. 3 passed: one and two processes have the same bits ($joined)"
