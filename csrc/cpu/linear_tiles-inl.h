// linear_tiles-inl.h: linear maps by the tiles of AMX, in float32's precision.
// Math    as linear-inl.h, with products of bfloat16 parts (bfloat16_parts-inl.h): x is three, weights are one
//         (bfloat16; q of the quantised forms, whose blocks' sums are scaled), two (float16) or three. m of q4_1 is
//         multiplied with sums of x, in two parts and three
// Method  x is split once, into tiles as they will be loaded. A piece of a panel is unpacked into tiles in L1, and all
//         rows pass over it. Quantised: 16 x 16 of c lie in vector registers, and a block of 32 depths is one tile of
//         sums, scaled and added to them while tiles are at the next ones. Else 32 x 32 of c lie in tiles
// Shapes  as LinearParams
// Memory  as linear-inl.h, x taking 2 bytes per element and part
// Limits  any number of rows; from least_tiled_rows() on faster than linear-inl.h
// Twins   truth: float64 products of the dequantised matrix (tests/ops/test_linear.py)
#pragma once

#include <type_traits>

#include "cpu/bfloat16_parts-inl.h"
#include "cpu/linear-inl.h"

namespace mixattn {
namespace cpu {
namespace {

// How a form's blocks of 32 depths become tiles: kParts of kTileVecs tiles each.

template <class Form>
struct TileForm;

// Words of the depths (0, 1), (2, 3) and so on.
template <typename T, int kNumParts>
struct PlainTileForm {
  static constexpr int kParts = kNumParts;
  static constexpr bool kIsScaled = false, kHasMin = false;
  MIXATTN_INLINE IntVec order(IntVec depths) { return depths; }
  // Rows are row_bytes apart, from `depth` on they count as 0.
  MIXATTN_INLINE void unpack(const char* block, int64_t row_bytes, int64_t depth, uint32_t* tiles) {
    for (int64_t k = 0; k < kBlockDepth; k += 2, block += 2 * row_bytes) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        const T* const row = reinterpret_cast<const T*>(block) + j * kLanes;
        const T* const next = reinterpret_cast<const T*>(block + row_bytes) + j * kLanes;
        IntVec parts[kParts];
        split_bfloat16<kParts>(k < depth ? load(row) : zero(), k + 1 < depth ? load(next) : zero(), parts);
#pragma GCC unroll 3
        for (int i = 0; i < kParts; ++i) {
          store_words(tiles + (i * kTileVecs + j) * kTileWords + k / 2 * kLanes, zip_halves(parts[i]));
        }
      }
    }
  }
};
template <>
struct TileForm<PlainForm<float>> : PlainTileForm<float, 3> {};
template <>
struct TileForm<PlainForm<Float16>> : PlainTileForm<Float16, 2> {};
template <>
struct TileForm<PlainForm<BFloat16>> : PlainTileForm<BFloat16, 1> {};

template <>
struct TileForm<Q8Form> {
  static constexpr int kParts = 1;
  static constexpr bool kIsScaled = true, kHasMin = false;
  MIXATTN_INLINE IntVec order(IntVec depths) { return depths; }
  MIXATTN_INLINE void unpack(const char* block, int64_t, int64_t, uint32_t* tiles) {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(block + Q8Form::kHeaderBytes);
    for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        const IntVec four = _mm512_xor_si512(load_words(words + g * kTileCols + j * kLanes),
                                             _mm512_set1_epi32(static_cast<int>(0x80808080)));
        uint32_t* const target = tiles + j * kTileWords + 2 * g * kLanes;
        store_words(target, pair(_mm512_slli_epi32(four, 24), _mm512_slli_epi32(four, 16)));
        store_words(target + kLanes, pair(_mm512_slli_epi32(four, 8), four));
      }
    }
  }
  // Of the signed bytes at the top of two words; as floats they have no more bits than a bfloat16.
  MIXATTN_INLINE IntVec pair(IntVec low, IntVec high) {
    const Vec first = _mm512_cvtepi32_ps(_mm512_srai_epi32(low, 24));
    const Vec second = _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second));
  }
};

