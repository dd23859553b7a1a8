"""OPT's decoder as a table of lines (operations) for kernels/program.cu: what model.py computes for one token of B rows, from embedding to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt_fast import program_cpp
from opt_np.config import OPTConfig

HALVES = (torch.float16, torch.bfloat16)
COLUMNS = 64.0  # an int8 model whose column factors exceed this, or fall below its inverse, goes through torch
Address = Callable[[Tensor], Any]


def one_kernel(params: dict, cfg: OPTConfig, program: Any) -> OneKernel | None:
    """The kernel for a program's tensors (program_cuda.Program); None where it does not take them or this GPU."""
    keys, B = program.keys, len(program.ids)
    if not keys.is_cuda or torch.cuda.get_device_capability(keys.device) < (8, 0) or not takes(params, cfg, keys.dtype, B):
        return None
    try:
        return OneKernel(params, cfg, program)
    except program_cpp.TooLittle:
        return None


def takes(params: dict, cfg: OPTConfig, dtype: torch.dtype, B: int) -> bool:
    """Whether the kernel can compute this model for B rows."""
    sizes = cfg.hidden_size, cfg.ffn_dim, cfg.word_embed_proj_dim
    known = cfg.head_dim in (64, 80, 128) and cfg.activation_function in program_cpp.ACTIVATIONS and B <= program_cpp.MOST_ROWS
    return known and dtype in HALVES and all(n % 16 == 0 for n in sizes) and all(readable(p, dtype) for p in groups(params))


def groups(params: dict) -> list[dict]:
    """The leaves of each matrix and of each norm."""
    found = [p for name, p in params.items() if name != "layers"]
    for layer in params["layers"]:
        found += [*layer["self_attn"].values(), *(p for name, p in layer.items() if name != "self_attn")]
    return found


def readable(p: dict, dtype: torch.dtype) -> bool:
    """Whether the kernel can read these leaves: a norm or a matrix in 16 bits, or a matrix in int8 with a factor for each row."""
    kinds = {"weight": torch.int8 if "scale" in p else dtype, "bias": dtype}
    whole = p.keys() <= {"weight", "bias", "scale", "columns"} and all(p[name].dtype == kind for name, kind in kinds.items() if name in p)
    even = "columns" not in p or bool(((p["columns"] <= COLUMNS) & (p["columns"] >= 1 / COLUMNS)).all())
    return whole and even and all(leaf.is_contiguous() and leaf.data_ptr() % 16 == 0 for leaf in p.values())


class OneKernel:
    """A program's lines on the GPU, with the buffers that they work on."""

    def __init__(self, params: dict, cfg: OPTConfig, program: Any) -> None:
        from cuda.core import Device

        keys, B, H, gpu = program.keys, len(program.ids), cfg.num_attention_heads, Device(program.keys.get_device()).properties
        bf16, widths = int(keys.dtype == torch.bfloat16), (cfg.hidden_size, cfg.ffn_dim)
        self.fit = program_cpp.fit(B, cfg.head_dim, bf16, gpu.multiprocessor_count, gpu.max_shared_memory_per_block_optin, widths)
        self.written = Writer(params, cfg, program, buffers(cfg, keys, B), self.fit, Tensor.data_ptr)
        self.lines = torch.tensor(self.written.lines, device=keys.device)
        self.state = torch.zeros(program_cpp.state_size(B, H), dtype=torch.int32, device=keys.device)
        self.parts = torch.empty(program_cpp.parts_size(B, H, cfg.head_dim, self.fit.grid), dtype=torch.float32, device=keys.device)

    def launch(self, lengths: Tensor, pages: Tensor) -> None:
        """lengths: (B) int32;  pages: (B, P) int32"""
        program_cpp.launch(self.fit, self.lines, lengths, pages, self.state, self.parts)


class Buffers(NamedTuple):
    """Activations of one token of B rows."""

    x: Tensor  # (B, D): the residual stream
    s: Tensor  # (B, D): in a post-norm block, x plus a branch's output, before the norm
    h: Tensor  # (B, D): a branch's input, where it is written to memory at all
    q: Tensor  # (B, D)
    O: Tensor  # (B, D)
    ff: Tensor  # (B, F)
    e: Tensor  # (B, W): embeddings of width W, before project_in or after project_out


def buffers(cfg: OPTConfig, like: Tensor, B: int) -> Buffers:
    D, F, W = cfg.hidden_size, cfg.ffn_dim, cfg.word_embed_proj_dim
    return Buffers(*(like.new_empty((B, width)) for width in (D, D, D, D, D, F, W)))


