// y = x W^T (+ B ax) for a few tokens, from the packed bytes.
//
// Bound it aims for: one read of the codes at the speed of memory. decode.cuh says how a tile gets
// to the matrix instruction. Here:
// - Scales are applied in float32 to the sums of a tile of 64 columns, zeros by the sum of x.
// - A block owns `share` rows, in slabs of SLAB; its warps take (slab, tile) pairs in turn, with
//   AHEAD of them on their way, and never wait for each other until the end: every warp adds into
//   sums of its own, and they are added up once, in one order. No atomics: the same bits each run.
// - Weights are asked for before the launch waits for the kernel that writes x (WAIT_EARLY: x is
//   that kernel's; else only ax is).
//
// Definitions: those of decode.cuh, RANKED (adapter), WARPS, TOKENS (a multiple of 8), AHEAD,
// WAIT_EARLY.

#include "decode.cuh"

struct Arguments {
    Weight weight;
    const u8 *x, *ax, *b;
    u8 *y;
    int tokens, rank, share, slabs, parts;
};

constexpr int BLOCKS = TOKENS / 8;  // token blocks of 8

struct Tile {  // what is on its way for one lane
    Codes codes;
    uint4 x[2 * BLOCKS];
};

struct Place {  // of one lane in the work of its block
    int first, last, height, lane, warp, tiles;  // rows [first, last], in slabs of `height`
    int token, tokens;                           // first token and their number
};

__device__ __forceinline__ int row_of(const Place &p, int slab, int h) {
    int within = min(h * 8 + p.lane / 4, p.height - 1);  // a row twice costs no traffic
    return min(p.first + slab * p.height + within, p.last);
}

struct Cursor {  // a warp's way through the (slab, tile) pairs of its block
    int slab, tile;
    u32 rows[UPPER];

    __device__ __forceinline__ void turn(const Place &p) {
#pragma unroll
        for (int h = 0; h < UPPER; h++) rows[h] = row_of(p, slab, h);
    }
    __device__ __forceinline__ Cursor(const Place &p) : slab(0), tile(p.warp) {
        while (tile >= p.tiles) tile -= p.tiles, slab++;
        turn(p);
    }
    __device__ __forceinline__ void advance(const Place &p) {
        tile += WARPS;
        if (tile >= p.tiles) {
            do tile -= p.tiles, slab++;
            while (tile >= p.tiles);
            turn(p);
        }
    }
};

__device__ __forceinline__ void fetch_x(Tile &t, const Arguments &s, const Place &p, int tile) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        int token = n * 8 + p.lane / 4;
        const uint4 *from = reinterpret_cast<const uint4 *>(
            s.x + (static_cast<u64>(p.token + token) * s.weight.columns + tile * 64 + p.lane % 4 * 16) * 2);
        bool inside = token < p.tokens;
        t.x[2 * n] = inside ? from[0] : make_uint4(0, 0, 0, 0);
        t.x[2 * n + 1] = inside ? from[1] : make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void compute(
    float sums[SLAB / 16][BLOCKS][4], const Tile &t, float offset, u32 bank) {
    float total[BLOCKS][4] = {};
    if (ZEROS)
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) sum_columns(total[n], t.x + 2 * n);
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++) {
        u32 low[8], high[8];
        decode(t.codes, 2 * r, bank, low);
        decode(t.codes, 2 * r + 1, bank, high);
        const float scale[2] = {
            scale_of(t.codes, 2 * r, offset), scale_of(t.codes, 2 * r + 1, offset)};
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            float part[4] = {};
            product(part, low, high, t.x + 2 * n);
            add_scaled(sums[r][n], part, total[n], t.codes, r, scale);
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
                if (within < p.height && row < s.share && token < p.tokens)
                    own[row * p.tokens + token] += sums[r][n][i];
                sums[r][n][i] = 0.0f;
            }
}

#if RANKED
// The adapter's 16-bit B as one more tile of 64 columns: x is ax, the sum of its parts.
__device__ void add_adapter(float *own, const Arguments &s, const Place &p) {
    int ranks = (s.rank + 63) / 64, q = p.lane % 4;
    for (int i = p.warp; i < s.slabs * ranks; i += WARPS) {
        int slab = i / ranks, first = i % ranks * 64 + q * 16;
        float sums[SLAB / 16][BLOCKS][4] = {};
#pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 a[SLAB / 16][4], b[BLOCKS][2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = first + step * 4 + j * 2;
                bool even = column < s.rank, odd = column + 1 < s.rank;
#pragma unroll
                for (int h = 0; h < UPPER; h++) {
                    const u16 *from = reinterpret_cast<const u16 *>(s.b) +
                        static_cast<u64>(row_of(p, slab, h)) * s.rank + column;
                    u32 word = even ? from[0] : 0;
                    a[h / 2][h % 2 + 2 * j] = word | (odd ? static_cast<u32>(from[1]) << 16 : 0);
                }
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    int token = n * 8 + p.lane / 4;
                    float v[2] = {};
                    if (token < p.tokens)
                        for (int part = 0; part < s.parts; part++) {
                            const float *from = reinterpret_cast<const float *>(s.ax) +
                                (part * s.tokens + p.token + token) * s.rank + column;
                            v[0] += even ? from[0] : 0.0f;
                            v[1] += odd ? from[1] : 0.0f;
                        }
                    b[n][j] = pair(v[0], v[1]);
                }
            }
