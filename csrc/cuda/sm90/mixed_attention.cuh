// mixed_attention.cuh: attention of all items by wgmma for chunks and mma.sync for decodes, at once in a block; sm_90a.
// Math    as sm80/mixed_attention.cuh
// Method  A block has four teams of 128 threads. One draws the plan's small items and computes them as on sm_80. One,
//         the producer, draws the larger items and copies their Q, K and V; two consumers have 64 rows of an item each,
//         P in registers. So chunks, which wait for the tensor cores, and decodes, which wait for memory, are always
//         both under way on an SM. The consumers take turns at the tensor cores: while one's products run, the other
//         does its softmax.
// Grid    a block per SM, 512 threads; registers as kDecodeRegisters, ... : 65,536 together
// Shapes  as cuda/mixed_attention.cuh; tiles (128, 128) of (packed query rows, keys), and sm80's small one
// Memory  an item reads 2 keys head_dim elements of K and V, and reads and writes rows head_dim; shared: tile.cuh.
//         K and V by TMA where pages are a multiple of 16 slots (key_maps.h), others and cut tiles by cp.async
// Static  nvcc 13.0, bf16, head_dim 128: 516 warp instructions per MMA-MFLOP of large tiles, 2,556 of small ones; no
//         spills, no wgmma serialised, no bank conflicts in the copies and the decodes (wgmma's reads are not counted)
// Limits  as cuda/mixed_attention.cuh, but head_dim 64, 96, 128, and neither ALiBi nor tree masks; the plan has small
//         items apart (Hardware.separates_small)
// Twins   sm80/mixed_attention.cuh, triton_kernels/mixed_attention.py; truth ops/reference.py
// Source  arXiv:2407.08608, section 3 (roles, turns, products issued ahead); wgmma: PTX ISA 8.7, section 9.7.15; TMA:
//         section 9.7.9.27
#pragma once

#include "cuda/sm90/tile.cuh"

