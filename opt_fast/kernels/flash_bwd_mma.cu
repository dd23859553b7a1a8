// FlashAttention-2's backward pass on tensor cores, by mma.sync (sm_80 and later): `attention_bwd` of opt_np/flash.py, with its symbols.
//
// Two kernels over the same tiles: a block of flash_bwd_keys owns 64 keys and loops over the queries that see them, for dK and dV; a block of
// flash_bwd_queries owns 64 queries and loops over their keys, for dQ. The scores are computed twice, seven products instead of five; but no sum runs
// across blocks, the bits are the same every time, and P and dscores pass from product to product in registers. A warp owns 16 rows.
#include "tiles.cuh"

constexpr int OWN = 16 * WARPS, OTHER = Dh > 80 ? 32 : 64;  // rows that a block owns, and rows of a tile that it loops over: as registers allow

// Turns a tile's scores into P, recomputed from L, and its dP into dscores / scale = P (dP - D). Rows are queries here; L is multiplied by log2(e).
// `reach` is the last key that this lane's first row sees, `column` this lane's first key in the tile.
__device__ __forceinline__ void weigh(float (&P)[1][OTHER / 8][4], float (&dP)[1][OTHER / 8][4], const float (&L)[2], const float (&D)[2],
                                      float log2_scale, int reach, int column, int keys) {
#pragma unroll
  for (int n = 0; n < OTHER / 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const bool hidden = column + 8 * n + c % 2 > min(reach + c / 2 * 8, keys - 1);
      P[0][n][c] = hidden ? 0.f : exp2_approx(P[0][n][c] * log2_scale - L[c / 2]);
      dP[0][n][c] = P[0][n][c] * (dP[0][n][c] - D[c / 2]);
    }
}

// The same with keys as rows: L and D belong to columns, of which `queries` exist. `first` is the first query that sees this lane's first key.
__device__ __forceinline__ void weigh_transposed(float (&P)[1][OTHER / 8][4], float (&dP)[1][OTHER / 8][4], const float* L, const float* D,
                                                 float log2_scale, int first, int column, int queries) {
#pragma unroll
  for (int n = 0; n < OTHER / 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int t = column + 8 * n + c % 2;
      const bool hidden = t < first + c / 2 * 8 || t >= queries;
      const float lse = hidden ? 0.f : L[t] * LOG2E, sum = hidden ? 0.f : D[t];
      P[0][n][c] = hidden ? 0.f : exp2_approx(P[0][n][c] * log2_scale - lse);
      dP[0][n][c] = P[0][n][c] * (dP[0][n][c] - sum);
    }
}

// dO: (B, T, H, Dh);  Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh);  L: (B, H, T);  D: (B, H, T)  ->  dK: (B, S, H, Dh), dV: (B, S, H, Dh)
// Grid: (tiles of OWN keys, H, B). dK and dV have the same strides.
extern "C" __global__ void __launch_bounds__(THREADS)
flash_bwd_keys(const half_t* dO, const half_t* Q, const half_t* K, const half_t* V, const float* L, const float* D, half_t* dK, half_t* dV,
               const int* ranges, int T, int S, float scale, long long do_batch, int do_token, int do_head, long long q_batch, int q_token,
               int q_head, long long k_batch, int k_token, int k_head, long long v_batch, int v_token, int v_head, long long d_batch, int d_token,
               int d_head) {
  extern __shared__ __align__(16) half_t shared[];
  half_t *tile_k = shared, *tile_v = tile_k + OWN * PITCH, *tile_q = tile_v + OWN * PITCH, *tile_do = tile_q + 2 * OTHER * PITCH;

  const int row = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = blockIdx.x * OWN;
  const auto [first_query, queries, first_key, keys, past] = range_of(ranges, row, T, S);
  if (j >= keys) return;
  const int begin = max(j - past, 0) / OTHER * OTHER;  // the first tile of queries that reaches these keys
  K = at(K, row, k_batch, first_key + j, k_token, head, k_head);
  V = at(V, row, v_batch, first_key + j, v_token, head, v_head);
  Q = at(Q, row, q_batch, first_query + begin, q_token, head, q_head);
  dO = at(dO, row, do_batch, first_query + begin, do_token, head, do_head);
  L += ((long long)row * gridDim.y + head) * T + first_query;
  D += ((long long)row * gridDim.y + head) * T + first_query;
  float acc_k[1][Dh / 8][4] = {}, acc_v[1][Dh / 8][4] = {};

  if (begin < queries) {
    load_tile<OWN>(tile_k, K, k_token, keys - j);
    load_tile<OWN>(tile_v, V, v_token, keys - j);
    load_tile<OTHER>(tile_q, Q, q_token, queries - begin);
    load_tile<OTHER>(tile_do, dO, do_token, queries - begin);
    cp_async_commit();
  }
  for (int i = begin; i < queries; i += OTHER) {
    const int here = (i - begin) / OTHER % 2 * OTHER * PITCH, next = OTHER * PITCH - here;
    cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and all warps are done with the one before, which the next one overwrites
    if (i + OTHER < queries) {
      load_tile<OTHER>(tile_q + next, Q += OTHER * q_token, q_token, queries - i - OTHER);
      load_tile<OTHER>(tile_do + next, dO += OTHER * do_token, do_token, queries - i - OTHER);
      cp_async_commit();
    }
    float P[1][OTHER / 8][4] = {}, dP[1][OTHER / 8][4] = {};  // transposed: rows are keys
    multiply<1, OTHER>(P, tile_k + 16 * warp * PITCH, tile_q + here);
    multiply<1, OTHER>(dP, tile_v + 16 * warp * PITCH, tile_do + here);
    weigh_transposed(P, dP, L, D, scale * LOG2E, j + 16 * warp + lane / 4 - past, i + lane % 4 * 2, queries);
    accumulate<1, OTHER>(acc_v, P, tile_do + here);
    accumulate<1, OTHER>(acc_k, dP, tile_q + here);
  }

  const float ones[1][2] = {{1, 1}}, scales[1][2] = {{scale, scale}};
  const int first = j + 16 * warp;
  dK = at(dK, row, d_batch, first_key + first, d_token, head, d_head);
  dV = at(dV, row, d_batch, first_key + first, d_token, head, d_head);
  store_rows<1>(tile_k + 16 * warp * PITCH, dK, d_token, keys - first, acc_k, scales);  // staged over K's and V's rows, which only this warp has read
  store_rows<1>(tile_v + 16 * warp * PITCH, dV, d_token, keys - first, acc_v, ones);
}

