// Weights on their way to a product. They do not depend on activations: one thread copies the tiles that the block will
// need into a ring in shared memory, through phases, layers and tokens, whatever the exchange does.

#if __CUDA_ARCH__ >= 900
// Tiles on their way at most: more would only queue up, and floats of the exchange behind them.
constexpr u32 MOVING_TILES = NUM_MOVING_TILES;

// A place in the ring: a stage, the parity of its barriers, and its first tile. No stage continues at the ring's
// beginning.
struct Place {
    u32 stage, parity, tile;

    // Makes room for a stage of so many tiles; gives how many were left unused.
    __device__ __forceinline__ u32 align(u32 tiles) {
        u32 left = RING_TILES - tile;
        if (left >= tiles) return 0;
        tile = 0;
        return left;
    }

    __device__ __forceinline__ void advance(u32 tiles) {
        if (++stage == STAGES) stage = 0, parity ^= 1;
        tile += tiles;
    }
};

// By one thread, before the others begin.
__device__ __forceinline__ void make_barriers(Shared& shared) {
#pragma unroll 1
    for (u32 k = 0; k < STAGES; ++k) {
        make_barrier(shared_address(&shared.full[k]), 1);
        make_barrier(shared_address(&shared.empty[k]), THREADS);
    }
    make_barrier(shared_address(&shared.squares_posted), THREADS);
    fence_barriers();
}

// By one thread.
__device__ __forceinline__ void fetch_weights(const Args& a, Shared& shared, u8* ring) {
    Place place = {0, 0, 0}, oldest = {0, 0, 0}, landing = {0, 0, 0};
    // Tiles and stages in use, and of these the ones that may be on their way.
    u32 used = 0, stages = 0, moving = 0, moving_stages = 0;
    auto land = [&]() {
        moving -= shared.stage_tiles[landing.stage];
        landing.advance(0);
        --moving_stages;
    };
#pragma unroll 1
    for (u32 token = 0; token < a.count; ++token)
#pragma unroll 1
        for (u32 step = 0; step <= 4 * a.layers; ++step) {
            u32 phase = step == 4 * a.layers ? (u32)HEAD : step % 4, col_tiles = col_tiles_of(phase);
            const Part& part = shared.plan.part[phase];
            const uint4* tiles = tiles_of_phase(a, step / 4, phase);
            u32 left = part.layer_rows;
#pragma unroll 1
            for (u32 row = 0; row < part.rows;) {
                u32 rows = min(left, part.stage_rows);
                left -= rows;
                if (left == 0) left = part.layer_rows;
                u32 count = rows * col_tiles, taken = count + place.align(part.together[row > 0]);
                while (used + taken > RING_TILES || stages == STAGES) {
                    wait_for(shared_address(&shared.empty[oldest.stage]), oldest.parity);
                    if (moving_stages == stages) land();
                    used -= shared.stage_tiles[oldest.stage];
                    oldest.advance(0);
                    --stages;
                }
                while (moving > 0 && moving + count > MOVING_TILES) {
                    wait_for(shared_address(&shared.full[landing.stage]), landing.parity);
                    land();
                }
                u32 full = shared_address(&shared.full[place.stage]);
                shared.stage_tiles[place.stage] = taken;
                expect_bytes(full, count * TILE_BYTES);
                u8* to = ring + place.tile * TILE_BYTES;
#pragma unroll 1
                for (u32 end = row + rows; row < end; ++row, to += col_tiles * TILE_BYTES)
                    bulk_copy(to, tiles + (size_t)part.row_at(row) * col_tiles * (TILE_BYTES / 16),
                              col_tiles * TILE_BYTES, full);
                used += taken;
                moving += taken;
                ++stages;
                ++moving_stages;
                place.advance(count);
            }
        }
}

// A warp's way through the rows of tiles.
struct Rows {
    u32 base;     // of the block's shared memory
    u32 lane_at;  // where this lane's part of the warp's tile would be in the ring's first row
    Place place;

    __device__ __forceinline__ Rows(Shared& shared, const u8* ring)
        : base(kept(shared_address(&shared))),
          lane_at(kept(shared_address(ring) + threadIdx.x / 32 * TILE_BYTES + threadIdx.x % 32 * 16)),
          place{} {}

    template <u32 PHASE>
    __device__ __forceinline__ void begin(const Args&, u32) {}

