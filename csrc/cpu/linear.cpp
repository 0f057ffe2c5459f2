// linear.cpp: linear maps over packed weights, how they are packed, and the small operations around them.
// Method  checks; then threads draw panels, or rows

#include <algorithm>
#include <climits>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace mixattn {
namespace cpu {
namespace {

// A draw of panels for a few rows: 65,536 weights, some 5 us of one core's reading; a thread is worth waking for it.
constexpr int64_t kGrainWeights = 65536;
constexpr int64_t kRowsPerDraw = 96;       // as linear-inl.h's kRowBlock: x of so many rows stays in L2
constexpr int64_t kGrainElements = 16384;  // of the small operations, as in kv_cache.cpp

int64_t element_bytes(WeightForm form) {
  return form == WeightForm::kFloat32 ? 4 : 2;
}

bool is_quantised(WeightForm form) {
  return form == WeightForm::kQ8_0 || form == WeightForm::kQ4_0 || form == WeightForm::kQ4_1;
}

// Of kBlockDepth elements in a checkpoint; a panel holds the same bytes in another order.
int64_t block_bytes(WeightForm form) {
  switch (form) {
    case WeightForm::kQ8_0:
      return 2 + kBlockDepth;
    case WeightForm::kQ4_0:
      return 2 + kBlockDepth / 2;
    case WeightForm::kQ4_1:
      return 4 + kBlockDepth / 2;
    default:
      return kBlockDepth * element_bytes(form);
  }
}

void check_matrix(WeightForm form, int64_t num_rows, int64_t depth) {
  check_range("num_rows of the matrix", num_rows, 1, INT32_MAX);
  check_range("depth", depth, 1, INT32_MAX);
  if (is_quantised(form) && depth % kBlockDepth != 0) {
    throw std::invalid_argument("depth must be a multiple of 32 in a quantised form, got " + std::to_string(depth));
  }
}

// panel[k][col] = row col's element k.
void pack_plain(const char* rows, int64_t row_bytes, int64_t num_cols, int64_t depth, int64_t size, int64_t panel_cols,
                char* panel) {
  for (int64_t col = 0; col < num_cols; ++col) {
    const char* row = rows + col * row_bytes;
    for (int64_t k = 0; k < depth; ++k) std::memcpy(panel + (k * panel_cols + col) * size, row + k * size, size);
  }
}

// Blocks as linear-inl.h's Q8Form and Q4Form read them.
void pack_blocks(WeightForm form, const char* rows, int64_t row_bytes, int64_t num_cols, int64_t depth,
                 int64_t panel_cols, char* panel) {
  const int64_t bytes = block_bytes(form);
  const int64_t num_scales = form == WeightForm::kQ4_1 ? 2 : 1;
  for (int64_t n = 0; n < depth / kBlockDepth; ++n, panel += panel_cols * bytes) {
    char* quants = panel + num_scales * 2 * panel_cols;
    for (int64_t col = 0; col < num_cols; ++col) {
      const char* block = rows + col * row_bytes + n * bytes;
      for (int64_t i = 0; i < num_scales; ++i) {
        std::memcpy(panel + 2 * (i * panel_cols + col), block + 2 * i, 2);
      }
      // Words of a column, of 4 neighbouring bytes; those of q8_0 get 128 more, which makes them unsigned.
      const char* q = block + 2 * num_scales;
      const int64_t num_words = (bytes - 2 * num_scales) / 4;
      const uint32_t flipped = form == WeightForm::kQ8_0 ? 0x80808080 : 0;
      for (int64_t i = 0; i < num_words; ++i) {
        uint32_t word;
        std::memcpy(&word, q + 4 * i, 4);
        word ^= flipped;
        std::memcpy(quants + 4 * (i * panel_cols + col), &word, 4);
      }
    }
  }
}

}  // namespace

int64_t weight_row_bytes(WeightForm form, int64_t depth) {
  return is_quantised(form) ? depth / kBlockDepth * block_bytes(form) : depth * element_bytes(form);
}

int64_t weight_panel_bytes(const IsaKernels& kernels, WeightForm form, int64_t depth) {
  return kernels.panel_cols * weight_row_bytes(form, depth);
}

void pack_weight(const IsaKernels& kernels, WeightForm form, const void* rows, int64_t num_rows, int64_t depth,
                 void* panels, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_matrix(form, num_rows, depth);
  const int64_t cols = kernels.panel_cols;
  const int64_t row_bytes = weight_row_bytes(form, depth), panel_bytes = weight_panel_bytes(kernels, form, depth);
  parallel_for(num_threads, (num_rows + cols - 1) / cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const char* source = static_cast<const char*>(rows) + n * cols * row_bytes;
      char* panel = static_cast<char*>(panels) + n * panel_bytes;
      const int64_t num_cols = std::min(cols, num_rows - n * cols);
      if (num_cols < cols) std::memset(panel, 0, static_cast<size_t>(panel_bytes));
      if (is_quantised(form)) {
        pack_blocks(form, source, row_bytes, num_cols, depth, cols, panel);
      } else {
        pack_plain(source, row_bytes, num_cols, depth, element_bytes(form), cols, panel);
      }
    }
  });
}