// As flash_bwd_keys  ->  dQ: (B, T, H, Dh).  Grid: (tiles of OWN queries, H, B).
extern "C" __global__ void __launch_bounds__(THREADS)
flash_bwd_queries(const half_t* dO, const half_t* Q, const half_t* K, const half_t* V, const float* L, const float* D, half_t* dQ, const int* ranges,
                  int T, int S, float scale, long long do_batch, int do_token, int do_head, long long q_batch, int q_token, int q_head,
                  long long k_batch, int k_token, int k_head, long long v_batch, int v_token, int v_head, long long d_batch, int d_token,
                  int d_head) {
  extern __shared__ __align__(16) half_t shared[];
  half_t *tile_q = shared, *tile_do = tile_q + OWN * PITCH, *tile_k = tile_do + OWN * PITCH, *tile_v = tile_k + 2 * OTHER * PITCH;

  const int row = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i = (gridDim.x - 1 - blockIdx.x) * OWN;  // the last queries see the most keys: they start first
  const auto [first_query, queries, first_key, keys, past] = range_of(ranges, row, T, S);
  if (i >= queries) return;
  const int first = i + 16 * warp, seen = min(past + min(i + OWN, queries), keys);
  Q = at(Q, row, q_batch, first_query + i, q_token, head, q_head);
  dO = at(dO, row, do_batch, first_query + i, do_token, head, do_head);
  K = at(K, row, k_batch, first_key, k_token, head, k_head);
  V = at(V, row, v_batch, first_key, v_token, head, v_head);
  L += ((long long)row * gridDim.y + head) * T + first_query;
  D += ((long long)row * gridDim.y + head) * T + first_query;
  float acc[1][Dh / 8][4] = {}, lse[2], sum[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int t = min(first + lane / 4 + 8 * r, queries - 1);
    lse[r] = L[t] * LOG2E, sum[r] = D[t];
  }

  if (seen > 0) {
    load_tile<OWN>(tile_q, Q, q_token, queries - i);
    load_tile<OWN>(tile_do, dO, do_token, queries - i);
    load_tile<OTHER>(tile_k, K, k_token, keys);
    load_tile<OTHER>(tile_v, V, v_token, keys);
    cp_async_commit();
  }
  for (int j = 0; j < seen; j += OTHER) {
    const int here = j / OTHER % 2 * OTHER * PITCH, next = OTHER * PITCH - here;
    cp_async_wait<0>();
    __syncthreads();  // as above
    if (j + OTHER < seen) {
      load_tile<OTHER>(tile_k + next, K += OTHER * k_token, k_token, keys - j - OTHER);
      load_tile<OTHER>(tile_v + next, V += OTHER * v_token, v_token, keys - j - OTHER);
      cp_async_commit();
    }
    float P[1][OTHER / 8][4] = {}, dP[1][OTHER / 8][4] = {};
    multiply<1, OTHER>(P, tile_q + 16 * warp * PITCH, tile_k + here);
    multiply<1, OTHER>(dP, tile_do + 16 * warp * PITCH, tile_v + here);
    weigh(P, dP, lse, sum, scale * LOG2E, past + first + lane / 4, j + lane % 4 * 2, keys);
    accumulate<1, OTHER>(acc, dP, tile_k + here);
  }

  const float scales[1][2] = {{scale, scale}};
  dQ = at(dQ, row, d_batch, first_query + first, d_token, head, d_head);
  store_rows<1>(tile_q + 16 * warp * PITCH, dQ, d_token, queries - first, acc, scales);
}
