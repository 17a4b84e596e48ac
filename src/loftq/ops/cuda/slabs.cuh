// Slabs of a block that go through the columns in step, and what becomes of their sums.
//
// Warp (slab, g) has columns 64 g .. 64 g + 63 of a tile; its sums meet those of the other warps of
// its slab in shared memory, at the end and in one order.
#pragma once

#include "adapters.cuh"

constexpr int PITCH = 512 + 16;  // of a token in a tile of x: neighbours in other banks
constexpr int X_STAGE = TOKENS * PITCH;

// sums += what a warp's columns of a tile give; x_of(n) is where this lane's columns of x for tokens
// 8 n .. 8 n + 7 are in shared memory.
template <class FROM> __device__ __forceinline__ void compute(
    float sums[SLAB / 16][BLOCKS][4], FROM x_of, u32 stage, const Arguments &s, const Place &p,
    int g, float offset, u32 bank) {
    u32 low[SLAB / 16][8], high[SLAB / 16][8];
    float scale[SLAB / 16][2];
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++) {
        decode(stage, 2 * r, g, bank, p.lane, low[r]);
        decode(stage, 2 * r + 1, g, bank, p.lane, high[r]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            scale[r][i] = scale_of(stage, s.map_copies, 2 * r + i, g, offset, p.lane);
    }
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        uint4 x[2];
        columns_of(x, x_of(n));
#pragma unroll
        for (int r = 0; r < SLAB / 16; r++) {
            float part[4] = {};
            product(part, low[r], high[r], x);
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][n][i] += part[i] * scale[r][i / 2];
        }
    }
}

// Sums of a slab's warp v into shared memory, or added to what it put there, (v, tokens, share).
template <bool ADD> __device__ __forceinline__ void put(
    float *all, const float sums[SLAB / 16][BLOCKS][4], const Arguments &s, const Place &p,
    int slab, int v) {
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++)
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int within = r * 16 + i / 2 * 8 + p.lane / 4, row = slab * p.height + within;
                int token = n * 8 + p.lane % 4 * 2 + i % 2;
                if (within >= p.height || row >= s.share || token >= s.tokens) continue;
                float &to = all[(v * s.tokens + token) * s.share + row];
                to = ADD ? to + sums[r][n][i] : sums[r][n][i];
            }
}

// The block's rows of y: the sums of the PARTS warps of each slab.
template <int PARTS> __device__ __forceinline__ void write_rows(
    const float *all, const Arguments &s, const Place &p, const Weight &w) {
    for (int i = threadIdx.x; i < s.share * s.tokens; i += THREADS) {
        int token = i / s.share, row = p.first + i % s.share;
        if (row > p.last) continue;
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < PARTS; v++) total += all[v * s.tokens * s.share + i];
        s.y[static_cast<u64>(token) * s.rows + w.before + row] =
            static_cast<u16>(pair(total, 0.0f));
    }
}
