// quantised.cuh: attention of one work item over K and V in int8, float8 or int4, and the kernel of all items, sm_80+.
// Math    as mixed_attention.cuh, of real = stored * scale: scores times K's scale of their key, weights times V's;
//         what all keys of a head share goes into the scores' scale and behind the sums
// Method  A warp copies its quarter of a tile as it is stored, and widens that, exactly, to float16 in the tile that
//         ldmatrix reads: once for all warps. Products are of float16 whatever q's element; a row of q becomes float16
//         times a power of two. There, and where results are stored, the call tells the element: one kernel serves
//         both. K and V have a place each as stored: both fly while the tile before is computed. e4m3 is widened to
//         2^-8 of its value, and the 2^8 is in the scales of launch_params.h. Weights times scales per token would
//         leave float16's range. They are divided by the largest such scale that the row has met, as they are by the
//         largest weight: sums of weights too, so that it cancels. A row's unit is that of the keys that it sees
//         itself, whatever its neighbours see.
// Grid    as mixed_attention.cuh
// Shapes  as mixed_attention.cuh, K [.., head_dim] and V [.., v_head_dim] bytes, of int4 half as many; the same tiles
// Memory  an item reads keys (head_dim + v_head_dim) bits / 8, and 8 keys of scales per token; shared: tile.cuh
// Static  nvcc 13.0, bf16, head_dim 128, int8, scales of heads: 254 registers, 1,238 / 1,785 / 3,822 warp instructions
//         per MMA-MFLOP on sm_80; other formats: docs/cuda.md. No spills in any kernel, no bank conflicts
// Limits  as cuda/mixed_attention.cuh; rows of K and V start at multiples of 16 bytes
// Twins   triton_kernels/_quantized.py (the same codes to float16); truth ops/reference.py
// Source  float8: arXiv:2209.05433; integers as the mantissa of 1024 + n: arXiv:2211.10017, section 3
#pragma once

#include "cuda/rows.cuh"
#include "cuda/sm80/mixed_attention.cuh"

