// attention_packed-inl.h: items of many rows, tiles of K and V in L2; bound by FMA.
// Formulas and sources are in mixed_attention-inl.h.
#pragma once

#include "cpu/attention_dot-inl.h"
#include "cpu/attention_rows-inl.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kPackedKeys = 128;  // keys of a packed tile, see key_tile

static_assert(kInvariantMultiple % kPackedKeys == 0, "no tile passes the end of an invariant plan's split");

// Keys of a packed tile: with 128 rows of head_dim 128 (256), Q, O, S, K and V come to 320 (416) KiB and stay in 512
// KiB of L2, the least among server cores since 2017. O is loaded and stored once per tile: 3 % of the work at 128
// keys.
MIXATTN_INLINE int key_tile(HeadDims dims) {
  return dims.k <= 128 && dims.v <= 128 ? kPackedKeys : kPackedKeys / 2;
}

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

// How S = Q K^T is computed from keys as Dot has them: what a panel of K looks like, the product of a register tile,
// whose rows are those of PackedValues as well.
template <class Dot>
struct PackedScores {  // float32, from any type
  typedef typename Dot::Key Key;
  static constexpr int kPerWord = 1;  // elements of K in 4 bytes of a panel
  static void start(const AttentionParams&, const WorkItem&, Rows*) {}
  static void pack(const Key* const* k, int64_t num_panels, int64_t head_dim, float* k_packed) {
    pack_keys(k, num_panels, head_dim, k_packed);
  }
  MIXATTN_INLINE void multiply(int n, const Rows& rows, int64_t r, const float* panel, int64_t head_dim, float* scores,
                               int64_t stride) {
    tile_function<kTileVecs, false>(n)(rows.q + r * rows.q_stride, rows.q_stride, panel, head_dim, scores, stride);
  }
};

#if defined(MIXATTN_HAS_BFLOAT16_DOT)
template <>
struct PackedScores<BFloat16Dot> {  // pairs of bfloat16 lie in words, of q, of K and of its panels, which take half
  typedef BFloat16 Key;
  static constexpr int kPerWord = 2;
  static void start(const AttentionParams& p, const WorkItem& item, Rows* rows) {
    for (int64_t r = 0; r < rows->num_rows; ++r) {
      rows->factor = BFloat16Dot::start(p, item, r, rows->q + r * rows->q_stride);  // the same for all rows
    }
  }
  static void pack(const BFloat16* const* k, int64_t num_panels, int64_t head_dim, float* k_packed) {
    pack_keys(reinterpret_cast<const float* const*>(k), num_panels, head_dim / 2, k_packed);
  }
  MIXATTN_INLINE void multiply(int n, const Rows& rows, int64_t r, const float* panel, int64_t head_dim, float* scores,
                               int64_t stride) {
    bfloat16_tile_function<false>(n)(rows.q + r * rows.q_stride, rows.q_stride, panel, head_dim / 2, rows.factor,
                                     scores, stride);
  }
};
#endif

#if defined(MIXATTN_HAS_INT16_DOT)
template <>
struct PackedScores<Int8Dot> {  // pairs of int16 lie in words, of q, each row's factor behind them, and of panels of K
  typedef Int8 Key;
  static constexpr int kPerWord = 2;
  static void start(const AttentionParams& p, const WorkItem& item, Rows* rows) {
    for (int64_t r = 0; r < rows->num_rows; ++r) {
      float* const q = rows->q + r * rows->q_stride;
      const float factor = Int8Dot::start(p, item, r, q);
      q[p.head_dim / 2] = factor;
    }
  }
  static void pack(const Int8* const* k, int64_t num_panels, int64_t head_dim, float* k_packed) {
    int16_t wide[kTileCols][kMaxHeadDim];
    const float* rows[kTileCols];
    for (int j = 0; j < kTileCols; ++j) rows[j] = reinterpret_cast<const float*>(wide[j]);
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      for (int j = 0; j < kTileCols; ++j) {
        const Int8* const key = k[panel * kTileCols + j];
        for (int64_t d = 0; d < head_dim; d += Int8Dot::kDepth) store_words(wide[j] + d, load_as_int16(key + d));
      }
      pack_keys(rows, 1, head_dim / 2, k_packed + panel * head_dim / 2 * kTileCols);
    }
  }
  MIXATTN_INLINE void multiply(int n, const Rows& rows, int64_t r, const float* panel, int64_t head_dim, float* scores,
                               int64_t stride) {
    integer_tile_function<Int16Words, false>(n)(rows.q + r * rows.q_stride, rows.q_stride, panel, head_dim / 2, scores,
                                                stride);
  }
};
#endif

