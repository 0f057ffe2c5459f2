// mixed_attention-inl.h: one work item of paged attention, prefill rows or decode rows, for one ISA.
// Math    o_i = sum_j softmax_j(softmax_scale * q_i.k_j) v_j over the keys row i may see; with soft_cap c the scores s
//         become c tanh(s / c) first; ALiBi takes slope_i |position_i - position_j| off them; a sink is one more score
//         in the sum, with v 0
// Method  Online softmax over tiles of keys, in base 2, all arithmetic in float32.
//         Few rows (a decode's query heads of one kv head): direct. One pass over K and V where they lie in their
//         pages; every vector of them that is loaded serves several rows. Bound by memory; the next rows are
//         prefetched. Many rows (a prefill chunk): packed. A tile of K is transposed and one of V copied, both as
//         float32, into scratch that stays in L2; S = Q K^T and O += P V are register-tiled matrix products. Bound by
//         FMA.
//         A key that a tree mask hides has score -inf; one hidden from all rows of an item is not read at all, because
//         0 * NaN would be NaN. A sink enters once, where its row's sum is complete, as one more state that is merged
//         (merge-inl.h): in the item that has all the row's keys, or with the row's splits.
//         Invariant: every row is packed. Tiles start at multiples of key_tile counted from the sequence's first token,
//         and splits (plan.h) at multiples of tiles, so that what one softmax step or one merge takes in is fixed by
//         the row's position; what other rows see and it does not adds zeros.
//         Quantised: k_j = k_scale_j k'_j and v_j = v_scale_j v'_j with the stored k' and v', so that
//         s_ij = softmax_scale k_scale_j q_i.k'_j and o_i = sum_j (p_ij v_scale_j) v'_j: one product per score and one
//         per weight. Scales that all keys of a head share move out: into q, and behind the sum.
// Grid    one item per call; cpu/mixed_attention.cpp draws items for its threads and has splits merged
// Shapes  as AttentionParams; q and out float32, bfloat16 or float16; k_cache and v_cache of any KvDType
// Memory  reads 2 keys head_dim elements once per item, and 2 keys scales of 4 bytes if each key has its own. Scratch
//         in bytes, packed: 4 (rows (2 head_dim + key_tile + 8) + key_tile head_dim), that is 260 KiB at 128 rows and
//         head_dim 128
// Limits  head_dim a multiple of 8, at most 256; any group_size, page_size and strides
// Twins   triton_kernels/mixed_attention.py; truth ops/reference.py
// Source  online softmax, arXiv:1805.02867; tiling, arXiv:2205.14135; register tiles, doi 10.1145/1356052.1356053
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/merge-inl.h"
#include "cpu/vec.h"
#include "cpu/vec_quantized.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;  // of a register tile, whose rows are vec.h's kTileRows
constexpr int kDirectKeys = 64;                // keys of a direct tile: enough that softmax's fixed part is small
// Keys per pass over O, direct; not many, because an 8-way L1 can hold only 8 rows that lie 4 KiB apart.
constexpr int kBlockKeys = kLanes > 8 ? kLanes : 8;
constexpr int kPackedKeys = 128;   // keys of a packed tile, see key_tile
constexpr int kLineFloats = 16;    // arrays in scratch start at cache lines
constexpr int kTreeMaskBits = 64;  // of a tree_mask word

static_assert(kInvariantMultiple % kPackedKeys == 0, "no tile passes the end of an invariant plan's split");

// Keys of a packed tile: with 128 rows of head_dim 128 (256), Q, O, S, K and V come to 320 (416) KiB and stay in 512
// KiB of L2, the least among server cores since 2017. O is loaded and stored once per tile: 3 % of the work at 128
// keys.
MIXATTN_INLINE int key_tile(int64_t head_dim) {
  return head_dim <= 128 ? kPackedKeys : kPackedKeys / 2;
}

MIXATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
MIXATTN_INLINE int64_t round_down(int64_t n, int64_t multiple) {
  return n / multiple * multiple;
}
MIXATTN_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// ---- an item's rows -------------------------------------------------------------------------------------------------

