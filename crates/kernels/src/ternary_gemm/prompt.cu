// Products of prompts on Hopper's warpgroup instructions: y[m, n] = sum_k q[m, k] t[n, k], exact; or, where the rows of weights are
// those of a and of b, silu(a) * b of the outputs.
//
// A block computes 128 tokens by 256 rows of weights, two warpgroups 128 rows each. Weights are the first operand, unpacked
// into registers (see common.cuh), so that shared memory has less to do than tensor cores. Activations are the second: the
// quantiser has laid them out so that a bulk copy brings a tile as the instruction wants it, [tokens][128 bytes], swizzled. A
// warp asks for them. Sums are left in shared memory, from where three more warps store them, or what becomes of them,
// while the next tile is multiplied. Blocks stay for as many tiles as there are.

#if __CUDA_ARCH__ >= 900
constexpr u32 TOKENS = 128;
constexpr u32 STAGES = 5;
constexpr u32 Q_BYTES = TOKENS * TILE_COLS;
constexpr u32 MULTIPLIERS = 256;         // threads
constexpr u32 WARPGROUP = 128;
constexpr u32 PAIRS = MULTIPLIERS / 32;  // of row tiles, of a block: a warp's
constexpr u32 AHEAD = 2;                 // steps that packed codes are fetched ahead
constexpr u32 STORERS = 3;               // warps
constexpr u32 PITCH = 2 * TILE_ROWS + 4; // words from token to token where a warp's sums lie; no bank is met twice
constexpr u32 SUM_BYTES = TOKENS * PITCH * 4;

extern __shared__ __align__(1024) u8 stages[];  // activations [stage]; then sums [warp]
__shared__ __align__(8) u64 full[STAGES], empty[STAGES], sums_full, sums_empty;
__shared__ int2 token_sums[2][TOKENS / 2];      // of a tile's activations, for each warpgroup
__shared__ float token_factors[TOKENS];         // gamma / s

__device__ __forceinline__ u32* sums_of(u32 warp) { return (u32*)(stages + STAGES * Q_BYTES + warp * SUM_BYTES); }

// Rows of 128 bytes, eight of them 1024 bytes further, swizzled by 128 bytes.
__device__ __forceinline__ u64 swizzled(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// d += codes (64 x 32) * q (32 x 128 tokens).
__device__ __forceinline__ void multiply(int (&d)[64], const u32 (&codes)[4], u64 q) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
          "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
          "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
          "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
          "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "l"(q));
}

// What a block computes at a time: 128 tokens by 8 pairs of row tiles, or half of those rows.
struct Tile {
    u32 segment, first_pair;  // pair within the segment
    u32 token_block, half;
};

template <bool IS_GATED>
struct Grid {
    u32 token_blocks, pairs, pair_blocks;  // pairs of a segment, and blocks of them
    u32 whole, tiles;                      // whole tiles, and all

    // Blocks that would find no tile for themselves in the last round take halves, if there are enough for all.
    __device__ __forceinline__ explicit Grid(const Args& a) {
        token_blocks = (a.m + TOKENS - 1) / TOKENS;
        pairs = IS_GATED ? a.row_tiles / 2 : (a.segment_tiles + 1) / 2;
        pair_blocks = (pairs + PAIRS - 1) / PAIRS;
        whole = tiles = token_blocks * pair_blocks * (a.row_tiles / a.segment_tiles);
        u32 last = tiles % gridDim.x;
        if (2 * last <= gridDim.x) {
            whole -= last;
            tiles += last;
        }
    }
    __device__ __forceinline__ Tile at(u32 index) const {
        Tile tile;
        tile.half = index < whole ? 0 : (index - whole) % 2;
        if (index >= whole) index = whole + (index - whole) / 2;
        tile.token_block = index % token_blocks;
        u32 pair_block = index / token_blocks;
        tile.segment = pair_block / pair_blocks;
        tile.first_pair = pair_block % pair_blocks * PAIRS;
        return tile;
    }
};

// ---- The fetching warp ----

