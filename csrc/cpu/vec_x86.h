// vec_x86.h: 8 lanes, which are AVX2 itself and half a vector of AVX-512; a part of vec.h, which says what may include
// it.
#pragma once

#include "cpu/vec_types.h"

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

namespace mixattn {
namespace {

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

}  // namespace
}  // namespace mixattn
