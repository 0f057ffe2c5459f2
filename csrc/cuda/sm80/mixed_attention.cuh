// mixed_attention.cuh: attention of one work item by mma.sync and cp.async, and the kernel of all items, sm_80+.
// Math    S = Q K^T; P = exp2(S score_scale - m); O = O exp2(m_old - m) + P V; out = O / sum P, online over KV tiles
// Method  FlashAttention-2's walk. K and V have one tile each in shared memory and take turns: V of this tile is copied
//         while Q K^T runs, K of the next while softmax and P V run. S, P and O stay in registers, P as the A operand
//         of the second product without a shuffle. Only tiles that some row does not see whole are masked. In a small
//         item (decodes) the warps split the keys of each tile, do not wait for each other, and add up at the end.
// Grid    kBlocksPerSm blocks of 128 threads per SM: 255 registers a thread are what fits two; tiles: tile.cuh
// Shapes  as cuda/mixed_attention.cuh; tiles (128, 64), (64, 64), (16, 128) of (packed query rows, keys) by item kind;
//         above head_dim 128 (64, 32) for large, twice, and medium, (16, 64) for small
// Memory  an item reads 2 keys head_dim elements of K and V, and reads and writes rows head_dim; shared: tile.cuh
// Static  nvcc 13.0, bf16, head_dim 128, registers and warp instructions per MMA-MFLOP of large / medium / small tiles:
//         sm_80: 254; 948 / 1,314 / 2,556. sm_90a: 255; 937 / 1,287 / 2,518. No spills in any kernel, no bank conflicts
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
template <int kHeadDim, int kRowTiles>
struct RowState {
  float accumulator[kRowTiles][kHeadDim / kMmaColumns][4];  // (16, kHeadDim) fragments
  float row_max[kRowTiles][2];
  float row_sum[kRowTiles][2];  // of this lane's columns
};

template <int kHeadDim, int kRowTiles>
MX_DEVICE void clear(RowState<kHeadDim, kRowTiles>& state) {
  MX_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    MX_UNROLL
    for (int i = 0; i < kHeadDim / kMmaColumns; ++i) {
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

// accumulator (16 kRowTiles, kHeadDim) += weights V, weights (16 kRowTiles, kWarpKeys) as A operands.
template <class T, int kHeadDim, class TileShape>
MX_DEVICE void multiply_values(const uint32_t (&weights)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4],
                               float (&accumulator)[TileShape::kRowTiles][kHeadDim / kMmaColumns][4]) {
  using Shared = Layout<kHeadDim, TileShape>;
  const uint32_t v_address =
      ldmatrix_address<Shared::kRowBytes, true>(mx::shared_base() + Shared::kV, warp_key<TileShape>());
  MX_UNROLL
  for (int k = 0; k < TileShape::kWarpKeys / kMmaDepth; ++k) {
    MX_UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d) {
      const uint32_t from = step_right<Shared::kRowBytes>(v_address, d) + k * kMmaDepth * Shared::kRowBytes;
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

// The position of a row of the item.
MX_DEVICE int32_t row_position(const LaunchParams& p, int32_t row) {
  return control(kContext) + (control(kRowBegin) + row) / p.group_size;
}

// Whether the tree mask's word lets a row see a key at or before its position.
MX_DEVICE bool is_in_tree(int64_t word, int32_t position, int32_t key) {
  const int32_t distance = position - key;
  return key < control(kContext) || distance >= kTreeMaskBits || (word >> distance & 1) != 0;
}

// -inf for keys that a row does not see; tile_begin is the tile's first key.
template <class TileShape, Scores kScores>
MX_DEVICE void mask_scores(const LaunchParams& p, int32_t tile_begin,
                           float (&scores)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4]) {
  const Thread thread = this_thread();
  const int32_t first_key = tile_begin + warp_key<TileShape>() + 2 * (thread.lane % 4);
  const bool has_tree = kScores == Scores::kAny && p.call.tree_mask != nullptr;
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int32_t row = warp_row<TileShape>() + r * kMmaRows + h * 8 + thread.lane / 4;
      const int32_t position = row_position(p, row);
      const KeyRange visible = visible_keys(p, position, control(kKvBegin), control(kKvEnd));
      int64_t word = -1;
      if (has_tree && row < control(kNumRows)) {
        word = p.call.tree_mask[control(kFirstToken) + position - control(kContext)];
      }
      MX_UNROLL
      for (int n = 0; n < TileShape::kWarpKeys / kMmaColumns; ++n) {
        MX_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int32_t key = first_key + n * kMmaColumns + j;
          const bool is_visible = key >= visible.begin && key < visible.end;
          if (!is_visible || (has_tree && !is_in_tree(word, position, key))) scores[r][n][2 * h + j] = -INFINITY;
        }
      }
    }
  }
}

