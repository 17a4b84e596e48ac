// y = x W^T (+ B ax) for a few tokens, from the packed bytes (layout: ops/reference.py).
//
// Bound it aims for: one read of the codes at the speed of memory. How:
// - Decoding is one permute and one shared-memory read for a pair (4, 3 bits) or four (2 bits) of
//   weights: the byte of codes is an address. Each lane has a copy of the table in banks of its
//   own, so that no two lanes meet. Nothing is computed on a level.
// - Weights are the left operand of mma m16n8k16. Its columns may be summed in any order: lane q of
//   a row takes the 16 columns 16 q .. 16 q + 15 of a tile of 64, which are neighbours in memory.
// - Scales are applied in float32 to the sums of a tile of 64 columns, zeros by the sum of x.
// - A block owns `share` rows, in slabs of SLAB; its warps take (slab, tile) pairs in turn, with
//   AHEAD of them on their way, and never wait for each other until the end: every warp adds into
//   sums of its own, and they are added up once, in one order. No atomics: the same bits each run.
// - Weights are asked for before the launch waits for the kernel that writes x (WAIT_EARLY: x is
//   that kernel's; else only ax is).
//
// Compiled for one format and launch by definitions: BITS, HALF (float16, else bfloat16), GROUP
// (0: one scale a row), SCALE (0: nested bytes, 1: float16, 2: bfloat16, 3: float32), ZEROS,
// RANKED (adapter), WARPS, SLAB (16 or 32 rows), TOKENS (8 or 16), AHEAD, WAIT_EARLY.

#include "instructions.cuh"

struct Arguments {
    const u8 *x, *packed, *scale, *zero, *nested, *map, *levels, *ax, *b;
    u8 *y;
    int tokens, rows, columns, groups, row_bytes, zero_row_bytes, rank, share, slabs, parts;
};

constexpr int UPPER = SLAB / 8;              // rows of one lane
constexpr int BLOCKS = TOKENS / 8;           // token blocks of 8
constexpr int WORDS = BITS == 4 ? 2 : 1;     // 32-bit words of a row in one lane
constexpr int TABLE = BITS == 3 ? 64 * 256 : 65536;

struct Tile {  // what is on its way for one lane: words, scale codes, x
    u32 words[UPPER * WORDS];
    u32 high[BITS == 3 ? UPPER : 1];
    u32 code[UPPER];
    float run[SCALE == 0 ? UPPER : 1];
    u32 zero[ZEROS ? UPPER : 1];
    uint4 x[2 * BLOCKS];
};

extern __shared__ __align__(1024) u8 memory[];  // the table first

// The levels of byte PLACE of `codes` in this lane's banks: an entry takes 256 bytes, so the byte
// is the second of the offset; the first is the lane's.
template <int PLACE> __device__ __forceinline__ u32 look_up(u32 codes, u32 bank) {
    return *reinterpret_cast<const u32 *>(memory + permute(codes, bank, 0x7604 | PLACE << 4));
}

template <int PLACE> __device__ __forceinline__ uint2 look_up_four(u32 codes, u32 bank) {
    return *reinterpret_cast<const uint2 *>(memory + permute(codes, bank, 0x7604 | PLACE << 4));
}

