// opt_fast/kernels/grid.cuh on a CPU: the barrier between the blocks of a cooperative launch.
#pragma once

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

static unsigned* gate;  // the word that all blocks share: its upper bit flips when the last block has arrived, the other bits count arrivals

inline bool gate_opened(const Thread& t) { return (*gate >> 31) != t.phase; }

inline void tell_gate(const Thread&, char* text, size_t size) {
  snprintf(text, size, "grid_barrier, to which %u of %u blocks have come", *gate & 0x7FFFFFFF, gridDim.x * gridDim.y * gridDim.z);
}

static const Event GATE_OPENED = {gate_opened, tell_gate};

__attribute__((noinline)) inline void arrive_at_gate(unsigned* state) {
  static uint64_t launch;
  static unsigned arrived;
  const void* site = __builtin_return_address(0);
  if (launch != launches) launch = launches, arrived = 0, gate = state;
  if (gate != state) fail(*current, site, "grid_barrier: its state is not the other blocks'");
  if ((*state & 0x7FFFFFFF) != arrived)
    fail(*current, site, "grid_barrier: its state counts %u blocks, and %u have come: it was not 0 at first", *state & 0x7FFFFFFF, arrived);
  unsigned before = *state >> 31;
  ++*state, ++arrived;
  if (arrived == gridDim.x * gridDim.y * gridDim.z) *state = (before ^ 1) << 31, arrived = 0;
  else alone("grid_barrier", site, GATE_OPENED, 0, before);
}

}  // namespace cuda_on_cpu

__device__ __forceinline__ void grid_barrier(unsigned* state) {
  __syncthreads();
  if (cuda_on_cpu::current->id == 0) cuda_on_cpu::arrive_at_gate(state);
  __syncthreads();
}
