// attention_rows-inl.h: what the direct and the packed path of mixed_attention-inl.h share: an item's rows, where its
// keys lie, and the steps of softmax. Formulas and sources are in that file.
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/merge-inl.h"
#include "cpu/register_tile-inl.h"
#include "cpu/vec.h"
#include "cpu/vec_quantized.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kLineFloats = 16;    // arrays in scratch start at cache lines
constexpr int kTreeMaskBits = 64;  // of a tree_mask word

// ---- an item's rows -------------------------------------------------------------------------------------------------

// Row r of an item is packed row item.row_begin + r of its slice (work_item.h).
struct Rows {
  int64_t num_rows;
  int64_t q_stride;  // head_dim in whole vectors
  int64_t o_stride;  // v_head_dim in whole vectors
  float* q;          // (num_rows, q_stride), scaled
  float* o;          // (num_rows, o_stride), not yet divided by l
  float* m;          // (num_rows) largest score so far, base 2
  float* l;          // (num_rows) sum of 2^(score - m)
  int32_t* lo;       // (num_rows) row r sees the keys [lo[r], hi[r]); neither ever falls as r rises
  int32_t* hi;
  int32_t* position;     // (num_rows) of the row's token in its sequence
  float* alibi;          // (num_rows) added per position between row and key, base 2; unset without alibi_slopes
  uint64_t* hidden;      // (num_rows) bit d: the key d before position is hidden from the row; unset without tree_mask
  int64_t hidden_begin;  // the first key that is hidden from some row; INT64_MAX: none is
  int64_t seen_key;      // some key of the item that is not hidden from every row; set if hidden_begin is
  int64_t kv_end;        // the item's, or its kv_begin if every key is hidden from every row
  float factor;          // of all scores, where q is not scaled (attention_packed-inl.h)
};

MIXATTN_INLINE HeadDims head_dims(const AttentionParams& p) {
  return {p.head_dim, p.v_head_dim};
}

MIXATTN_INLINE int64_t rows_floats(int64_t num_rows, HeadDims dims) {
  return round_up(num_rows, kLineFloats) * (round_up(dims.k, kLanes) + round_up(dims.v, kLanes) + 8);
}

MIXATTN_INLINE Rows carve_rows(int64_t num_rows, HeadDims dims, float* scratch) {
  const int64_t padded = round_up(num_rows, kLineFloats);
  Rows rows;
  rows.num_rows = num_rows;
  rows.q_stride = round_up(dims.k, kLanes);
  rows.o_stride = round_up(dims.v, kLanes);
  rows.q = scratch;
  rows.o = rows.q + padded * rows.q_stride;
  rows.m = rows.o + padded * rows.o_stride;
  rows.l = rows.m + padded;
  rows.lo = reinterpret_cast<int32_t*>(rows.l + padded);
  rows.hi = rows.lo + padded;
  rows.position = rows.hi + padded;
  rows.alibi = reinterpret_cast<float*>(rows.position + padded);
  rows.hidden = reinterpret_cast<uint64_t*>(rows.alibi + padded);
  return rows;
}

// Which query token (row of q) and query head a row of an item is.
struct TokenHead {
  int64_t token;
  int64_t head;
};

MIXATTN_INLINE TokenHead token_head(const AttentionParams& p, int64_t seq_idx, int64_t kv_head, int64_t packed_row) {
  const int64_t group_size = p.num_q_heads / p.num_kv_heads;
  return {p.cu_seqlens_q[seq_idx] + packed_row / group_size, kv_head * group_size + packed_row % group_size};
}

// Whether row r of an item sees this key of it.
MIXATTN_INLINE bool is_seen(const Rows& rows, int64_t r, int64_t key) {
  if (key < rows.lo[r] || key >= rows.hi[r]) return false;
  const int64_t distance = rows.position[r] - key;
  return distance >= kTreeMaskBits || (rows.hidden[r] >> distance & 1) == 0;
}

MIXATTN_INLINE bool is_seen_by_any(const Rows& rows, int64_t key) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    if (is_seen(rows, r, key)) return true;
  }
  return false;
}

