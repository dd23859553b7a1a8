// Small kernels for test_cuda_on_cpu_sm90.py: each instruction of sm90.cuh, pipelines with a part left out on demand, and what is forbidden.
#include "sm90.cuh"

__device__ __forceinline__ void fill(half_t* tiles, const half_t* image, int n) {  // n halves of shared memory, by plain stores
  for (int i = 8 * threadIdx.x; i < n; i += 8 * blockDim.x) *(uint4*)(tiles + i) = *(const uint4*)(image + i);
  async_proxy_fence();
  __syncthreads();
}

// A B^T, with A's fragments from registers A B, or A^T B, of one warpgroup. The tiles lie in `image`; places names where each k-step of 16 begins in it.
// a: (steps, 128, 4) or nullptr;  places: (steps, 2)  ->  d: (128, N / 2)
template <int N>
__device__ void product(const half_t* image, int n, const unsigned* a, bool transposed, const int* places, int steps, int leading, int stride,
                        bool add, float* d) {
  extern __shared__ __align__(1024) half_t tiles[];
  float D[N / 2];
  for (int i = 0; i < N / 2; i++) D[i] = d[threadIdx.x * (N / 2) + i];
  fill(tiles, image, n);
  wgmma_fence();
  for (int s = 0; s < steps; s++) {
    const unsigned long long b = descriptor(tiles + places[2 * s + 1], leading, stride);
    unsigned A[4];
    for (int i = 0; i < 4; i++) A[i] = a ? a[(s * 128 + threadIdx.x) * 4 + i] : 0;
    if (a) wgmma_rs<N>(D, A, b, add || s > 0);
    else if (transposed) wgmma_tt<N>(D, descriptor(tiles + places[2 * s], leading, stride), b, add || s > 0);
    else wgmma_ss<N>(D, descriptor(tiles + places[2 * s], leading, stride), b, add || s > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; i++) d[threadIdx.x * (N / 2) + i] = D[i];
}

extern "C" __global__ void products(int N, const half_t* image, int n, const unsigned* a, bool transposed, const int* places, int steps, int leading,
                                    int stride, bool add, float* d) {
  switch (N) {
    case 8: product<8>(image, n, a, transposed, places, steps, leading, stride, add, d); break;
    case 16: product<16>(image, n, a, transposed, places, steps, leading, stride, add, d); break;
    case 64: product<64>(image, n, a, transposed, places, steps, leading, stride, add, d); break;
    case 80: product<80>(image, n, a, transposed, places, steps, leading, stride, add, d); break;
    case 128: product<128>(image, n, a, transposed, places, steps, leading, stride, add, d); break;
    case 256: product<256>(image, n, a, transposed, places, steps, leading, stride, add, d); break;
  }
}

// Each thread adds its four numbers to place to[thread] of the sums.  x: (n, 4);  to: (n)
extern "C" __global__ void added(const float* x, const int* to, float* sums) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  reduce_add_v4(sums + to[t], x[4 * t], x[4 * t + 1], x[4 * t + 2], x[4 * t + 3]);
}

// What accumulators hold after each step: two groups of one product each, the second not waited for at first.  ->  seen: (3, 128, 4)
extern "C" __global__ void in_flight(const half_t* image, int n, float* seen) {
  extern __shared__ __align__(1024) half_t tiles[];
  float D[2][4] = {{1, 1, 1, 1}, {2, 2, 2, 2}};
  fill(tiles, image, n);
  const unsigned long long a = descriptor(tiles, 16, 1024), b = descriptor(tiles + 64 * 64, 16, 1024);
  wgmma_fence();
  wgmma_ss<8>(D[0], a, b, true);
  wgmma_commit();
  wgmma_ss<8>(D[1], a, b, true);
  wgmma_commit();
  for (int i = 0; i < 4; i++) seen[threadIdx.x * 4 + i] = D[0][i];
  wgmma_wait<1>();
  for (int i = 0; i < 4; i++) seen[512 + threadIdx.x * 4 + i] = D[0][i] + (i == 3 ? D[1][i] : 0);
  wgmma_wait<0>();
  for (int i = 0; i < 4; i++) seen[1024 + threadIdx.x * 4 + i] = D[1][i];
}

