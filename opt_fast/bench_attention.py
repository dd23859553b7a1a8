"""Tiled attention on a GPU against torch's: opt-np bench attention

First it measures the device's limits in the same process. Then every lane (one of our kernels, or of torch's) is compared with float64 by
FlashAttention's rule, on the shapes that will be timed; only then is it timed, by device events, with the device's cache emptied before each call, in
interleaved rounds. Times are the device's own: the host launches ahead while the device empties its cache. It prints a table, then one line of JSON.
With --backward the lanes compute gradients, and each shape is two cases: the backward pass alone, and both passes together.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from opt_fast.bench import check_plot, machine, middle, say, spread
from opt_np.checkpoint import write_text
from opt_np.config import OPTConfig

GRIDS = ("flash", "opt")
MODELS = ("125m", "350m", "1.3b", "2.7b", "6.7b")
DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 80, 128)
# Default options. FlashAttention's grid: 16k tokens in a batch, and as many heads as fit in a width of 2048 (25 of 80).
# On a CPU the cases take about a second: there they only try out the command, and do not measure the machine.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"dtypes": ("float16", "bfloat16"), "head_dims": HEAD_DIMS, "lengths": (512, 1024, 2048, 4096, 8192, 16384), "grids": GRIDS},
    "cpu": {"dtypes": ("float32",), "head_dims": (64,), "lengths": (64, 128), "grids": ("flash",)},
}
TOKENS, WIDTH = {"cuda": 16384, "cpu": 256}, {"cuda": 2048, "cpu": 256}
MATMUL, READ = {"cuda": 8192, "cpu": 512}, {"cuda": 2**31, "cpu": 2**26}  # rows of the square product; bytes of the reduction
BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
ON_CPU = ("flash", "math")  # the others are CUDA's
MATH_ROOM = 10e9  # bytes of scores in float32, beyond which MATH, which holds them all, is left out
WARM_UP = 50  # calls, during which a kernel is chosen and the clocks rise
REPEATS, BUDGET = 20, 0.2  # calls of a lane in a round, and seconds that they may take together; at least one call
HEAD_START = 300e-6  # seconds for which the device is busy emptying its cache while the host launches the timed call
BLOCK = 1024  # queries of a block of the reference
FORWARD, BACKWARD_PASS, BOTH = "forward", "backward", "forward and backward"
PRODUCTS = {FORWARD: 1.0, BACKWARD_PASS: 2.5, BOTH: 3.5}  # FLOPs relative to the forward pass, which has two products; the backward pass has five
ALLOWED = {FORWARD: 2, BACKWARD_PASS: 3, BOTH: 3}  # times the error of the plain formula, as in FlashAttention's own tests


@dataclass(frozen=True)
class Case:
    """Causal attention of S queries over S keys."""

    grid: str  # "flash", or the model whose shape it is
    dtype: str
    B: int
    S: int
    H: int
    Dh: int
    work: str = FORWARD  # a key of PRODUCTS

    @property
    def title(self) -> str:
        shape = f"{self.dtype}, B {self.B}, S {self.S}, {self.H} heads of {self.Dh}"
        return ("" if self.grid == "flash" else f"{self.grid}: ") + shape + ("" if self.work == FORWARD else f", {self.work}")

    @property
    def flops(self) -> float:
        """Two products, half of each by causality, not counting the diagonal, as in FlashAttention's own benchmark."""
        return PRODUCTS[self.work] * 4 * self.B * self.H * self.S * self.S * self.Dh / 2

    @property
    def scale(self) -> float:
        return self.Dh**-0.5


@dataclass(frozen=True)
class Lane:
    call: Callable[..., Any]  # (q, k, v, scale) -> O, all (B, T, H, Dh); of both passes (q, k, v, dO, scale) -> (dq, dk, dv)
    refuses: Callable[[Any], str]  # why it cannot compute tensors such as q, or ''
    ours: bool = False
    backward: Callable[..., Callable[[], Any]] | None = None  # like `call` for both passes, but runs the first, and returns the second as a function

    def ready(self, case: Case, tensors: Iterable[Any]) -> Callable[[], Any]:
        """The function that is checked and then timed; it can be called repeatedly."""
        if case.work == BACKWARD_PASS and self.backward:
            return self.backward(*tensors, case.scale)
        return partial(self.call, *tensors, case.scale)


