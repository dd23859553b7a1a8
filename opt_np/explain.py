"""Why a token was chosen: what each processor did to the leading candidates, step by step, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_np.generate import Request, Step, picker, steps
from opt_np.ops import softmax
from opt_np.processors import highest
from opt_np.reader import read


@dataclass(frozen=True)
class Candidate:
    """A token that might have been chosen; `scores` holds its score after each active processor, by name, in order."""

    id: int
    text: str | None  # None without a tokenizer
    logit: float
    scores: dict[str, float]
    probability: float
    removed_by: str | None  # the processor that removed it


@dataclass(frozen=True)
class Choice:
    """One row's step: the id that was chosen, and the candidates with the highest logits, best first, the chosen one always among them."""

    step: int
    row: int
    id: int
    candidates: list[Candidate]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """A line per candidate, the chosen one marked; a removed one shows by which processor, and no score after that."""
        texts = self.candidates[0].text is not None
        names = list(self.candidates[0].scores)
        lines = [["", *(["token"] if texts else []), "id", "logit", *names, "probability"]]
        for c in self.candidates:
            scores = [f"{score:.3f}" if np.isfinite(score) else "removed" if name == c.removed_by else "" for name, score in c.scores.items()]
            mark = ">" if c.id == self.id else ""
            lines.append([mark, *([repr(c.text)] if texts else []), str(c.id), f"{c.logit:.3f}", *scores, f"{c.probability:.4f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([f"step {self.step}, row {self.row}", *rows])


def explain(request: Request, top: int) -> list[Choice]:
    """A Choice per step and row that had not finished. Raises ValueError for beams and contrastive search, which choose by more than a score."""
    s = request.settings
    if s.beams or s.contrastive:
        way, off = (f"num_beams={s.num_beams}", "num_beams=1") if s.beams else (f"penalty_alpha={s.penalty_alpha}", "penalty_alpha=0")
        raise ValueError(f"explain shows greedy search and sampling, a token at a time; {way} chooses otherwise: set {off}")
    if not isinstance(top, int | np.integer) or top < 1:
        raise ValueError(f"top={top!r} must be a whole number of at least 1: how many candidates to show")
    stages: dict[str, np.ndarray] = {}  # this step's scores (N, V) after each processor; every step writes the same names
    found = enumerate(read(steps(request, picker(request, stages.__setitem__)), request.reader))
    return [choice for number, step in found for choice in choices(number, step, stages, top, request.tokenizer)]


def choices(number: int, step: Step, stages: dict[str, np.ndarray], top: int, tokenizer: Any) -> Iterator[Choice]:
    """A Choice for each row that had not finished before this step."""
    P = softmax([step.logits, *stages.values()][-1])
    leading = highest(step.logits, min(top, P.shape[1]))  # (N, top)
    for row in np.flatnonzero(step.active).tolist():
        chosen = int(step.ids[row])
        shown = [*leading[row].tolist(), *([chosen] if chosen not in leading[row] else [])]
        yield Choice(number, row, chosen, [candidate(i, row, step.logits, stages, float(P[row, i]), tokenizer) for i in shown])


def candidate(i: int, row: int, logits: np.ndarray, stages: dict[str, np.ndarray], probability: float, tokenizer: Any) -> Candidate:
    """One token's scores after each processor, and which processor removed it."""
    scores = {name: float(after[row, i]) for name, after in stages.items()}
    by = next((name for name, score in scores.items() if not np.isfinite(score)), None)
    return Candidate(i, tokenizer.decode([i]) if tokenizer else None, float(logits[row, i]), scores, probability, by)
