// vec.h: one float32 vector per ISA, and the few operations that the CPU kernels are written in.
// Method  A file compiled for one ISA defines MIXATTN_ISA_AVX512, MIXATTN_ISA_AVX2 or MIXATTN_ISA_SCALAR and includes
// this.
//         SCALAR is the compiler's own 4-lane vector: SSE2 on x86-64, NEON on aarch64, plain code elsewhere.
//         AVX-512 under MIXATTN_SIMDE runs on any x86-64 through SIMDe, slowly: for tests of that path.
// Hazard  Everything here, and everything that includes it, is internal to its file (anonymous namespace, no std
//         templates): an inline function that the linker shares between files could be the AVX copy on a CPU without.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(MIXATTN_ISA_AVX512) && defined(MIXATTN_SIMDE)
#include "cpu/simde_avx512.h"
#elif defined(MIXATTN_ISA_AVX512) || defined(MIXATTN_ISA_AVX2)
// GCC 12 warns about its own _mm512_undefined_ps (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define MIXATTN_INLINE static inline __attribute__((always_inline))

namespace mixattn {
namespace {

// Element types as they lie in memory; those of a byte and less are in vec_quantized.h. Arithmetic is in float32 only.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int4Pair {  // two elements of KvDType::kInt4
  uint8_t bits;
};

// Where element d of the row is; of an Int4Pair row d is even.
template <typename T>
MIXATTN_INLINE const T* element_at(const T* row, int64_t d) {
  return row + d;
}
MIXATTN_INLINE const Int4Pair* element_at(const Int4Pair* row, int64_t d) {
  return row + d / 2;
}

MIXATTN_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 3);
}

// Of what is read once only: into L1, not to be kept further out.
MIXATTN_INLINE void prefetch_once(const void* p) {
  __builtin_prefetch(p, 0, 0);
}

#if defined(MIXATTN_ISA_AVX2) || defined(MIXATTN_ISA_AVX512)

// ---- 8 lanes: AVX2 itself, and half a vector of AVX-512 -------------------------------------------------------------

