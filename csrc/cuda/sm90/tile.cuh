// tile.cuh: where a block of sm_90's kernel has what in shared memory, its barriers, and how keys get there.
// Method  A matrix lies as panels of 64 columns: a row of a panel is 128 bytes, its 16-byte chunks permuted as wgmma
//         wants them (prim_sm90.cuh). K and V take turns in a ring of tiles; Q has one place. Each has a barrier that
//         says it is there and one that says nobody needs it any more.
//         Keys come in two ways. Where pages allow (key_maps.h), a tile whose 128 keys are all the item's is loaded in
//         boxes: slots of one page, one panel, a thread for all of it. Others are gathered, 16 bytes a lane, so that
//         what lies beside the item's keys, maybe NaN, becomes 0.
// Shapes  Q (128, head_dim); tiles of 128 keys; kNumSlots of them in the ring: what two blocks of threads leave
// Memory  decodes: sm80/tile.cuh's small tile; prefill: 256 panels (1 + kNumSlots) bytes x 128 rows, panels of 64
//         columns: 199,680 bytes of 232,448 in all at head_dim 128
// Limits  head_dim 64, 96, 128
// Source  layout: PTX ISA 8.7, section 9.7.15.5.1
#pragma once

#include "cuda/sm80/mixed_attention.cuh"
#include "cuda/sm90/key_maps.h"

