// FlashAttention's backward pass for Hopper (sm_90a): `attention_bwd` of opt_np/flash.py with its symbols, in five products where flash_bwd_mma.cu
// takes seven.
//
// A block owns 128 keys, 64 for each of two warpgroups (consumers), and loops over the queries that see them; a warp of a third one (the producer)
// starts the copy engine's loads. Tiles are transposed, rows are keys: so P and dscores, in the registers they were computed in, are left factors of
// dV += Pᵀ dO and dK += dscoresᵀ Q. Only dscores are copied to shared memory too, because dQ = dscores K sums over the keys of both warpgroups. Each
// block adds its part of dQ in float32 to global memory, in the order in which blocks run, so dQ's last bits may differ from run to run. A second
// kernel rounds dQ.
// DH (head_dim) and BF16 are set when this is compiled.
#include "sm90.cuh"

constexpr int Dh = DH, Bc = 128, Br = Dh > 64 ? 64 : 128, CONSUMERS = 2, STAGES = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int SLABS = (Dh + 63) / 64;  // a head is split into slabs of 64 columns; the copy engine fills up a head of 80 with zeros
constexpr int SLAB_Q = Br * 64, SLAB_K = Bc * 64;  // elements of a slab
constexpr int DSCORES = Br / 64 * SLAB_K, PART = 64 * 64;  // elements of a tile of dscores; of dQ's tile, before the second group's part
constexpr int LAST = (Dh - 1) % 64 + 1;                    // columns of the last slab
constexpr bool EARLY = Br == 64;  // registers hold P twice, in float32 and as dV's left factor: then dV's product runs while dscores are computed
constexpr float LOG2E = 1.4426950408889634f;
static_assert(Dh >= 64 && Dh <= 128 && Dh % 16 == 0, "two groups share dQ's tile: 64 queries for each where it has 128, or else a slab of columns");

struct Shared {
  half_t K[SLABS * SLAB_K], V[SLABS * SLAB_K];                   // (SLABS, Bc, 64); V's memory later stages dV, then dK
  half_t Q[STAGES][SLABS * SLAB_Q], dO[STAGES][SLABS * SLAB_Q];  // (SLABS, Br, 64)
  half_t dscores[2][DSCORES];                                    // (Br / 64, Bc, 64): transposed, and without scale
  float L[STAGES][Br], D[STAGES][Br];                            // L times log2(e)
  mbarrier_t own_full, full[STAGES], empty[STAGES];
};

// Starts copying a tile of each of two tensors, slab by slab.
__device__ __forceinline__ void load(half_t* one, half_t* two, int slab, const TensorMap& map_one, const TensorMap& map_two, mbarrier_t* full,
                                     int token, int head, int row) {
  mbarrier_arrive_expect(full, 2 * 2 * SLABS * slab);
  for (int s = 0; s < SLABS; s++) tma_load_4d(one + s * slab, map_one, full, 64 * s, head, token, row);
  for (int s = 0; s < SLABS; s++) tma_load_4d(two + s * slab, map_two, full, 64 * s, head, token, row);
}

