// A tile of packed weights, SLAB rows by 256 columns, from memory to the operands of a matrix
// instruction.
//
// - Tiles come by asynchronous copies into a ring of the warp's own: registers hold what is being
//   decoded only, and a warp waits for no other.
// - Decoding is one permute and one shared-memory read for a pair (4, 3 bits) or four (2 bits) of
//   weights: a byte of codes is the second byte of an address. Each lane has a copy of the table in
//   banks of its own, so that no two lanes meet. Nothing is computed on a level.
// - Weights are the left operand of mma m16n8k16. Columns may be summed in any order if x has the
//   same: lane q of a row takes the 16 columns 16 q .. 16 q + 15 of each 64, neighbours in memory.
//
// Definitions: BITS, HALF (float16, else bfloat16), GROUP (64, 128 or 256), SCALE (0: nested bytes,
// 1: float16, 2: bfloat16, 3: float32), SLAB (16 or 32 rows).
#pragma once

#include "instructions.cuh"

constexpr int UPPER = SLAB / 8;               // rows of one lane
constexpr int PLANE = BITS == 4 ? 128 : 64;   // bytes of a row in a tile: codes or their low bits,
constexpr int HIGH = BITS == 3 ? 32 : 0;      // third bits,
constexpr int ITEM = SCALE == 0 ? 1 : SCALE == 3 ? 4 : 2;
constexpr int SCALES = ITEM * 256 / GROUP;    // scales: whole words,
constexpr int RUN = SCALE == 0 ? 4 : 0;       // and the absmax of its nested scales
constexpr int STAGE = SLAB * (PLANE + HIGH + SCALES + RUN);
constexpr int ENTRIES = BITS == 3 ? 64 : 256;  // of the table at BASE, 256 bytes each
constexpr u32 MAP_PITCH = BITS == 4 ? 256 : 32;  // of the map of nested scales; at 4 bits in the
                                                 // half of the table that its 32 lanes leave

static_assert(SCALES >= 4, "the scales of 256 columns are less than a word");

struct Layout {  // of every weight of a launch (ops/reference.py)
    int columns, groups, row_bytes;
};

// Byte `at` of a row in a plane of PITCH bytes a row: 16-byte pieces change places so that the rows
// that are read together lie in different banks.
template <int PITCH> __device__ __forceinline__ u32 placed(int row, int at) {
    int turn = PITCH == 128 ? row % 4 * 2 : PITCH == 64 ? row / 2 % 4 : row / 4 % 2;
    return row * PITCH + (at ^ turn * 16);
}

// The levels of byte PLACE of `codes` in this lane's banks.
template <int PLACE> __device__ __forceinline__ u32 look_up(u32 codes, u32 bank) {
    return table_word(permute(codes, bank, 0x7604 | PLACE << 4));
}
template <int PLACE> __device__ __forceinline__ uint2 look_up_four(u32 codes, u32 bank) {
    return table_words(permute(codes, bank, 0x7604 | PLACE << 4));
}
__device__ __forceinline__ u32 bank_of(int lane) { return lane * (BITS == 2 ? 8 : 4); }

// Levels of the codes in a byte, once for every lane.
__device__ __forceinline__ void fill_table(const u16 *levels, int threads) {
    constexpr int PIECES = BITS == 2 ? 16 : 8;  // of 16 bytes in an entry
    for (int i = threadIdx.x; i < ENTRIES * PIECES; i += threads) {
        int code = i / PIECES;
        uint4 v;
#if BITS == 2
        v.x = levels[code & 3] | static_cast<u32>(levels[code >> 2 & 3]) << 16;
        v.y = levels[code >> 4 & 3] | static_cast<u32>(levels[code >> 6]) << 16;
        v.z = v.x, v.w = v.y;
#else
#if BITS == 3  // low bits of both codes, then their third bits
        int first = (code & 3) | (code >> 4 & 1) << 2, second = (code >> 2 & 3) | (code >> 5) << 2;
#else
        int first = code & 15, second = code >> 4;
#endif
        v.x = levels[first] | static_cast<u32>(levels[second]) << 16;
        v.y = v.z = v.w = v.x;
#endif
        store_words(BASE + code * 256 + i % PIECES * 16, v);
    }
}

// The map of nested scales: 8 copies of each value, one for each row that is read at once.
__device__ __forceinline__ void fill_map(u32 to, const float *map, int threads) {
    if (SCALE == 0)
        for (int i = threadIdx.x; i < 256; i += threads) {
            u32 value = __float_as_uint(map[i]);
            store_words(to + i * MAP_PITCH, make_uint4(value, value, value, value));
            store_words(to + i * MAP_PITCH + 16, make_uint4(value, value, value, value));
        }
}

// Ask for the codes of PITCH bytes a row in a tile; `row_of(r)` is the row of W for row r of it.
template <int PITCH, class Rows>
__device__ __forceinline__ void ask_plane(
    u32 to, const u8 *from, int row_bytes, int lane, Rows row_of) {
    constexpr int PIECES = PITCH / 16;
#pragma unroll
    for (int i = 0; i < SLAB * PIECES / 32; i++) {
        int row = (i * 32 + lane) / PIECES, at = lane % PIECES * 16;
        copy_async<16>(to + placed<PITCH>(row, at),
                       from + static_cast<u64>(row_of(row)) * row_bytes + at);
    }
}

