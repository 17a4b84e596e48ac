// Entry points for single weights: what this CPU has, products, the weight itself.
#include "project.h"

extern "C" {

int32_t loftq_abi(void) { return LOFTQ_ABI; }

int32_t loftq_isas(void) {
  int32_t found = 1 << LOFTQ_SCALAR;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  found |= avx2 << LOFTQ_AVX2 | (avx2 && avx512) << LOFTQ_AVX512;
#elif defined(__aarch64__)
  found |= 1 << LOFTQ_NEON;
#endif
  return found;
}

int32_t loftq_project(const loftq_team* team, const loftq_projection* projections, int32_t count,
                      const void* x, int64_t tokens, int32_t dtype, void* y) {
  const Kernels* kernels = kernels_of(team->isa);
  if (!kernels || count < 1) return LOFTQ_UNSUPPORTED;
  return project(*kernels, *team, projections, count, x, tokens, dtype, y);
}

int32_t loftq_dequantize(const loftq_team* team, const loftq_weight* weight, int32_t dtype, void* y) {
  const Kernels* kernels = kernels_of(team->isa);
  if (!kernels) return LOFTQ_UNSUPPORTED;
  const int64_t step = ceil_div(CHUNK_WORK, weight->columns), pieces = ceil_div(weight->rows, step);
  const int size = team_size(*team, pieces, weight->rows * weight->columns);
  const int64_t scratch = round_up(2 * (groups(*weight) + PAD), PAD);
  const Floats room(size * scratch);
  if (!room.p) return LOFTQ_NO_MEMORY;
  share(*team, size, pieces, [&](int64_t piece, int member) {
    const int64_t begin = piece * step;
    const int64_t end = begin + step < weight->rows ? begin + step : weight->rows;
    kernels->dequantize(*weight, begin, end, dtype, y, room.p + member * scratch);
  });
  return LOFTQ_OK;
}
}
