// Products of integers on Hopper's warpgroup instructions: y[m, n] = sum_k q[m, k] t[n, k], exact, then rounded to bf16 or as
// f32 (below 2^24 exact, too).
//
// A block computes 128 rows by 256 columns, two warpgroups 64 rows each; a ninth warp fetches tiles of 128 bytes of k for
// them. Two blocks of a cluster have neighbouring rows and the same columns: each fetches half of the tile of t for both.

struct alignas(64) TensorMap {
    u64 words[16];
};

struct IntegerProductArgs {
    TensorMap q;  // [M][K]
    TensorMap t;  // [N][K]
    void* y;      // [M][N]
    u32 m, n, k;
};

#if __CUDA_ARCH__ >= 900
constexpr u32 BLOCK_ROWS = 128;
constexpr u32 BLOCK_COLUMNS = 256;
constexpr u32 BLOCK_DEPTH = 128;
constexpr u32 PRODUCT_STAGES = 4;
constexpr u32 Q_BYTES = BLOCK_ROWS * BLOCK_DEPTH;
constexpr u32 T_BYTES = BLOCK_COLUMNS * BLOCK_DEPTH;
constexpr u32 STAGE_BYTES = Q_BYTES + T_BYTES;
constexpr u32 CLUSTER = 2;

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// One arrival at the barrier of the same place in a block of the cluster.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 block) {
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, "
        "[remote]; }" ::"r"(barrier),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ void fetch_tile(u32 to, const TensorMap& map, u32 k, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     to),
                 "l"(&map), "r"(k), "r"(row), "r"(barrier)
                 : "memory");
}

// The same for both blocks of the cluster, each at this place and with this barrier of its own.
__device__ __forceinline__ void fetch_tile_for_all(u32 to, const TensorMap& map, u32 k, u32 row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
        "[%4], %5;" ::"r"(to),
        "l"(&map), "r"(k), "r"(row), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1))
        : "memory");
}

// Rows of 128 bytes, eight of them 1024 bytes further, swizzled by 128 bytes.
__device__ __forceinline__ u64 swizzled(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// d = (add ? d : 0) + q (64 x 32) t' (32 x 256).
__device__ __forceinline__ void multiply(int (&d)[128], u64 a, u64 b, u32 add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %130, 0; "
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 " SUM_REGISTERS_128 ", %128, %129, p; }"
        : SUM_OPERANDS_128(d)
        : "l"(a), "l"(b), "r"(add));
}

