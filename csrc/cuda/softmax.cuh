// softmax.cuh: the online softmax in base 2: a step over a warp's tile of scores, its end, the merge of results.
// Math    weights exp2(scores * scale_log2 - m), m the largest scaled score so far; earlier sums times exp2(m_old - m)
// Method  log2(e) is folded into the scores' scale on the host, so that exp2 is the whole exponential. A row of an
//         mma.sync accumulator lies in the 4 lanes of a quad: maxima go through the quad at every step, sums stay in
//         their lanes until the end.
// Shapes  scores (16, 8 kScoreTiles) of a warp, as fragments: [i][2 h + j] is row lane / 4 + 8 h, column 8 i +
//         2 (lane % 4) + j
// Twins   triton_kernels/_softmax.py (the same names and order)
// Source  online softmax, arXiv:1805.02867, algorithm 3; as in FlashAttention-2, arXiv:2307.08691, section 3.1
#pragma once

#include "cuda/prim.cuh"

namespace mixattn {
namespace cuda {

constexpr float kLn2 = 0.6931471805599453f;    // lse in base 2 times this is lse in natural log
constexpr float kLog2E = 1.4426950408889634f;  // and back

MX_DEVICE float quad_max(float value) {
  value = fmaxf(value, mx::shfl_xor(value, 1));
  return fmaxf(value, mx::shfl_xor(value, 2));
}
MX_DEVICE float quad_sum(float value) {
  value += mx::shfl_xor(value, 1);
  return value + mx::shfl_xor(value, 2);
}

// What row_max stands for in a subtraction: -inf - -inf would be NaN, so a row without keys subtracts 0 and gets
// weights exp2(-inf) = 0.
MX_DEVICE float finite_or_zero(float row_max) {
  return row_max == -INFINITY ? 0.0f : row_max;
}

// A number for each of a lane's two rows.
struct PerRow {
  float of_row[2];
};

// Scores, -inf where masked and not yet scaled, become weights in float32, which row_max and this lane's row_sum take
// in. Returns the factor of everything summed before. unit_log2: of what the weights are to be multiplied with (V's
// scales): they come out divided by the largest weight times unit so far, which row_max stands for.
template <int kScoreTiles>
MX_DEVICE PerRow weigh_scores(float (&scores)[kScoreTiles][4], const PerRow& scale_log2, float (&row_max)[2],
                              float (&row_sum)[2], const PerRow& unit_log2 = {{0.0f, 0.0f}}) {
  float offset[2];
  PerRow rescale;
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    float largest = -INFINITY;
    MX_UNROLL
    for (int i = 0; i < kScoreTiles; ++i) largest = fmaxf(largest, fmaxf(scores[i][2 * h], scores[i][2 * h + 1]));
    const float new_row_max = fmaxf(row_max[h], quad_max(largest) * scale_log2.of_row[h] + unit_log2.of_row[h]);
    offset[h] = finite_or_zero(new_row_max);
    rescale.of_row[h] = mx::ex2(row_max[h] - offset[h]);
    row_max[h] = new_row_max;
    row_sum[h] *= rescale.of_row[h];
  }
  MX_UNROLL
  for (int i = 0; i < kScoreTiles; ++i) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      scores[i][2 * h] = mx::ex2(scores[i][2 * h] * scale_log2.of_row[h] - offset[h]);
      scores[i][2 * h + 1] = mx::ex2(scores[i][2 * h + 1] * scale_log2.of_row[h] - offset[h]);
      row_sum[h] += scores[i][2 * h] + scores[i][2 * h + 1];
    }
  }
  return rescale;
}

// Weights (16, 8 kScoreTiles) as A operands of mma.m16n8k16 and wgmma: columns 16 k to 16 k + 7 are a[0] and a[1], the
// next 8 a[2] and a[3]; no value changes its lane.
template <class T, int kScoreTiles>
MX_DEVICE void pack_weights(const float (&weights)[kScoreTiles][4], uint32_t (&packed)[kScoreTiles / 2][4]) {
  MX_UNROLL
  for (int i = 0; i < kScoreTiles; ++i) {
    MX_UNROLL
    for (int h = 0; h < 2; ++h) {
      packed[i / 2][2 * (i % 2) + h] = mx::pack2(weights[i][2 * h], weights[i][2 * h + 1], T{});
    }
  }
}

struct RowEnd {
  float inverse_sum;  // the factor that makes a sum of weighted values an average; 0 for a row without keys
  float lse_log2;     // -inf for a row without keys
};

// row_sum: of the whole row.
MX_DEVICE RowEnd finish_row(float row_max, float row_sum) {
  if (row_sum == 0.0f) return {0.0f, -INFINITY};
  return {1.0f / row_sum, row_max + mx::lg2(row_sum)};
}

// The factors of a new state, a result over other keys with its own weight (exp2 of state_log2), and of what was summed
// before it.
struct StateFactors {
  float rescale;
  float weight;
};

MX_DEVICE StateFactors absorb_state(float state_log2, float& row_max) {
  const float new_row_max = fmaxf(row_max, state_log2);
  const float offset = finite_or_zero(new_row_max);
  const StateFactors factors = {mx::ex2(row_max - offset), mx::ex2(state_log2 - offset)};
  row_max = new_row_max;
  return factors;
}

// finish_row after one more logit that has no value: sink_log2, -inf for none.
MX_DEVICE RowEnd finish_row_with_sink(float row_max, float row_sum, float sink_log2) {
  const StateFactors factors = absorb_state(sink_log2, row_max);
  const RowEnd end = finish_row(row_max, row_sum * factors.rescale + factors.weight);
  return {end.inverse_sum * factors.rescale, end.lse_log2};
}

}  // namespace cuda
}  // namespace mixattn
