"""Writes docs/api.md from the docstrings of every public function and class: python docs/make_api.py"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("api.md")
MODULES = {
    "The model": ("ops", "model", "kv_cache", "arrays", "flash", "grad", "optim", "config", "tree", "init"),
    "Decoding": ("generate", "reader", "settings", "processors", "stopping", "beam", "contrastive", "explain"),
    "Looking inside": ("taps", "lens", "trace", "costs", "plan", "score", "perplexity", "embeddings", "explore", "gpt2", "verify"),
    "Files": ("checkpoint", "hub", "tokenizer", "pickle_bin", "tf_flax", "quantize", "layers_on_disk"),
    "Classes and training": ("classes", "train", "tasks"),
}
FAST = ("ops_cpu", "gemm", "gemm_int", "attention_cpu", "attention_bf16", "paged_cache", "engine", "limits", "ops_cuda", "attention_cuda",
        "attention_cpp", "attention_numba", "train_cuda", "nvrtc", "hf")  # fmt: skip


def page() -> str:
    """The whole page."""
    parts = ["# Every public function\n\nMade from the docstrings by `python docs/make_api.py`. Axes are named in [naming.md](naming.md).\n"]
    for title, names in {**MODULES, "The fast path": FAST}.items():
        parts.append(f"## {title}\n")
        package = "opt_fast" if names is FAST else "opt_np"
        parts += [section(importlib.import_module(f"{package}.{name}")) for name in names]
    return "\n".join(parts)


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """What a module defines for others, in the order in which it stands there."""
    own = [(name, thing) for name, thing in vars(module).items() if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__]
    return [(name, thing) for name, thing in own if inspect.isfunction(thing) or inspect.isclass(thing)]


def section(module: ModuleType) -> str:
    file = f"{module.__name__.replace('.', '/')}.py"
    entries = [entry(name, thing) for name, thing in public(module) if inspect.getdoc(thing)]
    return f"### [`{module.__name__}`](../{file})\n\n{(module.__doc__ or '').strip()}\n\n" + "".join(entries)


def entry(name: str, thing: Any) -> str:
    """A function with its arguments; a class with its methods."""
    if inspect.isclass(thing):
        methods = [(f"{name}.{key}", unwrapped(value)) for key, value in vars(thing).items() if not key.startswith("_")]
        return described(f"class {name}", thing) + "".join(
            described(key, value) for key, value in methods if inspect.isfunction(value) and value.__doc__
        )
    return described(name, thing)


def unwrapped(value: Any) -> Any:
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value.fget if isinstance(value, property) else value


def described(name: str, thing: Any) -> str:
    words = "" if inspect.isclass(thing) else f"({', '.join(inspect.signature(thing).parameters)})"
    own = thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(thing)
    if not own or own.startswith(f"{thing.__name__}("):  # a NamedTuple's or dataclass's made-up docstring
        return ""
    return f"* `{name}{words}`\n\n{textwrap.indent(inspect.cleandoc(own), '  ')}\n\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {len(page().splitlines())} lines")
