// opt_fast/kernels/sm90.cuh on a CPU: Hopper's copies, barriers and matrix products, written from the PTX ISA manual, not from the kernels. Sections:
// "mbarrier"; "cp.async.bulk.tensor"; "Tensor swizzling modes"; "barrier"; "Asynchronous warpgroup level matrix instructions": "Register fragments",
// "Shared memory matrix layout", "Strides", "Canonical layouts", "Matrix descriptor"; "red".
//
// Copies and products happen as late as the manual allows, or at once (`early`): a copy arrives at a random time, a whole box together, and its
// target is NaN until then; a product reads its operands, and writes its accumulators, which are NaN until then, at the wait for its group.
// Errors are
//   a copy to memory that a copy or a product still uses; a product on a copy that no thread of its warpgroup has waited for; a plain write, without
//     async_proxy_fence after it, to memory that a product or a store reads, or that a copy is in flight to (none of these with races=False)
//   more arrivals or bytes than were announced; and a phase whose successor has also ended before a thread that waits for it has noticed
//   a product's operands that change between the first of its warps to reach it and the last: a barrier is missing
//   an accumulator written between issue and wait; no wgmma_fence between a wait and a wgmma (the manual requires it where registers were touched)
//   a wgmma, a store, or the last copy to a barrier that nothing waits for; a barrier that is not initialised, or no longer
//   a deadlock; the message lists which warps wait for what
// Not detected: plain reads of memory in flight, except by the NaN that they return; an async_proxy_fence that another thread's makes up for;
// A's registers touched between issue and wait. mbarriers and named barriers do not count as barriers in the race checks of cp.async and ldmatrix.
#pragma once

#include "mma.cuh"

struct __align__(64) TensorMap { unsigned long long opaque[16]; };
typedef unsigned long long mbarrier_t;

