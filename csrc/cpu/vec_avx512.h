// vec_avx512.h: AVX-512, 16 lanes and 32 registers; a part of vec.h, which says what may include it.
#pragma once

#include "cpu/vec_x86.h"

namespace mixattn {
namespace {

typedef __m512 Vec;
constexpr int kLanes = 16;
constexpr int kNumRegisters = 32;
// 8 rows x 32 columns: 16 accumulators hide 4 cycles of latency on 2 ports twice over, 2 loads and 8 broadcasts feed 16
// FMAs, and 8 divides the planner's row tiles.
constexpr int kTileRows = 8;

MIXATTN_INLINE Vec zero() {
  return _mm512_setzero_ps();
}
MIXATTN_INLINE Vec broadcast(float x) {
  return _mm512_set1_ps(x);
}
MIXATTN_INLINE Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
MIXATTN_INLINE Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
MIXATTN_INLINE Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MIXATTN_INLINE Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <int kByte>
MIXATTN_INLINE Vec load_bytes(const uint32_t* p) {
  const __m512i words = _mm512_loadu_si512(p);
  if (kByte == 3) return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 24));
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xff << (8 * (kByte % 3)))));
}
template <int kNibble>
MIXATTN_INLINE Vec load_nibbles(const uint32_t* p) {
  const __m512i words = _mm512_loadu_si512(p);
  if (kNibble == 7) return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 28));
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xf << (4 * (kNibble % 7)))));
}
MIXATTN_INLINE __m256 low_half(Vec x) {
  return _mm512_castps512_ps256(x);
}
MIXATTN_INLINE __m256 high_half(Vec x) {
  return _mm512_extractf32x8_ps(x, 1);
}
MIXATTN_INLINE void store(float* p, Vec x) {
  _mm512_storeu_ps(p, x);
}
template <typename T>
MIXATTN_INLINE void store(T* p, Vec x) {
  store8(p, low_half(x));
  store8(p + 8, high_half(x));
}
#if defined(MIXATTN_SIMDE)
MIXATTN_INLINE void keep_in_register(Vec*) {}
#else
MIXATTN_INLINE void keep_in_register(Vec* x) {
  __asm__("" : "+v"(*x));
}
#endif
MIXATTN_INLINE void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  const __m512i both = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
MIXATTN_INLINE void interleave(Vec even, Vec odd, Vec* first, Vec* second) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  *first = _mm512_permutex2var_ps(even, low, odd);
  *second = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd);
}
MIXATTN_INLINE void deinterleave(Vec first, Vec second, Vec* even, Vec* odd) {
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  *even = _mm512_permutex2var_ps(first, evens, second);
  *odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), second);
}
// The 8 elements that a head_dim that is no multiple of 16 leaves over; lanes 8..15 are 0.
template <typename T>
MIXATTN_INLINE Vec load_half(const T* p) {
  return _mm512_insertf32x8(_mm512_setzero_ps(), load8(p), 0);
}
template <typename T>
MIXATTN_INLINE void store_half(T* p, Vec x) {
  store8(p, low_half(x));
}

MIXATTN_INLINE Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
MIXATTN_INLINE Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
MIXATTN_INLINE Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
MIXATTN_INLINE Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
MIXATTN_INLINE Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
MIXATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
#if !defined(MIXATTN_SIMDE)
#define MIXATTN_HAS_EXP2
// As vec.h's; below -126 subnormal numbers, then 0. 2^x = 2^n 2^f with n = floor(x), which scaling takes itself, and
// 2^f from a minimax polynomial of degree 6 with value 1 at 0 (Remez, relative error 2.0e-9). In float32 the largest
// error found over [-126, 0] is 1.4 ulp, 8.3e-8 relative.
MIXATTN_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // of -inf 0
  Vec p = _mm512_set1_ps(2.16129159441e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.24678461739e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.67545159359e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.54852806079e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40229305554e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147044443e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}
#endif

