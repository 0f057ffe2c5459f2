// plan.cpp: the planner, its prices and what else follows from a step's slices, for Python. Addresses are integers; who
// calls owns what they point at.

#include "common/plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using mixattn::PlanSpec;

// Bounds that keep every product in plan.h and cost.h inside its integer, far from any real shape or machine.
constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kMostHeadDim = 1 << 12;
constexpr int64_t kMostElementBytes = 16;
constexpr int64_t kMostBlockRows = 1 << 12;
constexpr int64_t kMostSlots = 1 << 16;  // times 2 kMostBlockRows partial rows: below 2^31
constexpr int64_t kMostFs = int64_t{1} << 50;

int64_t checked(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw py::value_error(std::string(name) + " must be in [" + std::to_string(low) + ", " + std::to_string(high) +
                          "], got " + std::to_string(value));
  }
  return value;
}

int32_t checked32(const char* name, int64_t value, int64_t low, int64_t high) {
  return static_cast<int32_t>(checked(name, value, low, high));
}

PlanSpec make_spec(int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t v_head_dim,
                   int64_t kv_element_bytes, bool causal, int64_t window_left, int64_t num_workers,
                   const std::array<int64_t, mixattn::kNumTileKinds>& rows, int64_t row_granule, int64_t packing_rows,
                   int64_t split_tokens, int64_t fixed_split_tokens, int64_t items_per_worker, int64_t heads_per_bundle,
                   int64_t workers_per_core, int64_t max_splits, bool separates_small, int64_t fs_per_kiloflop,
                   int64_t fs_per_kilobyte, int64_t fs_per_item) {
  PlanSpec spec = {};
  spec.num_kv_heads = checked32("num_kv_heads", num_kv_heads, 1, kMostHeads);
  spec.num_q_heads = checked32("num_q_heads", num_q_heads, 1, kMostHeads);
  if (num_q_heads % num_kv_heads != 0) {
    throw py::value_error("num_q_heads must be a multiple of num_kv_heads (" + std::to_string(num_kv_heads) +
                          "), got " + std::to_string(num_q_heads));
  }
  spec.head_dim = checked32("head_dim", head_dim, 1, kMostHeadDim);
  spec.v_head_dim = checked32("v_head_dim", v_head_dim, 1, kMostHeadDim);
  spec.kv_element_bytes = checked32("kv_element_bytes", kv_element_bytes, 1, kMostElementBytes);
  spec.causal = causal ? 1 : 0;
  spec.window_left = checked32("window_left", window_left, -1, INT32_MAX);
  spec.num_workers = checked32("num_workers", num_workers, 1, kMostSlots);
  spec.items_per_worker = checked32("items_per_worker", items_per_worker, 1, kMostSlots / num_workers);
  const int64_t most_heads = kMostSlots / (num_workers * items_per_worker);
  spec.heads_per_bundle = std::min(checked32("heads_per_bundle", heads_per_bundle, 1, most_heads), spec.num_kv_heads);
  spec.workers_per_core = checked32("workers_per_core", workers_per_core, 0, num_workers);
  if (workers_per_core > 0 && num_workers % workers_per_core != 0) {
    throw py::value_error("workers_per_core must divide num_workers (" + std::to_string(num_workers) + "), got " +
                          std::to_string(workers_per_core));
  }
  int64_t most_rows = kMostBlockRows;  // block_rows descend
  for (int kind = 0; kind < mixattn::kNumTileKinds; ++kind) {
    const std::string name = "block_rows[" + std::to_string(kind) + "]";
    spec.block_rows[kind] = checked32(name.c_str(), rows[kind], 1, most_rows);
    most_rows = rows[kind];
  }
  spec.row_granule = checked32("row_granule", row_granule, 0, kMostBlockRows);
  spec.packing_rows = checked32("packing_rows", packing_rows, 0, kMostBlockRows);
  spec.split_tokens = checked32("split_tokens", split_tokens, 1, INT32_MAX);
  spec.fixed_split_tokens = checked32("fixed_split_tokens", fixed_split_tokens, 0, INT32_MAX);
  spec.max_splits = checked32("max_splits", max_splits, 1, INT32_MAX);
  spec.separates_small = separates_small;
  spec.fs_per_kiloflop = checked("fs_per_kiloflop", fs_per_kiloflop, 1, kMostFs);
  spec.fs_per_kilobyte = checked("fs_per_kilobyte", fs_per_kilobyte, 1, kMostFs);
  spec.fs_per_item = checked("fs_per_item", fs_per_item, 0, kMostFs);
  return spec;
}

