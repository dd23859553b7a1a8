"""Every step of a forward pass in order: its name, equation, shape, FLOPs, bytes, a checksum and its values; and where two passes first differ.

Work is counted while the model runs, from the arrays that each operation takes and returns; `costs.py` has the same counts in closed form. A step
computes something. A point of taps.py that only repeats a value, as a block's input repeats the previous block's output, is not a step.

    ours = record(model, ids)                            # print(table(ours)) shows it
    compare(ours, record(other, ids)).first              # the first step at which another backend, dtype or implementation differs
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from opt_np import costs, taps
from opt_np import model as modelling
from opt_np.arrays import as_kind, host, size
from opt_np.model import Tap

ALLOWED = {"float64": 1e-10, "float32": 1e-4}  # relative to a step's largest value: rounding stays far below this


class Step(NamedTuple):
    """One step; in a PyTorch pass, where nothing can be counted, FLOPs and bytes are 0."""

    name: str
    equation: str
    shape: tuple[int, ...]
    dtype: str
    flops: int
    weights: int  # bytes of weights read
    read: int  # bytes of activations read
    written: int
    checksum: str  # CRC-32 of the values, in C order
    value: np.ndarray | None

    @property
    def bytes(self) -> int:
        return self.weights + self.read + self.written

    def __repr__(self) -> str:
        return f"Step({self.name}: {self.equation}, {self.dtype}{self.shape}, {self.flops} FLOP, {self.bytes} bytes, {self.checksum})"


def record(model: Any, input_ids: Any, attention_mask: Any = None, cache: Any = None, fused: bool = False, values: bool = True,
           tap: Tap | None = None, logits_to_keep: int = 0) -> list[Step]:  # fmt: skip
    """The steps of a language model's pass, run with unfused operations; with fused=True as it runs normally, without the residual sums.

    input_ids: (B, T);  attention_mask: (B, S)

    values=False keeps checksums only. cache: a KVCache, which grows. tap: runs first, and may replace values (see taps.hooked). Raises ValueError.
    """
    if tap and fused:
        raise ValueError("the fused operations have nothing to tap inside; leave fused or tap out")
    recorder: Any = Recorder(model.ops, model.config, values, tap)
    seen = modelling.no_tap if fused else recorder.tap
    if fused:
        recorder.names = fused_names(model.config)
    modelling.forward(model.params, input_ids, model.config, cache, attention_mask, recorder, logits_to_keep=logits_to_keep, tap=seen)
    return recorder.steps


def fused_names(cfg: Any) -> list[str]:
    """The points that the fused operations of an untapped pass compute, in order, by their names in taps.py."""
    hidden = ("attn_scores", "attn_weights", "fc1", "activation_fn", "resid_pre", "resid_mid", "resid_post")
    layers = {taps.LAYER.format(i=i) for i in range(cfg.num_hidden_layers)}
    return [name for name in taps.names(cfg) if not name.endswith(hidden) and name not in layers]


class Recorder:
    """Wraps a backend: counts what each operation reads and writes, and records it as a Step once the tap, or `names`, names it."""

    def __init__(self, ops: Any, cfg: Any, values: bool, tap: Tap | None) -> None:
        self.ops, self.cfg, self.values, self.outer = ops, cfg, values, tap
        self.steps: list[Step] = []
        self.names: list[str] | None = None  # of fused operations, in order
        self.work: Work | None = None  # of the latest operation, until the tap names it
        self.latest: dict[str, Any] = {}  # the latest values, by the last part of their names: inputs of `sum_or_product`

    def __getattr__(self, name: str) -> Any:
        if name not in WORK:  # above all the backend's own fused `decoder`, which is many steps
            raise AttributeError(name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.ops, name)(*args, **kwargs)
            self.work = WORK[name](result, *args, **kwargs)
            if self.names:
                self.note(self.names.pop(0), result, self.work)
            return result

        return noted

    def tap(self, name: str, value: Any) -> Any:
        value = self.outer(name, value) if self.outer else value
        stage = name.rpartition(".")[2]
        work, self.work = self.work or self.sum_or_product(stage, value), None
        if work:
            self.note(name, value, work)
        self.latest[stage] = value
        return value

    def sum_or_product(self, stage: str, value: Any) -> Work | None:
        """The work that model.py does without `ops`: residual sums, and attention weights times values. None for a repeated value."""
        at = self.latest
        if stage == "attn_output":
            P, O = at["attn_weights"], value
            keys = P.shape[0] * P.shape[-1] * O.shape[2] * O.shape[3] * O.dtype.itemsize
            return Work(2 * seen_pairs(at["attn_scores"]) * O.shape[-1], 0, P.nbytes + keys, O.nbytes)
        if stage == "resid_mid":
            return Work(size(value), 0, nbytes(value, at["self_attn"]), value.nbytes)
        if stage == "resid_post":
            return Work(size(value), 0, nbytes(value, at["fc2"]), value.nbytes)
        if stage == "resid_pre" and "resid_pre" not in at:  # later ones repeat the previous block's output
            return Work(size(value), 0, nbytes(value, at["embed_positions"]), value.nbytes)
        return None

    def note(self, name: str, value: Any, work: Work) -> None:
        array = host(value)
        equation = costs.equation(name, self.cfg, fused=self.names is not None)
        self.steps.append(Step(name, equation, tuple(array.shape), array.dtype.name, *work, checksum(array), array.copy() if self.values else None))


class Work(NamedTuple):
    """The work of an operation: FLOPs, bytes of weights read, bytes of activations read, and bytes written."""

    flops: int
    weights: int
    read: int
    written: int


def embed_work(y: Any, ids: Any, weight: Any, scale: Any = None, columns: Any = None) -> Work:
    """Only the rows that are looked up are read."""
    rows = size(ids) * sum(nbytes(a) // a.shape[0] for a in (weight, scale) if a is not None)
    return Work(0, rows, ids.nbytes, y.nbytes)


def linear_work(y: Any, x: Any, weight: Any, bias: Any = None, scale: Any = None, columns: Any = None) -> Work:
    """A multiplication and an addition for each element of the matrix and each row of x; the bias is one more addition per output."""
    return Work(size(y) * (2 * x.shape[-1] + (bias is not None)), nbytes(weight, bias, scale, columns), x.nbytes, y.nbytes)


def layer_norm_work(y: Any, x: Any, weight: Any = None, bias: Any = None) -> Work:
    """Sums, differences, squares and the quotient; weight and bias if there are any."""
    D = x.shape[-1]
    flops = size(x) // D * ((7 if weight is not None else 5) * D + 5)
    return Work(flops, nbytes(weight, bias), x.nbytes, y.nbytes)


def activation_work(y: Any, x: Any, function: str) -> Work:
    """costs.ACTIVATION gives the FLOPs per element."""
    return Work(size(x) * costs.ACTIVATION[function], 0, x.nbytes, y.nbytes)


def scores_work(y: Any, q: Any, k: Any, scale: float, layout: Any = None) -> Work:
    """q is scaled, and each query is multiplied by the keys that it sees."""
    return Work(size(q) + 2 * seen_pairs(y) * q.shape[-1], 0, q.nbytes + k.nbytes, y.nbytes)


def softmax_work(P: Any, scores: Any) -> Work:
    """For each visible score: maximum, difference, exponential, sum, quotient; and two FLOPs for each query."""
    return Work(5 * seen_pairs(scores) + 2 * size(scores) // scores.shape[-1], 0, scores.nbytes, P.nbytes)


def attention_work(O: Any, q: Any, k: Any, v: Any, scale: float, layout: Any = None) -> Work:
    """Scores, softmax and weights times values as one step, without the arrays between them."""
    (B, T, H, Dh), S = q.shape, k.shape[1]
    sees = np.broadcast_to(np.tri(T, S, S - T, bool), (B, T, S))
    visible = getattr(layout, "visible", None)
    pairs = H * int((sees if visible is None else sees & visible[:, None]).sum())
    flops = size(q) + 4 * pairs * Dh + 5 * pairs + 2 * B * H * T
    return Work(flops, 0, q.nbytes + k.nbytes + v.nbytes, O.nbytes)


def mlp_work(y: Any, h: Any, fc1: dict, fc2: dict, function: str) -> Work:
    """fc1, activation and fc2 as one step."""
    u = np.broadcast_to(np.zeros(1, f"V{h.dtype.itemsize}"), (*h.shape[:-1], fc1["weight"].shape[0]))
    parts = linear_work(u, h, **fc1), activation_work(u, u, function), linear_work(y, u, **fc2)
    return Work(sum(p.flops for p in parts), sum(p.weights for p in parts), h.nbytes, y.nbytes)


WORK: dict[str, Callable[..., Work]] = {
    "embed": embed_work, "linear": linear_work, "layer_norm": layer_norm_work, "activation": activation_work, "attention_scores": scores_work,
    "softmax": softmax_work, "attention": attention_work, "mlp": mlp_work,
}  # fmt: skip


def seen_pairs(scores: Any) -> int:
    """The number of pairs of a query and a key that it sees: scores that are not -inf.  scores: (B, H, T, S)"""
    return int((host(scores) != -math.inf).sum())


def nbytes(*arrays: Any) -> int:
    """The total bytes of several arrays, which may be a backend's packed matrices; None counts as 0."""
    return sum(int(a.nbytes) for a in arrays if a is not None)


