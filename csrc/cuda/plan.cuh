// plan.cuh: the planner on the device: the words of common/plan.h, equal in every bit, without a copy to the host.
// Math    common/plan.h, whose functions price, split and describe here, too: only the order of steps is another
// Method  one block. A thread takes a slice, then a row tile, then a piece, then an item; each finds what it is part of
//         by bisection in the prefix sums of the step before. Sums and maxima are of integers, so that their order does
//         not matter; the sort is stable, as the host's is:
//           1 slices         are they slices, the longest kv_len            1 maximum
//         with a page table:
//             slices         keys shared with the slice before              -
//             -              groups, by one thread as on the host           -
//             slices         their groups                                   -
//           2 slices         row tiles, of a group's first one more         prefix sums: the first tile of each
//           3 tiles          rows and keys                                  prefix sums: keys, for what a slice reads
//           4 tiles          cost                                           1 sum
//           5 large tiles    what each target would cut them into           9 sums, 4 maxima
//           6 tiles          pieces, merges, partial rows                   prefix sums: where each tile's begin
//           7 pieces         written, with their cost; merges               -
//           8 pieces         sorted by merging runs: a piece finds its place in the other run by bisection
//           9 items          written
// Grid    one block of any number of warps up to 16. With T threads, S slices, N tiles, P pieces and H kv heads the
//         steps take ceil(S / T), ceil(N / T), ceil(P / T), ceil(P H / T) rounds; a prefix sum is 10 shuffles and 2
//         barriers per round; the sort log2(P) rounds of ceil(P / T) bisections of log2(P) reads each, a barrier apart
// Shapes  as plan.h; scratch [plan_scratch_words(...)] int64
// Memory  reads 4 (2 num_seqs + 1) bytes four times, and of the pages what neighbours share; writes 4 (16 + 8 items + 8
//         merges) bytes, the last of them first through scratch, which stays in L2: 48 bytes per tile, 64 per piece, 24
//         per slice
// Limits  as plan.h. A batch that has no plan gets a header without items whose magic says why (PlanStatus); of several
//         reasons it may name another than the host does. Nothing is written past the capacity
// Twins   csrc/common/plan.h; tests/ops/plan_twin.py
// Source  as plan.h; merging by bisection: Cole 1988 (doi 10.1137/0217049) calls it cross-ranking
#pragma once

#include "common/plan.h"
#include "cuda/block_ops.cuh"

namespace mixattn {
namespace cuda {

constexpr int kPlanMostThreads = 512;  // with 1,024 a thread has 64 registers, and large_target() spills

struct PlanLaunch {
  PlanSpec spec;
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  PageTable table;
  int32_t* out;      // [16 + 8 capacity_items + 8 capacity_merges]
  int64_t* scratch;  // [plan_scratch_words(spec, num_seqs, capacity_items)]
  int32_t num_seqs;
  int32_t capacity_items;
  int32_t capacity_merges;
  int32_t capacity_partial_rows;  // of the buffers that the plan's items write
};

// What the steps have found of a row tile.
struct PlannedTile {
  int64_t keys_before;  // that the tiles before it read
  int64_t fs;
  int32_t seq_idx;
  int32_t tile_idx;  // in its slice
  int32_t splits;
  int32_t first_piece;
  int32_t first_merge;  // of a group: its first tile's, as is the next
  int32_t first_partial_row;
  int32_t group_idx;  // -1: the slice is in none
  int32_t is_shared;  // 0 or 1: a group's first tile, of the rows of all its slices
};
static_assert(sizeof(PlannedTile) % sizeof(int64_t) == 0, "scratch is in words");

constexpr int64_t kPlanWordsPerPiece = kScratchWordsPerPiece + sizeof(PlannedTile) / sizeof(int64_t);

// int64 words of scratch that a launch needs.
inline int64_t plan_scratch_words(const PlanSpec& spec, int64_t num_seqs, int64_t capacity_items) {
  const int64_t int32_words = (num_seqs + 1) + num_seqs + num_seqs / 2 + 1;
  return (capacity_items / spec.num_kv_heads + 1) * kPlanWordsPerPiece + group_scratch_words(num_seqs) +
         ceil_div(int32_words, 2);
}

// One launch's thread: what it was called with, where its block's scratch is, and the steps.
struct Planner {
  const PlanLaunch& p;
  const PlanSpec& spec;
  Block block;
  int32_t capacity_pieces;
  WorkItem* pieces;     // [capacity_pieces], of kv head 0
  PlanKey* keys;        // [capacity_pieces], and as many spare ones behind them
  PlannedTile* tiles;   // [capacity_pieces + 1]: of the one behind the last tile only keys_before is set
  PrefixGroup* groups;  // [num_seqs / 2]
  int32_t* shared;      // [num_seqs]: shared_tokens() of each slice but the first
  int32_t* first_tile;  // [num_seqs + 1]: of each slice
  int32_t* group_of;    // [num_seqs]: each slice's; -1: it is in none
  int32_t* own_splits;  // [num_seqs / 2], and the number of groups behind them