// Row r of an item is packed row item.row_begin + r of its slice (work_item.h).
struct Rows {
  int64_t num_rows;
  int64_t stride;  // of q and o: head_dim in whole vectors
  float* q;        // (num_rows, stride), scaled
  float* o;        // (num_rows, stride), not yet divided by l
  float* m;        // (num_rows) largest score so far, base 2
  float* l;        // (num_rows) sum of 2^(score - m)
  int32_t* lo;     // (num_rows) row r sees the keys [lo[r], hi[r]); neither ever falls as r rises
  int32_t* hi;
  int32_t* position;     // (num_rows) of the row's token in its sequence
  float* alibi;          // (num_rows) added per position between row and key, base 2; unset without alibi_slopes
  uint64_t* hidden;      // (num_rows) bit d: the key d before position is hidden from the row; unset without tree_mask
  int64_t hidden_begin;  // the first key that is hidden from some row; INT64_MAX: none is
  int64_t seen_key;      // some key of the item that is not hidden from every row; set if hidden_begin is
  int64_t kv_end;        // the item's, or its kv_begin if every key is hidden from every row
};

MIXATTN_INLINE int64_t rows_floats(int64_t num_rows, int64_t head_dim) {
  return round_up(num_rows, kLineFloats) * (2 * round_up(head_dim, kLanes) + 8);
}

