"""Random checkpoints of any size, written a layer at a time, and processes that run under a memory limit."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from opt_np import OPTConfig
from opt_np.config import parameter_shapes

# Limits this process's addresses to those that its libraries have, once warm, plus so many bytes: what is mapped counts as what is allocated.
LIMITED = """
import resource, sys
import ml_dtypes, safetensors
import numpy as np
from opt_np import OPTConfig, OPTForCausalLM
from opt_np.init import init_params

np.ones((999, 999)) @ np.ones((999, 999))  # starts OpenBLAS's threads
tiny = OPTConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
for dtype in ("float32", "float16") if sys.argv[1] == "cpu" else ("float32",):
    model = OPTForCausalLM(init_params(tiny, dtype=dtype), tiny, sys.argv[1])
    model(np.full((9, 9), 2))  # compiles the kernels
    model.generate([[2, 2]], max_new_tokens=2)

def now(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

limit = now("VmSize") + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


# A process's memory: in all, and its own, which is without the pages of mapped files that can be dropped at any time; and the most of both.
WATCHED = """
import threading, time

def memory():
    pages, resident, shared = map(int, open("/proc/self/statm").read().split()[:3])
    return resident * 4096, (resident - shared) * 4096

class Watch:
    def __enter__(self):
        self.before = self.peak = memory()
        self.done, self.thread = False, threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.done:
            self.peak = tuple(map(max, self.peak, memory()))
            time.sleep(0.002)

    def grown(self):
        return tuple(now - before for now, before in zip(memory(), self.before))

    def most(self):
        return tuple(peak - before for peak, before in zip(self.peak, self.before))

    def __exit__(self, *_):
        self.done = True
        self.thread.join()
"""


def tensors(cfg: OPTConfig) -> dict[str, np.ndarray]:
    """Float16 noise for every tensor, in the order of a published checkpoint, embeddings first: what is held while loading depends on it."""
    noise = np.random.default_rng(0).normal(0, 0.02, 2**24).astype(np.float16)
    return {name: np.resize(noise, shape) for name, shape in parameter_shapes(cfg).items()}


def checkpoint(folder: Path, cfg: OPTConfig, dtype: str) -> Path:
    """A shard for each layer, and one for the rest."""
    noise = np.random.default_rng(0).normal(0, 0.02, 2**22).astype(dtype)
    shards: dict[str, dict] = defaultdict(dict)
    for name, shape in parameter_shapes(cfg).items():
        shards[name.split(".")[1] if name.startswith("layers.") else "rest"][f"model.decoder.{name}"] = shape
    folder.mkdir(parents=True, exist_ok=True)
    for i, (shard, shapes) in enumerate(shards.items()):
        tensors = {name: np.resize(noise[997 * i + 101 * j :], shape) for j, (name, shape) in enumerate(shapes.items())}
        save_file({name: a + a.dtype.type("norm.weight" in name) for name, a in tensors.items()}, folder / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
    return folder


def limited(program: str, backend: str, limit: int, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a program in a process of its own that may have `limit` bytes beside its libraries."""
    command = [sys.executable, "-c", LIMITED + program, backend, str(limit), *map(str, arguments)]
    arena = {"MALLOC_ARENA_MAX": "1"}  # glibc reserves 64 MB of addresses for each thread, and uses few of them
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **arena})
