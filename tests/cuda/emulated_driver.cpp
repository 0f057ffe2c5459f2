// emulated_driver.cpp: a library with the functions of NVIDIA's driver that csrc/cuda/driver.h takes. It has one
// device, the host, and launches by the emulation, at once. What the driver would refuse of a launch, it refuses.

#include "emulated_driver.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "cuda/driver.h"
#include "recording.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mixattn::cuda;

// The signatures are checked against those that the loader calls.
#define DECLARE(name, signature) EXPORT Result name signature;
MIXATTN_DRIVER_FUNCTIONS(DECLARE)
MIXATTN_LATER_DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE

namespace {

// CUresult
constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr Result kNotInitialized = 3;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidImage = 200;
constexpr Result kInvalidContext = 201;
constexpr Result kNotFound = 500;
constexpr Result kLaunchFailed = 719;
const std::map<Result, const char*> kNames = {
    {kSuccess, "CUDA_SUCCESS"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
};

constexpr uint32_t kFatbinMagic = 0xba55ed50;
constexpr char kEmulatedImage[] = "emulated";   // mixattn/ops/cuda_images.py
constexpr int kDefaultSharedBytes = 48 * 1024;  // without cuFuncSetAttribute

struct Config {
  int driver_version = 13000;
  int capability = 80;
  int num_sms = 3;  // enough that splits of one row are finished by different blocks, in any order
  uint64_t seed = 0;
};

struct Function {
  std::string name;
  emulated_driver::Kernel kernel;
  int max_shared_bytes = kDefaultSharedBytes;
};

Config config;

// Of an A100, or an H100.
int shared_bytes_per_block() {
  return (config.capability >= 90 ? 227 : 163) * 1024;
}

bool is_initialized = false;
int num_contexts = 0;  // pushed
std::string report;    // of the launch that failed last
std::string recording_path;
std::vector<recording::Span> recorded_tensors;
emu::Stats counts;
std::string launched;  // the kernel that counts are of
int num_blocks = 0;    // of the last launch

struct CapturedLaunch {
  const Function* function;
  int num_blocks;
  int num_threads;
  int shared_bytes;
  std::vector<std::string> arguments;
};
bool is_capturing = false;
std::vector<CapturedLaunch> graph;

// What the driver copies of a launch.
std::vector<std::string> copied(const Function& function, void** arguments) {
  std::vector<std::string> copies;
  for (const size_t num_bytes : function.kernel.argument_bytes) {
    copies.emplace_back(static_cast<const char*>(*arguments++), num_bytes);
  }
  return copies;
}

Result run(const Function& function, int blocks, int num_threads, int shared_bytes, void** arguments) {
  launched = function.name;
  num_blocks = blocks;
  std::vector<emu::Region> regions = {{"anything", nullptr, SIZE_MAX}};
  if (function.kernel.regions) regions = function.kernel.regions(arguments);
  const std::string path = std::exchange(recording_path, {});
  recording::Launch recorded;
  if (!path.empty()) {
    recorded = {function.name, blocks, num_threads, uint32_t(shared_bytes), {}, recorded_tensors, {}, {}};
    recorded.params = copied(function, arguments);
    recorded.before = recording::contents(recorded_tensors);
  }
  try {
    counts = emu::launch(emu::config_of_seed(config.seed), blocks, num_threads, shared_bytes, regions,
                         [&] { function.kernel.run(arguments); });
  } catch (const std::exception& error) {
    report = error.what();
    return kLaunchFailed;
  }
  if (!path.empty()) {
    recorded.after = recording::contents(recorded_tensors);
    recording::write(path, recorded);
  }
  return kSuccess;
}

std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> all;
  return all;
}
Function& function_of(FunctionHandle handle) {
  return *reinterpret_cast<Function*>(handle);
}

template <class Handle>
Handle handle_of(void* pointer) {
  return reinterpret_cast<Handle>(pointer);
}

}  // namespace

namespace emulated_driver {

bool add_kernel(const std::string& name, Kernel kernel) {
  functions()[name] = {name, std::move(kernel)};
  return true;
}

}  // namespace emulated_driver

// ---- what marks the library, and what tests ask of it ---------------------------------------------------------------

EXPORT int mixattn_emulation() {
  return 1;
}

