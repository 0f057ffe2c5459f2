// attention_direct-inl.h: items of few rows, K and V read where they lie in their pages; bound by memory.
// Formulas and sources are in mixed_attention-inl.h.
#pragma once

#include "cpu/attention_dot-inl.h"
#include "cpu/attention_rows-inl.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int kDirectKeys = 64;  // keys of a direct tile: enough that softmax's fixed part is small
// Keys of a block: of one head they are scored, or have their values added up, in one go. Not many, because an 8-way L1
// holds only 8 rows that lie 4 KiB apart, and because long runs over one operand leave memory idle (README.md).
constexpr int kBlockKeys = 8;
// A tile has a multiple of these, so that its scores are whole vectors.
constexpr int kPaddedKeys = kLanes > kBlockKeys ? kLanes : kBlockKeys;
// Keys whose values are added up before the sums go back to o: twice as many where their rows are half as long.
template <typename T>
constexpr int kValueKeys = sizeof(T) == 1 ? kPaddedKeys : kBlockKeys;
// Vectors of V that are added up at a time: 8 sums whatever kRows, measured with vectors of 8 and 16 lanes (README.md).
// Of 4 lanes and many registers 16, with which a weight is loaded half as often.
template <int kRows>
constexpr int kValueVecs = kLanes == 4 && kNumRegisters > 16 && kRows > 1 ? 16 / kRows : 8 / kRows;

// Scores of a block of kRows rows lie key by key, scores[key * kRows + row], so that softmax needs no sums across a
// vector: lane i belongs to row i % kRows.

// What is prefetched into L1, and into L2, is read after so much else.
constexpr int64_t kNearBytes = 8192;
constexpr int64_t kFarBytes = 16384;

// As many rows as a block has, each `offset` elements further.
template <typename T>
struct BlockRows {
  const T* const* rows;
  int64_t offset;
};

// Rows that will be read soon.
template <typename T>
struct Ahead {
  BlockRows<T> near, far;
};

// Prefetches the cache lines that begin in the elements [d, d + count) of row i.
template <typename T>
MIXATTN_INLINE void prefetch_piece(const Ahead<T>& ahead, int i, int64_t d, int64_t count) {
  if (row_bytes<T>(count) < 64 && row_bytes<T>(d) % 64 != 0) return;
  const char* near = reinterpret_cast<const char*>(element_at(ahead.near.rows[i] + ahead.near.offset, d));
  const char* far = reinterpret_cast<const char*>(element_at(ahead.far.rows[i] + ahead.far.offset, d));
  for (int64_t b = 0; b < row_bytes<T>(count); b += 64) {
    prefetch_once(near + b);
    prefetch_far(far + b);
  }
}

// Keys that score_block works on at a time: kRows times as many accumulators, 8 at least, beside two vectors per key.
template <int kRows>
constexpr int kKeysAtOnce = kNumRegisters > 16 ? (kRows == 1 ? 8 : 4) : 8 / kRows;

