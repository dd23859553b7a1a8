// FlashAttention's forward pass for Hopper (sm_90a): `attention` of opt_np/flash.py with its symbols; flash_fwd_mma.cu plus three ideas.
//
// 1. The copy engine (TMA) loads tiles of K and V; one thread of a warpgroup that does nothing else (the producer) starts the copies, as far ahead as
// there are stages. 2. Each other warpgroup (a consumer) owns 64 queries and computes products by wgmma, which runs asynchronously and reads shared
// memory itself: Q Kᵀ of one tile and P V of the tile before run at the same time, and the softmax starts while P V still runs. 3. The consumers take
// turns in issuing products, so that the softmax of one overlaps with the products of another.
// DH (head_dim) and BF16 are set when this is compiled, as is POLYNOMIAL = n: of each lane's pairs of exponentials, every n-th is computed by
// multiply-adds, because at heads of 64 the exponential unit is the limit; 0 for none. That takes registers which three consumers do not leave.
#include "sm90.cuh"

#ifndef POLYNOMIAL
#define POLYNOMIAL 0
#endif
constexpr int Dh = DH, Bc = 128, CONSUMERS = Dh > 64 || POLYNOMIAL ? 2 : 3, STAGES = Dh > 64 ? 2 : 4, Br = 64 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
constexpr int SLABS = (Dh + 63) / 64;            // a head is split into slabs of 64 columns; the copy engine fills up a head of 80 with zeros
constexpr int SLAB_Q = Br * 64, SLAB = Bc * 64;  // elements of a slab
static_assert(Dh % 16 == 0 && Dh <= 128, "heads are made of pieces of 16 numbers, and O has to fit into registers");

struct Shared {
  half_t Q[SLABS * SLAB_Q];  // (SLABS, Br, 64), later O
  half_t K[STAGES][SLABS * SLAB], V[STAGES][SLABS * SLAB];
  mbarrier_t q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// Starts copying a tile, slab by slab; `full` completes when all its bytes have arrived.
__device__ __forceinline__ void load(half_t* tile, int slab, const TensorMap& map, mbarrier_t* full, int token, int head, int row) {
  mbarrier_arrive_expect(full, 2 * SLABS * slab);
  for (int s = 0; s < SLABS; s++) tma_load_4d(tile + s * slab, map, full, 64 * s, head, token, row);
}

// The producer: starts the copies of all tiles; a stage is refilled once all consumers have released it.
__device__ __forceinline__ void produce(Shared& shared, const TensorMap& map_q, const TensorMap& map_k, const TensorMap& map_v, int row, int head,
                                        int first_query, int first_key, int seen) {
  load(shared.Q, SLAB_Q, map_q, &shared.q_full, first_query, head, row);
  for (int j = 0, tile = 0; j < seen; j += Bc, tile++) {
    const int stage = tile % STAGES, before = tile / STAGES - 1;
    if (before >= 0) mbarrier_wait(&shared.k_empty[stage], before % 2);
    load(shared.K[stage], SLAB, map_k, &shared.k_full[stage], first_key + j, head, row);
    if (before >= 0) mbarrier_wait(&shared.v_empty[stage], before % 2);
    load(shared.V[stage], SLAB, map_v, &shared.v_full[stage], first_key + j, head, row);
  }
}

// Issues scores (64 x Bc) = Q (64 x Dh) Kᵀ; the caller waits for it.
__device__ __forceinline__ void query_key(float (&scores)[Bc / 2], const half_t* Q, const half_t* K) {
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < Dh; d += 16)
    wgmma_ss<Bc>(scores, descriptor(Q + d / 64 * SLAB_Q + d % 64, 16, 1024), descriptor(K + d / 64 * SLAB + d % 64, 16, 1024), d > 0);
  wgmma_commit();
}

// Issues acc (64 x Dh) += P (64 x Bc) V; the caller waits for it.
__device__ __forceinline__ void probs_value(float (&acc)[Dh / 2], const unsigned (&P)[Bc / 16][4], const half_t* V) {
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < Bc / 16; n++) wgmma_rs<Dh>(acc, P[n], descriptor(V + 16 * n * 64, 2 * SLAB, 1024), true);
  wgmma_commit();
}

