// memory.cpp: shared memory with its banks, copies that land late, and stores that other blocks see late.

#include <algorithm>

#include "emu/machine.h"

namespace emu {
namespace {

constexpr uint32_t kBankBytes = 4;
constexpr uint32_t kNumBanks = 32;

void land(const PendingCopy& copy) {
  if (copy.has_landed) return;
  char* const to = current->block->shared.data() + copy.shared_offset;
  if (copy.source == nullptr) {
    memset(to, 0, 16);
  } else {
    memcpy(to, copy.source, 16);
  }
  mark_unfenced(copy.shared_offset, 16);
}

bool is_same(Site a, Site b) {
  return a.line == b.line && a.file == b.file;
}

// At its issue and at its wait: in between it is under way.
void tell(const PendingCopy& copy, const void* line) {
  if (copy.source != nullptr) sanitizer::read(copy.source, 16, line);
  sanitizer::write(current->block->shared.data() + copy.shared_offset, 16, line);
}

void tell_load(const void* address, uint32_t num_bytes, const void* line) {
  sanitizer::Loud loud;
  sanitizer::read(address, num_bytes, line);
}

void tell_store(const void* address, uint32_t num_bytes, const void* line) {
  const auto word = machine.atomics.find(address);
  sanitizer::Loud loud;
  sanitizer::write(address, num_bytes, line);
  if (word == machine.atomics.end()) return;
  // Behind the latest atomic, which has observed those before it.
  if (word->second.latest != nullptr) sanitizer::read(word->second.latest.get(), 1, line);
  word->second.has_plain_store = true;
  word->second.fences.clear();
}

void tell_atomic(const int32_t* address, const void* line) {
  AtomicWord& word = machine.atomics[address];
  current->observed.insert(current->observed.end(), word.fences.begin(), word.fences.end());
  if (current->fence != nullptr) word.fences.push_back(current->fence);
  word.latest = std::make_unique<char>();
  sanitizer::Loud loud;
  sanitizer::write(word.latest.get(), 1, line);
  if (word.has_plain_store) sanitizer::read(address, sizeof *address, line);
}

// 128 bytes are one wavefront at best: 32, 16 or 8 lanes at a time.
void count_access(const SharedAccess& access) {
  const uint32_t lanes_at_once = kNumBanks * kBankBytes / access.num_bytes;
  for (uint32_t first = 0; first < kWarpSize; first += lanes_at_once) {
    uint32_t addresses[kWarpSize];
    uint32_t num_lanes = 0;
    for (uint32_t l = first; l < first + lanes_at_once; ++l) {
      if ((access.arrived >> l & 1) != 0) addresses[num_lanes++] = access.address[l];
    }
    if (num_lanes > 0) count_wavefronts(addresses, num_lanes, access.num_bytes, access.site);
  }
}

// A line's n-th access since lanes last came together is counted once all have made it, or else when they come together
// again. Returns whether another lane has made the same: of such stores one is made, whichever (CUDA C++ Programming
// Guide, "SIMT Architecture").
bool note_access(uint32_t address, uint32_t num_bytes, Site site) {
  auto& counts = current->num_accesses;
  auto count = std::find_if(counts.begin(), counts.end(), [&](const auto& each) { return is_same(each.first, site); });
  if (count == counts.end()) count = counts.insert(count, {site, 0});
  const uint32_t number = count->second++;
  std::vector<SharedAccess>& accesses = current->warp->accesses;
  auto access = std::find_if(accesses.begin(), accesses.end(), [&](const SharedAccess& each) {
    return each.number == number && is_same(each.site, site);
  });
  if (access == accesses.end()) access = accesses.insert(access, {site, number, num_bytes, {}, 0});
  bool is_made = false;
  for (int l = 0; l < kWarpSize; ++l) is_made |= (access->arrived >> l & 1) != 0 && access->address[l] == address;
  access->address[current->lane()] = address;
  access->arrived |= 1u << current->lane();
  if (access->arrived != kAllLanes) return is_made;
  count_access(*access);
  accesses.erase(access);
  return is_made;
}

}  // namespace

bool comes_at_once() {
  return machine.config.arrival == Arrival::kRandom && machine.random(2) == 0;
}

void close_accesses() {
  for (const SharedAccess& access : current->warp->accesses) count_access(access);
  current->warp->accesses.clear();
  for_each_lane([](Thread& lane) { lane.num_accesses.clear(); });
}

// Lanes that together want up to 128 bytes. A bank gives one word at a time, to all that want that word.
void count_wavefronts(const uint32_t* address, uint32_t num_lanes, uint32_t num_bytes, Site site) {
  uint32_t words[kNumBanks][kNumBanks];
  uint32_t num_words[kNumBanks] = {};
  for (uint32_t l = 0; l < num_lanes; ++l) {
    for (uint32_t byte = 0; byte < num_bytes; byte += kBankBytes) {
      const uint32_t word = (address[l] + byte) / kBankBytes;
      const uint32_t bank = word % kNumBanks;
      uint32_t* const end = words[bank] + num_words[bank];
      if (std::find(words[bank], end, word) == end) words[bank][num_words[bank]++] = word;
    }
  }
  const uint32_t wavefronts = *std::max_element(num_words, num_words + kNumBanks);
  machine.stats.num_wavefronts += wavefronts;
  if (wavefronts > 1) machine.stats.conflicts[std::to_string(site.line) + " " + site.file] += wavefronts - 1;
}

char* shared_bytes_at(uint32_t address, uint32_t num_bytes, uint32_t alignment, const char* primitive, Site site) {
  if (address % alignment != 0) {
    fail(std::string(primitive) + ": shared address " + std::to_string(address) + " is not a multiple of " +
             std::to_string(alignment),
         site);
  }
  const uint64_t offset = uint64_t{address} - kSharedBase;
  if (address < kSharedBase || offset + num_bytes > machine.shared_bytes) {
    fail(std::string(primitive) + ": outside of shared memory", site);
  }
  return current->block->shared.data() + offset;
}

void check_global(const void* address, size_t num_bytes, size_t alignment, const char* primitive, Site site) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % alignment != 0) {
    fail(std::string(primitive) + ": global address is not a multiple of " + std::to_string(alignment), site);
  }
  for (const Region& region : *machine.regions) {
    const uintptr_t region_begin = reinterpret_cast<uintptr_t>(region.begin);
    if (begin >= region_begin && begin + num_bytes <= region_begin + region.num_bytes) return;
  }
  fail(std::string(primitive) + ": outside of the tensors in global memory", site);
}