// scores[j * kRows + r] = q[r] . k[j][offset...] over kBlockKeys keys. The rows ahead are prefetched line by line in
// between: many prefetches in a row would fill the core's miss buffers and stop the sums.
template <class Dot, int kRows>
MIXATTN_INLINE void score_block(const float* q, int64_t q_stride, const typename Dot::Key* const* k, int64_t offset,
                                int64_t head_dim, const Ahead<typename Dot::Key>& ahead, float* scores) {
  constexpr int kKeys = kKeysAtOnce<kRows>;
  for (int n = 0; n < kBlockKeys; n += kKeys) {
    const typename Dot::Key* keys[kKeys];
    for (int i = 0; i < kKeys; ++i) keys[i] = k[n + i] + offset;
    typename Dot::Sum products[kKeys * kRows];  // (kKeys, kRows)
    for (int i = 0; i < kKeys * kRows; ++i) products[i] = Dot::start_sum();
    int64_t d = 0;
    for (; d + Dot::kDepth <= head_dim; d += Dot::kDepth) {
      typename Dot::Operand key[kKeys];
      for (int i = 0; i < kKeys; ++i) {
        key[i] = Dot::load_key(element_at(keys[i], d));
        prefetch_piece(ahead, n + i, d, Dot::kDepth);
      }
      for (int r = 0; r < kRows; ++r) {
        const typename Dot::Operand query = Dot::load_query(q + r * q_stride, d);
        for (int i = 0; i < kKeys; ++i) {
          products[i * kRows + r] = Dot::add_product(products[i * kRows + r], query, key[i]);
        }
      }
    }
    if constexpr (Dot::kTakesAnyDims) {
      for (; d + kLanes <= head_dim; d += kLanes) {
        for (int i = 0; i < kKeys; ++i) {
          const Vec key = load(element_at(keys[i], d));
          for (int r = 0; r < kRows; ++r) {
            products[i * kRows + r] = fmadd(load(q + r * q_stride + d), key, products[i * kRows + r]);
          }
        }
      }
      if (kLanes > 8 && d < head_dim) {
        for (int i = 0; i < kKeys; ++i) {
          const Vec key = load_half(element_at(keys[i], d));
          for (int r = 0; r < kRows; ++r) {
            products[i * kRows + r] = fmadd(load(q + r * q_stride + d), key, products[i * kRows + r]);
          }
        }
      }
    }
    sum_each(products, scores + n * kRows);
  }
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
      float* o = rows.o + (first_row + r) * rows.o_stride;
      for (int64_t d = 0; d < rows.o_stride; d += kLanes) store(o + d, mul(load(o + d), broadcast(change[r])));
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

// o[r][d, d + kVecs kLanes) += sum_j weights[j kRows + r] v[j][offset + d...] over kValueKeys<T> keys.
template <typename T, int kRows, int kVecs>
MIXATTN_INLINE void value_columns(const float* weights, const T* const* v, int64_t offset, int64_t d, float* o,
                                  int64_t o_stride, const Ahead<T>& ahead) {
  constexpr int kAccs = kVecs == 0 ? 1 : kVecs;
  Vec acc[kRows][kAccs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kAccs; ++c) acc[r][c] = load(o + r * o_stride + d + c * kLanes);
  }
  for (int j = 0; j < kValueKeys<T>; ++j) {
    Vec value[kAccs];
    load_columns<T, kVecs>(element_at(v[j] + offset, d), value);
    prefetch_piece(ahead, j, d, kAccs * kLanes);
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
MIXATTN_INLINE void value_block(const float* weights, const T* const* v, int64_t offset, int64_t v_head_dim, float* o,
                                int64_t o_stride, const Ahead<T>& ahead) {
  constexpr int kVecs = kValueVecs<kRows>;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= v_head_dim; d += kVecs * kLanes) {
    value_columns<T, kRows, kVecs>(weights, v, offset, d, o, o_stride, ahead);
  }
  if constexpr (kVecs > 2) {
    for (; d + 2 * kLanes <= v_head_dim; d += 2 * kLanes)
      value_columns<T, kRows, 2>(weights, v, offset, d, o, o_stride, ahead);
  }
  if (d + kLanes <= v_head_dim) {
    value_columns<T, kRows, 1>(weights, v, offset, d, o, o_stride, ahead);
    d += kLanes;
  }
  if constexpr (kLanes > 8) {
    if (d < v_head_dim) value_columns<T, kRows, 0>(weights, v, offset, d, o, o_stride, ahead);
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

// The scores of a block's row r times factors[r].
template <int kRows>
MIXATTN_INLINE void scale_rows(float* scores, const float* factors, int64_t num_keys) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = factors[i % kRows];
  const Vec factor = load(lanes);
  for (int64_t i = 0; i < num_keys * kRows; i += kLanes) store(scores + i, mul(load(scores + i), factor));
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

// How o += P V is computed for keys as Dot has them: what is made of a tile's weights, which lie key by key at
// `weights` with room for kDirectKeys, the sum over the block of keys from j on, and the way back from the order in
// which o has the dimensions then.
template <class Dot>
struct DirectValues {  // float32, from any type
  typedef typename Dot::Key T;
  template <int kRows>
  MIXATTN_INLINE void finish_weights(float*, int64_t) {}
  template <int kRows>
  MIXATTN_INLINE void add_block(const float* weights, int64_t j, const T* const* v, int64_t offset, int64_t v_head_dim,
                                float* o, int64_t o_stride, const Ahead<T>& ahead) {
    value_block<T, kRows>(weights + j * kRows, v + j, offset, v_head_dim, o, o_stride, ahead);
  }
  MIXATTN_INLINE void restore(Vec* a, Vec* b) { restore_pair(static_cast<const T*>(nullptr), a, b); }
};

#if defined(MIXATTN_HAS_PAIRED_ROWS)
// As value_columns by pairs of keys, whose weights and elements have 16 bits: words of a pair's weights, key pair by
// key pair, and dimensions in the order of zip_rows. units: what a row's sums are multiplied with; nullptr: nothing.
template <class Dot, int kRows, int kVecs>
MIXATTN_INLINE void pair_columns(const float* weights, const float* units, const typename Dot::Key* const* v,
                                 int64_t offset, int64_t d, float* o, int64_t o_stride,
                                 const Ahead<typename Dot::Key>& ahead) {
  typename Dot::Sum sums[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVecs; ++c) sums[r][c] = Dot::start_sum();
  }
  for (int j = 0; j < kValueKeys<typename Dot::Key>; j += 2) {
    IntVec pairs[kVecs];
    for (int c = 0; c < kVecs; c += 2) {
      const int64_t at = offset + d + c * kLanes;
      zip_rows(Dot::load_key(v[j] + at), Dot::load_key(v[j + 1] + at), &pairs[c], &pairs[c + 1]);
    }
    prefetch_piece(ahead, j, d, kVecs * kLanes);
    prefetch_piece(ahead, j + 1, d, kVecs * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const SharedWord weight = load_shared_word(weights + j / 2 * kRows + r);
      for (int c = 0; c < kVecs; ++c) sums[r][c] = Dot::add_product(sums[r][c], weight, pairs[c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Vec unit = broadcast(units == nullptr ? 1.0f : units[r]);
    for (int c = 0; c < kVecs; ++c) {
      float* const target = o + r * o_stride + d + c * kLanes;
      const Vec sum = Dot::to_vec(sums[r][c]);
      store(target, units == nullptr ? add(sum, load(target)) : fmadd(sum, unit, load(target)));
    }
  }
}

template <class Dot, int kRows>
MIXATTN_INLINE void pair_block(const float* weights, const float* units, const typename Dot::Key* const* v,
                               int64_t offset, int64_t v_head_dim, float* o, int64_t o_stride,
                               const Ahead<typename Dot::Key>& ahead) {
  constexpr int kVecs = kValueVecs<kRows> * (kValueKeys<typename Dot::Key> / kBlockKeys);
  int64_t d = 0;
  for (; d + kVecs * kLanes <= v_head_dim; d += kVecs * kLanes) {
    pair_columns<Dot, kRows, kVecs>(weights, units, v, offset, d, o, o_stride, ahead);
  }
  for (; d < v_head_dim; d += 2 * kLanes) {  // pair dots take multiples of that only
    pair_columns<Dot, kRows, 2>(weights, units, v, offset, d, o, o_stride, ahead);
  }
}

// Word (j / 2) kRows + r becomes to_word of weights[j kRows + r], j even, and of the next key's.
template <int kRows, typename ToWord>
MIXATTN_INLINE void pair_weights(float* weights, int64_t num_keys, const ToWord& to_word) {
  // With 16 or 48 weights of one row, what lies behind them makes words that are not read.
  for (int64_t i = 0; i < num_keys * kRows; i += 2 * kLanes) {
    store_words(weights + i / 2, to_word(load(weights + i), load(weights + i + kLanes)));
  }
}

#if defined(MIXATTN_HAS_INT16_DOT)
template <>
struct DirectValues<Int8Dot> {  // int16 weights, each row's in a unit of its own
  template <int kRows>
  MIXATTN_INLINE void finish_weights(float* weights, int64_t num_keys) {
    Vec largest = zero(), sum = zero();  // of magnitudes: scales may be negative
    for (int64_t i = 0; i < num_keys * kRows; i += kLanes) {
      const Vec magnitude = abs(load(weights + i));
      largest = max(largest, magnitude);
      sum = add(sum, magnitude);
    }
    float most_lanes[kLanes], sum_lanes[kLanes], inverse[kLanes], units[kRows];
    store(most_lanes, largest);
    store(sum_lanes, sum);
    for (int r = 0; r < kRows; ++r) {
      float most = 0.0f, total = 0.0f;
      for (int i = r; i < kLanes; i += kRows) {
        most = most_lanes[i] > most ? most_lanes[i] : most;
        total += sum_lanes[i];
      }
      // Of NaN there are no integers, but a maximum may pass it over: the sum does not, and the unit brings it out.
      units[r] = !(total < INFINITY) ? NAN : (most > 0.0f ? most / 32767.0f : 1.0f);
      for (int i = r; i < kLanes; i += kRows) inverse[i] = 1.0f / units[r];
    }
    const Vec factor = load(inverse);
    pair_weights<kRows>(weights, num_keys, [&](Vec first, Vec second) {
      return int16_pairs<kRows>(mul(first, factor), mul(second, factor));
    });
    memcpy(weights + kUnits * kRows, units, sizeof(units));
  }
  template <int kRows>
  MIXATTN_INLINE void add_block(const float* weights, int64_t j, const Int8* const* v, int64_t offset,
                                int64_t v_head_dim, float* o, int64_t o_stride, const Ahead<Int8>& ahead) {
    pair_block<Int8Dot, kRows>(weights + j / 2 * kRows, weights + kUnits * kRows, v + j, offset, v_head_dim, o,
                               o_stride, ahead);
  }
  MIXATTN_INLINE void restore(Vec* a, Vec* b) { restore_zipped(a, b); }

 private:
  static constexpr int kUnits = kDirectKeys - 1;  // the rows' units lie behind the words, half as many as weights
};
#endif
#endif

#if defined(MIXATTN_HAS_BFLOAT16_DOT)
template <>
struct DirectValues<BFloat16Dot> {  // bfloat16 weights
  template <int kRows>
  MIXATTN_INLINE void finish_weights(float* weights, int64_t num_keys) {
    pair_weights<kRows>(weights, num_keys, bfloat16_pairs<kRows>);
  }
  template <int kRows>
  MIXATTN_INLINE void add_block(const float* weights, int64_t j, const BFloat16* const* v, int64_t offset,
                                int64_t v_head_dim, float* o, int64_t o_stride, const Ahead<BFloat16>& ahead) {
    pair_block<BFloat16Dot, kRows>(weights + j / 2 * kRows, nullptr, v + j, offset, v_head_dim, o, o_stride, ahead);
  }
  MIXATTN_INLINE void restore(Vec* a, Vec* b) { restore_zipped(a, b); }
};
#endif

template <class Dot>
MIXATTN_INLINE void restore_order(const Rows& rows, int64_t v_head_dim) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    float* o = rows.o + r * rows.o_stride;
    for (int64_t d = 0; d + 2 * kLanes <= v_head_dim; d += 2 * kLanes) {
      Vec a = load(o + d), b = load(o + d + kLanes);
      DirectValues<Dot>::restore(&a, &b);
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

// Items that differ in their kv head only, side by side: block by block of keys, and in a block head by head, because
// the heads of a token lie next to each other. One head after the other would walk over memory in small pieces, each in
// another page of the system, once per head: that halves the bandwidth (README.md). kRows rows share each load of K and
// V; further rows find them in L1.
template <class Dot, int kRows>
void attend_direct(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  typedef typename Dot::Key T;
  typedef DirectValues<Dot> Values;
  const WorkItem& head0 = items[0];
  const int64_t item_rows = num_rows(head0);
  const int64_t padded_rows = round_up(item_rows, kRows);
  Rows rows[kMaxBundle];
  float factors[kMaxBundle][kDirectRows];
  for (int64_t n = 0; n < num_items; ++n, scratch += rows_floats(item_rows, head_dims(p))) {
    rows[n] = carve_rows(item_rows, head_dims(p), scratch);
    start_rows<T>(p, items[n], padded_rows, &rows[n]);
    for (int64_t r = 0; r < padded_rows; ++r) {
      float* const q = rows[n].q + r * rows[n].q_stride;
      factors[n][r] = r < item_rows ? Dot::start(p, items[n], r, q) : 1.0f;
    }
  }
  float* const scores = scratch;  // (num_items, padded_rows, kDirectKeys)
  float scales[kDirectKeys];      // of one head's keys

  struct Distance {  // in blocks
    int64_t near, far;
  };
  const auto distance = [](int64_t block_bytes) {
    return Distance{(kNearBytes + block_bytes - 1) / block_bytes, (kFarBytes + block_bytes - 1) / block_bytes};
  };
  const Distance k_distance = distance(kBlockKeys * row_bytes<T>(p.head_dim));
  const Distance v_distance = distance(kValueKeys<T> * row_bytes<T>(p.v_head_dim));
  struct Operand {
    const T* const* rows;
    int64_t num_keys;
    int64_t head_stride;
  };
  // What is read so many blocks after block j of head n: of these rows, or of those that are read when they are done.
  const auto after = [&](int64_t blocks, int block_keys, const Operand& now, const Operand& then, int64_t j,
                         int64_t n) {
    const int64_t key = j + (n + blocks) / num_items * block_keys, head = (n + blocks) % num_items;
    if (key < now.num_keys) return BlockRows<T>{now.rows + key, head * now.head_stride};
    const int64_t then_key = clamp(key - now.num_keys, 0, then.num_keys - block_keys);
    return BlockRows<T>{then.rows + then_key, head * then.head_stride};
  };
  const auto ahead_of = [&](Distance blocks, int block_keys, const Operand& now, const Operand& then, int64_t j,
                            int64_t n) {
    return Ahead<T>{after(blocks.near, block_keys, now, then, j, n), after(blocks.far, block_keys, now, then, j, n)};
  };

  KeyRows<T> tiles[2];
  const int64_t kv_end = rows[0].kv_end;
  int64_t num_keys = clamp(kv_end - head0.kv_begin, 0, kDirectKeys);
  int now = 0;
  if (num_keys > 0) locate_tile(p, head0, rows[0], head0.kv_begin, num_keys, kPaddedKeys, tiles[now].k, tiles[now].v);
  // Nothing has sent for the first keys yet.
  const int64_t first_keys = clamp(k_distance.far * kBlockKeys / num_items, 0, num_keys);
  for (int64_t j = 0; j < first_keys; ++j) {
    for (int64_t n = 0; n < num_items; ++n) {
      const char* row = reinterpret_cast<const char*>(element_at(tiles[now].k[j], n * p.k_head_stride));
      for (int64_t b = 0; b < row_bytes<T>(p.head_dim); b += 64) prefetch_far(row + b);
    }
  }
  for (int64_t first = head0.kv_begin; first < kv_end; first += kDirectKeys, now ^= 1) {
    const KeyRows<T>& keys = tiles[now];
    const int64_t padded_keys = round_up(num_keys, kPaddedKeys);
    const int64_t num_next = clamp(kv_end - first - kDirectKeys, 0, kDirectKeys);
    KeyRows<T>& next = tiles[now ^ 1];
    if (num_next > 0) locate_tile(p, head0, rows[0], first + kDirectKeys, num_next, kPaddedKeys, next.k, next.v);
    prefetch_scales(p, p.k_scale, head0, first + kDirectKeys, num_next);
    prefetch_scales(p, p.v_scale, head0, first + kDirectKeys, num_next);
    const Operand k_now{keys.k, padded_keys, p.k_head_stride}, v_now{keys.v, padded_keys, p.v_head_stride};
    const Operand k_next = num_next > 0 ? Operand{next.k, round_up(num_next, kPaddedKeys), p.k_head_stride} : v_now;

    for (int64_t j = 0; j < padded_keys; j += kBlockKeys) {
      for (int64_t n = 0; n < num_items; ++n) {
        // Always this head's block that comes next: K is read before V, and V before the next tile's K.
        const Ahead<T> ahead = ahead_of(k_distance, kBlockKeys, k_now, v_now, j, n);
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          score_block<Dot, kRows>(rows[n].q + r * rows[n].q_stride, rows[n].q_stride, keys.k + j, n * p.k_head_stride,
                                  p.head_dim, ahead, scores + (n * padded_rows + r) * kDirectKeys + j * kRows);
        }
      }
    }
    for (int64_t n = 0; n < num_items; ++n) {
      float* const head_scores = scores + n * padded_rows * kDirectKeys;
      if (Dot::kHasFactor) {
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          scale_rows<kRows>(head_scores + r * kDirectKeys, factors[n] + r, padded_keys);
        }
      }
      if (p.k_scale.is_per_token) {
        gather_tile_scales(p, p.k_scale, items[n], rows[n], first, num_keys, kPaddedKeys, scales);
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
        gather_tile_scales(p, p.v_scale, items[n], rows[n], first, num_keys, kPaddedKeys, scales);
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          scale_block<kRows>(head_scores + r * kDirectKeys, scales, padded_keys);
        }
      }
      for (int64_t r = 0; r < padded_rows; r += kRows) {
        Values::template finish_weights<kRows>(head_scores + r * kDirectKeys, padded_keys);
      }
    }
    for (int64_t j = 0; j < padded_keys; j += kValueKeys<T>) {
      for (int64_t n = 0; n < num_items; ++n) {
        const Ahead<T> ahead = ahead_of(v_distance, kValueKeys<T>, v_now, k_next, j, n);
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          Values::template add_block<kRows>(scores + (n * padded_rows + r) * kDirectKeys, j, keys.v,
                                            n * p.v_head_stride, p.v_head_dim, rows[n].o + r * rows[n].o_stride,
                                            rows[n].o_stride, ahead);
        }
      }
    }
    num_keys = num_next;
  }
  for (int64_t n = 0; n < num_items; ++n) {
    restore_order<Dot>(rows[n], p.v_head_dim);
    finish_rows<T>(p, items[n], rows[n]);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
