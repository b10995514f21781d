"""lm-evaluation-harness over this project: data sets from published files, and a model that the program scores.

    python3 tests/python/lm_eval_mmfree.py compare --program target/release/mmfree --data DIR --tasks arc-easy,piqa \\
        [--model MODEL --tokenizer TOKENIZER.json] [--hf-llama] [--limit N] [--shots N]

runs the harness on the published files below DIR and `mmfree eval` on the same files, and compares accuracies and
log-likelihoods item by item. Exit code 1 if an accuracy differs. The harness makes prompts, examples, tokens (with the
`tokenizers` package) and metrics by itself; only log-likelihoods of token ids come from the program (`mmfree eval
--requests`), with --server URL from a running `mmfree serve` through the harness' own `local-completions` model (wants
transformers), or with --hf-llama from transformers and PyTorch.

    python3 tests/python/lm_eval_mmfree.py fixture --data tests/fixtures/eval/data -o tests/fixtures/eval/expected.json

writes the harness' requests, and the scores of a made-up model (see `made_up`), for the small files there.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DISABLE_MULTIPROC", "1")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.model import LM, TemplateLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

HARNESS_NAMES = {
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "hellaswag": "hellaswag",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "lambada": "lambada_openai",
}


# ---- published files in the layout of the hub ----


def rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def labelled(choices):
    return {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}


def arc(path):
    return [
        {"id": r["id"], "question": r["question"]["stem"], "choices": labelled(r["question"]["choices"]), "answerKey": r["answerKey"]}
        for r in rows(path)
    ]


def openbookqa(path):
    return [
        {"id": r["id"], "question_stem": r["question"]["stem"], "choices": labelled(r["question"]["choices"]), "answerKey": r["answerKey"]}
        for r in rows(path)
    ]


def hellaswag(path):
    names = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label")
    return [{name: str(r[name]) if name == "label" else r.get(name) for name in names} for r in rows(path)]


def piqa(path):
    labels = path.with_name(path.stem + "-labels.lst").read_text().split()
    return [
        {"goal": r["goal"], "sol1": r["sol1"], "sol2": r["sol2"], "label": int(label)}
        for r, label in zip(rows(path), labels, strict=True)
    ]


def winogrande(path):
    return [{name: r[name] for name in ("sentence", "option1", "option2", "answer")} for r in rows(path)]


def lambada(path):
    return [{"text": r["text"]} for r in rows(path)]


# Task: reader, and the file of each split.
FILES = {
    "arc-easy": (arc, {"train": "ARC-Easy-Train.jsonl", "validation": "ARC-Easy-Dev.jsonl", "test": "ARC-Easy-Test.jsonl"}),
    "arc-challenge": (
        arc,
        {"train": "ARC-Challenge-Train.jsonl", "validation": "ARC-Challenge-Dev.jsonl", "test": "ARC-Challenge-Test.jsonl"},
    ),
    "hellaswag": (hellaswag, {"train": "hellaswag_train.jsonl", "validation": "hellaswag_val.jsonl"}),
    "openbookqa": (openbookqa, {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}),
    "piqa": (piqa, {"train": "train.jsonl", "validation": "valid.jsonl"}),
    "winogrande": (winogrande, {"train": "train_xl.jsonl", "validation": "dev.jsonl"}),
    "lambada": (lambada, {"test": "lambada_test.jsonl"}),
}
DATASETS = {
    ("allenai/ai2_arc", "ARC-Easy"): "arc-easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc-challenge",
    ("Rowan/hellaswag", None): "hellaswag",
    ("allenai/openbookqa", "main"): "openbookqa",
    ("baber/piqa", None): "piqa",
    ("allenai/winogrande", "winogrande_xl"): "winogrande",
    ("EleutherAI/lambada_openai", "default"): "lambada",
}


def serve_datasets(data):
    """Lets the harness find its data sets in `data`, with no network. A split that is not there is empty, or the
    validation split where a task wants one to begin with."""

    def load_dataset(path, name=None, **_):
        task = DATASETS[(path, name)]
        read, files = FILES[task]
        directories = [data / task, data / HARNESS_NAMES[task], data]
        splits = {}
        for split, file in files.items():
            found = [d / file for d in directories if (d / file).is_file()]
            if found:
                splits[split] = datasets.Dataset.from_list(read(found[0]))
        if not splits:
            raise FileNotFoundError(f"no file of {task} in {data}")
        for split in files:
            splits.setdefault(split, next(iter(splits.values())))
        return datasets.DatasetDict(splits)

    datasets.load_dataset = load_dataset


# ---- models ----


class Mmfree(TemplateLM):
    """Tokens by the `tokenizers` package, log-likelihoods of ids by `mmfree eval --requests`."""

    def __init__(self, command, tokenizer, bos, eos):
        super().__init__()
        from tokenizers import Tokenizer

        self.command, self.bos, self.eos = command, bos, eos
        self.encoder = Tokenizer.from_file(str(tokenizer))

    @property
    def eot_token_id(self):
        return self.encoder.token_to_id(self.eos)

    @property
    def prefix_token_id(self):
        return self.encoder.token_to_id(self.bos)

    def tok_encode(self, string, add_special_tokens=None, **_):
        special = add_special_tokens if add_special_tokens is not None else not string.startswith(self.bos)
        return self.encoder.encode(string, add_special_tokens=special).ids

    def _loglikelihood_tokens(self, requests, **_):
        lines = [json.dumps({"context_ids": context, "continuation_ids": continuation}) for _, context, continuation in requests]
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            output = subprocess.run([*self.command, "--requests", file.name], check=True, stdout=subprocess.PIPE).stdout
        scores = [json.loads(line) for line in output.splitlines()]
        assert len(scores) == len(requests)
        return [(score["log_likelihood"], score["is_greedy"]) for score in scores]

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


def local_completions(url, name, tokenizer, bos, eos):
    """The harness' own client of a server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import PreTrainedTokenizerFast

    directory = tempfile.mkdtemp()
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), bos_token=bos, eos_token=eos).save_pretrained(directory)
    return LocalCompletionsAPI(
        model=name,
        base_url=f"{url}/v1/completions",
        tokenizer=directory,
        add_bos_token=True,
        num_concurrent=8,
    )


