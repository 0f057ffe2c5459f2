// replay.cpp: runs a recorded launch again: replay FILE SEED FAULT. Its tensors are allocations of exactly their size,
// so that sanitizers see what is read or written beside them.
// Status 0: the tensors hold, bit by bit, what they held after the recorded launch. 1: they do not. 2: the emulation
// has ended the launch. Sanitizers have their own (tests/cuda/test_sanitizers.py).

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>

#include "emulated_driver.h"
#include "recording.h"

namespace {

constexpr std::align_val_t kAlignment{64};

struct Delete {
  void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
};
using Memory = std::unique_ptr<char, Delete>;

std::map<std::string, emulated_driver::Kernel>& kernels() {
  static std::map<std::string, emulated_driver::Kernel> all;
  return all;
}

// Puts addresses of recorded tensors right: a word of the parameters that looks like one is one. Not those inside of a
// tensor: what is left in a struct's padding may look like them.
void relocate(std::string& params, const std::vector<recording::Span>& tensors, const std::vector<Memory>& memory) {
  for (size_t at = 0; at + sizeof(uint64_t) <= params.size(); at += sizeof(uint64_t)) {
    uint64_t word;
    memcpy(&word, params.data() + at, sizeof word);
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (word != tensors[i].begin) continue;
      const uint64_t moved = reinterpret_cast<uint64_t>(memory[i].get());
      memcpy(params.data() + at, &moved, sizeof moved);
    }
  }
}

int run(const std::string& path, uint64_t seed) {
  // Static: when a launch ends with an error, fibers are left that have read them.
  static recording::Launch launch;
  static std::vector<void*> argument_list;
  launch = recording::read(path);
  const emulated_driver::Kernel& kernel = kernels().at(launch.name);
  std::vector<Memory> memory;
  for (const std::string& bytes : launch.before) {
    memory.emplace_back(static_cast<char*>(::operator new(bytes.size(), kAlignment)));
    memcpy(memory.back().get(), bytes.data(), bytes.size());
  }
  for (std::string& param : launch.params) {
    relocate(param, launch.tensors, memory);
    argument_list.push_back(param.data());
  }
  void** const arguments = argument_list.data();
  std::vector<emu::Region> regions = {{"anything", nullptr, SIZE_MAX}};
  if (kernel.regions) regions = kernel.regions(arguments);
  emu::launch(emu::config_of_seed(seed), launch.num_blocks, launch.num_threads, launch.shared_bytes, regions,
              [&] { kernel.run(arguments); });
  int num_different = 0;
  for (size_t i = 0; i < memory.size(); ++i) {
    if (memcmp(memory[i].get(), launch.after[i].data(), launch.after[i].size()) == 0) continue;
    std::fprintf(stderr, "tensor %zu of the recording differs\n", i);
    ++num_different;
  }
  return num_different == 0 ? 0 : 1;
}

}  // namespace

namespace emulated_driver {

bool add_kernel(const std::string& name, Kernel kernel) {
  kernels()[name] = std::move(kernel);
  return true;
}

}  // namespace emulated_driver

int main(int num_arguments, char** arguments) {
  if (num_arguments != 4) {
    std::fprintf(stderr, "usage: replay FILE SEED FAULT\n");
    return EXIT_FAILURE;
  }
  emu::active_fault = std::atoi(arguments[3]);
  try {
    return run(arguments[1], std::strtoull(arguments[2], nullptr, 10));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulation: %s\n", error.what());
    std::_Exit(2);  // fibers stand in the middle of the kernel
  }
}