template <bool IS_GATED>
__device__ __forceinline__ void fetch_all(const Args& a, const Grid<IS_GATED>& grid) {
    u32 stage = 0, lap = 0;
    for (u32 index = blockIdx.x; index < grid.tiles; index += gridDim.x) {
        Tile tile = grid.at(index);
        const i8* q = a.q + (size_t)tile.segment * a.rows * a.col_tiles * TILE_COLS +
                      (size_t)tile.token_block * a.col_tiles * Q_BYTES;
        for (u32 k = 0; k < a.col_tiles; ++k) {
            if (lap > 0) wait_for(shared_address(empty + stage), (lap - 1) % 2);
            expect_bytes(shared_address(full + stage), Q_BYTES);
            bulk_copy(stages + stage * Q_BYTES, q + (size_t)k * Q_BYTES, Q_BYTES, shared_address(full + stage));
            if (++stage == STAGES) {
                stage = 0;
                ++lap;
            }
        }
    }
}

// ---- Weights ----

// A multiplying warp's rows of weights. Of a whole tile they are a pair of row tiles: neighbours, or the same one of a and of b. Of half a tile
// it is one row tile, or eight rows of each of the pair.
template <bool IS_GATED>
struct WarpRows {
    u32 left, right;  // row tiles
    u32 column;       // of the first result
    u32 columns;      // of results inside the matrix

    __device__ __forceinline__ WarpRows(const Args& a, const Grid<IS_GATED>& grid, const Tile& tile, u32 warp, bool is_whole) {
        // Pairs beyond the last one repeat it; their results are dropped.
        if (IS_GATED) {
            u32 pair = tile.first_pair + warp;
            left = min(pair, grid.pairs - 1);
            right = left + grid.pairs;
            column = pair * TILE_ROWS + tile.half * (TILE_ROWS / 2);
            columns = pair < grid.pairs ? (is_whole ? TILE_ROWS : TILE_ROWS / 2) : 0;
        } else {
            u32 within = 2 * tile.first_pair + (is_whole ? 2 * warp : tile.half * PAIRS + warp);
            u32 last = a.segment_tiles - 1, first = tile.segment * a.segment_tiles;
            left = first + min(within, last);
            right = first + min(within + 1, last);
            column = (first + within) * TILE_ROWS;
            columns = min(is_whole ? 2u : 1u, a.segment_tiles - min(within, a.segment_tiles)) * TILE_ROWS;
        }
    }
};

// ---- The storing warps ----

__device__ __forceinline__ void sync_storers() { asm volatile("bar.sync 3, 96;" ::: "memory"); }

// silu of several fours: one check of the divisions' range for all of them, so that they interleave.
template <u32 N>
__device__ __forceinline__ void silu_of(float4 (&x)[N]) {
    float4 d[N], s[N];
    bool in_range = true;
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        d[i] = make_float4(1.0f + exp_f32(-x[i].x), 1.0f + exp_f32(-x[i].y), 1.0f + exp_f32(-x[i].z), 1.0f + exp_f32(-x[i].w));
        s[i] = make_float4(reciprocal_in_range(d[i].x), reciprocal_in_range(d[i].y), reciprocal_in_range(d[i].z),
                           reciprocal_in_range(d[i].w));
        // A NaN fails the comparison.
        in_range = in_range && d[i].x < 4e37f && d[i].y < 4e37f && d[i].z < 4e37f && d[i].w < 4e37f;
    }
    if (!in_range)
#pragma unroll
        for (u32 i = 0; i < N; ++i) s[i] = make_float4(1.0f / d[i].x, 1.0f / d[i].y, 1.0f / d[i].z, 1.0f / d[i].w);
#pragma unroll
    for (u32 i = 0; i < N; ++i) x[i] = x[i] * s[i];
}

// The results of a multiplying warp for a token, in fours, and the tokens that a storing warp takes at once.
template <bool IS_GATED, u32 TILES>
struct Storing {
    static constexpr u32 FOURS = TILES * TILE_ROWS / (IS_GATED ? 8 : 4), AT_ONCE = 32 / FOURS;
};

