// merge-inl.h: attention over a union of disjoint key sets, from the result over each, for one ISA.
// Math    lse = log sum_i exp(lse_i); out = sum_i exp(lse_i - lse) out_i; 0 and -inf where every lse_i is -inf
//         The sink of a split row is one more state, of out 0: here it enters, exactly once, and in no split.
// Method  states in ascending order, float32, relative to the largest lse_i; a state with lse_i -inf is not read
// Shapes  merge_splits: partial_out [rows, head_dim] float32 to out's dtype; merge_states: as MergeStatesParams
// Memory  reads every state once, writes once
// Twins   triton_kernels/mixed_attention.py and merge_states.py, cuda/merge_states.cuh; truth ops/reference.py
//         merge_states_reference
// Source  merge of online-softmax states, arXiv:1805.02867
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace mixattn {
namespace cpu {
namespace {

// One row: out[0, head_dim) and the returned lse from num_states rows outs + i * out_stride with lses[i * lse_stride],
// and a state of out 0 with lse `sink` (-inf: none).
template <typename Source, typename Target>
MIXATTN_INLINE float merge_row(const Source* outs, int64_t out_stride, const float* lses, int64_t lse_stride,
                               int64_t num_states, float sink, int64_t head_dim, Target* out) {
  float largest = sink;
  for (int64_t i = 0; i < num_states; ++i) {
    const float lse = lses[i * lse_stride];
    largest = lse > largest || lse != lse ? lse : largest;  // a NaN stays: it must come out
  }
  float sum[kMaxHeadDim];
  for (int64_t d = 0; d < head_dim; ++d) sum[d] = 0.0f;
  float total = sink == -INFINITY ? 0.0f : __builtin_expf(sink - largest);
  for (int64_t i = 0; i < num_states; ++i) {
    const float lse = lses[i * lse_stride];
    if (lse == -INFINITY) continue;
    const float weight = __builtin_expf(lse - largest);
    total += weight;
    const Source* row = outs + i * out_stride;
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(sum + d, fmadd(broadcast(weight), load(row + d), load(sum + d)));
    if (kLanes > 8 && d < head_dim) {
      store_half(sum + d, fmadd(broadcast(weight), load_half(row + d), load_half(sum + d)));
    }
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, mul(load(sum + d), broadcast(inverse)));
  if (kLanes > 8 && d < head_dim) store_half(out + d, mul(load_half(sum + d), broadcast(inverse)));
  return total == 0.0f ? -INFINITY : largest + __builtin_logf(total);
}

template <typename T>
void merge_splits_typed(const AttentionParams& p, const Merge& merge) {
  const int64_t group_size = p.num_q_heads / p.num_kv_heads;
  for (int64_t r = 0; r < merge.num_rows; ++r) {
    const int64_t packed_row = merge.row_begin + r;
    const int64_t token = p.cu_seqlens_q[merge.seq_idx] + packed_row / group_size;
    const int64_t head = merge.kv_head * group_size + packed_row % group_size;
    const int64_t first = merge.partial_row + r;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const float lse =
        merge_row(p.partial_out + first * p.v_head_dim, merge.num_rows * p.v_head_dim, p.partial_lse + first,
                  merge.num_rows, merge.num_splits, p.sinks == nullptr ? -INFINITY : p.sinks[head], p.v_head_dim, out);
    if (p.lse != nullptr) p.lse[token * p.lse_token_stride + head] = lse;
  }
}

void merge_splits(const AttentionParams& p, const Merge& merge) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_splits_typed<float>(p, merge);
    case DType::kBFloat16:
      return merge_splits_typed<BFloat16>(p, merge);
    case DType::kFloat16:
      return merge_splits_typed<Float16>(p, merge);
  }
}

template <typename T>
void merge_states_typed(const MergeStatesParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const T* outs = static_cast<const T*>(p.outs) + token * p.outs_token_stride + head * p.outs_head_stride;
      const int64_t row = token * p.num_heads + head;
      p.lse[row] =
          merge_row(outs, p.outs_state_stride, p.lses + token * p.lses_token_stride + head, p.lses_state_stride,
                    p.num_states, -INFINITY, p.head_dim, static_cast<T*>(p.out) + row * p.head_dim);
    }
  }
}

void merge_states_rows(const MergeStatesParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return merge_states_typed<float>(p, begin, end);
    case DType::kBFloat16:
      return merge_states_typed<BFloat16>(p, begin, end);
    case DType::kFloat16:
      return merge_states_typed<Float16>(p, begin, end);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
