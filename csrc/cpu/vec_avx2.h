// vec_avx2.h: AVX2, FMA and F16C, 8 lanes and 16 registers; a part of vec.h, which says what may include it.
#pragma once

#include "cpu/vec_x86.h"

namespace mixattn {
namespace {

typedef __m256 Vec;
constexpr int kLanes = 8;
constexpr int kNumRegisters = 16;
// 6 rows x 16 columns: 12 accumulators, 2 columns and 1 broadcast are 15 registers; 2 loads and 6 broadcasts feed 12
// FMAs, 4 cycles of the load ports against 6 of the FMA ports. (4 x 16 needs its 8 accumulators to be in time always.)
constexpr int kTileRows = 6;

MIXATTN_INLINE Vec zero() {
  return _mm256_setzero_ps();
}
MIXATTN_INLINE Vec broadcast(float x) {
  return _mm256_set1_ps(x);
}
template <typename T>
MIXATTN_INLINE Vec load(const T* p) {
  return load8(p);
}
MIXATTN_INLINE Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <int kByte>
MIXATTN_INLINE Vec load_bytes(const uint32_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (kByte == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 24));
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xff << (8 * (kByte % 3)))));
}
template <int kNibble>
MIXATTN_INLINE Vec load_nibbles(const uint32_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (kNibble == 7) return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 28));
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xf << (4 * (kNibble % 7)))));
}
template <typename T>
MIXATTN_INLINE void store(T* p, Vec x) {
  store8(p, x);
}
// The compiler would rather load an operand twice, once inside each FMA, than hold it; the load ports are what runs
// out.
MIXATTN_INLINE void keep_in_register(Vec* x) {
  __asm__("" : "+x"(*x));
}
MIXATTN_INLINE void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
MIXATTN_INLINE void interleave(Vec even, Vec odd, Vec* first, Vec* second) {
  const Vec low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  *first = _mm256_permute2f128_ps(low, high, 0x20);
  *second = _mm256_permute2f128_ps(low, high, 0x31);
}
MIXATTN_INLINE void deinterleave(Vec first, Vec second, Vec* even, Vec* odd) {
  const Vec low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
  // low is f0..f3, s0..s3 and high f4..f7, s4..s7; what shuffle_ps takes of both stays in its half.
  *even = _mm256_shuffle_ps(low, high, 0x88);
  *odd = _mm256_shuffle_ps(low, high, 0xdd);
}
// A head_dim is a multiple of 8: no half vector is ever left over. Declared for the text that all ISAs share.
template <typename T>
Vec load_half(const T* p);
template <typename T>
void store_half(T* p, Vec x);

