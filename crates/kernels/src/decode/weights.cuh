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
__device__ __forceinline__ void make_ring(Shared& shared) {
#pragma unroll 1
    for (u32 k = 0; k < STAGES; ++k) {
        make_barrier(shared_address(&shared.full[k]), 1);
        make_barrier(shared_address(&shared.empty[k]), WARPS);
    }
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
            u32 layer_rows = phase == MIX ? part.rows / 3 : part.rows, left = layer_rows;
#pragma unroll 1
            for (u32 row = 0; row < part.rows;) {
                u32 rows = is_one_stage(phase) ? part.rows : min(left, stage_rows_of(phase));
                left -= rows;
                if (left == 0) left = layer_rows;
                u32 count = rows * col_tiles, taken = count + place.align(count);
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
    Shared& shared;
    const u8* ring;
    Place place;

    template <u32 PHASE>
    __device__ __forceinline__ void begin(const Args&, u32) {}

    // Waits for a stage of so many rows, from one on.
    template <u32 PHASE>
    __device__ __forceinline__ void take(u32, u32 rows) {
        place.align(rows * col_tiles_of(PHASE));
        wait_for(shared_address(&shared.full[place.stage]), place.parity);
        __syncwarp();
    }

    template <u32 PHASE>
    __device__ __forceinline__ uint4 tile(u32 row, u32 column) const {
        return ((const uint4*)(ring + (place.tile + row * col_tiles_of(PHASE) + column) * TILE_BYTES))[threadIdx.x % 32];
    }

    template <u32 PHASE>
    __device__ __forceinline__ void release(u32 rows) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(shared_address(&shared.empty[place.stage]));
        place.advance(rows * col_tiles_of(PHASE));
    }
};
#else
// Older devices read weights where they need them.
struct Place {};

__device__ __forceinline__ void make_ring(Shared&) {}

__device__ __forceinline__ void fetch_weights(const Args&, Shared&, u8*) {}

struct Rows {
    Shared& shared;
    const u8* ring;
    Place place;
    const uint4* tiles;
    u32 first;

    template <u32 PHASE>
    __device__ __forceinline__ void begin(const Args& a, u32 layer) {
        tiles = tiles_of_phase(a, layer, PHASE);
    }

    template <u32 PHASE>
    __device__ __forceinline__ void take(u32 row, u32) {
        first = row;
    }

    template <u32 PHASE>
    __device__ __forceinline__ uint4 tile(u32 row, u32 column) const {
        u32 at = shared.plan.part[PHASE].row_at(first + row) * col_tiles_of(PHASE) + column;
        return __ldg(tiles + (size_t)at * (TILE_BYTES / 16) + threadIdx.x % 32);
    }

    template <u32 PHASE>
    __device__ __forceinline__ void release(u32) {}
};
#endif
