// linear-inl.h: y = x W^T + bias + residual in float32, W as it is stored, for one ISA.
// Math    y[r][n] = sum_k x[r][k] w[n][k] (+ bias[n]) (+ residual[r][n]), every w exactly what its form says; or, of
//         such columns g and u, silu(g) u
// Method  W lies in panels of kTileCols columns of y (rows of W), deep first, so that a register tile reads one from
//         front to back. Few rows (up to one register tile, a small decode batch): direct. Each vector of weights is
//         widened in registers and serves all rows; bound by memory. Nibbles are multiplied as the integers they are,
//         and a block's sum is scaled, d sum_k x q + m sum_k x: an FMA less per vector of weights. More rows: widened.
//         A piece of a panel is written as float32 into scratch that stays in L1, and register tiles pass over it;
//         bound by FMA.
// Grid    rows x panels; cpu/linear.cpp deals pieces of both to its threads
// Shapes  as LinearParams
// Memory  reads every panel once per kRowBlock rows, x once per panel. Scratch 4 kTileCols (kDepthPiece + kRowBlock)
//         bytes on the stack: 22 KiB (AVX2), 36 KiB (AVX-512)
// Limits  any number of rows and columns; depth a multiple of 32 in the quantised forms
// Twins   truth: float64 products of the dequantised matrix (tests/ops/test_linear.py)
// Source  GGUF blocks, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; register tiles, doi
//         10.1145/1356052.1356053
#pragma once

#include "common/linear_params.h"
#include "cpu/elementwise-inl.h"
#include "cpu/kernels.h"
#include "cpu/register_tile-inl.h"
#include "cpu/vec.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int64_t kDepthPiece = kLanes > 8 ? 192 : 256;  // of a widened panel: 24 or 16 KiB of L1, beside a tile of x
constexpr int kPanelNearBytes = 2048, kPanelFarBytes = 16384;  // of weights between prefetches, to L1 and L2, and use
constexpr int64_t kRowBlock = 96;  // rows that share a widening, which then costs 3 %; x stays in L2 at depth 576

// A form's widen() gives use(d, i, w) the weights of kTileCols columns at depth d of a block; i counts its calls.

template <typename T>
struct PlainForm {
  static constexpr int kDepth = 4;  // that is unrolled; any will do
  static constexpr int64_t kBytes = kDepth * kTileCols * sizeof(T);

  template <int kCount, typename Use>
  MIXATTN_INLINE void widen(const char* block, const Use& use) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const T* row = reinterpret_cast<const T*>(block) + i * kTileCols;
      const Vec w[kTileVecs] = {load(row), load(row + kLanes)};
      use(i, i, w);
    }
  }
};

// Quantised weights lie in words of a column's 4 neighbouring depths, as linear_int8-inl.h multiplies them. Bytes and
// nibbles are taken out where they stand in a word, as q 2^s, and d / 2^s undoes that, exactly.

// A block of the panel: d of each column, then 8 rows of words; byte i of row g is depth 4 g + i, plus 128.
struct Q8Form {
  static constexpr int kDepth = kBlockDepth;
  static constexpr int64_t kHeaderBytes = 2 * kTileCols;
  static constexpr int64_t kBytes = kHeaderBytes + kTileCols * kBlockDepth;

  template <int kCount, typename Use>
  MIXATTN_INLINE void widen(const char* block, const Use& use) {
    const Float16* d = reinterpret_cast<const Float16*>(block);
    const Vec scale[kTileVecs] = {load(d), load(d + kLanes)};
    const Vec min[kTileVecs] = {mul(scale[0], broadcast(-128.0f)), mul(scale[1], broadcast(-128.0f))};
    const uint32_t* words = reinterpret_cast<const uint32_t*>(d + kTileCols);
    widen_byte<0>(words, scale, min, use);
    widen_byte<1>(words, scale, min, use);
    widen_byte<2>(words, scale, min, use);
    widen_byte<3>(words, scale, min, use);
  }

  template <int kByte, typename Use>
  MIXATTN_INLINE void widen_byte(const uint32_t* words, const Vec (&scale)[kTileVecs], const Vec (&min)[kTileVecs],
                                 const Use& use) {
    const Vec unit = broadcast(byte_unit<kByte>());
    const Vec d[kTileVecs] = {mul(scale[0], unit), mul(scale[1], unit)};
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const uint32_t* row = words + g * kTileCols;
      const Vec w[kTileVecs] = {fmadd(load_bytes<kByte>(row), d[0], min[0]),
                                fmadd(load_bytes<kByte>(row + kLanes), d[1], min[1])};
      use(4 * g + kByte, 8 * kByte + g, w);
    }
  }
};

