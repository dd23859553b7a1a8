"""The operations of opt_np.ops over torch tensors, on torch's current stream: the same names, arguments and meaning, for backend="cuda".

`pack` moves the parameters to the GPU. Every operation runs on the device of its tensors, which may be the CPU, in float16, bfloat16, float32 or
float64, and autograd differentiates all of them. Attention is attention_cuda.py's; products and LayerNorm are torch's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_fast import attention_cuda, engine, nvrtc, train_cuda
from opt_fast.attention_cuda import attention_bwd, attention_lse
from opt_np import reader as reading
from opt_np.config import OPTConfig
from opt_np.ops import LAYER_NORM_EPS, group_size
from opt_np.tree import map_leaves

__all__ = ["attention_bwd", "attention_lse"]  # defined elsewhere
# What the model classes and train look up on a backend; where it has none of its own, they use opt_np's.
losses, default_rng = train_cuda, train_cuda.Random
loss_and_grads, clip_by_global_norm, adamw_step = train_cuda.loss_and_grads, train_cuda.clip_by_global_norm, train_cuda.adamw_step


def device() -> torch.device:
    """The device for parameters: torch's current GPU. Raises ValueError where there is none."""
    if not torch.cuda.is_available():
        raise ValueError(f"backend 'cuda' needs a GPU, and torch {torch.__version__} sees none here; backend='cpu' or 'numpy' computes without")
    return torch.device("cuda", torch.cuda.current_device())


def description() -> str:
    """As opt_np.ops.description: the GPU's name and torch's version."""
    return f"{torch.cuda.get_device_name(device())}, torch {torch.__version__}"


def pack(params: dict, release: bool = False) -> dict:
    """A copy of the tree `params` with tensors on the GPU; with `release`, each array is removed from the given tree once it is copied.

    Raises ValueError where there is no GPU or what compiles the kernels is not installed.
    """
    where = device()
    if missing := nvrtc.missing():
        raise ValueError(f"backend 'cuda': {missing}")
    return engine.Params(pack_on(params, where, release))


def pack_on(node: Any, where: torch.device | str, release: bool = False) -> Any:
    """As `pack`, to a given device."""
    if isinstance(node, dict):
        packed = {name: pack_on(node.pop(name) if release else node[name], where, release) for name in list(node)}
        if "scale" in packed.get("embed_tokens", ()):
            packed["embed_tokens"]["scale"].rows_are = packed["embed_positions"]["weight"].dtype  # an int8 or int4 table does not record it
        return packed
    if isinstance(node, list):
        return [pack_on(item, where, release) for item in node]
    return tensor(node, where) if isinstance(node, np.ndarray) else node


def unpack(params: dict) -> dict:
    """The tree as NumPy arrays of the same dtypes, for saving."""
    return map_leaves(lambda leaf: array(leaf) if isinstance(leaf, Tensor) else leaf, params)


def tensor(a: np.ndarray, where: torch.device | str) -> Tensor:
    """A copy on a device; bfloat16 is passed as its 16 bits, because torch does not know ml_dtypes' type."""
    if a.dtype.name == "bfloat16":
        return torch.tensor(a.view(np.int16), device=where).view(torch.bfloat16)
    return torch.tensor(a, device=where)


