// Scales and zeros of a row as floats. dq follows the reference step by step: product, then sum.
#pragma once
#include "layout.h"
#include "numbers.h"

namespace {

inline void nested_scales(const loftq_weight& w, int64_t first, int64_t count, float* out) {
  const uint8_t* codes = w.scales + first;
  for (int64_t k = 0; k < count;) {
    const int64_t run = (first + k) / NESTED_RUN;
    const int64_t end = (run + 1) * NESTED_RUN - first < count ? (run + 1) * NESTED_RUN - first : count;
    const float absmax = number(w.nested, 1 + run, LOFTQ_F32), offset = number(w.nested, 0, LOFTQ_F32);
    for (; k < end; ++k) out[k] = w.map[codes[k]] * absmax + offset;
  }
}

// The scales of one row, and PAD zeros behind them.
inline void row_scales(const loftq_weight& w, int64_t row, float* out) {
  const int64_t count = groups(w), first = row * count;
  if (w.scale_coding == LOFTQ_SCALES_DQ) {
    nested_scales(w, first, count, out);
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = number(w.scales, first + k, w.scale_coding);
  }
  for (int64_t k = count; k < count + PAD; ++k) out[k] = 0.0f;
}

inline int unpack(const uint8_t* row, int64_t low, int bits, int64_t i) {
  if (bits == 8) return row[i];
  if (bits == 4) return row[i >> 1] >> (4 * (i & 1)) & 15;
  const int two = row[i >> 2] >> (2 * (i & 3)) & 3;
  return bits == 2 ? two : two | (row[low + (i >> 3)] >> (i & 7) & 1) << 2;
}

// The zeros of one row, off the middle, and PAD zeros behind them.
inline void row_zeros(const loftq_weight& w, int64_t row, float* out) {
  const int64_t count = groups(w);
  for (int64_t k = 0; k < count + PAD; ++k) out[k] = w.zeros ? 0.0f : w.default_zero - middle(w);
  if (!w.zeros) return;
  const int64_t low = ceil_div(count * (w.bits == 3 ? 2 : w.bits), 8);
  const int64_t bytes = low + (w.bits == 3 ? ceil_div(count, 8) : 0);
  const uint8_t* from = w.zeros + row * bytes;
  for (int64_t k = 0; k < count; ++k) out[k] = float(unpack(from, low, w.bits, k)) - middle(w);
}

}  // namespace
