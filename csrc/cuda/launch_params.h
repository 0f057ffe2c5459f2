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
};

// What a kernel is compiled for.
enum class Scores {
  kPlain,
  kCapped,  // with a soft cap
  kAny,     // soft cap, ALiBi and tree mask where the call has them
};

constexpr int64_t kHeadDims[] = {64, 96, 128, 192, 256};
constexpr int64_t kVectorElements = 8;  // of 16 bytes: what one asynchronous copy moves

// Throws std::domain_error (Python: NotImplementedError), naming the nearest call that has a kernel, unless this one
// has. What addresses hold is not read; an option is on if its address is not null.
inline void check_call(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32) {
    throw std::domain_error("q.dtype float32 has no CUDA kernel; the nearest that has is bfloat16");
  }
  if (static_cast<int32_t>(p.kv_dtype) != static_cast<int32_t>(p.dtype)) {
    throw std::domain_error("k_cache in another dtype than q has no CUDA kernel; the nearest that has is q's");
  }
  const auto nearest = std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims) - 1, p.head_dim);
  if (*nearest != p.head_dim) {
    throw std::domain_error("head_dim " + std::to_string(p.head_dim) + " has no CUDA kernel; the nearest that has is " +
                            std::to_string(*nearest));
  }
  const struct {
    const char* name;
    int64_t stride;
  } strides[] = {{"q token", p.q_token_stride},       {"q head", p.q_head_stride},
                 {"k_cache page", p.k_page_stride},   {"k_cache token", p.k_token_stride},
                 {"k_cache head", p.k_head_stride},   {"v_cache page", p.v_page_stride},
                 {"v_cache token", p.v_token_stride}, {"v_cache head", p.v_head_stride}};
  for (const auto& each : strides) {
    if (each.stride % kVectorElements != 0) {
      throw std::domain_error(std::string(each.name) + " stride " + std::to_string(each.stride) +
                              " has no CUDA kernel; the nearest that has is a multiple of 8 elements");
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
  launch.score_scale = has_soft_cap ? 2.0f * p.softmax_scale * kBase2 / p.soft_cap : p.softmax_scale * kBase2;
  launch.score_cap = p.soft_cap * kBase2;
  return launch;
}

}  // namespace cuda
}  // namespace mixattn
