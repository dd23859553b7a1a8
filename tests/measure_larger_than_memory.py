"""Scoring and generating with a model that does not fit in memory, measured: python tests/measure_larger_than_memory.py 1.3b 1.5

The arguments are a model size and a limit in GB, of address space beyond that of Python and its libraries. The weights are random, in float16, and
before each pass over them they are dropped from the system's page cache, so that every byte comes from the disk, as if the cache were too small too.
"""

import sys
import tempfile
from pathlib import Path

import large

from opt_np import OPTConfig

PROGRAM = """
import os, threading, time
from pathlib import Path
from opt_np.kv_cache import KVCache

backend, folder, dtype = sys.argv[1], Path(sys.argv[3]), sys.argv[4]

def memory():
    pages, resident, shared = map(int, open("/proc/self/statm").read().split()[:3])
    return resident * 4096, (resident - shared) * 4096

def from_disk():
    return int(open("/proc/self/io").read().split("read_bytes:")[1].split()[0])

def forget():
    for path in folder.glob("*.safetensors"):
        with open(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def watch():
    while not done:
        peak[:] = np.maximum(peak, memory())
        time.sleep(0.005)

before = memory()
peak, done = list(before), False
watcher = threading.Thread(target=watch)
watcher.start()
try:
    if sys.argv[5] == "whole":
        OPTForCausalLM.from_pretrained(folder, dtype=dtype, backend=backend)
        print("fits")
        os._exit(0)
    model = OPTForCausalLM.from_pretrained(folder, dtype=dtype, backend=backend, stream_layers=True)
    model([[2, 3]])  # compiles, and looks for NaN
    for B, T, job in (1, 1, "decoded"), (16, 1, "decoded"), (4, 256, "scored"):
        cache, rng = KVCache(), np.random.default_rng(0)
        if job == "decoded":
            model(rng.integers(4, 9999, (B, 8)), past_key_values=cache, logits_to_keep=1)
        peak, times, read = list(memory()), [], from_disk()
        for _ in range(3):
            forget()
            begun = time.perf_counter()
            model(rng.integers(4, 9999, (B, T)), past_key_values=cache if job == "decoded" else None, logits_to_keep=1)
            times.append(time.perf_counter() - begun)
        read, time_ = (from_disk() - read) / 3, np.median(times)
        total, own = (1e-6 * (p - b) for p, b in zip(peak, before))
        print(f"{B * T:6} tokens {job} in {time_:5.2f} s: {B * T / time_:7.2f} a second, {read / B / T / 1e6:7.1f} MB each from the disk,"
              f" {read / time_ / 1e9:.2f} GB/s; memory grew by {total:.0f} MB, {own:.0f} MB of it other than the files'")
finally:
    done = True
    watcher.join()
"""

if __name__ == "__main__":
    size, limit = sys.argv[1], int(float(sys.argv[2]) * 1e9)
    with tempfile.TemporaryDirectory() as temporary:
        folder = large.checkpoint(Path(temporary), OPTConfig.from_size(size), "float16")
        print(f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e9:.2f} GB in files")
        for backend, dtype in (("numpy", "float32"), ("cpu", "float16"), ("cpu", "float32")):
            for how in ("whole", "layers"):
                done = large.limited(PROGRAM, backend, limit, folder, dtype, how)
                told = done.stdout or done.stderr.strip().splitlines()[-1]
                print(f"{backend}, {dtype}; loaded whole: {told}" if how == "whole" else done.stdout.rstrip() + done.stderr, flush=True)
