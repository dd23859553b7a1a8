"""Speed against the engines people use: opt-np bench cpu

First it measures the machine's limits; then each engine runs in a process of its own (thread pools disturb one another), on the same random weights.
Results are compared with each other before anything is timed. Rounds are interleaved, so that a slowdown of the machine affects all engines alike:
absolute times on a shared machine mean little, the ratios are the result. A lane is a column of the results: an engine and the dtype of its weights.
It prints a table, then one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from opt_fast import limits, peers
from opt_np.config import OPTConfig, parameter_shapes

SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "tiny")
ENGINES = tuple(peers.IMPORTS)
JOBS = ("attention", "decode", "prefill", "short", "batch", "prefix", "decode-16", "prefill-16", "short-16",
        "decode-int8", "prefill-int8", "short-int8", "batch-int8", "decode-int4", "prefill-int4", "short-int4", "batch-int4", "train",
        "memory")  # fmt: skip
# How the weights are stored: in float32, or in fewer bits, in the dtypes that each engine supports, beside a float32 reference for int8 and int4.
STORED: dict[str, dict[str, tuple[str, ...]]] = {
    "float32": dict.fromkeys(ENGINES, ("float32",)),
    "16 bits": {"opt_fast": ("float16", "bfloat16"), "openvino": ("bfloat16",), "hf": ("bfloat16",)},
    "int8": {"opt_fast": ("int8",), "openvino": ("int8",), "ctranslate2": ("int8",), "numpy": ("float32",)},
    "int4": {"opt_fast": ("int4",), "openvino": ("int4",), "numpy": ("float32",)},
}
SUFFIX = {"float32": "", "16 bits": "-16", "int8": "-int8", "int4": "-int4"}  # of a job
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "16 bits": 2.0, "int8": 1.0, "int4": 0.5}  # bytes per weight, not counting scales
TOLERANCE = {"float32": 1e-3, "16 bits": 3e-2, "int8": 5e-2, "int4": 0.5}  # of the largest value; random weights reach 0.02 in int8, 0.2 in int4
LOOSE = {"ctranslate2 int8": 0.5}  # reaches 0.11 to 0.32: it rounds activations to 8 bits, and on AVX2 without VNNI its sums of products saturate
BUDGET = 0.5  # seconds: a shorter call is repeated for this long, and the median counts
REST = 0.3  # seconds after which the previous engine's threads no longer spin, waiting for work
STEERING = ("OPENBLAS_", "MKL_", "OMP_", "GOMP_", "KMP_", "NUMBA_", "ONEDNN_", "MALLOC_", "GLIBC_")  # variables by which users steer the engines
PACKAGES = ("numpy", "numba", "torch", "transformers", "ctranslate2", "openvino", "openvino-genai", "nncf")
Seconds = dict[str, list[float]]  # of each lane ("hf bfloat16"), round by round


@dataclass(frozen=True)
class Job:
    name: str  # of the worker's function for it
    kind: str  # a key of peers.ENGINES
    stored: str  # a key of STORED
    title: str
    amount: float  # work of one call, the numerator of `unit`
    unit: str
    flops: float  # in one call
    read: float = 0.0  # bytes of weights, in one call

    @property
    def key(self) -> str:
        return self.name + SUFFIX[self.stored]

    @property
    def asked_as(self) -> str:
        """Its name in --jobs, which may stand for several."""
        return self.name.partition("-")[0] + SUFFIX[self.stored]

    def least(self, ceilings: dict[str, float]) -> float:
        """The least seconds that the machine's limits allow."""
        return max(self.flops / ceilings["matmul"], self.read / ceilings["bandwidth"])


class Disagreement(ValueError):
    """Raised if engines' results differ."""


def add_options(parser: Any) -> None:
    parser.add_argument("--size", choices=SIZES, default="125m", help="shape of the model; tiny is for trying this command")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="threads of each engine")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, metavar="JOB",
                        help=f"of {', '.join(JOBS)}; -16 stores weights in 16 bits, -int8 and -int4 as whole numbers")  # fmt: skip
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, metavar="ENGINE", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--plot", metavar="FILE", help="also draw the ratios, as a .png, .svg or .pdf")


