#!/usr/bin/env python3
"""Compare mmfree with other ternary CPU engines, side by side on one machine.

The peers are llama.cpp (formats TQ2_0 and TQ1_0) and ik_llama.cpp (IQ2_BN and
IQ2_BN_R4). Neither runs MatMul-free models, so they get Llama-shaped models with
random ternary weights and the same hidden size, layers, FFN size and vocabulary,
hence the same number of ternary weights a token. Their speed depends on shapes and
formats, not on the values.

One command does everything:

    python3 peers.py --work DIR --mmfree target/release/mmfree

1. pip downloads the peers' sources, which are vendored in the Python source packages
   `llama-cpp-python` and `ik-llama-cpp-python`; their `llama-bench` and
   `llama-quantize` are built for this machine's processor;
2. one f16 model a size is written with the `gguf` package, quantised with each peer's
   own tool, and deleted;
3. the engines run in turn, one process at a time, `--rounds` times. Each round starts
   with another engine, so that a slow phase of the machine does not always hit the
   same one;
4. tables go to `peers.md` and every sample to `peers.json`, in the work folder or
   where `--out` says.

What the work folder already has is used again. Without `--mmfree` the peers run alone.

Measured are prefill of 512 tokens at once (logits of the last one only) and decode of
64 tokens one by one from an empty context, in tokens a second: the median of a process's
repetitions, then the median of the rounds. Ratios are taken within a round, where the
engines met the machine in the same state. On Linux the script also measures how much
processor time others used meanwhile: engines whose threads wait for each other lose far
more than their share to a busy neighbour, so such a run is repeated, and marked if it
stays disturbed.

The peers are set up to be fast: their output matrix is ternary as well (by default it
takes 6.6 bits a weight, and a token streams more bytes; a tenth slower), and ik_llama.cpp
keeps keys and values in 8 bits (prefill a few percent faster). `--peer-defaults` leaves
both at the projects' own choice.

Needed: Python 3.9 or later with pip, numpy and gguf; cmake, ninja or make, a C++17
compiler (clang before gcc; CC and CXX override the choice). The work folder grows to
3 GB, and by 3 GB more while the 1.3B model is made. Building takes 10 to 20 minutes
on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


class Failure(Exception):
    """Something the user can act on: reported as one message, without a traceback."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model's shape. The sizes have the names that `mmfree bench --size` takes."""

    hidden: int
    layers: int
    ffn: int
    heads: int = 16
    vocab: int = 32000


SIZES = {
    "370m": Size(hidden=1024, layers=24, ffn=2816),
    "1.3b": Size(hidden=2048, layers=24, ffn=5632),
}


@dataclass(frozen=True)
class Project:
    """A peer's source code and how to configure it."""

    package: str
    version: str
    vendored_at: str
    cmake_options: tuple[str, ...]


PROJECTS = {
    "llama.cpp": Project(
        package="llama-cpp-python",
        version="0.3.36",
        vendored_at="vendor/llama.cpp",
        cmake_options=(
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_EXAMPLES=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            "-DLLAMA_BUILD_APP=OFF",
            "-DLLAMA_USE_PREBUILT_UI=OFF",
            "-DLLAMA_OPENSSL=OFF",
        ),
    ),
    "ik_llama.cpp": Project(
        package="ik-llama-cpp-python",
        version="0.1.5",
        vendored_at="vendor/ik_llama.cpp",
        cmake_options=(
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            # Leaves out attention kernels for 4-bit key-value caches, unused here.
            "-DGGML_IQK_FA_ALL_QUANTS=OFF",
        ),
    ),
}


@dataclass(frozen=True)
class Peer:
    """A project running one ternary format."""

    project: str
    format: str
    bench_options: tuple[str, ...] = ()


PEERS = {
    "iq2_bn_r4": Peer("ik_llama.cpp", "IQ2_BN_R4", ("-ctk", "q8_0", "-ctv", "q8_0")),
    "iq2_bn": Peer("ik_llama.cpp", "IQ2_BN", ("-ctk", "q8_0", "-ctv", "q8_0")),
    "tq2_0": Peer("llama.cpp", "TQ2_0"),
    "tq1_0": Peer("llama.cpp", "TQ1_0"),
}

ENGINES = ("mmfree", *PEERS)


