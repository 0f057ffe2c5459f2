// attention_tiles-inl.h: items of many rows by the tiles of AMX, for every type of K and V.
// Math    as attention_packed-inl.h, with products of bfloat16 parts (bfloat16_parts-inl.h): K and V are one part
//         (bfloat16, int8, float8, int4: exact), two (float16) or three (float32); q is three, float32's precision, but
//         one beside bfloat16 and two beside int8 if it is bfloat16 or may be rounded. Weights have as many parts as q.
//         The scale goes to scores that q of one part made
// Method  Tiles of kTileKeys keys are packed into tiles in L2. Row tiles of 32 rows go through three stages: scores,
//         softmax, P V. While vectors are at the softmax of one row tile, the tile unit is at the scores of the next
//         one and at P V of the last one: a step of its products stands before each row of softmax, because the core
//         looks some hundred instructions ahead, and a product takes 16 clocks
// Shapes  head_dim and v_head_dim multiples of 32
// Limits  as attention_packed-inl.h
// Twins   as mixed_attention-inl.h
// Source  tiles: amx_tile-inl.h; softmax beside products of other rows: FlashAttention-3, arXiv:2407.08608
#pragma once

#include "cpu/attention_packed-inl.h"
#include "cpu/bfloat16_parts-inl.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int64_t kTileKeys = kPackedKeys;
constexpr int64_t kKeyPanels = kTileKeys / kTileCols;
constexpr int64_t kRowTile = 2 * kAmxRows;
constexpr int64_t kStepDepth = 2 * kLanes;  // elements that a tile is deep
constexpr int kStages = 3;                  // row tiles whose scores or weights are held

template <typename T>
constexpr int kKeyParts = 1;
template <>
constexpr int kKeyParts<float> = 3;
template <>
constexpr int kKeyParts<Float16> = 2;

MIXATTN_INLINE bool has_tile_dims(HeadDims dims) {
  return dims.k % kStepDepth == 0 && dims.v % kStepDepth == 0;
}

// Where an item's arrays lie behind those of Rows, in words; tiles of K and V are (panel, step, part, half) tiles.
struct TileScratch {
  int64_t q, scores, weights, k, v, end;
};

MIXATTN_INLINE TileScratch tile_scratch(int64_t max_rows, HeadDims dims) {
  TileScratch at;
  at.q = rows_floats(max_rows, dims);
  at.scores = at.q + round_up(max_rows, kAmxRows) * kMaxParts * dims.k / 2;
  at.weights = at.scores + kStages * kRowTile * kTileKeys;
  at.k = at.weights + kStages * kRowTile * kMaxParts * kTileKeys / 2;
  at.v = at.k + kMaxParts * kTileKeys * dims.k / 2;
  at.end = at.v + kMaxParts * kTileKeys * dims.v / 2;
  return at;
}

// c (up to 32 rows, kTileCols) = or += a b, a step at a time.
struct TileProduct {
  const uint32_t* a;  // rows a_stride words apart, their parts a_part words, steps a tile's width
  int64_t a_stride, a_part;
  const uint32_t* b;
  float* c;
  int64_t c_stride;
  int64_t num_steps;
  bool is_added, is_tall;  // more than 16 rows
};

// Products that are worked off one after the other.
template <int kParts, int kWeightParts>
class ProductQueue {
 public:
  void push(const TileProduct& product) {
    products_[size_++] = product;
    steps_left_ += product.num_steps;
  }
  int64_t steps_left() const { return steps_left_; }

  void step() {
    const TileProduct& p = products_[first_];
    const int64_t c_bytes = p.c_stride * static_cast<int64_t>(sizeof(float));
    const int64_t a_bytes = p.a_stride * static_cast<int64_t>(sizeof(uint32_t));
    float* const c_low = p.c + kAmxRows * p.c_stride;
    if (step_ == 0) start(p, c_low, c_bytes);
    const uint32_t* const a = p.a + step_ * kLanes;
    const uint32_t* const a_low = a + kAmxRows * p.a_stride;
#pragma GCC unroll 3
    for (int i = kWeightParts - 1; i >= 0; --i) {
      const uint32_t* const b = p.b + (step_ * kWeightParts + i) * kTileVecs * kTileWords;
      load_tile<4>(b, kAmxBytes);
      load_tile<5>(b + kTileWords, kAmxBytes);
#pragma GCC unroll 3
      for (int k = kParts - 1; k >= 0; --k) {
        if (i + k >= kMaxParts) continue;
        load_tile<6>(a + k * p.a_part, a_bytes);
        add_bfloat16_tile<0, 6, 4>();
        add_bfloat16_tile<1, 6, 5>();
        if (p.is_tall) {
          load_tile<7>(a_low + k * p.a_part, a_bytes);
          add_bfloat16_tile<2, 7, 4>();
          add_bfloat16_tile<3, 7, 5>();
        }
      }
    }
    --steps_left_;
    if (++step_ < p.num_steps) return;
    step_ = 0;
    store_tile<0>(p.c, c_bytes);
    store_tile<1>(p.c + kLanes, c_bytes);
    if (p.is_tall) {
      store_tile<2>(c_low, c_bytes);
      store_tile<3>(c_low + kLanes, c_bytes);
    }
    if (++first_ == size_) first_ = size_ = 0;
  }

