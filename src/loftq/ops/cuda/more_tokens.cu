// y = x W^T + s (x A^T) B^T for 17 to 64 tokens and up to three weights, from the packed bytes.
//
// Bounds: reading x, which every block of `share` rows reads once, from the L2 cache, and shared
// memory, where SLAB rows of a warp meet 64 columns of all tokens. So here
// - a block of SLABS slabs goes through the columns in step: a tile of 256 columns of x and the
//   block's weights is in shared memory while the next one is on its way;
// - warp (slab, g) has columns 64 g .. 64 g + 63 of every tile, decodes them once for all tokens,
//   and the four sums of a slab are added up at the end, in one order.
//
// Definitions: those of adapters.cuh (TOKENS 16, 32 or 64; WARPS = 4 SLABS).

#include "slabs.cuh"

constexpr int SLABS = WARPS / 4;
constexpr int ALL = X_STAGE + SLABS * STAGE;

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

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
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
    const OwnUnits units(s, p);
    prefetch_b(s, p);
#endif
    fill_table(s.levels, THREADS);
    fill_map(s.map_copies, s.map, THREADS);
    float offset = SCALE == 0 ? *reinterpret_cast<const float *>(w.nested) : 0.0f;
    wait_for_producer();
    ask_tokens(0);
    commit_copies();
#if RANKED
    if (units.count) compute_units(s, units.first, units.step, p.lane);
    units.done(s, p.lane);
#endif
    float sums[SLAB / 16][BLOCKS][4] = {};
    u32 bank = bank_of(p.lane);
    auto x_at = [&](u32 stage, int n) {  // the sums of tokens beyond the last are not looked at
        return stage + min(n * 8 + p.lane / 4, s.tokens - 1) * PITCH + g * 128 + p.lane % 4 * 32;
    };
    for (int tile = 0; tile < p.tiles; tile++) {
        wait_copies<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        ask_weights(tile + 1);
        ask_tokens(tile + 1);
        commit_copies();
        u32 stage = s.ring + tile % 2 * ALL;
        if (slab < p.slabs)
            compute(sums, [&](int n) { return x_at(stage, n); }, stage + X_STAGE + slab * STAGE, s, p,
                g, offset, bank);
    }
    __syncthreads();
    float *all = FLOATS(s.sums);  // where the tiles were
    put<false>(all, sums, s, p, slab, g);
#if RANKED
    wait_for_units(s, p);
    add_units(s, p);
    for (int at = g * 64; at < s.rank; at += 256) {
        float more[SLAB / 16][BLOCKS][4] = {};
        add_adapter(more, s, p, slab, at);
        put<true>(all, more, s, p, slab, g);
    }
#endif
    __syncthreads();
    write_rows<4>(all, s, p, w);
}
