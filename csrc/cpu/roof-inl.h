// roof-inl.h: the two limits of a core, as loops: fused multiply-adds, and reads from memory, for one ISA.
// Method  fma_loop: kTileRows x 2 accumulators as in the register tile of the kernels, operands in registers.
//         bfloat16_loop: the same of products of bfloat16 pairs, where the choice of kernels depends on their speed.
//         read_loop: one pass over a buffer, 8 accumulators, loads, adds and, as in the kernels, single prefetches.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kRoofChains = 2 * kTileRows;
constexpr int64_t kFmaFlopsPerRound = 2 * kRoofChains * kLanes;

// The sum of chains that begin at 0, 1, ... and take rounds of next(chain).
template <typename Next>
MIXATTN_INLINE float run_chains(int64_t rounds, const Next& next) {
  Vec acc[kRoofChains];
#pragma GCC unroll 16
  for (int i = 0; i < kRoofChains; ++i) acc[i] = broadcast(static_cast<float>(i));
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kRoofChains; ++i) acc[i] = next(acc[i]);
  }
  Vec sum = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kRoofChains; ++i) sum = add(sum, acc[i]);
  return sum_lanes(sum);
}

float fma_loop(int64_t rounds) {
  // Through volatile, so that the compiler cannot know that x stays 1 and the sums stay finite.
  volatile float one = 1.0f, small = 1e-6f;
  const Vec x = broadcast(one), y = broadcast(small);
  return run_chains(rounds, [&](Vec acc) { return fmadd(acc, x, y); });
}

#if defined(MIXATTN_ISA_AVX512_BF16) && !defined(MIXATTN_ISA_AMX)
float bfloat16_loop(int64_t rounds) {
  volatile int32_t ones = 0x3f803f80, smalls = 0x35863586;  // pairs of 1 and of 1e-6
  const IntVec x = broadcast_word(ones), y = broadcast_word(smalls);
  return run_chains(rounds, [&](Vec acc) { return add_bfloat16_products(acc, x, y); });
}
#endif

float read_loop(const float* data, int64_t num_floats) {
  constexpr int kChains = 8;
  constexpr int64_t kFarFloats = 4096;  // what lies so far ahead is asked for, past the end, too, where it does no harm
  Vec acc[kChains];
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < num_floats; n += kChains * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      if (i * kLanes % 16 == 0) prefetch_far(data + n + i * kLanes + kFarFloats);
      acc[i] = add(acc[i], load(data + n + i * kLanes));
    }
  }
  Vec sum = zero();
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) sum = add(sum, acc[i]);
  return sum_lanes(sum);
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
