// mixed_attention.cpp: paged attention over prefill chunks and decode rows in one parallel region, by a plan.
// Method  Everything that the plan and the index arrays hold is checked. Then threads draw work items from a counter,
//         in the plan's order (dearest first), decodes of neighbouring kv heads together; whoever finishes the last
//         item of a merge merges, in split order, so that the result does not depend on who was when.
// Shapes  as AttentionParams
// Twins   triton_kernels/mixed_attention.py
// Source  longest processing time first, Graham 1969 (doi 10.1137/0117039); split-KV, arXiv:2311.01282

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/checks.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace mixattn {
namespace cpu {
namespace {

struct Range {
  int64_t begin;
  int64_t end;
};

struct PlanView {
  const PlanHeader* header;
  const WorkItem* items;
  const Merge* merges;
};

[[noreturn]] void refuse_plan(const std::string& reason) {
  throw std::invalid_argument("plan was not made for this batch: " + reason);
}

void check_plan_field(const char* name, int64_t planned, int64_t given) {
  if (planned != given) {
    refuse_plan("it has " + std::string(name) + " " + std::to_string(planned) + ", the call has " +
                std::to_string(given));
  }
}

void check_sizes(const AttentionParams& p) {
  check_range("total_q", p.total_q, 0, INT32_MAX);
  check_range("num_seqs", p.num_seqs, 0, INT32_MAX - 1);
  check_range("num_kv_heads", p.num_kv_heads, 1, INT32_MAX);
  check_range("num_q_heads", p.num_q_heads, 1, INT32_MAX);
  if (p.num_q_heads % p.num_kv_heads != 0) {
    throw std::invalid_argument("num_q_heads must be a multiple of num_kv_heads (" + std::to_string(p.num_kv_heads) +
                                "), got " + std::to_string(p.num_q_heads));
  }
  check_head_dim("head_dim", p.head_dim);
  check_head_dim("v_head_dim", p.v_head_dim);
  check_range("num_pages", p.num_pages, 0, INT32_MAX);
  check_range("page_size", p.page_size, 1, INT32_MAX);
  check_range("max_pages", p.max_pages, 0, INT32_MAX);
  check_range("window_left", p.window_left, -1, INT32_MAX);
  if (p.tree_mask != nullptr && !p.causal) throw std::invalid_argument("causal must be true with tree_mask");
  if (!(p.softmax_scale > 0.0f && std::isfinite(p.softmax_scale))) {  // NaN fails both
    throw std::invalid_argument("softmax_scale must be finite and > 0, got " + std::to_string(p.softmax_scale));
  }
  if (!(p.soft_cap >= 0.0f && std::isfinite(p.soft_cap))) {
    throw std::invalid_argument("soft_cap must be finite and >= 0, got " + std::to_string(p.soft_cap));
  }
}

void check_lengths(const AttentionParams& p) {
  const int64_t most_rows = INT32_MAX / (p.num_q_heads / p.num_kv_heads);
  const int64_t most_keys = std::min<int64_t>(p.max_pages * p.page_size, INT32_MAX);
  check_range("cu_seqlens_q[0]", p.cu_seqlens_q[0], 0, 0);
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const int64_t start = p.cu_seqlens_q[s];
    check_range(element("cu_seqlens_q", s + 1), p.cu_seqlens_q[s + 1], start, std::min(p.total_q, start + most_rows));
    check_range(element("seq_lens", s), p.seq_lens[s], 0, most_keys);  // what the block table can hold
  }
  check_range(element("cu_seqlens_q", p.num_seqs), p.cu_seqlens_q[p.num_seqs], p.total_q, p.total_q);
}

PlanView check_header(const AttentionParams& p) {
  if (p.plan_words < kPlanHeaderWords) {
    throw std::invalid_argument("plan must have at least " + std::to_string(kPlanHeaderWords) + " words, got " +
                                std::to_string(p.plan_words));
  }
  const auto* const header = reinterpret_cast<const PlanHeader*>(p.plan);
  if (header->magic != kPlanMagic) throw std::invalid_argument("plan does not start with this version's magic word");
  check_plan_field("num_seqs", header->num_seqs, p.num_seqs);
  check_plan_field("total_q", header->total_q, p.total_q);
  check_plan_field("num_q_heads", header->num_q_heads, p.num_q_heads);
  check_plan_field("num_kv_heads", header->num_kv_heads, p.num_kv_heads);
  check_plan_field("head_dim", header->head_dim, p.head_dim);
  check_plan_field("causal", header->causal, p.causal ? 1 : 0);
  check_plan_field("window_left", header->window_left, p.window_left);
  if (header->num_groups > 0 && p.alibi_slopes != nullptr) {
    throw std::invalid_argument("alibi_slopes must be off with a plan in which slices share a prefix");
  }
  if (header->num_groups > 0 && (p.window_left >= 0 || p.invariant)) {
    refuse_plan("slices share a prefix in it, which they do not with a window or invariance");
  }
  check_plan_field("invariant", header->fixed_split_tokens > 0 ? 1 : 0, p.invariant ? 1 : 0);
  if (header->fixed_split_tokens < 0 || header->fixed_split_tokens % kInvariantMultiple != 0) {
    throw std::invalid_argument("plan's invariant_split_tokens must be a multiple of " +
                                std::to_string(kInvariantMultiple) + ", got " +
                                std::to_string(header->fixed_split_tokens));
  }
  const int64_t words = kPlanHeaderWords + int64_t{header->capacity_items} * kWorkItemWords +
                        int64_t{header->capacity_merges} * kMergeWords;
  if (header->capacity_items < 0 || header->capacity_merges < 0 || words > p.plan_words) {
    throw std::invalid_argument("plan must have " + std::to_string(words) + " words for its capacity, got " +
                                std::to_string(p.plan_words));
  }
  check_range("plan's num_items", header->num_items, 0, header->capacity_items);
  check_range("plan's num_merges", header->num_merges, 0, header->capacity_merges);
  check_range("plan's num_partial_rows", header->num_partial_rows, 0, p.num_partial_rows);
  check_range("num_tickets", p.num_tickets, header->num_merges + int64_t{1}, INT64_MAX);
  const int32_t* const items = p.plan + kPlanHeaderWords;
  return {header, reinterpret_cast<const WorkItem*>(items),
          reinterpret_cast<const Merge*>(items + int64_t{header->capacity_items} * kWorkItemWords)};
}

// The keys that rows [row_begin, row_begin + num_rows) of a slice see, all together; the planner's rule (plan.h).
Range visible_keys(const AttentionParams& p, int64_t seq_idx, int64_t row_begin, int64_t num_rows) {
  const int64_t group_size = p.num_q_heads / p.num_kv_heads;
  const int64_t kv_len = p.seq_lens[seq_idx];
  const int64_t q_len = int64_t{p.cu_seqlens_q[seq_idx + 1]} - p.cu_seqlens_q[seq_idx];
  const int64_t first_position = kv_len - q_len + row_begin / group_size;
  const int64_t last_position = kv_len - q_len + (row_begin + num_rows - 1) / group_size;
  const int64_t end = p.causal ? std::clamp<int64_t>(last_position + 1, 0, kv_len) : kv_len;
  return {p.window_left < 0 ? 0 : std::clamp<int64_t>(first_position - p.window_left, 0, end), end};
}

int64_t slice_rows(const AttentionParams& p, int64_t seq_idx) {
  const int64_t q_len = int64_t{p.cu_seqlens_q[seq_idx + 1]} - p.cu_seqlens_q[seq_idx];
  return q_len * (p.num_q_heads / p.num_kv_heads);
}

// Keys before the slice's first row.
int64_t context(const AttentionParams& p, int64_t seq_idx) {
  return int64_t{p.seq_lens[seq_idx]} - p.cu_seqlens_q[seq_idx + 1] + p.cu_seqlens_q[seq_idx];
}

void check_rows(const AttentionParams& p, int64_t seq_idx, int64_t kv_head, int64_t row_begin, int64_t num_rows) {
  if (seq_idx < 0 || seq_idx >= p.num_seqs || kv_head < 0 || kv_head >= p.num_kv_heads) {
    refuse_plan("it names sequence " + std::to_string(seq_idx) + ", kv head " + std::to_string(kv_head));
  }
  const int64_t most = slice_rows(p, seq_idx);
  if (row_begin < 0 || num_rows < 1 || row_begin + num_rows > most) {
    refuse_plan("it names rows [" + std::to_string(row_begin) + ", " + std::to_string(row_begin + num_rows) +
                ") of sequence " + std::to_string(seq_idx) + ", which has " + std::to_string(most));
  }
}

[[noreturn]] void refuse_keys(const WorkItem& item, const Range& keys) {
  refuse_plan("it reads the keys [" + std::to_string(item.kv_begin) + ", " + std::to_string(item.kv_end) +
              ") of sequence " + std::to_string(item.seq_idx) + ", whose rows see [" + std::to_string(keys.begin) +
              ", " + std::to_string(keys.end) + ")");
}

// Checks the group of slices whose rows a merge has: that there are such slices, and that they share its prefix.
// Returns how many keys its items read, all together.
int64_t check_group(const AttentionParams& p, const Merge& merge) {
  check_rows(p, merge.seq_idx, merge.kv_head, merge.row_begin, 1);
  const int32_t* const first_pages = p.block_table + merge.seq_idx * p.block_table_stride;
  const int64_t num_pages = (int64_t{merge.prefix_tokens} + p.page_size - 1) / p.page_size;
  int64_t rows_left = merge.num_rows, num_keys = merge.prefix_tokens;
  int64_t s = merge.seq_idx;
  for (; s < p.num_seqs && rows_left > 0; ++s) {
    const int32_t* const pages = p.block_table + s * p.block_table_stride;
    if (context(p, s) < merge.prefix_tokens) {
      refuse_plan("sequence " + std::to_string(s) + " is not longer than the prefix that it is to share");
    }
    // Of all kv heads alike: once is enough.
    if (merge.kv_head == 0 && s > merge.seq_idx && !std::equal(pages, pages + num_pages, first_pages)) {
      refuse_plan("block_table[" + std::to_string(s) + "] does not begin with the pages of block_table[" +
                  std::to_string(merge.seq_idx) + "]");
    }
    rows_left -= slice_rows(p, s);
    num_keys += p.seq_lens[s] - merge.prefix_tokens;
  }
  if (merge.row_begin != 0 || rows_left != 0) {
    refuse_plan("the rows that share a prefix are not those of slices from sequence " + std::to_string(merge.seq_idx) +
                " on");
  }
  return num_keys;
}

// Checks an item of a group's merge; the group itself has been checked.
void check_group_item(const AttentionParams& p, const WorkItem& item, const Merge& merge) {
  const bool is_shared = item.kv_end <= merge.prefix_tokens && num_rows(item) == merge.num_rows;
  const int64_t rows_before =
      (int64_t{p.cu_seqlens_q[item.seq_idx]} - p.cu_seqlens_q[merge.seq_idx]) * (p.num_q_heads / p.num_kv_heads);
  const Range keys = is_shared ? Range{0, merge.prefix_tokens} : Range{merge.prefix_tokens, p.seq_lens[item.seq_idx]};
  const int64_t rows = is_shared ? merge.num_rows : slice_rows(p, item.seq_idx);
  if (item.kv_begin < keys.begin || item.kv_end > keys.end) refuse_keys(item, keys);
  if (item.kv_head != merge.kv_head || item.row_begin != 0 || num_rows(item) != rows || rows_before < 0 ||
      rows_before + rows > merge.num_rows || (is_shared && item.seq_idx != merge.seq_idx) ||
      item.partial_row < merge.partial_row ||
      item.partial_row >= merge.partial_row + int64_t{merge.num_splits} * merge.num_rows ||
      (item.partial_row - merge.partial_row) % merge.num_rows != rows_before) {
    refuse_plan("an item of sequence " + std::to_string(item.seq_idx) + " passes its group or its partial rows");
  }
}

// Checks that the items and merges cover what this batch's rows see, and returns the keys that are read.
int64_t check_work(const AttentionParams& p, const PlanView& plan, std::vector<Range>* keys_read) {
  const int32_t num_merges = plan.header->num_merges, num_partial_rows = plan.header->num_partial_rows;
  keys_read->assign(p.num_seqs, {INT64_MAX, 0});
  int64_t max_rows = 0, covered_rows = 0, split_keys = 0, split_rows = 0, num_parts = 0;
  for (int32_t m = 0; m < num_merges; ++m) {
    const Merge& merge = plan.merges[m];
    if (merge.num_splits < 2 || merge.num_items < merge.num_splits || merge.num_rows < 1 || merge.partial_row < 0 ||
        merge.partial_row + int64_t{merge.num_splits} * merge.num_rows > num_partial_rows) {
      refuse_plan("merge " + std::to_string(m) + " passes its partial rows");
    }
    if (merge.prefix_tokens > 0) {
      if (plan.header->num_groups < 1) refuse_plan("it has groups of slices that its header does not tell of");
      split_keys += check_group(p, merge);
    } else {
      check_rows(p, merge.seq_idx, merge.kv_head, merge.row_begin, merge.num_rows);
      const Range keys = visible_keys(p, merge.seq_idx, merge.row_begin, merge.num_rows);
      split_keys += keys.end - keys.begin;
    }
    covered_rows += merge.num_rows;
    split_rows += int64_t{merge.num_splits} * merge.num_rows;
    num_parts += merge.num_items;
  }
  for (int32_t i = 0; i < plan.header->num_items; ++i) {
    const WorkItem& item = plan.items[i];
    const int64_t rows = num_rows(item);
    if (item.merge_idx >= num_merges) refuse_plan("item " + std::to_string(i) + " passes its merge");
    const Merge* const merge = item.merge_idx < 0 ? nullptr : &plan.merges[item.merge_idx];
    const bool is_of_group = merge != nullptr && merge->prefix_tokens > 0;
    check_rows(p, item.seq_idx, item.kv_head, item.row_begin, is_of_group ? 1 : rows);
    max_rows = std::max(max_rows, rows);
    if (item.kv_begin > item.kv_end) refuse_keys(item, {0, p.seq_lens[item.seq_idx]});
    if (is_of_group) {
      check_group_item(p, item, *merge);
    } else {
      const Range keys = visible_keys(p, item.seq_idx, item.row_begin, rows);
      if (item.kv_begin < keys.begin || item.kv_end > keys.end ||
          (merge == nullptr && (item.kv_begin != keys.begin || item.kv_end != keys.end))) {
        refuse_keys(item, keys);
      }
      if (merge != nullptr &&
          (item.partial_row < 0 || item.partial_row + rows > num_partial_rows || merge->num_rows != rows)) {
        refuse_plan("item " + std::to_string(i) + " passes its merge or its partial rows");
      }
    }
    // Items that cover every key once and never pass a multiple end at all of them.
    const int64_t fixed = plan.header->fixed_split_tokens;
    if (fixed > 0 && item.kv_begin < item.kv_end && item.kv_begin / fixed != (item.kv_end - 1) / fixed) {
      refuse_plan("an item passes a multiple of its invariant_split_tokens, " + std::to_string(fixed));
    }
    if (merge == nullptr) {
      covered_rows += rows;
    } else {
      split_keys -= item.kv_end - item.kv_begin;
      split_rows -= rows;
      num_parts -= 1;
    }
    if (item.kv_begin < item.kv_end) {
      Range& read = (*keys_read)[item.seq_idx];
      read = {std::min<int64_t>(read.begin, item.kv_begin), std::max<int64_t>(read.end, item.kv_end)};
    }
  }
  if (covered_rows != p.total_q * p.num_q_heads || split_keys != 0 || split_rows != 0 || num_parts != 0) {
    refuse_plan("its items do not cover every row and key once");
  }
  return max_rows;
}

void check_pages(const AttentionParams& p, const std::vector<Range>& keys_read) {
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const Range keys = keys_read[s];
    if (keys.begin >= keys.end) continue;
    const int32_t* const pages = p.block_table + s * p.block_table_stride;
    for (int64_t i = keys.begin / p.page_size; i <= (keys.end - 1) / p.page_size; ++i) {
      if (pages[i] < 0 || pages[i] >= p.num_pages) {
        throw std::invalid_argument("block_table[" + std::to_string(s) + ", " + std::to_string(i) +
                                    "] must be in [0, num_pages) = [0, " + std::to_string(p.num_pages) + "), got " +
                                    std::to_string(pages[i]));
      }
    }
  }
}

// Scratch that lives as long as its thread and only grows, so that a step allocates nothing. nullptr: out of memory.
void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> scratch;
  static thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    constexpr int64_t kPageBytes = 4096;
    const int64_t size = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    scratch.reset(std::aligned_alloc(kPageBytes, size));
    capacity = scratch ? size : 0;
  }
  return scratch.get();
}

