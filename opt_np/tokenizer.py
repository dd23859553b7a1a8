"""OPT's tokenizer: GPT-2's byte-level BPE with OPT's ids, `</s>` (id 2) once at the start, and padding on either side.

The merging is done by the `tokenizers` library; this file adds what is OPT's own: which ids are special, where they go, and how text is streamed.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3; only <pad> and </s> are special to HF's OPT tokenizer
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


class OPTTokenizer:
    """Text to ids and back; equals HF's tokenizer for facebook/opt-* (transformers 5).

    tok("a b") -> {"input_ids": [2, …], "attention_mask": [1, …]}; a list of texts gives lists, or int64 arrays (B, T) with padding.
    """

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> None:
        self._tokenizer, self.config = tokenizer, dict(config or {})
        self.bos_token, self.eos_token, self.pad_token = (_content(self.config, f"{name}_token", default) for name, default in
                                                          (("bos", "</s>"), ("eos", "</s>"), ("pad", "<pad>")))  # fmt: skip
        self.add_bos_token = self.config.get("add_bos_token", True)
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (self.bos_token, self.eos_token, self.pad_token)])
        ids = [tokenizer.token_to_id(t) for t in (self.bos_token, self.eos_token, self.pad_token)]
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (int(i) for i in ids if i is not None)
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None) -> OPTTokenizer:
        """Reads tokenizer_config.json and either vocab.json and merges.txt or tokenizer.json of a folder or hub id. Raises CheckpointError."""
        from opt_np.hub import find

        return cls.from_folder(find(folder, revision, weights=False).tokenizer)

    @classmethod
    def from_folder(cls, folder: Path, **settings: Any) -> OPTTokenizer:
        """As `from_pretrained`, from a folder already located; `settings` override those of its config. Raises CheckpointError."""
        from opt_np.checkpoint import CheckpointError, read_json

        vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        split = vocab.exists() and merges.exists()
        if not split and not whole.exists():
            raise CheckpointError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json; copy them from the model's repository")
        try:
            if split:
                tokenizer = byte_level(models.BPE.from_file(str(vocab), str(merges)), config.get("add_prefix_space", False))
                _add_tokens(tokenizer, _added_tokens(folder, config), folder)
            else:
                tokenizer = Tokenizer.from_file(str(whole))
                config = {"add_bos_token": bool(tokenizer.encode("").ids), **config}  # the file defines what precedes a text (Galactica: nothing)
        except CheckpointError:
            raise
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise CheckpointError(f"{f'{vocab} with {merges.name}' if split else whole} cannot be read as a tokenizer: {error}") from None
        tokenizer.no_truncation()  # a tokenizer.json stores both as they were when it was saved; here the caller chooses them
        tokenizer.no_padding()
        return cls(tokenizer, config | settings)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> OPTTokenizer:
        """Learns merges from texts until there are vocab_size ids; ids 0 to 3 are OPT's special tokens."""
        if vocab_size < 256 + len(SPECIAL_TOKENS):
            raise ValueError(
                f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need {256 + len(SPECIAL_TOKENS)}"
            )
        tokenizer = byte_level(models.BPE(), add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        learnt = json.loads(tokenizer.to_str())["model"]  # rebuilt, so that <s> and <unk> are ordinary text, as in OPT
        return cls(byte_level(models.BPE(learnt["vocab"], [tuple(m) for m in learnt["merges"]]), add_prefix_space=False))

    @property
    def vocab_size(self) -> int:
        """The number of ids that have a token (a model may have more embedding rows: 50272 for 50265)."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, text_pair: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """One text to ids: </s> text, or </s> text </s> text_pair."""
        bos = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        ids = bos + self._encoding(text).ids
        if text_pair is not None:
            ids += bos + self._encoding(text_pair).ids
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without </s>, and for each the characters [start, end) of the text that it encodes."""
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str) -> Any:
        """Encodes a text; raises ValueError for invalid Unicode: half a surrogate pair, which Python makes of undecodable bytes."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            if not isinstance(text, str):
                raise
            bad = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
            raise ValueError(f"the text is not valid Unicode: character {bad} is {text[bad]!r}, half of a pair; is it UTF-8?") from None

    def __call__(self, text: Any, text_pair: Any = None, padding: bool = False, padding_side: str = "right",
                 truncation: bool = False, max_length: int | None = None, add_special_tokens: bool = True) -> dict[str, Any]:  # fmt: skip
        """Texts to input_ids and attention_mask: lists, or int64 arrays (B, T) with padding=True. Truncation keeps the first max_length ids."""
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side is {padding_side!r}; it is "left" (to generate) or "right"')
        if padding not in (True, False, "longest"):
            raise ValueError(f'padding is {padding!r}; it is True or "longest" (to the longest row), or False')
        if bool(truncation) != (max_length is not None):
            raise ValueError("truncation=True needs max_length" if truncation else f"max_length={max_length} cuts nothing without truncation=True")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1")
        single = isinstance(text, str)
        texts, pairs = ([text], [text_pair or None]) if single else (list(text), list(text_pair) if text_pair is not None else [None] * len(text))
        rows = [self.encode(a, b, add_special_tokens) for a, b in zip(texts, pairs, strict=True)]
        rows = [ids[:max_length] if truncation else ids for ids in rows]
        if padding:
            return self.pad(rows, padding_side)
        masks = [[1] * len(ids) for ids in rows]
        return {"input_ids": rows[0], "attention_mask": masks[0]} if single else {"input_ids": rows, "attention_mask": masks}

    def pad(self, rows: Sequence[Sequence[int]], padding_side: str = "right") -> dict[str, np.ndarray]:
        """Pads rows of ids to one array, with its mask.  -> input_ids (B, T), attention_mask (B, T), int64"""
        T = max(map(len, rows), default=0)
        ids, mask = np.full((len(rows), T), self.pad_token_id, np.int64), np.zeros((len(rows), T), np.int64)
        for b, row in enumerate(rows):
            where = slice(T - len(row), T) if padding_side == "left" else slice(len(row))
            ids[b, where], mask[b, where] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Ids to text; an id that has a row in the model but no token gives no text."""
        return "".join(self.stream_decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens))

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream_decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> Iterable[str]:
        """Yields text as it is completed, one piece per id and a last one; joined, they are decode(ids)."""
        detokenizer = self.detokenizer(skip_special_tokens)
        for i in ids:
            yield detokenizer.put(i)
        yield detokenizer.end()

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self, skip_special_tokens)

    def token_bytes(self, i: int) -> bytes:
        """The bytes that an id stands for; empty for an id without a token."""
        token = self._tokenizer.id_to_token(int(i)) if i >= 0 else None
        if token is None:
            return b""
        if int(i) in self._added:
            return token.encode()
        return bytes(BYTE_OF[c] for c in token)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes vocab.json, merges.txt and the two small configs: the files of facebook/opt-125m, which HF reads too.

        A tokenizer whose normalizer or pre-tokenizer differs, as in some tokenizer.json, is written as tokenizer.json instead of the first two.
        """
        from opt_np.checkpoint import write_text

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = json.loads(self._tokenizer.to_str())
        plain, bpe = json.loads(byte_level(models.BPE(), self.config.get("add_prefix_space", False)).to_str()), own["model"]
        contents = {"bos_token": self.bos_token, "eos_token": self.eos_token, "unk_token": self.eos_token, "pad_token": self.pad_token}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        token = {name: {"content": content, **flags} for name, content in contents.items()}
        own_way = any(own[part] != plain[part] for part in ("normalizer", "pre_tokenizer"))
        config: dict[str, Any] = {"errors": "replace", "tokenizer_class": "PreTrainedTokenizerFast" if own_way else "GPT2Tokenizer"}
        config |= {"add_prefix_space": False, "add_bos_token": self.add_bos_token, **self.config}
        config |= {name: {**t, "__type": "AddedToken"} for name, t in token.items()}
        added = {i: t for i, t in self._added.items() if t.content not in bpe["vocab"] or t.content not in contents.values()}
        if added:
            config["added_tokens_decoder"] = {str(i): {name: getattr(t, name) for name in ("content", *FLAGS)} for i, t in added.items()}
        merges = "".join(f"{a} {b}\n" for a, b in bpe["merges"])
        if own_way:
            write_text(folder / "tokenizer.json", self._tokenizer.to_str())
            for name in FILES[:2]:  # left by another tokenizer: they would be read first
                (folder / name).unlink(missing_ok=True)
        else:
            write_text(folder / FILES[0], json.dumps(bpe["vocab"], ensure_ascii=False))
            write_text(folder / FILES[1], "#version: 0.2\n" + merges)
        write_text(folder / FILES[2], json.dumps(config))
        write_text(folder / FILES[3], json.dumps(token))


class Detokenizer:
    """Turns a stream of ids into text, holding back the bytes of a character until it is complete.

    >>> text = "".join([d.put(i) for i in ids] + [d.end()])     # doctest: +SKIP
    """

    def __init__(self, tokenizer: OPTTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, i: int) -> str:
        return "" if i in self._skipped else self._decoder.decode(self._tokenizer.token_bytes(i))

    def end(self) -> str:
        """The remaining text, with incomplete characters as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens that a fine-tune added to the vocabulary, by id, from whichever file lists them."""
    from opt_np.checkpoint import read_json

    if "added_tokens_decoder" in config:
        return {int(i): token for i, token in config["added_tokens_decoder"].items()}
    if (folder / "tokenizer.json").exists():
        return {token["id"]: token for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    return {i: {"content": content} for content, i in read_json(folder / "added_tokens.json").items()}


def _add_tokens(tokenizer: Tokenizer, added: dict[int, dict[str, Any]], folder: Path) -> None:
    from opt_np.checkpoint import CheckpointError

    for i, token in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(token["content"], **{name: token.get(name, False) for name in FLAGS})])
        if tokenizer.token_to_id(token["content"]) != i:
            found = tokenizer.token_to_id(token["content"])
            raise CheckpointError(
                f"{folder}: the added token {token['content']!r} should have id {i}, and gets {found}; is a file of the vocabulary missing?"
            )


def byte_level(bpe: models.BPE, add_prefix_space: bool) -> Tokenizer:
    """A byte-level tokenizer, as GPT-2 and OPT have it, with this BPE model."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _content(config: dict[str, Any], name: str, default: str) -> str:
    """A special token's text, which the config gives as a string or in an object. Raises CheckpointError."""
    from opt_np.checkpoint import CheckpointError

    token = config.get(name) or default
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"tokenizer_config.json's {name} is {token!r}; it must be a text, such as {default!r}")
    return text


def byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-in character for each byte: a printable byte for itself, the rest from U+0100 on (openai/gpt-2 encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = byte_alphabet()
