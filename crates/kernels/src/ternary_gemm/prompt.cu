// Products of prompts on Hopper's warpgroup instructions: y[m, n] = sum_k q[m, k] t[n, k], exact; or, where the rows of weights are
// those of a and of b, silu(a) * b of the outputs.
//
// A block computes 256 rows of weights by 128 or 160 tokens, two warpgroups 128 rows each. Weights are the first operand, unpacked
// into registers (see common.cuh), so that shared memory has less to do than tensor cores. Activations are the second: the
// quantiser has laid them out so that a bulk copy brings what a step needs as the instruction wants it, [tokens][128 bytes], swizzled.
// A warp asks for them. Sums are left in shared memory, from where three more warps store them, or what becomes of them,
// while the next tile is multiplied; those of a block's last tile are stored by the warps that have multiplied it. Blocks stay for as many
// tiles as there are.

// How a product is cut into tiles: `PromptPlan` in plan.rs, so that no block divides before its first copies.
struct Plan {
    u64 by_pair_blocks, by_token_blocks, by_last_each;  // for `quotient`
    u32 pairs, pair_blocks;                     // pairs of row tiles of a segment, and blocks of them
    u32 token_blocks;                           // tiles of a block of pairs, but for the last round
    u32 whole, tiles;                           // whole tiles, and all
    u32 last_tokens, last_halves;               // of a tile of the last round; parts of its rows that are tiles
    u32 last_token, last_first, last_each;      // of the last round: first token, then its tiles of the first block of pairs and of others
};

#if __CUDA_ARCH__ >= 900
constexpr u32 TOKENS = 128;              // whose activations lie together, and whose sums have room in shared memory
constexpr u32 Q_BYTES = TOKENS * TILE_COLS;
constexpr u32 MULTIPLIERS = 256;         // threads
constexpr u32 WARPGROUP = 128;
constexpr u32 PAIRS = MULTIPLIERS / 32;  // of row tiles, of a block: a warp's
constexpr u32 AHEAD = 2;                 // steps that packed codes are fetched ahead
constexpr u32 STORERS = 3;               // warps
constexpr u32 PITCH = 2 * TILE_ROWS + 4; // words from token to token where a warp's sums lie; no bank is met twice
constexpr u32 SUM_BYTES = TOKENS * PITCH * 4;
constexpr u32 MOST_STAGES = 5, MOST_TOKENS = 160;

extern __shared__ __align__(1024) u8 stages[];  // activations [stage]; then sums [warp]
__shared__ __align__(8) u64 full[MOST_STAGES], empty[MOST_STAGES], sums_full, sums_empty;
__shared__ int2 token_sums[2][MOST_TOKENS / 2];  // of a tile's activations, for each warpgroup
__shared__ float token_factors[TOKENS];          // gamma / s, for the storing warps

// Rows of 128 bytes, eight of them 1024 bytes further, swizzled by 128 bytes.
__device__ __forceinline__ u64 swizzled(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Sums as registers and as operands of `asm`.
#define REGISTERS_24 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_40 REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_48 REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_80 REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define OPERANDS_8(d, i) \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define OPERANDS_24(d) OPERANDS_8(d, 0), OPERANDS_8(d, 8), OPERANDS_8(d, 16)
#define OPERANDS_40(d) OPERANDS_24(d), OPERANDS_8(d, 24), OPERANDS_8(d, 32)
#define OPERANDS_48(d) OPERANDS_40(d), OPERANDS_8(d, 40)
#define OPERANDS_64(d) OPERANDS_48(d), OPERANDS_8(d, 48), OPERANDS_8(d, 56)
#define OPERANDS_80(d) OPERANDS_64(d), OPERANDS_8(d, 64), OPERANDS_8(d, 72)

// d += codes (64 x 32) * q (32 x COUNT tokens); SUMS are a thread's, and the other operands' numbers follow theirs.
#define MULTIPLY(COUNT, SUMS, C0, C1, C2, C3, Q)                                                                          \
    __device__ __forceinline__ void multiply(int (&d)[SUMS], const u32 (&codes)[4], u64 q) {                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #COUNT "k32.s32.u8.s8 {" REGISTERS_##SUMS "}, {%" #C0 ", %" #C1  \
                     ", %" #C2 ", %" #C3 "}, %" #Q ", 1;"                                                                 \
                     : OPERANDS_##SUMS(d)                                                                                 \
                     : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "l"(q));                               \
    }
