// CUDA C++ for g++: a block's threads are fibres (threads that switch on request), so that a kernel's own source runs on a CPU, warp by warp.
// ../cuda_emulator.py compiles it. A kernel may use the following; anything else does not compile:
//   __global__ __device__ __host__ __forceinline__ __restrict__ __align__(n); __launch_bounds__ __grid_constant__ #pragma unroll do nothing here
//   extern __shared__ __align__(16) T name[];    any T and name, in a function or outside
//   __shared__ T name[n];                        in a function, one name; cuda_emulator.py rewrites these two forms of __shared__
//   threadIdx blockIdx blockDim gridDim; uint2 uint3 uint4 int2 int4 float2 float4 dim3 and their make_…
//   __syncthreads __syncwarp __shfl_sync __shfl_xor_sync (all 32 lanes) atomicAdd __threadfence __ldg; mma.cuh, sm90.cuh and grid.cuh
//   fmaxf fminf fabsf fmaf expf exp2f logf log2f sqrtf erff tanhf, __expf __logf __log2f __fdividef rsqrtf, min, max, INFINITY,
//   __float_as_int __int_as_float __float_as_uint __uint_as_float __byte_perm
//
// Its rules, each with an error message: all lanes of a warp reach the same warp-wide instruction, and none has exited; all threads of a block reach
// __syncthreads; pointers are aligned and inside the caller's arrays or shared memory; an index stays inside its array.
// Which warp and which lane runs next is drawn from a seed, and shared memory starts as NaN, so a missing barrier shows in the results.
// Blocks run one by one in a random order, or, in a cooperative launch, interleaved, some of them far ahead of others.
#pragma once

#include <cfloat>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

extern "C" {  // the functions of <cmath> that a kernel may call; that header and <vector> would take half of a kernel's compilation time
float expf(float), exp2f(float), logf(float), log2f(float), sqrtf(float), fabsf(float);
float fminf(float, float), fmaxf(float, float), fmaf(float, float, float), erff(float), tanhf(float);
double fabs(double), ldexp(double, int), nearbyint(double);
int ilogb(double);
}
#define INFINITY __builtin_inff()

#define __global__ inline  // so that only the requested kernel is compiled
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint2 { unsigned x, y; } __align__(8);
struct uint3 { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; } __align__(16);
struct int2 { int x, y; } __align__(8);
struct int4 { int x, y, z, w; } __align__(16);
struct float2 { float x, y; } __align__(8);
struct float4 { float x, y, z, w; } __align__(16);
using dim3 = uint3;

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the machine ------------------------------------------------------------------------------------------------------------------------

namespace cuda_on_cpu {

constexpr unsigned WARP = 32, GROUP = 128, MOST_THREADS = 1024;  // threads of a warp, of a warpgroup, of a block
constexpr unsigned SHARED_BASE = 1024;  // the PTX address of dynamic shared memory: not 0, so that address 0 is invalid
constexpr unsigned SHARED_MOST = 227 * 1024, FIXED_MOST = 48 * 1024;  // bytes of a block on compute capability 9.0
constexpr size_t PAGE = 4096, STACK = 64 * 1024, GUARD = 1 << 20;

using Perform = void (*)(void* const* operands);  // executes one instruction of a warp or warpgroup on its lanes' operands

template <class T>
struct Array {  // a minimal std::vector for plain structures
  T* items;
  size_t count, room;

