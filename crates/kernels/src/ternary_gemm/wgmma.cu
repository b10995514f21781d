// Products of batches on Hopper's warpgroup instructions: y[m, n] += sum_k q[m, k] t[n, k], exact. A block computes 128 rows
// by 64 tokens over its part of K, and adds.
//
// Trits are the first operand, unpacked into registers (see common.cuh); activations are the second, in shared memory,
// where the quantiser has laid them out so that one bulk copy brings a tile as the instruction wants it: eight
// chunks of 16 inputs, each [tokens][16 bytes]. Two warpgroups of 64 rows take turns on the tensor cores.

#if __CUDA_ARCH__ >= 900
// A warpgroup instruction's operand in shared memory: core matrices of 8 rows or tokens by 16 bytes, 128 bytes apart, a chunk
// of 16 inputs has LENGTH rows or tokens.
template <u32 LENGTH>
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(LENGTH * 16 >> 4) << 16 | (u64)(128 >> 4) << 32;
}

// A tile's codes as registers of the first operand.
__device__ __forceinline__ void unpack(uint4 w, u32 (&codes)[4][4]) {
#pragma unroll
    for (u32 f = 0; f < 4; ++f) {
        codes[f][0] = w.x >> 2 * f & FIELD;
        codes[f][1] = w.y >> 2 * f & FIELD;
        codes[f][2] = w.z >> 2 * f & FIELD;
        codes[f][3] = w.w >> 2 * f & FIELD;
    }
}

// d += codes (64 x 32) * activations (32 x 64).
__device__ __forceinline__ void wgmma(int (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

constexpr u32 BATCH_TOKENS = 64;
constexpr u32 BATCH_TILE_BYTES = BATCH_TOKENS * TILE_COLS;
constexpr u32 BATCH_ROW_TILES = 8;
constexpr u32 BATCH_TILES = 8;               // column tiles of a block, at most
constexpr u32 STAGED = 16 * BATCH_ROW_TILES + 4;  // from token to token where sums are staged; in no bank twice

// Weights are on their way before the kernel before this one has ended. Everything fits into shared memory, so there is no
// ring. Sums go out by bulk additions, 512 bytes at a time.
__device__ __forceinline__ void batch_product(const Args& a) {
    let_next_begin();
    extern __shared__ __align__(128) u8 tiles[];  // q [tile][BATCH_TILE_BYTES], weights [row tile][tile][512]; then sums
    __shared__ u64 weights_full, full[BATCH_TILES];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 begin = (u32)((u64)a.col_tiles * blockIdx.z / a.splits);
    u32 count = (u32)((u64)a.col_tiles * (blockIdx.z + 1) / a.splits) - begin;
    u32 first_tile = blockIdx.x * BATCH_ROW_TILES, row_tiles = min(BATCH_ROW_TILES, a.row_tiles - first_tile);
    u32 segment = first_tile / a.segment_tiles;
    u8* weights = tiles + count * BATCH_TILE_BYTES;
    if (threadIdx.x == 0) {
        make_barrier(shared_address(&weights_full), 1);
        for (u32 i = 0; i < count; ++i) make_barrier(shared_address(full + i), 1);
        fence_barriers();
        expect_bytes(shared_address(&weights_full), row_tiles * count * 512);
        for (u32 r = 0; r < row_tiles; ++r)
            bulk_copy(weights + r * count * 512, a.weights + ((size_t)(first_tile + r) * a.col_tiles + begin) * 32,
                  count * 512, shared_address(&weights_full));
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x == 0) {
        const i8* q = a.q + (size_t)segment * a.rows * a.col_tiles * TILE_COLS +
                      ((size_t)blockIdx.y * a.col_tiles + begin) * BATCH_TILE_BYTES;
        for (u32 i = 0; i < count; ++i) {
            expect_bytes(shared_address(full + i), BATCH_TILE_BYTES);
            bulk_copy(tiles + i * BATCH_TILE_BYTES, q + (size_t)i * BATCH_TILE_BYTES, BATCH_TILE_BYTES,
                  shared_address(full + i));
        }
    }
    int d[32];
#pragma unroll
    for (u32 i = 0; i < 32; ++i) d[i] = 0;
    wait_for(shared_address(&weights_full), 0);
    for (u32 i = 0; i < count; ++i) {
        // Rows beyond the last tile multiply what happens to lie there; they are dropped.
        u32 codes[4][4];
        unpack(((const uint4*)(weights + (warp * count + i) * 512))[lane], codes);
        wait_for(shared_address(full + i), 0);
        u32 address = shared_address(tiles + i * BATCH_TILE_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 f = 0; f < 4; ++f)
            wgmma(d, codes[f][0], codes[f][1], codes[f][2], codes[f][3],
                  descriptor<BATCH_TOKENS>(address + 2 * f * BATCH_TOKENS * 16));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    __syncthreads();
    int* staged = (int*)tiles + warp * TILE_ROWS + g;
    u32 first_token = blockIdx.y * BATCH_TOKENS;
#pragma unroll
    for (u32 i = 0; i < 32; i += 4) {
#pragma unroll
        for (u32 side = 0; side < 2; ++side) {
            u32 token = 2 * i + 2 * t + side;
            int sum = begin == 0 && first_token + token < a.m ? a.q_sums[segment * a.rows + first_token + token] : 0;
            staged[token * STAGED] = d[i + side] - sum;
            staged[token * STAGED + 8] = d[i + 2 + side] - sum;
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    u32 m = first_token + threadIdx.x;
    if (threadIdx.x < BATCH_TOKENS && m < a.m) {
        int* out = a.out + ((size_t)m * a.row_tiles + first_tile) * TILE_ROWS;
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(out),
                     "r"(shared_address((int*)tiles + threadIdx.x * STAGED)), "r"(row_tiles * TILE_ROWS * 4)
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
#endif

extern "C" __global__ void __launch_bounds__(256, 2) wgmma_128x64(const __grid_constant__ Args a) {
#if __CUDA_ARCH__ >= 900
    batch_product(a);
#endif
}
