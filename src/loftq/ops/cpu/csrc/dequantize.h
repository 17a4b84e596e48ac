// The weight itself: w = scale * (value - zero), difference first, as the reference has it.
#pragma once
#include "codes.h"
#include "kernels.h"
#include "scales.h"

namespace {

inline void store_any(void* to, int64_t i, int32_t dtype, Isa::Floats value) {
  if (dtype == LOFTQ_F32) return Isa::store(static_cast<float*>(to) + i, value);
  uint16_t* halves = static_cast<uint16_t*>(to) + i;
  if (dtype == LOFTQ_F16) return Isa::store_f16(halves, value);
  Isa::store_bf16(halves, value);
}

template <int bits>
Isa::Words consecutive(const uint8_t* row, const uint8_t* second, int64_t column) {
  if constexpr (bits == 3) {
    const Isa::Words top = Isa::template left<2>(Isa::template spread<1>(second, column));
    return Isa::low_two(Isa::template spread<2>(row, column), top);
  } else {
    return Isa::template spread<bits>(row, column);
  }
}

template <int bits>
void dequantize(const loftq_weight& w, int64_t begin, int64_t end, int32_t dtype, void* y,
                float* scratch) {
  float table[16] = {};
  level_table<bits>(w, table);
  const Values<bits> values(table);
  const int64_t count = groups(w), size = w.group ? w.group : w.columns;
  float *scale = scratch, *shift = scratch + count + PAD;
  const int same[16] = {};
  const typename Isa::Pick pick(same);  // the first float for every lane
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t *low = w.codes + row * row_bytes(w), *high = low + low_bytes(w);
    row_scales(w, row, scale);
    row_zeros(w, row, shift);
    for (int64_t g = 0; g < count; ++g) {
      const Isa::Floats by = pick(scale + g), zero = pick(shift + g);
      const int64_t stop = (g + 1) * size < w.columns ? (g + 1) * size : w.columns;
      int64_t j = g * size;
      for (; j + Isa::lanes <= stop; j += Isa::lanes) {
        const Isa::Floats value = Isa::sub(values(consecutive<bits>(low, high, j)), zero);
        store_any(y, row * w.columns + j, dtype, Isa::mul(value, by));
      }
      for (; j < stop; ++j) {
        const int code = unpack(low, low_bytes(w), bits, j);
        const float value = bits == 8 ? float(code) - 128.0f : table[code & 15];
        put_number(y, row * w.columns + j, dtype, scale[g] * (value - shift[g]));
      }
    }
  }
}

inline void dequantize_any(const loftq_weight& w, int64_t begin, int64_t end, int32_t dtype, void* y,
                           float* scratch) {
  switch (w.bits) {
    case 2: return dequantize<2>(w, begin, end, dtype, y, scratch);
    case 3: return dequantize<3>(w, begin, end, dtype, y, scratch);
    case 4: return dequantize<4>(w, begin, end, dtype, y, scratch);
    default: return dequantize<8>(w, begin, end, dtype, y, scratch);
  }
}

}  // namespace
