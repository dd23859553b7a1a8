"""Scores per token: how likely the model found a text's own tokens, how certain it was, and whether its certainty is calibrated.

Entry [b, t] of each array is about token t of row b, as predicted from the real tokens before it. A row's first real token has none before it: there,
and at padding, values are NaN and ranks and ids -1. Logs are natural, so that surprise (-ln p) and entropy are in nats. Probabilities are computed in
float64 whatever the model computes in, a few positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from opt_np import checkpoint, grad
from opt_np import ops as numpy_ops
from opt_np.arrays import host
from opt_np.config import OPTConfig
from opt_np.model import embeddings, final, id_array, last_hidden_state, lm_logits, make_layout, mask_array, no_tap
from opt_np.processors import highest, log_softmax
from opt_np.settings import whole

NUMBERS, FEW = 1 << 21, 1 << 18  # logits computed at a time, and judged at a time: float64 copies of a few stay in the processor's cache


# ---- a text's own tokens -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The result of `score`."""

    logprob: np.ndarray  # (B, T) of the token, in nats
    rank: np.ndarray  # (B, T) how many tokens were likelier; among equally likely ones the lower id goes first
    entropy: np.ndarray  # (B, T) the mean of -ln p under p, in nats: how much surprise the model expected
    varentropy: np.ndarray  # (B, T) the variance of -ln p under p, in nats²
    margin: np.ndarray  # (B, T) p of the likeliest token less p of the second
    top_ids: np.ndarray  # (B, T, K) the likeliest tokens, best first
    top_logprobs: np.ndarray  # (B, T, K)

    @property
    def entropy_bits(self) -> np.ndarray:
        return self.entropy / math.log(2)

    @property
    def scored(self) -> np.ndarray:
        """Where there was a prediction.  ->  (B, T) bool"""
        return self.rank >= 0

    def calibration(self, bins: int = 15) -> Calibration:
        """The calibration of the likeliest token at each position: the probability it was given, against whether it came."""
        return calibration(np.exp(self.top_logprobs[..., 0][self.scored]), self.rank[self.scored] == 0, bins)


def score(model: Any, input_ids: Any, attention_mask: Any = None, top: int = 5) -> Scores:
    """Each token's log probability and rank, the spread of the distribution at its position, and the `top` likeliest tokens.

    input_ids: (B, T);  attention_mask: (B, T)  ->  (B, T) each, and (B, T, K)

    Raises ValueError as the model does, and for a `top` outside 1 to vocab_size. Positions without a prediction are null in OpenAI's echoed logprobs
    too.
    """
    if not whole(1)(top) or top > model.config.vocab_size:
        raise ValueError(f"top={top!r} must be a whole number from 1 to vocab_size={model.config.vocab_size}: how many candidates to tell")
    h, ids = hidden(model, input_ids, attention_mask), id_array(input_ids)
    nan = np.full((*ids.shape, top), np.nan)
    found = {name: nan[..., 0].copy() for name in ("logprob", "entropy", "varentropy", "margin")}
    found |= {"rank": np.full(ids.shape, -1), "top_ids": np.full(nan.shape, -1), "top_logprobs": nan}
    for rows, before, at in predictions(ids, attention_mask, model.config.vocab_size):
        logits = logits_of(model, h[rows, before])
        for some in blocks(len(rows), model.config.vocab_size, few=True):
            for name, values in judged(logits[some], ids[rows[some], at[some]], top).items():
                found[name][rows[some], at[some]] = values
    return Scores(**found)


def hidden(model: Any, input_ids: Any, attention_mask: Any = None) -> Any:
    """The last hidden states, which the head reads.  input_ids: (B, T);  attention_mask: (B, T)  ->  (B, T, W)"""
    check_head(model)
    return last_hidden_state(model.params, input_ids, model.config, attention_mask=attention_mask, ops=model.ops)


def check_head(model: Any) -> None:
    """Raises ValueError for a class without a language-model head."""
    if model.head != "lm_head":
        raise ValueError(f"tokens are scored by a language model, OPTForCausalLM, and this is {type(model).__name__}")