// A box by TMA, as it lies in shared memory.  ->  image: (bytes / 2)
extern "C" __global__ void boxes(const __grid_constant__ TensorMap map, half_t* image, int bytes, int c0, int c1, int c2, int c3, bool wait) {
  extern __shared__ __align__(1024) half_t tile[];
  __shared__ __align__(8) mbarrier_t full[1];
  if (threadIdx.x == 0) mbarrier_init(full, 1), mbarrier_init_fence();
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive_expect(full, bytes), tma_load_4d(tile, map, full, c0, c1, c2, c3);
  if (wait) mbarrier_wait(full, 0);
  else __syncthreads();
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) image[i] = tile[i];
}

// An image of shared memory to a box of an array.
extern "C" __global__ void stored(const __grid_constant__ TensorMap map, const half_t* image, int n, int c0, int c1, int c2, int c3, bool wait) {
  extern __shared__ __align__(1024) half_t tile[];
  fill(tile, image, n);
  if (threadIdx.x != 0) return;
  tma_store_4d(map, tile, c0, c1, c2, c3);
  tma_store_commit();
  if (wait) tma_store_wait<0>();
}

enum Broken { NOTHING, NO_WAIT_FULL, NO_WAIT_EMPTY, FEWER_BYTES, MORE_BYTES, NO_EXPECT, NO_ARRIVE_EMPTY, NO_PRODUCT_WAIT, NO_INIT_FENCE, NO_SYNC,
              WRONG_PARITY, NO_WGMMA_FENCE, ARRIVE_BEFORE_PRODUCT, TWICE_ARRIVED, MANY_REGISTERS };

// Two stages: a producer's thread loads (64 x 64) tiles of X and Y, two warpgroups sum up X Y^T.  x, y: (n, 1, 64, 64)  ->  d: (2, 128, 32)
extern "C" __global__ void __launch_bounds__(384, 1)
pipeline(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, float* d, int n, int broken) {
  extern __shared__ __align__(1024) half_t tiles[];  // (2, 2, 64, 64)
  __shared__ __align__(8) mbarrier_t full[2];
  __shared__ __align__(8) mbarrier_t empty[2];
  const int t = threadIdx.x, group = t / 128;
  if (t == 0) {
    for (int s = 0; s < 2; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 2);
    if (broken != NO_INIT_FENCE) mbarrier_init_fence();
  }
  if (broken != NO_SYNC) __syncthreads();
  if (group == 0) {
    if (broken == MANY_REGISTERS) registers_fewer<32>();
    else registers_fewer<24>();
    if (t != 0) return;
    for (int j = 0; j < n; j++) {
      const int s = j % 2, bytes = 2 * 64 * 64 * 2 + (broken == MORE_BYTES) * 16 - (broken == FEWER_BYTES) * 64 * 64 * 2;
      if (broken != NO_WAIT_EMPTY) mbarrier_wait(empty + s, j / 2 % 2 == (broken == WRONG_PARITY));
      if (broken == NO_EXPECT) mbarrier_arrive(full + s);
      else mbarrier_arrive_expect(full + s, bytes);
      if (broken == TWICE_ARRIVED) mbarrier_arrive(full + s);
      tma_load_4d(tiles + 2 * s * 4096, x, full + s, 0, 0, 0, j);
      tma_load_4d(tiles + (2 * s + 1) * 4096, y, full + s, 0, 0, 0, j);
    }
    return;
  }
  registers_more<240>();
  float D[32] = {};
  for (int j = 0; j < n; j++) {
    const int s = j % 2;
    if (broken != NO_WAIT_FULL) mbarrier_wait(full + s, j / 2 % 2);
    if (broken == ARRIVE_BEFORE_PRODUCT && t % 128 == 0) mbarrier_arrive(empty + s);
    if (broken != NO_WGMMA_FENCE) wgmma_fence();
    for (int k = 0; k < 4; k++)
      wgmma_ss<64>(D, descriptor(tiles + 2 * s * 4096 + 16 * k, 16, 1024), descriptor(tiles + (2 * s + 1) * 4096 + 16 * k, 16, 1024), true);
    wgmma_commit();
    if (broken == NO_PRODUCT_WAIT) wgmma_wait<1>();
    else wgmma_wait<0>();
    if (t % 128 == 0 && broken != NO_ARRIVE_EMPTY && broken != ARRIVE_BEFORE_PRODUCT) mbarrier_arrive(empty + s);
  }
  if (broken == NO_PRODUCT_WAIT) wgmma_wait<0>();
  for (int i = 0; i < 32; i++) d[(group - 1) * 4096 + t % 128 * 32 + i] = D[i];
}

