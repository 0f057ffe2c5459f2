// vec.h: one float32 vector per ISA, and the few operations that the CPU kernels are written in.
// Method  A file compiled for one ISA defines MIXATTN_ISA_AVX512, _AVX2, _NEON or _SCALAR and includes this, which
//         takes Vec and its operations from vec_<isa>.h and adds what is the same for all.
//         SCALAR is the compiler's own 4-lane vector: SSE2 on x86-64, NEON on aarch64, plain code elsewhere.
//         AVX512 with MIXATTN_ISA_AVX512_VNNI has the products of AVX512_VNNI besides, with MIXATTN_ISA_AVX512_BF16
//         those of AVX512_BF16, too; AVX2 with MIXATTN_ISA_AVX2_VNNI those of AVX_VNNI, under
//         MIXATTN_EMULATED_AVX_VNNI as AVX512_VNNI has them: for tests. NEON with MIXATTN_ISA_NEON_BF16 has those of
//         BF16 and I8MM.
//         With MIXATTN_ISA_AMX products of many rows go by tiles (amx_tile-inl.h), besides; under
//         MIXATTN_EMULATED_AMX on CPUs without AMX, slowly: for tests.
//         AVX-512 under MIXATTN_SIMDE runs on any x86-64 through SIMDe, slowly: for tests of that path.
// Hazard  Everything here, and everything that includes it, is internal to its file (anonymous namespace, no std
//         templates): an inline function that the linker shares between files could be the AVX copy on a CPU without.
#pragma once

#if defined(MIXATTN_ISA_AVX512)
#include "cpu/vec_avx512.h"
#elif defined(MIXATTN_ISA_AVX2)
#include "cpu/vec_avx2.h"
#elif defined(MIXATTN_ISA_NEON)
#include "cpu/vec_neon.h"
#elif defined(MIXATTN_ISA_SCALAR)
#include "cpu/vec_scalar.h"
#else
#error "define MIXATTN_ISA_AVX512, MIXATTN_ISA_AVX2, MIXATTN_ISA_NEON or MIXATTN_ISA_SCALAR before vec.h"
#endif

namespace mixattn {
namespace {

#if !defined(MIXATTN_HAS_SHARED_WORDS)
// The 4 bytes at p as the operand of products with every lane of another.
typedef IntVec SharedWord;
MIXATTN_INLINE SharedWord load_shared_word(const void* p) {
  int32_t word;
  memcpy(&word, p, sizeof(word));
  return broadcast_word(word);
}
#endif

#if !defined(MIXATTN_HAS_INT16_NIBBLE_SUMS)
// Products of a block's nibbles with signed bytes, summed up from `start` on: sums are begun, grow, and end as int32.
// kNibbleZero is what the products take from a nibble, as kByteZero from a byte.
constexpr int kNibbleZero = kByteZero;
MIXATTN_INLINE IntVec begin_nibble_sums(int32_t start) {
  return broadcast_word(start);
}
MIXATTN_INLINE IntVec add_nibble_products(IntVec sum, IntVec nibbles, SharedWord signed_bytes) {
  return add_byte_products(sum, nibbles, signed_bytes);
}
MIXATTN_INLINE IntVec end_nibble_sums(IntVec sum, int32_t) {
  return sum;
}
#endif

// 2 kLanes elements as two vectors, in whatever order costs least, the same at every call for one T: sums over elements
// do not care. bfloat16 takes even and odd elements apart, one operation per vector where widening takes two.
template <typename T>
MIXATTN_INLINE void load_pair(const T* p, Vec* a, Vec* b) {
  *a = load(p);
  *b = load(p + kLanes);
}
MIXATTN_INLINE void load_pair(const BFloat16* p, Vec* a, Vec* b) {
  load_even_odd(p, a, b);
}

// The two vectors that load_pair of this type made, or what was computed from them, in the order of memory.
MIXATTN_INLINE void restore_pair(const BFloat16*, Vec* a, Vec* b) {
  interleave(*a, *b, a, b);
}
MIXATTN_INLINE void restore_pair(const void*, Vec*, Vec*) {}

// The reverse: two vectors in the order of memory as load_pair of this type would give them.
MIXATTN_INLINE void split_pair(const BFloat16*, Vec* a, Vec* b) {
  deinterleave(*a, *b, a, b);
}
MIXATTN_INLINE void split_pair(const void*, Vec*, Vec*) {}

// What load_nibbles<kNibble>, the unsigned value of bits [4 kNibble, 4 kNibble + 4) of each word where it stands, is to
// be multiplied with. Left in place it needs no shift, but for the highest, which would be a sign.
template <int kByte>
constexpr float byte_unit() {  // and load_bytes, which shifts byte 3 only
  return kByte == 3 ? 1.0f : 1.0f / static_cast<float>(int64_t{1} << (8 * kByte));
}
template <int kNibble>
constexpr float nibble_unit() {
  return kNibble == 7 ? 1.0f : 1.0f / static_cast<float>(int64_t{1} << (4 * kNibble));
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

#if !defined(MIXATTN_HAS_EXP2)
// 2^x for x <= 0; 0 below -126, -inf included; NaN stays NaN. 2^x = 2^n 2^f with n = round(x), |f| <= 1/2, and 2^f from
// a minimax polynomial of degree 6 with value 1 at 0 (Remez, relative error 2.6e-9). In float32 the largest error over
// all x in [-126, 0] is 1.0 ulp (1.2e-7 relative) with FMA, 1.2 ulp without.
MIXATTN_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec shift = broadcast(0x1.8p23f);  // pushes the fraction out of the mantissa: n is left in the low bits
  const Vec shifted = add(x, shift);
  const Vec f = sub(x, sub(shifted, shift));
  Vec p = broadcast(1.54614446986e-4f);
  p = fmadd(p, f, broadcast(1.34004281776e-3f));
  p = fmadd(p, f, broadcast(9.61805667852e-3f));
  p = fmadd(p, f, broadcast(5.55032722667e-2f));
  p = fmadd(p, f, broadcast(2.40226509223e-1f));
  p = fmadd(p, f, broadcast(6.93147206703e-1f));
  p = fmadd(p, f, broadcast(1.0f));
  return select_less(x, broadcast(-126.0f), zero(), add_to_exponent(p, shifted));
}
#endif

// tanh(x): below 0.625 x + x^3 P(x^2), P minimax of degree 4 (Remez, relative error 4.4e-9), so that small arguments
// keep their relative accuracy; above (1 - e) / (1 + e) with e = exp(-2 |x|).
MIXATTN_INLINE Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec e = exp2_nonpositive(mul(magnitude, broadcast(-2.0f * kLog2E)));
  const Vec large = copy_sign(div(sub(broadcast(1.0f), e), add(broadcast(1.0f), e)), x);
  const Vec square = mul(x, x);
  Vec p = broadcast(-5.70498795486e-3f);
  p = fmadd(p, square, broadcast(2.06390881102e-2f));
  p = fmadd(p, square, broadcast(-5.373971535e-2f));
  p = fmadd(p, square, broadcast(1.33314422013e-1f));
  p = fmadd(p, square, broadcast(-3.33332819421e-1f));
  const Vec small = fmadd(mul(p, square), x, x);
  return select_less(magnitude, broadcast(0.625f), small, large);
}

}  // namespace
}  // namespace mixattn