// Fills what the tree mask says of the rows, whose positions and visible keys are known.
void start_tree(const AttentionParams& p, const WorkItem& item, int64_t slice_begin, Rows* rows) {
  for (int64_t r = 0; r < rows->num_rows; ++r) {
    const int64_t token = token_head(p, item.seq_idx, item.kv_head, item.row_begin + r).token;
    // The keys that a bit is for: the slice's own, up to the row's.
    const int64_t num_bits = clamp(rows->position[r] + 1 - clamp(slice_begin, 0, INT32_MAX), 0, kTreeMaskBits);
    const uint64_t bits = num_bits == 0 ? 0 : ~uint64_t{0} >> (kTreeMaskBits - num_bits);
    const uint64_t hidden = ~static_cast<uint64_t>(p.tree_mask[token]) & bits;
    rows->hidden[r] = hidden;
    if (hidden == 0) continue;
    const int64_t first = rows->position[r] - (kTreeMaskBits - 1 - __builtin_clzll(hidden));
    if (first < rows->hidden_begin) rows->hidden_begin = first;
  }
  if (rows->hidden_begin >= item.kv_end) return;
  rows->seen_key = item.kv_begin;
  while (rows->seen_key < item.kv_end && !is_seen_by_any(*rows, rows->seen_key)) ++rows->seen_key;
  if (rows->seen_key == item.kv_end) rows->kv_end = item.kv_begin;
}

// The scale that all keys of a kv head share; 1 if each has its own.
MIXATTN_INLINE float shared_scale(const KvScale& scale, int64_t kv_head) {
  if (scale.data == nullptr) return scale.value;
  return scale.is_per_token ? 1.0f : scale.data[kv_head * scale.head_stride];
}

// What q . k is multiplied with before softmax in base 2: 2^(s log2(e)) = e^s. With soft_cap the factor behind tanh
// comes later (cap_scores).
MIXATTN_INLINE float query_scale(const AttentionParams& p, float k_factor) {
  return (p.soft_cap > 0 ? p.softmax_scale / p.soft_cap : p.softmax_scale * kLog2E) * k_factor;
}

// Fills the rows' q, times k_factor, and visible keys and clears the rest; the rows from num_rows to padded_rows get
// q 0.
template <typename T>
void fill_rows(const AttentionParams& p, const WorkItem& item, float k_factor, int64_t padded_rows, Rows* rows) {
  const Vec scale = broadcast(query_scale(p, k_factor));
  const int64_t group_size = p.num_q_heads / p.num_kv_heads;
  const int64_t q_len = int64_t{p.cu_seqlens_q[item.seq_idx + 1]} - p.cu_seqlens_q[item.seq_idx];
  const int64_t first_position = p.seq_lens[item.seq_idx] - q_len;
  for (int64_t r = 0; r < rows->num_rows; ++r) {
    const int64_t packed_row = item.row_begin + r;
    const TokenHead at = token_head(p, item.seq_idx, item.kv_head, packed_row);
    const T* source = static_cast<const T*>(p.q) + at.token * p.q_token_stride + at.head * p.q_head_stride;
    float* q = rows->q + r * rows->q_stride;
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) store(q + d, mul(load(source + d), scale));
    if (kLanes > 8 && d < p.head_dim) store(q + d, mul(load_half(source + d), scale));
    const int64_t position = first_position + packed_row / group_size;
    const int64_t hi = p.causal ? clamp(position + 1, item.kv_begin, item.kv_end) : item.kv_end;
    const int64_t lo = p.window_left < 0 ? item.kv_begin : clamp(position - p.window_left, item.kv_begin, hi);
    rows->lo[r] = static_cast<int32_t>(lo);
    rows->hi[r] = static_cast<int32_t>(hi);
    rows->position[r] = static_cast<int32_t>(position);
    if (p.alibi_slopes != nullptr) {
      rows->alibi[r] = -kLog2E * p.alibi_slopes[item.seq_idx * p.alibi_seq_stride + at.head];
    }
  }
  for (int64_t r = rows->num_rows; r < padded_rows; ++r) {
    rows->position[r] = 0;
    rows->alibi[r] = 0.0f;
  }
  rows->hidden_begin = INT64_MAX;
  rows->kv_end = item.kv_end;
  if (p.tree_mask != nullptr) start_tree(p, item, first_position, rows);
  for (int64_t r = 0; r < padded_rows; ++r) {
    rows->m[r] = -INFINITY;
    rows->l[r] = 0.0f;
  }
  for (int64_t i = 0; i < padded_rows * rows->o_stride; i += kLanes) store(rows->o + i, zero());
  for (int64_t i = rows->num_rows * rows->q_stride; i < padded_rows * rows->q_stride; i += kLanes) {
    store(rows->q + i, zero());
  }
}