def checksum(array: np.ndarray) -> str:
    """The CRC-32 of an array's values, in C order."""
    return f"{zlib.crc32(np.ascontiguousarray(array).data):08x}"


# Looking at a trace


def table(steps: list[Step]) -> str:
    """The steps, one per line, and their totals."""
    width, wide = max(len(short(step.name)) for step in steps), max(len(step.equation) for step in steps)
    form = f"{{:<{width}}}  {{:<{wide}}}  {{:<16}}  {{:<8}}  {{:>10}}  {{:>10}}  {{:>10}}  {{}}"
    lines = [form.format("step", "equation", "shape", "dtype", "MFLOP", "weights KB", "others KB", "checksum")]
    for s in steps:
        counts = f"{s.flops / 1e6:.3f}", f"{s.weights / 1e3:.1f}", f"{(s.read + s.written) / 1e3:.1f}"
        lines.append(form.format(short(s.name), s.equation, "×".join(map(str, s.shape)), s.dtype, *counts, s.checksum))
    return "\n".join([*lines, total(steps)])


def total(steps: list[Step]) -> str:
    """The totals of all steps, in words."""
    flops, weights, all_bytes = (sum(column) for column in zip(*((s.flops, s.weights, s.bytes) for s in steps), strict=True))
    others = (all_bytes - weights) / 1e6
    return f"{len(steps)} steps, {flops / 1e6:.1f} MFLOP, {weights / 1e6:.2f} MB of weights read, {others:.2f} MB read and written besides"