// A block of the panel: d of each column, m of each column if there is one, then 4 rows of words, each column's as in
// GGUF: byte i of row g has depth 4 g + i in its low nibble, and 16 more in its high one.
template <bool kHasMin>
struct Q4Form {
  static constexpr int kDepth = kBlockDepth;
  static constexpr int64_t kHeaderBytes = (kHasMin ? 4 : 2) * kTileCols;
  static constexpr int64_t kBytes = kHeaderBytes + kTileCols * kBlockDepth / 2;

  template <int kCount, typename Use>
  MIXATTN_INLINE void widen(const char* block, const Use& use) {
    const Float16* d = reinterpret_cast<const Float16*>(block);
    const Vec scale[kTileVecs] = {load(d), load(d + kLanes)};
    Vec min[kTileVecs];
#pragma GCC unroll 2
    for (int c = 0; c < kTileVecs; ++c) {
      min[c] = kHasMin ? load(d + kTileCols + c * kLanes) : mul(scale[c], broadcast(-8.0f));
    }
    const uint32_t* words = reinterpret_cast<const uint32_t*>(d + (kHasMin ? 2 : 1) * kTileCols);
    widen_nibble<0>(words, scale, min, use);
    widen_nibble<1>(words, scale, min, use);
    widen_nibble<2>(words, scale, min, use);
    widen_nibble<3>(words, scale, min, use);
    widen_nibble<4>(words, scale, min, use);
    widen_nibble<5>(words, scale, min, use);
    widen_nibble<6>(words, scale, min, use);
    widen_nibble<7>(words, scale, min, use);
  }

  template <int kNibble, typename Use>
  MIXATTN_INLINE void widen_nibble(const uint32_t* words, const Vec (&scale)[kTileVecs], const Vec (&min)[kTileVecs],
                                   const Use& use) {
    const Vec unit = broadcast(nibble_unit<kNibble>());
    const Vec d[kTileVecs] = {mul(scale[0], unit), mul(scale[1], unit)};
    for_nibble<kNibble>(words, [&](int k, int i, const Vec(&q)[kTileVecs]) __attribute__((always_inline)) {
      const Vec w[kTileVecs] = {fmadd(q[0], d[0], min[0]), fmadd(q[1], d[1], min[1])};
      use(k, i, w);
    });
  }

  // use(k, i, q): q of kTileCols columns at depth k of a block, times what nibble_unit undoes; i counts the calls.
  template <typename Use>
  MIXATTN_INLINE void for_each_nibble(const uint32_t* words, const Use& use) {
    for_nibble<0>(words, use);
    for_nibble<1>(words, use);
    for_nibble<2>(words, use);
    for_nibble<3>(words, use);
    for_nibble<4>(words, use);
    for_nibble<5>(words, use);
    for_nibble<6>(words, use);
    for_nibble<7>(words, use);
  }

  template <int kNibble, typename Use>
  MIXATTN_INLINE void for_nibble(const uint32_t* words, const Use& use) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const uint32_t* row = words + g * kTileCols;
      const Vec q[kTileVecs] = {load_nibbles<kNibble>(row), load_nibbles<kNibble>(row + kLanes)};
      use(4 * g + kNibble / 2 + kNibble % 2 * 16, 4 * kNibble + g, q);
    }
  }
};

// Sends for a line of weights that will be read soon and for one that will be read later.
MIXATTN_INLINE void prefetch_ahead(const char* line) {
  prefetch(line + kPanelNearBytes);
  prefetch_far(line + kPanelFarBytes);
}

// Calls use(k, i, w) for every k of the depth [0, depth) of a panel; i counts in an unrolled block. A panel that is
// streamed from memory is prefetched line by line.
template <class Form, bool kIsStreamed, typename Use>
MIXATTN_INLINE void for_each_depth(const char* panel, int64_t depth, const Use& use) {
  constexpr int kLines = (Form::kBytes + 63) / 64;
  int64_t k = 0;
  for (; k + Form::kDepth <= depth; k += Form::kDepth, panel += Form::kBytes) {
    Form::template widen<Form::kDepth>(
        panel, [&](int d, int i, const Vec(&w)[kTileVecs]) __attribute__((always_inline)) {
          if (kIsStreamed) {
            for (int line = i * kLines / Form::kDepth; line < (i + 1) * kLines / Form::kDepth; ++line) {
              prefetch_ahead(panel + line * 64);
            }
          }
          use(k + d, i, w);
        });
  }
  if constexpr (Form::kDepth < kBlockDepth) {  // quantised depths have no rest
    for (; k < depth; ++k, panel += Form::kBytes / Form::kDepth) {
      Form::template widen<1>(panel,
                              [&](int, int, const Vec(&w)[kTileVecs]) __attribute__((always_inline)) { use(k, 0, w); });
    }
  }
}