    // Waits for the stage that begins with a row.
    template <u32 PHASE>
    __device__ __forceinline__ void take(u32) {
        place.align(tiles_together(PHASE));
        wait_for(base + SHARED_AT(full) + 8 * place.stage, place.parity);
        __syncwarp();
    }

    // A stage of so many rows is not needed any more.
    template <u32 PHASE>
    __device__ __forceinline__ void release(u32 rows) {
        arrive(base + SHARED_AT(empty) + 8 * place.stage);
        place.advance(rows * col_tiles_of(PHASE));
    }

    // The same for all stages of a phase that lie together. Each lane asks about each of them, for it reads from all.
    template <u32 PHASE>
    __device__ __forceinline__ void take_all(u32 rows) {
        place.align(tiles_together(PHASE));
        u32 last = stages<PHASE>(rows) - 1;
        bool arrived;
        do {
            arrived = true;
#pragma unroll
            for (u32 k = 0; k < layers_of(PHASE) * layer_stages_of(PHASE); ++k) {
                u32 stage = place.stage + min(k, last);
                arrived &= is_over(base + SHARED_AT(full) + 8 * (stage % STAGES), place.parity ^ stage / STAGES);
            }
        } while (!arrived);
        __syncwarp();
    }

    template <u32 PHASE>
    __device__ __forceinline__ void release_all(u32 rows) {
        u32 count = stages<PHASE>(rows);
        for (u32 k = 0; k < count; ++k) arrive(base + SHARED_AT(empty) + 8 * ((place.stage + k) % STAGES));
        place.parity ^= (place.stage + count) / STAGES;
        place.stage = (place.stage + count) % STAGES;
        place.tile += rows * col_tiles_of(PHASE);
    }

    // Of a phase with so many rows.
    template <u32 PHASE>
    __device__ __forceinline__ static u32 stages(u32 rows) {
        constexpr u32 LAYERS = layers_of(PHASE), ROWS = stage_rows_of(PHASE);
        if (is_one_stage(PHASE)) return 1;
        return layer_stages_of(PHASE) == 1 ? LAYERS : LAYERS * ((rows / LAYERS + ROWS - 1) / ROWS);
    }

    // The warp's tile k of a row, counted from the first one taken. Behind the last column and row those again.
    template <u32 PHASE>
    __device__ __forceinline__ uint4 tile(u32 row, u32 k, u32 last_row) const {
        u32 column = k * WARPS, warp = threadIdx.x / 32;
        if (column + WARPS > col_tiles_of(PHASE)) column = min(column + warp, col_tiles_of(PHASE) - 1) - warp;
        return load_shared_4(lane_at + (place.tile + min(row, last_row) * col_tiles_of(PHASE) + column) * TILE_BYTES, 0);
    }
};
#else
// Older devices read weights where they need them.
__device__ __forceinline__ void make_barriers(Shared&) {}

__device__ __forceinline__ void fetch_weights(const Args&, Shared&, u8*) {}

struct Rows {
    Shared& shared;
    u32 base;  // of the block's shared memory
    const uint4* tiles;
    u32 first;

    __device__ __forceinline__ Rows(Shared& shared, const u8*)
        : shared(shared), base(kept(shared_address(&shared))), tiles(nullptr), first(0) {}

    template <u32 PHASE>
    __device__ __forceinline__ void begin(const Args& a, u32 layer) {
        tiles = tiles_of_phase(a, layer, PHASE);
    }

    template <u32 PHASE>
    __device__ __forceinline__ void take(u32 row) {
        first = row;
    }

    // The warp's tile k of a row. Behind the last ones those again.
    template <u32 PHASE>
    __device__ __forceinline__ uint4 tile(u32 row, u32 k, u32) const {
        const Part& part = shared.plan.part[PHASE];
        u32 column = min(threadIdx.x / 32 + k * WARPS, col_tiles_of(PHASE) - 1);
        u32 at = part.row_at(min(first + row, part.rows - 1)) * col_tiles_of(PHASE) + column;
        return __ldg(tiles + (size_t)at * (TILE_BYTES / 16) + threadIdx.x % 32);
    }

    template <u32 PHASE>
    __device__ __forceinline__ void release(u32) {}

    template <u32 PHASE>
    __device__ __forceinline__ void take_all(u32) {
        first = 0;
    }

    template <u32 PHASE>
    __device__ __forceinline__ void release_all(u32) {}
};
#endif
