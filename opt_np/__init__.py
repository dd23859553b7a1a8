"""OPT in NumPy: forward, backward, decoding, checkpoints. The public names are imported when first used (PEP 562), so that starting is fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_np.checkpoint import CheckpointError
    from opt_np.classes import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel
    from opt_np.config import OPTConfig
    from opt_np.tokenizer import OPTTokenizer

__version__ = "0.1.0"
__all__ = ["CheckpointError", "OPTConfig", "OPTForCausalLM", "OPTForQuestionAnswering", "OPTForSequenceClassification", "OPTModel", "OPTTokenizer"]

_SUBMODULES = (
    "beam",
    "checkpoint",
    "classes",
    "cli",
    "config",
    "contrastive",
    "costs",
    "embeddings",
    "explain",
    "explore",
    "flash",
    "generate",
    "gpt2",
    "grad",
    "hub",
    "init",
    "kv_cache",
    "layers_on_disk",
    "lens",
    "model",
    "ops",
    "optim",
    "perplexity",
    "pickle_bin",
    "plan",
    "processors",
    "reader",
    "score",
    "settings",
    "stopping",
    "taps",
    "tasks",
    "tf_flax",
    "tokenizer",
    "trace",
    "train",
    "tree",
    "verify",
)
_MODULES = {"OPTConfig": "config", "OPTTokenizer": "tokenizer", "CheckpointError": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"opt_np.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'opt_np' has no attribute {name!r}")
    return getattr(importlib.import_module(f"opt_np.{_MODULES.get(name, 'classes')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