  void resize(size_t n) {  // new ones are zeros
    if (n > room) {
      items = static_cast<T*>(realloc(items, 2 * n * sizeof(T)));
      memset(static_cast<void*>(items + room), 0, (2 * n - room) * sizeof(T));
      room = 2 * n;
    }
    count = n;
  }
  void push_back(const T& x) {
    resize(count + 1);
    items[count - 1] = x;
  }
  T& operator[](size_t i) { return items[i]; }
  T* begin() { return items; }
  T* end() { return items + count; }
};

struct Copy {  // a cp.async that has not arrived yet
  unsigned shared;
  const void* global;
  bool real;
  unsigned group;
};

struct Thread;

struct Event {  // a condition that a single thread waits for
  bool (*happened)(const Thread&);
  void (*tell)(const Thread&, char* text, size_t size);  // describes what is still missing
};

struct Thread {
  void* stack_pointer;
  ucontext_t context;  // used where the processor is not x86-64
  uint3 index;
  unsigned id;
  bool exited;
  const char* waits_at;  // nullptr while it can run
  Perform perform;       // nullptr at __syncthreads
  bool whole_group;      // all four warps of its warpgroup stop there, not only its own,
  Perform first;         // and the first of them to arrive does this, or nothing
  void* operands;
  const Event* event;  // that it waits for by itself, or nullptr
  unsigned place;      // which instance of it (which barrier),
  uint64_t phase;      // and which of its phases
  const void* site;  // the code address of the instruction
  unsigned groups;   // committed so far
  Array<Copy> copies;
};

struct Access {
  unsigned thread, barriers, warp_barriers;
};

struct Chunk {  // the accesses to 16 bytes of shared memory by cp.async and ldmatrix
  bool written;
  int landing;  // the thread whose cp.async has not been waited for, or -1
  Access writer;
  Array<Access> readers;
};

struct Region {  // one for each array
  const char *begin, *end;
  unsigned argument;
};

struct Engine {  // hooks for hardware that works beside the threads: sm90.cuh's
  void (*begin)();  // a block begins
  void (*step)();   // a warp is about to run
  bool (*idle)();   // no warp can run: makes progress, or returns false
  void (*end)();    // all threads have exited
};

enum Warp { RUNS, ALONE, AT_BARRIER, AT_GROUP, GONE };  // ALONE: some lanes wait for an event

struct Block {  // the state of a block; while it runs, the variables of the same names below hold it
  Thread threads[MOST_THREADS];
  Warp warps[MOST_THREADS / WARP];
  unsigned barriers, warp_barriers[MOST_THREADS / WARP];
  char *stacks, *shared_memory;
  Array<Chunk> chunks;
  uint3 index;
  bool done;
};

static Array<Block*> blocks;  // one, or in a cooperative launch all of the grid
static Block* block;          // the running one
static Thread *threads, scheduler, *current;
static Warp* warps;
static Engine engine;
static unsigned count, shared_bytes, barriers, *warp_barriers;
static char *stacks, *shared_memory, *fixed_memory;
static size_t fixed_bytes;  // allocated to __shared__ T name[n] declarations so far
static bool fixed_place;    // extern __shared__ is declared outside a function
static Array<Chunk> chunks;
static bool races, early, cooperative;
static const Region* regions;
static unsigned region_count;
static uint64_t state, launches;
static void (*body)();  // the kernel with its arguments
static sigjmp_buf escape;
static char message[4096];
static const void* failed_at;

inline unsigned drawn(unsigned n) {  // a random number below n (splitmix64)
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return unsigned((z ^ (z >> 31)) >> 33) % n;
}

// Ends a launch with an error, from a fibre, the scheduler or a signal handler; longjmp is safe, since no stack holds anything to destroy.
[[noreturn]] __attribute__((noinline, format(printf, 3, 4))) inline void fail(const Thread& t, const void* site, const char* format, ...) {
  int n = snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u), warp %u, lane %u: ", blockIdx.x, blockIdx.y, blockIdx.z,
                   t.index.x, t.index.y, t.index.z, t.id / WARP, t.id % WARP);
  va_list values;
  va_start(values, format);
  vsnprintf(message + n, sizeof message - n, format, values);
  va_end(values);
  failed_at = site;
  siglongjmp(escape, 1);
}

// ---- fibres -----------------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_SWITCH
extern "C" void cuda_on_cpu_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
inline void switch_to(Thread& from, Thread& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }
#else  // some 10 times slower: each swapcontext is a system call, for the signal mask
inline void switch_to(Thread& from, Thread& to) { swapcontext(&from.context, &to.context); }
#endif

inline void fibre() {
  body();
  current->exited = true;
  switch_to(*current, scheduler);
}

inline void start(Thread& t) {
  char* stack = stacks + t.id * STACK;
#if defined(CUDA_ON_CPU_SWITCH)
  void** top = reinterpret_cast<void**>(stack + STACK) - 2;  // at its entry a function's stack is 8 bytes off a multiple of 16
  *top = reinterpret_cast<void*>(fibre);
  t.stack_pointer = top - 6;
#else
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = stack + PAGE;
  t.context.uc_stack.ss_size = STACK - PAGE;
  makecontext(&t.context, fibre, 0);
#endif
  t.exited = false;
  t.waits_at = nullptr;
  t.event = nullptr;
  t.groups = 0;
  t.copies.count = 0;
}

