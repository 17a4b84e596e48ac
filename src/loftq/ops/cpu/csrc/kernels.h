// What each instruction set provides to the rest: one table of functions.
#pragma once
#include "layout.h"

// x laid out for one number of codes in a word: in block b, vector k holds the columns that lie at
// place k of the words of the block. Behind the blocks, for zeros: the sum of each block by lane.
struct Prepared {
  const float* x;    // (tokens, blocks, codes_per_word, lanes)
  const float* sum;  // (tokens, blocks, lanes)
  int64_t blocks, tokens;
};

// t = scaling A x (tokens, stride), zero from `rank` on; stride is a multiple of PAD.
struct Low {
  const float* t;
  int64_t stride;
};

struct Output {
  void* y;
  int64_t stride;  // elements from token to token
  int32_t dtype;
};

// Keys and values of one head, (capacity, head_size) each.
struct Cache {
  const void *keys, *values;
  int64_t head_size;
  int32_t dtype;
};

struct Kernels {
  int lanes;
  // Floats of scratch that one thread needs for rows of this projection.
  int64_t (*scratch)(const loftq_projection&);
  void (*prepare)(const float* x, int64_t columns, int codes, int64_t blocks, float* out, float* sum);
  // Rows begin .. end - 1 of one projection for all tokens, at columns begin .. end - 1 of y.
  void (*product)(const loftq_projection&, const Prepared&, const Low&, int64_t begin, int64_t end,
                  const Output&, float* scratch);
  // out[t * stride] = scale * sum over j of row[j] * x[t * columns + j].
  void (*dot)(const void* row, int32_t dtype, const float* x, int64_t columns, int64_t tokens,
              float scale, float* out, int64_t stride);
  // out (head_size) = sum over j of softmax(scaling q k_j) v_j for the `count` first keys and values.
  void (*attend)(const float* q, const Cache&, int64_t count, float scaling, float* out, float* scratch);
  void (*dequantize)(const loftq_weight&, int64_t begin, int64_t end, int32_t dtype, void* y,
                     float* scratch);
  // Of `rows` groups: scales and zeros (null without); codes and values under them; packed rows.
  void (*fit)(const loftq_grid&, const float* x, int64_t rows, float* scales, float* zeros);
  void (*round)(const loftq_grid&, const float* x, int64_t rows, const float* scales, const float* zeros,
                uint8_t* codes, float* values);
  void (*pack)(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint8_t* packed);
};

const Kernels* scalar_kernels();
const Kernels* neon_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
