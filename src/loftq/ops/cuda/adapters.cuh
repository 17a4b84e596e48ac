// s A x^T of a launch's adapters, by its own blocks.
//
// It is cut into units of 16 rows of A by `chunk` tiles of columns, one for a warp here and there;
// they write partial sums, and every block adds all of its weight's at its end, in one order. A
// block that waits in vain (those that have the units may not run) computes them itself, to the
// same bits: so nothing depends on which blocks run at once.
//
// Definitions: those of work.cuh; EARLY (early.cuh); RANKED is the bytes of an adapter's number: 2,
// of x's dtype, or 4, float32, used in x's; 0: no adapters.
#pragma once

#include "work.cuh"

#if RANKED
struct Unit {  // 16 rows of one A, `chunk` tiles of columns
    int member, row, part;
    __device__ __forceinline__ Unit(const Arguments &s, int number) {
        int blocks = (s.rank + 15) / 16;
        part = number % s.parts;
        row = number / s.parts % blocks * 16;
        member = number / s.parts / blocks;
    }
};

__device__ __forceinline__ int units_of(const Arguments &s) {
    return s.members * s.parts * ((s.rank + 15) / 16);
}

struct Slice {  // 16 rows by 256 columns of A
    uint4 rows[4][2][2];
};

__device__ __forceinline__ u32 pair_of(u32 low, u32 high) {
    return pair(__uint_as_float(low), __uint_as_float(high));
}

// Numbers 8 i .. 8 i + 7 of an adapter, from `from` on, in x's dtype.
__device__ __forceinline__ uint4 eight_of(const u8 *from, int i) {
    const uint4 *four = reinterpret_cast<const uint4 *>(from);
#if RANKED == 4
    uint4 a = four[2 * i], b = four[2 * i + 1];
    return make_uint4(
        pair_of(a.x, a.y), pair_of(a.z, a.w), pair_of(b.x, b.y), pair_of(b.z, b.w));
#else
    return four[i];
#endif
}

__device__ __forceinline__ void load_a(
    Slice &slice, const Arguments &s, const Unit &u, int tile, int lane) {
#pragma unroll
    for (int g = 0; g < 4; g++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u64 row = min(u.row + h * 8 + lane / 4, s.rank - 1);
            const u8 *from = s.weights[u.member].a +
                (row * s.layout.columns + tile * 256 + g * 64 + lane % 4 * 16) * RANKED;
            slice.rows[g][h][0] = eight_of(from, 0);
            slice.rows[g][h][1] = eight_of(from, 1);
        }
}

// Partial sums of one unit into s.ax; `slice` is its first tile.
__device__ __forceinline__ void finish_unit(
    Slice &slice, const Arguments &s, const Unit &u, int lane) {
    float sums[BLOCKS][4] = {};
    int tiles = s.layout.columns / 256, end = min((u.part + 1) * s.chunk, tiles);
    for (int tile = u.part * s.chunk; tile < end; tile++) {
        if (tile > u.part * s.chunk) load_a(slice, s, u, tile, lane);
#pragma unroll
        for (int g = 0; g < 4; g++) {
            u32 low[8], high[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                low[i] = word_of(slice.rows[g][0], i);
                high[i] = word_of(slice.rows[g][1], i);
            }
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                uint4 x[2];
                load_x(x, s, tile * 256 + g * 64, n, lane);
                product(sums[n], low, high, x);
            }
        }
    }
    float *to = s.ax + static_cast<u64>(u.member * s.parts + u.part) * s.tokens * s.rank;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = n * 8 + lane % 4 * 2 + i % 2, row = u.row + i / 2 * 8 + lane / 4;
            if (token < s.tokens && row < s.rank)
                to[token * s.rank + row] = sums[n][i] * s.weights[u.member].scaling;
        }
#if !EARLY
    __threadfence();
    __syncwarp();
#endif
}

// Units first, first + step, ... of a warp. Not inlined: its registers are not the loop's beside it.
#if EARLY
__device__ __forceinline__
#else
__device__ __noinline__
#endif
void compute_units(const Arguments &s, int first, int step, int lane) {
    for (int i = first; i < units_of(s); i += step) {
        Unit u(s, i);
        Slice slice;
        load_a(slice, s, u, u.part * s.chunk, lane);
        finish_unit(slice, s, u, lane);
    }
}

