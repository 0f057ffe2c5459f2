// mixed_attention.cuh: attention of one work item by mma.sync and cp.async, and the kernel of all items, sm_80+.
// Math    S = Q K^T; P = exp2(S score_scale - m); O = O exp2(m_old - m) + P V; out = O / sum P, online over KV tiles
// Method  FlashAttention-2's walk. K and V have one tile each in shared memory and take turns: V of this tile is copied
//         while Q K^T runs, K of the next while softmax and P V run. S, P and O stay in registers, P as the A operand
//         of the second product without a shuffle. Only tiles that some row does not see whole are masked. In a small
//         item (decodes) the warps split the keys of each tile, do not wait for each other, and add up at the end.
// Grid    kBlocksPerSm blocks of 128 threads per SM: 255 registers a thread are what fits two; tiles: tile.cuh
// Shapes  as cuda/mixed_attention.cuh; tiles (128, 64), (64, 64), (16, 128) of (packed query rows, keys) by item kind;
//         above head_dim 128 (128, 32), (64, 32), (16, 64), without the first above v_head_dim 128
// Memory  an item reads keys (head_dim + v_head_dim) elements of K and V and rows head_dim of q, and writes rows
//         v_head_dim; shared: tile.cuh
// Static  nvcc 13.0, bf16, head_dim 128, registers and warp instructions per MMA-MFLOP of large / medium / small tiles:
//         sm_80: 254; 962 / 1,331 / 2,590. sm_90a: 255; 949 / 1,305 / 2,552. No spills in any kernel, no bank conflicts
// Limits  as cuda/mixed_attention.cuh
// Twins   triton_kernels/mixed_attention.py (the same names and order); truth ops/reference.py
// Source  arXiv:2307.08691, section 3; GQA rows packed: arXiv:2305.13245; fragments: PTX ISA 8.7, section 9.7.14.5.8
#pragma once

#include "cuda/sm80/tile.cuh"

namespace mixattn {
namespace cuda {
namespace sm80 {

constexpr int kBlocksPerSm = 2;

// First row, and first key of a tile, of this warp.
template <class TileShape>
MX_DEVICE int warp_row() {
  return TileShape::kKeyWarps == 1 ? this_thread().warp * TileShape::kRowTiles * kMmaRows : 0;
}
template <class TileShape>
MX_DEVICE int warp_key() {
  return TileShape::kKeyWarps == 1 ? 0 : this_thread().warp * TileShape::kWarpKeys;
}

// What a warp keeps of its rows, kRowTiles times 16: a lane has rows lane / 4 and lane / 4 + 8 of each.
template <int kVHeadDim, int kRowTiles>
struct RowState {
  float accumulator[kRowTiles][kVHeadDim / kMmaColumns][4];  // (16, kVHeadDim) fragments
  float row_max[kRowTiles][2];
  float row_sum[kRowTiles][2];  // of this lane's columns
};

template <int kVHeadDim, int kRowTiles>
MX_DEVICE void clear(RowState<kVHeadDim, kRowTiles>& state) {
  MX_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    MX_UNROLL
    for (int i = 0; i < kVHeadDim / kMmaColumns; ++i) {
      MX_UNROLL
      for (int j = 0; j < 4; ++j) state.accumulator[r][i][j] = 0.0f;
    }
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      state.row_max[r][h] = -INFINITY;
      state.row_sum[r][h] = 0.0f;
    }
  }
}

// The address that a lane gives ldmatrix for 16 rows from first_row, 16 columns from 0: matrix 0 is rows 0-7 columns
// 0-7, and kRowsFirst says whether matrix 1 is the next 8 rows (true) or the next 8 columns. Columns 16 k and behind
// are at step_right(address, k).
template <int kRowBytes, bool kRowsFirst>
MX_DEVICE uint32_t ldmatrix_address(uint32_t tile, int first_row) {
  const int lane = this_thread().lane;
  const int matrix = lane / 8;
  const int second_rows = kRowsFirst ? matrix & 1 : matrix >> 1;
  const int second_columns = kRowsFirst ? matrix >> 1 : matrix & 1;
  return chunk_address<kRowBytes>(tile, first_row + second_rows * 8 + lane % 8, second_columns);
}

// scores (16 kRowTiles, kWarpKeys) = Q K^T of this warp's rows and keys.
template <class T, int kHeadDim, class TileShape>
MX_DEVICE void multiply_queries(float (&scores)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4]) {
  using Shared = Layout<kHeadDim, TileShape>;
  const uint32_t q_address =
      ldmatrix_address<Shared::kRowBytes, true>(mx::shared_base() + Shared::kQ, warp_row<TileShape>());
  const uint32_t k_address =
      ldmatrix_address<Shared::kRowBytes, false>(mx::shared_base() + Shared::kK, warp_key<TileShape>());
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    MX_UNROLL
    for (int n = 0; n < TileShape::kWarpKeys / kMmaColumns; ++n) {
      MX_UNROLL
      for (int j = 0; j < 4; ++j) scores[r][n][j] = 0.0f;
    }
  }
  MX_UNROLL
  for (int k = 0; k < kHeadDim / kMmaDepth; ++k) {
    uint32_t q[TileShape::kRowTiles][4];  // (16, 16) fragments of A
    MX_UNROLL
    for (int r = 0; r < TileShape::kRowTiles; ++r) {
      mx::ldmatrix_x4(q[r], step_right<Shared::kRowBytes>(q_address, k) + r * kMmaRows * Shared::kRowBytes);
    }
    MX_UNROLL
    for (int n = 0; n < TileShape::kWarpKeys / 16; ++n) {
      uint32_t keys[4];  // (16 dimensions, 16 keys): two fragments of B
      mx::ldmatrix_x4(keys, step_right<Shared::kRowBytes>(k_address, k) + n * 16 * Shared::kRowBytes);
      MX_UNROLL
      for (int r = 0; r < TileShape::kRowTiles; ++r) {
        mx::mma_m16n8k16(scores[r][2 * n], q[r], keys[0], keys[1], T{});
        mx::mma_m16n8k16(scores[r][2 * n + 1], q[r], keys[2], keys[3], T{});
      }
    }
  }
}