// Warpgroups take turns to add a digit: group g of three n times, in the order that named barriers give.  ->  digits: (3 n)
extern "C" __global__ void turns(int* digits, int n, bool wait, bool pass) {
  __shared__ int used[1];
  const int t = threadIdx.x, group = t / 128;
  if (t == 0) used[0] = 0;
  __syncthreads();
  if (group == 2 && pass) named_barrier_arrive(1, 256);  // as if the last group's turn had been
  for (int j = 0; j < n; j++) {
    if (wait) named_barrier_sync(1 + group, 256);
    if (t % 128 == 77) digits[used[0]++] = group;
    if ((group < 2 || j < n - 1) && pass) named_barrier_arrive(1 + (group + 1) % 3, 256);
  }
}

// Each lane waits by itself, for what other lanes of its warp do.  ->  order: (32)
extern "C" __global__ void chain(int* order) {
  __shared__ __align__(8) mbarrier_t links[32];
  __shared__ int used[1];
  const int t = threadIdx.x;
  mbarrier_init(links + t, 1);
  mbarrier_init_fence();
  if (t == 0) used[0] = 0;
  __syncthreads();
  if (t != 5) mbarrier_wait(links + t, 0);  // 5 begins
  order[used[0]++] = t;
  mbarrier_arrive(links + (t + 11) % 32);
  __syncwarp();
}

