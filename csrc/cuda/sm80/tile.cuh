// tile.cuh: the shapes of sm_80's tiles, where they lie in shared memory, and how keys get there from their pages.
// Method  A row of a tile is head_dim elements (of V v_head_dim), rounded up to 128 bytes, its 16-byte chunks permuted:
//         chunk c of row r lies where chunk c ^ (r mod 8) would. The 8 rows that one phase of ldmatrix reads, the same
//         chunk of each, then lie in 8 different groups of 4 banks, and so do the 8 chunks that 8 lanes copy: no bank
//         conflicts (tests/cuda counts).
//         Each warp copies a quarter of a tile's keys. A lane finds the page of one key, and the warp's lanes hand
//         each other the offsets by shuffles: one read of the block table and one division per key and tile.
// Shapes  large (128, 64): 4 warps x 32 rows; medium (64, 64): 4 x 16 rows; small (16, 128): all warps have the same 16
//         rows, and 32 keys each, which they copy themselves and never wait for each other. Above head_dim 128 tiles
//         have half the keys. Above v_head_dim 128 the sums of 32 rows do not fit a warp's registers: there a large
//         item is computed by the medium tile, twice
// Memory  block: kControlBytes + 2 head_dim (rows + keys) + 2 v_head_dim keys, or what the small tile's warps add up
//         in, the most of all: 68.25 KiB at head_dim 128 and at 192 with 128, 75.75 at 256
// Limits  head_dim 64, 96, 128, 192 or 256, v_head_dim the same; or 192 and 128
// Source  swizzle and ldmatrix: PTX ISA 8.7, section 9.7.14.5.15
#pragma once

#include <type_traits>

#include "cuda/fragments.cuh"