MIXATTN_INLINE Rows carve_rows(int64_t num_rows, int64_t head_dim, float* scratch) {
  const int64_t padded = round_up(num_rows, kLineFloats);
  Rows rows;
  rows.num_rows = num_rows;
  rows.stride = round_up(head_dim, kLanes);
  rows.q = scratch;
  rows.o = rows.q + padded * rows.stride;
  rows.m = rows.o + padded * rows.stride;
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

// Fills the rows' q, times k_factor, and visible keys and clears the rest; the rows from num_rows to padded_rows get
// q 0.
template <typename T>
void fill_rows(const AttentionParams& p, const WorkItem& item, float k_factor, int64_t padded_rows, Rows* rows) {
  // Base 2: 2^(s log2(e)) = e^s. With soft_cap the factor behind tanh comes later (cap_scores).
  const Vec scale = broadcast((p.soft_cap > 0 ? p.softmax_scale / p.soft_cap : p.softmax_scale * kLog2E) * k_factor);
  const int64_t group_size = p.num_q_heads / p.num_kv_heads;
  const int64_t q_len = int64_t{p.cu_seqlens_q[item.seq_idx + 1]} - p.cu_seqlens_q[item.seq_idx];
  const int64_t first_position = p.seq_lens[item.seq_idx] - q_len;
  for (int64_t r = 0; r < rows->num_rows; ++r) {
    const int64_t packed_row = item.row_begin + r;
    const TokenHead at = token_head(p, item.seq_idx, item.kv_head, packed_row);
    const T* source = static_cast<const T*>(p.q) + at.token * p.q_token_stride + at.head * p.q_head_stride;
    float* q = rows->q + r * rows->stride;
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
  for (int64_t i = 0; i < padded_rows * rows->stride; i += kLanes) store(rows->o + i, zero());
  for (int64_t i = rows->num_rows * rows->stride; i < padded_rows * rows->stride; i += kLanes) {
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

// target[d] = source[d] * factor, with d < head_dim.
template <typename T>
MIXATTN_INLINE void store_scaled(T* target, const float* source, float factor, int64_t head_dim) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(target + d, mul(load(source + d), broadcast(factor)));
  if (kLanes > 8 && d < head_dim) store_half(target + d, mul(load(source + d), broadcast(factor)));
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
    float* o = rows.o + r * rows.stride;
    if (item.merge_idx >= 0) {
      store_scaled(p.partial_out + (item.partial_row + r) * p.head_dim, o, factor, p.head_dim);
      p.partial_lse[item.partial_row + r] = lse;
      continue;
    }
    T* out = static_cast<T*>(p.out) + at.token * p.out_token_stride + at.head * p.out_head_stride;
    if (p.sinks != nullptr) {  // by the formula of a split row's: the bits do not tell whether a row was split
      store_scaled(o, o, factor, p.head_dim);
      lse = merge_row(o, 0, &lse, 0, 1, p.sinks[at.head], p.head_dim, out);
    } else {
      store_scaled(out, o, factor, p.head_dim);
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
MIXATTN_INLINE void prefetch_row(const T* row, int64_t head_dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < row_bytes<T>(head_dim); b += 64) prefetch(bytes + b);
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

// One step of online softmax: scores (num_keys, a multiple of kLanes) become 2^(score - m), m and l take them in, and
// the row o (stride floats) is scaled to the new m.
MIXATTN_INLINE void softmax_step(float* scores, int64_t num_keys, float* m, float* l, float* o, int64_t stride) {
  Vec largest = load(scores);
  for (int64_t k = kLanes; k < num_keys; k += kLanes) largest = max(largest, load(scores + k));
  const float tile_max = max_lanes(largest);
  const float old_max = *m;
  if (tile_max > old_max) {
    *m = tile_max;
    const Vec factor = exp2_nonpositive(broadcast(old_max - tile_max));  // from -inf: 0, and o and l are 0
    *l *= first_lane(factor);
    for (int64_t d = 0; d < stride; d += kLanes) store(o + d, mul(load(o + d), factor));
  }
  // While every key so far is masked m is -inf, and -inf - -inf would be NaN; -inf - 0 gives weight 0.
  const Vec base = broadcast(*m == -INFINITY ? 0.0f : *m);
  Vec sum = zero();
  for (int64_t k = 0; k < num_keys; k += kLanes) {
    const Vec weight = exp2_nonpositive(sub(load(scores + k), base));
    store(scores + k, weight);
    sum = add(sum, weight);
  }
  *l += sum_lanes(sum);
}

// ---- direct: few rows, K and V in their pages -----------------------------------------------------------------------

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

// ---- packed: many rows, K and V as float32 in L2 --------------------------------------------------------------------

// k_packed[panel][d][j] = K of key panel * kTileCols + j: a panel is (head_dim, kTileCols), what a register tile reads
// from top to bottom.
template <typename T>
void pack_keys(const T* const* k, int64_t num_panels, int64_t head_dim, float* k_packed) {
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int j = 0; j < kTileCols; j += 8) {
      for (int64_t d = 0; d < head_dim; d += 8) {
        transpose8(k + panel * kTileCols + j, d, k_packed + (panel * head_dim + d) * kTileCols + j, kTileCols);
      }
    }
  }
}

// v_packed[panel][key][j] = V of dimension panel * kTileCols + j; panels are (key_tile, kTileCols), the last one only
// kLanes wide if head_dim ends there.
template <typename T>
void pack_values(const T* const* v, int64_t num_keys, int64_t head_dim, int64_t key_tile, float* v_packed) {
  for (int64_t key = 0; key < num_keys; ++key) {
    int64_t d = 0;
    for (; d + kTileCols <= head_dim; d += kTileCols) {
      float* target = v_packed + d * key_tile + key * kTileCols;
      for (int c = 0; c < kTileCols; c += kLanes) store(target + c, load(element_at(v[key], d + c)));
    }
    const int64_t width = round_up(head_dim - d, kLanes);
    float* target = v_packed + d * key_tile + key * width;
    for (; d + kLanes <= head_dim; d += kLanes, target += kLanes) store(target, load(element_at(v[key], d)));
    if (kLanes > 8 && d < head_dim) store(target, load_half(element_at(v[key], d)));
  }
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

typedef void (*TileFunction)(const float*, int64_t, const float*, int64_t, float*, int64_t);

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
      return multiply_tile < kTileRows < 7 ? 1 : 7, kVecs, kIsAdded > ;
    default:
      return multiply_tile < kTileRows < 8 ? 1 : 8, kVecs, kIsAdded > ;
  }
}

// Rows of the next register tile: kTileRows, but the last two share what is left, so that neither is nearly empty.
MIXATTN_INLINE int tile_rows(int64_t rows_left) {
  if (rows_left <= kTileRows) return static_cast<int>(rows_left);
  return rows_left < 2 * kTileRows ? static_cast<int>((rows_left + 1) / 2) : kTileRows;
}

// The keys of a tile that rows [r, r + n) see, all together, from whole register tile to whole register tile.
struct KeySpan {
  int64_t begin;
  int64_t end;
};

MIXATTN_INLINE KeySpan key_span(const Rows& rows, int64_t r, int n, int64_t first, int64_t num_keys) {
  const int64_t begin = clamp(rows.lo[r] - first, 0, num_keys);
  const int64_t end = clamp(rows.hi[r + n - 1] - first, begin, num_keys);
  if (begin == end) return {0, 0};
  return {round_down(begin, kTileCols), round_up(end, kTileCols)};
}

// One tile of keys, as attend_packed works on it.
template <typename T>
struct PackedTile {
  int64_t first;     // absolute position of its first key
  int64_t num_keys;  // at most key_tile
  int64_t key_tile;
  const T* k[kPackedKeys];  // where its rows are
  const T* v[kPackedKeys];
  float k_scale[kPackedKeys];  // filled if each key has its own
  float v_scale[kPackedKeys];
};

// Calls visit(r, n, span) for the rows [r, r + n) of each register tile and the keys of this tile that they see.
template <typename Visit>
MIXATTN_INLINE void for_each_row_tile(const Rows& rows, int64_t first, int64_t num_keys, const Visit& visit) {
  for (int64_t r = 0; r < rows.num_rows;) {
    const int n = tile_rows(rows.num_rows - r);
    visit(r, n, key_span(rows, r, n, first, num_keys));
    r += n;
  }
}

// Prefetches the share of count rows that is due between steps `step` and `end` of num_steps: K or V come into L2 a few
// rows at a time while register tiles are computed. All at once they would fill the load queues.
template <typename T>
MIXATTN_INLINE void prefetch_share(const T* const* source, int64_t count, int64_t step, int64_t end, int64_t num_steps,
                                   int64_t head_dim) {
  for (int64_t i = count * step / num_steps; i < count * end / num_steps; ++i) prefetch_row(source[i], head_dim);
}

// S = Q K^T. A panel of K (8 KiB at head_dim 128, AVX2) stays in L1 while all rows pass by. V of the tile is on its
// way.
template <typename T>
void score_tile(const Rows& rows, const PackedTile<T>& tile, const float* k_packed, int64_t head_dim, float* scores) {
  const int64_t num_panels = round_up(tile.num_keys, kTileCols) / kTileCols;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const int64_t j = panel * kTileCols;
    for_each_row_tile(rows, tile.first, tile.num_keys, [&](int64_t r, int n, KeySpan span) {
      const int64_t step = panel * rows.num_rows + r;
      prefetch_share(tile.v, tile.num_keys, step, step + n, num_panels * rows.num_rows, head_dim);
      if (j < span.begin || j >= span.end) return;
      tile_function<kTileVecs, false>(n)(rows.q + r * rows.stride, rows.stride, k_packed + j * head_dim, head_dim,
                                         scores + r * tile.key_tile + j, tile.key_tile);
    });
  }
}

template <typename T>
void softmax_tile(const AttentionParams& p, const Rows& rows, const PackedTile<T>& tile, float* scores) {
  for_each_row_tile(rows, tile.first, tile.num_keys, [&](int64_t begin, int n, KeySpan span) {
    if (span.begin == span.end) return;
    const int64_t width = span.end - span.begin;
    for (int64_t r = begin; r < begin + n; ++r) {
      float* row = scores + r * tile.key_tile + span.begin;
      if (p.k_scale.is_per_token) scale_scores(row, tile.k_scale + span.begin, width);
      if (p.soft_cap > 0) cap_scores(row, width, p.soft_cap);
      if (p.alibi_slopes != nullptr) add_alibi<1>(row, tile.first + span.begin, width, rows, r);
      const int64_t lo = rows.lo[r] - tile.first - span.begin, hi = rows.hi[r] - tile.first - span.begin;
      if (lo > 0 || hi < width) mask_scores(row, 1, width, lo, hi);
      if (rows.hidden_begin < tile.first + tile.num_keys) {
        hide_scores(row, 1, tile.first + span.begin, width, rows, r);
      }
      softmax_step(row, width, rows.m + r, rows.l + r, rows.o + r * rows.stride, rows.stride);
      if (p.v_scale.is_per_token) scale_scores(row, tile.v_scale + span.begin, width);
    }
  });
}

// O += P V. A panel of V (8 KiB at 128 keys, AVX2) stays in L1 while all rows pass by. The next tile's K is on its way.
template <typename T>
void value_tile(const Rows& rows, const PackedTile<T>& tile, const PackedTile<T>& next, const float* v_packed,
                int64_t head_dim, const float* scores) {
  for (int64_t d = 0; d < rows.stride; d += kTileCols) {
    const bool is_whole = d + kTileCols <= rows.stride;
    const int64_t width = is_whole ? kTileCols : kLanes;
    for_each_row_tile(rows, tile.first, tile.num_keys, [&](int64_t r, int n, KeySpan span) {
      const int64_t step = d / kTileCols * rows.num_rows + r;
      const int64_t num_steps = round_up(rows.stride, kTileCols) / kTileCols * rows.num_rows;
      prefetch_share(next.k, next.num_keys, step, step + n, num_steps, head_dim);
      if (span.begin == span.end) return;
      const TileFunction multiply = is_whole ? tile_function<kTileVecs, true>(n) : tile_function<1, true>(n);
      multiply(scores + r * tile.key_tile + span.begin, tile.key_tile,
               v_packed + d * tile.key_tile + span.begin * width, span.end - span.begin, rows.o + r * rows.stride + d,
               rows.stride);
    });
  }
}

template <typename T>
void attend_packed(const AttentionParams& p, const WorkItem& item, float* scratch) {
  Rows rows = carve_rows(num_rows(item), p.head_dim, scratch);
  const int64_t tile_keys = key_tile(p.head_dim);
  float* const scores = scratch + rows_floats(rows.num_rows, p.head_dim);           // (rows, tile_keys)
  float* const packed = scores + round_up(rows.num_rows, kLineFloats) * tile_keys;  // K, and when S is done V
  start_rows<T>(p, item, rows.num_rows, &rows);

  PackedTile<T> tiles[2];
  const auto start_tile = [&](int64_t first, PackedTile<T>* tile) {
    tile->first = first;
    tile->num_keys = clamp(rows.kv_end - first, 0, tile_keys);
    tile->key_tile = tile_keys;
    if (tile->num_keys == 0) return;
    locate_tile(p, item, rows, first, tile->num_keys, kTileCols, tile->k, tile->v);
    if (p.k_scale.is_per_token) {
      gather_tile_scales(p, p.k_scale, item, rows, first, tile->num_keys, kTileCols, tile->k_scale);
    }
    if (p.v_scale.is_per_token) {
      gather_tile_scales(p, p.v_scale, item, rows, first, tile->num_keys, kTileCols, tile->v_scale);
    }
  };
  int now = 0;
  const bool is_aligned = p.invariant && item.kv_begin < rows.kv_end;
  start_tile(is_aligned ? round_down(item.kv_begin, tile_keys) : item.kv_begin, &tiles[now]);
  for (; tiles[now].num_keys > 0; now ^= 1) {
    const PackedTile<T>& tile = tiles[now];
    PackedTile<T>& next = tiles[now ^ 1];
    start_tile(tile.first + tile_keys, &next);
    const int64_t padded_keys = round_up(tile.num_keys, kTileCols);
    pack_keys(tile.k, padded_keys / kTileCols, p.head_dim, packed);
    score_tile(rows, tile, packed, p.head_dim, scores);
    softmax_tile(p, rows, tile, scores);
    pack_values(tile.v, padded_keys, p.head_dim, tile_keys, packed);
    value_tile(rows, tile, next, packed, p.head_dim, scores);
  }
  finish_rows<T>(p, item, rows);
}

// ---- entry points ---------------------------------------------------------------------------------------------------

int64_t attend_scratch_bytes(int64_t max_rows, int64_t head_dim) {
  const int64_t rows = round_up(max_rows, kLineFloats);
  const int64_t direct = kMaxBundle * (rows_floats(kDirectRows, head_dim) + kDirectRows * kDirectKeys);
  const int64_t packed =
      rows_floats(rows, head_dim) + rows * key_tile(head_dim) + round_up(head_dim, kLanes) * key_tile(head_dim);
  return static_cast<int64_t>(sizeof(float)) * (direct > packed ? direct : packed);
}

template <typename T>
void attend_typed(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  const int32_t rows = num_rows(items[0]);
  if (rows > kDirectRows || p.invariant) {
    for (int64_t n = 0; n < num_items; ++n) attend_packed<T>(p, items[n], scratch);
  } else if (rows == 1) {
    attend_direct<T, 1>(p, items, num_items, scratch);
  } else if (rows == 2) {
    attend_direct<T, 2>(p, items, num_items, scratch);
  } else {
    attend_direct<T, 4>(p, items, num_items, scratch);
  }
}

void attend(const AttentionParams& p, const WorkItem* items, int64_t num_items, void* scratch) {
  float* floats = static_cast<float*>(scratch);
  switch (p.kv_dtype) {
    case KvDType::kFloat32:
      return attend_typed<float>(p, items, num_items, floats);
    case KvDType::kBFloat16:
      return attend_typed<BFloat16>(p, items, num_items, floats);
    case KvDType::kFloat16:
      return attend_typed<Float16>(p, items, num_items, floats);
    case KvDType::kInt8:
      return attend_typed<Int8>(p, items, num_items, floats);
    case KvDType::kFloat8E4M3:
      return attend_typed<Float8E4M3>(p, items, num_items, floats);
    case KvDType::kFloat8E5M2:
      return attend_typed<Float8E5M2>(p, items, num_items, floats);
    case KvDType::kInt4:
      return attend_typed<Int4Pair>(p, items, num_items, floats);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
