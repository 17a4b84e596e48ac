// y = x W^T + s (x A^T) B^T for a few tokens and up to three weights, from the packed bytes.
//
// Bound it aims for: one read of the codes at the speed of memory. decode.cuh says how a tile gets
// to the matrix instruction. Here:
// - Scales are applied in float32 to the sums of a tile of 64 columns.
// - A block owns `share` rows of one weight, in slabs of `height` <= SLAB; its warps take (slab,
//   tile) pairs in turn, with AHEAD of them on their way, and never wait for each other until the
//   end: every warp adds into sums of its own, and they are added up once, in one order.
// - s A x^T is cut into units of 16 rows by `chunk` tiles, one for a warp here and there; they write
//   partial sums, and every block adds all of its weight's at its end, in one order. A block that
//   waits in vain (blocks that are to compute them may not have started) computes them itself: to
//   the same bits. So nothing depends on which blocks run at once.
// - Weights and adapters are asked for before the launch waits for the kernel that writes x.
//
// Definitions: those of decode.cuh, RANKED (bytes of an adapter's number: 2, of x's dtype, or 4,
// float32, used in x's; 0: no adapters), WARPS, TOKENS (8 or 16: the most), AHEAD.

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
    u32 ring, sums, map_copies, b_rows, ax_sums;  // addresses in shared memory
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

struct Cursor {  // a warp's way through the (slab, tile) pairs of its block
    int slab, tile;
    __device__ __forceinline__ Cursor(const Place &p) : slab(0), tile(p.warp) { settle(p); }
    __device__ __forceinline__ void advance(const Place &p) { tile += WARPS, settle(p); }
    __device__ __forceinline__ void settle(const Place &p) {
        while (tile >= p.tiles) tile -= p.tiles, slab++;
    }
};

// The sixteen columns of this lane in 64 of x, from `column` on, for every token block.
__device__ __forceinline__ void load_x(
    uint4 x[BLOCKS][2], const Arguments &s, int column, int lane) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        int token = min(n * 8 + lane / 4, s.tokens - 1);  // the others' sums are not looked at
        const uint4 *from = reinterpret_cast<const uint4 *>(
            s.x + static_cast<u64>(token) * s.layout.columns + column + lane % 4 * 16);
        x[n][0] = from[0];
        x[n][1] = from[1];
    }
}

__device__ __forceinline__ void compute(
    float sums[SLAB / 16][BLOCKS][4], u32 stage, const Arguments &s, const Place &p, int tile,
    float offset, u32 bank) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
        uint4 x[BLOCKS][2];
        load_x(x, s, tile * 256 + g * 64, p.lane);
#pragma unroll
        for (int r = 0; r < SLAB / 16; r++) {
            u32 low[8], high[8];
            decode(stage, 2 * r, g, bank, p.lane, low);
            decode(stage, 2 * r + 1, g, bank, p.lane, high);
            float upper = scale_of(stage, s.map_copies, 2 * r, g, offset, p.lane);
            float lower = scale_of(stage, s.map_copies, 2 * r + 1, g, offset, p.lane);
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                float part[4] = {};
                product(part, low, high, x[n]);
#pragma unroll
                for (int i = 0; i < 4; i++) sums[r][n][i] += part[i] * (i < 2 ? upper : lower);
            }
        }
    }
}

// Sums of one slab into this warp's own part of shared memory, (rows of the block, tokens).
__device__ __forceinline__ void put(
    float sums[SLAB / 16][BLOCKS][4], float *own, const Arguments &s, const Place &p, int slab) {
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++)
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int within = r * 16 + i / 2 * 8 + p.lane / 4, row = slab * p.height + within;
                int token = n * 8 + p.lane % 4 * 2 + i % 2;
                if (within < p.height && row < s.share && token < s.tokens)
                    own[row * s.tokens + token] += sums[r][n][i];
                sums[r][n][i] = 0.0f;
            }
}

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

__device__ __forceinline__ void load_a(
    Slice &slice, const Arguments &s, const Unit &u, int tile, int lane) {
#pragma unroll
    for (int g = 0; g < 4; g++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u64 row = min(u.row + h * 8 + lane / 4, s.rank - 1);
            const uint4 *from = reinterpret_cast<const uint4 *>(
                s.weights[u.member].a +
                (row * s.layout.columns + tile * 256 + g * 64 + lane % 4 * 16) * RANKED);
#pragma unroll
            for (int i = 0; i < 2; i++) {
#if RANKED == 4
                uint4 first = from[2 * i], second = from[2 * i + 1];
                slice.rows[g][h][i] = make_uint4(
                    pair_of(first.x, first.y), pair_of(first.z, first.w),
                    pair_of(second.x, second.y), pair_of(second.z, second.w));
#else
                slice.rows[g][h][i] = from[i];
#endif
            }
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
            uint4 x[BLOCKS][2];
            load_x(x, s, tile * 256 + g * 64, lane);
            u32 low[8], high[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                low[i] = word_of(slice.rows[g][0], i);
                high[i] = word_of(slice.rows[g][1], i);
            }
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) product(sums[n], low, high, x[n]);
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
    __threadfence();
    __syncwarp();
}

// Rows of B to shared memory, 16 bytes apart from each other's banks.
__device__ __forceinline__ void ask_b(const Arguments &s, const Place &p) {
    int pieces = s.rank * RANKED / 16, rows = p.last - p.first + 1;
    const u8 *from = p.w->b + static_cast<u64>(p.first) * s.rank * RANKED;
    for (int i = threadIdx.x; i < rows * pieces; i += THREADS)
        copy_async<16>(s.b_rows + (i + i / pieces) * 16, from + i * 16);
}

