// rows.cuh: a head's row dealt to lanes, 8 neighbouring dimensions of 16 bits to each: 16 bytes.
#pragma once

#include "common/work_item.h"
#include "cuda/prim.cuh"

namespace mixattn {
namespace cuda {

constexpr int kLaneElements = 8;

// A power of two, so that a warp holds whole rows.
MIXATTN_HD inline int lanes_per_row(int64_t head_dim) {
  int lanes = 1;
  while (lanes * kLaneElements < head_dim) lanes *= 2;
  return lanes;
}

template <class T>
MX_DEVICE void unpack_row(const mx::Words4& words, float (&x)[kLaneElements]) {
  MX_UNROLL
  for (int i = 0; i < 4; ++i) {
    const mx::float2 pair = mx::unpack2(words.word[i], T{});
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// Each rounded to nearest even.
template <class T>
MX_DEVICE mx::Words4 pack_row(const float (&x)[kLaneElements]) {
  mx::Words4 words;
  MX_UNROLL
  for (int i = 0; i < 4; ++i) words.word[i] = mx::pack2(x[2 * i], x[2 * i + 1], T{});
  return words;
}

}  // namespace cuda
}  // namespace mixattn
