"""The README's memory figures, measured: python tests/measure_memory.py (about 12 GB of memory and 6 GB of disk)"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from large import WATCHED, tensors

from opt_np import OPTConfig, checkpoint
from opt_np.tree import unflatten

# Loads in a process of its own, everything imported before, and looks at its resident memory.
PROGRAM = """
import sys
import ml_dtypes, safetensors, opt_np.classes, opt_np.pickle_bin
from opt_np import checkpoint
from opt_np.tree import flatten

with Watch() as watch:
    params, _ = checkpoint.load(sys.argv[1])
weights = sum(a.nbytes for a in flatten(params).values())
after, peak = watch.grown()[0] / weights, watch.most()[0] / weights
print(f"grows by {after:.3f} x the {weights / 1e9:.2f} GB of float32 weights, {peak:.3f} x at its peak")
"""


def checkpoints(folder: Path) -> list[Path]:
    """The 1.3b shape in float16, as safetensors and as a .bin that names the tied matrix twice."""
    cfg = OPTConfig.from_size("1.3b")
    flat = tensors(cfg)
    checkpoint.save(folder / "safetensors", unflatten(flat), cfg)
    state = {f"model.decoder.{name}": torch.from_numpy(a) for name, a in flat.items()}
    (folder / "bin").mkdir()
    torch.save(state | {"lm_head.weight": state["model.decoder.embed_tokens.weight"]}, folder / "bin" / "pytorch_model.bin")
    shutil.copy(folder / "safetensors" / "config.json", folder / "bin")
    return [folder / "safetensors", folder / "bin"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for path in checkpoints(Path(temporary)):
            print(
                path.name,
                subprocess.run([sys.executable, "-c", WATCHED + PROGRAM, str(path)], capture_output=True, text=True, check=True).stdout.strip(),
            )