// Transposes four words of four neighbouring lanes: lane c gets word c of each.
__device__ __forceinline__ void transpose(u32 (&w)[4]) {
    u32 lane = threadIdx.x % 4;
    bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (u32 i = 0; i < 4; i += 2) {
        u32 other = __shfl_xor_sync(ALL_LANES, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = other;
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        u32 other = __shfl_xor_sync(ALL_LANES, high ? w[i] : w[i + 2], 2);
        (high ? w[i] : w[i + 2]) = other;
    }
}

// A thread has, of rows g and g + 8 of its warp, the columns 8 j + 2 c and the next one.
template <bool FULL>
__device__ __forceinline__ void store_block(const IntegerProductArgs& a, const int (&d)[128], u32 row, u32 column) {
    u32 lane = threadIdx.x % 32, c = lane % 4;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        u32 m = row + lane / 4 + half * 8;
        if (FULL) {
            float* y = (float*)a.y + (size_t)m * a.n + column + c * 2;
            int left = m < a.m ? (int)(a.n - column - c * 2) : 0;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                float2 pair = make_float2((float)d[j * 4 + half * 2], (float)d[j * 4 + half * 2 + 1]);
                if (j * 8 < left) *(float2*)(y + j * 8) = pair;
            }
        } else {
            u16* y = (u16*)a.y + (size_t)m * a.n + column + c * 8;
            int left = m < a.m ? (int)(a.n - column - c * 8) : 0;
#pragma unroll
            for (int j = 0; j < 32; j += 4) {
                u32 w[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    w[i] = pack_bf16((float)d[(j + i) * 4 + half * 2], (float)d[(j + i) * 4 + half * 2 + 1]);
                transpose(w);
                if (j * 8 < left) *(uint4*)(y + j * 8) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}

template <bool FULL>
__device__ __forceinline__ void integer_product(const IntegerProductArgs& a) {
    extern __shared__ __align__(1024) u8 unaligned[];
    __shared__ __align__(8) u64 full[PRODUCT_STAGES], empty[PRODUCT_STAGES];
    u32 tiles = (shared_address(unaligned) + 1023) / 1024 * 1024;
    u32 block;  // of the cluster
    asm("mov.u32 %0, %cluster_ctarank;" : "=r"(block));
    u32 warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < PRODUCT_STAGES; ++s) {
            make_barrier(shared_address(full + s), 1);
            make_barrier(shared_address(empty + s), 2 * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();

    u32 columns = (a.n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, depth = (a.k + BLOCK_DEPTH - 1) / BLOCK_DEPTH;
    u32 pairs = (a.m + CLUSTER * BLOCK_ROWS - 1) / (CLUSTER * BLOCK_ROWS) * columns;
    u32 step = 0;  // tiles of k so far
    if (warp == 8) {
        if (threadIdx.x % 32 == 0) {
            for (u32 pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
                u32 row = (pair / columns * CLUSTER + block) * BLOCK_ROWS;
                u32 column = pair % columns * BLOCK_COLUMNS + block * (BLOCK_COLUMNS / CLUSTER);
                for (u32 k = 0; k < depth; ++k, ++step) {
                    u32 stage = step % PRODUCT_STAGES, barrier = shared_address(full + stage);
                    if (step >= PRODUCT_STAGES)
                        wait_for(shared_address(empty + stage), (step / PRODUCT_STAGES - 1) % 2);
                    expect_bytes(barrier, STAGE_BYTES);
                    u32 to = tiles + stage * STAGE_BYTES;
                    fetch_tile(to, a.q, k * BLOCK_DEPTH, row, barrier);
                    fetch_tile_for_all(to + Q_BYTES + block * (T_BYTES / CLUSTER), a.t, k * BLOCK_DEPTH, column, barrier);
                }
            }
        }
    } else {
        u32 group = warp / 4;
        for (u32 pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
            int d[128];
            for (u32 k = 0; k < depth; ++k, ++step) {
                u32 stage = step % PRODUCT_STAGES;
                wait_for(shared_address(full + stage), step / PRODUCT_STAGES % 2);
                u32 q = tiles + stage * STAGE_BYTES + group * (Q_BYTES / 2);
                u32 t = tiles + stage * STAGE_BYTES + Q_BYTES;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (u32 part = 0; part < BLOCK_DEPTH / 32; ++part)
                    multiply(d, swizzled(q + part * 32), swizzled(t + part * 32), k + part > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                // The tile before is free when only this one is still being multiplied.
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (k > 0 && threadIdx.x % 128 < CLUSTER)
                    arrive_at(shared_address(empty + (step - 1) % PRODUCT_STAGES), threadIdx.x % 128);
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (threadIdx.x % 128 < CLUSTER)
                arrive_at(shared_address(empty + (step - 1) % PRODUCT_STAGES), threadIdx.x % 128);
            u32 row = (pair / columns * CLUSTER + block) * BLOCK_ROWS + warp * 16;
            store_block<FULL>(a, d, row, pair % columns * BLOCK_COLUMNS);
        }
    }
    // The other block may still fetch into this one's memory.
    __syncwarp();
    cluster_sync();
}
#endif

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 1)
    integer_product_half(const __grid_constant__ IntegerProductArgs a) {
#if __CUDA_ARCH__ >= 900
    integer_product<false>(a);
#endif
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 1)
    integer_product_full(const __grid_constant__ IntegerProductArgs a) {
#if __CUDA_ARCH__ >= 900
    integer_product<true>(a);
#endif
}