// Scores, already in base 2, less what ALiBi takes off them.
template <class TileShape>
MX_DEVICE void subtract_alibi(const LaunchParams& p, int32_t tile_begin,
                              float (&scores)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4]) {
  const Thread thread = this_thread();
  const int32_t first_key = tile_begin + warp_key<TileShape>() + 2 * (thread.lane % 4);
  const float* const slopes = p.call.alibi_slopes + control(kSeqIdx) * p.call.alibi_seq_stride;
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int32_t row = warp_row<TileShape>() + r * kMmaRows + h * 8 + thread.lane / 4;
      const int32_t head = control(kKvHead) * p.group_size + (control(kRowBegin) + row) % p.group_size;
      const float slope = slopes[head] * kLog2E;
      const int32_t position = row_position(p, row);
      MX_UNROLL
      for (int n = 0; n < TileShape::kWarpKeys / kMmaColumns; ++n) {
        MX_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int32_t distance = position - (first_key + n * kMmaColumns + j);
          scores[r][n][2 * h + j] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
        }
      }
    }
  }
}

// Scores of tanh's argument to those of tanh: tanh(x) = 1 - 2 / (exp(2x) + 1); score_scale holds 2 log2(e) / soft_cap.
// exp2 = inf gives 1.
template <class Fragments>
MX_DEVICE void cap_scores(const LaunchParams& p, Fragments& scores) {
  MX_UNROLL
  for (auto& row_tile : scores) {
    MX_UNROLL
    for (auto& fragment : row_tile) {
      MX_UNROLL
      for (float& score : fragment) score = 1.0f - 2.0f * mx::rcp(mx::ex2(score * p.score_scale) + 1.0f);
    }
  }
}

// One tile's scores to weights; state's maxima and sums take them in, and its accumulator is rescaled.
template <class T, int kHeadDim, class TileShape, Scores kScores>
MX_DEVICE void apply_softmax(const LaunchParams& p, int32_t tile_begin, bool is_edge,
                             float (&scores)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4],
                             RowState<kHeadDim, TileShape::kRowTiles>& state,
                             uint32_t (&weights)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4]) {
  float scale = kScores == Scores::kCapped ? p.score_cap : p.score_scale;
  if constexpr (kScores == Scores::kCapped) cap_scores(p, scores);
  if constexpr (kScores == Scores::kAny) {
    if (p.call.soft_cap > 0.0f) {
      cap_scores(p, scores);
      scale = p.score_cap;
    }
    if (p.call.alibi_slopes != nullptr) {
      MX_UNROLL
      for (auto& row_tile : scores) {
        MX_UNROLL
        for (auto& fragment : row_tile) {
          MX_UNROLL
          for (float& score : fragment) score *= scale;
        }
      }
      scale = 1.0f;
      subtract_alibi<TileShape>(p, tile_begin, scores);
    }
  }
  if (is_edge) mask_scores<TileShape, kScores>(p, tile_begin, scores);
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    const Rescale rescale = weigh_scores<T>(scores[r], scale, state.row_max[r], state.row_sum[r], weights[r]);
    // After the first tiles a maximum seldom grows: most of the time there is nothing to rescale.
    if (!mx::any(rescale.of_row[0] != 1.0f || rescale.of_row[1] != 1.0f)) continue;
    MX_UNROLL
    for (int i = 0; i < kHeadDim / kMmaColumns; ++i) {
      MX_UNROLL
      for (int j = 0; j < 4; ++j) state.accumulator[r][i][j] *= rescale.of_row[j / 2];
    }
  }
}

// How a row of the item ends: with its sink, unless its keys are split: then it enters at the merge.
MX_DEVICE RowEnd end_row(const LaunchParams& p, int32_t row, float row_max, float row_sum) {
  if (p.call.sinks == nullptr || control(kMergeIdx) >= 0) return finish_row(row_max, row_sum);
  const int32_t head = control(kKvHead) * p.group_size + (control(kRowBegin) + row) % p.group_size;
  return finish_row_with_sink(row_max, row_sum, row_sink_log2(p, head));
}

