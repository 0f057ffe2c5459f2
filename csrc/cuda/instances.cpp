// instances.cpp: see instances.h. The kernels' headers are here for the shapes of their blocks; nothing is run.

#include "cuda/instances.h"

#include "cuda/plan.cuh"
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

std::vector<Instance> make_instances() {
  std::vector<Instance> all;
#define MIXATTN_ADD(element, kHeadDim, scores)                                                                    \
  all.push_back({MIXATTN_NAME(MIXATTN_SM90_NAME(element, kHeadDim, scores)), "sm90_mixed_attention_hd" #kHeadDim, \
                 kSm90, kSm90, dtype_of(mx::element{}), kHeadDim, MIXATTN_SCORES(scores), sm90::kBlockThreads,    \
                 static_cast<int>(sm90::Layout<kHeadDim>::kBytes), sm90::kWorkersPerSm, true});
  MIXATTN_SM90_INSTANCES(MIXATTN_ADD)
#undef MIXATTN_ADD
#define MIXATTN_ADD(element, kHeadDim, scores)                                                                    \
  all.push_back({MIXATTN_NAME(MIXATTN_SM80_NAME(element, kHeadDim, scores)), "sm80_mixed_attention_hd" #kHeadDim, \
                 kSm80, kAnyCapability, dtype_of(mx::element{}), kHeadDim, MIXATTN_SCORES(scores), kNumThreads,   \
                 static_cast<int>(sm80::kSharedBytes<kHeadDim>), sm80::kBlocksPerSm, false});
  MIXATTN_SM80_INSTANCES(MIXATTN_ADD)
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

const Instance& instance_for(const AttentionParams& p, int capability) {
  const bool has_small_apart = p.plan == nullptr || reinterpret_cast<const PlanHeader*>(p.plan)->first_small >= 0;
  for (const Instance& instance : instances()) {
    if (instance.separates_small && !has_small_apart) continue;
    if (capability >= instance.least_capability && capability <= instance.most_capability &&
        p.dtype == instance.dtype && p.head_dim == instance.head_dim && takes(instance.scores, p)) {
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

std::vector<Kernel> other_kernels() {
  return {plan_kernel()};
}

}  // namespace cuda
}  // namespace mixattn