// The producer, a warp: starts the copies of all tiles; a stage is refilled once the consumers have released it. It copies L and D itself; for a
// query that sees no key, L becomes +inf, and so P = 0.
__device__ __forceinline__ void produce(Shared& shared, const TensorMap& map_do, const TensorMap& map_q, const TensorMap& map_k,
                                        const TensorMap& map_v, const float* L, const float* D, int row, int head, int first_query, int first_key,
                                        int begin, int queries) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) load(shared.K, shared.V, SLAB_K, map_k, map_v, &shared.own_full, first_key, head, row);
  for (int i = begin, tile = 0; i < queries; i += Br, tile++) {
    const int stage = tile % STAGES, before = tile / STAGES - 1;
    float lse[Br / 32], sum[Br / 32];
#pragma unroll
    for (int n = 0; n < Br / 32; n++) {
      const int t = i + 32 * n + lane;
      lse[n] = t < queries ? L[t] : 0.f, sum[n] = t < queries ? D[t] : 0.f;
    }
    if (before >= 0) mbarrier_wait(&shared.empty[stage], before % 2);
    if (lane == 0) load(shared.Q[stage], shared.dO[stage], SLAB_Q, map_q, map_do, &shared.full[stage], first_query + i, head, row);
#pragma unroll
    for (int n = 0; n < Br / 32; n++) {
      shared.L[stage][32 * n + lane] = lse[n] == -INFINITY ? INFINITY : lse[n] * LOG2E;
      shared.D[stage][32 * n + lane] = sum[n];
    }
    mbarrier_arrive(&shared.full[stage]);  // each lane, for the L and D that it wrote
  }
}

// Zeros the rows from `first` on of both tiles: they may hold NaN, and 0 · NaN is NaN.
template <int ROWS> __device__ __forceinline__ void clear_rows(half_t* one, half_t* two, int first, int group) {
  for (int i = threadIdx.x % 128; i < (ROWS - first) * SLABS * 8; i += 128) {
    const int piece = i % SLABS * ROWS * 64 + (first + i / SLABS / 8) * 64 + i / SLABS % 8 * 8;
    *(uint4*)(one + piece) = *(uint4*)(two + piece) = make_uint4(0, 0, 0, 0);
  }
  async_proxy_fence();
  named_barrier_sync(2 + group, 128);  // the groups do not wait for each other: each zeros the rows itself
}

// Issues scores (64 x Br) = A (64 x Dh) Bᵀ, of the group's 64 rows with a tile of queries; the caller waits for it.
__device__ __forceinline__ void multiply(float (&scores)[Br / 2], const half_t* A, const half_t* B) {
#pragma unroll
  for (int d = 0; d < Dh; d += 16)
    wgmma_ss<Br>(scores, descriptor(A + d / 64 * SLAB_K + d % 64, 16, 1024), descriptor(B + d / 64 * SLAB_Q + d % 64, 16, 1024), d > 0);
  wgmma_commit();
}

// Issues acc (64 x Dh) += P (64 x Br) B; the caller waits for it.
__device__ __forceinline__ void accumulate(float (&acc)[Dh / 2], const unsigned (&P)[Br / 16][4], const half_t* B) {
#pragma unroll
  for (int n = 0; n < Br / 16; n++) wgmma_rs<Dh>(acc, P[n], descriptor(B + 16 * n * 64, 2 * SLAB_Q, 1024), true);
  wgmma_commit();
}

// Sets scores to -inf where the query is before the key. `first`: for each of this lane's two keys, the first query of this tile that sees it.
__device__ __forceinline__ void mask(float (&scores)[Br / 2], const int (&first)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < Br / 2; i++)
    if (column + i / 4 * 8 + i % 2 < first[i / 2 % 2]) scores[i] = -INFINITY;
}

// Turns scores into P, recomputed from L. `L` starts at this lane's first query.
__device__ __forceinline__ void weigh(float (&scores)[Br / 2], const float* L, float log2_scale) {
#pragma unroll
  for (int n = 0; n < Br / 8; n++) {
    const float2 l = *(const float2*)(L + 8 * n);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      scores[4 * n + 2 * r] = exp2_approx(scores[4 * n + 2 * r] * log2_scale - l.x);
      scores[4 * n + 2 * r + 1] = exp2_approx(scores[4 * n + 2 * r + 1] * log2_scale - l.y);
    }
  }
}

