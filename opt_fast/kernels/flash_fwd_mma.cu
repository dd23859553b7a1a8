// FlashAttention-2's forward pass on tensor cores, by mma.sync (sm_80 and later): `attention` of opt_np/flash.py, with its symbols.
//
// A block computes Br queries of one head, walking over the keys Bc at a time, from the first to the diagonal; each of its warps owns 32 of the queries.
// Q, K and V come through shared memory; while a tile of K and V is computed with, the next one is on its way. scores, P and O live in registers: the
// layout in which mma leaves scores is the one in which it takes P. DH (head_dim) and BF16 are set when this is compiled.
#include "mma.cuh"

constexpr int Dh = DH, Br = 128, Bc = Dh > 80 ? 48 : 64, WARPS = 4, THREADS = 32 * WARPS;  // 48: what scores and acc leave of 255 registers
constexpr int PITCH = Dh + 8;  // numbers from row to row of a tile: 16 bytes more than a row has, so that ldmatrix meets 8 rows in 8 different banks
static_assert(Dh % 16 == 0 && Bc % 16 == 0 && Br == 32 * WARPS, "tiles are made of 16 x 16 pieces, and a warp owns 32 queries");

// A tile of rows of one head on its way to shared memory; rows past `real` become zeros.
template <int ROWS> __device__ __forceinline__ void load_tile(half_t* tile, const half_t* rows, int stride, int real) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * (Dh / 8); i += THREADS) {
    const int row = i / (Dh / 8), column = i % (Dh / 8) * 8;
    cp_async_16(shared_address(tile + row * PITCH + column), rows + (row < real ? row * stride : 0) + column, row < real);
  }
}

// scores (32 x Bc) = Q (32 x Dh) Kᵀ, in the lanes' layout.
__device__ __forceinline__ void query_key(float (&scores)[2][Bc / 8][4], const half_t* Q, const half_t* K) {
  const int lane = threadIdx.x % 32;
  const unsigned q = shared_address(Q + lane % 16 * PITCH + lane / 16 * 8);  // lanes 0 to 15 address 16 rows, 16 to 31 the same rows 8 columns on
  const unsigned k = shared_address(K + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8);
#pragma unroll
  for (int d = 0; d < Dh; d += 16) {
    unsigned a[2][4], b[4];
    ldmatrix_x4(a[0], q + 2 * d);
    ldmatrix_x4(a[1], q + 2 * (16 * PITCH + d));
#pragma unroll
    for (int n = 0; n < Bc / 16; n++) {
      ldmatrix_x4(b, k + 2 * (16 * n * PITCH + d));  // 16 keys, 16 columns
#pragma unroll
      for (int half = 0; half < 2; half++) {
        mma_m16n8k16(scores[half][2 * n], a[half], b[0], b[1]);
        mma_m16n8k16(scores[half][2 * n + 1], a[half], b[2], b[3]);
      }
    }
  }
}

// acc (32 x Dh) += P (32 x Bc) V, P rounded to 16 bits.
__device__ __forceinline__ void probs_value(float (&acc)[2][Dh / 8][4], const float (&P)[2][Bc / 8][4], const half_t* V) {
  const int lane = threadIdx.x % 32;
  const unsigned v = shared_address(V + lane % 16 * PITCH + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < Bc / 16; n++) {
    unsigned a[2][4], b[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float *left = P[half][2 * n], *right = P[half][2 * n + 1];
      a[half][0] = pack2(left[0], left[1]), a[half][1] = pack2(left[2], left[3]);
      a[half][2] = pack2(right[0], right[1]), a[half][3] = pack2(right[2], right[3]);
    }
#pragma unroll
    for (int d = 0; d < Dh / 16; d++) {
      ldmatrix_x4_trans(b, v + 2 * (16 * n * PITCH + 16 * d));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        mma_m16n8k16(acc[half][2 * d], a[half], b[0], b[1]);
        mma_m16n8k16(acc[half][2 * d + 1], a[half], b[2], b[3]);
      }
    }
  }
}

// The largest, or the sum, of the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// scores become P under the new maximum; what was summed under the old one shrinks. `log2_scale` is scale · log2(e), for exp2 is what the GPU has.
__device__ __forceinline__ void online_softmax(float (&scores)[2][Bc / 8][4], float (&acc)[2][Dh / 8][4], float (&m)[2][2], float (&l)[2][2],
                                               float log2_scale) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int r = 0; r < 2; r++) {  // this lane's two rows of a 16 x 8 piece: numbers 0 and 1, 2 and 3
      float m_new = m[half][r];
#pragma unroll
      for (int n = 0; n < Bc / 8; n++) m_new = fmaxf(m_new, fmaxf(scores[half][n][2 * r], scores[half][n][2 * r + 1]));
      m_new = row_max(m_new);
      const float safe = m_new == -INFINITY ? 0.f : m_new * log2_scale;  // nothing seen yet: -inf - 0, where -inf - -inf would be NaN
      const float shrink = exp2_approx(m[half][r] * log2_scale - safe);
      float sum = l[half][r] * shrink;
#pragma unroll
      for (int n = 0; n < Bc / 8; n++)
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; c++) sum += scores[half][n][c] = exp2_approx(scores[half][n][c] * log2_scale - safe);
#pragma unroll
      for (int d = 0; d < Dh / 8; d++) acc[half][d][2 * r] *= shrink, acc[half][d][2 * r + 1] *= shrink;
      m[half][r] = m_new, l[half][r] = sum;
    }
}

// Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh)  ->  O: (B, T, H, Dh), L: (B, H, T).  Grid: (tiles of Br queries, H, B).
// `ranges`, where it is not null, gives each row of the batch five numbers: its first query, its queries, its first key, its keys, and the key before
// which its first query stands. Queries outside are not written; keys outside are hidden.
extern "C" __global__ void __launch_bounds__(THREADS)
flash_fwd_mma(const half_t* Q, const half_t* K, const half_t* V, half_t* O, float* L, const int* ranges, int T, int S, float scale,
              long long q_batch, int q_token, int q_head, long long k_batch, int k_token, int k_head,
              long long v_batch, int v_token, int v_head, long long o_batch, int o_token, int o_head) {
  extern __shared__ __align__(16) half_t shared[];
  half_t *tile_q = shared, *tile_k = tile_q + Br * PITCH, *tile_v = tile_k + 2 * Bc * PITCH;  // (Br, Dh), and two of (Bc, Dh) each

  const int row = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i = (gridDim.x - 1 - blockIdx.x) * Br;  // the last queries see the most keys: they begin first
  const int* range = ranges + 5 * row;
  const int first_query = ranges ? range[0] : 0, queries = ranges ? range[1] : T;
  const int first_key = ranges ? range[2] : 0, keys = ranges ? range[3] : S, past = ranges ? range[4] : S - T;  // query t stands at key past + t
  if (i >= queries) return;
  Q += row * q_batch + head * (long long)q_head + (first_query + i) * (long long)q_token;
  K += row * k_batch + head * (long long)k_head + first_key * (long long)k_token;
  V += row * v_batch + head * (long long)v_head + first_key * (long long)v_token;

  const int reach = past + i + 32 * warp;                 // the last key that this warp's first query sees
  const int seen = min(past + min(i + Br, queries), keys);  // keys that the block's last query sees: tiles wholly above the diagonal are never reached
  float acc[2][Dh / 8][4] = {}, m[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, l[2][2] = {};

  if (seen > 0) {
    load_tile<Br>(tile_q, Q, q_token, queries - i);
    load_tile<Bc>(tile_k, K, k_token, keys);
    load_tile<Bc>(tile_v, V, v_token, keys);
    cp_async_commit();
  }
  for (int j = 0; j < seen; j += Bc) {
    const int here = j / Bc % 2 * Bc * PITCH, next = Bc * PITCH - here;
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone is done with the one before, whose place the next one takes
    if (j + Bc < seen) {
      load_tile<Bc>(tile_k + next, K += Bc * k_token, k_token, keys - j - Bc);
      load_tile<Bc>(tile_v + next, V += Bc * v_token, v_token, keys - j - Bc);
      cp_async_commit();
    }
    if (j > reach + 31) continue;  // none of this warp's queries reaches this tile
    float scores[2][Bc / 8][4] = {};
    query_key(scores, tile_q + 32 * warp * PITCH, tile_k + here);
    if (j + Bc - 1 > min(reach, keys - 1)) {  // the tile meets the diagonal, or the end of the keys
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < Bc / 8; n++)
#pragma unroll
          for (int c = 0; c < 4; c++)
            if (j + 8 * n + lane % 4 * 2 + c % 2 > min(reach + 16 * half + lane / 4 + c / 2 * 8, keys - 1)) scores[half][n][c] = -INFINITY;
    }
    online_softmax(scores, acc, m, l, scale * 1.4426950408889634f);
    probs_value(acc, scores, tile_v + here);
  }

  // O leaves by way of Q's place, whose rows nobody but this warp has read, so that a row is written 16 bytes at a time.
  const int first = i + 32 * warp;  // this warp's first query
  half_t* tile_o = tile_q + 32 * warp * PITCH;
  O += row * o_batch + head * (long long)o_head + (first_query + first) * (long long)o_token;
  L += ((long long)row * gridDim.y + head) * T + first_query + first;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int t = 16 * half + 8 * r + lane / 4;
      const float sum = row_sum(l[half][r]), share = sum > 0 ? 1 / sum : 0.f;  // divided once, at the end; a query that sees no key gets 0
#pragma unroll
      for (int d = 0; d < Dh / 8; d++)
        *(unsigned*)(tile_o + t * PITCH + 8 * d + lane % 4 * 2) = pack2(acc[half][d][2 * r] * share, acc[half][d][2 * r + 1] * share);
      if (lane % 4 == 0 && first + t < queries) L[t] = sum > 0 ? m[half][r] * scale + logf(sum) : -INFINITY;
    }
  __syncwarp();
#pragma unroll
  for (int c = lane; c < 32 * (Dh / 8); c += 32) {
    const int t = c / (Dh / 8), column = c % (Dh / 8) * 8;
    if (first + t < queries) *(uint4*)(O + t * o_token + column) = *(const uint4*)(tile_o + t * PITCH + column);
  }
}