// Levels of the codes in a byte, once for every lane.
__device__ void fill_table(const u16 *levels) {
    constexpr int ENTRIES = TABLE / 256;
    for (int i = threadIdx.x; i < ENTRIES * 32; i += WARPS * 32) {
        int code = i / 32, lane = i % 32;
#if BITS == 2
        uint2 four;
        four.x = levels[code & 3] | static_cast<u32>(levels[code >> 2 & 3]) << 16;
        four.y = levels[code >> 4 & 3] | static_cast<u32>(levels[code >> 6]) << 16;
        *reinterpret_cast<uint2 *>(memory + code * 256 + lane * 8) = four;
#elif BITS == 3  // low bits of both codes, then their third bits
        u32 first = (code & 3) | (code >> 4 & 1) << 2, second = (code >> 2 & 3) | (code >> 5) << 2;
        *reinterpret_cast<u32 *>(memory + code * 256 + lane * 4) =
            levels[first] | static_cast<u32>(levels[second]) << 16;
#else
        *reinterpret_cast<u32 *>(memory + code * 256 + lane * 4) =
            levels[code & 15] | static_cast<u32>(levels[code >> 4]) << 16;
#endif
    }
}

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
            s.x + (static_cast<u64>(p.token + token) * s.columns + tile * 64 + p.lane % 4 * 16) * 2);
        bool inside = token < p.tokens;
        t.x[2 * n] = inside ? from[0] : make_uint4(0, 0, 0, 0);
        t.x[2 * n + 1] = inside ? from[1] : make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void fetch_weights(
    Tile &t, const Arguments &s, const Place &p, const Cursor &at_work) {
    int tile = at_work.tile, q = p.lane % 4;
    u32 group = GROUP > 0 ? tile * 64u / (GROUP > 0 ? GROUP : 1) : 0;
#pragma unroll
    for (int h = 0; h < UPPER; h++) {
        u64 row = at_work.rows[h];
        const u8 *codes = s.packed + row * static_cast<u32>(s.row_bytes);
#if BITS == 4
        uint2 v = load_words(codes + tile * 32 + q * 8);
        t.words[2 * h] = v.x;
        t.words[2 * h + 1] = v.y;
#else
        t.words[h] = __ldg(reinterpret_cast<const u32 *>(codes + tile * 16 + q * 4));
#endif
#if BITS == 3
        t.high[h] = __ldg(reinterpret_cast<const u16 *>(codes + s.columns / 4 + tile * 8 + q * 2));
#endif
        u64 at = row * static_cast<u32>(s.groups) + group;
#if SCALE == 0
        t.code[h] = __ldg(s.scale + at);
        t.run[h] = __ldg(reinterpret_cast<const float *>(s.nested) + 1 + at / 256);
#elif SCALE == 3
        t.code[h] = __ldg(reinterpret_cast<const u32 *>(s.scale) + at);
#else
        t.code[h] = __ldg(reinterpret_cast<const u16 *>(s.scale) + at);
#endif
#if ZEROS
        const u8 *zeros = s.zero + row * s.zero_row_bytes;
#if BITS == 3
        u32 low = zeros[group / 4] >> (group % 4 * 2) & 3;
        t.zero[h] = low | (zeros[(s.groups + 3) / 4 + group / 8] >> (group % 8) & 1) << 2;
#else
        t.zero[h] = zeros[group * BITS / 8] >> (group * BITS % 8) & ((1 << BITS) - 1);
#endif
#endif
    }
}

__device__ __forceinline__ float scale_of(const Tile &t, int h, const float *map, float offset) {
#if SCALE == 0
    return map[t.code[h]] * t.run[h] + offset;
#elif SCALE == 1
    return half_to_float(t.code[h]);
#elif SCALE == 2
    return __uint_as_float(t.code[h] << 16);
#else
    return __uint_as_float(t.code[h]);
#endif
}

// Sixteen levels of row h as the eight pairs of four steps: pair 2 s + j holds columns 4 s + 2 j, + 1.
__device__ __forceinline__ void decode(const Tile &t, int h, u32 bank, u32 w[8]) {
#if BITS == 4
    w[0] = look_up<0>(t.words[2 * h], bank);
    w[1] = look_up<1>(t.words[2 * h], bank);
    w[2] = look_up<2>(t.words[2 * h], bank);
    w[3] = look_up<3>(t.words[2 * h], bank);
    w[4] = look_up<0>(t.words[2 * h + 1], bank);
    w[5] = look_up<1>(t.words[2 * h + 1], bank);
    w[6] = look_up<2>(t.words[2 * h + 1], bank);
    w[7] = look_up<3>(t.words[2 * h + 1], bank);
#elif BITS == 2
    uint2 four = look_up_four<0>(t.words[h], bank);
    w[0] = four.x;
    w[1] = four.y;
    four = look_up_four<1>(t.words[h], bank);
    w[2] = four.x;
    w[3] = four.y;
    four = look_up_four<2>(t.words[h], bank);
    w[4] = four.x;
    w[5] = four.y;
    four = look_up_four<3>(t.words[h], bank);
    w[6] = four.x;
    w[7] = four.y;
#else
    // Two third bits become bits 4 and 5 of the byte that holds the four low bits of a pair.
    u32 high = permute(0x30201000, 0, t.high[h] & 0x3333);
    u32 even = (t.words[h] & 0x0f0f0f0f) | high;
    high = permute(0x30201000, 0, t.high[h] >> 2 & 0x3333);
    u32 odd = (t.words[h] >> 4 & 0x0f0f0f0f) | high;
    w[0] = look_up<0>(even, bank);
    w[1] = look_up<0>(odd, bank);
    w[2] = look_up<1>(even, bank);
    w[3] = look_up<1>(odd, bank);
    w[4] = look_up<2>(even, bank);
    w[5] = look_up<2>(odd, bank);
    w[6] = look_up<3>(even, bank);
    w[7] = look_up<3>(odd, bank);
#endif
}

