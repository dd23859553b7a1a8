"""Fast backends for opt_np's model function: "cpu" (ops_cpu.py) and "cuda" (ops_cuda.py), the engine (engine.py), the benchmarks (bench*.py)."""
