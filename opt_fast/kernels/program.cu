// One token of OPT for each row of a batch in one kernel (sm_80 and later), which executes a table of lines (operations), each by all blocks.
//
// One block for each multiprocessor, 8 warps. Nearly all that a GPU has to read is weights, and their addresses depend on no result: so all matrices
// of the table form one stream, of which each warp prefetches the next DEPTH steps into shared memory, whatever line the block is at. Memory stays
// busy while blocks wait for each other, compute LayerNorm, or attend.
//
// A line is WORDS 64-bit integers: an operation, flags, operands; pointers are addresses, or 0 for none. 16-bit values are float16, or bfloat16 where
// the kernel is compiled for it; int8 matrices have a float32 factor for each output, and may have one for each column, a power of two.
// opt_fast/program_cpp.py writes lines.
//
//   word    EMBED              NORM             LINEAR                                        ATTEND
//   2       y (B, W)           y (B, D)         y (B, O), 16 bits; FLOAT: float32; PAGED      O (B, H, Dh)
//   3       W                  D                O                                             H
//   4       table (V, W)       x (B, D)         x (B, I)                                      q (B, H, Dh)
//   5       ids (B), 64 bits   weight (D)       I                                             keys (pages, 64, H, Dh)
//   6       positions (P, W)   bias (D)         weight (O, I), as in the checkpoint           values (pages, 64, H, Dh)
//   7       factors (V)                         factors (O)                                   the scores' scale, a float32's bits
//   8       columns (W)                         bias (O)
//   9                                           residual (B, O), may be y
//   10                                          0; 1: relu; 2: gelu; 3: gelu_new
//   11, 12                                      the LayerNorm's weight and bias (I)
//   13                                          where block 0 writes the normalised rows (B, I), not x
//   14                                          the block that takes the first 8 outputs
//   15                                          columns (I)
//
//   EMBED   y = table[ids] + positions[lengths + 2], or only one of the two; 0 for a row that is not in use
//   NORM    y = LayerNorm(x)
//   LINEAR  y = activation(x weightᵀ + bias) + residual. STAGED: x is first copied to shared memory; NORMED: and normalised there; KEPT: it is there
//           from the line before, unless this line is a launch's first. PAGED: y is a pool of pages (64, O); row b is written at position lengths[b].
//   ATTEND  each row's query over the lengths[b] + 1 keys in its pages; keys are split over blocks where there are at least two blocks for each row
//           and head. Two ATTEND lines need a barrier between them
//   WAIT    the line reads what earlier lines wrote: a barrier of the whole grid precedes it. The first line of a launch never waits.
//
// The cache holds lengths[b] tokens of row b before this one; below 0, the row is not in use: it is written to no page, and O is 0.
// Sums and LayerNorm are in float32, rounded once, at the end of a line. No result depends on the order in which blocks run. B is at most 16 MT, D
// and I are multiples of 8 (int8: 16), and addresses of 16. DH, BF16, MT and DEPTH are set when the kernel is compiled.
#define BLOCK_WARPS 8
#include "decode.cuh"
#include <grid.cuh>  // not in quotes: the tests put their own grid.cuh first on the include path

constexpr int WORDS = 16, PAGE = 64, POSITION_OFFSET = 2;
constexpr float EPS = 1e-5f;                      // LayerNorm's
constexpr int M = MT, OUTPUTS = 8;                // tiles of 16 rows of x; outputs of a tile of weights
constexpr int CHAINS = MT == 1 ? 2 : 1;           // independent sums: in a single one each product would wait for the one before
constexpr int SPAN = 256, SLOT = OUTPUTS * SPAN;  // bytes of each row, and of all 8 rows, in a step of a warp
constexpr int SUM = 16 * M * OUTPUTS;             // sums of a tile
constexpr int PLACES = 2;                         // stages of keys and values of a warp
// Bytes of shared memory, in order: prefetched weights; copies of two lines; then either each warp's sums of two tiles, and rows of x, or what
// attention needs.
constexpr int RING = DEPTH * WARPS * SLOT, COPIES = 2 * WORDS * 8, SUMS = 2 * WARPS * SUM * sizeof(float);
enum Operation { EMBED, NORM, LINEAR, ATTEND };
enum Flag { WAIT = 1, NORMED = 2, STAGED = 4, KEPT = 8, INT8 = 16, FLOAT = 32, PAGED = 64 };

