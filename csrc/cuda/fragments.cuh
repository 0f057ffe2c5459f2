// fragments.cuh: what a warp does with 16 rows of scores or sums: soft cap, ALiBi, masks, and where results go.
// Method  a lane has rows first_row and first_row + 8 of the item, and of every 8 columns the two from 2 (lane % 4) on:
//         [i][2 h + j] is row first_row + 8 h, column 8 i + 2 (lane % 4) + j. So are the results of mma.sync, and those
//         of wgmma for each of a warpgroup's warps.
// Twins   triton_kernels/mixed_attention.py (the same names and order)
// Source  fragments: PTX ISA 8.7, sections 9.7.14.5.8 and 9.7.15.5
#pragma once

#include "cuda/mixed_attention.cuh"

namespace mixattn {
namespace cuda {

constexpr int kMmaRows = 16;  // of mma.m16n8k16, and of a warp's share of wgmma
constexpr int kMmaColumns = 8;
constexpr int kMmaDepth = 16;

constexpr int kTreeMaskBits = 64;  // of a tree_mask word

// The position of a row of the item.
MX_DEVICE int32_t row_position(const LaunchParams& p, Item item, int32_t row) {
  return item[kContext] + (item[kRowBegin] + row) / p.group_size;
}

// The query head of a row of the item.
MX_DEVICE int32_t row_head(const LaunchParams& p, Item item, int32_t row) {
  return item[kKvHead] * p.group_size + (item[kRowBegin] + row) % p.group_size;
}

// Whether the tree mask's word lets a row see a key at or before its position.
MX_DEVICE bool is_in_tree(Item item, int64_t word, int32_t position, int32_t key) {
  const int32_t distance = position - key;
  return key < item[kContext] || distance >= kTreeMaskBits || (word >> distance & 1) != 0;
}

// -inf for keys that a row does not see; first_key is that of the lane's first column.
template <Scores kScores, int kScoreTiles>
MX_DEVICE void mask_scores(const LaunchParams& p, Item item, int32_t first_row, int32_t first_key,
                           float (&scores)[kScoreTiles][4]) {
  const bool has_tree = kScores == Scores::kAny && p.call.tree_mask != nullptr;
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int32_t row = first_row + 8 * h;
    const int32_t position = row_position(p, item, row);
    const KeyRange visible = visible_keys(p, position, item[kKvBegin], item[kKvEnd]);
    int64_t word = -1;
    if (has_tree && row < item[kNumRows]) word = p.call.tree_mask[item[kFirstToken] + position - item[kContext]];
    MX_UNROLL
    for (int n = 0; n < kScoreTiles; ++n) {
      MX_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int32_t key = first_key + n * kMmaColumns + j;
        const bool is_visible = key >= visible.begin && key < visible.end;
        if (!is_visible || (has_tree && !is_in_tree(item, word, position, key))) scores[n][2 * h + j] = -INFINITY;
      }
    }
  }
}

// Scores, already in base 2, less what ALiBi takes off them.
template <int kScoreTiles>
MX_DEVICE void subtract_alibi(const LaunchParams& p, Item item, int32_t first_row, int32_t first_key,
                              float (&scores)[kScoreTiles][4]) {
  const float* const slopes = p.call.alibi_slopes + item[kSeqIdx] * p.call.alibi_seq_stride;
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int32_t row = first_row + 8 * h;
    const float slope = slopes[row_head(p, item, row)] * kLog2E;
    const int32_t position = row_position(p, item, row);
    MX_UNROLL
    for (int n = 0; n < kScoreTiles; ++n) {
      MX_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int32_t distance = position - (first_key + n * kMmaColumns + j);
        scores[n][2 * h + j] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
      }
    }
  }
}

// Scores of tanh's argument to those of tanh: tanh(x) = 1 - 2 / (exp(2x) + 1); score_scale holds 2 log2(e) / soft_cap.
// exp2 = inf gives 1.
template <int kScoreTiles>
MX_DEVICE void cap_scores(const PerRow& score_scale, float (&scores)[kScoreTiles][4]) {
  MX_UNROLL
  for (auto& fragment : scores) {
    MX_UNROLL
    for (int j = 0; j < 4; ++j) {
      fragment[j] = 1.0f - 2.0f * mx::rcp(mx::ex2(fragment[j] * score_scale.of_row[j / 2]) + 1.0f);
    }
  }
}