MULTIPLY(48, 24, 24, 25, 26, 27, 28)
MULTIPLY(80, 40, 40, 41, 42, 43, 44)
MULTIPLY(96, 48, 48, 49, 50, 51, 52)
MULTIPLY(128, 64, 64, 65, 66, 67, 68)
MULTIPLY(160, 80, 80, 81, 82, 83, 84)

// ---- Tiles ----

// What a block computes at a time: 8 pairs of row tiles, or half of those rows, by some tokens.
struct Tile {
    u32 segment, first_pair;  // pair within the segment
    u32 token, half;          // first token; which half of the rows
};

// n / d for a `by` of (2^64 - 1) / d.
__device__ __forceinline__ u32 quotient(u32 n, u64 by) { return (u32)__umul64hi((u64)n + 1, by); }

// What the tiles of all kernels have in common.
struct AnyTiles {
    const Plan& plan;

    __device__ __forceinline__ Tile tile(u32 pair_block, u32 token, u32 half) const {
        u32 segment = quotient(pair_block, plan.by_pair_blocks);
        return {segment, (pair_block - segment * plan.pair_blocks) * PAIRS, token, half};
    }
    // Whole tiles of some tokens.
    __device__ __forceinline__ Tile whole(u32 index, u32 tokens) const {
        u32 pair_block = quotient(index, plan.by_token_blocks);
        return tile(pair_block, (index - pair_block * plan.token_blocks) * tokens, 0);
    }
};

// Tiles of 128 tokens. In the last round, which has not enough of them for all blocks, they are smaller where that gives none of the
// blocks a second one: 48 tokens, half of the rows, 80 or 96 tokens.
template <bool IS_GATED_UNIT>
struct Regular : AnyTiles {
    static constexpr bool IS_GATED = IS_GATED_UNIT;
    static constexpr u32 STAGES = 5, STAGE_TOKENS = TOKENS;

    __device__ __forceinline__ u32 tokens(u32 index) const { return index < plan.whole ? TOKENS : plan.last_tokens; }
    __device__ __forceinline__ bool has_all_rows(u32 index) const { return index < plan.whole || plan.last_halves == 1; }
    __device__ __forceinline__ Tile at(u32 index) const {
        if (index < plan.whole) return whole(index, TOKENS);
        u32 halved = plan.last_halves - 1, half = (index - plan.whole) & halved, last = (index - plan.whole) >> halved;
        u32 pair_block = quotient(plan.whole, plan.by_token_blocks);
        if (last < plan.last_first) return tile(pair_block, plan.last_token + last * plan.last_tokens, half);
        last -= plan.last_first;
        u32 further = quotient(last, plan.by_last_each);
        return tile(pair_block + 1 + further, (last - further * plan.last_each) * plan.last_tokens, half);
    }
};

// Tiles of 160 tokens: fewer rounds for some shapes, and fewer bytes of weights.
struct Wide : AnyTiles {
    static constexpr bool IS_GATED = false;
    static constexpr u32 STAGES = 4, STAGE_TOKENS = MOST_TOKENS;

    __device__ __forceinline__ u32 tokens(u32) const { return STAGE_TOKENS; }
    __device__ __forceinline__ Tile at(u32 index) const { return whole(index, STAGE_TOKENS); }
};

template <class Tiles>
constexpr u32 STAGE_BYTES = Tiles::STAGE_TOKENS * TILE_COLS;

