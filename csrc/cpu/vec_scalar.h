// vec_scalar.h: any CPU, the compiler's 4-lane vectors; a part of vec.h, which says what may include it.
#pragma once

#include "cpu/vec_types.h"

namespace mixattn {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kNumRegisters = 16;  // of x86-64
constexpr int kTileRows = 6;       // as for AVX2

MIXATTN_INLINE float to_float(float x) {
  return x;
}
MIXATTN_INLINE float to_float(int8_t x) {
  return static_cast<float>(x);
}
MIXATTN_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
MIXATTN_INLINE float to_float(Float16 x) {
  // Exponent and mantissa moved into place and multiplied by 2^112, which renormalises subnormals; Inf and NaN get the
  // rest of their exponent by hand.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float result;
  memcpy(&result, &bits, sizeof(result));
  result *= 0x1p112f;
  memcpy(&bits, &result, sizeof(bits));
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
MIXATTN_INLINE void from_float(float x, float* p) {
  *p = x;
}
MIXATTN_INLINE void from_float(float x, BFloat16* p) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = x != x ? bits | 0x00400000 : bits + 0x7fff + ((bits >> 16) & 1);
  p->bits = static_cast<uint16_t>(bits >> 16);
}
MIXATTN_INLINE void from_float(float x, Float16* p) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {  // NaN, kept quiet
    half = 0x7e00 | ((bits >> 13) & 0x3ff);
  } else if (bits >= 0x477ff000) {  // 65520, the first float32 that rounds to infinity
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: subnormal; adding 0.5 leaves its rounded mantissa in the low bits
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

MIXATTN_INLINE Vec zero() {
  return Vec{0, 0, 0, 0};
}
MIXATTN_INLINE Vec broadcast(float x) {
  return Vec{x, x, x, x};
}
template <typename T>
MIXATTN_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
MIXATTN_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
MIXATTN_INLINE IntVec load_words(const void* p) {
  IntVec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
MIXATTN_INLINE void store_words(void* p, IntVec x) {
  memcpy(p, &x, sizeof(x));
}
MIXATTN_INLINE IntVec broadcast_word(int32_t x) {
  return IntVec{x, x, x, x};
}
MIXATTN_INLINE IntVec add_words(IntVec a, IntVec b) {
  return a + b;
}
MIXATTN_INLINE IntVec round_to_int(Vec x) {  // to nearest, ties to even, for |x| < 2^22
  return __builtin_convertvector((x + 0x1.8p23f) - 0x1.8p23f, IntVec);
}
MIXATTN_INLINE void store_low_bytes(int8_t* p, IntVec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
}
MIXATTN_INLINE IntVec low_nibbles(IntVec x) {
  return x & 0x0f0f0f0f;
}
MIXATTN_INLINE IntVec high_nibbles(IntVec x) {
  return low_nibbles(x >> 4);
}
MIXATTN_INLINE Vec int_to_float(IntVec x) {
  return __builtin_convertvector(x, Vec);
}
constexpr int kByteZero = 0;
MIXATTN_INLINE IntVec add_byte_products(IntVec sum, IntVec unsigned_bytes, IntVec signed_bytes) {
  for (int i = 0; i < 32; i += 8) sum += ((unsigned_bytes >> i) & 0xff) * ((signed_bytes << (24 - i)) >> 24);
  return sum;
}
template <int kByte>
MIXATTN_INLINE Vec load_bytes(const uint32_t* p) {
  const IntVec words = load_words(p);
  const IntVec bytes = kByte == 3 ? (words >> 24) & 0xff : words & (0xff << (8 * (kByte % 3)));
  return __builtin_convertvector(bytes, Vec);
}
template <int kNibble>
MIXATTN_INLINE Vec load_nibbles(const uint32_t* p) {
  IntVec words;
  memcpy(&words, p, sizeof(words));
  const IntVec nibbles = kNibble == 7 ? (words >> 28) & 0xf : words & (0xf << (4 * (kNibble % 7)));
  return __builtin_convertvector(nibbles, Vec);
}
template <typename T>
MIXATTN_INLINE void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
}
MIXATTN_INLINE void store(float* p, Vec x) {
  memcpy(p, &x, sizeof(x));
}
MIXATTN_INLINE void keep_in_register(Vec*) {}
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "load_even_odd takes the lower address for the lower half");
MIXATTN_INLINE void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  IntVec both;
  memcpy(&both, p, sizeof(both));
  *even = (Vec)(both << 16);
  *odd = (Vec)(both & static_cast<int32_t>(0xffff0000));
}
MIXATTN_INLINE void interleave(Vec even, Vec odd, Vec* first, Vec* second) {
  *first = Vec{even[0], odd[0], even[1], odd[1]};
  *second = Vec{even[2], odd[2], even[3], odd[3]};
}
MIXATTN_INLINE void deinterleave(Vec first, Vec second, Vec* even, Vec* odd) {
  *even = Vec{first[0], first[2], second[0], second[2]};
  *odd = Vec{first[1], first[3], second[1], second[3]};
}
template <typename T>
Vec load_half(const T* p);  // declared only, as for AVX2
template <typename T>
void store_half(T* p, Vec x);

template <typename T>
MIXATTN_INLINE void transpose8(const T* const* rows, int64_t offset, float* dst, int64_t stride) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; j += kLanes) {
      const Vec x = load(element_at(rows[i], offset + j));
      for (int lane = 0; lane < kLanes; ++lane) dst[(j + lane) * stride + i] = x[lane];
    }
  }
}

MIXATTN_INLINE Vec add(Vec a, Vec b) {
  return a + b;
}
MIXATTN_INLINE Vec sub(Vec a, Vec b) {
  return a - b;
}
MIXATTN_INLINE Vec mul(Vec a, Vec b) {
  return a * b;
}
MIXATTN_INLINE Vec div(Vec a, Vec b) {
  return a / b;
}
MIXATTN_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
MIXATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
  return a * b + c;
}
MIXATTN_INLINE Vec abs(Vec x) {
  return (Vec)((IntVec)x & 0x7fffffff);
}
MIXATTN_INLINE Vec copy_sign(Vec magnitude, Vec sign) {  // magnitude >= 0
  return (Vec)((IntVec)magnitude | ((IntVec)sign & INT32_MIN));
}
MIXATTN_INLINE Vec select_less(Vec x, Vec bound, Vec then, Vec otherwise) {
  return x < bound ? then : otherwise;
}
MIXATTN_INLINE Vec add_to_exponent(Vec x, Vec n) {
  return (Vec)((IntVec)x + ((IntVec)n << 23));
}
MIXATTN_INLINE float first_lane(Vec x) {
  return x[0];
}
MIXATTN_INLINE float max_lanes(Vec x) {
  const float a = x[0] > x[1] ? x[0] : x[1];
  const float b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
MIXATTN_INLINE float sum_lanes(Vec x) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}
MIXATTN_INLINE void sum_each(const Vec (&x)[8], float* out) {
  for (int i = 0; i < 8; ++i) out[i] = sum_lanes(x[i]);
}

}  // namespace
}  // namespace mixattn
