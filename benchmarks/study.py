#!/usr/bin/env python3
"""The study of docs/study.md: MatMul-free models beside Transformer++ of the same size and tokens, on GPUs.

Makes a tokenizer and token shards of a corpus (DIR/train and DIR/validation), looks for the learning rate of
each architecture with the smallest size, trains every size of both with that rate over its width (relative to the
smallest), judges each model (perplexity of the held-out text and zero-shot tasks), and fits the scaling laws. What is
there already is not done again.

    cargo build --release
    python3 benchmarks/study.py --corpus CORPUS --benchmarks TASKS --devices 0,1,2,3
"""

import argparse
import json
import os
import queue
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TASKS = "arc-easy,arc-challenge,hellaswag,openbookqa,piqa,winogrande,lambada"
# Hidden size and layers; a head of the Transformer++ has 64 channels. The smallest comes first.
SIZES = {"4m": (128, 6), "11m": (256, 8), "20m": (384, 8), "49m": (512, 12), "97m": (768, 12)}
RATES = {"matmul-free": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), "transformer++": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)}
SHORT = {"matmul-free": "mmf", "transformer++": "transformer"}
TOKENS_PER_STEP = 96 * 512


class Study:
    """Commands with their outputs in one directory."""

    def __init__(self, args):
        self.args = args
        self.out = args.out.resolve()
        self.runs = self.out / "runs"
        self.started = time.time()

    def say(self, text):
        print(f"[{time.time() - self.started:6.0f} s] {text}", flush=True)

    def mmfree(self, *command, log):
        """Runs the program; what it prints goes to a file of the logs."""
        path = self.out / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            subprocess.run([self.args.mmfree, *map(str, command)], stdout=file, stderr=file, check=True)

    def prepare(self):
        train, validation = (self.args.corpus / part for part in ("train", "validation"))
        tokenizer = self.out / "tokenizer"
        if not tokenizer.exists():
            self.mmfree("tokenizer", "train", train, "-o", tokenizer, "--vocab-size", 8192, log="tokenizer")
            self.say("trained the tokenizer")
        for part, texts in (("train", train), ("validation", validation)):
            self.mmfree("tokenize", texts, "-o", self.out / "shards" / part, "--tokenizer", tokenizer,
                        log=f"tokenize-{part}")
        self.say("tokenised the corpus")

    def train(self, name, architecture, size, rate, device):
        hidden, layers = SIZES[size]
        if (self.runs / name / "model").exists():
            return
        started = time.time()
        steps = round(self.args.tokens / TOKENS_PER_STEP)
        settings = {
            "run.directory": self.runs / name,
            "run.steps": steps,
            "data.train": self.out / "shards/train",
            "data.validation": self.out / "shards/validation",
            "model.architecture": architecture,
            "model.use_lower_bound": str(architecture == "matmul-free").lower(),
            "model.hidden_size": hidden,
            "model.num_hidden_layers": layers,
            "model.num_attention_heads": hidden // 64 if architecture == "transformer++" else 0,
            "optimizer.learning_rate": rate,
        }
        settings = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        self.mmfree("train", ROOT / "configs/study.toml", "--device", device, "--resume", *settings, log=name)
        self.say(f"{name}: validation loss {self.loss(name):.4f}, {time.time() - started:.0f} s")

    def loss(self, name):
        records = map(json.loads, (self.runs / name / "log.jsonl").read_text().splitlines())
        return [record["validation_loss"] for record in records if record.get("validation_loss")][-1]

    def judge(self, name):
        """Perplexity and tasks on the CPU, whose sums are f32 for both architectures."""
        model, threads = self.runs / name / "model", self.args.threads
        for what, options in (
            ("perplexity", ("--perplexity", self.args.corpus / "validation")),
            ("tasks", ("--tasks", TASKS, "--data", self.args.benchmarks, "--limit", self.args.limit)),
        ):
            output = self.out / "results" / f"{name}-{what}.json"
            output.parent.mkdir(parents=True, exist_ok=True)
            if not output.exists():
                self.mmfree("eval", model, *options, "--backend", "cpu", "--threads", threads, "-o", output,
                            log=f"{name}-{what}")
        self.say(f"judged {name}")

    def on_devices(self, jobs):
        """Runs functions of a device, as many at once as there are devices, in their order."""
        waiting = queue.Queue()
        for job in jobs:
            waiting.put(job)
        failures = []

        def work(device):
            while not failures:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    job(device)
                except BaseException as error:  # noqa: BLE001, raised below
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(device,)) for device in self.args.devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def search(self, size):
        """The learning rate of each architecture that ends at the lowest validation loss."""
        candidates = [(f"rate-{SHORT[a]}-{rate:g}", a, rate) for a, rates in RATES.items() for rate in rates]
        self.on_devices([
            lambda device, name=name, a=a, rate=rate: self.train(name, a, size, rate, device)
            for name, a, rate in candidates
        ])
        return {
            architecture: min((self.loss(name), rate) for name, a, rate in candidates if a == architecture)[1]
            for architecture in RATES
        }

    def run(self):
        self.prepare()
        sizes = self.args.sizes
        smallest = sizes[0]
        rates = self.args.rates or self.search(smallest)
        self.say(f"learning rates: {rates}")
        with ThreadPoolExecutor(self.args.judges) as judges:
            judged = []

            def job(device, architecture, size):
                name = f"{SHORT[architecture]}-{size}"
                searched = self.runs / f"rate-{SHORT[architecture]}-{rates[architecture]:g}"
                if size == smallest and searched.exists() and not (self.runs / name).exists():
                    os.symlink(searched, self.runs / name)
                # Wider layers take smaller steps, as 1 / width (Yang et al. 2022, "Tensor Programs V", for Adam).
                rate = rates[architecture] * SIZES[smallest][0] / SIZES[size][0]
                self.train(name, architecture, size, rate, device)
                judged.append(judges.submit(self.judge, name))

            # The longest first, so that no device waits long at the end.
            self.on_devices([
                lambda device, a=a, size=size: job(device, a, size) for size in reversed(sizes) for a in RATES
            ])
            names = [self.runs / f"{SHORT[a]}-{size}" for a in RATES for size in sizes]
            if not (self.out / "scaling").exists():
                self.mmfree("scaling", *names, "-o", self.out / "scaling", log="scaling")
            self.say("fitted the scaling laws")
            for done in judged:
                done.result()


def parse_rates(text):
    """Rates by architecture, as --rates has them."""
    found = {name: float(rate) for name, rate in (part.split("=") for part in text.split(","))}
    if set(found) != set(RATES):
        raise argparse.ArgumentTypeError(f"expected a rate for each of {', '.join(RATES)}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmfree", default=ROOT / "target/release/mmfree", type=Path, help="program")
    parser.add_argument("--corpus", required=True, type=Path, help="directory with train/ and validation/")
    parser.add_argument("--benchmarks", required=True, type=Path, help="directory of the tasks' files")
    parser.add_argument("--out", default=Path("study"), type=Path)
    parser.add_argument("--devices", default="0", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--sizes", default=list(SIZES), type=lambda text: text.split(","), help="the smallest first")
    parser.add_argument("--rates", type=parse_rates, help="matmul-free=X,transformer++=Y: of the smallest size, not searched")
    parser.add_argument("--tokens", default=150e6, type=float, help="of each run")
    parser.add_argument("--limit", default=1000, type=int, help="items of each task")
    parser.add_argument("--threads", default=16, type=int, help="of one evaluation")
    parser.add_argument("--judges", default=3, type=int, help="evaluations at once")
    Study(parser.parse_args()).run()


if __name__ == "__main__":
    main()