namespace mixattn {
namespace cuda {
namespace sm80 {

constexpr int kElementBytes = 2;

// (16 kRowTiles rows, kWarpKeys keys) per warp; with kKeyWarps > 1 the warps have the same rows and split the keys.
template <int kRowTilesPerWarp, int kWarpKeysPerTile, int kWarpsAlongKeys>
struct Tile {
  static constexpr int kRowTiles = kRowTilesPerWarp;
  static constexpr int kWarpKeys = kWarpKeysPerTile;
  static constexpr int kKeyWarps = kWarpsAlongKeys;
  static constexpr int kRows = kRowTiles * kMmaRows * kNumWarps / kKeyWarps;
  static constexpr int kKeys = kWarpKeys * kKeyWarps;
  static constexpr int kCopiedKeys = kKeys / kNumWarps;  // by one warp
  static constexpr int kStoredBits = 0;                  // of an element of K and V; 0: they come as products take them
  static_assert(kKeyWarps == 1 || kKeyWarps == kNumWarps, "warps share all rows or none");
  // A warp that has its keys to itself copies exactly those: it needs no barrier with the others.
  static_assert(kKeyWarps == 1 || kCopiedKeys == kWarpKeys, "a warp copies the keys that it uses");
};
// 128 rows of 4 warps: a fragment of K or V feeds two mma, which halves what ldmatrix takes from shared memory.
using LargeTile = Tile<2, 64, 1>;
using MediumTile = Tile<1, 64, 1>;
using SmallTile = Tile<1, 32, kNumWarps>;
// For wide heads of K, half the keys: two blocks fit the shared memory of an SM.
using WideLargeTile = Tile<2, 32, 1>;
using WideMediumTile = Tile<1, 32, 1>;
using WideSmallTile = Tile<1, 16, kNumWarps>;

constexpr int kMaxNarrowHeadDim = 128;
// The widest head of V whose sums a large tile has registers for, and beside any scores of its 64 keys.
constexpr int kMaxLargeVHeadDim = 128;
constexpr int kMaxLargeVHeadDimAnyScores = 64;

// The tiles that items of each kind are computed in; without a large one, those of large items are medium.
template <int kHeadDim, Scores kScores = Scores::kPlain, int kVHeadDim = kHeadDim>
struct Tiles {
  static constexpr bool kIsWide = kHeadDim > kMaxNarrowHeadDim;
  static constexpr bool kHasLarge =
      kVHeadDim <= (kScores == Scores::kAny && !kIsWide ? kMaxLargeVHeadDimAnyScores : kMaxLargeVHeadDim);
  using Medium = std::conditional_t<kIsWide, WideMediumTile, MediumTile>;
  using Large = std::conditional_t<kHasLarge, std::conditional_t<kIsWide, WideLargeTile, LargeTile>, Medium>;
  using Small = std::conditional_t<kIsWide, WideSmallTile, SmallTile>;
};

// What all 8 permutations of a row's chunks stay within.
constexpr uint32_t kSwizzleBytes = 8 * mx::kVectorBytes;

constexpr int power_of_two_from(int least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

constexpr uint32_t larger(uint32_t one, uint32_t other) {
  return one > other ? one : other;
}

// A row of a tile, of a head of so many elements.
template <int kWidth>
struct TileRow {
  static constexpr int kChunks = kWidth * kElementBytes / mx::kVectorBytes;
  static constexpr uint32_t kBytes = (kWidth * kElementBytes + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr int kLanes = power_of_two_from(kChunks);  // that copy a row; those past it are idle
};

// Where an item's tiles start in shared memory.
template <int kHeadDim, class TileShape, int kVHeadDim = kHeadDim>
struct Layout {
  static constexpr uint32_t kRowBytes = TileRow<kHeadDim>::kBytes;  // of Q and K
  static constexpr uint32_t kVRowBytes = TileRow<kVHeadDim>::kBytes;
  static constexpr uint32_t kQ = kControlBytes;                      // (kRows, kHeadDim)
  static constexpr uint32_t kK = kQ + TileShape::kRows * kRowBytes;  // (kKeys, kHeadDim)
  // (kKeys, kVHeadDim). What is widened into the small tile takes turns there: its warps wait for nobody else. Rows of
  // two sizes would have a warp's keys lie where another's values do.
  static constexpr bool kIsWidened = TileShape::kStoredBits > 0;
  static constexpr bool kTakesTurns = kIsWidened && TileShape::kKeyWarps > 1 && kRowBytes == kVRowBytes;
  static constexpr uint32_t kV = kTakesTurns ? kK : kK + TileShape::kKeys * kRowBytes;
  // K and V as they are stored, (kKeys, kHeadDim) and (kKeys, kVHeadDim).
  static constexpr uint32_t kStoredK = kV + TileShape::kKeys * kVRowBytes;
  static constexpr uint32_t kStoredV = kStoredK + TileShape::kKeys * kHeadDim * TileShape::kStoredBits / 8;
  // Their scales per token, float32, (2, kKeys); before that, of each row of Q.
  static constexpr uint32_t kKeyScales = kStoredV + TileShape::kKeys * kVHeadDim * TileShape::kStoredBits / 8;
  static constexpr uint32_t kKeyScaleBytes =
      kIsWidened ? larger(2 * TileShape::kKeys, TileShape::kRows) * sizeof(float) : 0;
  // What the warps of a small tile leave for each other in place of K and V: (kNumWarps, kMmaRows, kVHeadDim) float32.
  // 8 words more than kVHeadDim: the rows that half a warp stores at once start 8 banks apart.
  static constexpr uint32_t kSumRowBytes = (kVHeadDim + 8) * sizeof(float);
  static constexpr uint32_t kSumBytes = TileShape::kKeyWarps > 1 ? kNumWarps * kMmaRows * kSumRowBytes : 0;
  static constexpr uint32_t kTileBytes = kKeyScales + kKeyScaleBytes - kK;
  static constexpr uint32_t kBytes = kK + larger(kTileBytes, kSumBytes);
  // The bits of a chunk's place among 8 must be free in the address of its row: chunk_address xors them.
  static_assert(kQ % kSwizzleBytes == 0 && kRowBytes % kSwizzleBytes == 0 && kVRowBytes % kSwizzleBytes == 0,
                "rows start at a multiple of 8 chunks");
  static_assert(kControlBytes % kVRowBytes != 0 || kV % kVRowBytes == 0, "step_right takes this for granted");
};

// Of a block: what the largest tile takes, which is large or small; a medium one is a part of a large one.
template <int kHeadDim, class Shapes, int kVHeadDim>
constexpr uint32_t kLargestBytes = larger(Layout<kHeadDim, typename Shapes::Large, kVHeadDim>::kBytes,
                                          Layout<kHeadDim, typename Shapes::Small, kVHeadDim>::kBytes);

template <int kHeadDim, int kVHeadDim>
constexpr uint32_t kSharedBytes = kLargestBytes<kHeadDim, Tiles<kHeadDim, Scores::kPlain, kVHeadDim>, kVHeadDim>;

// Address of chunk c of row r of the tile at `tile`.
template <int kRowBytes>
MX_DEVICE uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  return tile + row * kRowBytes + ((chunk ^ (row & 7)) * mx::kVectorBytes);
}

// The address of the chunk 2 step further to the right in the same row, for a chunk 0 or 1: two chunks are the 16
// elements of an mma's step. Where rows start at multiples of their size, all bits of a chunk's place are free in the
// address of its row; elsewhere those within 8 chunks.
template <int kRowBytes>
MX_DEVICE uint32_t step_right(uint32_t address, int step) {
  constexpr int kStepBytes = 2 * mx::kVectorBytes;
  if constexpr (kControlBytes % kRowBytes == 0) {
    return address ^ (step * kStepBytes);
  } else {
    constexpr int kSwizzleSteps = kSwizzleBytes / kStepBytes;
    return (address ^ (step % kSwizzleSteps * kStepBytes)) + step / kSwizzleSteps * kSwizzleBytes;
  }
}

// The address of the same chunk num_rows further down, for a row that is a multiple of num_rows plus less than that:
// the bits of num_rows and of the row's remainder do not meet, so that their places differ by xor.
template <int kRowBytes>
MX_DEVICE uint32_t row_below(uint32_t address, int num_rows) {
  return (address ^ ((num_rows & 7) * mx::kVectorBytes)) + num_rows * kRowBytes;
}

// The barrier between those who copied a tile of keys and those who read it.
template <class TileShape>
MX_DEVICE void sync_tile() {
  if constexpr (TileShape::kKeyWarps == 1) {
    sync_team();
  } else {
    mx::sync_warp();
  }
}

// The key of a tile that this lane finds the page of, for its warp. Keys outside the item are nowhere: their table
// entries may be anything and are not read.
struct KeyPlace {
  int32_t page;
  int32_t slot;
  bool is_hidden;  // by the tree mask, from all rows of the item
};

// Whether the tree mask and the window let no row of the item see this key, one of its own.
MX_DEVICE bool is_hidden_from_all(const LaunchParams& p, Item item, int32_t key) {
  const int32_t context = item[kContext];
  if (key < context) return false;
  const int32_t first = item[kRowBegin] / p.group_size;
  const int32_t last = (item[kRowBegin] + item[kNumRows] - 1) / p.group_size;
  const int64_t* const words = p.call.tree_mask + item[kFirstToken];
  const int32_t own = key - context;  // the row of the slice that the key belongs to
  MX_NO_UNROLL
  for (int32_t row = own > first ? own : first; row <= last && row - own <= p.window_left; ++row) {
    if (row - own >= kTreeMaskBits || (words[row] >> (row - own) & 1) != 0) return false;
  }
  return true;
}

template <class TileShape, Scores kScores>
MX_DEVICE KeyPlace find_key(const LaunchParams& p, Item item, int32_t tile_begin) {
  const Thread thread = this_thread();
  const int32_t key = tile_begin + thread.warp * TileShape::kCopiedKeys + thread.lane % TileShape::kCopiedKeys;
  if (key < item[kKvBegin] || key >= item[kKvEnd]) return {0, 0, false};
  const int32_t page_size = static_cast<int32_t>(p.call.page_size);
  const int32_t* const block_table_row = p.call.block_table + item[kSeqIdx] * p.call.block_table_stride;
  const bool is_hidden = kScores == Scores::kAny && p.call.tree_mask != nullptr && is_hidden_from_all(p, item, key);
  return {block_table_row[key / page_size], key % page_size, is_hidden};
}

// K or V of every page.
template <class T>
struct Cache {
  const T* data;
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
};

template <class T>
MX_DEVICE Cache<T> k_cache(const LaunchParams& p) {
  return {static_cast<const T*>(p.call.k_cache), p.call.k_page_stride, p.call.k_token_stride, p.call.k_head_stride};
}
template <class T>
MX_DEVICE Cache<T> v_cache(const LaunchParams& p) {
  return {static_cast<const T*>(p.call.v_cache), p.call.v_page_stride, p.call.v_token_stride, p.call.v_head_stride};
}

constexpr int64_t kNowhere = INT64_MIN;  // the offset of a key that is not to be read

// Starts the copy of this warp's part of a tile of K or V, place being what find_key gave for it. Keys outside of the
// item, and those hidden from all its rows, become 0, not what memory holds there: 0 * NaN would be NaN.
template <class T, int kWidth, class TileShape, Scores kScores>
MX_DEVICE void copy_keys(const Cache<T>& cache, Item item, const KeyPlace& place, uint32_t tile, int32_t tile_begin) {
  using Row = TileRow<kWidth>;
  const Thread thread = this_thread();
  constexpr int kRowsAtOnce = mx::kWarpSize / Row::kLanes;
  int64_t offset = place.page * cache.page_stride + place.slot * cache.token_stride +
                   item[kKvHead] * cache.head_stride;  // may pass 2^31
  if (kScores == Scores::kAny && place.is_hidden) offset = kNowhere;
  const int lane_row = thread.lane / Row::kLanes;
  const int chunk = thread.lane % Row::kLanes;
  const int first_row = thread.warp * TileShape::kCopiedKeys + lane_row;
  const uint32_t to = mx::opaque(chunk_address<Row::kBytes>(tile, first_row, chunk));
  const int32_t kv_begin = item[kKvBegin];
  const int32_t kv_end = item[kKvEnd];
  MX_UNROLL
  for (int i = 0; i < TileShape::kCopiedKeys / kRowsAtOnce; ++i) {
    const int64_t row_offset = mx::shfl_idx(offset, i * kRowsAtOnce + lane_row);
    const int32_t key = tile_begin + first_row + i * kRowsAtOnce;
    // Lanes past the end of a row fill what pads it with zeros where they can: no branch, and fewer registers.
    const bool is_chunk = Row::kLanes == Row::kChunks || chunk < Row::kChunks;
    if (Row::kLanes * mx::kVectorBytes > Row::kBytes && !is_chunk) continue;
    const bool is_key = key >= kv_begin && key < kv_end && (kScores != Scores::kAny || row_offset != kNowhere);
    mx::cp_async16(row_below<Row::kBytes>(to, i * kRowsAtOnce), cache.data + (row_offset + chunk * kVectorElements),
                   is_key && is_chunk);
  }
}

// The chunk of a row that lies where chunk `place` would. Where keys are widened it is the first halves of what lanes
// widen, one after another, and then the second halves: that is how lanes can store them without bank conflicts, and
// sums over head_dim do not mind.
template <int kWidth, class TileShape>
MX_DEVICE constexpr int chunk_at(int place) {
  constexpr int kHalf = TileRow<kWidth>::kChunks / 2;
  return TileShape::kStoredBits == 0 ? place : place % kHalf * 2 + place / kHalf;
}

// Starts the copy of the item's rows of Q; rows past its last become 0.
template <class T, int kHeadDim, class TileShape>
MX_DEVICE void copy_queries(const LaunchParams& p, Item item, uint32_t tile) {
  using Row = TileRow<kHeadDim>;
  const Thread thread = this_thread();
  constexpr int kRowsAtOnce = kNumThreads / Row::kLanes;
  const int chunk = thread.idx % Row::kLanes;
  if (Row::kLanes > Row::kChunks && chunk >= Row::kChunks) return;
  MX_NO_UNROLL
  for (int row = thread.idx / Row::kLanes; row < TileShape::kRows; row += kRowsAtOnce) {
    const bool is_row = row < item[kNumRows];
    const RowPlace place = place_row(p, item[kFirstToken], item[kKvHead], item[kRowBegin] + (is_row ? row : 0));
    const T* const source =
        static_cast<const T*>(p.call.q) + place.token * p.call.q_token_stride + place.head * p.call.q_head_stride;
    mx::cp_async16(chunk_address<Row::kBytes>(tile, row, chunk),
                   source + chunk_at<kHeadDim, TileShape>(chunk) * kVectorElements, is_row);
  }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace mixattn
