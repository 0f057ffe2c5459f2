// dispatch.h: which CPU this is and which kernels it gets. The only place where an ISA is chosen.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mixattn {
namespace cpu {

// All kernels of this build, best first.
const std::vector<const IsaKernels*>& compiled_kernels();

// Whether this CPU (or the emulation) runs them.
bool is_available(const IsaKernels& kernels);

// The best that this CPU runs natively.
const IsaKernels& best_kernels();

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
