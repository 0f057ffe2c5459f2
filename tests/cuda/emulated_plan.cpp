// emulated_plan.cpp: the planner's kernel for the emulated driver. It reads and writes global memory as plain C++ does,
// so that the emulation does not see where; its tests look at what lies around its buffers.

#include "cuda/sm80/plan.cu"
#include "emulated_driver.h"

namespace {

[[maybe_unused]] const bool kAdded = emulated_driver::add_kernel(
    "mixattn_sm80_plan",
    {[](void** arguments) { mixattn_sm80_plan(*static_cast<mixattn::cuda::PlanLaunch*>(arguments[0])); },
     nullptr,
     {sizeof(mixattn::cuda::PlanLaunch)}});

}  // namespace
