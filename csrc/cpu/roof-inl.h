// roof-inl.h: the two limits of a core, as loops: fused multiply-adds, and reads from memory, for one ISA.
// Method  fma_loop: kTileRows x 2 accumulators as in the register tile of the kernels, operands in registers.
//         read_loop: one pass over a buffer, 8 accumulators, loads, adds and, as in the kernels, single prefetches.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kRoofChains = 2 * kTileRows;
constexpr int64_t kFmaFlopsPerRound = 2 * kRoofChains * kLanes;

float fma_loop(int64_t rounds) {
  Vec acc[kRoofChains];
#pragma GCC unroll 16
  for (int i = 0; i < kRoofChains; ++i) acc[i] = broadcast(static_cast<float>(i));
  // Through volatile, so that the compiler cannot know that x stays 1 and the sums stay finite.
  volatile float one = 1.0f, small = 1e-6f;
  const Vec x = broadcast(one), y = broadcast(small);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kRoofChains; ++i) acc[i] = fmadd(acc[i], x, y);
  }
  Vec sum = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kRoofChains; ++i) sum = add(sum, acc[i]);
  return sum_lanes(sum);
}

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
