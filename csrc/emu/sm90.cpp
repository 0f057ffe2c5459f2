// sm90.cpp: barriers in shared memory, what the async proxy sees, register counts, and the products of warpgroups.

#include <math.h>

#include <algorithm>

#include "emu/machine.h"

namespace emu {
namespace {

constexpr int kWarpgroupWarps = 4;
constexpr int kRows = 16;   // of a warp, of a product's 64
constexpr int kDepth = 16;  // of a product
constexpr uint32_t kRowBytes = 128;
constexpr uint32_t kBlockRows = 8;
constexpr int64_t kMostPhaseBytes = (1 << 20) - 1;  // PTX ISA 8.7, section 9.7.13.15.2

// Who waits or arrives must come behind the barrier's initialisation.
void tell_use(uint32_t address, const void* line) {
  sanitizer::Loud loud;
  sanitizer::read(current->block->shared.data() + (address - kSharedBase), 8, line);
}

// A matrix as a descriptor tells: PTX ISA 8.7, section 9.7.15.5.1.
struct Matrix {
  uint32_t begin;
  uint32_t leading_bytes;
  uint32_t stride_bytes;
};

Matrix matrix_of(uint64_t descriptor, bool is_k_major, Site site) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated", site);
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: a base offset is not emulated", site);
  const Matrix matrix = {field(0), field(16), field(32)};
  const uint32_t in_block = matrix.begin % (kBlockRows * kRowBytes);
  // A step along the depth of a K-major matrix starts inside its first row.
  if (is_k_major ? in_block >= kRowBytes : in_block != 0) {
    fail("wgmma: a matrix must start at a multiple of 1024 bytes, got " + std::to_string(matrix.begin), site);
  }
  return matrix;
}

uint32_t swizzled(uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}
uint32_t k_major_address(const Matrix& matrix, int row, int k) {
  return swizzled(matrix.begin + row / int(kBlockRows) * matrix.stride_bytes + row % int(kBlockRows) * kRowBytes +
                  2 * k);
}
uint32_t mn_major_address(const Matrix& matrix, int column, int k) {
  constexpr int kRowElements = kRowBytes / 2;
  return swizzled(matrix.begin + column / kRowElements * matrix.leading_bytes +
                  k / int(kBlockRows) * matrix.stride_bytes + k % int(kBlockRows) * kRowBytes +
                  column % kRowElements * 2);
}

float shared_element(uint32_t address, Element element, Site site) {
  uint16_t bits;
  memcpy(&bits, shared_bytes_at(address, 2, 2, "wgmma", site), sizeof bits);
  return element_value(bits, element);
}

int first_row_of_warp() {
  return current->idx / kWarpSize % kWarpgroupWarps * kRows;
}

// The address of element (row of A or column of B, k): the right matrix of a product with A in registers is MN-major.
uint32_t right_address(const Product& product, const Matrix& matrix, int column, int k) {
  return product.left.empty() ? k_major_address(matrix, column, k) : mn_major_address(matrix, column, k);
}

// The addresses of all 16 bytes of shared memory that a warp's product reads.
template <typename Act>
void for_each_granule(const Product& product, int num_columns, Site site, const Act& act) {
  constexpr int kGranuleElements = kGranuleBytes / 2;
  const bool is_right_k_major = product.left.empty();
  if (product.left.empty()) {
    const Matrix left = matrix_of(product.left_descriptor, true, site);
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; k += kGranuleElements) act(k_major_address(left, first_row_of_warp() + row, k));
    }
  }
  const Matrix right = matrix_of(product.right_descriptor, is_right_k_major, site);
  for (int column = 0; column < num_columns; column += is_right_k_major ? 1 : kGranuleElements) {
    for (int k = 0; k < kDepth; k += is_right_k_major ? kGranuleElements : 1) {
      act(right_address(product, right, column, k));
    }
  }
}

void check_operands(const Product& product, int num_columns, Site site) {
  for_each_granule(product, num_columns, site, [&](uint32_t address) {
    shared_bytes_at(address, 2, 2, "wgmma", site);
    check_fenced(address - kSharedBase, "wgmma reads", site);
  });
}

