// entry.cuh: the entry points of the sm_90 kernel, under the names of instances.h. The same macro serves nvcc and the
// emulation.
#pragma once

#include "cuda/instances.h"
#include "cuda/sm90/mixed_attention.cuh"

#define MIXATTN_SM90_ENTRY(element, kHeadDim, scores)                                                          \
  extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::sm90::kBlockThreads, 1)                                 \
      MIXATTN_SM90_NAME(element, kHeadDim, scores)(const MX_GRID_CONSTANT mixattn::cuda::LaunchParams p,       \
                                                   const MX_GRID_CONSTANT mixattn::cuda::sm90::KeyMaps maps) { \
    mixattn::cuda::sm90::mixed_attention<mx::element, kHeadDim, MIXATTN_SCORES(scores)>(p, maps);              \
  }
