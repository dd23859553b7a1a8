"""HF's published tables of OPT's speed, with one more column: opt-np bench hf-tables

HF's own model in the shape of opt-350m, with random weights in float16 and no padding; only its attention is exchanged. Training is a forward and a
backward pass of logits.sum(), with dropout; inference is generate() with HF's cache, its time per new token including the prompt's pass.
Each column is first compared with eager in float32, then timed, as HF does, by device events, kernel launches included; the columns are interleaved.
HF's diagrams, a forward pass of opt-2.7b and opt-350m against its length, are included as rows. Prints Markdown tables, then one line of JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from opt_fast.bench import say
from opt_fast.bench_attention import check_files, check_least, default_words, free_cached, keep, tell, wait, with_gpu
from opt_np.config import OPTConfig

TABLES = ("training", "inference", "diagrams")
MODELS = {"training": ("350m",), "inference": ("350m",), "diagrams": ("350m", "2.7b")}
TITLES = {"training": "Training", "inference": "Inference", "diagrams": "Forward pass"}
TIME = {"training": ("Time per batch", "s", 1.0), "inference": ("Per token latency", "ms", 1e3), "diagrams": ("Time", "ms", 1e3)}
# For each column, HF's name of the implementation of attention, and the only torch kernel that it may use.
COLUMNS: dict[str, dict[str, tuple[str, str | None]]] = {
    "cuda": {
        "eager": ("eager", None),
        "sdpa cudnn": ("sdpa", "CUDNN_ATTENTION"),
        "sdpa flash": ("sdpa", "FLASH_ATTENTION"),
        "ours": ("opt_fast", None),
    },
    "cpu": {"eager": ("eager", None), "sdpa": ("sdpa", None), "ours": ("opt_fast", None)},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"batches": (1, 2, 4, 8), "lengths": (128, 256, 512, 1024, 2048), "steps": 100},
    "cpu": {"batches": (1, 2), "lengths": (8, 16), "steps": 2},
}
NEW_TOKENS = {"cuda": 100, "cpu": 3}
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 128, "vocab_size": 512}  # a model for a CPU
PROJECTIONS = {"q_proj": 1.5, "k_proj": 1.0, "v_proj": 1.0, "out_proj": 1.0}  # scores of about 1.5: attention neither uniform nor all on one key
WARM_UP, WARM_BUDGET = 10, 2.0  # warm-up calls, and the seconds after which they stop; at least one
BUDGET = 3.0  # seconds that the calls of a cell may take together; at least MIN_STEPS calls
MIN_STEPS = 3
CHECKED = {"cuda": (2, 130), "cpu": (2, 13)}  # rows and tokens of the check
CACHED = 3  # the last of these tokens, which go through the cache one by one
ALLOWED = 3  # times the error of eager in float16, against eager in float32


def add_options(parser: Any) -> None:
    words = partial(default_words, DEFAULTS)
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda", help="cpu is for trying this command, on tiny models")
    parser.add_argument("--tables", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="rows of a batch; diagrams take the largest " + words("batches"))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="tokens of a row, or of a prompt " + words("lengths"))
    parser.add_argument("--steps", type=int, metavar="N", help=f"calls that count, fewer where they take {BUDGET:g} s together " + words("steps"))
    parser.add_argument("--seed", type=int, metavar="N", help="of weights and tokens (default: another one each time)")
    parser.add_argument("--plot", metavar="FILE", help="also draw the diagrams, as a .png, .svg or .pdf")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="also write the line of JSON there")


def run(what: str, device: str, tables: Iterable[str] | None = None, seed: int | None = None, plot: str | None = None, json_file: str | None = None,
        **asked: Any) -> None:  # fmt: skip
    """Runs the benchmark; batches, lengths and steps that are not in `asked` have the device's default.

    Raises ValueError for options that cannot be measured, and if a column's result differs from eager's.
    """
    options = DEFAULTS[device] | {key: value for key, value in asked.items() if value is not None}
    check_options(options, plot, json_file)
    need_device(device)
    from opt_fast import hf

    hf.register()
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    tables = [table for table in TABLES if table in (tables or TABLES)]
    result: dict[str, Any] = {"what": what, "seed": seed, "dtype": "float16", "machine": with_gpu(device), "new_tokens": NEW_TOKENS[device]}
    result |= {"options": options, "checks": {}, "tables": {table: [] for table in tables}}
    for size in dict.fromkeys(size for table in tables for model in [MODELS[table]] for size in model):
        say(f"making opt-{size}'s shape with random weights")
        model = build(size, device, seed)
        for table in [table for table in tables if size in MODELS[table]]:
            errors, left_out = check(table, size, model, device, seed)
            for name, reason in left_out.items():
                say(f"{name} is left out of {table}: {reason}")
            result["checks"].setdefault(table, {})[size] = errors
            for row in rows(table, size, model, left_out, device, seed, **options):
                result["tables"][table].append(row)
                keep(result, json_file)
        del model
        free_cached(device)
    tell(markdown(result), result, json_file)
    if plot:
        draw(plot, result)


def check_options(options: dict[str, Any], plot: str | None, json_file: str | None) -> None:
    most = OPTConfig().max_position_embeddings
    check_least({name: options[name] for name in ("batches", "lengths", "steps")})
    if max(options["lengths"]) > most:
        raise ValueError(f"--lengths is {max(options['lengths'])}; OPT has {most} positions")
    check_files(plot, json_file)


def need_device(device: str) -> None:
    if missing := [name for name in ("torch", "transformers") if not find_spec(name)]:
        raise ValueError(
            f"HF's model is measured, and {' and '.join(missing)} cannot be imported; pip install 'opt-np[bench]' brings what is missing"
        )
    from opt_fast import bench_attention

    bench_attention.need_device(device)
    try:
        import opt_fast.attention_cuda  # noqa: F401
    except ImportError as error:
        raise ValueError(f"our attention cannot be imported: {error}; pip install 'opt-np[cuda]' brings what it needs") from None


# ---- the models --------------------------------------------------------------------------------------------------------------------------


def where(device: str) -> Any:
    import torch

    return torch.device(device)


def shape(size: str, device: str) -> dict[str, Any]:
    keys = OPTConfig.from_size(size).to_dict()
    return keys if device == "cuda" else keys | TINY | {"word_embed_proj_dim": 32 if size == "350m" else TINY["hidden_size"]}


def build(size: str, device: str, seed: int) -> Any:
    """HF's OPT with random weights in float16; attention's are larger than HF's initialization, or it would hardly affect the logits."""
    import torch
    import transformers

    torch.manual_seed(seed)
    with where(device):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**shape(size, device)))
    width = model.config.hidden_size**-0.5  # standard deviation of weights that preserve the magnitude of their input
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for name, times in PROJECTIONS.items():
                getattr(layer.self_attn, name).weight.normal_(std=times * width)
    half: Any = torch.float16  # Any, as transformers' type hints for `to` expect the model here
    return model.to(half).eval()