// Scratch that lives as long as its thread and only grows, so that a step allocates nothing.
int64_t* thread_scratch(int64_t words) {
  static thread_local std::vector<int64_t> scratch;
  if (static_cast<int64_t>(scratch.size()) < words) scratch.resize(words);
  return scratch.data();
}

void plan(const PlanSpec& spec, uintptr_t cu_seqlens_q, uintptr_t seq_lens, int64_t num_seqs, uintptr_t out,
          int64_t capacity_items, int64_t capacity_merges, uintptr_t block_table, int64_t block_table_stride,
          int64_t page_size) {
  const int32_t seqs = checked32("num_seqs", num_seqs, 0, INT32_MAX - 1);
  const int32_t items = checked32("capacity_items", capacity_items, 0, INT32_MAX / mixattn::kWorkItemWords);
  const int32_t merges = checked32("capacity_merges", capacity_merges, 0, INT32_MAX / mixattn::kMergeWords);
  mixattn::PageTable table = {reinterpret_cast<const int32_t*>(block_table), block_table_stride, 0};
  if (table.pages != nullptr) table.page_size = checked32("page_size", page_size, 1, INT32_MAX);
  const mixattn::PlanStatus status = mixattn::plan(
      spec, reinterpret_cast<const int32_t*>(cu_seqlens_q), reinterpret_cast<const int32_t*>(seq_lens), seqs, table,
      reinterpret_cast<int32_t*>(out), items, merges, thread_scratch(scratch_words(spec, num_seqs, items)));
  switch (status) {
    case mixattn::kPlanOk:
      return;
    case mixattn::kPlanBadSlice:
      throw py::value_error(
          "cu_seqlens_q must not decrease, seq_lens must be >= 0, and a slice must have at most "
          "2^31 - 1 rows x group_size");
    case mixattn::kPlanNoRoom:
      throw py::value_error("capacity_items (" + std::to_string(capacity_items) + ") or capacity_merges (" +
                            std::to_string(capacity_merges) + ") is too small for this batch");
    case mixattn::kPlanCostTooLarge:
      throw py::value_error(
          "seq_lens: the predicted cost of the batch must be at most 2^62 fs (77 minutes of one "
          "worker); plan it in smaller chunks");
  }
}

py::dict plan_cost(const PlanSpec& spec, uintptr_t words) {
  const int32_t* const plan_words = reinterpret_cast<const int32_t*>(words);
  const int32_t num_seqs = reinterpret_cast<const mixattn::PlanHeader*>(plan_words)->num_seqs;
  const mixattn::PlanCost cost =
      mixattn::plan_cost(spec, plan_words, thread_scratch(mixattn::cost_scratch_words(spec, num_seqs)));
  py::dict result;
  result["flops"] = cost.flops;
  result["bytes"] = cost.bytes;
  result["makespan_fs"] = cost.makespan_fs;
  result["busy_fs"] = cost.busy_fs;
  result["compute_bound_fs"] = cost.compute_bound_fs;
  result["memory_bound_fs"] = cost.memory_bound_fs;
  return result;
}

void check_slices(uintptr_t cu_seqlens_q, uintptr_t seq_lens, int64_t num_seqs) {
  const int32_t* const starts = reinterpret_cast<const int32_t*>(cu_seqlens_q);
  const int32_t* const lens = reinterpret_cast<const int32_t*>(seq_lens);
  if (starts[0] != 0) throw py::value_error("cu_seqlens_q[0] must be 0, got " + std::to_string(starts[0]));
  for (int64_t n = 0; n < num_seqs; ++n) {
    if (starts[n + 1] < starts[n]) {
      throw py::value_error("cu_seqlens_q must not decrease, got " + std::to_string(starts[n]) + " then " +
                            std::to_string(starts[n + 1]) + " at " + std::to_string(n + 1));
    }
  }
  for (int64_t n = 0; n < num_seqs; ++n) {
    if (lens[n] < 0) {
      throw py::value_error("seq_lens[" + std::to_string(n) + "] must be >= 0, got " + std::to_string(lens[n]));
    }
  }
}