def predictions(ids: np.ndarray, attention_mask: Any, V: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every real token that has one before it, in blocks: its row, the column of the one before, and its own column.

    ids: (B, T);  attention_mask: (B, T)  ->  (N), (N), (N)
    """
    rows, at = np.nonzero(np.ones(ids.shape) if attention_mask is None else mask_array(attention_mask))
    follows = rows[1:] == rows[:-1]
    rows, before, at = rows[1:][follows], at[:-1][follows], at[1:][follows]
    for block in blocks(len(rows), V):
        yield rows[block], before[block], at[block]


def blocks(n: int, V: int, few: bool = False) -> Iterator[slice]:
    """Slices of n positions, each of NUMBERS logits at most, or of FEW (but at least one position)."""
    size = max(1, (FEW if few else NUMBERS) // V)
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def logits_of(model: Any, h: Any) -> np.ndarray:
    """The head's logits.  h: (N, W)  ->  (N, V).  Raises ValueError if they are NaN or infinite."""
    logits = host(lm_logits(model.params, h[None], model.ops))[0]
    if not np.isfinite(logits.max(-1)).all():
        raise ValueError("the model's logits are NaN or infinite, so that nothing has a probability; --strict or strict=True names such weights")
    return logits


def judged(logits: np.ndarray, ids: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """The fields of Scores, for N tokens, in float64.  logits: (N, V);  ids: (N)"""
    logits = logits.astype(np.float64)
    log_p, best = log_softmax(logits), highest(logits, min(max(top, 2), logits.shape[1]))
    p, at = np.exp(log_p), (np.arange(len(ids)), ids)
    own, nats = logits[at][:, None], np.where(p > 0, -log_p, 0)  # what cannot happen adds nothing to a mean
    entropy, leading = (p * nats).sum(-1), np.take_along_axis(p, best, axis=1)
    first = np.arange(logits.shape[1]) < ids[:, None]  # ids that rank before the token's own if both are equally likely
    return {
        "logprob": log_p[at],
        "rank": (logits > own).sum(-1) + ((logits == own) & first).sum(-1),
        "entropy": entropy,
        "varentropy": (p * (nats - entropy[:, None]) ** 2).sum(-1),
        "margin": leading[:, 0] - leading[:, 1:2].sum(-1),  # a vocabulary of one token has no second
        "top_ids": best[:, :top],
        "top_logprobs": np.take_along_axis(log_p, best[:, :top], axis=1),
    }


def surprise(p: np.ndarray) -> np.ndarray:
    """-ln p; 0 where p is 0, so that it adds nothing to a mean.  p: (*N)  ->  (*N)"""
    return -np.log(p, out=np.zeros_like(p), where=p > 0)


# ---- texts longer than the context -------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A stretch of a text: tokens first to stop - 1 are scored, each from those between start and itself."""

    start: int
    stop: int
    first: int


def stride_windows(n: int, window: int, stride: int) -> Iterator[Window]:
    """Windows that begin `stride` tokens apart; each scores what earlier ones did not reach (HF's page "Perplexity of fixed-length models").

    All but the first window's tokens have at least window - stride tokens before them; with stride = window, a window's first token has none and
    is not scored. Raises ValueError.
    """
    check_stride(stride, window)
    done = 0
    for start in range(0, n, stride):
        stop = min(start + window, n)
        yield Window(start, stop, max(done, start + 1))
        done = stop
        if stop == n:
            return


def check_stride(stride: int, window: int) -> None:
    """Raises ValueError for a stride that leaves gaps or is less than 1."""
    if not whole(1)(stride) or stride > window:
        raise ValueError(f"stride={stride!r} must be a whole number from 1 to window={window}, so that windows leave no gap")


def window_of(cfg: OPTConfig, window: int | None) -> int:
    """The given window, or min(2048, the model's context). Raises ValueError for one longer than the context, or below 2."""
    most = cfg.max_position_embeddings
    if window is not None and (not whole(2)(window) or window > most):
        raise ValueError(f"window={window!r} must be a whole number from 2 to max_position_embeddings={most}")
    return window or min(2048, most)


Judgement = TypeVar("Judgement")


def in_windows(judge: Callable[[np.ndarray], Judgement], ids: Any, window: int, stride: int | None = None) -> Judgement:
    """The joined results of judge(rows) over a text's windows, each token once; without a stride, the text must fit one window.

    ids: (T)  ->  arrays (B, T), B = 1        Raises ValueError.
    """
    ids = np.asarray(ids)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; it takes 2, as each is judged by those before it")
    if stride is None and len(ids) > window:
        raise ValueError(
            f"the text is {len(ids)} tokens, and the window {window}: shorten it, or give a stride (--stride {window // 2}) for more windows"
        )
    results, seen, done = [], [], 0
    for w in stride_windows(len(ids), window, window if stride is None else stride):
        results.append(judge(ids[None, w.start : w.stop]))
        seen.append(done - w.start)
        done = w.stop
    names = [f.name for f in fields(results[0])]  # type: ignore[arg-type]
    joined = {name: np.concatenate([getattr(r, name)[:, n:] for r, n in zip(results, seen, strict=True)], axis=1) for name in names}
    return type(results[0])(**joined)


# ---- disagreement of several predictions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """Several predictions of each token, averaged: how uncertain their mean is, and how much of that is because they differ."""

    logprob: np.ndarray  # (B, T) ln of the token's mean probability
    total: np.ndarray  # (B, T) entropy of the mean distribution, in nats
    expected: np.ndarray  # (B, T) mean of the entropies, in nats: the part that is not disagreement
    std: np.ndarray  # (B, T) standard deviation of the token's log probability

    @property
    def information(self) -> np.ndarray:
        """The mutual information of token and predictor (BALD, arXiv:1112.5745): 0 where all agree, at most ln(number of predictions).  ->  (B, T)"""
        return np.maximum(self.total - self.expected, 0)  # rounding may leave -1e-17


def mc_dropout(
    model: Any, input_ids: Any, samples: int = 10, seed: int = 0, attention_mask: Any = None, dropout: float | None = None
) -> Disagreement:
    """The disagreement of passes with dropout, each with another random mask; the rate is config.json's unless one is given.

    input_ids: (B, T);  attention_mask: (B, T)  ->  (B, T) each

    Sample s of a seed does not depend on `samples`. Raises ValueError. Source: Gal & Ghahramani, arXiv:1506.02142.
    """
    check_head(model)
    if model.ops is not numpy_ops:
        raise ValueError(
            f"dropout is computed by NumPy, and this model is laid out for {model.ops.__name__}: load it with backend='numpy' (--backend numpy)"
        )
    if not whole(2)(samples):
        raise ValueError(f"samples={samples!r} (--mc-dropout) must be a whole number of at least 2: one has nothing to disagree with")
    rate = model.config.dropout if dropout is None else dropout
    if not 0 < rate < 1:
        raise ValueError(f"dropout={rate} must be above 0, or every sample is the same, and below 1: give dropout=0.1, say")
    cfg, ids = replace(model.config, dropout=float(rate)), id_array(input_ids)
    rngs = [np.random.default_rng([seed, sample]) for sample in range(samples)]
    return disagreement([(model, hidden_with_dropout(model.params, ids, attention_mask, cfg, rng)) for rng in rngs], ids, attention_mask)


def hidden_with_dropout(params: dict, ids: np.ndarray, attention_mask: Any, cfg: OPTConfig, rng: np.random.Generator) -> np.ndarray:
    """As grad.decoder_fwd, without the values that a backward pass needs.  ids: (B, T);  attention_mask: (B, T)  ->  (B, T, W)"""
    layout = make_layout(cfg, ids, attention_mask)
    x = embeddings(params, ids, layout, numpy_ops, no_tap)
    for p in params["layers"]:
        x, _ = grad.decoder_layer_fwd(x, p, cfg, layout, rng)
    return final(params, x, cfg, numpy_ops, no_tap)


def ensemble(models: list[Any], input_ids: Any, attention_mask: Any = None) -> Disagreement:
    """The disagreement of several models with the same vocabulary, all weighted equally.

    input_ids: (B, T);  attention_mask: (B, T)  ->  (B, T) each

    Raises ValueError. Source: Lakshminarayanan, Pritzel & Blundell, arXiv:1612.01474.
    """
    sizes = [model.config.vocab_size for model in models]
    if len(models) < 2 or len(set(sizes)) > 1:
        raise ValueError(f"an ensemble is two models or more of one vocabulary; these have vocab_size {', '.join(map(str, sizes)) or '(no model)'}")
    return disagreement([(model, hidden(model, input_ids, attention_mask)) for model in models], id_array(input_ids), attention_mask)


def disagreement(predicted: list[tuple[Any, Any]], ids: np.ndarray, attention_mask: Any) -> Disagreement:
    """The Disagreement of (model, last hidden states) pairs; distributions are computed for one model and a few positions at a time."""
    found = {f.name: np.full(ids.shape, np.nan) for f in fields(Disagreement)}
    for rows, before, at in predictions(ids, attention_mask, predicted[0][0].config.vocab_size):
        own, entropies, mean = [], [], 0.0
        for model, h in predicted:
            log_p = log_softmax(logits_of(model, h[rows, before]).astype(np.float64))
            p = np.exp(log_p)
            own.append(log_p[np.arange(len(rows)), ids[rows, at]])
            entropies.append((p * surprise(p)).sum(-1))
            mean = mean + p / len(predicted)
        numbers = {"logprob": log_mean_exp(np.stack(own)), "total": (mean * surprise(mean)).sum(-1),  # type: ignore[arg-type]
                   "expected": np.mean(entropies, 0), "std": np.std(own, 0)}  # fmt: skip
        for name, values in numbers.items():
            found[name][rows, at] = values
    return Disagreement(**found)


def log_mean_exp(x: np.ndarray) -> np.ndarray:
    """ln of the mean of exp(x) over the first axis.  x: (M, N)  ->  (N)"""
    return np.logaddexp.reduce(x, axis=0) - math.log(len(x))


# ---- whether its confidence is calibrated ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width; a bin without predictions has NaN."""

    edges: np.ndarray  # (bins + 1): a bin includes its upper edge and excludes its lower one
    count: np.ndarray  # (bins)
    confidence: np.ndarray  # (bins) mean
    accuracy: np.ndarray  # (bins)

    @property
    def gaps(self) -> np.ndarray:
        """|accuracy - confidence|, 0 for a bin without predictions.  ->  (bins)"""
        return np.nan_to_num(np.abs(self.accuracy - self.confidence))

    @property
    def ece(self) -> float:
        """The expected calibration error: the mean gap over all predictions."""
        return float((self.count * self.gaps).sum() / self.count.sum())

    @property
    def mce(self) -> float:
        """The largest gap."""
        return float(self.gaps.max())


def calibration(confidence: Any, correct: Any, bins: int = 15) -> Calibration:
    """How the probability of predictions compares with how often they are right.

    confidence: (*N);  correct: (*N) bool        Raises ValueError. Source: Guo et al., arXiv:1706.04599 (equal-width bins, after Naeini et al.).
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if not whole(1)(bins):
        raise ValueError(f"bins={bins!r} must be a whole number of at least 1")
    if confidence.shape != correct.shape or not confidence.size:
        raise ValueError(f"confidence is {confidence.shape} and correct {correct.shape}; there is one of each for every prediction, and at least one")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidence holds {confidence.min()} to {confidence.max()}; it is a probability, 0 to 1, of each token that was scored")
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:], confidence.ravel())  # the first bin whose upper edge is not below it
    count = np.bincount(place, minlength=bins)
    sums = np.stack([np.bincount(place, weights=values.ravel(), minlength=bins) for values in (confidence, correct)])
    means = np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)
    return Calibration(edges, count, means[0], means[1])


def reliability_plot(calibration: Calibration, path: str | Path) -> None:
    """Writes a plot of accuracy by confidence, as PNG or by the path's suffix. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a plot needs matplotlib, which is not installed: pip install "opt-np[notebooks]"') from None
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    width = np.diff(calibration.edges)
    axes.bar(calibration.edges[:-1], np.nan_to_num(calibration.accuracy), width, align="edge", edgecolor="white", label="how often it was right")
    axes.plot([0, 1], [0, 1], color="black", linestyle="dashed", label="as often as it said")
    axes.plot(calibration.confidence, calibration.accuracy, "o", color="tab:red", label="mean confidence of the bin")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy",
             title=f"ECE {calibration.ece:.4f}, {calibration.count.sum()} predictions")  # fmt: skip
    axes.legend(loc="upper left")
    checkpoint.write_atomically(Path(path), lambda temporary: figure.savefig(temporary, dpi=120))