# ---------------------------------------------------------------------------------------
# Getting and building the peers
# ---------------------------------------------------------------------------------------


def run_logged(command: list[str], log: Path, doing: str) -> None:
    """Run a build step, its output going to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        code = subprocess.call(command, stdout=out, stderr=subprocess.STDOUT)
    if code != 0:
        lines = log.read_text(errors="replace").splitlines()
        raise Failure(
            f"{doing} failed (exit status {code}). The command was\n  {shlex.join(command)}\n"
            f"The log {log} ends with\n  " + "\n  ".join(lines[-15:])
        )


def find_compilers() -> tuple[str, str]:
    """The C and C++ compilers: CC and CXX, else the newest clang, else the system's."""
    if os.environ.get("CC") and os.environ.get("CXX"):
        return os.environ["CC"], os.environ["CXX"]
    for suffix in [f"-{n}" for n in range(25, 14, -1)] + [""]:
        if shutil.which("clang" + suffix) and shutil.which("clang++" + suffix):
            return "clang" + suffix, "clang++" + suffix
    if shutil.which("gcc") and shutil.which("g++"):
        return "gcc", "g++"
    raise Failure("no C++ compiler found: install clang or gcc, or set CC and CXX")


def fetch_source(project: Project, work: Path) -> Path:
    """Download and unpack a project's source package; returns the vendored folder."""
    unpacked = work / "source" / f"{project.package}-{project.version}"
    if not unpacked.is_dir():
        downloads = work / "download"
        downloads.mkdir(parents=True, exist_ok=True)
        say(f"downloading {project.package} {project.version}")
        run_logged(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", project.package,
             "--dest", str(downloads), f"{project.package}=={project.version}"],
            work / "log" / f"download-{project.package}.log",
            f"downloading {project.package}",
        )
        stem = project.package.replace("-", "_") + "-" + project.version
        archives = sorted(downloads.glob(f"{stem}*.tar.gz"))
        if not archives:
            raise Failure(f"pip left no {stem}.tar.gz in {downloads}")
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as scratch:
            with tarfile.open(archives[0]) as archive:
                if hasattr(tarfile, "data_filter"):
                    archive.extractall(scratch, filter="data")
                else:
                    archive.extractall(scratch)
            (folder,) = Path(scratch).iterdir()
            folder.rename(unpacked)
    source = unpacked / project.vendored_at
    if not (source / "CMakeLists.txt").is_file():
        raise Failure(f"{unpacked} has no {project.vendored_at}/CMakeLists.txt")
    return source


def mend_source(source: Path) -> None:
    """Two repairs that ik_llama.cpp needs; neither touches code that computes."""
    # The source package misses this script, which fills in the version strings.
    template = source / "common" / "build-info.cpp.in"
    script = source / "common" / "cmake" / "build-info-gen-cpp.cmake"
    if template.is_file() and "build-info-gen-cpp" in (source / "common" / "CMakeLists.txt").read_text():
        if not script.is_file():
            script.parent.mkdir(exist_ok=True)
            script.write_text(
                "set(BUILD_NUMBER 0)\n"
                'set(BUILD_COMMIT "unknown")\n'
                'set(BUILD_COMPILER "${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION}")\n'
                'set(BUILD_TARGET "unknown")\n'
                'configure_file("${CMAKE_CURRENT_SOURCE_DIR}/common/build-info.cpp.in"\n'
                '               "${CMAKE_CURRENT_SOURCE_DIR}/common/build-info.cpp")\n'
            )
    # The tokenizer's tables: clang takes minutes to optimise their initialisers.
    tables = source / "src" / "unicode-data.cpp"
    pragma = "#pragma clang optimize off\n"
    if tables.is_file():
        text = tables.read_text()
        if not text.startswith(pragma):
            tables.write_text(pragma + text)


def source_commit(project: Project, source: Path) -> str | None:
    """The commit a source package was made from, where it says so."""
    head = source.parents[1] / ".git" / "modules" / project.vendored_at / "HEAD"
    text = head.read_text().strip() if head.is_file() else ""
    return text if re.fullmatch(r"[0-9a-f]{40}", text) else None