void unpack_weight_rows(const IsaKernels& kernels, WeightForm form, const void* panels, int64_t num_rows, int64_t depth,
                        const int64_t* ids, int64_t num_ids, float* out, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_matrix(form, num_rows, depth);
  for (int64_t i = 0; i < num_ids; ++i) check_range(element("ids", i), ids[i], 0, num_rows - 1);
  const int64_t panel_bytes = weight_panel_bytes(kernels, form, depth);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / depth / 4);  // an element takes as long as four copies
  parallel_for(num_threads, num_ids, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.unpack_weight_row(form, panels, panel_bytes, ids[i], depth, out + i * depth);
    }
  });
}

namespace {

struct alignas(64) Line {
  int32_t words[16];
};

// Of this thread; lives as long as it does and only grows, so that a step allocates nothing.
int32_t* scratch_words(int64_t num_words) {
  static thread_local std::vector<Line> scratch;
  const int64_t num_lines = (num_words + 15) / 16;
  if (static_cast<int64_t>(scratch.size()) < num_lines) scratch.resize(static_cast<size_t>(num_lines));
  return scratch.data()->words;
}

int64_t ceil_div(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}

// Gives p its parts of x, in scratch.
void split_rows(const IsaKernels& kernels, LinearParams* p, int64_t num_threads) {
  constexpr int64_t kParts = 3, kTileRows = 16, kTileWords = 256;
  const int64_t num_blocks = ceil_div(p->depth, kBlockDepth);
  const int64_t num_sum_blocks = p->form == WeightForm::kQ4_1 ? ceil_div(num_blocks, kBlockDepth) : 0;
  const int64_t words_per_block = ceil_div(p->num_rows, kTileRows) * kParts * kTileWords;
  uint32_t* const tiles = reinterpret_cast<uint32_t*>(scratch_words((num_blocks + num_sum_blocks) * words_per_block));
  p->x_parts = {tiles, num_blocks};
  p->x_sum_parts = {tiles + num_blocks * words_per_block, num_sum_blocks};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / p->depth);
  parallel_for(num_threads, p->num_rows, grain,
               [&](int64_t begin, int64_t end) { kernels.split_rows(*p, begin, end); });
}

