// memory.cpp: shared memory with its banks, copies that land late, and stores that other blocks see late.

#include <algorithm>

#include "emu/machine.h"

namespace emu {
namespace {

constexpr uint32_t kBankBytes = 4;
constexpr uint32_t kNumBanks = 32;

void land(const PendingCopy& copy) {
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

// A line's n-th access is counted once all lanes have made it; where only some lanes come to a line, nothing is.
void count_access(uint32_t address, uint32_t num_bytes, Site site) {
  auto& counts = current->num_accesses;
  auto count = std::find_if(counts.begin(), counts.end(), [&](const auto& each) { return is_same(each.first, site); });
  if (count == counts.end()) count = counts.insert(count, {site, 0});
  const uint32_t number = count->second++;
  std::vector<SharedAccess>& accesses = current->warp->accesses;
  auto access = std::find_if(accesses.begin(), accesses.end(), [&](const SharedAccess& each) {
    return each.number == number && is_same(each.site, site);
  });
  if (access == accesses.end()) access = accesses.insert(access, {site, number, {}, 0});
  access->address[current->lane()] = address;
  access->arrived |= 1u << current->lane();
  if (access->arrived != kAllLanes) return;
  // 128 bytes are one wavefront at best: 32, 16 or 8 lanes at a time.
  const uint32_t lanes_at_once = kNumBanks * kBankBytes / num_bytes;
  for (uint32_t first = 0; first < kWarpSize; first += lanes_at_once) {
    count_wavefronts(access->address + first, num_bytes, site);
  }
  accesses.erase(access);
}

}  // namespace

bool comes_at_once() {
  return machine.config.arrival == Arrival::kRandom && machine.random(2) == 0;
}

// Lanes that together want 128 bytes. A bank gives one word at a time, to all that want that word.
void count_wavefronts(const uint32_t* address, uint32_t num_bytes, Site site) {
  const uint32_t num_lanes = kNumBanks * kBankBytes / num_bytes;
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
  char* const to = shared_bytes_at(shared_address, 16, 16, "cp.async", site);
  if (is_valid) check_global(source, 16, 16, "cp.async", site);
  count_access(shared_address, 16, site);
  const PendingCopy copy = {shared_address - kSharedBase, is_valid ? static_cast<const char*>(source) : nullptr};
  ++machine.stats.num_copies;
  if (comes_at_once()) {
    land(copy);
    return;
  }
  memset(to, 0xff, 16);
  current->open_copies.push_back(copy);
}

void cp_async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int num_pending) {
  maybe_yield();
  while (current->copy_groups.size() > size_t(num_pending)) {
    for (const PendingCopy& copy : current->copy_groups.front()) land(copy);
    current->copy_groups.pop_front();
  }
}

uint32_t shared_base() {
  return kSharedBase;
}

void load_shared(uint32_t address, void* value, uint32_t num_bytes, Site site) {
  memcpy(value, shared_bytes_at(address, num_bytes, num_bytes, "ld.shared", site), num_bytes);
  count_access(address, num_bytes, site);
}

void store_shared(uint32_t address, const void* value, uint32_t num_bytes, Site site) {
  memcpy(shared_bytes_at(address, num_bytes, num_bytes, "st.shared", site), value, num_bytes);
  mark_unfenced(address - kSharedBase, num_bytes);
  count_access(address, num_bytes, site);
}

void store_global(void* address, const void* value, uint32_t num_bytes, Site site) {
  check_global(address, num_bytes, num_bytes, "st.global", site);
  PendingStore store = {static_cast<char*>(address), num_bytes, {}, current, 0};
  memcpy(store.value, value, num_bytes);
  current->block->stores.push_back(store);
  if (comes_at_once()) memcpy(address, value, num_bytes);
}

void load_global(const void* address, void* value, uint32_t num_bytes, Site site) {
  check_global(address, num_bytes, num_bytes, "ld.global", site);
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
  check_global(address, sizeof value, sizeof value, "atom", site);
  maybe_yield();
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
  publish_stores(*current->block, current);
  maybe_yield();
}

}  // namespace emu
