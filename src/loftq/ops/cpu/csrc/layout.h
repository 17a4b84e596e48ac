// What a packed row holds, and how the columns of x are laid out to meet it.
#pragma once
#include <cstdint>

#include "loftq_cpu.h"

namespace {

constexpr int64_t NESTED_RUN = 256;  // scales that share one absmax
constexpr int64_t PAD = 16;          // floats behind each row of scales: the widest vector

constexpr int DENSE = 0;             // `bits` of a weight that is not packed

// Codes in a 32-bit word of the first plane (3 bits are a 2-bit plane and a 1-bit plane).
constexpr int codes_per_word(int bits) { return bits == 3 ? 16 : 32 / bits; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t low_bytes(const loftq_weight& w) {
  return ceil_div(w.columns * (w.bits == 3 ? 2 : w.bits), 8);
}

constexpr int64_t packed_bytes(int64_t columns, int bits) {
  return bits == 3 ? ceil_div(columns, 4) + ceil_div(columns, 8) : ceil_div(columns * bits, 8);
}

inline int64_t row_bytes(const loftq_weight& w) { return packed_bytes(w.columns, w.bits); }

inline int64_t groups(const loftq_weight& w) { return w.group ? ceil_div(w.columns, w.group) : 1; }

// Code-valued grids are decoded around their middle, which keeps sums small: value - zero is exact
// either way.
inline float middle(const loftq_weight& w) { return w.has_levels ? 0.0f : float(1 << (w.bits - 1)); }

inline bool has_zeros(const loftq_weight& w) {
  return w.zeros != nullptr || w.default_zero != middle(w);
}

}  // namespace
