// primitive_entries.h: entry points of the kernels in primitives.cuh that are right, so that a driver finds them by
// name; for nvcc and the emulation alike.
#pragma once

#include "cuda/prim.cuh"

// In this file the kernels are functions that entry points call.
#pragma push_macro("MX_KERNEL")
#undef MX_KERNEL
#define MX_KERNEL MX_DEVICE void
#include "primitives.cuh"
#pragma pop_macro("MX_KERNEL")

// X(name, kernel)
#define PRIMITIVE_ENTRIES(X)              \
  X(ldmatrix, ldmatrix<false>)            \
  X(ldmatrix_trans, ldmatrix<true>)       \
  X(mma_f16, mma<mx::f16>)                \
  X(mma_bf16, mma<mx::bf16>)              \
  X(shuffle_xor, shuffle_xor)             \
  X(shuffle_idx, shuffle_idx)             \
  X(any_lane, any_lane)                   \
  X(copy, copy<true>)                     \
  X(neighbour_sync_threads, neighbour<1>) \
  X(neighbour_bar_sync, neighbour<2>)     \
  X(arrive, arrive)                       \
  X(lanes, lanes<true>)                   \
  X(message, message<1>)                  \
  X(store_widths, store_widths)           \
  X(functions, functions)                 \
  X(pack_f16, pack<mx::f16>)              \
  X(pack_bf16, pack<mx::bf16>)            \
  X(block_size, block_size)               \
  X(move_vectors, move_vectors)           \
  X(unpack_f16, unpack<mx::f16>)          \
  X(unpack_bf16, unpack<mx::bf16>)        \
  X(rounded, rounded)                     \
  X(shared_vectors, shared_vectors)       \
  X(permute_bytes, permute_bytes)         \
  X(fma_pairs, fma_pairs)

#define PRIMITIVE_ENTRY(name, ...)                                     \
  extern "C" MX_KERNEL primitive_##name(uint32_t* in, uint32_t* out) { \
    primitives::__VA_ARGS__(in, out);                                  \
  }
PRIMITIVE_ENTRIES(PRIMITIVE_ENTRY)