namespace cuda_on_cpu {

struct Map {  // the contents that cuda_emulator.py gives a TensorMap; axis 0 is the innermost
  char* base;
  int64_t sizes[4], strides[3], box[4];  // strides in bytes, of axes 1 to 3
  uint64_t writeable, unused[2], mark;
};
static_assert(sizeof(Map) == sizeof(TensorMap));
constexpr uint64_t MARK = 0x54656E736F724D61, BARRIER_MARK = 0x6D62617200000000;
constexpr unsigned MOST_BYTES = (1 << 20) - 1, NAMED_BARRIERS = 16;

struct Mbarrier {  // the 8 bytes in shared memory hold BARRIER_MARK and its number
  const void* address;
  Access made;
  bool fenced;
  unsigned arrivals, pending;  // in each phase; still missing in this one
  int64_t bytes;               // announced and not yet arrived
  uint64_t phase, loads;       // phases complete; phases up to the last that a load belongs to
  uint64_t known[MOST_THREADS / GROUP];  // phases that each warpgroup knows to be complete
};

struct Tile {  // the use of 16 bytes of shared memory by TMA and wgmma
  bool flying;            // a load to them has not arrived
  unsigned thread, mbarrier;  // of the last load
  uint64_t phase;             // 1 + its phase; 0 without a load
  unsigned products, stores;  // that still read them
};

struct Box {
  Map map;
  int64_t at[4];
  unsigned shared;  // from the start of dynamic shared memory
  unsigned bytes;
};

struct Load {
  Box box;
  unsigned thread, mbarrier;
  uint64_t phase;
  const void* site;
};

struct Store {
  Box box;
  unsigned thread, group;
  const void* site;
};

struct NamedBarrier {
  unsigned threads, arrived, warps;  // threads expected; threads arrived; which warps
  uint64_t generation;
};

struct Accumulators {  // 64 x n values in four warps' registers, from the first product on them to the wait for the last
  float* registers[GROUP];
  unsigned n;
  uint64_t group;  // of the last product,
  const void* site;  // and where it is
  bool live, collected[GROUP / WARP];
  float values[64][256];
};

struct Product {
  unsigned n, accumulators;
  bool add, from_registers, transposed, computed;  // transposed: B is MN-major, and A where it is not from registers
  uint64_t group;
  const void* site;
  float a[64][16];  // from registers
  unsigned a_places[128], b_places[512];  // of 8 numbers each
};

struct Warpgroup {
  Array<Product> products;
  Array<Accumulators*> accumulators;
  uint64_t committed[GROUP / WARP], complete[GROUP / WARP];
  bool fenced[GROUP / WARP];
  unsigned first;       // the warp that has reached a product first,
  char found[640][16];  // and the operands that it saw there
  unsigned registers;
  const void* site;
};

static Array<Mbarrier> mbarriers;
static Array<Tile> tiles;
static Array<Load> loads;
static Array<Store> stores;
static unsigned store_groups[MOST_THREADS], pace, sleepy, sleepers;  // a load arrives with probability 1 / pace, a thread sleeps with 1 / sleepy
static unsigned sleepless;  // a warpgroup that never sleeps
static uint64_t wakings;
static char published[SHARED_MOST];  // shared memory as TMA and wgmma see it: their writes, and plain ones before the last async_proxy_fence
constexpr unsigned IN_FLIGHT = 0xFFBFFFFF;  // accumulators of running products: a NaN that any operation turns into another NaN
static NamedBarrier named_barriers[NAMED_BARRIERS];
static Warpgroup warpgroups[MOST_THREADS / GROUP];

inline int place_of(const void* p) { return int(static_cast<const char*>(p) - shared_memory); }

inline bool is_dynamic(const void* p, size_t bytes) {
  return p >= shared_memory && static_cast<const char*>(p) + bytes <= shared_memory + shared_bytes;
}

// 128-byte swizzle: permutes a row's 16-byte pieces by bits 7 to 9 of the address. Dynamic shared memory starts at a multiple of 1024.
inline unsigned swizzled(unsigned place) { return place ^ (place >> 3 & 0x70); }
static_assert(SHARED_BASE % 1024 == 0);

inline void check_published(const Thread& t, const void* site, unsigned place, const char* name) {
  if (races && memcmp(shared_memory + place, published + place, 16))
    fail(t, site, "race: %s reads the shared bytes at %u, where a plain write has no async_proxy_fence after it, or is late", name, place);
}

inline bool awake(const Thread& t) { return wakings > t.phase; }
inline void tell_nothing(const Thread&, char* text, size_t) { *text = 0; }

static const Event AWAKE = {awake, tell_nothing};

// Once a thread has released others, they may do a lot before it continues itself: so it sometimes sleeps here.
inline void sleep_perhaps(const void* site) {
  if (sleepy == 0 || current->id / GROUP == sleepless || drawn(sleepy) > 0) return;
  ++sleepers;
  alone("sleep", site, AWAKE, 0, wakings);
  --sleepers;
}

// ---- mbarriers --------------------------------------------------------------------------------------------------------------------------

inline const char* name_of(const void* b) {
  static char text[64];
  if (is_dynamic(b, 8)) snprintf(text, sizeof text, "the mbarrier at %d", place_of(b));
  else snprintf(text, sizeof text, "the mbarrier at %d of fixed shared memory", int(static_cast<const char*>(b) - fixed_memory));
  return text;
}

inline void check_place(const mbarrier_t* b, const void* site, const char* name) {
  const char* p = reinterpret_cast<const char*>(b);
  if (reinterpret_cast<uintptr_t>(b) % 8) fail(*current, site, "%s: the mbarrier's address %p is no multiple of 8", name, p);
  if (!is_dynamic(b, 8) && !(p >= fixed_memory && p + 8 <= fixed_memory + FIXED_MOST))
    fail(*current, site, "%s: the mbarrier at %p is not in shared memory", name, static_cast<const void*>(b));
}

// The number of the mbarrier at b, which the current thread may use.
inline unsigned mbarrier_at(const mbarrier_t* b, const void* site, const char* name) {
  check_place(b, site, name);
  uint64_t word;
  memcpy(&word, b, 8);
  uint64_t i = word - BARRIER_MARK;
  if (i >= mbarriers.count || mbarriers[i].address != b)
    fail(*current, site, "%s: %s is none: not initialised yet, or written over", name, name_of(b));
  const Mbarrier& m = mbarriers[i];
  if (!happened(m.made, *current))
    fail(*current, site, "race: %s: thread %u has initialised %s since the last barrier", name, m.made.thread, name_of(b));
  if (m.made.thread != current->id && !m.fenced)
    fail(*current, site, "race: %s: no mbarrier_init_fence has followed the initialisation of %s", name, name_of(b));
  return unsigned(i);
}

inline void perhaps_complete(Mbarrier& m, const Thread& t, const void* site) {
  if (m.pending > 0) return;
  if (m.bytes < 0)
    fail(t, site, "%lld bytes more than expected have come to %s in its phase %llu", -(long long)m.bytes, name_of(m.address),
         (unsigned long long)m.phase);
  if (m.bytes > 0) return;
  ++m.phase;
  m.pending = m.arrivals;
}

__attribute__((noinline)) inline void init(mbarrier_t* b, unsigned arrivals) {
  const void* site = __builtin_return_address(0);
  check_place(b, site, "mbarrier_init");
  uint64_t word;
  memcpy(&word, b, 8);
  if (word - BARRIER_MARK < mbarriers.count && mbarriers[word - BARRIER_MARK].address == b)
    fail(*current, site, "mbarrier_init: %s is one already", name_of(b));
  if (arrivals == 0 || arrivals > MOST_BYTES) fail(*current, site, "mbarrier_init: %u arrivals; 1 to %u are possible", arrivals, MOST_BYTES);
  word = BARRIER_MARK + mbarriers.count;
  memcpy(static_cast<void*>(b), &word, 8);
  Mbarrier m = {};
  m.address = b;
  m.made = now(*current);
  m.arrivals = m.pending = arrivals;
  mbarriers.push_back(m);
}

inline void init_fence() {
  for (Mbarrier& m : mbarriers) m.fenced |= m.made.thread == current->id;
}

__attribute__((noinline)) inline void arrive(mbarrier_t* b, unsigned bytes, const char* name) {
  const void* site = __builtin_return_address(0);
  Mbarrier& m = mbarriers[mbarrier_at(b, site, name)];
  if (bytes > MOST_BYTES) fail(*current, site, "%s: %u bytes; %u are the most", name, bytes, MOST_BYTES);
  if (m.pending == 0)
    fail(*current, site, "%s: one more than the %u arrivals of %s, whose phase %llu still waits for %lld bytes", name, m.arrivals, name_of(b),
         (unsigned long long)m.phase, (long long)m.bytes);
  m.bytes += bytes;
  --m.pending;
  perhaps_complete(m, *current, site);
  sleep_perhaps(site);
}

inline bool phase_over(const Thread& t) { return mbarriers[t.place].phase > t.phase; }

inline void tell_phase(const Thread& t, char* text, size_t size) {
  const Mbarrier& m = mbarriers[t.place];
  snprintf(text, size, "mbarrier_wait for parity %u (phase %llu) of %s: %u of %u arrivals and %lld bytes are missing", unsigned(t.phase & 1),
           (unsigned long long)t.phase, name_of(m.address), m.pending, m.arrivals, (long long)m.bytes);
}

static const Event PHASE_OVER = {phase_over, tell_phase};

__attribute__((noinline)) inline void wait_phase(mbarrier_t* b, unsigned parity) {
  const void* site = __builtin_return_address(0);
  unsigned i = mbarrier_at(b, site, "mbarrier_wait");
  uint64_t phase = mbarriers[i].phase, known = phase;  // the phases before it are complete
  if (parity > 1) fail(*current, site, "mbarrier_wait: the parity is %u, not 0 or 1", parity);
  if ((phase & 1) == parity) {
    alone("mbarrier_wait", site, PHASE_OVER, i, phase);
    known = phase + 1;
    if (mbarriers[i].phase > known)
      fail(*current, site, "race: %s has completed phases %llu and %llu while this thread waited for the first: it may miss it",
           name_of(b), (unsigned long long)phase, (unsigned long long)known);
  } else sleep_perhaps(site);
  uint64_t& group = mbarriers[i].known[current->id / GROUP];
  group = max(group, known);
}

// ---- TMA --------------------------------------------------------------------------------------------------------------------------------

// The box of a copy, after checking everything that can be wrong with it.
inline Box box_of(const TensorMap& map, const void* shared, const int (&at)[4], const void* site, const char* name) {
  Thread& t = *current;
  Box b = {};
  memcpy(&b.map, &map, sizeof map);
  if (b.map.mark != MARK) fail(t, site, "%s: this is no tensor map", name);
  b.bytes = unsigned(2 * b.map.box[0] * b.map.box[1] * b.map.box[2] * b.map.box[3]);
  for (int i = 0; i < 4; ++i) b.at[i] = at[i];
  int64_t place = place_of(shared);
  if (!is_dynamic(shared, b.bytes))
    fail(t, site, "%s: the %u bytes at %lld are outside the %u bytes of dynamic shared memory", name, b.bytes, (long long)place, shared_bytes);
  if (place % 1024) fail(t, site, "%s: the shared place %lld is no multiple of 1024, as 128-byte swizzle wants it", name, (long long)place);
  if (reinterpret_cast<uintptr_t>(b.map.base) % 16) fail(t, site, "%s: the array begins at %p, which is no multiple of 16", name, b.map.base);
  b.shared = unsigned(place);
  return b;
}

// Calls copy(shared, global, first, last) for elements first to last of every 8; both addresses are those of the first of the 8.
template <class Copy8>
inline void each_piece(const Box& b, Copy8 copy) {
  const Map& m = b.map;
  unsigned place = b.shared;
  int64_t c[4];
  for (c[3] = b.at[3]; c[3] < b.at[3] + m.box[3]; ++c[3])
    for (c[2] = b.at[2]; c[2] < b.at[2] + m.box[2]; ++c[2])
      for (c[1] = b.at[1]; c[1] < b.at[1] + m.box[1]; ++c[1]) {
        bool inside = true;
        for (int i = 1; i < 4; ++i) inside &= c[i] >= 0 && c[i] < m.sizes[i];
        int64_t row = c[1] * m.strides[0] + c[2] * m.strides[1] + c[3] * m.strides[2];
        for (c[0] = b.at[0]; c[0] < b.at[0] + m.box[0]; c[0] += 8, place += 16) {
          int64_t first = c[0] < 0 ? -c[0] : 0, last = m.sizes[0] - c[0];
          first = first > 8 ? 8 : first;
          last = inside ? last > 8 ? 8 : last : 0;
          copy(shared_memory + swizzled(place), reinterpret_cast<intptr_t>(m.base) + row + 2 * c[0], first, last < first ? first : last);
        }
      }
}

inline void fetch(const Box& b) {
  each_piece(b, [](char* shared, intptr_t global, int64_t first, int64_t last) {
    if (last - first < 8) memset(shared, 0, 16);
    memcpy(shared + 2 * first, reinterpret_cast<const char*>(global + 2 * first), 2 * size_t(last - first));
  });
  memcpy(published + b.shared, shared_memory + b.shared, b.bytes);
}

inline void put(const Box& b) {
  each_piece(b, [](char* shared, intptr_t global, int64_t first, int64_t last) {
    memcpy(reinterpret_cast<char*>(global + 2 * first), shared + 2 * first, 2 * size_t(last - first));
  });
}

inline void check_unused(const Box& b, const void* site) {
  for (unsigned place = b.shared; races && place < b.shared + b.bytes; place += 16) {
    const Tile& tile = tiles[place / 16];
    const char* reader = tile.products ? "wgmma" : tile.stores ? "tma_store_4d" : nullptr;
    if (tile.flying) fail(*current, site, "race: tma_load_4d to the shared bytes at %u, where thread %u's has not landed yet", place, tile.thread);
    if (reader) fail(*current, site, "race: tma_load_4d to the shared bytes at %u, which a %s that was not waited for still reads", place, reader);
  }
}

inline void land_load(unsigned i) {
  Load load = loads[i];
  loads[i] = loads[loads.count - 1];
  --loads.count;
  for (unsigned place = load.box.shared; races && place < load.box.shared + load.box.bytes; ++place)
    if (shared_memory[place] != char(0xFF))
      fail(threads[load.thread], load.site, "race: some thread has written the shared byte at %u, to which this load was on its way", place);
  fetch(load.box);
  for (unsigned place = load.box.shared; place < load.box.shared + load.box.bytes; place += 16) tiles[place / 16].flying = false;
  Mbarrier& m = mbarriers[load.mbarrier];
  if (m.phase != load.phase)
    fail(threads[load.thread], load.site, "the %u bytes of this load land after phase %llu of %s, in which it was issued: too few were expected",
         load.box.bytes, (unsigned long long)load.phase, name_of(m.address));
  m.bytes -= load.box.bytes;
  perhaps_complete(m, threads[load.thread], load.site);
}

__attribute__((noinline)) inline void issue_load(void* shared, const TensorMap& map, mbarrier_t* b, const int (&at)[4]) {
  const void* site = __builtin_return_address(0);
  Box box = box_of(map, shared, at, site, "tma_load_4d");
  unsigned i = mbarrier_at(b, site, "tma_load_4d");
  Mbarrier& m = mbarriers[i];
  if (!m.fenced) fail(*current, site, "race: tma_load_4d: no mbarrier_init_fence has followed the initialisation of %s", name_of(b));
  check_unused(box, site);
  for (unsigned place = box.shared; place < box.shared + box.bytes; place += 16) {
    Tile& tile = tiles[place / 16];
    tile.flying = true;
    tile.thread = current->id;
    tile.mbarrier = i;
    tile.phase = m.phase + 1;
  }
  m.loads = m.phase + 1;
  memset(shared_memory + box.shared, 0xFF, box.bytes);
  memset(published + box.shared, 0xFF, box.bytes);
  loads.push_back({box, current->id, i, m.phase, site});
  if (early) land_load(unsigned(loads.count - 1));
}

__attribute__((noinline)) inline void issue_store(const TensorMap& map, const void* shared, const int (&at)[4]) {
  const void* site = __builtin_return_address(0);
  Box box = box_of(map, shared, at, site, "tma_store_4d");
  if (!box.map.writeable) fail(*current, site, "tma_store_4d: the array may only be read");
  for (unsigned place = box.shared; place < box.shared + box.bytes; place += 16) {
    Tile& tile = tiles[place / 16];
    if (races && tile.flying)
      fail(*current, site, "race: tma_store_4d of the shared bytes at %u, where thread %u's load has not landed", place, tile.thread);
    check_published(*current, site, place, "tma_store_4d");
    ++tile.stores;
  }
  stores.push_back({box, current->id, store_groups[current->id], site});
  if (early) put(box);
}

inline void wait_stores(unsigned pending) {
  Thread& t = *current;
  size_t kept = 0;
  for (Store& store : stores) {
    if (store.thread != t.id || store.group + pending >= store_groups[t.id]) {
      stores[kept++] = store;
      continue;
    }
    for (unsigned place = store.box.shared; place < store.box.shared + store.box.bytes; place += 16) {
      check_published(t, store.site, place, "tma_store_4d");
      --tiles[place / 16].stores;
    }
    if (!early) put(store.box);
  }
  stores.count = kept;
}

// ---- named barriers ---------------------------------------------------------------------------------------------------------------------

struct Arrival {
  int id, threads;
  uint64_t generation;
  Thread* thread;
};

inline void arrive_named(void* const* operands) {  // one warp
  const Arrival& first = *static_cast<Arrival*>(operands[0]);
  Thread& t = *first.thread;
  for (unsigned i = 1; i < WARP; ++i) {
    const Arrival& a = *static_cast<Arrival*>(operands[i]);
    if (a.id != first.id || a.threads != first.threads)
      fail(*a.thread, t.site, "%s(%d, %d), and lane 0 of its warp (%d, %d)", t.waits_at, a.id, a.threads, first.id, first.threads);
  }
  if (first.id < 1 || first.id >= int(NAMED_BARRIERS))
    fail(t, t.site, "%s: barrier %d; they are 1 to 15, and 0 is __syncthreads'", t.waits_at, first.id);
  if (first.threads <= 0 || first.threads % WARP || unsigned(first.threads) > count)
    fail(t, t.site, "%s: %d threads; it must be a multiple of 32, and the block has %u", t.waits_at, first.threads, count);
  NamedBarrier& b = named_barriers[first.id];
  if (b.arrived && b.threads != unsigned(first.threads))
    fail(t, t.site, "%s: barrier %d for %d threads, and others have come to it for %u", t.waits_at, first.id, first.threads, b.threads);
  if (b.warps >> t.id / WARP & 1)
    fail(t, t.site, "%s: warp %u comes to barrier %d a second time before it is complete", t.waits_at, t.id / WARP, first.id);
  for (unsigned i = 0; i < WARP; ++i) static_cast<Arrival*>(operands[i])->generation = b.generation;
  b.threads = unsigned(first.threads);
  b.arrived += WARP;
  b.warps |= 1u << t.id / WARP;
  if (b.arrived < b.threads) return;
  b.arrived = b.warps = 0;
  ++b.generation;
}

inline bool barrier_over(const Thread& t) { return named_barriers[t.place].generation > t.phase; }

inline void tell_barrier(const Thread& t, char* text, size_t size) {
  const NamedBarrier& b = named_barriers[t.place];
  snprintf(text, size, "named_barrier_sync %u, to which %u of %u threads have come", t.place, b.arrived, b.threads);
}

static const Event BARRIER_OVER = {barrier_over, tell_barrier};

__attribute__((noinline)) inline void wait_named(const Arrival& a, const void* site) {
  if (named_barriers[a.id].generation == a.generation) alone("named_barrier_sync", site, BARRIER_OVER, unsigned(a.id), a.generation);
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------------------------

struct Wgmma {
  float* d;
  const unsigned* a;  // nullptr: from shared memory
  unsigned long long a_descriptor, b_descriptor;
  unsigned n;
  bool add, transposed;
  Thread* thread;
};

struct Descriptor {
  unsigned start, leading, stride;
};

inline Descriptor described(const Thread& t, unsigned long long bits, const char* name) {
  Descriptor d = {unsigned(bits & 0x3FFF) << 4, unsigned(bits >> 16 & 0x3FFF) << 4, unsigned(bits >> 32 & 0x3FFF) << 4};
  if (bits >> 62 != 1 || (bits >> 49 & 7)) fail(t, t.site, "wgmma: %s's descriptor %#llx has no 128-byte swizzle, or a base offset", name, bits);
  if (d.start / 128 % 8)
    fail(t, t.site, "wgmma: %s begins at %d: 128-byte swizzle wants the first of 8 rows at a multiple of 1024", name, int(d.start - SHARED_BASE));
  return d;
}

inline unsigned piece(const Thread& t, unsigned address, const char* name) {
  unsigned place = swizzled(address) - SHARED_BASE;
  if (address < SHARED_BASE || place + 16 > shared_bytes)
    fail(t, t.site, "wgmma: %s reaches %d, outside the %u bytes of dynamic shared memory", name, int(place), shared_bytes);
  return place;
}

// rows x 16, K-major: places[2 row + half] is the position of 8 elements of a row. The leading offset is not used.
inline void find_rows(const Thread& t, unsigned long long bits, unsigned rows, unsigned* places, const char* name) {
  Descriptor d = described(t, bits, name);
  if (d.start % 32) fail(t, t.site, "wgmma: %s begins at %d, which is no multiple of 32", name, int(d.start - SHARED_BASE));
  for (unsigned row = 0; row < rows; ++row)
    for (unsigned half = 0; half < 2; ++half) places[2 * row + half] = piece(t, d.start + row / 8 * d.stride + row % 8 * 128 + 16 * half, name);
}

// 16 x n, MN-major: places[k n / 8 + j] is the position of elements 8 j to 8 j + 7 of row k.
inline void find_columns(const Thread& t, unsigned long long bits, unsigned n, unsigned* places, const char* name) {
  Descriptor d = described(t, bits, name);
  if (d.start % 1024) fail(t, t.site, "wgmma: %s, MN-major, begins at %d, which is no multiple of 1024", name, int(d.start - SHARED_BASE));
  for (unsigned k = 0; k < 16; ++k)
    for (unsigned j = 0; j < n / 8; ++j)
      places[k * (n / 8) + j] = piece(t, d.start + j / 8 * d.leading + k / 8 * d.stride + k % 8 * 128 + j % 8 * 16, name);
}

inline void begin_reading(const Thread& t, unsigned place) {
  Tile& tile = tiles[place / 16];
  if (races && (tile.flying || (tile.phase && mbarriers[tile.mbarrier].known[t.id / GROUP] < tile.phase)))
    fail(t, t.site, "race: wgmma reads the shared bytes at %u, which thread %u's tma_load_4d fills; "
         "no thread of the warpgroup has waited for phase %llu of %s",
         place, tile.thread, (unsigned long long)tile.phase - 1, name_of(mbarriers[tile.mbarrier].address));
  check_published(t, t.site, place, "wgmma");
  ++tile.products;
}

inline void end_reading(const Thread& t, const void* site, unsigned place) {
  check_published(t, site, place, "wgmma");
  --tiles[place / 16].products;
}

inline void widen8(unsigned place, double* numbers) {
  uint16_t halves[8];
  memcpy(halves, shared_memory + place, 16);
  for (unsigned i = 0; i < 8; ++i) numbers[i] = widened(halves[i]);
}

// The row and column, in a 64 x n tile, of element i of a lane of warp w.
inline unsigned row_of(unsigned w, unsigned lane, unsigned i) { return 16 * w + lane / 4 + 8 * (i / 2 % 2); }
inline unsigned column_of(unsigned lane, unsigned i) { return 8 * (i / 4) + lane % 4 * 2 + i % 2; }

// The 16 products of each element are summed in a precision in which only one rounding shows, as in mma.cuh.
inline void compute(Warpgroup& g, Product& p) {
  static double A[64][16], B[16][256];
  unsigned n = p.n;
  for (unsigned i = 0; i < 128; ++i) {
    double numbers[8];
    if (!p.from_registers) widen8(p.a_places[i], numbers);
    for (unsigned j = 0; j < 8; ++j) {
      if (p.from_registers) A[i / 2][i % 2 * 8 + j] = p.a[i / 2][i % 2 * 8 + j];
      else if (p.transposed) A[i % 8 * 8 + j][i / 8] = numbers[j];
      else A[i / 2][i % 2 * 8 + j] = numbers[j];
    }
  }
  for (unsigned i = 0; i < 2 * n; ++i) {
    double numbers[8];
    widen8(p.b_places[i], numbers);
    for (unsigned j = 0; j < 8; ++j) {
      if (p.transposed) B[i / (n / 8)][i % (n / 8) * 8 + j] = numbers[j];
      else B[i % 2 * 8 + j][i / 2] = numbers[j];
    }
  }
  auto& values = g.accumulators[p.accumulators]->values;
  for (unsigned row = 0; row < 64; ++row)
    for (unsigned column = 0; column < n; column += 8) {
      double sums[8] = {};
      for (unsigned k = 0; k < 16; ++k)
        for (unsigned j = 0; j < 8; ++j) sums[j] += A[row][k] * B[k][column + j];
      for (unsigned j = 0; j < 8; ++j) values[row][column + j] = float((p.add ? values[row][column + j] : 0) + sums[j]);
    }
  p.computed = true;
}

inline void give(const Accumulators& x, unsigned w) {  // to a warp's registers
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned i = 0; i < x.n / 2; ++i) x.registers[w * WARP + lane][i] = x.values[row_of(w, lane, i)][column_of(lane, i)];
}

// Checks that a warp's accumulators have not been touched since its products were issued.
inline void check_untouched(const Accumulators& x, unsigned w, const Thread& t) {
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned i = 0; i < x.n / 2; ++i) {
      const void* left = early ? static_cast<const void*>(&x.values[row_of(w, lane, i)][column_of(lane, i)]) : &IN_FLIGHT;
      if (memcmp(&x.registers[w * WARP + lane][i], left, 4))
        fail(threads[t.id / WARP * WARP + lane], x.site, "its accumulator %u has been written since this wgmma, which was not waited for", i);
    }
}

