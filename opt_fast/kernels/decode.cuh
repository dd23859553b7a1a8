// Shared by the decoding kernels: a warp's walk over its own tiles of 16 keys, and the combination of the partial results of warps, or of splits,
// weighted by exp(L) and always in the same order. The 16 rows of a product are the queries; missing ones cost only tensor-core time.
#pragma once
#include "tiles.cuh"

constexpr int ROWS = 16, Bc = 16;      // queries of a product; keys of a warp's tile
constexpr int PLACE = 2 * Bc * PITCH;  // elements of a stage (called a place): a tile of K and one of V

struct Found {  // a warp's partial result: acc and l under its own maximum m
  float acc[ROWS][Dh], m[ROWS], l[ROWS];
};
static_assert(sizeof(Found) <= 2 * 2 * PLACE, "it is left where two of the warp's tiles were");

struct Weighed {
  float value, lse;
};

// Starts copying a warp's tile of K or of V to shared memory; rows from `real` on become zeros.
__device__ __forceinline__ void load_keys(half_t* tile, const half_t* rows, int stride, int real) {
#pragma unroll
  for (int c = threadIdx.x % 32; c < Bc * (Dh / 8); c += 32) {
    const int row = c / (Dh / 8), column = c % (Dh / 8) * 8;
    cp_async_16(shared_address(tile + row * PITCH + column), rows + (row < real ? row * stride : 0) + column, row < real);
  }
}

// Attention of a warp over every WARPS-th tile of keys from `first` to `end`, through its own STAGES `places`, with STAGES - 1 tiles prefetched. The
// queries must be under way to tile_q; query t is at key past + t. `where(place, j, real)` starts the copies of K's and V's rows from key j on. The
// partial result (Found) overwrites the tiles; a barrier must follow before other warps read it.
template <int STAGES, class Where>
__device__ __forceinline__ void walk(const half_t* tile_q, half_t* places, int first, int end, int past, float scale, Where where) {
  const int lane = threadIdx.x % 32;
  float acc[1][Dh / 8][4] = {}, m[1][2] = {{-INFINITY, -INFINITY}}, l[1][2] = {};
  auto place_of = [&](int j) { return places + (j - first) / (WARPS * Bc) % STAGES * PLACE; };
  auto load = [&](int j) {
    if (j < end) where(place_of(j), j, end - j);
    cp_async_commit();  // past the end an empty group, because waits count groups
  };
#pragma unroll
  for (int n = 0; n < STAGES - 1; n++) load(first + n * WARPS * Bc);
  cp_async_wait<STAGES - 1>();
  __syncthreads();  // the queries have arrived

  for (int j = first; j < end; j += WARPS * Bc) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // this tile has arrived, and every lane is done with the one before, whose place is now refilled
    load(j + (STAGES - 1) * WARPS * Bc);
    float scores[1][Bc / 8][4] = {};
    multiply<1, Bc>(scores, tile_q, place_of(j));
    if (j + Bc - 1 > min(past, end - 1)) {  // the tile crosses the diagonal, or the end of these keys
#pragma unroll
      for (int n = 0; n < Bc / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (j + 8 * n + lane % 4 * 2 + c % 2 > min(past + lane / 4 + c / 2 * 8, end - 1)) scores[0][n][c] = -INFINITY;
    }
    online_softmax<1, Bc>(scores, acc, m, l, scale * LOG2E);
    accumulate<1, Bc>(acc, scores, place_of(j) + Bc * PITCH);
  }
  cp_async_wait<0>();
  __syncwarp();

  Found& own = *(Found*)places;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int t = lane / 4 + 8 * r;
    const float sum = row_sum(l[0][r]);
    if (lane % 4 == 0) own.m[t] = m[0][r], own.l[t] = sum;
#pragma unroll
    for (int d = 0; d < Dh / 8; d++) own.acc[t][8 * d + lane % 4 * 2] = acc[0][d][2 * r], own.acc[t][8 * d + lane % 4 * 2 + 1] = acc[0][d][2 * r + 1];
  }
}

// Element d of query t's output, and L, from the partial results that the block's warps have left in `places`, `stride` elements apart.
__device__ __forceinline__ Weighed weigh(const half_t* places, int stride, int t, int d, float scale) {
  auto found = [&](int w) -> const Found& { return *(const Found*)(places + w * stride); };
  float top = -INFINITY, total = 0, value = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) top = fmaxf(top, found(w).m[t]);
  const float safe = top == -INFINITY ? 0.f : top;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float weight = exp2_approx((found(w).m[t] - safe) * scale * LOG2E);
    total += found(w).l[t] * weight, value += found(w).acc[t][d] * weight;
  }
  if (total > 0) return {value / total, top * scale + logf(total)};
  return {0.f, -INFINITY};  // a query that sees no key gets 0
}

// Σ exp(lse(n) - L) value(n) over the splits, with L = log Σ exp(lse(n)).
template <class Lse, class Value> __device__ __forceinline__ Weighed combine(int splits, Lse lse, Value value_of) {
  float top = -INFINITY, total = 0, value = 0;
  for (int n = 0; n < splits; n++) top = fmaxf(top, lse(n));
  const float safe = top == -INFINITY ? 0.f : top;
  for (int n = 0; n < splits; n++) {
    const float weight = exp2_approx((lse(n) - safe) * LOG2E);
    total += weight, value += weight * value_of(n);
  }
  if (total > 0) return {value / total, top + logf(total)};
  return {0.f, -INFINITY};
}