// v_packed[panel][key][j] = V of dimension panel * kTileCols + j; panels are (key_tile, kTileCols), the last one only
// kLanes wide if v_head_dim ends there.
template <typename T>
void pack_values(const T* const* v, int64_t num_keys, int64_t v_head_dim, int64_t key_tile, float* v_packed) {
  for (int64_t key = 0; key < num_keys; ++key) {
    int64_t d = 0;
    for (; d + kTileCols <= v_head_dim; d += kTileCols) {
      float* target = v_packed + d * key_tile + key * kTileCols;
      for (int c = 0; c < kTileCols; c += kLanes) store(target + c, load(element_at(v[key], d + c)));
    }
    const int64_t width = round_up(v_head_dim - d, kLanes);
    float* target = v_packed + d * key_tile + key * width;
    for (; d + kLanes <= v_head_dim; d += kLanes, target += kLanes) store(target, load(element_at(v[key], d)));
    if (kLanes > 8 && d < v_head_dim) store(target, load_half(element_at(v[key], d)));
  }
}

#if defined(MIXATTN_HAS_INT16_DOT) || defined(MIXATTN_HAS_BFLOAT16_DOT)
// As pack_values for pairs of keys, whose elements of 16 bits lie in words; v_head_dim is in whole panels.
template <class Dot>
void pack_value_pairs(const typename Dot::Key* const* v, int64_t num_keys, int64_t v_head_dim, int64_t key_tile,
                      float* v_packed) {
  for (int64_t pair = 0; pair < num_keys / 2; ++pair) {
    for (int64_t d = 0; d < v_head_dim; d += kTileCols) {
      IntVec words[2];
      zip_rows(Dot::load_key(v[2 * pair] + d), Dot::load_key(v[2 * pair + 1] + d), &words[0], &words[1]);
      Vec first = as_floats(words[0]), second = as_floats(words[1]);
      restore_zipped(&first, &second);
      float* const target = v_packed + d * key_tile / 2 + pair * kTileCols;
      store(target, first);
      store(target + kLanes, second);
    }
  }
}
#endif

// How O += P V is computed from keys as Dot has them: what weights and panels of V look like, and the product of a
// register tile of whole panels or, if !is_whole, of one that is a single vector wide.
template <class Dot>
struct PackedValues {  // float32, from any type
  typedef typename Dot::Key Key;
  static constexpr int kPerWord = 1;  // keys in 4 bytes of a panel, and of weights
  MIXATTN_INLINE void finish_weights(float*, int64_t) {}
  template <int kVecs>
  MIXATTN_INLINE void store_weights(const Vec (&x)[kVecs], float* weights) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) store(weights + i * kLanes, x[i]);
  }
  static void pack(const Key* const* v, int64_t num_keys, int64_t v_head_dim, int64_t key_tile, float* v_packed) {
    pack_values(v, num_keys, v_head_dim, key_tile, v_packed);
  }
  MIXATTN_INLINE void multiply(int n, bool is_whole, const float* weights, int64_t weights_stride, const float* panel,
                               int64_t num_keys, float* o, int64_t o_stride) {
    const TileFunction multiply_rows = is_whole ? tile_function<kTileVecs, true>(n) : tile_function<1, true>(n);
    multiply_rows(weights, weights_stride, panel, num_keys, o, o_stride);
  }
};

#if defined(MIXATTN_HAS_BFLOAT16_DOT)
template <>
struct PackedValues<BFloat16Dot> {  // pairs of keys in bfloat16 lie in words
  typedef BFloat16 Key;
  static constexpr int kPerWord = 2;
  MIXATTN_INLINE void finish_weights(float* weights, int64_t num_keys) {
    for (int64_t k = 0; k < num_keys; k += 2 * kLanes) {
      store_words(weights + k / 2, bfloat16_pairs<1>(load(weights + k), load(weights + k + kLanes)));
    }
  }
  template <int kVecs>
  MIXATTN_INLINE void store_weights(const Vec (&x)[kVecs], float* weights) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; i += 2) store_words(weights + i / 2 * kLanes, bfloat16_pairs<1>(x[i], x[i + 1]));
  }
  static void pack(const BFloat16* const* v, int64_t num_keys, int64_t v_head_dim, int64_t key_tile, float* v_packed) {
    pack_value_pairs<BFloat16Dot>(v, num_keys, v_head_dim, key_tile, v_packed);
  }
  MIXATTN_INLINE void multiply(int n, bool, const float* weights, int64_t weights_stride, const float* panel,
                               int64_t num_keys, float* o, int64_t o_stride) {
    bfloat16_tile_function<true>(n)(weights, weights_stride, panel, num_keys / 2, 1.0f, o, o_stride);
  }
};
#endif