def run(what: str, size: str, rounds: int, threads: int, jobs: Iterable[str], engines: Iterable[str], plot: str | None = None) -> None:
    """Raises ValueError for what cannot be measured, and where engines disagree."""
    for name, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    check_plot(plot)
    if not (engines := [name for name in ENGINES if name in engines and installed(name)]):
        raise ValueError("none of the engines is here; pip install 'opt-np[bench]' brings them")
    shape = peers.shape(size)
    wanted = choose(all_jobs(shape), jobs, engines)
    say("measuring what the machine can do")
    ceilings = limits.measure(threads)
    with tempfile.TemporaryDirectory() as folder, limits.thread_limit(threads):
        if "memory" in jobs or any(job.kind != "attention" for job in wanted):
            say("writing the weights")
            write_weights(shape.cfg, Path(folder))
        convert(folder, {lane for stored in stored_as(wanted, jobs) for lane in lanes("model", stored, engines)}, threads)
        seconds: dict[str, Seconds] = {}
        refused: list[str] = []
        for (kind, stored), group in groupby(wanted, lambda job: (job.kind, job.stored)):
            try:
                seconds |= measure(list(group), lanes(kind, stored, engines), peers.Setup(shape, folder, "float32", threads), rounds)
            except Disagreement as error:  # the other jobs' results, minutes of work, are not lost
                refused.append(str(error))
                say(refused[-1])
        memory = measure_memory(engines, peers.Setup(shape, folder, "float32", threads)) if "memory" in jobs else {}
    wanted = [job for job in wanted if job.key in seconds]
    result = {"size": size, "rounds": rounds, "machine": machine(threads), "limits": ceilings, "jobs": summary(wanted, seconds, ceilings)}
    result["memory"] = memory
    print("\n".join(table(result, wanted)))
    print(json.dumps(result), flush=True)
    if plot:
        draw(plot, result, wanted)
    if refused:
        raise ValueError("; ".join(refused))


def check_plot(file: str | None) -> None:
    if file and not (find_spec("matplotlib") and Path(file).parent.is_dir() and file.endswith((".png", ".svg", ".pdf"))):
        raise ValueError(f"--plot {file}: it needs matplotlib, a folder that exists, and a name that ends in .png, .svg or .pdf")


def say(words: str) -> None:
    print(f"bench: {words}", file=sys.stderr, flush=True)


def installed(engine: str) -> bool:
    """Whether an engine's packages are installed, and those that convert to its format; if not, prints that it is left out."""
    needs = [*peers.IMPORTS[engine], *peers.CONVERTERS_IMPORT.get(engine, ())]
    missing = [name for name in needs if not find_spec(name if name.startswith("opt_") else name.partition(".")[0])]
    if missing:
        say(f"{engine} is left out: {', '.join(missing)} cannot be imported; pip install 'opt-np[bench]' brings it")
    return not missing


# ---- what there is to do -----------------------------------------------------------------------------------------------------------------


def all_jobs(s: peers.Shape) -> list[Job]:
    jobs = []
    for S, Dh, H in s.attention:
        flops = 4 * S * S * Dh * H / 2  # two products, half of each by causality
        title = f"attention, {S} tokens, {H} heads of {Dh}"
        jobs.append(Job(f"attention-{S}-{Dh}", "attention", "float32", title, flops / 1e9, "GFLOP/s", flops))
        flops *= 3.5  # the backward pass has five more products
        jobs.append(Job(f"attention-{S}-{Dh}-backward", "attention", "float32", f"{title}, and backward", flops / 1e9, "GFLOP/s", flops))
    for stored in STORED:
        jobs += model_jobs(s, stored)
    B, T = s.train
    flops = 3 * B * forward_flops(s.cfg, T, T)  # the backward pass has two products for each of the forward pass
    jobs.append(Job("train", "train", "float32", f"training step, {B} x {T} tokens", B * T, "tokens/s", flops))
    return jobs


