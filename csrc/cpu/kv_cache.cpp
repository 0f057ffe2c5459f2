// kv_cache.cpp: append_kv: this step's K and V rows into their pages, K and q rotated on the way.
// Method  every slot and position is checked; then threads draw blocks of rows (kv_cache-inl.h)

#include <algorithm>
#include <climits>

#include "common/checks.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace mixattn {
namespace cpu {
namespace {

// Elements that a thread is worth waking for: about 10 us of one core's copying and rotating.
constexpr int64_t kGrainElements = 16384;

void check(const AppendKvParams& p) {
  check_range("num_tokens", p.num_tokens, 0, INT64_MAX);
  check_range("num_kv_heads", p.num_kv_heads, 1, INT32_MAX);
  check_range("num_q_heads", p.num_q_heads, p.q == nullptr ? 0 : 1, INT32_MAX);
  check_head_dim("head_dim", p.head_dim);
  check_head_dim("v_head_dim", p.v_head_dim);
  check_range("num_pages", p.num_pages, 0, INT32_MAX);
  check_range("page_size", p.page_size, 1, INT32_MAX);
  if (p.num_tokens == 0) return;  // empty arrays have no address
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.slot_mapping[t] < 0 || p.slot_mapping[t] >= p.num_pages * p.page_size) {
      throw std::invalid_argument(element("slot_mapping", t) + " must be in [0, num_pages * page_size) = [0, " +
                                  std::to_string(p.num_pages * p.page_size) + "), got " +
                                  std::to_string(p.slot_mapping[t]));
    }
  }
  if ((p.positions == nullptr) != (p.rope_cos_sin == nullptr)) {
    throw std::invalid_argument("positions and rope_cos_sin must be given together");
  }
  if (p.positions == nullptr) {
    if (p.q != nullptr) throw std::invalid_argument("q is given without positions and rope_cos_sin");
    return;
  }
  check_range("rotary_dim", p.rotary_dim, 0, p.head_dim);
  if (p.rotary_dim % 2 != 0) {
    throw std::invalid_argument("rotary_dim must be even, got " + std::to_string(p.rotary_dim));
  }
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.positions[t] < 0 || p.positions[t] >= p.max_positions) {
      throw std::invalid_argument(element("positions", t) + " must be in [0, max_positions) = [0, " +
                                  std::to_string(p.max_positions) + "), got " + std::to_string(p.positions[t]));
    }
  }
}

}  // namespace

void append_kv(const IsaKernels& kernels, const AppendKvParams& p, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check(p);
  const int64_t num_heads = 2 * p.num_kv_heads + (p.q == nullptr ? 0 : p.num_q_heads);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (num_heads * p.head_dim));
  parallel_for(num_threads, p.num_tokens, grain, [&](int64_t begin, int64_t end) { kernels.append_kv(p, begin, end); });
}

}  // namespace cpu
}  // namespace mixattn
