// Products of prompts on Hopper's warpgroup instructions: y[m, n] = sum_k q[m, k] t[n, k], exact.
//
// A block computes 128 tokens by 256 rows of weights. Activations are the first operand; the quantiser has laid them out
// so that a bulk copy brings a tile as the instruction wants it: eight chunks of 16 inputs, each [tokens][16 bytes].
// Codes are the second: a warpgroup of their own unpacks them into the same layout, [chunk][rows][16 bytes], while two
// others, 64 tokens each, do nothing but multiply. Blocks stay for as many tiles as there are; sums leave through shared
// memory by bulk copies, and one warpgroup's may leave while the other multiplies. Launches do not overlap (see many_rows.cu).

#if __CUDA_ARCH__ >= 900
constexpr u32 TOKENS = 128;
constexpr u32 ROWS = 256;
constexpr u32 ROW_TILES = ROWS / TILE_ROWS;
constexpr u32 STAGES = 4;
constexpr u32 Q_BYTES = TOKENS * TILE_COLS;
constexpr u32 CODE_BYTES = ROWS * TILE_COLS;
constexpr u32 STAGE_BYTES = Q_BYTES + CODE_BYTES;
constexpr u32 MULTIPLIERS = 256;    // threads
constexpr u32 UNPACK_WARPS = 4;
constexpr u32 WARP_TILES = ROW_TILES / UNPACK_WARPS;  // that a warp unpacks
constexpr u32 AHEAD = 2;            // steps that packed codes are fetched ahead
// Sums on their way out of a warp: 8 tokens by 128 rows; 8 rows more, so that stores meet in no bank.
constexpr u32 OUT_ROWS = 128;
constexpr u32 OUT_PITCH = (OUT_ROWS + 8) * 4;
constexpr u32 OUT_BYTES = 8 * OUT_PITCH;

extern __shared__ __align__(128) u8 stages[];  // [stage]: activations, codes; then sums on their way out [warp]
__shared__ __align__(8) u64 full[STAGES], empty[STAGES];

// d += q (64 x 32) codes' (32 x 256), or half of those rows.
__device__ __forceinline__ void multiply(int (&d)[128], u64 q, u64 codes) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.u8 " SUM_REGISTERS_128 ", %128, %129, 1;"
        : SUM_OPERANDS_128(d)
        : "l"(q), "l"(codes));
}

__device__ __forceinline__ void multiply(int (&d)[64], u64 q, u64 codes) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
          "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
          "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
          "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
          "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "l"(q), "l"(codes));
}

// What a block computes at a time: 128 tokens by 256 rows, or half of those rows.
struct Tile {
    u32 token_block, segment;
    u32 row_tile;      // first
    u32 row_tiles;     // of them inside the segment, may be none
    u32 warp_tiles;    // that a warp unpacks
};

struct Grid {
    u32 token_blocks, row_blocks;  // row blocks of a segment
    u32 whole, tiles;              // whole tiles, and all

    // Blocks that would find no tile for themselves in the last round take halves, if there are enough for all.
    __device__ __forceinline__ explicit Grid(const Args& a) {
        token_blocks = (a.m + TOKENS - 1) / TOKENS;
        row_blocks = (a.segment_tiles + ROW_TILES - 1) / ROW_TILES;
        whole = tiles = token_blocks * row_blocks * (a.row_tiles / a.segment_tiles);
        u32 last = tiles % gridDim.x;
        if (2 * last <= gridDim.x) {
            whole -= last;
            tiles += last;
        }
    }
    __device__ __forceinline__ Tile at(const Args& a, u32 index) const {
        Tile tile;
        bool is_whole = index < whole;
        u32 half = is_whole ? 0 : (index - whole) % 2;
        if (!is_whole) index = whole + (index - whole) / 2;
        tile.token_block = index % token_blocks;
        u32 row_block = index / token_blocks;
        tile.segment = row_block / row_blocks;
        tile.warp_tiles = is_whole ? WARP_TILES : WARP_TILES / 2;
        u32 within = row_block % row_blocks * ROW_TILES + half * (ROW_TILES / 2);
        tile.row_tiles = within < a.segment_tiles ? min(a.segment_tiles - within, UNPACK_WARPS * tile.warp_tiles) : 0;
        tile.row_tile = tile.segment * a.segment_tiles + within;
        return tile;
    }
};

