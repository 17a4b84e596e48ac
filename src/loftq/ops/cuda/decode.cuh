// A tile of packed weights, SLAB rows by 64 columns, from memory to the operands of a matrix
// instruction; what the products of this folder share.
//
// - Decoding is one permute and one shared-memory read for a pair (4, 3 bits) or four (2 bits) of
//   weights: a byte of codes is an address. Each lane has a copy of the table in banks of its own,
//   so that no two lanes meet. Nothing is computed on a level.
// - Weights are the left operand of mma m16n8k16. Columns may be summed in any order if x has the
//   same: lane q of a row takes the 16 columns 16 q .. 16 q + 15 of a tile, neighbours in memory.
//
// Definitions: BITS, HALF (float16, else bfloat16), GROUP (0: one scale a row), SCALE (0: nested
// bytes, 1: float16, 2: bfloat16, 3: float32), ZEROS, SLAB (16 or 32 rows).
#pragma once

#include "instructions.cuh"

constexpr int UPPER = SLAB / 8;            // rows of one lane
constexpr int WORDS = BITS == 4 ? 2 : 1;   // 32-bit words of a row in one lane
constexpr int TABLE = (BITS == 3 ? 64 : 256) * 256;
constexpr int MAP = 256 * 4;               // bytes of the nested coding's map

struct Weight {  // layout: ops/reference.py
    const u8 *packed, *scale, *zero, *nested, *map, *levels;
    int rows, columns, groups, row_bytes, zero_row_bytes;
};

struct Codes {  // of the UPPER rows of one lane
    u32 words[UPPER * WORDS];
    u32 high[BITS == 3 ? UPPER : 1];
    u32 scale[UPPER];
    float run[SCALE == 0 ? UPPER : 1];
    u32 zero[ZEROS ? UPPER : 1];
};

extern __shared__ __align__(1024) u8 memory[];  // the table, the map, then the kernel's own

// The levels of byte PLACE of `codes` in this lane's banks: an entry takes 256 bytes, so the byte
// is the second of the offset; the first is the lane's.
template <int PLACE> __device__ __forceinline__ u32 look_up(u32 codes, u32 bank) {
    return *reinterpret_cast<const u32 *>(memory + permute(codes, bank, 0x7604 | PLACE << 4));
}

template <int PLACE> __device__ __forceinline__ uint2 look_up_four(u32 codes, u32 bank) {
    return *reinterpret_cast<const uint2 *>(memory + permute(codes, bank, 0x7604 | PLACE << 4));
}

__device__ __forceinline__ u32 bank_of(int lane) { return lane * (BITS == 2 ? 8 : 4); }

// Levels of the codes in a byte, once for every lane; and the map of nested scales.
__device__ __forceinline__ void fill_table(const Weight &w, int threads) {
    const u16 *levels = reinterpret_cast<const u16 *>(w.levels);
    for (int i = threadIdx.x; i < TABLE / 256 * 32; i += threads) {
        int code = i / 32, lane = i % 32;
        u8 *place = memory + code * 256 + bank_of(lane);
#if BITS == 2
        uint2 four;
        four.x = levels[code & 3] | static_cast<u32>(levels[code >> 2 & 3]) << 16;
        four.y = levels[code >> 4 & 3] | static_cast<u32>(levels[code >> 6]) << 16;
        *reinterpret_cast<uint2 *>(place) = four;
#elif BITS == 3  // low bits of both codes, then their third bits
        u32 first = (code & 3) | (code >> 4 & 1) << 2, second = (code >> 2 & 3) | (code >> 5) << 2;
        *reinterpret_cast<u32 *>(place) = levels[first] | static_cast<u32>(levels[second]) << 16;
#else
        *reinterpret_cast<u32 *>(place) =
            levels[code & 15] | static_cast<u32>(levels[code >> 4]) << 16;
#endif
    }
    if (SCALE == 0)
        for (int i = threadIdx.x; i < 256; i += threads)
            reinterpret_cast<u32 *>(memory + TABLE)[i] = reinterpret_cast<const u32 *>(w.map)[i];
}