// c (kRows, kTileCols) = x (kRows, depth) times the panel. Few rows get several chains of sums each: 8 FMAs hide 4
// cycles of latency on 2 ports.
template <class Form, int kRows>
void multiply_direct(const char* panel, const float* x, int64_t x_stride, int64_t depth, float* c) {
  constexpr int kChains = kRows == 1 ? 4 : (kRows == 2 ? 2 : 1);
  Vec acc[kChains][kRows][kTileVecs];
#pragma GCC unroll 4
  for (int n = 0; n < kChains; ++n) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[n][r][0] = acc[n][r][1] = zero();
  }
  for_each_depth<Form, true>(panel, depth,
                             [&](int64_t k, int i, const Vec(&w)[kTileVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 8
                               for (int r = 0; r < kRows; ++r) {
                                 const Vec value = broadcast(x[r * x_stride + k]);
#pragma GCC unroll 2
                                 for (int j = 0; j < kTileVecs; ++j)
                                   acc[i % kChains][r][j] = fmadd(value, w[j], acc[i % kChains][r][j]);
                               }
                             });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) {
      Vec sum = acc[0][r][j];
      if (kChains == 2) sum = add(sum, acc[kChains - 1][r][j]);
      if (kChains == 4)
        sum = add(add(sum, acc[1 % kChains][r][j]), add(acc[2 % kChains][r][j], acc[3 % kChains][r][j]));
      store(c + r * kTileCols + j * kLanes, sum);
    }
  }
}

// What load_nibbles multiplies the nibble of a block's depth i with, inverted, as Q4Form::widen has them.
struct NibbleUnits {
  float of[kBlockDepth];
  constexpr NibbleUnits() : of() {
    constexpr float kUnits[8] = {nibble_unit<0>(), nibble_unit<1>(), nibble_unit<2>(), nibble_unit<3>(),
                                 nibble_unit<4>(), nibble_unit<5>(), nibble_unit<6>(), nibble_unit<7>()};
    for (int64_t i = 0; i < kBlockDepth; ++i) of[i] = kUnits[i % 4 * 2 + i / 16];
  }
};

void scale_for_nibbles(const LinearParams& p, int64_t begin, int64_t end) {
  static constexpr NibbleUnits kUnits;
  const int64_t num_blocks = p.depth / kBlockDepth;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t n = 0; n < num_blocks; ++n) {
      const float* const x = p.x + r * p.x_stride + n * kBlockDepth;
      float* const values = p.x_nibbles.values + r * p.depth + n * kBlockDepth;
      Vec sum = zero();
      for (int64_t i = 0; i < kBlockDepth; i += kLanes) {
        sum = add(sum, load(x + i));
        store(values + i, mul(load(x + i), load(kUnits.of + i)));
      }
      p.x_nibbles.sums[r * num_blocks + n] = sum_lanes(sum);
    }
  }
}

