// vec_types.h: what every ISA's vectors are made from: element types, and how memory is asked for; a part of vec.h.
#pragma once

#include <stdint.h>
#include <string.h>

#define MIXATTN_INLINE static inline __attribute__((always_inline))

namespace mixattn {
namespace {

// Element types as they lie in memory; those of a byte and less are in vec_quantized.h.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int4Pair {  // two elements of KvDType::kInt4
  uint8_t bits;
};

// Where element d of the row is; of an Int4Pair row d is even.
template <typename T>
MIXATTN_INLINE const T* element_at(const T* row, int64_t d) {
  return row + d;
}
MIXATTN_INLINE const Int4Pair* element_at(const Int4Pair* row, int64_t d) {
  return row + d / 2;
}

MIXATTN_INLINE void prefetch(const void* p) {  // into L1
  __builtin_prefetch(p, 0, 3);
}
MIXATTN_INLINE void prefetch_far(const void* p) {  // into L2, whose miss buffers are more than L1's
  __builtin_prefetch(p, 0, 2);
}

// Of what is read once only: into L1, not to be kept further out.
MIXATTN_INLINE void prefetch_once(const void* p) {
  __builtin_prefetch(p, 0, 0);
}

}  // namespace
}  // namespace mixattn