// As reads of the current lane.
void tell_operands(const Product& product, int num_columns, const void* line, Site site) {
  if (!sanitizer::kSeesRaces) return;
  for_each_granule(product, num_columns, site, [&](uint32_t address) {
    sanitizer::Loud loud;
    sanitizer::read(current->block->shared.data() + (address - kSharedBase), kGranuleBytes, line);
  });
}

void compute(const Product& product, Site site) {
  Accumulator& accumulator = current->warp->accumulators[product.accumulator];
  const int num_columns = 8 * accumulator.num_column_tiles;
  std::vector<float> left = product.left;
  if (left.empty()) {
    const Matrix matrix = matrix_of(product.left_descriptor, true, site);
    left.resize(kRows * kDepth);
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        left[row * kDepth + k] =
            shared_element(k_major_address(matrix, first_row_of_warp() + row, k), product.element, site);
      }
    }
  }
  const Matrix matrix = matrix_of(product.right_descriptor, product.left.empty(), site);
  if (!product.adds) std::fill(accumulator.sums.begin(), accumulator.sums.end(), 0.0f);
  std::vector<float> right(num_columns);
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < num_columns; ++column) {
      right[column] = shared_element(right_address(product, matrix, column, k), product.element, site);
    }
    for (int row = 0; row < kRows; ++row) {
      float* const sums = accumulator.sums.data() + row * num_columns;
      const float factor = left[row * kDepth + k];
      for (int column = 0; column < num_columns; ++column) sums[column] += factor * right[column];
    }
  }
}

// The element of the lane's registers and the place in Accumulator::sums that belong together.
template <typename Act>
void for_each_register(const Accumulator& accumulator, const Act& act) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4 * accumulator.num_column_tiles; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2);
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      act(accumulator.registers[lane][i], row * 8 * accumulator.num_column_tiles + column);
    }
  }
}

void finish(const Product& product, Site site) {
  Accumulator& accumulator = current->warp->accumulators[product.accumulator];
  compute(product, site);
  if (--accumulator.num_pending > 0) return;
  for_each_register(accumulator, [&](float& value, int at) { value = accumulator.sums[at]; });
}

int find_accumulator(const Accumulator& wanted) {
  std::vector<Accumulator>& all = current->warp->accumulators;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].registers[0] == wanted.registers[0] && all[i].num_pending > 0) return int(i);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].num_pending == 0) {
      all[i] = wanted;
      return int(i);
    }
  }
  all.push_back(wanted);
  return int(all.size()) - 1;
}

void arrive(uint32_t address, uint32_t num_bytes, const char* primitive, Site site) {
  MemoryBarrier& barrier = memory_barrier(address, primitive, site);
  if (barrier.num_missing == 0) fail(std::string(primitive) + ": more threads than the phase has arrivals", site);
  if (barrier.missing_bytes + num_bytes > kMostPhaseBytes) {
    fail(std::string(primitive) + ": a phase has at most " + std::to_string(kMostPhaseBytes) + " bytes", site);
  }
  release_phase(barrier);
  --barrier.num_missing;
  barrier.missing_bytes += num_bytes;
  end_phase_if_complete(barrier, site);
}

}  // namespace

MemoryBarrier& memory_barrier(uint32_t address, const char* primitive, Site site) {
  shared_bytes_at(address, 8, 8, primitive, site);
  const auto found = current->block->memory_barriers.find(address - kSharedBase);
  if (found == current->block->memory_barriers.end()) {
    fail(std::string(primitive) + ": there is no barrier at this address yet", site);
  }
  return found->second;
}

void release_phase(MemoryBarrier& barrier) {
  sanitizer::Order& order = barrier.order[barrier.phase % 2];
  if (barrier.is_begun) {
    order.release();
  } else {
    order.release_anew();
  }
  barrier.is_begun = true;
}

