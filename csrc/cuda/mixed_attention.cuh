// mixed_attention.cuh: paged attention over prefill chunks and decode rows in one launch: the part of every GPU.
// Math    o_i = sum_j softmax_j(softmax_scale * q_i.k_j) v_j over the keys j that row i may see; soft cap, ALiBi,
//         sinks, tree masks as ops/attention.py defines them. A sink enters once, where its row's sum is complete
// Method  persistent blocks draw the items of a plan (ops/plan.py) from a counter; attend_item, which differs by
//         architecture, leaves finished rows or, for rows whose keys are split, float32 partials; the last block to
//         finish an item of some rows merges them in split order. Counter and tickets are zero again when the launch
//         ends: a captured graph can be replayed with any plan.
// Grid    as many blocks as are resident at once, kNumThreads threads each: a warp per quarter of an SM
// Shapes  AttentionParams (common/params.h), q, k_cache, v_cache, out in f16 or bf16; partial_lse in log2
// Memory  merging a row of n splits reads 4 n (v_head_dim + 1) bytes and writes 2 v_head_dim
// Limits  sm_80+; head_dim 64, 96, 128, 192, 256 and v_head_dim the same, or 192 and 128; any page_size and group_size;
//         strides as launch_params.h checks; keys and packed rows of a slice up to 2^31 - 129
// Twins   triton_kernels/mixed_attention.py, csrc/cpu/mixed_attention-inl.h; truth ops/reference.py
// Source  split keys: arXiv:2311.01282, section 3; merge of online-softmax states: arXiv:1805.02867
#pragma once

#include <type_traits>

#include "common/work_item.h"
#include "cuda/launch_params.h"
#include "cuda/softmax.cuh"

namespace mixattn {
namespace cuda {

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * mx::kWarpSize;

// A team's words in shared memory: what was drawn for it, and the item that this is. Every thread reads them again
// wherever it needs them: in registers they would be spilled by the walk over the keys.
enum ControlWord : uint32_t {
  kItemsLeft,      // this one included; 0 and below: none
  kCapacityItems,  // of the plan: its merges are behind them
  kTicket,
  kSecondTicket,  // where two teams share an item
  // As in WorkItem.
  kSeqIdx,
  kKvHead,
  kRowBegin,
  kNumRows,
  kTileKindOf,
  kKvBegin,
  kKvEnd,
  kMergeIdx,
  kPartialRow,
  kFirstToken,  // the slice's first row of q
  kContext,     // keys before the slice's first row: its position
  // All rows see all keys of [kFullBegin, kFullEnd); tiles that are not inside need masks.
  kFullBegin,
  kFullEnd,
};
constexpr uint32_t kControlBytes = 256;  // a multiple of every row of a tile

// The item in hand: its control words, from this shared address on.
struct Item {
  uint32_t address;