 private:
  MIXATTN_INLINE void start(const TileProduct& p, const float* c_low, int64_t c_bytes) {
    finish_stores();
    if (!p.is_added) {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
      return;
    }
    load_tile<0>(p.c, c_bytes);
    load_tile<1>(p.c + kLanes, c_bytes);
    if (!p.is_tall) return;
    load_tile<2>(c_low, c_bytes);
    load_tile<3>(c_low + kLanes, c_bytes);
  }

  TileProduct products_[kKeyPanels + kMaxHeadDim / kTileCols];
  int64_t size_ = 0, first_ = 0, step_ = 0, steps_left_ = 0;
};

// Tiles of K: words of two dimensions of a key, rows of 16 keys; panels of 32 keys.
template <typename T>
void pack_key_tiles(const T* const* k, int64_t num_panels, int64_t head_dim, uint32_t* tiles) {
  constexpr int kParts = kKeyParts<T>;
  const int64_t num_steps = head_dim / kStepDepth;
  alignas(64) float words[kParts][kAmxRows][kLanes];
  for (int64_t half = 0; half < num_panels * kTileVecs; ++half) {
    for (int64_t step = 0; step < num_steps; ++step) {
      for (int64_t j = 0; j < kAmxRows; ++j) {
        const T* const row = element_at(k[half * kAmxRows + j], step * kStepDepth);
        IntVec parts[kParts];
        split_bfloat16(load(row), load(element_at(row, kLanes)), parts);
#pragma GCC unroll 3
        for (int i = 0; i < kParts; ++i) store_words(words[i][j], parts[i]);
      }
      for (int i = 0; i < kParts; ++i) {
        const float* rows[kAmxRows];
        for (int64_t j = 0; j < kAmxRows; ++j) rows[j] = words[i][j];
        uint32_t* const tile =
            tiles + (((half / 2 * num_steps + step) * kParts + i) * kTileVecs + half % 2) * kTileWords;
        for (int64_t j = 0; j < kAmxRows; j += 8) {
          for (int64_t d = 0; d < kLanes; d += 8) {
            transpose8(rows + j, d, reinterpret_cast<float*>(tile) + d * kLanes + j, kLanes);
          }
        }
      }
    }
  }
}

// Tiles of V: words of two keys of a dimension, rows of 16 dimensions; panels of 32 dimensions, kTileKeys keys deep.
template <typename T>
void pack_value_tiles(const T* const* v, int64_t num_keys, int64_t v_head_dim, uint32_t* tiles) {
  constexpr int kParts = kKeyParts<T>;
  for (int64_t key = 0; key < num_keys; key += 2) {
    for (int64_t d = 0; d < v_head_dim; d += kLanes) {
      IntVec parts[kParts];
      split_bfloat16(load(element_at(v[key], d)), load(element_at(v[key + 1], d)), parts);
      const int64_t step = d / kTileCols * (kTileKeys / kStepDepth) + key / kStepDepth, half = d / kLanes % 2;
      uint32_t* const row = tiles + (step * kParts * kTileVecs + half) * kTileWords + key % kStepDepth / 2 * kLanes;
#pragma GCC unroll 3
      for (int i = 0; i < kParts; ++i) store_words(row + i * kTileVecs * kTileWords, zip_halves(parts[i]));
    }
  }
}

// The rows [begin, begin + count) of an item and the keys of a tile that they see, all together.
struct RowSpan {
  int64_t begin;
  int count;
  KeySpan keys;
};

template <typename T, int kQueryParts>
class TileAttention {
 public:
  TileAttention(const AttentionParams& p, const WorkItem& item, float* scratch)
      : p_(p), item_(item), rows_(carve_rows(num_rows(item), head_dims(p), scratch)) {
    const TileScratch at = tile_scratch(rows_.num_rows, head_dims(p));
    uint32_t* const words = reinterpret_cast<uint32_t*>(scratch);
    q_ = words + at.q;
    scores_ = scratch + at.scores;
    weights_ = words + at.weights;
    k_ = words + at.k;
    v_ = words + at.v;
  }

