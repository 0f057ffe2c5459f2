// primitives.cuh: one small kernel per primitive of cuda/prim.cuh, words in and words out, for test_primitives.py.
// Written for the emulation and for nvcc alike: the same inputs on a GPU settle whether both sides mean the same.
#pragma once

#include "cuda/prim.cuh"

namespace primitives {

using namespace mx;

MX_DEVICE float as_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } word = {bits};
  return word.value;
}
MX_DEVICE uint32_t as_bits(float value) {
  union {
    float value;
    uint32_t bits;
  } word = {value};
  return word.bits;
}

// Copies words [0, 4 * 32) of `in` to shared memory: 16 bytes per lane, in order.
MX_DEVICE void fill_shared(const uint32_t* in) {
  for (int i = 0; i < 4; ++i) st_shared(shared_base() + 16 * thread_idx() + 4 * i, in[4 * thread_idx() + i]);
  sync_threads();
}

// in: four (8, 8) matrices of 16-bit elements. out: [lane][matrix].
template <bool kIsTransposed>
MX_KERNEL ldmatrix(const uint32_t* in, uint32_t* out) {
  fill_shared(in);
  uint32_t r[4];
  const uint32_t address = shared_base() + 16 * thread_idx();
  if (kIsTransposed) {
    ldmatrix_x4_trans(r, address);
  } else {
    ldmatrix_x4(r, address);
  }
  for (int i = 0; i < 4; ++i) out[4 * thread_idx() + i] = r[i];
}

// in: [lane][a0 a1 a2 a3 b0 b1 d0 d1 d2 d3]. out: [lane][d0 d1 d2 d3].
template <class T>
MX_KERNEL mma(const uint32_t* in, uint32_t* out) {
  const uint32_t* const lane = in + 10 * thread_idx();
  const uint32_t a[4] = {lane[0], lane[1], lane[2], lane[3]};
  float d[4] = {as_float(lane[6]), as_float(lane[7]), as_float(lane[8]), as_float(lane[9])};
  mma_m16n8k16(d, a, lane[4], lane[5], T{});
  for (int i = 0; i < 4; ++i) out[4 * thread_idx() + i] = as_bits(d[i]);
}

// in: lane mask, then a float per lane.
MX_KERNEL shuffle_xor(const uint32_t* in, uint32_t* out) {
  out[thread_idx()] = as_bits(shfl_xor(as_float(in[1 + thread_idx()]), in[0]));
}

// in: [lane][source lane, low word, high word]. out: [lane][low word, high word].
MX_KERNEL shuffle_idx(const uint32_t* in, uint32_t* out) {
  const uint32_t* const lane = in + 3 * thread_idx();
  const uint64_t value = shfl_idx(static_cast<int64_t>(lane[1] | uint64_t{lane[2]} << 32), lane[0]);
  out[2 * thread_idx()] = static_cast<uint32_t>(value);
  out[2 * thread_idx() + 1] = static_cast<uint32_t>(value >> 32);
}

// in: a predicate per lane. out: a word per lane.
MX_KERNEL any_lane(const uint32_t* in, uint32_t* out) {
  out[thread_idx()] = mx::any(in[thread_idx()] != 0);
}

// in: [lane][is_valid, 3 unused, 4 words]. out: [lane][the 4 words]; kWaits false: what is there before the wait.
template <bool kWaits>
MX_KERNEL copy(const uint32_t* in, uint32_t* out) {
  const uint32_t address = shared_base() + 16 * thread_idx();
  cp_async16(address, in + 8 * thread_idx() + 4, in[8 * thread_idx()] != 0);
  cp_async_commit();
  if (kWaits) cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * thread_idx() + i] = ld_shared(address + 4 * i);
  cp_async_wait<0>();
}

