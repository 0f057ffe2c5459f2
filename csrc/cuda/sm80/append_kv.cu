// append_kv.cu: the image of append_kv; the emulation includes this file, too.

#include "cuda/append_kv.cuh"
#include "cuda/instances.h"

#define MIXATTN_APPEND_KV_ENTRY(element, stored, kStored)                                         \
  extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::kAppendThreads, 4)                         \
      MIXATTN_APPEND_KV_NAME(element, stored)(const MX_GRID_CONSTANT mixattn::AppendKvParams p) { \
    mixattn::cuda::append_kv<mx::element, mixattn::KvDType::kStored>(p);                          \
  }

MIXATTN_APPEND_KV_INSTANCES(MIXATTN_APPEND_KV_ENTRY)