// Stops until all lanes of the warp or warpgroup (perform), or all threads of the block (nullptr), have stopped at the same instruction.
__attribute__((noinline)) inline void together(const char* name, Perform perform, void* operands, bool whole_group = false, Perform first = nullptr) {
  current->waits_at = name;
  current->perform = perform;
  current->whole_group = whole_group;
  current->first = first;
  current->operands = operands;
  current->site = __builtin_return_address(0);
  switch_to(*current, scheduler);
}

// Stops only this thread, until an event has happened.
inline void alone(const char* name, const void* site, const Event& event, unsigned place, uint64_t phase) {
  current->waits_at = name;
  current->site = site;
  current->event = &event;
  current->place = place;
  current->phase = phase;
  switch_to(*current, scheduler);
}

// ---- the scheduler ----------------------------------------------------------------------------------------------------------------------

inline bool can_go_on(const Thread& t) { return !t.exited && (!t.waits_at || (t.event && t.event->happened(t))); }

inline bool can_run(unsigned warp) {
  if (warps[warp] != ALONE) return warps[warp] == RUNS;
  for (unsigned i = 0; i < WARP; ++i)
    if (can_go_on(threads[warp * WARP + i])) return true;
  return false;
}

inline void run_lanes(Thread* lanes) {  // runs each to where it next stops, in a random order
  unsigned first = drawn(WARP), step = 2 * drawn(WARP / 2) + 1;
  for (unsigned i = 0; i < WARP; ++i) {
    Thread& t = lanes[(first + i * step) % WARP];
    if (!can_go_on(t)) continue;
    t.waits_at = nullptr;
    t.event = nullptr;
    current = &t;
    threadIdx = t.index;
    switch_to(scheduler, t);
  }
}

inline void let_go(unsigned warp) {
  for (unsigned i = 0; i < WARP; ++i) threads[warp * WARP + i].waits_at = nullptr;
  warps[warp] = RUNS;
}

// A warp has reached an instruction of its warpgroup: the last of the four to arrive executes it for all.
inline Warp meet(Thread& t) {
  unsigned first = t.id / GROUP * GROUP, here = 0;
  if (first + GROUP > count) fail(t, t.site, "waits at %s; the block has %u threads, and so no whole warpgroup here", t.waits_at, count);
  for (unsigned w = first / WARP; w < (first + GROUP) / WARP; ++w) {
    const Thread& other = threads[w * WARP];
    if (warps[w] == GONE) fail(t, t.site, "waits at %s, which warp %u of its warpgroup never reaches: it has exited", t.waits_at, w);
    if (w != t.id / WARP && warps[w] != AT_GROUP) continue;
    ++here;
    if (other.perform != t.perform)
      fail(t, t.site, "waits at %s while warp %u of its warpgroup waits at %s", t.waits_at, w, other.waits_at);
  }
  if (here == 1 && t.first) t.first(&t.operands);
  if (here < GROUP / WARP) return AT_GROUP;
  void* operands[GROUP];
  for (unsigned i = 0; i < GROUP; ++i) operands[i] = threads[first + i].operands;
  t.perform(operands);
  for (unsigned w = first / WARP; w < (first + GROUP) / WARP; ++w) let_go(w);
  return RUNS;
}

// All lanes have stopped: executes the instruction if they have all stopped at the same one, else fails.
inline Warp settle(Thread* lanes) {
  Thread *waits = nullptr, *other = nullptr, *gone = nullptr;
  bool some_alone = false;
  for (unsigned i = 0; i < WARP; ++i) {
    if (lanes[i].exited) gone = &lanes[i];
    else if (lanes[i].event) some_alone = true;
    else if (!waits) waits = &lanes[i];
    else if (lanes[i].perform != waits->perform) other = &lanes[i];
  }
  if (some_alone) return ALONE;
  if (!waits) return GONE;
  if (gone) fail(*waits, waits->site, "waits at %s, which lane %u never reaches: it has exited", waits->waits_at, gone->id % WARP);
  if (other) fail(*waits, waits->site, "waits at %s while lane %u of its warp waits at %s", waits->waits_at, other->id % WARP, other->waits_at);
  if (!waits->perform) return AT_BARRIER;
  if (waits->whole_group) return meet(lanes[0]);
  void* operands[WARP];
  for (unsigned i = 0; i < WARP; ++i) operands[i] = lanes[i].operands;
  waits->perform(operands);
  let_go(lanes[0].id / WARP);
  return RUNS;
}