// All units done by some block, or else by this one.
__device__ void wait_for_units(const Arguments &s, const Place &p) {
    int done = 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < PATIENCE && !done; i++)
            done = load_acquire(s.counts) == static_cast<u32>(units_of(s));
    if (!__syncthreads_or(done)) {
        Slice slice;
        for (int i = p.warp; i < units_of(s); i += WARPS) {
            Unit u(s, i);
            load_a(slice, s, u, u.part * s.chunk, p.lane);
            finish_unit(slice, s, u, p.lane);
        }
        __syncthreads();
    }
}

// s A x^T of this block's weight, (tokens, rank), into shared memory.
__device__ void add_units(const Arguments &s, const Place &p) {
    int size = s.tokens * s.rank;
    const float *from = s.ax + static_cast<u64>(p.w - s.weights) * s.parts * size;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        float total = 0.0f;
#pragma unroll 16
        for (int part = 0; part < s.parts; part++) total += load_fresh(from + part * size + i);
        FLOATS(s.ax_sums)[i] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(s.counts + 1, 1u) == gridDim.x - 1)
        s.counts[0] = s.counts[1] = 0;  // every block has counted all of its units
}

__device__ __forceinline__ float adapter_sum(const Arguments &s, int row, int token) {
    const float *ax = FLOATS(s.ax_sums) + token * s.rank;
    u32 b = s.b_rows + row * (s.rank * RANKED + 16);
    float total = 0.0f;
    for (int i = 0; i < s.rank; i += 8 / RANKED, b += 8) {
        uint2 words = shared_words(b);
#if RANKED == 4
        total += __uint_as_float(words.x) * ax[i] + __uint_as_float(words.y) * ax[i + 1];
#else
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 word = j < 2 ? words.x : words.y, half = j % 2 ? word >> 16 : word & 0xffff;
            total += (HALF ? half_to_float(half) : __uint_as_float(half << 16)) * ax[i + j];
        }
#endif
    }
    return total;
}
#endif

__device__ __forceinline__ Place place_of(const Arguments &s) {
    Place p;
    p.lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    int member = 0;
    for (int m = 1; m < s.members; m++)
        if (static_cast<int>(blockIdx.x) >= s.weights[m].blocks) member = m;
    p.w = s.weights + member;
    p.first = (blockIdx.x - p.w->blocks) * s.share;
    p.last = min(p.first + s.share, p.w->rows) - 1;
    p.height = s.height;
    p.slabs = (s.share + s.height - 1) / s.height;
    p.tiles = s.layout.columns / 256;
    return p;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_tokens(const __grid_constant__ Arguments s) {
    let_next_start();
    if (address_of(memory) != BASE) __trap();
    const Place p = place_of(s);
    const Weight w = *p.w;
    u32 ring = s.ring + p.warp * (AHEAD * STAGE);
    Cursor ahead(p), here(p);
    auto ask_next = [&](int slot) {
        if (ahead.slab < p.slabs)
            ask(ring + slot * STAGE, w.packed, w.scale, w.nested, s.layout, ahead.tile, p.lane,
                [&](int r) { return p.row(ahead.slab, r); });
        ahead.advance(p);
    };
#pragma unroll
    for (int d = 0; d < AHEAD; d++) {
        ask_next(d);
        commit_copies();
    }
#if RANKED
    // Its copies join the newest group: a warp waits for its own before the block meets.
    int number = (WARPS - 1 - p.warp) * gridDim.x + blockIdx.x;
    bool mine = number < units_of(s);
    Unit unit(s, mine ? number : 0);
    Slice slice;
    if (mine) load_a(slice, s, unit, unit.part * s.chunk, p.lane);
#endif
    fill_table(s.levels, THREADS);
    fill_map(s.map_copies, s.map, THREADS);
    int size = s.share * s.tokens;  // sums: (warps, share, tokens)
    for (int i = threadIdx.x; i < WARPS * size; i += THREADS) FLOATS(s.sums)[i] = 0.0f;
    float offset = SCALE == 0 ? *reinterpret_cast<const float *>(w.nested) : 0.0f;
    wait_for_producer();
    __syncthreads();
#if RANKED
    if (mine) {
        finish_unit(slice, s, unit, p.lane);
        if (p.lane == 0) atomicAdd(s.counts, 1u);
    }
    ask_b(s, p);
#endif
    float *own = FLOATS(s.sums) + p.warp * size;
    float sums[SLAB / 16][BLOCKS][4] = {};
    u32 bank = bank_of(p.lane);
    for (int slot = 0, slab = here.slab; here.slab < p.slabs; slot = slot + 1 < AHEAD ? slot + 1 : 0) {
        wait_copies<AHEAD - 1>();
        __syncwarp();
        compute(sums, ring + slot * STAGE, s, p, here.tile, offset, bank);
        __syncwarp();
        ask_next(slot);
        commit_copies();
        here.advance(p);
        if (here.slab != slab) {
            put(sums, own, s, p, slab);
            slab = here.slab;
        }
    }
    wait_copies<0>();
#if RANKED
    wait_for_units(s, p);
    add_units(s, p);
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += THREADS) {
        int row = i / s.tokens, token = i % s.tokens;
        if (p.first + row > p.last) break;
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < WARPS; v++) total += FLOATS(s.sums)[v * size + i];
#if RANKED
        total += adapter_sum(s, row, token);
#endif
        s.y[static_cast<u64>(token) * s.rows + w.before + p.first + row] =
            static_cast<u16>(pair(total, 0.0f));
    }
}
