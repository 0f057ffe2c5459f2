// plan.h: from the slices of a step to work items of near-equal cost; once per step, on host or device.
// Math    A slice's packed rows are cut into row tiles (row_tile.h). target = total cost / (num_workers *
//         items_per_worker), and of that 1 / heads_per_bundle for tiles of the small kind, whose kv heads a worker
//         takes together; a tile dearer than that is split along its keys into ceil(cost / target) pieces of equally
//         many granules of split_tokens, at fixed token positions. Where workers share cores
//         (workers_per_core > 0), tiles of larger kinds, whose partial results are not cheap, have a target of their
//         own: that of a few which ends earliest by estimate (choose_large_target), the number of pieces then rounded
//         to nearest. An invariant plan (fixed_split_tokens > 0) splits every tile into granules of fixed_split_tokens
//         instead: the keys that are summed up together are then the same for a row whatever its batch, its chunk and
//         the workers.
//         Slices that share a prefix may be groups (prefix_groups.h): a tile for the keys that they share, and one for
//         each slice over the keys behind. The first is split as others are, its slices' alike, by what they cost on
//         average.
// Method  Generation order is (slice, row tile, split, kv head), of a group first its shared keys' tile: the kv heads
//         of one KV range, which share its pages, stay neighbours. Items are sorted by cost, dearest first, ties in
//         generation order (longest processing time first), or first those of larger kinds and then the small ones,
//         where each have workers of their own (separates_small). All kv heads of a piece cost the same, so pieces are
//         sorted and heads written out in the end.
// Shapes  cu_seqlens_q [num_seqs + 1], seq_lens [num_seqs] int32, PageTable; out: the words of work_item.h
// Memory  reads 4 (2 num_seqs + 1) bytes twice, and of the pages what neighbours share; writes 4 (16 + 8 items + 8
//         merges) bytes; scratch_words() of scratch
// Limits  plan() is for one thread; O(n log n) in row tiles and pieces; no allocation
// Twins   tests/ops/plan_twin.py, cuda/plan.cuh, which calls the functions here from a block of threads (bit-equal)
// Source  longest processing time first, Graham 1969 (doi 10.1137/0117039); split-KV, arXiv:2311.01282
#pragma once

#include "common/cost.h"
#include "common/prefix_groups.h"
#include "common/row_tile.h"