MIXATTN_INLINE __m256 load8(const float* p) {
  return _mm256_loadu_ps(p);
}
MIXATTN_INLINE __m256 load8(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
MIXATTN_INLINE __m256 load8(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

MIXATTN_INLINE void store8(float* p, __m256 x) {
  _mm256_storeu_ps(p, x);
}
MIXATTN_INLINE void store8(BFloat16* p, __m256 x) {
  // Round to nearest even: add 0x7fff, one more if the kept part is odd. A NaN must not round to infinity: it is kept
  // quiet by its top mantissa bit instead.
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
MIXATTN_INLINE void store8(Float16* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// dst[j * stride + i] = rows[i][offset + j] for i, j < 8.
template <typename T>
MIXATTN_INLINE void transpose8(const T* const* rows, int64_t offset, float* dst, int64_t stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load8(element_at(rows[i], offset));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store8(dst + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store8(dst + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

// out[i] = sum of the lanes of x[i]. (hadd would be as many micro-operations on Intel and more on AMD.)
MIXATTN_INLINE void sum_each8(const __m256 (&x)[8], float* out) {
  __m256 pairs[4], quads[2];  // pairs: halves of 2 sums in turns; quads: 4 sums of the low lanes, 4 of the high ones
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    quads[i] = _mm256_add_ps(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                             _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
  }
  store8(out, _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                            _mm256_permute2f128_ps(quads[0], quads[1], 0x31)));
}

MIXATTN_INLINE float max_lanes8(__m256 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
MIXATTN_INLINE float sum_lanes8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#endif

#if defined(MIXATTN_ISA_AVX512)

// ---- AVX-512: 16 lanes, 32 registers --------------------------------------------------------------------------------

typedef __m512 Vec;
constexpr int kLanes = 16;
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
MIXATTN_INLINE void sum_each(const Vec (&x)[16], float* out) {
  // As sum_each8 within quarters of 4 lanes; then quarters are added, by twos and by fours.
  Vec pairs[8], quads[4];
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    quads[i] = _mm512_add_ps(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
  }
  const auto add_quarters = [](Vec a, Vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  _mm512_storeu_ps(out, add_quarters(add_quarters(quads[0], quads[1]), add_quarters(quads[2], quads[3])));
}

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
#if defined(MIXATTN_ISA_AVX512_BF16)
#define MIXATTN_HAS_BFLOAT16_DOT
MIXATTN_INLINE IntVec add_int16_products(IntVec sum, IntVec a, IntVec b) {
  // Not the intrinsic: GCC 12 copies each sum to another register and back around it.
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}
MIXATTN_INLINE Vec add_bfloat16_products(Vec sum, IntVec a, IntVec b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
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
#endif

#elif defined(MIXATTN_ISA_AVX2)

// ---- AVX2 + FMA + F16C: 8 lanes, 16 registers -----------------------------------------------------------------------

typedef __m256 Vec;
constexpr int kLanes = 8;
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
MIXATTN_INLINE IntVec add_int16_products(IntVec sum, IntVec a, IntVec b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {  // as for AVX-512
  const IntVec even = _mm256_and_si256(unsigned_bytes, _mm256_set1_epi16(0xff));
  const IntVec signed_even = _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8);
  sum = add_int16_products(sum, even, signed_even);
  return add_int16_products(sum, _mm256_srli_epi16(unsigned_bytes, 8), _mm256_srai_epi16(signed_bytes, 8));
}

#elif defined(MIXATTN_ISA_SCALAR)

// ---- any CPU: the compiler's 4-lane vectors -------------------------------------------------------------------------

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileRows = 6;  // as for AVX2: x86-64 has 16 registers; aarch64 has more than it needs

MIXATTN_INLINE float to_float(float x) {
  return x;
}
MIXATTN_INLINE float to_float(int8_t x) {
  return static_cast<float>(x);
}
MIXATTN_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
MIXATTN_INLINE float to_float(Float16 x) {
  // Exponent and mantissa moved into place and multiplied by 2^112, which renormalises subnormals; Inf and NaN get the
  // rest of their exponent by hand.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float result;
  memcpy(&result, &bits, sizeof(result));
  result *= 0x1p112f;
  memcpy(&bits, &result, sizeof(bits));
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
MIXATTN_INLINE void from_float(float x, float* p) {
  *p = x;
}
MIXATTN_INLINE void from_float(float x, BFloat16* p) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = x != x ? bits | 0x00400000 : bits + 0x7fff + ((bits >> 16) & 1);
  p->bits = static_cast<uint16_t>(bits >> 16);
}
MIXATTN_INLINE void from_float(float x, Float16* p) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {  // NaN, kept quiet
    half = 0x7e00 | ((bits >> 13) & 0x3ff);
  } else if (bits >= 0x477ff000) {  // 65520, the first float32 that rounds to infinity
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: subnormal; adding 0.5 leaves its rounded mantissa in the low bits
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

MIXATTN_INLINE Vec zero() {
  return Vec{0, 0, 0, 0};
}
MIXATTN_INLINE Vec broadcast(float x) {
  return Vec{x, x, x, x};
}
template <typename T>
MIXATTN_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
MIXATTN_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
MIXATTN_INLINE IntVec load_words(const void* p) {
  IntVec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
MIXATTN_INLINE void store_words(void* p, IntVec x) {
  memcpy(p, &x, sizeof(x));
}
MIXATTN_INLINE IntVec broadcast_word(int32_t x) {
  return IntVec{x, x, x, x};
}
MIXATTN_INLINE IntVec add_words(IntVec a, IntVec b) {
  return a + b;
}
MIXATTN_INLINE IntVec round_to_int(Vec x) {  // to nearest, ties to even, for |x| < 2^22
  return __builtin_convertvector((x + 0x1.8p23f) - 0x1.8p23f, IntVec);
}
MIXATTN_INLINE void store_low_bytes(int8_t* p, IntVec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
}
MIXATTN_INLINE IntVec low_nibbles(IntVec x) {
  return x & 0x0f0f0f0f;
}
MIXATTN_INLINE IntVec high_nibbles(IntVec x) {
  return low_nibbles(x >> 4);
}
MIXATTN_INLINE Vec int_to_float(IntVec x) {
  return __builtin_convertvector(x, Vec);
}
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  for (int i = 0; i < 32; i += 8) sum += ((unsigned_bytes >> i) & 0xff) * ((signed_bytes << (24 - i)) >> 24);
  return sum;
}
template <int kByte>
MIXATTN_INLINE Vec load_bytes(const uint32_t* p) {
  const IntVec words = load_words(p);
  const IntVec bytes = kByte == 3 ? (words >> 24) & 0xff : words & (0xff << (8 * (kByte % 3)));
  return __builtin_convertvector(bytes, Vec);
}
template <int kNibble>
MIXATTN_INLINE Vec load_nibbles(const uint32_t* p) {
  IntVec words;
  memcpy(&words, p, sizeof(words));
  const IntVec nibbles = kNibble == 7 ? (words >> 28) & 0xf : words & (0xf << (4 * (kNibble % 7)));
  return __builtin_convertvector(nibbles, Vec);
}
template <typename T>
MIXATTN_INLINE void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
}
MIXATTN_INLINE void store(float* p, Vec x) {
  memcpy(p, &x, sizeof(x));
}
MIXATTN_INLINE void keep_in_register(Vec*) {}
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "load_even_odd takes the lower address for the lower half");
MIXATTN_INLINE void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  IntVec both;
  memcpy(&both, p, sizeof(both));
  *even = (Vec)(both << 16);
  *odd = (Vec)(both & static_cast<int32_t>(0xffff0000));
}
MIXATTN_INLINE void interleave(Vec even, Vec odd, Vec* first, Vec* second) {
  *first = Vec{even[0], odd[0], even[1], odd[1]};
  *second = Vec{even[2], odd[2], even[3], odd[3]};
}
MIXATTN_INLINE void deinterleave(Vec first, Vec second, Vec* even, Vec* odd) {
  *even = Vec{first[0], first[2], second[0], second[2]};
  *odd = Vec{first[1], first[3], second[1], second[3]};
}
template <typename T>
Vec load_half(const T* p);  // declared only, as for AVX2
template <typename T>
void store_half(T* p, Vec x);

template <typename T>
MIXATTN_INLINE void transpose8(const T* const* rows, int64_t offset, float* dst, int64_t stride) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; j += kLanes) {
      const Vec x = load(element_at(rows[i], offset + j));
      for (int lane = 0; lane < kLanes; ++lane) dst[(j + lane) * stride + i] = x[lane];
    }
  }
}

MIXATTN_INLINE Vec add(Vec a, Vec b) {
  return a + b;
}
MIXATTN_INLINE Vec sub(Vec a, Vec b) {
  return a - b;
}
MIXATTN_INLINE Vec mul(Vec a, Vec b) {
  return a * b;
}
MIXATTN_INLINE Vec div(Vec a, Vec b) {
  return a / b;
}
MIXATTN_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
MIXATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
  return a * b + c;
}
MIXATTN_INLINE Vec abs(Vec x) {
  return (Vec)((IntVec)x & 0x7fffffff);
}
MIXATTN_INLINE Vec copy_sign(Vec magnitude, Vec sign) {  // magnitude >= 0
  return (Vec)((IntVec)magnitude | ((IntVec)sign & INT32_MIN));
}
MIXATTN_INLINE Vec select_less(Vec x, Vec bound, Vec then, Vec otherwise) {
  return x < bound ? then : otherwise;
}
MIXATTN_INLINE Vec add_to_exponent(Vec x, Vec n) {
  return (Vec)((IntVec)x + ((IntVec)n << 23));
}
MIXATTN_INLINE float first_lane(Vec x) {
  return x[0];
}
MIXATTN_INLINE float max_lanes(Vec x) {
  const float a = x[0] > x[1] ? x[0] : x[1];
  const float b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
MIXATTN_INLINE float sum_lanes(Vec x) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}
MIXATTN_INLINE void sum_each(const Vec (&x)[8], float* out) {
  for (int i = 0; i < 8; ++i) out[i] = sum_lanes(x[i]);
}

#else
#error "define MIXATTN_ISA_AVX512, MIXATTN_ISA_AVX2 or MIXATTN_ISA_SCALAR before vec.h"
#endif

// ---- functions over any Vec -----------------------------------------------------------------------------------------

// 2 kLanes elements as two vectors, in whatever order costs least, the same at every call for one T: sums over elements
// do not care. bfloat16 takes even and odd elements apart, one operation per vector where widening takes two.
template <typename T>
MIXATTN_INLINE void load_pair(const T* p, Vec* a, Vec* b) {
  *a = load(p);
  *b = load(p + kLanes);
}
MIXATTN_INLINE void load_pair(const BFloat16* p, Vec* a, Vec* b) {
  load_even_odd(p, a, b);
}

// The two vectors that load_pair of this type made, or what was computed from them, in the order of memory.
MIXATTN_INLINE void restore_pair(const BFloat16*, Vec* a, Vec* b) {
  interleave(*a, *b, a, b);
}
MIXATTN_INLINE void restore_pair(const void*, Vec*, Vec*) {}

// The reverse: two vectors in the order of memory as load_pair of this type would give them.
MIXATTN_INLINE void split_pair(const BFloat16*, Vec* a, Vec* b) {
  deinterleave(*a, *b, a, b);
}
MIXATTN_INLINE void split_pair(const void*, Vec*, Vec*) {}

// What load_nibbles<kNibble>, the unsigned value of bits [4 kNibble, 4 kNibble + 4) of each word where it stands, is to
// be multiplied with. Left in place it needs no shift, but for the highest, which would be a sign.
template <int kByte>
constexpr float byte_unit() {  // and load_bytes, which shifts byte 3 only
  return kByte == 3 ? 1.0f : 1.0f / static_cast<float>(int64_t{1} << (8 * kByte));
}
template <int kNibble>
constexpr float nibble_unit() {
  return kNibble == 7 ? 1.0f : 1.0f / static_cast<float>(int64_t{1} << (4 * kNibble));
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// 2^x for x <= 0; 0 below -126, -inf included; NaN stays NaN. 2^x = 2^n 2^f with n = round(x), |f| <= 1/2, and 2^f from
// a minimax polynomial of degree 6 with value 1 at 0 (Remez, relative error 2.6e-9). In float32 the largest error over
// all x in [-126, 0] is 1.0 ulp (1.2e-7 relative) with FMA, 1.2 ulp without.
MIXATTN_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec shift = broadcast(0x1.8p23f);  // pushes the fraction out of the mantissa: n is left in the low bits
  const Vec shifted = add(x, shift);
  const Vec f = sub(x, sub(shifted, shift));
  Vec p = broadcast(1.54614446986e-4f);
  p = fmadd(p, f, broadcast(1.34004281776e-3f));
  p = fmadd(p, f, broadcast(9.61805667852e-3f));
  p = fmadd(p, f, broadcast(5.55032722667e-2f));
  p = fmadd(p, f, broadcast(2.40226509223e-1f));
  p = fmadd(p, f, broadcast(6.93147206703e-1f));
  p = fmadd(p, f, broadcast(1.0f));
  return select_less(x, broadcast(-126.0f), zero(), add_to_exponent(p, shifted));
}

// tanh(x): below 0.625 x + x^3 P(x^2), P minimax of degree 4 (Remez, relative error 4.4e-9), so that small arguments
// keep their relative accuracy; above (1 - e) / (1 + e) with e = exp(-2 |x|).
MIXATTN_INLINE Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec e = exp2_nonpositive(mul(magnitude, broadcast(-2.0f * kLog2E)));
  const Vec large = copy_sign(div(sub(broadcast(1.0f), e), add(broadcast(1.0f), e)), x);
  const Vec square = mul(x, x);
  Vec p = broadcast(-5.70498795486e-3f);
  p = fmadd(p, square, broadcast(2.06390881102e-2f));
  p = fmadd(p, square, broadcast(-5.373971535e-2f));
  p = fmadd(p, square, broadcast(1.33314422013e-1f));
  p = fmadd(p, square, broadcast(-3.33332819421e-1f));
  const Vec small = fmadd(mul(p, square), x, x);
  return select_less(magnitude, broadcast(0.625f), small, large);
}

}  // namespace
}  // namespace mixattn