// ---- The unpacking warpgroup ----

// Where packed codes are fetched from, step by step.
struct Packed {
    u32 offsets[WARP_TILES];
    u32 index, k;

    __device__ __forceinline__ void place(const Args& a, const Grid& grid, u32 warp) {
        if (index >= grid.tiles) return;
        Tile tile = grid.at(a, index);
        // Row tiles beyond the last one repeat it; their results are dropped.
#pragma unroll
        for (u32 r = 0; r < WARP_TILES; ++r)
            offsets[r] = min(tile.row_tile + warp * tile.warp_tiles + r, a.row_tiles - 1) * a.col_tiles * 32 + threadIdx.x % 32;
    }
};

__device__ __forceinline__ void unpack_all(const Args& a, const Grid& grid) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = (threadIdx.x - MULTIPLIERS) / 32;
    u32 first = blockIdx.x, stride = gridDim.x;
    if (first >= grid.tiles) return;
    u32 steps = ((grid.tiles - first - 1) / stride + 1) * a.col_tiles;
    Packed next{{}, first, 0};
    next.place(a, grid, warp);
    auto advance = [&] {
        if (++next.k < a.col_tiles) return;
        next.k = 0;
        next.index += stride;
        next.place(a, grid, warp);
    };
    auto fetch = [&](u32 r) { return __ldg(a.weights + next.offsets[r] + next.k * 32); };
    uint4 held[AHEAD][WARP_TILES];
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
        if (next.index < grid.tiles)
#pragma unroll
            for (u32 r = 0; r < WARP_TILES; ++r) held[i][r] = fetch(r);
        advance();
    }
    u32 index = first, k = 0;  // of the step that is unpacked
    Tile tile = grid.at(a, index);
    u32 stage = 0, lap = 0;
    auto step_once = [&](uint4 (&w)[WARP_TILES]) {
        u32 barrier = shared_address(full + stage);
        u8* to = stages + stage * STAGE_BYTES;
        if (lap > 0) wait_for(shared_address(empty + stage), (lap - 1) % 2);
        if (threadIdx.x == MULTIPLIERS) {
            const i8* q = a.q + (size_t)tile.segment * a.rows * a.col_tiles * TILE_COLS +
                          ((size_t)tile.token_block * a.col_tiles + k) * Q_BYTES;
            expect_bytes(barrier, Q_BYTES);
            bulk_copy(to, q, Q_BYTES, barrier);
        }
        u8* codes = to + Q_BYTES + (warp * tile.warp_tiles * TILE_ROWS + g) * 16 + 4 * t;
        bool more = next.index < grid.tiles;
#pragma unroll
        for (u32 r = 0; r < WARP_TILES; ++r) {
            const u32 words[4] = {w[r].x, w[r].y, w[r].z, w[r].w};
            if (more) w[r] = fetch(r);
            if (r >= tile.warp_tiles) continue;
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
#pragma unroll
                for (u32 f = 0; f < 4; ++f)
                    *(u32*)(codes + (2 * f + j / 2) * ROWS * 16 + (r * TILE_ROWS + 8 * (j % 2)) * 16) =
                        words[j] >> 2 * f & FIELD;
        }
        advance();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) arrive(barrier);
        if (++stage == STAGES) {
            stage = 0;
            ++lap;
        }
        if (++k == a.col_tiles) {
            k = 0;
            index += stride;
            if (index < grid.tiles) tile = grid.at(a, index);
        }
    };
    for (u32 step = 0; step < steps; step += AHEAD) {
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i)
            if (step + i < steps) step_once(held[i]);
    }
}

// ---- The multiplying warpgroups ----