  MX_DEVICE explicit Planner(const PlanLaunch& launch)
      : p(launch),
        spec(launch.spec),
        block(this_block()),
        capacity_pieces(launch.capacity_items / launch.spec.num_kv_heads),
        pieces(reinterpret_cast<WorkItem*>(launch.scratch)),
        keys(reinterpret_cast<PlanKey*>(pieces + capacity_pieces)),
        tiles(reinterpret_cast<PlannedTile*>(keys + 2 * int64_t{capacity_pieces})),
        groups(reinterpret_cast<PrefixGroup*>(tiles + capacity_pieces + 1)),
        shared(reinterpret_cast<int32_t*>(groups + launch.num_seqs / 2)),
        first_tile(shared + launch.num_seqs),
        group_of(first_tile + launch.num_seqs + 1),
        own_splits(group_of + launch.num_seqs) {}

  MX_DEVICE int32_t q_len(int32_t seq_idx) const { return p.cu_seqlens_q[seq_idx + 1] - p.cu_seqlens_q[seq_idx]; }

  MX_DEVICE RowTile rows_of(const PlannedTile& tile) const {
    if (tile.is_shared) return prefix_tile(spec, groups[tile.group_idx]);
    if (tile.group_idx >= 0) {
      return suffix_tile(spec, p.cu_seqlens_q, p.seq_lens, groups[tile.group_idx], tile.seq_idx);
    }
    return row_tile(spec, q_len(tile.seq_idx), p.seq_lens[tile.seq_idx], tile.tile_idx);
  }

  MX_DEVICE KeyShare share_of(const PlannedTile& tile) const {
    if (tile.group_idx >= 0) return unshared();
    const int32_t first = first_tile[tile.seq_idx];
    const int32_t end = first_tile[tile.seq_idx + 1];
    const int64_t distinct = int64_t{rows_of(tiles[end - 1]).kv_end} - rows_of(tiles[first]).kv_begin;
    return {distinct, tiles[end].keys_before - tiles[first].keys_before};
  }

  MX_DEVICE PlanStatus check_slices() const {
    const int64_t group_size = spec.num_q_heads / spec.num_kv_heads;
    int64_t longest_kv[1] = {0};
    for (int32_t s = block.thread; s < p.num_seqs; s += block.num_threads) {
      const bool is_good = is_slice(group_size, p.cu_seqlens_q[s], p.cu_seqlens_q[s + 1], p.seq_lens[s]);
      const int64_t kv_len = is_good ? p.seq_lens[s] : INT64_MAX;
      longest_kv[0] = kv_len > longest_kv[0] ? kv_len : longest_kv[0];
    }
    reduce(block, longest_kv, 0, [](int64_t a, int64_t b) { return a > b ? a : b; });
    if (longest_kv[0] > INT32_MAX) return kPlanBadSlice;
    return is_cost_bounded(spec, spec.block_rows[kTileLarge], longest_kv[0]) ? kPlanOk : kPlanCostTooLarge;
  }

