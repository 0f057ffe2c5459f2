// emulated_driver.h: kernels for the emulated driver. A file of kernels adds them when the library is loaded.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "emu/emu.h"

namespace emulated_driver {

struct Kernel {
  // Runs one thread. arguments: as cuLaunchKernel takes them.
  std::function<void(void** arguments)> run;
  // The memory that a launch with these arguments may touch; empty: any.
  std::function<std::vector<emu::Region>(void** arguments)> regions;
  // Of each argument, a struct.
  std::vector<size_t> argument_bytes;
};

// Returns true, so that it can be called from an initialiser.
bool add_kernel(const std::string& name, Kernel kernel);

}  // namespace emulated_driver
