"""The fast path under opt_np's model function. So far: packed matrix products on the CPU (gemm.py) and the benchmark."""
