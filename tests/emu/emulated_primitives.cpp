// emulated_primitives.cpp: the same entry points for the emulated driver of tests/cuda.

#include "../cuda/emulated_driver.h"
#include "primitive_entries_sm90.h"

namespace {

bool add(const char* name, void (*kernel)(uint32_t*, uint32_t*)) {
  return emulated_driver::add_kernel(name, {[kernel](void** arguments) {
                                              kernel(*static_cast<uint32_t**>(arguments[0]),
                                                     *static_cast<uint32_t**>(arguments[1]));
                                            },
                                            nullptr});
}

bool add(const char* name, void (*kernel)(mx::TensorMap, uint32_t*, uint32_t*)) {
  return emulated_driver::add_kernel(name, {[kernel](void** arguments) {
                                              kernel(*static_cast<mx::TensorMap*>(arguments[0]),
                                                     *static_cast<uint32_t**>(arguments[1]),
                                                     *static_cast<uint32_t**>(arguments[2]));
                                            },
                                            nullptr});
}

#define ADD(name, ...) add("primitive_" #name, primitive_##name),
[[maybe_unused]] const bool kAdded[] = {PRIMITIVE_ENTRIES(ADD) PRIMITIVE_ENTRIES_SM90(ADD)
                                            PRIMITIVE_ENTRIES_BOXED(ADD)};

}  // namespace
