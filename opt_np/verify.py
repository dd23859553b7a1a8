"""Checks, on the user's own machine, that this port computes the same as the original for their model.

First against PyTorch, if it is installed: the tensors as Hugging Face loads them; then every point (named activation) of the forward pass in float64,
so that the first one to differ has a name; then the rounding of float32. Then, for a known model, against published results, in golden.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt_np import hub, model
from opt_np.checkpoint import CheckpointError, few
from opt_np.classes import OPTForCausalLM, choose_backend
from opt_np.config import OPTConfig
from opt_np.kv_cache import KVCache
from opt_np.ops import QUERY_BLOCK
from opt_np.trace import hooks_on
from opt_np.tree import flatten

GOLDEN = Path(__file__).with_name("golden.json")
PASS, FAIL, NOT_RUN = "pass", "FAIL", "not run"
LOADING, LAYERS, WHOLE, ROUNDING, PUBLISHED = "the tensors", "layer by layer", "as it runs, untapped", "rounding", "published numbers"
INSTALL = 'pip install "torch>=2.6" transformers==5.23.0'
# Largest difference over a point's largest value: in float64 rounding errors are far smaller, and mistakes in a formula far larger.
ALLOWED = {"float64": 1e-10, "float32": 1e-4}
# Points that have a name on both sides; a port may tap more. attn_output is out_proj's input, self_attn its output.
STAGES = ("embed_tokens", "embed_positions", "project_in", "self_attn_layer_norm", "q_proj", "k_proj", "v_proj", "attn_output", "self_attn",
          "final_layer_norm", "fc1", "activation_fn", "fc2", "project_out", "lm_head")  # fmt: skip
FREE = ("embed_tokens", "embed_positions", "q_proj", "k_proj", "v_proj")  # these may run in any order
LAYER_0 = "model.decoder.layers.0"
EMBEDDED = f"{LAYER_0} (its input)"  # token plus position embeddings: no module outputs it
LAST, LOGITS = "last hidden state", "logits"
LAYER = re.compile(r"model\.decoder\.layers\.\d+")
HF_READS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Check(NamedTuple):
    """One comparison: what was measured, what is allowed, and PASS, FAIL or NOT_RUN."""

    group: str
    name: str
    measured: float | None
    allowed: float | None
    verdict: str
    note: str = ""


class Case(NamedTuple):
    """One batch; if it has several chunks, they run in order with a KV cache."""

    name: str
    ids: np.ndarray  # (B, S)
    mask: np.ndarray | None  # (B, S)
    chunks: list[slice]

    def seen(self, chunk: slice) -> np.ndarray | None:
        """The mask for a chunk: past and new tokens.  -> (B, past + T)"""
        return None if self.mask is None else self.mask[:, : chunk.stop]

    def real(self, chunk: slice) -> np.ndarray:
        """Which of a chunk's tokens are real: pads are not compared.  -> (B, T) bool"""
        return np.ones(self.ids[:, chunk].shape, bool) if self.mask is None else self.mask[:, chunk] != 0


class Run(NamedTuple):
    """What one implementation computed for a case: for each chunk the values by name, in the order computed; and the error that ended it, if any."""

    points: list[dict[str, np.ndarray]]
    stopped: str = ""


class Difference(NamedTuple):
    """How far a point is off, and a note about it."""

    error: float  # relative to the largest value; inf: nothing to compare, or not finite
    note: str = ""


def verify(name: str | Path, revision: str | None = None, backend: str = "numpy", golden: str | None = None) -> list[Check]:
    """Every check of a model (a folder or a hub id); `golden` names the published model of which a folder is an unchanged copy.

    Raises CheckpointError and ValueError for what cannot be loaded at all. Sources: transformers' OPTForCausalLM; golden.json.
    """
    return list(checks(name, revision, backend, golden))


