// driver.cpp: see driver.h.

#include "cuda/driver.h"

#include <dlfcn.h>

namespace mixattn {
namespace cuda {

Driver::Driver(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw DriverError(dlerror());
#define MIXATTN_FIND(name, signature)                                  \
  name = reinterpret_cast<Result(*) signature>(dlsym(library, #name)); \
  if (name == nullptr) throw DriverError(path + " has no " #name ": the driver is too old");
  MIXATTN_DRIVER_FUNCTIONS(MIXATTN_FIND)
#undef MIXATTN_FIND
#define MIXATTN_LOOK_FOR(name, signature) name = reinterpret_cast<Result(*) signature>(dlsym(library, #name));
  MIXATTN_LATER_DRIVER_FUNCTIONS(MIXATTN_LOOK_FOR)
#undef MIXATTN_LOOK_FOR
  is_emulation_ = dlsym(library, "mixattn_emulation") != nullptr;
  check(cuInit(0), "cuInit");
  check(cuDriverGetVersion(&version_), "cuDriverGetVersion");
}

void Driver::check(Result result, const char* function) const {
  if (result == 0) return;
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  throw DriverError(std::string(function) + ": " + (name == nullptr ? std::to_string(result) : name) + " (" +
                    (text == nullptr ? "unknown to this driver" : text) + ")");
}

DeviceHandle Driver::device(int idx) const {
  DeviceHandle device;
  check(cuDeviceGet(&device, idx), "cuDeviceGet");
  return device;
}

int Driver::attribute(DeviceHandle device, int attribute) const {
  int value = 0;
  check(cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

std::vector<DeviceDescription> Driver::devices() const {
  int count = 0;
  check(cuDeviceGetCount(&count), "cuDeviceGetCount");
  std::vector<DeviceDescription> found;
  for (int idx = 0; idx < count; ++idx) {
    const DeviceHandle handle = device(idx);
    char name[256] = {};
    check(cuDeviceGetName(name, sizeof name, handle), "cuDeviceGetName");
    found.push_back({name,
                     10 * attribute(handle, kAttributeCapabilityMajor) + attribute(handle, kAttributeCapabilityMinor),
                     attribute(handle, kAttributeNumSms), attribute(handle, kAttributeSharedBytesPerBlockOptIn)});
  }
  return found;
}

}  // namespace cuda
}  // namespace mixattn
