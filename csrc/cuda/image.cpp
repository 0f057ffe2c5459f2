// image.cpp: see image.h.

#include "cuda/image.h"

#include <utility>

namespace mixattn {
namespace cuda {

namespace {

// Of an SM's memory that is L1 or shared, all that can be shared: by the default two blocks may not fit.
constexpr int kCarveoutMaxShared = 100;

}  // namespace

Image::Image(const Driver& driver, int device_idx, std::string data) : driver_(driver), data_(std::move(data)) {
  const DeviceHandle device = driver.device(device_idx);
  driver.check(driver.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain");
  num_sms_ = driver.attribute(device, kAttributeNumSms);
  capability_ =
      10 * driver.attribute(device, kAttributeCapabilityMajor) + driver.attribute(device, kAttributeCapabilityMinor);
  const ContextScope scope(driver, context_);
  driver.check(driver.cuModuleLoadData(&module_, data_.data()), "cuModuleLoadData");
}

const Launch& Image::prepare(const std::string& kernel, int num_threads, int shared_bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = launches_.find(kernel);
  if (found != launches_.end()) return found->second;
  const ContextScope scope(driver_, context_);
  Launch launch = {nullptr, 0, num_threads, shared_bytes};
  driver_.check(driver_.cuModuleGetFunction(&launch.function, module_, kernel.c_str()),
                ("cuModuleGetFunction of " + kernel).c_str());
  driver_.check(driver_.cuFuncSetAttribute(launch.function, kFunctionMaxDynamicSharedBytes, shared_bytes),
                "cuFuncSetAttribute");
  driver_.check(driver_.cuFuncSetAttribute(launch.function, kFunctionSharedMemoryCarveout, kCarveoutMaxShared),
                "cuFuncSetAttribute");
  int num_resident = 0;
  driver_.check(driver_.cuOccupancyMaxActiveBlocksPerMultiprocessor(&num_resident, launch.function, num_threads,
                                                                    static_cast<size_t>(shared_bytes)),
                "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (num_resident < 1) {
    throw DriverError(kernel + " does not fit an SM of this device: " + std::to_string(num_threads) + " threads, " +
                      std::to_string(shared_bytes) + " bytes of shared memory");
  }
  launch.num_blocks = num_sms_ * num_resident;
  return launches_.emplace(kernel, launch).first->second;
}

void Image::encode_map(const BoxedTensor& tensor, void* map) const {
  constexpr int kNumDims = BoxedTensor::kNumDims;
  constexpr uint64_t kElementBytes = 2;
  uint64_t sizes[kNumDims];
  uint64_t strides[kNumDims - 1];
  uint32_t box[kNumDims];
  const uint32_t steps[kNumDims] = {1, 1, 1, 1};
  for (int d = 0; d < kNumDims; ++d) {
    sizes[d] = static_cast<uint64_t>(tensor.sizes[d]);
    box[d] = static_cast<uint32_t>(tensor.box[d]);
    if (d > 0) strides[d - 1] = static_cast<uint64_t>(tensor.strides[d - 1]) * kElementBytes;
  }
  const ContextScope scope(driver_, context_);
  driver_.check(
      driver_.cuTensorMapEncodeTiled(map, kMapUInt16, kNumDims, const_cast<void*>(tensor.data), sizes, strides, box,
                                     steps, kMapNoInterleave, kMapSwizzle128, kMapL2Promotion128, kMapFillZero),
      "cuTensorMapEncodeTiled");
}

void Image::launch(const Launch& launch, StreamHandle stream, void** arguments) const {
  const ContextScope scope(driver_, context_);
  driver_.check(driver_.cuLaunchKernel(launch.function, launch.num_blocks, 1, 1, launch.num_threads, 1, 1,
                                       launch.shared_bytes, stream, arguments, nullptr),
                "cuLaunchKernel");
}

}  // namespace cuda
}  // namespace mixattn
