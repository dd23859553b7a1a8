"""The core needs only NumPy, checked in a separate process; and running and training import no torch."""

import subprocess
import sys

import pytest

CORE = ("config", "ops", "model", "kv_cache", "flash", "grad", "optim", "tree", "init",
        "generate", "reader", "processors", "settings", "stopping", "beam", "contrastive", "explain",
        "taps", "lens", "trace", "costs", "score", "embeddings", "plan")  # fmt: skip
PROGRAM = """
import sys, importlib
for name in {modules!r}:
    importlib.import_module(name)
from importlib.metadata import packages_distributions
known = packages_distributions()
print(" ".join(sorted({{d for m in sys.modules for d in known.get(m.partition(".")[0], ())}})))
"""


def distributions(*modules: str) -> set[str]:
    """Installed distributions, other than this one, that a fresh Python holds after importing these modules."""
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(modules=modules)], capture_output=True, text=True, check=True)
    return set(run.stdout.split()) - {"opt-np", "setuptools"}


def test_the_core_imports_numpy_alone():
    assert distributions("opt_np", *(f"opt_np.{name}" for name in CORE)) <= {"numpy"}


def test_running_and_training_import_no_torch():
    found = distributions("opt_np.cli", "opt_np.classes", "opt_np.train", "opt_np.checkpoint", "opt_np.tokenizer")
    assert found
    assert not found & {"torch", "transformers", "numba"}


@pytest.mark.parametrize("module", ["torch", "tokenizers"])
def test_the_check_can_fail(module):
    assert module in distributions(module)
