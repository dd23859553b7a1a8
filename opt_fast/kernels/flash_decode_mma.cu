// Attention of up to 16 queries over many keys, for decoding, on tensor cores (sm_80 and later), with the symbols of opt_np/flash.py.
//
// There are too few queries to fill a GPU, and every key is read once, so memory has to be kept busy. The keys of a head are split over blocks, and
// those of a block over its four warps, each of which loops over its own, 16 at a time, with the next tiles prefetched, and waits for no other warp.
// The partial results of warps and of blocks are combined at the end, weighted by exp(L), always in the same order.
#include "decode.cuh"

constexpr int STAGES = 3;  // tiles of K and V that a warp has room for

// Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh)  ->  with one split O: (B, T, H, Dh), L: (B, H, T);
// with more O_part: (splits, B, T, H, Dh), L_part: (splits, B, H, T), for flash_combine.  Grid: (splits of `share` keys, H, B).
extern "C" __global__ void __launch_bounds__(THREADS)
flash_decode(const half_t* Q, const half_t* K, const half_t* V, half_t* O, float* L, float* O_part, float* L_part, const int* ranges, int T, int S,
             int share, float scale, long long q_batch, int q_token, int q_head, long long k_batch, int k_token, int k_head, long long v_batch,
             int v_token, int v_head, long long o_batch, int o_token, int o_head) {
  extern __shared__ __align__(16) half_t shared[];
  const int row = blockIdx.z, head = blockIdx.y, H = gridDim.y, warp = threadIdx.x / 32;
  const auto [first_query, queries, first_key, keys, past] = range_of(ranges, row, T, S);
  const int begin = blockIdx.x * share, end = min(min(begin + share, keys), past + queries);  // the keys of this block's split
  half_t *tile_q = shared, *places = tile_q + ROWS * PITCH;
  Q = at(Q, row, q_batch, first_query, q_token, head, q_head);
  K = at(K, row, k_batch, first_key, k_token, head, k_head);
  V = at(V, row, v_batch, first_key, v_token, head, v_head);

  load_tile<ROWS>(tile_q, Q, q_token, queries);
  cp_async_commit();
  walk<STAGES>(tile_q, places + warp * STAGES * PLACE, begin + warp * Bc, end, past, scale, [&](half_t* place, int j, int real) {
    load_keys(place, K + j * (long long)k_token, k_token, real);
    load_keys(place + Bc * PITCH, V + j * (long long)v_token, v_token, real);
  });
  __syncthreads();
  for (int x = threadIdx.x; x < queries * Dh; x += THREADS) {
    const int t = x / Dh, d = x % Dh;
    const auto [value, lse] = weigh(places, STAGES * PLACE, t, d, scale);
    const long long place = ((long long)row * H + head) * T + first_query + t;
    if (gridDim.x == 1) {
      *(at(O, row, o_batch, first_query + t, o_token, head, o_head) + d) = (half_t)pack2(value, 0.f);
      if (d == 0) L[place] = lse;
    } else {
      const long long part = (long long)blockIdx.x * gridDim.z;
      O_part[(((part + row) * T + first_query + t) * H + head) * Dh + d] = value;
      if (d == 0) L_part[part * H * T + place] = lse;
    }
  }
}

// O = Σ exp(L_part - L) O_part over the splits, with L = log Σ exp(L_part).  Grid: (T, H, B), a thread for each element, rounded up to whole warps.
extern "C" __global__ void __launch_bounds__((Dh + 31) / 32 * 32)
flash_combine(const float* O_part, const float* L_part, half_t* O, float* L, int splits, long long o_batch, int o_token, int o_head) {
  const int t = blockIdx.x, head = blockIdx.y, row = blockIdx.z, T = gridDim.x, H = gridDim.y, d = threadIdx.x;
  const long long B = gridDim.z, place = ((long long)row * H + head) * T + t;
  if (d >= Dh) return;
  const auto [value, lse] = combine(
      splits, [&](int n) { return L_part[n * B * H * T + place]; }, [&](int n) { return O_part[(((n * B + row) * T + t) * H + head) * Dh + d]; });
  *(at(O, row, o_batch, t, o_token, head, o_head) + d) = (half_t)pack2(value, 0.f);
  if (d == 0) L[place] = lse;
}
