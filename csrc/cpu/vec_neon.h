// vec_neon.h: NEON with dot products of bytes (ARMv8.2), 4 lanes and 32 registers; a part of vec.h, which says what may
// include it. With MIXATTN_ISA_NEON_BF16 the products of BF16 and I8MM (ARMv8.6) besides.
// Source  Arm Architecture Reference Manual DDI 0487, C7.2: BFDOT, SDOT, USDOT; Arm C Language Extensions, IHI 0073
#pragma once

#include <arm_neon.h>

#include "cpu/vec_types.h"

namespace mixattn {
namespace {

typedef float32x4_t Vec;
typedef int32x4_t IntVec;
constexpr int kLanes = 4;
constexpr int kNumRegisters = 32;
// 8 rows x 8 columns: 16 accumulators keep 4 pipes (Neoverse V) busy over 4 cycles of latency, and beside 2 columns and
// the broadcasts no register is short; 10 loads feed 16 FMAs, 3.3 cycles of 3 load pipes against 4 of the FMA pipes.
// 8 divides the planner's row tiles.
constexpr int kTileRows = 8;

// Bits as they lie in memory, aligned or not.
template <typename Bits>
MIXATTN_INLINE Bits load_bits(const void* p) {
  Bits bits;
  memcpy(&bits, p, sizeof(bits));
  return bits;
}

MIXATTN_INLINE Vec zero() {
  return vdupq_n_f32(0.0f);
}
MIXATTN_INLINE Vec broadcast(float x) {
  return vdupq_n_f32(x);
}
MIXATTN_INLINE Vec load(const float* p) {
  return vld1q_f32(p);
}
MIXATTN_INLINE Vec load(const BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
MIXATTN_INLINE Vec load(const Float16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
MIXATTN_INLINE Vec load(const int8_t* p) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(load_bits<uint32_t>(p))));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
template <int kByte>
MIXATTN_INLINE Vec load_bytes(const uint32_t* p) {
  const uint32x4_t words = vld1q_u32(p);
  if (kByte == 3) return vcvtq_f32_u32(vshrq_n_u32(words, 24));
  return vcvtq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffu << (8 * (kByte % 3)))));
}
template <int kNibble>
MIXATTN_INLINE Vec load_nibbles(const uint32_t* p) {
  const uint32x4_t words = vld1q_u32(p);
  if (kNibble == 7) return vcvtq_f32_u32(vshrq_n_u32(words, 28));
  return vcvtq_f32_u32(vandq_u32(words, vdupq_n_u32(0xfu << (4 * (kNibble % 7)))));
}
MIXATTN_INLINE void keep_in_register(Vec* x) {
  __asm__("" : "+w"(*x));
}
MIXATTN_INLINE void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  *even = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
  *odd = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
}
MIXATTN_INLINE void interleave(Vec even, Vec odd, Vec* first, Vec* second) {
  *first = vzip1q_f32(even, odd);
  *second = vzip2q_f32(even, odd);
}
MIXATTN_INLINE void deinterleave(Vec first, Vec second, Vec* even, Vec* odd) {
  *even = vuzp1q_f32(first, second);
  *odd = vuzp2q_f32(first, second);
}

// Rounded to nearest even; a NaN must not round to infinity: it is kept quiet by its top mantissa bit.
MIXATTN_INLINE uint16x4_t to_bfloat16(Vec x) {
#if defined(MIXATTN_ISA_NEON_BF16)
  return vreinterpret_u16_bf16(vcvt_bf16_f32(x));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
#endif
}
MIXATTN_INLINE void store(float* p, Vec x) {
  vst1q_f32(p, x);
}
MIXATTN_INLINE void store(BFloat16* p, Vec x) {
  vst1_u16(&p->bits, to_bfloat16(x));
}
MIXATTN_INLINE void store(Float16* p, Vec x) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
// A head_dim is a multiple of 8: no half vector is ever left over. Declared for the text that all ISAs share.
template <typename T>
Vec load_half(const T* p);
template <typename T>
void store_half(T* p, Vec x);