namespace mixattn {

enum PlanStatus : int32_t {
  kPlanOk = 0,
  kPlanBadSlice = 1,      // a negative q_len or kv_len, or more than 2^31 - 1 packed rows
  kPlanNoRoom = 2,        // more items, merges or partial rows than the capacity
  kPlanCostTooLarge = 3,  // the batch costs more than kMaxCost
};

// What the workers draw to be balanced: enough that each draws several times, so that the last draw is short. One
// worker is balanced without splits.
MIXATTN_HD inline int64_t num_draws(const PlanSpec& spec) {
  return spec.num_workers == 1 ? 1 : int64_t{spec.num_workers} * spec.items_per_worker;
}

// Items that make up so many draws, at most.
MIXATTN_HD inline int64_t balance_slots(const PlanSpec& spec) {
  return spec.num_workers == 1 ? 1 : num_draws(spec) * spec.heads_per_bundle;
}

// Capacity, for any batch of num_seqs slices and total_q rows.
//
// Row tiles. A slice has ceil(R / b) <= R / b + 1 tiles per kv head, b = block_rows[0]. Summed over slices and kv
// heads, tiles <= num_kv_heads * (num_seqs + floor(total_q * group_size / b)). Pieces. Tile i costs c_i and the target
// is at least sum(c) / slots. It becomes n_i <= ceil(c_i / target) items, that is n_i - 1 < c_i / target pieces more
// than one. Summed, sum(n_i - 1) < sum(c) / target <= slots; being an integer it is at most slots - 1.
//   items  = sum(n_i) <= tiles + slots - 1
//   merges = number of n_i >= 2, each with n_i - 1 >= 1, so merges <= slots - 1
//   partial rows = sum over n_i >= 2 of n_i * rows_i <= sum of 2 (n_i - 1) * b <= 2 b (slots - 1)
// Merges and partial rows do not depend on the batch: their buffers can be made once. An invariant plan has none of
// these bounds: every tile has as many pieces as its keys have granules.
//
// Groups. A group of m >= 2 slices has m + 1 tiles per kv head instead of m, so that all tiles are at most num_kv_heads
// * max_groups more. Its slices' tiles, which cost S, have n <= ceil(S / (m target)) pieces each, m (n - 1) < S /
// target more than one: in the sum above they count as tiles that cost S. So
//   items  <= tiles + num_kv_heads * max_groups + slots - 1
//   merges <= slots - 1 + num_kv_heads * max_groups: those of groups need not have a tile of two pieces
//   partial rows: a group of G <= b rows whose first tile has n_0 pieces has (n_0 + n) G, which is at most
//           2 G + b (n_0 - 1 + m (n - 1)), and all groups' 2 G are at most 2 total_q * num_q_heads: in all, at most
//           2 b (slots - 1) + 2 total_q * num_q_heads. Only small slices are in groups, at most 2 max_groups + 1 of
//           them, of block_rows of the small kind each. And a row has at most max_splits partial rows, in a group twice
//           as many
// num_groups: max_groups() of a batch with a page table, 0 of one without.
MIXATTN_HD inline int64_t max_items(const PlanSpec& spec, int64_t total_q, int64_t num_seqs, int64_t num_groups) {
  const int64_t group_size = spec.num_q_heads / spec.num_kv_heads;
  const int64_t rows = total_q * group_size / spec.block_rows[kTileLarge];
  return spec.num_kv_heads * (num_seqs + num_groups + rows) + balance_slots(spec) - 1;
}

MIXATTN_HD inline int64_t max_merges(const PlanSpec& spec, int64_t num_groups) {
  return balance_slots(spec) - 1 + spec.num_kv_heads * num_groups;
}

MIXATTN_HD inline int64_t max_partial_rows(const PlanSpec& spec, int64_t total_q, int64_t num_groups) {
  const int64_t rows = total_q * spec.num_q_heads;
  const int64_t of_small_slices = spec.num_kv_heads * (2 * num_groups + 1) * spec.block_rows[kTileSmall];
  const int64_t of_groups = num_groups == 0 ? 0 : rows < of_small_slices ? rows : of_small_slices;
  const int64_t by_slots = 2 * spec.block_rows[kTileLarge] * (balance_slots(spec) - 1) + 2 * of_groups;
  const bool has_few_rows = rows + of_groups <= by_slots / spec.max_splits;  // the product could pass int64
  return has_few_rows ? (rows + of_groups) * spec.max_splits : by_slots;
}

// A piece before its heads are written out: its place in the order.
struct PlanKey {
  int64_t cost;
  int64_t piece_idx;
};

// int64 words of scratch that plan() needs: per piece one WorkItem and two keys (merge sort goes back and forth), and
// what the groups need.
constexpr int64_t kScratchWordsPerPiece = (sizeof(WorkItem) + 2 * sizeof(PlanKey)) / sizeof(int64_t);

MIXATTN_HD inline int64_t scratch_words(const PlanSpec& spec, int64_t num_seqs, int64_t capacity_items) {
  return capacity_items / spec.num_kv_heads * kScratchWordsPerPiece + group_scratch_words(num_seqs);
}

// Whether rows [row_begin, row_end) and so many keys are a slice that can be planned.
MIXATTN_HD inline bool is_slice(int64_t group_size, int32_t row_begin, int32_t row_end, int32_t kv_len) {
  const int64_t q_len = int64_t{row_end} - row_begin;
  return q_len >= 0 && q_len * group_size <= INT32_MAX && kv_len >= 0;
}

MIXATTN_HD inline PlanStatus check_slices(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                          int32_t num_seqs) {
  const int64_t group_size = spec.num_q_heads / spec.num_kv_heads;
  int32_t longest_kv = 0;
  for (int32_t s = 0; s < num_seqs; ++s) {
    if (!is_slice(group_size, cu_seqlens_q[s], cu_seqlens_q[s + 1], seq_lens[s])) return kPlanBadSlice;
    if (seq_lens[s] > longest_kv) longest_kv = seq_lens[s];
  }
  return is_cost_bounded(spec, spec.block_rows[kTileLarge], longest_kv) ? kPlanOk : kPlanCostTooLarge;
}

// ---- prices and targets ---------------------------------------------------------------------------------------------

// Cost of all row tiles, unsplit, over all kv heads, in *cost; their number, for one kv head, in *num_tiles.
MIXATTN_HD inline PlanStatus price_slices(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                          int32_t num_seqs, GroupCursor groups, int64_t* cost, int64_t* num_tiles) {
  const int64_t most_per_head = kMaxCost / spec.num_kv_heads;
  int64_t cost_per_head = 0;
  *num_tiles = 0;
  for (int32_t s = 0; s < num_seqs; ++s) {
    const int32_t q_len = cu_seqlens_q[s + 1] - cu_seqlens_q[s];
    const int32_t tiles = num_row_tiles(spec, q_len);
    const KeyShare share = key_share(spec, q_len, seq_lens[s], tiles);
    const PrefixGroup* const group = groups.find(s);
    if (group != nullptr && group->first_seq == s) {
      cost_per_head += tile_fs(spec, prefix_tile(spec, *group), group->prefix_tokens, unshared());
      if (cost_per_head >= most_per_head) return kPlanCostTooLarge;
      *num_tiles += 1;
    }
    for (int32_t t = 0; t < tiles; ++t) {
      const RowTile tile = group != nullptr ? suffix_tile(spec, cu_seqlens_q, seq_lens, *group, s)
                                            : row_tile(spec, q_len, seq_lens[s], t);
      cost_per_head += tile_fs(spec, tile, tile.kv_end - tile.kv_begin, share);
      if (cost_per_head >= most_per_head) return kPlanCostTooLarge;
    }
    *num_tiles += tiles;
  }
  *cost = cost_per_head * spec.num_kv_heads;
  return kPlanOk;
}

// No piece below twice fs_per_item: there a further split adds more overhead than it takes work away.
MIXATTN_HD inline int64_t target_fs(const PlanSpec& spec, int64_t cost, int64_t num_items) {
  const int64_t balanced = ceil_div(cost, num_items);
  const int64_t least = 2 * spec.fs_per_item > 1 ? 2 * spec.fs_per_item : 1;
  return balanced > least ? balanced : least;
}

// The granules of so many tokens that the tile's keys lie in.
struct Granules {
  int64_t first;
  int64_t count;
};

MIXATTN_HD inline Granules granules_of(const RowTile& tile, int32_t granule) {
  const int64_t end = tile.kv_end > 0 ? (tile.kv_end - 1) / granule + 1 : 0;
  return {tile.kv_begin / granule, end - tile.kv_begin / granule};
}

// The pieces of a tile that costs fs, of which it can have at most so many.
MIXATTN_HD inline int64_t num_splits(const PlanSpec& spec, int32_t kind, int64_t fs, int64_t target, int64_t most) {
  const bool is_nearest = spec.workers_per_core > 0 && kind != kTileSmall;
  return clamp(is_nearest ? (fs + target / 2) / target : ceil_div(fs, target), 1, most);
}

// A target for the tiles of larger kinds, and what it would cut them into, over all kv heads.
struct LargeCut {
  int64_t target;
  int64_t num_items;
  int64_t num_partial_rows;
  int64_t longest_fs;
};
constexpr int kMaxLargeCuts = 4;

// Gives each cut its target, cost / (cores, or 2, 4, 8 times as many, up to num_draws); returns how many cuts there
// are.
MIXATTN_HD inline int start_cuts(const PlanSpec& spec, int64_t cost, LargeCut (&cuts)[kMaxLargeCuts]) {
  int num_cuts = 0;
  int64_t items = num_cores(spec);
  for (int c = 0; c < kMaxLargeCuts && items <= num_draws(spec); ++c, items *= 2) {
    cuts[c] = {target_fs(spec, cost, items), 0, 0, 0};
    ++num_cuts;
  }
  return num_cuts;
}

// Adds what the cut makes of a tile that costs fs.
MIXATTN_HD inline void add_tile(const PlanSpec& spec, const RowTile& tile, int64_t fs, LargeCut* cut) {
  const int64_t heads = spec.num_kv_heads;
  const int64_t most = clamp(granules_of(tile, spec.split_tokens).count, 1, spec.max_splits);
  const int64_t splits = num_splits(spec, tile.kind, fs, cut->target, most);
  const int64_t piece_fs = ceil_div(fs, splits);
  cut->num_items += heads * splits;
  cut->num_partial_rows += splits > 1 ? heads * splits * tile.num_rows : 0;
  if (piece_fs > cut->longest_fs) cut->longest_fs = piece_fs;
}

// The target of the cut that ends first, of the one with fewer items if two do. The end is estimated as the latest of
//   everything, over all workers;
//   the dearest large item, and the large items, large_fs in all, in equal waves over the cores: an item has all that
//   its core reaches while the neighbours are idle, and small items fill what the last wave leaves;
// and then the partial results, written and read again.
MIXATTN_HD inline int64_t choose_cut(const PlanSpec& spec, const LargeCut (&cuts)[kMaxLargeCuts], int num_cuts,
                                     int64_t large_fs, int64_t cost) {
  const int64_t cores = num_cores(spec);
  int64_t best_target = cuts[0].target;
  int64_t best_fs = INT64_MAX;
  for (int c = 0; c < kMaxLargeCuts; ++c) {
    if (c >= num_cuts || large_fs == 0) continue;
    const LargeCut& cut = cuts[c];
    const int64_t wave_fs = ceil_div(cut.num_items, cores) * (large_fs / cut.num_items);  // at most large_fs
    const int64_t alone_fs = (cut.longest_fs > wave_fs ? cut.longest_fs : wave_fs) / spec.workers_per_core;
    const int64_t shared_fs = cost / spec.num_workers;
    const int64_t partial_fs = partials_fs(spec, cut.num_partial_rows);
    const int64_t end_fs = (alone_fs > shared_fs ? alone_fs : shared_fs) + partial_fs / spec.num_workers;
    if (end_fs >= best_fs) continue;
    best_target = cut.target;
    best_fs = end_fs;
  }
  return best_target;
}

// The target of larger kinds.
MIXATTN_HD inline int64_t choose_large_target(const PlanSpec& spec, const int32_t* cu_seqlens_q,
                                              const int32_t* seq_lens, int32_t num_seqs, GroupCursor groups,
                                              int64_t cost) {
  if (spec.workers_per_core == 0) return target_fs(spec, cost, num_draws(spec));
  LargeCut cuts[kMaxLargeCuts] = {};
  const int num_cuts = start_cuts(spec, cost, cuts);
  int64_t large_fs = 0;
  const auto add = [&](const RowTile& tile, const KeyShare& share) {
    if (tile.kind == kTileSmall) return;
    const int64_t fs = tile_fs(spec, tile, tile.kv_end - tile.kv_begin, share);
    large_fs += spec.num_kv_heads * fs;
    for (int c = 0; c < num_cuts; ++c) add_tile(spec, tile, fs, &cuts[c]);
  };
  for (int32_t s = 0; s < num_seqs; ++s) {
    const PrefixGroup* const group = groups.find(s);
    if (group != nullptr && group->first_seq == s) add(prefix_tile(spec, *group), unshared());
    const int32_t q_len = cu_seqlens_q[s + 1] - cu_seqlens_q[s];
    const int32_t tiles = num_row_tiles(spec, q_len);
    if (tiles == 0 || row_tile(spec, q_len, seq_lens[s], 0).kind == kTileSmall) continue;
    const KeyShare share = key_share(spec, q_len, seq_lens[s], tiles);
    for (int32_t t = 0; t < tiles; ++t) add(row_tile(spec, q_len, seq_lens[s], t), share);
  }
  return choose_cut(spec, cuts, num_cuts, large_fs, cost);
}

// Where tiles are split.
struct SplitRule {
  bool is_fixed;  // an invariant plan: at every granule
  int32_t granule;
  int64_t small_target;  // without is_fixed: what a piece of a tile of the small kind, or of another, is to cost
  int64_t large_target;
};

MIXATTN_HD inline SplitRule split_rule(const PlanSpec& spec, int64_t cost, int64_t large_target) {
  const bool is_fixed = spec.fixed_split_tokens > 0;
  return {is_fixed, is_fixed ? spec.fixed_split_tokens : spec.split_tokens, target_fs(spec, cost, balance_slots(spec)),
          large_target};
}

// The pieces of a tile that costs fs, which is not read if is_fixed.
MIXATTN_HD inline int32_t tile_splits(const PlanSpec& spec, const SplitRule& rule, const RowTile& tile,
                                      const Granules& granules, int64_t fs) {
  const int64_t most = clamp(granules.count, 1, rule.is_fixed ? INT32_MAX : spec.max_splits);
  const int64_t target = tile.kind == kTileSmall ? rule.small_target : rule.large_target;
  return static_cast<int32_t>(rule.is_fixed ? most : num_splits(spec, tile.kind, fs, target, most));
}

// The pieces that the tiles of a group's slices are split into, each.
MIXATTN_HD inline int32_t suffix_splits(const PlanSpec& spec, const SplitRule& rule, const int32_t* cu_seqlens_q,
                                        const int32_t* seq_lens, const PrefixGroup& group) {
  int64_t fs = 0;
  int64_t most_granules = 1;
  for (int32_t s = group.first_seq; s < group.end_seq; ++s) {
    const RowTile tile = suffix_tile(spec, cu_seqlens_q, seq_lens, group, s);
    fs += tile_fs(spec, tile, tile.kv_end - tile.kv_begin, unshared());
    const int64_t granules = granules_of(tile, rule.granule).count;
    if (granules > most_granules) most_granules = granules;
  }
  const int64_t average_fs = ceil_div(fs, group.end_seq - group.first_seq);
  return static_cast<int32_t>(
      clamp(ceil_div(average_fs, rule.small_target), 1, clamp(most_granules, 1, spec.max_splits)));
}

// Where the pieces of a tile go, as of kv head 0.
struct PieceTarget {
  int32_t merge_idx;    // -1: the tile is one piece, which leaves finished rows
  int32_t partial_row;  // of the first piece
  int32_t row_step;     // from a piece's partial rows to the next one's
};
MIXATTN_HD inline PieceTarget no_merge() {
  return {-1, 0, 0};
}

// Piece i of a tile, as of kv head 0.
MIXATTN_HD inline void write_piece(const RowTile& tile, const Granules& granules, int32_t granule, int32_t seq_idx,
                                   int32_t i, int32_t splits, const PieceTarget& target, WorkItem* piece) {
  // Granule edges are token positions of the sequence: where a piece ends does not depend on the chunking.
  const int64_t edge_begin = (granules.first + granules.count * i / splits) * granule;
  const int64_t edge_end = (granules.first + granules.count * (i + 1) / splits) * granule;
  *piece = {seq_idx,
            0,
            tile.row_begin,
            tile.num_rows | tile.kind << 16,
            static_cast<int32_t>(clamp(edge_begin, tile.kv_begin, tile.kv_end)),
            static_cast<int32_t>(clamp(edge_end, tile.kv_begin, tile.kv_end)),
            target.merge_idx,
            target.partial_row + i * target.row_step};
}

// What the items of a piece differ by, from one kv head to the next.
struct HeadStep {
  int32_t merges;
  int32_t partial_rows;
};

MIXATTN_HD inline HeadStep head_step(const WorkItem& piece, const Merge* merges) {
  if (piece.merge_idx < 0) return {0, 0};
  return {1, merges[piece.merge_idx].num_splits * merges[piece.merge_idx].num_rows};
}

// The item of a kv head, in place: made aside and copied, items take the host half again as long.
MIXATTN_HD inline void write_item(const WorkItem& piece, const HeadStep& step, int32_t kv_head, WorkItem* item) {
  *item = piece;
  item->kv_head = kv_head;
  item->merge_idx += kv_head * step.merges;
  item->partial_row += kv_head * step.partial_rows;
}

// Sorts keys[0, n) by cost, dearest first, ties as they stand: a merge sort, bottom-up, that goes back and forth
// between keys and spare [n]. Returns the one that ends up sorted. The inner loop has no branch on the costs, which are
// as good as random: mispredicted, it would take most of the planner's time.
MIXATTN_HD inline PlanKey* merge_sort(PlanKey* keys, PlanKey* spare, int64_t n) {
  for (int64_t width = 1; width < n; width *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * width) {
      const int64_t middle = clamp(begin + width, 0, n);
      const int64_t end = clamp(begin + 2 * width, 0, n);
      int64_t left = begin;
      int64_t right = middle;
      int64_t to = begin;
      while (left < middle && right < end) {
        const int64_t is_right = keys[right].cost > keys[left].cost;
        spare[to++] = keys[is_right ? right : left];
        right += is_right;
        left += 1 - is_right;
      }
      while (left < middle) spare[to++] = keys[left++];
      while (right < end) spare[to++] = keys[right++];
    }
    PlanKey* const sorted = spare;
    spare = keys;
    keys = sorted;
  }
  return keys;
}

