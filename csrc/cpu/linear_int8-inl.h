// linear_int8-inl.h: linear maps with x rounded to int8, over the quantised forms of linear-inl.h, for one ISA.
// Math    x[r][k] ~ s[r][b] q[r][k] with b = k / 32, s = max |x| of the block / 127 and q = round(x / s). A weight is
//         d (u - z) or d u + m with u in [0, 255]: of a block, y gains s d (sum_k u q - z sum_k q), or s d sum_k u q +
//         s m sum_k q. Sums of products are exact, in int32; blocks are added up in float32
// Method  Register tiles of kInt8Rows rows and one panel; u lies in words of 4 neighbouring depths, which one
//         instruction multiplies with 4 elements of x where there is VNNI, USDOT or, for u - 128, SDOT. Nibbles are
//         unpacked in registers, by units that the products leave free, once per register tile. With AMX 16 rows at a
//         time go by tiles, for which a piece of the panel is unpacked into L1
// Shapes  as LinearParams; depth a multiple of 32
// Memory  as linear-inl.h, x taking 1.4 bytes per element
// Twins   truth: float64 products of the dequantised matrix with the rounded x (tests/ops/test_linear.py)
// Source  dynamic rounding per block as llama.cpp's Q8_0 activations, https://github.com/ggml-org/ggml
#pragma once

#include "cpu/linear-inl.h"
#include "cpu/vec_quantized.h"
#if defined(MIXATTN_ISA_AMX)
#include "cpu/amx_tile-inl.h"
#endif

