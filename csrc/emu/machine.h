// machine.h: the state of a launch, shared by the emulation's files. emu.h is what others include.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emu/emu.h"
#include "emu/fiber.h"

namespace emu {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kNumBarriers = 16;
// Shared addresses start here: 0, as an address that nobody computed, is an error.
constexpr uint32_t kSharedBase = 1024;

struct Block;
struct Warp;

struct PendingCopy {
  uint32_t shared_offset;
  const char* source;  // nullptr: zeros
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
  std::vector<std::pair<Site, uint32_t>> num_accesses;  // to shared memory, by line

  int lane() const { return idx % kWarpSize; }
};

// One warp-wide access to shared memory, gathered from lanes that come one by one.
struct SharedAccess {
  Site site;
  uint32_t number;  // of the line's accesses in each lane
  uint32_t address[kWarpSize];
  uint32_t arrived;
};

struct Warp {
  // The collective that some lanes have come to.
  const char* collective = nullptr;
  Site site;
  uint32_t arrived = 0;
  void* argument[kWarpSize];

  uint32_t priority = 0;
  Thread* ready[kWarpSize];  // the first num_ready
  int num_ready = 0;
  std::vector<SharedAccess> accesses;  // that some lanes have made
};

struct Barrier {
  int num_arrived = 0;
  int num_threads = 0;
  std::vector<Thread*> waiting;
};

struct PendingStore {
  char* address;
  uint32_t num_bytes;
  char value[16];
  const Thread* owner;
  bool is_past_barrier;
};

struct Block {
  int idx;
  std::vector<char> shared;
  std::vector<Warp> warps;
  Barrier barriers[kNumBarriers];
  std::vector<PendingStore> stores;
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
  std::vector<Warp*> ready_warps;  // those with ready threads
  size_t turn;                     // of Schedule::kInTurn
  Stats stats;
  std::string error;  // of the first misuse; the launch ends with it
  uint64_t random_state;

  // A number in [0, bound), from the seed.
  uint32_t random(uint32_t bound);
};

extern Machine machine;
extern Thread* current;  // nullptr in the scheduler

// Ends the launch with this message. Does not return: the calling fiber is never resumed.
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
void publish_stores(Block& block);
void count_wavefronts(const uint32_t* address, uint32_t num_bytes, Site site);

}  // namespace emu
