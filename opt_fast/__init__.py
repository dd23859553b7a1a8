"""The fast path under opt_np's model function: backend="cpu" (ops_cpu.py), and the benchmark (bench.py)."""