MIXATTN_INLINE Vec abs(Vec x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
MIXATTN_INLINE Vec copy_sign(Vec magnitude, Vec sign) {  // magnitude >= 0
  const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude), bit));
}
MIXATTN_INLINE Vec select_less(Vec x, Vec bound, Vec then, Vec otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), then);
}
MIXATTN_INLINE Vec add_to_exponent(Vec x, Vec n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
MIXATTN_INLINE float first_lane(Vec x) {
  return _mm_cvtss_f32(_mm256_castps256_ps128(low_half(x)));
}
MIXATTN_INLINE float max_lanes(Vec x) {
  return max_lanes8(_mm256_max_ps(low_half(x), high_half(x)));
}
MIXATTN_INLINE float sum_lanes(Vec x) {
  return sum_lanes8(_mm256_add_ps(low_half(x), high_half(x)));
}
MIXATTN_INLINE void sum_each(const Vec (&x)[8], float* out) {
  __m256 halves[8];
  for (int i = 0; i < 8; ++i) halves[i] = _mm256_add_ps(low_half(x[i]), high_half(x[i]));
  sum_each8(halves, out);
}
// [i] = the sum of x[i]'s lanes by `add`. What can be is blended and not shuffled: shuffles have one port (Intel) or
// two half as wide (Zen 4).
template <typename Add>
MIXATTN_INLINE Vec sum_16(const Vec (&x)[16], const Add& add) {
  constexpr int kOrder[16] = {0, 4,  2,  6,  1, 5,  3,  7,
                              8, 12, 10, 14, 9, 13, 11, 15};  // so that [i] is x[i]'s in the end
  Vec halves[8], pairs[4], lanes[2];
  for (int i = 0; i < 8; ++i) {
    const Vec a = x[kOrder[2 * i]], b = x[kOrder[2 * i + 1]];
    halves[i] = add(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  for (int i = 0; i < 4; ++i) {
    const Vec a = halves[2 * i], b = halves[2 * i + 1];
    pairs[i] = add(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
  for (int i = 0; i < 2; ++i) {
    const Vec a = pairs[2 * i], b = pairs[2 * i + 1];
    lanes[i] = add(_mm512_mask_blend_ps(0xaaaa, a, b), _mm512_permute_ps(_mm512_mask_blend_ps(0x5555, a, b), 0xb1));
  }
  return add(_mm512_shuffle_f32x4(lanes[0], lanes[1], 0x88), _mm512_shuffle_f32x4(lanes[0], lanes[1], 0xdd));
}
MIXATTN_INLINE void sum_each(const Vec (&x)[16], float* out) {
  _mm512_storeu_ps(out, sum_16(x, [](Vec a, Vec b) { return _mm512_add_ps(a, b); }));
}

constexpr int kByteZero = 0;  // add_byte_products takes u for what it is, in [0, 255]

// Sums of products of pairs of 16 bits: each lane adds its two products.
#define MIXATTN_HAS_INT16_DOT
typedef __m512i IntVec;
MIXATTN_INLINE IntVec int_zero() {
  return _mm512_setzero_si512();
}
MIXATTN_INLINE IntVec load_int16(const int16_t* p) {
  return _mm512_loadu_si512(p);
}
MIXATTN_INLINE Vec int_to_float(IntVec x) {
  return _mm512_cvtepi32_ps(x);
}
MIXATTN_INLINE void sum_each(const IntVec (&x)[16], float* out) {
  Vec words[16];
  for (int i = 0; i < 16; ++i) words[i] = _mm512_castsi512_ps(x[i]);
  const Vec sums = sum_16(words, [](Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  });
  _mm512_storeu_ps(out, int_to_float(_mm512_castps_si512(sums)));
}
MIXATTN_INLINE void sum_each(const IntVec (&x)[8], float* out) {
  Vec floats[8];
  for (int i = 0; i < 8; ++i) floats[i] = int_to_float(x[i]);
  sum_each(floats, out);
}
MIXATTN_INLINE IntVec load_words(const void* p) {
  return _mm512_loadu_si512(p);
}
MIXATTN_INLINE void store_words(void* p, IntVec x) {
  _mm512_storeu_si512(p, x);
}
MIXATTN_INLINE IntVec broadcast_word(int32_t x) {
  return _mm512_set1_epi32(x);
}
MIXATTN_INLINE IntVec add_words(IntVec a, IntVec b) {
  return _mm512_add_epi32(a, b);
}
MIXATTN_INLINE IntVec round_to_int(Vec x) {  // to nearest, ties to even
  return _mm512_cvtps_epi32(x);
}
MIXATTN_INLINE void store_low_bytes(int8_t* p, IntVec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
MIXATTN_INLINE IntVec low_nibbles(IntVec x) {
  return _mm512_and_si512(x, _mm512_set1_epi32(0x0f0f0f0f));
}
MIXATTN_INLINE IntVec high_nibbles(IntVec x) {
  return low_nibbles(_mm512_srli_epi32(x, 4));
}

// Pairs of keys, whose elements lie in different rows.
#define MIXATTN_HAS_PAIRED_ROWS  // also in attention_direct-inl.h; AVX2 has what packed tiles need of it
// Of 32 floats x, lane l of the first becomes x[i] and of the second x[i + kStep]: i = l / kStep * 2 kStep + l % kStep.
template <int kStep>
MIXATTN_INLINE void split_steps(Vec* first, Vec* second) {
  int32_t index[kLanes];
  for (int l = 0; l < kLanes; ++l) index[l] = l / kStep * 2 * kStep + l % kStep;
  const __m512i low = _mm512_loadu_si512(index), high = _mm512_add_epi32(low, _mm512_set1_epi32(kStep));
  const Vec a = *first, b = *second;
  *first = _mm512_permutex2var_ps(a, low, b);
  *second = _mm512_permutex2var_ps(a, high, b);
}
// The same as words of two int16, x rounded to nearest even; all of x are below 2^15.
template <int kStep>
MIXATTN_INLINE IntVec int16_pairs(Vec first, Vec second) {
  split_steps<kStep>(&first, &second);
  const __m512i low = _mm512_and_si512(_mm512_cvtps_epi32(first), _mm512_set1_epi32(0xffff));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtps_epi32(second), 16));
}
// Words of x[i] and y[i] of two rows of 32 elements of 16 bits, in an order that costs the least; restore_zipped undoes
// it, for these words or for what is computed from them.
MIXATTN_INLINE void zip_rows(IntVec x, IntVec y, IntVec* first, IntVec* second) {
  *first = _mm512_unpacklo_epi16(x, y);
  *second = _mm512_unpackhi_epi16(x, y);
}
MIXATTN_INLINE void restore_zipped(Vec* first, Vec* second) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const Vec a = *first, b = *second;
  *first = _mm512_permutex2var_ps(a, low, b);
  *second = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
}
MIXATTN_INLINE Vec as_floats(IntVec words) {  // the same bits
  return _mm512_castsi512_ps(words);
}

#if defined(MIXATTN_ISA_AVX512_VNNI)
MIXATTN_INLINE IntVec add_int16_products(IntVec sum, IntVec a, IntVec b) {
  // Not the intrinsic: GCC 12 copies each sum to another register and back around it.
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}

// What attention_bytes-inl.h needs. A quarter of a register has 128 bits.
#define MIXATTN_HAS_BYTE_ROWS
MIXATTN_INLINE IntVec flip_signs(IntVec x) {  // b + 128 of each signed byte b, unsigned
  return _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(0x80808080)));
}
MIXATTN_INLINE int32_t sum_words(IntVec x) {
  return _mm512_reduce_add_epi32(x);
}
MIXATTN_INLINE bool has_only_finite(Vec x) {
  return _mm512_fpclass_ps_mask(x, 0x99) == 0;  // no NaN of either kind, no infinity of either sign
}
// Within each quarter x[j] becomes word j of each of the four.
MIXATTN_INLINE void transpose_quarters(IntVec (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c);
  x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d);
  x[3] = _mm512_unpackhi_epi64(b, d);
}
// p[i], p[4 + i] = the sum of the lanes 4 c + i, c the quarter, of a, and of b.
MIXATTN_INLINE void store_quarter_sums(float* p, IntVec a, IntVec b) {
  // Two quarters that add up to the sum of a's four, then two of b's.
  const __m512i halves = _mm512_add_epi32(_mm512_mask_blend_epi32(0xff00, a, b), _mm512_shuffle_i64x2(a, b, 0x4e));
  const __m512i even = _mm512_shuffle_i64x2(halves, halves, 0x88), odd = _mm512_shuffle_i64x2(halves, halves, 0xdd);
  _mm256_storeu_ps(p, _mm256_cvtepi32_ps(_mm512_castsi512_si256(_mm512_add_epi32(even, odd))));
}
// x becomes words of one byte of each x: quarter c of x[i] has those of the bytes 16 c + 4 i + [0, 4).
MIXATTN_INLINE void zip_bytes(IntVec (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpacklo_epi8(x[2], x[3]);
  const __m512i c = _mm512_unpackhi_epi8(x[0], x[1]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi16(a, b);
  x[1] = _mm512_unpackhi_epi16(a, b);
  x[2] = _mm512_unpacklo_epi16(c, d);
  x[3] = _mm512_unpackhi_epi16(c, d);
}
// What zip_bytes made, or what was computed from it, in the order of the bytes.
MIXATTN_INLINE void restore_zipped_bytes(Vec (&x)[4]) {
  const Vec ab_low = _mm512_shuffle_f32x4(x[0], x[1], 0x44), ab_high = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
  const Vec cd_low = _mm512_shuffle_f32x4(x[2], x[3], 0x44), cd_high = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
  x[1] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
  x[2] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
  x[3] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
}
#else
MIXATTN_INLINE IntVec add_int16_products(IntVec sum, IntVec a, IntVec b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
// Bytes with even and with odd index are widened apart: maddubs would saturate.
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  const IntVec even = _mm512_and_si512(unsigned_bytes, _mm512_set1_epi16(0xff));
  const IntVec signed_even = _mm512_srai_epi16(_mm512_slli_epi16(signed_bytes, 8), 8);
  sum = add_int16_products(sum, even, signed_even);
  return add_int16_products(sum, _mm512_srli_epi16(unsigned_bytes, 8), _mm512_srai_epi16(signed_bytes, 8));
}
// As for AVX2.
#define MIXATTN_HAS_INT16_NIBBLE_SUMS
constexpr int kNibbleZero = 0;
MIXATTN_INLINE IntVec begin_nibble_sums(int32_t) {
  return int_zero();
}
MIXATTN_INLINE IntVec add_nibble_products(IntVec sum, IntVec nibbles, IntVec signed_bytes) {
  sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(nibbles, signed_bytes));
#if !defined(MIXATTN_SIMDE)
  __asm__("" : "+v"(sum));
#endif
  return sum;
}
MIXATTN_INLINE IntVec end_nibble_sums(IntVec sum, int32_t start) {
  return add_int16_products(broadcast_word(start), sum, _mm512_set1_epi16(1));
}
#endif

#if defined(MIXATTN_ISA_AVX512_BF16)
#define MIXATTN_HAS_BFLOAT16_DOT
MIXATTN_INLINE Vec add_bfloat16_products(Vec sum, IntVec a, IntVec b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
// Of 32 floats x, in lane l the bfloat16 of x[i] and x[i + kStep], rounded to nearest even, i as for split_steps.
template <int kStep>
MIXATTN_INLINE IntVec bfloat16_pairs(Vec first, Vec second) {
  if constexpr (kStep == 1) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
  } else {
    split_steps<kStep>(&first, &second);
    const auto words = [](Vec x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
    return _mm512_or_si512(words(first), _mm512_slli_epi32(words(second), 16));
  }
}
#endif

}  // namespace
}  // namespace mixattn
