// simde_avx512.h: AVX-512 intrinsics for CPUs without, by SIMDe (https://github.com/simd-everywhere/simde, MIT), and
// the few that its version 0.7 lacks. Only in builds with MIXATTN_BUILD_SIMDE=1: slow, for tests of the AVX-512 path.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_extractf32x8_ps

static inline simde__m512i _mm512_cvtepi8_epi32(simde__m128i x) {
  const simde__m256i low = simde_mm256_cvtepi8_epi32(x);
  const simde__m256i high = simde_mm256_cvtepi8_epi32(simde_mm_srli_si128(x, 8));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}

static inline simde__m512 _mm512_cvtepi32_ps(simde__m512i x) {
  const simde__m256 low = simde_mm256_cvtepi32_ps(simde_mm512_castsi512_si256(x));
  const simde__m256 high = simde_mm256_cvtepi32_ps(simde_mm512_extracti64x4_epi64(x, 1));
  return simde_mm512_insertf32x8(simde_mm512_castps256_ps512(low), high, 1);
}

static inline simde__m512i _mm512_cvtepu16_epi32(simde__m256i x) {
  const simde__m256i low = simde_mm256_cvtepu16_epi32(simde_mm256_castsi256_si128(x));
  const simde__m256i high = simde_mm256_cvtepu16_epi32(simde_mm256_extracti128_si256(x, 1));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}

static inline simde__m512 _mm512_cvtph_ps(simde__m256i x) {
  const simde__m256 low = simde_mm256_cvtph_ps(simde_mm256_castsi256_si128(x));
  const simde__m256 high = simde_mm256_cvtph_ps(simde_mm256_extracti128_si256(x, 1));
  return simde_mm512_insertf32x8(simde_mm512_castps256_ps512(low), high, 1);
}

static inline simde__m256 _mm512_extractf32x8_ps(simde__m512 x, int half) {
  simde__m256 halves[2];
  simde_mm512_storeu_ps(halves, x);
  return halves[half];
}

static inline simde__m512i _mm512_cvtepu8_epi32(simde__m128i x) {
  const simde__m256i low = simde_mm256_cvtepu8_epi32(x);
  const simde__m256i high = simde_mm256_cvtepu8_epi32(simde_mm_srli_si128(x, 8));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}
