"""Random initial parameters, for training from scratch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from opt_np.config import OPTConfig, parameter_shapes
from opt_np.tree import unflatten

HEADS = {"score": "OPTForSequenceClassification", "qa_outputs": "OPTForQuestionAnswering"}
ALL_HEADS = ("lm_head", *HEADS)


def init_params(cfg: OPTConfig, seed: int = 0, dtype: Any = np.float32) -> dict:
    """A random decoder by OPT's recipe: N(0, init_std), times 1/√(2·layers) in out_proj and fc2, which write to the stream; biases 0, LayerNorms 1.

    Source: arXiv:2205.01068 section 2.2, metaseq's init. The pad token's row of embed_tokens is 0, as torch's padding_idx leaves it.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for name, shape in parameter_shapes(cfg).items():
        if name.endswith("bias"):
            flat[name] = np.zeros(shape, dtype)
        elif "layer_norm" in name:
            flat[name] = np.ones(shape, dtype)
        else:
            std = cfg.init_std / math.sqrt(2 * cfg.num_hidden_layers) if "out_proj" in name or "fc2" in name else cfg.init_std
            flat[name] = rng.normal(0, std, shape).astype(dtype)
    if cfg.pad_token_id is not None:
        flat["embed_tokens.weight"][cfg.pad_token_id] = 0
    return unflatten(flat)


def init_head(cfg: OPTConfig, head: str, num_labels: int = 2, seed: int = 0, dtype: Any = np.float32) -> dict:
    """A randomly initialised `score` (no bias) or `qa_outputs` (2 outputs, with bias), as HF creates them."""
    rows = num_labels if head == "score" else 2
    weight = np.random.default_rng(seed).normal(0, cfg.init_std, (rows, cfg.word_embed_proj_dim)).astype(dtype)
    return {"weight": weight} if head == "score" else {"weight": weight, "bias": np.zeros(rows, dtype)}
