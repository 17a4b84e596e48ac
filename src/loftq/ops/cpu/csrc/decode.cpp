// One token through a whole model: a single call instead of some dozen operators a block.
//
// Everything between the projections is float32 and takes a few microseconds; what counts is that no
// interpreter stands between them. Rows, heads and neurons are shared among threads, each whole on one,
// so the result does not depend on how many there are.
#include <math.h>

#include "project.h"

namespace {

// Scratch of a step; each is used by every block in turn.
struct Room {
  float *normed, *qkv, *mixed, *added, *gated, *scores;
};

class Step {
 public:
  Step(const Kernels& kernels, const loftq_team& team, const loftq_decoder& decoder, int64_t position)
      : k(kernels), team(team), d(decoder), position(position) {
    queries = d.heads * d.head_size, pairs = d.kv_heads * d.head_size;
    for (int64_t i = 0; i < d.count; ++i) {
      const int64_t own = d.blocks[i].gate_up[0].weight.rows;
      neurons = own > neurons ? own : neurons;
    }
  }

  int32_t run(float* x, float* logits) const {
    const int64_t size = 2 * d.hidden + 2 * queries + 2 * pairs + 2 * neurons + d.heads * (position + 1);
    const Floats floats(size);
    if (!floats.p) return LOFTQ_NO_MEMORY;
    Room room;
    room.normed = floats.p, room.added = room.normed + d.hidden, room.qkv = room.added + d.hidden;
    room.mixed = room.qkv + queries + 2 * pairs, room.gated = room.mixed + queries;
    room.scores = room.gated + 2 * neurons;
    for (int64_t i = 0; i < d.count; ++i) {
      if (const int32_t failed = attention(d.blocks[i], x, room)) return failed;
      if (const int32_t failed = neuron(d.blocks[i], x, room)) return failed;
    }
    norm(x, d.norm, d.hidden, room.normed);
    return project(k, team, &d.head, 1, room.normed, 1, LOFTQ_F32, logits);
  }

 private:
  int32_t attention(const loftq_block& block, float* x, const Room& room) const {
    norm(x, block.attention_norm, d.hidden, room.normed);
    if (const int32_t failed = project(k, team, block.qkv, 3, room.normed, 1, LOFTQ_F32, room.qkv)) return failed;
    rotate_all(room.qkv, d.heads, block.q_norm);
    rotate_all(room.qkv + queries, d.kv_heads, block.k_norm);
    remember(block.keys, room.qkv + queries);
    remember(block.values, room.qkv + queries + pairs);
    const int64_t count = position + 1;
    const int size = team_size(team, d.heads, 2 * queries * count);
    share(team, size, d.heads, [&](int64_t head, int) {
      const int64_t from = head / (d.heads / d.kv_heads) * d.capacity * d.head_size * bytes_of(d.cache_dtype);
      const Cache cache{static_cast<const char*>(block.keys) + from,
                        static_cast<const char*>(block.values) + from, d.head_size, d.cache_dtype};
      k.attend(room.qkv + head * d.head_size, cache, count, d.scaling, room.mixed + head * d.head_size,
               room.scores + head * count);
    });
    return add(block.o, room.mixed, x, room.added);
  }

  int32_t neuron(const loftq_block& block, float* x, const Room& room) const {
    const int64_t rows = block.gate_up[0].weight.rows;
    norm(x, block.mlp_norm, d.hidden, room.normed);
    if (const int32_t failed = project(k, team, block.gate_up, 2, room.normed, 1, LOFTQ_F32, room.gated)) return failed;
    const int64_t step = 256, pieces = ceil_div(rows, step);
    share(team, team_size(team, pieces, 64 * rows), pieces, [&](int64_t piece, int) {
      const int64_t end = (piece + 1) * step < rows ? (piece + 1) * step : rows;
      for (int64_t i = piece * step; i < end; ++i) {
        const float gate = room.gated[i];
        room.gated[i] = gate / (1.0f + expf(-gate)) * room.gated[rows + i];
      }
    });
    return add(block.down, room.gated, x, room.added);
  }

  int32_t add(const loftq_projection& p, const float* from, float* x, float* room) const {
    if (const int32_t failed = project(k, team, &p, 1, from, 1, LOFTQ_F32, room)) return failed;
    for (int64_t i = 0; i < d.hidden; ++i) x[i] += room[i];
    return LOFTQ_OK;
  }

  void norm(const float* x, const float* weight, int64_t size, float* out) const {
    float squares;
    k.dot(x, LOFTQ_F32, x, size, 1, 1.0f, &squares, 1);
    const float scale = 1.0f / sqrtf(squares / float(size) + d.epsilon);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
  }

  // Norm, if there is one, and rotation of the pairs (i, i + head_size / 2) of each head, in place.
  void rotate_all(float* of, int64_t heads, const float* weight) const {
    const int64_t half = d.head_size / 2;
    const float *cosine = d.cosine + position * d.head_size, *sine = d.sine + position * d.head_size;
    for (int64_t head = 0; head < heads; ++head, of += d.head_size) {
      if (weight) norm(of, weight, d.head_size, of);
      for (int64_t i = 0; i < half; ++i) {
        const float first = of[i], second = of[i + half];
        of[i] = first * cosine[i] - second * sine[i];
        of[i + half] = second * cosine[i + half] + first * sine[i + half];
      }
    }
  }

  void remember(void* cache, const float* from) const {
    for (int64_t head = 0; head < d.kv_heads; ++head) {
      const int64_t to = (head * d.capacity + position) * d.head_size;
      for (int64_t i = 0; i < d.head_size; ++i) put_number(cache, to + i, d.cache_dtype, *from++);
    }
  }

  const Kernels& k;
  const loftq_team& team;
  const loftq_decoder& d;
  const int64_t position;
  int64_t queries, pairs, neurons = 0;
};

}  // namespace

extern "C" {

int32_t loftq_step(const loftq_team* team, const loftq_decoder* decoder, int64_t position, float* x,
                   float* logits) {
  const Kernels* kernels = kernels_of(team->isa);
  if (!kernels || position < 0 || position >= decoder->capacity) return LOFTQ_UNSUPPORTED;
  return Step(*kernels, *team, *decoder, position).run(x, logits);
}
}
