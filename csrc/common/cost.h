// cost.h: what one work item takes, in integer femtoseconds, and what a whole plan takes; host and device.
// Math    flops = 2 (head_dim + v_head_dim) priced_rows keys; bytes = (head_dim + v_head_dim) kv_element_bytes (keys
//         distinct / read + rows)
//         item_fs = fs_per_item + max(flops fs_per_kiloflop / 1000, bytes fs_per_kilobyte / 1000)
//         distinct / read: of the keys that the row tiles of a slice read, the share that comes from memory. Tiles run
//         side by side, so a key is fetched once per slice and kv head, and is in a cache for the other tiles.
// Method  integers only, so that host, device and the Python twin agree in every bit; a femtosecond, because one SM of
//         an H100 does 7 flops in one; rates per thousand, because 0.13 fs per flop is no integer
// Limits  an item's cost is at most kMaxCost, which plan() checks before it prices the first
// Twins   tests/ops/plan_twin.py
// Source  roofline model, Williams et al. 2009 (doi 10.1145/1498765.1498785)
#pragma once

#include "common/work_item.h"

namespace mixattn {

// 2^62 fs = 77 minutes. Two costs can be added without a check.
constexpr int64_t kMaxCost = int64_t{1} << 62;

// What a plan is made for: the shape of the attention, and one worker (thread, SM) of the hardware.
struct PlanSpec {
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t v_head_dim;
  int32_t kv_element_bytes;
  int32_t causal;       // 0 or 1
  int32_t window_left;  // -1: no window
  int32_t num_workers;
  int32_t block_rows[kNumTileKinds];  // descending
  int32_t row_granule;                // rows are priced rounded up to this; 0: up to the kind's block_rows
  int32_t packing_rows;               // what a tile above the small kind takes per key besides its rows, in rows
  int32_t split_tokens;               // splits start and end at multiples of this token position
  int32_t fixed_split_tokens;         // > 0: at every multiple of this one, and nowhere else; 0: where it balances
  int32_t items_per_worker;
  int32_t heads_per_bundle;  // kv heads whose small items a worker takes together; divides their size, not their cost
  int32_t workers_per_core;  // workers that share what a core reaches, a divisor of num_workers; 0: each is alone
  int32_t max_splits;
  int32_t separates_small;  // 0 or 1: items of the small kind come behind all others, each in their order
  int64_t fs_per_kiloflop;
  int64_t fs_per_kilobyte;
  int64_t fs_per_item;
};

struct ItemCost {
  int64_t flops;
  int64_t bytes;
  int64_t compute_fs;
  int64_t memory_fs;
};

MIXATTN_HD inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// floor(amount * fs_per_thousand / 1000), exact wherever the result itself fits.
MIXATTN_HD inline int64_t scaled_fs(int64_t amount, int64_t fs_per_thousand) {
  return amount / 1000 * fs_per_thousand + amount % 1000 * fs_per_thousand / 1000;
}

// The keys of one (slice, kv head): how many there are, and how many its row tiles read, one by one.
struct KeyShare {
  int64_t distinct;
  int64_t read;
};

// Flops and bytes of num_rows packed rows over num_keys keys. q is read and out written once, both counted at KV's
// width (they are a few rows against thousands of keys).
MIXATTN_HD inline ItemCost item_cost(const PlanSpec& spec, int32_t num_rows, int32_t kind, int64_t num_keys,
                                     const KeyShare& share) {
  const int32_t granule = spec.row_granule > 0 ? spec.row_granule : spec.block_rows[kind];
  const int64_t priced_rows = (num_rows + granule - 1) / granule * granule;
  const int64_t fetched_keys = share.read == share.distinct ? num_keys : num_keys * share.distinct / share.read;
  ItemCost cost;
  const int64_t dims = int64_t{spec.head_dim} + spec.v_head_dim;
  cost.flops = 2 * dims * priced_rows * num_keys;
  cost.bytes = dims * spec.kv_element_bytes * (fetched_keys + num_rows);
  cost.compute_fs = scaled_fs(cost.flops, spec.fs_per_kiloflop);
  cost.memory_fs = scaled_fs(cost.bytes, spec.fs_per_kilobyte);
  return cost;
}

MIXATTN_HD inline int64_t total_fs(const PlanSpec& spec, const ItemCost& cost) {
  return spec.fs_per_item + (cost.compute_fs > cost.memory_fs ? cost.compute_fs : cost.memory_fs);
}

// Whether every item of at most num_rows x num_keys costs at most kMaxCost.
MIXATTN_HD inline bool is_cost_bounded(const PlanSpec& spec, int64_t num_rows, int64_t num_keys) {
  const int64_t granule = spec.row_granule > 0 ? spec.row_granule : spec.block_rows[kTileLarge];
  const int64_t most_rows = ceil_div(num_rows + spec.packing_rows, granule) * granule;
  const int64_t dims = int64_t{spec.head_dim} + spec.v_head_dim;
  const int64_t flops = 2 * dims * most_rows * num_keys;
  const int64_t bytes = dims * spec.kv_element_bytes * (num_keys + most_rows);
  const int64_t room = kMaxCost - spec.fs_per_item;
  return flops / 1000 < room / spec.fs_per_kiloflop && bytes / 1000 < room / spec.fs_per_kilobyte;
}

MIXATTN_HD inline int32_t core_size(const PlanSpec& spec) {
  return spec.workers_per_core > 0 ? spec.workers_per_core : 1;
}

MIXATTN_HD inline int32_t num_cores(const PlanSpec& spec) {
  return spec.num_workers / core_size(spec);
}

// What a plan takes when its workers draw items in the plan's order, each as soon as it is free. Workers of a core are
// priced as one that does an item after the other: together they are no faster, and one alone has all of the core.
struct PlanCost {
  int64_t flops;
  int64_t bytes;
  int64_t makespan_fs;       // when the last core ends
  int64_t busy_fs;           // over all workers
  int64_t compute_bound_fs;  // compute time of the items that compute bounds, over all workers
  int64_t memory_bound_fs;   // memory time of the others
};

// int64 words of scratch that plan_cost() needs.
MIXATTN_HD inline int64_t cost_scratch_words(const PlanSpec& spec, int64_t num_seqs) {
  return num_cores(spec) + 3 * num_seqs;
}

// Prices the items that `words` holds. scratch: [cost_scratch_words(spec, num_seqs of the plan)].
MIXATTN_HD inline PlanCost plan_cost(const PlanSpec& spec, const int32_t* words, int64_t* scratch) {
  const PlanHeader& header = *reinterpret_cast<const PlanHeader*>(words);
  const WorkItem* const items = reinterpret_cast<const WorkItem*>(words + kPlanHeaderWords);
  const int32_t cores = num_cores(spec);
  int64_t* const loads = scratch;            // a heap: the core that is free first is at 0
  int64_t* const first_key = loads + cores;  // per slice
  int64_t* const last_key = first_key + header.num_seqs;
  int64_t* const read_keys = last_key + header.num_seqs;
  for (int32_t c = 0; c < cores; ++c) loads[c] = 0;
  for (int32_t s = 0; s < header.num_seqs; ++s) {
    first_key[s] = INT32_MAX;
    last_key[s] = 0;
    read_keys[s] = 0;
  }
  for (int32_t i = 0; i < header.num_items; ++i) {
    const WorkItem& item = items[i];
    if (item.kv_head != 0 || item.kv_begin == item.kv_end) continue;
    if (item.kv_begin < first_key[item.seq_idx]) first_key[item.seq_idx] = item.kv_begin;
    if (item.kv_end > last_key[item.seq_idx]) last_key[item.seq_idx] = item.kv_end;
    read_keys[item.seq_idx] += item.kv_end - item.kv_begin;
  }
  PlanCost cost = {0, 0, 0, 0, 0, 0};
  for (int32_t i = 0; i < header.num_items; ++i) {
    const WorkItem& item = items[i];
    const int64_t read = read_keys[item.seq_idx];
    const KeyShare share = {read > 0 ? last_key[item.seq_idx] - first_key[item.seq_idx] : 0, read};
    const ItemCost one = item_cost(spec, num_rows(item), tile_kind(item), item.kv_end - item.kv_begin, share);
    const int64_t fs = total_fs(spec, one);
    cost.flops += one.flops;
    cost.bytes += one.bytes;
    cost.busy_fs += fs;
    if (one.compute_fs > one.memory_fs) {
      cost.compute_bound_fs += one.compute_fs;
    } else {
      cost.memory_bound_fs += one.memory_fs;
    }
    // The core that is free first takes the item and sinks to its new place.
    const int64_t load = loads[0] + fs / core_size(spec);
    if (load > cost.makespan_fs) cost.makespan_fs = load;
    int32_t hole = 0;
    for (int32_t child = 1; child < cores; child = 2 * hole + 1) {
      if (child + 1 < cores && loads[child + 1] < loads[child]) ++child;
      if (loads[child] >= load) break;
      loads[hole] = loads[child];
      hole = child;
    }
    loads[hole] = load;
  }
  return cost;
}

}  // namespace mixattn