// A slice's rows are the last ones of its sequence.
void fill_positions(uintptr_t cu_seqlens_q, uintptr_t seq_lens, int64_t num_seqs, uintptr_t block_table,
                    int64_t max_pages, int64_t page_size, uintptr_t positions, uintptr_t slot_mapping) {
  const int32_t* const starts = reinterpret_cast<const int32_t*>(cu_seqlens_q);
  const int32_t* const lens = reinterpret_cast<const int32_t*>(seq_lens);
  const int32_t* pages = reinterpret_cast<const int32_t*>(block_table);
  int64_t* const position_of = reinterpret_cast<int64_t*>(positions);
  int64_t* const slot_of = reinterpret_cast<int64_t*>(slot_mapping);
  for (int64_t n = 0; n < num_seqs; ++n, pages += max_pages) {
    for (int64_t row = starts[n]; row < starts[n + 1]; ++row) {
      const int64_t position = lens[n] - starts[n + 1] + row;
      position_of[row] = position;
      slot_of[row] = pages[position / page_size] * page_size + position % page_size;
    }
  }
}

}  // namespace

void bind_plan(py::module_& m) {
  using py::arg;
  m.attr("PLAN_MAGIC") = mixattn::kPlanMagic;
  m.attr("PLAN_HEADER_WORDS") = mixattn::kPlanHeaderWords;
  m.attr("WORK_ITEM_WORDS") = mixattn::kWorkItemWords;
  m.attr("MERGE_WORDS") = mixattn::kMergeWords;
  py::class_<PlanSpec>(m, "PlanSpec", "What a plan is made for: the shape of the attention and one worker's speed.")
      .def(py::init(&make_spec), py::kw_only(), arg("num_q_heads"), arg("num_kv_heads"), arg("head_dim"),
           arg("v_head_dim"), arg("kv_element_bytes"), arg("causal"), arg("window_left"), arg("num_workers"),
           arg("block_rows"), arg("row_granule"), arg("packing_rows"), arg("split_tokens"), arg("fixed_split_tokens"),
           arg("items_per_worker"), arg("heads_per_bundle"), arg("workers_per_core"), arg("max_splits"),
           arg("separates_small"), arg("fs_per_kiloflop"), arg("fs_per_kilobyte"), arg("fs_per_item"))
      .def("max_groups", &mixattn::max_groups, arg("num_seqs"),
           "Groups of slices with a prefix in common that a batch of num_seqs slices with a block table can have.")
      .def("max_items", &mixattn::max_items, arg("total_q"), arg("num_seqs"), arg("num_groups") = 0,
           "Items that a batch of num_seqs slices with total_q rows can need, if the plan is no invariant one.")
      .def("max_merges", &mixattn::max_merges, arg("num_groups") = 0,
           "Merges that any batch with so many groups can need, if the plan is no invariant one.")
      .def("max_partial_rows", &mixattn::max_partial_rows, arg("total_q"), arg("num_groups") = 0,
           "Rows of partial results that any batch of total_q rows with so many groups can need, if the plan is no\n"
           "invariant one.");
  m.def("plan", &plan, arg("spec"), arg("cu_seqlens_q"), arg("seq_lens"), arg("num_seqs"), arg("out"),
        arg("capacity_items"), arg("capacity_merges"), arg("block_table") = 0, arg("block_table_stride") = 0,
        arg("page_size") = 0,
        "Writes the plan of a batch to out: [16 + 8 capacity_items + 8 capacity_merges] int32. With a block table,\n"
        "[num_seqs, block_table_stride], slices that share a prefix are grouped. ValueError if the slices are no\n"
        "slices, need more than the capacity, or cost too much to be counted.");
  m.def(
      "check_slices", &check_slices, arg("cu_seqlens_q"), arg("seq_lens"), arg("num_seqs"),
      "ValueError naming the argument, unless cu_seqlens_q begins with 0 and does not decrease, and no length is < 0.");
  m.def(
      "fill_positions", &fill_positions, py::kw_only(), arg("cu_seqlens_q"), arg("seq_lens"), arg("num_seqs"),
      arg("block_table"), arg("max_pages"), arg("page_size"), arg("positions"), arg("slot_mapping"),
      "Writes each row's position in its sequence and its slot, both [total_q] int64, of a batch that is known to be\n"
      "sound; block_table: [num_seqs, max_pages] int32.");
  m.def("plan_cost", &plan_cost, arg("spec"), arg("words"), "What the plan in words costs, in flops, bytes and fs.");
}