// kColumnTiles fragments of one row, from column first_column on, to out, or to the item's rows of the partials.
template <class T, int kHeadDim, int kColumnTiles>
MX_DEVICE void store_row(const LaunchParams& p, int32_t row, int first_column, const float (&values)[kColumnTiles][4],
                         int h, const RowEnd& end) {
  const Thread thread = this_thread();
  if (row >= control(kNumRows)) return;
  const bool stores_lse = first_column == 0 && thread.lane % 4 == 0;
  const int column = first_column + 2 * (thread.lane % 4);
  if (control(kMergeIdx) < 0) {
    const RowPlace place = place_row(p, control(kFirstToken), control(kKvHead), control(kRowBegin) + row);
    T* const out = out_row<T>(p, place) + column;
    MX_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      mx::st_global(out + i * kMmaColumns,
                    mx::pack2(values[i][2 * h] * end.inverse_sum, values[i][2 * h + 1] * end.inverse_sum, T{}));
    }
    if (stores_lse) store_lse(p, place, end.lse_log2);
  } else {
    const int64_t partial_row = int64_t{control(kPartialRow)} + row;
    float* const partial = p.call.partial_out + partial_row * kHeadDim + column;
    MX_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      mx::st_global_v2(partial + i * kMmaColumns,
                       {values[i][2 * h] * end.inverse_sum, values[i][2 * h + 1] * end.inverse_sum});
    }
    if (stores_lse) mx::st_global(p.call.partial_lse + partial_row, end.lse_log2);
  }
}

// Rows that one warp has to itself.
template <class T, int kHeadDim, class TileShape>
MX_DEVICE void store_rows(const LaunchParams& p, const RowState<kHeadDim, TileShape::kRowTiles>& state) {
  const Thread thread = this_thread();
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int32_t row = warp_row<TileShape>() + r * kMmaRows + h * 8 + thread.lane / 4;
      const RowEnd end = end_row(p, row, state.row_max[r][h], quad_sum(state.row_sum[r][h]));
      store_row<T, kHeadDim>(p, row, 0, state.accumulator[r], h, end);
    }
  }
}

// Rows whose keys the warps have split: each warp leaves its sums in shared memory, where K and V were, and adds up a
// quarter of the columns over all warps, in their order.
template <class T, int kHeadDim, class TileShape>
MX_DEVICE void merge_warps(const LaunchParams& p, const RowState<kHeadDim, 1>& state) {
  const Thread thread = this_thread();
  using Shared = Layout<kHeadDim, TileShape>;
  constexpr int kColumnTiles = kHeadDim / kMmaColumns / kNumWarps;
  constexpr uint32_t kRowBytes = Shared::kSumRowBytes;
  constexpr uint32_t kWarpBytes = kMmaRows * kRowBytes;
  const uint32_t sums = mx::shared_base() + Shared::kK;
  const uint32_t states = mx::shared_base() + Shared::kQ;  // (warps, 16 rows) of row_max and row_sum
  const int first_column = thread.warp * kColumnTiles * kMmaColumns;
  mx::sync_threads();  // no warp reads Q, K or V any more
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = h * 8 + thread.lane / 4;
    const float row_sum = quad_sum(state.row_sum[0][h]);
    const uint32_t to = sums + thread.warp * kWarpBytes + row * kRowBytes + (thread.lane % 4) * sizeof(mx::float2);
    MX_UNROLL
    for (int i = 0; i < kHeadDim / kMmaColumns; ++i) {
      mx::st_shared_v2(to + i * kMmaColumns * sizeof(float),
                       {state.accumulator[0][i][2 * h], state.accumulator[0][i][2 * h + 1]});
    }
    // All four lanes of the quad, which have the same to say: no branch.
    mx::st_shared_v2(states + (thread.warp * kMmaRows + row) * sizeof(mx::float2), {state.row_max[0][h], row_sum});
  }
  mx::sync_threads();
  float total[kColumnTiles][4];  // (16, kHeadDim / kNumWarps) fragments
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
    store_row<T, kHeadDim>(p, row, first_column, total, h, end_row(p, row, row_max, row_sum));
  }
}

