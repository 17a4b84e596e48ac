// y = x W^T + s (x A^T) B^T for a few tokens and up to three weights, from the packed bytes.
//
// Bound it aims for: one read of the codes at the speed of memory. decode.cuh says how a tile gets
// to the matrix instruction. Here:
// - Scales are applied in float32 to the sums of a tile of 64 columns.
// - A block owns `share` rows of one weight, in slabs of `height` <= SLAB; its warps take (slab,
//   tile) pairs in turn, with AHEAD of them on their way, and never wait for each other until the
//   end: every warp adds into sums of its own, and they are added up once, in one order.
// - s A x^T comes from the same blocks (adapters.cuh), and B is multiplied with it at the end.
// - Weights and adapters are asked for before the launch waits for the kernel that writes x.
//
// Definitions: those of adapters.cuh (TOKENS: 8 or 16), AHEAD, EARLY (early.cuh).

#include "early.cuh"

struct Cursor {  // a warp's way through the (slab, tile) pairs of its block
    int slab, tile;
    __device__ __forceinline__ Cursor(const Place &p) : slab(0), tile(p.warp) { settle(p); }
    __device__ __forceinline__ void advance(const Place &p) { tile += WARPS, settle(p); }
    __device__ __forceinline__ void settle(const Place &p) {
        while (tile >= p.tiles) tile -= p.tiles, slab++;
    }
};

__device__ __forceinline__ void compute(
    float sums[SLAB / 16][BLOCKS][4], u32 stage, const Arguments &s, const Place &p, int tile,
    float offset, u32 bank) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
        uint4 x[BLOCKS][2];
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) load_x(x[n], s, tile * 256 + g * 64, n, p.lane);
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

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
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
    const OwnUnits units(s, p);
    Unit unit(s, units.count ? units.first : 0);
    Slice slice;  // of the first unit, on its way before x is there
    if (units.count) load_a(slice, s, unit, unit.part * s.chunk, p.lane);
    prefetch_b(s, p);
#endif
    fill_table(s.levels, THREADS);
    fill_map(s.map_copies, s.map, THREADS);
    int size = s.share * s.tokens;  // sums: (warps, share, tokens)
    for (int i = threadIdx.x; i < WARPS * size; i += THREADS) FLOATS(s.sums)[i] = 0.0f;
    float offset = SCALE == 0 ? *reinterpret_cast<const float *>(w.nested) : 0.0f;
    wait_for_producer();
    __syncthreads();
#if RANKED
    if (units.count) finish_unit(slice, s, unit, p.lane);
    if (units.count > 1) compute_units(s, units.first + units.step, units.step, p.lane);
#if EARLY  // a warp that has more than a tile decodes one before it says so
    bool said = ahead.slab >= p.slabs, added = false;
    if (said) say_done(units, s, p.lane);
#else
    units.done(s, p.lane);
#endif
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
#if RANKED && EARLY
        if (!said) say_done(units, s, p.lane), said = true;
        if (!added && ahead.slab >= p.slabs) added = add_units_early(s, p);
#endif
    }
    wait_copies<0>();
#if RANKED && EARLY
    int ranks = (s.rank + 63) / 64, parts = p.slabs * ranks, i = p.warp;
    Rows b;
    if (i < parts) b.load(s, p, i / ranks, i % ranks * 64);
    if (__syncthreads_or(!added)) {
        wait_for_units(s, p);
        add_own_units(s, p);
        __syncthreads();
        if (i < parts) b.load(s, p, i / ranks, i % ranks * 64);
    }
    u32 before = leaving(s);
    while (i < parts) {
        float more[SLAB / 16][BLOCKS][4] = {};
        add_rows(more, b, s, p, i % ranks * 64);
        put(more, own, s, p, i / ranks);
        i += WARPS;
        if (i < parts) b.load(s, p, i / ranks, i % ranks * 64);
    }
#elif RANKED
    wait_for_units(s, p);
    add_units(s, p);
    int ranks = (s.rank + 63) / 64;
    for (int i = p.warp; i < p.slabs * ranks; i += WARPS) {
        add_adapter(sums, s, p, i / ranks, i % ranks * 64);
        put(sums, own, s, p, i / ranks);
    }
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += THREADS) {
        int row = i / s.tokens, token = i % s.tokens;
        if (p.first + row > p.last) break;
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < WARPS; v++) total += FLOATS(s.sums)[v * size + i];
        s.y[static_cast<u64>(token) * s.rows + w.before + p.first + row] =
            static_cast<u16>(pair(total, 0.0f));
    }
#if RANKED && EARLY
    leave(s, before);
#endif
}