namespace mixattn {
namespace cuda {
namespace sm80 {

// A tile whose keys are stored so.
template <class Shape, KvDType kStoredAs>
struct Quantised : Shape {
  static constexpr KvDType kStored = kStoredAs;
  static constexpr int kStoredBits = kStoredAs == KvDType::kInt4 ? 4 : 8;
};

template <int kHeadDim, int kVHeadDim, Scores kScores, KvDType kStored>
struct QuantisedTiles {
  using Shapes = Tiles<kHeadDim, kScores, kVHeadDim>;
  static constexpr bool kHasLarge = Shapes::kHasLarge;
  using Large = Quantised<typename Shapes::Large, kStored>;
  using Medium = Quantised<typename Shapes::Medium, kStored>;
  using Small = Quantised<typename Shapes::Small, kStored>;
};

template <int kHeadDim, int kVHeadDim, Scores kScores, KvDType kStored>
constexpr uint32_t kQuantisedSharedBytes =
    kLargestBytes<kHeadDim, QuantisedTiles<kHeadDim, kVHeadDim, kScores, kStored>, kVHeadDim>;

// ---- from bytes to float16 ------------------------------------------------------------------------------------------

constexpr uint32_t kThousands = 0x64646464;  // behind 0x64, byte n is the float16 1024 + n

// A pair of bytes of the word, 0 and 1 or 2 and 3. e4m3: 2^-8 of it.
template <KvDType kStored, int kPair>
MX_DEVICE uint32_t widen_pair(uint32_t word) {
  if constexpr (kStored == KvDType::kInt8) {
    constexpr uint32_t kOnes = 0x3c003c00;
    constexpr uint32_t kZeros = 0xe480e480;  // -(1024 + 128): bytes come with 128 added
    return mx::fma2_f16(mx::byte_perm(word ^ 0x80808080u, kThousands, kPair == 0 ? 0x4140 : 0x4342), kOnes, kZeros);
  } else if constexpr (kStored == KvDType::kFloat8E5M2) {
    return mx::byte_perm(word, 0, kPair == 0 ? 0x1404 : 0x3424);  // the upper byte of a float16
  } else {
    static_assert(kStored == KvDType::kFloat8E4M3);
    // Bytes behind their signs; the 7 bits below the sign go to bits 13 to 7.
    const uint32_t spread = mx::byte_perm(word, 0, kPair == 0 ? 0x9180 : 0xb3a2) << 7;
    const uint32_t pair = spread & 0xbf80bf80u;
    // One more in the last place reaches bit 14 from NaN's code alone, and there makes the exponent that of NaN.
    return pair | ((pair + 0x00800080u) & 0x40004000u);
  }
}

// The two nibbles of byte kByte, the low one first.
template <int kByte>
MX_DEVICE uint32_t widen_nibbles(uint32_t word) {
  // 1024 + n, and 1024 + 16 n where the nibble is the high one.
  constexpr uint32_t kSelector = kByte | 4 << 4 | kByte << 8 | 4 << 12;
  const uint32_t pair = mx::byte_perm(word, kThousands, kSelector) & 0xfff0ff0fu;
  constexpr uint32_t kFactors = 0x2c003c00;  // 1, 1 / 16
  constexpr uint32_t kZeros = 0xd480e408;    // -(1024 + 8), -(64 + 8)
  return mx::fma2_f16(pair, kFactors, kZeros);
}

constexpr int kUnitElements = 16;  // that a lane widens at once: two chunks

template <KvDType kStored>
MX_DEVICE void widen_unit(uint32_t address, mx::Words4 (&chunks)[2]) {
  if constexpr (kStored == KvDType::kInt4) {
    const mx::float2 words = mx::ld_shared_v2(address);
    MX_UNROLL
    for (int c = 0; c < 2; ++c) {
      const uint32_t word = mx::bits_of(c == 0 ? words.x : words.y);
      chunks[c] = {{widen_nibbles<0>(word), widen_nibbles<1>(word), widen_nibbles<2>(word), widen_nibbles<3>(word)}};
    }
  } else {
    const mx::Words4 words = mx::ld_shared_v4(address);
    MX_UNROLL
    for (int c = 0; c < 2; ++c) {
      const uint32_t first = words.word[2 * c];
      const uint32_t second = words.word[2 * c + 1];
      chunks[c] = {{widen_pair<kStored, 0>(first), widen_pair<kStored, 1>(first), widen_pair<kStored, 0>(second),
                    widen_pair<kStored, 1>(second)}};
    }
  }
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// A row of K or V as it is stored, and the units that lanes widen of it.
template <int kWidth, int kBits>
struct StoredRow {
  static constexpr int kBytes = kWidth * kBits / 8;
  static constexpr int kVectors = kBytes / mx::kVectorBytes;
  static constexpr int kLanes = power_of_two_from(kVectors);  // that copy a row; those past it are idle
  static constexpr int kUnits = kWidth / kUnitElements;
  static constexpr int kUnitBytes = kUnitElements * kBits / 8;
  static constexpr int kUnitLanes = power_of_two_from(kUnits);  // that widen a row; those past it are idle
  static_assert(kWidth % kUnitElements == 0 && kBytes % mx::kVectorBytes == 0, "whole units and vectors");
};

// The key of a warp's that lies in this place of those as stored. With 4 units to a row, 8 lanes widen two keys at
// once: 4 keys apart, so that their chunks lie in different banks.
template <class Row>
MX_DEVICE int key_in_place(int place) {
  if constexpr (Row::kUnitLanes >= 8) {
    return place;
  } else {
    constexpr int kKeysAtOnce = mx::kWarpSize / Row::kUnitLanes;
    constexpr int kNeighbours = 8 / Row::kUnitLanes;
    const int key = place % kKeysAtOnce;
    return place - key + key % kNeighbours * Row::kUnitLanes + key / kNeighbours;
  }
}

// Starts the copy of this warp's part of a tile of K or V, as it is stored; keys as in copy_keys.
template <int kWidth, class TileShape, Scores kScores>
MX_DEVICE void copy_stored(const Cache<uint8_t>& cache, Item item, const KeyPlace& place, uint32_t stored,
                           int32_t tile_begin) {
  using Row = StoredRow<kWidth, TileShape::kStoredBits>;
  constexpr int kRowsAtOnce = mx::kWarpSize / Row::kLanes;
  const Thread thread = this_thread();
  int64_t offset = place.page * cache.page_stride + place.slot * cache.token_stride +
                   item[kKvHead] * cache.head_stride;  // may pass 2^31
  if (kScores == Scores::kAny && place.is_hidden) offset = kNowhere;
  const int32_t warp_begin = tile_begin + thread.warp * TileShape::kCopiedKeys;
  const int32_t kv_begin = item[kKvBegin];
  const int32_t kv_end = item[kKvEnd];
  const int lane_row = thread.lane / Row::kLanes;
  const int vector = thread.lane % Row::kLanes;
  const uint32_t to =
      stored + (thread.warp * TileShape::kCopiedKeys + lane_row) * Row::kBytes + vector * mx::kVectorBytes;
  MX_UNROLL
  for (int i = 0; i < TileShape::kCopiedKeys / kRowsAtOnce; ++i) {
    const int row = key_in_place<Row>(i * kRowsAtOnce + lane_row);
    const int64_t row_offset = mx::shfl_idx(offset, row);
    if (Row::kLanes > Row::kVectors && vector >= Row::kVectors) continue;
    const int32_t key = warp_begin + row;
    const bool is_key = key >= kv_begin && key < kv_end && (kScores != Scores::kAny || row_offset != kNowhere);
    mx::cp_async16(to + i * kRowsAtOnce * Row::kBytes, cache.data + (row_offset + vector * mx::kVectorBytes), is_key);
  }
}

// This warp's part of a tile, which it has copied, to float16.
template <int kWidth, class TileShape>
MX_DEVICE void widen_keys(uint32_t stored, uint32_t tile) {
  using Row = StoredRow<kWidth, TileShape::kStoredBits>;
  constexpr uint32_t kRowBytes = TileRow<kWidth>::kBytes;
  constexpr int kKeysAtOnce = mx::kWarpSize / Row::kUnitLanes;
  const Thread thread = this_thread();
  const int lane_row = thread.lane / Row::kUnitLanes;
  const int unit = thread.lane % Row::kUnitLanes;
  if (Row::kUnitLanes > Row::kUnits && unit >= Row::kUnits) return;
  const uint32_t from =
      mx::opaque(stored + (thread.warp * TileShape::kCopiedKeys + lane_row) * Row::kBytes + unit * Row::kUnitBytes);
  const int first_row = thread.warp * TileShape::kCopiedKeys + key_in_place<Row>(lane_row);
  const uint32_t to = mx::opaque(chunk_address<kRowBytes>(tile, first_row, unit));
  // Of second halves, kUnits chunks to the right: where that is no multiple of 8 or half of it, another swizzle away.
  constexpr uint32_t kRight = Row::kUnits * mx::kVectorBytes;
  constexpr bool kIsFar = kRight % kSwizzleBytes != 0 && kRight != kSwizzleBytes / 2;
  const uint32_t to_second = kIsFar ? mx::opaque(chunk_address<kRowBytes>(tile, first_row, unit + Row::kUnits)) : 0;
  MX_UNROLL
  for (int i = 0; i < TileShape::kCopiedKeys / kKeysAtOnce; ++i) {
    mx::Words4 chunks[2];
    widen_unit<TileShape::kStored>(from + i * kKeysAtOnce * Row::kBytes, chunks);
    const uint32_t first = row_below<kRowBytes>(to, i * kKeysAtOnce);
    mx::st_shared_v4(first, chunks[0]);
    mx::st_shared_v4(kIsFar                   ? row_below<kRowBytes>(to_second, i * kKeysAtOnce)
                     : kRight < kSwizzleBytes ? first ^ kRight
                                              : first + kRight,
                     chunks[1]);
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// A scale that all keys of the item's head share, beside those that are in LaunchParams.
MX_DEVICE float head_scale(const KvScale& scale, Item item) {
  return scale.data == nullptr || scale.is_per_token ? 1.0f : scale.data[item[kKvHead] * scale.head_stride];
}

// Of the key that this lane finds; 0 for keys that find_key says are nowhere.
struct KeyScales {
  float k;
  float v;
};

MX_DEVICE float token_scale(const KvScale& scale, Item item, const KeyPlace& place) {
  if (!scale.is_per_token) return 1.0f;
  return scale
      .data[place.page * scale.page_stride + place.slot * scale.token_stride + item[kKvHead] * scale.head_stride];
}

template <class TileShape>
MX_DEVICE KeyScales load_scales(const LaunchParams& p, Item item, const KeyPlace& place, int32_t tile_begin) {
  const Thread thread = this_thread();
  const int32_t key = tile_begin + thread.warp * TileShape::kCopiedKeys + thread.lane % TileShape::kCopiedKeys;
  if (key < item[kKvBegin] || key >= item[kKvEnd] || place.is_hidden) return {0.0f, 0.0f};
  return {token_scale(p.call.k_scale, item, place), token_scale(p.call.v_scale, item, place)};
}

template <class Shared, class TileShape>
MX_DEVICE void store_scales(const KeyScales& scales) {
  const Thread thread = this_thread();
  const int key = thread.warp * TileShape::kCopiedKeys + thread.lane % TileShape::kCopiedKeys;
  const uint32_t to = mx::shared_base() + Shared::kKeyScales + key * sizeof(float);
  mx::st_shared(to, mx::bits_of(scales.k));
  mx::st_shared(to + TileShape::kKeys * sizeof(float), mx::bits_of(scales.v));
}

// Each score or weight times the scale of its key, of those from this address on.
template <int kScoreTiles>
MX_DEVICE void scale_columns(uint32_t scales, float (&values)[kScoreTiles][4]) {
  MX_UNROLL
  for (int n = 0; n < kScoreTiles; ++n) {
    const mx::float2 scale = mx::ld_shared_v2(scales + n * kMmaColumns * sizeof(float));
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      values[n][2 * h] *= scale.x;
      values[n][2 * h + 1] *= scale.y;
    }
  }
}

// log2 of the least that a unit is, for rows that see zeros alone: weights are divided by it, and their sum is finite.
constexpr float kLeastUnitLog2 = -100.0f;

// log2 of the largest scale of the keys that each row sees: of all where not is_edge, else of those not masked.
template <int kScoreTiles>
MX_DEVICE PerRow unit_log2(uint32_t scales, bool is_edge, const float (&scores)[kScoreTiles][4]) {
  PerRow largest = {{0.0f, 0.0f}};
  MX_UNROLL
  for (int n = 0; n < kScoreTiles; ++n) {
    const mx::float2 scale = mx::ld_shared_v2(scales + n * kMmaColumns * sizeof(float));
    if (is_edge) {
      MX_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float x = scores[n][2 * h] == -INFINITY ? 0.0f : fabsf(scale.x);
        const float y = scores[n][2 * h + 1] == -INFINITY ? 0.0f : fabsf(scale.y);
        largest.of_row[h] = fmaxf(largest.of_row[h], fmaxf(x, y));
      }
    } else {
      largest.of_row[0] = fmaxf(largest.of_row[0], fmaxf(fabsf(scale.x), fabsf(scale.y)));
    }
  }
  if (!is_edge) largest.of_row[1] = largest.of_row[0];
  MX_UNROLL
  for (float& unit : largest.of_row) unit = fmaxf(mx::lg2(quad_max(unit)), kLeastUnitLog2);
  return largest;
}

// ---- an item --------------------------------------------------------------------------------------------------------

// The rows of Q that this thread has copied, as float16 times powers of two: a row's largest magnitude lands in [2^13,
// 2^14). What is more than 2^27 times smaller may lose bits. What a row's scores are to be multiplied with is left
// where scales of keys come later.
template <int kHeadDim, class Shared, class TileShape>
MX_DEVICE void fit_queries(const LaunchParams& p, Item item) {
  using Row = TileRow<kHeadDim>;
  constexpr int kRowsAtOnce = kNumThreads / Row::kLanes;
  static_assert(TileShape::kRows % kRowsAtOnce == 0, "all lanes of a row's warp come to its shuffles");
  constexpr int kLargestExponent = 13;
  constexpr uint32_t kBias = 127;
  constexpr uint32_t kExponentOne = 1u << 23;
  const Thread thread = this_thread();
  const float score_scale = p.score_scale * head_scale(p.call.k_scale, item);
  const int chunk = thread.idx % Row::kLanes;
  const bool is_chunk = Row::kLanes == Row::kChunks || chunk < Row::kChunks;
  MX_NO_UNROLL
  for (int row = thread.idx / Row::kLanes; row < TileShape::kRows; row += kRowsAtOnce) {
    const uint32_t address = chunk_address<Row::kBytes>(mx::shared_base() + Shared::kQ, row, is_chunk ? chunk : 0);
    float x[kLaneElements] = {};
    if (is_chunk && p.call.dtype == DType::kBFloat16) unpack_row<mx::bf16>(mx::ld_shared_v4(address), x);
    if (is_chunk && p.call.dtype == DType::kFloat16) unpack_row<mx::f16>(mx::ld_shared_v4(address), x);
    float largest = 0.0f;
    MX_UNROLL
    for (float element : x) largest = fmaxf(largest, fabsf(element));
    MX_UNROLL
    for (int mask = Row::kLanes / 2; mask > 0; mask /= 2) largest = fmaxf(largest, mx::shfl_xor(largest, mask));
    // Both powers of two are to be normal.
    uint32_t exponent = mx::bits_of(largest) / kExponentOne;
    exponent = exponent < kLargestExponent + 1 ? kLargestExponent + 1 : exponent > 2 * kBias ? 2 * kBias : exponent;
    const float inverse = mx::float_of((2 * kBias + kLargestExponent - exponent) * kExponentOne);
    MX_UNROLL
    for (float& element : x) element *= inverse;
    if (is_chunk) mx::st_shared_v4(address, pack_row<mx::f16>(x));
    if (chunk == 0) {
      mx::st_shared(mx::shared_base() + Shared::kKeyScales + row * sizeof(float),
                    mx::bits_of(score_scale * mx::float_of((exponent - kLargestExponent) * kExponentOne)));
    }
  }
}

// One tile's scores to weights, as apply_softmax; weights times V's scales.
template <class Shared, class TileShape, Scores kScores, int kVHeadDim>
MX_DEVICE void apply_scaled_softmax(const LaunchParams& p, Item item, int32_t tile_begin, bool is_edge,
                                    const PerRow (&score_scales)[TileShape::kRowTiles],
                                    float (&scores)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4],
                                    RowState<kVHeadDim, TileShape::kRowTiles>& state,
                                    uint32_t (&weights)[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4]) {
  const Thread thread = this_thread();
  const int first_column = warp_key<TileShape>() + 2 * (thread.lane % 4);
  const uint32_t k_scales = mx::shared_base() + Shared::kKeyScales + first_column * sizeof(float);
  const uint32_t v_scales = k_scales + TileShape::kKeys * sizeof(float);
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    const int32_t first_row = warp_row<TileShape>() + r * kMmaRows + thread.lane / 4;
    if (p.call.k_scale.is_per_token) scale_columns(k_scales, scores[r]);
    const PerRow scale =
        prepare_scores<kScores>(p, item, first_row, tile_begin + first_column, is_edge, score_scales[r], scores[r]);
    PerRow unit = {{0.0f, 0.0f}};
    if (p.call.v_scale.is_per_token) unit = unit_log2(v_scales, is_edge, scores[r]);
    const PerRow rescale = weigh_scores(scores[r], scale, state.row_max[r], state.row_sum[r], unit);
    if (p.call.v_scale.is_per_token) scale_columns(v_scales, scores[r]);
    pack_weights<mx::f16>(scores[r], weights[r]);
    rescale_sums(rescale, state.accumulator[r]);
  }
}

// Columns of the sums, which lie as chunk_at says, in the order of v_head_dim.
template <class TileShape, int kVHeadDim>
MX_DEVICE void order_columns(RowState<kVHeadDim, TileShape::kRowTiles>& state) {
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    float ordered[kVHeadDim / kMmaColumns][4];
    MX_UNROLL
    for (int i = 0; i < kVHeadDim / kMmaColumns; ++i) {
      MX_UNROLL
      for (int j = 0; j < 4; ++j) ordered[chunk_at<kVHeadDim, TileShape>(i)][j] = state.accumulator[r][i][j];
    }
    MX_UNROLL
    for (int i = 0; i < kVHeadDim / kMmaColumns; ++i) {
      MX_UNROLL
      for (int j = 0; j < 4; ++j) state.accumulator[r][i][j] = ordered[i][j];
    }
  }
}

// As attend_item.
template <int kHeadDim, class TileShape, Scores kScores, int kVHeadDim>
MX_DEVICE void attend_quantised(const LaunchParams& p, Item item) {
  using Shared = Layout<kHeadDim, TileShape, kVHeadDim>;
  const uint32_t stored_k = mx::shared_base() + Shared::kStoredK;
  const uint32_t stored_v = mx::shared_base() + Shared::kStoredV;
  const auto copy_k = [&](const KeyPlace& place, int32_t tile_begin) {
    copy_stored<kHeadDim, TileShape, kScores>(k_cache<uint8_t>(p), item, place, stored_k, tile_begin);
  };
  const auto copy_v = [&](const KeyPlace& place, int32_t tile_begin) {
    copy_stored<kVHeadDim, TileShape, kScores>(v_cache<uint8_t>(p), item, place, stored_v, tile_begin);
  };

  int32_t tile_begin = item[kKvBegin] / TileShape::kKeys * TileShape::kKeys;
  KeyPlace place = find_key<TileShape, kScores>(p, item, tile_begin);
  copy_queries<ElementOfCall, kHeadDim, TileShape>(p, item, mx::shared_base() + Shared::kQ);
  mx::cp_async_commit();
  copy_k(place, tile_begin);
  mx::cp_async_commit();
  copy_v(place, tile_begin);
  mx::cp_async_commit();
  KeyScales scales = load_scales<TileShape>(p, item, place, tile_begin);
  place = find_key<TileShape, kScores>(p, item, tile_begin + TileShape::kKeys);
  mx::cp_async_wait<2>();  // for Q
  fit_queries<kHeadDim, Shared, TileShape>(p, item);
  sync_team();  // Q and its scales, of all rows
  PerRow score_scales[TileShape::kRowTiles];
  MX_UNROLL
  for (int r = 0; r < TileShape::kRowTiles; ++r) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row<TileShape>() + r * kMmaRows + h * 8 + this_thread().lane / 4;
      score_scales[r].of_row[h] =
          mx::float_of(mx::ld_shared(mx::shared_base() + Shared::kKeyScales + row * sizeof(float)));
    }
  }
  sync_team();  // scales of keys take the place of those
  RowState<kVHeadDim, TileShape::kRowTiles> state;
  clear(state);
  if (item[kKvBegin] == item[kKvEnd]) tile_begin = item[kKvEnd];  // no keys, no tiles
  MX_NO_UNROLL
  while (tile_begin < item[kKvEnd]) {
    const int32_t next_begin = tile_begin + TileShape::kKeys;
    mx::cp_async_wait<1>();  // for K; V may be under way
    mx::sync_warp();         // all lanes' copies of K have landed
    widen_keys<kHeadDim, TileShape>(stored_k, mx::shared_base() + Shared::kK);
    store_scales<Shared, TileShape>(scales);
    sync_tile<TileShape>();  // K is widened, by whomever; nobody reads V of the tile before any more
    if (next_begin < item[kKvEnd]) copy_k(place, next_begin);
    mx::cp_async_commit();

    float scores[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaColumns][4];
    multiply_queries<mx::f16, kHeadDim, TileShape>(scores);
    const bool is_edge = tile_begin < item[kFullBegin] || next_begin > item[kFullEnd];
    uint32_t weights[TileShape::kRowTiles][TileShape::kWarpKeys / kMmaDepth][4];
    apply_scaled_softmax<Shared, TileShape, kScores>(p, item, tile_begin, is_edge, score_scales, scores, state,
                                                     weights);
    mx::cp_async_wait<1>();  // for V; K of the next tile may be under way
    mx::sync_warp();         // all lanes' copies of V have landed
    widen_keys<kVHeadDim, TileShape>(stored_v, mx::shared_base() + Shared::kV);
    sync_tile<TileShape>();  // V is widened; nobody reads K or the scales any more
    if (next_begin < item[kKvEnd]) copy_v(place, next_begin);
    mx::cp_async_commit();
    scales = load_scales<TileShape>(p, item, place, next_begin);
    place = find_key<TileShape, kScores>(p, item, next_begin + TileShape::kKeys);
    multiply_values<mx::f16, kHeadDim, TileShape, kVHeadDim>(weights, state.accumulator);
    tile_begin = next_begin;
  }
  mx::cp_async_wait<0>();  // of an item without keys: what was copied must land before others use its place

  order_columns<TileShape>(state);
  const float value_scale = p.value_scale * head_scale(p.call.v_scale, item);
  if constexpr (TileShape::kKeyWarps == 1) {
    store_rows<ElementOfCall, TileShape>(p, item, state, value_scale);
  } else {
    merge_warps<ElementOfCall, kHeadDim, TileShape>(p, item, state, value_scale);
  }
}

template <int kHeadDim, int kVHeadDim, Scores kScores>
struct QuantisedWalk {
  template <class TileShape>
  static MX_DEVICE void attend(const LaunchParams& p, Item item) {
    attend_quantised<kHeadDim, TileShape, kScores, kVHeadDim>(p, item);
  }
};

// The body of a kernel; its entry points are in entry.cuh.
template <int kHeadDim, int kVHeadDim, Scores kScores, KvDType kStored>
MX_DEVICE void quantised_attention(const LaunchParams& p) {
  using Shapes = QuantisedTiles<kHeadDim, kVHeadDim, kScores, kStored>;
  run_queue<ElementOfCall, kVHeadDim, AttendByKind<Shapes, QuantisedWalk<kHeadDim, kVHeadDim, kScores>>>(p,
                                                                                                         Queue::kAll);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace mixattn
