"""Settings: the options of generate under HF's names and defaults, checked once, and where each one comes from."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from opt_np.config import OPTConfig


@dataclass(frozen=True)
class Settings:
    """How to decode. Greedy by default; top_k is 50 unless set otherwise, as in HF; min_p=0 and penalty_alpha=0 are HF's None. Raises ValueError."""

    # how long, and where to stop
    max_new_tokens: int | None = None
    max_length: int | None = None  # the prompt, with its padding, included; max_new_tokens wins
    min_length: int = 0
    min_new_tokens: int | None = None  # wins over min_length
    eos_token_id: Any = ()  # one id, several, or [] for none
    pad_token_id: int | None = None
    stop_strings: Any = ()  # one string or several; needs tokenizer=
    overflow: str = "error"  # past the model's positions: "error", "truncate_left" or "slide"
    # how scores are changed: processors.py
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Any = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    # how tokens are chosen by their scores: generate.py, beam.py, contrastive.py
    seed: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_id", tuple(np.ravel(self.eos_token_id).tolist()))
        object.__setattr__(self, "stop_strings", (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings))
        for name, (holds, rule) in RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value!r} {rule}")
        if self.num_return_sequences > (self.num_beams if self.beams or not self.do_sample else math.inf):
            most = f"at most num_beams={self.num_beams}" if self.beams else "1 without do_sample=True or beams: greedy search has one answer"
            raise ValueError(f"num_return_sequences={self.num_return_sequences} must be {most}")

    @property
    def beams(self) -> bool:
        return self.num_beams > 1

    @property
    def contrastive(self) -> bool:
        """Whether penalty_alpha has an effect, by HF's rule."""
        return self.penalty_alpha > 0 and self.top_k > 1 and not self.do_sample and not self.beams

    def without_effect(self) -> dict[str, str]:
        """Options that are set but have no effect, and what they would need."""
        sampling = {} if self.do_sample else dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p"), "do_sample=True")
        beams = {} if self.beams else dict.fromkeys(("length_penalty", "early_stopping"), "num_beams above 1")
        needs = {**sampling, **beams, "penalty_alpha": "top_k above 1, or with do_sample or beams"}
        of_use = {"top_k", "penalty_alpha"} if self.contrastive else set()
        return {name: need for name, need in needs.items() if name not in of_use and getattr(self, name) != getattr(Settings, name)}


def whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    """A test of whether a value is an integer from `least` to `most`."""
    return lambda value: isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(least <= value <= most)


def number(least: float, most: float = math.inf, or_equal: bool = False) -> Callable[[Any], bool]:
    """A test of whether a value is a number above `least` (with or_equal, also `least` itself), and at most `most`."""
    return lambda value: isinstance(value, numbers.Real) and (least < float(value) <= most or (or_equal and value == least))


