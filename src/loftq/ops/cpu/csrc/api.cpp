// Entry points for single weights: what this CPU has, products, the weight itself, rounding.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "project.h"

namespace {

// Whether there is a rounding to this grid.
bool holds(const loftq_grid& grid) {
  const bool sized = grid.top == 3 || grid.top == 7 || grid.top == 15;
  return grid.columns >= 1 && (sized || (!grid.levels && grid.top >= 1 && grid.top <= 255));
}

// work(begin, end) for pieces of `rows` rows of some `cost` multiplications each.
template <class F>
int32_t by_rows(const loftq_team& team, int64_t rows, int64_t cost, const F& work) {
  const int64_t step = ceil_div(CHUNK_WORK, cost < 1 ? 1 : cost), pieces = ceil_div(rows, step);
  share(team, team_size(team, pieces, rows * cost), pieces, [&](int64_t piece, int) {
    work(piece * step, (piece + 1) * step < rows ? (piece + 1) * step : rows);
  });
  return LOFTQ_OK;
}

}  // namespace

extern "C" {

int32_t loftq_abi(void) { return LOFTQ_ABI; }

int32_t loftq_isas(void) {
  int32_t found = 1 << LOFTQ_SCALAR;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  __get_cpuid(1, &a, &b, &c, &d);  // clang knows no name for F16C
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C);
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

int32_t loftq_fit(const loftq_team* team, const loftq_grid* grid, const float* x, int64_t groups,
                  float* scales, float* zeros) {
  const Kernels* kernels = kernels_of(team->isa);
  if (!kernels || !holds(*grid)) return LOFTQ_UNSUPPORTED;
  if (grid->ratio_count * grid->shifts > LOFTQ_TRIALS) return LOFTQ_UNSUPPORTED;
  const int64_t columns = grid->columns, cost = columns * (1 + grid->ratio_count);
  return by_rows(*team, groups, cost, [&](int64_t begin, int64_t end) {
    kernels->fit(*grid, x + begin * columns, end - begin, scales + begin, zeros ? zeros + begin : zeros);
  });
}

int32_t loftq_round(const loftq_team* team, const loftq_grid* grid, const float* x, int64_t groups,
                    const float* scales, const float* zeros, uint8_t* codes, float* values) {
  const Kernels* kernels = kernels_of(team->isa);
  if (!kernels || !holds(*grid)) return LOFTQ_UNSUPPORTED;
  return by_rows(*team, groups, grid->columns, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * grid->columns;
    kernels->round(*grid, x + at, end - begin, scales + begin, zeros ? zeros + begin : zeros, codes + at,
                   values + at);
  });
}

int32_t loftq_pack(const loftq_team* team, const uint8_t* codes, int64_t rows, int64_t columns,
                   int32_t bits, uint8_t* packed) {
  const Kernels* kernels = kernels_of(team->isa);
  if (!kernels || (bits != 2 && bits != 3 && bits != 4 && bits != 8)) return LOFTQ_UNSUPPORTED;
  return by_rows(*team, rows, columns, [&](int64_t begin, int64_t end) {
    kernels->pack(codes + begin * columns, end - begin, columns, bits,
                  packed + begin * packed_bytes(columns, bits));
  });
}
}