class Writer:
    """Writes `lines`. `address` returns the address of a tensor's first element."""

    def __init__(self, params: dict, cfg: OPTConfig, program: Any, b: Buffers, fit: program_cpp.Fit, address: Address) -> None:
        self.cfg, self.b, self.fit, self.address = cfg, b, fit, address
        self.lines: list[list[Any]] = []
        self.held: list[Tensor] = []  # tensors that only the lines refer to: they must not be freed
        self.uneven = False  # whether the last product had column factors
        self.first = 0  # the block that takes the next tile of outputs: lines that do not wait for each other share the blocks evenly
        self.embeddings(params, program)
        stream = {"x": b.x}
        for layer, keys, values in zip(params["layers"], program.keys, program.values, strict=True):
            stream = self.block(layer, keys, values, stream)
        self.ending(params, program.logits, stream)

    def embeddings(self, params: dict, program: Any) -> None:
        """model.embeddings"""
        b, at, table = self.b, self.at, params["embed_tokens"]
        tokens = {"table": at(table["weight"]), "ids": at(program.ids), "scale": at(self.factors(table)), "columns": at(table.get("columns"))}
        positions = at(params["embed_positions"]["weight"])
        if "project_in" not in params:
            self.lines.append(program_cpp.embed(at(b.x), b.x.shape[1], positions=positions, **tokens))
            return
        self.lines.append(program_cpp.embed(at(b.e), b.e.shape[1], **tokens))
        self.lines.append(program_cpp.embed(at(b.x), b.x.shape[1], positions=positions))
        self.linear(b.x, params["project_in"], {"x": b.e}, residual=at(b.x))

    def block(self, layer: dict, keys: Tensor, values: Tensor, stream: dict) -> dict:
        """model.decoder_layer. Takes and returns the residual stream as a `source` of `linear`, with the norm that is still to be applied.

        keys: (pages, 64, H, Dh);  values: (pages, 64, H, Dh)
        """
        b, at, cfg, pre, attn = self.b, self.at, self.cfg, self.cfg.do_layer_norm_before, layer["self_attn"]
        norms = [layer.get(name, {}) for name in ("self_attn_layer_norm", "final_layer_norm")]
        h = self.normed(b.x, norms[0], b.h) if pre else stream
        self.linear(b.q, attn["q_proj"], h)
        for name, cache in (("k_proj", keys), ("v_proj", values)):
            self.linear(cache, attn[name], h, again=True, paged=True)
        self.lines.append(program_cpp.attend(at(b.O), cfg.num_attention_heads, at(b.q), at(keys), at(values), cfg.head_dim**-0.5))
        s = b.x if pre else b.s
        self.linear(s, attn["out_proj"], {"x": b.O}, residual=at(b.x))
        h = self.normed(b.x, norms[1], b.h) if pre else self.normed(b.s, norms[0], b.x, needed=True)
        self.linear(b.ff, layer["fc1"], h, activation=cfg.activation_function)
        self.linear(s, layer["fc2"], {"x": b.ff}, residual=at(b.x))
        return {"x": b.x} if pre else self.normed(b.s, norms[1], b.x, needed=True)

    def ending(self, params: dict, logits: Tensor, stream: dict) -> None:
        """model.final and model.lm_logits"""
        if self.cfg.has_final_layer_norm:
            stream = self.normed(self.b.x, params.get("final_layer_norm", {}), self.b.h)
        if "project_out" in params:
            self.linear(self.b.e, params["project_out"], stream)
            stream = {"x": self.b.e}
        self.linear(logits, params.get("lm_head", params["embed_tokens"]), stream)

    def normed(self, x: Tensor, p: dict, target: Tensor, needed: bool = False) -> dict:
        """LayerNorm of x, as a `source` of `linear`. Where shared memory holds all rows, the product applies it, and writes it to `target` only if
        `needed`; else a line before the product does."""
        weight, bias = self.at(p.get("weight")), self.at(p.get("bias"))
        if self.fit.holds(x.shape[1]):
            return {"x": x, "norm": (weight, bias), "normed": self.at(target) if needed else None}
        self.lines.append(program_cpp.norm(self.at(target), x.shape[1], self.at(x), weight, bias))
        return {"x": target}

    def linear(self, y: Tensor, p: dict, source: dict, again: bool = False, **options: Any) -> None:
        """A product; `again`: with the same `source` as the line before.

        Raises TooLittle where an int8 matrix has column factors and shared memory has no room for x.
        """
        (O, I), at, staged = p["weight"].shape, self.at, self.fit.holds(p["weight"].shape[1])
        factors, columns = self.shrinking(self.factors(p), p.get("columns"))
        if columns is not None and not staged:
            raise program_cpp.TooLittle(f"rows of {I} numbers do not fit into shared memory, where an int8 matrix with uneven columns wants them")
        options |= {name: source[name] for name in ("norm", "normed") if name in source}
        if again:
            options |= {"kept": staged and columns is None and not self.uneven, "wait": False, "normed": None}
        self.lines.append(program_cpp.linear(at(y), O, at(source["x"]), I, at(p["weight"]), at(p.get("bias")), scale=at(factors),
                                             columns=at(columns), staged=staged, first=self.first if again else 0, **options))  # fmt: skip
        self.first = ((self.first if again else 0) - (-O // 8)) % self.fit.grid
        self.uneven = columns is not None  # the rows in shared memory are multiplied by this matrix's columns

    def factors(self, p: dict) -> Tensor | None:
        """An int8 matrix's factors in float32."""
        if "scale" not in p:
            return None
        if p["scale"].dtype != torch.float32:
            self.held.append(p["scale"].float())
            return self.held[-1]
        return p["scale"]

    def shrinking(self, factors: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The factors and columns with no column above 1, and the same product: x times columns, in 16 bits, must not overflow."""
        if factors is None or columns is None:
            return factors, None
        largest = columns.max()
        self.held += [factors * largest, columns / largest]
        return self.held[-2], self.held[-1]

    def at(self, a: Tensor | None) -> Any:
        return None if a is None else self.address(a)