__device__ __forceinline__ u32 word_of(const uint4 *v, int i) {
    const uint4 &four = v[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
}

__device__ __forceinline__ void compute(
    float sums[SLAB / 16][BLOCKS][4], const Tile &t, const float *map, float offset, u32 bank) {
    float total[BLOCKS][4] = {};
#if ZEROS
    const u32 one = HALF ? 0x3c003c00 : 0x3f803f80;
    const u32 ones[4] = {one, one, one, one};
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int s = 0; s < 4; s++)
            multiply(total[n], ones, word_of(t.x + 2 * n, 2 * s), word_of(t.x + 2 * n, 2 * s + 1));
#endif
#pragma unroll
    for (int r = 0; r < SLAB / 16; r++) {
        u32 low[8], high[8];
        decode(t, 2 * r, bank, low);
        decode(t, 2 * r + 1, bank, high);
        float part[BLOCKS][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const u32 a[4] = {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]};
#pragma unroll
            for (int n = 0; n < BLOCKS; n++)
                multiply(part[n], a, word_of(t.x + 2 * n, 2 * s), word_of(t.x + 2 * n, 2 * s + 1));
        }
        float scale[2] = {scale_of(t, 2 * r, map, offset), scale_of(t, 2 * r + 1, map, offset)};
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (ZEROS) part[n][i] -= static_cast<float>(t.zero[2 * r + i / 2]) * total[n][i];
                sums[r][n][i] += part[n][i] * scale[i / 2];
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
    p.last = min(p.first + s.share, s.rows) - 1;
    p.lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    p.tiles = s.columns / 64;
    p.height = (s.share + s.slabs - 1) / s.slabs;
    p.token = blockIdx.y * TOKENS;
    p.tokens = min(TOKENS, s.tokens - p.token);

    Tile tile[AHEAD];
    Cursor ahead(p);
    int its_tile[AHEAD];
#pragma unroll
    for (int d = 0; d < AHEAD; d++) {
        if (ahead.slab < s.slabs) fetch_weights(tile[d], s, p, ahead);
        its_tile[d] = ahead.tile;
        ahead.advance(p);
    }

    // Shared: the table (at a multiple of 256 from 0), the map of nested scales, every warp's sums.
    float *map = reinterpret_cast<float *>(memory + TABLE);
    float *parts = map + 256;
    fill_table(reinterpret_cast<const u16 *>(s.levels));
    if (SCALE == 0)
        for (int i = threadIdx.x; i < 256; i += WARPS * 32)
            map[i] = reinterpret_cast<const float *>(s.map)[i];
    int size = s.share * p.tokens;
    for (int i = threadIdx.x; i < WARPS * size; i += WARPS * 32) parts[i] = 0.0f;
    float offset = SCALE == 0 ? *reinterpret_cast<const float *>(s.nested) : 0.0f;
    __syncthreads();

    if (WAIT_EARLY) wait_for_producer();
#pragma unroll
    for (int d = 0; d < AHEAD; d++) fetch_x(tile[d], s, p, its_tile[d]);

    u32 bank = p.lane * (BITS == 2 ? 8 : 4);
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
                compute(sums, tile[d], map, offset, bank);
                if (ahead.slab < s.slabs) {
                    fetch_weights(tile[d], s, p, ahead);
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
        u16 *y = reinterpret_cast<u16 *>(s.y) + static_cast<u64>(token) * s.rows + row;
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