  // Sets groups and group_of; returns how many groups there are.
  MX_DEVICE int32_t group_slices() const {
    for (int32_t s = block.thread; s < p.num_seqs; s += block.num_threads) group_of[s] = -1;
    if (p.table.pages == nullptr || !has_groups(spec)) return 0;  // whoever has set a slice's is the first to read it
    for (int32_t s = block.thread + 1; s < p.num_seqs; s += block.num_threads) {
      shared[s] = shared_tokens(spec, p.cu_seqlens_q, p.seq_lens, p.table, s);
    }
    int32_t* const num_groups = own_splits + p.num_seqs / 2;
    mx::sync_threads();  // what slices share is there
    if (block.thread == 0) *num_groups = find_groups(spec, p.cu_seqlens_q, p.seq_lens, p.num_seqs, shared, groups);
    mx::sync_threads();  // the groups are there
    for (int32_t g = block.thread; g < *num_groups; g += block.num_threads) {
      for (int32_t s = groups[g].first_seq; s < groups[g].end_seq; ++s) group_of[s] = g;
    }
    mx::sync_threads();  // the slices' groups are there
    return *num_groups;
  }

  MX_DEVICE bool is_first_of_group(int32_t seq_idx) const {
    return group_of[seq_idx] >= 0 && groups[group_of[seq_idx]].first_seq == seq_idx;
  }

  // Sets first_tile; returns the tiles of all slices, of which there may be more than room for.
  MX_DEVICE int64_t count_tiles() const {
    int64_t num_tiles[1] = {0};
    for (int32_t begin = 0; begin < p.num_seqs; begin += block.num_threads) {
      const int32_t s = begin + block.thread;
      int64_t before[1] = {s < p.num_seqs ? num_row_tiles(spec, q_len(s)) + is_first_of_group(s) : 0};
      exclusive_sums(block, before, num_tiles);
      if (s < p.num_seqs) first_tile[s] = static_cast<int32_t>(before[0]);
    }
    if (block.thread == 0) first_tile[p.num_seqs] = static_cast<int32_t>(num_tiles[0]);
    mx::sync_threads();  // first_tile is there
    return num_tiles[0];
  }

  // Sets slice and keys of each tile.
  MX_DEVICE void find_tiles(int32_t num_tiles) const {
    int64_t num_keys[1] = {0};
    for (int32_t begin = 0; begin < num_tiles; begin += block.num_threads) {
      const int32_t t = begin + block.thread;
      int64_t before[1] = {0};
      PlannedTile tile = {};
      if (t < num_tiles) {
        tile.seq_idx = last_from(p.num_seqs, t, [&](int32_t s) { return first_tile[s]; });
        tile.tile_idx = t - first_tile[tile.seq_idx];
        tile.group_idx = group_of[tile.seq_idx];
        tile.is_shared = tile.tile_idx == 0 && is_first_of_group(tile.seq_idx);
        const RowTile rows = rows_of(tile);
        before[0] = rows.kv_end - rows.kv_begin;
      }
      exclusive_sums(block, before, num_keys);
      tile.keys_before = before[0];
      if (t < num_tiles) tiles[t] = tile;
    }
    if (block.thread == 0) tiles[num_tiles].keys_before = num_keys[0];
    mx::sync_threads();
  }

  // Sets each tile's cost; returns that of all of them, for one kv head, or kMaxCost + 1 if it is more than kMaxCost.
  MX_DEVICE int64_t price_tiles(int32_t num_tiles) const {
    const auto add = [](int64_t a, int64_t b) { return a > kMaxCost - b ? kMaxCost + 1 : a + b; };
    int64_t cost[1] = {0};
    for (int32_t t = block.thread; t < num_tiles; t += block.num_threads) {
      const RowTile rows = rows_of(tiles[t]);
      tiles[t].fs = tile_fs(spec, rows, rows.kv_end - rows.kv_begin, share_of(tiles[t]));
      cost[0] = add(cost[0], tiles[t].fs);
    }
    reduce(block, cost, 0, add);
    return cost[0];
  }

