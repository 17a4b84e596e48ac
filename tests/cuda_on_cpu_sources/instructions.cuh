// src/loftq/ops/cuda/instructions.cuh for a CPU: a thread of the system for each of the GPU's, one
// block at a time. A matrix product is an exchange between the 32 threads of a warp.
#pragma once

#include <algorithm>
#include <atomic>
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
#define __noinline__
#define __shared__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __trap std::abort

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { u32 x, y, z; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

constexpr int PATIENCE = 3;
constexpr u32 BASE = 1024;  // the address of `memory`
thread_local Index threadIdx, blockIdx;
Index gridDim;
alignas(1024) u8 memory[1 << 18];

using std::min;
inline float __uint_as_float(u32 bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline u32 __float_as_uint(float f) { u32 bits; std::memcpy(&bits, &f, 4); return bits; }

struct Warp {
    std::barrier<> all{32};
    u32 a[32][4], b[32][2];
};
std::unique_ptr<std::barrier<>> block;
std::vector<std::unique_ptr<Warp>> warps;
inline void __syncthreads() { block->arrive_and_wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32]->all.arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
std::atomic<int> any;
inline int __syncthreads_or(int value) {
    if (value) any = 1;
    __syncthreads();
    int found = any;
    __syncthreads();
    return found;
}
inline u32 atomicAdd(u32 *p, u32 value) { return std::atomic_ref<u32>(*p).fetch_add(value); }
inline float load_fresh(const float *p) { return *p; }
inline u32 load_acquire(const u32 *p) { return *p; }
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

inline u32 address_of(const void *p) { return static_cast<const u8 *>(p) - memory + BASE; }
template <class T> T shared_at(u32 at) {
    T v;
    std::memcpy(&v, memory + at - BASE, sizeof v);
    return v;
}
inline u32 fixed_word(u32 at) { return shared_at<u32>(at); }
inline u32 table_word(u32 at) { return shared_at<u32>(at + BASE); }
inline uint2 table_words(u32 at) { return shared_at<uint2>(at + BASE); }
inline u32 shared_word(u32 at) { return shared_at<u32>(at); }
inline uint2 shared_words(u32 at) { return shared_at<uint2>(at); }
inline uint4 shared_four(u32 at) { return shared_at<uint4>(at); }
inline u32 shared_half(u32 at) { return shared_at<u16>(at); }
inline void store_words(u32 at, uint4 v) { std::memcpy(memory + at - BASE, &v, 16); }

template <int BYTES> void copy_async(u32 to, const u8 *from) {
    if (to % BYTES || reinterpret_cast<u64>(from) % BYTES) std::abort();
    std::memcpy(memory + to - BASE, from, BYTES);
}
inline void prefetch(const u8 *p) {}
inline void commit_copies() {}
template <int LEFT> void wait_copies() {}

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
    gridDim = {static_cast<u32>(grid[0]), static_cast<u32>(grid[1]), static_cast<u32>(grid[2])};
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++) {
                std::memset(memory, 0xff, sizeof memory);
                any = 0;
                block = std::make_unique<std::barrier<>>(threads);
                warps.clear();
                for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
                std::vector<std::thread> all;
                for (int t = 0; t < threads; t++)
                    all.emplace_back([=] {
                        threadIdx = {static_cast<u32>(t), 0, 0};
                        blockIdx = {static_cast<u32>(x), static_cast<u32>(y), static_cast<u32>(z)};
                        body();
                    });
                for (auto &thread : all) thread.join();
            }
}