#pragma unroll
            for (int r = 0; r < SLAB / 16; r++)
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) multiply(sums[r][n], a[r], b[n][0], b[n][1]);
        }
        put(sums, own, s, p, slab);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
few_tokens(const __grid_constant__ Arguments s) {
    let_next_start();
    Place p;
    p.first = blockIdx.x * s.share;
    p.last = min(p.first + s.share, s.weight.rows) - 1;
    p.lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    p.tiles = s.weight.columns / 64;
    p.height = (s.share + s.slabs - 1) / s.slabs;
    p.token = blockIdx.y * TOKENS;
    p.tokens = min(TOKENS, s.tokens - p.token);

    Tile tile[AHEAD];
    Cursor ahead(p);
    int its_tile[AHEAD];
#pragma unroll
    for (int d = 0; d < AHEAD; d++) {
        if (ahead.slab < s.slabs) fetch(tile[d].codes, s.weight, ahead.rows, ahead.tile, p.lane % 4);
        its_tile[d] = ahead.tile;
        ahead.advance(p);
    }

    fill_table(s.weight, WARPS * 32);
    float *parts = reinterpret_cast<float *>(memory + TABLE + MAP);  // (warps, share, tokens)
    int size = s.share * p.tokens;
    for (int i = threadIdx.x; i < WARPS * size; i += WARPS * 32) parts[i] = 0.0f;
    float offset = nested_offset(s.weight);
    __syncthreads();

    if (WAIT_EARLY) wait_for_producer();
#pragma unroll
    for (int d = 0; d < AHEAD; d++) fetch_x(tile[d], s, p, its_tile[d]);

    u32 bank = bank_of(p.lane);
    float *own = parts + p.warp * size;
    float sums[SLAB / 16][BLOCKS][4] = {};
    Cursor here(p);
    int slab = here.slab;
    while (here.slab < s.slabs) {
#pragma unroll
        for (int d = 0; d < AHEAD; d++) {
            if (here.slab < s.slabs) {
                if (here.slab != slab) {
                    put(sums, own, s, p, slab);
                    slab = here.slab;
                }
                compute(sums, tile[d], offset, bank);
                if (ahead.slab < s.slabs) {
                    fetch(tile[d].codes, s.weight, ahead.rows, ahead.tile, p.lane % 4);
                    fetch_x(tile[d], s, p, ahead.tile);
                    ahead.advance(p);
                }
                here.advance(p);
            }
        }
    }
    if (slab < s.slabs) put(sums, own, s, p, slab);
    if (!WAIT_EARLY) wait_for_producer();
#if RANKED
    add_adapter(own, s, p);
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += WARPS * 32) {
        int row = p.first + i / p.tokens, token = p.token + i % p.tokens;
        if (row > p.last) break;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += parts[w * size + i];
        u16 *y = reinterpret_cast<u16 *>(s.y) + static_cast<u64>(token) * s.weight.rows + row;
        *y = static_cast<u16>(pair(total, 0.0f));
    }
}

#if RANKED
// Part blockIdx.y of ax = scaling A x^T for 16 rows of the adapter's A, float32 (parts, tokens,
// rank). A warp takes two tiles of 64 columns.
extern "C" __global__ void __launch_bounds__(256)
down(const u8 *x, const u8 *a, float *ax, int tokens, int columns, int rank, float scaling) {
    float(*parts)[16][8] = reinterpret_cast<float(*)[16][8]>(memory);  // (warps, rows, tokens)
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4;
    int tile = blockIdx.y * 16 + warp * 2, token = blockIdx.z * 8 + lane / 4;
    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 rows[2][2][2], across[2][2];
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = blockIdx.x * 16 + h * 8 + lane / 4, column = (tile + t) * 64 + q * 16;
            const uint4 *from = reinterpret_cast<const uint4 *>(
                a + (static_cast<u64>(row) * columns + column) * 2);
            bool inside = row < rank && column < columns;
            rows[t][h][0] = inside ? from[0] : none;
            rows[t][h][1] = inside ? from[1] : none;
        }
    wait_for_producer();
    let_next_start();  // what waits for this block may read x
#pragma unroll
    for (int t = 0; t < 2; t++) {
        int column = (tile + t) * 64 + q * 16;
        const uint4 *from = reinterpret_cast<const uint4 *>(
            x + (static_cast<u64>(token) * columns + column) * 2);
        bool inside = token < tokens && column < columns;
        across[t][0] = inside ? from[0] : none;
        across[t][1] = inside ? from[1] : none;
    }
    float sums[4] = {};
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const u32 w[4] = {
                word_of(rows[t][0], 2 * s), word_of(rows[t][1], 2 * s),
                word_of(rows[t][0], 2 * s + 1), word_of(rows[t][1], 2 * s + 1)};
            multiply(sums, w, word_of(across[t], 2 * s), word_of(across[t], 2 * s + 1));
        }
#pragma unroll
    for (int i = 0; i < 4; i++) parts[warp][i / 2 * 8 + lane / 4][q * 2 + i % 2] = sums[i];
    __syncthreads();
    int row = blockIdx.x * 16 + threadIdx.x / 8 % 16, to = blockIdx.z * 8 + threadIdx.x % 8;
    if (threadIdx.x < 128 && row < rank && to < tokens) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; w++) total += parts[w][threadIdx.x / 8][threadIdx.x % 8];
        ax[(static_cast<u64>(blockIdx.y) * tokens + to) * rank + row] = total * scaling;
    }
}
#endif