struct Rows {  // of the batch
  int B;
  const int *lengths, *pages;
  int most;  // pages of a row

  // The position of a row's token j in a layer's pool, in tokens.
  __device__ __forceinline__ long long place(int row, int j) const { return pages[(long long)row * most + j / PAGE] * (long long)PAGE + j % PAGE; }
};

__device__ __forceinline__ half_t pack(float x) { return (half_t)pack2(x, 0.f); }
__device__ __forceinline__ int pitch(int width) { return (2 * width + 127) / 128 * 128 + 64; }  // bytes from row to row of x in shared memory
__device__ __forceinline__ int first_tile(const long long* line) { return (blockIdx.x + gridDim.x - (int)line[14] % gridDim.x) % gridDim.x; }
__device__ __forceinline__ int row_bytes(const long long* line) { return (int)line[5] * (line[1] & INT8 ? 1 : 2); }

// A warp's steps through the weights of all LINEAR lines: the block has every gridDim.x-th tile of 8 outputs, the warp every WARPS-th 256 bytes of
// its rows. A lane fetches only what it will use itself, four times 16 bytes of row lane / 4, so no barrier is needed.
struct Stream {
  const long long *line, *end;  // of the next step to fetch
  const char* weights;
  int outputs, bytes, tile, step;
  char* slots;
  int slot;

  __device__ __forceinline__ Stream(const long long* line, const long long* end, char* ring) : line(line), end(end), slot(0) {
    slots = ring + threadIdx.x / 32 * DEPTH * SLOT + threadIdx.x % 32 * 16;
    find();
#pragma unroll 1
    for (int n = 0; n < DEPTH; n++) fetch();
  }

  // The first step, in this line or a later one.
  __device__ __forceinline__ void find() {
    for (; line < end; line += WORDS) {
      if (line[0] != LINEAR) continue;
      outputs = (int)line[3], weights = (const char*)line[6], bytes = row_bytes(line), tile = first_tile(line), step = threadIdx.x / 32;
      if (tile * OUTPUTS < outputs && step * SPAN < bytes) return;
    }
  }

  // Starts copying the next step's weights to the slot that was used last; zeros outside the matrix.
  __device__ __forceinline__ void fetch() {
    if (line < end) {
      const int lane = threadIdx.x % 32, row = tile * OUTPUTS + lane / 4, column = step * SPAN + lane % 4 * 16;
      const char* from = weights + (row < outputs ? row * (long long)bytes : 0);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const bool real = row < outputs && column + 64 * c < bytes;
        cp_async_16(shared_address(slots + slot * SLOT + 512 * c), from + (real ? column + 64 * c : 0), real);
      }
      step += WARPS;
      if (step * SPAN >= bytes) {
        step = threadIdx.x / 32, tile += gridDim.x;
        if (tile * OUTPUTS >= outputs) line += WORDS, find();
      }
    }
    cp_async_commit();  // after the last step an empty group, because waits count groups
    slot = (slot + 1) % DEPTH;
  }

  // Waits for the oldest step that was fetched; when its pieces have been used, `fetch` must follow.
  __device__ __forceinline__ void wait() const { cp_async_wait<DEPTH - 1>(); }
  __device__ __forceinline__ uint4 piece(int c) const { return *(const uint4*)(slots + slot * SLOT + 512 * c); }
};

// ---- LayerNorm ----------------------------------------------------------------------------------------------------------------------------

// The sum over the `team` warps of a row. `sums`: WARPS floats, which must not be those of the call before.
__device__ __forceinline__ float team_sum(float x, int team, float* sums) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
  if (threadIdx.x % 32 == 0) sums[warp] = x;
  __syncthreads();
  float sum = 0;
  for (int w = warp / team * team; w < warp / team * team + team; w++) sum += sums[w];
  return sum;
}

struct Eight {
  float at[8];
};
__device__ __forceinline__ Eight unpack8(uint4 x) {
  const unsigned pairs[4] = {x.x, x.y, x.z, x.w};
  Eight y;
#pragma unroll
  for (int i = 0; i < 8; i++) y.at[i] = unpack((half_t)(pairs[i / 2] >> i % 2 * 16 & 0xFFFF));
  return y;
}