// The pairs of two lanes of a and of b: their first ones, and their second ones.
MIXATTN_INLINE Vec first_halves(Vec a, Vec b) {
  return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
MIXATTN_INLINE Vec second_halves(Vec a, Vec b) {
  return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}

// dst[j * stride + i] = rows[i][offset + j] for i, j < 8: four squares of 4.
template <typename T>
MIXATTN_INLINE void transpose8(const T* const* rows, int64_t offset, float* dst, int64_t stride) {
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 8; j += 4) {
      Vec r[4], t[4];
      for (int n = 0; n < 4; ++n) r[n] = load(element_at(rows[i + n], offset + j));
      for (int n = 0; n < 4; n += 2) {
        t[n] = vtrn1q_f32(r[n], r[n + 1]);
        t[n + 1] = vtrn2q_f32(r[n], r[n + 1]);
      }
      float* const target = dst + j * stride + i;
      for (int n = 0; n < 2; ++n) {
        store(target + n * stride, first_halves(t[n], t[n + 2]));
        store(target + (n + 2) * stride, second_halves(t[n], t[n + 2]));
      }
    }
  }
}

MIXATTN_INLINE Vec add(Vec a, Vec b) {
  return vaddq_f32(a, b);
}
MIXATTN_INLINE Vec sub(Vec a, Vec b) {
  return vsubq_f32(a, b);
}
MIXATTN_INLINE Vec mul(Vec a, Vec b) {
  return vmulq_f32(a, b);
}
MIXATTN_INLINE Vec div(Vec a, Vec b) {
  return vdivq_f32(a, b);
}
MIXATTN_INLINE Vec max(Vec a, Vec b) {
  return vmaxq_f32(a, b);
}
MIXATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
  return vfmaq_f32(c, a, b);
}
MIXATTN_INLINE Vec abs(Vec x) {
  return vabsq_f32(x);
}
MIXATTN_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return vbslq_f32(vdupq_n_u32(0x80000000), sign, magnitude);
}
MIXATTN_INLINE Vec select_less(Vec x, Vec bound, Vec then, Vec otherwise) {
  return vbslq_f32(vcltq_f32(x, bound), then, otherwise);
}
MIXATTN_INLINE Vec add_to_exponent(Vec x, Vec n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vshlq_n_s32(vreinterpretq_s32_f32(n), 23)));
}
MIXATTN_INLINE float first_lane(Vec x) {
  return vgetq_lane_f32(x, 0);
}
MIXATTN_INLINE float max_lanes(Vec x) {
  return vmaxvq_f32(x);
}
MIXATTN_INLINE float sum_lanes(Vec x) {
  return vaddvq_f32(x);
}
template <int kCount>
MIXATTN_INLINE void sum_each(const Vec (&x)[kCount], float* out) {
  for (int i = 0; i < kCount; i += 4) {
    store(out + i, vpaddq_f32(vpaddq_f32(x[i], x[i + 1]), vpaddq_f32(x[i + 2], x[i + 3])));
  }
}

