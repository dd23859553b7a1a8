// Small kernels for test_cuda_on_cpu.py: each instruction of mma.cuh, a pipeline with its barriers left out on demand, and what is forbidden.
#include "mma.cuh"
#include <grid.cuh>

// Lane t gives row t of 32, 16 bytes each.  source: (32, 8)  ->  plain: (32, 4), transposed: (32, 4)
extern "C" __global__ void matrices(const uint4* source, unsigned* plain, unsigned* transposed) {
  extern __shared__ __align__(16) uint4 rows[];
  const int t = threadIdx.x;
  unsigned r[4];
  rows[t] = source[t];
  __syncthreads();
  ldmatrix_x4(r, shared_address(rows + t));
  for (int i = 0; i < 4; i++) plain[4 * t + i] = r[i];
  ldmatrix_x4_trans(r, shared_address(rows + t));
  for (int i = 0; i < 4; i++) transposed[4 * t + i] = r[i];
}

// One mma on registers as they are.  a: (32, 4);  b: (32, 2);  c: (32, 4)
extern "C" __global__ void fragments(const unsigned* a, const unsigned* b, float* c) {
  const int t = threadIdx.x;
  unsigned A[4];
  float C[4];
  for (int i = 0; i < 4; i++) A[i] = a[4 * t + i], C[i] = c[4 * t + i];
  mma_m16n8k16(C, A, b[2 * t], b[2 * t + 1]);
  for (int i = 0; i < 4; i++) c[4 * t + i] = C[i];
}

// A B twice: from B's columns as rows by ldmatrix, and from B by ldmatrix.trans.  A: (16, 16);  B: (16, 16);  Bt: (16, 16)  ->  C: (2, 16, 16)
extern "C" __global__ void product(const half_t* A, const half_t* B, const half_t* Bt, float* C) {
  extern __shared__ __align__(16) half_t tiles[];
  const int t = threadIdx.x;
  half_t *tile_a = tiles, *tile_b = tiles + 256, *tile_bt = tiles + 512;
  cp_async_16(shared_address(tile_a + 8 * t), A + 8 * t, true);
  cp_async_16(shared_address(tile_b + 8 * t), B + 8 * t, true);
  cp_async_16(shared_address(tile_bt + 8 * t), Bt + 8 * t, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  unsigned a[4], b[2][4];
  ldmatrix_x4(a, shared_address(tile_a + t % 16 * 16 + t / 16 * 8));
  ldmatrix_x4(b[0], shared_address(tile_bt + (t % 8 + t / 16 * 8) * 16 + t / 8 % 2 * 8));
  ldmatrix_x4_trans(b[1], shared_address(tile_b + t % 16 * 16 + t / 16 * 8));
  for (int way = 0; way < 2; way++)
    for (int n = 0; n < 2; n++) {
      float c[4] = {};
      mma_m16n8k16(c, a, b[way][2 * n], b[way][2 * n + 1]);
      for (int i = 0; i < 4; i++) C[way * 256 + (t / 4 + i / 2 * 8) * 16 + 8 * n + t % 4 * 2 + i % 2] = c[i];
    }
}

// x: (2 n)  ->  packed: (n), powers: (2 n)
extern "C" __global__ void each(const float* x, unsigned* packed, float* powers, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    packed[i] = pack2(x[2 * i], x[2 * i + 1]);
    for (int half = 0; half < 2; half++) powers[2 * i + half] = exp2_approx(x[2 * i + half]);
  }
}

// x: (threads)  ->  exchanged: (threads), given: (threads)
extern "C" __global__ void shuffles(const float* x, float* exchanged, float* given, int lanes, int from) {
  const int t = threadIdx.x;
  exchanged[t] = __shfl_xor_sync(0xffffffff, x[t], lanes);
  given[t] = __shfl_sync(0xffffffff, x[t], from);
}

