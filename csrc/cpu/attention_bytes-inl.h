// attention_bytes-inl.h: items over int8 K and V where the CPU multiplies four bytes in one instruction: of few rows,
// as attention_direct-inl.h, and of many, as attention_packed-inl.h. Formulas and sources are in mixed_attention-inl.h.
// Math    A row of q becomes round(q 127 / max |q|), off by at most 2^-8 of the row's largest element, as K's elements
//         are of theirs; a row's weights of a tile, times their keys' scales, likewise (but not for their sum). K and V
//         become k + 128 and v + 128, unsigned as the instruction wants one side, and 128 times the other side's sum is
//         taken off again. Sums of products are exact, in int32
// Method  Few rows: tile by tile of kDirectKeys keys, and in a tile head by head: scores, softmax, P V, while the next
//         head's rows are prefetched line by line. Scores have keys in their lanes: the words of 4 keys, of 4 elements
//         each, are transposed within quarters of a register, so that lane 4 c + i has key i's word of quarter c, whose
//         sums over c come last; q lies in memory as those lanes want it. P V goes by 4 keys, whose bytes are zipped to
//         words. Many rows: words of 4 elements of K, or of 4 keys of V, stand where attention_packed-inl.h has float32
// Limits  calls that allow it (rounds_q); head_dim and v_head_dim multiples of 64; few rows are 2 or more, over keys
//         that lie close together (takes_few_rows)
#pragma once

#include "cpu/attention_direct-inl.h"
#include "cpu/attention_packed-inl.h"

#if defined(MIXATTN_HAS_BYTE_ROWS)