// The units of this warp.
struct OwnUnits {
    int first, step, count;
    __device__ __forceinline__ OwnUnits(const Arguments &s, const Place &p)
        : first((WARPS - 1 - p.warp) * s.unit_blocks + blockIdx.x), step(WARPS * s.unit_blocks) {
        count = blockIdx.x < s.unit_blocks && first < units_of(s)
            ? (units_of(s) - first + step - 1) / step : 0;
    }
    // Said once all of them are written.
    __device__ __forceinline__ void done(const Arguments &s, int lane) const {
        if (count && lane == 0) atomicAdd(s.counts, static_cast<u32>(count));
    }
};

// All units done by some block, or else by this one.
__device__ __forceinline__ void wait_for_units(const Arguments &s, const Place &p) {
    int done = 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < PATIENCE && !done; i++)
            done = load_acquire(s.counts) == static_cast<u32>(units_of(s));
    if (!__syncthreads_or(done)) {
        compute_units(s, p.warp, WARPS, p.lane);
        __syncthreads();
    }
}

// Bytes of a token of s A x^T in shared memory: 16-bit numbers, whole tiles of 64, the last filled
// up with 0; neighbours in other banks.
__device__ __forceinline__ int rank_pitch(const Arguments &s) {
    return (s.rank + 63) / 64 * 128 + 16;
}

// This block's rows of B on their way to the L2 cache.
__device__ __forceinline__ void prefetch_b(const Arguments &s, const Place &p) {
    int bytes = s.rank * RANKED;
    const u8 *from = p.w->b + static_cast<u64>(p.first) * bytes;
    for (int i = threadIdx.x * 128; i < (p.last - p.first + 1) * bytes; i += THREADS * 128)
        prefetch(from + i);
}

// Sixteen columns of a row of B, from `at` on, as pairs; 0 beyond the rank.
__device__ __forceinline__ void load_b(
    uint4 v[2], const Arguments &s, const Place &p, int row, int at) {
    const u8 *from = p.w->b + (static_cast<u64>(row) * s.rank + at) * RANKED;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (at + i * 8 < s.rank) v[i] = eight_of(from, i);
    }
}

// This thread's part of s A x^T of the block's weight, (tokens, rank), into shared memory; 0 where a
// row of stacked adapters is not the token's own.
__device__ __forceinline__ void add_own_units(const Arguments &s, const Place &p) {
    int pitch = rank_pitch(s) / 2, ranks = pitch - 8, size = s.tokens * s.rank;
    const float *parts = s.ax + static_cast<u64>(p.w - s.weights) * s.parts * size;
    u16 *to = reinterpret_cast<u16 *>(FLOATS(s.ax_sums));
    for (int i = threadIdx.x; i < s.tokens * ranks; i += THREADS) {
        int token = i / ranks, r = i % ranks;
        float total = 0.0f;
        if (r < s.rank && r / s.own_rank == token / s.own_tokens)
#pragma unroll 16
            for (int part = 0; part < s.parts; part++)
                total += load_fresh(parts + part * size + token * s.rank + r);
        to[token * pitch + r] = static_cast<u16>(pair(total, 0.0f));
    }
}

// The whole block's, and the units forgotten once no block is to look at them.
__device__ __forceinline__ void add_units(const Arguments &s, const Place &p) {
    add_own_units(s, p);
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(s.counts + 1, 1u) == gridDim.x - 1)
        s.counts[0] = s.counts[1] = 0;  // every block has counted all of its units
}

// sums of a slab += B (s A x^T) for the ranks at .. at + 63
__device__ __forceinline__ void add_adapter(
    float sums[SLAB / 16][BLOCKS][4], const Arguments &s, const Place &p, int slab, int at) {
    int pitch = rank_pitch(s);
    int of_lane = at + p.lane % 4 * 16;
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++) {
        u32 low[8], high[8];
        uint4 rows[2][2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            load_b(rows[h], s, p, p.row(slab, (r * 2 + h) * 8 + p.lane / 4), of_lane);
#pragma unroll
        for (int i = 0; i < 8; i++) low[i] = word_of(rows[0], i), high[i] = word_of(rows[1], i);
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            uint4 x[2];
            int token = min(n * 8 + p.lane / 4, s.tokens - 1);
            columns_of(x, s.ax_sums + token * pitch + of_lane * 2);
            product(sums[r][n], low, high, x);
        }
    }
}
#endif