// Makes the rows ready for keys of type S.
template <typename S>
void start_rows(const AttentionParams& p, const WorkItem& item, int64_t padded_rows, Rows* rows) {
  const float k_factor = shared_scale(p.k_scale, item.kv_head) * kElementScale<S>;
  switch (p.dtype) {
    case DType::kFloat32:
      return fill_rows<float>(p, item, k_factor, padded_rows, rows);
    case DType::kBFloat16:
      return fill_rows<BFloat16>(p, item, k_factor, padded_rows, rows);
    case DType::kFloat16:
      return fill_rows<Float16>(p, item, k_factor, padded_rows, rows);
  }
}

// target[d] = source[d] * factor, with d < num_dims.
template <typename T>
MIXATTN_INLINE void store_scaled(T* target, const float* source, float factor, int64_t num_dims) {
  int64_t d = 0;
  for (; d + kLanes <= num_dims; d += kLanes) store(target + d, mul(load(source + d), broadcast(factor)));
  if (kLanes > 8 && d < num_dims) store_half(target + d, mul(load(source + d), broadcast(factor)));
}

// Divides by l, times v_factor, and writes: to out and lse, or to the partial buffers if other items have the rows'
// other keys.
template <typename T>
void write_rows(const AttentionParams& p, const WorkItem& item, const Rows& rows, float v_factor) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const TokenHead at = token_head(p, item.seq_idx, item.kv_head, item.row_begin + r);
    // l is 0 for a row without keys (out 0, lse -inf), and NaN where q, k or v is: that must come out.
    const float l = rows.l[r];
    const float factor = l == 0.0f ? 0.0f : v_factor / l;
    float lse = l == 0.0f ? -INFINITY : (rows.m[r] + __builtin_log2f(l)) * kLn2;
    float* o = rows.o + r * rows.o_stride;
    if (item.merge_idx >= 0) {
      store_scaled(p.partial_out + (item.partial_row + r) * p.v_head_dim, o, factor, p.v_head_dim);
      p.partial_lse[item.partial_row + r] = lse;
      continue;
    }
    T* out = static_cast<T*>(p.out) + at.token * p.out_token_stride + at.head * p.out_head_stride;
    if (p.sinks != nullptr) {  // by the formula of a split row's: the bits do not tell whether a row was split
      store_scaled(o, o, factor, p.v_head_dim);
      lse = merge_row(o, 0, &lse, 0, 1, p.sinks[at.head], p.v_head_dim, out);
    } else {
      store_scaled(out, o, factor, p.v_head_dim);
    }
    if (p.lse != nullptr) p.lse[at.token * p.lse_token_stride + at.head] = lse;
  }
}

template <typename S>
void finish_rows(const AttentionParams& p, const WorkItem& item, const Rows& rows) {
  const float v_factor = shared_scale(p.v_scale, item.kv_head) * kElementScale<S>;
  switch (p.dtype) {
    case DType::kFloat32:
      return write_rows<float>(p, item, rows, v_factor);
    case DType::kBFloat16:
      return write_rows<BFloat16>(p, item, rows, v_factor);
    case DType::kFloat16:
      return write_rows<Float16>(p, item, rows, v_factor);
  }
}

// ---- an item's keys -------------------------------------------------------------------------------------------------

