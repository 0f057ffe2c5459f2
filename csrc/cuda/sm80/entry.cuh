// entry.cuh: the entry points of the sm_80 kernels, under the names of instances.h. The same macros serve nvcc and the
// emulation.
#pragma once

#include "cuda/instances.h"
#include "cuda/sm80/quantised.cuh"

#define MIXATTN_SM80_ENTRY(element, heads, scores)                                                      \
  extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::kNumThreads, mixattn::cuda::sm80::kBlocksPerSm)  \
      MIXATTN_SM80_NAME(element, heads, scores)(const MX_GRID_CONSTANT mixattn::cuda::LaunchParams p) { \
    mixattn::cuda::sm80::mixed_attention<mx::element, MIXATTN_HEADS(heads), MIXATTN_SCORES(scores)>(p); \
  }

#define MIXATTN_SM80_QUANTISED_ENTRY(stored, kStored, heads, scores)                                                   \
  extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::kNumThreads, mixattn::cuda::sm80::kBlocksPerSm)                 \
      MIXATTN_SM80_QUANTISED_NAME(stored, heads, scores)(const MX_GRID_CONSTANT mixattn::cuda::LaunchParams p) {       \
    mixattn::cuda::sm80::quantised_attention<MIXATTN_HEADS(heads), MIXATTN_SCORES(scores), mixattn::KvDType::kStored>( \
        p);                                                                                                            \
  }