// accumulator (16 kRowTiles, kVHeadDim) += weights V, weights (16 kRowTiles, kWarpKeys) as A operands.
template <class T, int kHeadDim, class TileShape, int kVHeadDim>
MX_DEVICE void multiply_values(const uint32_t (&weights)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4],
                               float (&accumulator)[TileShape::kRowTiles][kVHeadDim / kMmaColumns][4]) {
  using Shared = Layout<kHeadDim, TileShape, kVHeadDim>;
  const uint32_t v_address =
      ldmatrix_address<Shared::kVRowBytes, true>(mx::shared_base() + Shared::kV, warp_key<TileShape>());
  MX_UNROLL
  for (int k = 0; k < TileShape::kWarpKeys / kMmaDepth; ++k) {
    MX_UNROLL
    for (int d = 0; d < kVHeadDim / 16; ++d) {
      const uint32_t from = step_right<Shared::kVRowBytes>(v_address, d) + k * kMmaDepth * Shared::kVRowBytes;
      uint32_t values[4];  // (16 keys, 16 dimensions): two fragments of B
      mx::ldmatrix_x4_trans(values, from);
      MX_UNROLL
      for (int r = 0; r < TileShape::kRowTiles; ++r) {
        mx::mma_m16n8k16(accumulator[r][2 * d], weights[r][k], values[0], values[1], T{});
        mx::mma_m16n8k16(accumulator[r][2 * d + 1], weights[r][k], values[2], values[3], T{});
      }
    }
  }
}

// One tile's scores to weights; state's maxima and sums take them in, and its accumulator is rescaled.
template <class T, class TileShape, Scores kScores, int kVHeadDim>
MX_DEVICE void apply_softmax(const LaunchParams& p, Item item, int32_t tile_begin, bool is_edge,
                             float (&scores)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4],
                             RowState<kVHeadDim, TileShape::kRowTiles>& state,
                             uint32_t (&weights)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4]) {
  const Thread thread = this_thread();
  const int32_t first_key = tile_begin + warp_key<TileShape>() + 2 * (thread.lane % 4);
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    const int32_t first_row = warp_row<TileShape>() + r * kMmaRows + thread.lane / 4;
    const PerRow scale =
        prepare_scores<kScores>(p, item, first_row, first_key, is_edge, {{p.score_scale, p.score_scale}}, scores[r]);
    const PerRow rescale = weigh_scores(scores[r], scale, state.row_max[r], state.row_sum[r]);
    pack_weights<T>(scores[r], weights[r]);
    rescale_sums(rescale, state.accumulator[r]);
  }
}

// How a row ends that is divided by its sum already: with its sink, unless its keys are split: then it enters at the
// merge. There it comes in by the same steps, so that a row's bits do not tell whether it was split.
MX_DEVICE RowEnd end_average(const LaunchParams& p, Item item, int32_t row, float lse_log2) {
  if (item[kMergeIdx] >= 0) return {1.0f, lse_log2};
  return finish_row_with_sink(lse_log2, lse_log2 == -INFINITY ? 0.0f : 1.0f, row_sink_log2(p, row_head(p, item, row)));
}

