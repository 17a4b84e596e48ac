// y = x W^T + s (x A^T) B^T for 17 to 64 tokens and up to three weights, from the packed bytes.
//
// Bounds: reading x, which every block of `share` rows reads once, from the L2 cache, and shared
// memory, where 32 rows of a warp meet 64 columns of all tokens. So here
// - a block of SLABS slabs of 32 rows goes through the columns in step: a tile of 256 columns of x
//   and its weights' are in shared memory while the next one is on its way;
// - warp (slab, g) has columns 64 g .. 64 g + 63 of every tile, decodes them once for all tokens,
//   and the four sums of a slab are added up at the end, in one order.
//
// Definitions: those of adapters.cuh (SLAB 32, TOKENS 32 or 64, WARPS = 4 SLABS).

#include "adapters.cuh"

constexpr int SLABS = WARPS / 4;
constexpr int PITCH = 512 + 16;  // of a token in a tile of x: neighbours in other banks
constexpr int X_STAGE = TOKENS * PITCH, ALL = X_STAGE + SLABS * STAGE;
static_assert(SLAB == 32, "a warp decodes 32 rows");

// The next tile of x, by the warps that ask for no weights.
__device__ __forceinline__ void ask_x(u32 to, const Arguments &s, const Place &p, int tile) {
    constexpr int HELPERS = (WARPS - SLABS) * 32;
    int helper = (p.warp - p.warp / 4 - 1) * 32 + p.lane;
    for (int i = helper; i < s.tokens * 32; i += HELPERS) {
        int token = i / 32, at = i % 32 * 16;
        u64 from = (static_cast<u64>(token) * s.layout.columns + tile * 256) * 2 + at;
        copy_async<16>(to + token * PITCH + at, reinterpret_cast<const u8 *>(s.x) + from);
    }
}

// The sixteen columns of this lane in 64 of a row of `pitch` bytes for a token block.
__device__ __forceinline__ void columns_of(uint4 x[2], u32 at) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint2 low = shared_words(at + i * 16), high = shared_words(at + i * 16 + 8);
        x[i] = make_uint4(low.x, low.y, high.x, high.y);
    }
}

__device__ __forceinline__ void compute(
    float sums[2][BLOCKS][4], u32 x_stage, u32 stage, const Arguments &s, const Place &p, int g,
    float offset, u32 bank) {
    u32 low[2][8], high[2][8];
    float scale[2][2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        decode(stage, 2 * r, g, bank, p.lane, low[r]);
        decode(stage, 2 * r + 1, g, bank, p.lane, high[r]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            scale[r][i] = scale_of(stage, s.map_copies, 2 * r + i, g, offset, p.lane);
    }
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        uint4 x[2];
        int token = min(n * 8 + p.lane / 4, s.tokens - 1);  // the others' sums are not looked at
        columns_of(x, x_stage + token * PITCH + g * 128 + p.lane % 4 * 32);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float part[4] = {};
            product(part, low[r], high[r], x);
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][n][i] += part[i] * scale[r][i / 2];
        }
    }
}

#if RANKED
// Bytes of a row of B, and of a token of s A x^T, in shared memory: 16-bit numbers, whole tiles of
// 64, the last filled up with 0.
__device__ __forceinline__ int rank_pitch(const Arguments &s) {
    return (s.rank + 63) / 64 * 128 + 16;
}

__device__ __forceinline__ void load_b(const Arguments &s, const Place &p) {
    int pieces = rank_pitch(s) / 16 - 1;  // of 8 numbers
    for (int i = threadIdx.x; i < s.share * pieces; i += THREADS) {
        int row = min(p.first + i / pieces, p.last), at = i % pieces * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (at < s.rank) {
            const uint4 *from = reinterpret_cast<const uint4 *>(
                p.w->b + (static_cast<u64>(row) * s.rank + at) * RANKED);
#if RANKED == 4
            uint4 a = from[0], b = from[1];
            v = make_uint4(pair_of(a.x, a.y), pair_of(a.z, a.w), pair_of(b.x, b.y),
                           pair_of(b.z, b.w));
#else
            v = from[0];
#endif
        }
        store_words(s.b_rows + i / pieces * rank_pitch(s) + at * 2, v);
    }
}