void cp_async16(uint32_t shared_address, const void* source, bool is_valid, Site site) {
  sanitizer::Quiet quiet;
  char* const to = shared_bytes_at(shared_address, 16, 16, "cp.async", site);
  if (is_valid) check_global(source, 16, 16, "cp.async", site);
  note_access(shared_address, 16, site);
  PendingCopy copy = {shared_address - kSharedBase, is_valid ? static_cast<const char*>(source) : nullptr, false};
  ++machine.stats.num_copies;
  {
    sanitizer::Loud loud;
    tell(copy, EMU_CALLER);
  }
  if (comes_at_once()) {
    land(copy);
    copy.has_landed = true;
  } else {
    memset(to, 0xff, 16);
  }
  current->open_copies.push_back(copy);
}

void cp_async_commit() {
  sanitizer::Quiet quiet;
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int num_pending) {
  sanitizer::Quiet quiet;
  maybe_yield();
  while (current->copy_groups.size() > size_t(num_pending)) {
    for (const PendingCopy& copy : current->copy_groups.front()) {
      land(copy);
      sanitizer::Loud loud;
      tell(copy, EMU_CALLER);
    }
    current->copy_groups.pop_front();
  }
}

uint32_t shared_base() {
  return kSharedBase;
}

void load_shared(uint32_t address, void* value, uint32_t num_bytes, Site site) {
  sanitizer::Quiet quiet;
  const char* const from = shared_bytes_at(address, num_bytes, num_bytes, "ld.shared", site);
  memcpy(value, from, num_bytes);
  note_access(address, num_bytes, site);
  sanitizer::Loud loud;
  sanitizer::read(from, num_bytes, EMU_CALLER);
}

void store_shared(uint32_t address, const void* value, uint32_t num_bytes, Site site) {
  sanitizer::Quiet quiet;
  char* const to = shared_bytes_at(address, num_bytes, num_bytes, "st.shared", site);
  const bool holds_value = memcmp(to, value, num_bytes) == 0;
  memcpy(to, value, num_bytes);
  mark_unfenced(address - kSharedBase, num_bytes);
  if (note_access(address, num_bytes, site) && holds_value) return;
  sanitizer::Loud loud;
  sanitizer::write(to, num_bytes, EMU_CALLER);
}

void store_global(void* address, const void* value, uint32_t num_bytes, Site site) {
  sanitizer::Quiet quiet;
  check_global(address, num_bytes, num_bytes, "st.global", site);
  tell_store(address, num_bytes, EMU_CALLER);
  PendingStore store = {static_cast<char*>(address), num_bytes, {}, current, 0};
  memcpy(store.value, value, num_bytes);
  current->block->stores.push_back(store);
  if (comes_at_once()) memcpy(address, value, num_bytes);
}

void load_global(const void* address, void* value, uint32_t num_bytes, Site site) {
  sanitizer::Quiet quiet;
  check_global(address, num_bytes, num_bytes, "ld.global", site);
  tell_load(address, num_bytes, EMU_CALLER);
  const std::vector<PendingStore>& stores = current->block->stores;
  for (auto store = stores.rbegin(); store != stores.rend(); ++store) {
    if (store->address == address && store->num_bytes == num_bytes) {
      memcpy(value, store->value, num_bytes);
      return;
    }
  }
  memcpy(value, address, num_bytes);
}

int32_t atomic_add(int32_t* address, int32_t value, Site site) {
  sanitizer::Quiet quiet;
  check_global(address, sizeof value, sizeof value, "atom", site);
  maybe_yield();
  tell_atomic(address, EMU_CALLER);
  const int32_t before = *address;
  *address += value;
  maybe_yield();
  return before;
}

void publish_stores(Block& block, const Thread* thread) {
  const auto is_visible = [&](const PendingStore& store) {
    return thread == nullptr || store.owner == thread || (store.seen_by >> thread->idx / kWarpSize & 1) != 0;
  };
  for (const PendingStore& store : block.stores) {
    if (is_visible(store)) memcpy(store.address, store.value, store.num_bytes);
  }
  block.stores.erase(std::remove_if(block.stores.begin(), block.stores.end(), is_visible), block.stores.end());
}

void fence_gpu() {
  sanitizer::Quiet quiet;
  for (const auto& fence : current->observed) fence->acquire();
  current->observed.clear();
  current->fence = std::make_shared<sanitizer::Order>();
  current->fence->release_anew();
  publish_stores(*current->block, current);
  maybe_yield();
}

}  // namespace emu
