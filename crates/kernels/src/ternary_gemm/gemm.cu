// Products of ternary weights with 8-bit activations on the int8 tensor cores, as exact 32-bit sums:
// y[m, n] = sum_k q[m, k] t[n, k]. Codes are t + 1, so sum_k q (t + 1) - sum_k q.

// A block computes WARP_ROWS * 32 rows by TOKEN_WARPS * NT * 8 tokens; a warp 32 rows by NT * 8 tokens.
template <u32 WARP_ROWS, u32 TOKEN_WARPS, u32 NT, u32 STAGES>
__device__ void product(const Args& a) {
    constexpr u32 THREADS = WARP_ROWS * TOKEN_WARPS * 32, TOKENS = TOKEN_WARPS * NT * 8;
    let_next_begin();
    extern __shared__ uint4 tokens_tile[];  // [stage][token][8], 16-byte chunks swapped in odd rows
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 row_tile = (blockIdx.x * WARP_ROWS + warp % WARP_ROWS) * 2;
    u32 token_warp = warp / WARP_ROWS;
    u32 first_token = blockIdx.y * TOKENS;
    u32 segment = blockIdx.x * WARP_ROWS * 2 / a.segment_tiles;
    const i8* q = a.q + (size_t)segment * a.rows * a.col_tiles * TILE_COLS;
    u32 begin = (u32)((u64)a.col_tiles * blockIdx.z / a.splits);
    u32 end = (u32)((u64)a.col_tiles * (blockIdx.z + 1) / a.splits);

    auto fetch = [&](u32 tile) {
        if (tile < end) {
            uint4* stage = tokens_tile + tile % STAGES * TOKENS * 8;
#pragma unroll
            for (u32 at = threadIdx.x; at < TOKENS * 8; at += THREADS) {
                u32 token = at / 8, chunk = at % 8;
                // Tokens beyond the last one repeat it; their results are dropped.
                u32 from = min(first_token + token, a.m - 1);
                async_copy_16(stage + token * 8 + (chunk ^ (token & 1)),
                              q + ((size_t)from * a.col_tiles + tile) * TILE_COLS + chunk * 16);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    // Row tiles beyond the last one repeat it, too.
    const uint4* rows[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r)
        rows[r] = a.weights + (size_t)min(row_tile + r, a.row_tiles - 1) * a.col_tiles * 32 + lane;

    int c[2][NT][4] = {};
    uint4 next[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) next[r] = begin < end ? __ldg(rows[r] + (size_t)begin * 32) : make_uint4(0, 0, 0, 0);
    wait_for_previous();
#pragma unroll
    for (u32 stage = 0; stage + 1 < STAGES; ++stage) fetch(begin + stage);
    for (u32 tile = begin; tile < end; ++tile) {
        uint4 w[2] = {next[0], next[1]};
        if (tile + 1 < end) {
#pragma unroll
            for (u32 r = 0; r < 2; ++r) next[r] = __ldg(rows[r] + (size_t)(tile + 1) * 32);
        }
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        fetch(tile + STAGES - 1);
        const uint4* stage = tokens_tile + tile % STAGES * TOKENS * 8 + token_warp * NT * 8 * 8;
#pragma unroll
        for (u32 n = 0; n < NT; ++n) {
            const uint4* token = stage + (n * 8 + g) * 8;
            uint4 low = token[(2 * t) ^ (g & 1)], high = token[(2 * t + 1) ^ (g & 1)];
            const u32 b0[4] = {low.x, low.y, low.z, low.w}, b1[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
#pragma unroll
                for (u32 f = 0; f < 4; ++f)
                    mma_u8_s8(c[r][n], w[r].x >> 2 * f & FIELD, w[r].y >> 2 * f & FIELD,
                              w[r].z >> 2 * f & FIELD, w[r].w >> 2 * f & FIELD, b0[f], b1[f]);
            }
        }
    }
    u32 width = a.row_tiles * TILE_ROWS;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        if (row_tile + r >= a.row_tiles) continue;
        u32 row = (row_tile + r) * TILE_ROWS + g;
#pragma unroll
        for (u32 n = 0; n < NT; ++n) {
#pragma unroll
            for (u32 side = 0; side < 2; ++side) {
                u32 m = first_token + (token_warp * NT + n) * 8 + 2 * t + side;
                if (m >= a.m) continue;
                int sum = begin == 0 ? a.q_sums[segment * a.rows + m] : 0;
                int* out = a.out + (size_t)m * width + row;
                if (a.splits == 1) {
                    out[0] = c[r][n][side] - sum;
                    out[8] = c[r][n][2 + side] - sum;
                } else {
                    atomicAdd(out, c[r][n][side] - sum);
                    atomicAdd(out + 8, c[r][n][2 + side] - sum);
                }
            }
        }
    }
}

// Names: rows by tokens of a block.
extern "C" __global__ void __launch_bounds__(128) gemm_128x8(const __grid_constant__ Args a) { product<4, 1, 1, 4>(a); }

extern "C" __global__ void __launch_bounds__(128) gemm_128x16(const __grid_constant__ Args a) { product<4, 1, 2, 4>(a); }

extern "C" __global__ void __launch_bounds__(128) gemm_128x32(const __grid_constant__ Args a) { product<4, 1, 4, 4>(a); }

extern "C" __global__ void __launch_bounds__(128) gemm_128x64(const __grid_constant__ Args a) { product<4, 1, 8, 4>(a); }

extern "C" __global__ void __launch_bounds__(256, 2) gemm_128x128(const __grid_constant__ Args a) {
    product<4, 2, 8, 4>(a);
}

// ---- Layout ----

struct RepackArgs {
    const u32* words;  // as on the CPU: [row tile][unit of 16 inputs][row]
    u32* tiles;
    u32 row_tiles, units, col_tiles;
};

// One thread a code word.
extern "C" __global__ void __launch_bounds__(256) repack(const __grid_constant__ RepackArgs a) {
    u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)a.row_tiles * a.col_tiles * 128) return;
    u32 j = at % 4, lane = at / 4 % 32, g = lane / 4, t = lane % 4;
    u64 tile = at / 128;
    u32 col_tile = tile % a.col_tiles;
    u64 row_tile = tile / a.col_tiles;
    u32 unit = 8 * col_tile + 2 * t + j / 2, row = g + 8 * (j % 2);
    a.tiles[at] = unit < a.units ? a.words[(row_tile * a.units + unit) * 16 + row] : 0x55555555u;
}