// 2^x by multiply-adds: a polynomial of x's fraction; its integer part is added to the exponent. Error 7.5e-5, less than P's later rounding.
__device__ __forceinline__ float exp2_polynomial(float x) {
  const float shifted = x + 12582912.f;  // 1.5 · 2^23: the last bits now hold the nearest integer
  const float f = x - (shifted - 12582912.f);
  const float p = ((0.0551716685f * f + 0.242611125f) * f + 0.693260968f) * f + 0.999928057f;
  return x < -126.f ? 0.f : __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// Turns scores into P under the new maximum; `shrink` is the factor for the sums made under the old one.
__device__ __forceinline__ void online_softmax(float (&scores)[Bc / 2], float (&m)[2], float (&l)[2], float (&shrink)[2], float log2_scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {  // this lane's two rows
    float m_new = m[r];
#pragma unroll
    for (int n = 0; n < Bc / 8; n++) m_new = fmaxf(m_new, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
    m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 1));  // four lanes hold a row
    m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 2));
    const float safe = m_new == -INFINITY ? 0.f : m_new * log2_scale;  // no key seen yet: -inf - 0, where -inf - -inf would be NaN
    shrink[r] = exp2_approx(m[r] * log2_scale - safe);
    float sum = l[r] * shrink[r];
#pragma unroll
    for (int n = 0; n < Bc / 8; n++)
#pragma unroll
      for (int c = 4 * n + 2 * r; c < 4 * n + 2 * r + 2; c++) {
        const float x = scores[c] * log2_scale - safe;
        sum += scores[c] = POLYNOMIAL && n % max(POLYNOMIAL, 1) == 0 ? exp2_polynomial(x) : exp2_approx(x);
      }
    m[r] = m_new, l[r] = sum;
  }
}

// P in 16 bits, as P V takes it from registers: the layout of scores is also that of a left factor.
__device__ __forceinline__ void pack(unsigned (&P)[Bc / 16][4], const float (&scores)[Bc / 2]) {
#pragma unroll
  for (int n = 0; n < Bc / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) P[n][i] = pack2(scores[8 * n + 2 * i], scores[8 * n + 2 * i + 1]);
}

// Sets scores to -inf where the key is in the query's future, or past the last one. `first` is the last key that this lane's first row sees.
__device__ __forceinline__ void mask(float (&scores)[Bc / 2], int j, int first, int keys) {
  const int column = j + (int)(threadIdx.x % 4) * 2;
#pragma unroll
  for (int i = 0; i < Bc / 2; i++)
    if (column + i / 4 * 8 + i % 2 > min(first + i / 2 % 2 * 8, keys - 1)) scores[i] = -INFINITY;
}

// Zeros V's rows past the last key: they may hold NaN, and 0 · NaN is NaN.
__device__ __forceinline__ void clear_rows(half_t* V, int first, int group) {
  for (int i = threadIdx.x % 128; i < (Bc - first) * SLABS * 8; i += 128)
    *(uint4*)(V + i % SLABS * SLAB + (first + i / SLABS / 8) * 64 + i / SLABS % 8 * 8) = make_uint4(0, 0, 0, 0);
  async_proxy_fence();
  named_barrier_sync(1 + CONSUMERS + group, 128);  // the groups do not wait for each other: each zeros the rows itself
}

// A consumer: computes 64 queries, of which `queries` exist; `reach` is the last key that the first of them sees.
__device__ __forceinline__ void consume(Shared& shared, int group, half_t* O, float* L, int o_token, int queries, int reach, int keys, int seen,
                                        float scale) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, first = reach + 16 * warp + lane / 4;
  const float log2_scale = scale * 1.4426950408889634f;
  const int turn = 1 + group, next_turn = 1 + (group + 1) % CONSUMERS;  // named barriers; 0 is __syncthreads'
  float acc[Dh / 2] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {}, shrink[2];
  const half_t* Q = shared.Q + group * 64 * 64;

  if (seen > 0) {
    if (group == CONSUMERS - 1) named_barrier_arrive(1, 256);  // the first group's turn
    float scores[Bc / 2];
    unsigned P[Bc / 16][4];
    mbarrier_wait(&shared.q_full, 0);
    mbarrier_wait(&shared.k_full[0], 0);
    query_key(scores, Q, shared.K[0]);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&shared.k_empty[0]);
    if (Bc - 1 > min(reach, keys - 1)) mask(scores, 0, first, keys);
    online_softmax(scores, m, l, shrink, log2_scale);
    pack(P, scores);

    int tile = 0;
    for (int j = Bc; j < seen; j += Bc, tile++) {
      const int stage = tile % STAGES, next = (tile + 1) % STAGES;
      mbarrier_wait(&shared.k_full[next], (tile + 1) / STAGES % 2);
      named_barrier_sync(turn, 256);
      query_key(scores, Q, shared.K[next]);
      mbarrier_wait(&shared.v_full[stage], tile / STAGES % 2);
      probs_value(acc, P, shared.V[stage]);
      named_barrier_arrive(next_turn, 256);
      wgmma_wait<1>();  // scores are complete; P V of the tile before still runs
      if (lane == 0) mbarrier_arrive(&shared.k_empty[next]);
      if (j + Bc - 1 > min(reach, keys - 1)) mask(scores, j, first, keys);
      online_softmax(scores, m, l, shrink, log2_scale);
      before_waiting(l[0]);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(&shared.v_empty[stage]);
#pragma unroll
      for (int d = 0; d < Dh / 2; d++) acc[d] *= shrink[d / 2 % 2];
      pack(P, scores);
    }
    mbarrier_wait(&shared.v_full[tile % STAGES], tile / STAGES % 2);
    if (keys < (tile + 1) * Bc) clear_rows(shared.V[tile % STAGES], keys - tile * Bc, group);
    probs_value(acc, P, shared.V[tile % STAGES]);
    wgmma_wait<0>();
    if (group == 0) named_barrier_sync(1, 256);  // takes the last turn, which is left over
    named_barrier_sync(1 + CONSUMERS + group, 128);  // the products of all four warps have read Q
  }

  // O is staged in Q's memory, each warp's rows over its own, with the same swizzle, and then written 16 bytes at a time.
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int t = 16 * warp + lane / 4 + 8 * r;
    float sum = l[r];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    const float share = sum > 0 ? 1 / sum : 0.f;  // divided once, at the end; a query that sees no key gets 0
