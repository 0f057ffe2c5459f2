// bfloat16_parts-inl.h: float32 products by the tiles of AMX, which multiply bfloat16.
// Math    x = x1 + x2 + x3: a float32 is the sum of three bfloat16, each the rest of the last one, rounded; fewer are
//         enough for types of fewer bits. Products of parts are exact; those of parts i and j with i + j > 4 are left
//         out, 2^-26 |x y| together. Sums are float32's. A part below 2^-126 counts as 0, an x that rounds to an
//         infinity in bfloat16 (from 3.39e38 on) as that, and an infinity gives infinities or NaN
// Source  Henry, Tang, Heinecke, https://arxiv.org/abs/1904.06376
#pragma once

#include "cpu/amx_tile-inl.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kMaxParts = 3;
constexpr int64_t kTileWords = kAmxRows * kLanes;  // of a whole tile; its words are pairs of bfloat16

MIXATTN_INLINE void widen_bfloat16(IntVec elements, Vec* first, Vec* second) {
  const auto widen = [](__m256i half) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  *first = widen(_mm512_castsi512_si256(elements));
  *second = widen(_mm512_extracti64x4_epi64(elements, 1));
}

// parts[i]: 32 elements of bfloat16, those of `first` before those of `second`.
template <int kParts>
MIXATTN_INLINE void split_bfloat16(Vec first, Vec second, IntVec (&parts)[kParts]) {
  constexpr int kInfinities = 0x08 | 0x10;  // of which nothing is left
  const auto rest = [](Vec x, Vec taken) __attribute__((always_inline)) {
    return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(taken, kInfinities)), x, taken);
  };
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) {
    parts[i] = reinterpret_cast<IntVec>(_mm512_cvtne2ps_pbh(second, first));
    Vec taken[2];
    widen_bfloat16(parts[i], &taken[0], &taken[1]);
    first = rest(first, taken[0]);
    second = rest(second, taken[1]);
  }
}

// Words of elements i and 16 + i.
MIXATTN_INLINE IntVec zip_halves(IntVec elements) {
  const IntVec order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, elements);
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
