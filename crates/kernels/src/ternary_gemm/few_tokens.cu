// Products of one to eight tokens, as fast as the weights arrive: y[m, n] = sum_k q[m, k] t[n, k], added to `out`.
//
// Tiles lie row by row. Every block, and every warp in it, takes an equal contiguous part of all tiles, wherever rows
// begin and end, and streams it through a ring of its own in shared memory; each lane copies what itself will read, so
// the ring needs no synchronisation. The instruction multiplies eight columns whether there are eight tokens or one. Two blocks share
// a multiprocessor, so that the next launch's weights are on their way when this one ends.

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 DEPTH = 8;         // tiles on their way, a warp
constexpr u32 CHUNKS = TILE_COLS / 16;

__device__ __forceinline__ u32 part(u32 whole, u32 index, u32 parts) { return (u32)((u64)whole * index / parts); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) few_tokens(const __grid_constant__ Args a) {
    let_next_begin();
    extern __shared__ uint4 memory[];  // rings [warp][DEPTH][lane], q [segment][token][chunk]
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 begin = part(a.row_tiles * a.col_tiles, blockIdx.x, gridDim.x);
    u32 end = part(a.row_tiles * a.col_tiles, blockIdx.x + 1, gridDim.x);
    u32 at = begin + part(end - begin, warp, WARPS), last = begin + part(end - begin, warp + 1, WARPS);
    uint4* ring = memory + warp * DEPTH * 32 + lane;
    const uint4* next = a.weights + (size_t)at * 32 + lane;
    u32 left = last - at;  // to fetch
    auto fetch = [&](u32 slot) {
        if (left > 0) {
            async_copy_16(ring + slot * 32, next);
            --left;
            next += 32;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (u32 slot = 0; slot + 1 < DEPTH; ++slot) fetch(slot);

    u32 first_row = begin / a.col_tiles, rows = end > begin ? (end - 1) / a.col_tiles - first_row + 1 : 0;
    u32 first_segment = first_row / a.segment_tiles, chunks = a.col_tiles * CHUNKS;
    u32 segments = rows > 0 ? (first_row + rows - 1) / a.segment_tiles - first_segment + 1 : 0;
    uint4* q = memory + WARPS * DEPTH * 32;
    wait_for_previous();
    for (u32 segment = 0; segment < segments; ++segment) {
        const uint4* from = (const uint4*)a.q + (size_t)(first_segment + segment) * a.rows * chunks;
        uint4* to = q + segment * a.m * chunks;
        // Chunks are swapped in odd rows, so that eight rows meet in no bank.
        for (u32 k = threadIdx.x; k < a.m * chunks; k += THREADS) async_copy_16(to + (k ^ (k / chunks & 1)), from + k);
    }
    u32 row = at / a.col_tiles, col = at % a.col_tiles, token = min(g, a.m - 1), swap = token & 1;
    bool is_begin = col == 0, has_part = at < last;
    u32 segment = row / a.segment_tiles;
    int q_sums[2];  // of the tokens whose sums the thread has
    auto ask_for_q_sums = [&] {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) q_sums[i] = 2 * t + i < a.m ? a.q_sums[segment * a.rows + 2 * t + i] : 0;
    };
    if (has_part) ask_for_q_sums();
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    auto input_of = [&] { return q + ((segment - first_segment) * a.m + token) * chunks; };
    const uint4* input = input_of();
    int c[4][4] = {};
    auto flush = [&] {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            // Field f's sums are 4^f times too large.
            int sum = c[0][i] + (c[1][i] >> 2) + (c[2][i] >> 4) + (c[3][i] >> 6);
            u32 m = 2 * t + i % 2;
            if (m < a.m) {
                if (is_begin) sum -= q_sums[i % 2];
                atomicAdd(a.out + ((size_t)m * a.row_tiles + row) * TILE_ROWS + g + i / 2 * 8, sum);
            }
            c[0][i] = c[1][i] = c[2][i] = c[3][i] = 0;
        }
    };
    for (u32 slot = 0; at < last; ++at) {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
        uint4 w = ring[slot * 32];
        fetch((slot + DEPTH - 1) % DEPTH);
        slot = (slot + 1) % DEPTH;
        uint4 low = input[col * CHUNKS + (2 * t ^ swap)], high = input[col * CHUNKS + (2 * t + 1 ^ swap)];
        const u32 b0[4] = {low.x, low.y, low.z, low.w}, b1[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (u32 f = 0; f < 4; ++f) {
            u32 mask = FIELD << 2 * f;
            mma_u8_s8(c[f], w.x & mask, w.y & mask, w.z & mask, w.w & mask, b0[f], b1[f]);
        }
        if (++col == a.col_tiles) {
            flush();
            col = 0;
            is_begin = true;
            ++row;
            if (row % a.segment_tiles == 0 && at + 1 < last) {
                ++segment;
                input = input_of();
                ask_for_q_sums();
            }
        }
    }
    if (has_part && col != 0) flush();
}
