// s A x^T and B, asked for before the block meets. Not run on a GPU yet.
//
// A warp adds its part of s A x^T up as soon as all units are done, while its last tile is on its
// way, and has its rows of B in registers when the block meets; adapters.cuh does one after the
// other once it has met. The bits are the same.
#pragma once

#include "adapters.cuh"

#if RANKED
// The units of a warp are written; said without waiting until all can see them.
__device__ __forceinline__ void say_done(const OwnUnits &units, const Arguments &s, int lane) {
    if (units.count == 0) return;
    __syncwarp();
    if (lane == 0) add_release(s.counts, static_cast<u32>(units.count));
}

// This thread's part of s A x^T if all units are done by now; whether they were. A warp without a part says yes.
__device__ __forceinline__ bool add_units_early(const Arguments &s, const Place &p) {
    if (p.warp * 32 >= s.tokens * ((s.rank + 63) / 64 * 64)) return true;
    if (load_acquire(s.counts) != static_cast<u32>(units_of(s))) return false;
    add_own_units(s, p);
    return true;
}

// How many blocks had left before this one, which will not look at the units again; said to one
// thread, which hands it to `leave`.
__device__ __forceinline__ u32 leaving(const Arguments &s) {
    return threadIdx.x == THREADS - 1 ? atomicAdd(s.counts + 1, 1u) : 0;
}
__device__ __forceinline__ void leave(const Arguments &s, u32 before) {
    if (threadIdx.x == THREADS - 1 && before == gridDim.x - 1)
        s.counts[0] = s.counts[1] = 0;  // every block has counted all of its units
}

struct Rows {  // of B: a slab by 64 ranks
    uint4 halves[SLAB / 16][2][2];
    __device__ __forceinline__ void load(const Arguments &s, const Place &p, int slab, int at) {
#pragma unroll
        for (int r = 0; r < SLAB / 16; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = p.row(slab, (r * 2 + h) * 8 + p.lane / 4);
                load_b(halves[r][h], s, p, row, at + p.lane % 4 * 16);
            }
    }
};

// sums of a slab += B (s A x^T) for the ranks at .. at + 63
__device__ __forceinline__ void add_rows(
    float sums[SLAB / 16][BLOCKS][4], const Rows &b, const Arguments &s, const Place &p, int at) {
    int pitch = rank_pitch(s);
    int of_lane = at + p.lane % 4 * 16;
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++) {
        u32 low[8], high[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            low[i] = word_of(b.halves[r][0], i), high[i] = word_of(b.halves[r][1], i);
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
