// launch.cpp: the schedule of a launch, its barriers, and how it ends.

#include <algorithm>
#include <stdexcept>

#include "emu/machine.h"

namespace emu {

Machine machine;
Thread* current = nullptr;
int active_fault = 0;

namespace {

constexpr uint32_t kPriorities = 1000;
constexpr uint32_t kSwitchesPerPriority = 64;  // on average, until some warp's priority changes

// Of a thread when a kernel starts that fills an SM: what the compiler is bound to.
int initial_registers() {
  constexpr int kUnit = 8;
  return std::min(kMostRegisters, kRegistersPerSm / machine.num_threads / kUnit * kUnit);
}

std::string place(Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

// Where the lowest lane of each warp stands: what a kernel engineer asks first about a deadlock.
std::string describe_threads() {
  std::string text;
  for (const auto& thread : machine.threads) {
    if (thread->lane() != 0 && thread->state == Thread::State::kExited) continue;
    const bool is_like_lane_0 = thread->lane() != 0;
    if (is_like_lane_0) {
      const Thread& first = *machine.threads[&thread - machine.threads.data() - thread->lane()];
      if (first.state == thread->state && first.site.line == thread->site.line) continue;
    }
    text += "\n  block " + std::to_string(thread->block->idx) + " warp " + std::to_string(thread->idx / kWarpSize) +
            " lane " + std::to_string(thread->lane()) + ": ";
    text += thread->state == Thread::State::kExited ? "exited"
                                                    : std::string(thread->waits_for) + " at " + place(thread->site);
  }
  return text;
}

// Those whose phase lacks bytes, or has too many.
std::string describe_barriers() {
  std::string text;
  for (const Block& block : machine.blocks) {
    for (const auto& [offset, barrier] : block.memory_barriers) {
      if (barrier.missing_bytes == 0) continue;
      text += "\n  block " + std::to_string(block.idx) + ": the barrier at shared address " +
              std::to_string(offset + kSharedBase) + " lacks " + std::to_string(barrier.num_missing) +
              " arrivals and " + std::to_string(barrier.missing_bytes) + " bytes";
    }
  }
  return text;
}

void check_exit() {
  sanitizer::Quiet quiet;
  bool has_pending_copies = !current->open_copies.empty();
  for (const auto& group : current->copy_groups) has_pending_copies |= !group.empty();
  if (has_pending_copies) fail("the thread ends before its cp.async have landed", {"exit", 0});
  if (!current->warp->open_products.empty() || !current->warp->product_groups.empty()) {
    fail("the thread ends before its wgmma are done", {"exit", 0});
  }
}

void run_thread() {
  machine.start.acquire();
  (*machine.body)();
  check_exit();
  machine.end.release();
  current->state = Thread::State::kExited;
  current->fiber.suspend();
}

void start_threads() {
  machine.blocks.clear();
  machine.blocks.resize(machine.num_blocks);
  const size_t num_threads = size_t(machine.num_blocks) * machine.num_threads;
  while (machine.threads.size() > num_threads) machine.threads.pop_back();
  while (machine.threads.size() < num_threads) machine.threads.push_back(std::make_unique<Thread>());
  machine.ready_warps.clear();
  for (int b = 0; b < machine.num_blocks; ++b) {
    Block& block = machine.blocks[b];
    block.idx = b;
    block.shared.assign(machine.shared_bytes, '\xff');
    block.unfenced_writer.assign(machine.shared_bytes / kGranuleBytes + 1, 0);
    const int num_registers = initial_registers();
    block.num_free_registers = kRegistersPerSm - num_registers * machine.num_threads;
    block.warps.resize((machine.num_threads + kWarpSize - 1) / kWarpSize);
    for (Warp& warp : block.warps) {
      warp.priority = machine.random(kPriorities);
      warp.num_registers = num_registers;
    }
    for (int t = 0; t < machine.num_threads; ++t) {
      Thread& thread = *machine.threads[size_t(b) * machine.num_threads + t];
      thread.block = &block;
      thread.warp = &block.warps[t / kWarpSize];
      thread.idx = t;
      thread.waits_for = "start";
      thread.site = {"start", 0};
      thread.open_copies.clear();
      thread.copy_groups.clear();
      thread.num_accesses.clear();
      thread.unfenced_granules.clear();
      thread.has_wgmma_fence = false;
      thread.fence = nullptr;
      thread.observed.clear();
      thread.fiber.start(run_thread);
      wake(&thread);
    }
  }
}

// Which of the ready warps goes on.
size_t pick_warp() {
  const std::vector<Warp*>& warps = machine.ready_warps;
  switch (machine.config.schedule) {
    case Schedule::kInTurn:
      return machine.turn++ % warps.size();
    case Schedule::kRandom:
      return machine.random(uint32_t(warps.size()));
    default:
      break;
  }
  if (machine.random(kSwitchesPerPriority) == 0) {
    warps[machine.random(uint32_t(warps.size()))]->priority = machine.random(kPriorities);
  }
  size_t choice = 0;
  for (size_t i = 1; i < warps.size(); ++i) {
    if (warps[i]->priority > warps[choice]->priority) choice = i;
  }
  return choice;
}

// Takes the thread that runs next out of the ready ones.
Thread* pick() {
  const size_t choice = pick_warp();
  Warp& warp = *machine.ready_warps[choice];
  const int lane = machine.config.schedule == Schedule::kInTurn ? 0 : int(machine.random(uint32_t(warp.num_ready)));
  Thread* const thread = warp.ready[lane];
  warp.ready[lane] = warp.ready[--warp.num_ready];
  if (warp.num_ready == 0) {
    machine.ready_warps[choice] = machine.ready_warps.back();
    machine.ready_warps.pop_back();
  }
  return thread;
}

}  // namespace

uint32_t Machine::random(uint32_t bound) {
  // xorshift64, Marsaglia 2003 (doi 10.18637/jss.v008.i14).
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t((random_state >> 32) % bound);
}

Config config_of_seed(uint64_t seed) {
  switch (seed % 3) {
    case 0:
      return {Schedule::kInTurn, Arrival::kLate, seed};
    case 1:
      return {Schedule::kRandom, Arrival::kRandom, seed};
    default:
      return {Schedule::kPriority, Arrival::kLate, seed};
  }
}

Stats launch(const Config& config, int num_blocks, int num_threads, size_t shared_bytes,
             const std::vector<Region>& regions, const std::function<void()>& body) {
  if (num_threads < 1 || num_threads > 1024 || num_threads % kWarpSize != 0) {
    throw std::invalid_argument("num_threads must be a multiple of 32 in [32, 1024], got " +
                                std::to_string(num_threads));
  }
  if (num_blocks < 1) throw std::invalid_argument("num_blocks must be >= 1, got " + std::to_string(num_blocks));
  machine.config = config;
  machine.num_blocks = num_blocks;
  machine.num_threads = num_threads;
  machine.shared_bytes = shared_bytes;
  machine.regions = &regions;
  machine.body = &body;
  machine.stats = Stats();
  machine.error.clear();
  machine.turn = 0;
  machine.random_state = (config.seed + 1) * 0x9e3779b97f4a7c15u;
  machine.atomics.clear();
  machine.boxes.clear();
  machine.agents.clear();
  start_threads();
  machine.start.release_anew();
  machine.end.release_anew();
  size_t num_running = machine.threads.size();
  machine.stats.num_threads = num_running;
  while (num_running > 0 && machine.error.empty()) {
    const bool is_stuck = machine.ready_warps.empty();
    if (!machine.boxes.empty() && (is_stuck || comes_at_once())) {
      land_box();
      continue;
    }
    if (is_stuck) {
      machine.error = "deadlock:" + describe_threads() + describe_barriers();
      break;
    }
    current = pick();
    current->fiber.resume();
    ++machine.stats.num_switches;
    if (current->state == Thread::State::kExited) --num_running;
    current = nullptr;
  }
  machine.end.acquire();
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
  if (!machine.boxes.empty()) {
    throw std::runtime_error("the launch ends before a box has landed, of " + place(machine.boxes.front().site));
  }
  for (Block& block : machine.blocks) {
    publish_stores(block, nullptr);
  }
  return std::move(machine.stats);
}

void fail(const std::string& message, Site site) {
  machine.error = message + " at " + place(site);
  if (current == nullptr) throw std::runtime_error(machine.error);
  machine.error += ", block " + std::to_string(current->block->idx) + " thread " + std::to_string(current->idx);
  while (true) current->fiber.suspend();
}

void block_on(const char* primitive, Site site) {
  current->state = Thread::State::kBlocked;
  current->waits_for = primitive;
  current->site = site;
  current->fiber.suspend();
}

void acquire(const Thread& thread, sanitizer::Order& order) {
  sanitizer::As as(thread.fiber.identity());
  order.acquire();
}

void wake(Thread* thread) {
  thread->state = Thread::State::kReady;
  Warp& warp = *thread->warp;
  if (warp.num_ready == 0) machine.ready_warps.push_back(&warp);
  warp.ready[warp.num_ready++] = thread;
}

void maybe_yield() {
  while (machine.config.schedule != Schedule::kInTurn && machine.random(2) == 0) {
    wake(current);
    current->fiber.suspend();
  }
}

int thread_idx() {
  return current->idx;
}
int block_idx() {
  return current->block->idx;
}
int num_blocks() {
  return machine.num_blocks;
}
int num_threads() {
  return machine.num_threads;
}
int lane() {
  return current->lane();
}

void barrier(int id, int num_threads, bool waits, Site site) {
  sanitizer::Quiet quiet;
  if (id < 0 || id >= kNumBarriers) fail("barrier id must be in [0, 16), got " + std::to_string(id), site);
  if (num_threads % kWarpSize != 0 || num_threads < kWarpSize || num_threads > machine.num_threads) {
    fail("a barrier takes a multiple of 32 of the block's threads, got " + std::to_string(num_threads), site);
  }
  Barrier& barrier = current->block->barriers[id];
  if (barrier.num_arrived > 0 && barrier.num_threads != num_threads) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(num_threads) + " threads is under way with " +
             std::to_string(barrier.num_threads),
         site);
  }
  maybe_yield();
  if (barrier.num_arrived == 0) {
    barrier.order.release_anew();
  } else {
    barrier.order.release();
  }
  barrier.num_threads = num_threads;
  const uint32_t warp = 1u << current->idx / kWarpSize;
  barrier.warps |= warp;
  if (waits) barrier.waiting_warps |= warp;
  if (++barrier.num_arrived == num_threads) {
    barrier.num_arrived = 0;
    for (PendingStore& store : current->block->stores) {
      const uint32_t owner = 1u << store.owner->idx / kWarpSize;
      if (((owner | store.seen_by) & barrier.warps) != 0) store.seen_by |= barrier.waiting_warps;
    }
    barrier.warps = barrier.waiting_warps = 0;
    if (waits) barrier.order.acquire();
    for (Thread* thread : barrier.waiting) {
      acquire(*thread, barrier.order);
      wake(thread);
    }
    barrier.waiting.clear();
  } else if (waits) {
    barrier.waiting.push_back(current);
    block_on("barrier", site);
  }
  maybe_yield();
}

}  // namespace emu
