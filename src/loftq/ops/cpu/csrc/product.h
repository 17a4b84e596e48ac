// y = x W^T + t B^T + bias for some rows of W and all tokens.
//
// A tile is Isa::rows rows and up to Isa::tokens tokens. In a block each code is decoded once into a
// register and meets every token of the tile; the sum of the block is then scaled, lane by lane, since
// a lane's columns lie in one group. So y does not depend on how many tokens come together, and rows
// may be split over threads at will.
#pragma once
#include <cstddef>
#include <utility>

#include "codes.h"
#include "kernels.h"
#include "scales.h"

namespace {

// A row of B that vectors may be read from up to the next multiple of their width.
struct AdapterRow {
  const void* p;
  int32_t dtype;
};

inline Isa::Floats load_any(const void* from, int64_t i, int32_t dtype) {
  if (dtype == LOFTQ_F32) return Isa::load(static_cast<const float*>(from) + i);
  const uint16_t* halves = static_cast<const uint16_t*>(from) + i;
  return dtype == LOFTQ_F16 ? Isa::load_f16(halves) : Isa::load_bf16(halves);
}

template <int bits>
struct Rows {
  const uint8_t *low[Isa::rows], *high[Isa::rows];            // all blocks but the last
  const uint8_t *last_low[Isa::rows], *last_high[Isa::rows];  // which may be a copy with a margin
  const float *scale[Isa::rows], *shift[Isa::rows];
  AdapterRow b[Isa::rows];
  uint8_t copy[Isa::rows][Block<bits>::low + Block<bits>::high];
};

// Copies the last block of row r unless a whole block may be read there.
template <int bits>
void last_block(const loftq_weight& w, int64_t blocks, int r, Rows<bits>& rows) {
  using B = Block<bits>;
  const uint8_t* end = w.codes + w.rows * row_bytes(w);
  const uint8_t *low = rows.low[r] + (blocks - 1) * B::low, *high = rows.high[r] + (blocks - 1) * B::high;
  rows.last_low[r] = low, rows.last_high[r] = high;
  const uint8_t* outermost = bits == 3 ? high + B::high : low + B::low;
  if (outermost <= end && low + B::low <= end) return;
  memset(rows.copy[r], 0, sizeof rows.copy[r]);
  const int64_t low_left = rows.low[r] + low_bytes(w) - low;
  memcpy(rows.copy[r], low, size_t(low_left < B::low ? low_left : B::low));
  rows.last_low[r] = rows.copy[r];
  if constexpr (bits == 3) {
    const int64_t high_left = rows.low[r] + row_bytes(w) - high;
    memcpy(rows.copy[r] + B::low, high, size_t(high_left < B::high ? high_left : B::high));
    rows.last_high[r] = rows.copy[r] + B::low;
  }
}

// The group of each lane's columns relative to the first lane's, for any block.
template <int bits>
void lane_groups(const loftq_weight& w, int* group) {
  for (int lane = 0; lane < 16; ++lane) {
    group[lane] = w.group && lane < Isa::lanes ? lane * Block<bits>::codes / w.group : 0;
  }
}

template <int bits, int T, size_t... k>
inline __attribute__((always_inline)) void add_block(
    const Values<bits>& values, const Block<bits> (&block)[Isa::rows], const float* x, int64_t stride,
    Isa::Floats (&part)[Isa::rows][T], std::index_sequence<k...>) {
  const auto step = [&](auto place) __attribute__((always_inline)) {
    constexpr int at = decltype(place)::value;
    Isa::Floats column[T];
    for (int t = 0; t < T; ++t) column[t] = Isa::load(x + t * stride + at * Isa::lanes);
    for (int r = 0; r < Isa::rows; ++r) {
      const Isa::Floats value = values(block[r].template at<at>());
      for (int t = 0; t < T; ++t) {
        part[r][t] = at ? Isa::fma(value, column[t], part[r][t]) : Isa::mul(value, column[t]);
      }
    }
  };
  (step(std::integral_constant<int, int(k)>{}), ...);
}

// One tile: total[r][t] is the whole dot product but for the adapter and the bias.
template <int bits, int T, bool zeros>
void tile(const Values<bits>& values, const typename Isa::Pick& pick, const Rows<bits>& rows,
          const Prepared& x, int64_t token, int group, Isa::Floats (&total)[Isa::rows][T]) {
  using B = Block<bits>;
  const int64_t stride = x.blocks * B::columns, sums = x.blocks * Isa::lanes;
  const float *at = x.x + token * stride, *sum = x.sum + token * sums;
  for (int64_t b = 0; b < x.blocks; ++b, at += B::columns, sum += Isa::lanes) {
    Isa::Floats part[Isa::rows][T];
    const bool last = b + 1 == x.blocks;
    const auto open = [&](int r) __attribute__((always_inline)) {
      return B(last ? rows.last_low[r] : rows.low[r] + b * B::low,
               last ? rows.last_high[r] : rows.high[r] + b * B::high);
    };
    static_assert(Isa::rows == 4 || Isa::rows == 2, "spell out the rows of a tile here");
    if constexpr (Isa::rows == 4) {
      const B block[4] = {open(0), open(1), open(2), open(3)};
      add_block<bits, T>(values, block, at, stride, part, std::make_index_sequence<B::codes>{});
    } else {
      const B block[2] = {open(0), open(1)};
      add_block<bits, T>(values, block, at, stride, part, std::make_index_sequence<B::codes>{});
    }
    const int64_t first = group ? b * B::columns / group : 0;
    for (int r = 0; r < Isa::rows; ++r) {
      const Isa::Floats scale = pick(rows.scale[r] + first);
      for (int t = 0; t < T; ++t) {
        if (zeros) {
          const Isa::Floats shift = pick(rows.shift[r] + first);
          part[r][t] = Isa::sub(part[r][t], Isa::mul(shift, Isa::load(sum + t * sums)));
        }
        total[r][t] = Isa::fma(scale, part[r][t], total[r][t]);
      }
    }
  }
}

template <int bits, int T, bool zeros>
void finish_tile(const loftq_projection& p, const Values<bits>& values, const typename Isa::Pick& pick,
                 const Rows<bits>& rows, const Prepared& x, const Low& low, int64_t token, int64_t row,
                 int64_t count, const Output& out) {
  Isa::Floats total[Isa::rows][T];
  for (auto& sums : total) {
    for (auto& sum : sums) sum = Isa::zero();
  }
  tile<bits, T, zeros>(values, pick, rows, x, token, p.weight.group, total);
  for (int r = 0; r < count; ++r) {
    const float bias = p.bias ? number(p.bias, row + r, p.bias_dtype) : 0.0f;
    for (int t = 0; t < T; ++t) {
      const float* down = low.t + (token + t) * low.stride;
      for (int64_t c = 0; c < p.adapter.rank; c += Isa::lanes) {
        total[r][t] = Isa::fma(load_any(rows.b[r].p, c, rows.b[r].dtype), Isa::load(down + c), total[r][t]);
      }
      put_number(out.y, (token + t) * out.stride + row + r, out.dtype, Isa::sum(total[r][t]) + bias);
    }
  }
}

template <int bits, bool zeros>
void all_tokens(const loftq_projection& p, const Values<bits>& values, const typename Isa::Pick& pick,
                const Rows<bits>& rows, const Prepared& x, const Low& low, int64_t row, int64_t count,
                const Output& out) {
  int64_t token = 0;
  if constexpr (Isa::tokens == 4) {
    for (; token + 4 <= x.tokens; token += 4) {
      finish_tile<bits, 4, zeros>(p, values, pick, rows, x, low, token, row, count, out);
    }
    if (token + 2 <= x.tokens) {
      finish_tile<bits, 2, zeros>(p, values, pick, rows, x, low, token, row, count, out);
      token += 2;
    }
  }
  for (; token < x.tokens; ++token) {
    finish_tile<bits, 1, zeros>(p, values, pick, rows, x, low, token, row, count, out);
  }
}

// A row of B as it lies where it holds whole vectors, else in float32 with zeros behind it.
inline AdapterRow adapter_row(const loftq_adapter& a, int64_t row, float* scratch) {
  if (a.rank % Isa::lanes == 0) {
    return {static_cast<const char*>(a.b) + row * a.rank * bytes_of(a.dtype), a.dtype};
  }
  for (int64_t i = 0; i < a.rank; ++i) scratch[i] = number(a.b, row * a.rank + i, a.dtype);
  for (int64_t i = a.rank; i < a.rank + PAD; ++i) scratch[i] = 0.0f;
  return {scratch, LOFTQ_F32};
}

int64_t product_scratch(const loftq_projection& p) {
  if (p.weight.bits == DENSE) return 0;
  return Isa::rows * (2 * (groups(p.weight) + PAD) + p.adapter.rank + PAD);
}

template <int bits>
void product(const loftq_projection& p, const Prepared& x, const Low& low, int64_t begin, int64_t end,
             const Output& out, float* scratch) {
  const loftq_weight& w = p.weight;
  float table[16] = {};
  int group[16];
  level_table<bits>(w, table);
  lane_groups<bits>(w, group);
  const Values<bits> values(table);
  const typename Isa::Pick pick(group);
  const int64_t each = groups(w) + PAD, bytes = row_bytes(w), plane = low_bytes(w);
  float *scale = scratch, *shift = scale + Isa::rows * each, *b = shift + Isa::rows * each;
  for (int64_t row = begin; row < end; row += Isa::rows) {
    const int64_t count = end - row < Isa::rows ? end - row : Isa::rows;
    Rows<bits> rows;
    for (int64_t r = 0; r < Isa::rows; ++r) {
      const int64_t from = row + (r < count ? r : 0);  // what is left over is computed and dropped
      rows.low[r] = w.codes + from * bytes;
      rows.high[r] = rows.low[r] + plane;
      rows.scale[r] = scale + r * each, rows.shift[r] = shift + r * each;
      last_block<bits>(w, x.blocks, int(r), rows);
      row_scales(w, from, scale + r * each);
      if (has_zeros(w)) row_zeros(w, from, shift + r * each);
      rows.b[r] = p.adapter.rank ? adapter_row(p.adapter, from, b + r * (p.adapter.rank + PAD)) : AdapterRow{};
    }
    if (has_zeros(w)) {
      all_tokens<bits, true>(p, values, pick, rows, x, low, row, count, out);
    } else {
      all_tokens<bits, false>(p, values, pick, rows, x, low, row, count, out);
    }
  }
}

inline void dot(const void* row, int32_t dtype, const float* x, int64_t columns, int64_t tokens,
                float scale, float* out, int64_t stride) {
  const int64_t whole = columns / Isa::lanes * Isa::lanes;
  for (int64_t t = 0; t < tokens; ++t, x += columns) {
    Isa::Floats even = Isa::zero(), odd = Isa::zero();
    int64_t i = 0;
    for (; i + 2 * Isa::lanes <= whole; i += 2 * Isa::lanes) {
      even = Isa::fma(load_any(row, i, dtype), Isa::load(x + i), even);
      odd = Isa::fma(load_any(row, i + Isa::lanes, dtype), Isa::load(x + i + Isa::lanes), odd);
    }
    if (i < whole) even = Isa::fma(load_any(row, i, dtype), Isa::load(x + i), even);
    float total = Isa::sum(even) + Isa::sum(odd);
    for (int64_t j = whole; j < columns; ++j) total += number(row, j, dtype) * x[j];
    out[t * stride] = scale * total;
  }
}

// Rows of a weight that is not packed: x as it is, one row after the other.
inline void dense_product(const loftq_projection& p, const Prepared& x, const Low& low, int64_t begin,
                          int64_t end, const Output& out) {
  const loftq_weight& w = p.weight;
  const loftq_adapter& a = p.adapter;
  const int64_t bytes = w.columns * bytes_of(w.scale_coding);
  for (int64_t row = begin; row < end; ++row) {
    const float bias = p.bias ? number(p.bias, row, p.bias_dtype) : 0.0f;
    for (int64_t t = 0; t < x.tokens; ++t) {
      float y = 0.0f, added = 0.0f;
      dot(w.codes + row * bytes, w.scale_coding, x.x + t * w.columns, w.columns, 1, 1.0f, &y, 1);
      if (a.rank) {
        const char* b = static_cast<const char*>(a.b) + row * a.rank * bytes_of(a.dtype);
        dot(b, a.dtype, low.t + t * low.stride, a.rank, 1, 1.0f, &added, 1);
      }
      put_number(out.y, t * out.stride + row, out.dtype, y + added + bias);
    }
  }
}

inline void product_any(const loftq_projection& p, const Prepared& x, const Low& low, int64_t begin,
                        int64_t end, const Output& out, float* scratch) {
  switch (p.weight.bits) {
    case DENSE: return dense_product(p, x, low, begin, end, out);
    case 2: return product<2>(p, x, low, begin, end, out, scratch);
    case 3: return product<3>(p, x, low, begin, end, out, scratch);
    case 4: return product<4>(p, x, low, begin, end, out, scratch);
    default: return product<8>(p, x, low, begin, end, out, scratch);
  }
}

inline void prepare(const float* x, int64_t columns, int codes, int64_t blocks, float* out, float* sum) {
  for (int64_t b = 0; b < blocks; ++b) {
    float* to = out + b * codes * Isa::lanes;
    const int64_t first = b * codes * Isa::lanes;
    const bool whole = first + codes * Isa::lanes <= columns;
    for (int lane = 0; lane < Isa::lanes; ++lane) {
      float total = 0.0f;
      for (int k = 0; k < codes; ++k) {
        const int64_t column = first + lane * codes + k;
        const float value = whole || column < columns ? x[column] : 0.0f;
        to[k * Isa::lanes + lane] = value;
        total += value;
      }
      sum[b * Isa::lanes + lane] = total;
    }
  }
}

}  // namespace
