// block_ops.cuh: what the threads of a block find together: prefix sums, totals and maxima of one value each.
// Method  within a warp by shuffles, log2(32) = 5 steps; the warps' results go through shared memory, where every warp
//         combines all of them in the same way, so that no second barrier is needed
// Grid    a block of any number of warps, at most 32
// Memory  kBlockOpsBytes of shared memory from shared_base() on
// Source  parallel prefix sums, Hillis and Steele 1986 (doi 10.1145/7902.7903)
#pragma once

#include "cuda/prim.cuh"

namespace mixattn {
namespace cuda {

constexpr int kMostWarps = 32;
constexpr int kMostValues = 4;  // that one operation takes from each thread
constexpr uint32_t kBlockOpsBytes = kMostWarps * kMostValues * sizeof(int64_t);

struct Block {
  int thread;
  int num_threads;
  int lane;
  int warp;
  int num_warps;
};

MX_DEVICE Block this_block() {
  const int thread = mx::thread_idx();
  const int num_threads = mx::num_threads();
  return {thread, num_threads, thread % mx::kWarpSize, thread / mx::kWarpSize, num_threads / mx::kWarpSize};
}

MX_DEVICE int64_t shared_value(int warp, int value) {
  const uint32_t address = mx::shared_base() + (value * kMostWarps + warp) * sizeof(int64_t);
  const uint64_t high = static_cast<uint32_t>(mx::ld_shared(address + sizeof(int32_t)));
  return static_cast<int64_t>(high << 32 | static_cast<uint32_t>(mx::ld_shared(address)));
}
MX_DEVICE void set_shared_value(int warp, int value, int64_t to) {
  const uint32_t address = mx::shared_base() + (value * kMostWarps + warp) * sizeof(int64_t);
  mx::st_shared(address, static_cast<int32_t>(to));
  mx::st_shared(address + sizeof(int32_t), static_cast<int32_t>(to >> 32));
}

// value[i] of each thread becomes the sum of those of all threads before it, added to carry[i]; carry[i], the same in
// every thread, grows by the sum over the block.
template <int kCount>
MX_DEVICE void exclusive_sums(const Block& b, int64_t (&value)[kCount], int64_t (&carry)[kCount]) {
  static_assert(kCount <= kMostValues, "room in shared memory");
  int64_t own[kCount];
  MX_UNROLL
  for (int i = 0; i < kCount; ++i) own[i] = value[i];
  MX_UNROLL
  for (int distance = 1; distance < mx::kWarpSize; distance *= 2) {
    const int from = b.lane >= distance ? b.lane - distance : b.lane;
    MX_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int64_t before = mx::shfl_idx(value[i], from);
      value[i] += b.lane >= distance ? before : 0;
    }
  }
  mx::sync_threads();  // who still reads the sums or results of the operation before is done
  if (b.lane == mx::kWarpSize - 1) {
    MX_UNROLL
    for (int i = 0; i < kCount; ++i) set_shared_value(b.warp, i, value[i]);
  }
  mx::sync_threads();  // the sums of the warps are there
  MX_UNROLL
  for (int i = 0; i < kCount; ++i) value[i] += carry[i] - own[i];
  MX_UNROLL
  for (int i = 0; i < kCount; ++i) {
    int64_t of_warp = b.lane < b.num_warps ? shared_value(b.lane, i) : 0;
    MX_UNROLL
    for (int distance = 1; distance < mx::kWarpSize; distance *= 2) {
      const int64_t before = mx::shfl_idx(of_warp, b.lane >= distance ? b.lane - distance : b.lane);
      of_warp += b.lane >= distance ? before : 0;
    }
    const int64_t of_warps_before = mx::shfl_idx(of_warp, b.warp > 0 ? b.warp - 1 : 0);
    value[i] += b.warp > 0 ? of_warps_before : 0;
    carry[i] += mx::shfl_idx(of_warp, mx::kWarpSize - 1);
  }
}

// value[i] of every thread becomes combine() of those of all threads; combine is associative and commutative, and
// combine(x, kNothing) is x.
template <int kCount, class Combine>
MX_DEVICE void reduce(const Block& b, int64_t (&value)[kCount], int64_t nothing, const Combine& combine) {
  static_assert(kCount <= kMostValues, "room in shared memory");
  MX_UNROLL
  for (int mask = mx::kWarpSize / 2; mask > 0; mask /= 2) {
    MX_UNROLL
    for (int i = 0; i < kCount; ++i) value[i] = combine(value[i], mx::shfl_idx(value[i], b.lane ^ mask));
  }
  mx::sync_threads();  // as above
  if (b.lane == 0) {
    MX_UNROLL
    for (int i = 0; i < kCount; ++i) set_shared_value(b.warp, i, value[i]);
  }
  mx::sync_threads();  // the warps' results are there
  MX_UNROLL
  for (int i = 0; i < kCount; ++i) {
    value[i] = b.lane < b.num_warps ? shared_value(b.lane, i) : nothing;
    MX_UNROLL
    for (int mask = mx::kWarpSize / 2; mask > 0; mask /= 2) {
      value[i] = combine(value[i], mx::shfl_idx(value[i], b.lane ^ mask));
    }
  }
}

// The last of [0, n) whose begin is at most idx; begin(0) <= idx, and begin does not decrease.
template <class Begin>
MX_DEVICE int32_t last_from(int32_t n, int32_t idx, const Begin& begin) {
  int32_t low = 0;
  int32_t high = n;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (begin(middle) <= idx) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace cuda
}  // namespace mixattn