  void run() {
    const int64_t padded_rows = round_up(rows_.num_rows, kAmxRows);
    start_rows<T>(p_, item_, padded_rows, &rows_);
    start_queries(padded_rows);
    PackedTile<T> tiles[2];
    int now = 0;
    const bool is_aligned = p_.invariant && item_.kv_begin < rows_.kv_end;
    start_tile(is_aligned ? round_down(item_.kv_begin, kTileKeys) : item_.kv_begin, &tiles[now]);
    for (; tiles[now].num_keys > 0; now ^= 1) {
      start_tile(tiles[now].first + kTileKeys, &tiles[now ^ 1]);
      const int64_t padded_keys = round_up(tiles[now].num_keys, kTileCols);
      pack_key_tiles(tiles[now].k, padded_keys / kTileCols, p_.head_dim, k_);
      pack_value_tiles(tiles[now].v, padded_keys, p_.v_head_dim, v_);
      attend_tile(tiles[now], tiles[now ^ 1]);
    }
    finish_rows<T>(p_, item_, rows_);
  }

 private:
  // q as parts: what start_rows scaled, or, if there is one part, as it was given, with the scale for the scores.
  void start_queries(int64_t padded_rows) {
    const int64_t part_words = p_.head_dim / 2, row_words = kQueryParts * part_words;
    rows_.factor = 1.0f;
    for (int64_t r = 0; r < padded_rows; ++r) {
      float* const q = rows_.q + r * rows_.q_stride;
      uint32_t* const words = q_ + r * row_words;
      if (kQueryParts == 1) {
        if (r < rows_.num_rows) rows_.factor = BFloat16Dot::start(p_, item_, r, q) * kElementScale<T>;
        memcpy(words, q, sizeof(uint32_t) * static_cast<size_t>(row_words));
        continue;
      }
      for (int64_t d = 0; d < p_.head_dim; d += kStepDepth) {
        IntVec parts[kQueryParts];
        split_bfloat16(load(q + d), load(q + d + kLanes), parts);
#pragma GCC unroll 3
        for (int i = 0; i < kQueryParts; ++i) store_words(words + i * part_words + d / 2, parts[i]);
      }
    }
  }

  void start_tile(int64_t first, PackedTile<T>* tile) {
    tile->first = first;
    tile->num_keys = clamp(rows_.kv_end - first, 0, kTileKeys);
    tile->key_tile = kTileKeys;
    if (tile->num_keys == 0) return;
    locate_tile(p_, item_, rows_, first, tile->num_keys, kTileCols, tile->k, tile->v);
    if (p_.k_scale.is_per_token) {
      gather_tile_scales(p_, p_.k_scale, item_, rows_, first, tile->num_keys, kTileCols, tile->k_scale);
    }
    if (p_.v_scale.is_per_token) {
      gather_tile_scales(p_, p_.v_scale, item_, rows_, first, tile->num_keys, kTileCols, tile->v_scale);
    }
  }

  RowSpan row_span(const PackedTile<T>& tile, int64_t index) const {
    const int64_t begin = index * kRowTile;
    const int count = static_cast<int>(clamp(rows_.num_rows - begin, 0, kRowTile));
    return {begin, count, key_span(rows_, begin, count, tile.first, tile.num_keys)};
  }

  void push_scores(const RowSpan& span, int64_t stage) {
    const int64_t part_words = p_.head_dim / 2, num_steps = p_.head_dim / kStepDepth;
    for (int64_t j = span.keys.begin; j < span.keys.end; j += kTileCols) {
      queue_.push({q_ + span.begin * kQueryParts * part_words, kQueryParts * part_words, part_words,
                   k_ + j / kTileCols * num_steps * kKeyParts<T> * kTileVecs * kTileWords,
                   scores_ + stage * kRowTile * kTileKeys + j, kTileKeys, num_steps, false, span.count > kAmxRows});
    }
  }

  void push_values(const RowSpan& span, int64_t stage) {
    constexpr int64_t kPartWords = kTileKeys / 2, kRowWords = kQueryParts * kPartWords;
    constexpr int64_t kPanelTiles = kTileKeys / kStepDepth * kKeyParts<T> * kTileVecs;
    if (span.keys.begin == span.keys.end) return;
    for (int64_t d = 0; d < p_.v_head_dim; d += kTileCols) {
      queue_.push(
          {weights_ + stage * kRowTile * kRowWords + span.keys.begin / 2, kRowWords, kPartWords,
           v_ + (d / kTileCols * kPanelTiles + span.keys.begin / kStepDepth * kKeyParts<T> * kTileVecs) * kTileWords,
           rows_.o + span.begin * rows_.o_stride + d, rows_.o_stride, (span.keys.end - span.keys.begin) / kStepDepth,
           true, span.count > kAmxRows});
    }
  }

