"""Speed against the engines people use: python -m opt_fast.bench cpu

Each engine runs in a process of its own (thread pools spoil one another), on the same random weights; results are checked against each other
before anything is timed; rounds are interleaved, so that a machine that slows down slows everyone. Absolute times of a shared machine mean
little: the ratios are the result. A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from opt_np import grad, model
from opt_np.classes import OPTForCausalLM
from opt_np.config import OPTConfig
from opt_np.init import init_params
from opt_np.optim import adamw_init, adamw_step, clip_by_global_norm
from opt_np.tree import flatten

PREFILL, DECODE_PROMPT, DECODE = 1024, 32, 32  # tokens
TRAIN = 4, 256  # rows, tokens
TOLERANCE = 1e-3  # of the largest logit, float32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opt_fast.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cpu", "worker"), help="cpu: prefill, decode and training of the reference against HF transformers")
    parser.add_argument("--size", default="125m", help="shape of the model, random weights (default 125m)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each engine (default all)")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.what == "worker":
        return worker(ENGINES[args.engine], args.size)
    return cpu(args.size, args.rounds, args.threads)


def cpu(size: str, rounds: int, threads: int) -> int:
    engines = {name: Engine(name, size, threads) for name in ENGINES}
    jobs = ("prefill", "decode", "train")
    for job in jobs:  # also the warm-up
        check(job, {name: engine.run(job) for name, engine in engines.items()})
    print(f"checked: {', '.join(ENGINES)} agree to {TOLERANCE:g}; timing {rounds} rounds", file=sys.stderr)
    times: dict[str, dict[str, list[float]]] = {job: {name: [] for name in engines} for job in jobs}
    for _ in range(rounds):
        for job in jobs:
            for name, engine in engines.items():
                times[job][name].append(engine.run(job)["seconds"])
    report(size, threads, times)
    return 0


def check(job: str, results: dict[str, dict[str, Any]]) -> None:
    """Aborts where two engines disagree: a fast wrong answer is no result."""
    (first, expected), *rest = results.items()
    for name, result in rest:
        a, b = np.array(expected["numbers"]), np.array(result["numbers"])
        agree = np.array_equal(a, b) if job == "decode" else np.abs(a - b).max() <= TOLERANCE * np.abs(a).max()  # token ids are equal or not
        if not agree:
            raise SystemExit(f"{job}: {first} and {name} disagree by {np.abs(a - b).max():.2e}: nothing was timed")


def report(size: str, threads: int, times: dict[str, dict[str, list[float]]]) -> None:
    tokens = {"prefill": PREFILL, "decode": DECODE, "train": TRAIN[0] * TRAIN[1]}
    titles = {
        "prefill": f"prefill of {PREFILL} tokens",
        "decode": f"decode after {DECODE_PROMPT}",
        "train": f"training step, {TRAIN[0]} x {TRAIN[1]}",
    }
    print(
        f"opt-{size} shape, random weights, float32, {threads} threads; tokens/s: median (min to max); ratio of each round to HF: median (min to max)"
    )
    ratios: dict[str, dict[str, list[float]]] = {}
    for job, by_engine in times.items():
        for name, seconds in by_engine.items():
            rates = [tokens[job] / s for s in seconds]
            ratios.setdefault(job, {})[name] = [h / s for h, s in zip(by_engine["hf"], seconds, strict=True)]
            print(f"  {titles[job]:26} {name:6} {spread(rates, '8.1f')}   {spread(ratios[job][name], '.2f')} x")
    versions = {m: __import__(m).__version__ for m in ("numpy", "torch", "transformers")}
    machine = {"cpu": cpu_name(), "python": platform.python_version(), "threads": threads, **versions}
    print(
        json.dumps(
            {
                "size": size,
                "machine": machine,
                "seconds": times,
                "ratio_to_hf": {j: {n: statistics.median(r) for n, r in e.items()} for j, e in ratios.items()},
            }
        )
    )


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form.lstrip('0123456789')}} to {max(values):{form.lstrip('0123456789')}})"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Engine:
    """A worker process: one line of JSON per job, each way."""

    def __init__(self, name: str, size: str, threads: int) -> None:
        limits = {variable: str(threads) for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
        command = [sys.executable, "-m", "opt_fast.bench", "worker", "--engine", name, "--size", size]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **limits})
        self._name = name

    def run(self, job: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"engine {self._name} stopped during {job}; its error is above")
        return json.loads(line)


def worker(make_jobs: Callable[[OPTConfig, dict], dict[str, Callable[[], Any]]], size: str) -> int:
    cfg = OPTConfig.from_size(size, dropout=0.0)
    jobs = make_jobs(cfg, init_params(cfg))
    for line in sys.stdin:
        start = time.perf_counter()
        numbers = jobs[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - start, "numbers": np.asarray(numbers, np.float64).ravel().tolist()}), flush=True)
    return 0


def prompt(B: int, T: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, 50000, (B, T))


def numpy_jobs(cfg: OPTConfig, params: dict) -> dict[str, Callable[[], Any]]:
    """The readable reference."""
    lm, trained, state = OPTForCausalLM(params, cfg), params, adamw_init(params)
    ids = prompt(*TRAIN)

    def train() -> float:
        loss, grads = grad.loss_and_grads(trained, ids, ids, cfg)
        clip_by_global_norm(grads, 1.0)
        adamw_step(trained, grads, state, 0.0)  # a rate of 0: the work is the same, and the weights stay those of the other jobs
        return loss

    return {
        "prefill": lambda: model.forward(params, prompt(1, PREFILL), cfg, logits_to_keep=1),
        "decode": lambda: lm.generate(prompt(1, DECODE_PROMPT), max_new_tokens=DECODE, eos_token_id=-1),
        "train": train,
    }


def hf_jobs(cfg: OPTConfig, params: dict) -> dict[str, Callable[[], Any]]:
    """HF transformers on torch, float32, sdpa."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    keys: dict[str, Any] = {k: v for k, v in cfg.to_dict().items() if k != "model_type"} | {"attn_implementation": "sdpa"}
    hf = transformers.OPTForCausalLM(transformers.OPTConfig(**keys)).eval()
    named = {f"model.decoder.{name}": torch.from_numpy(a) for name, a in flatten(params).items()}
    hf.load_state_dict({**named, "lm_head.weight": named["model.decoder.embed_tokens.weight"]})
    optimizer = torch.optim.AdamW(hf.parameters(), lr=0.0)
    ids = torch.from_numpy(prompt(*TRAIN))

    def prefill() -> Any:
        with torch.inference_mode():
            return hf(torch.from_numpy(prompt(1, PREFILL)), logits_to_keep=1, use_cache=False).logits

    def decode() -> Any:
        start = torch.from_numpy(prompt(1, DECODE_PROMPT))
        return hf.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=DECODE, do_sample=False, eos_token_id=-1)

    def train() -> float:
        optimizer.zero_grad()
        loss = hf(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return {"prefill": prefill, "decode": decode, "train": train}


ENGINES = {"hf": hf_jobs, "numpy": numpy_jobs}

if __name__ == "__main__":
    raise SystemExit(main())
