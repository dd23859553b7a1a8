// A barrier for all blocks of a launch, all of which must be on the GPU at once (a cooperative launch).
#pragma once

// Writes of any thread before it are visible to every thread after it. `state` is one word, 0 before the first launch. Block 0 adds 2^31 less the
// number of other blocks, which add 1 each: once all have arrived, the upper bit has flipped and the rest is 0, ready for the next barrier or launch.
__device__ __forceinline__ void grid_barrier(unsigned* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned mine = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
    unsigned before, now;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(state), "r"(mine) : "memory");
    do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(state) : "memory");
    while (!((before ^ now) & 0x80000000u));
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncthreads();
}