  // As choose_large_target: each thread adds up some tiles' cuts.
  MX_DEVICE int64_t large_target(int32_t num_tiles, int64_t cost) const {
    if (spec.workers_per_core == 0) return target_fs(spec, cost, num_draws(spec));
    LargeCut cuts[kMaxLargeCuts] = {};
    const int num_cuts = start_cuts(spec, cost, cuts);
    int64_t large_fs[1] = {0};
    for (int32_t t = block.thread; t < num_tiles; t += block.num_threads) {
      const RowTile rows = rows_of(tiles[t]);
      if (rows.kind == kTileSmall) continue;
      large_fs[0] += spec.num_kv_heads * tiles[t].fs;
      MX_UNROLL
      for (int c = 0; c < kMaxLargeCuts; ++c) {
        if (c < num_cuts) add_tile(spec, rows, tiles[t].fs, &cuts[c]);
      }
    }
    const auto sum = [](int64_t a, int64_t b) { return a + b; };
    const auto maximum = [](int64_t a, int64_t b) { return a > b ? a : b; };
    reduce(block, large_fs, 0, sum);
    if (large_fs[0] == 0) return cuts[0].target;
    MX_UNROLL
    for (int c = 0; c < kMaxLargeCuts; ++c) {
      int64_t sums[2] = {cuts[c].num_items, cuts[c].num_partial_rows};
      int64_t longest_fs[1] = {cuts[c].longest_fs};
      reduce(block, sums, 0, sum);
      reduce(block, longest_fs, 0, maximum);
      cuts[c] = {cuts[c].target, sums[0], sums[1], longest_fs[0]};
    }
    return choose_cut(spec, cuts, num_cuts, large_fs[0], cost);
  }

  MX_DEVICE void split_groups(int32_t num_groups, const SplitRule& rule) const {
    for (int32_t g = block.thread; g < num_groups; g += block.num_threads) {
      own_splits[g] = suffix_splits(spec, rule, p.cu_seqlens_q, p.seq_lens, groups[g]);
    }
    mx::sync_threads();  // the splits of the groups' slices are there
  }

  struct Counts {
    int64_t pieces;
    int64_t merged_tiles;  // for one kv head
    int64_t partial_rows;  // of one kv head
  };

  // Sets how often each tile is split, and where its pieces, merges and partial rows begin.
  MX_DEVICE Counts split_tiles(int32_t num_tiles, const SplitRule& rule) const {
    const int64_t heads = spec.num_kv_heads;
    int64_t total[3] = {0, 0, 0};
    for (int32_t begin = 0; begin < num_tiles; begin += block.num_threads) {
      const int32_t t = begin + block.thread;
      int64_t before[3] = {0, 0, 0};
      if (t < num_tiles) {
        const RowTile rows = rows_of(tiles[t]);
        const bool is_own = tiles[t].group_idx >= 0 && !tiles[t].is_shared;
        const int32_t splits = is_own ? own_splits[tiles[t].group_idx]
                                      : tile_splits(spec, rule, rows, granules_of(rows, rule.granule), tiles[t].fs);
        const int64_t merged = tiles[t].is_shared      ? int64_t{splits} + own_splits[tiles[t].group_idx]
                               : is_own || splits == 1 ? 0
                                                       : splits;
        tiles[t].splits = splits;
        before[0] = splits;
        before[1] = merged > 0;
        before[2] = merged * rows.num_rows;
      }
      exclusive_sums(block, before, total);
      if (t < num_tiles) {
        // Where there is no room these may wrap around; they are not read then.
        tiles[t].first_piece = static_cast<int32_t>(before[0]);
        tiles[t].first_merge = static_cast<int32_t>(heads * before[1]);
        tiles[t].first_partial_row = static_cast<int32_t>(heads * before[2]);
      }
    }
    mx::sync_threads();
    return {total[0], total[1], total[2]};
  }

