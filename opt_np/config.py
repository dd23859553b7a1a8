"""OPTConfig: the keys of config.json, checked once, and the nine published sizes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACTIVATIONS = ("relu", "gelu", "gelu_new")  # OPT's, Galactica's, GPT-2's
FIRST_ROW = "first_position_row"  # an extra key, set when a GPT-2 is loaded as an OPT: the row of position 0 in its own position table
POSITION_OFFSET = 2  # embed_positions has max_position_embeddings + 2 rows; position p reads row p + 2

# name: layers, heads, hidden_size (ffn_dim is four times that). Source: metaseq/launcher/opt_job_constants.py.
SIZES = {
    "125m": (12, 12, 768), "350m": (24, 16, 1024), "1.3b": (24, 32, 2048), "2.7b": (32, 32, 2560), "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120), "30b": (48, 56, 7168), "66b": (64, 72, 9216), "175b": (96, 96, 12288),
}  # fmt: skip

# Keys that would change the model's output, and the only value of each that this code supports.
ONLY_VALUES: dict[str, Any] = {"model_type": "opt", "scale_embeddings": False, "learned_embeddings": True}
QUANTIZED: dict[str, tuple] = {"int8": (None,), "int4": (32, 64)}  # kinds of integer weights (quantize.py), and their group sizes


@dataclass(frozen=True)
class OPTConfig:
    """The keys of config.json, under its own names and with HF's defaults (equals transformers' OPTConfig).

    Raises ValueError for a value that this code does not support. Unknown keys go into `extra`, so that saving writes them back.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int = None  # type: ignore[assignment]  # becomes hidden_size
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "ffn_dim",
            "max_position_embeddings",
            "word_embed_proj_dim",
            "num_attention_heads",
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config.json's {key} is {value!r}; it must be a whole number of at least 1")
        for key in ("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"config.json's {key} is {getattr(self, key)!r}; it must be true or false")
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            for value in getattr(self, key) if isinstance(getattr(self, key), list) and key == "eos_token_id" else [getattr(self, key)]:
                if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                    raise ValueError(f"config.json's {key} is {getattr(self, key)!r}; it must be a whole number, an id, or null")
        for key, most in (("dropout", 1), ("attention_dropout", 1), ("layerdrop", 1), ("init_std", float("inf"))):
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
                raise ValueError(f"config.json's {key} is {value!r}; it must be a number from 0{' to 1' if most == 1 else ' up'}")
        labels = self.extra.get("num_labels", 2)
        if not isinstance(labels, int) or isinstance(labels, bool) or labels < 1:
            raise ValueError(f"config.json's num_labels is {labels!r}; it must be a whole number of at least 1")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"config.json's pad_token_id is {self.pad_token_id}; vocab_size={self.vocab_size} allows 0 to {self.vocab_size - 1}, or null"
            )
        if not isinstance(self.extra.get("id2label", {}), dict):
            raise ValueError(f"config.json's id2label is {self.extra['id2label']!r}; it must be an object of ids and names")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.json's hidden_size={self.hidden_size} does not divide into num_attention_heads={self.num_attention_heads} heads; "
                f"choose a hidden_size that is a multiple of the heads"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"config.json's activation_function is {self.activation_function!r}; OPT checkpoints use one of {', '.join(ACTIVATIONS)}"
            )
        for key, supported in ONLY_VALUES.items():
            if self.extra.get(key, supported) != supported:
                raise ValueError(f"config.json's {key} is {self.extra[key]!r}; opt_np computes only {supported!r}. Is it an OPT checkpoint?")
        found = self.extra.get("quantization_config")
        if found is not None and not (isinstance(found, dict) and found.get("quant_method") == "opt-np" and found.get("kind") in QUANTIZED
                                      and found.get("group_size") in QUANTIZED[found["kind"]]):  # fmt: skip
            raise ValueError(f"config.json's quantization_config is {found!r}; opt_np computes only None and what opt-np quantize writes")

    @property
    def quantized(self) -> tuple[str, int] | None:
        """For quantised weights "int8" or "int4", and how many columns share a scale (None for int8: one scale per row); else None."""
        found = self.extra.get("quantization_config")
        return found and (found["kind"], found.get("group_size"))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether the decoder ends in a LayerNorm: pre-norm models do, except fine-tunes from before June 2022."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def has_projections(self) -> bool:
        """Whether the token embeddings are narrower or wider than the residual stream (opt-350m: 512 against 1024)."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def num_labels(self) -> int:
        """The number of classes of OPTForSequenceClassification, from HF's keys: the length of id2label, else num_labels, else 2."""
        return len(self.extra["id2label"]) if "id2label" in self.extra else self.extra.get("num_labels", 2)

    def with_labels(self, names: Sequence[str], **extra: Any) -> OPTConfig:
        """The same config with these label names for a classifier, under HF's keys (id2label, label2id), and with the `extra` keys."""
        labels = {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}
        return dataclasses.replace(self, extra={**self.extra, **extra, **labels})

    @classmethod
    def from_size(cls, size: str, **changes: Any) -> OPTConfig:
        """The published configuration of a size: "125m", "350m", … "175b"."""
        if size.removeprefix("opt-") not in SIZES:
            raise ValueError(f"no OPT size {size!r}; there are {', '.join(SIZES)}")
        layers, heads, hidden = SIZES[size.removeprefix("opt-")]
        odd: dict[str, Any] = {"word_embed_proj_dim": 512, "do_layer_norm_before": False} if hidden == 1024 else {}
        return cls(**{"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, "ffn_dim": 4 * hidden, **odd, **changes})

    @classmethod
    def from_dict(cls, keys: dict[str, Any]) -> OPTConfig:
        """Known keys become fields; the rest goes into `extra`."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        return cls(**{k: v for k, v in keys.items() if k in known}, extra={k: v for k, v in keys.items() if k not in known})

    @classmethod
    def from_json(cls, path: str | Path) -> OPTConfig:
        """Reads a config.json; raises ValueError naming the file when it is not one."""
        try:
            keys = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(keys, dict):
            raise ValueError(f"{path} holds a JSON {type(keys).__name__}; a config is an object of keys and values")
        if isinstance(keys.get("text_config"), dict):  # OPT as a part of a larger model, such as BLIP-2
            keys = keys["text_config"]
        try:
            return cls.from_dict(keys)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every key of config.json, the unknown ones included."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**self.extra, **keys, "model_type": "opt"}


def parameter_shapes(cfg: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Name (from the decoder down) and shape of every tensor, in the checkpoint's order; lm_head is listed only if it is not tied."""
    D, F, W = cfg.hidden_size, cfg.ffn_dim, cfg.word_embed_proj_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (cfg.vocab_size, W),
        "embed_positions.weight": (cfg.max_position_embeddings + POSITION_OFFSET, D),
    }

    def linear(name: str, out: int, inp: int) -> None:
        shapes[f"{name}.weight"] = (out, inp)
        if cfg.enable_bias:
            shapes[f"{name}.bias"] = (out,)

    def layer_norm(name: str) -> None:
        if cfg.layer_norm_elementwise_affine:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (D,)

    if cfg.has_projections:  # these two never have a bias
        shapes["project_out.weight"], shapes["project_in.weight"] = (W, D), (D, W)
    if cfg.has_final_layer_norm:
        layer_norm("final_layer_norm")
    for i in range(cfg.num_hidden_layers):
        for proj in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"layers.{i}.self_attn.{proj}", D, D)
        layer_norm(f"layers.{i}.self_attn_layer_norm")
        linear(f"layers.{i}.fc1", F, D)
        linear(f"layers.{i}.fc2", D, F)
        layer_norm(f"layers.{i}.final_layer_norm")
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, W)
    return shapes
