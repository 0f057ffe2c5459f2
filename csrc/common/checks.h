// checks.h: one form for every complaint about an argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/params.h"

namespace mixattn {

// Throws std::invalid_argument (Python: ValueError) unless low <= value <= high.
inline void check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(name + " must be in [" + std::to_string(low) + ", " + std::to_string(high) + "], got " +
                                std::to_string(value));
  }
}

// The same for the size of a head, which is a multiple of 8 besides.
inline void check_head_dim(const char* name, int64_t head_dim) {
  check_range(name, head_dim, kHeadDimMultiple, kMaxHeadDim);
  if (head_dim % kHeadDimMultiple != 0) {
    throw std::invalid_argument(std::string(name) + " must be a multiple of 8, got " + std::to_string(head_dim));
  }
}

inline std::string element(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

}  // namespace mixattn