// What the machine forbids or leaves undefined, one at a time; 128 threads and 16384 bytes.
extern "C" __global__ void forbidden_sm90(int what, const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap fixed, float* out) {
  extern __shared__ __align__(1024) half_t tile[];
  __shared__ __align__(8) mbarrier_t bars[3];
  const int t = threadIdx.x, warp = t / 32;
  float D[4] = {}, E[8] = {};
  const unsigned A[4] = {};
  const unsigned long long a = descriptor(tile, 16, 1024), b = descriptor(tile, 16, 1024);
  if (t == 0) {
    mbarrier_init(bars, 1);
    mbarrier_init(bars + 1, 2);
    mbarrier_init_fence();
    if (what == 1) mbarrier_init(bars, 1);
  }
  fill(tile, (const half_t*)out, 0);
  if (what < 30 && t == 37) switch (what) {
    case 2: mbarrier_arrive(bars + 2); break;
    case 3: mbarrier_arrive((mbarrier_t*)((char*)bars + 4)); break;
    case 4: mbarrier_arrive((mbarrier_t*)out); break;
    case 5: *(bars + 1) = 0; mbarrier_arrive(bars + 1); break;
    case 6: mbarrier_arrive_expect(bars, 8192); mbarrier_arrive(bars); break;
    case 7: mbarrier_arrive_expect(bars, 1 << 20); break;
    case 8: mbarrier_wait(bars, 2); break;
    case 9: mbarrier_init(bars + 2, 0); break;
    case 10: tma_load_4d(tile + 64, map, bars, 0, 0, 0, 0); break;
    case 11: tma_load_4d(tile + 4096 + 512, map, bars, 0, 0, 0, 0); break;
    case 12: tma_load_4d(tile, map, bars, 0, 0, 0, 0); tma_load_4d(tile, map, bars, 0, 0, 0, 0); break;
    case 13: tma_store_4d(fixed, tile, 0, 0, 0, 0); break;
    case 14: tma_store_4d(map, tile, 0, 0, 0, 0); tma_store_commit(); break;
    case 15: tma_store_4d(map, tile, 0, 0, 0, 0); tma_store_wait<0>(); break;
    case 16: mbarrier_arrive_expect(bars, 8192); tma_load_4d(tile, map, bars, 0, 0, 0, 0); break;
    case 17: mbarrier_wait(bars, 0); break;
    case 18: { TensorMap none = {}; tma_load_4d(tile, none, bars, 0, 0, 0, 0); break; }
    case 19: mbarrier_init(bars + 2, 1); tma_load_4d(tile, map, bars + 2, 0, 0, 0, 0); break;
    case 20: tma_store_4d(map, tile, 0, 0, 0, 0); tma_load_4d(tile, map, bars, 0, 0, 0, 0); break;
    case 21: mbarrier_arrive_expect(bars, 4096); tma_load_4d(tile, map, bars, 0, 0, 0, 0); break;
    case 22: tma_load_4d(tile, map, bars, 0, 0, 0, 0); mbarrier_arrive(bars); break;
  }
  __syncwarp();
  switch (what) {
    case 30: wgmma_ss<8>(D, a, b, true); break;
    case 31: wgmma_fence(); wgmma_ss<8>(D, a, warp == 2 ? b + 2 : b, true); break;
    case 32: wgmma_fence(); wgmma_ss<8>(D, a & ~(3ull << 62), b, true); break;
    case 33: wgmma_fence(); wgmma_ss<8>(D, a + 8, b, true); break;
    case 34: wgmma_fence(); wgmma_ss<8>(D, a + 1024, b, true); break;
    case 35: wgmma_fence(); wgmma_ss<8>(D, a, b, true); break;
    case 36: wgmma_fence(); wgmma_ss<8>(D, a, b, true); wgmma_commit(); wgmma_wait<1>(); break;
    case 37: wgmma_fence(); if (warp != 2) wgmma_ss<8>(D, a, b, true); break;
    case 38: wgmma_fence(); if (warp != 2) wgmma_ss<8>(D, a, b, true); else registers_more<40>(); break;
    case 39: wgmma_fence(); if (warp != 2) wgmma_commit(); wgmma_ss<8>(D, a, b, true); break;
    case 40: wgmma_fence(); wgmma_ss<16>(E, a, b, true); wgmma_ss<8>(*(float(*)[4])(E + 4), a, b, true); break;
    case 41: wgmma_fence(); wgmma_rs<8>(D, A, b + 2, true); break;
    case 42: wgmma_fence(); if (t != 37) wgmma_ss<8>(D, a, b, true); else wgmma_commit(); break;
    case 43: registers_more<40>(); if (warp == 2) registers_more<48>(); break;
    case 44: wgmma_fence(); wgmma_ss<8>(D, a, b, t != 37); break;
    case 45: tile[t] = 1; __syncthreads(); wgmma_fence(); wgmma_ss<8>(D, a, b, true); break;
    case 46: wgmma_fence(); wgmma_ss<8>(D, a, b, true); wgmma_commit(); if (t % 32 == 5) tile[512 * warp] = 1; wgmma_wait<0>(); break;
    case 47: wgmma_fence(); wgmma_ss<8>(D, a, b, true); wgmma_commit(); if (t == 37) D[3] *= 2; wgmma_wait<0>(); break;
    case 48: tile[t] = 1; __syncthreads(); if (t == 37) tma_store_4d(map, tile, 0, 0, 0, 0); break;
    case 49: if (t == 37) tma_load_4d(tile, map, bars, 0, 0, 0, 0), tile[9] = 1; break;
    case 50: named_barrier_sync(0, 128); break;
    case 51: named_barrier_sync(16, 128); break;
    case 52: named_barrier_sync(1, 100); break;
    case 53: named_barrier_sync(1, t == 37 ? 64 : 128); break;
    case 54: named_barrier_sync(1, warp == 2 ? 64 : 128); break;
    case 55: if (warp == 1) named_barrier_arrive(1, 128), named_barrier_arrive(1, 128); break;
    case 56: if (warp != 2) named_barrier_sync(1, 128); break;
    case 57: if (t != 37) named_barrier_sync(1, 128); break;
    case 60: if (t == 37) mbarrier_wait(bars, 0); else if (t == 70) mbarrier_arrive(bars), mbarrier_arrive(bars); break;
    case 61: if (warp == 3) tile[t - 96] = 1, async_proxy_fence(); wgmma_fence(); wgmma_ss<8>(D, a, b, true); break;
  }
  out[t] = D[0] + E[0];
}

