// kv_cache-inl.h: rotate and store rows of K, store rows of V, rotate rows of q, for one ISA.
// Math    pair (x, y) of a head becomes (x cos - y sin, y cos + x sin) of its position; neox pairs are (i, i + half),
//         interleaved ones (2i, 2i + 1), i < half = rotary_dim / 2; dimensions from rotary_dim on stay as they are.
//         Quantised caches store x / scale, rounded to nearest (ties to even) and saturated. Scales per token are found
//         here: a row's largest |x| / the largest stored value, at least 2^-126, so that a row of zeros has one to
//         divide by; NaN for a row with NaN or infinity, so that it shows in attention. int8 and int4 store NaN as 0,
//         float8 as 0x7f.
// Method  a head's row through a float32 buffer on the stack, one rounding at the end; what is neither rotated nor
//         converted is copied bit by bit. Products and quotients are not fused, so that torch gets the same bits.
// Grid    rows [begin, end) of the call; cpu/kv_cache.cpp deals them to its threads
// Shapes  as AppendKvParams
// Memory  reads and writes (num_q_heads + num_kv_heads) head_dim + num_kv_heads v_head_dim elements per row, writes
//         2 num_kv_heads scales
// Limits  head_dim and v_head_dim multiples of 8, at most 256; rotary_dim even, at most head_dim
// Twins   cuda/append_kv.cuh, triton_kernels/kv_cache.py; truth ops/reference.py
// Source  arXiv:2104.09864, equation 34
#pragma once

#include <string.h>

#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "cpu/vec_quantized.h"

