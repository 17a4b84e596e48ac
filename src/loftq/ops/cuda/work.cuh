// The work of a launch of y = x W^T (+ adapters), and which of it is whose.
//
// Definitions: those of decode.cuh, WARPS of a block, RESIDENT blocks of a
// multiprocessor, TOKENS (the most, a multiple of 8), RANKED.
#pragma once

#include "decode.cuh"

struct Weight {
    const u8 *packed, *scale, *nested, *a, *b;
    int rows, blocks;  // blocks before this weight's
    int before;        // rows before its own in y
    float scaling;
};

struct Arguments {
    Weight weights[3];
    const u16 *x;
    u16 *y;
    float *ax;         // (weights, parts, tokens, rank)
    u32 *counts;       // units done, blocks that have left; both 0 between launches
    const float *map;  // of nested scales
    Layout layout;
    int tokens, rows, share, height;
    int rank, chunk, parts, members;
    int own_rank, own_tokens;  // of each of the stacked adapters, which share out rank and tokens
    u32 unit_blocks;   // blocks that surely start first: they have the units
    u32 ring, sums, map_copies, ax_sums;  // addresses in shared memory
    u16 levels[16];
};

constexpr int BLOCKS = TOKENS / 8;  // token blocks of 8
constexpr int THREADS = WARPS * 32;

extern __shared__ u8 memory[];
#define FLOATS(address) reinterpret_cast<float *>(memory + ((address) - BASE))

struct Place {  // of one lane in the work of its block
    const Weight *w;
    int first, last, height, slabs, tiles, lane, warp;  // rows [first, last] of the weight
    __device__ __forceinline__ int row(int slab, int r) const {
        return min(first + slab * height + min(r, height - 1), last);  // twice costs no traffic
    }
};

__device__ __forceinline__ Place place_of(const Arguments &s) {
    Place p;
    p.lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    int member = 0, block = blockIdx.x;
    for (int m = 1; m < s.members; m++)
        if (block >= s.weights[m].blocks) member = m;
    p.w = s.weights + member;
    p.first = (block - p.w->blocks) * s.share;
    p.last = min(p.first + s.share, p.w->rows) - 1;
    p.height = s.height;
    p.slabs = (s.share + s.height - 1) / s.height;
    p.tiles = s.layout.columns / 256;
    return p;
}

// The sixteen columns of this lane in 64 of x, from `column` on, for token block n.
__device__ __forceinline__ void load_x(
    uint4 x[2], const Arguments &s, int column, int n, int lane) {
    int token = min(n * 8 + lane / 4, s.tokens - 1);  // the others' sums are not looked at
    const uint4 *from = reinterpret_cast<const uint4 *>(
        s.x + static_cast<u64>(token) * s.layout.columns + column + lane % 4 * 16);
    x[0] = from[0];
    x[1] = from[1];
}

// The same, of 16-bit numbers in shared memory, from address `at` on.
__device__ __forceinline__ void columns_of(uint4 x[2], u32 at) {
#pragma unroll
    for (int i = 0; i < 2; i++) x[i] = shared_four(at + i * 16);
}
