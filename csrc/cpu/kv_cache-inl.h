// kv_cache-inl.h: rotate and store rows of K, store rows of V, rotate rows of q, for one ISA.
// Math    pair (x, y) of a head becomes (x cos - y sin, y cos + x sin) of its position; neox pairs are (i, i + half),
//         interleaved ones (2i, 2i + 1), i < half = rotary_dim / 2; dimensions from rotary_dim on stay as they are
// Method  a head's row through a float32 buffer on the stack, one rounding at the end; V is copied bit by bit
// Grid    rows [begin, end) of the call; cpu/kv_cache.cpp deals them to its threads
// Shapes  as AppendKvParams
// Memory  reads and writes (num_q_heads + 2 num_kv_heads) head_dim elements per row
// Limits  head_dim a multiple of 8, at most 256; rotary_dim even, at most head_dim
// Twins   truth ops/reference.py append_kv_reference
// Source  arXiv:2104.09864, equation 34
#pragma once

#include <string.h>

#include "cpu/kernels.h"
#include "cpu/vec.h"

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

// target = the head at source, rotated. They may be the same.
template <typename T>
MIXATTN_INLINE void rotate_head(const AppendKvParams& p, const T* source, const float* cos_sin, T* target) {
  float x[kMaxHeadDim];
  int64_t d = 0;
  for (; d + kLanes <= p.head_dim; d += kLanes) store(x + d, load(source + d));
  if (kLanes > 8 && d < p.head_dim) store_half(x + d, load_half(source + d));
  const int64_t half = p.rotary_dim / 2;
  if (p.interleaved) {
    rotate_interleaved(x, cos_sin, cos_sin + half, half);
  } else {
    rotate_neox(x, cos_sin, cos_sin + half, half);
  }
  for (d = 0; d + kLanes <= p.head_dim; d += kLanes) store(target + d, load(x + d));
  if (kLanes > 8 && d < p.head_dim) store_half(target + d, load_half(x + d));
}

template <typename T>
void append_kv_typed(const AppendKvParams& p, int64_t begin, int64_t end) {
  const size_t row_bytes = static_cast<size_t>(p.head_dim) * sizeof(T);
  for (int64_t t = begin; t < end; ++t) {
    const float* cos_sin = p.positions == nullptr ? nullptr : p.rope_cos_sin + p.positions[t] * p.rope_stride;
    const int64_t page = p.slot_mapping[t] / p.page_size, slot = p.slot_mapping[t] % p.page_size;
    const T* k = static_cast<const T*>(p.k) + t * p.k_token_stride;
    const T* v = static_cast<const T*>(p.v) + t * p.v_token_stride;
    T* k_slot = static_cast<T*>(p.k_cache) + page * p.k_cache_page_stride + slot * p.k_cache_token_stride;
    T* v_slot = static_cast<T*>(p.v_cache) + page * p.v_cache_page_stride + slot * p.v_cache_token_stride;
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      if (cos_sin == nullptr) {
        memcpy(k_slot + h * p.k_cache_head_stride, k + h * p.k_head_stride, row_bytes);
      } else {
        rotate_head(p, k + h * p.k_head_stride, cos_sin, k_slot + h * p.k_cache_head_stride);
      }
      memcpy(v_slot + h * p.v_cache_head_stride, v + h * p.v_head_stride, row_bytes);
    }
    if (p.q == nullptr) continue;
    const T* q = static_cast<const T*>(p.q) + t * p.q_token_stride;
    T* q_out = static_cast<T*>(p.q_out) + t * p.q_out_token_stride;
    for (int64_t h = 0; h < p.num_q_heads; ++h) {
      rotate_head(p, q + h * p.q_head_stride, cos_sin, q_out + h * p.q_out_head_stride);
    }
  }
}

void append_kv_rows(const AppendKvParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return append_kv_typed<float>(p, begin, end);
    case DType::kBFloat16:
      return append_kv_typed<BFloat16>(p, begin, end);
    case DType::kFloat16:
      return append_kv_typed<Float16>(p, begin, end);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