namespace mixattn {
namespace cpu {
namespace {

MIXATTN_INLINE void rotate_neox(float* x, const float* cos, const float* sin, int64_t half) {
  float* y = x + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(y + i), c = load(cos + i), s = load(sin + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(y + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = y[i];
    x[i] = a * cos[i] - b * sin[i];
    y[i] = b * cos[i] + a * sin[i];
  }
}

MIXATTN_INLINE void rotate_interleaved(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

// target[d] = source[d], converted.
template <typename Source, typename Target>
MIXATTN_INLINE void convert_row(const Source* source, int64_t head_dim, Target* target) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(target + d, load(source + d));
  if (kLanes > 8 && d < head_dim) store_half(target + d, load_half(source + d));
}

MIXATTN_INLINE void rotate_row(const AppendKvParams& p, const float* cos_sin, float* x) {
  const int64_t half = p.rotary_dim / 2;
  if (p.interleaved) {
    rotate_interleaved(x, cos_sin, cos_sin + half, half);
  } else {
    rotate_neox(x, cos_sin, cos_sin + half, half);
  }
}

// One cache of a call, K's or V's.
struct Cache {
  void* data;
  int64_t page_stride, token_stride, head_stride;
  const KvScale& scale;
};

struct Slot {
  int64_t page;
  int64_t token;
  int64_t head;
};

template <typename S>
MIXATTN_INLINE S* slot_of(const Cache& cache, Slot at) {
  return static_cast<S*>(cache.data) + at.page * cache.page_stride + at.token * cache.token_stride +
         at.head * cache.head_stride;
}

// The scale of a row of its own.
template <typename S>
MIXATTN_INLINE float find_scale(const float* x, int64_t head_dim) {
  Vec largest_lanes = zero(), not_finite_lanes = zero();  // the latter 0, or NaN if any x is NaN or infinite
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    largest_lanes = max(largest_lanes, abs(load(x + d)));
    not_finite_lanes = fmadd(load(x + d), zero(), not_finite_lanes);
  }
  float largest = max_lanes(largest_lanes), not_finite = sum_lanes(not_finite_lanes);
  for (; d < head_dim; ++d) {
    const float magnitude = __builtin_fabsf(x[d]);
    largest = magnitude > largest ? magnitude : largest;
    not_finite += x[d] * 0.0f;
  }
  const float scale = largest / QuantizedRange<S>::kRowMax;
  return (scale > kMinRowScale ? scale : kMinRowScale) + not_finite;
}

// Stores the row x, which is divided on the way, in a quantised cache.
template <typename S>
MIXATTN_INLINE void quantize_row(float* x, int64_t head_dim, const Cache& cache, Slot at) {
  const KvScale& s = cache.scale;
  float scale = s.value;
  if (s.is_per_token) {
    scale = find_scale<S>(x, head_dim);
    s.data[at.page * s.page_stride + at.token * s.token_stride + at.head * s.head_stride] = scale;
  } else if (s.data != nullptr) {
    scale = s.data[at.head * s.head_stride];
  }
  for (int64_t d = 0; d < head_dim; ++d) x[d] /= scale;
  narrow_row(x, head_dim, slot_of<S>(cache, at));
}

MIXATTN_INLINE void store_row(const AppendKvParams& p, float* x, int64_t head_dim, const Cache& cache, Slot at) {
  switch (p.kv_dtype) {
    case KvDType::kFloat32:
      return convert_row(x, head_dim, slot_of<float>(cache, at));
    case KvDType::kBFloat16:
      return convert_row(x, head_dim, slot_of<BFloat16>(cache, at));
    case KvDType::kFloat16:
      return convert_row(x, head_dim, slot_of<Float16>(cache, at));
    case KvDType::kInt8:
      return quantize_row<Int8>(x, head_dim, cache, at);
    case KvDType::kFloat8E4M3:
      return quantize_row<Float8E4M3>(x, head_dim, cache, at);
    case KvDType::kFloat8E5M2:
      return quantize_row<Float8E5M2>(x, head_dim, cache, at);
    case KvDType::kInt4:
      return quantize_row<Int4Pair>(x, head_dim, cache, at);
  }
}

// Stores one row of K or V, rotated unless cos_sin is nullptr.
template <typename T>
MIXATTN_INLINE void append_row(const AppendKvParams& p, const T* source, int64_t head_dim, const float* cos_sin,
                               bool is_copied, const Cache& cache, Slot at) {
  if (is_copied && cos_sin == nullptr) {
    memcpy(slot_of<T>(cache, at), source, static_cast<size_t>(head_dim) * sizeof(T));
    return;
  }
  float x[kMaxHeadDim];
  convert_row(source, head_dim, x);
  if (cos_sin != nullptr) rotate_row(p, cos_sin, x);
  store_row(p, x, head_dim, cache, at);
}

// kSameDType: the cache's, which is T's.
template <typename T, KvDType kSameDType>
void append_kv_typed(const AppendKvParams& p, int64_t begin, int64_t end) {
  const bool is_copied = p.kv_dtype == kSameDType;
  const Cache k_cache = {p.k_cache, p.k_cache_page_stride, p.k_cache_token_stride, p.k_cache_head_stride, p.k_scale};
  const Cache v_cache = {p.v_cache, p.v_cache_page_stride, p.v_cache_token_stride, p.v_cache_head_stride, p.v_scale};
  for (int64_t t = begin; t < end; ++t) {
    const float* cos_sin = p.positions == nullptr ? nullptr : p.rope_cos_sin + p.positions[t] * p.rope_stride;
    const T* k = static_cast<const T*>(p.k) + t * p.k_token_stride;
    const T* v = static_cast<const T*>(p.v) + t * p.v_token_stride;
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      const Slot at = {p.slot_mapping[t] / p.page_size, p.slot_mapping[t] % p.page_size, h};
      append_row(p, k + h * p.k_head_stride, p.head_dim, cos_sin, is_copied, k_cache, at);
      append_row(p, v + h * p.v_head_stride, p.v_head_dim, nullptr, is_copied, v_cache, at);
    }
    if (p.q == nullptr) continue;
    const T* q = static_cast<const T*>(p.q) + t * p.q_token_stride;
    T* q_out = static_cast<T*>(p.q_out) + t * p.q_out_token_stride;
    for (int64_t h = 0; h < p.num_q_heads; ++h) {
      float x[kMaxHeadDim];
      convert_row(q + h * p.q_head_stride, p.head_dim, x);
      rotate_row(p, cos_sin, x);
      convert_row(x, p.head_dim, q_out + h * p.q_out_head_stride);
    }
  }
}

void append_kv_rows(const AppendKvParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return append_kv_typed<float, KvDType::kFloat32>(p, begin, end);
    case DType::kBFloat16:
      return append_kv_typed<BFloat16, KvDType::kBFloat16>(p, begin, end);
    case DType::kFloat16:
      return append_kv_typed<Float16, KvDType::kFloat16>(p, begin, end);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
