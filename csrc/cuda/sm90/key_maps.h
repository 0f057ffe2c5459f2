// key_maps.h: how K and V may come to the sm_90 kernel in boxes: slots of a page, some columns of one head. Host code.
#pragma once

#include "cuda/launch_params.h"
#include "cuda/prim_sm90.cuh"

namespace mixattn {
namespace cuda {
namespace sm90 {

constexpr int kPanelColumns = mx::kSwizzledRowBytes / 2;  // of 16-bit elements: a box's, and of a tile's panel
constexpr int kLeastBoxSlots = 16;
constexpr int kMostBoxSlots = 128;  // the keys of a tile

// Maps of K and V with the dimensions (head_dim, kv head, slot, page), whose strides rise where a cache is contiguous,
// and boxes of (kPanelColumns, 1, box_slots, 1). The kernel's second parameter: where they are part of LaunchParams,
// whose address is then taken, a tile takes consumers 17 instructions more (nvcc 13.0, head_dim 128).
struct KeyMaps {
  mx::TensorMap k;
  mx::TensorMap v;
  int32_t box_slots;  // a power of two in [kLeastBoxSlots, kMostBoxSlots]; 0: there are no maps
};

// The slots of a box for this call: the most that tile the page and a tile of keys alike. 0 where they would be few, or
// the tensors are none that cuTensorMapEncodeTiled takes; check_call has passed.
inline int32_t box_slots(const AttentionParams& p) {
  constexpr int64_t kMostSize = int64_t{1} << 32;
  constexpr int64_t kStrideLimit = (int64_t{1} << 40) / 2;  // in elements
  const int64_t slots = std::min<int64_t>(p.page_size & -p.page_size, kMostBoxSlots);
  const auto is_mapped = [](int64_t size, int64_t stride) {
    return size >= 1 && size <= kMostSize && stride > 0 && stride < kStrideLimit;
  };
  const bool are_mapped = is_mapped(p.num_kv_heads, p.k_head_stride) && is_mapped(p.num_kv_heads, p.v_head_stride) &&
                          is_mapped(p.page_size, p.k_token_stride) && is_mapped(p.page_size, p.v_token_stride) &&
                          is_mapped(p.num_pages, p.k_page_stride) && is_mapped(p.num_pages, p.v_page_stride);
  return slots >= kLeastBoxSlots && are_mapped ? static_cast<int32_t>(slots) : 0;
}

}  // namespace sm90
}  // namespace cuda
}  // namespace mixattn