// Turns dP into dscores / scale = P (dP - D). `D` starts at this lane's first query.
__device__ __forceinline__ void differentiate(float (&dP)[Br / 2], const float (&P)[Br / 2], const float* D) {
#pragma unroll
  for (int n = 0; n < Br / 8; n++) {
    const float2 sum = *(const float2*)(D + 8 * n);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      dP[4 * n + 2 * r] = P[4 * n + 2 * r] * (dP[4 * n + 2 * r] - sum.x);
      dP[4 * n + 2 * r + 1] = P[4 * n + 2 * r + 1] * (dP[4 * n + 2 * r + 1] - sum.y);
    }
  }
}

// P, or dscores, in 16 bits, as the next product takes it from registers: the layout of scores is also that of a left factor.
__device__ __forceinline__ void pack(unsigned (&P)[Br / 16][4], const float (&scores)[Br / 2]) {
#pragma unroll
  for (int n = 0; n < Br / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) P[n][i] = pack2(scores[8 * n + 2 * i], scores[8 * n + 2 * i + 1]);
}

// Writes the packed values to shared memory, swizzled; `key` is this lane's first row.
__device__ __forceinline__ void share(half_t* tile, const unsigned (&P)[Br / 16][4], int key) {
#pragma unroll
  for (int n = 0; n < Br / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int piece = 2 * n + i / 2;  // of 8 queries
      *(unsigned*)(tile + piece / 8 * SLAB_K + (key + i % 2 * 8) * 64 + (piece % 8 ^ key % 8) * 8 + threadIdx.x % 4 * 2) = P[n][i];
    }
}

// Adds this group's part of a tile's dQ / scale (64 x COLUMNS) = dscores K to `sums`, where each lane's four values follow those of the lane before,
// while acc (64 x Dh) += dscoresᵀ Q still runs.
template <int COLUMNS>
__device__ __forceinline__ void last_products(float (&acc)[Dh / 2], const unsigned (&left)[Br / 16][4], const half_t* Q, const half_t* dscores,
                                              const half_t* K, float* sums) {
  float dQ[COLUMNS / 2];
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < Bc / 16; n++)
    wgmma_tt<COLUMNS>(dQ, descriptor(dscores + 16 * n * 64, 16, 1024), descriptor(K + 16 * n * 64, 16, 1024), n > 0);
  wgmma_commit();
  accumulate(acc, left, Q);
  wgmma_wait<1>();  // dQ is complete; dK still runs
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++)
    reduce_add_v4(sums + n * 512 + threadIdx.x % 128 * 4, dQ[4 * n], dQ[4 * n + 1], dQ[4 * n + 2], dQ[4 * n + 3]);
  wgmma_wait<0>();
}

// Writes a warp's 16 rows to global memory, staged in shared memory, swizzled, so that each store has 16 bytes. `first` is their first row in `tile`,
// of which no other warp uses these rows; `rows` is where the first of them goes, and `real` of them exist.
__device__ __forceinline__ void store_rows(half_t* tile, int first, half_t* rows, int stride, int real, const float (&acc)[Dh / 2], float factor) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the rows staged before have been read
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int d = 0; d < Dh / 8; d++) {
      const int t = first + lane / 4 + 8 * r;
      *(unsigned*)(tile + d / 8 * SLAB_K + t * 64 + (d % 8 ^ t % 8) * 8 + lane % 4 * 2) =
          pack2(acc[4 * d + 2 * r] * factor, acc[4 * d + 2 * r + 1] * factor);
    }
  __syncwarp();
  for (int c = lane; c < 16 * (Dh / 8); c += 32) {
    const int t = c / (Dh / 8), d = c % (Dh / 8);
    if (t < real) *(uint4*)(rows + t * stride + 8 * d) = *(const uint4*)(tile + d / 8 * SLAB_K + (first + t) * 64 + (d % 8 ^ (first + t) % 8) * 8);
  }
}