// The accumulators of an unfinished product, or new ones: then it takes over the registers' values and leaves NaN in them.
inline unsigned find_accumulators(Warpgroup& g, void* const* operands, const Wgmma& o) {
  unsigned free = unsigned(g.accumulators.count);
  for (unsigned i = 0; i < g.accumulators.count; ++i) {
    const Accumulators& x = *g.accumulators[i];
    if (!x.live) free = i;
    else if (o.d < x.registers[0] + x.n / 2 && x.registers[0] < o.d + o.n / 2) {
      if (x.registers[0] != o.d || x.n != o.n)
        fail(*o.thread, o.thread->site, "wgmma: its accumulators are a part of those of one that was not waited for");
      return i;
    }
  }
  if (free == g.accumulators.count) g.accumulators.push_back(static_cast<Accumulators*>(malloc(sizeof(Accumulators))));
  Accumulators& x = *g.accumulators[free];
  x.live = true;
  x.n = o.n;
  for (unsigned t = 0; t < GROUP; ++t) {
    x.registers[t] = static_cast<Wgmma*>(operands[t])->d;
    for (unsigned i = 0; i < o.n / 2; ++i) x.values[row_of(t / WARP, t % WARP, i)][column_of(t % WARP, i)] = x.registers[t][i];
    for (unsigned i = 0; i < o.n / 2; ++i) memcpy(&x.registers[t][i], &IN_FLIGHT, 4);
  }
  return free;
}

