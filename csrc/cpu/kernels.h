// kernels.h: what every ISA's file offers, and the shapes of the work it is given. Plain data and function pointers only:
// this is included where AVX instructions are made, and must not make any that another file could end up running.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace mixattn {
namespace cpu {

struct IsaKernels {
  const char* name;
  bool is_emulated;

  // Bytes of scratch that attend() needs for items of up to max_rows rows; 64-byte aligned.
  int64_t (*attend_scratch_bytes)(int64_t max_rows, int64_t head_dim);

  // One work item: writes its rows of out and lse, or its partial rows.
  void (*attend)(const AttentionParams& p, const WorkItem& item, void* scratch);

  // Merges the splits of one group, in their order, into out and lse. Overwrites the group's partial_lse.
  void (*merge_splits)(const AttentionParams& p, const Merge& merge);

  // Rows [begin, end) of the call.
  void (*append_kv)(const AppendKvParams& p, int64_t begin, int64_t end);
  void (*merge_states)(const MergeStatesParams& p, int64_t begin, int64_t end);

  // Loops at the machine's limits. Both return a value that depends on all that was computed.
  float (*fma_loop)(int64_t rounds);                         // rounds * fma_flops_per_round flops
  float (*read_loop)(const float* data, int64_t num_floats);  // num_floats is a multiple of 256
  int64_t fma_flops_per_round;
};

extern const IsaKernels kAvx512Kernels;
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kScalarKernels;

}  // namespace cpu
}  // namespace mixattn
