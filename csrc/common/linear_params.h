// linear_params.h: what a linear map and the small operations around it get; as params.h.
#pragma once

#include <cstdint>

namespace mixattn {

// How a weight matrix is stored. The quantised forms are GGUF's, blocks of kBlockDepth neighbouring elements of a row:
// q8_0 w = d q, q in [-128, 127]; q4_0 w = d (q - 8); q4_1 w = d q + m, q in [0, 15]; d and m are float16.
enum class WeightForm : int32_t { kFloat32, kBFloat16, kFloat16, kQ8_0, kQ4_0, kQ4_1 };

constexpr int64_t kBlockDepth = 32;

// x rounded to int8 in blocks of kBlockDepth elements, x ~ scale value (linear_int8-inl.h).
struct Int8Rows {
  int8_t* values;      // [num_rows, depth]; nullptr: x is not rounded
  float* scales;       // [num_rows, depth / kBlockDepth], as are the following
  int32_t* sums;       // of a block's values
  float* scaled_sums;  // scale times sum
};

// x for products with nibbles that stay where they are in their words: divided by what that multiplies them with
// (linear-inl.h).
struct NibbleRows {
  float* values;  // [num_rows, depth]; nullptr: there are too many rows, or no nibbles
  float* sums;    // [num_rows, depth / kBlockDepth], of a block's elements of x
};

// Rows as sums of three bfloat16, in tiles (linear_tiles-inl.h).
struct PartRows {
  uint32_t* tiles;     // [num_rows / 16, num_blocks, 3, 16, 16], the first rounded up; nullptr: not split
  int64_t num_blocks;  // of kBlockDepth elements of a row, the last one filled up with zeros
};

struct LinearParams {
  WeightForm form;
  const void* panels;     // [num_panels, panel_bytes], written by pack_panels
  const float* x;         // [num_rows, depth]
  const float* bias;      // [num_cols] or nullptr
  const float* residual;  // [num_rows, num_cols] or nullptr; may be y
  float* y;               // [num_rows, num_cols]; if is_gated [num_rows, num_cols / 2]
  int64_t num_rows, num_cols, depth;
  int64_t panel_bytes;
  int64_t x_stride, residual_stride, y_stride;
  bool is_gated;  // the columns are gates, then as many that they are for: y = silu(gate) * column; no residual
  Int8Rows x_int8;
  NibbleRows x_nibbles;
  PartRows x_parts;
  PartRows x_sum_parts;  // of the sums of each kBlockDepth elements of x; q4_1 only
};

struct RmsNormParams {
  const float* x;       // [num_rows, num_groups, size]
  const float* weight;  // [size]
  float* y;             // the same as x; may be x
  int64_t num_rows, num_groups, size;
  int64_t x_row_stride, x_group_stride, y_row_stride, y_group_stride;
  float eps;
};

struct SiluMulParams {
  const float* gate_up;  // [num_rows, 2 size]: gates, then what they are multiplied with
  float* y;              // [num_rows, size]
  int64_t num_rows, size;
  int64_t gate_up_stride, y_stride;
};

}  // namespace mixattn