namespace mixattn {
namespace cuda {
namespace sm90 {

constexpr int kNumConsumers = 2;  // teams of the prefill side, each with kWgmmaRows rows of an item
constexpr int kBlockThreads = (2 + kNumConsumers) * kNumThreads;

// A tile of K or V, named as sm80/tile.cuh's find_key wants it.
struct Tile {
  static constexpr int kRows = kNumConsumers * mx::kWgmmaRows;
  static constexpr int kKeys = 128;
  static constexpr int kCopiedKeys = kKeys / kNumWarps;
};

// Named barriers of the block, behind kTeamBarrier of the decodes' team.
constexpr int kConsumerBarrier = kTeamBarrier + 1;  // and the next
constexpr int kProducerBarrier = kConsumerBarrier + kNumConsumers;
constexpr int kTurnBarrier = kProducerBarrier + 1;  // and the next: a consumer's turn at the tensor cores

constexpr int kNumItems = 2;  // items whose words are kept: the one in hand and the next
constexpr uint32_t kItemBytes = 128;
constexpr uint32_t kBarrierBytes = 8;

constexpr uint32_t round_up(uint32_t bytes, uint32_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

template <int kHeadDim>
struct Layout {
  static constexpr int kPanels = (kHeadDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr uint32_t kPanelBytes = Tile::kKeys * mx::kSwizzledRowBytes;
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static constexpr int kNumSlots = kHeadDim > kPanelColumns ? 3 : 4;

  static constexpr uint32_t kItems =
      round_up(sm80::Layout<kHeadDim, typename sm80::Tiles<kHeadDim>::Small>::kBytes, kItemBytes);
  static constexpr uint32_t kFull = kItems + kNumItems * kItemBytes;          // per slot: its tile is there
  static constexpr uint32_t kEmpty = kFull + kNumSlots * kBarrierBytes;       // per slot: its tile is done with
  static constexpr uint32_t kQueryFull = kEmpty + kNumSlots * kBarrierBytes;  // the next item and its Q are there
  static constexpr uint32_t kQueryEmpty = kQueryFull + kBarrierBytes;         // Q is done with
  static constexpr uint32_t kItemEmpty = kQueryEmpty + kBarrierBytes;         // per item: its words are done with
  static constexpr uint32_t kQ = round_up(kItemEmpty + kNumItems * kBarrierBytes, mx::kSwizzledBlockBytes);
  static constexpr uint32_t kRing = kQ + kTileBytes;
  static constexpr uint32_t kBytes = kRing + kNumSlots * kTileBytes;
  static_assert(Tile::kRows == Tile::kKeys, "Q takes a tile's bytes");
  static_assert(kItemBytes >= (kFullEnd + 1) * sizeof(int32_t), "an item's words fit");
  static_assert(kBytes <= 227 * 1024, "what a block of an H100 may have");
};

template <class Shared>
MX_DEVICE Item prefill_item(int count) {
  return {mx::shared_base() + Shared::kItems + count % kNumItems * kItemBytes};
}
template <class Shared>
MX_DEVICE uint32_t item_empty(int count) {
  return mx::shared_base() + Shared::kItemEmpty + count % kNumItems * kBarrierBytes;
}

// A place in the ring, and the parity of the turn that it is used in.
template <class Shared>
struct RingPlace {
  int slot;
  int parity;

  MX_DEVICE uint32_t full() const { return mx::shared_base() + Shared::kFull + slot * kBarrierBytes; }
  MX_DEVICE uint32_t empty() const { return mx::shared_base() + Shared::kEmpty + slot * kBarrierBytes; }
  MX_DEVICE uint32_t tile() const { return mx::shared_base() + Shared::kRing + slot * Shared::kTileBytes; }
  MX_DEVICE void advance() {
    const bool is_last = slot == Shared::kNumSlots - 1;
    slot = is_last ? 0 : slot + 1;
    parity ^= is_last;
  }
};

// Address of chunk c of row r of the tile at `tile`.
template <class Shared>
MX_DEVICE uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  constexpr int kPanelChunks = mx::kSwizzledRowBytes / mx::kVectorBytes;
  return sm80::chunk_address<mx::kSwizzledRowBytes>(tile + chunk / kPanelChunks * Shared::kPanelBytes, row,
                                                    chunk % kPanelChunks);
}

constexpr int kUnrolledCopies = 4;  // all of them at once take more registers than a producer has

// Lanes that copy a row, and those of them that have a chunk of it.
template <int kHeadDim>
constexpr int kRowChunks = kHeadDim * sm80::kElementBytes / mx::kVectorBytes;
template <int kHeadDim>
constexpr int kRowLanes = sm80::power_of_two_from(kRowChunks<kHeadDim>);

// Starts the copy of this warp's part of a tile of K or V, place being what find_key gave for it. Keys outside of the
// item become 0, not what memory holds there: 0 * NaN would be NaN.
template <class T, int kHeadDim>
MX_DEVICE void copy_keys(const sm80::Cache<T>& cache, Item item, const sm80::KeyPlace& place, uint32_t tile,
                         int32_t tile_begin) {
  const Thread thread = this_thread();
  constexpr int kRowsAtOnce = mx::kWarpSize / kRowLanes<kHeadDim>;
  const int64_t offset = place.page * cache.page_stride + place.slot * cache.token_stride +
                         item[kKvHead] * cache.head_stride;  // may pass 2^31
  const int lane_row = thread.lane / kRowLanes<kHeadDim>;
  const int chunk = thread.lane % kRowLanes<kHeadDim>;
  const int first_row = thread.warp * Tile::kCopiedKeys + lane_row;
  const uint32_t to = mx::opaque(chunk_address<Layout<kHeadDim>>(tile, first_row, chunk));
  const int32_t kv_begin = item[kKvBegin];
  const int32_t kv_end = item[kKvEnd];
  MX_UNROLL_BY(kUnrolledCopies)
  for (int i = 0; i < Tile::kCopiedKeys / kRowsAtOnce; ++i) {
    const int64_t row_offset = mx::shfl_idx(offset, i * kRowsAtOnce + lane_row);
    const int32_t key = tile_begin + first_row + i * kRowsAtOnce;
    if (chunk >= kRowChunks<kHeadDim>) continue;
    mx::cp_async16(sm80::row_below<mx::kSwizzledRowBytes>(to, i * kRowsAtOnce),
                   cache.data + (row_offset + chunk * kVectorElements), key >= kv_begin && key < kv_end);
  }
}

// Starts the loads of this warp's part of a tile of K or V that is whole, place being what find_key gave for it, and
// arrives at the tile's barrier for all that it promises. A box has a power of two of slots, from half a warp's keys to
// all of the tile's: it is for the warp that has its first key to load.
template <int kHeadDim>
MX_DEVICE void load_keys(const mx::TensorMap& map, int32_t box_slots, Item item, const sm80::KeyPlace& place,
                         uint32_t tile, uint32_t barrier) {
  using Shared = Layout<kHeadDim>;
  const Thread thread = this_thread();
  // What a load is told must be the same in all lanes: from shuffles the compiler knows that it is.
  const int first_key = mx::shfl_idx(thread.warp, 0) * Tile::kCopiedKeys;
  const int32_t first_page = mx::shfl_idx(place.page, 0);
  const int32_t first_slot = mx::shfl_idx(place.slot, 0);
  const int32_t second_page = mx::shfl_idx(place.page, kLeastBoxSlots);
  const int32_t second_slot = mx::shfl_idx(place.slot, kLeastBoxSlots);
  const bool is_first_of_box = (first_key & (box_slots - 1)) == 0;
  const int num_keys = box_slots > Tile::kCopiedKeys ? box_slots : Tile::kCopiedKeys;
  if (thread.lane != 0 || !is_first_of_box) return mx::mbarrier_arrive(barrier);
  // Before the loads: a phase whose bytes were not promised could end without them.
  mx::mbarrier_arrive_expect(barrier, num_keys * Shared::kPanels * mx::kSwizzledRowBytes);
  const int32_t kv_head = item[kKvHead];
  const uint32_t to = tile + first_key * mx::kSwizzledRowBytes;
  MX_UNROLL
  for (int panel = 0; panel < Shared::kPanels; ++panel) {
    const uint32_t panel_to = to + panel * Shared::kPanelBytes;
    const int column = panel * kPanelColumns;  // past head_dim is 0
    mx::load_box(panel_to, map, column, kv_head, first_slot, first_page, barrier);
    if (box_slots > kLeastBoxSlots) continue;
    mx::load_box(panel_to + kLeastBoxSlots * mx::kSwizzledRowBytes, map, column, kv_head, second_slot, second_page,
                 barrier);
  }
}

// Starts the copy of the item's rows of Q; rows past its last become 0.
template <class T, int kHeadDim>
MX_DEVICE void copy_queries(const LaunchParams& p, Item item, uint32_t tile) {
  const Thread thread = this_thread();
  constexpr int kRowsAtOnce = kNumThreads / kRowLanes<kHeadDim>;
  const int chunk = thread.idx % kRowLanes<kHeadDim>;
  const int32_t num_rows = item[kNumRows];
  const int32_t first_token = item[kFirstToken];
  const int32_t kv_head = item[kKvHead];
  const int32_t row_begin = item[kRowBegin];
  if (chunk >= kRowChunks<kHeadDim>) return;
  MX_NO_UNROLL
  for (int row = thread.idx / kRowLanes<kHeadDim>; row < Tile::kRows; row += kRowsAtOnce) {
    const bool is_row = row < num_rows;
    const RowPlace place = place_row(p, first_token, kv_head, row_begin + (is_row ? row : 0));
    const T* const source =
        static_cast<const T*>(p.call.q) + place.token * p.call.q_token_stride + place.head * p.call.q_head_stride;
    mx::cp_async16(chunk_address<Layout<kHeadDim>>(tile, row, chunk), source + chunk * kVectorElements, is_row);
  }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace mixattn
