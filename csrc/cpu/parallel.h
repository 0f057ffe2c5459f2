// parallel.h: parallel regions on the OpenMP pool that the process already has (torch's), found at run time.
// Method  GOMP_parallel, the entry point that GCC's "#pragma omp parallel" compiles to; libgomp, LLVM's libomp and
// Intel's
//         libiomp5 all export it. Two runtimes would mean two pools whose idle threads spin against each other.
// Source  GCC libgomp ABI, https://gcc.gnu.org/onlinedocs/libgomp/Implementing-PARALLEL-construct.html
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

namespace mixattn {
namespace cpu {

// File of the OpenMP runtime that this process has loaded, or "" if there is none yet. Loads nothing.
std::string openmp_runtime();

// Calls body(context) on up to num_threads threads at once, this one included, and returns when all have. There can be
// fewer: in a nested region, or without a runtime (none loaded, no libgomp.so.1 to load) one. body must not throw.
void parallel_region(int64_t num_threads, void (*body)(void*), void* context);

// Calls run() on this thread; its parallel regions share num_threads - 1 others that do nothing else meanwhile. A
// region begins and ends sooner than by the runtime, and waits for nobody who has not begun when the work is done: on a
// busy machine a thread may not run for milliseconds. What run throws is thrown here.
void with_team(int64_t num_threads, const std::function<void()>& run);

// Calls run(begin, end) for [0, count) in pieces of `grain`, drawn by up to num_threads threads.
template <typename Run>
void parallel_for(int64_t num_threads, int64_t count, int64_t grain, const Run& run) {
  struct Context {
    const Run& run;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
  } context{run, count, grain};
  const int64_t num_pieces = (count + grain - 1) / grain;
  if (num_pieces < num_threads) num_threads = num_pieces;
  parallel_region(
      num_threads,
      [](void* data) {
        Context& c = *static_cast<Context*>(data);
        for (;;) {
          const int64_t begin = c.next.fetch_add(c.grain, std::memory_order_relaxed);
          if (begin >= c.count) return;
          c.run(begin, begin + c.grain < c.count ? begin + c.grain : c.count);
        }
      },
      &context);
}

// As parallel_for, but each thread draws from a stretch of [0, count) of its own, and from those of others when that is
// done. What lies one behind the other in memory is read so, and what a thread prefetches beyond a piece is its own.
template <typename Run>
void parallel_for_stretches(int64_t num_threads, int64_t count, int64_t grain, const Run& run) {
  constexpr int64_t kMaxStretches = 64;
  struct alignas(64) Stretch {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    const Run& run;
    int64_t grain, num_stretches;
    std::atomic<int64_t> num_arrived{0};
    Stretch stretches[kMaxStretches];
  } context{run, grain, 0, {}, {}};
  const int64_t num_pieces = (count + grain - 1) / grain;
  if (num_pieces < num_threads) num_threads = num_pieces;
  const int64_t num_stretches = num_threads < kMaxStretches ? num_threads : kMaxStretches;
  context.num_stretches = num_stretches;
  for (int64_t n = 0; n < num_stretches; ++n) {
    context.stretches[n].next.store(num_pieces * n / num_stretches * grain, std::memory_order_relaxed);
    const int64_t end = num_pieces * (n + 1) / num_stretches * grain;
    context.stretches[n].end = end < count ? end : count;
  }
  parallel_region(
      num_threads,
      [](void* data) {
        Context& c = *static_cast<Context*>(data);
        const int64_t own = c.num_arrived.fetch_add(1, std::memory_order_relaxed);
        for (int64_t n = 0; n < c.num_stretches; ++n) {
          Stretch& stretch = c.stretches[(own + n) % c.num_stretches];
          for (;;) {
            const int64_t begin = stretch.next.fetch_add(c.grain, std::memory_order_relaxed);
            if (begin >= stretch.end) break;
            c.run(begin, begin + c.grain < stretch.end ? begin + c.grain : stretch.end);
          }
        }
      },
      &context);
}

}  // namespace cpu
}  // namespace mixattn