def made_up(context, continuation):
    """Log-likelihood and greediness that depend on every byte of the two texts and on nothing else."""
    hashed = zlib.crc32(context.encode() + b"\0" + continuation.encode())
    return -(hashed % 9973) / 100, hashed % 3 == 0


class MadeUp(LM):
    """Remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def loglikelihood(self, requests, **_):
        self.asked.extend(request.args for request in requests)
        return [made_up(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


def evaluate(model, tasks, data, shots, limit):
    serve_datasets(data)
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[HARNESS_NAMES[task] for task in tasks],
        num_fewshot=shots,
        limit=limit,
        log_samples=True,
        bootstrap_iters=1000,
        task_manager=TaskManager(),
    )


# ---- commands ----


def compare(args):
    model = [args.model] if args.model else []
    base = [args.program, "eval", *model, "--backend", args.backend]
    tasks = args.tasks.split(",")
    if args.hf_llama:
        from lm_eval.models.huggingface import HFLM

        judged = HFLM(pretrained=args.model, device="cpu", dtype="float32", batch_size=16)
    elif args.server:
        judged = local_completions(args.server, args.server_model, args.tokenizer, args.bos, args.eos)
    else:
        judged = Mmfree(base, args.tokenizer, args.bos, args.eos)
    theirs = evaluate(judged, tasks, args.data, args.shots, args.limit)
    command = [*base, "--tasks", args.tasks, "--data", str(args.data), "--shots", str(args.shots), "--json"]
    if args.limit:
        command += ["--limit", str(args.limit)]
    ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    failed = False
    print("| task | items | metric | harness | mmfree | other answers | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for result in ours["tasks"]:
        name = result["harness_name"]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(result["items"]), (len(samples), len(result["items"]))
        largest, others = 0.0, 0
        for sample, item in zip(samples, result["items"]):
            lls = [float(response[0]) for response in sample["filtered_resps"]] if len(item["log_likelihoods"]) > 1 else [
                float(sample["filtered_resps"][0][0])
            ]
            largest = max([largest] + [abs(a - b) for a, b in zip(lls, item["log_likelihoods"], strict=True)])
            if len(lls) > 1:
                others += max(range(len(lls)), key=lls.__getitem__) != item["predicted"]
        for metric in result["metrics"]:
            expected = theirs["results"][name].get(f"{metric['name']},none")
            if expected is None:
                continue
            stderr = theirs["results"][name][f"{metric['name']}_stderr,none"]
            is_accuracy = metric["name"].startswith("acc")
            equal = abs(expected - metric["value"]) < (1e-12 if is_accuracy else 0.01 * expected)
            if is_accuracy:
                equal = equal and abs(stderr - metric["stderr"]) < 1e-12
            failed |= not equal
            print(
                f"| {name} | {len(samples)} | {metric['name']} | {expected:.6f} ± {stderr:.6f} |"
                f" {metric['value']:.6f} ± {metric['stderr']:.6f} | {others} | {largest:.2e} |{'' if equal else ' DIFFERS'}"
            )
    sys.exit(1 if failed else 0)


def fixture(args):
    expected = []
    for shots in (0, 2):
        for task in args.tasks.split(","):
            model = MadeUp()
            found = evaluate(model, [task], args.data, shots, None)
            results = found["results"][HARNESS_NAMES[task]]
            metrics = {
                name.split(",")[0]: value
                for name, value in results.items()
                if isinstance(value, float) and "perplexity_stderr" not in name
            }
            expected.append({"task": task, "shots": shots, "requests": model.asked, "metrics": metrics})
            assert all(math.isfinite(value) for value in metrics.values())
    text = json.dumps({"lm_eval": lm_eval.__version__, "tasks": expected}, indent=1, ensure_ascii=False)
    pathlib.Path(args.output).write_text(text + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("compare")
    command.set_defaults(run=compare)
    command.add_argument("--program", default="target/release/mmfree")
    command.add_argument("--model")
    command.add_argument("--tokenizer")
    command.add_argument("--bos", default="<s>")
    command.add_argument("--eos", default="</s>")
    command.add_argument("--hf-llama", action="store_true")
    command.add_argument("--server", metavar="URL")
    command.add_argument("--server-model", metavar="NAME", default="mmfree-builtin")
    command.add_argument("--backend", default="cpu")
    command.add_argument("--limit", type=int)
    command.add_argument("--shots", type=int, default=0)
    command.add_argument("--tasks", required=True)
    command.add_argument("--data", type=pathlib.Path, required=True)
    command = commands.add_parser("fixture")
    command.set_defaults(run=fixture)
    command.add_argument("--tasks", default=",".join(HARNESS_NAMES))
    command.add_argument("--data", type=pathlib.Path, required=True)
    command.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
