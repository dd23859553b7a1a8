"""What OPT costs, in closed form, from its config alone: FLOPs and bytes of every step, parameters, keys and values.

A FLOP is one operation on one number: a multiplication, an addition, a comparison, a division, a root, an exponential; the product of (N, I) and
(I, O) is 2·N·I·O. Attention counts the pairs of a query and a key that it sees, about half of T² in a prompt. Dequantising is not counted, nor is
what is computed above the diagonal and thrown away. Bytes are those of every array that a step reads or writes, once each. trace.py counts the same
while the model runs, from the arrays themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from opt_np.config import OPTConfig, parameter_shapes

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
GELU = 126  # FLOPs of ops.normal_cdf's series and of the product with it
DECODER = "model.decoder"


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


def pairs(batch: int, tokens: int, past: int = 0) -> int:
    """How many pairs of a query and a key there are, each query seeing the keys up to its own."""
    return batch * (tokens * past + tokens * (tokens + 1) // 2)


def steps(cfg: OPTConfig, batch: int, tokens: int, past: int = 0, dtype: str = "float32", kind: str | None = None, fused: bool = False,
          logits_to_keep: int = 0) -> list[Cost]:  # fmt: skip
    """Every step of a forward pass over (batch, tokens) new tokens without padding, after `past` cached ones, in order, under the names of taps.py.

    dtype: of the numbers computed and of the weights; float16 and bfloat16 are of the weights, computed in float32. kind: "int8" or "int4" matrices.
    fused: attention and mlp as one step each, whose insides never reach memory. Sums over the steps are the model's.
    """
    form = Forms(cfg, batch, tokens, past, dtype, kind)
    found = list(form.embeddings())
    for i in range(cfg.num_hidden_layers):
        found += form.block(f"{DECODER}.layers.{i}", fused)
    return found + list(form.ending(logits_to_keep))


class Forms:
    """The closed forms of each kind of step, for one call's sizes."""

    def __init__(self, cfg: OPTConfig, batch: int, tokens: int, past: int, dtype: str, kind: str | None) -> None:
        self.cfg, self.B, self.T, self.S, self.kind = cfg, batch, tokens, past + tokens, kind
        self.number, self.stored = max(BYTES[dtype], 4), BYTES[dtype]  # bytes of a computed number, and of a stored one
        self.pairs = pairs(batch, tokens, past) * cfg.num_attention_heads

    def embeddings(self) -> Iterator[Cost]:
        cfg, B, T = self.cfg, self.B, self.T
        D, W = cfg.hidden_size, cfg.word_embed_proj_dim
        row = matrix_bytes((B * T, W), self.stored, self.kind)  # only the rows that are looked up
        yield Cost(f"{DECODER}.embed_tokens", "x = E[ids]", (B, T, W), 0, row, 8 * B * T, B * T * W * self.number)
        if cfg.has_projections:
            yield self.linear(f"{DECODER}.project_in", "x = x Wᵀ", W, D, bias=False)
        yield Cost(f"{DECODER}.embed_positions", "p = P[positions + 2]", (1, T, D), 0, T * D * self.stored, 8 * T, T * D * self.stored)
        read = B * T * D * self.number + T * D * self.stored
        yield Cost(f"{DECODER}.layers.0.resid_pre", "x = x + p", (B, T, D), B * T * D, 0, read, B * T * D * self.number)

    def block(self, here: str, fused: bool) -> Iterator[Cost]:
        pre, D = self.cfg.do_layer_norm_before, self.cfg.hidden_size
        if pre:
            yield self.layer_norm(f"{here}.self_attn_layer_norm", "h")
        h = "h" if pre else "x"
        for name in "qkv":
            yield self.linear(f"{here}.self_attn.{name}_proj", f"{name} = {h} Wᵀ", D, D)
        yield from self.attention(f"{here}.self_attn", fused)
        yield self.linear(f"{here}.self_attn", "a = O Wᵀ", D, D)
        yield self.add(f"{here}.resid_mid", "x = x + a")
        yield self.layer_norm(f"{here}.final_layer_norm", "h") if pre else self.layer_norm(f"{here}.self_attn_layer_norm", "x")
        yield from self.mlp(here, h, fused)
        yield self.add(f"{here}.resid_post", "x = x + m")
        if not pre:
            yield self.layer_norm(f"{here}.final_layer_norm", "x")

    def attention(self, here: str, fused: bool) -> Iterator[Cost]:
        B, T, S, H, Dh = self.B, self.T, self.S, self.cfg.num_attention_heads, self.cfg.head_dim
        q, keys, scores = (n * self.number for n in (B * T * H * Dh, B * S * H * Dh, B * H * T * S))
        products = B * T * H * Dh + 2 * self.pairs * Dh, 5 * self.pairs + 2 * B * H * T, 2 * self.pairs * Dh
        if fused:
            yield Cost(f"{here}.attn_output", "O = softmax(q kᵀ/√Dh) v", (B, T, H, Dh), sum(products), 0, q + 2 * keys, q)
            return
        yield Cost(f"{here}.attn_scores", "s = q kᵀ/√Dh", (B, H, T, S), products[0], 0, q + keys, scores)
        yield Cost(f"{here}.attn_weights", "P = softmax(s)", (B, H, T, S), products[1], 0, scores, scores)
        yield Cost(f"{here}.attn_output", "O = P v", (B, T, H, Dh), products[2], 0, scores + keys, q)

    def mlp(self, here: str, h: str, fused: bool) -> Iterator[Cost]:
        D, F, f = self.cfg.hidden_size, self.cfg.ffn_dim, self.cfg.activation_function
        first, second = self.linear(f"{here}.fc1", f"u = {h} Wᵀ", D, F), self.linear(f"{here}.fc2", "m = u Wᵀ", F, D)
        function = self.activation(f"{here}.activation_fn")
        if fused:
            flops, weights = first.flops + function.flops + second.flops, first.weights + second.weights
            yield Cost(second.name, f"m = {f}({h} W₁ᵀ) W₂ᵀ", second.shape, flops, weights, first.read, second.written)
            return
        yield from (first, function, second)

    def ending(self, logits_to_keep: int) -> Iterator[Cost]:
        cfg, D, W = self.cfg, self.cfg.hidden_size, self.cfg.word_embed_proj_dim
        if cfg.has_final_layer_norm:
            yield self.layer_norm(f"{DECODER}.final_layer_norm", "x")
        if cfg.has_projections:
            yield self.linear(f"{DECODER}.project_out", "x = x Wᵀ", D, W, bias=False)
        self.T = logits_to_keep or self.T
        yield self.linear("lm_head", "logits = x Eᵀ", W, cfg.vocab_size, bias=False)

    def linear(self, name: str, equation: str, I: int, O: int, bias: bool = True) -> Cost:
        N, bias = self.B * self.T, bias and self.cfg.enable_bias
        weights = matrix_bytes((O, I), self.stored, self.kind) + O * self.stored * bias
        shape = (self.B, self.T, O)
        return Cost(name, equation + (" + b" if bias else ""), shape, N * O * (2 * I + bias), weights, N * I * self.number, N * O * self.number)

    def layer_norm(self, name: str, result: str) -> Cost:
        N, D, affine = self.B * self.T, self.cfg.hidden_size, self.cfg.layer_norm_elementwise_affine
        size, flops = N * D * self.number, N * ((7 if affine else 5) * D + 5)
        return Cost(name, f"{result} = LayerNorm(x)", (self.B, self.T, D), flops, 2 * D * self.stored * affine, size, size)

    def activation(self, name: str) -> Cost:
        N, F, f = self.B * self.T, self.cfg.ffn_dim, self.cfg.activation_function
        return Cost(name, f"u = {f}(u)", (self.B, self.T, F), N * F * (1 if f == "relu" else GELU), 0, N * F * self.number, N * F * self.number)

    def add(self, name: str, equation: str) -> Cost:
        N, D = self.B * self.T, self.cfg.hidden_size
        return Cost(name, equation, (self.B, self.T, D), N * D, 0, 2 * N * D * self.number, N * D * self.number)