template <class Tiles>
__device__ __forceinline__ u32* sums_of(u32 warp) {
    return (u32*)(stages + Tiles::STAGES * STAGE_BYTES<Tiles> + warp * SUM_BYTES);
}

// ---- The fetching warp ----

template <class Tiles>
__device__ __forceinline__ void fetch_all(const Args& a, const Tiles& tiles) {
    u32 stage = 0, lap = 0;
    for (u32 index = blockIdx.x; index < tiles.plan.tiles; index += gridDim.x) {
        Tile tile = tiles.at(index);
        // A tile's tokens lie in one or two blocks of them; none beyond the last one is needed.
        u32 block = tile.token / TOKENS, skipped = tile.token % TOKENS, tokens = tiles.tokens(index);
        u32 here = min(tokens, TOKENS - skipped), beyond = (block + 1) * TOKENS < a.m ? tokens - here : 0;
        const i8* q = a.q + (size_t)tile.segment * a.rows * a.col_tiles * TILE_COLS + (size_t)block * a.col_tiles * Q_BYTES;
        for (u32 k = 0; k < a.col_tiles; ++k) {
            u8* to = stages + stage * STAGE_BYTES<Tiles>;
            u32 barrier = shared_address(full + stage);
            if (lap > 0) wait_for(shared_address(empty + stage), (lap - 1) % 2);
            expect_bytes(barrier, (here + beyond) * TILE_COLS);
            bulk_copy(to, q + (size_t)k * Q_BYTES + skipped * TILE_COLS, here * TILE_COLS, barrier);
            if (beyond > 0) bulk_copy(to + here * TILE_COLS, q + (size_t)(a.col_tiles + k) * Q_BYTES, beyond * TILE_COLS, barrier);
            if (++stage == Tiles::STAGES) {
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

    __device__ __forceinline__ WarpRows(const Args& a, const Plan& plan, const Tile& tile, u32 warp, bool is_whole) {
        // Pairs beyond the last one repeat it; their results are dropped.
        if (IS_GATED) {
            u32 pair = tile.first_pair + warp;
            left = min(pair, plan.pairs - 1);
            right = left + plan.pairs;
            column = pair * TILE_ROWS + tile.half * (TILE_ROWS / 2);
            columns = pair < plan.pairs ? (is_whole ? TILE_ROWS : TILE_ROWS / 2) : 0;
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

// ---- Storing ----

// The factors of a gated unit's sums; empty for others.
struct Gate {
    const float* scales;  // s, [M]
    float gamma;

    __device__ __forceinline__ float factor(u32 m) const { return gamma / __ldcg(scales + m); }
};

// What a warp stores: the sums of some multiplying warps, and of the tokens that are `AT_ONCE` times `index`, `index` + `step`, ...
struct Share {
    u32 first_warp, warps, index, step;
};

// The results of a multiplying warp for a token, in fours, and the tokens that a warp stores at once.
template <bool IS_GATED, u32 TILES>
struct Storing {
    static constexpr u32 FOURS = TILES * TILE_ROWS / (IS_GATED ? 8 : 4), AT_ONCE = 32 / FOURS;
};

// Stores the sums that lie in shared memory, of COUNT tokens from the one with number `first_token` in the tile. A multiplying warp has left, for each
// token, those of its row tiles one behind the other.
template <u32 TILES, u32 COUNT, class Tiles>
__device__ __forceinline__ void store_sums(const Args& a, const Tiles& tiles, const Tile& tile, u32 first_token, Share share) {
    constexpr u32 FOURS = Storing<false, TILES>::FOURS, AT_ONCE = Storing<false, TILES>::AT_ONCE;
    u32 four = threadIdx.x % 32 % FOURS, first = threadIdx.x % 32 / FOURS, m = tile.token + first_token;
    u32 pitch = a.row_tiles * TILE_ROWS, tokens = min(COUNT, a.m - min(m, a.m));
    for (u32 warp = share.first_warp; warp < share.first_warp + share.warps; ++warp) {
        WarpRows<false> rows(a, tiles.plan, tile, warp, TILES == 2);
        if (4 * four >= rows.columns) continue;
        const u32* from = sums_of<Tiles>(warp) + 4 * four;
        int* to = a.out + (size_t)m * pitch + rows.column + 4 * four;
#pragma unroll 2
        for (u32 token = share.index * AT_ONCE + first; token < tokens; token += share.step * AT_ONCE) {
            int4 sums = *(const int4*)(from + token * PITCH);
            *(int4*)(to + (size_t)token * pitch) = sums;
        }
    }
}

// Stores a gated unit's results. Of the rows of a tile the first eight are of a, the others of b. A thread takes three fours together, of
// which each is a chain of dependent operations.
template <u32 TILES, u32 COUNT, class Tiles, class Factor>
__device__ __forceinline__ void store_gated(const Args& a, const Tiles& tiles, const Tile& tile, Share share, Factor factor_of) {
    constexpr u32 FOURS = Storing<true, TILES>::FOURS, AT_ONCE = Storing<true, TILES>::AT_ONCE, GROUPS = COUNT / AT_ONCE, TOGETHER = 3;
    u32 four = threadIdx.x % 32 % FOURS, first = threadIdx.x % 32 / FOURS, items = share.warps * GROUPS;
    u32 place = four / 2 * TILE_ROWS + four % 2 * 4;
    u32 pitch = a.row_tiles * (TILE_ROWS / 2), tokens = a.m - tile.token;
    int* out = a.out + (size_t)tile.token * pitch + 4 * four;
    for (u32 item = share.index; item < items; item += share.step * TOGETHER) {
        float4 left[TOGETHER], right[TOGETHER];
        int* to[TOGETHER];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; ++i) {
            u32 at = item + i * share.step, warp = share.first_warp + min(at / GROUPS, share.warps - 1);
            u32 token = at % GROUPS * AT_ONCE + first;
            WarpRows<true> rows(a, tiles.plan, tile, warp, TILES == 2);
            to[i] = at < items && token < tokens && 4 * four < rows.columns ? out + (size_t)token * pitch + rows.column : nullptr;
            const u32* from = sums_of<Tiles>(warp) + token * PITCH + place;
            int4 sums = *(const int4*)from;
            float factor = factor_of(token);
            right[i] = dequantize(*(const int4*)(from + TILE_ROWS / 2), factor);
            left[i] = dequantize(sums, factor);
        }
        float4 sigmoid_of[TOGETHER];
        sigmoids(left, sigmoid_of);
#pragma unroll
        for (u32 i = 0; i < TOGETHER; ++i)
            if (to[i]) *(float4*)to[i] = left[i] * sigmoid_of[i] * right[i];
    }
}

// ---- The storing warps ----

__device__ __forceinline__ void sync_storers() { asm volatile("bar.sync 3, 96;" ::: "memory"); }

// All tiles but the last one, which alone may be smaller.
template <class Tiles>
__device__ __forceinline__ void store_all(const Args& a, Gate gate, const Tiles& tiles, u32 storer) {
    u32 parity = 0;
    for (u32 index = blockIdx.x; index + gridDim.x < tiles.plan.tiles; index += gridDim.x, parity ^= 1) {
        Tile tile = tiles.at(index);
        Share share{0, PAIRS, storer, STORERS};
        if constexpr (Tiles::IS_GATED) {
            for (u32 token = storer * 32 + threadIdx.x % 32; token < TOKENS; token += STORERS * 32)
                token_factors[token] = gate.factor(min(tile.token + token, a.m - 1));
            sync_storers();
        }
        wait_for(shared_address(&sums_full), parity);
        if constexpr (Tiles::IS_GATED)
            store_gated<2, TOKENS>(a, tiles, tile, share, [](u32 token) { return token_factors[token]; });
        else
            store_sums<2, TOKENS>(a, tiles, tile, 0, share);
        arrive(shared_address(&sums_empty));
        if constexpr (Tiles::IS_GATED) sync_storers();
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
template <class Tiles>
struct Prepared {
    static constexpr u32 SUMS = (Tiles::STAGE_TOKENS + WARPGROUP - 1) / WARPGROUP;
    const uint4 *left, *right;  // the warp's row tiles
    uint4 held[AHEAD][2];
    int q_sums[SUMS];           // of tokens threadIdx.x % 128, and 128 further

    __device__ __forceinline__ void fetch(u32 slot, u32 k) {
        held[slot][0] = __ldg(left + k * 32);
        held[slot][1] = __ldg(right + k * 32);
    }
    __device__ __forceinline__ void begin(const Args& a, const Tiles& tiles, u32 index) {
        if (index >= tiles.plan.tiles) return;
        Tile tile = tiles.at(index);
        bool has_all_rows = true;
        if constexpr (Tiles::STAGE_TOKENS == TOKENS) has_all_rows = tiles.has_all_rows(index);
        WarpRows<Tiles::IS_GATED> rows(a, tiles.plan, tile, threadIdx.x / 32, has_all_rows);
        left = a.weights + (size_t)rows.left * a.col_tiles * 32 + threadIdx.x % 32;
        right = a.weights + (size_t)rows.right * a.col_tiles * 32 + threadIdx.x % 32;
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i)
            if (i < a.col_tiles) fetch(i, i);
        // Nothing is stored for tokens beyond the last one.
#pragma unroll
        for (u32 i = 0; i < SUMS; ++i)
            q_sums[i] = __ldcg(a.q_sums + tile.segment * a.rows + min(tile.token + i * WARPGROUP + threadIdx.x % WARPGROUP, a.m - 1));
    }
};

// Leaves a warp's sums of COUNT tokens, from token FIRST of the tile on. A thread has, of each row tile, the rows g and g + 8 of the
// tokens 8 j + 2 t and the next one.
template <class Tiles, u32 FIRST, u32 COUNT, u32 TILES, u32 SUMS>
__device__ __forceinline__ void leave_sums(const int (&d)[TILES][SUMS]) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32* to = sums_of<Tiles>(threadIdx.x / 32) + 2 * t * PITCH + g;
#pragma unroll
    for (u32 j = 0; j < COUNT / 8; ++j)
#pragma unroll
        for (u32 s = 0; s < TILES; ++s)
#pragma unroll
            for (u32 e = 0; e < 4; ++e) to[(8 * j + e % 2) * PITCH + s * TILE_ROWS + e / 2 * 8] = d[s][4 * (FIRST / 8 + j) + e];
    __syncwarp();
}

// Multiplies a tile of COUNT tokens, one or two row tiles a warp.
template <u32 COUNT, u32 TILES, class Tiles>
__device__ __forceinline__ void multiply_tile(const Args& a, Gate gate, const Tiles& tiles, u32 index, Prepared<Tiles>& prepared,
                                              Place& place, u32 turn) {
    constexpr bool IS_GATED = Tiles::IS_GATED;
    u32 group = threadIdx.x / WARPGROUP, i = threadIdx.x % WARPGROUP, t = threadIdx.x % 4;
    u32 half = TILES == 1 ? tiles.at(index).half : 0;
    // All have read those of the tile before.
    sync_warpgroup();
#pragma unroll
    for (u32 part = 0; part < Prepared<Tiles>::SUMS; ++part)
        if (part * WARPGROUP + i < Tiles::STAGE_TOKENS) ((int*)token_sums[group])[part * WARPGROUP + i] = prepared.q_sums[part];
    sync_warpgroup();
    int d[TILES][COUNT / 2];
#pragma unroll
    for (u32 j = 0; j < COUNT / 8; ++j) {
        int2 sum = token_sums[group][4 * j + t];
#pragma unroll
        for (u32 s = 0; s < TILES; ++s) {
            d[s][4 * j] = d[s][4 * j + 2] = -sum.x;
            d[s][4 * j + 1] = d[s][4 * j + 3] = -sum.y;
        }
    }
    // Where there are registers for it, the next codes are unpacked while products are under way, not behind a wait for them.
    constexpr bool UNPACKS_AHEAD = COUNT <= TOKENS;
    u32 codes[UNPACKS_AHEAD ? 4 : 2][TILES][4], before = 0;
    auto step = [&](u32 slot, u32 k) {
        uint4 l = prepared.held[slot][0], r = prepared.held[slot][1];
        // Of a gated unit half a tile has eight rows of each of a and b.
        if (IS_GATED && TILES == 1 && half) l = make_uint4(l.y, 0, l.w, 0), r = make_uint4(r.y, 0, r.w, 0);
        const u32 words[2][4] = {{l.x, IS_GATED ? r.x : l.y, l.z, IS_GATED ? r.z : l.w},
                                 {IS_GATED ? l.y : r.x, r.y, IS_GATED ? l.w : r.z, r.w}};
        auto unpack = [&](u32 f) {
#pragma unroll
            for (u32 s = 0; s < TILES; ++s) {
                u32(&to)[4] = codes[UNPACKS_AHEAD ? f : f % 2][s];
#pragma unroll
                for (u32 w = 0; w < 4; ++w) to[w] = words[s][w] >> 2 * f & FIELD;
                // Here, and not where the compiler would like it.
                asm volatile("" : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3]));
            }
        };
        if (UNPACKS_AHEAD) unpack(0);
        wait_for(shared_address(full + place.stage), place.lap % 2);
        u32 q = shared_address(stages + place.stage * STAGE_BYTES<Tiles>);
#pragma unroll
        for (u32 f = 0; f < 4; ++f) {
            // The registers of the f before the last one are free when only the products of one f are under way.
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (f == 1 && k > 0 && i == 0) arrive(shared_address(empty + before));
            if (!UNPACKS_AHEAD) unpack(f);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (u32 s = 0; s < TILES; ++s) multiply(d[s], codes[UNPACKS_AHEAD ? f : f % 2][s], swizzled(q + f * 32));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (UNPACKS_AHEAD && f < 3) unpack(f + 1);
        }
        if (k + AHEAD < a.col_tiles) prepared.fetch(slot, k + AHEAD);
        before = place.stage;
        if (++place.stage == Tiles::STAGES) place = Place{0, place.lap + 1};
    };
    for (u32 k = 0; k < a.col_tiles; k += AHEAD) {
#pragma unroll
        for (u32 slot = 0; slot < AHEAD; ++slot)
            if (k + slot < a.col_tiles) step(slot, k + slot);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (i == 0) arrive(shared_address(empty + before));
    prepared.begin(a, tiles, index + gridDim.x);
    if (turn > 0) wait_for(shared_address(&sums_empty), (turn - 1) % 2);
    constexpr u32 FIRST = COUNT < TOKENS ? COUNT : TOKENS;
    Tile tile = tiles.at(index);
    Share own{threadIdx.x / 32, 1, 0, 1};
    // There is room for the sums of so many tokens.
    if constexpr (COUNT > FIRST) {
        leave_sums<Tiles, FIRST, COUNT - FIRST>(d);
        store_sums<TILES, COUNT - FIRST>(a, tiles, tile, FIRST, own);
        __syncwarp();
    }
    leave_sums<Tiles, 0, FIRST>(d);
    if (index + gridDim.x < tiles.plan.tiles) {
        arrive(shared_address(&sums_full));
    } else if constexpr (IS_GATED) {
        store_gated<TILES, FIRST>(a, tiles, tile, own, [&](u32 token) { return gate.factor(min(tile.token + token, a.m - 1)); });
    } else {
        store_sums<TILES, FIRST>(a, tiles, tile, 0, own);
    }
}

template <bool IS_GATED>
__device__ __forceinline__ void multiply_all(const Args& a, Gate gate, const Regular<IS_GATED>& tiles) {
    Place place{0, 0};
    u32 turn = 0, index = blockIdx.x;
    Prepared<Regular<IS_GATED>> prepared;
    prepared.begin(a, tiles, index);
    for (; index < tiles.plan.whole; index += gridDim.x, ++turn) multiply_tile<TOKENS, 2>(a, gate, tiles, index, prepared, place, turn);
    if (index >= tiles.plan.tiles) return;
    if (tiles.plan.last_halves == 2)
        multiply_tile<TOKENS, 1>(a, gate, tiles, index, prepared, place, turn);
    else if (tiles.plan.last_tokens == 48)
        multiply_tile<48, 2>(a, gate, tiles, index, prepared, place, turn);
    else if (tiles.plan.last_tokens == 80)
        multiply_tile<80, 2>(a, gate, tiles, index, prepared, place, turn);
    else if (tiles.plan.last_tokens == 96)
        multiply_tile<96, 2>(a, gate, tiles, index, prepared, place, turn);
    else
        multiply_tile<TOKENS, 2>(a, gate, tiles, index, prepared, place, turn);
}

__device__ __forceinline__ void multiply_all(const Args& a, Gate gate, const Wide& tiles) {
    Place place{0, 0};
    u32 turn = 0, index = blockIdx.x;
    Prepared<Wide> prepared;
    prepared.begin(a, tiles, index);
    for (; index < tiles.plan.tiles; index += gridDim.x, ++turn) multiply_tile<Wide::STAGE_TOKENS, 2>(a, gate, tiles, index, prepared, place, turn);
}

template <class Tiles>
__device__ __forceinline__ void product(const Args& a, const Plan& plan, Gate gate) {
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < Tiles::STAGES; ++s) {
            make_barrier(shared_address(full + s), 1);
            make_barrier(shared_address(empty + s), 2);
        }
        make_barrier(shared_address(&sums_full), PAIRS * 32);
        make_barrier(shared_address(&sums_empty), STORERS * 32);
        fence_barriers();
    }
    __syncthreads();
    Tiles tiles{plan};
    if (threadIdx.x >= MULTIPLIERS) {
        // Wide tiles take more registers, and storing their sums fewer.
        if constexpr (Tiles::STAGE_TOKENS > TOKENS)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        u32 warp = (threadIdx.x - MULTIPLIERS) / 32;
        if (warp < STORERS)
            store_all(a, gate, tiles, warp);
        else if (threadIdx.x % 32 == 0)
            fetch_all(a, tiles);
    } else {
        if constexpr (Tiles::STAGE_TOKENS > TOKENS)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        multiply_all(a, gate, tiles);
    }
}
#endif

struct PromptArgs {
    Args product;
    Plan plan;
};

struct GatedArgs {
    PromptArgs product;   // of rows of a and as many of b; its results are floats, [M][row tiles * 8]
    const float* scales;  // s, [M]
    float gamma;
};

extern "C" __global__ void __launch_bounds__(384, 1) prompt_product(const __grid_constant__ PromptArgs a) {
#if __CUDA_ARCH__ >= 900
    product<Regular<false>>(a.product, a.plan, Gate{});
#endif
}

extern "C" __global__ void __launch_bounds__(384, 1) gated_prompt_product(const __grid_constant__ GatedArgs a) {
#if __CUDA_ARCH__ >= 900
    product<Regular<true>>(a.product.product, a.product.plan, Gate{a.scales, a.gamma});
#endif
}

// For shapes whose tiles of 128 tokens would keep few blocks busy in the last round (see plan.rs).
extern "C" __global__ void __launch_bounds__(384, 1) wide_prompt_product(const __grid_constant__ PromptArgs a) {
#if __CUDA_ARCH__ >= 900
    product<Wide>(a.product, a.plan, Gate{});
#endif
}