// Attention without a mask, as a warp-specialised kernel computes it: one producer, three warpgroups of 64 queries, tiles of 128 keys in two stages.
// q, o: (1, 1, 192, 128);  k, v: (1, 1, S, 128), S a multiple of 128
extern "C" __global__ void __launch_bounds__(512, 1)
attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
          const __grid_constant__ TensorMap o, int S, float scale) {
  extern __shared__ __align__(1024) half_t tiles[];  // q: (3, 2, 64, 64);  k, v: (2 stages, 2, 128, 64)
  __shared__ __align__(8) mbarrier_t q_full[1];
  __shared__ __align__(8) mbarrier_t full[2];
  __shared__ __align__(8) mbarrier_t empty[2];
  half_t *Q = tiles, *K = tiles + 3 * 8192, *V = K + 2 * 16384;
  const int t = threadIdx.x, group = t / 128 - 1;
  if (t == 0) {
    mbarrier_init(q_full, 1);
    for (int s = 0; s < 2; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 3);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (group < 0) {
    registers_fewer<32>();
    if (t != 0) return;
    mbarrier_arrive_expect(q_full, 3 * 16384);
    for (int g = 0; g < 3; g++)
      for (int slab = 0; slab < 2; slab++) tma_load_4d(Q + (2 * g + slab) * 4096, q, q_full, 64 * slab, 64 * g, 0, 0);
    for (int j = 0; j < S / 128; j++) {
      const int s = j % 2;
      mbarrier_wait(empty + s, j / 2 % 2 ^ 1);
      mbarrier_arrive_expect(full + s, 65536);
      for (int slab = 0; slab < 2; slab++) {
        tma_load_4d(K + (2 * s + slab) * 8192, k, full + s, 64 * slab, 128 * j, 0, 0);
        tma_load_4d(V + (2 * s + slab) * 8192, v, full + s, 64 * slab, 128 * j, 0, 0);
      }
    }
    return;
  }
  registers_more<160>();
  float O[64] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  mbarrier_wait(q_full, 0);
  half_t* mine = Q + group * 8192;
  for (int j = 0; j < S / 128; j++) {
    const int s = j % 2;
    float scores[64];
    mbarrier_wait(full + s, j / 2 % 2);
    wgmma_fence();
    for (int step = 0; step < 8; step++)
      wgmma_ss<128>(scores, descriptor(mine + step / 4 * 4096 + step % 4 * 16, 16, 1024),
                    descriptor(K + (2 * s + step / 4) * 8192 + step % 4 * 16, 16, 1024), step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    for (int r = 0; r < 2; r++) {
      float most = m[r];
      for (int i = 0; i < 64; i++)
        if (i / 2 % 2 == r) most = fmaxf(most, scores[i] *= scale);
      for (int lanes = 1; lanes < 4; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
      const float shrink = __expf(m[r] - most);
      m[r] = most, l[r] *= shrink;
      for (int i = 0; i < 64; i++)
        if (i / 2 % 2 == r) scores[i] = __expf(scores[i] - most), l[r] += scores[i], O[i] *= shrink;
    }
    wgmma_fence();
    for (int step = 0; step < 8; step++) {
      const float* p = scores + 8 * step;
      const unsigned P[4] = {pack2(p[0], p[1]), pack2(p[2], p[3]), pack2(p[4], p[5]), pack2(p[6], p[7])};
      wgmma_rs<128>(O, P, descriptor(V + 2 * s * 8192 + step * 1024, 16384, 1024), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (t % 128 == 0) mbarrier_arrive(empty + s);
  }
  for (int r = 0; r < 2; r++)
    for (int lanes = 1; lanes < 4; lanes *= 2) l[r] += __shfl_xor_sync(0xffffffff, l[r], lanes);
  for (int i = 0; i < 64; i += 2) {
    const int row = t % 128 / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + t % 4 * 2;
    half_t* line = mine + column / 64 * 4096 + row * 64;
    *(unsigned*)(line + ((column % 64 / 8 ^ row % 8) * 8 + column % 8)) = pack2(O[i] / l[i / 2 % 2], O[i + 1] / l[i / 2 % 2]);
  }
  async_proxy_fence();
  named_barrier_sync(1 + group, 128);
  if (t % 128 != 0) return;
  for (int slab = 0; slab < 2; slab++) tma_store_4d(o, mine + slab * 4096, 64 * slab, 64 * group, 0, 0);
  tma_store_commit();
  tma_store_wait<0>();
}
