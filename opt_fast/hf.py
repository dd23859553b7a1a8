"""Our attention inside HF transformers' own OPT: register(), then attn_implementation="opt_fast".

HF calls a mask function once per forward pass and gives its result to every layer, which gives it to the attention function. Ours returns the
layout of opt_np.ops.attention, so the padding mask is copied from the GPU to the host, where the kernels' launchers read it, once per pass and not
once per layer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def register(name: str = "opt_fast") -> None:
    """Makes `from_pretrained(…, attn_implementation=name)` and `model.set_attn_implementation(name)` select our attention, for HF's OPT.

    It runs forward and backward, with HF's own cache or without, and with padding on either side, as HF's "sdpa"; `attention` lists what it refuses.
    Equals what HF's AttentionInterface and AttentionMaskInterface call an attention function and its mask function.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, layout)


def layout(config: Any, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Any = None, **_: Any) -> SimpleNamespace:
    """The padding mask of a forward pass, as opt_np.ops.attention's layout: `visible` on the host, or None where no key is hidden.

    attention_mask: (B, S)  ->  .visible (B, S)

    Raises ValueError for models other than OPT, whose masks may mean more than padding, and for a cache with more slots than tokens (a static one).
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
    """What HF's OPTAttention calls; `attention_mask` is `layout`'s result, or None. OPT scales its queries itself, so `scaling` is 1.

    query: (B, H, T, Dh);  key: (B, H, S, Dh);  value: (B, H, S, Dh)  ->  (B, T, H, Dh)

    Raises ValueError for what tiled attention cannot do: dropout, returning its weights, and a mask that differs between queries, (B, 1, T, S).
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
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, ·, Dh) -> (B, ·, H, Dh), their order in memory before HF transposes them
    return attention_cuda.attention_lse(q, k, v, scaling, attention_mask)[0], None


def weights_wanted(options: dict[str, Any]) -> bool:
    """Whether output_attentions was requested; OPT does not pass it on, so this reads a private variable of HF's that records it."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version
        return bool(options.get("output_attentions"))
    return "attentions" in (_active_collector.get() or {})
