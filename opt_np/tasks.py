"""The data of `train`: text, labelled examples, or questions, as batches that depend on (seed, step) alone, and how each task is evaluated.

A task has `head` (its loss, from grad.py), `batch(index) -> (input_ids, labels, attention_mask)`, `items(labels)` (what the mean loss divides
by), `evaluate(params, cfg, ops) -> {measure: value}` and `checksum()` of its data. Batches have no state, so a run resumed at any step sees the
same batches as one that was never interrupted.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from opt_np import grad
from opt_np import ops as numpy_ops
from opt_np.arrays import host
from opt_np.config import OPTConfig
from opt_np.init import HEADS
from opt_np.model import forward, last_hidden_state
from opt_np.tokenizer import OPTTokenizer
from opt_np.tree import map_leaves

KINDS: dict[str, Any] = {"label": str | int | float, "answer_start": int}  # types of the keys that are not text


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, the line, what was found and what was expected."""


def read_texts(files: Iterable[str | Path]) -> list[str]:
    """Whole files as text; a folder stands for its .txt files. Raises DataError."""
    try:
        paths = [p for f in files for p in (sorted(p for p in Path(f).iterdir() if p.suffix == ".txt") if Path(f).is_dir() else [Path(f)])]
    except OSError as error:
        raise DataError(f"a folder cannot be read: {error}") from None
    if not paths:
        raise DataError(f"no .txt file in {', '.join(map(str, files))}")
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
        if not texts[-1].strip():
            raise DataError(f"{path} is empty")
    return texts


