// Scales of groups, and codes under them: to the bit as ops/scale_search.py and ops/columns.py have it.
//
// A row is one group. Vectors are the compiler's own, as wide as these instructions allow, since the
// order of every sum is fixed: SUMS running sums, then halves added to halves. So all instruction sets
// give the same bits. A search takes ratios * (2 * levels + 3) operations a weight, a rounding some 3 a
// level: the one is bound by arithmetic, the other by memory.
#pragma once
#include <math.h>

#include "kernels.h"

namespace {

constexpr int WIDE = Isa::lanes < 4 ? 4 : Isa::lanes;
constexpr int SUMS = 16, PARTS = SUMS / WIDE, BLOCK = 4;
typedef float Single __attribute__((vector_size(4 * WIDE)));
typedef int32_t Number __attribute__((vector_size(4 * WIDE)));
typedef uint8_t Bytes __attribute__((vector_size(WIDE)));

inline Single each(float a) { return a - Single{}; }

// What is there of `to`, a whole vector nearly always: then its size is known to the compiler.
template <class Vector>
inline void copy(void* to, const void* from, int64_t left) {
  if (left >= WIDE) {
    memcpy(to, from, sizeof(Vector));
  } else {
    memcpy(to, from, size_t(left) * (sizeof(Vector) / WIDE));
  }
}

// The first floats at p, `other` behind the `left` that are there.
inline Single load_part(const float* p, int64_t left, float other) {
  Single v = each(other);
  copy<Single>(&v, p, left);
  return v;
}

// Value and code of x under one scale and zero.
struct Nearest {
  Single value;
  Number code;
};

// A grid comes in units of the widest scale, times the ratio of a trial. `error` leaves u less its nearest
// value in u, for BLOCK vectors that share what is loaded.

// level: the code is the number of bounds below.
template <int count>
struct Book {
  float level[count], bound[count - 1];
  void set(const loftq_grid& g, float ratio) {
    for (int i = 0; i < count; ++i) level[i] = g.levels[i] * ratio;
    for (int i = 0; i + 1 < count; ++i) bound[i] = (g.levels[i + 1] + g.levels[i]) / 2 * ratio;
  }
  void error(Single (&u)[BLOCK], float) const {
    Single near[BLOCK];
    for (auto& value : near) value = each(level[0]);
    for (int i = 0; i + 1 < count; ++i) {
      for (int p = 0; p < BLOCK; ++p) near[p] = u[p] > each(bound[i]) ? each(level[i + 1]) : near[p];
    }
    for (int p = 0; p < BLOCK; ++p) u[p] -= near[p];
  }
  Nearest round(Single unit, float s, float) const {
    Nearest found{each(level[0]), Number{}};
    for (int i = 0; i + 1 < count; ++i) {
      const Number above = unit > each(bound[i]);
      found.value = above ? each(level[i + 1]) : found.value;
      found.code -= above;
    }
    found.value *= s;
    return found;
  }
};

// code - zero: codes rounded half to even by the last bit of 1.5 * 2^23, clamped before.
struct Integers {
  float top, ratio, inverse;
  void set(const loftq_grid& g, float by) { top = float(g.top), ratio = by, inverse = 1.0f / by; }
  Single code(Single at) const {
    at = at > 0.0f ? at : Single{};
    at = at < top ? at : each(top);
    return (at + 12582912.0f) - 12582912.0f;
  }
  void error(Single (&u)[BLOCK], float zero) const {
    for (auto& v : u) v -= (code(v * inverse + zero) - zero) * ratio;
  }
  Nearest round(Single unit, float s, float zero) const {
    const Single found = code(unit + zero);
    return {(found - zero) * s, __builtin_convertvector(found, Number)};
  }
};

// Sums of one row, (trials, SUMS), and the zero of each trial.
struct Trials {
  int count;
  float zero[LOFTQ_TRIALS];
  Single sum[LOFTQ_TRIALS][PARTS];
};

template <class Grid>
void add_errors(const Grid* grids, const float* x, int64_t left, float widest, Trials& trials) {
  Single unit[BLOCK];
  for (int p = 0; p < BLOCK; ++p) {
    unit[p] = p * WIDE < left ? load_part(x + p * WIDE, left - p * WIDE, 0.0f) / widest : Single{};
  }
  for (int k = 0; k < trials.count; ++k) {
    Single off[BLOCK];
    for (int p = 0; p < BLOCK; ++p) off[p] = unit[p];
    grids[k].error(off, trials.zero[k]);
    if (left < BLOCK * WIDE) {
      float all[BLOCK * WIDE];
      memcpy(all, off, sizeof all);
      for (int64_t i = left; i < BLOCK * WIDE; ++i) all[i] = 0.0f;
      memcpy(off, all, sizeof all);
    }
    for (int p = 0; p < BLOCK; ++p) trials.sum[k][p % PARTS] += off[p] * off[p];
  }
}

inline float fold(const Single (&sums)[PARTS]) {
  float sum[SUMS];
  memcpy(sum, sums, sizeof sum);
  for (int half = SUMS / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// Least and greatest of a row; both NaN if one is.
inline void range(const float* x, int64_t columns, float& low, float& high) {
  Single least = each(x[0]), most = least;
  Number odd = {};
  for (int64_t j = 0; j < columns; j += WIDE) {
    const Single v = load_part(x + j, columns - j, x[0]);
    least = v < least ? v : least;
    most = v > most ? v : most;
    odd |= v != v;
  }
  float lows[WIDE], highs[WIDE];
  int32_t odds[WIDE], any = 0;
  memcpy(lows, &least, sizeof lows), memcpy(highs, &most, sizeof highs), memcpy(odds, &odd, sizeof odds);
  low = lows[0], high = highs[0];
  for (int i = 0; i < WIDE; ++i) {
    low = lows[i] < low ? lows[i] : low;
    high = highs[i] > high ? highs[i] : high;
    any |= odds[i];
  }
  if (any) low = high = NAN;
}

// The smallest scale that clips nothing, and for integers the code of 0.
inline void widest(const loftq_grid& g, const float* x, float& s, float& z) {
  float low, high;
  range(x, g.columns, low, high);
  if (g.levels) {
    const float up = high / g.levels[g.top], down = -low / -g.levels[0];
    s = down > up ? down : up;
  } else {
    low = low > 0.0f ? 0.0f : low, high = high < 0.0f ? 0.0f : high;
    s = (high - low) / float(g.top);
  }
  s = s < g.tiny ? g.tiny : s;
  z = g.levels ? 0.0f : rintf(-low / s);
}

// The first trial with the least error; its number.
template <class Grid>
int search(const loftq_grid& g, const Grid* grids, const float* x, float widest, Trials& trials) {
  memset(trials.sum, 0, size_t(trials.count) * sizeof trials.sum[0]);
  for (int64_t j = 0; j < g.columns; j += BLOCK * WIDE) {
    add_errors(grids, x + j, g.columns - j, widest, trials);
  }
  int best = 0;
  float least = fold(trials.sum[0]);
  for (int k = 1; k < trials.count; ++k) {
    const float error = fold(trials.sum[k]);
    best = error < least ? k : best;
    least = error < least ? error : least;
  }
  return best;
}

template <class Grid>
void fit(const loftq_grid& g, const float* x, int64_t rows, float* scales, float* zeros) {
  const int shifts = g.levels ? 1 : g.shifts;
  Grid grids[LOFTQ_TRIALS];
  Trials trials;
  trials.count = shifts * g.ratio_count;
  for (int k = 0; k < trials.count; ++k) grids[k].set(g, g.ratios[k / shifts]);
  for (int64_t row = 0; row < rows; ++row, x += g.columns) {
    float s, z;
    widest(g, x, s, z);
    if (trials.count) {
      for (int k = 0; k < trials.count; ++k) {
        const float moved = z + float(k % shifts);
        trials.zero[k] = moved > float(g.top) ? float(g.top) : moved;
      }
      const int best = search(g, grids, x, s, trials);
      s *= g.ratios[best / shifts], z = trials.zero[best];
    }
    scales[row] = s;
    if (zeros) zeros[row] = z;
  }
}

template <class Grid>
void round_rows(const loftq_grid& g, const float* x, int64_t rows, const float* scales, const float* zeros,
                uint8_t* codes, float* values) {
  Grid grid;
  grid.set(g, 1.0f);
  for (int64_t row = 0; row < rows; ++row, x += g.columns, codes += g.columns, values += g.columns) {
    const float s = scales[row], z = zeros ? zeros[row] : 0.0f, by = s == 0.0f ? g.tiny : s;
    for (int64_t j = 0; j < g.columns; j += WIDE) {
      const int64_t left = g.columns - j;
      const Nearest found = grid.round(load_part(x + j, left, 0.0f) / by, s, z);
      const Bytes code = __builtin_convertvector(found.code, Bytes);
      copy<Bytes>(codes + j, &code, left);
      copy<Single>(values + j, &found.value, left);
    }
  }
}

inline void fit_any(const loftq_grid& g, const float* x, int64_t rows, float* scales, float* zeros) {
  if (!g.levels) return fit<Integers>(g, x, rows, scales, zeros);
  switch (g.top) {
    case 3: return fit<Book<4>>(g, x, rows, scales, zeros);
    case 7: return fit<Book<8>>(g, x, rows, scales, zeros);
    default: return fit<Book<16>>(g, x, rows, scales, zeros);
  }
}

inline void round_any(const loftq_grid& g, const float* x, int64_t rows, const float* scales,
                      const float* zeros, uint8_t* codes, float* values) {
  if (!g.levels) return round_rows<Integers>(g, x, rows, scales, zeros, codes, values);
  switch (g.top) {
    case 3: return round_rows<Book<4>>(g, x, rows, scales, zeros, codes, values);
    case 7: return round_rows<Book<8>>(g, x, rows, scales, zeros, codes, values);
    default: return round_rows<Book<16>>(g, x, rows, scales, zeros, codes, values);
  }
}

// `columns` codes into one plane of width bits: bits shift .. shift + width - 1 of each, low ones first.
template <int width>
uint8_t* pack_plane(const uint8_t* codes, int64_t columns, int shift, uint8_t* to) {
  constexpr int per_byte = 8 / width, mask = (1 << width) - 1;
  const int64_t whole = columns / per_byte;
  for (int64_t i = 0; i < whole; ++i) {
    unsigned byte = 0;
    for (int k = 0; k < per_byte; ++k) byte |= unsigned(codes[i * per_byte + k] >> shift & mask) << k * width;
    to[i] = uint8_t(byte);
  }
  if (columns % per_byte == 0) return to + whole;
  to[whole] = 0;
  for (int64_t j = whole * per_byte; j < columns; ++j) {
    to[whole] |= uint8_t((codes[j] >> shift & mask) << (j - whole * per_byte) * width);
  }
  return to + whole + 1;
}

inline void pack(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint8_t* to) {
  for (int64_t row = 0; row < rows; ++row, codes += columns) {
    switch (bits) {
      case 2: to = pack_plane<2>(codes, columns, 0, to); break;
      case 3: to = pack_plane<1>(codes, columns, 2, pack_plane<2>(codes, columns, 0, to)); break;
      case 4: to = pack_plane<4>(codes, columns, 0, to); break;
      default: to = pack_plane<8>(codes, columns, 0, to);
    }
  }
}

}  // namespace
