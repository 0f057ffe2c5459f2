"""Mistakes that a kernel engineer makes, each put into a copy of the CUDA kernel's sources behind a run-time switch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cases import KvFormat
from tests.cuda.emulation import NUM_SMS
from tests.emu.build import ROOT


@dataclass(frozen=True)
class Fault:
    """A mistake, by name.

    Args:
        file: below csrc/cuda.
        right: the statement or expression as it is, found once in the file.
        wrong: what is there instead when the fault is on.
        case: id of the case that shows it.
        also: more of these, (right, wrong), in the same file.
        caught_by: what shows it: ``result`` (not close to the truth, or NaN), ``tickets`` (not zero after the launch)
            or a regular expression of the emulator's report.
        capability: of the GPU that it is run on, 10 major + minor.
        kv: what K and V are stored as; None: as q.
        num_blocks: that run it.
    """

    name: str
    file: str
    right: str
    wrong: str
    case: str
    caught_by: str = "result"
    capability: int = 80
    also: tuple[tuple[str, str], ...] = ()
    kv: KvFormat | None = None
    num_blocks: int = NUM_SMS


SM80 = "sm80/mixed_attention.cuh"
SM90 = "sm90/mixed_attention.cuh"
SM90_TILE = "sm90/tile.cuh"
QUANTISED = "sm80/quantised.cuh"
TILE = "sm80/tile.cuh"
FRAGMENTS = "fragments.cuh"
PLAN = "mixed_attention.cuh"
SOFTMAX = "softmax.cuh"
CHUNK = "q65-kv200-page16-gqa3"
DECODE = "q1-kv4096-page16-gqa8"
SPLITS = "splits-chunk-beside-decodes"
PREFIX = "prefix-splits"
LARGE_PREFIX = "prefix-of-40-decodes-page16-gqa4"
TWO_SPLITS = "two-splits"
MANY_ITEMS = "all-kinds-head-dim-128"
LONG_CHUNK = "long-chunk-beside-decode-head-dim-128"
WINDOW = "chunk-whose-window-begins-inside-a-tile"
WIDE = "all-kinds-head-dim-256"
OTHER_V = "all-kinds-head-dim-192-v128"
OTHER_V_SPLITS = "v128-of-192-splits"
INT8 = KvFormat(torch.int8, "token")
INT4 = KvFormat(torch.uint8, "token")
"""Of test_mixed_attention.py and test_sanitizers.py; the others are of tests/cases.py."""

FAULTS = [
    Fault("no-barrier-before-v-is-read", SM80, "sync_tile<TileShape>();  // V has landed", "", CHUNK),
    Fault("no-barrier-before-k-is-read", SM80, "sync_tile<TileShape>();  // K has landed", "", CHUNK),
    Fault("no-barrier-before-q-is-read-by-all-warps", SM80, "sync_team();  // Q, which", "", DECODE),
    Fault("no-barrier-before-sums-replace-k-and-v", SM80, "sync_team();  // no warp reads", "", DECODE),
    Fault(
        "k-overwritten-while-it-is-read",
        SM80,
        "place = find_key<TileShape, kScores>(p, item, next_begin);",
        "place = find_key<TileShape, kScores>(p, item, next_begin);"
        " if (next_begin < item[kKvEnd]) copy_k(place, next_begin);",
        CHUNK,
    ),
    Fault("no-wait-for-v", SM80, "mx::cp_async_wait<0>();  // for V", "", CHUNK),
    Fault(
        "wait-for-k-one-group-too-shallow", SM80, "mx::cp_async_wait<0>();  // for K", "mx::cp_async_wait<1>();", CHUNK
    ),
    Fault(
        "page-off-by-one",
        TILE,
        "block_table_row[key / page_size]",
        "block_table_row[(key + 1) / page_size]",
        CHUNK,
    ),
    Fault("slot-off-by-one", TILE, "key % page_size", "(key + 1) % page_size", CHUNK),
    Fault(
        "tail-not-zeroed",
        TILE,
        "key >= kv_begin && key < kv_end",
        "true",
        CHUNK,
        caught_by="cp.async: outside of the tensors",  # the table's entries past the last page are read
        also=(("key < item[kKvBegin] || key >= item[kKvEnd]", "false"),),
    ),
    Fault(
        "ticket-without-fences",
        PLAN,
        "mx::fence_gpu();  // before the ticket",
        "",
        SPLITS,
        also=(("mx::fence_gpu();  // behind the ticket", ""),),
    ),
    Fault("no-barrier-before-the-fence", PLAN, "sync_team(team.barrier);  // before the fence", "", SPLITS),
    Fault(
        "item-counter-not-reset", PLAN, "mx::st_global(queue_counter(p, queue), 0u);", "", SPLITS, caught_by="tickets"
    ),
    Fault("ticket-not-reset", PLAN, "mx::st_global(merge_ticket(p, merge_idx), 0u);", "", SPLITS, caught_by="tickets"),
    Fault("merge-one-split-too-early", PLAN, "merge_tickets - tickets", "merge_tickets - 2 * tickets", SPLITS),
    Fault("merge-of-a-group-counts-splits", PLAN, "merge.num_items", "merge.num_splits", PREFIX),
    Fault(
        "small-item-draws-one-ticket-where-others-draw-two",
        PLAN,
        "merge_if_last<T, kVHeadDim>(p, item, kOnlyTeam, Attend::kItemTickets, Attend::kItemTickets);",
        "merge_if_last<T, kVHeadDim>(p, item, kOnlyTeam, 1, Attend::kItemTickets);",
        LARGE_PREFIX,
        caught_by="result|tickets",
        capability=90,
    ),
    Fault("fragment-of-k-swapped", SM80, "keys[1]", "keys[2]", CHUNK),
    Fault(
        "v-not-transposed",
        SM80,
        "mx::ldmatrix_x4_trans(values, from);",
        "mx::ldmatrix_x4(values, from);",
        CHUNK,
    ),
    Fault("causal-mask-off-by-one", PLAN, "position + 1", "position + 2", CHUNK),
    Fault("window-off-by-one", PLAN, "position - p.window_left", "position - p.window_left + 1", "window-q1"),
    Fault("first-tile-not-masked", SM80, "tile_begin < item[kFullBegin]", "false", "window-chunk-beside-decodes"),
    Fault("last-tile-not-masked", SM80, "next_begin > item[kFullEnd]", "false", CHUNK),
    Fault("sum-not-rescaled", SOFTMAX, "row_sum[h] *= rescale.of_row[h];", "", "scale-and-peaked-scores"),
    Fault(
        "swizzle-of-copies-left-out",
        TILE,
        "address ^ ((num_rows & 7) * mx::kVectorBytes)",
        "address",
        CHUNK,
    ),
    Fault("step-past-8-chunks-swizzled-too", TILE, "step % kSwizzleSteps * kStepBytes", "step * kStepBytes", WIDE),
    Fault(
        "rows-dropped-while-they-are-read",
        SM80,
        "sync_team();  // no thread reads the item",
        "",
        WIDE,
        caught_by="result|deadlock:",  # warps that differ over the rows that are left part ways
    ),
    Fault("rows-read-before-they-are-dropped", SM80, "sync_team();  // the item is what", "", WIDE),
    Fault(
        "partials-of-dropped-rows-overwritten",
        SM80,
        "item.set(kPartialRow, item[kPartialRow] + num_rows);",
        "",
        WIDE,
    ),
    Fault(
        "partials-as-wide-as-k",
        FRAGMENTS,
        "partial_row * kVHeadDim + column",
        "partial_row * p.call.head_dim + column",
        OTHER_V_SPLITS,
        caught_by="st.global: outside of the tensors",
    ),
    Fault(
        "partials-read-as-wide-as-k",
        PLAN,
        "partial_row * kVHeadDim + dim",
        "partial_row * p.call.head_dim + dim",
        OTHER_V_SPLITS,
        caught_by="result|ld.global: outside of the tensors",
    ),
    Fault(
        "results-in-the-other-element",
        PLAN,
        "p.call.dtype == DType::kBFloat16",
        "p.call.dtype != DType::kBFloat16",
        CHUNK,
        kv=INT8,
    ),
    Fault(
        "alibi-added",
        FRAGMENTS,
        "slopes[row_head(p, item, row)] * kLog2E",
        "-slopes[row_head(p, item, row)] * kLog2E",
        "alibi-q1-gqa8",
    ),
    Fault(
        "alibi-of-keys-behind-negative",
        FRAGMENTS,
        "distance < 0 ? -distance : distance",
        "distance",
        "alibi-non-causal",
    ),
    Fault(
        "sink-in-every-split",
        FRAGMENTS,
        "p.call.sinks == nullptr || item[kMergeIdx] >= 0",
        "p.call.sinks == nullptr",
        "sinks-soft-cap-window-splits",
    ),
    Fault(
        "sink-in-every-split-of-larger-items",
        SM80,
        "if (item[kMergeIdx] >= 0) return {1.0f, lse_log2};",
        "",
        "sinks-soft-cap-window-splits",
    ),
    Fault("tree-bit-off-by-one", FRAGMENTS, "word >> distance & 1", "word >> (distance + 1) & 1", "tree-gqa1"),
    Fault(
        "tree-tiles-not-masked",
        PLAN,
        "clamp(context, drawn.kv_begin, full_end)",
        "full_end",
        "tree-words-0-in-long-chunk",
    ),
    Fault(
        "hidden-keys-read",
        TILE,
        "if (kScores == Scores::kAny && place.is_hidden) offset = kNowhere;",
        "",
        "tree-keys-that-no-row-sees",
    ),
    *(
        Fault(f"quantised-{name}", QUANTISED, right, wrong, case, kv=kv)
        for name, right, wrong, case, kv in (
            ("no-wait-for-k", "mx::cp_async_wait<1>();  // for K; V", "", CHUNK, INT8),
            ("no-wait-for-v", "mx::cp_async_wait<1>();  // for V; K", "", CHUNK, INT8),
            (
                "k-overwritten-before-it-is-widened",
                "mx::sync_warp();         // all lanes' copies of K have landed",
                "mx::sync_warp(); if (next_begin < item[kKvEnd]) copy_k(place, next_begin);",
                CHUNK,
                INT8,
            ),
            ("lanes-do-not-wait-for-each-other", "mx::sync_warp();         // all lanes' copies of V", "", CHUNK, INT4),
            ("no-barrier-before-k-is-read", "sync_tile<TileShape>();  // K is widened", "", CHUNK, INT8),
            ("no-barrier-before-v-is-read", "sync_tile<TileShape>();  // V is widened", "", CHUNK, INT8),
            ("no-barrier-before-q-is-read", "sync_team();  // Q and its scales", "", DECODE, INT8),
            ("rows-scales-overwritten-before-they-are-read", "sync_team();  // scales of keys take", "", CHUNK, INT8),
            ("scale-of-k-for-v", "mx::bits_of(scales.v)", "mx::bits_of(scales.k)", CHUNK, INT8),
            (
                "scale-of-the-wrong-slot",
                "place.slot * scale.token_stride",
                "place.slot * scale.head_stride",
                CHUNK,
                INT8,
            ),
            (
                "scale-of-the-wrong-head",
                "scale.data[item[kKvHead] * scale.head_stride]",
                "scale.data[0]",
                CHUNK,
                KvFormat(torch.int8, "head"),
            ),
            (
                "key-in-the-wrong-place",
                "key % kNeighbours * Row::kUnitLanes",
                "key % kNeighbours",
                CHUNK,
                INT8,
            ),
            ("idle-lanes-widen", "unit >= Row::kUnits", "false", OTHER_V, INT8),
            (
                "second-half-swizzled-as-the-first",
                "row_below<kRowBytes>(to_second, i * kKeysAtOnce)",
                "first + kRight",
                OTHER_V,
                INT8,
            ),
            ("queries-past-their-end-fitted", "chunk < Row::kChunks", "true", OTHER_V, INT8),
            (
                "columns-of-v-ordered-as-those-of-k-lie",
                "ordered[chunk_at<kVHeadDim, TileShape>(i)]",
                "ordered[i]",
                OTHER_V,
                INT8,
            ),
            (
                "queries-not-scaled-back",
                "(exponent - kLargestExponent) * kExponentOne",
                "127 * kExponentOne",
                CHUNK,
                INT8,
            ),
        )
    ),
    *(
        Fault(f"sm90-{name}", SM90, right, wrong, LONG_CHUNK, caught_by=caught_by, capability=90)
        for name, right, wrong, caught_by in (
            (
                "k-not-waited-for",
                "mx::mbarrier_wait(ring.full(), ring.parity);  // for K",
                "",
                "result|fence|under way",
            ),
            (
                "v-not-waited-for",
                "mx::mbarrier_wait(ring.full(), ring.parity);  // for V",
                "",
                "result|fence|under way",
            ),
            ("scores-not-waited-for", "mx::wgmma_wait<0>();  // for the scores", "", "result|wgmma_fence"),
            ("sums-not-waited-for", "mx::wgmma_wait<0>();  // for the sums", "", "result|ends before"),
            (
                "copies-not-fenced",
                "mx::fence_proxy_async();  // wgmma is to see what cp.async wrote",
                "",
                "without fence_proxy_async",
            ),
            ("copies-told-too-early", "mx::cp_async_wait<1>();", "mx::cp_async_wait<2>();", "result|fence"),
            (
                "queries-not-waited-for",
                "mx::mbarrier_wait(mx::shared_base() + Shared::kQueryFull, count & 1);",
                "mx::mbarrier_wait(mx::shared_base() + Shared::kQueryFull, 1);",
                "result|deadlock|fence|ld.shared|cp.async",
            ),
            (
                "item-never-drawn",
                "mx::mbarrier_wait(item_empty<Shared>(count), (count / kNumItems & 1) ^ 1);",
                "mx::mbarrier_wait(item_empty<Shared>(count), count / kNumItems & 1);",
                "deadlock",
            ),
            ("step-of-k-wrong", "k % kPanelSteps * kStepBytes", "k % kPanelSteps * kStepBytes / 2", "result|multiple"),
            (
                "second-panel-of-k-in-the-wrong-place",
                "k / kPanelSteps * Shared::kPanelBytes",
                "k / kPanelSteps * Shared::kPanelBytes / 2",
                "result",
            ),
            ("consumers-share-their-rows", "consumer * (mx::kWgmmaRows * mx::kSwizzledRowBytes)", "0", "result"),
            (
                "merge-does-not-wait-for-the-other-consumer",
                "kItemTickets / kNumConsumers",
                "kItemTickets",
                "result|tickets",
            ),
            ("turn-kept-at-the-end", "if (has_turns) pass_turn(consumer);\n  release", "", "deadlock"),
            ("tile-never-released", "release(ring.empty());\n    ring.advance();\n    tile_begin", "", "deadlock"),
        )
    ),
    *(
        Fault(f"sm90-boxes-{name}", SM90_TILE, right, wrong, LONG_CHUNK, caught_by=caught_by, capability=90)
        for name, right, wrong, caught_by in (
            (
                "not-promised",
                "mx::mbarrier_arrive_expect(barrier, num_keys * Shared::kPanels * mx::kSwizzledRowBytes);",
                "mx::mbarrier_arrive(barrier);",
                "deadlock|under way",
            ),
            (
                "slot-and-page-swapped",
                "mx::load_box(panel_to, map, column, kv_head, first_slot, first_page, barrier);",
                "mx::load_box(panel_to, map, column, kv_head, first_page, first_slot, barrier);",
                "result",
            ),
            ("promised-without-a-panel", "num_keys * Shared::kPanels", "num_keys", "deadlock|under way"),
            ("page-of-the-box-before", "mx::shfl_idx(place.page, kLeastBoxSlots)", "first_page", "result"),
            ("of-the-first-panel-twice", "panel * kPanelColumns", "0 * panel", "result"),
            ("of-one-warp", "tile + first_key * mx::kSwizzledRowBytes", "tile", "result|under way"),
        )
    ),
    Fault(
        "sm90-boxes-head-and-slot-swapped",
        SM90_TILE,
        "mx::load_box(panel_to + kLeastBoxSlots * mx::kSwizzledRowBytes, map, column, kv_head, second_slot,"
        " second_page,\n                 barrier);",
        "mx::load_box(panel_to + kLeastBoxSlots * mx::kSwizzledRowBytes, map, column, second_slot, kv_head,"
        " second_page, barrier);",
        WINDOW,
        capability=90,
    ),
    *(
        Fault(f"sm90-boxes-{name}", SM90, right, wrong, case, caught_by=caught_by, capability=90)
        for name, right, wrong, case, caught_by in (
            ("past-the-last-key", "tile_begin + Tile::kKeys <= item[kKvEnd]", "true", LONG_CHUNK, "result"),
            ("before-the-first-key", "tile_begin >= item[kKvBegin]", "true", WINDOW, "result"),
            (
                "report-to-the-wrong-barrier",
                "load_keys<kHeadDim>(map, box_slots, item, place, tile, ring.full());",
                "load_keys<kHeadDim>(map, box_slots, item, place, tile, ring.empty());",
                LONG_CHUNK,
                "deadlock|arrivals",
            ),
            (
                "copies-before-them-not-told-of",
                "finish_copies(announcement);\n  } else",
                "",
                LONG_CHUNK,
                "deadlock",
            ),
            (
                "barriers-not-fenced",
                "mx::fence_proxy_async();  // loads report to them",
                "",
                LONG_CHUNK,
                "reports to .* without fence_proxy_async",
            ),
        )
    ),
    Fault(
        "sm90-tile-skipped-while-other-lanes-wait-for-it",
        SM90,
        "mx::sync_warp();  // all lanes have waited",
        "",
        "splits-page7-window",
        caught_by="deadlock",
        capability=90,
    ),
    Fault(
        "sm90-queries-overwritten-while-they-are-read",
        SM90,
        "mx::mbarrier_wait(mx::shared_base() + Shared::kQueryEmpty, (count & 1) ^ 1);",
        "",
        MANY_ITEMS,
        caught_by="result|fence|deadlock",
        capability=90,
    ),
    Fault(
        "sm90-tiles-overwritten-while-they-are-read",
        SM90,
        "mx::mbarrier_wait(ring.empty(), ring.parity ^ 1);  // before K",
        "",
        LONG_CHUNK,
        caught_by="result|fence|deadlock|under way|arrivals",
        capability=90,
        also=(("mx::mbarrier_wait(ring.empty(), ring.parity ^ 1);  // before V", ""),),
    ),
    Fault(
        "sm90-item-released-while-other-lanes-read-it",
        SM90,
        "mx::sync_warp();  // all lanes have read the item's words",
        "",
        MANY_ITEMS,
        caught_by="result|tickets|deadlock",
        capability=90,
        num_blocks=1,  # which has so many items that it uses the words of one again
    ),
    Fault(
        "sm90-small-items-drawn-from-the-start",
        PLAN,
        "queue == Queue::kSmall ? header.first_small : 0",
        "0",
        LONG_CHUNK,
        caught_by="result|tickets|deadlock",
        capability=90,
    ),
]


PLANNER = "plan.cuh"
BLOCK_OPS = "block_ops.cuh"
PLAN_FAULTS = [
    Fault("no-barrier-before-sums-are-overwritten", BLOCK_OPS, "mx::sync_threads();  // who still reads", "", "many"),
    Fault("no-barrier-before-sums-are-read", BLOCK_OPS, "mx::sync_threads();  // the sums of the warps", "", "many"),
    Fault("no-barrier-before-maxima-are-read", BLOCK_OPS, "mx::sync_threads();  // the warps' results", "", "many"),
    Fault("sums-of-the-own-warp-counted-twice", BLOCK_OPS, "b.warp > 0 ? b.warp - 1 : 0", "b.warp", "many"),
    Fault("no-barrier-before-first-tiles-are-read", PLANNER, "mx::sync_threads();  // first_tile", "", "ties"),
    Fault(
        "no-barrier-before-keys-are-sorted", PLANNER, "mx::sync_threads();  // the keys of the last pass", "", "many"
    ),
    Fault("no-barrier-before-items-are-written", PLANNER, "mx::sync_threads();  // the sorted keys", "", "many"),
    Fault(
        "ties-turned-around",
        PLANNER,
        "is_right ? cost >= key.cost : cost > key.cost",
        "is_right ? cost > key.cost : cost >= key.cost",
        "ties",
    ),
    Fault("piece-off-by-one", PLANNER, "q - tile.first_piece", "q - tile.first_piece + 1", "many"),
    Fault("partial-rows-of-one-head", PLANNER, "heads * before[2]", "before[2]", "many"),
    Fault(
        "bad-slice-not-found",
        PLANNER,
        "kv_len > longest_kv[0] ? kv_len : longest_kv[0]",
        "kv_len < longest_kv[0] ? kv_len : longest_kv[0]",
        "bad",
    ),
    Fault("no-barrier-before-groups-are-found", PLANNER, "mx::sync_threads();  // what slices share", "", "groups"),
    Fault("no-barrier-before-groups-are-read", PLANNER, "mx::sync_threads();  // the groups are", "", "groups"),
    Fault("no-barrier-before-slices-know-theirs", PLANNER, "mx::sync_threads();  // the slices' groups", "", "groups"),
    Fault("no-barrier-before-own-splits-are-read", PLANNER, "mx::sync_threads();  // the splits of", "", "groups"),
    Fault(
        "rows-of-a-group-in-one-place",
        PLANNER,
        "first.splits * group.num_rows + rows_before",
        "first.splits * group.num_rows",
        "groups",
    ),
    Fault(
        "shared-tile-left-out",
        PLANNER,
        "num_row_tiles(spec, q_len(s)) + is_first_of_group(s)",
        "num_row_tiles(spec, q_len(s))",
        "groups",
    ),
    Fault("merges-past-their-room", PLANNER, "heads * counts.merged_tiles > p.capacity_merges", "false", "no-room"),
    Fault(
        "partial-rows-past-their-room",
        PLANNER,
        "heads * counts.partial_rows > p.capacity_partial_rows",
        "false",
        "no-partial-room",
    ),
]
"""Of the planner; cases of test_faults.py."""
APPEND = "append_kv.cuh"
APPEND_FAULTS = [
    Fault("row-written-while-it-is-read", APPEND, "mx::sync_warp();  // q_out may be q", "", "in-place"),
    Fault("sine-of-the-second-of-a-pair-negative", APPEND, "d < half ? -turned : turned", "-turned", "neox"),
    Fault("sine-of-the-pair-off-by-one", APPEND, "half + (dim + i) / 2", "half + (dim + i) / 2 + 1", "interleaved"),
    Fault("partner-of-the-wrong-half", APPEND, "dim < half ? dim + half : dim - half", "dim", "neox"),
    Fault("page-and-offset-swapped", APPEND, "slot % p.page_size", "slot / p.page_size", "neox"),
    Fault(
        "head-of-v-counted-from-k",
        APPEND,
        "is_q ? head - 2 * num_kv_heads : is_v ? head - num_kv_heads : head",
        "is_q ? head - 2 * num_kv_heads : head",
        "neox",
    ),
    Fault(
        "v-as-wide-as-k",
        APPEND,
        "dim < (is_v ? p.v_head_dim : p.head_dim)",
        "dim < p.head_dim",
        "other-v",
        caught_by="ld.global: outside of the tensors",
    ),
    Fault("lanes-for-k-alone", APPEND, "lanes_per_row(widest_head(p))", "lanes_per_row(p.head_dim)", "wider-v"),
    Fault("largest-of-half-a-row", APPEND, "mask /= 2", "mask /= 4", "token"),
    Fault("nan-is-no-code", APPEND, "magnitude > 0x7f800000u", "false", "token"),
    Fault("ties-rounded-up", APPEND, "(1u << (kDropped - 1)) - 1", "(1u << (kDropped - 1))", "unit"),
]
"""Of append_kv; cases of test_faults.py."""
MERGE = "merge_states.cuh"
MERGE_FAULTS = [
    Fault("empty-state-read", MERGE, "lse == -INFINITY", "false", "empty"),
    Fault("weights-not-relative-to-the-largest", MERGE, "lse - largest", "lse", "far"),
    Fault("lse-in-base-2", MERGE, "mx::lg2(total) * kLnOf2", "mx::lg2(total)", "empty"),
    Fault("sum-not-divided", MERGE, "1.0f / total", "1.0f", "empty"),
    Fault("token-and-head-swapped", MERGE, "row % p.num_heads", "row / p.num_heads % p.num_heads", "empty"),
]
"""Of merge_states; cases of test_faults.py."""
RACES = [
    Fault("no-fence-before-the-ticket", PLAN, "mx::fence_gpu();  // before the ticket", "", TWO_SPLITS),
    Fault("no-fence-behind-the-ticket", PLAN, "mx::fence_gpu();  // behind the ticket", "", TWO_SPLITS),
    Fault("quantised-idle-lanes-copy", QUANTISED, "vector >= Row::kVectors", "false", OTHER_V, kv=INT8),
]
"""Of attention; seldom a schedule shows them, or none: nothing is read stale here, and few wrong bytes of one key are
within the bound. For test_sanitizers.py."""
ALL_FAULTS = [*FAULTS, *PLAN_FAULTS, *APPEND_FAULTS, *MERGE_FAULTS, *RACES]


def write_sources(folder: Path) -> None:
    """A copy of csrc/cuda in folder/cuda with every fault in it, switched by emu::active_fault = its number from 1 on.

    Files are left as they are when nothing changed, so that nothing is compiled again.
    """
    for source in (ROOT / "csrc" / "cuda").rglob("*.*h"):
        name = str(source.relative_to(ROOT / "csrc" / "cuda"))
        text = source.read_text()
        choices: dict[tuple[str, str], list[int]] = {}
        for number, fault in enumerate(ALL_FAULTS, 1):
            if fault.file == name:
                for choice in ((fault.right, fault.wrong), *fault.also):
                    choices.setdefault(choice, []).append(number)
        for (right, wrong), numbers in choices.items():
            text = with_choice(text, numbers, right, wrong)
        target = folder / "cuda" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def with_choice(text: str, numbers: list[int], right: str, wrong: str) -> str:
    """The text with its only ``right`` turned into a choice between it and ``wrong``, which these faults take."""
    assert text.count(right) == 1, f"{text.count(right)} times in the sources, not once: {right}"
    is_on = " || ".join(f"emu::active_fault == {number}" for number in numbers)
    statement, semicolon, comment = right.partition(";")
    if semicolon:
        choice = f"if ({is_on}) {{ {wrong} }} else {{ {statement}; }}{comment}"
    else:
        choice = f"({is_on} ? ({wrong}) : ({right}))"
    return text.replace(right, choice)