@contextmanager
def attention(model: Any, device: str, name: str) -> Iterator[None]:
    """Inside, the model uses a column's attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    implementation, kernel = COLUMNS[device][name]
    model.set_attn_implementation(implementation)
    with sdpa_kernel(getattr(SDPBackend, kernel)) if kernel else nullcontext():
        yield


def tokens(model: Any, B: int, T: int, device: str, seed: int) -> Any:
    """->  (B, T)"""
    import torch

    rng = np.random.default_rng((seed, B, T))
    return torch.from_numpy(rng.integers(4, model.config.vocab_size, (B, T))).to(where(device))


# ---- the timed calls ---------------------------------------------------------------------------------------------------------------------


def train(model: Any, ids: Any) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    model(ids, use_cache=False).logits.sum().backward()  # its value overflows in float16; its gradient is 1 everywhere


def generate(model: Any, ids: Any, count: int) -> None:
    import torch
    import transformers

    length = {"max_new_tokens": count, "min_new_tokens": count}
    settings = transformers.GenerationConfig(**length, do_sample=False, eos_token_id=None, pad_token_id=1, bos_token_id=2)
    model.eval()
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def forward(model: Any, ids: Any) -> None:
    import torch

    model.eval()
    with torch.inference_mode():
        model(ids, use_cache=False)


def rows(table: str, size: str, model: Any, left_out: dict[str, str], device: str, seed: int, batches: Any, lengths: Any,
         steps: int) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A table's rows, one for each batch and length."""
    told = set()
    for B in batches if table != "diagrams" else [max(batches)]:
        for T in lengths:
            new = NEW_TOKENS[device] if table == "inference" else 0
            if T + new > model.config.max_position_embeddings:
                say(f"{table}: prompts of {T} are left out: {new} tokens more, and OPT has {model.config.max_position_embeddings} positions")
                continue
            say(f"timing {table}, opt-{size}, batch {B}, {T} tokens")
            ids = tokens(model, B, T, device, seed)
            jobs: dict[str, Any] = {"training": train, "inference": partial(generate, count=new), "diagrams": forward}
            calls: dict[str, Any] = {name: partial(jobs[table], model, ids) for name in COLUMNS[device] if name not in left_out}
            cells = measure(calls, model, device, steps) | {name: {"failed": reason} for name, reason in left_out.items()}
            for name, cell in cells.items():
                if name not in left_out and (reason := cell.get("failed", "OOM")) != "OOM" and (name, reason) not in told:
                    say(f"{name} is left out: {reason}")
                    told.add((name, reason))
            yield {"model": size, "batch": B, "length": T} | summary(cells, new or 1)


