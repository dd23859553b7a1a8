"""The reference of the tests: HF transformers' OPT on torch, in float64, with random weights, so that no bias is 0 and no LayerNorm weight is 1."""

from functools import lru_cache

import numpy as np
import torch
import transformers

from opt_np.config import OPTConfig
from opt_np.tree import unflatten

# transformers 4.52.0 to 4.52.2 scale q twice in OPT (huggingface/transformers#38277), so they cannot be the reference.
version = tuple(int(part) for part in transformers.__version__.split(".")[:3])
assert not (4, 52, 0) <= version <= (4, 52, 2), f"transformers {transformers.__version__} computes OPT wrongly; install the version in setup.cfg"

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 64, "max_position_embeddings": 40, "num_attention_heads": 4}
VARIANTS = {
    "pre_norm": {},
    "post_norm": {"do_layer_norm_before": False},
    "like_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "wide_embeddings": {"word_embed_proj_dim": 48},
    "gelu": {"activation_function": "gelu"},
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "galactica_30b": {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "head_dim_80": {"hidden_size": 160, "num_attention_heads": 2},
    "head_dim_7": {"hidden_size": 21, "num_attention_heads": 3},
}
CLASSES = {
    "lm": transformers.OPTForCausalLM,
    "base": transformers.OPTModel,
    "classify": transformers.OPTForSequenceClassification,
    "qa": transformers.OPTForQuestionAnswering,
}


@lru_cache(maxsize=64)
def build(variant: str, task: str = "lm", dtype: str = "float64", attention: str = "sdpa", scale: float = 0.1, **changes):
    """An HF model in eval mode, our config, and our parameters: views of HF's arrays, so that both always have the same values."""
    keys = {**SMALL, **VARIANTS[variant], "dropout": 0.0, **changes}
    torch.manual_seed(0)
    hf = CLASSES[task](transformers.OPTConfig(**keys, attn_implementation=attention)).double().eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * scale)
    hf = hf.to(getattr(torch, dtype))
    return hf, OPTConfig.from_dict(keys), unflatten(decoder_names({name: p.detach().numpy() for name, p in hf.named_parameters()}))


def decoder_names(named: dict) -> dict:
    """HF's names without the prefix of the decoder."""
    return {name.removeprefix("model.").removeprefix("decoder."): value for name, value in named.items()}


def batch(kind: str, B: int = 3, T: int = 17, vocab: int = 99, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """ids and mask: no padding, left, right, both, or holes in the mask."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(4, vocab, (B, T)), np.ones((B, T), np.int64)
    if kind == "none":
        return ids, None
    for b in range(B):
        n = int(rng.integers(1, T // 2)) if b else 0
        if kind in ("left", "both"):
            mask[b, :n] = 0
        if kind in ("right", "both"):
            mask[b, T - n // 2 :] = 0
        if kind == "holes":
            mask[b, rng.permutation(np.arange(1, T - 1))[:n]] = 0
    return np.where(mask, ids, 1), mask


PADDINGS = ("none", "left", "right", "both", "holes")


def tensors(*arrays):
    return [None if a is None else torch.tensor(a) for a in arrays]


def worst(ours, theirs, where=None) -> float:
    """The largest difference over the largest reference value, at `where` only."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs, np.float64)
    assert ours.shape == theirs.shape, f"shapes differ: ours {ours.shape}, theirs {theirs.shape}"
    difference = np.abs(ours - theirs)
    if where is not None:
        difference, theirs = difference[where != 0], theirs[where != 0]
    return float(difference.max() / np.abs(theirs).max())
