// One token's attention over the keys and values of one head.
#pragma once
#include <math.h>

#include "kernels.h"

namespace {

// out[c] = sum over j of weight[j] * values[j][c], a vector of columns at a time.
inline void weighted_sum(const Cache& cache, int64_t count, const float* weight, float* out) {
  const int64_t size = cache.head_size, whole = size / Isa::lanes * Isa::lanes;
  for (int64_t c = 0; c < whole; c += Isa::lanes) {
    Isa::Floats even = Isa::zero(), odd = Isa::zero();
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      even = Isa::fma(Isa::all(weight[j]), load_any(cache.values, j * size + c, cache.dtype), even);
      odd = Isa::fma(Isa::all(weight[j + 1]), load_any(cache.values, (j + 1) * size + c, cache.dtype), odd);
    }
    if (j < count) even = Isa::fma(Isa::all(weight[j]), load_any(cache.values, j * size + c, cache.dtype), even);
    Isa::store(out + c, Isa::fma(Isa::all(1.0f), even, odd));
  }
  for (int64_t c = whole; c < size; ++c) {
    float sum = 0.0f;
    for (int64_t j = 0; j < count; ++j) sum += weight[j] * number(cache.values, j * size + c, cache.dtype);
    out[c] = sum;
  }
}

inline void attend(const float* q, const Cache& cache, int64_t count, float scaling, float* out,
                   float* scratch) {
  const int64_t bytes = cache.head_size * bytes_of(cache.dtype);
  const char* keys = static_cast<const char*>(cache.keys);
  float most = -INFINITY, total = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    dot(keys + j * bytes, cache.dtype, q, cache.head_size, 1, scaling, scratch + j, 1);
    most = scratch[j] > most ? scratch[j] : most;
  }
  for (int64_t j = 0; j < count; ++j) total += scratch[j] = expf(scratch[j] - most);
  for (int64_t j = 0; j < count; ++j) scratch[j] /= total;
  weighted_sum(cache, count, scratch, out);
}

}  // namespace