#if defined(MIXATTN_HAS_INT16_DOT)
template <>
struct PackedValues<Int8Dot> {  // pairs of keys in int16 lie in words, the unit of a row's weights behind them
  typedef Int8 Key;
  static constexpr int kPerWord = 2;
  MIXATTN_INLINE void finish_weights(float* weights, int64_t num_keys) {
    Vec largest = zero(), sum = zero();  // of magnitudes: scales may be negative
    for (int64_t k = 0; k < num_keys; k += kLanes) {
      const Vec magnitude = abs(load(weights + k));
      largest = max(largest, magnitude);
      sum = add(sum, magnitude);
    }
    const float most = max_lanes(largest);
    // Of NaN there are no integers, but a maximum may pass it over: the sum does not, and the unit brings it out.
    const float unit = !(sum_lanes(sum) < INFINITY) ? NAN : (most > 0.0f ? most / 32767.0f : 1.0f);
    const Vec inverse = broadcast(1.0f / unit);
    for (int64_t k = 0; k < num_keys; k += 2 * kLanes) {
      store_words(weights + k / 2,
                  int16_pairs<1>(mul(load(weights + k), inverse), mul(load(weights + k + kLanes), inverse)));
    }
    weights[num_keys / 2] = unit;
  }
  template <int kVecs>
  MIXATTN_INLINE void store_weights(const Vec (&x)[kVecs], float* weights) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) store(weights + i * kLanes, x[i]);
    finish_weights(weights, kVecs * kLanes);
  }
  static void pack(const Int8* const* v, int64_t num_keys, int64_t v_head_dim, int64_t key_tile, float* v_packed) {
    pack_value_pairs<Int8Dot>(v, num_keys, v_head_dim, key_tile, v_packed);
  }
  MIXATTN_INLINE void multiply(int n, bool, const float* weights, int64_t weights_stride, const float* panel,
                               int64_t num_keys, float* o, int64_t o_stride) {
    integer_tile_function<Int16Words, true>(n)(weights, weights_stride, panel, num_keys / 2, o, o_stride);
  }
};
#endif

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
                                   int64_t num_dims) {
  for (int64_t i = count * step / num_steps; i < count * end / num_steps; ++i) prefetch_row(source[i], num_dims);
}

// S = Q K^T. A panel of K (8 KiB at head_dim 128, AVX2) stays in L1 while all rows pass by. V of the tile is on its
// way.
template <class Scores, typename T>
void score_tile(const Rows& rows, const PackedTile<T>& tile, const float* k_packed, HeadDims dims, float* scores) {
  const int64_t num_panels = round_up(tile.num_keys, kTileCols) / kTileCols;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const int64_t j = panel * kTileCols;
    for_each_row_tile(rows, tile.first, tile.num_keys, [&](int64_t r, int n, KeySpan span) {
      const int64_t step = panel * rows.num_rows + r;
      prefetch_share(tile.v, tile.num_keys, step, step + n, num_panels * rows.num_rows, dims.v);
      if (j < span.begin || j >= span.end) return;
      Scores::multiply(n, rows, r, k_packed + j * dims.k / Scores::kPerWord, dims.k, scores + r * tile.key_tile + j,
                       tile.key_tile);
    });
  }
}

// Whether softmax of a tile's scores has nothing to do besides, for rows that see all of its keys.
template <typename T>
bool is_plain_softmax(const AttentionParams& p, const Rows& rows, const PackedTile<T>& tile) {
  return !p.k_scale.is_per_token && !p.v_scale.is_per_token && p.soft_cap <= 0 && p.alibi_slopes == nullptr &&
         rows.hidden_begin >= tile.first + kPackedKeys;
}

MIXATTN_INLINE bool sees_whole_tile(const Rows& rows, int64_t r, int64_t first) {
  return rows.lo[r] <= first && rows.hi[r] >= first + kPackedKeys;
}

// softmax_step for kPackedKeys scores, which stay in registers: finish(vector) of them as they are read, and
// store(vectors) takes the weights.
template <typename Finish, typename Store>
MIXATTN_INLINE void softmax_whole_row(const Rows& rows, int64_t r, const float* scores, const Finish& finish,
                                      const Store& store) {
  constexpr int kVecs = kPackedKeys / kLanes;
  Vec x[kVecs], largest[kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kVecs; ++i) x[i] = largest[i] = finish(load(scores + i * kLanes));
#pragma GCC unroll 4
  for (int n = kVecs / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) largest[i] = max(largest[i], largest[i + n]);
  }
  const Vec base =
      broadcast(raise_max(max_lanes(largest[0]), rows.m + r, rows.l + r, rows.o + r * rows.o_stride, rows.o_stride));
  Vec sum = zero();  // in softmax_step's order: the bits do not tell which of them it was
#pragma GCC unroll 16
  for (int i = 0; i < kVecs; ++i) {
    x[i] = exp2_nonpositive(sub(x[i], base));
    sum = add(sum, x[i]);
  }
  rows.l[r] += sum_lanes(sum);
  store(x);
}

