// y = x W^T + s (x A^T) B^T for up to 64 tokens and up to three weights, as more_tokens.cu computes
// it, in fewer instructions and with teams of warps for few rows. Not run on a GPU yet.
//
// Bounds: reading x, which every block of `share` rows reads once, from the L2 cache, and shared
// memory, where SLAB rows of a warp meet 64 columns of all tokens. So here
// - a block of SLABS slabs goes through the columns in step: a tile of 256 columns of x and the
//   block's weights is in shared memory while the next one is on its way;
// - warp (slab, g) has columns 64 g .. 64 g + 63 of every tile, decodes them once for all tokens,
//   and the sums of a slab are added up at the end, in one order;
// - with few rows SPAN tiles are taken at once, each by warps of its own.
//
// Definitions: those of adapters.cuh (TOKENS 16, 32 or 64; WARPS = 4 SLABS SPAN), SPAN.

#include "slabs.cuh"

constexpr int TEAM = WARPS / SPAN, SLABS = TEAM / 4;  // warps of a tile
constexpr int ALL = X_STAGE + SLABS * STAGE;

// Ask for the scales of a tile, lane by lane those of a row.
__device__ __forceinline__ void ask_scales(
    u32 stage, const u8 *scale, const u8 *nested, const Layout &w, int tile, int lane, int row) {
    if (lane >= SLAB) return;
    u64 at = static_cast<u64>(row) * w.groups + tile * (256 / GROUP);
    u32 to = stage + SLAB * (PLANE + HIGH);
    copy_async<SCALES>(to + lane * SCALES, scale + at * ITEM);
    if (RUN) copy_async<4>(to + SLAB * SCALES + lane * 4, nested + 4 + at / 256 * 4);
}

// What a lane asks for in every tile is worked out once: a tile has few instructions to spare.
struct Tokens {  // of x: a row of 512 bytes for each turn of a warp
    const u8 *from;
    u32 to;
    __device__ __forceinline__ Tokens(const Arguments &s, const Place &p)
        : from(row(s, p.warp % TEAM) + p.lane * 16), to(p.warp % TEAM * PITCH + p.lane * 16) {}
    static __device__ __forceinline__ const u8 *row(const Arguments &s, int token) {
        return reinterpret_cast<const u8 *>(s.x) + static_cast<u64>(token) * s.layout.columns * 2;
    }
    __device__ __forceinline__ void ask(
        u32 stage, const Arguments &s, const Place &p, int tile) const {
#pragma unroll
        for (int turn = 0; turn < (TOKENS + TEAM - 1) / TEAM; turn++)
            if (p.warp % TEAM + turn * TEAM < s.tokens)
                copy_async<16>(
                    stage + to + turn * (TEAM * PITCH),
                    from + static_cast<u64>(turn * TEAM) * s.layout.columns * 2 + tile * 512);
    }
};

template <int BYTES> struct Quarter {  // warp g's of a plane of BYTES bytes a row in a slab
    static constexpr int PIECES = BYTES / 16, COPIES = SLAB * PIECES / 32, TURNS = (COPIES + 3) / 4;
    const u8 *from[TURNS];
    u32 to[TURNS];
    __device__ __forceinline__ Quarter(
        const u8 *plane, const Arguments &s, const Place &p, int slab, int g) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int row = ((turn * 4 + g) * 32 + p.lane) / PIECES, at = p.lane % PIECES * 16;
            from[turn] = plane + static_cast<u64>(p.row(slab, row)) * s.layout.row_bytes + at;
            to[turn] = placed<BYTES>(row, at);
        }
    }
    __device__ __forceinline__ void ask(u32 stage, int g, int tile) const {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++)
            if (COPIES % 4 == 0 || turn * 4 + g < COPIES)
                copy_async<16>(stage + to[turn], from[turn] + tile * BYTES);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
teams(const __grid_constant__ Arguments s) {
    let_next_start();
    if (address_of(memory) != BASE) __trap();
    const Place p = place_of(s);
    const Weight w = *p.w;
    int slab = p.warp % TEAM / 4, g = p.warp % 4, team = p.warp / TEAM;
    auto stage_of = [&](int tile) { return s.ring + tile % (2 * SPAN) * ALL; };
    const Tokens tokens(s, p);
    const Quarter<PLANE> codes(w.packed, s, p, slab, g);
#if BITS == 3
    const Quarter<HIGH> high(w.packed + s.layout.columns / 4, s, p, slab, g);
#endif
    auto ask_weights = [&](int tile) {
        u32 to = stage_of(tile) + X_STAGE + slab * STAGE;
        if (slab >= p.slabs || tile >= p.tiles) return;
        codes.ask(to, g, tile);
#if BITS == 3
        high.ask(to + SLAB * PLANE, g, tile);
#endif
        if (g == 3) ask_scales(to, w.scale, w.nested, s.layout, tile, p.lane, p.row(slab, p.lane));
    };
    auto ask_tokens = [&](int tile) {
        if (tile < p.tiles) tokens.ask(stage_of(tile), s, p, tile);
    };
    ask_weights(team);
#if RANKED
    const OwnUnits units(s, p);
    prefetch_b(s, p);
#endif
    fill_table(s.levels, THREADS);
    fill_map(s.map_copies, s.map, THREADS);
    float offset = SCALE == 0 ? *reinterpret_cast<const float *>(w.nested) : 0.0f;
    wait_for_producer();
    ask_tokens(team);
    commit_copies();
#if RANKED
    if (units.count) compute_units(s, units.first, units.step, p.lane);
    units.done(s, p.lane);
#endif
    float sums[SLAB / 16][BLOCKS][4] = {};
    u32 bank = bank_of(p.lane);
    for (int first = 0; first < p.tiles; first += SPAN) {
        int tile = first + team;
        wait_copies<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        ask_weights(tile + SPAN);
        ask_tokens(tile + SPAN);
        commit_copies();
        u32 stage = stage_of(tile);
        u32 x = stage + p.lane / 4 * PITCH + g * 128 + p.lane % 4 * 32;
        if (slab < p.slabs && tile < p.tiles)  // what is no token's goes into sums of its own
            compute(sums, [&](int n) { return x + n * 8 * PITCH; }, stage + X_STAGE + slab * STAGE,
                s, p, g, offset, bank);
    }
    __syncthreads();
    float *all = FLOATS(s.sums);  // where the tiles were
    put<false>(all, sums, s, p, slab, team * 4 + g);
#if RANKED
    wait_for_units(s, p);
    add_units(s, p);
    for (int at = (team * 4 + g) * 64; at < s.rank; at += 256 * SPAN) {
        float more[SLAB / 16][BLOCKS][4] = {};
        add_adapter(more, s, p, slab, at);
        put<true>(all, more, s, p, slab, team * 4 + g);
    }
#endif
    __syncthreads();
    write_rows<4 * SPAN>(all, s, p, w);
}