// For images and drivers that are opened from then on, but seed and fault for every launch.
EXPORT void mixattn_emulation_configure(int driver_version, int capability, int num_sms, uint64_t seed, int fault) {
  config = {driver_version, capability, num_sms, seed};
  emu::active_fault = fault;
  counts = emu::Stats();
  num_blocks = 0;
}

// The next launch is also written to this file, with what these tensors hold before and after it.
EXPORT void mixattn_emulation_record(const char* path, int num_tensors, const uint64_t* begins,
                                     const uint64_t* num_bytes) {
  recording_path = path;
  recorded_tensors.clear();
  for (int i = 0; i < num_tensors; ++i) recorded_tensors.push_back({begins[i], num_bytes[i]});
}

// Of the last launch since the configuration, in JSON.
EXPORT const char* mixattn_emulation_counts() {
  static std::string text;
  text = "{\"kernel\": \"" + launched + "\", \"num_switches\": " + std::to_string(counts.num_switches) +
         ", \"num_threads\": " + std::to_string(counts.num_threads) +
         ", \"num_blocks\": " + std::to_string(num_blocks) + ", \"num_mmas\": " + std::to_string(counts.num_mmas) +
         ", \"num_copies\": " + std::to_string(counts.num_copies) +
         ", \"num_boxes\": " + std::to_string(counts.num_boxes) +
         ", \"num_wavefronts\": " + std::to_string(counts.num_wavefronts) + ", \"conflicts\": {";
  for (const auto& [line, count] : counts.conflicts) {
    if (text.back() != '{') text += ", ";
    text += "\"" + line + "\": " + std::to_string(count);
  }
  text += "}}";
  return text.c_str();
}

// From now on launches are put into a graph, an empty one, and not run; as a stream does that is captured.
EXPORT void mixattn_emulation_begin_capture() {
  is_capturing = true;
  graph.clear();
}

EXPORT void mixattn_emulation_end_capture() {
  is_capturing = false;
}

// Runs the graph. Returns why a launch has failed; nullptr if none has.
EXPORT const char* mixattn_emulation_replay() {
  for (CapturedLaunch& each : graph) {
    std::vector<void*> arguments;
    for (std::string& argument : each.arguments) arguments.push_back(argument.data());
    if (run(*each.function, each.num_blocks, each.num_threads, each.shared_bytes, arguments.data()) != kSuccess) {
      return report.c_str();
    }
  }
  return nullptr;
}

// ---- the driver -----------------------------------------------------------------------------------------------------