// A from registers, in the layout of mma.m16n8k16's A for each warp's 16 rows.
inline void take_a(Product& p, void* const* operands) {
  for (unsigned t = 0; t < GROUP; ++t)
    for (unsigned i = 0; i < 8; ++i) {
      unsigned row = t / WARP * 16 + t % WARP / 4 + i / 2 % 2 * 8, column = t % 4 * 2 + i % 2 + i / 4 * 8;
      p.a[row][column] = half_of(static_cast<Wgmma*>(operands[t])->a[i / 2], i % 2);
    }
}

inline void check_group(const Warpgroup& g, const Thread& t) {
  for (unsigned w = 0; w < GROUP / WARP; ++w) {
    if (!g.fenced[w]) fail(threads[t.id + w * WARP], t.site, "wgmma: no wgmma_fence before it, since this warp's last wgmma_wait");
    if (g.committed[w] != g.committed[0] || g.complete[w] != g.complete[0])
      fail(threads[t.id + w * WARP], t.site, "wgmma: this warp has committed %llu groups and waited for %llu; warp %u %llu and %llu",
           (unsigned long long)g.committed[w], (unsigned long long)g.complete[w], t.id / WARP, (unsigned long long)g.committed[0],
           (unsigned long long)g.complete[0]);
  }
}