def model_jobs(s: peers.Shape, stored: str) -> list[Job]:
    """The jobs of a whole model with its weights stored this way, as far as JOBS names them."""
    read, step = BYTES[stored] * weights_read(s.cfg), forward_flops(s.cfg, 1, 1)
    decode = f"{s.decode} tokens after one, {stored}"
    jobs = [
        Job("decode", "model", stored, f"decode, {decode}", s.decode, "tokens/s", s.decode * step, s.decode * read),
        *(Job(name, "model", stored, f"first token of a fresh prompt of {T}, {stored}", T, "tokens/s", forward_flops(s.cfg, T, 1), read)
          for name, T in (("prefill", s.prefill), ("short", s.short))),
    ]  # fmt: skip
    jobs += [
        Job(f"batch-{B}", "model", stored, f"decode, {B} rows at once, {decode}", B * s.decode, "tokens/s", B * s.decode * step, s.decode * read)
        for B in s.batches
    ]
    B, P, T = s.prefix
    flops = forward_flops(s.cfg, P, 0) + B * forward_flops(s.cfg, T, 1, past=P)
    jobs.append(Job("prefix", "model", stored, f"first tokens of {B} prompts of {P + T} that share {P}, {stored}", B, "prompts/s", flops, read))
    return [job for job in jobs if job.asked_as in JOBS]


def choose(every: list[Job], jobs: Iterable[str], engines: Iterable[str]) -> list[Job]:
    """The jobs asked for that one of the engines can do."""
    asked = [job for job in every if job.asked_as in jobs]
    idle = [job.key for job in asked if not lanes(job.kind, job.stored, engines)]
    if idle:
        say(f"{', '.join(idle)} left out: {', '.join(engines)} cannot do that")
    chosen = [job for job in asked if job.key not in idle]
    if not chosen and "memory" not in jobs:
        raise ValueError(f"{', '.join(engines)} cannot do any of {', '.join(jobs)}")
    return chosen


def stored_as(wanted: list[Job], jobs: Iterable[str]) -> Collection[str]:
    """The keys of STORED that the jobs of a whole model need; memory is measured for all."""
    return STORED if "memory" in jobs else {job.stored for job in wanted if job.kind == "model"}


def weights_read(cfg: OPTConfig) -> int:
    """Weights that a decoding step reads: all but the position table; the token matrix serves as the head."""
    return sum(prod(shape) for name, shape in parameter_shapes(cfg).items() if name != "embed_positions.weight")


def forward_flops(cfg: OPTConfig, T: int, logits: int, past: int = 0) -> float:
    """FLOPs for T tokens of one row after `past` others, `logits` of them through the head."""
    matrices = sum(prod(shape) for name, shape in parameter_shapes(cfg).items() if len(shape) == 2 and not name.startswith("embed_"))
    attention = cfg.num_hidden_layers * 2 * T * (2 * past + T) * cfg.hidden_size
    return 2 * T * matrices + 2 * logits * cfg.vocab_size * cfg.word_embed_proj_dim + attention


def lanes(kind: str, stored: str, engines: Iterable[str]) -> list[tuple[str, str]]:
    """The lanes (engine, dtype), ours first and the reference last; none if only the float32 reference could take part."""
    found = [(engine, dtype) for engine in engines if engine in peers.ENGINES[kind] for dtype in STORED[stored].get(engine, ())]
    return found if stored == "float32" or {dtype for _, dtype in found} != {"float32"} else []


def write_weights(cfg: OPTConfig, folder: Path) -> None:
    """Writes a random checkpoint in float16, like Meta's, with a shard for each layer, so that it can be larger than memory.

    Weights are drawn as OPT initializes matrices, LayerNorm weights around 1: no parameter is exactly 0 or 1, so leaving one out shows.
    """
    from safetensors.numpy import save_file

    from opt_np import checkpoint

    rng = np.random.default_rng(1)
    weight_map: dict[str, str] = {}
    for layer, group in groupby(parameter_shapes(cfg).items(), lambda item: ".".join(item[0].split(".")[:2])):
        file, shard = f"model-{layer}.safetensors", {}
        for name, shape in group:
            centre = 1.0 if name.endswith("layer_norm.weight") else 0.0
            shard[f"model.decoder.{name}"] = (centre + cfg.init_std * rng.standard_normal(shape, np.float32)).astype(np.float16)
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    keys = {**cfg.to_dict(), "architectures": ["OPTForCausalLM"], "torch_dtype": "float16"}
    checkpoint.write_text(folder / "config.json", json.dumps(keys))