// Ask for a tile of a weight.
template <class Rows>
__device__ __forceinline__ void ask(
    u32 stage, const u8 *packed, const u8 *scale, const u8 *nested, const Layout &w, int tile,
    int lane, Rows row_of) {
    ask_plane<PLANE>(stage, packed + tile * PLANE, w.row_bytes, lane, row_of);
#if BITS == 3
    const u8 *high = packed + w.columns / 4 + tile * HIGH;
    ask_plane<HIGH>(stage + SLAB * PLANE, high, w.row_bytes, lane, row_of);
#endif
    if (lane < SLAB) {
        u64 at = static_cast<u64>(row_of(lane)) * w.groups + tile * (256 / GROUP);
        u32 to = stage + SLAB * (PLANE + HIGH);
        copy_async<SCALES>(to + lane * SCALES, scale + at * ITEM);
        if (RUN) copy_async<4>(to + SLAB * SCALES + lane * 4, nested + 4 + at / 256 * 4);
    }
}

// Scale of row h of this lane in columns 64 g .. 64 g + 63 of a tile.
__device__ __forceinline__ float scale_of(
    u32 stage, u32 map, int h, int g, float offset, int lane) {
    int row = h * 8 + lane / 4, group = g * 64 / GROUP;
    u32 at = stage + SLAB * (PLANE + HIGH) + row * SCALES + group * ITEM / 4 * 4;
    u32 word = shared_word(at);
#if SCALE == 0
    u32 run = shared_word(stage + SLAB * (PLANE + HIGH + SCALES) + row * 4);
    u32 code = word >> group % 4 * 8 & 255;
    float level = __uint_as_float(fixed_word(map + lane / 4 * 4 + code * MAP_PITCH));
    return level * __uint_as_float(run) + offset;
#elif SCALE == 3
    return __uint_as_float(word);
#else
    u32 half = group % 2 ? word >> 16 : word & 0xffff;
    return SCALE == 1 ? half_to_float(half) : __uint_as_float(half << 16);
#endif
}

// Sixteen levels of row h of this lane, columns 64 g and on, as pairs: pair 2 s + j holds columns
// 4 s + 2 j and the next.
__device__ __forceinline__ void decode(u32 stage, int h, int g, u32 bank, int lane, u32 pairs[8]) {
    int row = h * 8 + lane / 4, q = lane % 4;
#if BITS == 4
    uint2 words = shared_words(stage + placed<PLANE>(row, g * 32 + q / 2 * 16) + q % 2 * 8);
    pairs[0] = look_up<0>(words.x, bank);
    pairs[1] = look_up<1>(words.x, bank);
    pairs[2] = look_up<2>(words.x, bank);
    pairs[3] = look_up<3>(words.x, bank);
    pairs[4] = look_up<0>(words.y, bank);
    pairs[5] = look_up<1>(words.y, bank);
    pairs[6] = look_up<2>(words.y, bank);
    pairs[7] = look_up<3>(words.y, bank);
#else
    u32 word = shared_word(stage + placed<PLANE>(row, g * 16) + q * 4);
#if BITS == 2
    uint2 four[4] = {
        look_up_four<0>(word, bank), look_up_four<1>(word, bank), look_up_four<2>(word, bank),
        look_up_four<3>(word, bank)};
#pragma unroll
    for (int s = 0; s < 4; s++) pairs[2 * s] = four[s].x, pairs[2 * s + 1] = four[s].y;
#else
    u32 high = shared_half(
        stage + SLAB * PLANE + placed<32>(row, g / 2 * 16) + g % 2 * 8 + q * 2);
    // Two third bits become bits 4 and 5 of the byte that holds the four low bits of a pair.
    u32 even = (word & 0x0f0f0f0f) | permute(0x30201000, 0, high & 0x3333);
    u32 odd = (word >> 4 & 0x0f0f0f0f) | permute(0x30201000, 0, high >> 2 & 0x3333);
    pairs[0] = look_up<0>(even, bank);
    pairs[1] = look_up<0>(odd, bank);
    pairs[2] = look_up<1>(even, bank);
    pairs[3] = look_up<1>(odd, bank);
    pairs[4] = look_up<2>(even, bank);
    pairs[5] = look_up<2>(odd, bank);
    pairs[6] = look_up<3>(even, bank);
    pairs[7] = look_up<3>(odd, bank);
#endif
#endif
}

// The sixteen columns of one lane in x, or in a 16-bit weight: word 2 s + j is pair 2 s + j.
__device__ __forceinline__ u32 word_of(const uint4 *v, int i) {
    const uint4 &four = v[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
}

// part (16 rows x 8 tokens) += two rows of every lane times 64 columns of 8 tokens
__device__ __forceinline__ void product(
    float part[4], const u32 low[8], const u32 high[8], const uint4 x[2]) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const u32 a[4] = {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]};
        multiply(part, a, word_of(x, 2 * s), word_of(x, 2 * s + 1));
    }
}
