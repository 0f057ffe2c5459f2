// ops.h: the CPU operators: checks, threads, and the kernels of one ISA. Each throws std::invalid_argument, naming the
// argument and its bound, before it writes anything.
#pragma once

#include "cpu/kernels.h"

namespace mixattn {
namespace cpu {

void mixed_attention(const IsaKernels& kernels, const AttentionParams& p, int64_t num_threads);
void append_kv(const IsaKernels& kernels, const AppendKvParams& p, int64_t num_threads);
void merge_states(const IsaKernels& kernels, const MergeStatesParams& p, int64_t num_threads);

// What num_threads threads of this machine reach, best of several rounds, about one second in all.
struct Roofs {
  double read_gb_s;    // 1e9 bytes per second, streaming reads from memory
  double fma_gflop_s;  // 1e9 float32 flops per second, fused multiply-adds
};
Roofs measure_roofs(const IsaKernels& kernels, int64_t num_threads);

}  // namespace cpu
}  // namespace mixattn