// Items [begin, end) of the plan that one thread works on side by side (kernels.h).
struct Bundle {
  int32_t begin;
  int32_t end;
};

bool differs_in_head_only(const WorkItem& a, const WorkItem& b) {
  return a.seq_idx == b.seq_idx && a.kv_head + 1 == b.kv_head && a.row_begin == b.row_begin &&
         a.rows_and_kind == b.rows_and_kind && a.kv_begin == b.kv_begin && a.kv_end == b.kv_end;
}

// Few-row items of neighbouring kv heads, which the planner puts next to each other, go together: their keys lie next
// to each other in memory. But no bundle holds more than 1 / (2 num_threads) of all such work, so that every thread has
// some (one thread may take all).
void make_bundles(const AttentionParams& p, const PlanView& plan, int64_t num_threads, std::vector<Bundle>* bundles) {
  int64_t direct_keys = 0;
  for (int32_t i = 0; i < plan.header->num_items; ++i) {
    const WorkItem& item = plan.items[i];
    if (num_rows(item) <= kDirectRows) direct_keys += item.kv_end - item.kv_begin;
  }
  bundles->clear();
  for (int32_t i = 0; i < plan.header->num_items;) {
    const WorkItem& first = plan.items[i];
    const int64_t item_keys = first.kv_end - first.kv_begin;
    const bool is_shared = num_threads > 1 && item_keys > 0;
    const int64_t share = is_shared ? direct_keys / (2 * num_threads * item_keys) : kMaxBundle;
    const int64_t most = num_rows(first) <= kDirectRows && !p.invariant ? std::clamp<int64_t>(share, 1, kMaxBundle) : 1;
    int32_t end = i + 1;
    while (end < plan.header->num_items && end - i < most &&
           differs_in_head_only(plan.items[end - 1], plan.items[end])) {
      ++end;
    }
    bundles->push_back({i, end});
    i = end;
  }
}