// Nibbles are looked up where they stand, two at a time, in the halves of a word: words of the depths (4 g, 4 g + 2),
// (4 g + 16, 4 g + 18), (4 g + 1, 4 g + 3), (4 g + 17, 4 g + 19), an order that x gets, too.
template <bool kIsQ4_1>
struct TileForm<Q4Form<kIsQ4_1>> {
  static constexpr int kParts = 1;
  static constexpr bool kIsScaled = true, kHasMin = kIsQ4_1;
  MIXATTN_INLINE IntVec order(IntVec depths) {
    const IntVec order = _mm512_set_epi16(31, 29, 15, 13, 30, 28, 14, 12, 27, 25, 11, 9, 26, 24, 10, 8,  //
                                          23, 21, 7, 5, 22, 20, 6, 4, 19, 17, 3, 1, 18, 16, 2, 0);
    return _mm512_permutexvar_epi16(order, depths);
  }
  MIXATTN_INLINE void unpack(const char* block, int64_t, int64_t, uint32_t* tiles) {
    // Twice, because the fifth bit of an index is the next nibble's.
    static constexpr float kZero = kIsQ4_1 ? 0.0f : 8.0f;
    Vec integers =
        sub(int_to_float(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)), broadcast(kZero));
    IntVec table[1];
    split_bfloat16<1>(integers, integers, table);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(block + Q4Form<kIsQ4_1>::kHeaderBytes);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) {
        const IntVec nibbles = load_words(words + g * kTileCols + j * kLanes);
        uint32_t* const target = tiles + j * kTileWords + 4 * g * kLanes;
        store_words(target, _mm512_permutexvar_epi16(nibbles, table[0]));
        store_words(target + kLanes, _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4), table[0]));
        store_words(target + 2 * kLanes, _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 8), table[0]));
        store_words(target + 3 * kLanes, _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 12), table[0]));
      }
    }
  }
};

constexpr int64_t kTilePiece = 192;   // most depths of a panel in L1: 12 KiB of tiles per part
constexpr int64_t kFewTiledRows = 8;  // up to which tiles are half as high, which take 10 clocks instead of 16

// Tiles of rows lie one behind the other: 16 rows, a block of depths, its parts, then the next block.
MIXATTN_INLINE uint32_t* tiles_at(const PartRows& x, int64_t row, int64_t block) {
  return x.tiles + (row / kAmxRows * x.num_blocks + block) * kMaxParts * kTileWords;
}

// Elements [0, count) of row r to its block.
template <typename Order>
MIXATTN_INLINE void split_block(const float* elements, int64_t count, const PartRows& x, int64_t r, int64_t block,
                                const Order& order) {
  const auto mask = [&](int64_t from) { return static_cast<__mmask16>((1u << clamp(count - from, 0, kLanes)) - 1); };
  IntVec parts[kMaxParts];
  split_bfloat16(_mm512_maskz_loadu_ps(mask(0), elements), _mm512_maskz_loadu_ps(mask(kLanes), elements + kLanes),
                 parts);
  uint32_t* const target = tiles_at(x, r, block) + r % kAmxRows * kLanes;
#pragma GCC unroll 3
  for (int i = 0; i < kMaxParts; ++i) store_words(target + i * kTileWords, order(parts[i]));
}

template <class Form>
void split_rows_of(const LinearParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* const x = p.x + r * p.x_stride;
    for (int64_t b = 0; b < p.x_parts.num_blocks; ++b) {
      split_block(x + b * kBlockDepth, p.depth - b * kBlockDepth, p.x_parts, r, b, TileForm<Form>::order);
    }
    for (int64_t n = 0; n < p.x_sum_parts.num_blocks; ++n) {
      float sums[kBlockDepth];
      const int64_t first = n * kBlockDepth, count = clamp(p.x_parts.num_blocks - first, 0, kBlockDepth);
      for (int64_t b = 0; b < count; ++b) {
        const float* const block = x + (first + b) * kBlockDepth;
        sums[b] = sum_lanes(add(load(block), load(block + kLanes)));
      }
      split_block(sums, count, p.x_sum_parts, r, n, [](IntVec part) { return part; });
    }
  }
}

void split_rows(const LinearParams& p, int64_t begin, int64_t end) {
  for_form(p.form, [&](auto form) { split_rows_of<decltype(form)>(p, begin, end); });
}

// Products of a block's parts with tile kIndex of weights, to tile kIndex.
template <int kIndex>
MIXATTN_INLINE void multiply_block(const uint32_t* x, const uint32_t* w) {
  constexpr int kB = 4 + kIndex % 2, kA = 6 + kIndex % 2;
  zero_tile<kIndex>();
  load_tile<kB>(w, kAmxBytes);
#pragma GCC unroll 3
  for (int i = kMaxParts - 1; i >= 0; --i) {
    load_tile<kA>(x + i * kTileWords, kAmxBytes);
    add_bfloat16_tile<kIndex, kA, kB>();
  }
}

// Where a product of a block is: blocks, then the two halves of the columns, then rows.
struct BlockCursor {
  int64_t block = 0, half = 0, row = 0;
  // Whether these rows and columns were through.
  bool advance(int64_t num_blocks) {
    if (++block < num_blocks) return false;
    block = 0;
    half ^= 1;
    if (half == 0) row += kAmxRows;
    return true;
  }
};

