// emulated_amx.h: the tile instructions of AMX as plain C++, for CPUs with AVX512_BF16 and no AMX: slow, for tests.
// Method  Tiles are arrays of their thread. What an instruction would fault at, and what the CPU would do silently but
//         no kernel of ours wants (a tile of no rows), ends the process with a message. TDPBF16PS sums the even and the
//         odd elements of its up to 16 pairs apart, by fused multiply-adds, adds both sums, then the result to C;
//         subnormal numbers are 0 before and after each of these steps
// Source  Intel SDM volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TDPBSUD
#pragma once

#include <float.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace mixattn {
namespace {
namespace emulated_amx {

constexpr int kNumTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;  // of palette 1

struct Tile {
  int rows, row_bytes;  // 0: not configured
  alignas(64) uint8_t data[kMaxRows][kMaxRowBytes];
};

inline Tile* tiles() {
  static thread_local Tile tiles[kNumTiles];
  return tiles;
}

inline void require(bool holds, const char* instruction, const char* what) {
  if (holds) return;
  fprintf(stderr, "emulated AMX: %s: %s\n", instruction, what);
  abort();
}

inline Tile* configured(int tile, const char* instruction) {
  require(tile >= 0 && tile < kNumTiles, instruction, "there are the tiles 0 to 7");
  require(tiles()[tile].rows > 0, instruction, "the tile is not configured");
  return tiles() + tile;
}

inline void load_config(const void* config) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(config);  // palette, start row, 14 of 0, row bytes, rows
  require(bytes[0] == 1, "ldtilecfg", "the palette is not 1");
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "ldtilecfg", "the start row or a reserved byte is not 0");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    const int rows = bytes[48 + i];
    require(row_bytes <= kMaxRowBytes && rows <= kMaxRows, "ldtilecfg", "a tile has more than 16 rows of 64 bytes");
    require((rows == 0) == (row_bytes == 0), "ldtilecfg", "a tile has rows or bytes only");
    require(i < kNumTiles || rows == 0, "ldtilecfg", "a tile from 8 on has rows");
    if (i < kNumTiles) tiles()[i] = {rows, row_bytes, {}};
  }
}

inline void release() {
  for (int i = 0; i < kNumTiles; ++i) tiles()[i] = {};
}

inline void zero(int tile) {
  memset(configured(tile, "tilezero")->data, 0, sizeof(Tile::data));
}

inline void load(int tile, const void* base, int64_t stride) {
  Tile* const to = configured(tile, "tileloadd");
  memset(to->data, 0, sizeof(to->data));
  for (int r = 0; r < to->rows; ++r) {
    memcpy(to->data[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(to->row_bytes));
  }
}

inline void store(int tile, void* base, int64_t stride) {
  const Tile* const from = configured(tile, "tilestored");
  for (int r = 0; r < from->rows; ++r) {
    memcpy(static_cast<char*>(base) + r * stride, from->data[r], static_cast<size_t>(from->row_bytes));
  }
}

inline float flush(float x) {
  return __builtin_fabsf(x) < FLT_MIN ? __builtin_copysignf(0.0f, x) : x;
}

inline float multiply_add(float a, float b, float c) {
  return flush(__builtin_fmaf(flush(a), flush(b), flush(c)));
}

inline float low_bfloat16(uint32_t word) {
  word <<= 16;
  float x;
  memcpy(&x, &word, sizeof(x));
  return x;
}

inline float high_bfloat16(uint32_t word) {
  return low_bfloat16(word >> 16);
}

// The tiles of c (rows, columns) += a (rows, depth) b (depth, columns), all in words.
struct Product {
  Tile* c;
  const Tile *a, *b;
  int rows, columns, depth;
};

inline Product product(int c, int a, int b, const char* instruction) {
  require(c != a && c != b && a != b, instruction, "a tile comes twice");
  const Product p{configured(c, instruction), configured(a, instruction), configured(b, instruction), tiles()[c].rows,
                  tiles()[c].row_bytes / 4,   tiles()[a].row_bytes / 4};
  require(p.c->row_bytes % 4 == 0 && p.a->row_bytes % 4 == 0 && p.b->row_bytes % 4 == 0, instruction, "half a word");
  require(p.a->rows == p.rows, instruction, "a and c differ in rows");
  require(p.b->row_bytes == p.c->row_bytes, instruction, "b and c differ in columns");
  require(p.b->rows == p.depth, instruction, "a and b differ in depth");
  return p;
}

inline void multiply_bfloat16(int c, int a, int b) {
  const Product p = product(c, a, b, "tdpbf16ps");
  for (int r = 0; r < p.rows; ++r) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < p.depth; ++k) {
      uint32_t x, y[16];
      memcpy(&x, p.a->data[r] + 4 * k, sizeof(x));
      memcpy(y, p.b->data[k], sizeof(y));
      for (int n = 0; n < 16; ++n) {
        even[n] = multiply_add(low_bfloat16(x), low_bfloat16(y[n]), even[n]);
        odd[n] = multiply_add(high_bfloat16(x), high_bfloat16(y[n]), odd[n]);
      }
    }
    memcpy(sum, p.c->data[r], sizeof(sum));
    for (int n = 0; n < p.columns; ++n) sum[n] = flush(flush(sum[n]) + flush(even[n] + odd[n]));
    memcpy(p.c->data[r], sum, sizeof(sum));
  }
}

inline void multiply_signed_unsigned_bytes(int c, int a, int b) {
  const Product p = product(c, a, b, "tdpbsud");
  for (int r = 0; r < p.rows; ++r) {
    int32_t sum[16];
    memcpy(sum, p.c->data[r], sizeof(sum));
    for (int k = 0; k < 4 * p.depth; ++k) {
      const int x = static_cast<int8_t>(p.a->data[r][k]);
      for (int n = 0; n < p.columns; ++n) sum[n] += x * p.b->data[k / 4][4 * n + k % 4];
    }
    memcpy(p.c->data[r], sum, sizeof(sum));
  }
}

}  // namespace emulated_amx
}  // namespace
}  // namespace mixattn

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig mixattn::emulated_amx::load_config
#define _tile_release mixattn::emulated_amx::release
#define _tile_zero mixattn::emulated_amx::zero
#define _tile_loadd mixattn::emulated_amx::load
#define _tile_stored mixattn::emulated_amx::store
#define _tile_dpbf16ps mixattn::emulated_amx::multiply_bfloat16
#define _tile_dpbsud mixattn::emulated_amx::multiply_signed_unsigned_bytes
