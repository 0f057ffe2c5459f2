// work_item.h: the WorkPlan as int32 words, as the planner writes it and every kernel reads it.
// Layout  [header: 16 words][items: capacity_items x 8 words][merges: capacity_merges x 8 words]
// Twins   mixattn/ops/plan.py (names and offsets), triton_kernels/mixed_attention.py (offsets)
#pragma once

#include <cstdint>

// Marks what also runs inside CUDA kernels.
#ifdef __CUDACC__
#define MIXATTN_HD __host__ __device__
#else
#define MIXATTN_HD
#endif

namespace mixattn {

constexpr int32_t kPlanMagic = 0x6d780002;  // "mx", layout version 2
constexpr int32_t kPlanHeaderWords = 16;
constexpr int32_t kWorkItemWords = 8;
constexpr int32_t kMergeWords = 8;

// The fixed tile kinds, by packed query rows (see packed row below). A kind is an upper bound on num_rows.
enum TileKind : int32_t { kTileLarge = 0, kTileMedium = 1, kTileSmall = 2, kNumTileKinds = 3 };

struct PlanHeader {
  int32_t magic;  // of a batch that has no plan, which a device can only write down here: its PlanStatus (plan.h). Such
                  // a plan has no items, merges and groups, and kernels that run it write nothing
  int32_t num_items;
  int32_t num_merges;
  int32_t num_partial_rows;  // rows of the partial buffers that the items of this plan write
  int32_t num_seqs;
  int32_t total_q;
  int32_t capacity_items;  // where the merges start: kPlanHeaderWords + capacity_items * kWorkItemWords
  int32_t capacity_merges;
  int32_t num_q_heads;  // what the plan was made for; kernels refuse another shape
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t causal;              // 0 or 1
  int32_t window_left;         // -1: no window
  int32_t num_groups;          // of slices that share a prefix (plan.h); 0: every item's rows are of one slice
  int32_t fixed_split_tokens;  // > 0: an invariant plan (plan.h); 0: split where that balances the workers
  int32_t first_small;         // items from here on are of the small kind, none before; -1: the kinds are mixed
};
static_assert(sizeof(PlanHeader) == kPlanHeaderWords * sizeof(int32_t), "header is 16 words");

// One unit of work: some packed query rows of one (sequence, kv head) over the keys [kv_begin, kv_end).
// Packed row p of a slice with group_size query heads per kv head is query token p / group_size of the slice and query
// head kv_head * group_size + p % group_size.
// Rows may see fewer keys than the range (causal edge, window): the kernel masks inside it. kv_begin == kv_end: no row
// of the item sees a key; its rows get out 0 and lse -inf (when merge_idx < 0) or an empty partial.
// An item over the keys that a group of neighbouring slices shares has the packed rows of all of them, seq_idx being
// the first: packed rows of neighbours are neighbours, so that p / group_size goes on into the next slice. Every row
// sees every key of it.
struct WorkItem {
  int32_t seq_idx;
  int32_t kv_head;
  int32_t row_begin;      // first packed row
  int32_t rows_and_kind;  // num_rows | kind << 16
  int32_t kv_begin;       // inclusive, absolute token position
  int32_t kv_end;         // exclusive
  int32_t merge_idx;      // -1: the item sees all keys of its rows and writes out directly
  int32_t partial_row;    // first of its num_rows rows in the partial buffers; 0 when merge_idx < 0
};
static_assert(sizeof(WorkItem) == kWorkItemWords * sizeof(int32_t), "item is 8 words");

// The rows whose keys were split into num_splits ranges. Split i wrote its num_rows rows at partial_row + i * num_rows,
// splits in ascending kv order; whoever finishes the last of num_items items merges them in that order. The first
// splits of a group of slices are of the keys [0, prefix_tokens), which they share, one item each; the others are of
// the keys behind, each slice's own, and have an item for each slice, which writes the slice's rows of the split.
struct Merge {
  int32_t seq_idx;
  int32_t kv_head;
  int32_t row_begin;
  int32_t num_rows;
  int32_t partial_row;
  int32_t num_splits;
  int32_t num_items;
  int32_t prefix_tokens;  // 0: no group
};
static_assert(sizeof(Merge) == kMergeWords * sizeof(int32_t), "merge is 8 words");

MIXATTN_HD inline int32_t num_rows(const WorkItem& item) {
  return item.rows_and_kind & 0xffff;
}
MIXATTN_HD inline int32_t tile_kind(const WorkItem& item) {
  return item.rows_and_kind >> 16;
}

}  // namespace mixattn
