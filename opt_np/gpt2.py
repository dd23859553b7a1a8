"""GPT-2 run by OPT's model function: its checkpoint is loaded under OPT's names, so that whatever here takes an OPT takes a GPT-2.

Both are pre-norm decoders with learned positions. `differences` lists what differs, and `side_by_side` shows it step by step: gelu_new for relu,
positions from row 0, no token before the text, and other ids for the same pieces of text. GPT-2 stores its matrices as (in, out), and q, k and v as
one: they are transposed and split here, once, while loading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import models

from opt_np import checkpoint, hub, trace
from opt_np.checkpoint import CheckpointError
from opt_np.classes import BACKENDS, OPTForCausalLM, choose_backend
from opt_np.config import FIRST_ROW, POSITION_OFFSET, OPTConfig
from opt_np.tokenizer import BYTE_OF, OPTTokenizer, byte_level
from opt_np.tree import unflatten

END = "<|endoftext|>"
CONFIG = {"vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
          "n_positions": "max_position_embeddings", "activation_function": "activation_function", "resid_pdrop": "dropout"}  # fmt: skip
DEFAULTS = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "activation_function": "gelu_new"}
# Keys that would change the output, and the values at which OPT's model function computes the same as GPT-2's.
ONLY_VALUES = {"layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
               "reorder_and_upcast_attn": (False, True), "add_cross_attention": (False,), "tie_word_embeddings": (True,)}  # fmt: skip
NAMES = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "final_layer_norm", "ln_1": "self_attn_layer_norm", "ln_2": "final_layer_norm",
         "attn.c_proj": "self_attn.out_proj", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}  # fmt: skip


def load(name: str | Path, revision: str | None = None, dtype: str = "float32", backend: str = "numpy",
         strict: bool = False) -> tuple[OPTForCausalLM, OPTTokenizer]:  # fmt: skip
    """A GPT-2 folder or hub id, such as openai-community/gpt2, as an OPTForCausalLM and its tokenizer.

    Raises CheckpointError for a checkpoint that is no GPT-2, or a variant that OPT's model function does not compute. Equals HF's GPT2LMHeadModel.
    """
    backend = choose_backend(backend, dtype)
    if dtype not in BACKENDS[backend]:
        raise ValueError(f"backend {backend!r} computes in {' or '.join(BACKENDS[backend])}, not {dtype!r}")
    source = hub.find(name, revision)
    cfg = config(checkpoint.read_json(source.config / "config.json"), source.config)
    flat = checkpoint.as_type(renamed(checkpoint.read_weights(source.weights), cfg), cfg, source.name, dtype, strict, copy=True)
    params = unflatten(checkpoint.checked(flat, cfg, source.name))
    defaults = checkpoint.read_json(source.config / "generation_config.json")
    return OPTForCausalLM(params, cfg, backend, defaults), tokenizer(source.tokenizer)


def config(keys: dict[str, Any], where: Any = "config.json") -> OPTConfig:
    """GPT-2's config under OPT's keys. Raises CheckpointError."""
    if keys.get("model_type") != "gpt2":
        raise CheckpointError(f"{where}: model_type is {keys.get('model_type')!r}; a GPT-2 has 'gpt2'. OPTForCausalLM.from_pretrained loads OPT")
    if "hidden_size" in keys and "n_embd" not in keys:
        raise CheckpointError(f"{where}: model_type is 'gpt2', and the other keys are not a GPT-2's but those of an 'opt'. Is it this checkpoint's?")
    for key, only in ONLY_VALUES.items():
        if keys.get(key, only[0]) not in only:
            raise CheckpointError(f"{where}: {key} is {keys[key]!r}; opt_np computes only {only[0]!r}")
    keys = {"n_positions": keys.get("n_ctx", DEFAULTS["n_positions"]), **{key: value for key, value in keys.items() if value is not None}}
    found = {ours: keys.get(theirs, DEFAULTS.get(theirs, 0.1)) for theirs, ours in CONFIG.items()}
    if found["activation_function"] in ("gelu_pytorch_tanh", "gelu_fast"):  # other names of the same formula
        found["activation_function"] = "gelu_new"
    ids = {key: keys.get(key, found["vocab_size"] - 1) for key in ("bos_token_id", "eos_token_id")}
    try:
        ffn = keys.get("n_inner") or 4 * found["hidden_size"]
        return OPTConfig(**found, **ids, ffn_dim=ffn, pad_token_id=None, extra={FIRST_ROW: 0})
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def renamed(tensors: Iterator[tuple[str, np.ndarray]], cfg: OPTConfig) -> Iterator[tuple[str, np.ndarray]]:
    """GPT-2's tensors under OPT's names and in OPT's shapes, without the tied head and the causal masks that old files store."""
    for name, array in tensors:
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        stem, _, leaf = name.rpartition(".")
        layer = re.match(r"h\.(\d+)\.", stem)
        inner, path = (stem[layer.end() :], f"layers.{layer[1]}.") if layer else (stem, "")
        if layer and array.ndim == 2:
            array = array.T  # Conv1D's (in, out)
        if inner == "attn.c_attn":
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                yield f"{path}self_attn.{part}_proj.{leaf}", np.ascontiguousarray(rows)
        elif inner == "wpe":  # OPT's position 0 reads row 2
            yield f"embed_positions.{leaf}", np.concatenate([np.zeros((POSITION_OFFSET, array.shape[1]), array.dtype), array])
        else:
            yield f"{path}{NAMES.get(inner, inner)}.{leaf}", np.ascontiguousarray(array)


