// ops.h: the CPU operators: checks, threads, and the kernels of one ISA. Each throws std::invalid_argument, naming the
// argument and its bound, before it writes anything.
#pragma once

#include "cpu/kernels.h"

namespace mixattn {
namespace cpu {

void mixed_attention(const IsaKernels& kernels, const AttentionParams& p, int64_t num_threads);
void append_kv(const IsaKernels& kernels, const AppendKvParams& p, int64_t num_threads);
void merge_states(const IsaKernels& kernels, const MergeStatesParams& p, int64_t num_threads);

// Bytes of one row of a matrix as a checkpoint stores it, and of one panel of it; depth is the length of a row.
int64_t weight_row_bytes(WeightForm form, int64_t depth);
int64_t weight_panel_bytes(const IsaKernels& kernels, WeightForm form, int64_t depth);
// panels [ceil(num_rows / panel_cols), panel_bytes] = the matrix whose num_rows stored rows lie one after another; what
// the last panel has beyond them is zero.
void pack_weight(const IsaKernels& kernels, WeightForm form, const void* rows, int64_t num_rows, int64_t depth,
                 void* panels, int64_t num_threads);
// out [num_ids, depth] = these rows of the matrix.
void unpack_weight_rows(const IsaKernels& kernels, WeightForm form, const void* panels, int64_t num_rows, int64_t depth,
                        const int64_t* ids, int64_t num_ids, float* out, int64_t num_threads);

// rounds_x: x is rounded to int8 in blocks (linear_int8-inl.h); quantised forms only.
void linear(const IsaKernels& kernels, const LinearParams& p, bool rounds_x, int64_t num_threads);
void rms_norm(const IsaKernels& kernels, const RmsNormParams& p, int64_t num_threads);
void silu_mul(const IsaKernels& kernels, const SiluMulParams& p, int64_t num_threads);

// What num_threads threads of this machine reach, best of several rounds, about one second in all.
struct Roofs {
  double read_gb_s;    // 1e9 bytes per second, streaming reads from memory
  double fma_gflop_s;  // 1e9 float32 flops per second, fused multiply-adds
};
Roofs measure_roofs(const IsaKernels& kernels, int64_t num_threads);

}  // namespace cpu
}  // namespace mixattn
