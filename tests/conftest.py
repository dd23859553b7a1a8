"""Settings of all tests: quiet libraries, no network, a fixed number of threads, Hypothesis with fixed examples and no deadline."""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # pytest-xdist already uses the cores

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu where there is no GPU."""
    if marked := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        for item in marked if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


SHARED = Path(__file__).resolve().parents[2] / "shared"  # OPT's real vocabulary and configs, where a developer has them


@pytest.fixture(scope="session")
def opt_files() -> Path:
    """OPT's real tokenizer files and hub configs; no copy of them is in the repository."""
    folder = SHARED / "opt_tokenizer"
    if not folder.is_dir():
        pytest.skip(f"OPT's own tokenizer files are not at {folder}")
    return folder
