"""Will it fit, and how long will it take: memory, FLOPs, bytes and time of a generation, from the config alone.

Memory is that of this package's backends; tests/measure_plan.py compares it with what processes take. Time is a lower bound: the slower of
arithmetic and memory traffic, each at the machine's peak.
"""

from __future__ import annotations

from typing import NamedTuple

from opt_np import costs
from opt_np.config import OPTConfig, parameter_shapes
from opt_np.ops import QUERY_BLOCK
from opt_np.quantize import is_quantized_matrix

GB = 1e9
# Memory that malloc retains of freed temporary arrays, as measured: bytes, and for int8 and int4 a share of the weights.
SLACK = {"float64": 25_000_000, "float32": 25_000_000, "float16": 0, "bfloat16": 0}
WHOLE_SLACK = {"int8": 0.05, "int4": 0.13}
KEPT = 2**25  # bytes: malloc returns larger arrays to the system as soon as they are freed
HUGE_PAGE = 2**21  # bytes that Linux hands out at once for large arrays
# Published by the manufacturer: bytes of memory, bytes/s, and FLOP/s of dense products in 16 bits and in float32.
DEVICES = {"h200": (141e9, 4.8e12, 989e12, 67e12), "h100": (80e9, 3.35e12, 989e12, 67e12)}


class Memory(NamedTuple):
    """Bytes: the weights as the backend holds them; the KV cache of all tokens, and the part of it that is in use once the prompt is read; the most
    that is allocated besides while the prompt is read; the most besides the weights while they are loaded; and what is lost to malloc.

    Python and its libraries, some 100 MB, are not counted.
    """

    weights: int
    cache: int
    prompt_cache: int
    working: int
    loading: int
    slack: int

    @property
    def peak(self) -> int:
        return self.weights + max(self.loading, self.prompt_cache + self.working, self.cache) + self.slack


class Work(NamedTuple):
    """The work of one pass or several: FLOPs, and the bytes that are read from and written to memory."""

    flops: int
    bytes: int

    def seconds(self, bandwidth: float, flops: float) -> float:
        """The time that memory at `bandwidth` bytes/s or arithmetic at `flops` FLOP/s takes, whichever is longer."""
        return max(self.bytes / bandwidth, self.flops / flops)


def memory(cfg: OPTConfig, batch: int, prompt: int, gen: int, dtype: str = "float32", kind: str | None = None, backend: str = "numpy",
           cache_number: int = 4) -> Memory:  # fmt: skip
    """What a generating process needs; assumes 16-bit weight files with the embeddings first, as Meta's are (if they come last, loading takes more).

    NumPy dequantises an int8 or int4 matrix to float32 at each use, and its activation needs a second array. The CPU backend packs each matrix after
    all were read; its KV cache is stored layer after layer, for each of which the system hands out memory in large pages.
    """
    number = max(costs.BYTES[dtype], 4)
    D, F, N = cfg.hidden_size, cfg.ffn_dim, batch * prompt * number
    largest = max(shape[0] * shape[1] for name, shape in parameter_shapes(cfg).items() if len(shape) == 2 and is_quantized_matrix(name, 2))
    scores = batch * cfg.num_attention_heads * min(QUERY_BLOCK, prompt) * prompt * number
    if backend == "numpy":
        made = {None: 0, "int8": 4, "int4": 12}[kind]  # bytes per element of the matrix in use
        working = max(N * (4 * D + 2 * F) + made * D * F, N * 6 * D + scores, made * largest)
    else:
        working = N * (5 * D + F)
    working += 3 * batch * cfg.vocab_size * number
    one = costs.matrix_bytes((1, largest), costs.BYTES[dtype], kind)
    loading = one + min(one, KEPT) if kind else 0 if backend == "numpy" else one  # quantised in parts, which are then joined; else packed
    cache, of_prompt = (costs.cache_bytes(cfg, batch, tokens, 8 if dtype == "float64" else cache_number) for tokens in (prompt + gen, prompt))
    touched = cache if backend == "numpy" else min(cache, of_prompt + 2 * cfg.num_hidden_layers * HUGE_PAGE)
    weights = costs.weight_bytes(cfg, dtype, kind)
    slack = int(WHOLE_SLACK[kind] * weights) if kind else SLACK[dtype]
    return Memory(weights, cache, touched, working, loading, slack)


def prefill(cfg: OPTConfig, batch: int, prompt: int, dtype: str = "float32", kind: str | None = None, number: int | None = None) -> Work:
    """Reading the prompt, up to the logits of the first new token: a whole pass. `generate` skips the part of the last block that no logit needs.

    number: bytes per computed value.
    """
    return work(costs.steps(cfg, batch, prompt, 0, dtype, kind, fused=True, logits_to_keep=1, number=number))