MIXATTN_INLINE IntVec load_words(const void* p) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
MIXATTN_INLINE void store_words(void* p, IntVec x) {
  vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(x));
}
MIXATTN_INLINE IntVec broadcast_word(int32_t x) {
  return vdupq_n_s32(x);
}
MIXATTN_INLINE IntVec add_words(IntVec a, IntVec b) {
  return vaddq_s32(a, b);
}
MIXATTN_INLINE Vec int_to_float(IntVec x) {
  return vcvtq_f32_s32(x);
}
MIXATTN_INLINE IntVec round_to_int(Vec x) {  // to nearest, ties to even
  return vcvtnq_s32_f32(x);
}
MIXATTN_INLINE void store_low_bytes(int8_t* p, IntVec x) {
  const int16x4_t halves = vmovn_s32(x);
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  memcpy(p, &bytes, sizeof(bytes));
}
MIXATTN_INLINE IntVec low_nibbles(IntVec x) {
  return vandq_s32(x, vdupq_n_s32(0x0f0f0f0f));
}
MIXATTN_INLINE IntVec high_nibbles(IntVec x) {
  return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4));
}
// The instructions for products of words take one lane of a register for all lanes of the other operand.
#define MIXATTN_HAS_SHARED_WORDS
typedef int32x2_t SharedWord;  // in lane 0
MIXATTN_INLINE SharedWord load_shared_word(const void* p) {
  return vcreate_s32(load_bits<uint32_t>(p));
}
// No MIXATTN_HAS_INT16_DOT: a smlal has 4 products of int16, as many as a fmla has of float32, and fewer pipes run it
// (one of N1's two, two of V1's four).
#if defined(MIXATTN_ISA_NEON_BF16)
constexpr int kByteZero = 0;
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, SharedWord signed_bytes) {
  return vusdotq_lane_s32(sum, vreinterpretq_u8_s32(unsigned_bytes), vreinterpret_s8_s32(signed_bytes), 0);
}
#else
constexpr int kByteZero = 128;  // SDOT takes signed bytes on both sides: u - 128, which is u with its top bit flipped
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, SharedWord signed_bytes) {
  const uint8x16_t flipped = veorq_u8(vreinterpretq_u8_s32(unsigned_bytes), vdupq_n_u8(0x80));
  return vdotq_lane_s32(sum, vreinterpretq_s8_u8(flipped), vreinterpret_s8_s32(signed_bytes), 0);
}
#endif

#if defined(MIXATTN_ISA_NEON_BF16)

#define MIXATTN_HAS_BFLOAT16_DOT
MIXATTN_INLINE IntVec load_int16(const int16_t* p) {
  return vreinterpretq_s32_s16(vld1q_s16(p));
}
// The two products, their sum and its sum with the lane: each sum is rounded to odd, so that it is off by less than one
// unit of its last place, and subnormal results are 0 as subnormal operands are.
MIXATTN_INLINE Vec add_bfloat16_products(Vec sum, IntVec a, IntVec b) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_s32(a), vreinterpretq_bf16_s32(b));
}
MIXATTN_INLINE Vec add_bfloat16_products(Vec sum, SharedWord a, IntVec b) {
  return vbfdotq_lane_f32(sum, vreinterpretq_bf16_s32(b), vreinterpret_bf16_s32(a), 0);
}
// Of 8 floats x, in lane l the bfloat16 of x[i] and x[i + kStep], rounded to nearest even, with i = l / kStep * 2 kStep
// + l % kStep.
template <int kStep>
MIXATTN_INLINE IntVec bfloat16_pairs(Vec first, Vec second) {
  static_assert(kStep == 1 || kStep == 2 || kStep == 4, "steps that lie in 8 floats");
  const uint16x8_t in_order = vcombine_u16(to_bfloat16(first), to_bfloat16(second));
  if (kStep == 1) return vreinterpretq_s32_u16(in_order);
  const uint32x4_t words = vreinterpretq_u32_u16(in_order);
  const uint32x4_t steps = kStep == 4 ? words : vuzp1q_u32(words, vextq_u32(words, words, 1));
  const uint16x8_t in_steps = vreinterpretq_u16_u32(steps);
  return vreinterpretq_s32_u16(vzip1q_u16(in_steps, vextq_u16(in_steps, in_steps, 4)));
}

// Pairs of keys, whose elements lie in different rows: words of x[i] and y[i] of two rows of 8 elements of 16 bits.
#define MIXATTN_HAS_PAIRED_ROWS
MIXATTN_INLINE void zip_rows(IntVec x, IntVec y, IntVec* first, IntVec* second) {
  const int16x8_t a = vreinterpretq_s16_s32(x), b = vreinterpretq_s16_s32(y);
  *first = vreinterpretq_s32_s16(vzip1q_s16(a, b));
  *second = vreinterpretq_s32_s16(vzip2q_s16(a, b));
}
MIXATTN_INLINE void restore_zipped(Vec*, Vec*) {}  // they are in order
MIXATTN_INLINE Vec as_floats(IntVec words) {       // the same bits
  return vreinterpretq_f32_s32(words);
}

#endif

}  // namespace
}  // namespace mixattn
