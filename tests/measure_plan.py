"""`opt-np plan` against the memory that a process really uses: python tests/measure_plan.py [sizes] (1.3b: about 8 GB of memory and 3 GB of disk)

Each case loads a random checkpoint of the real shape in its own process, after all imports, generates, and samples its resident memory, without that
of mapped files, every 2 ms; the plan's peak is the sum of what it lists.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import large

from opt_np import OPTConfig, checkpoint, plan
from opt_np.tree import unflatten

CASES = [("numpy", "float32", None, 8, 512, 128), ("numpy", "float32", None, 1, 64, 64), ("numpy", "float32", "int8", 1, 128, 32),
         ("cpu", "float32", None, 8, 512, 128), ("cpu", "float32", None, 1, 64, 64), ("cpu", "float16", None, 4, 256, 64),
         ("cpu", "float32", "int8", 8, 512, 128), ("cpu", "float32", "int4", 1, 64, 64)]  # fmt: skip
PROGRAM = """
import sys
import numpy as np
from opt_np import OPTForCausalLM, checkpoint, generate, hub, pickle_bin
folder, backend, dtype, kind, B, prompt, gen, tiny = sys.argv[1:]
warm = OPTForCausalLM.from_pretrained(tiny, dtype=dtype, backend=backend, quantize=None if kind == "None" else kind)  # imports and compiles
warm.generate([[5] * int(prompt)] * int(B), max_new_tokens=3, min_new_tokens=3)
np.ones((256, 256), np.float32) @ np.ones((256, 256), np.float32)
del warm

with Watch() as watch:
    model = OPTForCausalLM.from_pretrained(folder, dtype=dtype, backend=backend, quantize=None if kind == "None" else kind)
    loaded = watch.grown()[1]
    ids = np.random.default_rng(0).integers(4, 50000, (int(B), int(prompt)))
    model.generate(ids, max_new_tokens=int(gen), min_new_tokens=int(gen))
print(loaded, watch.most()[1])
"""


def random_checkpoint(folder: Path, cfg: OPTConfig) -> Path:
    checkpoint.save(folder, unflatten(large.tensors(cfg)), cfg)
    return folder


def main(sizes: list[str]) -> None:
    print(f"{'case':<58}  {'loaded MB':>10} {'plan':>8}  {'peak MB':>9} {'plan':>8}  plan / measured")
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            cfg = OPTConfig.from_size(size)
            folder = random_checkpoint(Path(temporary) / "model", cfg)
            small = OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=1)
            tiny = random_checkpoint(Path(temporary) / "tiny", small)
            for backend, dtype, kind, B, prompt, gen in CASES:
                words = [str(word) for word in (folder, backend, dtype, kind, B, prompt, gen, tiny)]
                out = subprocess.run([sys.executable, "-c", large.WATCHED + PROGRAM, *words], capture_output=True, text=True, check=True).stdout
                loaded, peak = map(int, out.split())
                m = plan.memory(cfg, B, prompt, gen, dtype, kind, backend)
                case = f"{size} {backend} {kind or dtype}, {B} x ({prompt} + {gen})"
                found = f"{loaded / 1e6:10.1f} {m.weights / 1e6:8.1f}  {peak / 1e6:9.1f} {m.peak / 1e6:8.1f}  {m.peak / peak:.3f}"
                print(f"{case:<58}  {found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["125m", "350m", "1.3b"])