  // Of a tile whose keys are split, or of a group, where its pieces go.
  MX_DEVICE PieceTarget target_of(const PlannedTile& tile, const RowTile& rows) const {
    if (tile.group_idx < 0) {
      return tile.splits > 1 ? PieceTarget{tile.first_merge, tile.first_partial_row, rows.num_rows} : no_merge();
    }
    const PrefixGroup& group = groups[tile.group_idx];
    const PlannedTile& first = tiles[first_tile[group.first_seq]];
    const int32_t tokens_before = p.cu_seqlens_q[tile.seq_idx] - p.cu_seqlens_q[group.first_seq];
    const int32_t rows_before = tokens_before * (spec.num_q_heads / spec.num_kv_heads);
    const int32_t own_rows = tile.is_shared ? 0 : first.splits * group.num_rows + rows_before;
    return {first.first_merge, first.first_partial_row + own_rows, group.num_rows};
  }

  MX_DEVICE void write_pieces(int32_t num_tiles, int32_t num_pieces, const SplitRule& rule) const {
    for (int32_t q = block.thread; q < num_pieces; q += block.num_threads) {
      const PlannedTile& tile = tiles[last_from(num_tiles, q, [&](int32_t t) { return tiles[t].first_piece; })];
      const RowTile rows = rows_of(tile);
      WorkItem& piece = pieces[q];
      write_piece(rows, granules_of(rows, rule.granule), rule.granule, tile.seq_idx, q - tile.first_piece, tile.splits,
                  target_of(tile, rows), &piece);
      const int64_t fs = tile_fs(spec, rows, piece.kv_end - piece.kv_begin, share_of(tile));
      keys[q] = {sort_cost(spec, rows.kind, fs), q};
    }
  }

  MX_DEVICE void write_merges(int32_t num_tiles, Merge* merges) const {
    for (int32_t t = block.thread; t < num_tiles; t += block.num_threads) {
      const PlannedTile& tile = tiles[t];
      int32_t splits = tile.splits;
      int32_t num_items = tile.splits;
      int32_t prefix_tokens = 0;
      if (tile.is_shared) {
        const PrefixGroup& group = groups[tile.group_idx];
        splits += own_splits[tile.group_idx];
        num_items += own_splits[tile.group_idx] * (group.end_seq - group.first_seq);
        prefix_tokens = group.prefix_tokens;
      } else if (tile.group_idx >= 0 || splits == 1) {
        continue;
      }
      const RowTile rows = rows_of(tile);
      for (int32_t h = 0; h < spec.num_kv_heads; ++h) {
        merges[tile.first_merge + h] = {
            tile.seq_idx, h,         rows.row_begin, rows.num_rows, tile.first_partial_row + h * splits * rows.num_rows,
            splits,       num_items, prefix_tokens};
      }
    }
  }

