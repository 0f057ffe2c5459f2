// emu.h: CUDA kernels executed on the CPU, for tests: what cuda/prim.cuh calls, and how a test launches.
// Method  Every thread of the grid is a fiber; all blocks of a launch are resident and interleave. A fiber stops only
//         at a primitive, where the schedule, a function of the seed, picks who goes on. What the hardware leaves open
//         is left open here too, and chosen against the kernel:
//         - shared memory starts as NaN (all bits set);
//         - the destination of cp.async is NaN from its issue on, and the bytes come as late as the wait or earlier, by
//           a coin; the source is read when they come. load_box likewise: its bytes come when no thread can go on
//           without them, or at any switch of threads;
//         - global stores stay in the block until a fence: see store_global;
//         - every warp collective checks that all lanes came to the same line.
// Limits  x86-64 (the switch of fibers is assembly); one launch at a time. Not modelled: rounding and order of sums
//         inside mma, stale lines in a reader's L1, whether the inline PTX says what its emulation does
// Source  as cuda/prim.cuh
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace emu {

// A line of the kernel: the default argument of a primitive is evaluated where the primitive is called.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// ---- for tests ------------------------------------------------------------------------------------------------------

enum class Schedule {
  kInTurn,    // warps take turns, thread by thread
  kRandom,    // any ready thread
  kPriority,  // warps have priorities that change now and then: one runs ahead as far as it can
};
enum class Arrival {
  kLate,    // copies land at the wait, boxes when all threads wait, stores at the fence
  kRandom,  // each at once or late, by a coin
};

struct Config {
  Schedule schedule;
  Arrival arrival;
  uint64_t seed;
};
// The three pairs that tests run, by seed.
Config config_of_seed(uint64_t seed);

// Global memory that a kernel may touch. An access outside every region is an error, also by cp.async.
struct Region {
  const char* name;
  const void* begin;
  size_t num_bytes;
};

// Counts over a launch. A wavefront is one pass over the 32 banks of shared memory; what an access takes beyond the
// least for its width is a conflict, counted by the kernel's line.
struct Stats {
  uint64_t num_threads = 0;  // of all blocks
  uint64_t num_switches = 0;
  uint64_t num_mmas = 0;
  uint64_t num_copies = 0;
  uint64_t num_boxes = 0;
  uint64_t num_wavefronts = 0;
  std::map<std::string, uint64_t> conflicts;
};

// Runs the kernel's body once per thread of num_blocks blocks of num_threads threads. Throws std::runtime_error with
// the kernel's line, block and thread if a primitive is misused or the launch deadlocks.
Stats launch(const Config& config, int num_blocks, int num_threads, size_t shared_bytes,
             const std::vector<Region>& regions, const std::function<void()>& body);

// What a tensor map is made of: dimensions, the innermost first, of 16-bit elements; rows of a box of at most 128
// bytes, which lie in shared memory in the 128-byte swizzle.
struct BoxedTensor {
  static constexpr int kMostDims = 5;
  const char* data;
  int num_dims;
  uint64_t sizes[kMostDims];
  uint64_t strides[kMostDims];  // in bytes
  uint32_t box[kMostDims];
};

// Writes the tensor's 128 bytes. Returns nullptr, or what cuTensorMapEncodeTiled would refuse it for.
const char* encode_map(void* map, const BoxedTensor& tensor);

// Which fault is switched on in a copy of a kernel made for it (tests/cuda/faults.py); 0: none.
extern int active_fault;

// ---- for prim.cuh ---------------------------------------------------------------------------------------------------

enum class Element { kFloat16, kBFloat16 };

int thread_idx();
int block_idx();
int num_blocks();
int num_threads();
int lane();

void barrier(int id, int num_threads, bool waits, Site site);
void sync_warp(Site site);
uint64_t shuffle(uint64_t value, int source_lane, Site site);
bool any(bool predicate, Site site);
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address, bool is_transposed, Site site);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element element, Site site);

void cp_async16(uint32_t shared_address, const void* source, bool is_valid, Site site);
void cp_async_commit();
void cp_async_wait(int num_pending);

uint32_t shared_base();
void load_shared(uint32_t address, void* value, uint32_t num_bytes, Site site);
void store_shared(uint32_t address, const void* value, uint32_t num_bytes, Site site);

// A store is in memory, and so seen by other blocks, once a thread fences that made it itself or that a barrier after
// it, or a chain of them, has shown it to; at the latest when the launch ends. Its own block sees it at once.
void store_global(void* address, const void* value, uint32_t num_bytes, Site site);
void load_global(const void* address, void* value, uint32_t num_bytes, Site site);
int32_t atomic_add(int32_t* address, int32_t value, Site site);
void fence_gpu();

// sm_90. A barrier's state is kept beside shared memory; its 8 bytes there are only an address. wgmma's sums are NaN
// from the issue on until the wait, and its matrices are read as late as the wait or at the issue, by a coin. What was
// written to shared memory by other instructions, a barrier's initialisation too, cannot be read by wgmma, or written
// by load_box, until the writer fences. A phase that ends while boxes which report to its barrier are under way is an
// error.
void mbarrier_init(uint32_t address, int num_arrivals, Site site);
void mbarrier_arrive(uint32_t address, Site site);
void mbarrier_arrive_expect(uint32_t address, uint32_t num_bytes, Site site);
void mbarrier_wait(uint32_t address, int parity, Site site);
void fence_proxy_async();
struct BoxPlace {
  int x[4];
};
void load_box(uint32_t to, const void* map, BoxPlace place, uint32_t barrier, Site site);
void check_map(const void* map, Site site);
void set_registers(int count, bool raises, Site site);
void wgmma_fence();
void wgmma_commit(Site site);
void wgmma_wait(int num_pending, Site site);
struct LeftOperand {
  uint64_t descriptor;       // K-major, of 64 rows
  const uint32_t* fragment;  // or the lane's, if not nullptr: then the right one is MN-major
};
void wgmma(float* d, int num_column_tiles, LeftOperand a, uint64_t b, bool adds, Element element, Site site);

float float16_value(uint16_t bits);
uint16_t float16_bits(float value);
uint16_t bfloat16_bits(float value);
uint16_t fma_f16(uint32_t a, uint32_t b, uint32_t c);  // of the lower halves
float flush_subnormal(float value);

template <typename T>
inline T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
inline uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

}  // namespace emu