// c (num_rows, kTileCols) = or += x times tiles of weights, times the scales of their blocks. A block's sums take long
// on their way: what is stored was multiplied two blocks ago, and what vectors add up, three, across the ends of
// columns and rows.
template <class Form, int kRows>
MIXATTN_INLINE void multiply_scaled_rows(const char* blocks, const uint32_t* tiles, int64_t num_blocks,
                                         const PartRows& x, int64_t row, int64_t num_rows, int64_t first, bool is_added,
                                         float* c) {
  alignas(64) float sums[4][kRows * kLanes];
  Vec acc[kRows];
  const auto start_rows = [&](const float* c_rows) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = is_added ? load(c_rows + r * kTileCols) : zero();
  };
  const int64_t num_steps = round_up(num_rows, kAmxRows) / kAmxRows * kTileVecs * num_blocks;
  BlockCursor multiplied, added;
  const auto step = [&](int64_t n, auto index) __attribute__((always_inline)) {
    constexpr int kIndex = decltype(index)::value;
    if (n < num_steps) {
      multiply_block<kIndex>(tiles_at(x, row + multiplied.row, first + multiplied.block),
                             tiles + (multiplied.block * kTileVecs + multiplied.half) * kTileWords);
      multiplied.advance(num_blocks);
    }
    if (n >= 2 && n - 2 < num_steps) store_tile<(kIndex + 2) % 4>(sums[(kIndex + 2) % 4], kAmxBytes);
    if (n >= 3 && n - 3 < num_steps) {
      const Vec scale =
          load(reinterpret_cast<const Float16*>(blocks + added.block * Form::kBytes) + added.half * kLanes);
      const float* const of_block = sums[(kIndex + 1) % 4];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] = fmadd(load(of_block + r * kLanes), scale, acc[r]);
      float* const c_rows = c + added.row * kTileCols + added.half * kLanes;
      if (added.advance(num_blocks)) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store(c_rows + r * kTileCols, acc[r]);
        if (n - 2 < num_steps) start_rows(c + added.row * kTileCols + added.half * kLanes);
      }
    }
  };
  start_rows(c);
  for (int64_t n = 0; n < num_steps + 3; n += 4) {
    step(n, std::integral_constant<int, 0>());
    step(n + 1, std::integral_constant<int, 1>());
    step(n + 2, std::integral_constant<int, 2>());
    step(n + 3, std::integral_constant<int, 3>());
  }
}

// c (16 kTiles, kTileCols) = or += x times tiles of weights, whose blocks are those of x from `first` on.
template <int kWeightParts, int kTiles>
void multiply_plain_tiles(const uint32_t* tiles, int64_t num_blocks, const PartRows& rows, int64_t row, int64_t first,
                          float* c) {
  constexpr int64_t kStride = kTileCols * sizeof(float);
  const uint32_t* const x = tiles_at(rows, row, first);
  const uint32_t* const x_low = x + rows.num_blocks * kMaxParts * kTileWords;
  float* const c_low = c + kAmxRows * kTileCols;
  if (first > 0) {
    load_tile<0>(c, kStride);
    load_tile<1>(c + kLanes, kStride);
    if constexpr (kTiles == 2) {
      load_tile<2>(c_low, kStride);
      load_tile<3>(c_low + kLanes, kStride);
    }
  } else {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (kTiles == 2) {
      zero_tile<2>();
      zero_tile<3>();
    }
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 3
    for (int i = kWeightParts - 1; i >= 0; --i) {
      const uint32_t* const w = tiles + (b * kWeightParts + i) * kTileVecs * kTileWords;
      load_tile<4>(w, kAmxBytes);
      load_tile<5>(w + kTileWords, kAmxBytes);
#pragma GCC unroll 3
      for (int k = kMaxParts - 1 - i; k >= 0; --k) {
        const int64_t part = (b * kMaxParts + k) * kTileWords;
        load_tile<6>(x + part, kAmxBytes);
        add_bfloat16_tile<0, 6, 4>();
        add_bfloat16_tile<1, 6, 5>();
        if constexpr (kTiles == 2) {
          load_tile<7>(x_low + part, kAmxBytes);
          add_bfloat16_tile<2, 7, 4>();
          add_bfloat16_tile<3, 7, 5>();
        }
      }
    }
  }
  store_tile<0>(c, kStride);
  store_tile<1>(c + kLanes, kStride);
  if constexpr (kTiles == 2) {
    store_tile<2>(c_low, kStride);
    store_tile<3>(c_low + kLanes, kStride);
  }
}