# ---- checking ----------------------------------------------------------------------------------------------------------------------------


def check(table: str, size: str, model: Any, device: str, seed: int) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """{column: {what: {"error": …, "allowed": …}}}, and why the other columns cannot run.

    Raises ValueError if a column's error against eager in float32 exceeds ALLOWED times that of eager in float16.
    """
    import copy

    import torch

    ids = tokens(model, *CHECKED[device], device, seed)
    exact = copy.deepcopy(model).float()
    with attention(exact, device, "eager"):
        truth = outcomes(table, exact, ids, seed)
    del exact
    found: dict[str, dict[str, dict[str, float]]] = {}
    left_out: dict[str, str] = {}
    for name in COLUMNS[device]:
        try:
            with attention(model, device, name):
                errors = {what: distance(what, a.float(), truth[what]) for what, a in outcomes(table, model, ids, seed).items()}
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if name == "eager" or not expected(name, error):
                raise
            left_out[name] = why(error)
            continue
        found[name] = {}
        for what, off in errors.items():
            allowed = ALLOWED * found["eager"].get(what, {"error": off})["error"]
            found[name][what] = {"error": off, "allowed": allowed}
            if not off <= allowed:
                raise ValueError(f"opt-{size}: {what} of {name} are off by {off:.2e} of the largest, and {allowed:.2e} is allowed, {ALLOWED} times "
                                 f"what eager is off in float16; the table of {table} was not timed")  # fmt: skip
    say(f"{table}, opt-{size}: {', '.join(found)} agree: {', '.join(truth)}")
    return found, left_out


def outcomes(table: str, model: Any, ids: Any, seed: int) -> dict[str, Any]:
    """Logits; for training also gradients of a sum of them, where dq, dk and dv arrive; for inference, logits through the cache, step by step."""
    import torch

    model.eval()
    with torch.no_grad():
        found = {"logits": model(ids, use_cache=False).logits}
        if table == "inference":
            step = model(ids[:, :-CACHED], use_cache=True)
            last = []
            for t in range(-CACHED, 0):
                step = model(ids[:, t : t + 1 or None], past_key_values=step.past_key_values, use_cache=True)
                last.append(step.logits)
            found["cached logits"] = torch.cat(last, 1)
    if table == "training":
        logits = model(ids, use_cache=False).logits
        weights = np.random.default_rng(seed).standard_normal(logits.shape, np.float32) / 16
        for name in list(PROJECTIONS)[:3]:
            mine = [getattr(layer.self_attn, name).weight for layer in model.model.decoder.layers]
            grads = torch.autograd.grad(logits, mine, torch.from_numpy(weights).to(logits), retain_graph=True)
            found[f"gradients of {name}"] = torch.stack(grads)
    return found


