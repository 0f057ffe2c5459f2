// instances.h: every kernel that is compiled for GPUs, and which of them a call gets. Host code.
// Method  a list per architecture, MIXATTN_<ARCHITECTURE>_INSTANCES(X), names the compile-time parameters of each
//         kernel once. csrc/cuda/<architecture>/*.cu make the entry points from it for nvcc, instances.cpp the table
//         below, and tests/cuda/emulated_attention.cpp the same entry points for the emulation. The kernels beside
//         attention are one each for all architectures; the emulation includes their .cu files.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/launch_params.h"

// The sizes of heads, as names of kernels have them, and the head_dim and v_head_dim that they stand for.
#define MIXATTN_SM80_HEADS(X, INSTANCES_OF) \
  INSTANCES_OF(X, 64)                       \
  INSTANCES_OF(X, 96)                       \
  INSTANCES_OF(X, 128)                      \
  INSTANCES_OF(X, 192_v128)                 \
  INSTANCES_OF(X, 192)                      \
  INSTANCES_OF(X, 256)
#define MIXATTN_HEADS(heads) MIXATTN_HEADS_##heads
#define MIXATTN_HEADS_64 64, 64
#define MIXATTN_HEADS_96 96, 96
#define MIXATTN_HEADS_128 128, 128
#define MIXATTN_HEADS_192_v128 192, 128
#define MIXATTN_HEADS_192 192, 192
#define MIXATTN_HEADS_256 256, 256

// X(element, heads, scores): element as in prim.cuh; scores plain, capped or any: Scores::kPlain, ...
#define MIXATTN_SM80_INSTANCES_OF(X, heads) \
  X(bf16, heads, plain)                     \
  X(bf16, heads, capped)                    \
  X(bf16, heads, any)                       \
  X(f16, heads, plain)                      \
  X(f16, heads, capped)                     \
  X(f16, heads, any)
#define MIXATTN_SM80_INSTANCES(X) MIXATTN_SM80_HEADS(X, MIXATTN_SM80_INSTANCES_OF)

// X(stored, kStored, heads, scores): stored and kStored as for append_kv, below. `any` serves soft caps. A call tells
// the element.
#define MIXATTN_SM80_QUANTISED_INSTANCES_BY(X, heads, scores) \
  X(int8, kInt8, heads, scores)                               \
  X(e4m3, kFloat8E4M3, heads, scores)                         \
  X(e5m2, kFloat8E5M2, heads, scores)                         \
  X(int4, kInt4, heads, scores)
#define MIXATTN_SM80_QUANTISED_INSTANCES_OF(X, heads)  \
  MIXATTN_SM80_QUANTISED_INSTANCES_BY(X, heads, plain) \
  MIXATTN_SM80_QUANTISED_INSTANCES_BY(X, heads, any)
#define MIXATTN_SM80_QUANTISED_INSTANCES(X) MIXATTN_SM80_HEADS(X, MIXATTN_SM80_QUANTISED_INSTANCES_OF)

// Without capped at head_dim 128: its consumers would need 176 registers a thread.
#define MIXATTN_SM90_INSTANCES_64(X) \
  X(bf16, 64, plain)                 \
  X(bf16, 64, capped)                \
  X(f16, 64, plain)                  \
  X(f16, 64, capped)
#define MIXATTN_SM90_INSTANCES_96(X) \
  X(bf16, 96, plain)                 \
  X(bf16, 96, capped)                \
  X(f16, 96, plain)                  \
  X(f16, 96, capped)
#define MIXATTN_SM90_INSTANCES_128(X) \
  X(bf16, 128, plain)                 \
  X(f16, 128, plain)
#define MIXATTN_SM90_INSTANCES(X) \
  MIXATTN_SM90_INSTANCES_64(X)    \
  MIXATTN_SM90_INSTANCES_96(X)    \
  MIXATTN_SM90_INSTANCES_128(X)

// The name of an instance's entry point, in its image and everywhere, and its Scores.
#define MIXATTN_SM80_NAME(element, heads, scores) mixattn_sm80_##element##_hd##heads##_##scores
#define MIXATTN_SM80_QUANTISED_NAME(stored, heads, scores) mixattn_sm80_##stored##_hd##heads##_##scores
#define MIXATTN_SM90_NAME(element, kHeadDim, scores) mixattn_sm90_##element##_hd##kHeadDim##_##scores
#define MIXATTN_SCORES(scores) mixattn::cuda::Scores::MIXATTN_SCORES_##scores
#define MIXATTN_SCORES_plain kPlain
#define MIXATTN_SCORES_capped kCapped
#define MIXATTN_SCORES_any kAny

// X(element, stored, kStored): element of k, v and q; what K and V are stored as, in words and as KvDType.
#define MIXATTN_APPEND_KV_INSTANCES_OF(X, element) \
  X(element, int8, kInt8)                          \
  X(element, e4m3, kFloat8E4M3)                    \
  X(element, e5m2, kFloat8E5M2)                    \
  X(element, int4, kInt4)
#define MIXATTN_APPEND_KV_INSTANCES(X)    \
  X(bf16, bf16, kBFloat16)                \
  X(f16, f16, kFloat16)                   \
  MIXATTN_APPEND_KV_INSTANCES_OF(X, bf16) \
  MIXATTN_APPEND_KV_INSTANCES_OF(X, f16)
#define MIXATTN_APPEND_KV_NAME(element, stored) mixattn_sm80_append_kv_##element##_##stored

// X(element): of outs and out.
#define MIXATTN_MERGE_STATES_INSTANCES(X) X(bf16) X(f16)
#define MIXATTN_MERGE_STATES_NAME(element) mixattn_sm80_merge_states_##element

namespace mixattn {
namespace cuda {

struct Instance {
  std::string name;   // of the entry point
  std::string image;  // the fatbin that it is in, less .fatbin
  int least_capability;
  int most_capability;         // 10 major + minor, both ends included
  std::optional<DType> dtype;  // none: either of 16 bits
  KvDType kv_dtype;
  int head_dim;
  int v_head_dim;
  Scores scores;
  int num_threads;
  int shared_bytes;
  int workers_per_sm;    // that draw items of a plan at the same time
  bool separates_small;  // whether it takes only plans with small items apart (PlanHeader::first_small)
  bool has_maps;         // whether sm90::KeyMaps are its second parameter
};

constexpr int kAnyCapability = INT32_MAX;

// The best kernel comes first.
const std::vector<Instance>& instances();

// The kernel for a call that check_call has passed, on a GPU of this capability, with a plan that has its small items
// apart or has not. The plan is not read. Throws std::domain_error when there is none.
const Instance& instance_for(const AttentionParams& p, int capability, bool has_small_apart);

// A kernel beside attention; its fields as in Instance.
struct Kernel {
  std::string name;
  std::string image;
  int num_threads;
  int shared_bytes;
};

const Kernel& plan_kernel();

// The kernel of append_kv for a call. Throws std::domain_error, naming the nearest call that has one, when there is
// none. What addresses hold is not read.
const Kernel& append_kv_kernel(const AppendKvParams& p);
const Kernel& merge_states_kernel(const MergeStatesParams& p);  // the same of merge_states

// All of them.
std::vector<Kernel> other_kernels();

}  // namespace cuda
}  // namespace mixattn
