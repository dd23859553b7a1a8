"""Tiny configs, parameters, texts and folders, made in milliseconds, for tests about files, training and the command line."""

import ctypes
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from opt_np import OPTConfig, OPTTokenizer, checkpoint
from opt_np.config import parameter_shapes
from opt_np.tree import flatten, unflatten

TEXT = "the cat sat on the mat, and the dog sat on the log; it's 1999 and they'll never know why. " * 12
TRICKY = "naïve café — 日本語のテキスト, emoji 🙂👩‍👩‍👧 and\ttabs\n\nnew lines   spaces é e\u0301 \x00 \ufffd"


def config(**changes: Any) -> OPTConfig:
    """Two layers of width 16; 308 embedding rows for a tokenizer of 300 ids, because OPT has spare rows too."""
    small = {"vocab_size": 308, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "max_position_embeddings": 32}
    return OPTConfig(**{**small, **changes})


def params(cfg: OPTConfig, seed: int = 0, dtype: str = "float32") -> dict:
    """Every tensor random, because tests would not notice an ignored bias of 0 or LayerNorm weight of 1."""
    rng = np.random.default_rng(seed)
    return unflatten({name: rng.normal(0.1, 0.4, shape).astype(dtype) for name, shape in parameter_shapes(cfg).items()})


def ids(cfg: OPTConfig, rows: int = 2, length: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, cfg.vocab_size, (rows, length))


def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.train([TEXT], 300)


def folder(path: Path, cfg: OPTConfig | None = None, with_tokenizer: bool = True) -> Path:
    """A complete checkpoint folder, as save_pretrained writes it."""
    cfg = cfg or config()
    checkpoint.save(path, params(cfg), cfg)
    if with_tokenizer:
        tokenizer().save_pretrained(path)
    return path


def write(path: Path, tensors: dict[str, np.ndarray], cfg: OPTConfig, file: str = "model.safetensors", **metadata: str) -> Path:
    """A checkpoint folder with these tensors under exactly these names."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path / file, {"format": "pt", **metadata})
    checkpoint.write_text(path / "config.json", json.dumps(cfg.to_dict()))
    return path


def named(cfg: OPTConfig, prefix: str = "model.decoder.", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under a checkpoint's names: the decoder's with the prefix, lm_head's outside the decoder."""
    flat = flatten(params(cfg, seed))
    outer = prefix.removesuffix("decoder.").removesuffix("model.")
    return {outer + name if name.startswith("lm_head") else prefix + name: a for name, a in flat.items()}


def stored_as(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {name: a.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, a in tensors.items()}


def cast(tree: Any, dtype: str) -> Any:
    """The tree with every array in this dtype."""
    if isinstance(tree, dict):
        return {name: cast(value, dtype) for name, value in tree.items()}
    if isinstance(tree, list):
        return [cast(value, dtype) for value in tree]
    return np.asarray(tree).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def writes_without_a_task(program: Any) -> bool:
    """Whether a kernel of opt_fast's program writes to a thread's scratch memory when no task is left: others may be using that memory."""
    from opt_fast.kernel import MEMORY, TASKS, address

    for memory in program.memory:
        memory[:] = 7
    for (kernel, tasks, _), table in zip(program.list, program.tables.copy(), strict=True):
        table[:MEMORY] = 0
        table[TASKS] = tasks
        ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(int(kernel))(address(table))
    return any((memory != 7).any() for memory in program.memory)