inline void find_operands(Product& p, const Wgmma& o) {
  const Thread& t = *o.thread;
  p.n = o.n, p.add = o.add, p.from_registers = o.a != nullptr, p.transposed = o.transposed, p.computed = false, p.site = t.site;
  auto find = o.transposed ? find_columns : find_rows;
  if (!o.a) find(t, o.a_descriptor, 64, p.a_places, "A");
  find(t, o.b_descriptor, o.n, p.b_places, "B");
}

// calls f(i, place) for the 16-byte pieces of shared memory that a product reads
template <class F>
inline void each_operand(const Product& p, F f) {
  for (unsigned i = 0; i < 128 && !p.from_registers; ++i) f(i, p.a_places[i]);
  for (unsigned i = 0; i < 2 * p.n; ++i) f(128 + i, p.b_places[i]);
}

// On a GPU each warp continues by itself, so the operands that the first one sees must still be there for the last.
inline void look_first(void* const* operands) {
  const Wgmma& o = *static_cast<Wgmma*>(operands[0]);
  Warpgroup& g = warpgroups[o.thread->id / GROUP];
  static Product p;
  find_operands(p, o);
  each_operand(p, [&](unsigned i, unsigned place) { memcpy(g.found[i], shared_memory + place, 16); });
  g.first = o.thread->id / WARP;
}