// Attention of the drawn item's rows over its keys, to out and lse, or to its rows of the partials.
template <class T, int kHeadDim, class TileShape, Scores kScores>
MX_DEVICE void attend_item(const LaunchParams& p) {
  using Shared = Layout<kHeadDim, TileShape>;
  const auto copy_k = [&](const KeyPlace& place, int32_t tile_begin) {
    copy_keys<T, kHeadDim, TileShape, kScores>(k_cache<T>(p), place, mx::shared_base() + Shared::kK, tile_begin);
    mx::cp_async_commit();
  };
  const auto copy_v = [&](const KeyPlace& place, int32_t tile_begin) {
    copy_keys<T, kHeadDim, TileShape, kScores>(v_cache<T>(p), place, mx::shared_base() + Shared::kV, tile_begin);
    mx::cp_async_commit();
  };

  // Tiles start at multiples of their size, wherever a window begins: what a row sums up, and in which order, does not
  // depend on its neighbours.
  int32_t tile_begin = control(kKvBegin) / TileShape::kKeys * TileShape::kKeys;
  KeyPlace place = find_key<TileShape, kScores>(p, tile_begin);
  copy_queries<T, kHeadDim, TileShape>(p, mx::shared_base() + Shared::kQ);
  copy_k(place, tile_begin);
  if constexpr (TileShape::kKeyWarps > 1) {
    mx::cp_async_wait<0>();
    mx::sync_threads();  // Q, which every warp reads, was copied by all
  }
  RowState<kHeadDim, TileShape::kRowTiles> state;
  clear(state);
  if (control(kKvBegin) == control(kKvEnd)) tile_begin = control(kKvEnd);  // no keys, no tiles
  MX_NO_UNROLL
  while (tile_begin < control(kKvEnd)) {
    const int32_t next_begin = tile_begin + TileShape::kKeys;
    mx::cp_async_wait<0>();  // for K
    sync_tile<TileShape>();  // K has landed, copied by whomever; nobody reads V of the tile before any more
    copy_v(place, tile_begin);
    place = find_key<TileShape, kScores>(p, next_begin);  // long before it is needed

    float scores[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4];
    multiply_queries<T, kHeadDim, TileShape>(scores);
    mx::cp_async_wait<0>();  // for V
    sync_tile<TileShape>();  // V has landed; nobody reads K any more
    if (next_begin < control(kKvEnd)) copy_k(place, next_begin);
    const bool is_edge = tile_begin < control(kFullBegin) || next_begin > control(kFullEnd);
    uint32_t weights[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4];
    apply_softmax<T, kHeadDim, TileShape, kScores>(p, tile_begin, is_edge, scores, state, weights);
    multiply_values<T, kHeadDim, TileShape>(weights, state.accumulator);
    tile_begin = next_begin;
  }
  mx::cp_async_wait<0>();  // of an item without keys: what was copied must land before others use its place

  if constexpr (TileShape::kKeyWarps == 1) {
    store_rows<T, kHeadDim, TileShape>(p, state);
  } else {
    merge_warps<T, kHeadDim, TileShape>(p, state);
  }
}

// Makes the item what is left of it below the first num_rows rows. Also a barrier, on both sides.
MX_DEVICE void drop_rows(int32_t num_rows) {
  mx::sync_threads();  // no thread reads the item as it was any more, or its tiles
  if (mx::thread_idx() == 0) {
    set_control(kRowBegin, control(kRowBegin) + num_rows);
    set_control(kNumRows, control(kNumRows) - num_rows);
    set_control(kPartialRow, control(kPartialRow) + num_rows);
  }
  mx::sync_threads();  // the item is what is left
}

template <class T, int kHeadDim, Scores kScores>
struct Attend {
  using Shapes = Tiles<kHeadDim, kScores>;

  static MX_DEVICE void item(const LaunchParams& p) {
    const int32_t kind = control(kTileKindOf);
    if (kind == kTileSmall) return attend_item<T, kHeadDim, typename Shapes::Small, kScores>(p);
    if constexpr (!Shapes::kHasLarge) {
      // The keys that all rows of the item see are seen by those below as well: some masks too many, none too few.
      while (true) {
        attend_item<T, kHeadDim, typename Shapes::Medium, kScores>(p);
        if (control(kNumRows) <= Shapes::Medium::kRows) return;
        drop_rows(Shapes::Medium::kRows);
      }
    } else if (kind == kTileLarge) {
      attend_item<T, kHeadDim, typename Shapes::Large, kScores>(p);
    } else {
      attend_item<T, kHeadDim, typename Shapes::Medium, kScores>(p);
    }
  }
};

// The body of a kernel; its entry points are in entry.cuh.
template <class T, int kHeadDim, Scores kScores>
MX_DEVICE void mixed_attention(const LaunchParams& p) {
  run_plan<T, kHeadDim, Attend<T, kHeadDim, kScores>>(p);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace mixattn
