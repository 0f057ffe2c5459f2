// row_tile.h: the tiles that a slice's packed rows are cut into, and the keys that each of them sees; host and device.
// Math    Slice s has R = q_len * group_size packed rows per kv head, cut into row tiles of block_rows[0]; a tile's
//         kind is the smallest that holds its rows. Tile rows belong to tokens t0..t1 at positions p(t) = kv_len -
//         q_len + t and see, all together, the keys [max(0, p(t0) - window_left), min(kv_len, p(t1) + 1)).
// Twins   tests/ops/plan_twin.py
#pragma once

#include "common/cost.h"

namespace mixattn {

// The packed rows [row_begin, row_begin + num_rows) of a slice and the keys that they see, all together.
struct RowTile {
  int32_t row_begin;
  int32_t num_rows;
  int32_t kind;
  int32_t kv_begin;
  int32_t kv_end;
};

MIXATTN_HD inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

MIXATTN_HD inline int32_t num_row_tiles(const PlanSpec& spec, int32_t q_len) {
  const int32_t num_rows = q_len * (spec.num_q_heads / spec.num_kv_heads);
  return num_rows > 0 ? (num_rows - 1) / spec.block_rows[kTileLarge] + 1 : 0;
}

// The smallest kind that holds so many rows.
MIXATTN_HD inline int32_t kind_of(const PlanSpec& spec, int32_t num_rows) {
  return num_rows > spec.block_rows[kTileMedium]  ? kTileLarge
         : num_rows > spec.block_rows[kTileSmall] ? kTileMedium
                                                  : kTileSmall;
}

// Packed rows fit int32 (check_slices refuses others): 64-bit division is the slow part otherwise.
MIXATTN_HD inline RowTile row_tile(const PlanSpec& spec, int32_t q_len, int32_t kv_len, int32_t tile_idx) {
  const int32_t group_size = spec.num_q_heads / spec.num_kv_heads;
  const int32_t block = spec.block_rows[kTileLarge];
  const int32_t row_begin = tile_idx * block;
  const int32_t rows_left = q_len * group_size - row_begin;
  const int32_t row_end = row_begin + (rows_left < block ? rows_left : block);
  RowTile tile;
  tile.row_begin = row_begin;
  tile.num_rows = row_end - row_begin;
  tile.kind = kind_of(spec, tile.num_rows);
  // With q_len > kv_len the first rows stand before key 0: positions are negative, and the range may be empty.
  const int64_t first_position = int64_t{kv_len} - q_len + row_begin / group_size;
  const int64_t last_position = int64_t{kv_len} - q_len + (row_end - 1) / group_size;
  const int64_t kv_end = spec.causal ? clamp(last_position + 1, 0, kv_len) : kv_len;
  const int64_t kv_begin = spec.window_left < 0 ? 0 : clamp(first_position - spec.window_left, 0, kv_end);
  tile.kv_begin = static_cast<int32_t>(kv_begin);
  tile.kv_end = static_cast<int32_t>(kv_end);
  return tile;
}

MIXATTN_HD inline KeyShare key_share(const PlanSpec& spec, int32_t q_len, int32_t kv_len, int32_t num_tiles) {
  // From tile to tile both edges move right or stay, and no key is left out between two tiles.
  KeyShare share = {0, 0};
  for (int32_t t = 0; t < num_tiles; ++t) {
    const RowTile tile = row_tile(spec, q_len, kv_len, t);
    share.read += tile.kv_end - tile.kv_begin;
    if (t == 0) share.distinct = -tile.kv_begin;
    if (t == num_tiles - 1) share.distinct += tile.kv_end;
  }
  return share;
}

MIXATTN_HD inline int64_t tile_fs(const PlanSpec& spec, const RowTile& tile, int64_t num_keys, const KeyShare& share) {
  return total_fs(spec, item_cost(spec, tile.num_rows, tile.kind, num_keys, share));
}

}  // namespace mixattn