void end_phase_if_complete(MemoryBarrier& barrier, Site site) {
  if (barrier.num_missing > 0 || barrier.missing_bytes != 0) return;
  if (barrier.num_boxes > 0) {
    fail("mbarrier: a phase ends, all bytes that were promised are there, and " + std::to_string(barrier.num_boxes) +
             " boxes are still under way",
         site);
  }
  barrier.num_missing = barrier.num_arrivals;
  barrier.is_begun = false;
  ++barrier.phase;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void check_fenced(uint32_t shared_offset, const std::string& what, Site site) {
  const uint16_t writer = current->block->unfenced_writer[shared_offset / kGranuleBytes];
  if (writer == 0) return;
  fail(what + " shared memory that " +
           (writer == kBoxUnderWay ? "a box is under way to"
                                   : "thread " + std::to_string(writer - 1) + " has written without fence_proxy_async"),
       site);
}

void mbarrier_init(uint32_t address, int num_arrivals, Site site) {
  sanitizer::Quiet quiet;
  const char* const word = shared_bytes_at(address, 8, 8, "mbarrier.init", site);
  if (num_arrivals < 1) fail("mbarrier.init: at least one thread must arrive", site);
  current->block->memory_barriers[address - kSharedBase] = {num_arrivals, num_arrivals, 0, {}, {}, 0, 0, false};
  mark_unfenced(address - kSharedBase, 8);
  {
    sanitizer::Loud loud;
    sanitizer::write(word, 8, EMU_CALLER);
  }
  maybe_yield();
}

void mbarrier_arrive(uint32_t address, Site site) {
  sanitizer::Quiet quiet;
  maybe_yield();
  memory_barrier(address, "mbarrier.arrive", site);
  tell_use(address, EMU_CALLER);
  arrive(address, 0, "mbarrier.arrive", site);
  maybe_yield();
}

void mbarrier_arrive_expect(uint32_t address, uint32_t num_bytes, Site site) {
  sanitizer::Quiet quiet;
  maybe_yield();
  memory_barrier(address, "mbarrier.arrive.expect_tx", site);
  tell_use(address, EMU_CALLER);
  arrive(address, num_bytes, "mbarrier.arrive.expect_tx", site);
  maybe_yield();
}

void mbarrier_wait(uint32_t address, int parity, Site site) {
  sanitizer::Quiet quiet;
  maybe_yield();
  if (parity != 0 && parity != 1) fail("mbarrier wait: a parity is 0 or 1, got " + std::to_string(parity), site);
  while (memory_barrier(address, "mbarrier wait", site).phase % 2 == parity) {
    memory_barrier(address, "mbarrier wait", site).waiting.push_back(current);
    block_on("mbarrier wait", site);
  }
  tell_use(address, EMU_CALLER);
  memory_barrier(address, "mbarrier wait", site).order[parity].acquire();
}

void mark_unfenced(uint32_t shared_offset, uint32_t num_bytes) {
  for (uint32_t granule = shared_offset / kGranuleBytes; granule * kGranuleBytes < shared_offset + num_bytes;
       ++granule) {
    current->block->unfenced_writer[granule] = uint16_t(1 + current->idx);
    current->unfenced_granules.push_back(granule);
  }
}

void fence_proxy_async() {
  sanitizer::Quiet quiet;
  for (const uint32_t granule : current->unfenced_granules) {
    uint16_t& writer = current->block->unfenced_writer[granule];
    if (writer == 1 + current->idx) writer = 0;
  }
  current->unfenced_granules.clear();
  maybe_yield();
}

void set_registers(int count, bool raises, Site site) {
  sanitizer::Quiet quiet;
  if (count % 8 != 0 || count < 24 || count > 256) {
    fail("setmaxnreg: a multiple of 8 in [24, 256], got " + std::to_string(count), site);
  }
  Warp& warp = *current->warp;
  if (raises ? count < warp.num_registers : count > warp.num_registers) {
    fail("setmaxnreg: " + std::to_string(warp.num_registers) + " registers are no " + (raises ? "less" : "more") +
             " than " + std::to_string(count),
         site);
  }
  const int num_taken = (count - warp.num_registers) * kWarpSize;
  collective("setmaxnreg", nullptr, site, [&](void**) { warp.num_registers = count; });
  if (current->lane() != 0) return;
  current->block->num_free_registers -= num_taken;
  if (!raises) {
    for (const auto& thread : machine.threads) {
      if (thread->state == Thread::State::kBlocked && thread->waits_for == kWaitsForRegisters) wake(thread.get());
    }
  }
  while (current->block->num_free_registers < 0) block_on(kWaitsForRegisters, site);
}

void wgmma_fence() {
  current->has_wgmma_fence = true;
}

void wgmma(float* d, int num_column_tiles, LeftOperand a, uint64_t b, bool adds, Element element, Site site) {
  sanitizer::Quiet quiet;
  const void* const line = EMU_CALLER;
  if (!current->has_wgmma_fence) fail("wgmma without wgmma_fence", site);
  struct Argument {
    float* d;
    LeftOperand a;
    uint64_t b;
    bool adds;
  } argument = {d, a, b, adds};
  collective("wgmma", &argument, site, [&](void** lanes) {
    Accumulator accumulator = {};
    accumulator.num_column_tiles = num_column_tiles;
    for (int l = 0; l < kWarpSize; ++l) accumulator.registers[l] = static_cast<Argument*>(lanes[l])->d;
    Product product = {find_accumulator(accumulator), {}, a.descriptor, b, adds, element};
    Accumulator& into = current->warp->accumulators[product.accumulator];
    if (into.num_pending == 0) into.sums.resize(kRows * 8 * num_column_tiles);
    if (a.fragment != nullptr) product.left.resize(kRows * kDepth);
    for (int l = 0; l < kWarpSize; ++l) {
      const Argument& lane = *static_cast<Argument*>(lanes[l]);
      if (lane.b != b || lane.adds != adds || lane.a.descriptor != a.descriptor) {
        fail("wgmma: lane " + std::to_string(l) + " has other operands", site);
      }
      for (int i = 0; a.fragment != nullptr && i < 8; ++i) {  // as mma.m16n8k16 has A
        const int row = l / 4 + 8 * (i / 2 % 2);
        const int k = 2 * (l % 4) + i % 2 + 8 * (i / 4);
        product.left[row * kDepth + k] = element_value(uint16_t(lane.a.fragment[i / 2] >> (16 * (i % 2))), element);
      }
    }
    // First: a sanitizer says more of a race than the check does.
    for_each_lane([&](const Thread& lane) {
      sanitizer::As as(lane.fiber.identity());
      tell_operands(product, 8 * num_column_tiles, line, site);
    });
    check_operands(product, 8 * num_column_tiles, site);
    if (into.num_pending == 0) {
      for_each_register(into, [&](float& value, int at) {
        into.sums[at] = value;
        value = NAN;
      });
    }
    ++into.num_pending;
    ++machine.stats.num_mmas;
    current->warp->open_products.push_back(std::move(product));
  });
}

void wgmma_commit(Site site) {
  sanitizer::Quiet quiet;
  collective("wgmma.commit_group", nullptr, site, [](void**) {
    Warp& warp = *current->warp;
    warp.product_groups.push_back(std::move(warp.open_products));
    warp.open_products.clear();
  });
}

void wgmma_wait(int num_pending, Site site) {
  sanitizer::Quiet quiet;
  const void* const line = EMU_CALLER;
  maybe_yield();
  release_lane();
  collective("wgmma.wait_group", nullptr, site, [&](void**) {
    Warp& warp = *current->warp;
    if (warp.product_groups.size() <= size_t(num_pending)) return;
    // A product is done for every lane that has waited. Told as reads of one of them, behind which the others come:
    // more order between lanes than the hardware promises.
    warp.order.acquire();
    while (warp.product_groups.size() > size_t(num_pending)) {
      for (const Product& product : warp.product_groups.front()) {
        tell_operands(product, 8 * warp.accumulators[product.accumulator].num_column_tiles, line, site);
        finish(product, site);
      }
      warp.product_groups.pop_front();
    }
    warp.order.release();
    acquire_lanes();
  });
  current->has_wgmma_fence = false;
}

}  // namespace emu