def short(name: str) -> str:
    """A step's name without the decoder's prefix."""
    return name.removeprefix(f"{taps.DECODER}.")


# Where two traces first differ


class Difference(NamedTuple):
    """A step's largest difference over its largest value; inf if shapes differ, unequal values are not finite, or bare checksums differ."""

    name: str
    error: float
    a: Step
    b: Step


class Comparison(NamedTuple):
    """The steps that both traces have, in order; the first whose difference is more than allowed; and the steps that only one trace has."""

    rows: list[Difference]
    first: Difference | None
    allowed: float
    only_a: list[str]
    only_b: list[str]

    def __str__(self) -> str:
        width = max(len(short(row.name)) for row in self.rows)
        lines = [f"{'step':<{width}}  {'difference':>10}  equation"]
        for row in self.rows:
            mark = "  <- first to differ" if self.first and row.name == self.first.name else ""
            lines.append(f"{short(row.name):<{width}}  {row.error:>10.1e}  {row.a.equation or row.b.equation}{mark}")
        lines += [f"only in the first: {stages(self.only_a)}"] if self.only_a else []
        lines += [f"only in the second: {stages(self.only_b)}"] if self.only_b else []
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        compared = f"{len(self.rows)} steps compared, {self.allowed:.0e} of a step's largest value allowed"
        if not self.first:
            return f"{compared}: none differs"
        a, b = self.first.a, self.first.b
        sizes = math.prod(a.shape) == math.prod(b.shape)
        return f"{compared}: the first to differ is {short(self.first.name)}, " + (
            f"by {self.first.error:.1e}" if sizes else f"{a.shape} and {b.shape}"
        )

    @property
    def worst(self) -> Difference:
        """The step that differs most."""
        return max(self.rows, key=lambda row: row.error)