// What a piece is sorted by: its cost, which is below kMaxCost, and where the kinds are separate first its kind.
MIXATTN_HD inline int64_t sort_cost(const PlanSpec& spec, int32_t kind, int64_t fs) {
  return spec.separates_small && kind != kTileSmall ? kMaxCost + fs : fs;
}

// PlanHeader::first_small of sorted keys [0, n).
MIXATTN_HD inline int32_t first_small_item(const PlanSpec& spec, const PlanKey* sorted, int64_t n) {
  if (!spec.separates_small) return -1;
  int64_t low = 0;
  int64_t high = n;
  while (low < high) {
    const int64_t probe = low + (high - low) / 2;
    if (sorted[probe].cost >= kMaxCost) {
      low = probe + 1;
    } else {
      high = probe;
    }
  }
  return static_cast<int32_t>(low * spec.num_kv_heads);
}

MIXATTN_HD inline PlanHeader plan_header(const PlanSpec& spec, const int32_t* cu_seqlens_q, int32_t num_seqs,
                                         int32_t num_items, int32_t num_merges, int32_t num_partial_rows,
                                         int32_t capacity_items, int32_t capacity_merges, int32_t num_groups,
                                         int32_t first_small, PlanStatus status) {
  return {
      status == kPlanOk ? kPlanMagic : status,
      num_items,
      num_merges,
      num_partial_rows,
      num_seqs,
      num_seqs > 0 ? cu_seqlens_q[num_seqs] - cu_seqlens_q[0] : 0,
      capacity_items,
      capacity_merges,
      spec.num_q_heads,
      spec.num_kv_heads,
      spec.head_dim,
      spec.causal,
      spec.window_left,
      num_groups,
      spec.fixed_split_tokens,
      first_small,
  };
}