// Softmax of a row's scores of a tile's keys in span, whatever there is to do.
template <typename T>
void softmax_any_row(const AttentionParams& p, const Rows& rows, int64_t r, const PackedTile<T>& tile, KeySpan span,
                     float* scores) {
  const int64_t width = span.end - span.begin;
  if (p.k_scale.is_per_token) scale_scores(scores, tile.k_scale + span.begin, width);
  if (p.soft_cap > 0) cap_scores(scores, width, p.soft_cap);
  if (p.alibi_slopes != nullptr) add_alibi<1>(scores, tile.first + span.begin, width, rows, r);
  const int64_t lo = rows.lo[r] - tile.first - span.begin, hi = rows.hi[r] - tile.first - span.begin;
  if (lo > 0 || hi < width) mask_scores(scores, 1, width, lo, hi);
  if (rows.hidden_begin < tile.first + tile.num_keys) hide_scores(scores, 1, tile.first + span.begin, width, rows, r);
  softmax_step(scores, width, rows.m + r, rows.l + r, rows.o + r * rows.o_stride, rows.o_stride);
  if (p.v_scale.is_per_token) scale_scores(scores, tile.v_scale + span.begin, width);
}

template <class Values, typename T>
void softmax_tile(const AttentionParams& p, const Rows& rows, const PackedTile<T>& tile, float* scores) {
  constexpr bool kFitsRegisters = kNumRegisters * kLanes >= 4 * kPackedKeys;
  const bool is_plain = kFitsRegisters && is_plain_softmax(p, rows, tile);
  for_each_row_tile(rows, tile.first, tile.num_keys, [&](int64_t begin, int n, KeySpan span) {
    if (span.begin == span.end) return;
    const int64_t width = span.end - span.begin;
    for (int64_t r = begin; r < begin + n; ++r) {
      float* row = scores + r * tile.key_tile + span.begin;
      if (is_plain && width == kPackedKeys && sees_whole_tile(rows, r, tile.first)) {
        softmax_whole_row(
            rows, r, row, [](Vec x) __attribute__((always_inline)) { return x; },
            [&](const auto& x) __attribute__((always_inline)) { Values::store_weights(x, row); });
        continue;
      }
      softmax_any_row(p, rows, r, tile, span, row);
      Values::finish_weights(row, width);
    }
  });
}

// O += P V. A panel of V (8 KiB at 128 keys, AVX2) stays in L1 while all rows pass by. The next tile's K is on its way.
template <class Values, typename T>
void value_tile(const Rows& rows, const PackedTile<T>& tile, const PackedTile<T>& next, const float* v_packed,
                int64_t head_dim, const float* scores) {
  for (int64_t d = 0; d < rows.o_stride; d += kTileCols) {
    const bool is_whole = d + kTileCols <= rows.o_stride;
    const int64_t width = is_whole ? kTileCols : kLanes;
    for_each_row_tile(rows, tile.first, tile.num_keys, [&](int64_t r, int n, KeySpan span) {
      const int64_t step = d / kTileCols * rows.num_rows + r;
      const int64_t num_steps = round_up(rows.o_stride, kTileCols) / kTileCols * rows.num_rows;
      prefetch_share(next.k, next.num_keys, step, step + n, num_steps, head_dim);
      if (span.begin == span.end) return;
      Values::multiply(n, is_whole, scores + r * tile.key_tile + span.begin, tile.key_tile,
                       v_packed + (d * tile.key_tile + span.begin * width) / Values::kPerWord, span.end - span.begin,
                       rows.o + r * rows.o_stride + d, rows.o_stride);
    });
  }
}

template <class Dot>
void attend_packed(const AttentionParams& p, const WorkItem& item, float* scratch) {
  typedef typename Dot::Key T;
  typedef PackedScores<Dot> Scores;
  typedef PackedValues<Dot> Values;
  Rows rows = carve_rows(num_rows(item), head_dims(p), scratch);
  const int64_t tile_keys = key_tile(head_dims(p));
  float* const scores = scratch + rows_floats(rows.num_rows, head_dims(p));         // (rows, tile_keys)
  float* const packed = scores + round_up(rows.num_rows, kLineFloats) * tile_keys;  // K, and when S is done V
  start_rows<T>(p, item, rows.num_rows, &rows);
  Scores::start(p, item, &rows);

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
    Scores::pack(tile.k, padded_keys / kTileCols, p.head_dim, packed);
    score_tile<Scores>(rows, tile, packed, head_dims(p), scores);
    softmax_tile<Values>(p, rows, tile, scores);
    Values::pack(tile.v, padded_keys, p.v_head_dim, tile_keys, packed);
    value_tile<Values>(rows, tile, next, packed, p.head_dim, scores);
  }
  finish_rows<T>(p, item, rows);
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