@dataclass(frozen=True)
class Pair:
    """The forward pass of a rung (one of the successive kernels in attention_cuda.RUNGS), and the backward pass that takes its results."""

    rung: str  # a key of attention_cuda.RUNGS
    backward: Callable[..., tuple[Any, Any, Any]]  # (dO, q, k, v, O, L, scale) -> (dq, dk, dv)

    def refuses(self, q: Any) -> str:
        from opt_fast.attention_cuda import RUNGS

        return RUNGS[self.rung].refuses(q)

    def forward(self, q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any]:
        from opt_fast.attention_cuda import RUNGS

        return RUNGS[self.rung](q, k, v, scale)


def mma_bwd(*args: Any) -> tuple[Any, Any, Any]:
    from opt_fast import attention_cuda

    return attention_cuda.mma_bwd(*args)


def sm90_bwd(*args: Any) -> tuple[Any, Any, Any]:
    from opt_fast import attention_cpp

    return attention_cpp.sm90_bwd(*args)


def v3_bwd(*args: Any) -> tuple[Any, Any, Any]:
    from opt_fast import attention_numba

    return attention_numba.v3_bwd(*args)


BACKWARD = {"numba v3": Pair("numba v3", v3_bwd), "mma": Pair("mma", mma_bwd), "sm90": Pair("sm90", sm90_bwd)}


def add_options(parser: Any) -> None:
    words = partial(default_words, DEFAULTS)
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda", help="cpu is for trying this command")
    parser.add_argument("--backward", action="store_true", help="time the backward pass, alone and together with the forward pass")
    parser.add_argument("--grid", dest="grids", nargs="+", choices=GRIDS, metavar="GRID",
                        help="flash: FlashAttention's, 16k tokens, 2048 wide; opt: OPT's own, batch 1, S 2048 " + words("grids"))  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)} " + words("dtypes"))
    parser.add_argument("--head-dims", nargs="+", type=int, metavar="N", help="numbers of a head, in both grids " + words("head_dims"))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="S of the flash grid " + words("lengths"))
    parser.add_argument("--lanes", nargs="+", metavar="LANE", help="numba-v1, mma, torch-cudnn and so on (default: all)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random inputs (default: another one each time)")
    parser.add_argument("--plot", metavar="FILE", help="also draw the flash grid, as a .png, .svg or .pdf")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="also write the line of JSON there")


def run(what: str, device: str, lanes: Any, rounds: int, seed: int | None = None, plot: str | None = None, json_file: str | None = None,
        backward: bool = False, **asked: Any) -> None:  # fmt: skip
    """Runs the benchmark; grids, dtypes, head_dims and lengths that are not in `asked` have the device's default.

    Raises ValueError for options that cannot be measured, and if a lane's result is wrong.
    """
    check_options(rounds, asked["head_dims"] or (), asked["lengths"] or (), plot, json_file)
    need_device(device)
    every = cases(device, backward=backward, **DEFAULTS[device] | {key: values for key, values in asked.items() if values})
    chosen = choose(all_lanes(device, backward), lanes)
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    clock = Clock(device, HEAD_START * (3 if backward else 1))  # more launches, and autograd's overhead
    say("measuring what the device can do")
    limits = measure_limits(dict.fromkeys(case.dtype for case in every), clock)
    say(limits_told(limits))
    result: dict[str, Any] = {"what": what, "seed": seed, "rounds": rounds, "machine": described(clock), "limits": limits}
    result["state_before"] = nvidia_smi(clock)
    checked, result["cases"] = check_all(every, chosen, device, seed), []
    for case, found in zip(every, checked, strict=True):
        say(f"timing {case.title}")
        seconds = measure(case, {name: chosen[name] for name in found["errors"]}, found["left_out"], clock, rounds, seed)
        result["cases"].append(summary(case, seconds, chosen, limits["matmul"][case.dtype]) | found)
        keep(result, json_file)
    result["state_after"] = nvidia_smi(clock)
    tell(table(result), result, json_file)
    if plot:
        draw(plot, result)


def check_options(rounds: int, head_dims: Iterable[int], lengths: Iterable[int], plot: str | None, json_file: str | None) -> None:
    check_least({"rounds": rounds, "head-dims": head_dims, "lengths": lengths})
    check_files(plot, json_file)


