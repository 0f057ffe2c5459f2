// parallel.cpp: finds the OpenMP runtime, once, at the first parallel region.

#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>

namespace mixattn {
namespace cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel symbol_of(void* handle) {
  return reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
}

// The first OpenMP runtime among the mapped libraries. Wheels carry renamed copies (libgomp-a34b3233.so.1).
GompParallel among_mapped_libraries() {
  GompParallel found = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) -> int {
        if (info->dlpi_name == nullptr) return 0;
        const char* slash = std::strrchr(info->dlpi_name, '/');
        const char* file = slash == nullptr ? info->dlpi_name : slash + 1;
        if (std::strncmp(file, "libgomp", 7) != 0 && std::strncmp(file, "libiomp5", 8) != 0 &&
            std::strncmp(file, "libomp", 6) != 0) {
          return 0;
        }
        void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
        if (handle == nullptr) return 0;
        *static_cast<GompParallel*>(data) = symbol_of(handle);
        dlclose(handle);  // only our reference: whoever mapped it keeps it
        return *static_cast<GompParallel*>(data) != nullptr;
      },
      &found);
  return found;
}

// The global scope comes first: there torch's own calls are bound to, whether by a preloaded runtime or by its own.
GompParallel loaded_runtime() {
  const GompParallel global = symbol_of(RTLD_DEFAULT);
  return global != nullptr ? global : among_mapped_libraries();
}

GompParallel any_runtime() {
  const GompParallel loaded = loaded_runtime();
  if (loaded != nullptr) return loaded;
  void* handle = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_GLOBAL);  // global: who comes later finds this one
  return handle == nullptr ? nullptr : symbol_of(handle);
}

}  // namespace

std::string openmp_runtime() {
  const GompParallel function = loaded_runtime();
  Dl_info info;
  if (function == nullptr || dladdr(reinterpret_cast<void*>(function), &info) == 0) return "";
  return info.dli_fname;
}

void parallel_region(int64_t num_threads, void (*body)(void*), void* context) {
  if (num_threads <= 1) return body(context);
  static const GompParallel gomp_parallel = any_runtime();
  if (gomp_parallel == nullptr) return body(context);
  gomp_parallel(body, context, static_cast<unsigned>(num_threads), 0);
}

}  // namespace cpu
}  // namespace mixattn
