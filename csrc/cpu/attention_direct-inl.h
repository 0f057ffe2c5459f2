// attention_direct-inl.h: items of few rows, K and V read where they lie in their pages; bound by memory.
// Formulas and sources are in mixed_attention-inl.h.
#pragma once

#include "cpu/attention_rows-inl.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kDirectKeys = 64;  // keys of a direct tile: enough that softmax's fixed part is small
// Keys per pass over O, direct; not many, because an 8-way L1 can hold only 8 rows that lie 4 KiB apart.
constexpr int kBlockKeys = kLanes > 8 ? kLanes : 8;

// Scores of a block of kRows rows lie key by key, scores[key * kRows + row], so that softmax needs no sums across a
// vector: lane i belongs to row i % kRows.

// scores[j * kRows + r] = q[r] . k[j][offset...] over kBlockKeys keys; 8 accumulators whatever kRows.
template <typename T, int kRows>
MIXATTN_INLINE void score_block(const float* q, int64_t q_stride, const T* const* k, int64_t offset, int64_t head_dim,
                                float* scores) {
  constexpr int kKeys = 8 / kRows;
  // Summed up across lanes in the end, all at once: after every 8 the sums would wait for the last FMA each time.
  Vec sums[kBlockKeys * kRows / 8][8];
  for (int n = 0; n < kBlockKeys / kKeys; ++n) {
    const T* keys[kKeys];
    for (int i = 0; i < kKeys; ++i) keys[i] = k[n * kKeys + i] + offset;
    Vec acc[8];  // (kKeys, kRows)
    for (int i = 0; i < 8; ++i) acc[i] = zero();
    int64_t d = 0;
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
      Vec key[kKeys][2];
      for (int i = 0; i < kKeys; ++i) load_pair(element_at(keys[i], d), &key[i][0], &key[i][1]);
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < kRows; ++r) {
          Vec query = load(q + r * q_stride + d + half * kLanes);
          keep_in_register(&query);
          for (int i = 0; i < kKeys; ++i) acc[i * kRows + r] = fmadd(query, key[i][half], acc[i * kRows + r]);
        }
      }
    }
    for (; d + kLanes <= head_dim; d += kLanes) {
      for (int i = 0; i < kKeys; ++i) {
        const Vec key = load(element_at(keys[i], d));
        for (int r = 0; r < kRows; ++r) acc[i * kRows + r] = fmadd(load(q + r * q_stride + d), key, acc[i * kRows + r]);
      }
    }
    if (kLanes > 8 && d < head_dim) {
      for (int i = 0; i < kKeys; ++i) {
        const Vec key = load_half(element_at(keys[i], d));
        for (int r = 0; r < kRows; ++r) acc[i * kRows + r] = fmadd(load(q + r * q_stride + d), key, acc[i * kRows + r]);
      }
    }
    for (int i = 0; i < 8; ++i) sums[n][i] = acc[i];
  }
  for (int n = 0; n < kBlockKeys / kKeys; ++n) sum_each(sums[n], scores + n * 8);
}

