// attention_dot-inl.h: the products q . k of a few rows, in the arithmetic that the keys' type and the CPU offer.
// Math    FloatDot      float32, any type of key
//         BFloat16Dot   products of bfloat16 pairs, exact, summed in float32: q as given, the scale goes to the scores;
//                       q of another type is rounded, if the call allows it (rounds_q). The instructions (VDPBF16PS,
//                       BFDOT) take subnormal elements (below 2^-126) for 0; BFDOT rounds sums to odd, off by less than
//                       a last place instead of half. P V goes the same way, by pairs of keys (DirectValues,
//                       PackedValues): weights are rounded to bfloat16 for it, not for their sum
//         Int8Dot       products of int16 pairs, exact, summed in int32: each row of a 16-bit q, or of any with
//                       rounds_q, becomes round(q 32767 / max |q|), which is off by at most 2^-16 of the row's largest
//                       element. P V likewise, by pairs of keys, in packed tiles (PackedValues) and, with AVX-512, in
//                       direct ones (DirectValues): a row's weights, times their keys' scales, become integers tile by
//                       tile
// Method  A dot has kDepth elements per step, load_key and load_query for them, and add_product. start() rewrites a row
//         of q, which holds scaled float32, in place to what load_query reads, and returns the factor that scores of
//         the row are still to be multiplied with.
#pragma once

#include <math.h>

#include "cpu/attention_rows-inl.h"

namespace mixattn {
namespace cpu {
namespace {

template <typename T>
struct FloatDot {
  static constexpr int kDepth = 2 * kLanes;
  static constexpr bool kHasFactor = false;
  static constexpr bool kTakesAnyDims = true;  // also a head_dim that kDepth leaves something of
  typedef T Key;
  typedef Vec Sum;
  struct Operand {
    Vec a, b;
  };

  static bool takes(const AttentionParams&) { return true; }
  // Elements in the order of load_pair.
  static float start(const AttentionParams& p, const WorkItem&, int64_t, float* q) {
    for (int64_t d = 0; d + kDepth <= p.head_dim; d += kDepth) {
      Vec a = load(q + d), b = load(q + d + kLanes);
      split_pair(static_cast<const T*>(nullptr), &a, &b);
      store(q + d, a);
      store(q + d + kLanes, b);
    }
    return 1.0f;
  }
  MIXATTN_INLINE Sum start_sum() { return zero(); }
  MIXATTN_INLINE Operand load_key(const T* key) {
    Operand x;
    load_pair(key, &x.a, &x.b);
    return x;
  }
  MIXATTN_INLINE Operand load_query(const float* q, int64_t d) {
    Operand x{load(q + d), load(q + d + kLanes)};
    keep_in_register(&x.a);
    keep_in_register(&x.b);
    return x;
  }
  MIXATTN_INLINE Sum add_product(Sum sum, const Operand& q, const Operand& k) {
    return fmadd(q.b, k.b, fmadd(q.a, k.a, sum));
  }
  MIXATTN_INLINE Vec to_vec(Sum sum) { return sum; }
};

#if defined(MIXATTN_HAS_INT16_DOT) || defined(MIXATTN_HAS_BFLOAT16_DOT)

// What dots of pairs of 16 bits share: q in their elements, one behind the other.
struct PairDot {
  static constexpr int kDepth = 2 * kLanes;
  static constexpr bool kHasFactor = true;
  static constexpr bool kTakesAnyDims = false;
  typedef IntVec Operand;

  static bool has_pairs(const AttentionParams& p) { return p.head_dim % kDepth == 0 && p.v_head_dim % kDepth == 0; }
  MIXATTN_INLINE Operand load_query(const float* q, int64_t d) {
    return load_int16(reinterpret_cast<const int16_t*>(q) + d);
  }
};

#endif

#if defined(MIXATTN_HAS_INT16_DOT)

struct Int8Dot : PairDot {
  typedef Int8 Key;
  typedef IntVec Sum;

  // A float32 row would see the rounding. 256 products of 128 and 32767 stay below 2^31.
  static bool takes(const AttentionParams& p) { return (p.dtype != DType::kFloat32 || p.rounds_q) && has_pairs(p); }
  static float start(const AttentionParams& p, const WorkItem&, int64_t, float* q) {
    float largest = 0.0f, sum = 0.0f;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const float magnitude = fabsf(q[d]);
      largest = magnitude > largest ? magnitude : largest;
      sum += magnitude;
    }
    if (!(sum < INFINITY)) return NAN;  // infinities and NaN have no such integers
    const float unit = largest > 0.0f ? largest / 32767.0f : 1.0f;
    int16_t integers[kMaxHeadDim];
    for (int64_t d = 0; d < p.head_dim; ++d) integers[d] = static_cast<int16_t>(round_even(q[d] / unit));
    memcpy(q, integers, sizeof(int16_t) * static_cast<size_t>(p.head_dim));
    return unit;
  }
  MIXATTN_INLINE Sum start_sum() { return int_zero(); }
  MIXATTN_INLINE Operand load_key(const Int8* key) { return load_as_int16(key); }
  template <class Word>  // Operand or SharedWord
  MIXATTN_INLINE Sum add_product(Sum sum, Word q, Operand k) {
    return add_int16_products(sum, q, k);
  }
  MIXATTN_INLINE Vec to_vec(Sum sum) { return int_to_float(sum); }
};

#endif

#if defined(MIXATTN_HAS_BFLOAT16_DOT)

struct BFloat16Dot : PairDot {
  typedef BFloat16 Key;
  typedef Vec Sum;

  static bool takes(const AttentionParams& p) { return (p.dtype == DType::kBFloat16 || p.rounds_q) && has_pairs(p); }
  static float start(const AttentionParams& p, const WorkItem& item, int64_t r, float* q) {
    const TokenHead at = token_head(p, item.seq_idx, item.kv_head, item.row_begin + r);
    const int64_t offset = at.token * p.q_token_stride + at.head * p.q_head_stride;
    if (p.dtype == DType::kFloat32) {
      round_row(static_cast<const float*>(p.q) + offset, p.head_dim, q);
    } else if (p.dtype == DType::kFloat16) {
      round_row(static_cast<const Float16*>(p.q) + offset, p.head_dim, q);
    } else {
      memcpy(q, static_cast<const BFloat16*>(p.q) + offset, static_cast<size_t>(row_bytes<BFloat16>(p.head_dim)));
    }
    return query_scale(p, shared_scale(p.k_scale, item.kv_head));
  }
  template <typename T>
  MIXATTN_INLINE void round_row(const T* source, int64_t head_dim, float* q) {
    for (int64_t d = 0; d < head_dim; d += kDepth) {
      store_words(q + d / 2, bfloat16_pairs<1>(load(source + d), load(source + d + kLanes)));
    }
  }
  MIXATTN_INLINE Sum start_sum() { return zero(); }
  MIXATTN_INLINE Operand load_key(const BFloat16* key) { return load_int16(reinterpret_cast<const int16_t*>(key)); }
  template <class Word>  // Operand or SharedWord
  MIXATTN_INLINE Sum add_product(Sum sum, Word q, Operand k) {
    return add_bfloat16_products(sum, q, k);
  }
  MIXATTN_INLINE Vec to_vec(Sum sum) { return sum; }
};

#endif

}  // namespace
}  // namespace cpu
}  // namespace mixattn
