// vec_quantized.h: the part of vec.h for elements of a byte and less: what a quantised KV cache holds.
// Math    int8        the integer
//         e5m2        the upper byte of a float16
//         e4m3        s eeee mmm is 2^(e - 7) 1.m, at e = 0 2^-6 0.m; s 1111 111 is NaN, there is no infinity. As a
//                     float16 the bits s 0eeee mmm0000000 are 2^-8 of that, subnormals included: float16's exponent
//                     bias is 15, not 7. load() gives these, kElementScale says so.
//         int4        nibble - 8, the element with the even index in the low nibble
// Method  All arithmetic is exact. Narrowing rounds to nearest even and saturates.
// Twins   ops/reference.py quantize_reference, dequantize_reference
// Source  arXiv:2209.05433 (float8); IEEE 754 binary16
#pragma once

#include <math.h>

#include "common/params.h"
#include "cpu/vec.h"

namespace mixattn {
namespace {

struct Int8 {
  int8_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};

// Elements of type T are kElementScale<T> times what load() gives.
template <typename T>
constexpr float kElementScale = 1.0f;
template <>
constexpr float kElementScale<Float8E4M3> = 256.0f;

// Bytes of num_elements of a row.
template <typename T>
constexpr int64_t row_bytes(int64_t num_elements) {
  return num_elements * static_cast<int64_t>(sizeof(T));
}
template <>
constexpr int64_t row_bytes<Int4Pair>(int64_t num_elements) {
  return num_elements / 2;
}

constexpr int kInt4Zero = 8;  // the nibble that stands for 0

#if defined(MIXATTN_ISA_AVX2) || defined(MIXATTN_ISA_AVX512)

MIXATTN_INLINE __m128i load_8_bytes(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
MIXATTN_INLINE __m128i load_16_bytes(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

// float16 bits of e4m3 elements that were sign-extended to 16 bits. The shift leaves the sign in bits 15 and 14; what
// is NaN becomes all ones, which is one too.
MIXATTN_INLINE __m256i half_of_e4m3(__m256i x) {
  const __m256i magnitude_bits = _mm256_set1_epi16(0x7f);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(x, magnitude_bits), magnitude_bits);
  const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  return _mm256_or_si256(moved, is_nan);
}

MIXATTN_INLINE __m256 load8(const Int8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_bytes(p)));
}
MIXATTN_INLINE __m256 load8(const Float8E5M2* p) {
  return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), load_8_bytes(p)));
}
MIXATTN_INLINE __m256 load8(const Float8E4M3* p) {
  return _mm256_cvtph_ps(_mm256_castsi256_si128(half_of_e4m3(_mm256_cvtepi8_epi16(load_8_bytes(p)))));
}
MIXATTN_INLINE __m256 load8(const Int4Pair* p) {
  int32_t bits;  // lane i takes nibble i
  memcpy(&bits, p, sizeof(bits));
  const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(bits), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
  const __m256 x = _mm256_cvtepi32_ps(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)));
  return _mm256_sub_ps(x, _mm256_set1_ps(kInt4Zero));
}

#endif

#if defined(MIXATTN_ISA_AVX512)

MIXATTN_INLINE IntVec load_as_int16(const Int8* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MIXATTN_INLINE Vec load(const Int8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(p)));
}
MIXATTN_INLINE Vec load(const Float8E5M2* p) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_16_bytes(p)), 8));
}
MIXATTN_INLINE Vec load(const Float8E4M3* p) {
  return _mm512_cvtph_ps(half_of_e4m3(_mm256_cvtepi8_epi16(load_16_bytes(p))));
}
MIXATTN_INLINE Vec load(const Int4Pair* p) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(load8(p)), load8(element_at(p, 8)), 1);
}
MIXATTN_INLINE void load_pair(const Int4Pair* p, Vec* a, Vec* b) {
  // permutexvar takes the low 4 bits of an index: the nibble picks its value.
  const Vec values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  const __m512i bytes = _mm512_cvtepu8_epi32(load_16_bytes(p));
  *a = _mm512_permutexvar_ps(bytes, values);
  *b = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
}

#elif defined(MIXATTN_ISA_AVX2)

MIXATTN_INLINE IntVec load_as_int16(const Int8* p) {
  return _mm256_cvtepi8_epi16(load_16_bytes(p));
}
MIXATTN_INLINE void load_pair(const Float8E5M2* p, Vec* a, Vec* b) {
  const __m128i bytes = load_16_bytes(p);
  *a = _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
  *b = _mm256_cvtph_ps(_mm_unpackhi_epi8(_mm_setzero_si128(), bytes));
}
MIXATTN_INLINE void load_pair(const Float8E4M3* p, Vec* a, Vec* b) {
  const __m256i halves = half_of_e4m3(_mm256_cvtepi8_epi16(load_16_bytes(p)));
  *a = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  *b = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}
MIXATTN_INLINE void load_pair(const Int4Pair* p, Vec* a, Vec* b) {
  const __m256i bytes = _mm256_cvtepu8_epi32(load_8_bytes(p));
  const Vec zero_point = broadcast(kInt4Zero);
  *a = sub(_mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15))), zero_point);
  *b = sub(_mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4)), zero_point);
}