// Runs a warp for 1 to 1024 instructions, so that warps drift apart as far as barriers let them.
inline void run_for_a_while(unsigned warp) {
  for (unsigned n = 1u << drawn(11); n > 0 && can_run(warp); --n) {
    run_lanes(threads + warp * WARP);
    warps[warp] = settle(threads + warp * WARP);
  }
}

// Writes a description of what a warp waits for.
inline const Thread& tell_wait(unsigned warp, char* text, size_t size) {
  const Thread* waits = nullptr;
  for (unsigned i = 0; i < WARP; ++i) {
    const Thread& t = threads[warp * WARP + i];
    if (!t.exited && (!waits || (t.event && !waits->event))) waits = &t;
  }
  if (waits->event) waits->event->tell(*waits, text, size);
  else snprintf(text, size, "%s%s", waits->waits_at, waits->whole_group && waits->perform ? " with the rest of its warpgroup" : "");
  return *waits;
}

[[noreturn]] inline void fail_at_barrier(unsigned n) {
  unsigned left = 0, waits = 0;
  while (warps[left] != GONE) ++left;
  while (waits < n && warps[waits] != AT_BARRIER) ++waits;
  Thread& t = threads[waits * WARP];
  fail(t, t.site, "deadlock: waits at __syncthreads, which warp %u never reaches: it has exited", left);
}

[[noreturn]] inline void fail_in_deadlock(unsigned n) {
  static char waits[MOST_THREADS / WARP][256];
  char text[3000] = "";
  size_t used = 0;
  const Thread* first = nullptr;
  for (unsigned w = 0; w < n; ++w) {
    *waits[w] = 0;
    if (warps[w] == GONE) continue;
    const Thread& t = tell_wait(w, waits[w], sizeof waits[w]);
    if (!first) first = &t;
  }
  for (unsigned w = 0; w < n; ++w) {  // warps that wait for the same thing are listed together
    if (!*waits[w]) continue;
    used += size_t(snprintf(text + used, sizeof text - used, "; warp %u", w));
    for (unsigned i = w + 1; i < n; ++i)
      if (!strcmp(waits[i], waits[w])) used += size_t(snprintf(text + used, sizeof text - used, ", %u", i)), *waits[i] = 0;
    used += size_t(snprintf(text + used, sizeof text - used, ": %s", waits[w]));
    if (used + 500 > sizeof text) break;
  }
  fail(*first, first->site, "deadlock: nothing can happen any more%s", text);
}

// No warp can run: opens a barrier that all have reached, or lets the engine continue, or returns false where only another block can help, or fails.
inline bool resolve(unsigned n) {
  unsigned at_barrier = 0, gone = 0;
  for (unsigned w = 0; w < n; ++w) at_barrier += warps[w] == AT_BARRIER, gone += warps[w] == GONE;
  if (at_barrier == n) {
    ++barriers;
    for (unsigned w = 0; w < n; ++w) let_go(w);
  } else if (engine.idle && engine.idle()) {
  } else if (at_barrier + gone == n) fail_at_barrier(n);
  else if (cooperative) return false;
  else fail_in_deadlock(n);
  return true;
}

// Runs the block until it is done or waits for another one, for at most `turns` turns of its warps; returns whether anything happened.
inline bool run_block(unsigned turns) {
  unsigned n = count / WARP, stuck = 0;
  bool moved = false;
  while (turns--) {
    unsigned w = drawn(n), gone = 0;
    if (engine.step) engine.step();
    if (can_run(w)) {
      run_for_a_while(w);
      stuck = 0, moved = true;
    } else if (++stuck > n) {  // perhaps no warp can run: check all
      bool some = false;
      for (unsigned i = 0; i < n; ++i) some |= can_run(i), gone += warps[i] == GONE;
      if (gone == n) return block->done = true;
      if (!some && !resolve(n)) return moved;
      stuck = 0, moved |= !some;
    }
  }
  return moved;
}

// ---- memory -----------------------------------------------------------------------------------------------------------------------------

inline char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
}

// Loads this block's state into the variables above.
inline void enter(Block* b) {
  if (block) block->barriers = barriers, block->chunks = chunks;
  block = b, threads = b->threads, warps = b->warps, barriers = b->barriers, warp_barriers = b->warp_barriers;
  stacks = b->stacks, shared_memory = b->shared_memory, chunks = b->chunks, blockIdx = b->index;
}

inline void make_blocks(unsigned n) {
  while (blocks.count < n) blocks.push_back(static_cast<Block*>(calloc(1, sizeof(Block))));
}