def convert(folder: str, those: Iterable[tuple[str, str]], threads: int) -> None:
    """Converts the checkpoint to an engine's own format, for the engines and dtypes that need one."""
    for engine, (own, make) in peers.CONVERTERS.items():
        if dtypes := sorted(dtype for name, dtype in those if name == engine and dtype in own):
            say(f"converting them for {engine}, {', '.join(dtypes)}")
            limits.alone(threads, make, folder, dtypes)


# ---- measuring ---------------------------------------------------------------------------------------------------------------------------


def measure(jobs: list[Job], those: list[tuple[str, str]], setup: peers.Setup, rounds: int) -> dict[str, Seconds]:
    """Seconds of each job in each lane, round by round, after checking that all lanes agree."""
    those = those[: how_many_fit(jobs[0], those, setup.shape.cfg)]
    names = [job.name for job in jobs]
    steps = [name.replace("batch", "step") for name in names] + ["step"] * (jobs[0].kind == "model")
    with ExitStack() as stack:
        workers = {" ".join(lane): stack.enter_context(Worker(jobs[0].kind, *lane, setup)) for lane in those}
        for name in dict.fromkeys(names + steps):
            check(name, jobs[0].stored, {lane: worker.check(name) for lane, worker in workers.items()})  # also the warm-up
        verdict = f"{', '.join(workers)} agree" if len(workers) > 1 else f"{next(iter(workers))} is alone, and not checked"
        say(f"{verdict}; timing {', '.join(job.key for job in jobs)}")
        seconds: dict[str, Seconds] = {job.key: {lane: [] for lane in workers} for job in jobs}
        for i in range(rounds):
            for job in jobs:
                for lane, worker in workers.items():
                    time.sleep(REST)
                    seconds[job.key][lane].append(worker.time(job.name, seed=1000 * (i + 1)))
    return seconds


def how_many_fit(job: Job, those: list[tuple[str, str]], cfg: OPTConfig) -> int:
    """How many lanes fit in memory together; prints which are left out, the reference first."""
    needs = [room(job.kind, dtype, cfg) for _, dtype in those]
    fit = int(np.searchsorted(np.cumsum(needs), free_memory(), side="right"))
    if fit < len(those):
        say(f"{job.key}: {', '.join(' '.join(lane) for lane in those[fit:])} left out, as memory is short; choose with --engines and --jobs")
    if not fit:
        raise ValueError(f"{job.key} needs {needs[0] / 1e9:.0f} GB of free memory for {' '.join(those[0])}, and {free_memory() / 1e9:.0f} are free")
    return fit


def room(kind: str, dtype: str, cfg: OPTConfig) -> float:
    """Bytes of memory that an engine needs, roughly."""
    weights = BYTES[dtype] * sum(prod(shape) for shape in parameter_shapes(cfg).values())
    return {"attention": 0.5e9, "model": 0.6e9 + 1.1 * weights, "train": 2e9 + 4.5 * weights}[kind]


def check(name: str, stored: str, results: dict[str, list[np.ndarray]]) -> None:
    """Raises Disagreement if an engine disagrees with the last one: a fast wrong answer is no result.

    Tokens in float32 have to be equal. In fewer bits each engine rounds its own way, and two likely tokens may swap, so single steps are checked.
    Gradients are compared as a whole: where relu's input is nearly 0, rounding decides whether a single element is 0.
    """
    *others, (reference, expected) = results.items()
    tokens = expected[0].dtype.kind == "i"
    if tokens and stored != "float32":
        return
    for lane, found in others:
        tolerance = 0.0 if tokens else max(TOLERANCE[stored], LOOSE.get(lane, 0.0), LOOSE.get(reference, 0.0))
        for a, b in zip(expected, found, strict=True):
            told = (a != peers.UNTOLD) & (b != peers.UNTOLD) if a.shape == b.shape else np.zeros(0, bool)
            size = np.linalg.norm if name == "train" else lambda numbers: np.abs(numbers).max()
            error, largest = (size((a - b)[told]), size(a[told])) if told.any() else (np.inf, 0)
            if not error <= tolerance * largest:
                raise Disagreement(
                    f"{name}: {lane} and {reference} differ by {error:.2e}, {tolerance:g} of {largest:.2e} is allowed; it was not timed"
                )