// Stores the sums of a tile, whole or half. A multiplying warp has left, for each token, those of its row tiles one behind the other.
template <u32 TILES>
__device__ __forceinline__ void store_sums(const Args& a, const Grid<false>& grid, const Tile& tile, u32 storer) {
    constexpr u32 FOURS = Storing<false, TILES>::FOURS, AT_ONCE = Storing<false, TILES>::AT_ONCE;
    u32 four = threadIdx.x % 32 % FOURS, first = threadIdx.x % 32 / FOURS;
    u32 pitch = a.row_tiles * TILE_ROWS, tokens = min(TOKENS, a.m - tile.token_block * TOKENS);
    for (u32 warp = 0; warp < PAIRS; ++warp) {
        WarpRows<false> rows(a, grid, tile, warp, TILES == 2);
        if (4 * four >= rows.columns) continue;
        const u32* from = sums_of(warp) + 4 * four;
        int* to = a.out + (size_t)tile.token_block * TOKENS * pitch + rows.column + 4 * four;
#pragma unroll 4
        for (u32 token = storer * AT_ONCE + first; token < tokens; token += STORERS * AT_ONCE) {
            int4 sums = *(const int4*)(from + token * PITCH);
            *(int4*)(to + (size_t)token * pitch) = sums;
        }
    }
}

// Stores a gated unit's results. Of the rows of a tile the first eight are of a, the others of b. A thread takes three fours together, of
// which each is a chain of dependent operations.
template <u32 TILES>
__device__ __forceinline__ void store_gated(const Args& a, const Grid<true>& grid, const Tile& tile, u32 storer) {
    constexpr u32 FOURS = Storing<true, TILES>::FOURS, AT_ONCE = Storing<true, TILES>::AT_ONCE;
    constexpr u32 GROUPS = TOKENS / AT_ONCE, ITEMS = PAIRS * GROUPS, TOGETHER = 3;
    u32 four = threadIdx.x % 32 % FOURS, first = threadIdx.x % 32 / FOURS;
    u32 place = four / 2 * TILE_ROWS + four % 2 * 4;
    u32 pitch = a.row_tiles * (TILE_ROWS / 2), tokens = a.m - tile.token_block * TOKENS;
    int* out = a.out + (size_t)tile.token_block * TOKENS * pitch + 4 * four;
    for (u32 item = storer; item < ITEMS; item += STORERS * TOGETHER) {
        float4 left[TOGETHER], right[TOGETHER];
        int* to[TOGETHER];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; ++i) {
            u32 at = item + i * STORERS, warp = min(at / GROUPS, PAIRS - 1), token = at % GROUPS * AT_ONCE + first;
            WarpRows<true> rows(a, grid, tile, warp, TILES == 2);
            to[i] = at < ITEMS && token < tokens && 4 * four < rows.columns ? out + (size_t)token * pitch + rows.column : nullptr;
            const u32* from = sums_of(warp) + token * PITCH + place;
            int4 sums = *(const int4*)from;
            float factor = token_factors[token];
            right[i] = dequantize(*(const int4*)(from + TILE_ROWS / 2), factor);
            left[i] = dequantize(sums, factor);
        }
        silu_of(left);
#pragma unroll
        for (u32 i = 0; i < TOGETHER; ++i)
            if (to[i]) *(float4*)to[i] = left[i] * right[i];
    }
}

template <bool IS_GATED, u32 TILES>
__device__ __forceinline__ void store_tile(const Args& a, const Grid<IS_GATED>& grid, const Tile& tile, u32 storer) {
    if constexpr (IS_GATED)
        store_gated<TILES>(a, grid, tile, storer);
    else
        store_sums<TILES>(a, grid, tile, storer);
}