// Copy rows to shared memory, and back.
__device__ __forceinline__ void stage(char* rows, const half_t* x, int B, int width) {
  for (int i = threadIdx.x; i < B * (width / 8); i += THREADS) {
    const int row = i / (width / 8), c = i % (width / 8);
    *(uint4*)(rows + row * pitch(width) + 16 * c) = *(const uint4*)(x + (long long)row * width + 8 * c);
  }
  __syncthreads();
}
__device__ __forceinline__ void write_back(half_t* y, const char* rows, int B, int width) {
  for (int i = threadIdx.x; i < B * (width / 8); i += THREADS) {
    const int row = i / (width / 8), c = i % (width / 8);
    *(uint4*)(y + (long long)row * width + 8 * c) = *(const uint4*)(rows + row * pitch(width) + 16 * c);
  }
}

// LayerNorm in shared memory: 8 rows at a time, a warp each, or fewer with several warps each.
__device__ __forceinline__ void normalize(char* rows, int B, int width, const half_t* weight, const half_t* bias, float* sums) {
  const int team = B == 1 ? 8 : B == 2 ? 4 : B <= 4 ? 2 : 1, warp = threadIdx.x / 32, first = warp % team * 32 + threadIdx.x % 32;
  for (int begin = 0; begin < B; begin += WARPS / team) {
    const int row = begin + warp / team, pieces = row < B ? width / 8 : 0;  // of 8 numbers
    auto of = [&](const half_t* vector, int c) { return vector && c < pieces ? ((const uint4*)vector)[c] : make_uint4(0, 0, 0, 0); };
    uint4 *x = (uint4*)(rows + row * pitch(width)), w = of(weight, first), b = of(bias, first);  // weight and bias are loaded early
    float sum = 0, squares = 0;
    for (int c = first; c < pieces; c += 32 * team) {
      const Eight numbers = unpack8(x[c]);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += numbers.at[i];
    }
    const float mean = team_sum(sum, team, sums) / width;
    for (int c = first; c < pieces; c += 32 * team) {
      const Eight numbers = unpack8(x[c]);
#pragma unroll
      for (int i = 0; i < 8; i++) squares += (numbers.at[i] - mean) * (numbers.at[i] - mean);
    }
    const float rstd = rsqrtf(team_sum(squares, team, sums + WARPS) / width + EPS);
    for (int c = first; c < pieces; c += 32 * team, w = of(weight, c), b = of(bias, c)) {
      Eight numbers = unpack8(x[c]);
      const Eight factors = unpack8(w), added = unpack8(b);
#pragma unroll
      for (int i = 0; i < 8; i++) numbers.at[i] = (numbers.at[i] - mean) * rstd * (weight ? factors.at[i] : 1.f) + added.at[i];
      const float* y = numbers.at;
      x[c] = make_uint4(pack2(y[0], y[1]), pack2(y[2], y[3]), pack2(y[4], y[5]), pack2(y[6], y[7]));
    }
  }
  __syncthreads();
}

// Multiplies rows in shared memory by an int8 matrix's column factors.
__device__ __forceinline__ void scale_columns(char* rows, int B, int width, const float* columns) {
  __syncthreads();  // other threads may still be writing the rows back
  for (int i = threadIdx.x; i < B * (width / 8); i += THREADS) {
    const int row = i / (width / 8), c = i % (width / 8);
    uint4* place = (uint4*)(rows + row * pitch(width)) + c;
    const float* by = columns + 8 * c;
    const Eight x = unpack8(*place);
    *place = make_uint4(pack2(x.at[0] * by[0], x.at[1] * by[1]), pack2(x.at[2] * by[2], x.at[3] * by[3]), pack2(x.at[4] * by[4], x.at[5] * by[5]),
                        pack2(x.at[6] * by[6], x.at[7] * by[7]));
  }
  __syncthreads();
}

__device__ __forceinline__ void norm(const long long* line, int B, char* memory) {
  half_t* y = (half_t*)line[2];
  const half_t* x = (const half_t*)line[4];
  const int width = (int)line[3];
  for (int row = blockIdx.x; row < B; row += gridDim.x) {
    stage(memory + SUMS, x + (long long)row * width, 1, width);
    normalize(memory + SUMS, 1, width, (const half_t*)line[5], (const half_t*)line[6], (float*)memory);
    write_back(y + (long long)row * width, memory + SUMS, 1, width);
    __syncthreads();  // before the next row overwrites it
  }
}

