// instances.cpp: see instances.h. The kernels' headers are here for the shapes of their blocks; nothing is run.

#include "cuda/instances.h"

#include <algorithm>

#include "cuda/append_kv.cuh"
#include "cuda/merge_states.cuh"
#include "cuda/plan.cuh"
#include "cuda/sm80/quantised.cuh"
#include "cuda/sm90/mixed_attention.cuh"

namespace mixattn {
namespace cuda {

namespace {

constexpr int kSm80 = 80;
constexpr int kSm90 = 90;

constexpr DType dtype_of(mx::bf16) {
  return DType::kBFloat16;
}
constexpr DType dtype_of(mx::f16) {
  return DType::kFloat16;
}

#define MIXATTN_STRING(text) #text
#define MIXATTN_NAME(name) MIXATTN_STRING(name)

constexpr KvDType kv_dtype_of(DType dtype) {
  return static_cast<KvDType>(dtype);
}

std::vector<Instance> make_instances() {
  std::vector<Instance> all;
#define MIXATTN_ADD(element, kHeadDim, scores)                                                                    \
  all.push_back({MIXATTN_NAME(MIXATTN_SM90_NAME(element, kHeadDim, scores)), "sm90_mixed_attention_hd" #kHeadDim, \
                 kSm90, kSm90, dtype_of(mx::element{}), kv_dtype_of(dtype_of(mx::element{})), kHeadDim, kHeadDim, \
                 MIXATTN_SCORES(scores), sm90::kBlockThreads, static_cast<int>(sm90::Layout<kHeadDim>::kBytes),   \
                 sm90::kWorkersPerSm, true, true});
  MIXATTN_SM90_INSTANCES(MIXATTN_ADD)
#undef MIXATTN_ADD
#define MIXATTN_ADD(element, heads, scores)                                                                           \
  all.push_back({MIXATTN_NAME(MIXATTN_SM80_NAME(element, heads, scores)), "sm80_mixed_attention_hd" #heads, kSm80,    \
                 kAnyCapability, dtype_of(mx::element{}), kv_dtype_of(dtype_of(mx::element{})), MIXATTN_HEADS(heads), \
                 MIXATTN_SCORES(scores), kNumThreads, static_cast<int>(sm80::kSharedBytes<MIXATTN_HEADS(heads)>),     \
                 sm80::kBlocksPerSm, false, false});
  MIXATTN_SM80_INSTANCES(MIXATTN_ADD)
#undef MIXATTN_ADD
#define MIXATTN_ADD(stored, kStored, heads, scores)                                                                   \
  all.push_back(                                                                                                      \
      {MIXATTN_NAME(MIXATTN_SM80_QUANTISED_NAME(stored, heads, scores)), "sm80_quantised_hd" #heads, kSm80,           \
       kAnyCapability, std::nullopt, KvDType::kStored, MIXATTN_HEADS(heads), MIXATTN_SCORES(scores), kNumThreads,     \
       static_cast<int>(sm80::kQuantisedSharedBytes<MIXATTN_HEADS(heads), MIXATTN_SCORES(scores), KvDType::kStored>), \
       sm80::kBlocksPerSm, false, false});
  MIXATTN_SM80_QUANTISED_INSTANCES(MIXATTN_ADD)
#undef MIXATTN_ADD
  return all;
}

}  // namespace

const std::vector<Instance>& instances() {
  static const std::vector<Instance> all = make_instances();
  return all;
}

namespace {

bool takes(Scores scores, const AttentionParams& p) {
  if (scores == Scores::kAny) return true;
  return p.alibi_slopes == nullptr && p.tree_mask == nullptr && (p.soft_cap > 0.0f) == (scores == Scores::kCapped);
}

}  // namespace

const Instance& instance_for(const AttentionParams& p, int capability, bool has_small_apart) {
  for (const Instance& instance : instances()) {
    // Where small items have threads of their own, these sum up in another order than the others: no invariance.
    if (instance.separates_small && (!has_small_apart || p.invariant)) continue;
    if (capability >= instance.least_capability && capability <= instance.most_capability &&
        p.dtype == instance.dtype.value_or(p.dtype) && p.kv_dtype == instance.kv_dtype &&
        p.head_dim == instance.head_dim && p.v_head_dim == instance.v_head_dim && takes(instance.scores, p)) {
      return instance;
    }
  }
  throw std::domain_error("a GPU of compute capability " + std::to_string(capability / 10) + "." +
                          std::to_string(capability % 10) +
                          " has no CUDA kernel for this call; the nearest that has is 8.0");
}

const Kernel& plan_kernel() {
  static const Kernel kernel = {"mixattn_sm80_plan", "sm80_plan", kPlanMostThreads, static_cast<int>(kBlockOpsBytes)};
  return kernel;
}

namespace {

struct AppendKvInstance {
  DType dtype;
  KvDType stored;
  Kernel kernel;
};

const std::vector<AppendKvInstance>& append_kv_instances() {
#define MIXATTN_ADD(element, stored, kStored) \
  {dtype_of(mx::element{}),                   \
   KvDType::kStored,                          \
   {MIXATTN_NAME(MIXATTN_APPEND_KV_NAME(element, stored)), "sm80_append_kv", kAppendThreads, 0}},
  static const std::vector<AppendKvInstance> all = {MIXATTN_APPEND_KV_INSTANCES(MIXATTN_ADD)};
#undef MIXATTN_ADD
  return all;
}

void check_vector(const char* name, uintptr_t value, uintptr_t multiple, const char* unit) {
  if (value % multiple != 0) {
    throw std::domain_error(std::string(name) + " " + unit + " " + std::to_string(value % multiple) +
                            " past a multiple of " + std::to_string(multiple) +
                            " has no CUDA kernel; the nearest that has is such a multiple");
  }
}

}  // namespace

const Kernel& append_kv_kernel(const AppendKvParams& p) {
  const auto is_of_call = [&](const AppendKvInstance& each) {
    return each.dtype == p.dtype && each.stored == p.kv_dtype;
  };
  const std::vector<AppendKvInstance>& all = append_kv_instances();
  const auto found = std::find_if(all.begin(), all.end(), is_of_call);
  if (p.dtype == DType::kFloat32) {
    throw std::domain_error("k.dtype float32 has no CUDA kernel; the nearest that has is bfloat16");
  }
  if (found == all.end()) {
    throw std::domain_error("k_cache in another float dtype than k has no CUDA kernel; the nearest that has is k's");
  }
  const struct {
    const char* name;
    const void* address;
    int64_t strides[3];
  } rows[] = {{"k", p.k, {p.k_token_stride, p.k_head_stride, 0}},
              {"v", p.v, {p.v_token_stride, p.v_head_stride, 0}},
              {"q", p.q, {p.q_token_stride, p.q_head_stride, 0}},
              {"q_out", p.q_out, {p.q_out_token_stride, p.q_out_head_stride, 0}}};
  const struct {
    const char* name;
    const void* address;
    int64_t strides[3];
  } caches[] = {{"k_cache", p.k_cache, {p.k_cache_page_stride, p.k_cache_token_stride, p.k_cache_head_stride}},
                {"v_cache", p.v_cache, {p.v_cache_page_stride, p.v_cache_token_stride, p.v_cache_head_stride}}};
  // A lane stores 8 elements at once; strides of int4 count bytes.
  const uintptr_t cache_bytes = !is_quantised(p.kv_dtype) ? 16 : p.kv_dtype == KvDType::kInt4 ? 4 : 8;
  const uintptr_t cache_elements = p.kv_dtype == KvDType::kInt4 ? 4 : kLaneElements;
  for (const auto& row : rows) {
    check_vector(row.name, reinterpret_cast<uintptr_t>(row.address), 16, "at a byte");
    for (int64_t stride : row.strides)
      check_vector(row.name, static_cast<uintptr_t>(stride), kLaneElements, "with a stride");
  }
  for (const auto& cache : caches) {
    check_vector(cache.name, reinterpret_cast<uintptr_t>(cache.address), cache_bytes, "at a byte");
    for (int64_t stride : cache.strides)
      check_vector(cache.name, static_cast<uintptr_t>(stride), cache_elements, "with a stride");
  }
  return found->kernel;
}

namespace {

const std::vector<Kernel>& merge_states_instances() {
#define MIXATTN_ADD(element) {MIXATTN_NAME(MIXATTN_MERGE_STATES_NAME(element)), "sm80_merge_states", kMergeThreads, 0},
  static const std::vector<Kernel> all = {MIXATTN_MERGE_STATES_INSTANCES(MIXATTN_ADD)};
#undef MIXATTN_ADD
  return all;
}

}  // namespace

const Kernel& merge_states_kernel(const MergeStatesParams& p) {
  if (p.dtype == DType::kFloat32) {
    throw std::domain_error("outs.dtype float32 has no CUDA kernel; the nearest that has is bfloat16");
  }
  check_vector("outs", reinterpret_cast<uintptr_t>(p.outs), 16, "at a byte");
  for (int64_t stride : {p.outs_state_stride, p.outs_token_stride, p.outs_head_stride}) {
    check_vector("outs", static_cast<uintptr_t>(stride), kLaneElements, "with a stride");
  }
  return merge_states_instances()[p.dtype == DType::kBFloat16 ? 0 : 1];
}

std::vector<Kernel> other_kernels() {
  std::vector<Kernel> all = {plan_kernel()};
  for (const AppendKvInstance& each : append_kv_instances()) all.push_back(each.kernel);
  for (const Kernel& each : merge_states_instances()) all.push_back(each);
  return all;
}

}  // namespace cuda
}  // namespace mixattn