  // Row r of a span: its scores become weights, which are stored as parts.
  void softmax_row(const PackedTile<T>& tile, const RowSpan& span, int64_t r, int64_t stage) {
    constexpr int64_t kPartWords = kTileKeys / 2, kRowWords = kQueryParts * kPartWords;
    const int64_t row = stage * kRowTile + r - span.begin;
    uint32_t* const words = weights_ + row * kRowWords;
    const auto store_parts = [&](int64_t key, Vec first, Vec second) __attribute__((always_inline)) {
      IntVec parts[kQueryParts];
      split_bfloat16(first, second, parts);
#pragma GCC unroll 3
      for (int i = 0; i < kQueryParts; ++i) store_words(words + i * kPartWords + key / 2, parts[i]);
    };
    float* const scores = scores_ + row * kTileKeys + span.keys.begin;
    const int64_t num_keys = span.keys.end - span.keys.begin;
    if (is_plain_ && num_keys == kTileKeys && sees_whole_tile(rows_, r, tile.first)) {
      const Vec factor = broadcast(rows_.factor);
      softmax_whole_row(
          rows_, r, scores, [&](Vec x) __attribute__((always_inline)) { return kQueryParts == 1 ? mul(x, factor) : x; },
          [&](const auto& x) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int i = 0; i < kTileKeys / kLanes; i += 2) store_parts(i * kLanes, x[i], x[i + 1]);
          });
      return;
    }
    if (kQueryParts == 1) {
      const Vec factor = broadcast(rows_.factor);
      for (int64_t k = 0; k < num_keys; k += kLanes) store(scores + k, mul(load(scores + k), factor));
    }
    softmax_any_row(p_, rows_, r, tile, span.keys, scores);
    for (int64_t k = 0; k < num_keys; k += kStepDepth) {
      store_parts(span.keys.begin + k, load(scores + k), load(scores + k + kLanes));
    }
  }

  // All rows over a tile of keys, while those of the next one come from memory.
  void attend_tile(const PackedTile<T>& tile, const PackedTile<T>& next) {
    is_plain_ = is_plain_softmax(p_, rows_, tile);
    const int64_t num_tiles = round_up(rows_.num_rows, kRowTile) / kRowTile;
    for (int64_t n = 0; n < num_tiles + kStages - 1; ++n) {
      if (n < num_tiles) push_scores(row_span(tile, n), n % kStages);
      if (n >= 2) push_values(row_span(tile, n - 2), (n - 2) % kStages);
      const int64_t num_steps = queue_.steps_left();
      if (n >= 1 && n <= num_tiles) {
        const RowSpan span = row_span(tile, n - 1);
        for (int i = 0; i < span.count; ++i) {
          while (queue_.steps_left() > num_steps * (span.count - 1 - i) / span.count) queue_.step();
          prefetch_share(next.k, next.num_keys, span.begin + i, span.begin + i + 1, rows_.num_rows, p_.head_dim);
          prefetch_share(next.v, next.num_keys, span.begin + i, span.begin + i + 1, rows_.num_rows, p_.v_head_dim);
          if (span.keys.begin < span.keys.end) softmax_row(tile, span, span.begin + i, (n - 1) % kStages);
        }
      }
      while (queue_.steps_left() > 0) queue_.step();
    }
  }

  const AttentionParams& p_;
  const WorkItem& item_;
  Rows rows_;
  const TileRegisters<kLanes> registers_;
  ProductQueue<kQueryParts, kKeyParts<T>> queue_;
  bool is_plain_ = false;
  uint32_t *q_, *weights_, *k_, *v_;
  float* scores_;
};

// The parts of a q in bfloat16, or one that may be rounded.
template <typename T>
constexpr int kFewQueryParts = kMaxParts;
template <>
constexpr int kFewQueryParts<BFloat16> = 1;
template <>
constexpr int kFewQueryParts<Int8> = 2;

template <typename T>
void attend_tiles(const AttentionParams& p, const WorkItem& item, float* scratch) {
  if (p.dtype == DType::kBFloat16 || p.rounds_q) return TileAttention<T, kFewQueryParts<T>>(p, item, scratch).run();
  TileAttention<T, kMaxParts>(p, item, scratch).run();
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