__device__ __forceinline__ void embed(const long long* line, Rows rows) {
  half_t* y = (half_t*)line[2];
  const int width = (int)line[3];
  const half_t *table = (const half_t*)line[4], *positions = (const half_t*)line[6];
  const signed char* bytes = (const signed char*)line[4];
  const long long* ids = (const long long*)line[5];
  const float *factors = (const float*)line[7], *columns = (const float*)line[8];
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < rows.B * width; i += gridDim.x * THREADS) {
    const int row = i / width, column = i % width, length = rows.lengths[row];
    float x = 0;
    if (length >= 0 && table) {
      const long long place = ids[row] * width + column;
      x = line[1] & INT8 ? bytes[place] * factors[ids[row]] * (columns ? columns[column] : 1.f) : unpack(table[place]);
    }
    if (length >= 0 && positions) x += unpack(positions[(long long)(length + POSITION_OFFSET) * width + column]);
    y[i] = pack(x);
  }
}

// ---- products -----------------------------------------------------------------------------------------------------------------------------

// 8 elements of a row of x; zeros where there is no such row or column.
__device__ __forceinline__ uint4 piece(const char* x, int step, int row, int k, int B, int width) {
  return row < B && k < width ? *(const uint4*)(x + row * (long long)step + 2 * k) : make_uint4(0, 0, 0, 0);
}

// Converts four signed bytes to 16-bit floats, exactly: each is written into the last bits of a power of two, which is then subtracted.
__device__ __forceinline__ void unpack_bytes(unsigned (&y)[2], unsigned bytes) {
  bytes ^= 0x80808080;  // 0 to 255: each is 128 too large
#if BF16                // its mantissa of 7 bits cannot hold 8: through float32
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = __uint_as_float(__byte_perm(bytes, 0x4B000000, 0x7440 + i)) - 8388736.f;
  y[0] = pack2(x[0], x[1]), y[1] = pack2(x[2], x[3]);
#else
  y[0] = subtract2(__byte_perm(bytes, 0x64646464, 0x4140), 0x64806480);  // 1024 + 128 each
  y[1] = subtract2(__byte_perm(bytes, 0x64646464, 0x4342), 0x64806480);
#endif
}

// sums += x Wᵀ over the 32 columns of which this lane has the 8 from k on. The order of the terms of a sum does not matter, so mma's columns are
// permuted: those of a lane are contiguous in memory, 16 bytes of a row of W, and of two rows of x.
__device__ __forceinline__ void multiply_8(float (&sums)[CHAINS][M][4], const char* x, int step, int k, int B, int width, const unsigned (&w)[4]) {
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int row = 16 * m + threadIdx.x % 32 / 4;
    const uint4 one = piece(x, step, row, k, B, width), two = piece(x, step, row + 8, k, B, width);
    const unsigned a[4] = {one.x, two.x, one.y, two.y}, b[4] = {one.z, two.z, one.w, two.w};
    mma_m16n8k16(sums[0][m], a, w[0], w[1]);
    mma_m16n8k16(sums[CHAINS - 1][m], b, w[2], w[3]);
  }
}

__device__ __forceinline__ float activate(float x, int function) {
  if (function == 1) return fmaxf(x, 0.f);
  if (function == 2) return x * 0.5f * (1.f + erff(x * 0.70710678f));
  if (function == 3) return x * 0.5f * (1.f + tanhf((x * x * x * 0.044715f + x) * 0.79788456f));
  return x;
}

// Writes element `column` of a row's result.
__device__ __forceinline__ void store(const long long* line, const Rows& rows, int row, int column, float x) {
  const int flags = (int)line[1], outputs = (int)line[3];
  if (flags & FLOAT) ((float*)line[2])[(long long)row * outputs + column] = x;
  else if (!(flags & PAGED)) ((half_t*)line[2])[(long long)row * outputs + column] = pack(x);
  else if (const int length = rows.lengths[row]; length >= 0) ((half_t*)line[2])[rows.place(row, length) * outputs + column] = pack(x);
}