#elif defined(MIXATTN_ISA_NEON)

// 4 bytes, twice.
MIXATTN_INLINE uint8x8_t load_4_bytes(const void* p) {
  return vreinterpret_u8_u32(vdup_n_u32(load_bits<uint32_t>(p)));
}
MIXATTN_INLINE uint8x8_t load_8_bytes(const void* p) {
  return vld1_u8(static_cast<const uint8_t*>(p));
}
MIXATTN_INLINE void widen(int16x8_t x, Vec* a, Vec* b) {
  *a = vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
  *b = vcvtq_f32_s32(vmovl_high_s16(x));
}
MIXATTN_INLINE void widen(uint16x8_t halves, Vec* a, Vec* b) {
  const float16x8_t x = vreinterpretq_f16_u16(halves);
  *a = vcvt_f32_f16(vget_low_f16(x));
  *b = vcvt_high_f32_f16(x);
}

// What load() and load_pair() convert, of 8 bytes.
MIXATTN_INLINE int16x8_t to_16_bits(const Int8*, uint8x8_t bytes) {
  return vmovl_s8(vreinterpret_s8_u8(bytes));
}
MIXATTN_INLINE uint16x8_t to_16_bits(const Float8E5M2*, uint8x8_t bytes) {
  return vshll_n_u8(bytes, 8);
}
// The sign-extending shift leaves the sign in bits 15 and 14; what is NaN becomes all ones, which is one too.
MIXATTN_INLINE uint16x8_t to_16_bits(const Float8E4M3*, uint8x8_t bytes) {
  const uint16x8_t shifted = vreinterpretq_u16_s16(vshll_n_s8(vreinterpret_s8_u8(bytes), 7));
  const uint16x8_t moved = vandq_u16(shifted, vdupq_n_u16(0xbfff)), magnitude_bits = vdupq_n_u16(0x3f80);
  return vorrq_u16(moved, vceqq_u16(vandq_u16(moved, magnitude_bits), magnitude_bits));
}

template <typename T>
MIXATTN_INLINE Vec load_4(const T* p) {
  Vec a, b;
  widen(to_16_bits(p, load_4_bytes(p)), &a, &b);
  return a;
}
template <typename T>
MIXATTN_INLINE void load_8(const T* p, Vec* a, Vec* b) {
  widen(to_16_bits(p, load_8_bytes(p)), a, b);
}
MIXATTN_INLINE Vec load(const Int8* p) {
  return load_4(p);
}
MIXATTN_INLINE Vec load(const Float8E5M2* p) {
  return load_4(p);
}
MIXATTN_INLINE Vec load(const Float8E4M3* p) {
  return load_4(p);
}
MIXATTN_INLINE void load_pair(const Int8* p, Vec* a, Vec* b) {
  load_8(p, a, b);
}
MIXATTN_INLINE void load_pair(const Float8E5M2* p, Vec* a, Vec* b) {
  load_8(p, a, b);
}
MIXATTN_INLINE void load_pair(const Float8E4M3* p, Vec* a, Vec* b) {
  load_8(p, a, b);
}

MIXATTN_INLINE Vec load(const Int4Pair* p) {
  const int16x4_t shifts = {0, -4, -8, -12};  // lane i takes nibble i
  const uint16x4_t nibbles = vand_u16(vshl_u16(vdup_n_u16(load_bits<uint16_t>(p)), shifts), vdup_n_u16(15));
  return vcvtq_f32_s32(vmovl_s16(vsub_s16(vreinterpret_s16_u16(nibbles), vdup_n_s16(kInt4Zero))));
}
MIXATTN_INLINE void load_pair(const Int4Pair* p, Vec* a, Vec* b) {
  const int8x8_t shifts = {0, 0, 0, 0, -4, -4, -4, -4};  // the low nibbles of 4 bytes, then the high ones
  const uint8x8_t nibbles = vand_u8(vshl_u8(load_4_bytes(p), shifts), vdup_n_u8(15));
  widen(vmovl_s8(vsub_s8(vreinterpret_s8_u8(nibbles), vdup_n_s8(kInt4Zero))), a, b);
}

#else

MIXATTN_INLINE float to_float(Int8 x) {
  return x.bits;
}
MIXATTN_INLINE float to_float(Float8E5M2 x) {
  return to_float(Float16{static_cast<uint16_t>(x.bits << 8)});
}
MIXATTN_INLINE float to_float(Float8E4M3 x) {
  const int sign = x.bits & 0x80, magnitude = x.bits & 0x7f;
  return to_float(Float16{static_cast<uint16_t>(sign << 8 | (magnitude == 0x7f ? 0x7fff : magnitude << 7))});
}
MIXATTN_INLINE Vec load(const Int4Pair* p) {
  const int a = p[0].bits, b = p[1].bits;
  return Vec{static_cast<float>((a & 15) - kInt4Zero), static_cast<float>((a >> 4) - kInt4Zero),
             static_cast<float>((b & 15) - kInt4Zero), static_cast<float>((b >> 4) - kInt4Zero)};
}
MIXATTN_INLINE void load_pair(const Int4Pair* p, Vec* a, Vec* b) {
  deinterleave(load(p), load(element_at(p, kLanes)), a, b);
}

