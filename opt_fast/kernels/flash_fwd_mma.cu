// FlashAttention-2's forward pass on tensor cores, by mma.sync (sm_80 and later): `attention` of opt_np/flash.py, with its symbols.
//
// A block computes Br queries of one head, looping over the keys Bc at a time, from the first to the diagonal; each warp owns 32 of the queries.
// Q, K and V pass through shared memory; while one tile of K and V is used, the next one is being copied. scores, P and O stay in registers.
#include "tiles.cuh"

constexpr int Br = 128, Bc = Dh > 80 ? 48 : 64;  // 48: with 64, scores and acc would not fit in 255 registers
static_assert(Br == 32 * WARPS, "a warp owns 32 queries");

// Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh)  ->  O: (B, T, H, Dh), L: (B, H, T).  Grid: (tiles of Br queries, H, B).
extern "C" __global__ void __launch_bounds__(THREADS)
flash_fwd_mma(const half_t* Q, const half_t* K, const half_t* V, half_t* O, float* L, const int* ranges, int T, int S, float scale,
              long long q_batch, int q_token, int q_head, long long k_batch, int k_token, int k_head,
              long long v_batch, int v_token, int v_head, long long o_batch, int o_token, int o_head) {
  extern __shared__ __align__(16) half_t shared[];
  half_t *tile_q = shared, *tile_k = tile_q + Br * PITCH, *tile_v = tile_k + 2 * Bc * PITCH;  // (Br, Dh), and two of (Bc, Dh) each for K and V

  const int row = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i = (gridDim.x - 1 - blockIdx.x) * Br;  // the last queries see the most keys: they start first
  const auto [first_query, queries, first_key, keys, past] = range_of(ranges, row, T, S);
  if (i >= queries) return;
  Q = at(Q, row, q_batch, first_query + i, q_token, head, q_head);
  K = at(K, row, k_batch, first_key, k_token, head, k_head);
  V = at(V, row, v_batch, first_key, v_token, head, v_head);

  const int reach = past + i + 32 * warp;                   // the last key that this warp's first query sees
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
    __syncthreads();  // this tile has arrived, and all warps are done with the one before, which the next one overwrites
    if (j + Bc < seen) {
      load_tile<Bc>(tile_k + next, K += Bc * k_token, k_token, keys - j - Bc);
      load_tile<Bc>(tile_v + next, V += Bc * v_token, v_token, keys - j - Bc);
      cp_async_commit();
    }
    if (j > reach + 31) continue;  // none of this warp's queries reaches this tile
    float scores[2][Bc / 8][4] = {};
    multiply<2, Bc>(scores, tile_q + 32 * warp * PITCH, tile_k + here);
    if (j + Bc - 1 > min(reach, keys - 1)) {  // the tile crosses the diagonal, or the end of the keys
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < Bc / 8; n++)
#pragma unroll
          for (int c = 0; c < 4; c++)
            if (j + 8 * n + lane % 4 * 2 + c % 2 > min(reach + 16 * half + lane / 4 + c / 2 * 8, keys - 1)) scores[half][n][c] = -INFINITY;
    }
    online_softmax<2, Bc>(scores, acc, m, l, scale * LOG2E);
    accumulate<2, Bc>(acc, scores, tile_v + here);
  }

  const int first = i + 32 * warp;  // this warp's first query
  L += ((long long)row * gridDim.y + head) * T + first_query + first;
  float share[2][2];
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int t = 16 * half + 8 * r + lane / 4;
      const float sum = row_sum(l[half][r]);
      share[half][r] = sum > 0 ? 1 / sum : 0.f;  // divided once, at the end; a query that sees no key gets 0
      if (lane % 4 == 0 && first + t < queries) L[t] = sum > 0 ? m[half][r] * scale + logf(sum) : -INFINITY;
    }
  O = at(O, row, o_batch, first_query + first, o_token, head, o_head);
  store_rows<2>(tile_q + 32 * warp * PITCH, O, o_token, queries - first, acc, share);  // staged over Q's rows, which only this warp has read
}