template <bool IS_GATED>
__device__ __forceinline__ void store_all(const Args& a, const float* scales, float gamma, const Grid<IS_GATED>& grid, u32 storer) {
    u32 parity = 0;
    for (u32 index = blockIdx.x; index < grid.tiles; index += gridDim.x, parity ^= 1) {
        Tile tile = grid.at(index);
        if constexpr (IS_GATED) {
            for (u32 token = storer * 32 + threadIdx.x % 32; token < TOKENS; token += STORERS * 32)
                token_factors[token] = gamma / __ldcg(scales + tile.token_block * TOKENS + token);
            sync_storers();
        }
        wait_for(shared_address(&sums_full), parity);
        if (index < grid.whole)
            store_tile<IS_GATED, 2>(a, grid, tile, storer);
        else
            store_tile<IS_GATED, 1>(a, grid, tile, storer);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(shared_address(&sums_empty));
        if constexpr (IS_GATED) sync_storers();
    }
}

// ---- The multiplying warpgroups ----

// Waits for the threads of this thread's warpgroup.
__device__ __forceinline__ void sync_warpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / WARPGROUP) : "memory"); }

// Where a multiplying warp is in the ring.
struct Place {
    u32 stage, lap;
};

// What a tile needs of its weights and tokens, asked for before the sums of the tile before it are left.
template <bool IS_GATED>
struct Prepared {
    const uint4 *left, *right;  // the warp's row tiles
    uint4 held[AHEAD][2];
    int q_sum;                  // of token threadIdx.x % 128

    __device__ __forceinline__ void fetch(u32 slot, u32 k) {
        held[slot][0] = __ldg(left + k * 32);
        held[slot][1] = __ldg(right + k * 32);
    }
    __device__ __forceinline__ void begin(const Args& a, const Grid<IS_GATED>& grid, u32 index) {
        if (index >= grid.tiles) return;
        Tile tile = grid.at(index);
        WarpRows<IS_GATED> rows(a, grid, tile, threadIdx.x / 32, index < grid.whole);
        left = a.weights + (size_t)rows.left * a.col_tiles * 32 + threadIdx.x % 32;
        right = a.weights + (size_t)rows.right * a.col_tiles * 32 + threadIdx.x % 32;
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i)
            if (i < a.col_tiles) fetch(i, i);
        u32 m = tile.segment * a.rows + tile.token_block * TOKENS + threadIdx.x % WARPGROUP;
        q_sum = __ldcg(a.q_sums + m);
    }
};

// Leaves a warp's sums. A thread has, of each row tile, the rows g and g + 8 of the tokens 8 j + 2 t and the next one.
template <u32 TILES>
__device__ __forceinline__ void leave_sums(const int (&d)[TILES][64]) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32* to = sums_of(threadIdx.x / 32) + 2 * t * PITCH + g;
#pragma unroll
    for (u32 j = 0; j < TOKENS / 8; ++j)
#pragma unroll
        for (u32 s = 0; s < TILES; ++s)
#pragma unroll
            for (u32 e = 0; e < 4; ++e) to[(8 * j + e % 2) * PITCH + s * TILE_ROWS + e / 2 * 8] = d[s][4 * j + e];
    __syncwarp();
    if (lane == 0) arrive(shared_address(&sums_full));
}