// The same for num_rows rows from `row` on. c has room for whole tiles.
template <int kWeightParts>
void multiply_plain_rows(const uint32_t* tiles, int64_t num_blocks, const PartRows& rows, int64_t row, int64_t num_rows,
                         int64_t first, float* c) {
  for (int64_t r = 0; r < num_rows; r += 2 * kAmxRows) {
    const auto multiply =
        num_rows - r > kAmxRows ? multiply_plain_tiles<kWeightParts, 2> : multiply_plain_tiles<kWeightParts, 1>;
    multiply(tiles, num_blocks, rows, row + r, first, c + r * kTileCols);
  }
}

// c (num_rows, kTileCols) = sums of x (rows from `row` on) times the panel's m, whose rows are the blocks of 32 depths.
template <class Form>
void multiply_mins(const LinearParams& p, const char* panel, int64_t row, int64_t num_rows, uint32_t* tiles, float* c) {
  constexpr int64_t kMinParts = 2, kPiece = 3;
  typedef PlainTileForm<Float16, kMinParts> Mins;
  for (int64_t first = 0; first < p.x_sum_parts.num_blocks; first += kPiece) {
    const int64_t count = clamp(p.x_sum_parts.num_blocks - first, 0, kPiece);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t block = (first + n) * kBlockDepth;
      Mins::unpack(panel + block * Form::kBytes + kTileCols * sizeof(Float16), Form::kBytes,
                   p.x_parts.num_blocks - block, tiles + n * kMinParts * kTileVecs * kTileWords);
    }
    finish_stores();
    multiply_plain_rows<kMinParts>(tiles, count, p.x_sum_parts, row, num_rows, first, c);
  }
}

// c (num_rows, kTileCols) = x (rows from `row` on) times the panel. c has room for whole tiles.
template <class Form, int kRows>
void multiply_panel_tiles(const LinearParams& p, int64_t panel, int64_t row, int64_t num_rows, float* c) {
  typedef TileForm<Form> Tiles;
  constexpr int64_t kBlockTiles = Tiles::kParts * kTileVecs;
  constexpr int64_t kBlockBytes = kBlockDepth / Form::kDepth * Form::kBytes;
  alignas(64) uint32_t tiles[kTilePiece / kBlockDepth * kBlockTiles * kTileWords];
  const char* const data = static_cast<const char*>(p.panels) + panel * p.panel_bytes;
  if constexpr (Tiles::kHasMin) multiply_mins<Form>(p, data, row, num_rows, tiles, c);
  for (int64_t begin = 0; begin < p.depth; begin += kTilePiece) {
    const int64_t first = begin / kBlockDepth;
    const int64_t num_blocks = clamp(p.x_parts.num_blocks - first, 0, kTilePiece / kBlockDepth);
    const char* const blocks = data + first * kBlockBytes;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const char* const block = blocks + b * kBlockBytes;
      for (int64_t i = 0; i < kBlockBytes; i += 64) prefetch_ahead(block + i);
      Tiles::unpack(block, kBlockBytes / kBlockDepth, p.depth - begin - b * kBlockDepth,
                    tiles + b * kBlockTiles * kTileWords);
    }
    finish_stores();
    if (begin == 0) prefetch_finish(p, row, num_rows, panel);
    if constexpr (Tiles::kIsScaled) {
      multiply_scaled_rows<Form, kRows>(blocks, tiles, num_blocks, p.x_parts, row, num_rows, first,
                                        begin > 0 || Tiles::kHasMin, c);
    } else {
      multiply_plain_rows<Tiles::kParts>(tiles, num_blocks, p.x_parts, row, num_rows, first, c);
    }
  }
}

template <class Form, int kRows>
void linear_tiles_of(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                     int64_t panel_end) {
  const TileRegisters<kLanes, kRows> registers;
  alignas(64) float c[kRowBlock * kTileCols];
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t num_rows = clamp(row_end - row, 0, kRowBlock);
    for (int64_t n = panel_begin; n < panel_end; ++n) {
      multiply_panel_tiles<Form, kRows>(p, n, row, num_rows, c);
      finish_panel(p, c, row, num_rows, n);
    }
  }
}

void linear_tiles(const LinearParams& p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  for_form(p.form, [&](auto form) {
    typedef decltype(form) Form;
    const auto multiply =
        p.num_rows <= kFewTiledRows ? linear_tiles_of<Form, kFewTiledRows> : linear_tiles_of<Form, kAmxRows>;
    multiply(p, row_begin, row_end, panel_begin, panel_end);
  });
}

// Unpacking to tiles, through L1, takes as long as some rows by FMAs (README.md).
int64_t least_tiled_rows(WeightForm form) {
  switch (form) {
    case WeightForm::kFloat32:
      return 33;
    case WeightForm::kBFloat16:
      return 9;
    case WeightForm::kFloat16:
      return 17;
    case WeightForm::kQ8_0:
      return 7;
    default:
      return 4;
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
