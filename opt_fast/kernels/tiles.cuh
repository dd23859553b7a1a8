// Shared by the mma.sync kernels: tiles of rows of one head in shared memory, and attention's two products. A block has four warps, or BLOCK_WARPS;
// each owns 16 M rows of a product, in registers, in mma_m16n8k16's layout: element 2 r + c of piece n is at row lane / 4 + 8 r of its 16 rows, and
// column 8 n + lane % 4 * 2 + c. DH (head_dim) and BF16 are set when a kernel is compiled.
#pragma once
#include <mma.cuh>  // not in quotes: the tests put their own mma.cuh first on the include path

#ifndef BLOCK_WARPS
#define BLOCK_WARPS 4
#endif
constexpr int Dh = DH, WARPS = BLOCK_WARPS, THREADS = 32 * WARPS;
constexpr int PITCH = Dh + 8;  // elements from row to row of a tile, padded by 16 bytes so that the 8 rows that ldmatrix reads are in different banks
constexpr float LOG2E = 1.4426950408889634f;
static_assert(Dh % 16 == 0, "heads are made of pieces of 16 numbers");

// Starts copying a tile of rows of one head to shared memory; rows from `real` on become zeros.
template <int ROWS> __device__ __forceinline__ void load_tile(half_t* tile, const half_t* rows, int stride, int real) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * (Dh / 8); i += THREADS) {
    const int row = i / (Dh / 8), column = i % (Dh / 8) * 8;
    cp_async_16(shared_address(tile + row * PITCH + column), rows + (row < real ? row * stride : 0) + column, row < real);
  }
}

// scores (16 M x N) = A (16 M x Dh) Bᵀ.  B: (N, Dh)
template <int M, int N> __device__ __forceinline__ void multiply(float (&scores)[M][N / 8][4], const half_t* A, const half_t* B) {
  const int lane = threadIdx.x % 32;
  const unsigned left = shared_address(A + lane % 16 * PITCH + lane / 16 * 8);  // lanes 0 to 15: 16 rows; 16 to 31: the same rows, 8 columns later
  const unsigned right = shared_address(B + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8);
#pragma unroll
  for (int d = 0; d < Dh; d += 16) {
    unsigned a[M][4], b[4];
#pragma unroll
    for (int half = 0; half < M; half++) ldmatrix_x4(a[half], left + 2 * (16 * half * PITCH + d));
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
      ldmatrix_x4(b, right + 2 * (16 * n * PITCH + d));  // 16 rows, 16 columns
#pragma unroll
      for (int half = 0; half < M; half++) {
        mma_m16n8k16(scores[half][2 * n], a[half], b[0], b[1]);
        mma_m16n8k16(scores[half][2 * n + 1], a[half], b[2], b[3]);
      }
    }
  }
}

// acc (16 M x Dh) += P (16 M x N) B, P rounded to 16 bits: mma's output layout (scores) is also that of its left factor (P).  B: (N, Dh)
template <int M, int N>
__device__ __forceinline__ void accumulate(float (&acc)[M][Dh / 8][4], const float (&P)[M][N / 8][4], const half_t* B) {
  const int lane = threadIdx.x % 32;
  const unsigned right = shared_address(B + lane % 16 * PITCH + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    unsigned a[M][4], b[4];
#pragma unroll
    for (int half = 0; half < M; half++) {
      const float *one = P[half][2 * n], *two = P[half][2 * n + 1];
      a[half][0] = pack2(one[0], one[1]), a[half][1] = pack2(one[2], one[3]);
      a[half][2] = pack2(two[0], two[1]), a[half][3] = pack2(two[2], two[3]);
    }
#pragma unroll
    for (int d = 0; d < Dh / 16; d++) {
      ldmatrix_x4_trans(b, right + 2 * (16 * n * PITCH + 16 * d));
#pragma unroll
      for (int half = 0; half < M; half++) {
        mma_m16n8k16(acc[half][2 * d], a[half], b[0], b[1]);
        mma_m16n8k16(acc[half][2 * d + 1], a[half], b[2], b[3]);
      }
    }
  }
}

// The maximum, or the sum, over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Turns scores into P under the new maximum m, and rescales acc and l, which were summed under the old one. `log2_scale` is scale · log2(e), because
// the GPU's instruction is exp2. l holds this lane's part of each row's sum.
template <int M, int N>
__device__ __forceinline__ void online_softmax(float (&scores)[M][N / 8][4], float (&acc)[M][Dh / 8][4], float (&m)[M][2], float (&l)[M][2],
                                               float log2_scale) {
#pragma unroll
  for (int half = 0; half < M; half++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float m_new = m[half][r];
#pragma unroll
      for (int n = 0; n < N / 8; n++) m_new = fmaxf(m_new, fmaxf(scores[half][n][2 * r], scores[half][n][2 * r + 1]));
      m_new = row_max(m_new);
      const float safe = m_new == -INFINITY ? 0.f : m_new * log2_scale;  // no key seen yet: -inf - 0, where -inf - -inf would be NaN
      const float shrink = exp2_approx(m[half][r] * log2_scale - safe);
      float sum = l[half][r] * shrink;
#pragma unroll
      for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; c++) sum += scores[half][n][c] = exp2_approx(scores[half][n][c] * log2_scale - safe);
#pragma unroll
      for (int d = 0; d < Dh / 8; d++) acc[half][d][2 * r] *= shrink, acc[half][d][2 * r + 1] *= shrink;
      m[half][r] = m_new, l[half][r] = sum;
    }
}

// Writes a warp's rows to global memory, through shared memory, so that each store has 16 bytes: `tile` has room for 16 M rows and is used by this
// warp only, `rows` is where the first row goes, and `real` of them exist. Row lane / 4 + 8 r of each 16 is multiplied by factor[half][r].
template <int M>
__device__ __forceinline__ void store_rows(half_t* tile, half_t* rows, int stride, int real, const float (&acc)[M][Dh / 8][4],
                                           const float (&factor)[M][2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < M; half++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int d = 0; d < Dh / 8; d++)
        *(unsigned*)(tile + (16 * half + 8 * r + lane / 4) * PITCH + 8 * d + lane % 4 * 2) =
            pack2(acc[half][d][2 * r] * factor[half][r], acc[half][d][2 * r + 1] * factor[half][r]);
  __syncwarp();
#pragma unroll
  for (int c = lane; c < 16 * M * (Dh / 8); c += 32) {
    const int t = c / (Dh / 8), column = c % (Dh / 8) * 8;
    if (t < real) *(uint4*)(rows + t * stride + column) = *(const uint4*)(tile + t * PITCH + column);
  }
}

// The queries and keys of a row of the batch. `ranges`, if not null, has five numbers for each row: its first query, its number of queries, its first
// key, its number of keys, and its past. Queries outside are not written; keys outside are hidden.
struct Range {
  int first_query, queries, first_key, keys, past;  // query t of these is at key past + t of these, and sees the keys up to that one
};
__device__ __forceinline__ Range range_of(const int* ranges, int row, int T, int S) {
  if (!ranges) return {0, T, 0, S, S - T};
  ranges += 5 * row;
  return {ranges[0], ranges[1], ranges[2], ranges[3], ranges[4]};
}

// The address of a head's vector at a token of a row of the batch.
template <class Pointer>
__device__ __forceinline__ Pointer at(Pointer first, int row, long long batch, int token, int token_stride, int head, int head_stride) {
  return first + row * batch + token * (long long)token_stride + head * (long long)head_stride;
}
