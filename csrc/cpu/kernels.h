// kernels.h: what every ISA's file offers, and the shapes of the work it is given. Plain data and function pointers
// only: this is included where AVX instructions are made, and must not make any that another file could end up running.
#pragma once

#include <cstdint>

#include "common/linear_params.h"
#include "common/params.h"

namespace mixattn {
namespace cpu {

// Items of at most this many rows (a decode's, a speculative verification's) are read straight from their pages: up to
// here packing a tile of K and V costs more than the matrix product gains (README.md). But not if the call is
// invariant.
constexpr int kDirectRows = 16;
// The splits of an invariant plan start at multiples of this, the keys of the longest tile.
constexpr int kInvariantMultiple = 128;
// Such items that differ in their kv head only can be worked on side by side, up to this many.
constexpr int kMaxBundle = 32;

// Elements of a row of Q and K, and of one of V.
struct HeadDims {
  int64_t k;
  int64_t v;
};

struct IsaKernels {
  const char* name;
  bool is_emulated;

  // Bytes of scratch that attend() needs for items of up to max_rows rows; to be aligned to 64 bytes.
  int64_t (*attend_scratch_bytes)(int64_t max_rows, HeadDims dims);

  // A bundle of work items: writes their rows of out and lse, or their partial rows. A bundle is one item, or up to
  // kMaxBundle items of at most kDirectRows rows, of a call that is not invariant, that differ in kv_head (each one
  // more than the last), merge_idx and partial_row only.
  void (*attend)(const AttentionParams& p, const WorkItem* items, int64_t num_items, void* scratch);

  // Merges the splits of one group, in their order, into out and lse. Overwrites the group's partial_lse.
  void (*merge_splits)(const AttentionParams& p, const Merge& merge);

  // Rows [begin, end) of the call.
  void (*append_kv)(const AppendKvParams& p, int64_t begin, int64_t end);
  void (*merge_states)(const MergeStatesParams& p, int64_t begin, int64_t end);

  // Rows [row_begin, row_end) and panels [panel_begin, panel_end) of a linear map; a panel is panel_cols columns. Of a
  // gated map, num_cols a multiple of 2 panel_cols, gates come before the columns that they are for.
  // If the map has at most direct_rows rows, weights are widened in registers and never written; nibbles are not even
  // scaled then, but multiplied with p.x_nibbles, which scale_for_nibbles writes for rows [begin, end).
  void (*linear)(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
  void (*scale_for_nibbles)(const LinearParams& p, int64_t begin, int64_t end);
  // The same from p.x_int8, which quantise_rows writes for rows [begin, end) of x; quantised forms only.
  void (*linear_int8)(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                      int64_t panel_end);
  void (*quantise_rows)(const LinearParams& p, int64_t begin, int64_t end);
  // The same from p.x_parts and p.x_sum_parts, which split_rows writes for rows [begin, end) of x; row_begin is a
  // multiple of 16. Faster than linear from least_tiled_rows(p.form) rows on. nullptr: the ISA has no such tiles.
  void (*linear_tiles)(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end);
  void (*split_rows)(const LinearParams& p, int64_t begin, int64_t end);
  int64_t (*least_tiled_rows)(WeightForm form);
  int64_t panel_cols;
  int64_t direct_rows;
  // target [depth] = row `row` of the matrix in these panels.
  void (*unpack_weight_row)(WeightForm form, const void* panels, int64_t panel_bytes, int64_t row, int64_t depth,
                            float* target);

  // Rows [begin, end) of the call.
  void (*rms_norm)(const RmsNormParams& p, int64_t begin, int64_t end);
  void (*silu_mul)(const SiluMulParams& p, int64_t begin, int64_t end);

  // Loops at the machine's limits. Both return a value that depends on all that was computed.
  float (*fma_loop)(int64_t rounds);                          // rounds * fma_flops_per_round flops
  float (*read_loop)(const float* data, int64_t num_floats);  // num_floats is a multiple of 256
  int64_t fma_flops_per_round;
  // As many products of bfloat16 pairs as fma_loop has FMAs, for the choice at start (dispatch.h); nullptr: such
  // products do not decide it.
  float (*bfloat16_loop)(int64_t rounds);
};

extern const IsaKernels kAmxKernels;
extern const IsaKernels kAvx512Bf16Kernels;
extern const IsaKernels kAvx512VnniKernels;
extern const IsaKernels kAvx512Kernels;
extern const IsaKernels kAvx2VnniKernels;
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kNeonBf16Kernels;
extern const IsaKernels kNeonKernels;
extern const IsaKernels kScalarKernels;

}  // namespace cpu
}  // namespace mixattn