// Sends a warp's sums of 16 tokens. A thread has, of tokens g and g + 8, the rows 8 j + 2 t and the next one.
template <u32 SUMS>
__device__ __forceinline__ void send_sums(const Args& a, const Tile& tile, const int (&d)[SUMS], u32 first_token,
                                          const int (&q_sums)[2], u8* staged) {
    constexpr u32 PART = OUT_ROWS / 8;  // j of a part
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        u32 m = first_token + 8 * half + lane;
        int* out = a.out + ((size_t)m * a.row_tiles + tile.row_tile) * TILE_ROWS;
        u32 rows = lane < 8 && m < a.m ? tile.row_tiles * TILE_ROWS : 0;
#pragma unroll
        for (u32 part = 0; part < SUMS / 4 / PART; ++part) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            __syncwarp();
#pragma unroll
            for (u32 j = 0; j < PART; ++j) {
                u32 at = 4 * (part * PART + j) + 2 * half;
                *(int2*)(staged + g * OUT_PITCH + 32 * j + 8 * t) = make_int2(d[at] - q_sums[half], d[at + 1] - q_sums[half]);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            // A lane sends the sums of a token.
            if (part * OUT_ROWS < rows)
                asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + part * OUT_ROWS),
                             "r"(shared_address(staged + lane * OUT_PITCH)), "r"(min(OUT_ROWS, rows - part * OUT_ROWS) * 4)
                             : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
}

// Where a multiplying warp is in the ring.
struct Place {
    u32 stage, lap;
};

// Multiplies a tile, whole (128 sums a thread) or half.
template <u32 SUMS>
__device__ __forceinline__ void multiply_tile(const Args& a, const Tile& tile, Place& place) {
    u32 warp = threadIdx.x / 32, first_token = tile.token_block * TOKENS + warp * 16;
    int q_sums[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        u32 m = first_token + threadIdx.x % 32 / 4 + 8 * half;
        q_sums[half] = m < a.m ? __ldcg(a.q_sums + tile.segment * a.rows + m) : 0;
    }
    int d[SUMS];
#pragma unroll
    for (u32 i = 0; i < SUMS; ++i) d[i] = 0;
    u32 before = 0;
    for (u32 k = 0; k < a.col_tiles; ++k) {
        wait_for(shared_address(full + place.stage), place.lap % 2);
        u32 q = shared_address(stages + place.stage * STAGE_BYTES) + warp / 4 * 64 * 16;
        u32 codes = shared_address(stages + place.stage * STAGE_BYTES + Q_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 f = 0; f < 4; ++f)
            multiply(d, descriptor<TOKENS>(q + 2 * f * TOKENS * 16), descriptor<ROWS>(codes + 2 * f * ROWS * 16));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The stage before is free when only this one is still being multiplied.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && threadIdx.x % 128 == 0) arrive(shared_address(empty + before));
        before = place.stage;
        if (++place.stage == STAGES) place = Place{0, place.lap + 1};
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (threadIdx.x % 128 == 0) arrive(shared_address(empty + before));
    send_sums(a, tile, d, first_token, q_sums, stages + STAGES * STAGE_BYTES + warp * OUT_BYTES);
}

__device__ __forceinline__ void multiply_all(const Args& a, const Grid& grid) {
    Place place{0, 0};
    for (u32 index = blockIdx.x; index < grid.tiles; index += gridDim.x) {
        Tile tile = grid.at(a, index);
        if (index < grid.whole)
            multiply_tile<128>(a, tile, place);
        else
            multiply_tile<64>(a, tile, place);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void product(const Args& a) {
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            make_barrier(shared_address(full + s), 1 + UNPACK_WARPS);
            make_barrier(shared_address(empty + s), 2);
        }
        fence_barriers();
    }
    __syncthreads();
    Grid grid(a);
    if (threadIdx.x >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        unpack_all(a, grid);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        multiply_all(a, grid);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1) prompt_product(const __grid_constant__ Args a) {
#if __CUDA_ARCH__ >= 900
    product(a);
#endif
}