// One step of online softmax for the rows [first_row, first_row + kRows): as softmax_step, for scores key by key.
template <int kRows>
MIXATTN_INLINE void softmax_block(float* scores, int64_t num_keys, const Rows& rows, int64_t first_row) {
  const int64_t num_scores = num_keys * kRows;
  float lanes[kLanes];
  Vec largest = load(scores);
  for (int64_t i = kLanes; i < num_scores; i += kLanes) largest = max(largest, load(scores + i));
  store(lanes, largest);
  float base[kLanes], change[kLanes];
  bool is_changed = false;
  for (int r = 0; r < kRows; ++r) {
    float* m = rows.m + first_row + r;
    const float old_max = *m;
    for (int i = r; i < kLanes; i += kRows) *m = lanes[i] > *m ? lanes[i] : *m;
    is_changed |= *m > old_max;
    // While every key so far is masked m is -inf, and -inf - -inf would be NaN; -inf - 0 gives weight 0.
    for (int i = r; i < kLanes; i += kRows) base[i] = *m == -INFINITY ? 0.0f : *m;
    for (int i = r; i < kLanes; i += kRows) change[i] = old_max - base[i];
  }
  if (is_changed) {
    store(change, exp2_nonpositive(load(change)));  // from -inf: 0, and o and l are 0
    for (int r = 0; r < kRows; ++r) {
      rows.l[first_row + r] *= change[r];
      float* o = rows.o + (first_row + r) * rows.stride;
      for (int64_t d = 0; d < rows.stride; d += kLanes) store(o + d, mul(load(o + d), broadcast(change[r])));
    }
  }
  const Vec base_lanes = load(base);
  Vec sum = zero();
  for (int64_t i = 0; i < num_scores; i += kLanes) {
    const Vec weight = exp2_nonpositive(sub(load(scores + i), base_lanes));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  store(lanes, sum);
  for (int r = 0; r < kRows; ++r) {
    for (int i = r; i < kLanes; i += kRows) rows.l[first_row + r] += lanes[i];
  }
}

// V of one key, dimensions [d, d + kVecs kLanes): in pairs, alone, or the 8 that are left over (kVecs 0).
template <typename T, int kVecs>
MIXATTN_INLINE void load_columns(const T* source, Vec* value) {
  if constexpr (kVecs == 0) {
    value[0] = load_half(source);
  } else if constexpr (kVecs == 1) {
    value[0] = load(source);
  } else {
    for (int c = 0; c < kVecs; c += 2) load_pair(element_at(source, c * kLanes), &value[c], &value[c + 1]);
  }
}

// o[r][d, d + kVecs kLanes) += sum_j weights[j kRows + r] v[j][offset + d...] over kBlockKeys keys.
template <typename T, int kRows, int kVecs>
MIXATTN_INLINE void value_columns(const float* weights, const T* const* v, int64_t offset, int64_t d, float* o,
                                  int64_t o_stride) {
  constexpr int kAccs = kVecs == 0 ? 1 : kVecs;
  Vec acc[kRows][kAccs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kAccs; ++c) acc[r][c] = load(o + r * o_stride + d + c * kLanes);
  }
  for (int j = 0; j < kBlockKeys; ++j) {
    Vec value[kAccs];
    load_columns<T, kVecs>(element_at(v[j] + offset, d), value);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[j * kRows + r]);
      for (int c = 0; c < kAccs; ++c) acc[r][c] = fmadd(weight, value[c], acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kAccs; ++c) store(o + r * o_stride + d + c * kLanes, acc[r][c]);
  }
}

template <typename T, int kRows>
MIXATTN_INLINE void value_block(const float* weights, const T* const* v, int64_t offset, int64_t head_dim, float* o,
                                int64_t o_stride) {
  constexpr int kVecs = 8 / kRows;  // 8 accumulators whatever kRows
  int64_t d = 0;
  for (; d + kVecs * kLanes <= head_dim; d += kVecs * kLanes) {
    value_columns<T, kRows, kVecs>(weights, v, offset, d, o, o_stride);
  }
  if constexpr (kVecs > 2) {
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) value_columns<T, kRows, 2>(weights, v, offset, d, o, o_stride);
  }
  if (d + kLanes <= head_dim) {
    value_columns<T, kRows, 1>(weights, v, offset, d, o, o_stride);
    d += kLanes;
  }
  if constexpr (kLanes > 8) {
    if (d < head_dim) value_columns<T, kRows, 0>(weights, v, offset, d, o, o_stride);
  }
}

// The scores of a block times their keys' scales.
template <int kRows>
MIXATTN_INLINE void scale_block(float* scores, const float* scales, int64_t num_keys) {
  if constexpr (kRows == 1) {
    scale_scores(scores, scales, num_keys);
  } else {
    for (int64_t k = 0; k < num_keys; ++k) {
      for (int r = 0; r < kRows; ++r) scores[k * kRows + r] *= scales[k];
    }
  }
}