# ---- as data and as a table --------------------------------------------------------------------------------------------------------------


def records(scores: Scores, ids: Any, tokenizer: Any, disagreement: Disagreement | None = None) -> list[dict[str, Any]]:
    """One JSON-ready object for each token of a text (row 0): None for NaN and infinite values."""
    found = []
    for t, i in enumerate(np.asarray(ids).tolist()):
        numbers: dict[str, Any] = {"token": tokenizer.decode([i]), "id": i, "logprob": scores.logprob[0, t]}
        numbers["rank"] = int(scores.rank[0, t]) if scores.scored[0, t] else None
        numbers |= {"entropy_nats": scores.entropy[0, t], "entropy_bits": scores.entropy_bits[0, t]}
        numbers |= {name: getattr(scores, name)[0, t] for name in ("varentropy", "margin")}
        if disagreement:
            numbers |= {"mutual_information": disagreement.information[0, t], "logprob_std": disagreement.std[0, t]}
        best = [(int(k), float(x)) for k, x in zip(scores.top_ids[0, t], scores.top_logprobs[0, t], strict=True) if k >= 0]
        numbers["top"] = [{"token": tokenizer.decode([k]), "id": k, "logprob": number(x)} for k, x in best]
        found.append({name: number(value) if isinstance(value, float) else value for name, value in numbers.items()})
    return found