// The block's tiles of 8 outputs, in order; its warps divide a tile's columns of x, rows of which are `step` bytes apart.
template <bool BYTES>
__device__ __forceinline__ void tiles(const long long* line, const Rows& rows, Stream& stream, const char* x, int step, float* sums) {
  const int outputs = (int)line[3], width = (int)line[5], bytes = row_bytes(line), function = (int)line[10], B = rows.B;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* factors = (const float*)line[7];
  const half_t *bias = (const half_t*)line[8], *residual = (const half_t*)line[9];
  constexpr int EACH = (SUM + THREADS - 1) / THREADS;  // results of a thread
  int turn = 0;  // shared memory has the sums of two turns, and each turn gives the first results to another warp
  for (int tile = first_tile(line); tile * OUTPUTS < outputs; tile += gridDim.x, turn++) {
    float factor[EACH] = {};  // loaded early, because of their latency
    half_t added[EACH] = {}, more[EACH] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int e = (threadIdx.x + 32 * turn) % THREADS + i * THREADS, row = e / OUTPUTS, column = tile * OUTPUTS + e % OUTPUTS;
      if (row >= B || column >= outputs) continue;
      factor[i] = BYTES ? factors[column] : 1.f;
      if (bias) added[i] = bias[column];
      if (residual) more[i] = residual[(long long)row * outputs + column];
    }
    float acc[CHAINS][M][4] = {};
    for (int s = warp; s * SPAN < bytes; s += WARPS) {
      stream.wait();
#pragma unroll(M > 2 ? 1 : 4)
      for (int c = 0; c < 4; c++) {
        const int k = (s * SPAN + 64 * c + lane % 4 * 16) / (BYTES ? 1 : 2);
        const uint4 w = stream.piece(c);
        const unsigned words[4] = {w.x, w.y, w.z, w.w};
        if (BYTES) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            unsigned low[2], high[2];
            unpack_bytes(low, words[2 * half]), unpack_bytes(high, words[2 * half + 1]);
            multiply_8(acc, x, step, k + 8 * half, B, width, {low[0], low[1], high[0], high[1]});
          }
        } else multiply_8(acc, x, step, k, B, width, words);
      }
      stream.fetch();
    }
    float* here = sums + turn % 2 * WARPS * SUM;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float2 two = make_float2(acc[0][m][2 * r], acc[0][m][2 * r + 1]);
        if (CHAINS == 2) two.x += acc[CHAINS - 1][m][2 * r], two.y += acc[CHAINS - 1][m][2 * r + 1];
        *(float2*)(here + warp * SUM + (16 * m + 8 * r + lane / 4) * OUTPUTS + lane % 4 * 2) = two;
      }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int e = (threadIdx.x + 32 * turn) % THREADS + i * THREADS, row = e / OUTPUTS, column = tile * OUTPUTS + e % OUTPUTS;
      if (row >= B || column >= outputs) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += here[w * SUM + e];
      store(line, rows, row, column, activate(sum * factor[i] + unpack(added[i]), function) + unpack(more[i]));
    }
  }
}

__device__ __forceinline__ void linear(const long long* line, const Rows& rows, Stream& stream, char* memory, bool first) {
  const int flags = (int)line[1], width = (int)line[5];
  const char* x = (const char*)line[4];
  int step = 2 * width;
  if (flags & STAGED) {
    char* copy = memory + SUMS;
    if (first || !(flags & KEPT)) {
      stage(copy, (const half_t*)x, rows.B, width);
      if (flags & NORMED) normalize(copy, rows.B, width, (const half_t*)line[11], (const half_t*)line[12], (float*)memory);
      if (line[13] && blockIdx.x == 0) write_back((half_t*)line[13], copy, rows.B, width);
      if (line[15]) scale_columns(copy, rows.B, width, (const float*)line[15]);
    }
    x = copy, step = pitch(width);
  }
  if (flags & INT8) tiles<true>(line, rows, stream, x, step, (float*)memory);
  else tiles<false>(line, rows, stream, x, step, (float*)memory);
}

// ---- attention ----------------------------------------------------------------------------------------------------------------------------