def id_lists(value: Any) -> bool:
    """Whether a value is a list of lists of ids, none of them empty."""
    return isinstance(value, list | tuple) and all(isinstance(word, list | tuple) and word and all(map(whole(0), word)) for word in value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {  # the test of each option's value, and the rule as an error states it
    "max_new_tokens": (lambda n: isinstance(n, int | np.integer), "must be a whole number"),
    "max_length": (lambda n: isinstance(n, int | np.integer), "must be a whole number"),
    "min_length": (whole(0), "must be a whole number of at least 0"),
    "min_new_tokens": (whole(0), "must be a whole number of at least 0"),
    "eos_token_id": (lambda ids: all(isinstance(i, int) and abs(i) < 2**63 for i in ids), "must be whole numbers: one id, several, or [] for none"),
    "pad_token_id": (whole(0), "must be a whole number of at least 0"),
    "stop_strings": (lambda strings: all(isinstance(s, str) and s for s in strings), "must be texts of at least one character"),
    "overflow": (lambda way: way in ("error", "truncate_left", "slide"), 'must be "error", "truncate_left" or "slide"'),
    "repetition_penalty": (number(0), "must be above 0 (1 turns it off)"),
    "no_repeat_ngram_size": (whole(0), "must be a whole number of at least 0 (0 turns it off)"),
    "bad_words_ids": (id_lists, "must be a list of lists of ids, none of them empty"),
    "do_sample": (lambda on: isinstance(on, bool | np.bool_), "must be True or False"),
    "temperature": (number(0), "must be above 0; for the likeliest token every time use do_sample=False"),
    "top_k": (whole(0), "must be a whole number of at least 0 (0 turns it off)"),
    "top_p": (number(0, 1), "must be above 0 and at most 1"),
    "min_p": (number(0, 1, or_equal=True), "must be from 0 to 1 (0 turns it off)"),
    "typical_p": (number(0, 1), "must be above 0 and at most 1"),
    "seed": (whole(0), "must be a whole number of at least 0"),
    "num_return_sequences": (whole(1, 1_000_000), "must be a whole number from 1 to 1000000"),
    "num_beams": (whole(1, 1_000_000), "must be a whole number from 1 to 1000000"),
    "length_penalty": (lambda p: isinstance(p, numbers.Real) and abs(float(p)) <= 50, "must be a number from -50 to 50"),
    "early_stopping": (lambda way: isinstance(way, bool) or way == "never", 'must be True, False or "never"'),
    "penalty_alpha": (number(0, 1, or_equal=True), "must be from 0 to 1 (0 turns it off)"),
}

# Keys of a generation_config.json that would change the output, but are not implemented here: the value at which each has no effect.
NOT_BUILT = {
    "begin_suppress_tokens": None, "constraints": None, "diversity_penalty": 0, "dola_layers": None, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "exponential_decay_length_penalty": None, "force_words_ids": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1, "max_time": None, "num_beam_groups": 1,
    "remove_invalid_values": False, "renormalize_logits": False, "sequence_bias": None, "suppress_tokens": None, "token_healing": False,
    "top_h": None, "watermarking_config": None,
}  # fmt: skip


def resolve(options: dict[str, Any], generation_config: dict[str, Any] | None, cfg: OPTConfig) -> Settings:
    """Takes each option from the caller (None: not given), else generation_config.json (config.json if there is none), else HF's default.

    Keys of generation_config.json that would change the output but are not implemented here are named in one warning, and so are the caller's
    options that have no effect. Raises TypeError for an option that does not exist, ValueError for an invalid value.
    """
    known = [f.name for f in fields(Settings)]
    unknown = options.keys() - set(known)
    if unknown:
        raise TypeError(f"generate has no option {', '.join(sorted(unknown))}; it has attention_mask, tokenizer, {', '.join(known)}")
    ours = ("seed", "overflow")  # not keys of HF's files
    ids = {"eos_token_id": cfg.eos_token_id, "pad_token_id": cfg.pad_token_id}  # also used where generation_config.json lacks them; HF then has none
    stored = {**ids, **generation_config} if generation_config else cfg.to_dict()
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings(**{name: value for name, value in stored.items() if name in known and name not in ours and value is not None} | given)
    ignored = sorted(name for name, neutral in NOT_BUILT.items() if stored.get(name) not in (None, neutral, [], {}))
    if ignored:
        warnings.warn(f"the model's generation_config asks for {', '.join(ignored)}, which is not built here and has no effect", stacklevel=5)
    idle = {name: need for name, need in settings.without_effect().items() if name in given}
    if idle:
        warnings.warn("; ".join(f"{name} has no effect without {need}" for name, need in idle.items()), stacklevel=5)
    outside = [i for i in settings.eos_token_id if i >= cfg.vocab_size] if "eos_token_id" in given else []
    if outside:
        warnings.warn(f"eos_token_id={outside} is outside the vocabulary of {cfg.vocab_size} ids, and ends nothing", stacklevel=5)
    if "max_length" in given and settings.max_new_tokens is not None:
        both = f"max_length={settings.max_length} and max_new_tokens={settings.max_new_tokens} are both set"
        warnings.warn(f"{both}; max_new_tokens wins", stacklevel=5)
    return settings