def distance(what: str, found: Any, truth: Any) -> float:
    """The relative error: of logits, the largest error over the largest logit; of gradients, whose magnitudes vary widely, in the vector norm."""
    if what.startswith("gradients"):
        return float((found - truth).norm() / truth.norm())
    return float((found - truth).abs().max() / truth.abs().max())


def expected(name: str, error: Exception) -> bool:
    """Whether an error only means that a column has no result: out of memory, or inputs that a torch kernel does not support."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (name.startswith("sdpa") and isinstance(error, RuntimeError))


def why(error: Exception) -> str:
    import torch

    return "OOM" if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0].rstrip(".")


# ---- timing ------------------------------------------------------------------------------------------------------------------------------


def measure(calls: dict[str, Callable[[], Any]], model: Any, device: str, steps: int) -> dict[str, dict[str, Any]]:
    """For each column {"seconds": of each call, "peak": bytes of memory} or {"failed": why}; the columns are interleaved."""
    cells: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak": None} for name in calls}
    left: dict[str, int] = {}
    for name, call in calls.items():
        if (found := attempt(name, partial(warm_up, call, model, device), model, device, cells)) is not None:
            cells[name]["peak"], estimate = found
            left[name] = min(steps, max(MIN_STEPS, int(BUDGET / estimate)))
    for i in range(steps):
        for name in [name for name, count in left.items() if i < count and "failed" not in cells[name]]:
            second = attempt(name, partial(seconds, calls[name], device), model, device, cells)
            cells[name].get("seconds", []).append(second)
    model.zero_grad(set_to_none=True)
    free_cached(device)
    return cells


def attempt(name: str, call: Callable[[], Any], model: Any, device: str, cells: dict[str, dict[str, Any]]) -> Any:
    """Returns the call's result with a column's attention; or None, with the reason in the column's cell."""
    import torch

    try:
        with attention(model, device, name):
            return call()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not expected(name, error):
            raise
        reason = why(error)
    cells[name] = {"failed": reason}
    wait(device)  # a persistent device error is raised again here, and ends the run
    model.zero_grad(set_to_none=True)
    free_cached(device)
    return None