Result cuInit(unsigned flags) {
  is_initialized = true;
  return flags == 0 ? kSuccess : kInvalidValue;
}
Result cuDriverGetVersion(int* version) {
  *version = config.driver_version;
  return kSuccess;
}
Result cuGetErrorName(Result result, const char** name) {
  const auto found = kNames.find(result);
  *name = found == kNames.end() ? nullptr : found->second;
  return found == kNames.end() ? kInvalidValue : kSuccess;
}
Result cuGetErrorString(Result result, const char** text) {
  *text = result == kLaunchFailed ? report.c_str() : "emulated";
  return kSuccess;
}
Result cuDeviceGetCount(int* count) {
  *count = 1;
  return is_initialized ? kSuccess : kNotInitialized;
}
Result cuDeviceGet(DeviceHandle* device, int idx) {
  *device = idx;
  return idx == 0 ? kSuccess : kInvalidDevice;
}
Result cuDeviceGetName(char* name, int num_bytes, DeviceHandle) {
  strncpy(name, "emulation on the host", num_bytes);
  return kSuccess;
}
Result cuDeviceGetAttribute(int* value, int attribute, DeviceHandle) {
  switch (attribute) {
    case kAttributeNumSms:
      *value = config.num_sms;
      return kSuccess;
    case kAttributeCapabilityMajor:
      *value = config.capability / 10;
      return kSuccess;
    case kAttributeCapabilityMinor:
      *value = config.capability % 10;
      return kSuccess;
    case kAttributeSharedBytesPerBlockOptIn:
      *value = shared_bytes_per_block();
      return kSuccess;
    default:
      return kInvalidValue;
  }
}
Result cuDevicePrimaryCtxRetain(ContextHandle* context, DeviceHandle device) {
  *context = handle_of<ContextHandle>(&config);
  return device == 0 ? kSuccess : kInvalidDevice;
}
Result cuCtxPushCurrent_v2(ContextHandle context) {
  if (context != handle_of<ContextHandle>(&config)) return kInvalidContext;
  ++num_contexts;
  return kSuccess;
}
Result cuCtxPopCurrent_v2(ContextHandle* context) {
  if (num_contexts == 0) return kInvalidContext;
  --num_contexts;
  *context = handle_of<ContextHandle>(&config);
  return kSuccess;
}
Result cuModuleLoadData(ModuleHandle* module, const void* image) {
  if (num_contexts == 0) return kInvalidContext;
  uint32_t magic;
  memcpy(&magic, image, sizeof magic);
  if (magic != kFatbinMagic && memcmp(image, kEmulatedImage, sizeof kEmulatedImage - 1) != 0) return kInvalidImage;
  *module = handle_of<ModuleHandle>(&config);
  return kSuccess;
}
Result cuModuleGetFunction(FunctionHandle* function, ModuleHandle, const char* name) {
  const auto found = functions().find(name);
  if (found == functions().end()) return kNotFound;
  found->second.max_shared_bytes = kDefaultSharedBytes;
  *function = handle_of<FunctionHandle>(&found->second);
  return kSuccess;
}
Result cuFuncSetAttribute(FunctionHandle function, int attribute, int value) {
  if (attribute == kFunctionSharedMemoryCarveout) return value <= 100 ? kSuccess : kInvalidValue;
  if (attribute != kFunctionMaxDynamicSharedBytes || value > shared_bytes_per_block()) return kInvalidValue;
  function_of(function).max_shared_bytes = value;
  return kSuccess;
}
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, FunctionHandle function, int,
                                                   size_t dynamic_shared_bytes) {
  *num_blocks = dynamic_shared_bytes <= size_t(function_of(function).max_shared_bytes) ? 1 : 0;
  return kSuccess;
}
// Of elements that are not of 16 bits, and other swizzles, there are no maps here.
Result cuTensorMapEncodeTiled(void* map, int data_type, uint32_t rank, void* data, const uint64_t* sizes,
                              const uint64_t* outer_strides, const uint32_t* box, const uint32_t* element_strides,
                              int interleave, int swizzle, int l2_promotion, int fill) {
  if (num_contexts == 0) return kInvalidContext;
  if (config.capability < 90 || rank < 1 || rank > emu::BoxedTensor::kMostDims) return kInvalidValue;
  const bool has_emulated_form = data_type == kMapUInt16 && interleave == kMapNoInterleave && swizzle == kMapSwizzle128;
  if (!has_emulated_form || l2_promotion < 0 || l2_promotion > 3 || fill != kMapFillZero) return kInvalidValue;
  emu::BoxedTensor tensor = {static_cast<const char*>(data), int(rank), {}, {}, {}};
  for (uint32_t d = 0; d < rank; ++d) {
    if (element_strides[d] != 1) return kInvalidValue;
    tensor.sizes[d] = sizes[d];
    tensor.strides[d] = d == 0 ? 0 : outer_strides[d - 1];
    tensor.box[d] = box[d];
  }
  return emu::encode_map(map, tensor) == nullptr ? kSuccess : kInvalidValue;
}
Result cuLaunchKernel(FunctionHandle handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned dynamic_shared_bytes, StreamHandle, void** arguments,
                      void** extra) {
  const Function& function = function_of(handle);
  if (num_contexts == 0) return kInvalidContext;
  if (std::min({grid_x, grid_y, grid_z, block_x, block_y, block_z}) == 0 || extra != nullptr) return kInvalidValue;
  if (std::max({grid_y, grid_z, block_y, block_z}) > 1) return kInvalidValue;  // one-dimensional: prim.cuh
  if (dynamic_shared_bytes > unsigned(function.max_shared_bytes)) return kInvalidValue;
  if (!is_capturing) return run(function, int(grid_x), int(block_x), int(dynamic_shared_bytes), arguments);
  graph.push_back({&function, int(grid_x), int(block_x), int(dynamic_shared_bytes), copied(function, arguments)});
  return kSuccess;
}
