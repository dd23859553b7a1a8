"""OPTModel, OPTForCausalLM, OPTForSequenceClassification, OPTForQuestionAnswering: HF's class names for the functions of model.py and grad.py."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opt_np import checkpoint, embeddings, grad, hub, model, taps
from opt_np import explain as explaining
from opt_np import generate as decoding
from opt_np.arrays import host
from opt_np.checkpoint import CheckpointError
from opt_np.config import OPTConfig
from opt_np.init import init_head
from opt_np.kv_cache import KVCache
from opt_np.quantize import num_parameters, quantizer, with_kind

BACKENDS = {"numpy": ("float32", "float64"), "cpu": ("float32", "float16", "bfloat16"), "cuda": ("float32", "float16", "bfloat16")}


@dataclass
class Output:
    """A model's return value; fields that were not requested, or that its class does not have, are None."""

    logits: Any = None
    loss: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    past_key_values: KVCache | None = None
    last_hidden_state: Any = None
    start_logits: Any = None
    end_logits: Any = None


class OPTPreTrained:
    """The base of the four classes: `params`, `config`, `ops`, loading and saving."""

    head: str | None = None  # the name of the head's tensors, in the checkpoint

    def __init__(self, params: dict, config: OPTConfig, backend: str = "numpy", generation_config: dict | None = None) -> None:
        if missing := self.missing_head(params, config):
            raise CheckpointError(f"the parameters have no {missing}, which {type(self).__name__} needs")
        self.config, self.ops = config, load_ops(backend)
        self.params = self.ops.pack(params)
        self.generation_config = generation_config or {}  # generation_config.json: this checkpoint's defaults for generate

    def __getstate__(self) -> dict:
        """For copies, also in other processes: a module is copied as its name."""
        return {**vars(self), "ops": self.ops.__name__}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, ops=importlib.import_module(state["ops"]))

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None, dtype: str = "float32", backend: str = "numpy",
                        quantize: str | None = None, new_head: bool = False, num_labels: int = 2, seed: int = 0,
                        strict: bool = False, stream_layers: bool = False) -> Any:  # fmt: skip
        """Loads a folder, or a hub id at a revision: from the local cache, else from the hub.

        dtype is that of the weights in memory: float32 always; float64 with backend "numpy"; float16 and bfloat16 with "cpu" and "cuda".
        backend may also be "auto": "cpu" if Numba is installed, else "numpy".

        new_head=True initialises a head (num_labels, seed) for a checkpoint that has none. strict makes NaN and infinite weights an error
        instead of a warning. quantize is "int8" or "int4": matrices are quantised as they are read (quantize.py).
        stream_layers=True is for a model larger than memory: each pass reads the layers, in order, from the files, which must be safetensors.
        Raises CheckpointError, ValueError.
        """
        dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        backend = choose_backend(backend, dtype)
        if dtype not in BACKENDS[backend]:
            raise ValueError(f"backend {backend!r} computes in {' or '.join(BACKENDS[backend])}, not {dtype!r}")
        if quantize and stream_layers:
            raise ValueError(
                f"quantize={quantize!r} and stream_layers: every pass would quantise again; write a quantised folder first, opt-np quantize"
            )
        source = hub.find(folder, revision, tokenizer=False)
        copy = backend == "numpy"  # the other backends make packed copies of their own
        if stream_layers:
            from opt_np import layers_on_disk

            params, config = layers_on_disk.load_from(source, dtype, strict, copy, load_ops(backend).pack)
        else:
            params, config = checkpoint.load_from(source, dtype, strict, copy, quantizer(quantize) if quantize else None)
            config = with_kind(config, quantize) if quantize else config
        params = checkpoint.with_head_only(params, cls.head, folder, cls.__name__)
        missing = cls.missing_head(params, config)
        if missing and not new_head:
            raise CheckpointError(f"{folder} has no {missing}.weight, which {cls.__name__} needs; new_head=True makes a fresh one, to be trained")
        if new_head and not cls.head:
            raise ValueError(f"{cls.__name__} has no head to make; new_head=True is for the classes that have one")
        if new_head and not missing:
            raise ValueError(f"{folder} has a head already, that of {cls.__name__}; new_head=True is for a checkpoint without one")
        if missing:
            params[missing] = init_head(config, missing, num_labels, seed, dtype)
            config = config.with_labels([f"LABEL_{i}" for i in range(num_labels)]) if missing == "score" else config
        params = load_ops(backend).pack(params, release=True)
        return cls(params, config, backend, checkpoint.read_json(source.config / "generation_config.json"))

    @classmethod
    def missing_head(cls, params: dict, config: OPTConfig) -> str | None:
        """The head that this class needs and the parameters lack; a language model with tied embeddings needs none."""
        tied = cls.head == "lm_head" and config.tie_word_embeddings
        return cls.head if cls.head and not tied and cls.head not in params else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and, if there was one, generation_config.json; HF loads the same weights from them."""
        checkpoint.save(folder, getattr(self.ops, "unpack", unchanged)(self.params), self.config)
        if self.generation_config:
            checkpoint.write_text(Path(folder) / "generation_config.json", json.dumps(self.generation_config, indent=2) + "\n")

    def num_parameters(self) -> int:
        layers = self.params["layers"]
        return num_parameters({**self.params, "layers": layers if isinstance(layers, list) else layers.tensors})

    def embed(self, input_ids: Any, attention_mask: Any = None, layer: Any = -1, pooling: str = "mean", normalize: bool = True,
              skip_bos: bool = False) -> Any:  # fmt: skip
        """One vector per row: a layer's hidden states, pooled ("mean", "last", "weighted", "max"); for several layers, or "all", a list.

        input_ids: (B, T);  attention_mask: (B, T)  ->  (B, D)        embeddings.embed explains the options. Raises ValueError.
        """
        return embeddings.embed(self, input_ids, attention_mask, layer, pooling, normalize, skip_bos)

    def _hidden(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, use_cache: bool, output_hidden_states: bool,
                output_attentions: bool, tap: Any, padding: bool = False) -> tuple[Any, Output]:  # fmt: skip
        """The decoder's output, and an Output with the optional results, without logits and loss."""
        cache = past_key_values if past_key_values is not None else KVCache() if use_cache else None
        hidden: list | None = [] if output_hidden_states else None
        attentions: list | None = [] if output_attentions else None
        h = model.last_hidden_state(self.params, input_ids, self.config, cache, attention_mask, self.ops, position_ids,
                                    collecting(attentions, tap), hidden, padding)  # fmt: skip
        return h, Output(past_key_values=cache, hidden_states=as_tuple(hidden), attentions=as_tuple(attentions))

    def _loss(self, name: str, logits: Any, *labels: Any) -> Any:
        """The loss by the function of this name: grad.py's, or the backend's own, which autograd can differentiate."""
        losses = getattr(self.ops, "losses", grad)
        found = getattr(losses, name)(logits, *labels)
        found = found[0] if isinstance(found, tuple) else found  # some of grad.py's return (loss, gradient)
        return np.float64(found) if isinstance(found, float) else found


