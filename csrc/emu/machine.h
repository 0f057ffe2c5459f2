// machine.h: the state of a launch, shared by the emulation's files. emu.h is what others include.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emu/emu.h"
#include "emu/fiber.h"
#include "emu/sanitizer.h"

namespace emu {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kNumBarriers = 16;
constexpr uint32_t kGranuleBytes = 16;  // of shared memory, for what proxies see
constexpr uint16_t kBoxUnderWay = 0xffff;
constexpr int kRegistersPerSm = 65536;
constexpr int kMostRegisters = 255;  // of a thread
constexpr char kWaitsForRegisters[] = "setmaxnreg";
// Shared addresses start here: 0, as an address that nobody computed, is an error.
constexpr uint32_t kSharedBase = 1024;

struct Block;
struct Warp;

struct PendingCopy {
  uint32_t shared_offset;
  const char* source;  // nullptr: zeros
  bool has_landed;
};

struct Thread {
  enum class State { kReady, kBlocked, kExited };

  Fiber fiber;
  Block* block;
  Warp* warp;
  int idx;  // in its block
  State state;
  const char* waits_for;  // names a primitive
  Site site;
  std::vector<PendingCopy> open_copies;
  std::deque<std::vector<PendingCopy>> copy_groups;
  std::vector<std::pair<Site, uint32_t>> num_accesses;  // to shared memory, by line, since lanes came together
  std::vector<uint32_t> unfenced_granules;
  bool has_wgmma_fence;
  std::shared_ptr<sanitizer::Order> fence;                  // what the latest fence_gpu has released
  std::vector<std::shared_ptr<sanitizer::Order>> observed;  // fences before atomics whose results it has seen since

  int lane() const { return idx % kWarpSize; }
};

// One warp-wide access to shared memory, gathered from lanes that come one by one.
struct SharedAccess {
  Site site;
  uint32_t number;  // of the line's accesses in each lane
  uint32_t num_bytes;
  uint32_t address[kWarpSize];
  uint32_t arrived;
};

// A product that a warp has issued: its 16 rows of it.
struct Product {
  int accumulator;          // which of the warp's
  std::vector<float> left;  // [16][16], or empty: at left_descriptor, rows from first_row on
  uint64_t left_descriptor;
  uint64_t right_descriptor;
  bool adds;
  Element element;
};

// Sums that products are under way to: [16][columns] of the lanes' registers.
struct Accumulator {
  float* registers[kWarpSize];
  int num_column_tiles;
  std::vector<float> sums;
  int num_pending;  // products
};

struct Warp {
  // The collective that some lanes have come to.
  const char* collective = nullptr;
  Site site;
  sanitizer::Order order;  // of lanes that wait for each other
  uint32_t arrived = 0;
  void* argument[kWarpSize];

  uint32_t priority = 0;
  Thread* ready[kWarpSize];  // the first num_ready
  int num_ready = 0;
  std::vector<SharedAccess> accesses;  // that some lanes have made

