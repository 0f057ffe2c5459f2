// mixed_attention.cuh: paged attention over prefill chunks and decode rows in one launch: the part of every GPU.
// Math    o_i = sum_j softmax_j(softmax_scale * q_i.k_j) v_j over the keys j that row i may see
// Method  persistent blocks draw the items of a plan (ops/plan.py) from a counter; attend_item, which differs by
//         architecture, leaves finished rows or, for rows whose keys are split, float32 partials; the last block to
//         finish a split of some rows merges them in split order. Counter and tickets are zero again when the launch
//         ends: a captured graph can be replayed with any plan.
// Grid    as many blocks as are resident at once, kNumThreads threads each
// Shapes  AttentionParams (common/params.h), q, k_cache, v_cache, out in f16 or bf16; partial_lse in log2
// Memory  merging a row of n splits reads 4 n (head_dim + 1) bytes and writes 2 head_dim
// Limits  sm_80+; head_dim 64 or 128; any page_size and group_size; strides as launch_params.h checks
// Twins   triton_kernels/mixed_attention.py, csrc/cpu/mixed_attention-inl.h; truth ops/reference.py
// Source  split keys: arXiv:2311.01282, section 3; merge of online-softmax states: arXiv:1805.02867
#pragma once

#include "common/work_item.h"
#include "cuda/launch_params.h"
#include "cuda/softmax.cuh"

