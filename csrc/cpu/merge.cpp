// merge.cpp: merge_states: attention over a union of key sets from the result over each (merge-inl.h).

#include <algorithm>
#include <climits>

#include "common/checks.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace mixattn {
namespace cpu {

// Elements that a thread is worth waking for: about 10 us of one core's reading.
constexpr int64_t kGrainElements = 16384;

void merge_states(const IsaKernels& kernels, const MergeStatesParams& p, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_range("num_states", p.num_states, 1, INT32_MAX);
  check_range("num_tokens", p.num_tokens, 0, INT32_MAX);
  check_range("num_heads", p.num_heads, 1, INT32_MAX);
  check_head_dim("head_dim", p.head_dim);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (p.num_states * p.num_heads * p.head_dim));
  parallel_for(num_threads, p.num_tokens, grain,
               [&](int64_t begin, int64_t end) { kernels.merge_states(p, begin, end); });
}

}  // namespace cpu
}  // namespace mixattn