def read_examples(path: str | Path, keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """A file of JSON lines, each an object with these keys, by line number. Raises DataError naming the line."""
    examples = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(example, dict):
            raise DataError(f"{path}:{number} holds a JSON {type(example).__name__}; each line is an object with {', '.join(keys)}")
        for key in keys:
            if key not in example:
                raise DataError(f"{path}:{number} has no {key}; each line is an object with {', '.join(keys)}")
            if not isinstance(example[key], KINDS.get(key, str)) or isinstance(example[key], bool):
                raise DataError(f"{path}:{number}: {key} is {example[key]!r}, a {type(example[key]).__name__}")
            if isinstance(example[key], float) and example[key].is_integer():  # JSON's 1.0 is the same number as 1
                example[key] = int(example[key])
        examples[number] = example
    if not examples:
        raise DataError(f"{path} holds no example")
    return examples


@functools.lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def indices(n: int, batch_size: int, index: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, example) of each row of batch `index`: every example once per epoch, in a new order each time."""
    at = range(index * batch_size, (index + 1) * batch_size)
    return [(i // n, int(shuffled(n, seed, i // n)[i % n])) for i in at]


class LanguageModelling:
    """Windows of `context` tokens from the concatenated texts, each of which starts with </s>.

    The windows of an epoch start at a random offset, so that they are cut at other places each time. In half of them </s> replaces the
    first token: text is generated from </s>, but scored from any token on.
    """

    head = staticmethod(grad.language_model_head)

    def __init__(self, tokenizer: OPTTokenizer, texts: list[str], eval_texts: list[str], context: int, batch_size: int, seed: int) -> None:
        self.tokenizer, self.context, self.batch_size, self.seed = tokenizer, context, batch_size, seed
        self.tokens = np.concatenate([np.array(tokenizer.encode(text), np.int32) for text in texts])
        self.eval_texts = eval_texts
        if len(self.tokens) < 2 * context:
            raise DataError(
                f"the training text is {len(self.tokens)} tokens; windows of context={context} need at least {2 * context}: add text or shorten them"
            )

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray, None]:
        n = len(self.tokens) // self.context - 1  # one fewer, to leave room for the offset
        rows = []
        for epoch, i in indices(n, self.batch_size, index, self.seed):
            start = int(np.random.default_rng([self.seed, epoch, 1]).integers(self.context)) + i * self.context
            rows.append(self.tokens[start : start + self.context])
        ids = np.stack(rows).astype(np.int64)
        ids[np.random.default_rng([self.seed, index, 2]).random(len(ids)) < 0.5, 0] = self.tokenizer.bos_token_id
        return ids, ids, None

    def items(self, labels: np.ndarray) -> int:
        return labels[:, 1:].size

    def checksum(self) -> int:
        return zlib.crc32(self.tokens.tobytes())

    def evaluate(self, params: dict, cfg: OPTConfig, ops: ModuleType) -> dict[str, float]:
        return mean_scores([bits_per_byte(params, cfg, self.tokenizer, text, self.context, ops) for text in self.eval_texts])


def mean_scores(scores: list[tuple[float, int, int]]) -> dict[str, float]:
    """Totals of (nats, tokens, bytes) as loss per token and bits per byte."""
    nats, tokens, size = (sum(column) for column in zip(*scores, strict=True))
    return {"eval_loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}


def bits_per_byte(params: dict, cfg: OPTConfig, tokenizer: OPTTokenizer, text: str, context: int,
                  ops: ModuleType = numpy_ops) -> tuple[float, int, int]:  # fmt: skip
    """Nats, tokens and UTF-8 bytes of a text, cut into windows that do not overlap: </s> and context - 1 tokens; every token is predicted once."""
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False))
    nats = 0.0
    for start in range(0, len(tokens), context - 1):
        window = tokens[start : start + context - 1]
        logits = forward(params, np.array([[tokenizer.bos_token_id, *window[:-1]]]), cfg, ops=ops)[0]  # (T, V)
        nats += numpy_ops.cross_entropy(host(logits), window)[0]
    return nats, len(tokens), len(text.encode())


class Examples:
    """What classification and question answering share: right-padded batches of examples, cut at `context` tokens."""

    head: Any
    keys: tuple[str, ...]

    def __init__(self, tokenizer: OPTTokenizer, data: str, eval_data: str | None, context: int, batch_size: int, seed: int) -> None:
        self.tokenizer, self.context, self.batch_size, self.seed = tokenizer, context, batch_size, seed
        examples = read_examples(data, self.keys)
        self.prepare(list(examples.values()))
        self.rows = self.rows_of(data, examples)
        self.eval_rows = self.rows_of(eval_data, read_examples(eval_data, self.keys)) if eval_data else []

    def prepare(self, examples: list[dict]) -> None: ...

    def rows_of(self, path: str, examples: dict[int, dict]) -> list[tuple[list[int], Any]]:
        rows = []
        for number, example in examples.items():
            try:
                rows.append(self.row(example))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
        return rows

    row: Callable[[dict], tuple[list[int], Any]]  # an example as ids and label
    answer: Callable[..., np.ndarray]  # the model's prediction for each row
    measures: Callable[[list, list], dict[str, float]]  # how good the predictions are

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.stack([self.rows[i] for _, i in indices(len(self.rows), self.batch_size, index, self.seed)])

    def stack(self, rows: list[tuple[list[int], Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batch = self.tokenizer.pad([ids for ids, _ in rows])
        return batch["input_ids"], np.array([label for _, label in rows]), batch["attention_mask"]

    def items(self, labels: np.ndarray) -> int:
        return len(labels)

    def checksum(self) -> int:
        return zlib.crc32(repr(self.rows).encode())

    def evaluate(self, params: dict, cfg: OPTConfig, ops: ModuleType) -> dict[str, float]:
        """Loss and the task's measures over the evaluation rows."""
        losses, answers, wanted = [], [], []
        head = map_leaves(host, {name: params[name] for name in HEADS if name in params})  # it is small: NumPy computes it for every backend
        for first in range(0, len(self.eval_rows), self.batch_size):
            ids, labels, mask = self.stack(self.eval_rows[first : first + self.batch_size])
            h = host(last_hidden_state(params, ids, cfg, attention_mask=mask, ops=ops, padding=True))
            losses.append(self.head(h, head, ids, labels, cfg)[0] * len(ids))
            answers += list(self.answer(h, head, ids, mask, cfg))
            wanted += labels.tolist()
        return {"eval_loss": sum(losses) / len(wanted), **self.measures(answers, wanted)}


class Classification(Examples):
    """Lines of {"text": …, "label": …}; labels are any JSON strings or numbers, in sorted order."""

    head = staticmethod(grad.classification_head)
    keys = ("text", "label")

    def prepare(self, examples: list[dict]) -> None:
        self.labels = sorted({str(e["label"]) for e in examples})
        if len(self.labels) < 2:
            raise DataError(f"every example has the label {self.labels[0]!r}; a classifier needs at least two")

    def row(self, example: dict) -> tuple[list[int], int]:
        if str(example["label"]) not in self.labels:
            raise DataError(f"the label {example['label']!r} is not in the training data ({', '.join(self.labels)})")
        return self.tokenizer.encode(example["text"])[: self.context], self.labels.index(str(example["label"]))

    def answer(self, h: np.ndarray, head: dict, ids: np.ndarray, mask: np.ndarray, cfg: OPTConfig) -> np.ndarray:
        pooled = h[np.arange(len(h)), grad.pooled_rows(ids, cfg.pad_token_id)]
        return numpy_ops.linear(pooled, **head["score"]).argmax(-1)

    def measures(self, answers: list[int], wanted: list[int]) -> dict[str, float]:
        """Accuracy, and F1 averaged over the classes."""
        a, w = np.array(answers), np.array(wanted)
        f1 = [2 * np.sum((a == c) & (w == c)) / max(np.sum(a == c) + np.sum(w == c), 1) for c in range(len(self.labels))]
        return {"accuracy": float((a == w).mean()), "f1": float(np.mean(f1))}


class QuestionAnswering(Examples):
    """Lines of {"question": …, "context": …, "answer": …, "answer_start": …}, as SQuAD: the answer starts at that character of the context."""

    head = staticmethod(grad.question_head)
    keys = ("question", "context", "answer", "answer_start")

    def rows_of(self, path: str, examples: dict[int, dict]) -> list[tuple[list[int], Any]]:
        """The rows, without those whose answer is cut off, which teach nothing."""
        rows = super().rows_of(path, examples)
        whole = [row for row in rows if max(row[1]) < self.context]
        if not whole:
            raise DataError(f"{path}: every answer lies beyond the first --context {self.context} tokens; raise it")
        if len(whole) < len(rows):
            warnings.warn(
                f"{path}: {len(rows) - len(whole)} of {len(rows)} answers lie beyond --context {self.context} and are left out", stacklevel=2
            )
        return whole

    def row(self, example: dict) -> tuple[list[int], tuple[int, int]]:
        """</s> question </s> context, cut at `context` tokens; an end that is cut off gets the position `context`."""
        text, start, answer = example["context"], example["answer_start"], example["answer"]
        if start < 0 or not answer or text[start : start + len(answer)] != answer:
            raise DataError(
                f"the answer {answer!r} does not stand at character {start} of its context, where {text[start : start + len(answer)]!r} is"
            )
        ids, spans = self.tokenizer.encode_with_spans(text)
        question = [*self.tokenizer.encode(example["question"]), self.tokenizer.bos_token_id]
        inside = [i for i, (a, b) in enumerate(spans) if a < start + len(answer) and b > start]
        ids = (question + ids)[: self.context]
        ends = [len(question) + inside[0], len(question) + inside[-1]]
        return ids, tuple(e if e < len(ids) else self.context for e in ends)  # type: ignore[return-value]

    def answer(self, h: np.ndarray, head: dict, ids: np.ndarray, mask: np.ndarray, cfg: OPTConfig) -> np.ndarray:
        """The best span with start ≤ end.  -> (B, 2)"""
        start, end = np.moveaxis(np.where(mask[..., None], numpy_ops.linear(h, **head["qa_outputs"]), -np.inf), -1, 0)  # (B, T) each
        total = start[:, :, None] + end[:, None, :]  # (B, start, end)
        total[:, np.tri(ids.shape[1], k=-1, dtype=bool)] = -np.inf
        return np.stack(np.divmod(total.reshape(len(ids), -1).argmax(-1), ids.shape[1]), -1)

    def measures(self, answers: list[Any], wanted: list[Any]) -> dict[str, float]:
        """Share of spans found exactly, and F1 over the tokens of the span."""
        exact = [tuple(a) == tuple(w) for a, w in zip(answers, wanted, strict=True)]
        f1 = [span_f1(range(a[0], a[1] + 1), range(w[0], w[1] + 1)) for a, w in zip(answers, wanted, strict=True)]
        return {"accuracy": float(np.mean(exact)), "f1": float(np.mean(f1))}


def span_f1(found: Iterable[int], wanted: Iterable[int]) -> float:
    """The F1 of two bags of tokens, as SQuAD measures answers."""
    a, b = collections.Counter(found), collections.Counter(wanted)
    return 2 * (a & b).total() / (a.total() + b.total())