// Where the K and V rows of the keys [first, first + num_keys) lie.
template <typename T>
void locate_keys(const AttentionParams& p, const WorkItem& item, int64_t first, int64_t num_keys, const T** k,
                 const T** v) {
  const int32_t* pages = p.block_table + item.seq_idx * p.block_table_stride + first / p.page_size;
  int64_t slot = first % p.page_size;
  for (int64_t i = 0; i < num_keys; ++pages, slot = 0) {
    const T* k_row = static_cast<const T*>(p.k_cache) + *pages * p.k_page_stride + slot * p.k_token_stride +
                     item.kv_head * p.k_head_stride;
    const T* v_row = static_cast<const T*>(p.v_cache) + *pages * p.v_page_stride + slot * p.v_token_stride +
                     item.kv_head * p.v_head_stride;
    const int64_t end = clamp(i + p.page_size - slot, 0, num_keys);
    for (; i < end; ++i, k_row += p.k_token_stride, v_row += p.v_token_stride) {
      k[i] = k_row;
      v[i] = v_row;
    }
  }
}

// As locate_keys, but read is only what is there and what some row of the item sees; other keys, which may hold NaN or
// lie nowhere, get the rows of one that is, and their scores are masked: keys before the item's first one, hidden ones,
// and those up to the next multiple of `multiple`.
template <typename T>
void locate_tile(const AttentionParams& p, const WorkItem& item, const Rows& rows, int64_t first, int64_t num_keys,
                 int64_t multiple, const T** k, const T** v) {
  const int64_t num_before = clamp(item.kv_begin - first, 0, num_keys);
  const int64_t begin = first + num_before;
  locate_keys(p, item, begin, num_keys - num_before, k + num_before, v + num_before);
  for (int64_t key = rows.hidden_begin > begin ? rows.hidden_begin : begin; key < first + num_keys; ++key) {
    if (!is_seen_by_any(rows, key)) locate_keys(p, item, rows.seen_key, 1, k + (key - first), v + (key - first));
  }
  for (int64_t i = 0; i < num_before; ++i) {
    k[i] = k[num_before];
    v[i] = v[num_before];
  }
  for (int64_t i = num_keys; i < round_up(num_keys, multiple); ++i) {
    k[i] = k[num_keys - 1];
    v[i] = v[num_keys - 1];
  }
}

// scales[i] = the scale of key first + i, each key's own.
MIXATTN_INLINE void gather_scales(const AttentionParams& p, const KvScale& scale, const WorkItem& item, int64_t first,
                                  int64_t num_keys, float* scales) {
  const int32_t* pages = p.block_table + item.seq_idx * p.block_table_stride + first / p.page_size;
  int64_t slot = first % p.page_size;
  for (int64_t i = 0; i < num_keys; ++pages, slot = 0) {
    const float* source =
        scale.data + *pages * scale.page_stride + slot * scale.token_stride + item.kv_head * scale.head_stride;
    const int64_t end = clamp(i + p.page_size - slot, 0, num_keys);
#pragma GCC unroll 8
    for (; i < end; ++i, source += scale.token_stride) scales[i] = *source;
  }
}

// The scales of the rows that locate_tile finds.
void gather_tile_scales(const AttentionParams& p, const KvScale& scale, const WorkItem& item, const Rows& rows,
                        int64_t first, int64_t num_keys, int64_t multiple, float* scales) {
  const int64_t num_before = clamp(item.kv_begin - first, 0, num_keys);
  const int64_t begin = first + num_before;
  gather_scales(p, scale, item, begin, num_keys - num_before, scales + num_before);
  for (int64_t key = rows.hidden_begin > begin ? rows.hidden_begin : begin; key < first + num_keys; ++key) {
    if (!is_seen_by_any(rows, key)) gather_scales(p, scale, item, rows.seen_key, 1, scales + (key - first));
  }
  for (int64_t i = 0; i < num_before; ++i) scales[i] = scales[num_before];
  for (int64_t i = num_keys; i < round_up(num_keys, multiple); ++i) scales[i] = scales[num_keys - 1];
}