def array(t: Tensor) -> np.ndarray:
    """The inverse of `tensor`."""
    t = t.detach().cpu()
    if t.dtype == torch.bfloat16:
        import ml_dtypes

        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def embed(ids: Any, weight: Tensor, scale: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """As opt_np.ops.embed.  ids: (*N);  weight: (V, D)  ->  (*N, D)"""
    at = ids if isinstance(ids, Tensor) else train_cuda.whole(ids, weight.device)
    return F.embedding(at, weight) if scale is None else dequantized(weight[at], scale[at], columns).to(getattr(scale, "rows_are", torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """As opt_np.ops.linear; x may be a NumPy array, as the inspection tools pass it.  x: (*N, I);  weight: (O, I);  bias: (O)  ->  (*N, O)"""
    if isinstance(x, np.ndarray):
        x = tensor(x, weight.device).to(torch.float32 if scale is not None else weight.dtype)
    return F.linear(x, weight if scale is None else dequantized(weight, scale, columns).to(x.dtype), bias)


def dequantized(weight: Tensor, scale: Tensor, columns: Tensor | None = None) -> Tensor:
    """As opt_np.ops.dequantized, in float32.  weight: (*N, I) of int8, or (*N, I/2) of uint8  ->  (*N, I)"""
    if weight.dtype == torch.int8:
        w = weight * scale.float()[..., None]
    else:
        I = 2 * weight.shape[-1]
        w = torch.stack([weight & 15, weight >> 4], -1).reshape(*weight.shape[:-1], I).float() - 8
        w = w * scale.float().repeat_interleave(group_size(I, scale.shape[-1]), -1)[..., :I]
    return w if columns is None else w * columns


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """As opt_np.ops.matmul.  a: (M, K);  b: (K, N)  ->  (M, N)"""
    return a @ b


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """As opt_np.ops.layer_norm.  x: (*N, D);  weight: (D);  bias: (D)  ->  (*N, D)"""
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


def activation(x: Tensor, function: str) -> Tensor:
    """As opt_np.ops.activation.  x: (*N, F)  ->  (*N, F)"""
    return F.relu(x) if function == "relu" else F.gelu(x, approximate="tanh" if function == "gelu_new" else "none")


def mlp(h: Tensor, fc1: dict[str, Any], fc2: dict[str, Any], function: str) -> Tensor:
    """As opt_np.ops.mlp.  h: (*N, D)  ->  (*N, D)"""
    return linear(activation(linear(h, **fc1), function), **fc2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Any = None) -> Tensor:
    """As opt_np.ops.attention.

    q: (B, T, H, Dh);  k: (B, S, H, Dh);  v: (B, S, H, Dh)  ->  (B, T, H, Dh)
    """
    if attend := getattr(layout, "attend", None):  # keys are in pages, and the layout knows which
        return attend(q, k, v, scale)
    return attention_lse(q, k, v, scale, layout)[0]


def attention_scores(q: Tensor, k: Tensor, scale: float, layout: Any = None) -> Tensor:
    """As opt_np.ops.attention_scores, for inspection.  q: (B, T, H, Dh);  k: (B, S, H, Dh)  ->  (B, H, T, S)"""
    return attention_cuda.scores(q, k, scale, attention_cuda.seen_of(layout, q)).to(q.dtype)


def softmax(scores: Tensor) -> Tensor:
    """As opt_np.ops.softmax, for inspection.  scores: (*N, S)  ->  (*N, S)"""
    return attention_cuda.probabilities(attention_cuda.wide(scores)).to(scores.dtype)


def attention_probs(q: Tensor, k: Tensor, scale: float, layout: Any = None, rows: Any = None) -> Tensor:
    """As opt_np.ops.attention_probs.  q: (B, T, H, Dh);  k: (B, S, H, Dh);  rows: (R)  ->  (B, H, T, S), or (B, H, R, S)"""
    probs = softmax(attention_scores(q, k, scale, layout))
    return probs if rows is None else probs[:, :, rows]


# ---- decoding over pages -----------------------------------------------------------------------------------------------------------------


def machine(params: dict, cfg: OPTConfig, pages: int, dtype: str | None = None) -> Any:
    """The model with a cache of `pages` pages, for the engine; keys and values have the parameters' dtype. Raises ValueError for another one."""
    from opt_fast.machine_cuda import Machine, Pages  # here, because they import this module

    if type(params["layers"]) is not list:
        raise ValueError("layers that are read from their files at every pass have no pages on a GPU: load the model without stream_layers")
    like = params["embed_positions"]["weight"]
    if dtype not in (None, own := str(like.dtype).removeprefix("torch.")):
        raise ValueError(f"dtype={dtype!r}: on a GPU keys and values have the model's dtype, {own}; load the model in another one")
    return Machine(params, cfg, Pages(cfg, pages, like.detach()))


def reader(params: dict, cfg: OPTConfig, ops: ModuleType, first: int, most: tuple[int, int] = (0, 0)) -> Any:
    """As opt_np.reader.Reader, over pages, which are freed with the reader; without pages where layers are streamed from their files."""
    if type(params["layers"]) is not list:
        return PlainReader(params, cfg, ops, first, most)
    return engine.reader(params, cfg, lambda count: machine(params, cfg, count), first, most)


class PlainReader(reading.Reader):
    """As opt_np.reader.Reader, without recording gradients."""

    @torch.no_grad()
    def __call__(self, asked: reading.Reading) -> reading.Answer:
        return super().__call__(asked)