// The pieces of a batch while they are found, of kv head 0.
struct PieceList {
  WorkItem* pieces;  // [capacity]
  PlanKey* keys;     // [capacity]
  int64_t capacity;
  int64_t count;
};

MIXATTN_HD inline void add_pieces(const PlanSpec& spec, const SplitRule& rule, const RowTile& tile,
                                  const Granules& granules, const KeyShare& share, int32_t seq_idx, int32_t splits,
                                  const PieceTarget& target, PieceList* list) {
  for (int32_t i = 0; i < splits; ++i) {
    WorkItem& piece = list->pieces[list->count];
    write_piece(tile, granules, rule.granule, seq_idx, i, splits, target, &piece);
    const int64_t fs = tile_fs(spec, tile, piece.kv_end - piece.kv_begin, share);
    list->keys[list->count] = {sort_cost(spec, tile.kind, fs), list->count};
    ++list->count;
  }
}

// Writes the plan of a batch.
//   out      [kPlanHeaderWords + kWorkItemWords * capacity_items + kMergeWords * capacity_merges] words, written
//   scratch  [scratch_words(spec, num_seqs, capacity_items)], aligned to 8 bytes
// Never writes past either, whatever the slices; unless it returns kPlanOk, what it wrote is no plan.
MIXATTN_HD inline PlanStatus plan(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                  int32_t num_seqs, const PageTable& table, int32_t* out, int32_t capacity_items,
                                  int32_t capacity_merges, int64_t* scratch) {
  const int64_t heads = spec.num_kv_heads;
  PieceList list = {reinterpret_cast<WorkItem*>(scratch), nullptr, capacity_items / heads, 0};
  list.keys = reinterpret_cast<PlanKey*>(list.pieces + list.capacity);
  PrefixGroup* const groups = reinterpret_cast<PrefixGroup*>(list.keys + 2 * list.capacity);
  int32_t* const shared = reinterpret_cast<int32_t*>(groups + num_seqs / 2);
  WorkItem* const items = reinterpret_cast<WorkItem*>(out + kPlanHeaderWords);
  Merge* const merges = reinterpret_cast<Merge*>(items + capacity_items);

  const PlanStatus slices_status = check_slices(spec, cu_seqlens_q, seq_lens, num_seqs);
  if (slices_status != kPlanOk) return slices_status;
  int32_t num_groups = 0;
  if (table.pages != nullptr && has_groups(spec)) {
    for (int32_t s = 1; s < num_seqs; ++s) shared[s] = shared_tokens(spec, cu_seqlens_q, seq_lens, table, s);
    num_groups = find_groups(spec, cu_seqlens_q, seq_lens, num_seqs, shared, groups);
  }
  GroupCursor cursor = {groups, groups + num_groups};
  int64_t cost = 0;
  int64_t num_tiles = 0;
  const PlanStatus price_status = price_slices(spec, cu_seqlens_q, seq_lens, num_seqs, cursor, &cost, &num_tiles);
  if (price_status != kPlanOk) return price_status;
  if (num_tiles > list.capacity) return kPlanNoRoom;

  const bool is_fixed = spec.fixed_split_tokens > 0;
  const SplitRule rule =
      split_rule(spec, cost, is_fixed ? 0 : choose_large_target(spec, cu_seqlens_q, seq_lens, num_seqs, cursor, cost));
  int32_t num_merges = 0;
  int32_t num_partial_rows = 0;
  const auto has_room = [&](int64_t num_pieces, int64_t splits, int64_t num_rows) {
    return list.count + num_pieces <= list.capacity && num_merges + (splits > 1 ? heads : 0) <= capacity_merges &&
           num_partial_rows + (splits > 1 ? heads * splits * num_rows : 0) <= INT32_MAX;
  };
  const auto add_merges = [&](int32_t s, const RowTile& rows, int32_t splits, int32_t num_items, int32_t prefix) {
    for (int32_t h = 0; h < heads; ++h) {
      merges[num_merges++] = {s, h, rows.row_begin, rows.num_rows, num_partial_rows, splits, num_items, prefix};
      num_partial_rows += splits * rows.num_rows;
    }
  };
  for (int32_t s = 0; s < num_seqs; ++s) {
    const PrefixGroup* const group = cursor.find(s);
    if (group != nullptr) {
      const RowTile prefix = prefix_tile(spec, *group);
      const Granules granules = granules_of(prefix, rule.granule);
      const int64_t prefix_fs = tile_fs(spec, prefix, group->prefix_tokens, unshared());
      const int32_t prefix_splits = tile_splits(spec, rule, prefix, granules, prefix_fs);
      const int32_t own_splits = suffix_splits(spec, rule, cu_seqlens_q, seq_lens, *group);
      const int64_t num_items = prefix_splits + int64_t{own_splits} * (group->end_seq - group->first_seq);
      if (!has_room(num_items, int64_t{prefix_splits} + own_splits, group->num_rows)) return kPlanNoRoom;
      PieceTarget target = {num_merges, num_partial_rows, group->num_rows};
      add_pieces(spec, rule, prefix, granules, unshared(), s, prefix_splits, target, &list);
      target.partial_row += prefix_splits * group->num_rows;
      for (; s < group->end_seq; ++s) {
        const RowTile own = suffix_tile(spec, cu_seqlens_q, seq_lens, *group, s);
        add_pieces(spec, rule, own, granules_of(own, rule.granule), unshared(), s, own_splits, target, &list);
        target.partial_row += own.num_rows;
      }
      --s;
      add_merges(group->first_seq, prefix, prefix_splits + own_splits, static_cast<int32_t>(num_items),
                 group->prefix_tokens);
      continue;
    }
    const int32_t q_len = cu_seqlens_q[s + 1] - cu_seqlens_q[s];
    const int32_t tiles = num_row_tiles(spec, q_len);
    const KeyShare share = key_share(spec, q_len, seq_lens[s], tiles);
    for (int32_t t = 0; t < tiles; ++t) {
      const RowTile tile = row_tile(spec, q_len, seq_lens[s], t);
      const Granules granules = granules_of(tile, rule.granule);
      const int32_t splits =
          tile_splits(spec, rule, tile, granules, tile_fs(spec, tile, tile.kv_end - tile.kv_begin, share));
      if (!has_room(splits, splits, tile.num_rows)) return kPlanNoRoom;
      const PieceTarget target = splits > 1 ? PieceTarget{num_merges, num_partial_rows, tile.num_rows} : no_merge();
      add_pieces(spec, rule, tile, granules, share, s, splits, target, &list);
      if (splits > 1) add_merges(s, tile, splits, splits, 0);
    }
  }

  const PlanKey* const sorted = merge_sort(list.keys, list.keys + list.capacity, list.count);
  WorkItem* next = items;
  for (int64_t p = 0; p < list.count; ++p) {
    const WorkItem& piece = list.pieces[sorted[p].piece_idx];
    const HeadStep step = head_step(piece, merges);
    for (int32_t h = 0; h < heads; ++h) write_item(piece, step, h, next++);
  }
  *reinterpret_cast<PlanHeader*>(out) =
      plan_header(spec, cu_seqlens_q, num_seqs, static_cast<int32_t>(next - items), num_merges, num_partial_rows,
                  capacity_items, capacity_merges, num_groups, first_small_item(spec, sorted, list.count), kPlanOk);
  return kPlanOk;
}

}  // namespace mixattn