namespace mixattn {
namespace cuda {
namespace sm90 {

constexpr int kWorkersPerSm = 2;  // a queue for each side of the block

// Of a thread, by role: together 512 for the four threads that stand at the same place in the teams.
constexpr int kDecodeRegisters = 152;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 160;
// Of a merge, for each item: a merge may have items of one consumer, of both, and of the team of small items.
constexpr int32_t kItemTickets = kNumConsumers;
static_assert(kDecodeRegisters + kProducerRegisters + kNumConsumers * kConsumerRegisters <= 512, "of an SM");

// The first key of an item's first tile: tiles start at multiples of their size, wherever a window begins.
MX_DEVICE int32_t first_tile(Item item) {
  return item[kKvBegin] == item[kKvEnd] ? item[kKvEnd] : item[kKvBegin] / Tile::kKeys * Tile::kKeys;
}

// ---- producer -------------------------------------------------------------------------------------------------------

MX_DEVICE void sync_producer() {
  sync_team(kProducerBarrier);
}

// What is gathered is told one behind: while a group of copies flies, the group before has landed. This holds the
// barrier to tell. What is loaded tells of itself.
struct Announcement {
  uint32_t barrier;  // 0: none
};

// Ends a group of copies, and tells of the group before.
MX_DEVICE void commit_copies(Announcement& announcement, uint32_t barrier) {
  mx::cp_async_commit();
  if (announcement.barrier != 0) {
    mx::cp_async_wait<1>();
    mx::fence_proxy_async();  // wgmma is to see what cp.async wrote
    mx::mbarrier_arrive(announcement.barrier);
  }
  announcement.barrier = barrier;
}
MX_DEVICE void finish_copies(Announcement& announcement) {
  if (announcement.barrier == 0) return;
  mx::cp_async_wait<0>();
  mx::fence_proxy_async();  // of the last group
  mx::mbarrier_arrive(announcement.barrier);
  announcement.barrier = 0;
}

// Sends for a tile of K or V, into the ring's next place, which is empty. Between the two ways of writing there, no
// fence is needed but those that wgmma needs: who gathers fences before it arrives at `full`, and whoever loads there
// later has waited for `empty`, behind consumers that had waited for `full`. A load writes through the proxy that wgmma
// reads by; behind `full` it is done, and behind `empty` the reads are, for a gather as for a load.
template <class T, int kHeadDim>
MX_DEVICE void send_keys(const sm80::Cache<T>& cache, const mx::TensorMap& map, int32_t box_slots, Item item,
                         const sm80::KeyPlace& place, RingPlace<Layout<kHeadDim>>& ring, int32_t tile_begin,
                         Announcement& announcement) {
  const uint32_t tile = ring.tile();
  if (box_slots > 0) {
    load_keys<kHeadDim>(map, box_slots, item, place, tile, ring.full());
    // No commit will tell of the group before, and consumers that wait for it would empty no place for those to come.
    finish_copies(announcement);
  } else {
    copy_keys<T, kHeadDim>(cache, item, place, tile, tile_begin);
    commit_copies(announcement, ring.full());
  }
  ring.advance();
}

template <class T, int kHeadDim, Scores kScores>
MX_DEVICE void produce(const LaunchParams& p, const KeyMaps& maps) {
  using Shared = Layout<kHeadDim>;
  const uint32_t query_full = mx::shared_base() + Shared::kQueryFull;
  if (this_thread().idx == 0 && maps.box_slots > 0) {
    mx::prefetch_map(maps.k);
    mx::prefetch_map(maps.v);
  }
  RingPlace<Shared> ring = {0, 0};
  for (int count = 0;; ++count) {
    const Item item = prefill_item<Shared>(count);
    mx::mbarrier_wait(item_empty<Shared>(count), (count / kNumItems & 1) ^ 1);  // the words of the item before last
    if (this_thread().idx == 0) draw_words(p, item, Queue::kLarger);
    sync_producer();
    mx::mbarrier_wait(mx::shared_base() + Shared::kQueryEmpty, (count & 1) ^ 1);
    if (item[kItemsLeft] <= 0) {
      mx::mbarrier_arrive(query_full);
      if (this_thread().idx == 0) close_queue(p, item, Queue::kLarger);
      return;
    }
    Announcement announcement = {0};
    copy_queries<T, kHeadDim>(p, item, mx::shared_base() + Shared::kQ);
    commit_copies(announcement, query_full);
    MX_NO_UNROLL
    for (int32_t tile_begin = first_tile(item); tile_begin < item[kKvEnd]; tile_begin += Tile::kKeys) {
      const sm80::KeyPlace place = sm80::find_key<Tile, kScores>(p, item, tile_begin);
      const bool is_whole = tile_begin >= item[kKvBegin] && tile_begin + Tile::kKeys <= item[kKvEnd];
      const int32_t box_slots = is_whole ? maps.box_slots : 0;
      mx::mbarrier_wait(ring.empty(), ring.parity ^ 1);  // before K
      send_keys<T, kHeadDim>(sm80::k_cache<T>(p), maps.k, box_slots, item, place, ring, tile_begin, announcement);
      mx::mbarrier_wait(ring.empty(), ring.parity ^ 1);  // before V
      send_keys<T, kHeadDim>(sm80::v_cache<T>(p), maps.v, box_slots, item, place, ring, tile_begin, announcement);
    }
    finish_copies(announcement);
  }
}

// ---- consumers ------------------------------------------------------------------------------------------------------

// What a consumer's thread keeps of its rows: lane / 4 and lane / 4 + 8 of its warp's 16.
template <int kHeadDim>
struct RowState {
  float accumulator[kHeadDim / kMmaColumns][4];
  float row_max[2];
  float row_sum[2];  // of this lane's columns
};

template <int kHeadDim>
MX_DEVICE void clear(RowState<kHeadDim>& state) {
  MX_UNROLL
  for (auto& fragment : state.accumulator) {
    MX_UNROLL
    for (float& sum : fragment) sum = 0.0f;
  }
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    state.row_max[h] = -INFINITY;
    state.row_sum[h] = 0.0f;
  }
}

template <class T, int kHeadDim>
MX_DEVICE void store_rows(const LaunchParams& p, Item item, int consumer, const RowState<kHeadDim>& state) {
  const Thread thread = this_thread();
  MX_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int32_t row = consumer * mx::kWgmmaRows + thread.warp * kMmaRows + thread.lane / 4 + 8 * h;
    const RowEnd end = end_row(p, item, row, state.row_max[h], quad_sum(state.row_sum[h]));
    store_row<T, kHeadDim>(p, item, row, 0, state.accumulator, h, end);
  }
}

using Fragments = float[Tile::kKeys / kMmaColumns][4];
using PackedWeights = uint32_t[Tile::kKeys / kMmaDepth][4];

// A warp is done with what this barrier guards.
MX_DEVICE void release(uint32_t barrier) {
  if (this_thread().lane == 0) mx::mbarrier_arrive(barrier);
}

// The same behind a wait, with nothing between that brings the lanes together: one that still waits would miss the
// phase if the next one ended, too.
MX_DEVICE void release_behind_wait(uint32_t barrier) {
  mx::sync_warp();  // all lanes have waited
  release(barrier);
}

// Starts scores (64, 128) = Q K^T of this consumer's rows.
template <class T, int kHeadDim>
MX_DEVICE void start_queries(int consumer, uint32_t keys, Fragments& scores) {
  using Shared = Layout<kHeadDim>;
  constexpr int kPanelSteps = kPanelColumns / mx::kWgmmaDepth;
  constexpr uint32_t kStepBytes = mx::kWgmmaDepth * sm80::kElementBytes;
  const uint32_t queries = mx::shared_base() + Shared::kQ + consumer * (mx::kWgmmaRows * mx::kSwizzledRowBytes);
  mx::wgmma_fence();
  MX_UNROLL
  for (int k = 0; k < kHeadDim / mx::kWgmmaDepth; ++k) {
    const uint32_t offset = k / kPanelSteps * Shared::kPanelBytes + k % kPanelSteps * kStepBytes;
    mx::wgmma_shared(scores, mx::matrix_descriptor(queries + offset, 0, mx::kSwizzledBlockBytes),
                     mx::matrix_descriptor(keys + offset, 0, mx::kSwizzledBlockBytes), k > 0, T{});
  }
  mx::wgmma_commit();
}

// Starts accumulator (64, kHeadDim) += P V.
template <class T, int kHeadDim>
MX_DEVICE void start_values(const PackedWeights& weights, uint32_t values, RowState<kHeadDim>& state) {
  using Shared = Layout<kHeadDim>;
  constexpr uint32_t kStepBytes = mx::kWgmmaDepth * mx::kSwizzledRowBytes;
  mx::wgmma_fence();
  MX_UNROLL
  for (int k = 0; k < Tile::kKeys / mx::kWgmmaDepth; ++k) {
    mx::wgmma_registers(state.accumulator, weights[k],
                        mx::matrix_descriptor(values + k * kStepBytes, Shared::kPanelBytes, mx::kSwizzledBlockBytes),
                        true, T{});
  }
  mx::wgmma_commit();
}

// A consumer's turn at the tensor cores, of an item whose rows both have.
MX_DEVICE void await_turn(int consumer) {
  mx::bar_sync(kTurnBarrier + consumer, kNumConsumers * kNumThreads);
}
MX_DEVICE void pass_turn(int consumer) {
  mx::bar_arrive(kTurnBarrier + (consumer ^ 1), kNumConsumers * kNumThreads);
}

// One tile's scores to weights, in place.
template <Scores kScores, int kHeadDim>
MX_DEVICE PerRow apply_softmax(const LaunchParams& p, Item item, int consumer, int32_t tile_begin, Fragments& scores,
                               RowState<kHeadDim>& state) {
  const Thread thread = this_thread();
  const int32_t first_row = consumer * mx::kWgmmaRows + thread.warp * kMmaRows + thread.lane / 4;
  const bool is_edge = tile_begin < item[kFullBegin] || tile_begin + Tile::kKeys > item[kFullEnd];
  const PerRow scale = prepare_scores<kScores>(p, item, first_row, tile_begin + 2 * (thread.lane % 4), is_edge,
                                               {{p.score_scale, p.score_scale}}, scores);
  return weigh_scores(scores, scale, state.row_max, state.row_sum);
}

// The item's keys, for this consumer's rows.
template <class T, int kHeadDim, Scores kScores>
MX_DEVICE void attend_item(const LaunchParams& p, Item item, int consumer, RingPlace<Layout<kHeadDim>>& ring,
                           RowState<kHeadDim>& state) {
  const bool has_turns = item[kNumRows] > mx::kWgmmaRows;
  const uint32_t query_empty = mx::shared_base() + Layout<kHeadDim>::kQueryEmpty;
  int32_t tile_begin = first_tile(item);
  if (tile_begin >= item[kKvEnd]) return release_behind_wait(query_empty);
  if (has_turns) await_turn(consumer);
  MX_NO_UNROLL
  do {
    // No product is under way here: ptxas would put a wait behind each one that goes on into the next turn of the loop.
    Fragments scores;
    mx::mbarrier_wait(ring.full(), ring.parity);  // for K
    start_queries<T, kHeadDim>(consumer, ring.tile(), scores);
    if (has_turns) pass_turn(consumer);
    mx::wgmma_wait<0>();  // for the scores
    release(ring.empty());
    ring.advance();
    const PerRow rescale = apply_softmax<kScores>(p, item, consumer, tile_begin, scores, state);
    rescale_sums(rescale, state.accumulator);
    PackedWeights weights;
    pack_weights<T>(scores, weights);
    mx::mbarrier_wait(ring.full(), ring.parity);  // for V
    if (has_turns) await_turn(consumer);
    start_values<T, kHeadDim>(weights, ring.tile(), state);
    mx::wgmma_wait<0>();  // for the sums
    release(ring.empty());
    ring.advance();
    tile_begin += Tile::kKeys;
  } while (tile_begin < item[kKvEnd]);
  if (has_turns) pass_turn(consumer);
  release(query_empty);
}

// Lets the tiles of an item pass that has no rows for this consumer.
template <int kHeadDim>
MX_DEVICE void skip_item(Item item, RingPlace<Layout<kHeadDim>>& ring) {
  release_behind_wait(mx::shared_base() + Layout<kHeadDim>::kQueryEmpty);
  MX_NO_UNROLL
  for (int32_t tile_begin = first_tile(item); tile_begin < item[kKvEnd]; tile_begin += Tile::kKeys) {
    for (int i = 0; i < 2; ++i) {
      mx::mbarrier_wait(ring.full(), ring.parity);
      release_behind_wait(ring.empty());
      ring.advance();
    }
  }
}

template <class T, int kHeadDim, Scores kScores>
MX_DEVICE void consume(const LaunchParams& p, int consumer) {
  using Shared = Layout<kHeadDim>;
  const Team team = {kConsumerBarrier + consumer, consumer == 0 ? kTicket : kSecondTicket};
  RingPlace<Shared> ring = {0, 0};
  if (consumer == 1) pass_turn(consumer);  // the other begins
  for (int count = 0;; ++count) {
    const Item item = prefill_item<Shared>(count);
    mx::mbarrier_wait(mx::shared_base() + Shared::kQueryFull, count & 1);
    if (item[kItemsLeft] <= 0) return;
    if (item[kNumRows] > consumer * mx::kWgmmaRows) {
      RowState<kHeadDim> state;
      clear(state);
      attend_item<T, kHeadDim, kScores>(p, item, consumer, ring, state);
      store_rows<T, kHeadDim>(p, item, consumer, state);
      const int32_t tickets = item[kNumRows] > mx::kWgmmaRows ? kItemTickets / kNumConsumers : kItemTickets;
      merge_if_last<T, kHeadDim>(p, item, team, tickets, kItemTickets);
    } else {
      skip_item<kHeadDim>(item, ring);
    }
    mx::sync_warp();  // all lanes have read the item's words
    release(item_empty<Shared>(count));
  }
}

// ---- the block ------------------------------------------------------------------------------------------------------

template <class T, int kHeadDim, Scores kScores>
struct AttendSmall {
  static constexpr int32_t kItemTickets = sm90::kItemTickets;