// Rows that one warp has to itself, to be multiplied with value_scale.
template <class T, class TileShape, int kVHeadDim>
MX_DEVICE void store_rows(const LaunchParams& p, Item item, RowState<kVHeadDim, TileShape::kRowTiles>& state,
                          float value_scale = 1.0f) {
  const Thread thread = this_thread();
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int32_t row = warp_row<TileShape>() + r * kMmaRows + h * 8 + thread.lane / 4;
      const RowEnd end = finish_row(state.row_max[r][h], quad_sum(state.row_sum[r][h]));
      MX_UNROLL
      for (auto& sums : state.accumulator[r]) {
        sums[2 * h] *= end.inverse_sum * value_scale;
        sums[2 * h + 1] *= end.inverse_sum * value_scale;
      }
      store_row<T, kVHeadDim>(p, item, row, 0, state.accumulator[r], h, end_average(p, item, row, end.lse_log2));
    }
  }
}

// Rows whose keys the warps have split: each warp leaves its sums in shared memory, where K and V were, and adds up a
// quarter of the columns over all warps, in their order. To be multiplied with value_scale.
template <class T, int kHeadDim, class TileShape, int kVHeadDim>
MX_DEVICE void merge_warps(const LaunchParams& p, Item item, const RowState<kVHeadDim, 1>& state,
                           float value_scale = 1.0f) {
  const Thread thread = this_thread();
  using Shared = Layout<kHeadDim, TileShape, kVHeadDim>;
  constexpr int kColumnTiles = kVHeadDim / kMmaColumns / kNumWarps;
  constexpr uint32_t kRowBytes = Shared::kSumRowBytes;
  constexpr uint32_t kWarpBytes = kMmaRows * kRowBytes;
  const uint32_t sums = mx::shared_base() + Shared::kK;
  const uint32_t states = mx::shared_base() + Shared::kQ;  // (warps, 16 rows) of row_max and row_sum
  const int first_column = thread.warp * kColumnTiles * kMmaColumns;
  sync_team();  // no warp reads Q, K or V any more
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = h * 8 + thread.lane / 4;
    const float row_sum = quad_sum(state.row_sum[0][h]);
    const uint32_t to = sums + thread.warp * kWarpBytes + row * kRowBytes + (thread.lane % 4) * sizeof(mx::float2);
    MX_UNROLL
    for (int i = 0; i < kVHeadDim / kMmaColumns; ++i) {
      mx::st_shared_v2(to + i * kMmaColumns * sizeof(float),
                       {state.accumulator[0][i][2 * h], state.accumulator[0][i][2 * h + 1]});
    }
    // All four lanes of the quad, which have the same to say: no branch.
    mx::st_shared_v2(states + (thread.warp * kMmaRows + row) * sizeof(mx::float2), {state.row_max[0][h], row_sum});
  }
  sync_team();
  float total[kColumnTiles][4];  // (16, kVHeadDim / kNumWarps) fragments
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = h * 8 + thread.lane / 4;
    float row_max = -INFINITY;
    float row_sum = 0.0f;
    MX_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) total[i][2 * h] = total[i][2 * h + 1] = 0.0f;
    MX_UNROLL
    for (int w = 0; w < kNumWarps; ++w) {
      const mx::float2 warp_state = mx::ld_shared_v2(states + (w * kMmaRows + row) * sizeof(mx::float2));
      const StateFactors factors = absorb_state(warp_state.x, row_max);
      row_sum = row_sum * factors.rescale + warp_state.y * factors.weight;
      const uint32_t from =
          sums + w * kWarpBytes + row * kRowBytes + (first_column + 2 * (thread.lane % 4)) * sizeof(float);
      MX_UNROLL
      for (int i = 0; i < kColumnTiles; ++i) {
        const mx::float2 value = mx::ld_shared_v2(from + i * kMmaColumns * sizeof(float));
        total[i][2 * h] = total[i][2 * h] * factors.rescale + value.x * factors.weight;
        total[i][2 * h + 1] = total[i][2 * h + 1] * factors.rescale + value.y * factors.weight;
      }
    }
    RowEnd end = end_row(p, item, row, row_max, row_sum);
    end.inverse_sum *= value_scale;
    store_row<T, kVHeadDim>(p, item, row, first_column, total, h, end);
  }
}