inline void look_again(const Warpgroup& g, const Product& p, const Thread& t) {
  each_operand(p, [&](unsigned i, unsigned place) {
    if (races && memcmp(g.found[i], shared_memory + place, 16))
      fail(t, t.site, "race: wgmma reads the shared bytes at %u, which have changed since warp %u reached it: a barrier is missing", place, g.first);
  });
}

inline void issue_product(void* const* operands) {
  const Wgmma& o = *static_cast<Wgmma*>(operands[0]);
  Thread& t = *o.thread;
  Warpgroup& g = warpgroups[t.id / GROUP];
  for (unsigned i = 1; i < GROUP; ++i) {
    const Wgmma& x = *static_cast<Wgmma*>(operands[i]);
    if (x.n != o.n || x.add != o.add || x.transposed != o.transposed || x.b_descriptor != o.b_descriptor || x.a_descriptor != o.a_descriptor)
      fail(*x.thread, t.site, "wgmma: N, the descriptors or `add` are not those of thread %u of its warpgroup", t.id);
  }
  check_group(g, t);
  static Product p;
  find_operands(p, o);
  p.group = g.committed[0];
  if (o.a) take_a(p, operands);
  each_operand(p, [&](unsigned, unsigned place) { begin_reading(t, place); });
  look_again(g, p, t);
  p.accumulators = find_accumulators(g, operands, o);
  Accumulators& x = *g.accumulators[p.accumulators];
  x.group = p.group;
  x.site = t.site;
  for (bool& collected : x.collected) collected = false;
  g.products.push_back(p);
  if (!early) return;
  compute(g, g.products[g.products.count - 1]);
  for (unsigned w = 0; w < GROUP / WARP; ++w) give(x, w);
}