// multiply_direct for rows of NibbleRows, from `row` on.
template <bool kHasMin, int kRows>
void multiply_nibbles(const char* panel, const NibbleRows& x, int64_t row, int64_t depth, float* c) {
  typedef Q4Form<kHasMin> Form;
  constexpr int kChains = kRows == 1 ? 4 : (kRows == 2 ? 2 : 1);  // as in multiply_direct
  constexpr int kLines = (Form::kBytes + 63) / 64;
  const int64_t num_blocks = depth / kBlockDepth;
  Vec acc[kRows][kTileVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
  for (int64_t n = 0; n < num_blocks; ++n, panel += Form::kBytes) {
    const float* const values = x.values + row * depth + n * kBlockDepth;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(panel + Form::kHeaderBytes);
    Vec sums[kChains][kRows][kTileVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[i][r][0] = sums[i][r][1] = zero();
    }
    Form::for_each_nibble(words, [&](int d, int i, const Vec(&q)[kTileVecs]) __attribute__((always_inline)) {
      for (int line = i * kLines / kBlockDepth; line < (i + 1) * kLines / kBlockDepth; ++line) {
        prefetch_ahead(panel + line * 64);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec value = broadcast(values[r * depth + d]);
#pragma GCC unroll 2
        for (int j = 0; j < kTileVecs; ++j) sums[i % kChains][r][j] = fmadd(value, q[j], sums[i % kChains][r][j]);
      }
    });
    const Float16* const d = reinterpret_cast<const Float16*>(panel);
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) {
      const Vec scale = load(d + j * kLanes);
      const Vec min = kHasMin ? load(d + kTileCols + j * kLanes) : mul(scale, broadcast(-8.0f));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        Vec sum = sums[0][r][j];
        if (kChains == 2) sum = add(sum, sums[kChains - 1][r][j]);
        if (kChains == 4) {
          sum = add(add(sum, sums[1 % kChains][r][j]), add(sums[2 % kChains][r][j], sums[3 % kChains][r][j]));
        }
        const Vec total = broadcast(x.sums[(row + r) * num_blocks + n]);
        acc[r][j] = fmadd(min, total, fmadd(scale, sum, acc[r][j]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) store(c + r * kTileCols + j * kLanes, acc[r][j]);
  }
}

// c as multiply_direct's, of the rows from `row` on.
typedef void (*DirectFunction)(const LinearParams& p, const char* panel, int64_t row, float* c);

template <class Form, int kRows>
struct Direct {
  static void multiply(const LinearParams& p, const char* panel, int64_t row, float* c) {
    multiply_direct<Form, kRows>(panel, p.x + row * p.x_stride, p.x_stride, p.depth, c);
  }
};
template <bool kHasMin, int kRows>
struct Direct<Q4Form<kHasMin>, kRows> {
  static void multiply(const LinearParams& p, const char* panel, int64_t row, float* c) {
    multiply_nibbles<kHasMin, kRows>(panel, p.x_nibbles, row, p.depth, c);
  }
};

// A pointer, because GCC would otherwise inline all of them into one function, and hold too much in registers: with
// AVX2, 3 rows of q4_1 take 2.7 times as long then.
template <class Form>
DirectFunction direct_function(int64_t num_rows) {
  static_assert(kTileRows <= 8, "one entry per number of rows");
  static constexpr DirectFunction kFunctions[] = {
      Direct<Form, 1>::multiply,
      Direct<Form, 2>::multiply,
      Direct<Form, 3>::multiply,
      Direct<Form, 4>::multiply,
      Direct<Form, 5>::multiply,
      Direct<Form, 6>::multiply,
      Direct<Form, at_most_tile_rows(7)>::multiply,
      Direct<Form, at_most_tile_rows(8)>::multiply,
  };
  return kFunctions[num_rows - 1];
}

// Prefetches the share of num_bytes that is due between rows `row` and `end` of num_rows.
MIXATTN_INLINE void prefetch_share(const char* source, int64_t num_bytes, int64_t row, int64_t end, int64_t num_rows) {
  for (int64_t b = round_up(num_bytes * row / num_rows, 64); b < num_bytes * end / num_rows; b += 64) {
    prefetch_far(source + b);
  }
}

// The first column of y that a panel is for. Of a gated map the panels of gates write them there, which stay in a cache
// until the panels of the others have come.
MIXATTN_INLINE int64_t first_col(const LinearParams& p, int64_t panel) {
  const int64_t col = panel * kTileCols;
  return p.is_gated && col >= p.num_cols / 2 ? col - p.num_cols / 2 : col;
}

// Sends for the lines that finish_panel is to write and to read. All at once, when it runs, they would be waited for.
MIXATTN_INLINE void prefetch_finish(const LinearParams& p, int64_t row, int64_t num_rows, int64_t panel) {
  const int64_t begin = first_col(p, panel);
  for (int64_t r = row; r < row + num_rows; ++r) {
    for (int64_t col = begin; col < begin + kTileCols; col += 16) {
      prefetch_far(p.y + r * p.y_stride + col);
      if (p.residual != nullptr) prefetch_far(p.residual + r * p.residual_stride + col);
    }
  }
}

// c (num_rows, kTileCols) = x (rows from `row` on) times the panel, a piece of its depth at a time. The next piece
// comes from memory while register tiles are computed.
template <class Form>
void multiply_many_rows(const LinearParams& p, int64_t panel, int64_t row, int64_t num_rows, float* c) {
  alignas(64) float widened[kDepthPiece * kTileCols];
  const char* data = static_cast<const char*>(p.panels) + panel * p.panel_bytes;
  const float* const x = p.x + row * p.x_stride;
  for (int64_t begin = 0; begin < p.depth; begin += kDepthPiece, data += kDepthPiece / Form::kDepth * Form::kBytes) {
    const int64_t piece = clamp(p.depth - begin, 0, kDepthPiece);
    const int64_t piece_bytes = piece / Form::kDepth * Form::kBytes;
    for_each_depth<Form, false>(data, piece,
                                [&](int64_t k, int, const Vec(&w)[kTileVecs]) __attribute__((always_inline)) {
                                  store(widened + k * kTileCols, w[0]);
                                  store(widened + k * kTileCols + kLanes, w[1]);
                                });
    for (int64_t r = 0; r < num_rows;) {
      const int n = tile_rows(num_rows - r);
      prefetch_share(data + piece_bytes, piece_bytes, r, r + n, num_rows);
      if (begin == 0) prefetch_finish(p, row + r, n, panel);
      const TileFunction multiply = begin == 0 ? tile_function<kTileVecs, false>(n) : tile_function<kTileVecs, true>(n);
      multiply(x + r * p.x_stride + begin, p.x_stride, widened, piece, c + r * kTileCols, kTileCols);
      r += n;
    }
  }
}

// y = c + bias + residual for the rows from `row` on and the columns of the panel; where gates are in y, what they let
// through. Panels of a gated map are full.
MIXATTN_INLINE void finish_panel(const LinearParams& p, const float* c, int64_t row, int64_t num_rows, int64_t panel) {
  const int64_t col = panel * kTileCols, width = clamp(p.num_cols - col, 0, kTileCols);
  const bool has_gates = first_col(p, panel) != col;
  for (int64_t r = 0; r < num_rows; ++r, c += kTileCols) {
    float* y = p.y + (row + r) * p.y_stride + first_col(p, panel);
    const float* residual = p.residual == nullptr ? nullptr : p.residual + (row + r) * p.residual_stride + col;
    if (width == kTileCols) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileCols; j += kLanes) {
        Vec sum = load(c + j);
        if (p.bias != nullptr) sum = add(sum, load(p.bias + col + j));
        if (residual != nullptr) sum = add(sum, load(residual + j));
        if (has_gates) sum = mul(silu(load(y + j)), sum);
        store(y + j, sum);
      }
      continue;
    }
    for (int64_t j = 0; j < width; ++j) {
      float sum = c[j];
      if (p.bias != nullptr) sum += p.bias[col + j];
      if (residual != nullptr) sum += residual[j];
      y[j] = sum;
    }
  }
}

