// register_tile-inl.h: the matrix product that packed attention and the linear maps are made of, for one ISA.
// Math    c = a b, or c += a b, with c of up to kTileRows rows and one or two vectors of columns
// Method  all of c in registers while the depth runs; the operands lie in L1 and L2 (README.md draws it)
// Shapes  a (rows, depth) by stride, b (depth, columns) contiguous, c (rows, columns) by stride, all float32
// Source  register tiles, doi 10.1145/1356052.1356053
#pragma once

#include "cpu/vec.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;  // of a register tile, whose rows are vec.h's kTileRows

MIXATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
MIXATTN_INLINE int64_t round_down(int64_t n, int64_t multiple) {
  return n / multiple * multiple;
}
MIXATTN_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// c (kRows, kVecs kLanes) = or += a (kRows, depth) b (depth, kVecs kLanes), all of c in registers.
template <int kRows, int kVecs, bool kIsAdded>
void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) acc[r][j] = kIsAdded ? load(c + r * c_stride + j * kLanes) : zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) column[j] = load(b + (k * kVecs + j) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(a[r * a_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) acc[r][j] = fmadd(x, column[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(c + r * c_stride + j * kLanes, acc[r][j]);
  }
}

#if defined(MIXATTN_HAS_BFLOAT16_DOT)
// c (kRows, kTileCols) = factor a b, or c += a b, for a (kRows, 2 depth) and b (2 depth, kTileCols) in bfloat16, of
// which two neighbouring depths lie side by side: a's rows are words, b is (depth, kTileCols) words.
template <int kRows, bool kIsAdded>
void multiply_bfloat16_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float factor, float* c,
                            int64_t c_stride) {
  Vec acc[kRows][kTileVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) acc[r][j] = kIsAdded ? load(c + r * c_stride + j * kLanes) : zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    const IntVec column[kTileVecs] = {load_words(b + k * kTileCols), load_words(b + k * kTileCols + kLanes)};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const SharedWord x = load_shared_word(a + r * a_stride + k);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) acc[r][j] = add_bfloat16_products(acc[r][j], x, column[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) {
      store(c + r * c_stride + j * kLanes, kIsAdded ? acc[r][j] : mul(acc[r][j], broadcast(factor)));
    }
  }
}

typedef void (*BFloat16TileFunction)(const float*, int64_t, const float*, int64_t, float, float*, int64_t);

template <bool kIsAdded>
BFloat16TileFunction bfloat16_tile_function(int num_rows) {
  static_assert(kTileRows == 8, "one entry per number of rows");
  static constexpr BFloat16TileFunction kFunctions[] = {
      multiply_bfloat16_tile<1, kIsAdded>, multiply_bfloat16_tile<2, kIsAdded>, multiply_bfloat16_tile<3, kIsAdded>,
      multiply_bfloat16_tile<4, kIsAdded>, multiply_bfloat16_tile<5, kIsAdded>, multiply_bfloat16_tile<6, kIsAdded>,
      multiply_bfloat16_tile<7, kIsAdded>, multiply_bfloat16_tile<8, kIsAdded>};
  return kFunctions[num_rows - 1];
}
#endif

typedef void (*TileFunction)(const float*, int64_t, const float*, int64_t, float*, int64_t);

constexpr int at_most_tile_rows(int num_rows) {
  return num_rows < kTileRows ? num_rows : kTileRows;
}

#if defined(MIXATTN_HAS_INT16_DOT)
// Words of two int16 (HeadDims and keys keep their sums below 2^31); behind a row's words lies its unit, a float.
struct Int16Words {
  MIXATTN_INLINE int32_t first_sum(const float*) { return 0; }
  MIXATTN_INLINE IntVec add(IntVec sum, IntVec column, SharedWord x) { return add_int16_products(sum, x, column); }
};

// As multiply_bfloat16_tile for words of integers, each row times its unit.
template <class Words, int kRows, bool kIsAdded>
void multiply_integer_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                           int64_t c_stride) {
  IntVec acc[kRows][kTileVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = acc[r][1] = broadcast_word(Words::first_sum(a + r * a_stride + depth));
  }
  for (int64_t k = 0; k < depth; ++k) {
    const IntVec column[kTileVecs] = {load_words(b + k * kTileCols), load_words(b + k * kTileCols + kLanes)};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const SharedWord x = load_shared_word(a + r * a_stride + k);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) acc[r][j] = Words::add(acc[r][j], column[j], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vec unit = broadcast(a[r * a_stride + depth]);
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) {
      float* const target = c + r * c_stride + j * kLanes;
      store(target, fmadd(int_to_float(acc[r][j]), unit, kIsAdded ? load(target) : zero()));
    }
  }
}

template <class Words, bool kIsAdded>
TileFunction integer_tile_function(int num_rows) {
  static_assert(kTileRows <= 8, "one entry per number of rows");
  static constexpr TileFunction kFunctions[] = {multiply_integer_tile<Words, 1, kIsAdded>,
                                                multiply_integer_tile<Words, 2, kIsAdded>,
                                                multiply_integer_tile<Words, 3, kIsAdded>,
                                                multiply_integer_tile<Words, 4, kIsAdded>,
                                                multiply_integer_tile<Words, 5, kIsAdded>,
                                                multiply_integer_tile<Words, 6, kIsAdded>,
                                                multiply_integer_tile<Words, at_most_tile_rows(7), kIsAdded>,
                                                multiply_integer_tile<Words, at_most_tile_rows(8), kIsAdded>};
  return kFunctions[num_rows - 1];
}
#endif

template <int kVecs, bool kIsAdded>
TileFunction tile_function(int num_rows) {
  static_assert(kTileRows <= 8, "one entry per number of rows");
  switch (num_rows) {
    case 1:
      return multiply_tile<1, kVecs, kIsAdded>;
    case 2:
      return multiply_tile<2, kVecs, kIsAdded>;
    case 3:
      return multiply_tile<3, kVecs, kIsAdded>;
    case 4:
      return multiply_tile<4, kVecs, kIsAdded>;
    case 5:
      return multiply_tile<5, kVecs, kIsAdded>;
    case 6:
      return multiply_tile<6, kVecs, kIsAdded>;
    case 7:
      return multiply_tile<at_most_tile_rows(7), kVecs, kIsAdded>;
    default:
      return multiply_tile<at_most_tile_rows(8), kVecs, kIsAdded>;
  }
}

// Rows of the next register tile: kTileRows, but the last two share what is left, so that neither is nearly empty.
MIXATTN_INLINE int tile_rows(int64_t rows_left) {
  if (rows_left <= kTileRows) return static_cast<int>(rows_left);
  return rows_left < 2 * kTileRows ? static_cast<int>((rows_left + 1) / 2) : kTileRows;
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
