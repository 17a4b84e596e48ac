// Who works: which instructions, which piece on which thread, and scratch memory.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // multiplications below which a second thread does not pay
constexpr int64_t CHUNK_WORK = 1 << 18;   // multiplications that a thread claims at a time
constexpr int64_t MOST_THREADS = 256;

inline const Kernels* kernels_of(int32_t isa) {
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

inline int team_size(const loftq_team& team, int64_t pieces, int64_t work) {
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

}  // namespace