// in: [lane][first group's 4 words, second group's]. out: [lane][both], read when one group may be under way.
MX_KERNEL copy_groups(const uint32_t* in, uint32_t* out) {
  const uint32_t address = shared_base() + 32 * thread_idx();
  for (int group = 0; group < 2; ++group) {
    cp_async16(address + 16 * group, in + 8 * thread_idx() + 4 * group, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < 8; ++i) out[8 * thread_idx() + i] = ld_shared(address + 4 * i);
  cp_async_wait<0>();
}

// A thread reads what its neighbour of the next warp wrote. kBarrier: 0 none, 1 block, 2 named, 3 warp.
template <int kBarrier>
MX_KERNEL neighbour(const uint32_t* in, uint32_t* out) {
  const int num_threads = 64;
  st_shared(shared_base() + 4 * thread_idx(), in[thread_idx()]);
  if (kBarrier == 1) sync_threads();
  if (kBarrier == 2) bar_sync(3, num_threads);
  if (kBarrier == 3) sync_warp();
  out[thread_idx()] = ld_shared(shared_base() + 4 * ((thread_idx() + 32) % num_threads));
}

// Warp 0 writes and arrives, warp 1 waits and reads. in: 32 words. out: the same.
MX_KERNEL arrive(const uint32_t* in, uint32_t* out) {
  const int lane = thread_idx() % 32;
  if (thread_idx() < 32) {
    st_shared(shared_base() + 4 * lane, in[lane]);
    bar_arrive(1, 64);
  } else {
    bar_sync(1, 64);
    out[lane] = ld_shared(shared_base() + 4 * lane);
  }
}

// Lane l writes for lane 31 - l of its warp.
template <bool kSyncs>
MX_KERNEL lanes(const uint32_t* in, uint32_t* out) {
  st_shared(shared_base() + 4 * thread_idx(), in[thread_idx()]);
  if (kSyncs) sync_warp();
  out[thread_idx()] = ld_shared(shared_base() + 4 * (31 - thread_idx()));
}

// Both blocks store a word per thread; the one that draws the second ticket reads the other's. in: zeros, [0] of which
// is the ticket. kFence: 0 none, 1 between barrier and ticket (right), 2 before the barrier by thread 0 alone (wrong).
template <int kFence>
MX_KERNEL message(uint32_t* in, uint32_t* out) {
  float* const messages = reinterpret_cast<float*>(in + 4);
  const uint32_t drawn = shared_base();
  st_global(messages + 64 * block_idx() + thread_idx(), 1.0f + thread_idx());
  if (kFence == 2 && thread_idx() == 0) fence_gpu();
  sync_threads();
  if (thread_idx() == 0) {
    if (kFence == 1) fence_gpu();
    st_shared(drawn, atomic_add_relaxed(reinterpret_cast<int32_t*>(in), 1));
    if (kFence == 1) fence_gpu();
  }
  sync_threads();
  if (ld_shared(drawn) == 1) {
    const float* const other = messages + 64 * (1 - block_idx());
    out[thread_idx()] = as_bits(ld_global_cg(other + thread_idx()));
    const mx::float2 pair = ld_global_cg_v2(other + thread_idx() / 2 * 2);
    out[64 + thread_idx()] = as_bits(thread_idx() % 2 == 0 ? pair.x : pair.y);
  }
}

// Stores of every width, read back by the same block. out: [lane][word, float, pair].
MX_KERNEL store_widths(const uint32_t* in, uint32_t* out) {
  const int lane = thread_idx();
  const float value = as_float(in[lane]);
  st_global(static_cast<void*>(out + 4 * lane), in[lane]);
  st_global(reinterpret_cast<float*>(out + 4 * lane + 1), value);
  st_global_v2(reinterpret_cast<float*>(out + 4 * lane + 2), {value, -value});
}

// in: a float per lane. out: [lane][ex2, lg2, rcp].
MX_KERNEL functions(const uint32_t* in, uint32_t* out) {
  const float x = as_float(in[thread_idx()]);
  out[3 * thread_idx()] = as_bits(ex2(x));
  out[3 * thread_idx() + 1] = as_bits(lg2(x));
  out[3 * thread_idx() + 2] = as_bits(rcp(x));
}

// in: [lane][low, high]. out: a word per lane.
template <class T>
MX_KERNEL pack(const uint32_t* in, uint32_t* out) {
  out[thread_idx()] = pack2(as_float(in[2 * thread_idx()]), as_float(in[2 * thread_idx() + 1]), T{});
}

// in: a byte offset into shared memory per lane. kWidth: bytes; 32 is ldmatrix.
template <int kWidth>
MX_KERNEL banks(const uint32_t* in, uint32_t*) {
  const uint32_t address = shared_base() + in[thread_idx()];
  if (kWidth == 4) st_shared(address, 0);
  if (kWidth == 8) ld_shared_v2(address);
  if (kWidth == 16) {
    cp_async16(address, in, false);
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (kWidth == 32) {
    uint32_t r[4];
    ldmatrix_x4(r, address);
  }
}

// Of the block. out: a word per thread.
MX_KERNEL block_size(const uint32_t*, uint32_t* out) {
  out[thread_idx()] = num_threads();
}

// in: [lane][4 words]. out: [lane][the 4 words; the last two again, by a store of 8 bytes; 2 unwritten].
MX_KERNEL move_vectors(const uint32_t* in, uint32_t* out) {
  const Words4 words = ld_global_v4(in + 4 * thread_idx());
  st_global_v4(out + 8 * thread_idx(), words);
  st_global_v2(out + 8 * thread_idx() + 4, words.word[2], words.word[3]);
}

// in: a pair of elements per lane. out: [lane][lower, upper] as float32.
template <class T>
MX_KERNEL unpack(const uint32_t* in, uint32_t* out) {
  const mx::float2 pair = unpack2(in[thread_idx()], T{});
  out[2 * thread_idx()] = bits_of(pair.x);
  out[2 * thread_idx() + 1] = bits_of(pair.y);
}

// in: [lane][a, b, c, x]. out: [lane][a b + c, each rounded; a / b; x as an integer].
MX_KERNEL rounded(const uint32_t* in, uint32_t* out) {
  const uint32_t* const lane = in + 4 * thread_idx();
  const float a = float_of(lane[0]);
  const float b = float_of(lane[1]);
  out[3 * thread_idx()] = bits_of(add_rn(mul_rn(a, b), float_of(lane[2])));
  out[3 * thread_idx() + 1] = bits_of(div_rn(a, b));
  out[3 * thread_idx() + 2] = static_cast<uint32_t>(round_to_int(float_of(lane[3])));
}

// in: [lane][4 words]. out: the words of the lane after, by way of shared memory.
MX_KERNEL shared_vectors(const uint32_t* in, uint32_t* out) {
  Words4 words;
  for (int i = 0; i < 4; ++i) words.word[i] = in[4 * thread_idx() + i];
  st_shared_v4(shared_base() + 16 * thread_idx(), words);
  sync_warp();
  words = ld_shared_v4(shared_base() + 16 * ((thread_idx() + 1) % kWarpSize));
  for (int i = 0; i < 4; ++i) out[4 * thread_idx() + i] = words.word[i];
}

// in: [lane][a, b, selector]. out: a word per lane.
MX_KERNEL permute_bytes(const uint32_t* in, uint32_t* out) {
  const uint32_t* const lane = in + 3 * thread_idx();
  out[thread_idx()] = byte_perm(lane[0], lane[1], lane[2]);
}

// in: [lane][a, b, c], pairs of float16. out: a pair per lane.
MX_KERNEL fma_pairs(const uint32_t* in, uint32_t* out) {
  const uint32_t* const lane = in + 3 * thread_idx();
  out[thread_idx()] = fma2_f16(lane[0], lane[1], lane[2]);
}

// ---- kernels that are wrong -----------------------------------------------------------------------------------------

MX_KERNEL divergent(const uint32_t*, uint32_t*) {
  if (thread_idx() < 16) {
    sync_warp();
  } else {
    sync_warp();
  }
}
MX_KERNEL deadlock(const uint32_t*, uint32_t*) {
  if (thread_idx() < 32) sync_threads();
}
MX_KERNEL barrier_counts(const uint32_t*, uint32_t*) {
  bar_sync(1, thread_idx() < 32 ? 64 : 32);
}
// in: what is wrong, by number.
MX_KERNEL bad_access(const uint32_t* in, uint32_t* out) {
  switch (in[0]) {
    case 0:
      return cp_async16(shared_base() + 8, in, true);
    case 1:
      return cp_async16(shared_base(), in + 1, true);
    case 2:
      return cp_async16(shared_base(), in + 4096, true);
    case 3:
      return st_shared(shared_base() + 4096, 0);
    case 4:
      return st_shared(0, 0);
    case 5:
      return st_global(out + 4096, 0u);
    case 6:
      return cp_async16(shared_base(), in, true);
    default:
      shfl_idx(int64_t{0}, 32);
  }
}

}  // namespace primitives
