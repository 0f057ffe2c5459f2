// primitives_sm90.cuh: one small kernel per primitive of cuda/prim_sm90.cuh, words in and words out, as primitives.cuh.
#pragma once

#include "cuda/prim_sm90.cuh"
#include "primitives.cuh"

namespace primitives {

constexpr uint32_t kLeftAt = 0;         // of shared memory, in bytes: a matrix of 64 rows of 128 bytes
constexpr uint32_t kRightAt = 8 << 10;  // two panels of 128 rows of 128 bytes
constexpr uint32_t kPanelBytes = 16 << 10;
constexpr uint32_t kBarrierAt = 0;

// Words [0, num_words) of `in` to shared memory, in order, seen by wgmma.
MX_DEVICE void fill_matrices(const uint32_t* in, int num_words) {
  for (int i = thread_idx(); i < num_words; i += 128) st_shared(shared_base() + 4 * i, in[i]);
  fence_proxy_async();
  sync_threads();
}

// in: A (64 rows of 128 bytes), then B, both as they lie in shared memory. out: [thread][column / 8][4].
// d = a b from columns 16 kStep of A's and B's rows on, twice: with kAdds the second time adds.
template <int kColumns, int kStep, bool kAdds, class T>
MX_KERNEL wgmma_product(const uint32_t* in, uint32_t* out) {
  fill_matrices(in, static_cast<int>(kRightAt + kColumns * kSwizzledRowBytes) / 4);
  float d[kColumns / 8][4];
  for (auto& tile : d) {
    for (float& sum : tile) sum = 0.0f;
  }
  const uint64_t a = matrix_descriptor(shared_base() + kLeftAt + 32 * kStep, 0, kSwizzledBlockBytes);
  const uint64_t b = matrix_descriptor(shared_base() + kRightAt + 32 * kStep, 0, kSwizzledBlockBytes);
  wgmma_fence();
  wgmma_shared(d, a, b, false, T{});
  wgmma_shared(d, a, b, kAdds, T{});
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) out[kColumns / 2 * thread_idx() + i] = as_bits(d[i / 4][i % 4]);
}

// in: as wgmma_product, A's fragments first: [thread][4]; B, 16 rows of kColumns in panels of 64 columns that lie
// kPanelBytes apart, from row 16 kStep on. out: as wgmma_product.
template <int kColumns, int kStep, class T>
MX_KERNEL wgmma_from_registers(const uint32_t* in, uint32_t* out) {
  constexpr int kPanels = (kColumns + 63) / 64;
  const uint32_t* const right = in + 4 * 128;
  for (int i = thread_idx(); i < kPanels * static_cast<int>(kPanelBytes) / 4; i += 128) {
    st_shared(shared_base() + 4 * i, right[i]);
  }
  fence_proxy_async();
  sync_threads();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = in[4 * thread_idx() + i];
  float d[kColumns / 8][4];
  for (auto& tile : d) {
    for (float& sum : tile) sum = 1.0f;
  }
  const uint32_t begin = shared_base() + 16 * kStep * kSwizzledRowBytes;
  wgmma_fence();
  wgmma_registers(d, a, matrix_descriptor(begin, kPanelBytes, kSwizzledBlockBytes), true, T{});
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) out[kColumns / 2 * thread_idx() + i] = as_bits(d[i / 4][i % 4]);
}

// Warp 0 writes, arrives at a barrier of 32, and does so again once warp 1 has arrived at another. in: 64 words. out:
// those, read by warp 1 behind the barrier's first and second phase. kWaits false: without waiting for the first.
template <bool kWaits>
MX_KERNEL mbarrier(const uint32_t* in, uint32_t* out) {
  const uint32_t full = shared_base() + kBarrierAt;
  const uint32_t empty = full + 8;
  const uint32_t word = shared_base() + 64 + 4 * (thread_idx() % 32);
  const int lane = thread_idx() % 32;
  if (thread_idx() == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 1);
  }
  sync_threads();
  for (int phase = 0; phase < 2; ++phase) {
    if (thread_idx() < 32) {
      mbarrier_wait(empty, phase ^ 1);  // at once the first time
      st_shared(word, in[32 * phase + lane]);
      mbarrier_arrive(full);
    } else {
      if (kWaits || phase > 0) mbarrier_wait(full, phase);
      out[32 * phase + lane] = ld_shared(word);
      sync_warp();
      if (lane == 0) mbarrier_arrive(empty);
    }
  }
}