// Attention of the drawn item's rows over its keys, to out and lse, or to its rows of the partials.
template <class T, int kHeadDim, class TileShape, Scores kScores, int kVHeadDim = kHeadDim>
MX_DEVICE void attend_item(const LaunchParams& p, Item item) {
  using Shared = Layout<kHeadDim, TileShape, kVHeadDim>;
  const auto copy_k = [&](const KeyPlace& place, int32_t tile_begin) {
    copy_keys<T, kHeadDim, TileShape, kScores>(k_cache<T>(p), item, place, mx::shared_base() + Shared::kK, tile_begin);
    mx::cp_async_commit();
  };
  const auto copy_v = [&](const KeyPlace& place, int32_t tile_begin) {
    copy_keys<T, kVHeadDim, TileShape, kScores>(v_cache<T>(p), item, place, mx::shared_base() + Shared::kV, tile_begin);
    mx::cp_async_commit();
  };

  // Tiles start at multiples of their size, wherever a window begins: what a row sums up, and in which order, does not
  // depend on its neighbours.
  int32_t tile_begin = item[kKvBegin] / TileShape::kKeys * TileShape::kKeys;
  KeyPlace place = find_key<TileShape, kScores>(p, item, tile_begin);
  copy_queries<T, kHeadDim, TileShape>(p, item, mx::shared_base() + Shared::kQ);
  copy_k(place, tile_begin);
  if constexpr (TileShape::kKeyWarps > 1) {
    mx::cp_async_wait<0>();
    sync_team();  // Q, which every warp reads, was copied by all
  }
  RowState<kVHeadDim, TileShape::kRowTiles> state;
  clear(state);
  if (item[kKvBegin] == item[kKvEnd]) tile_begin = item[kKvEnd];  // no keys, no tiles
  MX_NO_UNROLL
  while (tile_begin < item[kKvEnd]) {
    const int32_t next_begin = tile_begin + TileShape::kKeys;
    mx::cp_async_wait<0>();  // for K
    sync_tile<TileShape>();  // K has landed, copied by whomever; nobody reads V of the tile before any more
    copy_v(place, tile_begin);
    place = find_key<TileShape, kScores>(p, item, next_begin);  // long before it is needed

    float scores[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4];
    multiply_queries<T, kHeadDim, TileShape>(scores);
    mx::cp_async_wait<0>();  // for V
    sync_tile<TileShape>();  // V has landed; nobody reads K any more
    if (next_begin < item[kKvEnd]) copy_k(place, next_begin);
    const bool is_edge = tile_begin < item[kFullBegin] || next_begin > item[kFullEnd];
    uint32_t weights[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4];
    apply_softmax<T, TileShape, kScores>(p, item, tile_begin, is_edge, scores, state, weights);
    multiply_values<T, kHeadDim, TileShape, kVHeadDim>(weights, state.accumulator);
    tile_begin = next_begin;
  }
  mx::cp_async_wait<0>();  // of an item without keys: what was copied must land before others use its place

  if constexpr (TileShape::kKeyWarps == 1) {
    store_rows<T, TileShape>(p, item, state);
  } else {
    merge_warps<T, kHeadDim, TileShape>(p, item, state);
  }
}

// Makes the item what is left of it below the first num_rows rows. Also a barrier, on both sides.
MX_DEVICE void drop_rows(Item item, int32_t num_rows) {
  sync_team();  // no thread reads the item as it was any more, or its tiles
  if (this_thread().idx == 0) {
    item.set(kRowBegin, item[kRowBegin] + num_rows);
    item.set(kNumRows, item[kNumRows] - num_rows);
    item.set(kPartialRow, item[kPartialRow] + num_rows);
  }
  sync_team();  // the item is what is left
}

// Computes an item by Walk::attend<TileShape>(p, item), in the tile of its kind.
template <class Shapes, class Walk>
struct AttendByKind {
  static constexpr int32_t kItemTickets = 1;

  static MX_DEVICE void item(const LaunchParams& p, Item item) {
    // Kinds sum up keys in different orders. An invariant call has one of them, which does not depend on a row's mates.
    const int32_t kind = p.call.invariant ? kTileMedium : item[kTileKindOf];
    if (kind == kTileSmall) return Walk::template attend<typename Shapes::Small>(p, item);
    if constexpr (Shapes::kHasLarge) {
      if (kind == kTileLarge) return Walk::template attend<typename Shapes::Large>(p, item);
    }
    // The keys that all rows of the item see are seen by those below as well: some masks too many, none too few.
    while (true) {
      Walk::template attend<typename Shapes::Medium>(p, item);
      if (item[kNumRows] <= Shapes::Medium::kRows) return;
      drop_rows(item, Shapes::Medium::kRows);
    }
  }
};

template <class T, int kHeadDim, int kVHeadDim, Scores kScores>
struct Walk {
  template <class TileShape>
  static MX_DEVICE void attend(const LaunchParams& p, Item item) {
    attend_item<T, kHeadDim, TileShape, kScores, kVHeadDim>(p, item);
  }
};

// The body of a kernel; its entry points are in entry.cuh.
template <class T, int kHeadDim, int kVHeadDim, Scores kScores>
MX_DEVICE void mixed_attention(const LaunchParams& p) {
  using Shapes = Tiles<kHeadDim, kScores, kVHeadDim>;
  run_queue<T, kVHeadDim, AttendByKind<Shapes, Walk<T, kHeadDim, kVHeadDim, kScores>>>(p, Queue::kAll);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace mixattn