#pragma unroll
    for (int d = 0; d < Dh / 8; d++) {
      half_t* piece = shared.Q + d / 8 * SLAB_Q + (group * 64 + t) * 64 + (d % 8 ^ t % 8) * 8;
      *(unsigned*)(piece + lane % 4 * 2) = pack2(acc[4 * d + 2 * r] * share, acc[4 * d + 2 * r + 1] * share);
    }
    if (lane % 4 == 0 && t < queries) L[t] = sum > 0 ? m[r] * scale + logf(sum) : -INFINITY;
  }
  __syncwarp();
  for (int c = lane; c < 16 * (Dh / 8); c += 32) {
    const int t = 16 * warp + c / (Dh / 8), d = c % (Dh / 8);
    const half_t* piece = shared.Q + d / 8 * SLAB_Q + (group * 64 + t) * 64 + (d % 8 ^ t % 8) * 8;
    if (t < queries) *(uint4*)(O + t * o_token + 8 * d) = *(const uint4*)piece;
  }
}

// Q: (B, T, H, Dh);  K: (B, S, H, Dh);  V: (B, S, H, Dh)  ->  O: (B, T, H, Dh), L: (B, H, T).  Grid: tiles of Br queries · H · B. `together` heads
// run side by side, as many as have their K and V in the L2 cache together; all of them start with the tiles that see the most keys.
// `ranges` as in tiles.cuh. The maps' boxes are (1, Br or Bc, 1, 64), swizzled by 128 bytes.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_fwd_sm90(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v, half_t* O,
               float* L, const int* ranges, int T, int S, float scale, long long o_batch, int o_token, int o_head, int H, int together) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *(Shared*)memory;
  const int group = threadIdx.x / 128, block = blockIdx.x, tiles = (T + Br - 1) / Br, heads = gridDim.x / tiles;  // of all rows of the batch
  const int first = block / (tiles * together) * together, some = min(together, heads - first), place = block - first * tiles;
  const int row = (first + place % some) / H, head = (first + place % some) % H;
  const int i = (tiles - 1 - place / some) * Br;  // the last queries see the most keys: they start first
  const int* range = ranges + 5 * row;
  const int first_query = ranges ? range[0] : 0, queries = ranges ? range[1] : T;
  const int first_key = ranges ? range[2] : 0, keys = ranges ? range[3] : S, past = ranges ? range[4] : S - T;  // query t is at key past + t
  if (i >= queries) return;
  const int seen = min(past + min(i + Br, queries), keys);  // keys that the block's last query sees

  if (threadIdx.x == 0) {
    mbarrier_init(&shared.q_full, 1);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&shared.k_full[s], 1), mbarrier_init(&shared.v_full[s], 1);
      mbarrier_init(&shared.k_empty[s], 4 * CONSUMERS), mbarrier_init(&shared.v_empty[s], 4 * CONSUMERS);  // a lane of each warp arrives
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (group == CONSUMERS) {
    registers_fewer<CONSUMERS == 2 ? 24 : 32>();
    if (threadIdx.x == 128 * CONSUMERS && seen > 0) produce(shared, map_q, map_k, map_v, row, head, first_query + i, first_key, seen);
  } else {
    registers_more<CONSUMERS == 2 ? 240 : 160>();
    const int t = i + 64 * group;
    O += row * o_batch + head * (long long)o_head + (first_query + t) * (long long)o_token;
    L += ((long long)row * H + head) * T + first_query + t;
    consume(shared, group, O, L, o_token, queries - t, past + t, keys, seen, scale);
  }
}