def warm_up(call: Callable[[], Any], model: Any, device: str) -> tuple[int | None, float]:
    """Peak bytes of memory in the first call, weights included, and the approximate seconds of a call."""
    import torch

    model.zero_grad(set_to_none=True)
    free_cached(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = [seconds(call, device)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    while len(taken) < WARM_UP and sum(taken) < WARM_BUDGET:
        taken.append(seconds(call, device))
    return peak, max(min(taken), 1e-6)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, until the device is done."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait(device)
    start.record()
    call()
    end.record()
    wait(device)
    return start.elapsed_time(end) / 1e3


# ---- reporting ---------------------------------------------------------------------------------------------------------------------------


def summary(cells: dict[str, dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians, per token if there are several; and each column's advantage over eager in percent, computed as HF does: eager / column - 1."""
    told = {name: cell if "failed" in cell else cell | {"median": float(np.median(cell["seconds"])) / tokens} for name, cell in cells.items()}

    def over(key: str) -> dict[str, float]:
        known = {name: cell[key] for name, cell in told.items() if cell.get(key)}
        return {name: 100 * (known["eager"] / value - 1) for name, value in known.items() if name != "eager"} if "eager" in known else {}

    return {"cells": told, "speedup": over("median"), "saving": over("peak")}


def markdown(result: dict[str, Any]) -> list[str]:
    versions, machine_ = result["machine"]["versions"], result["machine"]
    names = list(COLUMNS[machine_["device"]])
    on = machine_["gpu"] if machine_["device"] == "cuda" else f"{machine_['threads']} threads of {machine_['cpu']}: to try this command, no result"
    lines = [f"HF transformers {versions.get('transformers')}, torch {versions.get('torch')}, float16, random weights, on {on}"]
    lines.append("Medians, columns in turns. Speedup and memory saving in %, as HF counts them: eager / column - 1. MB are 10^6 bytes.")
    for table, found in result["tables"].items():
        for size in dict.fromkeys(row["model"] for row in found):
            note = f", {result['new_tokens']} new tokens, the prompt's pass included" if table == "inference" else ""
            mine = [row for row in found if row["model"] == size]
            lines += ["", f"### {TITLES[table]}, opt-{size}{note}", "", *one_table(table, mine, names, machine_["device"] == "cuda")]
    return lines


def one_table(table: str, found: list[dict[str, Any]], names: list[str], memory: bool) -> list[str]:
    title, unit, times = TIME[table]
    others = names[1:]
    heads = ["batch_size", "seq_len", *(f"{title} ({name} - {unit})" for name in names), *(f"Speedup {name} (%)" for name in others)]
    heads += [*(f"{name} peak mem (MB)" for name in names), *(f"Mem saving {name} (%)" for name in others)] if memory else []
    lines = [heads]
    for row in found:
        cells = row["cells"]
        line = [str(row["batch"]), str(row["length"]), *(cell_told(cells[name], "median", times) for name in names)]
        line += [percent(row["speedup"], name, cells) for name in others]
        if memory:
            line += [*(cell_told(cells[name], "peak", 1e-6) for name in names), *(percent(row["saving"], name, cells) for name in others)]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return ["| " + " | ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in lines]


def cell_told(cell: dict[str, Any], key: str, times: float) -> str:
    if "failed" in cell:
        return "OOM" if cell["failed"] == "OOM" else "-"
    return f"{times * cell[key]:.3f}"


def percent(known: dict[str, float], name: str, cells: dict[str, dict[str, Any]]) -> str:
    """The advantage in percent; as in HF's tables, eager running out of memory counts as the advantage."""
    if name in known:
        return f"{known[name]:.3f}"
    return "Eager OOM" if cells["eager"].get("failed") == "OOM" and "failed" not in cells[name] else "-"


def draw(file: str, result: dict[str, Any]) -> None:
    """Draws milliseconds of a forward pass against its length: a panel for each model, a line for each column with its calls' interquartile range."""
    from matplotlib.figure import Figure

    found = result["tables"].get("diagrams", [])
    sizes = list(dict.fromkeys(row["model"] for row in found))
    if not sizes:
        say("nothing to draw: the plot shows the diagrams, and they were not asked for")
        return
    figure = Figure(figsize=(1 + 4.6 * len(sizes), 4.4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in found if row["model"] == size]
        panel(axes, mine, list(COLUMNS[result["machine"]["device"]]))
        axes.set_title(f"opt-{size}'s shape, batch {mine[0]['batch']}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"Forward pass of HF's OPT in float16 on {result['machine'].get('gpu') or result['machine']['cpu']}", fontsize=11)
    figure.savefig(file, dpi=150)


def panel(axes: Any, found: list[dict[str, Any]], names: list[str]) -> None:
    from matplotlib import colormaps

    for i, name in enumerate(names):
        cells = [(row["length"], row["cells"][name]) for row in found if "failed" not in row["cells"][name]]
        quarters = np.array([[1e3 * q for q in np.percentile(cell["seconds"], (25, 50, 75))] for _, cell in cells]).reshape(-1, 3)
        there = [length for length, _ in cells]
        style = {"eager": ":", "ours": "-"}.get(name, "--")
        axes.plot(there, quarters[:, 1], style, marker="o", markersize=4, color=colormaps["tab10"](i), label=name)
        axes.fill_between(there, quarters[:, 0], quarters[:, 2], color=colormaps["tab10"](i), alpha=0.2, linewidth=0)
    lengths = sorted({row["length"] for row in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in a row")
    axes.set_ylabel("ms of a forward pass")
    axes.grid(alpha=0.3)