inline Warpgroup& group_of(void* const* operands, unsigned& warp) {
  unsigned id = static_cast<Thread*>(operands[0])->id;
  warp = id / WARP % (GROUP / WARP);
  return warpgroups[id / GROUP];
}

inline void fence_products(void* const* operands) {
  unsigned w;
  Warpgroup& g = group_of(operands, w);
  g.fenced[w] = true;
}

inline void commit_products(void* const* operands) {
  unsigned w;
  Warpgroup& g = group_of(operands, w);
  ++g.committed[w];
}

// The first warp to wait for a group computes its products, for all four; each warp then gets its own values.
template <int N>
void wait_products(void* const* operands) {
  unsigned w;
  Warpgroup& g = group_of(operands, w);
  const Thread& t = *static_cast<Thread*>(operands[0]);
  if (g.committed[w] > N) g.complete[w] = max(g.complete[w], g.committed[w] - N);
  g.fenced[w] = false;
  size_t kept = 0;
  for (Product& p : g.products) {
    if (p.group >= g.complete[w]) {
      if (kept != size_t(&p - g.products.begin())) g.products[kept] = p;
      ++kept;
      continue;
    }
    each_operand(p, [&](unsigned, unsigned place) { end_reading(t, p.site, place); });
    if (!p.computed) compute(g, p);
  }
  g.products.count = kept;
  for (Accumulators* x : g.accumulators) {
    if (!x->live || x->collected[w] || x->group >= g.complete[w]) continue;
    check_untouched(*x, w, t);
    if (!early) give(*x, w);
    x->collected[w] = true;
    x->live = !(x->collected[0] && x->collected[1] && x->collected[2] && x->collected[3]);
  }
}

template <int R>
void set_registers(void* const* operands) {
  const Thread& t = *static_cast<Thread*>(operands[0]);
  warpgroups[t.id / GROUP].registers = R;
  warpgroups[t.id / GROUP].site = t.site;
}

// ---- sums in global memory --------------------------------------------------------------------------------------------------------------

// Adds one thread's four values in memory; other blocks' additions come before or after, never between.
__attribute__((noinline)) inline void reduce(float* p, const float (&x)[4]) {
  const void* site = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(p) % 16) fail(*current, site, "reduce_add_v4: the address %p is no multiple of 16", static_cast<void*>(p));
  if (!registered(p, 16)) fail(*current, site, "reduce_add_v4: the 16 bytes at %p are in none of the arrays", static_cast<void*>(p));
  for (int i = 0; i < 4; ++i) p[i] += x[i];
}

// ---- a block ----------------------------------------------------------------------------------------------------------------------------

inline void begin_engine() {
  static const unsigned PACES[] = {1, 4, 32, 0x7FFFFFFF}, SLEEPY[] = {0, 1, 1, 4};  // the last pace: only when nothing else can happen
  pace = PACES[drawn(4)];
  sleepy = SLEEPY[drawn(4)];
  sleepless = drawn(count / GROUP + 1);
  wakings = sleepers = 0;
  mbarriers.count = loads.count = stores.count = 0;
  memset(published, 0xFF, shared_bytes);
  tiles.resize(shared_bytes / 16);
  if (tiles.count) memset(static_cast<void*>(tiles.items), 0, tiles.count * sizeof(Tile));
  memset(store_groups, 0, sizeof store_groups);
  memset(named_barriers, 0, sizeof named_barriers);
  for (Warpgroup& g : warpgroups) {
    g.products.count = 0;
    for (Accumulators* x : g.accumulators) x->live = false;
    memset(g.committed, 0, sizeof g.committed);
    memset(g.complete, 0, sizeof g.complete);
    memset(g.fenced, 0, sizeof g.fenced);
    g.registers = 0;
  }
}

inline bool land_one() {
  if (loads.count) land_load(drawn(unsigned(loads.count)));
  else return false;
  return true;
}

inline void step() {
  if (loads.count && drawn(pace) == 0) land_one();
  if (sleepers && drawn(256) == 0) ++wakings;
}

inline bool idle() {
  if (sleepers == 0 || (loads.count && drawn(2))) return land_one();
  ++wakings;
  return true;
}

inline void check_end() {
  while (land_one()) {}
  for (const Store& s : stores) fail(threads[s.thread], s.site, "exits, and has not waited for this tma_store_4d");
  for (const Mbarrier& m : mbarriers) {
    bool waited = m.loads == 0;
    for (uint64_t known : m.known) waited |= known >= m.loads;
    if (!waited) fail(threads[m.made.thread], nullptr, "the block ends, and nobody has waited for the last loads of %s", name_of(m.address));
  }
  unsigned registers = 0, most = min(65536 / count / 8 * 8, 255u) * count;  // a block has only the registers that it was started with
  for (unsigned i = 0; i < count / GROUP; ++i) {
    Warpgroup& g = warpgroups[i];
    if (g.products.count) fail(threads[i * GROUP], g.products[0].site, "the block ends, and warpgroup %u has not waited for this wgmma", i);
    for (const Accumulators* x : g.accumulators)
      if (x->live) fail(threads[i * GROUP], x->site, "the block ends, and not all warps of warpgroup %u have waited for this wgmma", i);
    registers += g.registers;
    if (registers * GROUP > most)
      fail(threads[i * GROUP], g.site, "the warpgroups ask for %u registers together; a block of %u threads has %u", registers * GROUP, count, most);
  }
}