namespace mixattn {
namespace cpu {
namespace {

constexpr float kMostByte = 127.0f;
constexpr int kByteDims = 4 * kLanes;  // elements of a vector of bytes
constexpr int kGroupKeys = 4;          // keys that are transposed, or zipped, together
// Bytes from one key of a head to the next, at most: what lies further apart comes from memory no faster than
// attend_direct walks over it, several heads at a time (README.md).
constexpr int64_t kMostStride = 512;

struct ByteDot {
  typedef Int8 Key;
  static bool takes(const AttentionParams& p) {
    return p.rounds_q && p.head_dim % kByteDims == 0 && p.v_head_dim % kByteDims == 0;
  }
  static bool takes_few_rows(const AttentionParams& p, int64_t num_rows) {
    const bool is_dense = p.k_token_stride <= kMostStride && p.v_token_stride <= kMostStride;
    return takes(p) && is_dense && num_rows > 1 && num_rows <= kDirectRows && !p.invariant;
  }
};

// x becomes bytes of a unit of its own, which is returned: NaN if an infinity or NaN is among x, for which no integer
// stands. num_elements is a multiple of kLanes.
MIXATTN_INLINE float round_to_bytes(const float* x, int64_t num_elements, int8_t* bytes, int32_t* sum) {
  Vec largest = zero();
  bool is_finite = true;
  for (int64_t i = 0; i < num_elements; i += kLanes) {
    largest = max(largest, abs(load(x + i)));
    is_finite &= has_only_finite(load(x + i));
  }
  const float largest_unit = max_lanes(largest) / kMostByte;
  const float unit = largest_unit > kMinRowScale ? largest_unit : 1.0f;  // else 1 / unit might be infinite
  const Vec inverse = broadcast(1.0f / unit);
  IntVec total = broadcast_word(0);
  for (int64_t i = 0; i < num_elements; i += kLanes) {
    const IntVec integers = round_to_int(mul(load(x + i), inverse));
    total = add_words(total, integers);
    store_low_bytes(bytes + i, integers);
  }
  *sum = sum_words(total);
  return is_finite ? unit : NAN;
}

// ---- few rows -------------------------------------------------------------------------------------------------------

// A row of q as bytes: what they are in units of, and what each lane's sum of products with k + 128 starts at. Four
// lanes make a score.
struct ByteRow {
  float unit;
  int32_t first_sum;
};

// A row's weights of a tile as bytes, in place of the floats.
struct ByteWeights {
  int8_t values[kDirectKeys];
  float unit;
  int32_t first_sum;
};
static_assert(sizeof(ByteWeights) <= sizeof(float) * kDirectKeys, "it takes a row of scores");

// The lines of a head's K and then V rows of a tile, to be prefetched a few at a time: many in a row would fill the
// core's miss buffers.
struct LinesAhead {
  struct Operand {
    const Int8* const* row;
    const Int8* const* end;
    int64_t offset, head_dim;
  };
  Operand now, then;
  int64_t d;
};

MIXATTN_INLINE void prefetch_lines(LinesAhead* a, int num_lines) {
  for (; num_lines > 0; --num_lines) {
    if (a->now.row == a->now.end) {
      if (a->then.row == a->then.end) return;
      a->now = a->then;
      a->then.row = a->then.end;
    }
    prefetch_far(*a->now.row + a->now.offset + a->d);
    a->d += kByteDims;
    if (a->d < a->now.head_dim) continue;
    a->d = 0;
    ++a->now.row;
  }
}

// A row of q becomes vectors of 16 words, as many bytes as it has as float32: of chunk c of kByteDims elements vector
// (c, j) has, 4 times each, the words j, 4 + j, 8 + j and 12 + j.
ByteRow start_byte_row(float* q, int64_t head_dim) {
  int8_t bytes[kMaxHeadDim];
  int32_t sum;
  const float unit = round_to_bytes(q, head_dim, bytes, &sum);
  char* target = reinterpret_cast<char*>(q);
  for (int64_t c = 0; c < head_dim; c += kByteDims) {
    for (int j = 0; j < kGroupKeys; ++j) {
      for (int i = 0; i < kLanes; ++i, target += 4) {
        memcpy(target, bytes + c + 4 * (i / kGroupKeys * kGroupKeys + j), 4);
      }
    }
  }
  return {unit, -128 / 4 * sum};
}

// scores[r * kDirectKeys + i] = q[r] . k[i][offset...] for 2 kGroupKeys keys, in units of the rows'.
template <int kRows>
MIXATTN_INLINE void score_bytes(const Rows& rows, int64_t first_row, const ByteRow* byte_rows, const Int8* const* k,
                                int64_t offset, int64_t head_dim, LinesAhead* ahead, float* scores) {
  const float* const q = rows.q + first_row * rows.q_stride;
  IntVec sums[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = broadcast_word(byte_rows[r].first_sum);
  for (int64_t d = 0; d < head_dim; d += kByteDims) {
    IntVec keys[2][kGroupKeys];
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroupKeys; ++i) {
        keys[g][i] = flip_signs(load_words(k[g * kGroupKeys + i] + offset + d));
      }
      transpose_quarters(keys[g]);
    }
    prefetch_lines(ahead, kGroupKeys);
#pragma GCC unroll 4
    for (int j = 0; j < kGroupKeys; ++j) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const IntVec query = load_words(q + r * rows.q_stride + d + j * kLanes);
        sums[r][0] = add_byte_products(sums[r][0], keys[0][j], query);
        sums[r][1] = add_byte_products(sums[r][1], keys[1][j], query);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store_quarter_sums(scores + r * kDirectKeys, sums[r][0], sums[r][1]);
}

// o[r][0, kByteDims) += P V of num_keys keys, dimensions in the order of zip_bytes.
template <int kRows>
MIXATTN_INLINE void add_byte_values(const float* weights, int64_t num_keys, const Int8* const* v, int64_t offset,
                                    float* o, int64_t o_stride, LinesAhead* ahead) {
  const ByteWeights* rows[kRows];
  IntVec sums[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    rows[r] = reinterpret_cast<const ByteWeights*>(weights + r * kDirectKeys);
    sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = broadcast_word(rows[r]->first_sum);
  }
  for (int64_t j = 0; j < num_keys; j += kGroupKeys) {
    IntVec words[kGroupKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kGroupKeys; ++i) words[i] = flip_signs(load_words(v[j + i] + offset));
    prefetch_lines(ahead, kGroupKeys);
    zip_bytes(words);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const IntVec weight = load_shared_word(&rows[r]->values[j]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = add_byte_products(sums[r][c], words[c], weight);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vec unit = broadcast(rows[r]->unit);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      float* const target = o + r * o_stride + c * kLanes;
      store(target, fmadd(int_to_float(sums[r][c]), unit, load(target)));
    }
  }
}

// As attend_direct.
template <int kRows>
void attend_bytes(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  const WorkItem& head0 = items[0];
  const int64_t item_rows = num_rows(head0);
  const int64_t padded_rows = round_up(item_rows, kRows);
  Rows rows[kMaxBundle];
  ByteRow byte_rows[kMaxBundle][kDirectRows];
  for (int64_t n = 0; n < num_items; ++n, scratch += rows_floats(item_rows, head_dims(p))) {
    rows[n] = carve_rows(item_rows, head_dims(p), scratch);
    start_rows<Int8>(p, items[n], padded_rows, &rows[n]);
    for (int64_t r = 0; r < padded_rows; ++r) {
      byte_rows[n][r] = start_byte_row(rows[n].q + r * rows[n].q_stride, p.head_dim);
    }
  }
  float* const scores = scratch;  // (padded_rows, kDirectKeys), of one head
  float scales[kDirectKeys];      // of its keys

  KeyRows<Int8> tiles[2];
  const int64_t kv_end = rows[0].kv_end;
  const auto locate = [&](int64_t first, KeyRows<Int8>* tile) {
    const int64_t num_keys = clamp(kv_end - first, 0, kDirectKeys);
    if (num_keys > 0) locate_tile(p, head0, rows[0], first, num_keys, kPaddedKeys, tile->k, tile->v);
    prefetch_scales(p, p.k_scale, head0, first, num_keys);
    prefetch_scales(p, p.v_scale, head0, first, num_keys);
    return num_keys;
  };
  const auto lines_of = [&](const KeyRows<Int8>& tile, int64_t num_keys, int64_t n) {
    return LinesAhead{{tile.k, tile.k + num_keys, n * p.k_head_stride, p.head_dim},
                      {tile.v, tile.v + num_keys, n * p.v_head_stride, p.v_head_dim},
                      0};
  };
  int64_t num_keys = locate(head0.kv_begin, &tiles[0]);
  LinesAhead ahead = lines_of(tiles[0], num_keys, 0);
  prefetch_lines(&ahead, INT32_MAX);  // nothing has sent for them yet
  int now = 0;
  for (int64_t first = head0.kv_begin; first < kv_end; first += kDirectKeys, now ^= 1) {
    const KeyRows<Int8>& keys = tiles[now];
    const KeyRows<Int8>& next = tiles[now ^ 1];
    const int64_t padded_keys = round_up(num_keys, kPaddedKeys);
    const int64_t num_next = locate(first + kDirectKeys, &tiles[now ^ 1]);
    for (int64_t n = 0; n < num_items; ++n) {
      const Rows& head = rows[n];
      ahead = n + 1 < num_items ? lines_of(keys, num_keys, n + 1) : lines_of(next, num_next, 0);
      for (int64_t j = 0; j < padded_keys; j += 2 * kGroupKeys) {
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          score_bytes<kRows>(head, r, &byte_rows[n][r], keys.k + j, n * p.k_head_stride, p.head_dim, &ahead,
                             scores + r * kDirectKeys + j);
        }
      }
      if (p.k_scale.is_per_token) {
        gather_tile_scales(p, p.k_scale, items[n], head, first, num_keys, kPaddedKeys, scales);
      }
      for (int64_t r = 0; r < padded_rows; ++r) {
        float* const row = scores + r * kDirectKeys;
        prefetch_lines(&ahead, 5 * kGroupKeys);
        const Vec unit = broadcast(byte_rows[n][r].unit);
        for (int64_t i = 0; i < padded_keys; i += kLanes) {
          const Vec scale = p.k_scale.is_per_token ? mul(unit, load(scales + i)) : unit;
          store(row + i, mul(load(row + i), scale));
        }
        if (p.soft_cap > 0) cap_scores(row, padded_keys, p.soft_cap);
        if (p.alibi_slopes != nullptr) add_alibi<1>(row, first, padded_keys, head, r);
        if (r >= item_rows) continue;
        const int64_t lo = head.lo[r] - first, hi = clamp(head.hi[r] - first, 0, num_keys);
        if (lo > 0 || hi < padded_keys) mask_scores(row, 1, padded_keys, lo, hi);
        if (head.hidden_begin < first + num_keys) hide_scores(row, 1, first, num_keys, head, r);
      }
      if (p.v_scale.is_per_token) {
        gather_tile_scales(p, p.v_scale, items[n], head, first, num_keys, kPaddedKeys, scales);
      }
      for (int64_t r = 0; r < padded_rows; ++r) {
        float* const row = scores + r * kDirectKeys;
        softmax_step(row, padded_keys, &head.m[r], &head.l[r], head.o + r * head.o_stride, head.o_stride);
        if (p.v_scale.is_per_token) scale_scores(row, scales, padded_keys);
        ByteWeights weights;
        int32_t sum;
        weights.unit = round_to_bytes(row, padded_keys, weights.values, &sum);
        weights.first_sum = -128 * sum;
        memcpy(row, &weights, sizeof(weights));
      }
      for (int64_t d = 0; d < p.v_head_dim; d += kByteDims) {
        for (int64_t r = 0; r < padded_rows; r += kRows) {
          add_byte_values<kRows>(scores + r * kDirectKeys, padded_keys, keys.v, n * p.v_head_stride + d,
                                 head.o + r * head.o_stride + d, head.o_stride, &ahead);
        }
      }
      prefetch_lines(&ahead, INT32_MAX);
    }
    num_keys = num_next;
  }
  for (int64_t n = 0; n < num_items; ++n) {
    for (int64_t r = 0; r < item_rows; ++r) {
      for (int64_t d = 0; d < p.v_head_dim; d += kByteDims) {
        float* const o = rows[n].o + r * rows[n].o_stride + d;
        Vec x[4] = {load(o), load(o + kLanes), load(o + 2 * kLanes), load(o + 3 * kLanes)};
        restore_zipped_bytes(x);
        for (int i = 0; i < 4; ++i) store(o + i * kLanes, x[i]);
      }
    }
    finish_rows<Int8>(p, items[n], rows[n]);
  }
}

// ---- many rows ------------------------------------------------------------------------------------------------------

// Of a row of q, or of weights: words of 4 bytes in place of the floats, and behind them a ByteRow.
MIXATTN_INLINE void round_in_place(float* x, int64_t num_elements) {
  int8_t bytes[kMaxHeadDim];
  static_assert(kMaxHeadDim >= kPackedKeys, "keys, or dimensions");
  int32_t sum;
  const float unit = round_to_bytes(x, num_elements, bytes, &sum);
  const ByteRow row{unit, -128 * sum};
  memcpy(x, bytes, static_cast<size_t>(num_elements));
  memcpy(x + num_elements / 4, &row, sizeof(row));
}

// Those rows, beside columns of unsigned bytes.
struct ByteWords {
  MIXATTN_INLINE int32_t first_sum(const float* unit) {
    ByteRow row;
    memcpy(&row, unit, sizeof(row));
    return row.first_sum;
  }
  MIXATTN_INLINE IntVec add(IntVec sum, IntVec column, SharedWord x) { return add_byte_products(sum, column, x); }
};

template <>
struct PackedScores<ByteDot> {
  typedef Int8 Key;
  static constexpr int kPerWord = 4;
  static void start(const AttentionParams& p, const WorkItem&, Rows* rows) {
    for (int64_t r = 0; r < rows->num_rows; ++r) round_in_place(rows->q + r * rows->q_stride, p.head_dim);
  }
  static void pack(const Int8* const* k, int64_t num_panels, int64_t head_dim, float* k_packed) {
    pack_keys(reinterpret_cast<const float* const*>(k), num_panels, head_dim / 4, k_packed);
    for (int64_t i = 0; i < num_panels * kTileCols * head_dim / 4; i += kLanes) {
      store_words(k_packed + i, flip_signs(load_words(k_packed + i)));
    }
  }
  MIXATTN_INLINE void multiply(int n, const Rows& rows, int64_t r, const float* panel, int64_t head_dim, float* scores,
                               int64_t stride) {
    integer_tile_function<ByteWords, false>(n)(rows.q + r * rows.q_stride, rows.q_stride, panel, head_dim / 4, scores,
                                               stride);
  }
};

template <>
struct PackedValues<ByteDot> {
  typedef Int8 Key;
  static constexpr int kPerWord = 4;
  MIXATTN_INLINE void finish_weights(float* weights, int64_t num_keys) { round_in_place(weights, num_keys); }
  template <int kVecs>
  MIXATTN_INLINE void store_weights(const Vec (&x)[kVecs], float* weights) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) store(weights + i * kLanes, x[i]);
    finish_weights(weights, kVecs * kLanes);
  }
  static void pack(const Int8* const* v, int64_t num_keys, int64_t v_head_dim, int64_t key_tile, float* v_packed) {
    for (int64_t group = 0; group < num_keys / kGroupKeys; ++group) {
      for (int64_t d = 0; d < v_head_dim; d += kByteDims) {
        IntVec words[kGroupKeys];
        for (int i = 0; i < kGroupKeys; ++i) words[i] = flip_signs(load_words(v[group * kGroupKeys + i] + d));
        zip_bytes(words);
        Vec x[4] = {as_floats(words[0]), as_floats(words[1]), as_floats(words[2]), as_floats(words[3])};
        restore_zipped_bytes(x);
        for (int i = 0; i < 4; ++i) {  // kTileVecs of them to a panel
          const int64_t panel = d + i / kTileVecs * kTileCols;
          store(v_packed + panel * key_tile / 4 + group * kTileCols + i % kTileVecs * kLanes, x[i]);
        }
      }
    }
  }
  MIXATTN_INLINE void multiply(int n, bool, const float* weights, int64_t weights_stride, const float* panel,
                               int64_t num_keys, float* o, int64_t o_stride) {
    integer_tile_function<ByteWords, true>(n)(weights, weights_stride, panel, num_keys / 4, o, o_stride);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace mixattn

#endif
