// primitive_entries_sm90.h: entry points of the kernels in primitives_sm90.cuh that are right, as primitive_entries.h.
#pragma once

#include "cuda/prim_sm90.cuh"
#include "primitive_entries.h"

#pragma push_macro("MX_KERNEL")
#undef MX_KERNEL
#define MX_KERNEL MX_DEVICE void
#include "primitives_sm90.cuh"
#pragma pop_macro("MX_KERNEL")

// X(name, kernel)
#define PRIMITIVE_ENTRIES_SM90(X)                                     \
  X(wgmma_64_f16, wgmma_product<64, 0, true, mx::f16>)                \
  X(wgmma_128_bf16, wgmma_product<128, 3, false, mx::bf16>)           \
  X(wgmma_registers_96_f16, wgmma_from_registers<96, 1, mx::f16>)     \
  X(wgmma_registers_128_bf16, wgmma_from_registers<128, 7, mx::bf16>) \
  X(mbarrier, mbarrier<true>)

// X(name, kernel): those that also take a map, whose tensor begins 64 bytes behind `in`.
#define PRIMITIVE_ENTRIES_BOXED(X)                \
  X(box_16, box<16, primitives::BoxFault::kNone>) \
  X(box_64, box<64, primitives::BoxFault::kNone>)

#define PRIMITIVE_BOXED_ENTRY(name, ...)                                                                         \
  extern "C" MX_KERNEL primitive_##name(const MX_GRID_CONSTANT mx::TensorMap map, uint32_t* in, uint32_t* out) { \
    primitives::__VA_ARGS__(map, in, out);                                                                       \
  }

PRIMITIVE_ENTRIES_SM90(PRIMITIVE_ENTRY)
PRIMITIVE_ENTRIES_BOXED(PRIMITIVE_BOXED_ENTRY)
