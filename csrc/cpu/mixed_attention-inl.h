// mixed_attention-inl.h: one work item of paged attention, prefill rows or decode rows, for one ISA.
// Math    o_i = sum_j softmax_j(softmax_scale * q_i.k_j) v_j over the keys row i may see; with soft_cap c the scores s
//         become c tanh(s / c) first; ALiBi takes slope_i |position_i - position_j| off them; a sink is one more score
//         in the sum, with v 0
// Method  Online softmax over tiles of keys, in base 2, all arithmetic in float32.
//         Few rows (a decode's query heads of one kv head): direct. One pass over K and V where they lie in their
//         pages; every vector of them that is loaded serves several rows. Bound by memory; the next rows are
//         prefetched. Many rows (a prefill chunk): packed. A tile of K is transposed and one of V copied, both as
//         float32 (as bfloat16, where the CPU multiplies it in pairs), into scratch that stays in L2; S = Q K^T and
//         O += P V are register-tiled matrix products. Bound by FMA.
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
// Memory  reads keys (head_dim + v_head_dim) elements once per item, and 2 keys scales of 4 bytes if each key has its
//         own. Scratch in bytes, packed: 4 (rows (head_dim + v_head_dim + key_tile + 8) + key_tile times the larger of
//         the two), that is 260 KiB at 128 rows and 128 dimensions
// Limits  head_dim and v_head_dim multiples of 8, at most 256; any group_size, page_size and strides
// Twins   triton_kernels/mixed_attention.py; truth ops/reference.py
// Source  online softmax, arXiv:1805.02867; tiling, arXiv:2205.14135; register tiles, doi 10.1145/1356052.1356053
#pragma once

#include "cpu/attention_bytes-inl.h"
#include "cpu/attention_direct-inl.h"
#include "cpu/attention_packed-inl.h"
#if defined(MIXATTN_ISA_AMX)
#include "cpu/attention_tiles-inl.h"
#endif

namespace mixattn {
namespace cpu {
namespace {

int64_t attend_scratch_bytes(int64_t max_rows, HeadDims dims) {
  const int64_t rows = round_up(max_rows, kLineFloats);
  const int64_t widest = round_up(dims.k > dims.v ? dims.k : dims.v, kLanes);
  const int64_t direct = kMaxBundle * (rows_floats(kDirectRows, dims) + kDirectRows * kDirectKeys);
  int64_t packed = rows_floats(rows, dims) + rows * key_tile(dims) + widest * key_tile(dims);
#if defined(MIXATTN_ISA_AMX)
  if (has_tile_dims(dims)) packed = tile_scratch(rows, dims).end;
#endif
  return static_cast<int64_t>(sizeof(float)) * (direct > packed ? direct : packed);
}

template <class Dot>
void attend_few_rows(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  const int32_t rows = num_rows(items[0]);
  if (rows == 1) return attend_direct<Dot, 1>(p, items, num_items, scratch);
  if (rows == 2) return attend_direct<Dot, 2>(p, items, num_items, scratch);
  return attend_direct<Dot, 4>(p, items, num_items, scratch);
}

#if defined(MIXATTN_HAS_BYTE_ROWS)
void attend_few_bytes(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  const int32_t rows = num_rows(items[0]);
  if (rows == 2) return attend_bytes<2>(p, items, num_items, scratch);
  if (rows == 3) return attend_bytes<3>(p, items, num_items, scratch);
  return attend_bytes<4>(p, items, num_items, scratch);
}
#endif

// Dots, the fastest first, of which the last takes every call.
template <class Dot, class... Others>
void attend_dots(const AttentionParams& p, const WorkItem* items, int64_t num_items, float* scratch) {
  const bool is_packed = num_rows(items[0]) > kDirectRows || p.invariant;
#if defined(MIXATTN_ISA_AMX)
  if (is_packed && has_tile_dims(head_dims(p))) {
    for (int64_t n = 0; n < num_items; ++n) attend_tiles<typename Dot::Key>(p, items[n], scratch);
    return;
  }
#endif
  if constexpr (sizeof...(Others) > 0) {
    if (!Dot::takes(p)) return attend_dots<Others...>(p, items, num_items, scratch);
  }
  if (is_packed) {
    for (int64_t n = 0; n < num_items; ++n) attend_packed<Dot>(p, items[n], scratch);
    return;
  }
  attend_few_rows<Dot>(p, items, num_items, scratch);
}

void attend(const AttentionParams& p, const WorkItem* items, int64_t num_items, void* scratch) {
  float* floats = static_cast<float*>(scratch);
  switch (p.kv_dtype) {
    case KvDType::kFloat32:
      return attend_dots<FloatDot<float>>(p, items, num_items, floats);
    case KvDType::kBFloat16:
#if defined(MIXATTN_HAS_BFLOAT16_DOT)
      return attend_dots<BFloat16Dot, FloatDot<BFloat16>>(p, items, num_items, floats);
#else
      return attend_dots<FloatDot<BFloat16>>(p, items, num_items, floats);
#endif
    case KvDType::kFloat16:
      return attend_dots<FloatDot<Float16>>(p, items, num_items, floats);
    case KvDType::kInt8:
#if defined(MIXATTN_HAS_BYTE_ROWS)
      if (ByteDot::takes_few_rows(p, num_rows(items[0]))) return attend_few_bytes(p, items, num_items, floats);
#endif
#if defined(MIXATTN_HAS_BYTE_ROWS) && !defined(MIXATTN_ISA_AMX)  // which has tiles
      if (ByteDot::takes(p) && (num_rows(items[0]) > kDirectRows || p.invariant)) {
        for (int64_t n = 0; n < num_items; ++n) attend_packed<ByteDot>(p, items[n], floats);
        return;
      }
#endif
#if defined(MIXATTN_HAS_INT16_DOT)
      return attend_dots<Int8Dot, FloatDot<Int8>>(p, items, num_items, floats);
#else
      return attend_dots<FloatDot<Int8>>(p, items, num_items, floats);
#endif
    case KvDType::kFloat8E4M3:
      return attend_dots<FloatDot<Float8E4M3>>(p, items, num_items, floats);
    case KvDType::kFloat8E5M2:
      return attend_dots<FloatDot<Float8E5M2>>(p, items, num_items, floats);
    case KvDType::kInt4:
      return attend_dots<FloatDot<Int4Pair>>(p, items, num_items, floats);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