inline char* dynamic_shared() {  // at the same address for every launch; memory beyond the launch's bytes is inaccessible
  if (!block) make_blocks(1), enter(blocks[0]);
  if (!launches) fixed_place = true;
  if (!shared_memory) shared_memory = block->shared_memory = reserve(SHARED_MOST + GUARD);
  return shared_memory;
}

// Memory for one __shared__ T name[n], the same for all threads; possible because only one block exists at a time.
template <class T>
T& fixed() {
  if (cooperative)
    fail(*current, __builtin_return_address(0), "__shared__ T name[n] in a cooperative launch; here each block has dynamic shared memory only");
  size_t place = fixed_bytes, end = place + (sizeof(T) + 15) / 16 * 16;
  if (end > FIXED_MOST || end + shared_bytes > SHARED_MOST)
    fail(*current, __builtin_return_address(0), "%zu fixed and %u dynamic bytes of shared memory; %u and %u in all are the most", end, shared_bytes,
         FIXED_MOST, SHARED_MOST);
  fixed_bytes = end;
  return *reinterpret_cast<T*>(fixed_memory + place);
}

inline size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// The host address of 16 bytes at a PTX address in shared memory.
inline char* shared_row(const Thread& t, const void* site, const char* name, unsigned address) {
  if (address % 16) fail(t, site, "%s: the shared address %u (%d from the start) is no multiple of 16", name, address, int(address - SHARED_BASE));
  if (address < SHARED_BASE || address - SHARED_BASE + 16 > shared_bytes)
    fail(t, site, "%s: the 16 bytes at %d are outside the %u bytes of dynamic shared memory", name, int(address - SHARED_BASE), shared_bytes);
  return shared_memory + (address - SHARED_BASE);
}

inline bool registered(const void* p, size_t bytes) {
  const char* begin = static_cast<const char*>(p);
  for (unsigned i = 0; i < region_count; ++i)
    if (regions[i].begin <= begin && begin + bytes <= regions[i].end) return true;
  return false;
}

inline Access now(const Thread& t) { return {t.id, barriers, warp_barriers[t.id / WARP]}; }

// Whether another access surely happened before: by the same thread, or before a barrier of the block, or of the warp, since passed.
inline bool happened(const Access& a, const Thread& t) {
  return a.thread == t.id || a.barriers < barriers || (a.thread / WARP == t.id / WARP && a.warp_barriers < warp_barriers[t.id / WARP]);
}

inline void check_read(Thread& t, const void* site, unsigned address) {
  if (!races) return;
  unsigned place = address - SHARED_BASE;
  Chunk& chunk = chunks[place / 16];
  if (chunk.landing >= 0)
    fail(t, site, "race: reads the shared bytes at %u, where thread %d's cp.async has not been waited for", place, chunk.landing);
  if (chunk.written && !happened(chunk.writer, t))
    fail(t, site, "race: reads the shared bytes at %u, which thread %u's cp.async wrote since the last barrier", place, chunk.writer.thread);
  if (chunk.readers.count && chunk.readers.end()[-1].thread == t.id) --chunk.readers.count;
  chunk.readers.push_back(now(t));
}

inline void check_write(Thread& t, const void* site, unsigned address) {
  if (!races) return;
  unsigned place = address - SHARED_BASE;
  Chunk& chunk = chunks[place / 16];
  if (chunk.landing >= 0) fail(t, site, "race: cp.async writes the shared bytes at %u, and so does thread %d's before it", place, chunk.landing);
  if (chunk.written && !happened(chunk.writer, t))
    fail(t, site, "race: cp.async writes the shared bytes at %u, which thread %u's wrote since the last barrier", place, chunk.writer.thread);
  for (const Access& reader : chunk.readers)
    if (!happened(reader, t))
      fail(t, site, "race: cp.async writes the shared bytes at %u, which thread %u read since the last barrier", place, reader.thread);
  chunk.landing = int(t.id);
}

inline void land(const Copy& copy) {
  char* target = shared_memory + (copy.shared - SHARED_BASE);
  if (copy.real) memcpy(target, copy.global, 16);
  else memset(target, 0, 16);
}

inline void landed(Thread& t, const Copy& copy) {
  if (!races) return;
  Chunk& chunk = chunks[(copy.shared - SHARED_BASE) / 16];
  chunk.landing = -1;
  chunk.written = true;
  chunk.writer = now(t);
  chunk.readers.count = 0;  // all of them happened before
}

// ---- faults -----------------------------------------------------------------------------------------------------------------------------

