// merge_states.cuh: attention over the union of disjoint key sets, from the result over each; one launch.
// Math    lse = log sum_i exp(lse_i); out = sum_i exp(lse_i - lse) out_i; 0 and -inf where every lse_i is -inf
// Method  a lane takes 8 neighbouring dimensions of a row, 16 bytes; the largest lse first, then the states in
//         ascending order, float32; the out of a state with lse -inf is not read. Exponentials in base 2
// Grid    a row of a token and head takes head_dim / 8 lanes, rounded up to a power of two; blocks of kMergeThreads
// Shapes  as MergeStatesParams; outs and out in f16 or bf16
// Memory  reads every state that is not empty once, writes once; lses twice, the second time from L1; no shared memory
// Limits  as merge_states_kernel (instances.h) checks; at most 2^31 - 1 blocks
// Twins   triton_kernels/merge_states.py, csrc/cpu/merge-inl.h; truth ops/reference.py merge_states_reference
// Source  merge of online-softmax states, arXiv:1805.02867
#pragma once

#include "common/params.h"
#include "cuda/rows.cuh"

namespace mixattn {
namespace cuda {

constexpr int kMergeThreads = 128;
constexpr float kLog2OfE = 1.4426950408889634f;
constexpr float kLnOf2 = 0.6931471805599453f;

template <class T>
MX_DEVICE void merge_states(const MergeStatesParams& p) {
  const int lanes = lanes_per_row(p.head_dim);
  const int64_t row = (int64_t{mx::block_idx()} * kMergeThreads + mx::thread_idx()) / lanes;
  const int64_t token = row / p.num_heads;
  const int64_t head = row % p.num_heads;
  const int dim = mx::thread_idx() % lanes * kLaneElements;
  if (token >= p.num_tokens || dim >= p.head_dim) return;

  const float* const lses = p.lses + token * p.lses_token_stride + head;
  float largest = -INFINITY;
  for (int64_t i = 0; i < p.num_states; ++i) {
    const float lse = lses[i * p.lses_state_stride];
    largest = lse > largest || lse != lse ? lse : largest;  // a NaN stays: it must come out
  }
  const uint16_t* const outs =
      static_cast<const uint16_t*>(p.outs) + token * p.outs_token_stride + head * p.outs_head_stride + dim;
  float sum[kLaneElements] = {};
  float total = 0.0f;
  for (int64_t i = 0; i < p.num_states; ++i) {
    const float lse = lses[i * p.lses_state_stride];
    if (lse == -INFINITY) continue;  // so that no -inf is taken off itself below
    const float weight = mx::ex2((lse - largest) * kLog2OfE);
    total += weight;
    float x[kLaneElements];
    unpack_row<T>(mx::ld_global_v4(outs + i * p.outs_state_stride), x);
    MX_UNROLL
    for (int d = 0; d < kLaneElements; ++d) sum[d] += weight * x[d];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  MX_UNROLL
  for (int d = 0; d < kLaneElements; ++d) sum[d] *= inverse;
  mx::st_global_v4(static_cast<uint16_t*>(p.out) + row * p.head_dim + dim, pack_row<T>(sum));
  if (dim == 0) mx::st_global(p.lse + row, total == 0.0f ? -INFINITY : largest + mx::lg2(total) * kLnOf2);
}

}  // namespace cuda
}  // namespace mixattn