class OPTModel(OPTPreTrained):
    """The decoder without a head; equals HF's OPTModel."""

    def __call__(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None, use_cache: bool = False,
                 output_hidden_states: bool = False, output_attentions: bool = False, tap: Any = None) -> Output:  # fmt: skip
        """input_ids: (B, T);  attention_mask: (B, S)  ->  .last_hidden_state (B, T, W)"""
        h, out = self._hidden(input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states, output_attentions, tap)
        return replace(out, last_hidden_state=h)


class OPTForCausalLM(OPTPreTrained):
    """The language model; equals HF's OPTForCausalLM."""

    head = "lm_head"

    def __call__(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None, use_cache: bool = False,
                 labels: Any = None, output_hidden_states: bool = False, output_attentions: bool = False, logits_to_keep: Any = 0,
                 tap: Any = None) -> Output:  # fmt: skip
        """input_ids: (B, T);  attention_mask: (B, S);  labels: (B, T)  ->  .logits (B, T, V), .loss

        With past_key_values (a KVCache, which grows in place) input_ids holds only the new tokens; attention_mask covers past and new.
        Labels are shifted inside, and -100 is ignored. Raises ValueError.
        """
        if labels is not None and not np.array_equal(logits_to_keep, 0):
            raise ValueError("labels need the logits of every position; leave logits_to_keep at 0")
        h, out = self._hidden(input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states, output_attentions, tap,
                              padding=labels is not None)  # fmt: skip
        logits = model.lm_logits(self.params, h, self.ops, logits_to_keep, tap or model.no_tap)
        loss = None if labels is None else self._loss("shifted_cross_entropy", logits, model.label_array(labels))
        return replace(out, logits=logits, loss=loss)

    def run_with_cache(self, input_ids: Any, names_filter: Any = None, **inputs: Any) -> tuple[Any, taps.Cache]:
        """The logits and the intermediate values, by HF's module paths and TransformerLens's names; see taps.run_with_cache.  input_ids: (B, T)"""
        return taps.run_with_cache(self, input_ids, names_filter, **inputs)

    def run_with_hooks(self, input_ids: Any, fwd_hooks: Any, **inputs: Any) -> Any:
        """The logits of a pass whose intermediate values hooks may replace; see taps.run_with_hooks.  input_ids: (B, T)  ->  (B, T, V)"""
        return taps.run_with_hooks(self, input_ids, fwd_hooks, **inputs)

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> np.ndarray:
        """The prompt with its continuation, greedy by default; settings.py lists the options, HF's, and stop_strings also need `tokenizer`.

        input_ids: (B, T)  ->  (B·num_return_sequences, T + new)

        An option that is not given is taken from generation_config.json, else it has HF's default. Raises ValueError, TypeError.
        """
        return decoding.generate(self.params, input_ids, self.config, attention_mask=attention_mask, generation_config=self.generation_config,
                                 ops=self.ops, **options)  # fmt: skip

    def stream(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[decoding.Step]:
        """As generate, one Step at a time; with tokenizer=, each step has the text that its tokens completed."""
        return decoding.stream(self.params, input_ids, self.config, attention_mask=attention_mask, generation_config=self.generation_config,
                               ops=self.ops, **options)  # fmt: skip

    def explain(self, input_ids: Any, top: int = 5, tokenizer: Any = None, attention_mask: Any = None, **options: Any) -> list[explaining.Choice]:
        """Generates, and reports for each step and row what each processor did to the `top` likeliest tokens; str() of a Choice is a table.

        input_ids: (B, T);  attention_mask: (B, T)        Raises ValueError for beams and contrastive search.
        """
        request = decoding.prepare(self.params, input_ids, self.config, attention_mask, self.generation_config, tokenizer, self.ops, **options)
        return explaining.explain(request, top)


class OPTForSequenceClassification(OPTPreTrained):
    """A label per row, predicted at its last token that is not the pad; equals HF's OPTForSequenceClassification."""

    head = "score"

    def __call__(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, labels: Any = None,
                 output_hidden_states: bool = False, output_attentions: bool = False, tap: Any = None) -> Output:  # fmt: skip
        """input_ids: (B, T);  attention_mask: (B, T);  labels: (B) or (B, L)  ->  .logits (B, L), .loss"""
        h, out = self._hidden(input_ids, attention_mask, position_ids, None, False, output_hidden_states, output_attentions, tap,
                              padding=True)  # fmt: skip
        at = grad.pooled_rows(host(input_ids), self.config.pad_token_id)
        logits = self.ops.linear(h[np.arange(len(at)), at], **self.params["score"])  # (B, W) -> (B, L)
        loss = None if labels is None else self._loss("classification_loss", logits, model.label_array(labels), self.config.extra.get("problem_type"))
        return replace(out, logits=logits, loss=loss)


class OPTForQuestionAnswering(OPTPreTrained):
    """A start and an end score per token; equals HF's OPTForQuestionAnswering."""

    head = "qa_outputs"

    def __call__(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, start_positions: Any = None, end_positions: Any = None,
                 output_hidden_states: bool = False, output_attentions: bool = False, tap: Any = None) -> Output:  # fmt: skip
        """input_ids: (B, T);  attention_mask: (B, T);  start_positions: (B);  end_positions: (B)  ->  .start_logits, .end_logits (B, T), .loss"""
        h, out = self._hidden(input_ids, attention_mask, position_ids, None, False, output_hidden_states, output_attentions, tap,
                              padding=True)  # fmt: skip
        logits = self.ops.linear(h, **self.params["qa_outputs"])  # (B, T, W) -> (B, T, 2)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self._loss("question_loss", logits, np.stack([np.ravel(host(a)) for a in (start_positions, end_positions)], axis=1))
        return replace(out, start_logits=logits[..., 0], end_logits=logits[..., 1], loss=loss)


def collecting(attentions: list | None, tap: Any) -> Any:
    """A tap (model.Tap) that collects every layer's attention weights, as the caller's own tap leaves them."""
    if attentions is None:
        return tap

    def keep(name: str, value: Any) -> Any:
        value = tap(name, value) if tap else value
        if name.endswith("self_attn.attn_weights"):
            attentions.append(value)
        return value

    return keep


def unchanged(params: dict) -> dict:
    return params


def as_tuple(items: list | None) -> tuple | None:
    """A tuple of a list; None stays None."""
    return None if items is None else tuple(items)


def choose_backend(backend: str, dtype: str = "float32") -> str:
    """ "auto" is "cpu" if opt_fast and Numba can be imported, else "numpy"; for float64 always "numpy", the only one with it. Never imports torch."""
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend {backend!r} is none of {', '.join((*BACKENDS, 'auto'))}")
    if backend != "auto":
        return backend
    if dtype == "float64":
        return "numpy"
    try:
        load_ops("cpu")
    except ValueError:
        if dtype not in BACKENDS["numpy"]:
            raise
        return "numpy"
    return "cpu"


def load_ops(backend: str) -> Any:
    """The backend's module. Raises ValueError if it cannot be imported."""
    name = "opt_np.ops" if backend == "numpy" else f"opt_fast.ops_{backend}"
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # Numba raises RuntimeError if it has nowhere to cache its code
        extra = "cuda" if backend == "cuda" else "fast"
        hint = f": pip install 'opt-np[{extra}]' brings what it needs" if isinstance(error, ImportError) else ""
        raise ValueError(f"backend {backend!r} needs {name}, which does not import here ({error}){hint}; backend='numpy' always works") from None
