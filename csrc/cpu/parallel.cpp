// parallel.cpp: finds the OpenMP runtime, once, at the first parallel region; and teams of its threads.
// Method  a team's threads watch one word, the places that are left in a region. Who takes one runs the body and says
//         when it is done. The thread that opened the region runs the body, too; when that returns there is nothing
//         left to draw, so it takes the places that nobody came for back, and waits for those who did come.

#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>

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

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

class Team {
 public:
  explicit Team(int64_t num_helpers) : num_helpers_(num_helpers) {}

  // A region, by the thread that has the team.
  void run(int64_t num_threads, void (*body)(void*), void* context) {
    const int64_t num_places = std::min(num_threads - 1, num_helpers_);
    body_ = body;
    context_ = context;
    num_done_.store(0, std::memory_order_relaxed);
    generation_ += kGeneration;
    places_.store(generation_ + num_places, std::memory_order_release);
    body(context);
    const int64_t num_left = places_.exchange(generation_, std::memory_order_relaxed) - generation_;
    Spin spin;
    while (num_done_.load(std::memory_order_acquire) != num_places - num_left) spin.wait();
  }

  void close() { places_.store(kClosed, std::memory_order_release); }

  // By the others, until it is closed.
  void help() {
    Spin spin;
    for (;;) {
      int64_t places = places_.load(std::memory_order_relaxed);
      if (places == kClosed) return;
      if (places % kGeneration == 0 ||
          !places_.compare_exchange_weak(places, places - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        spin.wait();
        continue;
      }
      body_(context_);
      num_done_.fetch_add(1, std::memory_order_release);
      spin = Spin();
    }
  }

 private:
  // Of places_; each region has another multiple of kGeneration, so that nobody takes a place of an earlier one.
  static constexpr int64_t kGeneration = int64_t{1} << 20, kClosed = -1;

  // From some 100 us on, whoever else wants this core may have it.
  class Spin {
   public:
    void wait() {
      if (++num_waits_ < kMostWaits) return pause();
      std::this_thread::yield();
    }

   private:
    static constexpr int kMostWaits = 4096;
    int num_waits_ = 0;
  };

  const int64_t num_helpers_;
  int64_t generation_ = 0;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> places_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
};

thread_local Team* current_team = nullptr;

void openmp_region(int64_t num_threads, void (*body)(void*), void* context) {
  static const GompParallel gomp_parallel = any_runtime();
  if (gomp_parallel == nullptr) return body(context);
  gomp_parallel(body, context, static_cast<unsigned>(num_threads), 0);
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
  if (current_team != nullptr) return current_team->run(num_threads, body, context);
  openmp_region(num_threads, body, context);
}

void with_team(int64_t num_threads, const std::function<void()>& run) {
  if (num_threads <= 1 || current_team != nullptr) return run();
  struct Context {
    const std::function<void()>& run;
    std::thread::id owner;
    Team team;
    std::exception_ptr error;
  } context{run, std::this_thread::get_id(), Team(num_threads - 1), nullptr};
  openmp_region(
      num_threads,
      [](void* data) {
        Context& c = *static_cast<Context*>(data);
        if (std::this_thread::get_id() != c.owner) return c.team.help();
        current_team = &c.team;
        try {
          c.run();
        } catch (...) {
          c.error = std::current_exception();
        }
        current_team = nullptr;
        c.team.close();
      },
      &context);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace cpu
}  // namespace mixattn