def build_project(name: str, work: Path, jobs: int, skip: bool) -> dict:
    """Build llama-bench and llama-quantize; returns what was built and where."""
    project = PROJECTS[name]
    folder = work / "build" / name
    binaries = {tool: folder / "bin" / tool for tool in ("llama-bench", "llama-quantize")}
    record = folder / "built.json"
    if skip:
        missing = [str(path) for path in [*binaries.values(), record] if not path.is_file()]
        if missing:
            raise Failure("--skip-build was given, but these are missing: " + ", ".join(missing))
        return json.loads(record.read_text()) | binaries

    if not shutil.which("cmake"):
        raise Failure("cmake not found: install it, for example with `pip install cmake ninja`")
    cc, cxx = find_compilers()
    compiler = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    configuration = {
        "package": project.package,
        "version": project.version,
        "compiler": compiler,
        "cmake_options": [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_C_COMPILER={cc}",
            f"-DCMAKE_CXX_COMPILER={cxx}",
            "-DBUILD_SHARED_LIBS=OFF",
            "-DGGML_NATIVE=ON",
            *project.cmake_options,
        ],
    }
    if record.is_file() and all(path.is_file() for path in binaries.values()):
        known = json.loads(record.read_text())
        if all(known.get(key) == value for key, value in configuration.items()):
            return known | binaries
    record.unlink(missing_ok=True)

    source = fetch_source(project, work)
    mend_source(source)
    say(f"building {name} with {compiler}")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if folder.exists() and not (folder / "CMakeCache.txt").is_file():
        shutil.rmtree(folder)
    run_logged(
        ["cmake", "-S", str(source), "-B", str(folder), *generator, *configuration["cmake_options"]],
        work / "log" / f"configure-{name}.log",
        f"configuring {name}",
    )
    run_logged(
        ["cmake", "--build", str(folder), "--target", *binaries, "-j", str(jobs)],
        work / "log" / f"build-{name}.log",
        f"building {name}",
    )
    built = configuration | {"commit": source_commit(project, source)}
    record.write_text(json.dumps(built, indent=2) + "\n")
    return built | binaries


# ---------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------