// s A x^T of this block's weight, (tokens, rank), into shared memory.
__device__ void add_units(const Arguments &s, const Place &p) {
    int pitch = rank_pitch(s) / 2;
    u16 *to = reinterpret_cast<u16 *>(FLOATS(s.ax_sums));
    for (int i = threadIdx.x; i < s.tokens * (pitch - 8); i += THREADS) {
        int token = i / (pitch - 8), r = i % (pitch - 8);
        float total = r < s.rank ? add_parts(s, p, token * s.rank + r) : 0.0f;
        to[token * pitch + r] = static_cast<u16>(pair(total, 0.0f));
    }
    __syncthreads();
    leave_units(s);
}

// The adapter as more columns: 64 of the rank a warp.
__device__ __forceinline__ void add_adapter(
    float sums[2][BLOCKS][4], const Arguments &s, const Place &p, int slab, int g) {
    int pitch = rank_pitch(s), q = p.lane % 4;
    for (int at = g * 128; at < pitch - 16; at += 512)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            u32 low[8], high[8];
            uint4 rows[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = min(slab * p.height + (r * 2 + h) * 8 + p.lane / 4, s.share - 1);
                columns_of(rows[h], s.b_rows + row * pitch + at + q * 32);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) low[i] = word_of(rows[0], i), high[i] = word_of(rows[1], i);
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                uint4 x[2];
                int token = min(n * 8 + p.lane / 4, s.tokens - 1);
                columns_of(x, s.ax_sums + token * pitch + at + q * 32);
                product(sums[r][n], low, high, x);
            }
        }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
more_tokens(const __grid_constant__ Arguments s) {
    let_next_start();
    if (address_of(memory) != BASE) __trap();
    const Place p = place_of(s);
    const Weight w = *p.w;
    int slab = p.warp / 4, g = p.warp % 4;
    auto ask_weights = [&](int tile) {
        u32 to = s.ring + tile % 2 * ALL + X_STAGE + slab * STAGE;
        if (g == 0 && slab < p.slabs && tile < p.tiles)
            ask(to, w.packed, w.scale, w.nested, s.layout, tile, p.lane,
                [&](int r) { return p.row(slab, r); });
    };
    auto ask_tokens = [&](int tile) {
        if (g != 0 && tile < p.tiles) ask_x(s.ring + tile % 2 * ALL, s, p, tile);
    };
    ask_weights(0);
#if RANKED
    OwnUnits units(s, p);
    load_b(s, p);
#endif
    fill_table(s.levels, THREADS);
    fill_map(s.map_copies, s.map, THREADS);
    float offset = SCALE == 0 ? *reinterpret_cast<const float *>(w.nested) : 0.0f;
    wait_for_producer();
    ask_tokens(0);
    commit_copies();
#if RANKED
    units.finish(s, p);
#endif
    float sums[2][BLOCKS][4] = {};
    u32 bank = bank_of(p.lane);
    for (int tile = 0; tile < p.tiles; tile++) {
        wait_copies<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        ask_weights(tile + 1);
        ask_tokens(tile + 1);
        commit_copies();
        u32 stage = s.ring + tile % 2 * ALL;
        if (slab < p.slabs)
            compute(sums, stage, stage + X_STAGE + slab * STAGE, s, p, g, offset, bank);
    }
#if RANKED
    wait_for_units(s, p);
    add_units(s, p);
    if (slab < p.slabs) add_adapter(sums, s, p, slab, g);
#endif
    __syncthreads();
    float *all = FLOATS(s.sums);  // (4, tokens, share), where the tiles were
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int within = r * 16 + i / 2 * 8 + p.lane / 4, row = slab * p.height + within;
                int token = n * 8 + p.lane % 4 * 2 + i % 2;
                if (within < p.height && row < s.share && token < s.tokens)
                    all[(g * s.tokens + token) * s.share + row] = sums[r][n][i];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < s.share * s.tokens; i += THREADS) {
        int token = i / s.share, row = p.first + i % s.share;
        if (row > p.last) continue;
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < 4; v++) total += all[v * s.tokens * s.share + i];
        s.y[static_cast<u64>(token) * s.rows + w.before + row] =
            static_cast<u16>(pair(total, 0.0f));
    }
}