def default_words(defaults: dict[str, dict[str, Any]], key: str) -> str:
    """An option's default on either device, for its help text."""
    told = {device: " ".join(map(str, np.atleast_1d(default[key]))) for device, default in defaults.items()}
    return f"(default: {told['cuda']}; on a CPU {told['cpu']})"


def check_least(options: dict[str, Any], least: int = 1) -> None:
    """Raises ValueError if an option, or one of its values, is less than `least`."""
    for name, values in options.items():
        for value in np.atleast_1d(list(values) if isinstance(values, Iterable) else values):
            if value < least:
                raise ValueError(f"--{name} is {value}; it must be at least {least}")


def check_files(plot: str | None, json_file: str | None) -> None:
    """Raises ValueError for files that could not be written at the end."""
    check_plot(plot)
    if json_file and not Path(json_file).parent.is_dir():
        raise ValueError(f"--json {json_file}: {Path(json_file).parent} is no folder")


def tell(lines: list[str], result: dict[str, Any], json_file: str | None) -> None:
    """Prints the table, then the line of JSON, which also goes into `json_file`, if given."""
    print("\n".join(lines))
    print(json.dumps(result), flush=True)
    keep(result, json_file)


def keep(result: dict[str, Any], json_file: str | None) -> None:
    """Writes the results so far, in case the run is stopped."""
    if json_file:
        write_text(Path(json_file), json.dumps(result) + "\n")


def need_device(device: str) -> None:
    if not find_spec("torch"):
        raise ValueError("attention is measured against torch's, and torch cannot be imported; pip install 'opt-np[bench]' brings it")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
        raise ValueError(f"torch {torch.__version__}, built {build}, finds no GPU; --device cpu tries this command on small shapes")


# ---- what there is to do -----------------------------------------------------------------------------------------------------------------


