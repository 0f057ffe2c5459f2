// checks.h: one form for every complaint about an argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mixattn {

// Throws std::invalid_argument (Python: ValueError) unless low <= value <= high.
inline void check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(name + " must be in [" + std::to_string(low) + ", " + std::to_string(high) + "], got " +
                                std::to_string(value));
  }
}

inline std::string element(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

}  // namespace mixattn
