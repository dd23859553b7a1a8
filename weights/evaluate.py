"""Bits per byte of the shipped model on a text, beside a byte 5-gram model: python weights/evaluate.py BOOK… --train TEXT…

Bits per byte compare models whatever their tokens are: total -log2 p of the text over its UTF-8 bytes. The text is cut in windows of the model's
context that do not overlap, each read from </s>; every token is predicted once.
"""

import argparse
from pathlib import Path

import numpy as np

from opt_np import checkpoint
from opt_np.tasks import bits_per_byte, mean_scores, read_texts
from opt_np.tokenizer import OPTTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", nargs="+", help="texts to score")
    parser.add_argument("--train", nargs="+", default=[], help="the texts that the model was trained on, to count the 5-grams in (optional)")
    parser.add_argument("--model", default=Path(__file__).parent / "opt-tiny")
    parser.add_argument("--context", type=int, help="tokens per window (default: the model's context)")
    args = parser.parse_args()
    params, cfg = checkpoint.load(args.model)
    tokenizer = OPTTokenizer.from_pretrained(args.model)
    ngrams = NGrams("".join(read_texts(args.train)).encode()) if args.train else None
    context = max(2, min(args.context or cfg.max_position_embeddings, cfg.max_position_embeddings))
    for book in args.books:
        text = "".join(read_texts([book]))
        bits = mean_scores([bits_per_byte(params, cfg, tokenizer, text, context)])["bits_per_byte"]
        beside = f", byte 5-gram {ngrams.bits_per_byte(text.encode()):.3f}" if ngrams else ""
        print(f"{book}: {bits:.3f} bits per byte{beside}")


class NGrams:
    """Byte n-grams of orders 1 to 5, interpolated (Witten-Bell): p = (count + kinds·p_lower) / (total + kinds), kinds = different bytes seen next."""

    def __init__(self, text: bytes, order: int = 5) -> None:
        self.order, self.tables = order, []
        for n in range(1, order + 1):
            keys, counts = np.unique(self.keys(np.frombuffer(text, np.uint8), n), return_counts=True)
            contexts, first = np.unique(keys >> 8, return_index=True)
            totals, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(keys))
            self.tables.append((keys, counts, contexts, totals, kinds))

    @staticmethod
    def keys(data: np.ndarray, n: int) -> np.ndarray:
        """Each run of n bytes as one number."""
        windows = np.lib.stride_tricks.sliding_window_view(data, n).astype(np.int64)
        return windows @ (1 << (8 * np.arange(n)[::-1]))

    def bits_per_byte(self, text: bytes) -> float:
        data = np.concatenate([np.full(self.order - 1, ord("\n"), np.uint8), np.frombuffer(text, np.uint8)])
        p = np.full(len(text), 1 / 256)
        for n, (keys, counts, contexts, totals, kinds) in enumerate(self.tables, 1):
            grams = self.keys(data[self.order - n :], n)
            count, at = look_up(grams, keys, counts), grams >> 8
            total, kind = look_up(at, contexts, totals), look_up(at, contexts, kinds)
            p = np.where(total > 0, (count + kind * p) / np.maximum(total + kind, 1), p)
        return float(-np.log2(p).mean())


def look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none; keys are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


if __name__ == "__main__":
    main()