// Bundles [begin, end) that are drawn in order.
struct Queue {
  int64_t end;
  std::atomic<int64_t> next;
};

// Work that waits for the FMA units and work that waits for memory have a queue each. Threads begin with one or the
// other in turns, so that both go on at the same time, and end with what is left.
struct Region {
  const IsaKernels& kernels;
  const AttentionParams& p;
  const PlanView& plan;
  const std::vector<Bundle>& bundles;
  int64_t scratch_bytes;
  Queue queues[2];
  std::atomic<int> num_threads{0};
  std::atomic<int64_t> num_done{0};
};

// The next bundle, or -1.
int64_t draw(Region* region, int first_queue) {
  for (const int i : {first_queue, 1 - first_queue}) {
    Queue& queue = region->queues[i];
    if (queue.next.load(std::memory_order_relaxed) >= queue.end) continue;
    const int64_t n = queue.next.fetch_add(1, std::memory_order_relaxed);
    if (n < queue.end) return n;
  }
  return -1;
}

void run_bundles(void* context) {
  Region& region = *static_cast<Region*>(context);
  const int first_queue = region.num_threads.fetch_add(1, std::memory_order_relaxed) % 2;
  void* const scratch = thread_scratch(region.scratch_bytes);
  if (scratch == nullptr) return;  // the other threads do its share; without any, num_done tells
  for (;;) {
    const int64_t n = draw(&region, first_queue);
    if (n < 0) return;
    const Bundle bundle = region.bundles[n];
    region.kernels.attend(region.p, region.plan.items + bundle.begin, bundle.end - bundle.begin, scratch);
    region.num_done.fetch_add(1, std::memory_order_relaxed);
    for (int32_t i = bundle.begin; i < bundle.end; ++i) {
      const int32_t merge_idx = region.plan.items[i].merge_idx;
      if (merge_idx < 0) continue;
      const Merge& merge = region.plan.merges[merge_idx];
      // Releases this item's partial rows to whoever comes last, and acquires everybody's if that is us.
      int32_t* const ticket = region.p.tickets + merge_idx;
      if (__atomic_add_fetch(ticket, 1, __ATOMIC_ACQ_REL) == merge.num_items) {
        region.kernels.merge_splits(region.p, merge);
        __atomic_store_n(ticket, 0, __ATOMIC_RELAXED);  // for the next call, which the end of the region orders
      }
    }
  }
}

}  // namespace