// Multiplies a tile, whole or half.
template <bool IS_GATED, u32 TILES>
__device__ __forceinline__ void multiply_tile(const Args& a, const Grid<IS_GATED>& grid, u32 index, Prepared<IS_GATED>& prepared,
                                              Place& place, u32 turn) {
    u32 group = threadIdx.x / WARPGROUP, i = threadIdx.x % WARPGROUP, t = threadIdx.x % 4;
    Tile tile = grid.at(index);
    ((int*)token_sums[group])[i] = prepared.q_sum;
    sync_warpgroup();
    int d[TILES][64];
#pragma unroll
    for (u32 j = 0; j < TOKENS / 8; ++j) {
        int2 sum = token_sums[group][4 * j + t];
#pragma unroll
        for (u32 s = 0; s < TILES; ++s) {
            d[s][4 * j] = d[s][4 * j + 2] = -sum.x;
            d[s][4 * j + 1] = d[s][4 * j + 3] = -sum.y;
        }
    }
    u32 codes[2][TILES][4], before = 0;
    auto step = [&](u32 slot, u32 k) {
        wait_for(shared_address(full + place.stage), place.lap % 2);
        u32 q = shared_address(stages + place.stage * Q_BYTES);
        uint4 l = prepared.held[slot][0], r = prepared.held[slot][1];
        // Of a gated unit a tile has eight rows of each half.
        if (IS_GATED && TILES == 1 && tile.half) l = make_uint4(l.y, 0, l.w, 0), r = make_uint4(r.y, 0, r.w, 0);
        const u32 words[2][4] = {{l.x, IS_GATED ? r.x : l.y, l.z, IS_GATED ? r.z : l.w},
                                 {IS_GATED ? l.y : r.x, r.y, IS_GATED ? l.w : r.z, r.w}};
#pragma unroll
        for (u32 f = 0; f < 4; ++f) {
            // The registers of this f are free when only the products of the one before it are under way.
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (f == 1 && k > 0 && i == 0) arrive(shared_address(empty + before));
#pragma unroll
            for (u32 s = 0; s < TILES; ++s)
#pragma unroll
                for (u32 w = 0; w < 4; ++w) codes[f % 2][s][w] = words[s][w] >> 2 * f & FIELD;
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (u32 s = 0; s < TILES; ++s) multiply(d[s], codes[f % 2][s], swizzled(q + f * 32));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
        if (k + AHEAD < a.col_tiles) prepared.fetch(slot, k + AHEAD);
        before = place.stage;
        if (++place.stage == STAGES) place = Place{0, place.lap + 1};
    };
    for (u32 k = 0; k < a.col_tiles; k += AHEAD) {
#pragma unroll
        for (u32 slot = 0; slot < AHEAD; ++slot)
            if (k + slot < a.col_tiles) step(slot, k + slot);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (i == 0) arrive(shared_address(empty + before));
    prepared.begin(a, grid, index + gridDim.x);
    if (turn > 0) wait_for(shared_address(&sums_empty), (turn - 1) % 2);
    leave_sums(d);
}

template <bool IS_GATED>
__device__ __forceinline__ void product(const Args& a, const float* scales, float gamma) {
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            make_barrier(shared_address(full + s), 1);
            make_barrier(shared_address(empty + s), 2);
        }
        make_barrier(shared_address(&sums_full), PAIRS);
        make_barrier(shared_address(&sums_empty), STORERS);
        fence_barriers();
    }
    __syncthreads();
    Grid<IS_GATED> grid(a);
    if (threadIdx.x >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        u32 warp = (threadIdx.x - MULTIPLIERS) / 32;
        if (warp < STORERS)
            store_all(a, scales, gamma, grid, warp);
        else if (threadIdx.x % 32 == 0)
            fetch_all(a, grid);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        Place place{0, 0};
        u32 turn = 0;
        Prepared<IS_GATED> prepared;
        prepared.begin(a, grid, blockIdx.x);
        for (u32 index = blockIdx.x; index < grid.tiles; index += gridDim.x, ++turn) {
            if (index < grid.whole)
                multiply_tile<IS_GATED, 2>(a, grid, index, prepared, place, turn);
            else
                multiply_tile<IS_GATED, 1>(a, grid, index, prepared, place, turn);
        }
    }
}
#endif

struct GatedArgs {
    Args product;         // of rows of a and as many of b; its results are floats, [M][row tiles * 8]
    const float* scales;  // s, [M]
    float gamma;
};

extern "C" __global__ void __launch_bounds__(384, 1) prompt_product(const __grid_constant__ Args a) {
#if __CUDA_ARCH__ >= 900
    product<false>(a, nullptr, 0.0f);
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) gated_prompt_product(const __grid_constant__ GatedArgs a) {
#if __CUDA_ARCH__ >= 900
    product<true>(a.product, a.scales, a.gamma);
#endif
}