__device__ __forceinline__ void fetch(
    Codes &c, const Weight &w, const u32 rows[UPPER], int tile, int q) {
    u32 group = GROUP > 0 ? tile * 64u / (GROUP > 0 ? GROUP : 1) : 0;
#pragma unroll
    for (int h = 0; h < UPPER; h++) {
        u64 row = rows[h];
        const u8 *codes = w.packed + row * static_cast<u32>(w.row_bytes);
#if BITS == 4
        uint2 two = load_words(codes + tile * 32 + q * 8);
        c.words[2 * h] = two.x;
        c.words[2 * h + 1] = two.y;
#else
        c.words[h] = __ldg(reinterpret_cast<const u32 *>(codes + tile * 16 + q * 4));
#endif
#if BITS == 3
        c.high[h] = __ldg(reinterpret_cast<const u16 *>(codes + w.columns / 4 + tile * 8 + q * 2));
#endif
        u64 at = row * static_cast<u32>(w.groups) + group;
#if SCALE == 0
        c.scale[h] = __ldg(w.scale + at);
        c.run[h] = __ldg(reinterpret_cast<const float *>(w.nested) + 1 + at / 256);
#elif SCALE == 3
        c.scale[h] = __ldg(reinterpret_cast<const u32 *>(w.scale) + at);
#else
        c.scale[h] = __ldg(reinterpret_cast<const u16 *>(w.scale) + at);
#endif
#if ZEROS
        const u8 *zeros = w.zero + row * static_cast<u32>(w.zero_row_bytes);
#if BITS == 3
        u32 low = zeros[group / 4] >> (group % 4 * 2) & 3;
        c.zero[h] = low | (zeros[(w.groups + 3) / 4 + group / 8] >> (group % 8) & 1) << 2;
#else
        c.zero[h] = zeros[group * BITS / 8] >> (group * BITS % 8) & ((1 << BITS) - 1);
#endif
#endif
    }
}

// Scale of row h; `offset` is the nested coding's.
__device__ __forceinline__ float scale_of(const Codes &c, int h, float offset) {
#if SCALE == 0
    return reinterpret_cast<const float *>(memory + TABLE)[c.scale[h]] * c.run[h] + offset;
#elif SCALE == 1
    return half_to_float(c.scale[h]);
#elif SCALE == 2
    return __uint_as_float(c.scale[h] << 16);
#else
    return __uint_as_float(c.scale[h]);
#endif
}

__device__ __forceinline__ float nested_offset(const Weight &w) {
    return SCALE == 0 ? *reinterpret_cast<const float *>(w.nested) : 0.0f;
}

// Sixteen levels of row h as pairs: pair 2 s + j holds columns 4 s + 2 j and the next.
__device__ __forceinline__ void decode(const Codes &c, int h, u32 bank, u32 pairs[8]) {
#if BITS == 4
    pairs[0] = look_up<0>(c.words[2 * h], bank);
    pairs[1] = look_up<1>(c.words[2 * h], bank);
    pairs[2] = look_up<2>(c.words[2 * h], bank);
    pairs[3] = look_up<3>(c.words[2 * h], bank);
    pairs[4] = look_up<0>(c.words[2 * h + 1], bank);
    pairs[5] = look_up<1>(c.words[2 * h + 1], bank);
    pairs[6] = look_up<2>(c.words[2 * h + 1], bank);
    pairs[7] = look_up<3>(c.words[2 * h + 1], bank);
#elif BITS == 2
    uint2 four[4] = {
        look_up_four<0>(c.words[h], bank), look_up_four<1>(c.words[h], bank),
        look_up_four<2>(c.words[h], bank), look_up_four<3>(c.words[h], bank)};
#pragma unroll
    for (int s = 0; s < 4; s++) pairs[2 * s] = four[s].x, pairs[2 * s + 1] = four[s].y;
#else
    // Two third bits become bits 4 and 5 of the byte that holds the four low bits of a pair.
    u32 even = (c.words[h] & 0x0f0f0f0f) | permute(0x30201000, 0, c.high[h] & 0x3333);
    u32 odd = (c.words[h] >> 4 & 0x0f0f0f0f) | permute(0x30201000, 0, c.high[h] >> 2 & 0x3333);
    pairs[0] = look_up<0>(even, bank);
    pairs[1] = look_up<0>(odd, bank);
    pairs[2] = look_up<1>(even, bank);
    pairs[3] = look_up<1>(odd, bank);
    pairs[4] = look_up<2>(even, bank);
    pairs[5] = look_up<2>(odd, bank);
    pairs[6] = look_up<3>(even, bank);
    pairs[7] = look_up<3>(odd, bank);
#endif
}

// The sixteen columns of one lane in x, or in a 16-bit weight: word 2 s + j is pair 2 s + j.
__device__ __forceinline__ u32 word_of(const uint4 *v, int i) {
    const uint4 &four = v[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
}

// part (16 rows x 8 tokens) = rows 2 r, 2 r + 1 of every lane times 64 columns of 8 tokens
__device__ __forceinline__ void product(
    float part[4], const u32 low[8], const u32 high[8], const uint4 x[2]) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const u32 a[4] = {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]};
        multiply(part, a, word_of(x, 2 * s), word_of(x, 2 * s + 1));
    }
}

// total (every row x 8 tokens) = sum of 64 columns of x
__device__ __forceinline__ void sum_columns(float total[4], const uint4 x[2]) {
    constexpr u32 ONE = HALF ? 0x3c003c00 : 0x3f803f80;
    const u32 ones[8] = {ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE};
    product(total, ones, ones, x);
}

// sums += (part - zero total) scale, for row pair r
__device__ __forceinline__ void add_scaled(
    float sums[4], const float part[4], const float total[4], const Codes &c, int r,
    const float scale[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float value = part[i];
        if (ZEROS) value -= static_cast<float>(c.zero[2 * r + i / 2]) * total[i];
        sums[i] += value * scale[i / 2];
    }
}