def cases(device: str, dtypes: Iterable[str], head_dims: Iterable[int], lengths: Iterable[int], grids: Iterable[str],
          backward: bool = False) -> list[Case]:  # fmt: skip
    """All cases, by dtype."""
    shapes = []
    if "flash" in grids:
        shapes = [("flash", max(1, TOKENS[device] // S), S, max(1, WIDTH[device] // Dh), Dh) for Dh in head_dims for S in lengths]
    if "opt" in grids:
        for size in MODELS:
            cfg = OPTConfig.from_size(size)
            S = cfg.max_position_embeddings if device == "cuda" else max(DEFAULTS["cpu"]["lengths"])
            shapes += [(f"opt-{size}", 1, S, cfg.num_attention_heads, cfg.head_dim)] * (cfg.head_dim in head_dims)
    if not shapes:
        raise ValueError(f"no model of the opt grid has heads of {', '.join(map(str, head_dims))}; they have {', '.join(map(str, HEAD_DIMS))}")
    works = (BACKWARD_PASS, BOTH) if backward else (FORWARD,)
    return [Case(grid, dtype, B, S, H, Dh, work) for dtype in dtypes for grid, B, S, H, Dh in shapes for work in works]


def all_lanes(device: str, backward: bool = False) -> dict[str, Lane]:
    """Our lanes, in the order of the ladder of kernels, then torch's by name."""
    theirs = {f"torch {name}": torch_lane(name) for name in (BACKENDS if device == "cuda" else ON_CPU)}
    return our_lanes(backward) | ({name: through_autograd(lane) for name, lane in theirs.items()} if backward else theirs)


def our_lanes(backward: bool = False) -> dict[str, Lane]:
    try:
        from opt_fast.attention_cuda import RUNGS
    except ImportError as error:
        say(f"ours are left out: {error}; pip install 'opt-np[cuda]' brings what they need")
        return {}
    if backward:
        return {name: pair_lane(pair) for name, pair in BACKWARD.items()}
    return {name: Lane(partial(first_of, rung), rung.refuses, ours=True) for name, rung in RUNGS.items()}


def first_of(rung: Any, *args: Any) -> Any:
    """O, without L."""
    return rung(*args)[0]


def pair_lane(pair: Any) -> Lane:
    """A lane of gradients, from two kernels of ours."""

    def backward(q: Any, k: Any, v: Any, dO: Any, scale: float) -> Callable[[], Any]:
        return partial(pair.backward, dO, q, k, v, *pair.forward(q, k, v, scale), scale)

    return Lane(lambda *args: backward(*args)(), pair.refuses, ours=True, backward=backward)


def through_autograd(lane: Lane) -> Lane:
    """A lane of gradients, from the backward pass that autograd records for a call."""
    import torch

    def backward(q: Any, k: Any, v: Any, dO: Any, scale: float, again: bool = True) -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        return partial(torch.autograd.grad, lane.call(*leaves, scale), leaves, dO, retain_graph=again)

    return Lane(lambda q, k, v, dO, scale: backward(q, k, v, dO, scale, False)(), lane.refuses, backward=backward)


def torch_lane(name: str) -> Lane:
    """A lane restricted to one backend of torch's scaled_dot_product_attention: torch raises RuntimeError where that cannot run."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, BACKENDS[name])

    def call(q: Any, k: Any, v: Any, scale: float) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # torch expects (B, H, T, Dh): views, as in models
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    def refuses(q: Any) -> str:
        B, T, H, _ = q.shape
        scores = 4 * B * H * T * T
        return f"holds {scores / 1e9:.0f} GB of scores, and {MATH_ROOM / 1e9:.0f} GB are allowed" if name == "math" and scores > MATH_ROOM else ""

    return Lane(call, refuses)


def choose(every: dict[str, Lane], asked: Iterable[str] | None) -> dict[str, Lane]:
    """The requested lanes, in the order of `every`; on the command line, names have dashes for blanks."""
    if asked is None:
        return every
    typed = {name.replace(" ", "-"): name for name in every}
    if unknown := [word for word in asked if word.replace(" ", "-") not in typed]:
        raise ValueError(f"--lanes {' '.join(unknown)}: there is no such lane here; there are {', '.join(typed)}")
    return {name: every[name] for word, name in typed.items() if word in {w.replace(" ", "-") for w in asked}}


def inputs(case: Case, device: str, seed: int) -> tuple[Any, ...]:
    """q, k and v, (B, S, H, Dh), and dO for a backward pass: normally distributed, drawn anew for each shape and seed."""
    import torch

    generator = torch.Generator(device).manual_seed(hash((seed, case.B, case.S, case.H, case.Dh)) % 2**63)
    shape = (case.B, case.S, case.H, case.Dh)
    count = 3 if case.work == FORWARD else 4
    return tuple(torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype)) for _ in range(count))


# ---- checking ----------------------------------------------------------------------------------------------------------------------------


def check_all(every: list[Case], lanes: dict[str, Lane], device: str, seed: int) -> list[dict[str, Any]]:
    """The result of `check` for each case; prints each reason to leave out a lane once."""
    found, told = [], set()
    for case in every:
        found.append(check(case, lanes, device, seed))
        for told_now in found[-1]["left_out"].items():
            if told_now not in told:
                say("{} is left out: {}".format(*told_now) + f" (from {case.title} on)")
                told.add(told_now)
        say(f"{case.title}: {', '.join(found[-1]['errors']) or 'no lane'} within the rule")
    if not any(one["errors"] for one in found):
        raise ValueError(f"no lane of {', '.join(lanes)} can compute any of these shapes")
    return found


def check(case: Case, lanes: dict[str, Lane], device: str, seed: int) -> dict[str, Any]:
    """{"errors": {lane: {"error": …, "allowed": …}}, "left_out": {lane: why}}; it runs the same calls that will be timed, with the whole batch.

    Of three gradients, it reports the one closest to its allowed error. Raises ValueError for a lane that breaks FlashAttention's rule: a fast wrong
    answer is no result.
    """
    tensors, rows = inputs(case, device, seed + 1), sorted({0, case.B - 1})  # only the batch's first and last rows in float64
    references = expected(case, [t[rows] for t in tensors])
    errors, left_out = {}, {}
    for name, lane in lanes.items():
        out, reason = (None, why) if (why := lane.refuses(tensors[0])) else attempt(lane, case, tensors)
        if out is None:
            left_out[name] = reason
            continue
        outs = [out] if case.work == FORWARD else out
        told = [judge(case, name, of, one, rows, *references[of]) for of, one in zip(references, outs, strict=True)]
        errors[name] = max(told, key=lambda one: one["error"] / one["allowed"])
    return {"errors": errors, "left_out": left_out}


def judge(case: Case, name: str, of: str, out: Any, rows: list[int], truth: Any, plain_error: float, noise: float) -> dict[str, Any]:
    error = float((out[rows].double() - truth).abs().max())
    allowed = ALLOWED[case.work] * plain_error + noise
    if not (error <= allowed and bool(out.isfinite().all())):
        what = f"{name} is off" if of == "O" else f"{of} of {name} is off"
        raise ValueError(f"{case.title}: {what} by {error:.2e}, and {allowed:.2e} is allowed, {'thrice' if of != 'O' else 'twice'} the "
                         f"{plain_error:.2e} of attention written out in {case.dtype} and {noise:.2e}; nothing was timed, and --lanes can leave it "
                         f"out")  # fmt: skip
    return {"error": error, "allowed": allowed} | ({} if of == "O" else {"of": of})


def expected(case: Case, tensors: Any) -> dict[str, tuple[Any, float, float]]:
    """The triple of `reference` for O, or for each gradient."""
    q, k, v, *rest = tensors
    if case.work == FORWARD:
        return {"O": reference(q, k, v, case.scale)}
    (dO,) = rest
    near = plain_bwd(q, k, v, dO, case.scale)
    truths = plain_bwd(q.double(), k.double(), v.double(), dO.double(), case.scale)
    return {of: (a, float((b.double() - a).abs().max()), rounding(a, b.dtype)) for of, a, b in zip(("dq", "dk", "dv"), truths, near, strict=True)}


def reference(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, float, float]:
    """Attention in float64, the error of the same formula in q's dtype, and the rounding of the result itself, as FlashAttention-3 estimates it."""
    truth = plain(q.double(), k.double(), v.double(), scale)
    return truth, float((plain(q, k, v, scale).double() - truth).abs().max()), rounding(truth, q.dtype)


def rounding(truth: Any, dtype: Any) -> float:
    near = truth.to(dtype)
    return 2 * float((near + 0.3 - 0.3 - near).abs().max())


def plain(q: Any, k: Any, v: Any, scale: float, block: int | None = None) -> Any:
    """softmax(scale·q kᵀ) v, the plain formula in the inputs' dtype, causal; a head and a block of its queries at a time, to save memory.

    q: (B, T, H, Dh);  k: (B, T, H, Dh);  v: (B, T, H, Dh)  ->  (B, T, H, Dh)
    """
    import torch

    B, T, H, _ = q.shape
    O, block = torch.empty_like(q), block or BLOCK
    for start in range(0, T, block):
        stop = min(start + block, T)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        for b in range(B):
            for h in range(H):
                scores = (q[b, start:stop, h] @ k[b, :stop, h].T) * scale
                O[b, start:stop, h] = torch.softmax(scores.masked_fill_(future, -math.inf), -1) @ v[b, :stop, h]
    return O


def plain_bwd(q: Any, k: Any, v: Any, dO: Any, scale: float) -> tuple[Any, ...]:
    """The gradients of `plain` by autograd, a head at a time; in one block of queries, since sums over blocks would be rounded in between.

    q: (B, T, H, Dh);  k: (B, T, H, Dh);  v: (B, T, H, Dh);  dO: (B, T, H, Dh)  ->  (B, T, H, Dh), (B, T, H, Dh), (B, T, H, Dh)
    """
    import torch

    B, T, H, _ = q.shape
    found = tuple(torch.empty_like(t) for t in (q, k, v))
    for b in range(B):
        for h in range(H):
            part = (slice(b, b + 1), slice(None), slice(h, h + 1))
            q_, k_, v_ = (t[part].detach().requires_grad_() for t in (q, k, v))
            grads = torch.autograd.grad(plain(q_, k_, v_, scale, T), (q_, k_, v_), dO[part])
            for whole, grad in zip(found, grads, strict=True):
                whole[part] = grad
    return found


def attempt(lane: Lane, case: Case, tensors: tuple[Any, ...]) -> tuple[Any, str]:
    """O or the gradients; or None and why: out of memory, or inputs that this torch kernel does not support, in torch's own words."""
    import torch

    device = tensors[0].device.type
    poison(tensors[0]) if case.work == FORWARD else poison(tensors[0], 4)
    with warnings.catch_warnings(record=True, action="always") as heard:
        try:
            out = lane.ready(case, tensors)()
            wait(device)
            return out, ""
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except ImportError as error:
            reason = f"{error}; pip install 'opt-np[cuda]' brings it"
        except RuntimeError as error:
            if lane.ours:
                raise
            said = [str(warning.message).partition(" (Triggered")[0] for warning in heard]
            reasons = [words for words in said if "not used because" not in words and "runtime disabled" not in words]
            reason = ". ".join([str(error).splitlines()[0].rstrip("."), *reasons[:1]])
    wait(device)  # a persistent device error is not the lane's alone: it is raised again here, and ends the run
    free_cached(device)
    return None, reason


def poison(q: Any, results: int = 1) -> None:
    """Leaves NaN in the memory that the allocator will hand out next, for `results` tensors like q, so that elements left unwritten show."""
    import torch

    [*(torch.full_like(q, math.nan) for _ in range(results)), torch.full(q.shape[:3], math.nan, device=q.device)]


# ---- timing ------------------------------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    """Waits until the device has finished its work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def free_cached(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


class Clock:
    """Measures the device's seconds for calls, each with none of its inputs in the L2 cache."""

    def __init__(self, device: str, head_start: float = HEAD_START) -> None:
        import torch

        self.device, self.times = device, 1
        self.properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device()) if device == "cuda" else None
        cache = getattr(self.properties, "L2_cache_size", 0) or 2**23
        self.written = torch.empty(4 * cache, dtype=torch.int8, device=device)
        if device == "cuda":
            self.seconds(self.empty_cache, 3)
            self.times = math.ceil(head_start / float(np.median(self.seconds(self.empty_cache, 10))))

    def empty_cache(self) -> None:
        """Writes four times the cache's size, repeatedly until the head start has passed: meanwhile launches cost no time."""
        for _ in range(self.times):
            self.written.zero_()

    def seconds(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each of `repeats` calls; on a GPU from events before and after it, which the host reads once all is done."""
        if self.device == "cpu":
            return [self.second(call) for _ in range(repeats)]
        import torch

        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            self.empty_cache()
            start.record()
            call()
            end.record()
        wait(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def second(self, call: Callable[[], Any]) -> float:
        self.empty_cache()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def estimate(self, call: Callable[[], Any]) -> float:
        """Approximate seconds of a call. The host's clock includes more, but must not show much more: else the events miss the work.

        Raises ValueError if it does in all of five attempts: the first may include compilation, and the host may be busy.
        """
        for _ in range(5):
            wait(self.device)
            start = time.perf_counter()
            call()
            wait(self.device)
            outside = time.perf_counter() - start
            (inside,) = self.seconds(call, 1)
            if self.device == "cpu" or outside <= 2 * inside + 2e-3:
                return inside
        raise ValueError(f"events tell {1e3 * inside:.3g} ms, the host's clock {1e3 * outside:.3g} ms: does it run on torch's current stream?")


def measure_limits(dtypes: Iterable[str], clock: Clock) -> dict[str, Any]:
    """FLOP/s of a square product of random matrices in each dtype, and bytes/s of a reduction, which only reads: medians."""
    import torch

    n, found = MATMUL[clock.device], {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=clock.device, dtype=getattr(torch, dtype)) for _ in range(2))
        clock.seconds(partial(torch.matmul, a, b), WARM_UP)
        found[dtype] = clock.seconds(partial(torch.matmul, a, b), REPEATS)
    x = torch.randn(READ[clock.device] // 4, device=clock.device)
    clock.seconds(x.amax, WARM_UP)
    read = clock.seconds(x.amax, REPEATS)
    return {
        "width": n, "matmul_seconds": found, "matmul": {dtype: 2 * n**3 / float(np.median(seconds)) for dtype, seconds in found.items()},
        "read": 4 * len(x), "read_seconds": read, "bandwidth": 4 * len(x) / float(np.median(read)),
    }  # fmt: skip


def measure(case: Case, lanes: dict[str, Lane], left_out: dict[str, str], clock: Clock, rounds: int, seed: int) -> dict[str, list[float]]:
    """For each lane, the median seconds of its calls in each round, interleaved. A lane that runs out of memory joins those left out."""
    import torch

    if not lanes:
        return {}
    tensors, taking_part = inputs(case, clock.device, seed), dict(lanes)
    repeats: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    with warnings.catch_warnings(action="ignore"):  # they were collected during the check
        for i in range(1 + rounds):
            for name, lane in list(taking_part.items()):
                try:
                    call: Any = lane.ready(case, tensors)
                    if i == 0:  # round 0 only estimates the time
                        repeats[name] = max(1, min(REPEATS, int(BUDGET / estimate(name, case, call, clock))))
                    else:
                        seconds[name].append(float(np.median(clock.seconds(call, repeats[name]))))
                except torch.OutOfMemoryError:
                    left_out[name] = "out of memory"
                    say(f"{name} is left out of {case.title}: out of memory")
                    del taking_part[name], seconds[name]
                    call = None
                    free_cached(clock.device)
                call = None  # frees what its forward pass saved, before the next lane starts
    return seconds


def estimate(name: str, case: Case, call: Callable[[], Any], clock: Clock) -> float:
    try:
        return clock.estimate(call)
    except ValueError as error:
        raise ValueError(f"{case.title}: {name}: {error}") from None


# ---- reporting ---------------------------------------------------------------------------------------------------------------------------


def summary(case: Case, seconds: dict[str, list[float]], lanes: dict[str, Lane], matmul: float) -> dict[str, Any]:
    """TFLOP/s of each lane as (median, min, max), its share of the matmul's, and torch's seconds divided by our best lane's in the same round."""
    tflops = {name: middle([case.flops / s / 1e12 for s in times]) for name, times in seconds.items()}
    ours = max((name for name in seconds if lanes[name].ours), key=lambda name: tflops[name][0], default=None)
    theirs = [name for name in seconds if not lanes[name].ours] if ours else []
    ratio = {name: middle([b / a for a, b in zip(seconds[ours or ""], seconds[name], strict=True)]) for name in theirs}
    percent = {name: 100e12 * told[0] / matmul for name, told in tflops.items()}
    return {**asdict(case), "flops": case.flops, "seconds": seconds, "tflops": tflops, "percent_of_matmul": percent, "ours": ours, "ratio": ratio}


def described(clock: Clock) -> dict[str, Any]:
    """The machine that was measured."""
    import torch

    found = with_gpu(clock.device) | {"float32_products": torch.get_float32_matmul_precision()}
    return found if clock.device == "cpu" else found | {"multiprocessors": clock.properties.multi_processor_count}


def with_gpu(device: str) -> dict[str, Any]:
    """bench.machine, the device, and the GPU with the versions of its software."""
    import torch

    found = machine(torch.get_num_threads()) | {"device": device}
    if device == "cpu":
        return found
    card: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"gpu": card.name, "memory": card.total_memory, "versions": found["versions"] | versions}


def nvidia_smi(clock: Clock) -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU in use; {} if nvidia-smi does not answer."""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    if clock.device == "cpu":
        return {}
    words = ["nvidia-smi", f"--id=GPU-{getattr(clock.properties, 'uuid', '0')}", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer[0].split(",")] if answer else []
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else {}


def limits_told(limits: dict[str, Any]) -> str:
    products = ", ".join(f"{flops / 1e12:.3g} TFLOP/s of {dtype}" for dtype, flops in limits["matmul"].items())
    return f"limits: {limits['bandwidth'] / 1e9:.4g} GB/s read from memory; products of {limits['width']} x {limits['width']}, {products}"


def table(result: dict[str, Any]) -> list[str]:
    where = result["machine"]
    unit = "TFLOP/s" if where["device"] == "cuda" else "GFLOP/s"
    forward = all(found["work"] == FORWARD for found in result["cases"])
    flops_told = "4 B H S S D / 2" + ("" if forward else ", 2.5 times that for the backward pass and 3.5 times for both")
    lines = [
        *header(where, result["state_before"]),
        limits_told(result["limits"]),
        f"median (min to max) of {result['rounds']} interleaved rounds; % of the product in this dtype; ratios of seconds in the same round",
        f"causal FLOPs, {flops_told}; the cache is emptied before each call; time on the device, without the launch"
        if where["device"] == "cuda"
        else f"causal FLOPs, {flops_told}; on a CPU, to try this command: no result",
        f"torch reads views of the same memory, (B, S, H, D), as models hold it; math takes part up to {MATH_ROOM / 1e9:.0f} GB of scores in float32",
    ]
    for found in result["cases"]:
        lines += ["", Case(**{key: found[key] for key in Case.__dataclass_fields__}).title]
        for lane, told in found["tflops"].items():
            rate, low, high = (tflops * (1 if unit == "TFLOP/s" else 1e3) for tflops in told)
            ratio = f"{found['ours']} is {spread(found['ratio'][lane])} x as fast" if lane in found["ratio"] else ""
            reached = f"{rate:8.2f} {unit} ({low:.2f} to {high:.2f})"
            lines.append(f"  {lane:15} {reached:40} {found['percent_of_matmul'][lane]:3.0f} %  {ratio}")
        lines += [f"  {lane:15} left out: {reason}" for lane, reason in found["left_out"].items()]
    return [line.rstrip() for line in lines]


def header(where: dict[str, Any], state: dict[str, str]) -> list[str]:
    versions = where["versions"]
    if where["device"] == "cpu":
        return [f"attention on {where['threads']} threads of {where['cpu']}, torch {versions.get('torch')}"]
    driver = f"driver {state['driver_version']}, " if state else ""
    lines = [f"attention on {where['gpu']}, {driver}CUDA {versions['cuda']}, torch {versions.get('torch')}, cuDNN {versions['cudnn']}"]
    if state:
        lines.append(f"after the products {state['clocks.sm']} of {state['clocks.max.sm']}, {state['power.draw']} of {state['power.limit']}, "
                     f"{state['temperature.gpu']} °C")  # fmt: skip
    return lines


def draw(file: str, result: dict[str, Any]) -> None:
    """Draws TFLOP/s against S in the flash grid: a column for each head dimension, a row for each dtype and work, a line for each lane and matmul."""
    from matplotlib.figure import Figure

    found = [case for case in result["cases"] if case["grid"] == "flash" and case["tflops"]]
    if not found:
        say("nothing to draw: the plot shows the flash grid, and none of it was measured")
        return
    rows = list(dict.fromkeys((case["dtype"], case["work"]) for case in found))
    head_dims = list(dict.fromkeys(case["Dh"] for case in found))
    lanes = list(dict.fromkeys(lane for case in found for lane in case["tflops"]))
    matmul = {dtype: flops / 1e12 for dtype, flops in result["limits"]["matmul"].items()}
    slowest = min(told[0] for case in found for told in case["tflops"].values())
    figure = Figure(figsize=(1.2 + 4.2 * len(head_dims), 1.4 + 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(head_dims), squeeze=False, sharex=True, sharey="row")
    for (i, row), (j, Dh) in ((row, column) for row in enumerate(rows) for column in enumerate(head_dims)):
        dtype, _ = row
        panel(grid[i, j], [case for case in found if (case["dtype"], case["work"], case["Dh"]) == (*row, Dh)], lanes, matmul[dtype])
        grid[i, j].set_title(f"{dtype}, heads of {Dh}", fontsize=10)
        grid[i, j].tick_params(labelbottom=True)
        if slowest < max(matmul.values()) / 50:  # else the ladder's first rungs would be invisible at the bottom
            grid[i, j].set_yscale("log")
            grid[i, j].yaxis.set_major_formatter("{x:g}")
        else:
            grid[i, j].set_ylim(bottom=0)
    for axes, (_, work) in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(f"TFLOP/s, causal {work}")
    for axes in grid[-1]:
        axes.set_xlabel("tokens in a sequence, S")
    handles = dict(pair for axes in grid.flat for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3 if len(head_dims) == 1 else 5, frameon=False)
    figure.suptitle(result["machine"].get("gpu") or result["machine"]["cpu"])
    figure.savefig(file, dpi=150)


def panel(axes: Any, found: list[dict[str, Any]], lanes: list[str], matmul: float) -> None:
    """Draws our lanes as solid lines, torch's as dashed ones, each with its spread."""
    from matplotlib import colormaps

    for i, lane in enumerate(lanes):
        points = [(case["S"], *case["tflops"][lane]) for case in found if lane in case["tflops"]]
        if not points:
            continue
        S, middle_, low, high = zip(*points, strict=True)
        theirs = lane.startswith("torch ")
        colour = colormaps["tab10"](i)
        axes.plot(S, middle_, "--" if theirs else "-", marker="s" if theirs else "o", markersize=4, color=colour, label=lane)
        axes.fill_between(S, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(matmul, color="black", linewidth=1, linestyle=":", label="product of matrices")
    lengths = sorted({case["S"] for case in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{S // 1024}k" if S % 1024 == 0 else str(S) for S in lengths])
    axes.grid(alpha=0.3)