def matrix_bytes(shape: tuple[int, int], stored: int, kind: str | None = None, group_size: int = 32) -> int:
    """Bytes of a matrix (O, I): whole numbers and their scales, or floats of `stored` bytes."""
    O, I = shape
    if kind == "int8":
        return O * (I + 4)
    return O * (I // 2 + 2 * math.ceil(I / group_size)) if kind == "int4" else O * I * stored


def parameters(cfg: OPTConfig) -> int:
    """How many numbers the model has, the tied head counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())


def weight_bytes(cfg: OPTConfig, dtype: str = "float32", kind: str | None = None) -> int:
    """Bytes of all weights as opt_np holds them: with `kind`, every matrix but positions is whole numbers, and the rest float32."""
    from opt_np.quantize import is_quantized_matrix

    shapes = parameter_shapes(cfg).items()
    size = BYTES[dtype]
    return sum(matrix_bytes((shape[0], shape[1]), size, kind) if len(shape) == 2 and is_quantized_matrix(name, 2)
               else math.prod(shape) * size for name, shape in shapes)  # fmt: skip


def cache_bytes(cfg: OPTConfig, batch: int, tokens: int, number: int = 4) -> int:
    """Bytes of the keys and values of every layer."""
    return 2 * cfg.num_hidden_layers * batch * tokens * cfg.hidden_size * number
