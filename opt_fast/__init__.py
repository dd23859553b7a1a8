"""The fast path under opt_np's model function. So far: the benchmark; kernels follow."""
