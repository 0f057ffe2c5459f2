// image.h: the kernels of one fatbin on one device, ready to be launched.
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "cuda/driver.h"

namespace mixattn {
namespace cuda {

// How a kernel is launched: as prepared, in a grid of all blocks that the device holds at once.
struct Launch {
  FunctionHandle function;
  int num_blocks;
  int num_threads;
  int shared_bytes;
};

// A tensor of 16-bit elements and the box of it that one load takes: rows of 128 bytes. Dimensions are in elements, the
// innermost first, strides those of the others.
struct BoxedTensor {
  static constexpr int kNumDims = 4;
  const void* data;
  int64_t sizes[kNumDims];
  int64_t strides[kNumDims - 1];
  int32_t box[kNumDims];
};

class Image {
 public:
  // data: a fatbin's bytes, from which the driver takes what fits the device. The driver outlives the image. Throws
  // DriverError, also when nothing in the fatbin fits.
  Image(const Driver& driver, int device_idx, std::string data);
  // A module stays loaded as long as the process: a kernel of it may still be running.
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  int capability() const { return capability_; }  // of the device: 10 major + minor
  int num_sms() const { return num_sms_; }

  // The kernel, looked up and given its shared memory at the first call. Throws DriverError when it has not this name,
  // or the device not room for one block.
  const Launch& prepare(const std::string& kernel, int num_threads, int shared_bytes);

  // Whether the driver makes tensor maps.
  bool has_maps() const { return driver_.cuTensorMapEncodeTiled != nullptr; }
  // Writes the tensor's map, 128 bytes at a multiple of 64, for kernels on this device. Nothing runs there. Throws
  // DriverError if the driver refuses it.
  void encode_map(const BoxedTensor& tensor, void* map) const;

  // Puts the kernel on the stream. arguments: an address per parameter, of a value that is copied before this returns.
  void launch(const Launch& launch, StreamHandle stream, void** arguments) const;

 private:
  const Driver& driver_;
  std::string data_;  // the driver may come back to it when it loads a kernel of the module
  ContextHandle context_;
  ModuleHandle module_;
  int num_sms_;
  int capability_;
  std::mutex mutex_;
  std::map<std::string, Launch> launches_;
};

}  // namespace cuda
}  // namespace mixattn
