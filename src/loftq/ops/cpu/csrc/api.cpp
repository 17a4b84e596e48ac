// Entry points: which instructions, which rows on which thread, and scratch memory.
#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "numbers.h"

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // multiplications below which a second thread does not pay
constexpr int64_t CHUNK_WORK = 1 << 18;   // multiplications that a thread claims at a time
constexpr int64_t MOST_THREADS = 256;

const Kernels* kernels_of(int32_t isa) {
  if (isa < 0 || isa > LOFTQ_AVX512 || !(loftq_isas() >> isa & 1)) return nullptr;
#if defined(__x86_64__)
  if (isa == LOFTQ_AVX512) return avx512_kernels();
  if (isa == LOFTQ_AVX2) return avx2_kernels();
#elif defined(__aarch64__)
  if (isa == LOFTQ_NEON) return neon_kernels();
#endif
  return scalar_kernels();
}

template <class F>
struct Job {
  const F& work;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> member{0};

  static void run(void* self) {
    Job& job = *static_cast<Job*>(self);
    const int member = job.member.fetch_add(1);
    for (int64_t i; (i = job.next.fetch_add(1)) < job.count;) job.work(i, member);
  }
};

int team_size(const loftq_team& team, int64_t pieces, int64_t work) {
  if (!team.fork || work < SERIAL_WORK || pieces < 2) return 1;
  const int64_t most = team.threads < MOST_THREADS ? team.threads : MOST_THREADS;
  return int(pieces < most ? pieces : (most < 1 ? 1 : most));
}

// work(piece, member) for every piece; members are numbered from 0 within this call.
template <class F>
void share(const loftq_team& team, int size, int64_t pieces, const F& work) {
  Job<F> job{work, pieces};
  if (size == 1) {
    Job<F>::run(&job);
  } else {
    team.fork(Job<F>::run, &job, unsigned(size), 0);
  }
}

class Floats {
 public:
  explicit Floats(int64_t count) : p(new (std::nothrow) float[size_t(count < 1 ? 1 : count)]) {}
  Floats(const Floats&) = delete;
  ~Floats() { delete[] p; }
  float* const p;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// x in the layout of each number of codes in a word that a projection asks for: 4, 8 or 16.
struct Inputs {
  Prepared of[3];
  static int slot(int bits) { return codes_per_word(bits) / 8; }
};

int64_t blocks_of(const Kernels& k, int64_t columns, int codes) {
  return ceil_div(columns, int64_t(codes) * k.lanes);
}

int64_t prepared_size(const Kernels& k, int64_t columns, int codes) {
  return blocks_of(k, columns, codes) * (codes + 1) * k.lanes;
}

struct Call {
  const Kernels& kernels;
  const loftq_team& team;
  const loftq_projection* projections;
  int64_t count, tokens, columns, rows, ranks, rank_stride;
  bool wanted[3];
};

Call describe(const Kernels& k, const loftq_team& team, const loftq_projection* p, int32_t count,
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

void lay_out(const Call& call, const float* x, float* room, Inputs& inputs) {
  for (int slot = 0; slot < 3; ++slot) {
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
}

// t = scaling A x of every adapter; `low` (tokens, rank_stride) is zero already.
void down(const Call& call, const float* x, float* low) {
  const int size = team_size(call.team, call.ranks, call.ranks * call.columns * call.tokens);
  share(call.team, size, call.ranks, [&](int64_t piece, int) {
    int64_t row = piece, at = 0;
    const loftq_projection* p = call.projections;
    for (; row >= p->adapter.rank; ++p) {
      row -= p->adapter.rank;
      at += p->adapter.rank ? round_up(p->adapter.rank, PAD) : 0;
    }
    const loftq_adapter& a = p->adapter;
    const char* from = static_cast<const char*>(a.a) + row * call.columns * (a.dtype == LOFTQ_F32 ? 4 : 2);
    call.kernels.dot(from, a.dtype, x, call.columns, call.tokens, a.scaling, low + at + row,
                     call.rank_stride);
  });
}

int64_t rows_at_a_time(const Call& call) {
  const int64_t rows = CHUNK_WORK / (call.columns * call.tokens);
  return rows < 4 ? 4 : rows / 4 * 4;
}

void up(const Call& call, const Inputs& inputs, const float* low, int size, int64_t scratch, float* room,
        void* y, int32_t dtype) {
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
    char* to = static_cast<char*>(y) + row * (dtype == LOFTQ_F32 ? 4 : 2);
    call.kernels.product(*p, inputs.of[Inputs::slot(p->weight.bits)], {low + at, call.rank_stride}, begin,
                         end, {to, call.rows, dtype}, room + member * scratch);
  });
}

}  // namespace

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
  const Call call = describe(*kernels, *team, projections, count, tokens);
  int64_t laid_out = 0, scratch = 0;
  for (int slot = 0; slot < 3; ++slot) {
    if (call.wanted[slot]) laid_out += prepared_size(*kernels, call.columns, slot ? 8 * slot : 4);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t own = round_up(kernels->scratch(projections[i]), PAD);
    scratch = own > scratch ? own : scratch;
  }
  const int64_t pieces = ceil_div(call.rows, rows_at_a_time(call));
  const int size = team_size(*team, pieces, call.rows * call.columns * tokens);
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