// Asks for the scales of the keys [first, first + num_keys), of the item's head and, since they lie side by side, of
// the next few: else each page's would be one more wait for memory.
MIXATTN_INLINE void prefetch_scales(const AttentionParams& p, const KvScale& scale, const WorkItem& item, int64_t first,
                                    int64_t num_keys) {
  if (!scale.is_per_token) return;
  const int32_t* pages = p.block_table + item.seq_idx * p.block_table_stride + first / p.page_size;
  int64_t slot = first % p.page_size;
  for (int64_t i = 0; i < num_keys; ++pages, slot = 0) {
    const float* source =
        scale.data + *pages * scale.page_stride + slot * scale.token_stride + item.kv_head * scale.head_stride;
    const int64_t end = clamp(i + p.page_size - slot, 0, num_keys);
    for (; i < end; ++i, source += scale.token_stride) prefetch(source);
  }
}

// From the order of memory to that of load_pair for type T, and back: q before the first key, o after the last one.
template <typename T>
MIXATTN_INLINE void split_order(const Rows& rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    float* q = rows.q + r * rows.stride;
    for (int64_t d = 0; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
      Vec a = load(q + d), b = load(q + d + kLanes);
      split_pair(static_cast<const T*>(nullptr), &a, &b);
      store(q + d, a);
      store(q + d + kLanes, b);
    }
  }
}

template <typename T>
MIXATTN_INLINE void restore_order(const Rows& rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    float* o = rows.o + r * rows.stride;
    for (int64_t d = 0; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
      Vec a = load(o + d), b = load(o + d + kLanes);
      restore_pair(static_cast<const T*>(nullptr), &a, &b);
      store(o + d, a);
      store(o + d + kLanes, b);
    }
  }
}

// Where the K and V rows of a tile's keys are, of the first head of a bundle; head n is n strides further.
template <typename T>
struct KeyRows {
  const T* k[kDirectKeys];
  const T* v[kDirectKeys];
};

template <typename T>
MIXATTN_INLINE void prefetch_block(const T* const* rows, int64_t offset, int64_t head_dim) {
  for (int i = 0; i < kBlockKeys; ++i) prefetch_row(rows[i] + offset, head_dim);
}