  MX_DEVICE int32_t operator[](ControlWord word) const { return mx::ld_shared(address + word * sizeof(int32_t)); }
  MX_DEVICE void set(ControlWord word, int32_t value) const { mx::st_shared(address + word * sizeof(int32_t), value); }
};

struct Thread {
  int idx;
  int warp;
  int lane;
};

// In its team. Read anew where it is needed: hoisted out of the loop over items, every kind's addresses would be in
// registers at once.
MX_DEVICE Thread this_thread() {
  const int idx = mx::thread_idx() % kNumThreads;
  return {idx, idx / mx::kWarpSize, idx % mx::kWarpSize};
}

constexpr int kTeamBarrier = 1;

// kNumThreads threads that compute an item, or some of its rows, together: a team. Orders their accesses to memory.
// Where a block has several, each has a barrier of its own.
MX_DEVICE void sync_team(int barrier = kTeamBarrier) {
  mx::bar_sync(barrier, kNumThreads);
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
MX_DEVICE const Merge* plan_merges(const LaunchParams& p, Item item) {
  return reinterpret_cast<const Merge*>(plan_items(p) + item[kCapacityItems]);
}

// Where a packed row of a slice lies: query token of the batch, query head.
struct RowPlace {
  int64_t token;
  int32_t head;
};

// first_token: of the slice.
MX_DEVICE RowPlace place_row(const LaunchParams& p, int32_t first_token, int32_t kv_head, int32_t packed_row) {
  return {int64_t{first_token} + packed_row / p.group_size, kv_head * p.group_size + packed_row % p.group_size};
}

template <class T>
MX_DEVICE T* out_row(const LaunchParams& p, const RowPlace& place) {
  return static_cast<T*>(p.call.out) + place.token * p.call.out_token_stride + place.head * p.call.out_head_stride;
}

// q's element in a kernel that serves both: what it multiplies is float16 anyhow.
struct ElementOfCall {
  uint16_t bits;
};

// Two results as out has them.
template <class T>
MX_DEVICE uint32_t pack_results(const LaunchParams& p, float x, float y) {
  if constexpr (std::is_same_v<T, ElementOfCall>) {
    return p.call.dtype == DType::kBFloat16 ? mx::pack2(x, y, mx::bf16{}) : mx::pack2(x, y, mx::f16{});
  } else {
    return mx::pack2(x, y, T{});
  }
}

// The sink of a row's head; -inf for none.
MX_DEVICE float row_sink_log2(const LaunchParams& p, int32_t head) {
  return p.call.sinks == nullptr ? -INFINITY : p.call.sinks[head] * kLog2E;
}

MX_DEVICE void store_lse(const LaunchParams& p, const RowPlace& place, float lse_log2) {
  if (p.call.lse == nullptr) return;
  mx::st_global(p.call.lse + place.token * p.call.lse_token_stride + place.head, lse_log2 * kLn2);
}

// The keys [begin, end) of the item [kv_begin, kv_end) that a row at this position sees.
struct KeyRange {
  int32_t begin;
  int32_t end;
};

MX_DEVICE KeyRange visible_keys(const LaunchParams& p, int32_t position, int32_t kv_begin, int32_t kv_end) {
  // A position may lie before the first key; one before the window's width has no window.
  return {position < p.window_left ? kv_begin : clamp(position - p.window_left, kv_begin, kv_end),
          p.call.causal ? clamp(position + 1, kv_begin, kv_end) : kv_end};
}

MX_DEVICE void describe_item(const LaunchParams& p, const WorkItem& drawn, Item item) {
  const int32_t first_token = p.call.cu_seqlens_q[drawn.seq_idx];
  const int32_t q_len = p.call.cu_seqlens_q[drawn.seq_idx + 1] - first_token;
  const int32_t context = p.call.seq_lens[drawn.seq_idx] - q_len;
  const int32_t first_position = context + drawn.row_begin / p.group_size;
  const int32_t last_position = context + (drawn.row_begin + num_rows(drawn) - 1) / p.group_size;
  item.set(kSeqIdx, drawn.seq_idx);
  item.set(kKvHead, drawn.kv_head);
  item.set(kRowBegin, drawn.row_begin);
  item.set(kNumRows, num_rows(drawn));
  item.set(kTileKindOf, tile_kind(drawn));
  item.set(kKvBegin, drawn.kv_begin);
  item.set(kKvEnd, drawn.kv_end);
  item.set(kMergeIdx, drawn.merge_idx);
  item.set(kPartialRow, drawn.partial_row);
  item.set(kFirstToken, first_token);
  item.set(kContext, context);
  // The first row sees the fewest keys to the right, the last row the fewest to the left.
  item.set(kFullBegin, visible_keys(p, last_position, drawn.kv_begin, drawn.kv_end).begin);
  const int32_t full_end = visible_keys(p, first_position, drawn.kv_begin, drawn.kv_end).end;
  // A tree mask speaks of the slice's own keys.
  item.set(kFullEnd, p.call.tree_mask == nullptr ? full_end : clamp(context, drawn.kv_begin, full_end));
}

// Which items of the plan a team draws. Where the kinds have teams of their own, the plan has them apart.
enum class Queue { kAll, kLarger, kSmall };
constexpr int kNumQueues = 2;  // at once

// The counter of a queue's items that are drawn.
MX_DEVICE int32_t* queue_counter(const LaunchParams& p, Queue queue) {
  return p.call.tickets + (queue == Queue::kSmall ? 1 : 0);
}

// The ticket of a merge: items that are done, times the tickets of an item.
MX_DEVICE int32_t* merge_ticket(const LaunchParams& p, int32_t merge_idx) {
  return p.call.tickets + kNumQueues + merge_idx;
}

// Draws an item, or notes that there is none; by one thread.
MX_DEVICE void draw_words(const LaunchParams& p, Item item, Queue queue) {
  const PlanHeader& header = plan_header(p);
  const int32_t begin = queue == Queue::kSmall ? header.first_small : 0;
  const int32_t end = queue == Queue::kLarger ? header.first_small : header.num_items;
  const int32_t item_idx = begin + mx::atomic_add_relaxed(queue_counter(p, queue), 1);
  item.set(kItemsLeft, end - item_idx);
  item.set(kCapacityItems, header.capacity_items);
  if (item_idx < end) describe_item(p, plan_items(p)[item_idx], item);
}

// Every block draws one number past the items; whoever drew the last of these resets the counter. By one thread.
MX_DEVICE void close_queue(const LaunchParams& p, Item item, Queue queue) {
  if (item[kItemsLeft] == 1 - mx::num_blocks()) mx::st_global(queue_counter(p, queue), 0u);
}

// Draws the team's next item; false when there is none. Also a barrier: every thread is done with the shared memory of
// the item before.
MX_DEVICE bool draw_item(const LaunchParams& p, Item item, Queue queue) {
  sync_team();
  if (this_thread().idx == 0) draw_words(p, item, queue);
  sync_team();
  return item[kItemsLeft] > 0;
}

// What a team knows itself by where several share an item.
struct Team {
  int barrier;
  ControlWord ticket;
};
constexpr Team kOnlyTeam = {kTeamBarrier, kTicket};

// Draws some of a merge's tickets. Whether this team, with its partials written, is the last of those that have some of
// the merge's rows and keys to get here; if so, it sees the partials of all of them.
MX_DEVICE bool is_last_team(const LaunchParams& p, Item item, Team team, int32_t merge_idx, int32_t tickets,
                            int32_t merge_tickets) {
  // The barrier puts the partials of all threads before thread 0's fence, the fence before its ticket: whoever draws a
  // later ticket, and fences behind it, sees them. The other barrier hands that on to the team.
  sync_team(team.barrier);  // before the fence
  if (this_thread().idx == 0) {
    mx::fence_gpu();  // before the ticket
    item.set(team.ticket, mx::atomic_add_relaxed(merge_ticket(p, merge_idx), tickets));
    mx::fence_gpu();  // behind the ticket
  }
  sync_team(team.barrier);
  return item[team.ticket] == merge_tickets - tickets;
}

// The partials of all splits of some rows, in split order, to out and lse. A warp merges a row, a lane the dimensions
// 2 lane + 64 d and the one behind.
template <class T, int kVHeadDim>
MX_DEVICE void merge_item(const LaunchParams& p, const Merge& merge) {
  constexpr int kStride = 2 * mx::kWarpSize;
  constexpr int kPairs =
      (kVHeadDim + kStride - 1) / kStride;  // of a lane; the last is no dimension for some lanes of 96
  const Thread thread = this_thread();
  const int dim = 2 * thread.lane;
  MX_NO_UNROLL
  for (int32_t row = thread.warp; row < merge.num_rows; row += kNumWarps) {
    mx::float2 sum[kPairs];
    MX_UNROLL
    for (int d = 0; d < kPairs; ++d) sum[d] = {0.0f, 0.0f};
    float row_max = -INFINITY;
    float row_sum = 0.0f;
    MX_NO_UNROLL
    for (int32_t split = 0; split < merge.num_splits; ++split) {
      const int64_t partial_row = int64_t{merge.partial_row} + split * merge.num_rows + row;
      const float* const partial = p.call.partial_out + partial_row * kVHeadDim + dim;
      const StateFactors factors = absorb_state(mx::ld_global_cg(p.call.partial_lse + partial_row), row_max);
      row_sum = row_sum * factors.rescale + factors.weight;
      MX_UNROLL
      for (int d = 0; d < kPairs; ++d) {
        if (dim + kStride * d >= kVHeadDim) continue;
        const mx::float2 value = mx::ld_global_cg_v2(partial + kStride * d);
        sum[d] = {sum[d].x * factors.rescale + value.x * factors.weight,
                  sum[d].y * factors.rescale + value.y * factors.weight};
      }
    }
    const RowPlace place = place_row(p, p.call.cu_seqlens_q[merge.seq_idx], merge.kv_head, merge.row_begin + row);
    const RowEnd end = finish_row_with_sink(row_max, row_sum, row_sink_log2(p, place.head));
    T* const out = out_row<T>(p, place) + dim;
    MX_UNROLL
    for (int d = 0; d < kPairs; ++d) {
      if (dim + kStride * d >= kVHeadDim) continue;
      mx::st_global(out + kStride * d, pack_results<T>(p, sum[d].x * end.inverse_sum, sum[d].y * end.inverse_sum));
    }
    if (thread.lane == 0) store_lse(p, place, end.lse_log2);
  }
}

// Behind the last store of an item's partials: whoever comes last merges. Every item has item_tickets; this team draws
// them all, or its share if it has only some of the rows.
template <class T, int kVHeadDim>
MX_DEVICE void merge_if_last(const LaunchParams& p, Item item, Team team, int32_t tickets, int32_t item_tickets) {
  const int32_t merge_idx = item[kMergeIdx];
  if (merge_idx < 0) return;
  const Merge& merge = plan_merges(p, item)[merge_idx];
  if (!is_last_team(p, item, team, merge_idx, tickets, merge.num_items * item_tickets)) return;
  merge_item<T, kVHeadDim>(p, merge);
  // For the next launch: in this one nobody draws it again.
  if (this_thread().idx == 0) mx::st_global(merge_ticket(p, merge_idx), 0u);
}

// Draws items of the plan until none is left. Attend::item(p, item) computes the one that was drawn, which has
// Attend::kItemTickets.
template <class T, int kVHeadDim, class Attend>
MX_DEVICE void run_queue(const LaunchParams& p, Queue queue) {
  const Item item = {mx::shared_base()};
  while (draw_item(p, item, queue)) {
    Attend::item(p, item);
    merge_if_last<T, kVHeadDim>(p, item, kOnlyTeam, Attend::kItemTickets, Attend::kItemTickets);
  }
  if (this_thread().idx == 0) close_queue(p, item, queue);
}

}  // namespace cuda
}  // namespace mixattn