template <class Form>
void linear_typed(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  alignas(64) float c[kRowBlock * kTileCols];
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t num_rows = clamp(row_end - row, 0, kRowBlock);
    for (int64_t n = panel_begin; n < panel_end; ++n) {
      if (p.num_rows <= kTileRows) {
        const char* panel = static_cast<const char*>(p.panels) + n * p.panel_bytes;
        direct_function<Form>(num_rows)(p, panel, row, c);
      } else {
        multiply_many_rows<Form>(p, n, row, num_rows, c);
      }
      finish_panel(p, c, row, num_rows, n);
    }
  }
}

// Calls call(Form()) for the form as a type.
template <typename Call>
MIXATTN_INLINE void for_form(WeightForm form, const Call& call) {
  switch (form) {
    case WeightForm::kFloat32:
      return call(PlainForm<float>());
    case WeightForm::kBFloat16:
      return call(PlainForm<BFloat16>());
    case WeightForm::kFloat16:
      return call(PlainForm<Float16>());
    case WeightForm::kQ8_0:
      return call(Q8Form());
    case WeightForm::kQ4_0:
      return call(Q4Form<false>());
    case WeightForm::kQ4_1:
      return call(Q4Form<true>());
  }
}

void linear_panels(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  for_form(p.form, [&](auto form) { linear_typed<decltype(form)>(p, row_begin, row_end, panel_begin, panel_end); });
}

// ---- unpacking ------------------------------------------------------------------------------------------------------

// target[k] = w[row][k], by widening the panel that the row is a column of.
template <class Form>
void unpack_row(const char* panels, int64_t panel_bytes, int64_t row, int64_t depth, float* target) {
  const int64_t lane = row % kTileCols;
  alignas(64) float widened[kTileCols];
  for_each_depth<Form, false>(panels + row / kTileCols * panel_bytes, depth,
                              [&](int64_t k, int, const Vec(&w)[kTileVecs]) __attribute__((always_inline)) {
                                store(widened, w[0]);
                                store(widened + kLanes, w[1]);
                                target[k] = widened[lane];
                              });
}

void unpack_weight_row(WeightForm form, const void* panels, int64_t panel_bytes, int64_t row, int64_t depth,
                       float* target) {
  for_form(form, [&](auto form_type) {
    unpack_row<decltype(form_type)>(static_cast<const char*>(panels), panel_bytes, row, depth, target);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