  std::vector<Accumulator> accumulators;
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> product_groups;
  int num_registers = 0;  // per thread
};

struct Barrier {
  int num_arrived = 0;
  int num_threads = 0;
  uint32_t warps = 0;          // that have arrived, by bit
  uint32_t waiting_warps = 0;  // that wait
  std::vector<Thread*> waiting;
  sanitizer::Order order;
};

struct MemoryBarrier {
  int num_arrivals;
  int num_missing;
  int phase;
  std::vector<Thread*> waiting;
  sanitizer::Order order[2];  // of phases, by parity
  int64_t missing_bytes;      // that were promised; below 0: that came before they were
  int num_boxes;              // under way
  bool is_begun;              // somebody has arrived in this phase, or a box has
};

// A box of a tensor on its way to shared memory.
struct PendingBox {
  struct Piece {
    uint32_t shared_offset;
    const char* source;  // nullptr: zeros
  };
  Block* block;
  uint32_t barrier;           // its shared offset
  std::vector<Piece> pieces;  // of 16 bytes
  Site site;
  const void* line;
  std::unique_ptr<sanitizer::Agent> agent;  // who copies
};

// A word of global memory that atomics change, for ThreadSanitizer: PTX ISA 8.7, sections 8.8 to 8.10. An atomic that
// observes another comes behind it, but not behind what that thread did before; fences on both sides order that, too.
struct AtomicWord {
  std::vector<std::shared_ptr<sanitizer::Order>> fences;  // before the atomics since the last plain store
  std::unique_ptr<char> latest;                           // written by the latest atomic, read by plain stores
  bool has_plain_store = false;
};

struct PendingStore {
  char* address;
  uint32_t num_bytes;
  char value[16];
  const Thread* owner;
  uint32_t seen_by;  // warps that a barrier has shown it to, by bit
};

struct Block {
  int idx;
  std::vector<char> shared;
  std::vector<Warp> warps;
  Barrier barriers[kNumBarriers];
  std::vector<PendingStore> stores;
  std::map<uint32_t, MemoryBarrier> memory_barriers;  // by shared offset
  // Of each 16 bytes of shared memory: who wrote them and has not made them visible to the async proxy, 1 + its index;
  // or kBoxUnderWay.
  std::vector<uint16_t> unfenced_writer;
  int num_free_registers;
};

struct Machine {
  Config config;
  int num_blocks;
  int num_threads;
  size_t shared_bytes;
  const std::vector<Region>* regions;
  const std::function<void()>* body;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<const void*, AtomicWord> atomics;
  std::vector<PendingBox> boxes;
  std::vector<std::unique_ptr<sanitizer::Agent>> agents;  // of boxes that have landed: reports may name them
  sanitizer::Order start, end;                            // of the launch
  std::vector<Warp*> ready_warps;                         // those with ready threads
  size_t turn;                                            // of Schedule::kInTurn
  Stats stats;
  std::string error;  // of the first misuse; the launch ends with it
  uint64_t random_state;

  // A number in [0, bound), from the seed.
  uint32_t random(uint32_t bound);
};

extern Machine machine;
extern Thread* current;  // nullptr in the scheduler

// Ends the launch with this message. Does not return: the calling fiber is never resumed; the scheduler throws.
[[noreturn]] void fail(const std::string& message, Site site);
// Makes a thread one that can run.
void wake(Thread* thread);
// Leaves the current thread until wake() is called for it.
void block_on(const char* primitive, Site site);
// Lets others run here, by a coin, where hardware may too.
void maybe_yield();

// Where the kernel may touch shared and global memory.
char* shared_bytes_at(uint32_t address, uint32_t num_bytes, uint32_t alignment, const char* primitive, Site site);
void check_global(const void* address, size_t num_bytes, size_t alignment, const char* primitive, Site site);
// Those that this thread knows of; nullptr: all.
void publish_stores(Block& block, const Thread* thread);
// Notes that the current thread has written here other than through the async proxy.
void mark_unfenced(uint32_t shared_offset, uint32_t num_bytes);
// Lands one of the boxes that are under way, any of them.
void land_box();
// Tells that the current thread, or a box's agent, has come to the phase: what it did is before its end.
void release_phase(MemoryBarrier& barrier);
// Ends the phase if nothing is missing any more.
void end_phase_if_complete(MemoryBarrier& barrier, Site site);
MemoryBarrier& memory_barrier(uint32_t address, const char* primitive, Site site);
// Fails if somebody has written here without fence_proxy_async, or a box is under way to here.
void check_fenced(uint32_t shared_offset, const std::string& what, Site site);
// Whether what is left open by Arrival::kRandom happens now.
bool comes_at_once();
// Tells that a thread which waits has seen a barrier's phase end.
void acquire(const Thread& thread, sanitizer::Order& order);
// Brings the lanes of a warp together, each with its argument; the last one calls act(arguments by lane).
void collective(const char* name, void* argument, Site site, const std::function<void(void**)>& act);
// Around a collective that orders the lanes' accesses: before it, and when all have come.
void release_lane();
void acquire_lanes();
// Of the current thread's warp.
void for_each_lane(const std::function<void(Thread&)>& act);
float element_value(uint16_t bits, Element element);
void count_wavefronts(const uint32_t* address, uint32_t num_lanes, uint32_t num_bytes, Site site);
// Counts the accesses that only some lanes of the current thread's warp have made; the others did not come to them.
void close_accesses();

}  // namespace emu