inline void where(char* text, size_t size, const char* p) {
  if (p < reinterpret_cast<char*>(PAGE)) snprintf(text, size, "through a null pointer or a misaligned one");
  else if (p >= shared_memory && p < shared_memory + SHARED_MOST + GUARD)
    snprintf(text, size, "%zd bytes from the start of dynamic shared memory, which has %u", p - shared_memory, shared_bytes);
  else if (p >= stacks && p < stacks + count * STACK) snprintf(text, size, "beyond its stack of %zu bytes", STACK);
  else {
    snprintf(text, size, "%p, far from every array", static_cast<const void*>(p));
    for (unsigned i = 0; i < region_count; ++i)
      if (p >= regions[i].begin - GUARD && p < regions[i].end + GUARD)
        snprintf(text, size, "%zd bytes from the start of argument %u, which has %zu", p - regions[i].begin, regions[i].argument,
                 size_t(regions[i].end - regions[i].begin));
  }
}

inline void fault(int signal, siginfo_t* info, void* context) {
  const void* site = nullptr;
#if defined(__x86_64__)
  site = reinterpret_cast<char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;  // as if it were a return address
#endif
  char text[256] = "";
  if (signal == SIGSEGV || signal == SIGBUS) where(text, sizeof text, static_cast<const char*>(info->si_addr));
  if (signal == SIGFPE) fail(*current, site, "divides an integer by zero");
  if (*text) fail(*current, site, "reads or writes where it may not: %s", text);
  fail(*current, site, "a misaligned pointer, an index outside its array, or an integer that overflows");  // -fsanitize's trap
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};

struct Faults {  // signal handlers, installed while a kernel runs
  struct sigaction before[5];
  stack_t stack_before;

  void take() {
    static char stack[64 * 1024];  // a fibre's own stack may have overflowed
    stack_t ours = {};
    ours.ss_sp = stack;
    ours.ss_size = sizeof stack;
    sigaltstack(&ours, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &action, &before[i]);
  }