namespace mixattn {
namespace cuda {

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * mx::kWarpSize;

// Shared memory of a block: two words for what one thread drew, then what attend_item needs.
constexpr uint32_t kDrawnItemByte = 0;
constexpr uint32_t kDrawnTicketByte = 4;
constexpr uint32_t kControlBytes = 256;

MX_DEVICE int warp_idx() {
  return mx::thread_idx() / mx::kWarpSize;
}
MX_DEVICE int lane_idx() {
  return mx::thread_idx() % mx::kWarpSize;
}

MX_DEVICE int32_t min(int32_t a, int32_t b) {
  return a < b ? a : b;
}
MX_DEVICE int32_t clamp(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : (value > high ? high : value);
}

MX_DEVICE const PlanHeader& plan_header(const LaunchParams& p) {
  return *reinterpret_cast<const PlanHeader*>(p.call.plan);
}
MX_DEVICE const WorkItem* plan_items(const LaunchParams& p) {
  return reinterpret_cast<const WorkItem*>(p.call.plan + kPlanHeaderWords);
}
MX_DEVICE const Merge* plan_merges(const LaunchParams& p) {
  return reinterpret_cast<const Merge*>(plan_items(p) + plan_header(p).capacity_items);
}

// Where a packed row of a slice lies: query token of the batch, query head.
struct RowPlace {
  int64_t token;
  int32_t head;
};

MX_DEVICE RowPlace place_row(const LaunchParams& p, int32_t seq_idx, int32_t kv_head, int32_t packed_row) {
  return {int64_t{p.call.cu_seqlens_q[seq_idx]} + packed_row / p.group_size,
          kv_head * p.group_size + packed_row % p.group_size};
}

template <class T>
MX_DEVICE T* out_row(const LaunchParams& p, const RowPlace& place) {
  return static_cast<T*>(p.call.out) + place.token * p.call.out_token_stride + place.head * p.call.out_head_stride;
}

MX_DEVICE void store_lse(const LaunchParams& p, const RowPlace& place, float lse_log2) {
  if (p.call.lse == nullptr) return;
  mx::st_global(p.call.lse + place.token * p.call.lse_token_stride + place.head, lse_log2 * kLn2);
}

// The number of the block's next item. Also a barrier: every thread is done with the shared memory of the last item.
MX_DEVICE int32_t draw_item(const LaunchParams& p) {
  const uint32_t drawn = mx::shared_base() + kDrawnItemByte;
  mx::sync_threads();
  if (mx::thread_idx() == 0) mx::st_shared(drawn, mx::atomic_add_relaxed(p.call.tickets, 1));
  mx::sync_threads();
  return mx::ld_shared(drawn);
}

// Whether this block, with its split's partials written, is the last of the merge's splits to get here; if so, it sees
// the partials of all of them.
MX_DEVICE bool is_last_split(const LaunchParams& p, int32_t merge_idx, int32_t num_splits) {
  const uint32_t drawn = mx::shared_base() + kDrawnTicketByte;
  // The barrier puts the partials of all threads before thread 0's fence, the fence before its ticket: whoever draws a
  // later ticket, and fences behind it, sees them. The other barrier hands that on to the block.
  mx::sync_threads();
  if (mx::thread_idx() == 0) {
    mx::fence_gpu();
    mx::st_shared(drawn, mx::atomic_add_relaxed(p.call.tickets + 1 + merge_idx, 1));
    mx::fence_gpu();
  }
  mx::sync_threads();
  return mx::ld_shared(drawn) == num_splits - 1;
}

// The partials of all splits of some rows, in split order, to out and lse. A warp merges a row, a lane the dimensions
// 2 lane + 64 d and the one behind.
template <class T, int kHeadDim>
MX_DEVICE void merge_item(const LaunchParams& p, const Merge& merge) {
  constexpr int kPairs = kHeadDim / (2 * mx::kWarpSize);  // of a lane
  const int dim = 2 * lane_idx();
  MX_NO_UNROLL
  for (int32_t row = warp_idx(); row < merge.num_rows; row += kNumWarps) {
    mx::float2 sum[kPairs];
    MX_UNROLL
    for (int d = 0; d < kPairs; ++d) sum[d] = {0.0f, 0.0f};
    float row_max = -INFINITY;
    float row_sum = 0.0f;
    MX_NO_UNROLL
    for (int32_t split = 0; split < merge.num_splits; ++split) {
      const int64_t partial_row = int64_t{merge.partial_row} + split * merge.num_rows + row;
      const float* const partial = p.call.partial_out + partial_row * kHeadDim + dim;
      const StateFactors factors = absorb_state(mx::ld_global_cg(p.call.partial_lse + partial_row), row_max);
      row_sum = row_sum * factors.rescale + factors.weight;
      MX_UNROLL
      for (int d = 0; d < kPairs; ++d) {
        const mx::float2 value = mx::ld_global_cg_v2(partial + 2 * mx::kWarpSize * d);
        sum[d] = {sum[d].x * factors.rescale + value.x * factors.weight,
                  sum[d].y * factors.rescale + value.y * factors.weight};
      }
    }
    const RowEnd end = finish_row(row_max, row_sum);
    const RowPlace place = place_row(p, merge.seq_idx, merge.kv_head, merge.row_begin + row);
    T* const out = out_row<T>(p, place) + dim;
    MX_UNROLL
    for (int d = 0; d < kPairs; ++d) {
      mx::st_global(out + 2 * mx::kWarpSize * d,
                    mx::pack2(sum[d].x * end.inverse_sum, sum[d].y * end.inverse_sum, T{}));
    }
    if (lane_idx() == 0) store_lse(p, place, end.lse_log2);
  }
}

// Draws items of the plan until none is left. Attend::item(p, item) computes one.
template <class T, int kHeadDim, class Attend>
MX_DEVICE void run_plan(const LaunchParams& p) {
  const int32_t num_items = plan_header(p).num_items;
  int32_t item_idx = draw_item(p);
  while (item_idx < num_items) {
    const WorkItem* const item = plan_items(p) + item_idx;
    Attend::item(p, item);
    const int32_t merge_idx = item->merge_idx;
    if (merge_idx >= 0) {
      const Merge& merge = plan_merges(p)[merge_idx];
      if (is_last_split(p, merge_idx, merge.num_splits)) {
        merge_item<T, kHeadDim>(p, merge);
        // For the next launch: in this one nobody draws it again.
        if (mx::thread_idx() == 0) mx::st_global(p.call.tickets + 1 + merge_idx, 0u);
      }
    }
    item_idx = draw_item(p);
  }
  // Every block draws one number past the items; whoever draws the last of these resets the counter.
  if (mx::thread_idx() == 0 && item_idx == num_items + mx::num_blocks() - 1) mx::st_global(p.call.tickets, 0u);
}

}  // namespace cuda
}  // namespace mixattn