def summary(scores: Scores, calibration: Calibration | None = None) -> str:
    """The totals and means over a text's tokens, one per line."""
    mean = float(scores.logprob[scores.scored].mean())
    lines = [f"tokens        {scores.rank.shape[1]}, of which {scores.scored.sum()} are scored",
             f"mean logprob  {mean:.4f} nats, {mean / math.log(2):.4f} bits",
             f"perplexity    {math.exp(-mean) if mean > -700 else math.inf:.4f}, of the scored tokens; see --perplexity"]  # fmt: skip
    if calibration:
        said, right = (float(values[calibration.count > 0] @ calibration.count[calibration.count > 0]) / calibration.count.sum()
                       for values in (calibration.confidence, calibration.accuracy))  # fmt: skip
        lines += [f"confidence    {said:.4f} said, {right:.4f} right", f"calibration   ECE {calibration.ece:.4f}, MCE {calibration.mce:.4f}"]
    return "\n".join(lines)


def report(model: Any, tokenizer: Any, text: str, window: int | None = None, stride: int | None = None, top: int = 3, json: bool = False,
           reliability: str | None = None, samples: int | None = None, others: Sequence[tuple[Any, Any]] = ()) -> str:  # fmt: skip
    """The output of `opt-np score`; `others` are the further models of an ensemble, each with its tokenizer. Raises ValueError."""
    ids, width = tokenizer.encode(text), window_of(model.config, window)
    if any(its.encode(text) != ids for _, its in others):
        raise ValueError("the models cut this text into different tokens; what they predict can be compared only where these are the same")
    scores, between = in_windows(partial(score, model, top=top), ids, width, stride), None
    if samples is not None:
        between = in_windows(partial(mc_dropout, model, samples=samples), ids, width, stride)
    elif others:
        between = in_windows(partial(ensemble, [model, *(other for other, _ in others)]), ids, width, stride)
    believed = scores.calibration() if reliability else None
    if believed and reliability:
        reliability_plot(believed, reliability)
    found = records(scores, ids, tokenizer, between)
    return "\n".join(map(dumps, found)) if json else f"{table(found)}\n\n{LEGEND}\n\n{summary(scores, believed)}"