// What tests leave out of a load, or do wrong.
enum class BoxFault {
  kNone,
  kNotWaitedFor,  // until what is there has been read
  kTooFewBytes,
  kTooManyBytes,
  kNoBytes,
  kMisaligned,
  kBarrierNotFenced,
  kPlaceNotFenced,
  kReadByWgmma,  // on its way
  kNeverWaitedFor,
};

// Loads the boxes of kRows rows at in[0] to in[3] and at in[4] to in[7], each in a phase of its own. out: their bytes
// as they lie in shared memory, one behind the other. The map's tensor begins at in[16]; of 128 threads.
template <int kRows, BoxFault kFault>
MX_DEVICE void box(const TensorMap& map, const uint32_t* in, uint32_t* out) {
  constexpr uint32_t kBytes = kRows * kSwizzledRowBytes;
  const uint32_t full = shared_base();
  const uint32_t to = full + kSwizzledBlockBytes + (kFault == BoxFault::kMisaligned ? kSwizzledRowBytes : 0);
  if (thread_idx() == 0) {
    prefetch_map(map);
    mbarrier_init(full, 128);
    if (kFault != BoxFault::kBarrierNotFenced) fence_proxy_async();
    if (kFault == BoxFault::kPlaceNotFenced) st_shared(to, 0);
  }
  sync_threads();
  for (int phase = 0; phase < 2; ++phase) {
    if (thread_idx() == 0) {
      constexpr int kPromised = kFault == BoxFault::kTooFewBytes    ? kBytes / 2
                                : kFault == BoxFault::kTooManyBytes ? kBytes + 16
                                                                    : kBytes;
      if (kFault == BoxFault::kNoBytes) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, kPromised);
      }
      const int* const x = reinterpret_cast<const int*>(in) + 4 * phase;
      load_box(to, map, x[0], x[1], x[2], x[3], full);
    } else {
      mbarrier_arrive(full);
    }
    if (kFault == BoxFault::kReadByWgmma) {
      sync_threads();
      float d[8][4] = {};
      const uint64_t matrix = matrix_descriptor(to, 0, kSwizzledBlockBytes);
      wgmma_fence();
      wgmma_shared(d, matrix, matrix, false, f16{});
      wgmma_commit();
      wgmma_wait<0>();
    }
    if (kFault == BoxFault::kNeverWaitedFor) return;
    if (kFault != BoxFault::kNotWaitedFor) mbarrier_wait(full, phase);
    for (uint32_t i = thread_idx(); i < kBytes / 4; i += 128) out[kBytes / 4 * phase + i] = ld_shared(to + 4 * i);
    if (kFault == BoxFault::kNotWaitedFor) mbarrier_wait(full, phase);
    sync_threads();  // before the place is used again
  }
}

// Four warpgroups: two give registers away, two take them. out: a word per thread.
MX_KERNEL registers(const uint32_t*, uint32_t* out) {
  if (thread_idx() < 256) {
    lower_registers<40>();
  } else {
    raise_registers<216>();
  }
  out[thread_idx()] = thread_idx();
}

// ---- kernels that are wrong -----------------------------------------------------------------------------------------

// What is wrong, by number.
template <int kWrong>
MX_KERNEL bad_wgmma(const uint32_t* in, uint32_t* out) {
  for (int i = thread_idx(); i < 4096; i += 128) st_shared(shared_base() + 4 * i, in[i % 64]);
  if (kWrong != 0) fence_proxy_async();
  sync_threads();
  const uint32_t begin = shared_base() + (kWrong == 2 ? 128 : 0);
  const uint64_t matrix = matrix_descriptor(begin, 0, kSwizzledBlockBytes);
  float d[8][4] = {};
  if (kWrong != 1) wgmma_fence();
  wgmma_shared(d, matrix, matrix, false, f16{});
  wgmma_commit();
  if (kWrong == 3) out[thread_idx()] = as_bits(d[0][0]);  // before the wait
  if (kWrong == 4) {                                      // its matrices overwritten before the wait
    sync_threads();
    for (int i = thread_idx(); i < 4096; i += 128) st_shared(shared_base() + 4 * i, 0);
    sync_threads();
  }
  if (kWrong != 5) wgmma_wait<0>();
  if (kWrong == 4) out[thread_idx()] = as_bits(d[0][0]);
}
MX_KERNEL barrier_not_there(const uint32_t*, uint32_t*) {
  mbarrier_wait(shared_base(), 0);
}
MX_KERNEL too_many_registers(const uint32_t*, uint32_t*) {
  raise_registers<240>();
}

}  // namespace primitives