// Rows of 16 bytes by cp.async; those from `real` on become zeros.  source: (real, 8)  ->  target: (threads, 8)
extern "C" __global__ void copies(const uint4* source, uint4* target, int real) {
  extern __shared__ __align__(16) uint4 rows[];
  const int t = threadIdx.x;
  cp_async_16(shared_address(rows + t), source + t, t < real);
  cp_async_commit();
  cp_async_wait<0>();
  target[t] = rows[t];
}

// Three groups of a row for each thread, of which all but the last one are waited for.  source: (3, threads, 8)  ->  target: (3, threads, 8)
extern "C" __global__ void groups(const uint4* source, uint4* target) {
  extern __shared__ __align__(16) uint4 rows[];
  const int t = threadIdx.x, threads = blockDim.x;
  for (int j = 0; j < 3; j++) {
    cp_async_16(shared_address(rows + j * threads + t), source + j * threads + t, true);
    if (j < 2) cp_async_commit();
  }
  cp_async_wait<1>();  // the last one here is not even committed: only the first is sure
  for (int j = 0; j < 3; j++) target[j * threads + t] = rows[j * threads + t];
}

// Tiles of a row for each thread, two on their way; each warp reads rows that others fetched.  tiles: (n, threads, 4)  ->  sums: (threads)
extern "C" __global__ void pipeline(const uint4* tiles, unsigned* sums, int n, bool wait, bool arrived, bool done) {
  extern __shared__ __align__(16) uint4 ring[];
  const int t = threadIdx.x, threads = blockDim.x;
  unsigned sum = 0, r[4];
  cp_async_16(shared_address(ring + t), tiles + t, true);
  cp_async_commit();
  for (int j = 0; j < n; j++) {
    if (j + 1 < n) cp_async_16(shared_address(ring + (j + 1) % 2 * threads + t), tiles + (j + 1) * threads + t, true);
    cp_async_commit();
    if (wait) cp_async_wait<1>();  // all but the next tile's
    if (arrived) __syncthreads();
    ldmatrix_x4(r, shared_address(ring + j % 2 * threads + (t + 37) % threads));
    sum += r[0] + r[1] + r[2] + r[3];
    if (done) __syncthreads();
  }
  sums[t] = sum;
}

// Each thread gets another's number, by plain stores and loads.  x: (threads)  ->  y: (threads)
template <bool SYNC> __global__ void rotated(const float* x, float* y) {
  __shared__ float numbers[1024];
  const int t = threadIdx.x;
  numbers[t] = x[t];
  if (SYNC) __syncthreads();
  y[t] = numbers[(t + 1) % blockDim.x];
}

// Each thread writes where it is.  Grid and block of three axes  ->  places: (blocks, threads, 6)
extern "C" __global__ void places(unsigned* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned* place = out + (block * blockDim.x * blockDim.y * blockDim.z + t) * 6;
  __syncthreads();  // what threadIdx was before a switch, it is after it
  place[0] = blockIdx.z, place[1] = blockIdx.y, place[2] = blockIdx.x;
  place[3] = threadIdx.z, place[4] = threadIdx.y, place[5] = threadIdx.x;
}

// A number for each thread as float32; two numbers less two others; bytes of two words.  x: (threads);  a: (threads);  b: (threads);
// which: (threads)  ->  y: (threads), less: (threads), chosen: (threads)
extern "C" __global__ void widths(const half_t* x, const unsigned* a, const unsigned* b, const unsigned* which, float* y, unsigned* less,
                                  unsigned* chosen) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  y[t] = unpack(x[t]);
#if !BF16
  less[t] = subtract2(a[t], b[t]);
#endif
  chosen[t] = __byte_perm(a[t], b[t], which[t]);
}

