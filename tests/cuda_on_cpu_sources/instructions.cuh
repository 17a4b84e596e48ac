// src/loftq/ops/cuda/instructions.cuh for a CPU: a thread of the system for each of the GPU's, one
// block at a time. A matrix product is an exchange between the 32 threads of a warp.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { int x, y, z; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

thread_local Index threadIdx, blockIdx;
alignas(1024) u8 memory[1 << 18];

using std::min;
template <class T> T __ldg(const T *p) { return *p; }
inline float __uint_as_float(u32 bits) { float f; std::memcpy(&f, &bits, 4); return f; }

struct Warp {
    std::barrier<> all{32};
    u32 a[32][4], b[32][2];
};
std::unique_ptr<std::barrier<>> block;
std::vector<std::unique_ptr<Warp>> warps;
inline void __syncthreads() { block->arrive_and_wait(); }
inline void wait_for_producer() {}
inline void let_next_start() {}

inline float half_to_float(u32 half) { _Float16 f; u16 h = half; std::memcpy(&f, &h, 2); return f; }
inline u32 half_of(float value) {
    u16 h;
#if HALF
    _Float16 f = value;
    std::memcpy(&h, &f, 2);
#else
    u32 bits;
    std::memcpy(&bits, &value, 4);
    h = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
    return h;
}
inline float float_of(u32 half) {
#if HALF
    return half_to_float(half);
#else
    return __uint_as_float(half << 16);
#endif
}
inline u32 pair(float low, float high) { return half_of(low) | half_of(high) << 16; }

inline u32 permute(u32 a, u32 b, u32 picks) {
    u64 bytes = a | static_cast<u64>(b) << 32;
    u32 d = 0;
    for (int i = 0; i < 4; i++) d |= (bytes >> (picks >> 4 * i & 7) * 8 & 255) << 8 * i;
    return d;
}

inline uint2 load_words(const u8 *p) { return *reinterpret_cast<const uint2 *>(p); }

inline void multiply(float d[4], const u32 a[4], u32 b0, u32 b1) {
    Warp &warp = *warps[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    std::memcpy(warp.a[lane], a, 16);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp.all.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        int column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            u32 left = warp.a[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i / 2];
            u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
            int half = k % 2 * 16;
            d[i] += float_of(left >> half & 0xffff) * float_of(right >> half & 0xffff);
        }
    }
    warp.all.arrive_and_wait();
}

template <class Body> void launch(const int *grid, int threads, Body body) {
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++) {
                std::memset(memory, 0xff, sizeof memory);
                block = std::make_unique<std::barrier<>>(threads);
                warps.clear();
                for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
                std::vector<std::thread> all;
                for (int t = 0; t < threads; t++)
                    all.emplace_back([=] {
                        threadIdx = {t, 0, 0};
                        blockIdx = {x, y, z};
                        body();
                    });
                for (auto &thread : all) thread.join();
            }
}
