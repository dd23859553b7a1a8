"""What OPT costs, in closed form, from its config alone: FLOPs and bytes of every step, parameters, the KV cache.

A FLOP is one scalar operation: a multiplication, an addition, a comparison, a division, a root, an exponential; the product of (N, I) and (I, O) is
2·N·I·O. Attention counts the pairs of a query and a key that it sees, about half of T² in a prompt. Dequantising is not counted, nor is
what is computed above the diagonal and thrown away. Bytes count every array that a step reads or writes, once each. trace.py counts the same while
the model runs, from the arrays themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from opt_np.config import FIRST_ROW, POSITION_OFFSET, OPTConfig, parameter_shapes

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
ACTIVATION = {"relu": 1, "gelu": 125, "gelu_new": 9}  # FLOPs per element; gelu's Φ is a series, ops.normal_cdf
DECODER = "model.decoder"
# By the last part of a step's name: {h} is the input of a block's branch, {b} a bias if there is one, {f} the activation.
EQUATIONS = {
    "embed_tokens": "x = E[ids]", "project_in": "x = x Wᵀ", "embed_positions": "p = P[positions{offset}]", "resid_pre": "x = x + p",
    "self_attn_layer_norm": "{h} = LayerNorm(x)", "q_proj": "q = {h} Wᵀ{b}", "k_proj": "k = {h} Wᵀ{b}", "v_proj": "v = {h} Wᵀ{b}",
    "attn_scores": "s = q kᵀ/√Dh", "attn_weights": "P = softmax(s)", "attn_output": "O = P v", "self_attn": "a = O Wᵀ{b}", "resid_mid": "x = x + a",
    "final_layer_norm": "{h} = LayerNorm(x)", "fc1": "u = {h} Wᵀ{b}", "activation_fn": "u = {f}(u)", "fc2": "m = u Wᵀ{b}", "resid_post": "x = x + m",
    "project_out": "x = x Wᵀ", "lm_head": "logits = x Eᵀ",
}  # fmt: skip
FUSED_EQUATIONS = {"attn_output": "O = softmax(q kᵀ/√Dh) v", "fc2": "m = {f}({h} W₁ᵀ{b}) W₂ᵀ{b}"}


class Cost(NamedTuple):
    """A step of the model: what it computes, the shape of the result, FLOPs, and the bytes of weights and activations that it reads and writes."""

    name: str
    equation: str
    shape: tuple[int, ...]
    flops: int
    weights: int = 0
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.read + self.written


def equation(name: str, cfg: OPTConfig, fused: bool = False) -> str:
    """What a step computes, as a formula."""
    stage, in_block = name.rpartition(".")[2], ".layers." in name
    form = (EQUATIONS | FUSED_EQUATIONS if fused else EQUATIONS)[stage]
    offset = cfg.extra.get(FIRST_ROW, POSITION_OFFSET)
    return form.format(
        offset=f" + {offset}" if offset else "",
        h="h" if cfg.do_layer_norm_before and in_block else "x",
        b=" + b" * cfg.enable_bias,
        f=cfg.activation_function,
    )


def pairs(batch: int, tokens: int, past: int = 0) -> int:
    """How many pairs of a query and a key there are, each query seeing the keys up to its own."""
    return batch * (tokens * past + tokens * (tokens + 1) // 2)


def steps(cfg: OPTConfig, batch: int, tokens: int, past: int = 0, dtype: str = "float32", kind: str | None = None, fused: bool = False,
          logits_to_keep: int = 0, number: int | None = None) -> list[Cost]:  # fmt: skip
    """Every step of a forward pass over (batch, tokens) new tokens without padding, after `past` cached ones, in order, under the names of taps.py.

    dtype: of weights and of computed values; with float16 and bfloat16 weights, values are float32. kind: "int8" or "int4" matrices. fused:
    attention and mlp as one step each, whose intermediate values never reach memory. number: bytes per computed value, if not by dtype.
    Sums over the steps are the model's totals. The few int8 and int4 matrices that have `columns` take 4 bytes a column more.
    """
    form = Forms(cfg, batch, tokens, past, dtype, kind, fused, number)
    found = list(form.embeddings())
    for i in range(cfg.num_hidden_layers):
        found += form.block(f"{DECODER}.layers.{i}")
    return found + list(form.ending(logits_to_keep))


class Forms:
    """The closed forms of each kind of step, for one call's sizes."""

    def __init__(self, cfg: OPTConfig, batch: int, tokens: int, past: int, dtype: str, kind: str | None, fused: bool,
                 number: int | None) -> None:  # fmt: skip
        self.cfg, self.B, self.T, self.S, self.kind, self.fused = cfg, batch, tokens, past + tokens, kind, fused
        self.stored = BYTES[dtype]  # bytes per matrix element
        self.number = number or max(self.stored, 4)  # and per computed value or vector element
        self.group = (cfg.quantized or (None, None))[1] or 32
        self.pairs = pairs(batch, tokens, past) * cfg.num_attention_heads

    def embeddings(self) -> Iterator[Cost]:
        cfg, B, T = self.cfg, self.B, self.T
        D, W = cfg.hidden_size, cfg.word_embed_proj_dim
        rows = matrix_bytes((B * T, W), self.stored, self.kind, self.group)  # only the rows that are looked up
        yield self.cost(f"{DECODER}.embed_tokens", (B, T, W), 0, rows, 8 * B * T)
        if cfg.has_projections:
            yield self.linear(f"{DECODER}.project_in", W, D, bias=False)
        yield self.cost(f"{DECODER}.embed_positions", (1, T, D), 0, T * D * self.stored, 8 * T)
        yield self.cost(f"{DECODER}.layers.0.resid_pre", (B, T, D), B * T * D, 0, (B * T * D + T * D) * self.number)

    def block(self, here: str) -> Iterator[Cost]:
        pre, D = self.cfg.do_layer_norm_before, self.cfg.hidden_size
        if pre:
            yield self.layer_norm(f"{here}.self_attn_layer_norm")
        for name in ("q_proj", "k_proj", "v_proj"):
            yield self.linear(f"{here}.self_attn.{name}", D, D)
        yield from self.attention(f"{here}.self_attn")
        yield self.linear(f"{here}.self_attn", D, D)
        yield self.add(f"{here}.resid_mid")
        yield self.layer_norm(f"{here}.{'final' if pre else 'self_attn'}_layer_norm")
        yield from self.mlp(here)
        yield self.add(f"{here}.resid_post")
        if not pre:
            yield self.layer_norm(f"{here}.final_layer_norm")

    def attention(self, here: str) -> Iterator[Cost]:
        B, T, S, H, Dh = self.B, self.T, self.S, self.cfg.num_attention_heads, self.cfg.head_dim
        q, keys, scores = (n * self.number for n in (B * T * H * Dh, B * S * H * Dh, B * H * T * S))
        products = B * T * H * Dh + 2 * self.pairs * Dh, 5 * self.pairs + 2 * B * H * T, 2 * self.pairs * Dh
        if self.fused:
            yield self.cost(f"{here}.attn_output", (B, T, H, Dh), sum(products), 0, q + 2 * keys)
            return
        yield self.cost(f"{here}.attn_scores", (B, H, T, S), products[0], 0, q + keys)
        yield self.cost(f"{here}.attn_weights", (B, H, T, S), products[1], 0, scores)
        yield self.cost(f"{here}.attn_output", (B, T, H, Dh), products[2], 0, scores + keys)

    def mlp(self, here: str) -> Iterator[Cost]:
        D, F, each = self.cfg.hidden_size, self.cfg.ffn_dim, ACTIVATION[self.cfg.activation_function]
        first, second = self.linear(f"{here}.fc1", D, F), self.linear(f"{here}.fc2", F, D)
        function = self.cost(f"{here}.activation_fn", first.shape, math.prod(first.shape) * each, 0, first.written)
        if self.fused:
            parts = (first, function, second)
            yield self.cost(second.name, second.shape, sum(part.flops for part in parts), first.weights + second.weights, first.read)
            return
        yield from (first, function, second)

    def ending(self, logits_to_keep: int) -> Iterator[Cost]:
        cfg, D, W = self.cfg, self.cfg.hidden_size, self.cfg.word_embed_proj_dim
        if cfg.has_final_layer_norm:
            yield self.layer_norm(f"{DECODER}.final_layer_norm")
        if cfg.has_projections:
            yield self.linear(f"{DECODER}.project_out", D, W, bias=False)
        yield self.linear("lm_head", W, cfg.vocab_size, bias=False, tokens=min(logits_to_keep, self.T) or self.T)

    def linear(self, name: str, I: int, O: int, bias: bool = True, tokens: int | None = None) -> Cost:
        T = tokens or self.T
        N, bias = self.B * T, bias and self.cfg.enable_bias
        weights = matrix_bytes((O, I), self.stored, self.kind, self.group) + O * bias * self.number
        return self.cost(name, (self.B, T, O), N * O * (2 * I + bias), weights, N * I * self.number)

    def layer_norm(self, name: str) -> Cost:
        N, D, affine = self.B * self.T, self.cfg.hidden_size, self.cfg.layer_norm_elementwise_affine
        return self.cost(name, (self.B, self.T, D), N * ((7 if affine else 5) * D + 5), 2 * D * affine * self.number, N * D * self.number)

    def add(self, name: str) -> Cost:
        size = self.B * self.T * self.cfg.hidden_size
        return self.cost(name, (self.B, self.T, self.cfg.hidden_size), size, 0, 2 * size * self.number)

    def cost(self, name: str, shape: tuple[int, ...], flops: int, weights: int, read: int) -> Cost:
        return Cost(name, equation(name, self.cfg, self.fused), shape, flops, weights, read, math.prod(shape) * self.number)


