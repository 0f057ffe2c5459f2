// append_kv.cuh: this step's K (rotated) and V into their pages, quantised where the cache is, and Q rotated.
// Math    (a, b) -> (a cos - b sin, b cos + a sin) for each pair (a, b) of a head's leading rotary_dim dimensions
//         Quantised: round(x / scale), scale given or a head's largest |x| / the largest stored value, at least 2^-126
// Method  a lane takes 8 neighbouring dimensions of a head's row, 16 bytes, so that a warp reads and writes whole
//         lines; the partner of a neox pair is read again, from L1. float32, rounded once, no product fused: what is
//         stored are the bits of the reference. A row's largest magnitude is found by shuffles, as an integer
// Grid    a row of num_heads = 2 num_kv_heads + num_q_heads per token and head takes max(head_dim, v_head_dim) / 8
//         lanes, rounded up to a power of two; blocks of kAppendThreads
// Shapes  as AppendKvParams; k, v, q in f16 or bf16
// Memory  reads and writes each element once, cos and sin of a token once per head, from L1 and L2; no shared memory
// Limits  as check_append_kv: addresses and strides in whole vectors of 8 elements; at most 2^31 - 1 blocks
// Twins   triton_kernels/kv_cache.py, csrc/cpu/kv_cache-inl.h; truth ops/reference.py append_kv_reference
// Source  arXiv:2104.09864, equation 34; float8: arXiv:2209.05433
#pragma once

#include "cuda/launch_params.h"
#include "cuda/rows.cuh"

namespace mixattn {
namespace cuda {

constexpr int kAppendThreads = 128;
constexpr float kLeastRowScale = 0x1p-126f;
constexpr int32_t kInt4Zero = 8;  // the nibble that stands for 0

// The largest value that a row's largest |x| is put on, where rows have scales of their own.
MIXATTN_HD constexpr float row_max(KvDType stored) {
  return stored == KvDType::kInt8         ? 127.0f
         : stored == KvDType::kInt4       ? 7.0f
         : stored == KvDType::kFloat8E4M3 ? 448.0f
                                          : 57344.0f;
}

// x between the bounds; NaN stays.
MX_DEVICE float saturate(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

// The code of a saturated x, to nearest even; NaN becomes 0x7f. Integers, because sm_80 has no instruction for it.
template <int kMantissaBits, int kBias>
MX_DEVICE uint32_t float8_code(float x) {
  constexpr int kDropped = 23 - kMantissaBits;
  const uint32_t bits = mx::bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 24 & 0x80;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude < uint32_t{128 - kBias} << 23) {
    // A subnormal. In the sum with 2^23 of its steps, float32's last bit is one step.
    constexpr uint32_t kShiftBits = uint32_t{127 + 1 - kBias - kMantissaBits + 23} << 23;
    return (mx::bits_of(mx::add_rn(mx::float_of(magnitude), mx::float_of(kShiftBits))) & 0x7fffff) | sign;
  }
  const uint32_t rounded = magnitude + ((1u << (kDropped - 1)) - 1) + (magnitude >> kDropped & 1);
  return ((rounded >> kDropped) - (uint32_t{127 - kBias} << kMantissaBits)) | sign;
}

// What is stored of a value in units of its scale; of int4 a nibble.
template <KvDType kStored>
MX_DEVICE uint32_t code_of(float x) {
  if constexpr (kStored == KvDType::kFloat8E4M3) return float8_code<3, 7>(saturate(x, -448.0f, 448.0f));
  if constexpr (kStored == KvDType::kFloat8E5M2) return float8_code<2, 15>(saturate(x, -57344.0f, 57344.0f));
  const float finite = x == x ? x : 0.0f;  // integers have no NaN
  if constexpr (kStored == KvDType::kInt8) {
    return static_cast<uint32_t>(mx::round_to_int(saturate(finite, -128.0f, 127.0f))) & 0xff;
  }
  return static_cast<uint32_t>(mx::round_to_int(saturate(finite, -8.0f, 7.0f)) + kInt4Zero);
}

// Rotates x, the dimensions [dim, dim + 8) of row.
template <class T>
MX_DEVICE void rotate(const AppendKvParams& p, const float* cos_sin, const uint16_t* row, int dim,
                      float (&x)[kLaneElements]) {
  const int rotary_dim = static_cast<int>(p.rotary_dim);
  const int half = rotary_dim / 2;
  if (dim >= rotary_dim) return;
  if (p.interleaved) {
    MX_UNROLL
    for (int i = 0; i < kLaneElements; i += 2) {
      if (dim + i >= rotary_dim) continue;
      const float cos = cos_sin[(dim + i) / 2];
      const float sin = cos_sin[half + (dim + i) / 2];
      const float a = x[i];
      const float b = x[i + 1];
      x[i] = mx::add_rn(mx::mul_rn(a, cos), -mx::mul_rn(b, sin));
      x[i + 1] = mx::add_rn(mx::mul_rn(b, cos), mx::mul_rn(a, sin));
    }
    return;
  }
  float partner[kLaneElements];
  if (half % kLaneElements == 0) {
    unpack_row<T>(mx::ld_global_v4(row + (dim < half ? dim + half : dim - half)), partner);
  } else {
    MX_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const int d = dim + i;
      partner[i] = d < rotary_dim ? mx::unpack2(row[d < half ? d + half : d - half], T{}).x : 0.0f;
    }
  }
  MX_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    const int d = dim + i;
    if (d >= rotary_dim) continue;
    const int pair = d < half ? d : d - half;
    const float turned = mx::mul_rn(partner[i], cos_sin[half + pair]);
    x[i] = mx::add_rn(mx::mul_rn(x[i], cos_sin[pair]), d < half ? -turned : turned);
  }
}

