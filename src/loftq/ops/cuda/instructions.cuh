// Instructions that C++ has no word for. The tests run the sources on a CPU with a file of this name
// and the same functions (tests/cuda_on_cpu_sources).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 BASE = 1024;         // the first address of dynamic shared memory
constexpr int PATIENCE = 1 << 14;  // looks at a counter, about a microsecond each

__device__ __forceinline__ float half_to_float(u32 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(half)));
    return value;
}

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 joined;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(joined) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(joined) : "f"(high), "f"(low));
#endif
    return joined;
}

// d (16 rows x 8 tokens) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float d[4], const u32 a[4], u32 b0, u32 b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 picks) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(picks));
    return d;
}

// Shared memory by its own 32-bit addresses. Reads of what never changes once written may be moved
// by the compiler (`fixed`), others not.
__device__ __forceinline__ u32 address_of(const void *p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ u32 fixed_word(u32 at) {
    u32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ u32 table_word(u32 at) {  // from BASE on
    u32 v;
    asm("ld.shared.u32 %0, [%1 + 1024];" : "=r"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ uint2 table_words(u32 at) {
    uint2 v;
    asm("ld.shared.v2.u32 {%0, %1}, [%2 + 1024];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
__device__ __forceinline__ u32 shared_word(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ uint2 shared_words(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
__device__ __forceinline__ uint4 shared_four(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
__device__ __forceinline__ u32 shared_half(u32 at) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ void store_words(u32 at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Copies to shared memory that nobody waits for until `wait_copies`.
template <int BYTES> __device__ __forceinline__ void copy_async(u32 to, const u8 *from) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(to), "l"(from), "n"(BYTES));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int LEFT> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

__device__ __forceinline__ void prefetch(const u8 *p) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// Numbers that other blocks of the launch write.
__device__ __forceinline__ float load_fresh(const float *p) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 load_acquire(const u32 *p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Seen by others no earlier than what this warp wrote before its last `__syncwarp`.
__device__ __forceinline__ void add_release(u32 *p, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(p), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_for_producer() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