def tokenizer(folder: Path) -> OPTTokenizer:
    """GPT-2's tokenizer: no token before the text, and <|endoftext|> as end and pad token. Raises CheckpointError.

    Its ids are those of vocab.json or tokenizer.json; if there is only merges.txt, they follow from it in OpenAI's numbering: the 256 bytes, the
    merges in order, <|endoftext|>. OPT has the same merges, but other ids.
    """
    settings: dict[str, Any] = {"add_bos_token": False, "bos_token": END, "eos_token": END, "pad_token": END}
    merges = folder / "merges.txt"
    if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists() or not merges.exists():
        return OPTTokenizer.from_folder(folder, **settings)
    try:
        lines = merges.read_text(encoding="utf-8-sig").splitlines()
        rules = [(left, right) for left, right in (line.split(" ") for line in lines if line and not line.startswith("#version"))]
        vocabulary = [*BYTE_OF, *(left + right for left, right in rules), END]
        return OPTTokenizer(byte_level(models.BPE({token: i for i, token in enumerate(vocabulary)}, rules), add_prefix_space=False), settings)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise CheckpointError(f"{merges} cannot be read as GPT-2's merges: {error}") from None


# Side by side


def side_by_side(model: Any, tokenizer: Any, other: Any, other_tokenizer: Any, text: str) -> str:
    """The same text through two models: what differs between them, and their steps, aligned by name; the blocks after the first are given as totals.

    Any two models of this package can be compared: an OPT and a GPT-2, or two sizes of either.
    """
    ids = [tokenizer.encode(text), other_tokenizer.encode(text)]
    traces = [trace.record(m, [row], values=False) for m, row in zip((model, other), ids, strict=True)]
    facts = differences((model.config, tokenizer, ids[0]), (other.config, other_tokenizer, ids[1]))
    return "\n".join([*columns(facts), "", *columns(aligned(*traces))])


def differences(*sides: tuple[OPTConfig, Any, list[int]]) -> list[tuple[str, ...]]:
    """(property, first, second) of every property in which two models, or their tokens of a text, differ."""
    rows = []
    for cfg, tok, ids in sides:
        order = "before each branch" if cfg.do_layer_norm_before else "after each sum"
        rows.append({
            "tokens": " ".join(repr(tok.decode([i])) for i in ids), "ids": " ".join(map(str, ids)), "number of tokens": len(ids),
            "before the text": tok.bos_token if tok.add_bos_token else "nothing", "rows of the vocabulary": cfg.vocab_size,
            "row of position 0": cfg.extra.get(FIRST_ROW, POSITION_OFFSET), "positions": cfg.max_position_embeddings,
            "activation": cfg.activation_function, "LayerNorm": order, "layers": cfg.num_hidden_layers, "width": cfg.hidden_size,
            "heads": cfg.num_attention_heads, "ffn": cfg.ffn_dim, "biases": cfg.enable_bias, "projections": cfg.has_projections,
        })  # fmt: skip
    return [("", "the first", "the second"), *((key, *(str(row[key]) for row in rows)) for key in rows[0] if len({row[key] for row in rows}) > 1)]


def aligned(a: list[trace.Step], b: list[trace.Step]) -> list[tuple[str, ...]]:
    """A line per step of either model: name, equation, shape and MFLOP of each; = where the second's equal the first's."""
    lines: list[tuple[str, ...]] = [("step", "equation", "shape", "MFLOP", "equation", "shape", "MFLOP")]
    found = [{step.name: step for step in steps if (layer_of(step.name) or 0) == 0} for steps in (a, b)]
    for name in dict.fromkeys([*found[0], *found[1]]):
        cells = [described(side.get(name)) for side in found]
        lines.append((trace.short(name), *cells[0], *("=" if x == y else y for x, y in zip(*cells, strict=True))))
    rest = [[step for step in steps if (layer_of(step.name) or 0) > 0] for steps in (a, b)]
    lines.append(("the other layers", *(cell for steps in rest for cell in ("", f"{len(steps)} steps", f"{sum(s.flops for s in steps) / 1e6:.3f}"))))
    return [*lines, ("all", *(cell for steps in (a, b) for cell in ("", f"{len(steps)} steps", f"{sum(s.flops for s in steps) / 1e6:.3f}")))]


def described(step: trace.Step | None) -> tuple[str, str, str]:
    """A step's equation, shape and MFLOP; dashes where there is none."""
    return (step.equation, "×".join(map(str, step.shape)), f"{step.flops / 1e6:.3f}") if step else ("-", "-", "-")


def layer_of(name: str) -> int | None:
    """The number of the block that a point is in, or None."""
    found = re.search(r"\.layers\.(\d+)\.", name + ".")
    return int(found[1]) if found else None


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