def stages(names: list[str]) -> str:
    """The names for a message: a step of a layer without the layer, and each only once."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] if ".layers." in name else short(name) for name in names))


def compare(a: list[Step], b: list[Step], allowed: float | None = None) -> Comparison:
    """Compares two traces of one input, step by step: of two backends, dtypes, quantisations or implementations, or with and without hooks.

    allowed: the difference, relative to a step's largest value, that still counts as rounding; by default ALLOWED of the coarser dtype; 0 requires
    equality. Between backends int8 and int4 need 1e-3, because kernels round their inputs to 16 bits.
    Traces without values are compared by checksum. Raises ValueError for traces that have no step in common, or that are of different inputs.
    """
    if not a or not b:
        raise ValueError("there is nothing to compare: a trace is empty")
    others = {step.name: step for step in b}
    common = [(step, others[step.name]) for step in a if step.name in others]
    if not common:
        raise ValueError(f"the traces share no step: one begins with {a[0].name}, the other with {b[0].name}")
    if common[0][0].shape[:2] != common[0][1].shape[:2]:
        raise ValueError(f"the traces are of different inputs: {common[0][0].name} is {common[0][0].shape} in one, {common[0][1].shape} in the other")
    if allowed is None:
        allowed = max(ALLOWED.get(step.dtype, ALLOWED["float32"]) for pair in common for step in pair)
    rows = [Difference(x.name, difference(x, y), x, y) for x, y in common]
    names = {step.name for step in a}
    first = next((row for row in rows if not row.error <= allowed), None)
    return Comparison(rows, first, allowed, [s.name for s in a if s.name not in others], [s.name for s in b if s.name not in names])


def record_each(model: Any, exact: Any, input_ids: Any, **how: Any) -> list[Step]:
    """The steps of `model` when each block is given the input of the same block of `exact`: shows what each block alone adds to a difference.

    input_ids: (B, T)        Raises ValueError.
    """
    _, given = taps.run_with_cache(exact, input_ids, lambda name: name.endswith(".resid_pre"), attention_mask=how.get("attention_mask"))

    def tap(name: str, value: Any) -> Any:
        return as_kind(host(given[name]), value) if name in given.keys() else value  # noqa: SIM118  (of paths, not of aliases)

    return record(model, input_ids, tap=tap, **how)


def difference(a: Step, b: Step) -> float:
    """The largest difference over the largest finite value of `a`; equal infinities, the scores of hidden keys, count as equal."""
    if a.value is None or b.value is None:
        return 0.0 if a.checksum == b.checksum else math.inf
    x, y = a.value.astype(np.float64), b.value.astype(np.float64)
    if x.size == size(y):
        y = y.reshape(x.shape)  # PyTorch has the heads concatenated
    elif x.ndim != y.ndim or any(m != n and 1 not in (m, n) for m, n in zip(x.shape, y.shape, strict=True)):
        return math.inf  # only position embeddings may differ in shape: (1, T, D) for all rows, or (B, T, D)
    x, y = np.broadcast_arrays(x, y)
    apart = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not apart.any():
        return 0.0
    if not np.isfinite(x[apart]).all() or not np.isfinite(y[apart]).all():
        return math.inf
    largest = np.abs(x[np.isfinite(x)]).max()
    return float(np.abs(x[apart] - y[apart]).max() / largest) if largest else math.inf


# PyTorch's steps


def record_torch(oracle: Any, input_ids: Any, attention_mask: Any = None) -> list[Step]:
    """The steps for which Hugging Face's OPTForCausalLM has a module, recorded by hooks; FLOPs and bytes are not counted.

    input_ids: (B, T);  attention_mask: (B, T)        Raises ValueError for another kind of model.
    """
    import torch

    steps: list[Step] = []

    def keep(name: str, value: Any) -> None:
        if name.rpartition(".")[2].isdigit():  # a block: its output is that of its last step
            return
        value = value[0] if isinstance(value, tuple) else value
        array = value.detach().cpu().to(value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32).numpy().copy()
        steps.append(Step(name, "", tuple(array.shape), str(value.dtype).removeprefix("torch."), 0, 0, 0, 0, checksum(array), array))

    if taps.LAYER.format(i=0) not in dict(oracle.named_modules()):
        raise ValueError(f"{type(oracle).__name__} is no OPTForCausalLM of transformers: it has no {taps.LAYER.format(i=0)}")
    with hooks_on(oracle, keep), torch.inference_mode():
        oracle(torch.as_tensor(np.asarray(input_ids)), attention_mask=None if attention_mask is None else torch.as_tensor(np.asarray(attention_mask)))
    return steps


@contextmanager
def hooks_on(oracle: Any, keep: Callable[[str, Any], None]) -> Iterator[None]:
    """While the context lasts, calls keep(name, value) after every block and module that is a step, and before the first block and out_proj."""
    stages = {name for name in costs.EQUATIONS if name not in ("attn_scores", "attn_weights", "attn_output", "resid_pre", "resid_mid", "resid_post")}
    first, handles = taps.LAYER.format(i=0), []
    for path, module in oracle.named_modules():
        stage = path.rpartition(".")[2]
        if stage == "out_proj":
            at = path.replace("out_proj", "attn_output")
            handles.append(module.register_forward_pre_hook(lambda _, given, at=at: keep(at, given[0])))
        elif stage in stages or stage.isdigit():  # layers.3
            handles.append(module.register_forward_hook(lambda _, given, value, at=path: keep(at, value)))
        if path == first:
            handles.append(module.register_forward_pre_hook(
                lambda _, given, named: keep(f"{first}.resid_pre", given[0] if given else named["hidden_states"]), with_kwargs=True))  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