  void give_back() {
    for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// ---- a launch ---------------------------------------------------------------------------------------------------------------------------

inline void begin_block(unsigned n) {
  blockIdx = block->index = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
  block->done = false;
  memset(dynamic_shared(), 0xFF, pages(shared_bytes));  // NaN, in every float format
  memset(fixed_memory, 0xFF, fixed_bytes);
  chunks.resize(shared_bytes / 16);
  for (Chunk& chunk : chunks) {
    chunk.written = false;
    chunk.landing = -1;
    chunk.readers.count = 0;
  }
  barriers = 0;
  for (unsigned w = 0; w < count / WARP; ++w) warps[w] = RUNS;
  for (unsigned i = 0; i < count; ++i) {
    threads[i].id = i;
    threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    warp_barriers[i / WARP] = 0;
    start(threads[i]);
  }
  current = threads;
  if (engine.begin) engine.begin();
}

inline void end_block() {
  if (engine.end) engine.end();
  for (size_t i = shared_bytes; i < pages(shared_bytes); ++i)
    if (shared_memory[i] != char(0xFF))
      fail(threads[0], nullptr, "some thread wrote %zu bytes from the start of dynamic shared memory, which has %u", i, shared_bytes);
}

inline const char* refused() {
  static char text[200];
  if (count == 0 || count % WARP || count > MOST_THREADS)
    snprintf(text, sizeof text, "a block of %u threads; it has whole warps of 32 here, and at most %u", count, MOST_THREADS);
  else if (shared_bytes > SHARED_MOST)
    snprintf(text, sizeof text, "%u bytes of dynamic shared memory; %u are the most", shared_bytes, SHARED_MOST);
  else if (cooperative && (engine.begin || fixed_place))
    snprintf(text, sizeof text, "a cooperative launch; it has nothing of sm90.cuh, and shared memory in functions only");
  else return nullptr;
  return text;
}

inline bool open_memory() {
  if (!fixed_memory) {
    fixed_memory = reserve(FIXED_MOST);
    if (!fixed_memory) return false;
    memset(fixed_memory, 0xFF, FIXED_MOST);
  }
  unsigned n = cooperative ? gridDim.x * gridDim.y * gridDim.z : 1;
  make_blocks(n);
  for (unsigned b = 0; b < n; ++b) {
    enter(blocks[b]);
    stacks = block->stacks = reserve(count * STACK);
    if (!stacks || !dynamic_shared()) return false;
    for (unsigned i = 0; i < count; ++i) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
    mprotect(dynamic_shared(), SHARED_MOST + GUARD, PROT_NONE);
    if (mprotect(dynamic_shared(), pages(shared_bytes), PROT_READ | PROT_WRITE)) return false;
  }
  return true;
}

inline void close_memory() {  // each inaccessible page splits a mapping, and a process may have only so many mappings
  for (Block* b : blocks) {
    if (b->stacks) munmap(b->stacks, count * STACK);
    b->stacks = nullptr;
  }
}

inline void run_in_turn(const Array<unsigned>& order) {
  for (unsigned i = 0; i < order.count; ++i) {
    begin_block(order.items[i]);
    while (!block->done) run_block(~0u);
    end_block();
  }
}

inline bool go_on(Block* b, unsigned turns) {
  if (b->done) return false;
  enter(b);
  bool moved = run_block(turns);
  if (b->done) end_block();
  return moved;
}

// Interleaves all blocks: one runs for a while, up to thousands of instructions, then another.
inline void run_together(unsigned n) {
  for (unsigned b = 0; b < n; ++b) enter(blocks[b]), begin_block(b);
  for (;;) {
    for (unsigned idle = 0, slow = n; idle < 4 * n;) {
      if (drawn(4 * n) == 0) slow = drawn(2 * n);  // for a while this block hardly runs (none, where slow >= n)
      unsigned b = drawn(n);
      idle = go_on(blocks[b == slow ? drawn(n) : b], drawn(3) ? 1u << drawn(11) : 1) ? 0 : idle + 1;
    }
    Block* left = nullptr;  // perhaps no block can continue: check all
    bool moved = false;
    for (unsigned b = 0; b < n; ++b) moved |= go_on(blocks[b], ~0u);
    for (unsigned b = 0; b < n; ++b) left = blocks[b]->done ? left : blocks[b];
    if (!left) return;
    enter(left);
    if (!moved) fail_in_deadlock(count / WARP);
  }
}

inline void run_grid() {
  unsigned n = gridDim.x * gridDim.y * gridDim.z;
  static Array<unsigned> order;  // random: no block may rely on an earlier one
  order.resize(n);
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  for (unsigned i = n; i > 1; --i) std::swap(order[i - 1], order[drawn(i)]);
  if (cooperative) run_together(n);
  else run_in_turn(order);
}

struct Launch {
  uint3 grid, block;
  unsigned shared_bytes, region_count;
  const Region* regions;
  void* const* values;  // the address of each argument
  uint64_t seed;
  int races, early, cooperative;
};

static void* const* values;

template <class P>
std::remove_cv_t<P> value(const void* from) {  // `from` need not be aligned
  std::remove_cv_t<P> x;
  memcpy(static_cast<void*>(&x), from, sizeof x);
  return x;
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), std::index_sequence<I...>) {
  kernel(value<P>(values[I])...);
}

// Returns nullptr, or an error message; then *site is the code address in this library.
template <auto kernel, class... P>
const char* launch(void (*)(P...), const Launch& l, const void** site) {
  gridDim = l.grid, blockDim = l.block, shared_bytes = l.shared_bytes, regions = l.regions, region_count = l.region_count, values = l.values;
  state = l.seed, races = l.races, early = l.early, cooperative = l.cooperative, count = blockDim.x * blockDim.y * blockDim.z;
  ++launches;
  body = [] { call(kernel, std::index_sequence_for<P...>()); };
  if (const char* text = refused()) return text;
  if (!open_memory()) return close_memory(), "no memory for the threads' stacks and shared memory";
  static Faults faults;
  faults.take();
  bool failed = sigsetjmp(escape, 1);
  if (!failed) run_grid();
  faults.give_back();
  close_memory();
  Dl_info library;
  *site = nullptr;
  if (failed && failed_at && dladdr(failed_at, &library))
    *site = reinterpret_cast<void*>(static_cast<const char*>(failed_at) - static_cast<char*>(library.dli_fbase));
  return failed ? message : nullptr;
}

// NumPy's name of a parameter's type; pointers' end in *.
template <class T>
const char* type_name() {
  using V = std::remove_cv_t<std::remove_pointer_t<T>>;
  constexpr bool pointer = std::is_pointer_v<T>;
  if constexpr (std::is_same_v<V, float>) return pointer ? "float32*" : "float32";
  else if constexpr (std::is_same_v<V, double>) return pointer ? "float64*" : "float64";
  else if constexpr (std::is_same_v<V, bool>) return pointer ? "bool*" : "bool";
  else if constexpr (std::is_integral_v<V>) {
    static char name[16];
    snprintf(name, sizeof name, "%sint%zu%s", std::is_signed_v<V> ? "" : "u", 8 * sizeof(V), pointer ? "*" : "");
    return name;
  } else if constexpr (pointer) return "*";
  else return "struct";
}

template <class... P>
const char* signature(void (*)(P...)) {
  static char text[1024];
  *text = 0;
  for (const char* name : {type_name<P>()..., ""}) strncat(strncat(text, name, sizeof text - strlen(text) - 1), " ", sizeof text - strlen(text) - 1);
  return text;
}

}  // namespace cuda_on_cpu