def checks(name: str | Path, revision: str | None = None, backend: str = "numpy", golden: str | None = None) -> Iterator[Check]:
    """As `verify`, one check at a time. Holds the model in float32 and in float64 (12 bytes per parameter), which PyTorch shares."""
    backend, entries = choose_backend(backend), read_golden()["entries"]
    known = list(dict.fromkeys(entry["model"] for entry in entries))
    if golden is not None and golden not in known:
        raise ValueError(f"nothing is published here for {golden!r}; golden is one of {', '.join(known)}")
    ours = load(name, revision, "float32", backend)
    check_known_to_pytorch(name, ours.config)
    yield from against_pytorch(name, revision, backend, ours)
    published = golden or (str(name) if hub.is_hub_id(name) and str(name) in known else None)
    if published is None:
        yield Check(PUBLISHED, "published numbers", None, None, NOT_RUN, hint(ours.config.extra.get("_name_or_path"), known))
    for entry in entries:
        if entry["model"] == published:
            yield against_golden(entry, ours, lambda: decoder_of_ids(name, revision))


def load(name: str | Path, revision: str | None, dtype: str, backend: str) -> OPTForCausalLM:
    """The language model."""
    return OPTForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, backend=backend)


def check_known_to_pytorch(name: Any, cfg: OPTConfig) -> None:
    """Raises ValueError for quantised weights."""
    if cfg.quantized:
        raise ValueError(f"{name} is {cfg.quantized[0]}, a format of our own that PyTorch does not know; take the checkpoint that it was made from")


def hint(origin: Any, known: list[str]) -> str:
    """Why no published result was compared. A fine-tune's config.json keeps the name of its original, so the name alone proves nothing."""
    if origin in known:
        return f"config.json names {origin}; for an unchanged copy of it, add --golden {origin}"
    return "none for this model; for an unchanged copy of one of Meta's, add --golden facebook/opt-…"


# Against PyTorch


def against_pytorch(name: str | Path, revision: str | None, backend: str, ours: OPTForCausalLM) -> Iterator[Check]:
    """The checks of tensors, points, logits and rounding; if PyTorch is not installed, one check that reports this."""
    try:
        torch, transformers = oracle_libraries()
    except ImportError as error:
        yield Check(LAYERS, "comparison with PyTorch", None, None, NOT_RUN, str(error))
        return
    source, inputs = hub.find(name, revision, tokenizer=False), cases(ours.config)
    with quiet(transformers):
        plain = ours if backend == "numpy" else load(name, revision, "float32", "numpy")
        yield loading(torch, transformers, source, plain.params)
        exact = load(name, revision, "float64", "numpy")
        try:
            rounded = [ends(run) for run in run_pytorch(torch, pytorch_model(torch, transformers, source.config, plain.params), inputs)]
            theirs = run_pytorch(torch, pytorch_model(torch, transformers, source.config, exact.params), inputs)
        except Exception as error:  # they may raise anything, if they read config.json as another model than we do
            reason = f"transformers {transformers.__version__} cannot run config.json with our tensors: {type(error).__name__}: {first_line(error)}"
            yield Check(LAYERS, "comparison with PyTorch", None, None, FAIL, reason)
            return
    tested, allowed = (exact, ALLOWED["float64"]) if backend == "numpy" else (ours, ALLOWED["float32"])
    yield from compared(LAYERS, inputs, (run_tapped(tested, case) for case in inputs), theirs, allowed)
    exactly = [ends(run) for run in theirs]
    yield from compared(WHOLE, inputs, (run_whole(tested, case) for case in inputs), exactly, allowed)
    yield rounding(inputs, [run_whole(ours, case) for case in inputs], rounded, exactly)