namespace mixattn {
namespace cpu {
namespace {

// 32 registers hold kInt8Rows x 2 sums of integers, as many in float32, two words of weights, one of x. Of 16, those in
// float32 lie on the stack while a block is multiplied: 5 rows are 1.04 times as fast as 4 (Zen 3), and as fast as 6
// where VNNI leaves registers for them (emulated on a Zen 4, README.md).
constexpr int kInt8Rows = kNumRegisters > 16 ? 6 : 5;
constexpr int64_t kInt8Piece = 640;  // most depths of a panel that register tiles pass over: up to 21 KiB of L1

// One row of x, rounded: q, and of each block s, sum q, and s sum q. All that is not finite makes s NaN.
void quantise_row(const float* x, int64_t depth, int8_t* q, float* scales, int32_t* sums, float* scaled_sums) {
  for (int64_t b = 0; b < depth / kBlockDepth; ++b, x += kBlockDepth, q += kBlockDepth) {
    Vec largest = zero(), magnitudes = zero();
    for (int64_t i = 0; i < kBlockDepth; i += kLanes) {
      const Vec magnitude = abs(load(x + i));
      largest = max(largest, magnitude);
      magnitudes = add(magnitudes, magnitude);
    }
    const float scale = max_lanes(largest) / 127.0f;
    const float inverse = scale > kMinRowScale ? 1.0f / scale : 0.0f;
    IntVec total = broadcast_word(0);
    for (int64_t i = 0; i < kBlockDepth; i += kLanes) {
      const IntVec integers = round_to_int(mul(load(x + i), broadcast(inverse)));
      store_low_bytes(q + i, integers);
      total = add_words(total, integers);
    }
    const float sum = sum_lanes(int_to_float(total));  // exact: below 2^12
    scales[b] = sum_lanes(magnitudes) < INFINITY ? scale : NAN;
    sums[b] = static_cast<int32_t>(sum);
    scaled_sums[b] = scales[b] * sum;
  }
}

void quantise_rows(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t num_blocks = p.depth / kBlockDepth;
  for (int64_t r = begin; r < end; ++r) {
    quantise_row(p.x + r * p.x_stride, p.depth, p.x_int8.values + r * p.depth, p.x_int8.scales + r * num_blocks,
                 p.x_int8.sums + r * num_blocks, p.x_int8.scaled_sums + r * num_blocks);
  }
}

// Words of 4 weights u, of depth 4 group + [0, 4), as a block has them, and how sums of u q are made, from `start` on.
// Products take kTaken from u.
struct ByteQuants {
  static constexpr int64_t kBytes = kTileCols * kBlockDepth;
  MIXATTN_INLINE IntVec words(const char* quants, int group, int c) {
    return load_words(quants + (group * kTileCols + c * kLanes) * 4);
  }
  static constexpr int kTaken = kByteZero;
  MIXATTN_INLINE IntVec begin(int32_t start) { return broadcast_word(start); }
  MIXATTN_INLINE IntVec add(IntVec sum, IntVec w, SharedWord x) { return add_byte_products(sum, w, x); }
  MIXATTN_INLINE IntVec end(IntVec sum, int32_t) { return sum; }
};

struct NibbleQuants {
  MIXATTN_INLINE IntVec words(const char* quants, int group, int c) {
    const IntVec pairs = load_words(quants + (group % 4 * kTileCols + c * kLanes) * 4);
    return group < 4 ? low_nibbles(pairs) : high_nibbles(pairs);
  }
  static constexpr int kTaken = kNibbleZero;
  MIXATTN_INLINE IntVec begin(int32_t start) { return begin_nibble_sums(start); }
  MIXATTN_INLINE IntVec add(IntVec sum, IntVec w, SharedWord x) { return add_nibble_products(sum, w, x); }
  MIXATTN_INLINE IntVec end(IntVec sum, int32_t start) { return end_nibble_sums(sum, start); }
};

template <class Form>
struct Int8Form;
template <>
struct Int8Form<Q8Form> {
  typedef ByteQuants Quants;
  static constexpr int kZero = 128;
  static constexpr bool kHasMin = false;
};
template <>
struct Int8Form<Q4Form<false>> {
  typedef NibbleQuants Quants;
  static constexpr int kZero = 8;
  static constexpr bool kHasMin = false;
};
template <>
struct Int8Form<Q4Form<true>> {
  typedef NibbleQuants Quants;
  static constexpr int kZero = 0;
  static constexpr bool kHasMin = true;
};

// Neighbouring blocks of a panel.
struct Blocks {
  const char* data;
  int64_t first;  // of the row's blocks
  int64_t count;
  bool is_streamed;  // they come from memory: not for all but the first rows that pass over them
};

// c (kRows, kTileCols) = or, after the first block, += x (rows from `row` on) times the blocks.
template <class Form, int kRows>
void multiply_blocks(const Blocks& blocks, const Int8Rows& x, int64_t depth, int64_t row, float* c) {
  typedef Int8Form<Form> Int8;
  typedef typename Int8::Quants Quants;
  const int64_t row_blocks = depth / kBlockDepth;
  Vec acc[kRows][kTileVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) acc[r][j] = blocks.first > 0 ? load(c + r * kTileCols + j * kLanes) : zero();
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    const char* const scales = blocks.data + b * Form::kBytes;
    const char* const quants = scales + Form::kHeaderBytes;
    const int64_t block = row * row_blocks + blocks.first + b;  // of row r, r row_blocks further
    const int8_t* const values = x.values + block * kBlockDepth;
    const auto start = [&](int r) __attribute__((always_inline)) {
      constexpr int kZero = Int8::kZero - Quants::kTaken;  // of what the ISA multiplies
      return kZero == 0 ? 0 : -kZero * x.sums[block + r * row_blocks];
    };
    IntVec dots[kRows][kTileVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dots[r][0] = dots[r][1] = Quants::begin(start(r));
#pragma GCC unroll 8
    for (int group = 0; group < kBlockDepth / 4; ++group) {
      const IntVec w[kTileVecs] = {Quants::words(quants, group, 0), Quants::words(quants, group, 1)};
      if (blocks.is_streamed) {  // from memory far ahead, a line or two at a time
        if (group * 128 < Form::kBytes) prefetch_ahead(scales + group * 128);
        if (group * 128 + 64 < Form::kBytes) prefetch_ahead(scales + group * 128 + 64);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const SharedWord four = load_shared_word(values + r * depth + 4 * group);
#pragma GCC unroll 2
        for (int j = 0; j < kTileVecs; ++j) dots[r][j] = Quants::add(dots[r][j], w[j], four);
      }
    }
    const Float16* d = reinterpret_cast<const Float16*>(scales);
    const Vec scale[kTileVecs] = {load(d), load(d + kLanes)};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x_scale = broadcast(x.scales[block + r * row_blocks]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        acc[r][j] = fmadd(int_to_float(Quants::end(dots[r][j], start(r))), mul(scale[j], x_scale), acc[r][j]);
      }
    }
    if (Int8::kHasMin) {
      const Vec min[kTileVecs] = {load(d + kTileCols), load(d + kTileCols + kLanes)};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec sum = broadcast(x.scaled_sums[block + r * row_blocks]);
#pragma GCC unroll 2
        for (int j = 0; j < kTileVecs; ++j) acc[r][j] = fmadd(min[j], sum, acc[r][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) store(c + r * kTileCols + j * kLanes, acc[r][j]);
  }
}

typedef void (*Int8TileFunction)(const Blocks&, const Int8Rows&, int64_t, int64_t, float*);

constexpr int at_most_int8_rows(int num_rows) {
  return num_rows < kInt8Rows ? num_rows : kInt8Rows;
}

template <class Form>
Int8TileFunction int8_tile_function(int64_t num_rows) {
  static_assert(kInt8Rows <= 6, "one entry per number of rows");
  static constexpr Int8TileFunction kFunctions[] = {
      multiply_blocks<Form, 1>,
      multiply_blocks<Form, 2>,
      multiply_blocks<Form, at_most_int8_rows(3)>,
      multiply_blocks<Form, at_most_int8_rows(4)>,
      multiply_blocks<Form, at_most_int8_rows(5)>,
      multiply_blocks<Form, at_most_int8_rows(6)>,
  };
  return kFunctions[num_rows - 1];
}

// Rows of the next register tile: kInt8Rows, but the last two share what is left.
MIXATTN_INLINE int64_t int8_tile_rows(int64_t rows_left) {
  return rows_left <= kInt8Rows || rows_left >= 2 * kInt8Rows ? clamp(rows_left, 0, kInt8Rows) : (rows_left + 1) / 2;
}

#if defined(MIXATTN_ISA_AMX)
void unpack_nibbles(const Blocks& blocks, int64_t block_bytes, int64_t header_bytes, char* bytes) {
  for (int64_t b = 0; b < blocks.count; ++b, bytes += ByteQuants::kBytes) {
#pragma GCC unroll 8
    for (int group = 0; group < kBlockDepth / 4; ++group) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        store_words(bytes + (group * kTileCols + j * kLanes) * 4,
                    NibbleQuants::words(blocks.data + b * block_bytes + header_bytes, group, j));
      }
    }
  }
}

// multiply_blocks for kAmxRows rows, by tiles, to the bit: sums of products are exact, what follows is the same. The
// blocks' u are bytes in memory, quants_stride apart.
template <class Form>
void multiply_block_tiles(const Blocks& blocks, const char* quants, int64_t quants_stride, const Int8Rows& x,
                          int64_t depth, int64_t row, float* c) {
  typedef Int8Form<Form> Int8;
  const int64_t row_blocks = depth / kBlockDepth;
  const int64_t first = row * row_blocks + blocks.first;  // of row r, r row_blocks further
  alignas(64) int32_t dots[2][kAmxRows * kTileCols];      // of a block, and of the next one, which is on its way
  const auto multiply = [&](int64_t b) {
    multiply_byte_tile(x.values + (first + b) * kBlockDepth, depth, quants + b * quants_stride, dots[b % 2]);
  };
  multiply(0);
  for (int64_t b = 0; b < blocks.count; ++b) {
    if (b + 1 < blocks.count) multiply(b + 1);
    const char* const scales = blocks.data + b * Form::kBytes;
    if (blocks.is_streamed) {
      for (int64_t i = 0; i < Form::kBytes; i += 64) prefetch_ahead(scales + i);
    }
    const Float16* const d = reinterpret_cast<const Float16*>(scales);
    const Vec scale[kTileVecs] = {load(d), load(d + kLanes)};
    for (int64_t r = 0; r < kAmxRows; ++r) {
      const IntVec start = broadcast_word(-Int8::kZero * x.sums[first + b + r * row_blocks]);
      const Vec x_scale = broadcast(x.scales[first + b + r * row_blocks]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        float* const target = c + r * kTileCols + j * kLanes;
        const IntVec dot = add_words(load_words(dots[b % 2] + r * kTileCols + j * kLanes), start);
        Vec acc = blocks.first + b > 0 ? load(target) : zero();
        acc = fmadd(int_to_float(dot), mul(scale[j], x_scale), acc);
        if (Int8::kHasMin) {
          const Vec min = load(d + kTileCols + j * kLanes);
          acc = fmadd(min, broadcast(x.scaled_sums[first + b + r * row_blocks]), acc);
        }
        store(target, acc);
      }
    }
  }
}

// Of the rows from `row` on, as many as whole tiles have: their number.
template <class Form>
int64_t multiply_tiles(const LinearParams& p, Blocks* blocks, int64_t panel, int64_t row, int64_t num_rows, float* c) {
  constexpr bool kHasNibbles = Form::kBytes - Form::kHeaderBytes < ByteQuants::kBytes;
  alignas(64) char bytes[kHasNibbles ? kInt8Piece / kBlockDepth * ByteQuants::kBytes : 1];
  const int64_t num_tiled = round_down(num_rows, kAmxRows);
  if (num_tiled > 0 && kHasNibbles) unpack_nibbles(*blocks, Form::kBytes, Form::kHeaderBytes, bytes);
  finish_stores();
  const char* const quants = kHasNibbles ? bytes : blocks->data + Form::kHeaderBytes;
  for (int64_t r = 0; r < num_tiled; r += kAmxRows) {
    if (blocks->first == 0) prefetch_finish(p, row + r, kAmxRows, panel);
    multiply_block_tiles<Form>(*blocks, quants, kHasNibbles ? ByteQuants::kBytes : Form::kBytes, p.x_int8, p.depth,
                               row + r, c + r * kTileCols);
    blocks->is_streamed = false;
  }
  return num_tiled;
}
#endif

// c (num_rows, kTileCols) = x (rows from `row` on) times the panel, a piece of its depth at a time.
template <class Form>
void multiply_panel_int8(const LinearParams& p, int64_t panel, int64_t row, int64_t num_rows, float* c) {
  const char* const data = static_cast<const char*>(p.panels) + panel * p.panel_bytes;
  const int64_t num_blocks = p.depth / kBlockDepth;
  for (int64_t first = 0; first < num_blocks; first += kInt8Piece / kBlockDepth) {
    const int64_t count = clamp(num_blocks - first, 0, kInt8Piece / kBlockDepth);
    Blocks blocks{data + first * Form::kBytes, first, count, true};
    int64_t r = 0;
#if defined(MIXATTN_ISA_AMX)
    r = multiply_tiles<Form>(p, &blocks, panel, row, num_rows, c);
#endif
    while (r < num_rows) {
      const int64_t n = int8_tile_rows(num_rows - r);
      if (first == 0) prefetch_finish(p, row + r, n, panel);
      int8_tile_function<Form>(n)(blocks, p.x_int8, p.depth, row + r, c + r * kTileCols);
      r += n;
      blocks.is_streamed = false;
    }
  }
}

template <class Form>
void linear_int8_typed(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end) {
#if defined(MIXATTN_ISA_AMX)
  const ByteTileRegisters registers(row_end - row_begin >= kAmxRows);
#endif
  alignas(64) float c[kRowBlock * kTileCols];
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t num_rows = clamp(row_end - row, 0, kRowBlock);
    for (int64_t n = panel_begin; n < panel_end; ++n) {
      multiply_panel_int8<Form>(p, n, row, num_rows, c);
      finish_panel(p, c, row, num_rows, n);
    }
  }
}

void linear_int8_panels(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                        int64_t panel_end) {
  switch (p.form) {
    case WeightForm::kQ8_0:
      return linear_int8_typed<Q8Form>(p, row_begin, row_end, panel_begin, panel_end);
    case WeightForm::kQ4_0:
      return linear_int8_typed<Q4Form<false>>(p, row_begin, row_end, panel_begin, panel_end);
    case WeightForm::kQ4_1:
      return linear_int8_typed<Q4Form<true>>(p, row_begin, row_end, panel_begin, panel_end);
    default:
      return;  // cpu/linear.cpp refuses the others
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
