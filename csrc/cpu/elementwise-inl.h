// elementwise-inl.h: what a decoder layer does between its matrix products, for one ISA.
// Math    rms_norm y = x / sqrt(mean(x^2) + eps) * weight; silu_mul y = g / (1 + e^-g) * u
// Method  two passes over a row (the second finds it in L1), one over gate and up
// Grid    rows [begin, end) of the call; cpu/linear.cpp deals them to its threads
// Shapes  as RmsNormParams and SiluMulParams
// Memory  reads and writes every element once
// Limits  none
// Twins   truth: torch in float64 (tests/ops/test_elementwise.py)
// Source  arXiv:1910.07467, equation 4; arXiv:2002.05202
#pragma once

#include <string.h>

#include "common/linear_params.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace mixattn {
namespace cpu {
namespace {

MIXATTN_INLINE void rms_norm_one(const float* x, const float* weight, int64_t size, float eps, float* y) {
  Vec sums[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    sums[0] = fmadd(a, a, sums[0]);
    sums[1] = fmadd(b, b, sums[1]);
  }
  float sum = sum_lanes(add(sums[0], sums[1]));
  for (; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(size) + eps);
  for (i = 0; i + kLanes <= size; i += kLanes) store(y + i, mul(mul(load(x + i), broadcast(scale)), load(weight + i)));
  for (; i < size; ++i) y[i] = x[i] * scale * weight[i];
}

void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < p.num_groups; ++group) {
      rms_norm_one(p.x + row * p.x_row_stride + group * p.x_group_stride, p.weight, p.size, p.eps,
                   p.y + row * p.y_row_stride + group * p.y_group_stride);
    }
  }
}

// g / (1 + e^-g), with e = e^-|g| so that nothing overflows: g / (1 + e) above 0, g e / (1 + e) below.
MIXATTN_INLINE Vec silu(Vec g) {
  const Vec e = exp2_nonpositive(mul(abs(g), broadcast(-kLog2E)));
  const Vec numerator = select_less(g, zero(), mul(g, e), g);
  return div(numerator, add(broadcast(1.0f), e));
}

void silu_mul_rows(const SiluMulParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = p.gate_up + row * p.gate_up_stride;
    const float* up = gate + p.size;
    float* y = p.y + row * p.y_stride;
    int64_t i = 0;
    for (; i + kLanes <= p.size; i += kLanes) store(y + i, mul(silu(load(gate + i)), load(up + i)));
    if (i == p.size) continue;
    float rest[3][kLanes] = {};
    const int64_t num_left = p.size - i;
    memcpy(rest[0], gate + i, static_cast<size_t>(num_left) * sizeof(float));
    memcpy(rest[1], up + i, static_cast<size_t>(num_left) * sizeof(float));
    store(rest[2], mul(silu(load(rest[0])), load(rest[1])));
    memcpy(y + i, rest[2], static_cast<size_t>(num_left) * sizeof(float));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
