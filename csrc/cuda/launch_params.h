// launch_params.h: a call of attention as the CUDA kernels take it, and what they can run. Host code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>

#include "common/checks.h"
#include "common/params.h"

namespace mixattn {
namespace cuda {

// tickets: [2 + num_merges], zeros between launches: the next item of each queue, then one per merge.
struct LaunchParams {
  AttentionParams call;
  int32_t group_size;
  int32_t window_left;  // INT32_MAX: no window
  // In units of log2, so that the kernel's only exponential is exp2. Without a cap a score times score_scale; with one,
  // a score times score_scale is twice tanh's argument, and tanh times score_cap the logit.
  float score_scale;
  float score_cap;
  float value_scale;  // of what V's elements are as the kernel has them; 1 where they are not quantised
};

// What a kernel is compiled for.
enum class Scores {
  kPlain,
  kCapped,  // with a soft cap
  kAny,     // soft cap, ALiBi and tree mask where the call has them
};

MIXATTN_HD constexpr bool is_quantised(KvDType stored) {
  return static_cast<int32_t>(stored) >= static_cast<int32_t>(KvDType::kInt8);
}

// head_dim and v_head_dim, in ascending order.
constexpr int64_t kHeadDims[][2] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {192, 192}, {256, 256}};
constexpr float kE4M3Scale = 256.0f;    // of float8_e4m3fn as it is widened: sm80/quantised.cuh
constexpr int64_t kVectorBytes = 16;    // that one asynchronous copy moves
constexpr int64_t kVectorElements = 8;  // of q's dtype in them

// Throws std::domain_error (Python: NotImplementedError), naming the nearest call that has a kernel, unless this one
// has. What addresses hold is not read; an option is on if its address is not null.
inline void check_call(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32) {
    throw std::domain_error("q.dtype float32 has no CUDA kernel; the nearest that has is bfloat16");
  }
  const bool is_widened = is_quantised(p.kv_dtype);
  if (!is_widened && static_cast<int32_t>(p.kv_dtype) != static_cast<int32_t>(p.dtype)) {
    throw std::domain_error("k_cache in another float dtype than q has no CUDA kernel; the nearest that has is q's");
  }
  // The nearest is the first in which both fit.
  const auto is_enough = [&](const int64_t (&dims)[2]) { return dims[0] >= p.head_dim && dims[1] >= p.v_head_dim; };
  const auto nearest = std::find_if(std::begin(kHeadDims), std::end(kHeadDims) - 1, is_enough);
  if ((*nearest)[0] != p.head_dim || (*nearest)[1] != p.v_head_dim) {
    const auto name = [&](int64_t head_dim, int64_t v_head_dim) {
      return std::to_string(head_dim) +
             (p.v_head_dim == p.head_dim ? "" : " with v_head_dim " + std::to_string(v_head_dim));
    };
    throw std::domain_error("head_dim " + name(p.head_dim, p.v_head_dim) +
                            " has no CUDA kernel; the nearest that has is " + name((*nearest)[0], (*nearest)[1]));
  }
  // Strides of int4 count bytes, as those of int8 and float8 do.
  const int64_t stored_vector = is_widened ? kVectorBytes : kVectorElements;
  const struct {
    const char* name;
    int64_t stride;
    int64_t multiple;
  } strides[] = {{"q token", p.q_token_stride, kVectorElements},     {"q head", p.q_head_stride, kVectorElements},
                 {"k_cache page", p.k_page_stride, stored_vector},   {"k_cache token", p.k_token_stride, stored_vector},
                 {"k_cache head", p.k_head_stride, stored_vector},   {"v_cache page", p.v_page_stride, stored_vector},
                 {"v_cache token", p.v_token_stride, stored_vector}, {"v_cache head", p.v_head_stride, stored_vector}};
  for (const auto& each : strides) {
    if (each.stride % each.multiple != 0) {
      throw std::domain_error(std::string(each.name) + " stride " + std::to_string(each.stride) +
                              " has no CUDA kernel; the nearest that has is a multiple of " +
                              std::to_string(each.multiple) + " elements");
    }
  }
  // Results are stored two elements at a time.
  if (p.out_token_stride % 2 != 0 || p.out_head_stride % 2 != 0) {
    throw std::domain_error("out with an odd stride has no CUDA kernel; the nearest that has is a multiple of 2");
  }
  const struct {
    const char* name;
    const void* address;
    uintptr_t alignment;
  } tensors[] = {{"q", p.q, 16}, {"k_cache", p.k_cache, 16}, {"v_cache", p.v_cache, 16}, {"out", p.out, 4}};
  for (const auto& each : tensors) {
    if (reinterpret_cast<uintptr_t>(each.address) % each.alignment != 0) {
      throw std::domain_error(std::string(each.name) + " must start at a multiple of " +
                              std::to_string(each.alignment) + " bytes for the CUDA kernel");
    }
  }
}

// Throws std::invalid_argument (Python: ValueError) unless the workspace holds what this plan needs.
inline void check_workspace(const AttentionParams& p, const PlanHeader& plan) {
  check_range("num_tickets", p.num_tickets, 2 + int64_t{plan.num_merges}, INT64_MAX);
  check_range("num_partial_rows", p.num_partial_rows, plan.num_partial_rows, INT64_MAX);
}

inline LaunchParams make_launch_params(const AttentionParams& p) {
  constexpr float kBase2 = 1.4426950408889634f;  // log2(e)
  LaunchParams launch;
  launch.call = p;
  launch.group_size = static_cast<int32_t>(p.group_size());
  launch.window_left = p.window_left < 0 ? INT32_MAX : static_cast<int32_t>(p.window_left);
  const bool has_soft_cap = p.soft_cap > 0.0f;
  const float code_scale = p.kv_dtype == KvDType::kFloat8E4M3 ? kE4M3Scale : 1.0f;
  launch.score_scale = p.softmax_scale * kBase2 * p.k_scale.value * code_scale;
  if (has_soft_cap) launch.score_scale *= 2.0f / p.soft_cap;
  launch.score_cap = p.soft_cap * kBase2;
  launch.value_scale = p.v_scale.value * code_scale;
  return launch;
}

}  // namespace cuda
}  // namespace mixattn