MIXATTN_INLINE Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
MIXATTN_INLINE Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
MIXATTN_INLINE Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
MIXATTN_INLINE Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
MIXATTN_INLINE Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
MIXATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
MIXATTN_INLINE Vec abs(Vec x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}
MIXATTN_INLINE Vec copy_sign(Vec magnitude, Vec sign) {  // magnitude >= 0
  return _mm256_or_ps(magnitude, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
}
MIXATTN_INLINE Vec select_less(Vec x, Vec bound, Vec then, Vec otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
}
MIXATTN_INLINE Vec add_to_exponent(Vec x, Vec n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
MIXATTN_INLINE float first_lane(Vec x) {
  return _mm_cvtss_f32(_mm256_castps256_ps128(x));
}
MIXATTN_INLINE float max_lanes(Vec x) {
  return max_lanes8(x);
}
MIXATTN_INLINE float sum_lanes(Vec x) {
  return sum_lanes8(x);
}
MIXATTN_INLINE void sum_each(const Vec (&x)[8], float* out) {
  sum_each8(x, out);
}

#define MIXATTN_HAS_INT16_DOT
typedef __m256i IntVec;
MIXATTN_INLINE IntVec int_zero() {
  return _mm256_setzero_si256();
}
MIXATTN_INLINE IntVec load_int16(const int16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MIXATTN_INLINE Vec int_to_float(IntVec x) {
  return _mm256_cvtepi32_ps(x);
}
MIXATTN_INLINE void sum_each(const IntVec (&x)[8], float* out) {
  Vec floats[8];
  for (int i = 0; i < 8; ++i) floats[i] = int_to_float(x[i]);
  sum_each(floats, out);
}
MIXATTN_INLINE IntVec load_words(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MIXATTN_INLINE void store_words(void* p, IntVec x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x);
}
MIXATTN_INLINE IntVec broadcast_word(int32_t x) {
  return _mm256_set1_epi32(x);
}
MIXATTN_INLINE IntVec add_words(IntVec a, IntVec b) {
  return _mm256_add_epi32(a, b);
}
MIXATTN_INLINE IntVec round_to_int(Vec x) {  // to nearest, ties to even
  return _mm256_cvtps_epi32(x);
}
MIXATTN_INLINE void store_low_bytes(int8_t* p, IntVec x) {
  const __m256i firsts = _mm256_set1_epi32(0x0c080400);  // of each half, the lowest byte of its 4 words
  const __m256i packed = _mm256_shuffle_epi8(x, firsts);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
}
MIXATTN_INLINE IntVec low_nibbles(IntVec x) {
  return _mm256_and_si256(x, _mm256_set1_epi32(0x0f0f0f0f));
}
MIXATTN_INLINE IntVec high_nibbles(IntVec x) {
  return low_nibbles(_mm256_srli_epi32(x, 4));
}
#if defined(MIXATTN_ISA_AVX2_VNNI)
// AVX_VNNI is what AVX512_VNNI has for 256 bits in another encoding, which the assembler does not take by itself.
#if defined(MIXATTN_EMULATED_AVX_VNNI)
#define MIXATTN_VNNI(name) "%{evex%} " name " %2, %1, %0"
#else
#define MIXATTN_VNNI(name) "%{vex%} " name " %2, %1, %0"
#endif
MIXATTN_INLINE IntVec add_int16_products(IntVec sum, IntVec a, IntVec b) {
  __asm__(MIXATTN_VNNI("vpdpwssd") : "+x"(sum) : "x"(a), "x"(b));  // as for AVX-512, no intrinsic
  return sum;
}
constexpr int kByteZero = 0;
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  __asm__(MIXATTN_VNNI("vpdpbusd") : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
  return sum;
}
#else
MIXATTN_INLINE IntVec add_int16_products(IntVec sum, IntVec a, IntVec b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  __asm__("" : "+x"(sum));  // or GCC sums up products first, more of them than there are registers for
  return sum;
}
// maddubs saturates, but not at products with a weight of at most 128: it gets |u - 128|, and its partner the sign.
constexpr int kByteZero = 128;
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  const IntVec w = _mm256_xor_si256(unsigned_bytes, _mm256_set1_epi8(-128));
  const IntVec pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(signed_bytes, w));
  return add_int16_products(sum, pairs, _mm256_set1_epi16(1));
}
// Two products of nibbles are below 2^12, and 16 bits hold the 8 such pairs of a block.
#define MIXATTN_HAS_INT16_NIBBLE_SUMS
constexpr int kNibbleZero = 0;
MIXATTN_INLINE IntVec begin_nibble_sums(int32_t) {
  return int_zero();
}
MIXATTN_INLINE IntVec add_nibble_products(IntVec sum, IntVec nibbles, IntVec signed_bytes) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(nibbles, signed_bytes));
  __asm__("" : "+x"(sum));  // as above
  return sum;
}
MIXATTN_INLINE IntVec end_nibble_sums(IntVec sum, int32_t start) {
  return add_int16_products(broadcast_word(start), sum, _mm256_set1_epi16(1));
}
#endif

// As for AVX-512.
template <int kStep>
MIXATTN_INLINE IntVec int16_pairs(Vec first, Vec second) {
  static_assert(kStep == 1, "others are not needed");
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second)), 0xd8);
}
MIXATTN_INLINE void zip_rows(IntVec x, IntVec y, IntVec* first, IntVec* second) {
  *first = _mm256_unpacklo_epi16(x, y);
  *second = _mm256_unpackhi_epi16(x, y);
}
MIXATTN_INLINE void restore_zipped(Vec* first, Vec* second) {
  const Vec low = _mm256_permute2f128_ps(*first, *second, 0x20), high = _mm256_permute2f128_ps(*first, *second, 0x31);
  *first = low;
  *second = high;
}
MIXATTN_INLINE Vec as_floats(IntVec words) {
  return _mm256_castsi256_ps(words);
}

}  // namespace
}  // namespace mixattn