// Products q k, in units of score_scale, to scores, -inf where is_edge and the row does not see the key. Returns what
// the scores are yet to be multiplied by to be logits in base 2.
template <Scores kScores, int kScoreTiles>
MX_DEVICE PerRow prepare_scores(const LaunchParams& p, Item item, int32_t first_row, int32_t first_key, bool is_edge,
                                const PerRow& score_scale, float (&scores)[kScoreTiles][4]) {
  PerRow scale = score_scale;
  if constexpr (kScores == Scores::kCapped) {
    cap_scores(score_scale, scores);
    scale = {{p.score_cap, p.score_cap}};
  }
  if constexpr (kScores == Scores::kAny) {
    if (p.call.soft_cap > 0.0f) {
      cap_scores(score_scale, scores);
      scale = {{p.score_cap, p.score_cap}};
    }
    if (p.call.alibi_slopes != nullptr) {
      MX_UNROLL
      for (auto& fragment : scores) {
        MX_UNROLL
        for (int j = 0; j < 4; ++j) fragment[j] *= scale.of_row[j / 2];
      }
      scale = {{1.0f, 1.0f}};
      subtract_alibi(p, item, first_row, first_key, scores);
    }
  }
  if (is_edge) mask_scores<kScores>(p, item, first_row, first_key, scores);
  return scale;
}

// Sums of 16 rows times what a step's new maxima ask for.
template <int kColumnTiles>
MX_DEVICE void rescale_sums(const PerRow& rescale, float (&sums)[kColumnTiles][4]) {
  // After the first tiles a maximum seldom grows: most of the time there is nothing to rescale.
  if (!mx::any(rescale.of_row[0] != 1.0f || rescale.of_row[1] != 1.0f)) return;
  MX_UNROLL
  for (int i = 0; i < kColumnTiles; ++i) {
    MX_UNROLL
    for (int j = 0; j < 4; ++j) sums[i][j] *= rescale.of_row[j / 2];
  }
}

// How a row of the item ends: with its sink, unless its keys are split: then it enters at the merge.
MX_DEVICE RowEnd end_row(const LaunchParams& p, Item item, int32_t row, float row_max, float row_sum) {
  if (p.call.sinks == nullptr || item[kMergeIdx] >= 0) return finish_row(row_max, row_sum);
  return finish_row_with_sink(row_max, row_sum, row_sink_log2(p, row_head(p, item, row)));
}

// kColumnTiles fragments of one row, from column first_column on, to out, or to the item's rows of the partials.
template <class T, int kVHeadDim, int kColumnTiles>
MX_DEVICE void store_row(const LaunchParams& p, Item item, int32_t row, int first_column,
                         const float (&values)[kColumnTiles][4], int h, const RowEnd& end) {
  const int quad_lane = this_thread().lane % 4;
  if (row >= item[kNumRows]) return;
  const bool stores_lse = first_column == 0 && quad_lane == 0;
  const int column = first_column + 2 * quad_lane;
  if (item[kMergeIdx] < 0) {
    const RowPlace place = place_row(p, item[kFirstToken], item[kKvHead], item[kRowBegin] + row);
    T* const out = out_row<T>(p, place) + column;
    MX_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      mx::st_global(out + i * kMmaColumns,
                    pack_results<T>(p, values[i][2 * h] * end.inverse_sum, values[i][2 * h + 1] * end.inverse_sum));
    }
    if (stores_lse) store_lse(p, place, end.lse_log2);
  } else {
    const int64_t partial_row = int64_t{item[kPartialRow]} + row;
    float* const partial = p.call.partial_out + partial_row * kVHeadDim + column;
    MX_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      mx::st_global_v2(partial + i * kMmaColumns,
                       {values[i][2 * h] * end.inverse_sum, values[i][2 * h + 1] * end.inverse_sum});
    }
    if (stores_lse) mx::st_global(p.call.partial_lse + partial_row, end.lse_log2);
  }
}

}  // namespace cuda
}  // namespace mixattn