// Pages for a copy of one of the caller's arrays, with inaccessible ones before and after.
extern "C" __attribute__((visibility("default"))) char* cuda_on_cpu_allocate(size_t bytes) {
  using namespace cuda_on_cpu;
  char* p = reserve(pages(bytes) + 2 * GUARD);
  if (!p) return nullptr;
  mprotect(p, GUARD, PROT_NONE);
  mprotect(p + GUARD + pages(bytes), GUARD, PROT_NONE);
  return p + GUARD;
}

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_only_read(char* p, size_t bytes) {
  mprotect(p, cuda_on_cpu::pages(bytes), PROT_READ);
}

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_free(char* p, size_t bytes) {
  munmap(p - cuda_on_cpu::GUARD, cuda_on_cpu::pages(bytes) + 2 * cuda_on_cpu::GUARD);
}

// ---- CUDA's functions -------------------------------------------------------------------------------------------------------------------

#define __logf(x) logf(x)  // glibc declares these names and has no functions for them
#define __log2f(x) log2f(x)
#define __expf(x) expf(x)

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

template <class To, class From>
inline To cuda_on_cpu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}

inline int __float_as_int(float x) { return cuda_on_cpu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_bits<float>(x); }

// Each digit of `which` names one of the eight bytes of b and a, the lowest is a's.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned y = 0;
  for (unsigned i = 0; i < 4; ++i) y |= unsigned(bytes >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return y;
}

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

template <class T> inline T __ldg(const T* p) { return *p; }
inline void __threadfence() {}  // fibres see each other's writes at once
template <class T> inline T atomicAdd(T* p, T x) {  // fibres switch only at instructions that wait
  T before = *p;
  *p += x;
  return before;
}

__forceinline__ void __syncthreads() { cuda_on_cpu::together("__syncthreads", nullptr, nullptr); }

namespace cuda_on_cpu {

struct Shuffle {
  unsigned mask, from;
  void* value;
};

inline void check_mask(unsigned mask, const char* name) {
  if (mask != 0xFFFFFFFFu)
    fail(*current, __builtin_return_address(0), "%s: only the mask of all 32 lanes, 0xFFFFFFFF, is understood, not 0x%X", name, mask);
}

template <class T>
void shuffle(void* const* operands) {
  T values[WARP];
  for (unsigned i = 0; i < WARP; ++i) values[i] = *static_cast<T*>(static_cast<Shuffle*>(operands[i])->value);
  for (unsigned i = 0; i < WARP; ++i) {
    const Shuffle& s = *static_cast<Shuffle*>(operands[i]);
    *static_cast<T*>(s.value) = values[s.from];
  }
}

inline void warp_barrier(void* const* operands) { ++warp_barriers[static_cast<Thread*>(operands[0])->id / WARP]; }

}  // namespace cuda_on_cpu

__forceinline__ void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  cuda_on_cpu::check_mask(mask, "__syncwarp");
  cuda_on_cpu::together("__syncwarp", cuda_on_cpu::warp_barrier, cuda_on_cpu::current);
}

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int from) {
  cuda_on_cpu::check_mask(mask, "__shfl_sync");
  cuda_on_cpu::Shuffle s = {mask, unsigned(from) % cuda_on_cpu::WARP, &value};
  cuda_on_cpu::together("__shfl_sync", cuda_on_cpu::shuffle<T>, &s);
  return value;
}

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  cuda_on_cpu::check_mask(mask, "__shfl_xor_sync");
  cuda_on_cpu::Shuffle s = {mask, (cuda_on_cpu::current->id ^ unsigned(lanes)) % cuda_on_cpu::WARP, &value};
  cuda_on_cpu::together("__shfl_xor_sync", cuda_on_cpu::shuffle<T>, &s);
  return value;
}