// A consumer: computes 64 of the block's keys, `keys` of which exist in the block. Key c of the block is seen from query c - reach on. `sums` is
// where its part of dQ is summed, for the tile at `begin`.
__device__ __forceinline__ void consume(Shared& shared, int group, float* sums, half_t* dK, half_t* dV, int d_token, int keys, int reach, int begin,
                                        int queries, float scale) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, key = 64 * group + 16 * warp + lane / 4;
  const float log2_scale = scale * LOG2E;
  const half_t *K = shared.K + group * 64 * 64, *V = shared.V + group * 64 * 64;  // the group's own rows
  const half_t *K_part = shared.K + (Br == 64 ? group * SLAB_K : 0), *dscores_part = shared.dscores[0] + (Br == 64 ? 0 : group * SLAB_K);  // for dQ
  float acc_k[Dh / 2] = {}, acc_v[Dh / 2] = {};

  if (begin < queries) {
    mbarrier_wait(&shared.own_full, 0);
    if (keys < Bc) clear_rows<Bc>(shared.K, shared.V, keys, group);
  }
  for (int i = begin, tile = 0; i < queries; i += Br, tile++, sums += Br * Dh) {
    const int stage = tile % STAGES;
    half_t *Q = shared.Q[stage], *dO = shared.dO[stage];
    float P[Br / 2], dP[Br / 2];
    unsigned left[Br / 16][4], right[Br / 16][4];

    mbarrier_wait(&shared.full[stage], tile / STAGES % 2);
    if (i + Br > queries) clear_rows<Br>(Q, dO, queries - i, group);
    wgmma_fence();
    multiply(P, K, Q);
    multiply(dP, V, dO);
    wgmma_wait<1>();  // scores are complete; dP still runs
    if (i < 64 * group + 63 - reach || keys < Bc) {
      const int first[2] = {key < keys ? key - reach - i : Br, key + 8 < keys ? key + 8 - reach - i : Br};
      mask(P, first);
    }
    weigh(P, shared.L[stage] + lane % 4 * 2, log2_scale);
    if (EARLY) {
      pack(left, P);
      wgmma_fence();
      accumulate(acc_v, left, dO);
      wgmma_wait<1>();  // dP is complete; dV still runs
      differentiate(dP, P, shared.D[stage] + lane % 4 * 2);
      pack(right, dP);
    } else {
      before_waiting(P[0]);
      wgmma_wait<0>();
      differentiate(dP, P, shared.D[stage] + lane % 4 * 2);
      pack(left, P), pack(right, dP);
      wgmma_fence();
      accumulate(acc_v, left, dO);
    }
    share(shared.dscores[tile % 2], right, key);
    async_proxy_fence();
    named_barrier_sync(1, 256);  // both groups' dscores are written; this buffer's readers, two tiles ago, finished before the last such barrier

    if (LAST < 64 && group == 1) last_products<LAST>(acc_k, right, Q, dscores_part + tile % 2 * DSCORES, K_part, sums);
    else last_products<64>(acc_k, right, Q, dscores_part + tile % 2 * DSCORES, K_part, sums);
    if (lane == 0) mbarrier_arrive(&shared.empty[stage]);
  }

  const int first = 64 * group + 16 * warp;  // V's rows of this warp, which no other warp's products have read
  store_rows(shared.V, first, dV + first * d_token, d_token, keys - first, acc_v, 1.f);
  store_rows(shared.V, first, dK + first * d_token, d_token, keys - first, acc_k, scale);
}

