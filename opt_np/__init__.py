"""OPT in NumPy: forward, backward, decoding, checkpoints. Public names are imported on first use (PEP 562), to keep start-up fast."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_np.checkpoint import CheckpointError
    from opt_np.classes import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel
    from opt_np.config import OPTConfig
    from opt_np.tokenizer import OPTTokenizer

__version__ = "0.1.0"
__all__ = ["CheckpointError", "OPTConfig", "OPTForCausalLM", "OPTForQuestionAnswering", "OPTForSequenceClassification", "OPTModel", "OPTTokenizer"]

_MODULES = {"OPTConfig": "config", "OPTTokenizer": "tokenizer", "CheckpointError": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"opt_np.{_MODULES.get(name, 'classes')}"), name)
    try:
        return importlib.import_module(f"opt_np.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"opt_np.{name}":  # the module is here, and something that it needs is not
            raise
        raise AttributeError(f"module 'opt_np' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in pkgutil.iter_modules(__path__))})
