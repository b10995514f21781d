#!/usr/bin/env python3
"""Training speed on the CPU beside PyTorch: whole steps (gradients, clipping, AdamW) of one model, in f32, each
program in turn in one run.

PyTorch runs tests/python/reference_model.py, a plain module of the same equations, eager. Wants torch, and

    cargo build --release -p mmfree-train --example training-speed
    python3 benchmarks/training.py --output benchmarks/results/DATE-training.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# In place of this folder, whose tokenize.py would hide that of the standard library.
sys.path[0] = str(ROOT / "tests/python")
import torch  # noqa: E402
from reference_model import MatMulFree  # noqa: E402

CONFIG = dict(
    model_type="hgrn_bit", vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
    rms_norm_eps=1e-6, use_lower_bound=True,
)


class PyTorch:
    """Steps of the plain module, optimiser state kept from round to round."""

    def __init__(self, batch, length):
        torch.manual_seed(0)
        self.model = MatMulFree(CONFIG)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-3, (0.9, 0.95), 1e-8, weight_decay=0.01, fused=True)
        self.shape = (batch, length)

    def steps(self, count):
        seconds = []
        for _ in range(count):
            ids, targets = torch.randint(CONFIG["vocab_size"], (2, *self.shape))
            start = time.perf_counter()
            self.optimizer.zero_grad()
            logits = self.model(ids)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            loss.item()
            seconds.append(time.perf_counter() - start)
        return seconds


def mmfree_steps(program, config, batch, length, steps, threads):
    command = [program, config, batch, length, steps, threads]
    run = subprocess.run(list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL)
    return [float(line) for line in run.stdout.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each program in a round; one more warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--program", default=ROOT / "target/release/examples/training-speed")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = arguments.batch * arguments.length
    peer = PyTorch(arguments.batch, arguments.length)
    rounds = []
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "config.json"
        config.write_text(json.dumps(CONFIG))
        for number in range(arguments.rounds):
            pytorch = peer.steps(arguments.steps + (number == 0))[-arguments.steps:]
            ours = mmfree_steps(arguments.program, config, arguments.batch, arguments.length,
                                arguments.steps + 1, arguments.threads)[1:]
            rounds.append({"pytorch": pytorch, "mmfree": ours})
            ratio = statistics.median(pytorch) / statistics.median(ours)
            print(f"round {number + 1}: PyTorch {tokens / statistics.median(pytorch):.0f} tokens/s, mmfree "
                  f"{tokens / statistics.median(ours):.0f} tokens/s, ratio {ratio:.2f}", flush=True)
    ratios = [statistics.median(r["pytorch"]) / statistics.median(r["mmfree"]) for r in rounds]
    record = {
        "config": CONFIG, "batch": arguments.batch, "length": arguments.length, "threads": arguments.threads,
        "torch": torch.__version__, "processor": platform.processor() or platform.machine(),
        "seconds_a_step": rounds, "ratios": ratios,
        "tokens_a_second": {
            name: tokens / statistics.median([s for r in rounds for s in r[name]]) for name in ("pytorch", "mmfree")},
    }
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