// dO: (B, T, H, Dh);  Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh);  L: (B, H, T);  D: (B, H, T)  ->  dK: (B, S, H, Dh), dV: (B, S, H, Dh)
// dQ / scale is added to `sums`: (B, H, tiles of Br queries, Br · Dh), the elements of a tile in the order of wgmma's registers.
// Grid: (tiles of Bc keys, H, B). `ranges` as in tiles.cuh. The maps' boxes are (1, Br or Bc, 1, 64), swizzled by 128 bytes. dK and dV have the same
// strides.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_bwd_sm90(const __grid_constant__ TensorMap map_do, const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
               const __grid_constant__ TensorMap map_v, const float* L, const float* D, float* sums, half_t* dK, half_t* dV, const int* ranges, int T,
               int S, float scale, long long d_batch, int d_token, int d_head) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *(Shared*)memory;
  const int row = blockIdx.z, head = blockIdx.y, group = threadIdx.x / 128, j = blockIdx.x * Bc;  // the first keys, seen by most queries, start first
  const int* range = ranges + 5 * row;
  const int first_query = ranges ? range[0] : 0, queries = ranges ? range[1] : T;
  const int first_key = (ranges ? range[2] : 0) + j, keys = (ranges ? range[3] : S) - j, past = ranges ? range[4] : S - T;
  if (keys <= 0) return;
  const int begin = max(j - past, 0) / Br * Br;  // the first tile of queries that reaches these keys
  const long long plane = (long long)row * gridDim.y + head;

  if (threadIdx.x == 0) {
    mbarrier_init(&shared.own_full, 1);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&shared.full[s], 1 + 32);          // one that announces the copies' bytes, and each lane of the producer for L and D
      mbarrier_init(&shared.empty[s], 4 * CONSUMERS);  // a lane of each warp arrives
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (group == CONSUMERS) {
    registers_fewer<EARLY ? 24 : 40>();
    L += plane * T + first_query, D += plane * T + first_query;
    if (threadIdx.x < 128 * CONSUMERS + 32 && begin < queries)
      produce(shared, map_do, map_q, map_k, map_v, L, D, row, head, first_query, first_key, begin, queries);
  } else {
    registers_more<EARLY ? 240 : 232>();
    sums += (plane * ((T + Br - 1) / Br) + begin / Br) * (Br * Dh) + group * PART;
    const long long first = row * d_batch + first_key * (long long)d_token + head * (long long)d_head;
    consume(shared, group, sums, dK + first, dV + first, d_token, keys, past - j, begin, queries, scale);
  }
}

// sums: (B, H, tiles of Br queries, Br · Dh), as flash_bwd_sm90 leaves them  ->  dQ: (B, T, H, Dh).  Grid: (tiles, H, B).
// Eight columns of two rows are stored as four groups of four: element 2 r + c of group t is at row 8 r, column 2 t + c.
extern "C" __global__ void __launch_bounds__(128)
flash_bwd_sm90_queries(const float* sums, half_t* dQ, const int* ranges, int T, float scale, long long d_batch, int d_token, int d_head) {
  const int row = blockIdx.z, head = blockIdx.y, i = blockIdx.x * Br;
  const int* range = ranges + 5 * row;
  const int first_query = ranges ? range[0] : 0, queries = (ranges ? range[1] : T) - i;
  sums += (((long long)row * gridDim.y + head) * gridDim.x + blockIdx.x) * (Br * Dh);
  dQ += row * d_batch + (first_query + i) * (long long)d_token + head * (long long)d_head;
  for (int c = threadIdx.x; c < Br / 2 * (Dh / 8); c += 128) {
    const int pair = c / (Dh / 8), d = c % (Dh / 8);  // two rows; eight columns
    const int t = pair / 32 * 64 + pair % 32 / 8 * 16 + pair % 8;
    const float4* four = (const float4*)(sums + pair / 32 * PART + d * 512 + pair % 32 * 16);
    const float4 x[4] = {four[0], four[1], four[2], four[3]};
    unsigned low[4], high[4];
#pragma unroll
    for (int n = 0; n < 4; n++) low[n] = pack2(x[n].x * scale, x[n].y * scale), high[n] = pack2(x[n].z * scale, x[n].w * scale);
    if (t < queries) *(uint4*)(dQ + t * d_token + 8 * d) = make_uint4(low[0], low[1], low[2], low[3]);
    if (t + 8 < queries) *(uint4*)(dQ + (t + 8) * d_token + 8 * d) = make_uint4(high[0], high[1], high[2], high[3]);
  }
}
