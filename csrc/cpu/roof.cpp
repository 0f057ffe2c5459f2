// roof.cpp: what this machine reaches at reading memory and at fused multiply-adds: the roofs that kernels are held to.
// Method  the best of several rounds, because whatever disturbs a round makes it slower; one untimed round first, which
//         wakes the threads and touches the pages

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/checks.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace mixattn {
namespace cpu {
namespace {

constexpr int64_t kReadFloats = int64_t{1} << 26;  // 256 MiB: far beyond the last-level cache of a few cores
constexpr int64_t kReadMultiple = 256;             // of floats in a draw (kernels.h)
constexpr int64_t kFmaFlops = int64_t{1} << 31;    // per thread and round: some 30 ms
constexpr int64_t kFmaDraws = 8;                   // per thread and round
constexpr int kRounds = 8;

// Seconds of the fastest round of run(begin, end) over [0, count).
template <typename Run>
double best_seconds(int64_t num_threads, int64_t count, int64_t grain, const Run& run) {
  std::atomic<float> last{0.0f};  // somebody must want the result, or the loops are not run
  double best = 0.0;
  for (int round = 0; round <= kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(num_threads, count, grain, [&](int64_t begin, int64_t end) { last = run(begin, end); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (round == 1 || (round > 1 && elapsed.count() < best)) best = elapsed.count();
  }
  return best;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// kReadFloats of 1, in huge pages where the system gives some: in small ones what is measured is address translation.
std::unique_ptr<float, Free> huge_buffer() {
  constexpr size_t kHugePage = size_t{2} << 20;
  std::unique_ptr<float, Free> data(static_cast<float*>(std::aligned_alloc(kHugePage, kReadFloats * sizeof(float))));
  if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data.get(), kReadFloats * sizeof(float), MADV_HUGEPAGE);
#endif
  std::fill_n(data.get(), kReadFloats, 1.0f);
  return data;
}

}  // namespace

Roofs measure_roofs(const IsaKernels& kernels, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  Roofs roofs;
  {
    const auto data = huge_buffer();
    // A stretch for each thread: threads that take turns in memory stop each other's prefetching.
    const int64_t grain = (kReadFloats / num_threads + kReadMultiple - 1) / kReadMultiple * kReadMultiple;
    const double seconds = best_seconds(num_threads, kReadFloats, grain, [&](int64_t begin, int64_t end) {
      return kernels.read_loop(data.get() + begin, end - begin);
    });
    roofs.read_gb_s = kReadFloats * sizeof(float) / seconds * 1e-9;
  }
  const int64_t rounds_per_draw = kFmaFlops / kFmaDraws / kernels.fma_flops_per_round;
  const int64_t num_draws = num_threads * kFmaDraws;
  const double seconds =
      best_seconds(num_threads, num_draws, 1, [&](int64_t, int64_t) { return kernels.fma_loop(rounds_per_draw); });
  const double flops = static_cast<double>(num_draws) * rounds_per_draw * kernels.fma_flops_per_round;
  roofs.fma_gflop_s = flops / seconds * 1e-9;
  return roofs;
}

}  // namespace cpu
}  // namespace mixattn