def number(x: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON lacks."""
    return float(x) if math.isfinite(x) else None


LEGEND = """rank: how many tokens were likelier. entropy: the surprise, -ln p, that was expected. varentropy: its variance. margin: p of the
likeliest less p of the second. information: of the entropy, what the predictions disagree about. std: of the token's logprob among them."""
COLUMNS = {  # heading: key and format
    "logprob": ("logprob", ".3f"), "rank": ("rank", "d"), "entropy": ("entropy_nats", ".3f"), "in bits": ("entropy_bits", ".3f"),
    "varentropy": ("varentropy", ".3f"), "margin": ("margin", ".3f"), "information": ("mutual_information", ".4f"), "std": ("logprob_std", ".3f"),
}  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """A line per token, with "-" for a missing value, that ends in the likeliest tokens and their probabilities."""
    shown = {heading: key for heading, key in COLUMNS.items() if key[0] in found[0]}
    cells = [[repr(r["token"]), *("-" if r[key] is None else format(r[key], form) for key, form in shown.values())] for r in found]
    widths = [max(map(len, column)) for column in zip(["token", *shown], *cells, strict=True)]
    ends = ["  ".join(f"{c['token']!r} {0 if c['logprob'] is None else math.exp(c['logprob']):.3f}" for c in r["top"]) for r in found]
    lines = [(["token", *shown], "likeliest here"), *zip(cells, ends, strict=True)]
    return "\n".join("  ".join([*(cell.rjust(w) for cell, w in zip(line, widths, strict=True)), end]).rstrip() for line, end in lines)
