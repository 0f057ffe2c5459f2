// prefix_groups.h: neighbouring slices whose first keys lie in the same pages, which one tile reads once for all.
// Math    Neighbouring slices of a small tile each whose first P keys lie in the same pages may be one group: one tile
//         of all their rows, a large one at most, over the keys [0, P), which every row sees, and a tile for each slice
//         over the keys behind. A slice joins while more reads are saved, (slices - 1) P, than without it, unless the
//         longest of their own keys would hold up the others (may_join); it leaves for a next slice with which it
//         shares more than 2 P. A group is made if its shared tile costs less than that its slices read those keys one
//         after the other (is_cheaper).
// Twins   tests/ops/plan_twin.py
// Source  prefixes in common, arXiv:2402.05099, arXiv:2402.15220
#pragma once

#include "common/row_tile.h"

namespace mixattn {

// With a window keys that neighbours share leave one's sight before the other's; an invariant plan must not look at
// neighbours.
MIXATTN_HD inline bool has_groups(const PlanSpec& spec) {
  return spec.window_left < 0 && spec.fixed_split_tokens == 0;
}

MIXATTN_HD inline int64_t max_groups(const PlanSpec& spec, int64_t num_seqs) {
  return has_groups(spec) ? num_seqs / 2 : 0;
}

// Where the keys of a batch are. Of a sequence only the entries of the pages that it has are read.
struct PageTable {
  const int32_t* pages;  // [num_seqs, stride]; nullptr: not known, and no slices are a group
  int64_t stride;
  int32_t page_size;
};

// The slices [first_seq, end_seq), whose first prefix_tokens keys lie in the same pages and stand before their rows.
struct PrefixGroup {
  int32_t first_seq;
  int32_t end_seq;
  int32_t num_rows;  // packed, of all of them
  int32_t prefix_tokens;
};

// int64 words of scratch for groups: per slice half a PrefixGroup and one int32.
MIXATTN_HD inline int64_t group_scratch_words(int64_t num_seqs) {
  return num_seqs / 2 * static_cast<int64_t>(sizeof(PrefixGroup) / sizeof(int64_t)) + num_seqs / 2 + 1;
}

// What every tile of a group reads: its keys, once.
MIXATTN_HD inline KeyShare unshared() {
  return {1, 1};
}

// Whether a slice can be in a group: one small tile.
MIXATTN_HD inline bool is_small_slice(const PlanSpec& spec, int32_t q_len) {
  const int64_t num_rows = int64_t{q_len} * (spec.num_q_heads / spec.num_kv_heads);
  return num_rows > 0 && num_rows <= spec.block_rows[kTileSmall];
}

// Leading entries that two rows of pages, [num_pages] each, have in common.
MIXATTN_HD inline int32_t common_pages(const int32_t* a, const int32_t* b, int32_t num_pages) {
  constexpr int32_t kStep = 16;  // without a branch inside: one vector
  int32_t n = 0;
  for (; n + kStep <= num_pages; n += kStep) {
    int32_t difference = 0;
    for (int32_t i = 0; i < kStep; ++i) difference |= a[n + i] ^ b[n + i];
    if (difference != 0) break;
  }
  while (n < num_pages && a[n] == b[n]) ++n;
  return n;
}

// The keys that slices s - 1 and s share and that all their rows see, in whole pages; 0 if either can be in no group.
MIXATTN_HD inline int32_t shared_tokens(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                        const PageTable& table, int32_t s) {
  const int32_t first_q_len = cu_seqlens_q[s] - cu_seqlens_q[s - 1];
  const int32_t second_q_len = cu_seqlens_q[s + 1] - cu_seqlens_q[s];
  if (!is_small_slice(spec, first_q_len) || !is_small_slice(spec, second_q_len)) return 0;
  const int32_t first_context = seq_lens[s - 1] - first_q_len;
  const int32_t second_context = seq_lens[s] - second_q_len;
  const int32_t context = first_context < second_context ? first_context : second_context;
  if (context < table.page_size) return 0;  // it may be negative
  const int32_t* const pages = table.pages + s * table.stride;
  return common_pages(pages - table.stride, pages, context / table.page_size) * table.page_size;
}

MIXATTN_HD inline RowTile prefix_tile(const PlanSpec& spec, const PrefixGroup& group) {
  return {0, group.num_rows, kind_of(spec, group.num_rows), 0, group.prefix_tokens};
}

// The tile of a slice of a group over its own keys.
MIXATTN_HD inline RowTile suffix_tile(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                      const PrefixGroup& group, int32_t s) {
  RowTile tile = row_tile(spec, cu_seqlens_q[s + 1] - cu_seqlens_q[s], seq_lens[s], 0);
  tile.kv_begin = group.prefix_tokens;
  return tile;
}

// What it takes to write so many rows of partial results, float32 and an lse each, and to read them again. Bounded, for
// a slow worker's could pass int64.
MIXATTN_HD inline int64_t partials_fs(const PlanSpec& spec, int64_t num_partial_rows) {
  const int64_t kilobytes = 2 * 4 * (int64_t{spec.v_head_dim} + 1) * num_partial_rows / 1000;
  return kilobytes < kMaxCost / spec.fs_per_kilobyte ? kilobytes * spec.fs_per_kilobyte : kMaxCost;
}

// A key that another slice has just read comes from a cache: in about a third of the time that memory takes.
constexpr int32_t kCacheSpeed = 3;

// Whether the shared tile of a group, with at least two partial results of every row to merge, costs less than that its
// slices read the shared keys one after the other. What they read besides costs the same either way.
MIXATTN_HD inline bool is_cheaper(const PlanSpec& spec, const int32_t* cu_seqlens_q, const PrefixGroup& group) {
  const RowTile tile = prefix_tile(spec, group);
  const int32_t packing_rows = tile.kind == kTileSmall ? 0 : spec.packing_rows;
  const ItemCost together = item_cost(spec, tile.num_rows + packing_rows, tile.kind, group.prefix_tokens, unshared());
  int64_t saved = -total_fs(spec, together) - partials_fs(spec, 2 * int64_t{group.num_rows});
  for (int32_t s = group.first_seq; s < group.end_seq && saved <= 0; ++s) {  // no further: the sum could pass int64
    const int32_t num_rows = (cu_seqlens_q[s + 1] - cu_seqlens_q[s]) * (spec.num_q_heads / spec.num_kv_heads);
    const ItemCost apart = item_cost(spec, num_rows, kTileSmall, group.prefix_tokens, unshared());
    const int64_t memory_fs = s == group.first_seq ? apart.memory_fs : apart.memory_fs / kCacheSpeed;
    saved += apart.compute_fs > memory_fs ? apart.compute_fs : memory_fs;
  }
  return saved > 0;
}

// A group in the making, with its slices' keys.
struct PrefixRun {
  PrefixGroup group;
  int32_t longest_kv;
  int64_t sum_kv;
};

MIXATTN_HD inline PrefixRun start_run(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                      int32_t s) {
  const int32_t num_rows = (cu_seqlens_q[s + 1] - cu_seqlens_q[s]) * (spec.num_q_heads / spec.num_kv_heads);
  return {{s, s + 1, num_rows, 0}, seq_lens[s], seq_lens[s]};
}

// Whether the run, which has been given a slice more than `before`, is better than that one. even_share: keys that each
// worker reads if no prefix is shared, so that to read as many takes no longer than a plan without groups. Where one
// slice has more keys of its own than these, and half again as many as the average, which is what slices are split by,
// its pieces would hold up the others, or the others' be empty.
MIXATTN_HD inline bool may_join(const PlanSpec& spec, const PrefixRun& before, const PrefixRun& run,
                                int64_t even_share) {
  const int64_t num_seqs = run.group.end_seq - run.group.first_seq;
  const int64_t prefix = run.group.prefix_tokens;
  const int64_t longest_own = run.longest_kv - prefix;
  const int64_t sum_own = run.sum_kv - num_seqs * prefix;
  return prefix > 0 && run.group.num_rows <= spec.block_rows[kTileLarge] &&
         (num_seqs - 1) * prefix >= (num_seqs - 2) * before.group.prefix_tokens &&
         (longest_own <= even_share || 2 * longest_own * num_seqs <= 3 * sum_own);
}

// Finds the groups of a batch, in order; returns how many there are.
//   shared  [num_seqs]: shared_tokens() of each slice but the first
//   groups  [max_groups(spec, num_seqs)], written
MIXATTN_HD inline int32_t find_groups(const PlanSpec& spec, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                                      int32_t num_seqs, const int32_t* shared, PrefixGroup* groups) {
  int64_t num_keys = 0;
  for (int32_t s = 0; s < num_seqs; ++s) num_keys += cu_seqlens_q[s + 1] > cu_seqlens_q[s] ? seq_lens[s] : 0;
  num_keys = clamp(num_keys, 0, kMaxCost / spec.num_kv_heads);
  const int64_t even_share = num_keys * spec.num_kv_heads / spec.num_workers;
  int32_t num_groups = 0;
  const auto end_run = [&](const PrefixRun& run) {
    if (run.group.end_seq - run.group.first_seq < 2) return;
    if (is_cheaper(spec, cu_seqlens_q, run.group)) groups[num_groups++] = run.group;
  };
  PrefixRun run = {};
  for (int32_t s = 0; s < num_seqs; ++s) {
    PrefixRun next = start_run(spec, cu_seqlens_q, seq_lens, s);
    if (s > 0 && shared[s] > 0) {
      const int32_t prefix = run.group.prefix_tokens;
      if (prefix > 0 && shared[s] > 2 * int64_t{prefix}) {
        // The last slice goes on with this one.
        PrefixRun rest = run;
        const PrefixRun last = start_run(spec, cu_seqlens_q, seq_lens, s - 1);
        rest.group.end_seq -= 1;
        rest.group.num_rows -= last.group.num_rows;
        end_run(rest);
        run = last;
      }
      PrefixRun joined = run;
      joined.group.end_seq = s + 1;
      joined.group.num_rows += next.group.num_rows;
      joined.group.prefix_tokens =
          run.group.prefix_tokens == 0 || shared[s] < run.group.prefix_tokens ? shared[s] : run.group.prefix_tokens;
      if (next.longest_kv > joined.longest_kv) joined.longest_kv = next.longest_kv;
      joined.sum_kv += next.sum_kv;
      if (may_join(spec, run, joined, even_share)) {
        run = joined;
        continue;
      }
    }
    if (s > 0) end_run(run);
    run = next;
  }
  if (num_seqs > 0) end_run(run);
  return num_groups;
}

// The groups of a batch, for who goes through its slices in order.
struct GroupCursor {
  const PrefixGroup* next;
  const PrefixGroup* end;

  // That of slice s; nullptr if it is in none.
  MIXATTN_HD const PrefixGroup* find(int32_t s) {
    while (next != end && next->end_seq <= s) ++next;
    return next != end && next->first_seq <= s ? next : nullptr;
  }
};

}  // namespace mixattn