void mixed_attention(const IsaKernels& kernels, const AttentionParams& p, int64_t num_threads) {
  check_range("num_threads", num_threads, 1, INT_MAX);
  check_sizes(p);
  check_lengths(p);
  const PlanView plan = check_header(p);
  static thread_local std::vector<Range> keys_read;
  const int64_t max_rows = check_work(p, plan, &keys_read);
  check_pages(p, keys_read);
  if (plan.header->num_items == 0) return;
  static thread_local std::vector<Bundle> bundles;
  make_bundles(p, plan, num_threads, &bundles);
  const int64_t num_bundles = static_cast<int64_t>(bundles.size());
  const auto direct = std::stable_partition(bundles.begin(), bundles.end(), [&](const Bundle& bundle) {
    return p.invariant || num_rows(plan.items[bundle.begin]) > kDirectRows;
  });
  const int64_t num_packed = direct - bundles.begin();
  Region region{kernels,
                p,
                plan,
                bundles,
                kernels.attend_scratch_bytes(max_rows, {p.head_dim, p.v_head_dim}),
                {{num_packed, {0}}, {num_bundles, {num_packed}}}};
  parallel_region(std::min(num_threads, num_bundles), run_bundles, &region);
  if (region.num_done != num_bundles) throw std::bad_alloc();
}

}  // namespace cpu
}  // namespace mixattn
