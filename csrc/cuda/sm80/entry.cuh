// entry.cuh: the entry points of the sm_80 kernel, under the names of instances.h. The same macro serves nvcc and the
// emulation.
#pragma once

#include "cuda/instances.h"
#include "cuda/sm80/mixed_attention.cuh"

#define MIXATTN_SM80_ENTRY(element, kHeadDim, scores)                                                      \
  extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::kNumThreads, mixattn::cuda::sm80::kBlocksPerSm)     \
      MIXATTN_SM80_NAME(element, kHeadDim, scores)(const MX_GRID_CONSTANT mixattn::cuda::LaunchParams p) { \
    mixattn::cuda::sm80::mixed_attention<mx::element, kHeadDim, MIXATTN_SCORES(scores)>(p);                \
  }
