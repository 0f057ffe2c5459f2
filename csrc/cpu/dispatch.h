// dispatch.h: which CPU this is and which kernels it gets. The only place where an ISA is chosen.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mixattn {
namespace cpu {

// All kernels of this build, best first.
const std::vector<const IsaKernels*>& compiled_kernels();

// Whether this CPU (or the emulation) runs them.
bool is_available(const IsaKernels& kernels);

// How long as many products of bfloat16 pairs as FMAs take.
struct LoopTimes {
  double bfloat16_s;
  double fma_s;
};

struct KernelChoice {
  const IsaKernels* kernels;
  std::string passed_over;  // better ones that were not taken, and why; empty: there are none
};

// The first of `candidates`, which are best first and not all to be passed over: kernels with a bfloat16_loop are where
// such a product takes twice as long as an FMA or longer. Each lane of it has two products, so that in less time it is
// the faster one.
KernelChoice choose_kernels(const std::vector<const IsaKernels*>& candidates,
                            const std::function<LoopTimes(const IsaKernels&)>& time_loops);

// The choice among what this CPU runs natively, made by measuring at the first call.
const KernelChoice& best_choice();
const IsaKernels& best_kernels();

// The kernels by name, whether they run here or not; std::invalid_argument if this build has none of it.
const IsaKernels& compiled_kernels_named(const std::string& isa);

// The kernels by name; std::invalid_argument naming what is available if there are none of this name that run here.
const IsaKernels& kernels_named(const std::string& isa);

struct CpuDescription {
  std::string model;
  int64_t num_cpus;
  int64_t l1d_bytes;  // 0 where the system does not say
  int64_t l2_bytes;
};
CpuDescription describe_cpu();

}  // namespace cpu
}  // namespace mixattn
