// A barrier for all blocks of a launch, all of which must be on the GPU at once (a cooperative launch).
#pragma once

// What any thread has written before it, every thread sees after it. `state`: a word, 0 before the first launch; its upper bit turns over when all
// have come, and the rest is 0 again: block 0 adds what the others lack. So the next barrier, and the next launch, find it ready.
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
