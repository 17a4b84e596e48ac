// Several projections of the same x, shared among threads.
#pragma once
#include "numbers.h"
#include "team.h"

namespace {

// x in the layout of each number of codes in a word that a projection asks for: 4, 8 or 16; and last
// as it is, for dense weights.
constexpr int SLOTS = 3;
struct Inputs {
  Prepared of[SLOTS + 1];
  static int slot(int bits) { return bits == DENSE ? SLOTS : codes_per_word(bits) / 8; }
};

inline int64_t blocks_of(const Kernels& k, int64_t columns, int codes) {
  return ceil_div(columns, int64_t(codes) * k.lanes);
}

inline int64_t prepared_size(const Kernels& k, int64_t columns, int codes) {
  return blocks_of(k, columns, codes) * (codes + 1) * k.lanes;
}

struct Call {
  const Kernels& kernels;
  const loftq_team& team;
  const loftq_projection* projections;
  int64_t count, tokens, columns, rows, ranks, rank_stride;
  bool wanted[SLOTS + 1];
};

inline Call describe(const Kernels& k, const loftq_team& team, const loftq_projection* p, int32_t count,
                     int64_t tokens) {
  Call call{k, team, p, count, tokens, p[0].weight.columns, 0, 0, 0, {}};
  for (int i = 0; i < count; ++i) {
    call.rows += p[i].weight.rows;
    call.ranks += p[i].adapter.rank;
    call.rank_stride += p[i].adapter.rank ? round_up(p[i].adapter.rank, PAD) : 0;
    call.wanted[Inputs::slot(p[i].weight.bits)] = true;
  }
  return call;
}

inline void lay_out(const Call& call, const float* x, float* room, Inputs& inputs) {
  for (int slot = 0; slot < SLOTS; ++slot) {
    if (!call.wanted[slot]) continue;
    const int codes = slot ? 8 * slot : 4;
    const int64_t blocks = blocks_of(call.kernels, call.columns, codes);
    const int64_t each = blocks * codes * call.kernels.lanes, sums = blocks * call.kernels.lanes;
    float* sum = room + call.tokens * each;
    const int size = team_size(call.team, call.tokens, call.tokens * call.columns);
    share(call.team, size, call.tokens, [&](int64_t t, int) {
      call.kernels.prepare(x + t * call.columns, call.columns, codes, blocks, room + t * each,
                           sum + t * sums);
    });
    inputs.of[slot] = {room, sum, blocks, call.tokens};
    room = sum + call.tokens * sums;
  }
  inputs.of[SLOTS] = {x, nullptr, 0, call.tokens};
}

// t = scaling A x of every adapter; `low` (tokens, rank_stride) is zero already.
inline void down(const Call& call, const float* x, float* low) {
  constexpr int64_t step = 8;
  const int size = team_size(call.team, ceil_div(call.ranks, step), call.ranks * call.columns * call.tokens);
  share(call.team, size, ceil_div(call.ranks, step), [&](int64_t piece, int) {
    int64_t row = piece * step, at = 0;
    const int64_t end = row + step < call.ranks ? row + step : call.ranks;
    const loftq_projection* p = call.projections;
    for (int64_t left = end - row, i = 0; i < left; ++i, ++row) {
      for (; row >= p->adapter.rank; ++p) {
        row -= p->adapter.rank;
        at += p->adapter.rank ? round_up(p->adapter.rank, PAD) : 0;
      }
      const loftq_adapter& a = p->adapter;
      const char* from = static_cast<const char*>(a.a) + row * call.columns * bytes_of(a.dtype);
      call.kernels.dot(from, a.dtype, x, call.columns, call.tokens, a.scaling, low + at + row,
                       call.rank_stride);
    }
  });
}

// A multiple of the rows of a tile, and several pieces for each thread.
inline int64_t rows_at_a_time(const Call& call) {
  const int64_t threads = call.team.threads < 1 ? 1 : call.team.threads;
  const int64_t cheap = CHUNK_WORK / (call.columns * call.tokens), fair = call.rows / (3 * threads);
  const int64_t rows = cheap < fair ? cheap : fair;
  return rows < 4 ? 4 : rows / 4 * 4;
}

inline void up(const Call& call, const Inputs& inputs, const float* low, int size, int64_t scratch,
               float* room, void* y, int32_t dtype) {
  const int64_t step = rows_at_a_time(call);
  int64_t pieces = 0;
  for (int i = 0; i < call.count; ++i) pieces += ceil_div(call.projections[i].weight.rows, step);
  share(call.team, size, pieces, [&](int64_t piece, int member) {
    const loftq_projection* p = call.projections;
    int64_t row = 0, at = 0;
    for (int64_t own; piece >= (own = ceil_div(p->weight.rows, step)); ++p) {
      piece -= own;
      row += p->weight.rows;
      at += p->adapter.rank ? round_up(p->adapter.rank, PAD) : 0;
    }
    const int64_t begin = piece * step, rows = p->weight.rows;
    const int64_t end = begin + step < rows ? begin + step : rows;
    char* to = static_cast<char*>(y) + row * bytes_of(dtype);
    call.kernels.product(*p, inputs.of[Inputs::slot(p->weight.bits)], {low + at, call.rank_stride}, begin,
                         end, {to, call.rows, dtype}, room + member * scratch);
  });
}

// As loftq_project, with instructions that this CPU has.
inline int32_t project(const Kernels& k, const loftq_team& team, const loftq_projection* projections,
                       int32_t count, const void* x, int64_t tokens, int32_t dtype, void* y) {
  const Call call = describe(k, team, projections, count, tokens);
  int64_t laid_out = 0, scratch = 0;
  for (int slot = 0; slot < SLOTS; ++slot) {
    if (call.wanted[slot]) laid_out += prepared_size(k, call.columns, slot ? 8 * slot : 4);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t own = round_up(k.scratch(projections[i]), PAD);
    scratch = own > scratch ? own : scratch;
  }
  const int64_t pieces = ceil_div(call.rows, rows_at_a_time(call));
  const int size = team_size(team, pieces, call.rows * call.columns * tokens);
  const int64_t plain = dtype == LOFTQ_F32 ? 0 : tokens * call.columns;
  const Floats room(tokens * (laid_out + call.rank_stride) + size * scratch + plain);
  if (!room.p) return LOFTQ_NO_MEMORY;
  float *low = room.p + tokens * laid_out, *own = low + tokens * call.rank_stride;
  float* copy = own + size * scratch;
  for (int64_t i = 0; i < plain; ++i) copy[i] = number(x, i, dtype);
  const float* floats = dtype == LOFTQ_F32 ? static_cast<const float*>(x) : copy;
  for (int64_t i = 0; i < tokens * call.rank_stride; ++i) low[i] = 0.0f;
  Inputs inputs{};
  lay_out(call, floats, room.p, inputs);
  if (call.ranks) down(call, floats, low);
  up(call, inputs, low, size, scratch, own, y, dtype);
  return LOFTQ_OK;
}

}  // namespace