template <typename T>
MIXATTN_INLINE void prefetch_row(const T* row, int64_t num_dims) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < row_bytes<T>(num_dims); b += 64) prefetch_far(bytes + b);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// scores[k * stride] = -inf for k in [0, lo) and [hi, num_keys).
MIXATTN_INLINE void mask_scores(float* scores, int64_t stride, int64_t num_keys, int64_t lo, int64_t hi) {
  for (int64_t k = 0; k < clamp(lo, 0, num_keys); ++k) scores[k * stride] = -INFINITY;
  for (int64_t k = clamp(hi, 0, num_keys); k < num_keys; ++k) scores[k * stride] = -INFINITY;
}

// scores[k * stride] = -inf for the keys first + k that the tree mask hides from row r.
MIXATTN_INLINE void hide_scores(float* scores, int64_t stride, int64_t first, int64_t num_keys, const Rows& rows,
                                int64_t r) {
  for (uint64_t bits = rows.hidden[r]; bits != 0; bits &= bits - 1) {
    const int64_t k = rows.position[r] - __builtin_ctzll(bits) - first;
    if (k >= 0 && k < num_keys) scores[k * stride] = -INFINITY;
  }
}

// Adds ALiBi's term to the scores (num_keys, kRows) of the keys from `first` on and the rows from r on.
template <int kRows>
MIXATTN_INLINE void add_alibi(float* scores, int64_t first, int64_t num_keys, const Rows& rows, int64_t r) {
  float factor[kLanes], distance[kLanes];  // lane i belongs to row r + i % kRows
  for (int i = 0; i < kLanes; ++i) {
    factor[i] = rows.alibi[r + i % kRows];
    distance[i] = static_cast<float>(rows.position[r + i % kRows] - first - i / kRows);
  }
  const Vec factors = load(factor), step = broadcast(static_cast<float>(kLanes / kRows));
  Vec distances = load(distance);
  for (int64_t i = 0; i < num_keys * kRows; i += kLanes, distances = sub(distances, step)) {
    store(scores + i, fmadd(factors, abs(distances), load(scores + i)));
  }
}

MIXATTN_INLINE void cap_scores(float* scores, int64_t num_keys, float soft_cap) {
  const Vec factor = broadcast(soft_cap * kLog2E);
  for (int64_t k = 0; k < num_keys; k += kLanes) store(scores + k, mul(tanh(load(scores + k)), factor));
}

// scores[k] *= scales[k]; num_keys is a multiple of kLanes.
MIXATTN_INLINE void scale_scores(float* scores, const float* scales, int64_t num_keys) {
  for (int64_t k = 0; k < num_keys; k += kLanes) store(scores + k, mul(load(scores + k), load(scales + k)));
}

// m takes in the largest score of a tile; l and the row o (stride floats) are scaled to the new m. Returns what to take
// from scores.
MIXATTN_INLINE float raise_max(float tile_max, float* m, float* l, float* o, int64_t stride) {
  const float old_max = *m;
  if (tile_max > old_max) {
    *m = tile_max;
    const Vec factor = exp2_nonpositive(broadcast(old_max - tile_max));  // from -inf: 0, and o and l are 0
    *l *= first_lane(factor);
    for (int64_t d = 0; d < stride; d += kLanes) store(o + d, mul(load(o + d), factor));
  }
  // While every key so far is masked m is -inf, and -inf - -inf would be NaN; -inf - 0 gives weight 0.
  return *m == -INFINITY ? 0.0f : *m;
}

// One step of online softmax: scores (num_keys, a multiple of kLanes) become 2^(score - m), m and l take them in, and
// the row o (stride floats) is scaled to the new m.
MIXATTN_INLINE void softmax_step(float* scores, int64_t num_keys, float* m, float* l, float* o, int64_t stride) {
  Vec largest = load(scores);
  for (int64_t k = kLanes; k < num_keys; k += kLanes) largest = max(largest, load(scores + k));
  const Vec base = broadcast(raise_max(max_lanes(largest), m, l, o, stride));
  Vec sum = zero();
  for (int64_t k = 0; k < num_keys; k += kLanes) {
    const Vec weight = exp2_nonpositive(sub(load(scores + k), base));
    store(scores + k, weight);
    sum = add(sum, weight);
  }
  *l += sum_lanes(sum);
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