def oracle_libraries() -> tuple[Any, Any]:
    """torch and transformers. Raises ImportError with the command to install them, if they are missing or a version known to be wrong."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}. To compare with PyTorch: {INSTALL}") from None
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3])
    if (4, 52, 0) <= version <= (4, 52, 2):
        raise ImportError(f"transformers {transformers.__version__} scales q twice in OPT (huggingface/transformers#38277): no oracle. {INSTALL}")
    return torch, transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silences transformers' progress bars and messages, which would appear in the middle of the table."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def loading(torch: Any, transformers: Any, source: hub.Source, params: dict) -> Check:
    """Whether Hugging Face reads the same bits from the same files. Tensors that it misses and initialises are noted, not compared."""
    if not any((source.weights / file).exists() for file in HF_READS):
        return Check(LOADING, "tensors", None, None, NOT_RUN, f"transformers reads none of the files in {source.weights}: not compared")
    try:
        config = transformers.OPTConfig.from_pretrained(str(source.config))
        read = transformers.OPTForCausalLM.from_pretrained
        theirs, report = read(str(source.weights), config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a failure of theirs, not ours
        return Check(LOADING, "tensors", None, None, NOT_RUN, f"transformers cannot read {source.weights}: {first_line(error)}")
    made_up = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
    found = same_tensors(hf_names(params), {name: p.detach().numpy() for name, p in theirs.named_parameters() if name not in made_up})
    return found._replace(note=f"{found.note}; transformers {transformers.__version__}, torch {torch.__version__}")


def same_tensors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> Check:
    """The check that HF reads the same bits: the number of tensors that differ."""
    found = [name for name in ours if name in theirs]
    differ = [name for name in found if not same_bits(ours[name], theirs[name])]
    notes = [f"of {len(found)}"] + ([f"first: {', '.join(differ[:3])}"] if differ else [])
    if lost := [name for name in ours if name not in theirs]:
        notes.append(f"transformers did not find {few(lost)}, and made up values: not compared")
    verdict = (FAIL if differ else PASS) if found else NOT_RUN
    return Check(LOADING, "tensors that transformers reads otherwise", len(differ) if found else None, 0, verdict, "; ".join(notes))


def hf_names(params: dict) -> dict[str, np.ndarray]:
    """Parameters under HF's names."""
    return {name if name.startswith("lm_head") else f"model.decoder.{name}": array for name, array in flatten(params).items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of 32-bit values hold the same bits."""
    return a.shape == b.shape and np.array_equal(np.ascontiguousarray(a).view(np.int32), np.ascontiguousarray(b).view(np.int32))


def pytorch_model(torch: Any, transformers: Any, folder: Path, params: dict) -> Any:
    """Hugging Face's model, by its own reading of config.json; its parameters share our arrays' memory."""
    config = transformers.OPTConfig.from_pretrained(str(folder), attn_implementation="sdpa")  # its eager softmax is float32 even in float64
    with torch.device("meta"):
        oracle = transformers.OPTForCausalLM(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in hf_names(params).items()}
    tensors.setdefault("lm_head.weight", tensors["model.decoder.embed_tokens.weight"])
    oracle.load_state_dict(tensors, strict=True, assign=True)
    return oracle.eval()


def cases(cfg: Any) -> list[Case]:
    """Small batches of what tends to go wrong: pads on either side, a hole in the mask, a cache, many positions, a second block of queries."""
    S, long = min(11, cfg.max_position_embeddings), min(QUERY_BLOCK + 3, cfg.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, long))
    ids[:, 0] = cfg.bos_token_id if cfg.bos_token_id in range(cfg.vocab_size) else 0
    left, right = np.ones((3, S), np.int64), np.ones((3, S), np.int64)
    left[1, : S // 4] = left[2, : S // 2] = 0
    right[1, S - S // 3 :] = 0
    right[2, 1 : S // 5] = 0  # a hole
    steps = [s for s in (slice(0, S // 2), slice(S // 2, S - 1), slice(S - 1, S)) if s.start < s.stop]
    return [
        Case("plain batch", ids[:2, :S], None, [slice(0, S)]),
        Case("left padding", ids[:, :S], left, [slice(0, S)]),
        Case("right padding and a hole", ids[:, :S], right, [slice(0, S)]),
        Case("cached steps", ids[:2, :S], None, steps),
        Case("cached steps, left padding", ids[:, :S], left, steps),
        Case(f"{long} tokens", ids[:1], None, [slice(0, long)]),
    ]


def run_pytorch(torch: Any, oracle: Any, inputs: list[Case]) -> list[Run]:
    """Every case through Hugging Face's model, with hooks at our points."""
    runs: list[Run] = []

    def keep(name: str, value: Any) -> None:
        runs[-1].points[-1].setdefault(
            EMBEDDED if name == f"{LAYER_0}.resid_pre" else name, plain_array(value[0] if isinstance(value, tuple) else value)
        )

    with hooks_on(oracle, keep), torch.inference_mode():
        for case in inputs:
            runs.append(Run([]))
            past = None
            for chunk in case.chunks:
                runs[-1].points.append({})
                mask = case.seen(chunk)
                out = oracle(torch.from_numpy(case.ids[:, chunk]), attention_mask=None if mask is None else torch.from_numpy(mask),
                             past_key_values=past, use_cache=len(case.chunks) > 1)  # fmt: skip
                past = out.past_key_values
    return runs


def run_tapped(tested: OPTForCausalLM, case: Case) -> Run:
    """The case through our model, tapped: attention and mlp run by the unfused ops."""

    def chunk_points(chunk: slice, cache: KVCache | None, points: dict) -> None:
        def tap(name: str, value: Any) -> Any:
            if stage_of(name) in STAGES or LAYER.fullmatch(name):
                points.setdefault(name, plain_array(value))
            return value

        hidden: list = []
        try:
            model.forward(tested.params, case.ids[:, chunk], tested.config, cache, case.seen(chunk), tested.ops, tap=tap, hidden_states=hidden)
        finally:
            if hidden:
                points[EMBEDDED] = plain_array(hidden[0])

    return run_chunks(case, chunk_points)


def run_whole(tested: OPTForCausalLM, case: Case) -> Run:
    """The case as it normally runs, with fused ops: each layer's input, the last hidden state and the logits."""

    def chunk_points(chunk: slice, cache: KVCache | None, points: dict) -> None:
        out = tested(case.ids[:, chunk], attention_mask=case.seen(chunk), past_key_values=cache, output_hidden_states=True)
        names = [EMBEDDED, *(f"model.decoder.layers.{i}" for i in range(tested.config.num_hidden_layers - 1)), LAST]
        points.update(zip(names, map(plain_array, out.hidden_states or ()), strict=True))
        points[LOGITS] = plain_array(out.logits)

    return run_chunks(case, chunk_points)


def run_chunks(case: Case, chunk_points: Callable[[slice, KVCache | None, dict], None]) -> Run:
    """Runs the chunks in order, until the end or an error; values computed before an error are kept, to show where it occurred."""
    points: list[dict[str, np.ndarray]] = []
    cache = KVCache() if len(case.chunks) > 1 else None
    for chunk in case.chunks:
        points.append({})
        try:
            chunk_points(chunk, cache, points[-1])
        except Exception as error:  # the code under test may fail in any way
            return Run(points, f"{type(error).__name__}: {first_line(error)}")
    return Run(points)


def ends(run: Run) -> Run:
    """Those of PyTorch's points that `run_whole` has."""

    def ends_of(points: dict) -> dict:
        *names, last, head = points  # the last before lm_head is the last layer, the final LayerNorm, or project_out
        layers = [name for name in (*names, last) if LAYER.fullmatch(name)][:-1]  # the last layer's own output is not among hidden_states
        return {name: points[name] for name in (EMBEDDED, *layers)} | {LAST: points[last], LOGITS: points[head]}

    return Run([ends_of(points) for points in run.points])


def stage_of(name: str) -> str:
    """The last part of a point's name."""
    return name.rpartition(".")[2]


def layer_of(name: str) -> str:
    """ "model.decoder.layers.3" for that layer and its points, else the empty string."""
    found = LAYER.match(name)
    return found[0] if found and name != EMBEDDED else ""


def plain_array(value: Any) -> np.ndarray:
    """A float64 copy of a NumPy array or a torch tensor."""
    return np.array(value.detach().double().cpu().numpy() if hasattr(value, "detach") else value, np.float64)


def compared(group: str, inputs: list[Case], ours: Iterable[Run], theirs: list[Run], allowed: float) -> list[Check]:
    """A check per point, in PyTorch's order: the worst over the cases, up to the first case that fails. Look at the first failing point."""
    worst: dict[str, Difference] = {}
    for case, our, their in zip(inputs, ours, theirs, strict=True):
        for chunk, points, wanted in zip(case.chunks, our.points, their.points, strict=False):  # ours may have stopped early
            for name, found in differences(points, wanted, case.real(chunk), our.stopped, allowed).items():
                if name not in worst or found.error > worst[name].error:
                    worst[name] = found._replace(note=f"{found.note} ({case.name})" if found.note else "")
        if any(found.error > allowed for found in worst.values()):
            break  # failures of later cases would only obscure where this one began
    return [Check(group, name, d.error, allowed, PASS if d.error <= allowed else FAIL, d.note) for name, d in worst.items()]


def differences(ours: dict, theirs: dict, real: np.ndarray, stopped: str, allowed: float) -> dict[str, Difference]:
    """How far each point is off, in PyTorch's order; a point that only we have is listed before the one that follows it here."""
    found: dict[str, Difference] = {}
    extra = {name: next((n for n in list(ours)[i:] if n in theirs), None) for i, name in enumerate(ours) if name not in theirs}
    for name, wanted in theirs.items():
        found |= {n: Difference(math.inf, f"this port ran {n}, PyTorch has none") for n, follower in extra.items() if follower == name}
        if name not in ours:
            found[name] = Difference(math.inf, f"PyTorch has {name}, this port did not run it" + (f": it stopped with {stopped}" if stopped else ""))
            continue
        error = relative_error(ours[name], wanted, real)
        if error is None:
            found[name] = Difference(math.inf, f"the shape is {ours[name].shape}, PyTorch's {wanted.shape}{order(name, ours, theirs)}")
        else:
            found[name] = Difference(error, "" if error <= allowed else f"off by {error:.1e} of the largest value{order(name, ours, theirs)}")
    return found


def relative_error(ours: np.ndarray, theirs: np.ndarray, real: np.ndarray) -> float | None:
    """The largest difference over the largest value, at real tokens only; None for another shape, inf if it is not finite.

    ours: (B, T, …) or (1, T, …);  theirs: (B, T, …) or (B·T, …);  real: (B, T)
    """
    B, T = real.shape
    theirs = theirs.reshape(B, T, -1)
    if ours.ndim < 2 or ours.shape[0] not in (1, B) or ours.shape[1] != T or ours[0, 0].size != theirs.shape[2]:
        return None
    difference = np.abs(np.broadcast_to(ours.reshape(len(ours), T, -1), theirs.shape) - theirs)[real]
    error = difference.max() / (np.abs(theirs[real]).max() or 1)
    return float(error) if np.isfinite(error) else math.inf


def order(name: str, ours: dict, theirs: dict) -> str:
    """A note of the points that ran before this one in its layer on one side only, without those that may run in any order."""

    def before(points: dict) -> list[str]:
        earlier = itertools.takewhile(lambda other: other != name, points)
        return [n for n in earlier if layer_of(n) == layer_of(name) and stage_of(n) in STAGES and stage_of(n) not in FREE]

    here, there = before(ours), before(theirs)
    sides = (("this port", here, there, "PyTorch"), ("PyTorch", there, here, "this port"))
    return "".join(f"; {who} ran {', '.join(alone)} before it, {other} did not"
                   for who, names, others, other in sides if (alone := [n for n in names if n not in others]))  # fmt: skip


def rounding(inputs: list[Case], ours: list[Run], rounded: list[Run], exact: list[Run]) -> Check:
    """Our float32 logits are at most twice as far from the float64 ones as PyTorch's float32 logits are."""

    def distance(runs: list[Run]) -> float:
        squares = [((points[LOGITS] - wanted[LOGITS])[case.real(chunk)] ** 2).ravel()
                   for case, run, truth in zip(inputs, runs, exact, strict=True)
                   for chunk, points, wanted in zip(case.chunks, run.points, truth.points, strict=True)]  # fmt: skip
        return float(np.sqrt(np.concatenate(squares).mean()))

    name = "float32 logits: our error over PyTorch's"
    if stopped := next((run.stopped for run in ours if run.stopped), ""):
        return Check(ROUNDING, name, math.inf, 2.0, FAIL, f"this port stopped with {stopped}")
    mine, its = distance(ours), distance(rounded)
    ratio = mine / its if its else math.inf if mine else 0.0
    return Check(ROUNDING, name, ratio, 2.0, PASS if ratio <= 2 else FAIL, f"{mine:.1e} / {its:.1e}, root mean square, against float64")


def first_line(error: Exception) -> str:
    """The first line of an error's message, shortened."""
    return (str(error).strip().splitlines() or [""])[0][:200]


# Against published numbers


def read_golden() -> dict[str, Any]:
    """golden.json, which any port may use; the file explains its own contents."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def against_golden(entry: dict[str, Any], ours: OPTForCausalLM, decoder: Callable[[], Callable | None]) -> Check:
    """The check of one entry of golden.json; an entry that needs more than the weights is not run."""
    measure, allowed = MEASURES.get(entry["kind"]), float(entry["tolerance"])
    if entry["needs"] or measure is None:
        return Check(PUBLISHED, entry["id"], None, allowed, NOT_RUN, f"needs {entry['needs'] or 'code for ' + entry['kind']}")
    if entry["kind"].endswith("_text"):
        measure = text_with(decoder)
    try:
        measured, note = measure(ours, entry["inputs"], entry["expected"])
    except Exception as error:  # one entry that fails must not stop the others
        measured, note = math.inf, f"{type(error).__name__}: {first_line(error)}"
    if not measured <= allowed:
        note = "; ".join(filter(None, (note, f"published: {entry['sources'][0]['what']} ({entry['conditions']})")))
    return Check(PUBLISHED, entry["id"], measured, allowed, PASS if measured <= allowed else FAIL, note)


def decoder_of_ids(name: str | Path, revision: str | None) -> Callable | None:
    """The model's own tokenizer's decode, or None if it has none."""
    from opt_np.tokenizer import OPTTokenizer

    try:
        return OPTTokenizer.from_pretrained(name, revision).decode
    except CheckpointError:
        return None


def batches(inputs: dict) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Rows to run together, their ids and mask: all rows if a mask is given, else one at a time.  -> rows, (B, T), (B, T)"""
    if "attention_mask" in inputs:
        yield [*range(len(inputs["ids"]))], np.array(inputs["ids"]), np.array(inputs["attention_mask"])
    else:
        for b, row in enumerate(inputs["ids"]):
            yield [b], np.array([row]), np.ones((1, len(row)), np.int64)


def log_probabilities(ours: OPTForCausalLM, inputs: dict) -> list[np.ndarray]:
    """Per row: the log probability of each next token.  -> (T, V) each"""
    logits = [row for _, ids, mask in batches(inputs) for row in plain_array(ours(ids, attention_mask=mask).logits)]
    return [row - np.logaddexp.reduce(row, axis=-1, keepdims=True) for row in logits]


def largest(pairs: Iterable[tuple[Any, Any]]) -> float:
    """The largest difference over all pairs; NaN counts as infinite. Raises ValueError for different shapes."""
    errors = [np.abs(np.subtract(a, b)).max() for a, b in pairs]
    return float(max(errors)) if np.isfinite(errors).all() else math.inf


def argmax_probs(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
    """The likeliest ids and their probabilities against published ones: the largest difference, and a note."""
    rows = log_probabilities(ours, inputs)
    ids = [row.argmax(-1).tolist() for row in rows]
    if expected["argmax_ids"] not in (None, ids):
        return math.inf, f"the likeliest ids are {ids}, not {expected['argmax_ids']}"
    return largest((np.exp(row.max(-1)), p) for row, p in zip(rows, expected["probs"], strict=True)), ""


def last_hidden_slice(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
    """A slice of the last hidden state against published values: the largest difference, and a note."""
    ((_, ids, mask),) = batches(inputs)
    out, values = ours(ids, attention_mask=mask, output_hidden_states=True), np.array(expected["values"])
    hidden = plain_array((out.hidden_states or ())[-1])
    if list(hidden.shape) != expected["shape"]:
        return math.inf, f"the shape is {[*hidden.shape]}, not {expected['shape']}"
    return largest([(hidden[tuple(slice(a, a + n) for a, n in zip(expected["start"], values.shape, strict=True))], values)]), ""


def mean_logits(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
    """The mean logit of every position against published ones: the largest difference, and a note."""
    ((_, ids, mask),) = batches(inputs)
    means, wanted = plain_array(ours(ids, attention_mask=mask).logits).mean(-1), np.array(expected["mean"])
    real = np.ones_like(mask) if ours.ops.__name__ == "opt_np.ops" else mask  # a fast backend need not compute pads
    return largest([(means[real != 0], wanted[real != 0])]), "" if real.all() else "pads not compared"


def token_logprobs(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
    """Log probabilities of given tokens against published ones: the largest difference, and a note."""
    rows = zip(log_probabilities(ours, inputs), inputs["ids"], expected["logprobs"], strict=True)
    return largest((log_p[np.arange(len(ids) - 1), ids[1:]], wanted) for log_p, ids, wanted in rows), ""


def loss(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
    """The loss of a text against the published one: the difference, and a note."""
    ((_, ids, mask),) = batches(inputs)
    measured = float(ours(ids, attention_mask=mask, labels=ids).loss)
    return largest([(measured, expected["loss"])]), f"loss {measured:.6f}, perplexity {math.exp(min(measured, 700)):.4f}"


def no_nan(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
    """The number of logits that are not finite, against the published number, and a note."""
    found = sum(int((~np.isfinite(plain_array(ours(ids, attention_mask=mask).logits))).sum()) for _, ids, mask in batches(inputs))
    return abs(found - expected["not_finite"]), "run in float32"


def text_with(decoder: Callable[[], Callable | None]) -> Callable[[OPTForCausalLM, dict, dict], tuple[float, str]]:
    """A measure: how many rows continue differently. Equal ids are equal text; if ids differ, the decoded texts are compared, given a tokenizer."""

    def text(ours: OPTForCausalLM, inputs: dict, expected: dict) -> tuple[float, str]:
        wrong, options = [], {name: inputs[name] for name in ("penalty_alpha", "top_k") if name in inputs}
        for rows, ids, mask in batches(inputs):
            new = inputs["max_new_tokens"][rows[0]]
            made = np.asarray(ours.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options))
            for b, row, real in zip(rows, made, mask, strict=True):
                tokens = [*row[: len(real)][real != 0].tolist(), *row[len(real) :].tolist()]
                if tokens != expected["ids_of_texts"][b]:
                    decode = decoder()
                    words = decode(tokens, skip_special_tokens=True) if decode else f"ids {tokens}, and no tokenizer to read them"
                    wrong += [words] if words != expected["texts"][b] else []
        return len(wrong), f"got {wrong[0]!r}" if wrong else ""

    return text


MEASURES: dict[str, Callable[[OPTForCausalLM, dict, dict], tuple[float, str]]] = {
    "argmax_probs": argmax_probs, "last_hidden_slice": last_hidden_slice, "mean_logits": mean_logits, "token_logprobs": token_logprobs,
    "loss": loss, "no_nan": no_nan, "greedy_text": text_with(lambda: None), "contrastive_text": text_with(lambda: None),
}  # fmt: skip


# For people


def table(found: list[Check], every_point: bool = False) -> list[str]:
    """The lines of one group. The first layer and the first that fails are shown point by point, the other layers as one line each."""
    shown, lines = [], [f"{found[0].group:<60}  {'measured':>9}  {'allowed':>9}"]
    failing = next((layer_of(check.name) for check in found if check.verdict == FAIL), None)
    for layer, points in itertools.groupby(found, key=lambda check: layer_of(check.name)):
        some = list(points)
        fold = len(some) > 2 and layer not in ("", "model.decoder.layers.0", failing) and not every_point
        shown += [folded(layer, some)] if fold else some
    first = first_failure(found)
    for check in shown:
        note = check.note if check.verdict != FAIL or check.group not in (LAYERS, WHOLE) else "<- first to differ" if check is first else ""
        lines.append(f"  {check.name:<58}  {number(check.measured):>9}  {number(check.allowed):>9}  {check.verdict:<7}  {note}".rstrip())
    return lines


def folded(layer: str, points: list[Check]) -> Check:
    """One line for a layer: its worst point."""
    worst = max(points, key=lambda check: math.inf if check.measured is None else check.measured)
    return worst._replace(name=f"{layer} ({len(points)} points)", verdict=FAIL if any(p.verdict == FAIL for p in points) else PASS, note="")


def number(value: float | None) -> str:
    """A value, formatted for the table."""
    if value is None or value == math.inf:
        return "-"
    return f"{value:.3g}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def first_failure(found: list[Check]) -> Check | None:
    """The first check that failed, if one did."""
    return next((check for check in found if check.verdict == FAIL), None)


def passed_by_pytorch(found: list[Check]) -> bool:
    """Whether a comparison with PyTorch was run and passed."""
    return any(check.group == LAYERS and check.verdict == PASS for check in found)


def verdict(found: list[Check]) -> tuple[int, str]:
    """The exit status and the last line. If nothing could be compared, that is not a success."""
    passed, failed, absent = (sum(check.verdict == word for check in found) for word in (PASS, FAIL, NOT_RUN))
    if first := first_failure(found):
        doubt = (
            ". PyTorch computes the same from these weights: are they that model's?" if first.group == PUBLISHED and passed_by_pytorch(found) else ""
        )
        return 1, f"FAIL: {failed} of {passed + failed} checks. First: {first.name}" + (f": {first.note}" if first.note else "") + doubt
    rest = f", {absent} not run" if absent else ""
    if not passed:
        return 1, f"NOT VERIFIED: no check could run{rest}"
    return 0, f"pass: {passed} checks{rest}"
