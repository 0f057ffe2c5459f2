// merge_states.cu: the image of merge_states; the emulation includes this file, too.

#include "cuda/instances.h"
#include "cuda/merge_states.cuh"

#define MIXATTN_MERGE_STATES_ENTRY(element)                                                     \
  extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::kMergeThreads, 4)                        \
      MIXATTN_MERGE_STATES_NAME(element)(const MX_GRID_CONSTANT mixattn::MergeStatesParams p) { \
    mixattn::cuda::merge_states<mx::element>(p);                                                \
  }

MIXATTN_MERGE_STATES_INSTANCES(MIXATTN_MERGE_STATES_ENTRY)
