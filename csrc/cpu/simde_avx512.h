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
#undef _mm512_madd_epi16

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

static inline simde__m512i _mm512_madd_epi16(simde__m512i a, simde__m512i b) {
  const simde__m256i low = simde_mm256_madd_epi16(simde_mm512_castsi512_si256(a), simde_mm512_castsi512_si256(b));
  const simde__m256i high =
      simde_mm256_madd_epi16(simde_mm512_extracti64x4_epi64(a, 1), simde_mm512_extracti64x4_epi64(b, 1));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}

static inline simde__m512i _mm512_cvtps_epi32(simde__m512 x) {
  const simde__m256i low = simde_mm256_cvtps_epi32(simde_mm512_castps512_ps256(x));
  const simde__m256i high = simde_mm256_cvtps_epi32(_mm512_extractf32x8_ps(x, 1));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}

static inline simde__m128i _mm512_cvtepi32_epi8(simde__m512i x) {
  int32_t words[16];
  int8_t bytes[16];
  simde_mm512_storeu_si512(words, x);
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(words[i]);
  return simde_mm_loadu_si128(bytes);
}

static inline simde__m512 _mm512_shuffle_f32x4(simde__m512 a, simde__m512 b, int places) {
  simde__m128 quarters[2][4], shuffled[4];
  simde_mm512_storeu_ps(quarters[0], a);
  simde_mm512_storeu_ps(quarters[1], b);
  for (int i = 0; i < 4; ++i) shuffled[i] = quarters[i / 2][places >> 2 * i & 3];
  return simde_mm512_loadu_ps(shuffled);
}

static inline simde__m512 _mm512_permute_ps(simde__m512 x, int places) {
  float lanes[16], permuted[16];
  simde_mm512_storeu_ps(lanes, x);
  for (int i = 0; i < 16; ++i) permuted[i] = lanes[i / 4 * 4 + (places >> 2 * (i % 4) & 3)];
  return simde_mm512_loadu_ps(permuted);
}
