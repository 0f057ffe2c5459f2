// plan.cu: the image of the planner; the emulation includes this file, too.

#include "cuda/plan.cuh"

extern "C" MX_KERNEL MX_LAUNCH_BOUNDS(mixattn::cuda::kPlanMostThreads, 1)
    mixattn_sm80_plan(const MX_GRID_CONSTANT mixattn::cuda::PlanLaunch p) {
  mixattn::cuda::plan_batch(p);
}