void multiply_panels(const IsaKernels& kernels, const LinearParams& p, int64_t num_threads) {
  const int64_t cols = kernels.panel_cols, num_panels = ceil_div(p.num_cols, cols);
  const auto multiply = p.x_int8.values != nullptr   ? kernels.linear_int8
                        : p.x_parts.tiles != nullptr ? kernels.linear_tiles
                                                     : kernels.linear;
  // Draws run through all panels for one block of rows, then the next; a draw of gates has what they are for, too.
  const int64_t num_blocks = (p.num_rows + kRowsPerDraw - 1) / kRowsPerDraw;
  const int64_t panels_per_draw = p.is_gated ? 2 : 1, num_drawn = num_panels / panels_per_draw;
  const int64_t draw_weights = panels_per_draw * cols * p.depth;
  const int64_t grain = p.num_rows <= kernels.direct_rows ? std::max<int64_t>(1, kGrainWeights / draw_weights) : 1;
  parallel_for_stretches(num_threads, num_blocks * num_drawn, grain, [&](int64_t begin, int64_t end) {
    const int64_t row = begin / num_drawn * kRowsPerDraw, row_end = std::min(row + kRowsPerDraw, p.num_rows);
    for (int64_t n = 0; n < panels_per_draw; ++n) {
      const int64_t panel = begin % num_drawn + n * num_drawn;
      multiply(p, row, row_end, panel, panel + (end - begin));
    }
  });
}

}  // namespace

void linear(const IsaKernels& kernels, const LinearParams& params, bool rounds_x, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_range("num_rows", params.num_rows, 0, INT32_MAX);
  check_matrix(params.form, params.num_cols, params.depth);
  if (params.is_gated && params.num_cols % (2 * kernels.panel_cols) != 0) {
    throw std::invalid_argument("num_cols of a gated map must be a multiple of " +
                                std::to_string(2 * kernels.panel_cols) + ", got " + std::to_string(params.num_cols));
  }
  LinearParams p = params;
  p.x_int8 = {};
  p.x_nibbles = {};
  p.x_parts = {};
  const bool has_nibbles = p.form == WeightForm::kQ4_0 || p.form == WeightForm::kQ4_1;
  const int64_t num_values = p.num_rows * p.depth, num_blocks = num_values / kBlockDepth;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / p.depth);
  if (rounds_x) {
    if (!is_quantised(p.form)) throw std::invalid_argument("x is rounded to int8 beside quantised weights only");
    int32_t* const sums = scratch_words(num_values / 4 + 3 * num_blocks);
    float* const scales = reinterpret_cast<float*>(sums + num_blocks);
    p.x_int8 = {reinterpret_cast<int8_t*>(sums + 3 * num_blocks), scales, sums, scales + num_blocks};
    parallel_for(num_threads, p.num_rows, grain,
                 [&](int64_t begin, int64_t end) { kernels.quantise_rows(p, begin, end); });
  } else if (kernels.linear_tiles != nullptr && p.num_rows >= kernels.least_tiled_rows(p.form)) {
    split_rows(kernels, &p, num_threads);
  } else if (has_nibbles && p.num_rows <= kernels.direct_rows) {
    float* const values = reinterpret_cast<float*>(scratch_words(num_values + num_blocks));
    p.x_nibbles = {values, values + num_values};
    kernels.scale_for_nibbles(p, 0, p.num_rows);
  }
  multiply_panels(kernels, p, num_threads);
}

void rms_norm(const IsaKernels& kernels, const RmsNormParams& p, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_range("num_rows", p.num_rows, 0, INT32_MAX);
  check_range("num_groups", p.num_groups, 1, INT32_MAX);
  check_range("size", p.size, 1, INT32_MAX);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (p.num_groups * p.size));
  parallel_for(num_threads, p.num_rows, grain, [&](int64_t begin, int64_t end) { kernels.rms_norm(p, begin, end); });
}

void silu_mul(const IsaKernels& kernels, const SiluMulParams& p, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_range("num_rows", p.num_rows, 0, INT32_MAX);
  check_range("size", p.size, 1, INT32_MAX);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (2 * p.size));
  parallel_for(num_threads, p.num_rows, grain, [&](int64_t begin, int64_t end) { kernels.silu_mul(p, begin, end); });
}

}  // namespace cpu
}  // namespace mixattn