// One lane's 8 elements, quantised, to their place in the page.
template <KvDType kStored>
MX_DEVICE void store_codes(const float (&x)[kLaneElements], float scale, uint8_t* row, int dim) {
  constexpr int kBits = kStored == KvDType::kInt4 ? 4 : 8;
  uint64_t codes = 0;
  MX_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    codes |= static_cast<uint64_t>(code_of<kStored>(mx::div_rn(x[i], scale))) << (kBits * i);
  }
  if (kStored == KvDType::kInt4) {
    mx::st_global(row + dim / 2, static_cast<uint32_t>(codes));
  } else {
    mx::st_global_v2(row + dim, static_cast<uint32_t>(codes), static_cast<uint32_t>(codes >> 32));
  }
}

// Of K and V: rows of both take as many lanes.
MIXATTN_HD inline int64_t widest_head(const AppendKvParams& p) {
  return p.head_dim > p.v_head_dim ? p.head_dim : p.v_head_dim;
}

template <class T, KvDType kStored>
MX_DEVICE void append_kv(const AppendKvParams& p) {
  const int lanes = lanes_per_row(widest_head(p));
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int num_heads = 2 * num_kv_heads + static_cast<int>(p.num_q_heads);
  const int64_t row_idx = (int64_t{mx::block_idx()} * kAppendThreads + mx::thread_idx()) / lanes;
  const int64_t token = row_idx / num_heads;
  const int head = static_cast<int>(row_idx % num_heads);
  const int dim = mx::thread_idx() % lanes * kLaneElements;
  const bool is_q = head >= 2 * num_kv_heads;
  const bool is_v = !is_q && head >= num_kv_heads;
  const bool is_there = token < p.num_tokens && dim < (is_v ? p.v_head_dim : p.head_dim);
  const int64_t own_head = is_q ? head - 2 * num_kv_heads : is_v ? head - num_kv_heads : head;

  mx::Words4 words = {};
  float x[kLaneElements] = {};  // of a lane that is not there: zeros
  const bool is_rotated = p.positions != nullptr && !is_v;
  if (is_there) {
    const uint16_t* const source = static_cast<const uint16_t*>(is_q   ? p.q
                                                                : is_v ? p.v
                                                                       : p.k) +
                                   token * (is_q   ? p.q_token_stride
                                            : is_v ? p.v_token_stride
                                                   : p.k_token_stride) +
                                   own_head * (is_q   ? p.q_head_stride
                                               : is_v ? p.v_head_stride
                                                      : p.k_head_stride);
    words = mx::ld_global_v4(source + dim);
    unpack_row<T>(words, x);
    if (is_rotated) rotate<T>(p, p.rope_cos_sin + p.positions[token] * p.rope_stride, source, dim, x);
  }
  uint32_t largest = 0;  // bits of a magnitude: they are ordered as the values are, infinity and NaN last
  if (is_quantised(kStored)) {
    MX_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const uint32_t magnitude = mx::bits_of(x[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const uint32_t other = mx::bits_of(mx::shfl_xor(mx::float_of(largest), mask));
      largest = other > largest ? other : largest;
    }
  }
  mx::sync_warp();  // q_out may be q: all of a row has been read
  if (!is_there) return;

  if (is_rotated || is_q) {
    words = pack_row<T>(x);
  }
  if (is_q) {
    mx::st_global_v4(
        static_cast<uint16_t*>(p.q_out) + token * p.q_out_token_stride + own_head * p.q_out_head_stride + dim, words);
    return;
  }
  const int64_t slot = p.slot_mapping[token];
  const int64_t page = slot / p.page_size;
  const int64_t offset = slot % p.page_size;
  const int64_t to =
      is_v ? page * p.v_cache_page_stride + offset * p.v_cache_token_stride + own_head * p.v_cache_head_stride
           : page * p.k_cache_page_stride + offset * p.k_cache_token_stride + own_head * p.k_cache_head_stride;
  void* const cache = is_v ? p.v_cache : p.k_cache;
  if constexpr (!is_quantised(kStored)) {
    mx::st_global_v4(static_cast<uint16_t*>(cache) + to + dim, words);
  } else {
    const KvScale& given = is_v ? p.v_scale : p.k_scale;
    float scale = given.value;
    if (given.is_per_token) {
      const float found = mx::div_rn(mx::float_of(largest), row_max(kStored));
      const uint32_t kNaN = 0x7fc00000u;
      scale = largest >= 0x7f800000u ? mx::float_of(kNaN) : found > kLeastRowScale ? found : kLeastRowScale;
      if (dim == 0) {
        mx::st_global(
            given.data + page * given.page_stride + offset * given.token_stride + own_head * given.head_stride, scale);
      }
    } else if (given.data != nullptr) {
      scale = given.data[own_head * given.head_stride];
    }
    store_codes<kStored>(x, scale, static_cast<uint8_t*>(cache) + to, dim);
  }
}

}  // namespace cuda
}  // namespace mixattn
