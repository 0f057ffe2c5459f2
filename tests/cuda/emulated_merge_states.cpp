// emulated_merge_states.cpp: the kernels of merge_states for the emulated driver, and the memory that each may touch.

#include "cuda/sm80/merge_states.cu"
#include "emulated_driver.h"

namespace {

using mixattn::MergeStatesParams;

std::vector<emu::Region> regions_of(const MergeStatesParams& p) {
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const int64_t last_row = (p.num_states - 1) * p.outs_state_stride + (p.num_tokens - 1) * p.outs_token_stride +
                           (p.num_heads - 1) * p.outs_head_stride;
  return {{"outs", p.outs, 2 * static_cast<size_t>(last_row + p.head_dim)},
          {"out", p.out, 2 * static_cast<size_t>(num_rows * p.head_dim)},
          {"lse", p.lse, sizeof(float) * static_cast<size_t>(num_rows)}};
}

const MergeStatesParams& params_of(void** arguments) {
  return *static_cast<const MergeStatesParams*>(arguments[0]);
}

bool add(const char* name, void (*kernel)(MergeStatesParams)) {
  return emulated_driver::add_kernel(name, {[kernel](void** arguments) { kernel(params_of(arguments)); },
                                            [](void** arguments) { return regions_of(params_of(arguments)); },
                                            {sizeof(MergeStatesParams)}});
}

#define STRING(text) #text
#define NAME(name) STRING(name)
#define ADD(element) add(NAME(MIXATTN_MERGE_STATES_NAME(element)), MIXATTN_MERGE_STATES_NAME(element)),
[[maybe_unused]] const bool kAdded[] = {MIXATTN_MERGE_STATES_INSTANCES(ADD)};

}  // namespace
