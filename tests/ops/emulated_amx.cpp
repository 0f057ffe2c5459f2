// emulated_amx.cpp: one use or misuse of the emulated tiles, by the name that is its argument.
// Method  A program, because a misuse ends it. Of a use it prints the words of the first row of c.
#include "cpu/emulated_amx.h"

#include <string>

namespace {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  Config& tile(int i, int num_rows, int num_bytes) {
    rows[i] = static_cast<uint8_t>(num_rows);
    row_bytes[i] = static_cast<uint16_t>(num_bytes);
    return *this;
  }
};

// c (1, 2 words) = a (1, 2 words) b (2, 2 words).
Config small() {
  return Config().tile(0, 1, 8).tile(1, 1, 8).tile(2, 2, 8);
}

uint32_t pair(float even, float odd) {
  uint32_t words[2];
  const float floats[2] = {even, odd};
  memcpy(words, floats, sizeof(words));
  return words[0] >> 16 | (words[1] & 0xffff0000u);
}

void load(const uint32_t (&c)[2], const uint32_t (&a)[2], const uint32_t (&b)[2][2]) {
  const Config config = small();
  _tile_loadconfig(&config);
  _tile_loadd(0, c, 8);
  _tile_loadd(1, a, 8);
  _tile_loadd(2, b, 8);
}

void print() {
  uint32_t row[2];
  _tile_stored(0, row, 8);
  printf("%08x %08x\n", row[0], row[1]);
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  const uint32_t ones = pair(1, 1), nothing[2] = {};
  Config config = small();
  char data[1024] = {};
  if (name == "even-and-odd-are-summed-apart") {
    load({nothing[0], nothing[1]}, {pair(1, 0x1p-24f), pair(-1, 0x1p-24f)}, {{ones, ones}, {ones, 0}});
    _tile_dpbf16ps(0, 1, 2);
    print();
  } else if (name == "subnormal-is-zero") {
    load({1, 0x80000001}, {pair(0x1p-127f, 0x1p-64f), 0}, {{pair(0x1p64f, 0x1p-64f), 0}, {0, 0}});
    _tile_dpbf16ps(0, 1, 2);
    print();
  } else if (name == "signed-times-unsigned") {
    load({5, 0}, {0x80ff017f, 0x02}, {{0xffffffff, 0x01000000}, {0x03, 0}});
    _tile_dpbsud(0, 1, 2);
    print();
  } else if (name == "no-config") {
    _tile_zero(0);
  } else if (name == "released") {
    _tile_loadconfig(&config);
    _tile_release();
    _tile_loadd(1, data, 8);
  } else if (name == "other-tile") {
    _tile_loadconfig(&config);
    _tile_stored(3, data, 8);
  } else if (name == "palette") {
    config.palette = 0;
    _tile_loadconfig(&config);
  } else if (name == "too-many-rows") {
    _tile_loadconfig(&config.tile(0, 17, 8));
  } else if (name == "too-long-rows") {
    _tile_loadconfig(&config.tile(0, 1, 68));
  } else if (name == "depth") {
    _tile_loadconfig(&config.tile(1, 1, 4));
    _tile_dpbf16ps(0, 1, 2);
  } else if (name == "rows") {
    _tile_loadconfig(&config.tile(1, 2, 8));
    _tile_dpbf16ps(0, 1, 2);
  } else if (name == "columns") {
    _tile_loadconfig(&config.tile(2, 2, 4));
    _tile_dpbsud(0, 1, 2);
  } else if (name == "twice") {
    _tile_loadconfig(&config);
    _tile_dpbsud(0, 1, 1);
  }
  return 0;
}
