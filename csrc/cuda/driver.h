// driver.h: what launching takes of NVIDIA's driver API, from a library that is opened at run time.
// Method  types, numbers and signatures are those of cuda.h, declared here: neither building nor importing takes CUDA.
//         A function is looked up under the name that cuda.h maps it to: the one with _v2 where there is one.
// Limits  a driver of CUDA 11 or later; what images need besides is for ops/cuda_images.py to check
// Source  CUDA Driver API reference, CUDA 13.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mixattn {
namespace cuda {

using Result = int;  // CUresult; 0 is success
using DeviceHandle = int;
using ContextHandle = struct CUctx_st*;
using ModuleHandle = struct CUmod_st*;
using FunctionHandle = struct CUfunc_st*;
using StreamHandle = struct CUstream_st*;

// CUdevice_attribute
constexpr int kAttributeSharedBytesPerBlockOptIn = 97;
constexpr int kAttributeNumSms = 16;
constexpr int kAttributeCapabilityMajor = 75;
constexpr int kAttributeCapabilityMinor = 76;
// CUfunction_attribute
constexpr int kFunctionMaxDynamicSharedBytes = 8;
constexpr int kFunctionSharedMemoryCarveout = 9;

// CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
constexpr int kMapUInt16 = 1;
constexpr int kMapNoInterleave = 0;
constexpr int kMapSwizzle128 = 3;
constexpr int kMapL2Promotion128 = 2;
constexpr int kMapFillZero = 0;

// name, signature: every function that is used.
#define MIXATTN_DRIVER_FUNCTIONS(X)                                                                                  \
  X(cuInit, (unsigned flags))                                                                                        \
  X(cuDriverGetVersion, (int* version))                                                                              \
  X(cuGetErrorName, (Result result, const char** name))                                                              \
  X(cuGetErrorString, (Result result, const char** text))                                                            \
  X(cuDeviceGetCount, (int* count))                                                                                  \
  X(cuDeviceGet, (DeviceHandle * device, int idx))                                                                   \
  X(cuDeviceGetName, (char* name, int num_bytes, DeviceHandle device))                                               \
  X(cuDeviceGetAttribute, (int* value, int attribute, DeviceHandle device))                                          \
  X(cuDevicePrimaryCtxRetain, (ContextHandle * context, DeviceHandle device))                                        \
  X(cuCtxPushCurrent_v2, (ContextHandle context))                                                                    \
  X(cuCtxPopCurrent_v2, (ContextHandle * context))                                                                   \
  X(cuModuleLoadData, (ModuleHandle * module, const void* image))                                                    \
  X(cuModuleGetFunction, (FunctionHandle * function, ModuleHandle module, const char* name))                         \
  X(cuFuncSetAttribute, (FunctionHandle function, int attribute, int value))                                         \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor,                                                                     \
    (int* num_blocks, FunctionHandle function, int num_threads, size_t dynamic_shared_bytes))                        \
  X(cuLaunchKernel,                                                                                                  \
    (FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
     unsigned block_z, unsigned dynamic_shared_bytes, StreamHandle stream, void** arguments, void** extra))
// Those that a driver of CUDA 11 has not: nullptr there.
#define MIXATTN_LATER_DRIVER_FUNCTIONS(X)                                                                       \
  X(cuTensorMapEncodeTiled,                                                                                     \
    (void* map, int data_type, uint32_t rank, void* data, const uint64_t* sizes, const uint64_t* outer_strides, \
     const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int l2_promotion, int fill))

// Python: RuntimeError.
class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct DeviceDescription {
  std::string name;
  int capability;  // 10 major + minor
  int num_sms;
  int shared_bytes_per_block;  // the most that a block can ask for
};

// The driver, found and initialised. Never closed: kernels may be running when the interpreter ends.
class Driver {
 public:
  // path: as dlopen takes it. Throws DriverError when the library, a function of it, or cuInit fails.
  explicit Driver(const std::string& path);

  int version() const { return version_; }  // 1000 major + 10 minor of the newest CUDA that it runs
  // Whether the library runs kernels on the host, in the host's memory (tests/cuda/emulated.cpp): it says so by a
  // function that NVIDIA's has not.
  bool is_emulation() const { return is_emulation_; }
  std::vector<DeviceDescription> devices() const;
  DeviceHandle device(int idx) const;
  int attribute(DeviceHandle device, int attribute) const;

  // Throws DriverError with the function's name and the driver's name and words for the result unless that is success.
  void check(Result result, const char* function) const;

#define MIXATTN_DECLARE(name, signature) Result(*name) signature = nullptr;
  MIXATTN_DRIVER_FUNCTIONS(MIXATTN_DECLARE)
  MIXATTN_LATER_DRIVER_FUNCTIONS(MIXATTN_DECLARE)
#undef MIXATTN_DECLARE

 private:
  int version_ = 0;
  bool is_emulation_ = false;
};

// Makes the device's primary context, which is torch's too, current while it lives.
class ContextScope {
 public:
  ContextScope(const Driver& driver, ContextHandle context) : driver_(driver) {
    driver_.check(driver_.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
  }
  ~ContextScope() {
    ContextHandle before;
    driver_.cuCtxPopCurrent_v2(&before);
  }
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

}  // namespace cuda
}  // namespace mixattn