def measure_memory(engines: Iterable[str], setup: peers.Setup) -> dict[str, dict[str, float]]:
    """By how much each engine's process grows, one at a time, from all imported to loaded and decoded; mapped files count.

    For lanes that do not fit, it prints that they are left out.
    """
    cfg, found = setup.shape.cfg, {}
    if not resident()["VmRSS"]:
        say("memory is left out: this system has no /proc/self/status")
        return {}
    cache = 4 * 2 * cfg.num_hidden_layers * cfg.hidden_size * setup.shape.decode
    for lane in dict.fromkeys(lane for stored in STORED for lane in lanes("model", stored, engines)):
        least = BYTES[lane[1]] * sum(prod(shape) for shape in parameter_shapes(cfg).values()) + cache
        if room("model", lane[1], cfg) > free_memory():
            say(f"memory: {' '.join(lane)} left out, as memory is short")
        else:
            with Worker("model", *lane, setup) as worker:
                worker.check("decode")
                grown, peak = worker.memory["VmRSS"] - worker.before["VmRSS"], worker.memory["VmHWM"] - worker.before["VmRSS"]
            found[" ".join(lane)] = {"least": least, "grown": grown, "peak": peak, "ratio": grown / least}
    return found


class Worker:
    """An engine in a process of its own."""

    def __init__(self, kind: str, engine: str, dtype: str, setup: peers.Setup) -> None:
        from multiprocessing import get_context  # here, as every opt-np command imports this module

        context = get_context("spawn")
        self.name = f"{engine} {dtype}"
        self.connection, there = context.Pipe()
        setup = peers.Setup(setup.shape, setup.folder, dtype, setup.threads)
        self.process = context.Process(target=serve, args=(there, kind, engine, setup), daemon=True)
        self.process.start()
        there.close()  # the process has its own copy: when it ends, the pipe closes
        self.before = self.receive("loading")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    def check(self, job: str) -> list[np.ndarray]:
        """The results of `job` for the first seed."""
        self.connection.send((job, 0, 0.0))
        _, numbers, self.memory = self.receive(job)
        return numbers

    def time(self, job: str, seed: int) -> float:
        """Seconds of a call."""
        self.connection.send((job, seed, BUDGET))
        return self.receive(job)[0]

    def receive(self, doing: str) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise ValueError(f"{self.name} stopped, at {doing}; its error is above") from None


def serve(connection: Any, kind: str, engine: str, setup: peers.Setup) -> None:
    """The loop of a Worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    for module in peers.IMPORTS[engine]:
        importlib.import_module(module)
    before = resident()
    jobs = peers.ENGINES[kind][engine](setup)
    connection.send(before)
    while True:
        try:
            name, seed, budget = connection.recv()
        except EOFError:
            return
        seconds: list[float] = []
        if budget:  # untimed first: since then, other engines have used the caches and freed memory
            jobs[name](seed - 1)
        while not seconds or sum(seconds) < budget:
            start = time.perf_counter()
            result = jobs[name](seed + len(seconds))
            seconds.append(time.perf_counter() - start)
        numbers = [] if budget else [np.asarray(a).ravel() for a in (result if isinstance(result, list | tuple) else [result])]
        connection.send((float(np.median(seconds)), numbers, resident()))


def proc(path: str) -> dict[str, str]:
    """The `key: value` lines of a file in /proc, the first for each key; {} if there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def resident() -> dict[str, float]:
    """Bytes of memory that this process uses now, and used at its peak."""
    status = proc("/proc/self/status")
    return {key: 1024.0 * int(status.get(key, "0").split()[0]) for key in ("VmRSS", "VmHWM")}


def free_memory() -> float:
    return 1024 * float(proc("/proc/meminfo").get("MemAvailable", "inf").split()[0])


# ---- reporting ---------------------------------------------------------------------------------------------------------------------------


def summary(jobs: list[Job], seconds: dict[str, Seconds], ceilings: dict[str, float]) -> dict[str, Any]:
    """For each job: seconds, the share of the limit that each lane reaches, and its time divided by ours, as (median, min, max).

    Ours is opt_fast in each dtype, or the first lane if opt_fast does not take part.
    """
    found: dict[str, Any] = {}
    for job in jobs:
        times = seconds[job.key]
        least = job.least(ceilings)
        ours = [lane for lane in times if lane.startswith("opt_fast")] or [next(iter(times))]
        ratios = {o: {lane: middle([b / a for a, b in zip(times[o], times[lane], strict=True)]) for lane in times if lane not in ours} for o in ours}
        share = {lane: 100 * least / float(np.median(s)) for lane, s in times.items()}
        found[job.key] = {"seconds": times, "limit_seconds": least, "percent_of_limit": share, "ratio": ratios}
    return found