def matrix_bytes(shape: tuple[int, int], stored: int, kind: str | None = None, group_size: int = 32) -> int:
    """Bytes of a matrix (O, I): integers and their scales, or floats of `stored` bytes."""
    O, I = shape
    if kind == "int8":
        return O * (I + 4)
    return O * (I // 2 + 2 * math.ceil(I / group_size)) if kind == "int4" else O * I * stored


def parameters(cfg: OPTConfig) -> int:
    """The number of parameters, a tied head counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())


def weight_bytes(cfg: OPTConfig, dtype: str = "float32", kind: str | None = None) -> int:
    """Bytes of all weights: with `kind`, every matrix but position embeddings is quantised; biases and LayerNorms are at least float32."""
    from opt_np.quantize import is_quantized_matrix

    shapes = parameter_shapes(cfg).items()
    size, group = BYTES[dtype], (cfg.quantized or (None, None))[1] or 32
    return sum(matrix_bytes((shape[0], shape[1]), size, kind, group) if len(shape) == 2 and is_quantized_matrix(name, 2)
               else math.prod(shape) * (size if len(shape) == 2 else max(size, 4)) for name, shape in shapes)  # fmt: skip


def cache_bytes(cfg: OPTConfig, batch: int, tokens: int, number: int = 4) -> int:
    """Bytes of the KV cache: keys and values of every layer."""
    return 2 * cfg.num_hidden_layers * batch * tokens * cfg.hidden_size * number