[[maybe_unused]] static const bool has_engine = (engine = {begin_engine, step, idle, check_end}, true);

}  // namespace cuda_on_cpu

// ---- what a kernel calls ------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(mbarrier_t* b, unsigned arrivals) { cuda_on_cpu::init(b, arrivals); }
__device__ __forceinline__ void mbarrier_init_fence() { cuda_on_cpu::init_fence(); }
__device__ __forceinline__ void mbarrier_arrive(mbarrier_t* b) { cuda_on_cpu::arrive(b, 0, "mbarrier_arrive"); }
__device__ __forceinline__ void mbarrier_arrive_expect(mbarrier_t* b, unsigned bytes) { cuda_on_cpu::arrive(b, bytes, "mbarrier_arrive_expect"); }
__device__ __forceinline__ void mbarrier_wait(mbarrier_t* b, unsigned parity) { cuda_on_cpu::wait_phase(b, parity); }

__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap& map, mbarrier_t* b, int c0, int c1, int c2, int c3) {
  cuda_on_cpu::issue_load(shared, map, b, {c0, c1, c2, c3});
}

__device__ __forceinline__ void tma_store_4d(const TensorMap& map, const void* shared, int c0, int c1, int c2, int c3) {
  cuda_on_cpu::issue_store(map, shared, {c0, c1, c2, c3});
}

__device__ __forceinline__ void tma_store_commit() { ++cuda_on_cpu::store_groups[cuda_on_cpu::current->id]; }

template <int N>
__device__ __forceinline__ void tma_store_wait() {
  cuda_on_cpu::wait_stores(N);
}

__device__ __forceinline__ void async_proxy_fence() {
  memcpy(cuda_on_cpu::published, cuda_on_cpu::shared_memory, cuda_on_cpu::shared_bytes);
}

// Only the GPU's compiler needs this; here the order is the source's.
__device__ __forceinline__ void before_waiting(float x) {}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  cuda_on_cpu::Arrival a = {id, threads, 0, cuda_on_cpu::current};
  cuda_on_cpu::together("named_barrier_sync", cuda_on_cpu::arrive_named, &a);
  cuda_on_cpu::wait_named(a, cuda_on_cpu::current->site);
  cuda_on_cpu::sleep_perhaps(cuda_on_cpu::current->site);
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  cuda_on_cpu::Arrival a = {id, threads, 0, cuda_on_cpu::current};
  cuda_on_cpu::together("named_barrier_arrive", cuda_on_cpu::arrive_named, &a);
  cuda_on_cpu::sleep_perhaps(cuda_on_cpu::current->site);
}

__device__ __forceinline__ void reduce_add_v4(float* p, float x, float y, float z, float w) { cuda_on_cpu::reduce(p, {x, y, z, w}); }

template <int R>
__device__ __forceinline__ void registers_more() {
  static_assert(R % 8 == 0 && 24 <= R && R <= 256, "a multiple of 8 in 24 to 256");
  cuda_on_cpu::together("registers_more", cuda_on_cpu::set_registers<R>, cuda_on_cpu::current, true);
}

template <int R>
__device__ __forceinline__ void registers_fewer() {
  static_assert(R % 8 == 0 && 24 <= R && R <= 256, "a multiple of 8 in 24 to 256");
  cuda_on_cpu::together("registers_fewer", cuda_on_cpu::set_registers<R>, cuda_on_cpu::current, true);
}

__device__ __forceinline__ unsigned long long descriptor(const void* tile, unsigned leading_bytes, unsigned stride_bytes) {
  auto encoded = [](unsigned x) { return (unsigned long long)((x & 0x3FFFF) >> 4); };
  return encoded(shared_address(tile)) | encoded(leading_bytes) << 16 | encoded(stride_bytes) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() { cuda_on_cpu::together("wgmma_fence", cuda_on_cpu::fence_products, cuda_on_cpu::current); }
__device__ __forceinline__ void wgmma_commit() { cuda_on_cpu::together("wgmma_commit", cuda_on_cpu::commit_products, cuda_on_cpu::current); }

template <int N>
__device__ __forceinline__ void wgmma_wait() {
  cuda_on_cpu::together("wgmma_wait", cuda_on_cpu::wait_products<N>, cuda_on_cpu::current);
}

template <int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], unsigned long long a, unsigned long long b, bool add) {
  static_assert(N % 8 == 0 && 8 <= N && N <= 256, "a multiple of 8 up to 256");
  cuda_on_cpu::Wgmma operands = {d, nullptr, a, b, N, add, false, cuda_on_cpu::current};
  cuda_on_cpu::together("wgmma_ss", cuda_on_cpu::issue_product, &operands, true, cuda_on_cpu::look_first);
}

template <int N>
__device__ __forceinline__ void wgmma_tt(float (&d)[N / 2], unsigned long long a, unsigned long long b, bool add) {
  static_assert(N % 8 == 0 && 8 <= N && N <= 256, "a multiple of 8 up to 256");
  cuda_on_cpu::Wgmma operands = {d, nullptr, a, b, N, add, true, cuda_on_cpu::current};
  cuda_on_cpu::together("wgmma_tt", cuda_on_cpu::issue_product, &operands, true, cuda_on_cpu::look_first);
}

template <int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, bool add) {
  static_assert(N % 8 == 0 && 8 <= N && N <= 256, "a multiple of 8 up to 256");
  cuda_on_cpu::Wgmma operands = {d, a, 0, b, N, add, true, cuda_on_cpu::current};
  cuda_on_cpu::together("wgmma_rs", cuda_on_cpu::issue_product, &operands, true, cuda_on_cpu::look_first);
}
