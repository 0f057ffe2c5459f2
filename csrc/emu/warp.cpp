// warp.cpp: what the 32 lanes of a warp do together. The last lane to come does the work of all.

#include "emu/machine.h"

namespace emu {
namespace {

float bfloat16_value(uint16_t bits) {
  return from_bits<float>(uint64_t{bits} << 16);
}

}  // namespace

void collective(const char* name, void* argument, Site site, const std::function<void(void**)>& act) {
  Warp& warp = *current->warp;
  if (warp.arrived == 0) {
    warp.collective = name;
    warp.site = site;
  } else if (warp.site.line != site.line || strcmp(warp.site.file, site.file) != 0) {
    fail(std::string("divergent warp: ") + name + ", while other lanes wait in " + warp.collective + " of line " +
             std::to_string(warp.site.line),
         site);
  }
  warp.argument[current->lane()] = argument;
  warp.arrived |= 1u << current->lane();
  if (warp.arrived != kAllLanes) {
    block_on(name, site);
    return;
  }
  warp.arrived = 0;
  close_accesses();
  act(warp.argument);
  for_each_lane([](Thread& lane) {
    if (&lane != current) wake(&lane);
  });
}

void release_lane() {
  if (current->warp->arrived == 0) {
    current->warp->order.release_anew();
  } else {
    current->warp->order.release();
  }
}

void acquire_lanes() {
  for_each_lane([](const Thread& lane) { acquire(lane, current->warp->order); });
}

void for_each_lane(const std::function<void(Thread&)>& act) {
  const size_t lane_0 = size_t(current->block->idx) * machine.num_threads + (current->idx - current->lane());
  for (int l = 0; l < kWarpSize; ++l) act(*machine.threads[lane_0 + l]);
}

float element_value(uint16_t bits, Element element) {
  return element == Element::kFloat16 ? float16_value(bits) : bfloat16_value(bits);
}

void sync_warp(Site site) {
  sanitizer::Quiet quiet;
  maybe_yield();
  release_lane();
  collective("sync_warp", nullptr, site, [](void**) { acquire_lanes(); });
}

uint64_t shuffle(uint64_t value, int source_lane, Site site) {
  sanitizer::Quiet quiet;
  struct Argument {
    uint64_t value, result;
    int source_lane;
  } argument = {value, 0, source_lane};
  if (source_lane < 0 || source_lane >= kWarpSize) {
    fail("a shuffle's lane must be in [0, 32), got " + std::to_string(source_lane), site);
  }
  collective("shuffle", &argument, site, [](void** lanes) {
    for (int l = 0; l < kWarpSize; ++l) {
      Argument& to = *static_cast<Argument*>(lanes[l]);
      to.result = static_cast<Argument*>(lanes[to.source_lane])->value;
    }
  });
  return argument.result;
}

bool any(bool predicate, Site site) {
  sanitizer::Quiet quiet;
  struct Argument {
    bool predicate, result;
  } argument = {predicate, false};
  collective("any", &argument, site, [](void** lanes) {
    bool result = false;
    for (int l = 0; l < kWarpSize; ++l) result |= static_cast<Argument*>(lanes[l])->predicate;
    for (int l = 0; l < kWarpSize; ++l) static_cast<Argument*>(lanes[l])->result = result;
  });
  return argument.result;
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address, bool is_transposed, Site site) {
  sanitizer::Quiet quiet;
  struct Argument {
    const char* row;
    uint32_t address;
    uint32_t* r;
  } argument = {shared_bytes_at(row_address, 16, 16, "ldmatrix", site), row_address, r};
  {
    sanitizer::Loud loud;
    sanitizer::read(argument.row, 16, EMU_CALLER);
  }
  collective("ldmatrix", &argument, site, [&](void** lanes) {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      uint32_t addresses[8];
      for (int i = 0; i < 8; ++i) {
        const Argument& lane = *static_cast<Argument*>(lanes[8 * m + i]);
        memcpy(matrix[i], lane.row, sizeof matrix[i]);
        addresses[i] = lane.address;
      }
      count_wavefronts(addresses, 8, 16, site);
      for (int l = 0; l < kWarpSize; ++l) {
        const int row = l / 4;
        const int column = 2 * (l % 4);
        const uint16_t low = is_transposed ? matrix[column][row] : matrix[row][column];
        const uint16_t high = is_transposed ? matrix[column + 1][row] : matrix[row][column + 1];
        static_cast<Argument*>(lanes[l])->r[m] = low | uint32_t{high} << 16;
      }
    }
  });
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element element, Site site) {
  sanitizer::Quiet quiet;
  struct Argument {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } argument = {d, a, {b0, b1}};
  collective("mma", &argument, site, [&](void** lanes) {
    const auto value = [&](uint32_t pair, int half) { return element_value(uint16_t(pair >> (16 * half)), element); };
    float left[16][16], right[16][8], sum[16][8];
    for (int l = 0; l < kWarpSize; ++l) {
      const Argument& lane = *static_cast<Argument*>(lanes[l]);
      const int group = l / 4;
      for (int half = 0; half < 2; ++half) {
        const int column = 2 * (l % 4) + half;
        left[group][column] = value(lane.a[0], half);
        left[group + 8][column] = value(lane.a[1], half);
        left[group][column + 8] = value(lane.a[2], half);
        left[group + 8][column + 8] = value(lane.a[3], half);
        right[column][group] = value(lane.b[0], half);
        right[column + 8][group] = value(lane.b[1], half);
        sum[group][column] = lane.d[half];
        sum[group + 8][column] = lane.d[2 + half];
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
      }
    }
    for (int l = 0; l < kWarpSize; ++l) {
      float* const to = static_cast<Argument*>(lanes[l])->d;
      for (int half = 0; half < 2; ++half) {
        to[half] = sum[l / 4][2 * (l % 4) + half];
        to[2 + half] = sum[l / 4 + 8][2 * (l % 4) + half];
      }
    }
    ++machine.stats.num_mmas;
  });
}

float float16_value(uint16_t bits) {
  return float(from_bits<_Float16>(bits));
}

uint16_t float16_bits(float value) {
  return uint16_t(to_bits(static_cast<_Float16>(value)));
}

uint16_t bfloat16_bits(float value) {
  const uint32_t bits = uint32_t(to_bits(value));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

uint16_t fma_f16(uint32_t a, uint32_t b, uint32_t c) {
  // The product is exact in double, and so, but for a c of very different size, is the sum.
  const double sum =
      double{float16_value(uint16_t(a))} * double{float16_value(uint16_t(b))} + double{float16_value(uint16_t(c))};
  return uint16_t(to_bits(static_cast<_Float16>(sum)));
}

float flush_subnormal(float value) {
  return value > -1.17549435e-38f && value < 1.17549435e-38f ? 0.0f : value;  // FLT_MIN
}

}  // namespace emu
