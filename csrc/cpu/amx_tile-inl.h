// amx_tile-inl.h: the tiles of AMX and their instructions, and products of bytes by them.
// Math    c += a b of pairs of bfloat16; c = a b of signed and unsigned bytes, exact
// Method  8 tiles of up to 16 rows of 16 words: 4 of c, 2 of a and 2 of b, so that 4 loads (8 clocks each) feed 4
//         products (16 clocks each). TDPBF16PS sums the even and the odd elements of 16 pairs apart, adds both sums,
//         then the result to c, where vdpbf16ps adds pair after pair to c: the last bits differ. Both take subnormal
//         numbers, in and out, for 0. Every row's sums are made so, whatever rows it lies among
// Shapes  rows of a are words, b is (depth in words, 16) words, c (rows of a, 16)
// Hazard  Tiles belong to the thread. They are configured as long as a TileRegisters lives: a thread that has none in
//         use has no tiles saved when it is interrupted. Loads do not say to the compiler what they read: it must have
//         been stored before a finish_stores(). Rows of a tile that cross cache lines take longer
// Source  Intel SDM volume 2, volume 1 chapter 18; clocks: Intel Optimization Reference Manual, chapter on AMX
#pragma once

#include "cpu/register_tile-inl.h"

#if defined(MIXATTN_EMULATED_AMX)
#include "cpu/emulated_amx.h"
#endif

namespace mixattn {
namespace cpu {
namespace {

constexpr int kAmxRows = 16;   // of a tile, and words of its rows
constexpr int kAmxBytes = 64;  // of its rows

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t reserved[15] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 for c, 4 and 5 for b, 6 and 7 for a, of which one step takes this many words of depth.
constexpr TileConfig tile_config(int depth, int rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = static_cast<uint16_t>(i < 6 ? kAmxBytes : 4 * depth);
    config.rows[i] = static_cast<uint8_t>(i < 4 || i >= 6 ? rows : depth);
  }
  return config;
}

template <int kDepth, int kRows = kAmxRows>
class TileRegisters {
 public:
  explicit TileRegisters(bool is_used = true) : is_used_(is_used) {
    if (is_used) _tile_loadconfig(&kConfig);
  }
  ~TileRegisters() {
    if (is_used_) _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  static constexpr TileConfig kConfig = tile_config(kDepth, kRows);
  bool is_used_;
};

MIXATTN_INLINE void finish_stores() {
  __asm__ volatile("" ::: "memory");
}

// The instructions. GCC's intrinsics take the number of a tile as it is written only.
#if defined(MIXATTN_EMULATED_AMX)
template <int kTile>
void zero_tile() {
  emulated_amx::zero(kTile);
}
template <int kTile>
void load_tile(const void* rows, int64_t stride) {
  emulated_amx::load(kTile, rows, stride);
}
template <int kTile>
void store_tile(void* rows, int64_t stride) {
  emulated_amx::store(kTile, rows, stride);
}
template <int kC, int kA, int kB>
void add_bfloat16_tile() {
  emulated_amx::multiply_bfloat16(kC, kA, kB);
}
template <int kC, int kA, int kB>
void add_byte_tile() {
  emulated_amx::multiply_signed_unsigned_bytes(kC, kA, kB);
}
#else
template <int kTile>
MIXATTN_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
MIXATTN_INLINE void load_tile(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(rows), "r"(stride));
}
template <int kTile>
MIXATTN_INLINE void store_tile(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(rows), "r"(stride) : "memory");
}
template <int kC, int kA, int kB>
MIXATTN_INLINE void add_bfloat16_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
MIXATTN_INLINE void add_byte_tile() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
#endif

typedef TileRegisters<8> ByteTileRegisters;

// c (16, kTileCols) = a b over a depth of 8 words, of 4 signed bytes of a, whose stride is in bytes, and 4 unsigned
// ones of b. c is for vectors to read, b was stored before a finish_stores().
MIXATTN_INLINE void multiply_byte_tile(const int8_t* a, int64_t a_stride, const void* b, int32_t* c) {
  constexpr int64_t kStride = kTileCols * sizeof(int32_t);
  zero_tile<0>();
  zero_tile<1>();
  load_tile<6>(a, a_stride);
  load_tile<4>(b, kStride);
  load_tile<5>(static_cast<const char*>(b) + kAmxBytes, kStride);
  add_byte_tile<0, 6, 4>();
  add_byte_tile<1, 6, 5>();
  store_tile<0>(c, kStride);
  store_tile<1>(c + kLanes, kStride);
}

}  // namespace
}  // namespace cpu
}  // namespace mixattn
