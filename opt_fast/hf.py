"""Our attention inside HF transformers' own OPT: register(), then attn_implementation="opt_fast".

HF asks a mask function once for each forward pass, and hands what it returns to every layer, which hands it to the attention function. Ours returns
the layout of opt_np.ops.attention: so the padding mask crosses from the GPU to the host, where kernels want it, once a pass and not once a layer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def register(name: str = "opt_fast") -> None:
    """Makes `from_pretrained(…, attn_implementation=name)` and `model.set_attn_implementation(name)` mean our attention, for HF's OPT.

    Forward and backward, with HF's own cache or without, and with padding on either side, as HF's "sdpa"; see `attention` for what it refuses.
    Equals what HF's AttentionInterface and AttentionMaskInterface call an attention function and its mask function.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, layout)


def layout(config: Any, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Any = None, **_: Any) -> SimpleNamespace:
    """The padding mask of a forward pass, as opt_np.ops.attention's layout: `visible` on the host, or None where no key is hidden.

    attention_mask: (B, S)  ->  .visible (B, S)

    Raises ValueError for a model that is no OPT, whose masks may mean more than padding, and for a cache that is longer than what it holds.
    """
    if config.model_type != "opt":
        raise ValueError(f"opt_fast's attention is OPT's, and this model is {config.model_type!r}; load it with attn_implementation='sdpa'")
    if kv_length != q_offset + q_length:
        raise ValueError(f"opt_fast's attention wants all keys to be tokens, and there are {kv_length} keys for {int(q_offset + q_length)} tokens; "
                         f"use HF's default cache, DynamicCache, and a mask for past and new tokens")  # fmt: skip
    visible = None if attention_mask is None else attention_mask.cpu().numpy()
    return SimpleNamespace(visible=None if visible is None or visible.all() else visible)


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, dropout: float = 0.0,
              **options: Any) -> tuple[Any, None]:  # fmt: skip
    """What an OPTAttention calls; `attention_mask` is `layout`'s, or None. OPT scales its queries itself, so `scaling` is 1.

    query: (B, H, T, Dh);  key: (B, H, S, Dh);  value: (B, H, S, Dh)  ->  (B, T, H, Dh)

    Raises ValueError for what tiled attention cannot do: dropout, giving out its weights, a mask of one's own for each query.
    """
    from opt_fast import attention_cuda

    if dropout:
        raise ValueError(f"attention_dropout is {dropout:g}, and opt_fast's attention has none; load with attention_dropout=0.0 or use 'sdpa'")
    if weights_wanted(options):
        raise ValueError("output_attentions: opt_fast's attention never holds its weights; model.set_attn_implementation('eager') gives them")
    if getattr(attention_mask, "ndim", 0) == 4:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; opt_fast's attention is causal by itself and takes a mask of keys, (B, S)"
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, ·, Dh) -> (B, ·, H, Dh), as they lie in memory before HF turns them
    return attention_cuda.attention_lse(q, k, v, scaling, attention_mask)[0], None


def weights_wanted(options: dict[str, Any]) -> bool:
    """Whether output_attentions was asked for, which OPT does not hand on: what is asked for stands in a variable of HF's own."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version
        return bool(options.get("output_attentions"))
    return "attentions" in (_active_collector.get() or {})