#endif

MIXATTN_INLINE void restore_pair(const Int4Pair*, Vec* a, Vec* b) {
  interleave(*a, *b, a, b);
}
MIXATTN_INLINE void split_pair(const Int4Pair*, Vec* a, Vec* b) {
  deinterleave(*a, *b, a, b);
}

// ---- narrowing ------------------------------------------------------------------------------------------------------

// The least scale of a row, the smallest normal float32.
constexpr float kMinRowScale = 0x1p-126f;

// What saturation ends at, and what the largest of a row becomes where each row has its own scale.
template <typename T>
struct QuantizedRange;
template <>
struct QuantizedRange<Int8> {
  static constexpr float kLow = -128.0f, kHigh = 127.0f, kRowMax = 127.0f;
};
template <>
struct QuantizedRange<Float8E4M3> {
  static constexpr float kLow = -448.0f, kHigh = 448.0f, kRowMax = 448.0f;
};
template <>
struct QuantizedRange<Float8E5M2> {
  static constexpr float kLow = -57344.0f, kHigh = 57344.0f, kRowMax = 57344.0f;
};
template <>
struct QuantizedRange<Int4Pair> {
  static constexpr float kLow = -8.0f, kHigh = 7.0f, kRowMax = 7.0f;
};

// x to the nearest integer, ties to even, for |x| < 2^22: pushing the fraction out of the mantissa rounds it.
MIXATTN_INLINE float round_even(float x) {
  return (x + 0x1.8p23f) - 0x1.8p23f;
}

// x, saturated to [kLow, kHigh], NaN kept.
template <typename T>
MIXATTN_INLINE float saturate(float x) {
  x = x < QuantizedRange<T>::kLow ? QuantizedRange<T>::kLow : x;
  return x > QuantizedRange<T>::kHigh ? QuantizedRange<T>::kHigh : x;
}

// The nearest integer in T's range; 0 for NaN, which no integer stands for.
template <typename T>
MIXATTN_INLINE int32_t to_integer(float x) {
  return static_cast<int32_t>(round_even(x == x ? saturate<T>(x) : 0.0f));
}

// The nearest float8 in T's range; NaN is 0x7f. Between powers of two the kept mantissa bits are rounded as for
// bfloat16 (vec.h); below the smallest normal number adding a float whose last mantissa bit is worth the smallest
// subnormal leaves the rounded multiple in the low bits.
template <typename T, int kMantissaBits, int kBias>
MIXATTN_INLINE uint8_t to_float8(float x) {
  constexpr int kDropped = 23 - kMantissaBits;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  constexpr uint32_t kAligned = static_cast<uint32_t>(127 + 23 + 1 - kBias - kMantissaBits) << 23;
  const float saturated = saturate<T>(x);
  uint32_t bits;
  memcpy(&bits, &saturated, sizeof(bits));
  const uint32_t sign = (bits >> 24) & 0x80;
  bits &= 0x7fffffff;
  float magnitude, aligner;
  memcpy(&magnitude, &bits, sizeof(magnitude));
  memcpy(&aligner, &kAligned, sizeof(aligner));
  const float aligned = magnitude + aligner;
  uint32_t subnormal;
  memcpy(&subnormal, &aligned, sizeof(subnormal));
  const uint32_t rounded = bits + (1u << (kDropped - 1)) - 1 + ((bits >> kDropped) & 1);
  const uint32_t normal = (rounded - (static_cast<uint32_t>(127 - kBias) << 23)) >> kDropped;
  const uint32_t stored = sign | (bits < kSmallestNormal ? subnormal - kAligned : normal);
  return static_cast<uint8_t>(x == x ? stored : 0x7f);
}

// target[d] = the element nearest to x[d], d < num_elements. Plain loops: the compiler makes vectors of them.
MIXATTN_INLINE void narrow_row(const float* x, int64_t num_elements, Int8* target) {
  for (int64_t d = 0; d < num_elements; ++d) target[d].bits = static_cast<int8_t>(to_integer<Int8>(x[d]));
}
MIXATTN_INLINE void narrow_row(const float* x, int64_t num_elements, Float8E4M3* target) {
  for (int64_t d = 0; d < num_elements; ++d) target[d].bits = to_float8<Float8E4M3, 3, 7>(x[d]);
}
MIXATTN_INLINE void narrow_row(const float* x, int64_t num_elements, Float8E5M2* target) {
  for (int64_t d = 0; d < num_elements; ++d) target[d].bits = to_float8<Float8E5M2, 2, 15>(x[d]);
}
MIXATTN_INLINE void narrow_row(const float* x, int64_t num_elements, Int4Pair* target) {
  for (int64_t d = 0; d < num_elements; d += 2) {
    const int32_t low = to_integer<Int4Pair>(x[d]) + kInt4Zero, high = to_integer<Int4Pair>(x[d + 1]) + kInt4Zero;
    target[d / 2].bits = static_cast<uint8_t>(low | high << 4);
  }
}

}  // namespace
}  // namespace mixattn