  // Sorts keys [0, n) by cost, dearest first, ties as they stand; returns where they end up. The runs of 2 width begin
  // as two sorted ones: a key's place is its own in its run, and behind what the other run has before it.
  MX_DEVICE const PlanKey* sort(int32_t n) const {
    PlanKey* from = keys;
    PlanKey* to = keys + capacity_pieces;
    for (int64_t width = 1; width < n; width *= 2) {
      mx::sync_threads();  // the keys of the last pass are there
      for (int32_t i = block.thread; i < n; i += block.num_threads) {
        const PlanKey key = from[i];
        const bool is_right = i / width % 2 != 0;
        const int32_t begin = static_cast<int32_t>(i / (2 * width) * (2 * width));
        const int32_t middle = static_cast<int32_t>(clamp(begin + width, 0, n));
        int32_t low = is_right ? begin : middle;  // of the other run
        int32_t high = is_right ? middle : static_cast<int32_t>(clamp(begin + 2 * width, 0, n));
        const int32_t other_begin = low;
        while (low < high) {
          const int32_t probe = low + (high - low) / 2;
          const int64_t cost = from[probe].cost;
          // Of equal costs the left run's come first.
          if (is_right ? cost >= key.cost : cost > key.cost) {
            low = probe + 1;
          } else {
            high = probe;
          }
        }
        to[(is_right ? i - width : i) + (low - other_begin)] = key;
      }
      PlanKey* const sorted = to;
      to = from;
      from = sorted;
    }
    mx::sync_threads();  // the sorted keys are there, and so are pieces and merges
    return from;
  }
};

// The status of the plan, the same in every thread; unless it is kPlanOk no header has been written.
MX_DEVICE PlanStatus write_plan(const PlanLaunch& p) {
  const Planner planner(p);
  const PlanSpec& spec = p.spec;
  const PlanStatus status = planner.check_slices();
  if (status != kPlanOk) return status;
  const int32_t num_groups = planner.group_slices();
  const int64_t tiles_needed = planner.count_tiles();
  if (tiles_needed > planner.capacity_pieces) return kPlanNoRoom;
  const int32_t num_tiles = static_cast<int32_t>(tiles_needed);
  planner.find_tiles(num_tiles);
  const int64_t cost_per_head = planner.price_tiles(num_tiles);
  const int64_t heads = spec.num_kv_heads;
  if (cost_per_head >= kMaxCost / heads) return kPlanCostTooLarge;
  const int64_t cost = cost_per_head * heads;
  const bool is_fixed = spec.fixed_split_tokens > 0;
  const SplitRule rule = split_rule(spec, cost, is_fixed ? 0 : planner.large_target(num_tiles, cost));
  if (num_groups > 0) planner.split_groups(num_groups, rule);
  const Planner::Counts counts = planner.split_tiles(num_tiles, rule);
  // In this order: with few pieces nothing overflows in the lines behind.
  if (counts.pieces > planner.capacity_pieces) return kPlanNoRoom;
  if (heads * counts.merged_tiles > p.capacity_merges || heads * counts.partial_rows > p.capacity_partial_rows) {
    return kPlanNoRoom;
  }

  const int32_t num_pieces = static_cast<int32_t>(counts.pieces);
  WorkItem* const items = reinterpret_cast<WorkItem*>(p.out + kPlanHeaderWords);
  Merge* const merges = reinterpret_cast<Merge*>(items + p.capacity_items);
  planner.write_pieces(num_tiles, num_pieces, rule);
  planner.write_merges(num_tiles, merges);
  const PlanKey* const sorted = planner.sort(num_pieces);
  const int32_t num_items = static_cast<int32_t>(heads * num_pieces);
  for (int32_t i = planner.block.thread; i < num_items; i += planner.block.num_threads) {
    const WorkItem& piece = planner.pieces[sorted[i / spec.num_kv_heads].piece_idx];
    write_item(piece, head_step(piece, merges), i % spec.num_kv_heads, items + i);
  }
  if (planner.block.thread == 0) {
    *reinterpret_cast<PlanHeader*>(p.out) =
        plan_header(spec, p.cu_seqlens_q, p.num_seqs, num_items, static_cast<int32_t>(heads * counts.merged_tiles),
                    static_cast<int32_t>(heads * counts.partial_rows), p.capacity_items, p.capacity_merges, num_groups,
                    first_small_item(spec, sorted, num_pieces), kPlanOk);
  }
  return kPlanOk;
}

MX_DEVICE void plan_batch(const PlanLaunch& p) {
  const PlanStatus status = write_plan(p);
  if (status == kPlanOk || mx::thread_idx() != 0) return;
  *reinterpret_cast<PlanHeader*>(p.out) =
      plan_header(p.spec, p.cu_seqlens_q, p.num_seqs, 0, 0, 0, p.capacity_items, p.capacity_merges, 0,
                  first_small_item(p.spec, nullptr, 0), status);
}

}  // namespace cuda
}  // namespace mixattn
