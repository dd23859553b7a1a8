// opt_fast/kernels/mma.cuh on a CPU: the same functions, written from the PTX ISA manual and not from the kernels. Its sections:
// "Warp-level matrix instructions": matrix fragments for mma.m16n8k16, ldmatrix; "Data movement": cp.async; "Floating point": ex2, cvt.
#pragma once

#include "cuda_on_cpu.h"

#ifndef BF16
#define BF16 0
#endif

using half_t = unsigned short;  // the bits of a 16-bit value: only the functions below interpret them

namespace cuda_on_cpu {

#if BF16
inline float widened(unsigned half) { return __uint_as_float(half << 16); }

inline unsigned narrowed(float x) {
  unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // round to nearest, ties to even
}
#else
inline float widened(unsigned half) {
  unsigned sign = (half & 0x8000) << 16, size = half & 0x7FFF;
  float x = size < 0x7C00 ? __uint_as_float(size << 13) * 0x1p112f : __uint_as_float(0x7F800000 | size << 13);  // the exponent biases differ by 112
  return __uint_as_float(__float_as_uint(x) | sign);
}

inline unsigned narrowed(float x) {
  unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  double size = fabs(double(x));
  if (x != x) return 0x7FFF;
  if (size >= 65520) return sign | 0x7C00;  // halfway between the largest, 65504, and 65536, which would be next
  int exponent = size < 0x1p-14 ? -14 : ilogb(size);
  unsigned steps = unsigned(nearbyint(ldexp(size, 10 - exponent)));  // of 2^(exponent - 10); 1024 or more for normal numbers
  return sign | (unsigned(exponent + 14) * 1024 + steps);  // a carry out of the mantissa increments the exponent, as it should
}
#endif

inline float half_of(unsigned pair, unsigned i) { return widened(pair >> 16 * i & 0xFFFF); }

struct Ldmatrix {
  unsigned* r;
  unsigned address;
  Thread* thread;
};

// Lane 8 i + j gives the address of row j of matrix i. Of each matrix, or with .trans of its transpose, a lane gets two neighbouring elements: row
// lane / 4, columns 2 (lane % 4) and 2 (lane % 4) + 1.
template <bool trans>
void ldmatrix(void* const* operands) {
  uint16_t matrices[4][8][8];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const Ldmatrix& o = *static_cast<Ldmatrix*>(operands[lane]);
    memcpy(matrices[lane / 8][lane % 8], shared_row(*o.thread, o.thread->site, "ldmatrix", o.address), 16);
    check_read(*o.thread, o.thread->site, o.address);
  }
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      unsigned row = lane / 4, column = lane % 4 * 2;
      const auto& m = matrices[i];
      unsigned low = trans ? m[column][row] : m[row][column], high = trans ? m[column + 1][row] : m[row][column + 1];
      static_cast<Ldmatrix*>(operands[lane])->r[i] = high << 16 | low;
    }
}

struct Mma {
  float* c;
  const unsigned* a;
  unsigned b[2];
};

// c += a b; a (16, 16), b (16, 8), c (16, 8). The sum is rounded once, at the end: the hardware's own order and roundings are nowhere specified.
inline void mma(void* const* operands) {
  double A[16][16], B[16][8];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const Mma& o = *static_cast<Mma*>(operands[lane]);
    unsigned group = lane >> 2, in_group = lane % 4;
    for (unsigned i = 0; i < 8; ++i) {
      unsigned row = i < 2 || (4 <= i && i < 6) ? group : group + 8, column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      A[row][column] = half_of(o.a[i / 2], i % 2);
    }
    for (unsigned i = 0; i < 4; ++i) B[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = half_of(o.b[i / 2], i % 2);
  }
  double sums[16][8] = {};
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned column = 0; column < 8; ++column) sums[row][column] += A[row][k] * B[k][column];
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      float& c = static_cast<Mma*>(operands[lane])->c[i];
      c = float(c + sums[(lane >> 2) + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)]);
    }
}

__attribute__((noinline)) inline void issue(unsigned shared, const void* global, bool real) {
  Thread& t = *current;
  const void* site = __builtin_return_address(0);
  shared_row(t, site, "cp.async", shared);
  if (real && reinterpret_cast<uintptr_t>(global) % 16) fail(t, site, "cp.async: the global address %p is no multiple of 16", global);
  if (real && !registered(global, 16)) fail(t, site, "cp.async: the 16 bytes at %p are outside the caller's arrays", global);
  check_write(t, site, shared);
  t.copies.push_back({shared, global, real, t.groups});
  if (early) land(t.copies.end()[-1]);
}

// The copies of all groups but the last `pending` ones arrive here, as late as possible, so that a missing wait shows. With `early`, the other
// extreme, they arrive when they are issued, so that a missing barrier between the reads of some memory and the next copy to it shows.
inline void wait(unsigned pending) {
  Thread& t = *current;
  size_t kept = 0;
  for (const Copy& copy : t.copies) {
    if (copy.group + pending >= t.groups) {
      t.copies[kept++] = copy;
      continue;
    }
    if (!early) land(copy);
    landed(t, copy);
  }
  t.copies.resize(kept);
}

}  // namespace cuda_on_cpu

__device__ __forceinline__ unsigned shared_address(const void* p) {
  using namespace cuda_on_cpu;
  int64_t place = static_cast<const char*>(p) - shared_memory;
  if (place < 0 || place > shared_bytes) fail(*current, nullptr, "shared_address: %p is not in dynamic shared memory", p);
  return SHARED_BASE + unsigned(place);
}

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
  cuda_on_cpu::Ldmatrix operands = {r, address, cuda_on_cpu::current};
  cuda_on_cpu::together("ldmatrix_x4", cuda_on_cpu::ldmatrix<false>, &operands);
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
  cuda_on_cpu::Ldmatrix operands = {r, address, cuda_on_cpu::current};
  cuda_on_cpu::together("ldmatrix_x4_trans", cuda_on_cpu::ldmatrix<true>, &operands);
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  cuda_on_cpu::Mma operands = {c, a, {b0, b1}};
  cuda_on_cpu::together("mma_m16n8k16", cuda_on_cpu::mma, &operands);
}

__device__ __forceinline__ void cp_async_16(unsigned shared, const void* global, bool real) { cuda_on_cpu::issue(shared, global, real); }

__device__ __forceinline__ void cp_async_commit() { ++cuda_on_cpu::current->groups; }

template <int N>
__device__ __forceinline__ void cp_async_wait() {
  cuda_on_cpu::wait(N);
}

__attribute__((noinline)) inline void prefetch_L2(const void* global) {
  using namespace cuda_on_cpu;
  if (!registered(global, 1)) fail(*current, __builtin_return_address(0), "prefetch: %p is outside the caller's arrays", global);
}

__device__ __forceinline__ float exp2_approx(float x) {  // .ftz: subnormal results are 0
  float y = exp2f(x);
  return y < FLT_MIN ? 0 : y;
}

__device__ __forceinline__ unsigned pack2(float low, float high) { return cuda_on_cpu::narrowed(high) << 16 | cuda_on_cpu::narrowed(low); }

__device__ __forceinline__ float unpack(half_t x) { return cuda_on_cpu::widened(x); }

#if !BF16
__device__ __forceinline__ unsigned subtract2(unsigned a, unsigned b) {
  using cuda_on_cpu::half_of;
  return pack2(half_of(a, 0) - half_of(b, 0), half_of(a, 1) - half_of(b, 1));  // float32's own rounding, if any, is far smaller
}
#endif