  static MX_DEVICE void item(const LaunchParams& p, Item item) {
    sm80::attend_item<T, kHeadDim, typename sm80::Tiles<kHeadDim>::Small, kScores>(p, item);
  }
};

template <class Shared>
MX_DEVICE void init_barriers() {
  constexpr int kConsumerWarps = kNumConsumers * kNumWarps;
  const uint32_t base = mx::shared_base();
  for (int slot = 0; slot < Shared::kNumSlots; ++slot) {
    mx::mbarrier_init(base + Shared::kFull + slot * kBarrierBytes, kNumThreads);
    mx::mbarrier_init(base + Shared::kEmpty + slot * kBarrierBytes, kConsumerWarps);
  }
  mx::mbarrier_init(base + Shared::kQueryFull, kNumThreads);
  mx::mbarrier_init(base + Shared::kQueryEmpty, kConsumerWarps);
  for (int i = 0; i < kNumItems; ++i) mx::mbarrier_init(item_empty<Shared>(i), kConsumerWarps);
  mx::fence_proxy_async();  // loads report to them
}

// The body of a kernel; its entry points are in entry.cuh.
template <class T, int kHeadDim, Scores kScores>
MX_DEVICE void mixed_attention(const LaunchParams& p, const KeyMaps& maps) {
  const int team = mx::thread_idx() / kNumThreads;
  if (mx::thread_idx() == 0) init_barriers<Layout<kHeadDim>>();
  mx::sync_threads();  // the barriers are there
  if (team == 0) {
    mx::raise_registers<kDecodeRegisters>();
    run_queue<T, kHeadDim, AttendSmall<T, kHeadDim, kScores>>(p, Queue::kSmall);
  } else if (team == 1) {
    mx::lower_registers<kProducerRegisters>();
    produce<T, kHeadDim, kScores>(p, maps);
  } else {
    mx::raise_registers<kConsumerRegisters>();
    consume<T, kHeadDim, kScores>(p, team - 2);
  }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace mixattn