def middle(values: list[float]) -> tuple[float, float, float]:
    return float(np.median(values)), min(values), max(values)


def table(result: dict[str, Any], jobs: list[Job]) -> list[str]:
    where, best = result["machine"], result["limits"]
    lines = [
        f"opt-{result['size']} shape, random weights, {where['threads']} threads of {where['cpu']}",
        f"limits: {best['bandwidth'] / 1e9:.1f} GB/s read from memory, {best['matmul'] / 1e9:.0f} GFLOP/s of float32 products in NumPy",
        f"median (min to max) of {result['rounds']} interleaved rounds; % of the limit; ratios of the same round; hf's attention is torch's",
    ]
    if where["environment"]:
        lines.append("set in the environment: " + " ".join(f"{name}={value}" for name, value in where["environment"].items()))
    if not {"avx512_bf16", "amx_bf16"} & set(where["vectors"]):
        lines.append("no bfloat16 products on this CPU: in 16 bits each engine widens as it can, and OpenVINO computes in float32")
    else:
        lines.append("this CPU has bfloat16 products: in bfloat16 activations are rounded too, and the limit, of float32 products, can be passed")
    if any(job.stored.startswith("int") for job in jobs):
        own = f"int8 and int4: each engine quantises in its own way, int4 in groups of {peers.INT4_GROUP}"
        lines.append(f"{own}; the limit reads 1 byte or half a byte a weight, and multiplies in float32")
    for job in jobs:
        found = result["jobs"][job.key]
        lines += ["", job.title]
        for lane, seconds in found["seconds"].items():
            rate, low, high = middle([job.amount / s for s in seconds])
            ratios = [f"{ours} is {spread(by[lane])} x as fast" for ours, by in found["ratio"].items() if lane in by]
            reached = f"{rate:8.1f} {job.unit:8} ({low:.1f} to {high:.1f})"
            lines.append(f"  {lane:19} {reached:42} {found['percent_of_limit'][lane]:3.0f} %  {'; '.join(ratios)}")
    if result["memory"]:
        lines += ["", "growth of resident memory, from imported to loaded and decoded, and how often weights and cache go into it"]
        lines += [f"  {lane:19} {m['grown'] / 1e6:8.0f} MB (peak {m['peak'] / 1e6:.0f})   {m['ratio']:.2f} x" for lane, m in result["memory"].items()]
    return [line.rstrip() for line in lines]


def spread(values: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def machine(threads: int) -> dict[str, Any]:
    from importlib import metadata

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    flags = proc("/proc/cpuinfo").get("flags", "").split()
    vectors = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags]
    cpu = proc("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine()
    found = {"cpu": cpu, "vectors": vectors, "threads": threads, "python": platform.python_version(), "versions": versions}
    return found | {"environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(STEERING)}}


def draw(file: str, result: dict[str, Any], jobs: list[Job]) -> None:
    """Draws a bar for each engine in each job: how many times as fast ours is, with the spread over the rounds."""
    from matplotlib.figure import Figure

    ratios = [(job.key, result["jobs"][job.key]["ratio"]) for job in jobs]
    bars = [(f"{key}: {lane} / {ours}", *ratio) for key, by_ours in ratios for ours, by in by_ours.items() for lane, ratio in by.items()]
    if not bars:
        say("nothing to draw: there are no two engines to compare")
        return
    labels, values, lows, highs = (list(column) for column in zip(*bars, strict=True))
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    below, above = np.subtract(values, lows), np.subtract(highs, values)
    axes.barh(labels, values, xerr=[below, above], color="#4878a8", ecolor="#555555")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the first / seconds of the second, same round")
    axes.set_title(f"opt-{result['size']} shape on {result['machine']['cpu']}")
    figure.savefig(file)


if __name__ == "__main__":
    from opt_np.cli import main

    raise SystemExit(main(["bench", *sys.argv[1:]]))