// Each block adds its number to what the block before it has had in the round before.  x: (2, blocks)  ->  x: (2, blocks)
extern "C" __global__ void relay(int* x, unsigned* state, int rounds, int without, int stays_away) {
  extern __shared__ __align__(16) int mine[];  // each block's own
  const int block = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x == 0) mine[0] = block;
  __syncthreads();
  if (block == stays_away) return;
  for (int round = 0; round < rounds; round++) {
    const int before = x[round % 2 * blocks + (block + 1) % blocks];
    if (threadIdx.x == 40) x[(round + 1) % 2 * blocks + block] = before + mine[0];
    __threadfence();
    if (round != without) grid_barrier(state);
  }
}

// Arrays that are told by their addresses.  lines: (n, 3): from, to, how many numbers
extern "C" __global__ void moves(const long long* lines, int n) {
  for (int i = 0; i < n; i++)
    if (threadIdx.x < lines[3 * i + 2]) ((float*)lines[3 * i + 1])[threadIdx.x] = ((const float*)lines[3 * i])[threadIdx.x];
}

// Shared memory that would be the same for all blocks here.
extern "C" __global__ void fixed_place(int* x) {
  __shared__ int numbers[32];
  numbers[threadIdx.x] = x[threadIdx.x];
}

// The functions of one float32.  x: (threads)  ->  y: (8, threads)
extern "C" __global__ void functions(const float* x, float* y) {
  const int t = threadIdx.x, n = blockDim.x;
  y[t] = __expf(x[t]), y[n + t] = __logf(x[t]), y[2 * n + t] = __log2f(x[t]), y[3 * n + t] = __fdividef(x[t], 3);
  y[4 * n + t] = rsqrtf(x[t]), y[5 * n + t] = __int_as_float(__float_as_int(max(x[t], 1.f)) + min(int(threadIdx.x), 5));
  y[6 * n + t] = erff(x[t]), y[7 * n + t] = tanhf(x[t]);
}

// What the machine forbids or leaves undefined, one at a time.  x: (64, 8) that may only be read;  y: (64, 8)
extern "C" __global__ void forbidden(int what, const half_t* x, half_t* y, int zero) {
  extern __shared__ __align__(16) half_t numbers[];  // (64, 8)
  const int t = threadIdx.x, lane = t % 32;
  const unsigned address = shared_address(numbers + 8 * t);
  unsigned r[4] = {};
  float c[4] = {};
  switch (what) {
    case 1: ldmatrix_x4(r, address + (t == 37 ? 8 : 0)); break;
    case 2: ldmatrix_x4(r, address + (t == 37 ? 512 : 0)); break;
    case 3: cp_async_16(address + (t == 37 ? 2 : 0), x, true); break;
    case 4: cp_async_16(t == 37 ? 0 : address, x, true); break;
    case 5: cp_async_16(address, x + (t == 37), true); break;
    case 6: cp_async_16(address, x + 8 * (t == 37 ? 64 : t), true); break;
    case 7: if (lane < 16) ldmatrix_x4(r, address); else mma_m16n8k16(c, r, 0, 0); break;
    case 8: if (t != 37) __syncwarp(); break;
    case 9: if (t < 32) __syncthreads(); break;
    case 10: if (lane < 31) __syncthreads(); else __syncwarp(); break;
    case 11: if (t == 37) y[0] = x[512 + zero]; break;
    case 12: if (t == 37) y[zero - 9] = 1; break;
    case 13: if (t == 37) const_cast<half_t*>(x)[zero] = 1; break;
    case 14: if (t == 37) y[0] = numbers[8 * 512 + zero]; break;
    case 15: if (t == 37) y[0] = r[4 + zero]; break;
    case 16: if (t == 37) *(uint4*)y = *(const uint4*)(x + 4 + zero); break;
    case 17: if (t == 37) y[0] = what / zero; break;
    case 18: if (t == 37) y[0] = (2147483647 - zero) + what < 0; break;
    case 19: y[0] = __shfl_sync(0xffff, t, 0); break;
    case 20: y[t] = shared_address(x); break;
    case 21: if (t == 37) y[512 + zero] = 1; break;
    case 22: if (t == 37) numbers[520 + zero] = 1; break;
  }
  y[t] = r[0] + c[0];
}