def write_f16_model(path: Path, size: Size) -> None:
    """Write a Llama-shaped GGUF file: ternary matrices, random embeddings."""
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise Failure(f"{error.name} is missing: pip install numpy gguf") from error

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.ffn)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.heads)
    writer.add_rope_dimension_count(size.hidden // size.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(size.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    # The smallest vocabulary that the peers load: control tokens, bytes, and fillers.
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    fillers = size.vocab - len(pieces)
    pieces += [f"token{i}" for i in range(fillers)]
    kinds += [gguf.TokenType.NORMAL] * fillers
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * size.vocab)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    rng = np.random.default_rng(20240604)
    scale = size.hidden**-0.5  # keeps the activations finite; it does not matter for speed
    levels = np.array([-scale, 0.0, scale], dtype=np.float16)

    def ternary(shape):
        return levels[rng.integers(0, 3, shape, dtype=np.uint8)]

    def normal(shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)

    def ones(shape):
        return np.ones(shape, dtype=np.float32)

    d, f, v = size.hidden, size.ffn, size.vocab
    tensors = [("token_embd.weight", (v, d), normal)]
    for layer in range(size.layers):
        tensors += [
            (f"blk.{layer}.attn_norm.weight", (d,), ones),
            (f"blk.{layer}.attn_q.weight", (d, d), ternary),
            (f"blk.{layer}.attn_k.weight", (d, d), ternary),
            (f"blk.{layer}.attn_v.weight", (d, d), ternary),
            (f"blk.{layer}.attn_output.weight", (d, d), ternary),
            (f"blk.{layer}.ffn_norm.weight", (d,), ones),
            (f"blk.{layer}.ffn_gate.weight", (f, d), ternary),
            (f"blk.{layer}.ffn_up.weight", (f, d), ternary),
            (f"blk.{layer}.ffn_down.weight", (d, f), ternary),
        ]
    tensors += [("output_norm.weight", (d,), ones), ("output.weight", (v, d), ternary)]

    for name, shape, make in tensors:
        dtype = np.dtype(np.float32 if make is ones else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, make in tensors:  # one at a time: the whole model need not fit in memory
        writer.write_tensor_data(make(shape))
    writer.close()


def make_models(size: str, peers: list[str], built: dict, work: Path, peer_defaults: bool) -> dict[str, Path]:
    """Quantise the models that are missing; returns the model file of each peer."""
    folder = work / "models"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "-default-head" if peer_defaults else ""
    models = {peer: folder / f"{size}-{peer}{suffix}.gguf" for peer in peers}
    missing = [peer for peer in peers if not models[peer].is_file()]
    if not missing:
        return models

    f16 = folder / f"{size}-f16.gguf"
    try:
        say(f"writing a random ternary {size} model")
        write_f16_model(f16, SIZES[size])
        for peer in missing:
            format = PEERS[peer].format
            say(f"quantising it to {format}")
            head = [] if peer_defaults else ["--output-tensor-type", format.lower()]
            partial = models[peer].with_suffix(".partial")
            partial.unlink(missing_ok=True)
            run_logged(
                [str(built[PEERS[peer].project]["llama-quantize"]), *head, str(f16), str(partial), format],
                work / "log" / f"quantise-{size}-{peer}.log",
                f"quantising {size} to {format}",
            )
            partial.rename(models[peer])
    finally:
        f16.unlink(missing_ok=True)
    return models


def read_tensor_bytes(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and stored bytes (padding to the alignment included) of a GGUF file's tensors.

    Sizes come from the offsets, so formats that the gguf package does not know are fine.
    """
    scalar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    with path.open("rb") as file:

        def take(layout: str):
            return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

        def text() -> str:
            return file.read(take("Q")[0]).decode("utf-8", "replace")

        def skip(kind: int) -> None:
            if kind == 8:
                text()
            elif kind == 9:
                inner, count = take("IQ")
                if inner in scalar:
                    file.seek(scalar[inner] * count, os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip(inner)
            else:
                file.seek(scalar[kind], os.SEEK_CUR)

        magic, version, tensor_count, key_count = take("4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise Failure(f"{path} is no GGUF file of version 3")
        alignment = 32
        for _ in range(key_count):
            key = text()
            (kind,) = take("I")
            if key == "general.alignment" and kind == 4:
                (alignment,) = take("I")
            else:
                skip(kind)
        found = []
        for _ in range(tensor_count):
            name = text()
            (dimensions,) = take("I")
            shape = take(f"{dimensions}Q")
            _, offset = take("IQ")
            found.append((offset, name, shape))
        data_start = -(-file.tell() // alignment) * alignment
    found.sort()
    ends = [offset for offset, _, _ in found[1:]] + [path.stat().st_size - data_start]
    return {name: (shape, end - offset) for (offset, name, shape), end in zip(found, ends)}


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding a token reads: all tensors, and one embedding row."""
    tensors = read_tensor_bytes(path)
    shape, embedding = tensors.pop("token_embd.weight")
    return sum(size for _, size in tensors.values()) + embedding // shape[-1]


# ---------------------------------------------------------------------------------------
# Running the engines
# ---------------------------------------------------------------------------------------


def machine_busy_seconds() -> float | None:
    """Processor time spent by everybody since boot, time taken by the host included."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Finished:
    """A process that ended well."""

    stdout: str
    peak_rss_bytes: int
    others_cores: float | None  # processors that others kept busy meanwhile


def run_measured(command: list[str], timeout: float) -> Finished:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        busy_before, start = machine_busy_seconds(), time.monotonic()
        try:
            process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise Failure(f"cannot start {command[0]}: {error.strerror}") from error
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        wall, busy_after = time.monotonic() - start, machine_busy_seconds()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if process.returncode != 0:
        reason = f"exit status {process.returncode}"
        if wall >= timeout:
            reason = f"stopped after {timeout:.0f} s"
        raise Failure(
            f"{shlex.join(command)}\nfailed ({reason}). It said\n  "
            + "\n  ".join((stderr or stdout).splitlines()[-15:])
        )
    others = None
    if busy_before is not None and busy_after is not None:
        own = usage.ru_utime + usage.ru_stime
        others = max(0.0, busy_after - busy_before - own) / wall
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(stdout, usage.ru_maxrss * unit, others)


def peer_options(peer: str, options) -> tuple[str, ...]:
    return () if options.peer_defaults else PEERS[peer].bench_options


def bench_peer(peer: str, model: Path, threads: int, options, built: dict) -> dict:
    command = [
        str(built[PEERS[peer].project]["llama-bench"]), "-m", str(model),
        "-p", str(PREFILL_TOKENS), "-n", str(DECODE_TOKENS), "-t", str(threads),
        "-r", str(options.repetitions), "-o", "json", *peer_options(peer, options),
    ]  # fmt: skip
    done = run_measured(command, options.timeout)
    try:
        results = json.loads(done.stdout)
        speeds = {}
        for result in results:
            tokens = result["n_prompt"] + result["n_gen"]
            measure = MEASURES[0] if result["n_prompt"] else MEASURES[1]
            speeds[measure] = [tokens * 1e9 / duration for duration in result["samples_ns"]]
        sample = {measure: statistics.median(speeds[measure]) for measure in MEASURES}
    except (ValueError, KeyError, TypeError, statistics.StatisticsError) as error:
        raise Failure(f"{shlex.join(command)}\nprinted no results: {error!r}\n{done.stdout[-500:]}") from error
    return sample | {
        "repetitions": speeds,
        "bytes_per_token": bytes_per_token(model),
        "peak_rss_bytes": done.peak_rss_bytes,
        "others_cores": done.others_cores,
    }


def bench_mmfree(size: str, threads: int, options) -> dict:
    command = [
        str(options.mmfree), "bench", "--size", size, "--threads", str(threads), "--json",
        *shlex.split(options.mmfree_args),
    ]  # fmt: skip
    done = run_measured(command, options.timeout)
    needed = (*MEASURES, "bytes_per_token")
    try:
        sample = json.loads(done.stdout)
        absent = [key for key in needed if not isinstance(sample.get(key), (int, float))]
    except (ValueError, AttributeError) as error:
        raise Failure(f"{shlex.join(command)}\nprinted no JSON object: {error}\n{done.stdout[-500:]}") from error
    if absent:
        raise Failure(f"{shlex.join(command)}\nprinted an object without the numbers {', '.join(absent)}")
    return {"peak_rss_bytes": done.peak_rss_bytes} | sample | {"others_cores": done.others_cores}


def wait_for_quiet(limit: float, longest: float) -> None:
    """Wait until others use less than `limit` processors, `longest` seconds at most."""
    end = time.monotonic() + longest
    while (before := machine_busy_seconds()) is not None:
        time.sleep(1)
        if machine_busy_seconds() - before <= limit or time.monotonic() >= end:
            return


def measure(engines: list[str], models: dict, built: dict, options, samples: list[dict]) -> None:
    """Run all rounds; appends to `samples`, so that the caller has them if a run fails."""
    total = options.rounds * len(options.sizes) * len(options.threads) * len(engines)
    for round in range(options.rounds):
        first = round % len(engines)
        order = engines[first:] + engines[:first]
        for size in options.sizes:
            for threads in options.threads:
                for engine in order:
                    for attempt in range(options.retries + 1):
                        wait_for_quiet(options.quiet, options.wait)
                        if engine == "mmfree":
                            sample = bench_mmfree(size, threads, options)
                        else:
                            sample = bench_peer(engine, models[size][engine], threads, options, built)
                        others = sample["others_cores"]
                        sample["disturbed"] = others is not None and others > options.quiet
                        if not sample["disturbed"]:
                            break
                    sample |= {"round": round + 1, "size": size, "threads": threads, "engine": engine}
                    samples.append(sample)
                    say(
                        f"[{len(samples)}/{total}] round {round + 1}, {size}, {threads} thread{'s' if threads > 1 else ''}, {engine}: "
                        f"prefill {sample[MEASURES[0]]:.1f}, decode {sample[MEASURES[1]]:.1f} tokens/s"
                        + (f" (disturbed: others used {others:.2f} processors)" if sample["disturbed"] else "")
                    )


# ---------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(samples: list[dict], engines: list[str], options) -> list[dict]:
    """One entry for each size, thread count and engine; ratios are to the reference."""
    reference = engines[0]
    summary = []
    for size in options.sizes:
        for threads in options.threads:
            cell = [s for s in samples if (s["size"], s["threads"]) == (size, threads)]
            by_round = {(s["engine"], s["round"]): s for s in cell}
            bandwidth = {
                s["round"]: s["read_bandwidth_bytes_per_s"] for s in cell if s.get("read_bandwidth_bytes_per_s")
            }
            for engine in engines:
                own = [s for s in cell if s["engine"] == engine]
                entry = {
                    "size": size,
                    "threads": threads,
                    "engine": engine,
                    "bytes_per_token": own[0]["bytes_per_token"],
                    "peak_rss_bytes": max(s["peak_rss_bytes"] for s in own),
                    "disturbed_rounds": sum(s["disturbed"] for s in own),
                    "weights_read_bytes_per_s": statistics.median(
                        s[MEASURES[1]] * s["bytes_per_token"] for s in own
                    ),
                }
                for name in MEASURES:
                    entry[name] = spread([s[name] for s in own])
                    entry[f"{reference}_over_this_{name.split('_')[0]}"] = spread(
                        [by_round[reference, s["round"]][name] / s[name] for s in own]
                    )
                shares = [
                    s[MEASURES[1]] * s["bytes_per_token"] / bandwidth[s["round"]]
                    for s in own
                    if s["round"] in bandwidth
                ]
                entry["share_of_read_bandwidth"] = statistics.median(shares) if shares else None
                summary.append(entry)
    return summary


def label(engine: str) -> str:
    return engine if engine == "mmfree" else f"{PEERS[engine].project} {PEERS[engine].format}"


def markdown(report: dict) -> str:
    machine, protocol = report["machine"], report["protocol"]
    reference = protocol["reference"]
    lines = [
        "# Decode and prefill beside other ternary engines",
        "",
        f"{machine['processor']}, {machine['logical_processors']} logical processors. "
        f"Rounds: {protocol['rounds']}, engines in turn; prefill of {protocol['prefill_tokens']} tokens, "
        f"decode of {protocol['decode_tokens']}, from an empty context. Tokens a second: median of the "
        f"rounds (lowest to highest). The ratio columns say how many times as fast {label(reference)} was "
        "in the same round. The peers run Llama-shaped models with as many ternary weights; their output "
        f"matrix is {protocol['peer_output_matrix']}. 'Read' is decode speed times the bytes of weights a "
        "token needs, 'of limit' its share of the bandwidth that mmfree measured.",
    ]
    for size in protocol["sizes"]:
        for threads in protocol["threads"]:
            lines += [
                "",
                f"## {size}, {threads} thread{'s' if threads > 1 else ''}",
                "",
                "| engine | decode | ratio | prefill | ratio | MB a token | read, GB/s | of limit | peak MiB |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for entry in report["summary"]:
                if (entry["size"], entry["threads"]) != (size, threads):
                    continue
                cells = [label(entry["engine"]) + (" \\*" if entry["disturbed_rounds"] else "")]
                for name in reversed(MEASURES):
                    speed = entry[name]
                    ratio = entry[f"{reference}_over_this_{name.split('_')[0]}"]
                    cells.append(f"**{speed['median']:.1f}** ({speed['min']:.1f} to {speed['max']:.1f})")
                    cells.append(
                        "1"
                        if entry["engine"] == reference
                        else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                    )
                share = entry["share_of_read_bandwidth"]
                cells += [
                    f"{entry['bytes_per_token'] / 1e6:.1f}",
                    f"{entry['weights_read_bytes_per_s'] / 1e9:.1f}",
                    "" if share is None else f"{share:.0%}",
                    f"{entry['peak_rss_bytes'] / 2**20:.0f}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    if any(entry["disturbed_rounds"] for entry in report["summary"]):
        lines += ["", "\\* In some rounds other processes were busy meanwhile: see the samples."]
    lines += ["", "## Versions", ""]
    for name, built in report["peers"].items():
        commit = f", commit {built['commit']}" if built.get("commit") else ""
        lines.append(
            f"- {name}: from {built['package']} {built['version']}{commit}, {built['compiler']}, "
            f"`{' '.join(built['cmake_options'])}`"
        )
    for peer, extra in protocol["peer_options"].items():
        if extra:
            lines.append(f"- {label(peer)} ran with `{' '.join(extra)}`")
    backends = sorted({str(s["backend"]) for s in report["samples"] if s.get("backend")})
    if backends:
        lines.append(f"- mmfree: backend {', '.join(backends)}")
    return "\n".join(lines) + "\n"


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------


def choices(known: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(word.strip().lower() for word in text.split(",") if word.strip()))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(known)}, separated by commas")
        return names

    return parse


def thread_counts(text: str) -> list[int]:
    try:
        counts = list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected thread counts such as 1,2")
    return counts


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare mmfree with other ternary CPU engines, side by side on one machine.",
        epilog="The head of this file says what is measured and how.",
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for sources, builds and models; used again if it exists")
    add("--mmfree", type=Path, help="the mmfree binary; without it the peers run alone")
    add("--mmfree-args", default="", metavar="ARGS", help="more arguments for `mmfree bench`, as one string")
    add("--rounds", type=positive, default=5, help="default 5")
    add("--repetitions", type=positive, default=3, help="of a peer within a round, in one process; default 3")
    add("--sizes", type=choices(tuple(SIZES)), default=list(SIZES), help="default " + ",".join(SIZES))
    add("--threads", type=thread_counts, default=[1, 2], help="default 1,2")
    add("--engines", type=choices(ENGINES), help="default all: " + ",".join(ENGINES))
    add("--peer-defaults", action="store_true", help="leave the peers' output matrix and cache as they come")
    add("--skip-build", action="store_true", help="use the peers already built in the work folder")
    add("--prepare-only", action="store_true", help="build and make the models, measure nothing")
    add("--jobs", type=positive, default=os.cpu_count() or 1, help="of the build; default: all processors")
    add("--out", type=Path, help="path of the results without extension; default WORK/peers")
    add("--quiet", type=float, default=0.1, metavar="CORES",
        help="a run is disturbed if others keep more processors busy; default 0.1 (Linux only)")  # fmt: skip
    add("--retries", type=int, default=2, help="of a disturbed run; default 2")
    add("--wait", type=float, default=30, metavar="SECONDS", help="for a quiet machine before each run; default 30")
    add("--timeout", type=float, default=900, metavar="SECONDS", help="for one process; default 900")
    options = parser.parse_args()
    if options.engines is None:
        options.engines = list(ENGINES) if options.mmfree else list(PEERS)
    if "mmfree" in options.engines and not options.mmfree:
        parser.error("the engine mmfree needs --mmfree PATH")
    if options.mmfree and "mmfree" not in options.engines:
        parser.error("--mmfree was given, but --engines leaves mmfree out")
    if options.mmfree and not options.prepare_only:
        if not options.mmfree.is_file() or not os.access(options.mmfree, os.X_OK):
            parser.error(f"--mmfree {options.mmfree}: no executable file")
        options.mmfree = options.mmfree.resolve()
    options.work = options.work.resolve()
    return options


def main() -> None:
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    engines = [engine for engine in ENGINES if engine in options.engines]  # mmfree first: the reference
    peers = [engine for engine in engines if engine in PEERS]
    projects = list(dict.fromkeys(PEERS[peer].project for peer in peers))

    built = {name: build_project(name, options.work, options.jobs, options.skip_build) for name in projects}
    models = {
        size: make_models(size, peers, built, options.work, options.peer_defaults) for size in options.sizes
    }
    if options.prepare_only:
        return

    out = (options.out or options.work / "peers").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    samples = []
    try:
        measure(engines, models, built, options, samples)
    except BaseException:
        if samples:
            rescued = out.with_name(out.name + "-partial.json")
            rescued.write_text(json.dumps(samples, indent=1) + "\n")
            say(f"stopped early; the samples so far are in {rescued}")
        raise
    report = {
        "machine": {"processor": processor_name(), "logical_processors": os.cpu_count()},
        "protocol": {
            "prefill_tokens": PREFILL_TOKENS,
            "decode_tokens": DECODE_TOKENS,
            "rounds": options.rounds,
            "repetitions": options.repetitions,
            "sizes": options.sizes,
            "threads": options.threads,
            "reference": engines[0],
            "peer_output_matrix": "in their default format" if options.peer_defaults else "ternary too",
            "peer_options": {peer: list(peer_options(peer, options)) for peer in peers},
            "disturbed_above_cores": options.quiet,
        },
        "peers": {
            name: {key: value for key, value in built[name].items() if not key.startswith("llama-")}
            for name in projects
        },
        "summary": summarise(samples, engines, options),
        "samples": samples,
    }
    text = markdown(report)
    out.with_name(out.name + ".md").write_text(text)
    out.with_name(out.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    print(text, end="")
    say(f"written: {out}.md, {out}.json")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"peers.py: {failure}")
    except KeyboardInterrupt:
        sys.exit("peers.py: interrupted")