// Items that differ in their kv head only, side by side: block by block of keys, and in a block head by head, because
// the heads of a token lie next to each other. One head after the other would walk over memory in small pieces, each in
// another page of the system, once per head: that halves the bandwidth (README.md). kRows rows share each load of K and
// V; further rows find them in L1.
template <typename T, int kRows>
void attend_direct(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  const WorkItem& head0 = items[0];
  const int64_t item_rows = num_rows(head0);
  const int64_t padded_rows = round_up(item_rows, kRows);
  Rows rows[kMaxBundle];
  for (int64_t n = 0; n < num_items; ++n, scratch += rows_floats(item_rows, p.head_dim)) {
    rows[n] = carve_rows(item_rows, p.head_dim, scratch);
    start_rows<T>(p, items[n], padded_rows, &rows[n]);
    split_order<T>(rows[n], p.head_dim);
  }
  float* const scores = scratch;  // (num_items, padded_rows, kDirectKeys)
  float scales[kDirectKeys];      // of one head's keys

  KeyRows<T> tiles[2];
  const int64_t kv_end = rows[0].kv_end;
  int64_t num_keys = clamp(kv_end - head0.kv_begin, 0, kDirectKeys);
  int now = 0;
  if (num_keys > 0) locate_tile(p, head0, rows[0], head0.kv_begin, num_keys, kBlockKeys, tiles[now].k, tiles[now].v);
  for (int64_t first = head0.kv_begin; first < kv_end; first += kDirectKeys, now ^= 1) {
    const KeyRows<T>& keys = tiles[now];
    const int64_t padded_keys = round_up(num_keys, kBlockKeys);
    const int64_t num_next = clamp(kv_end - first - kDirectKeys, 0, kDirectKeys);
    KeyRows<T>& next = tiles[now ^ 1];
    if (num_next > 0) locate_tile(p, head0, rows[0], first + kDirectKeys, num_next, kBlockKeys, next.k, next.v);
    prefetch_scales(p, p.k_scale, head0, first + kDirectKeys, num_next);
    prefetch_scales(p, p.v_scale, head0, first + kDirectKeys, num_next);

    for (int64_t j = 0; j < padded_keys; j += kBlockKeys) {
      for (int64_t n = 0; n < num_items; ++n) {
        // Always this head's block that comes next: K is read before V, and V before the next tile's K.
        if (j + kBlockKeys < padded_keys) {
          prefetch_block(keys.k + j + kBlockKeys, n * p.k_head_stride, p.head_dim);
        } else {
          prefetch_block(keys.v, n * p.v_head_stride, p.head_dim);
        }
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          score_block<T, kRows>(rows[n].q + r * rows[n].stride, rows[n].stride, keys.k + j, n * p.k_head_stride,
                                p.head_dim, scores + (n * padded_rows + r) * kDirectKeys + j * kRows);
        }
      }
    }
    for (int64_t n = 0; n < num_items; ++n) {
      float* const head_scores = scores + n * padded_rows * kDirectKeys;
      if (p.k_scale.is_per_token) {
        gather_tile_scales(p, p.k_scale, items[n], rows[n], first, num_keys, kBlockKeys, scales);
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          scale_block<kRows>(head_scores + r * kDirectKeys, scales, padded_keys);
        }
      }
      for (int64_t r = 0; r < padded_rows; r += kRows) {
        float* block = head_scores + r * kDirectKeys;
        if (p.soft_cap > 0) cap_scores(block, padded_keys * kRows, p.soft_cap);
        if (p.alibi_slopes != nullptr) add_alibi<kRows>(block, first, padded_keys, rows[n], r);
        for (int64_t i = r; i < clamp(item_rows, r, r + kRows); ++i) {
          const int64_t lo = rows[n].lo[i] - first, hi = clamp(rows[n].hi[i] - first, 0, num_keys);
          if (lo > 0 || hi < padded_keys) mask_scores(block + i - r, kRows, padded_keys, lo, hi);
          if (rows[n].hidden_begin < first + num_keys) {
            hide_scores(block + i - r, kRows, first, num_keys, rows[n], i);
          }
        }
        softmax_block<kRows>(block, padded_keys, rows[n], r);
      }
      if (p.v_scale.is_per_token) {
        gather_tile_scales(p, p.v_scale, items[n], rows[n], first, num_keys, kBlockKeys, scales);
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          scale_block<kRows>(head_scores + r * kDirectKeys, scales, padded_keys);
        }
      }
    }
    for (int64_t j = 0; j < padded_keys; j += kBlockKeys) {
      for (int64_t n = 0; n < num_items; ++n) {
        if (j + kBlockKeys < padded_keys) {
          prefetch_block(keys.v + j + kBlockKeys, n * p.v_head_stride, p.head_dim);
        } else if (num_next > 0) {
          prefetch_block(next.k, n * p.k_head_stride, p.head_dim);
        }
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          value_block<T, kRows>(scores + (n * padded_rows + r) * kDirectKeys + j * kRows, keys.v + j,
                                n * p.v_head_stride, p.head_dim, rows[n].o + r * rows[n].stride, rows[n].stride);
        }
      }
    }
    num_keys = num_next;
  }
  for (int64_t n = 0; n < num_items; ++n) {
    restore_order<T>(rows[n], p.head_dim);
    finish_rows<T>(p, items[n], rows[n]);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
