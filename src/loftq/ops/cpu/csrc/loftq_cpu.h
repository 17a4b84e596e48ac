// The C ABI of the CPU library: packed weights, adapters, products, rounding. No torch, no Python.
//
// Every pointer is borrowed for the call. Tensors are contiguous and row-major; the packed layout is
// that of checkpoint/SPEC.md, and packed bytes may start at any address. Functions return one of the
// LOFTQ_* results below.
#pragma once
#include <cstdint>

#define LOFTQ_ABI 3
#define LOFTQ_TRIALS 32
#define LOFTQ_API __attribute__((visibility("default")))

extern "C" {

enum loftq_result { LOFTQ_OK = 0, LOFTQ_NO_MEMORY = 1, LOFTQ_UNSUPPORTED = 2 };
enum loftq_isa { LOFTQ_SCALAR = 0, LOFTQ_NEON = 1, LOFTQ_AVX2 = 2, LOFTQ_AVX512 = 3 };
enum loftq_dtype { LOFTQ_F32 = 0, LOFTQ_F16 = 1, LOFTQ_BF16 = 2 };
enum loftq_scales { LOFTQ_SCALES_F32 = 0, LOFTQ_SCALES_F16 = 1, LOFTQ_SCALES_BF16 = 2, LOFTQ_SCALES_DQ = 3 };

// One packed weight (rows x columns); `group` divides 2^31, 0 = one scale per row. bits = 0: not packed,
// `codes` are its numbers, aligned, of the loftq_dtype that stands in scale_coding; not to dequantize.
struct loftq_weight {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;  // of asymmetric grids, or null
  const uint8_t* nested; // float32: offset, then one absmax per 256 scales; only LOFTQ_SCALES_DQ
  const float* map;      // the 256 values of a nested scale's byte; likewise
  int64_t rows, columns;
  int32_t bits, group, scale_coding;
  int32_t has_levels;    // 0: a code is its own value, and default_zero or `zeros` is taken off
  float default_zero;
  float levels[16];
};

// scaling * B A, with A (rank x columns) and B (rows x rank) of one dtype.
struct loftq_adapter {
  const void* a;
  const void* b;
  int64_t rank;
  int32_t dtype;
  float scaling;
};

// y = x W^T + scaling (x A^T) B^T + bias; adapter.rank = 0 and bias = null leave a term out.
struct loftq_projection {
  loftq_weight weight;
  loftq_adapter adapter;
  const void* bias;
  int32_t bias_dtype;
};

// What groups of `columns` weights are rounded to, and how their scale is found: the smallest that clips
// nothing, or of its multiples by `ratios` the one with the least squared error. levels: top + 1 = 4, 8
// or 16 of them, ascending, or null: scale * (code - zero), and `shifts` zeros from the first one up are
// tried; LOFTQ_TRIALS scales and zeros at most. A scale is at least `tiny`, and 0 divides as `tiny`.
struct loftq_grid {
  const float *levels, *ratios;
  int64_t columns;
  int32_t top, ratio_count, shifts;
  float tiny;
};

// Which instructions run, on how many threads. `fork` is GOMP_parallel of the OpenMP runtime that the
// process already uses, so that no second team competes with it; null = the calling thread alone.
struct loftq_team {
  int32_t isa, threads;
  void (*fork)(void (*)(void*), void*, unsigned, unsigned);
};

LOFTQ_API int32_t loftq_abi(void);

// Bit 1 << loftq_isa for each instruction set that this library holds and this CPU has.
LOFTQ_API int32_t loftq_isas(void);

// One block of a Llama: x += o attend(q, k, v of norm(x)); x += down (silu(gate) * up of norm(x)).
struct loftq_block {
  const float *attention_norm, *mlp_norm;  // (hidden)
  const float *q_norm, *k_norm;            // (head_size) of every head before its rotation, or null
  loftq_projection qkv[3], o, gate_up[2], down;
  void *keys, *values;                     // (kv_heads, capacity, head_size) of the cache's dtype
};

// A language model of such blocks, its cache filled up to the position of a step.
struct loftq_decoder {
  const loftq_block* blocks;
  int64_t count;
  const float* norm;             // (hidden) before the head
  loftq_projection head;
  const float *cosine, *sine;    // (capacity, head_size) of the rotation
  int64_t hidden, heads, kv_heads, head_size, capacity;
  float epsilon, scaling;        // of the norms; of q k
  int32_t cache_dtype;
};

// `count` projections of the same x (tokens x columns); y is (tokens x sum of rows), both of `dtype`.
LOFTQ_API int32_t loftq_project(const loftq_team* team, const loftq_projection* projections, int32_t count,
                      const void* x, int64_t tokens, int32_t dtype, void* y);

// y (rows x columns) of `dtype`: the weight itself, to the bit as ops/reference.py has it.
LOFTQ_API int32_t loftq_dequantize(const loftq_team* team, const loftq_weight* weight, int32_t dtype, void* y);

// scales and, of integers, zeros (groups) of x (groups x columns).
LOFTQ_API int32_t loftq_fit(const loftq_team* team, const loftq_grid* grid, const float* x, int64_t groups,
                            float* scales, float* zeros);

// codes and values (groups x columns) nearest to x under scales and zeros as they are stored.
LOFTQ_API int32_t loftq_round(const loftq_team* team, const loftq_grid* grid, const float* x,
                              int64_t groups, const float* scales, const float* zeros, uint8_t* codes,
                              float* values);

// Packed rows of codes (rows x columns) below 2^bits; 2, 3, 4 or 8 bits.
LOFTQ_API int32_t loftq_pack(const loftq_team* team, const uint8_t* codes, int64_t rows, int64_t columns,
                             int32_t bits, uint8_t* packed);

// One token: x (hidden) float32 is its embedding and is overwritten, `position` counts from 0 and lies
// below the capacity; its keys and values are added to the cache. logits are (head rows) float32.
LOFTQ_API int32_t loftq_step(const loftq_team* team, const loftq_decoder* decoder, int64_t position,
                             float* x, float* logits);
}