def decode(cfg: OPTConfig, batch: int, prompt: int, gen: int, dtype: str = "float32", kind: str | None = None, number: int | None = None) -> Work:
    """The gen - 1 steps after the prompt, one token per row: costs grow linearly with the context, so the mean of first and last is that of all."""
    if gen < 2:
        return Work(0, 0)
    ends = [work(costs.steps(cfg, batch, 1, past, dtype, kind, fused=True, number=number)) for past in (prompt, prompt + gen - 2)]
    return Work(*((gen - 1) * (first + last) // 2 for first, last in zip(*ends, strict=True)))


def work(steps: list[costs.Cost]) -> Work:
    """The totals of some steps."""
    return Work(sum(step.flops for step in steps), sum(step.bytes for step in steps))


def checked(cfg: OPTConfig, batch: int, prompt: int, gen: int) -> None:
    """Raises ValueError for sizes that are out of range or exceed the model's positions."""
    for name, value in (("batch", batch), ("prompt", prompt), ("gen", gen)):
        if not 1 <= value <= 1_000_000:
            raise ValueError(f"{name} is {str(value)[:12]}; it is from 1 to 1000000")
    fits = cfg.max_position_embeddings + 1 - prompt
    if gen > fits:
        way = f"the last new token needs none: ask for at most {fits}" if fits > 0 else f"shorten the prompt to at most {cfg.max_position_embeddings}"
        raise ValueError(f"a prompt of {prompt} tokens and {gen} new ones outgrow this model's {cfg.max_position_embeddings} positions; {way}")


def available() -> float | None:
    """Bytes that this machine could give to a new process now; None if the system does not report it."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def report(cfg: OPTConfig, batch: int, prompt: int, gen: int, dtype: str, kind: str | None, backend: str, room: float | None, bandwidth: float,
           flops: float, where: str, cache_number: int = 4) -> str:  # fmt: skip
    """The plan as text. room: bytes to fit into; bandwidth: bytes/s; flops: FLOP/s; where: the machine that has these."""
    m = memory(cfg, batch, prompt, gen, dtype, kind, backend, cache_number)
    first, rest = prefill(cfg, batch, prompt, dtype, kind, cache_number), decode(cfg, batch, prompt, gen, dtype, kind, cache_number)
    t_first, t_rest = first.seconds(bandwidth, flops), rest.seconds(bandwidth, flops)
    each = t_rest / max(gen - 1, 1)
    most = "while loading" if m.loading > max(m.prompt_cache + m.working, m.cache) else "while generating"
    lines = [
        f"parameters   {costs.parameters(cfg):,}; {batch} × ({prompt} + {gen}) tokens, memory as of backend {backend}",
        f"weights      {m.weights / GB:.3f} GB in {kind or dtype}",
        f"cache        {m.cache / GB:.3f} GB: {batch} × {prompt + gen} tokens, {costs.cache_bytes(cfg, 1, 1, cache_number) / 1024:.0f} KiB each",
        f"working      {m.working / GB:.3f} GB while the prompt is read, {m.loading / GB:.3f} GB while loading; {m.slack / GB:.3f} GB lost to malloc",
        f"peak         {m.peak / GB:.3f} GB, {most}" + ("" if room is None else f", of {room / GB:.1f} GB: {fits(m, room)}"),
        f"prefill      {first.flops / 1e9:.1f} GFLOP, {first.bytes / GB:.3f} GB moved: at least {duration(t_first)} to the first token",
    ]
    if gen > 1:
        per_step = f"{rest.flops / (gen - 1) / 1e9:.3f} GFLOP, {rest.bytes / (gen - 1) / GB:.3f} GB moved a step"
        rows = f", all {batch} rows together" if batch > 1 else ""
        lines.append(f"decode       {per_step}: at least {duration(each)} a step, at most {batch / each:.1f} tokens/s{rows}")
    return "\n".join([*lines, f"in all       at least {duration(t_first + t_rest)}, at {where}"])


def fits(m: Memory, room: float) -> str:
    """Whether it fits into `room` bytes, and if not, what would help."""
    if m.peak <= room:
        return "fits"
    if max(m.cache, m.prompt_cache + m.working) + m.slack < room:
        return "does not fit; read its layers anew at every pass (--stream-layers), or choose int8, int4, or a smaller model"
    return "does not fit, even without its weights; choose a smaller batch or fewer tokens"


def duration(seconds: float) -> str:
    """A time as text."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
