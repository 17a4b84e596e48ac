// src/loftq/ops/cuda/instructions.cuh for a CPU: one block at a time, its threads taking turns where
// they wait for each other. A matrix product is an exchange between the 32 threads of a warp.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
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
Index threadIdx, blockIdx;
Index gridDim;
alignas(1024) u8 memory[1 << 18];

using std::min;
inline float __uint_as_float(u32 bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline u32 __float_as_uint(float f) { u32 bits; std::memcpy(&bits, &f, 4); return bits; }

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool over = false;
};
std::vector<Thread> threads;
ucontext_t scheduler;
std::function<void()> work;
inline void give_way() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

struct Barrier {
    u32 size, waiting = 0, round = 0;
    void wait() {
        u32 mine = round;
        if (++waiting == size) waiting = 0, round++;
        while (round == mine) give_way();
    }
};
struct Warp {
    Barrier all{32};
    u32 a[32][4], b[32][2];
};
Barrier block;
std::vector<Warp> warps;
inline void __syncthreads() { block.wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32].all.wait(); }
inline void __threadfence() {}
bool any;
inline int __syncthreads_or(int value) {
    any |= value != 0;
    __syncthreads();
    bool found = any;
    __syncthreads();
    any = false;
    __syncthreads();
    return found;
}
inline u32 atomicAdd(u32 *p, u32 value) { return (*p += value) - value; }
inline float load_fresh(const float *p) { return *p; }
inline u32 load_acquire(const u32 *p) { return *p; }
inline void add_release(u32 *p, u32 value) { *p += value; }
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
    Warp &warp = warps[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    std::memcpy(warp.a[lane], a, 16);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp.all.wait();
    for (int i = 0; i < 4; i++) {
        int column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            u32 left = warp.a[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i / 2];
            u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
            int half = k % 2 * 16;
            d[i] += float_of(left >> half & 0xffff) * float_of(right >> half & 0xffff);
        }
    }
    warp.all.wait();
}

inline void start() {
    work();
    threads[threadIdx.x].over = true;
    give_way();
}

inline void run_block(u32 count) {
    std::memset(memory, 0xff, sizeof memory);
    any = false;
    block = {count};
    warps = std::vector<Warp>(count / 32);
    threads = std::vector<Thread>(count);
    for (Thread &thread : threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, start, 0);
    }
    for (u32 left = count; left;) {
        left = 0;
        for (threadIdx = {}; threadIdx.x < count; threadIdx.x++)
            if (!threads[threadIdx.x].over) left++, swapcontext(&scheduler, &threads[threadIdx.x].context);
    }
}

inline void launch(const int *grid, int count, std::function<void()> body) {
    gridDim = {static_cast<u32>(grid[0]), 1, 1};
    work = body;
    for (blockIdx = {}; blockIdx.x < gridDim.x; blockIdx.x++) run_block(count);
}
