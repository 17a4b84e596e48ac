// float16, bfloat16 and float32 as float, and back, rounding to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "loftq_cpu.h"

// Internal linkage throughout: this header is compiled once for each instruction set, and a shared
// copy could hold instructions that another CPU lacks.
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t half) { return as_float(uint32_t(half) << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // NaN
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000 | ((rest & 0x3FF) << 13));
  // Exponents of float16 as float32 ones that are 112 too small; the product also mends subnormals.
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000)));  // 2^112
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (rest >= 0x477FF000) return uint16_t(sign | 0x7C00);  // from 65520 on: infinity
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the 2^-24 steps in the low bits
    return uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - 0x3F000000));
  }
  return uint16_t(sign | ((rest - 0x38000000 + 0xFFF + ((rest >> 13) & 1)) >> 13));
}

constexpr int64_t bytes_of(int32_t dtype) { return dtype == LOFTQ_F32 ? 4 : 2; }

// Number i behind any address: bytes read from a file may start at an odd place.
inline float number(const void* from, int64_t i, int32_t dtype) {
  const char* at = static_cast<const char*>(from);
  if (dtype == LOFTQ_F32) {
    float value;
    memcpy(&value, at + 4 * i, 4);
    return value;
  }
  uint16_t half;
  memcpy(&half, at + 2 * i, 2);
  return dtype == LOFTQ_F16 ? from_f16(half) : from_bf16(half);
}

inline void put_number(void* to, int64_t i, int32_t dtype, float value) {
  if (dtype == LOFTQ_F32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = dtype == LOFTQ_F16 ? to_f16(value) : to_bf16(value);
  }
}

}  // namespace
