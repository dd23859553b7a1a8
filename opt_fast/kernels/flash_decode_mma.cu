// Attention of up to 16 queries over many keys, for decoding, on tensor cores (sm_80 and later), with the symbols of opt_np/flash.py.
//
// There are too few queries to fill a GPU, and every key is read once: it is the memory that has to be kept busy. The keys of a head are split over
// blocks, and those of a block over its four warps, each of which walks over its own, 16 at a time, with the next tiles on their way, and waits for
// nobody. The 16 rows of a product are the queries; those that are not there cost nothing but tensor cores' time. What warps and blocks have found
// they weigh by exp(L) in the end, always in the same order.
#include "tiles.cuh"

constexpr int ROWS = 16, Bc = 16, STAGES = 3;  // queries of a product; keys of a warp's tile; places for tiles

struct Found {  // what a warp has found
  float acc[ROWS][Dh], m[ROWS], l[ROWS];
};
static_assert(sizeof(Found) <= 2 * STAGES * 2 * Bc * PITCH, "it is left where the warp's tiles were");

// A warp's tile of keys, or of values, on its way; rows past `real` become zeros.
__device__ __forceinline__ void load_keys(half_t* tile, const half_t* rows, int stride, int real) {
#pragma unroll
  for (int c = threadIdx.x % 32; c < Bc * (Dh / 8); c += 32) {
    const int row = c / (Dh / 8), column = c % (Dh / 8) * 8;
    cp_async_16(shared_address(tile + row * PITCH + column), rows + (row < real ? row * stride : 0) + column, row < real);
  }
}

// Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh)  ->  with one split O: (B, T, H, Dh), L: (B, H, T);
// with more O_part: (splits, B, T, H, Dh), L_part: (splits, B, H, T), for flash_combine.  Grid: (splits of `share` keys, H, B).
extern "C" __global__ void __launch_bounds__(THREADS)
flash_decode(const half_t* Q, const half_t* K, const half_t* V, half_t* O, float* L, float* O_part, float* L_part, const int* ranges, int T, int S,
             int share, float scale, long long q_batch, int q_token, int q_head, long long k_batch, int k_token, int k_head, long long v_batch,
             int v_token, int v_head, long long o_batch, int o_token, int o_head) {
  extern __shared__ __align__(16) half_t shared[];
  const int row = blockIdx.z, head = blockIdx.y, H = gridDim.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto [first_query, queries, first_key, keys, past] = range_of(ranges, row, T, S);
  const int begin = blockIdx.x * share, end = min(min(begin + share, keys), past + queries);  // of the keys that this block looks at
  half_t *tile_q = shared, *places = tile_q + ROWS * PITCH;
  half_t* mine = places + warp * STAGES * 2 * Bc * PITCH;  // tiles of K and of V, one after the other
  Q = at(Q, row, q_batch, first_query, q_token, head, q_head);
  K = at(K, row, k_batch, first_key, k_token, head, k_head);
  V = at(V, row, v_batch, first_key, v_token, head, v_head);
  float acc[1][Dh / 8][4] = {}, m[1][2] = {{-INFINITY, -INFINITY}}, l[1][2] = {};

  auto load = [&](int j) {
    half_t* place = mine + (j - begin) / (WARPS * Bc) % STAGES * 2 * Bc * PITCH;
    if (j < end) {
      load_keys(place, K + j * (long long)k_token, k_token, end - j);
      load_keys(place + Bc * PITCH, V + j * (long long)v_token, v_token, end - j);
    }
    cp_async_commit();  // of nothing, past the end: groups are counted
  };
  load_tile<ROWS>(tile_q, Q, q_token, queries);
  cp_async_commit();
  const int first = begin + warp * Bc;
#pragma unroll
  for (int n = 0; n < STAGES - 1; n++) load(first + n * WARPS * Bc);
  cp_async_wait<STAGES - 1>();
  __syncthreads();  // the queries are here

  for (int j = first; j < end; j += WARPS * Bc) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // this tile is here, and every lane is done with the one before, whose place is filled again
    load(j + (STAGES - 1) * WARPS * Bc);
    const half_t* place = mine + (j - begin) / (WARPS * Bc) % STAGES * 2 * Bc * PITCH;
    float scores[1][Bc / 8][4] = {};
    multiply<1, Bc>(scores, tile_q, place);
    if (j + Bc - 1 > min(past, end - 1)) {  // the tile meets the diagonal, or the end of this block's keys
#pragma unroll
      for (int n = 0; n < Bc / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (j + 8 * n + lane % 4 * 2 + c % 2 > min(past + lane / 4 + c / 2 * 8, end - 1)) scores[0][n][c] = -INFINITY;
    }
    online_softmax<1, Bc>(scores, acc, m, l, scale * LOG2E);
    accumulate<1, Bc>(acc, scores, place + Bc * PITCH);
  }
  cp_async_wait<0>();
  __syncwarp();

  auto found = [&](int w) -> Found& { return *(Found*)(places + w * STAGES * 2 * Bc * PITCH); };
  Found& own = found(warp);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int t = lane / 4 + 8 * r;
    const float sum = row_sum(l[0][r]);
    if (lane % 4 == 0) own.m[t] = m[0][r], own.l[t] = sum;
#pragma unroll
    for (int d = 0; d < Dh / 8; d++) own.acc[t][8 * d + lane % 4 * 2] = acc[0][d][2 * r], own.acc[t][8 * d + lane % 4 * 2 + 1] = acc[0][d][2 * r + 1];
  }
  __syncthreads();
  for (int x = threadIdx.x; x < queries * Dh; x += THREADS) {
    const int t = x / Dh, d = x % Dh;
    float top = -INFINITY, total = 0, value = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, found(w).m[t]);
    const float safe = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2_approx((found(w).m[t] - safe) * scale * LOG2E);
      total += found(w).l[t] * weight, value += found(w).acc[t][d] * weight;
    }
    value = total > 0 ? value / total : 0.f;  // a query that sees no key gets 0
    const float lse = total > 0 ? top * scale + logf(total) : -INFINITY;
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

// O = Σ exp(L_part - L) O_part over the splits, with L = log Σ exp(L_part).  Grid: (T, H, B), a thread for each number and whole warps.
extern "C" __global__ void __launch_bounds__((Dh + 31) / 32 * 32)
flash_combine(const float* O_part, const float* L_part, half_t* O, float* L, int splits, long long o_batch, int o_token, int o_head) {
  const int t = blockIdx.x, head = blockIdx.y, row = blockIdx.z, T = gridDim.x, H = gridDim.y, d = threadIdx.x;
  const long long B = gridDim.z, place = ((long long)row * H + head) * T + t;
  if (d >= Dh) return;
  float top = -INFINITY, total = 0, value = 0;
  for (int n = 0; n < splits; n++) top = fmaxf(top, L_part[n * B * H * T + place]);
  const float safe = top == -INFINITY ? 0.f : top;
  for (int n = 0; n < splits; n++) {
    const float weight = exp2_approx((L_part[n * B * H * T + place] - safe) * LOG2E);
    total += weight, value += weight * O_part[(((n * B + row) * T + t) * H + head) * Dh + d];
  }
  *(at(O, row, o_batch, t, o_token, head, o_head) + d) = (half_t)pack2(total > 0 ? value / total : 0.f, 0.f);
  if (d == 0) L[place] = total > 0 ? top + logf(total) : -INFINITY;
}