// A task is a row, a head and a split of its keys. `counts`: how many splits of each row and head are done, 0 between lines; the block that finishes
// the last one combines them. `parts`: (B, H, splits, Dh + 1), O and L of each.
__device__ __forceinline__ void attend(const long long* line, const Rows& rows, unsigned* counts, float* parts, half_t* memory) {
  half_t *O = (half_t*)line[2], *tile_q = memory, *places = tile_q + ROWS * PITCH;
  const half_t *Q = (const half_t*)line[4], *K = (const half_t*)line[5], *V = (const half_t*)line[6];
  const int H = (int)line[3], pairs = rows.B * H, most = max((int)gridDim.x / pairs, 1), warp = threadIdx.x / 32;
  const float scale = __int_as_float((int)line[7]);
  for (int task = blockIdx.x; task < pairs * most; task += gridDim.x) {
    const int pair = task / most, split = task % most, row = pair / H, head = pair % H, keys = rows.lengths[row] + 1;
    const int pieces = max((keys + WARPS * Bc - 1) / (WARPS * Bc), 1), each = (pieces + most - 1) / most, splits = (pieces + each - 1) / each;
    if (split >= splits) continue;
    const int begin = split * each * WARPS * Bc, end = min(begin + each * WARPS * Bc, keys);
    load_tile<ROWS>(tile_q, Q + (long long)pair * Dh, Dh, 1);
    cp_async_commit();
    walk<PLACES>(tile_q, places + warp * PLACES * PLACE, begin + warp * Bc, end, keys - 1, scale, [&](half_t* place, int j, int real) {
      const long long from = (rows.place(row, j) * H + head) * Dh;  // a tile never crosses pages
      load_keys(place, K + from, H * Dh, real);
      load_keys(place + Bc * PITCH, V + from, H * Dh, real);
    });
    __syncthreads();
    float* part = parts + (long long)pair * most * (Dh + 1);
    if (threadIdx.x < Dh) {
      const int d = threadIdx.x;
      const auto [value, lse] = weigh(places, PLACES * PLACE, 0, d, scale);
      if (splits == 1) O[(long long)pair * Dh + d] = pack(value);
      else {
        part[split * (Dh + 1) + d] = value;
        if (d == 0) part[split * (Dh + 1) + Dh] = lse;
      }
    }
    if (splits > 1) {
      int* last = (int*)tile_q;
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();  // releases what all of the block's threads have written
        *last = atomicAdd(counts + pair, 1u) == splits - 1u;
        if (*last) counts[pair] = 0;
        __threadfence();
      }
      __syncthreads();
      if (*last && threadIdx.x < Dh) {
        auto lse = [&](int n) { return part[n * (Dh + 1) + Dh]; };
        O[(long long)pair * Dh + threadIdx.x] = pack(combine(splits, lse, [&](int n) { return part[n * (Dh + 1) + threadIdx.x]; }).value);
      }
    }
    __syncthreads();  // before the next task overwrites this one's shared memory
  }
}

// Prefetches into the L2 cache, before the barrier, the vectors that a line reads (factors, biases, norms); the blocks share the work.
__device__ __forceinline__ void prefetch(const long long* line) {
  const int operation = (int)line[0], i = (blockIdx.x * THREADS + threadIdx.x) * 128;  // bytes
  auto vector = [&](int word, long long bytes) {
    if (line[word] && i < bytes) prefetch_L2((const char*)line[word] + i);
  };
  if (operation == NORM) vector(5, 2 * line[3]), vector(6, 2 * line[3]);
  if (operation == LINEAR) vector(7, 4 * line[3]), vector(8, 2 * line[3]), vector(11, 2 * line[5]), vector(12, 2 * line[5]);
}

// Lines begin to end of the table.  lengths: (B);  pages: (B, most);  state: (1 + B·H) for the barrier and for ATTEND, zeros before the first launch
extern "C" __global__ void __launch_bounds__(THREADS, 1)
program(const long long* lines, int begin, int end, int B, const int* lengths, const int* pages, int most, unsigned* state, float* parts) {
  extern __shared__ __align__(16) char memory[];
  const Rows rows = {B, lengths, pages, most};
  Stream stream(lines + (long long)begin * WORDS, lines + (long long)end * WORDS, memory);
#pragma unroll 1
  for (int i = begin; i < end; i++) {
    const long long* next = lines + (long long)i * WORDS;
    long long* line = (long long*)(memory + RING) + i % 2 * WORDS;  // a copy, complete when the barrier opens
    if (threadIdx.x < WORDS) line[threadIdx.x] = next[threadIdx.x];
    prefetch(next);
    if (i > begin && next[1] & WAIT) grid_barrier(state);
    else __syncthreads();  // lines use the same shared memory
    const int operation = (int)line[0];
    if (operation == EMBED) embed(line, rows);
    else if (operation == NORM) norm(line, B, memory + RING + COPIES);
    else if (operation == LINEAR) linear(line, rows, stream, memory + RING + COPIES, i == begin);
    else attend(line, rows, state + 1, parts, (half_t*)(memory + RING + COPIES));
  }
}
