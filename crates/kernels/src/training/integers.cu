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

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    u32 done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
}

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
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7,  "
        "%8, %9, %10, %11, %12, %13, %14, %15,  "
        "%16, %17, %18, %19, %20, %21, %22, %23,  "
        "%24, %25, %26, %27, %28, %29, %30, %31,  "
        "%32, %33, %34, %35, %36, %37, %38, %39,  "
        "%40, %41, %42, %43, %44, %45, %46, %47,  "
        "%48, %49, %50, %51, %52, %53, %54, %55,  "
        "%56, %57, %58, %59, %60, %61, %62, %63,  "
        "%64, %65, %66, %67, %68, %69, %70, %71,  "
        "%72, %73, %74, %75, %76, %77, %78, %79,  "
        "%80, %81, %82, %83, %84, %85, %86, %87,  "
        "%88, %89, %90, %91, %92, %93, %94, %95,  "
        "%96, %97, %98, %99, %100, %101, %102, %103,  "
        "%104, %105, %106, %107, %108, %109, %110, %111,  "
        "%112, %113, %114, %115, %116, %117, %118, %119,  "
        "%120, %121, %122, %123, %124, %125, %126, %127},  "
        "%128, %129, p; }"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
          "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
          "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
          "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
          "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63]),
          "+r"(d[64]), "+r"(d[65]), "+r"(d[66]), "+r"(d[67]), "+r"(d[68]), "+r"(d[69]), "+r"(d[70]), "+r"(d[71]),
          "+r"(d[72]), "+r"(d[73]), "+r"(d[74]), "+r"(d[75]), "+r"(d[76]), "+r"(d[77]), "+r"(d[78]), "+r"(d[79]),
          "+r"(d[80]), "+r"(d[81]), "+r"(d[82]), "+r"(d[83]), "+r"(d[84]), "+r"(d[85]), "+r"(d[86]), "+r"(d[87]),
          "+r"(d[88]), "+r"(d[89]), "+r"(d[90]), "+r"(d[91]), "+r"(d[92]), "+r"(d[93]), "+r"(d[94]), "+r"(d[95]),
          "+r"(d[96]), "+r"(d[97]), "+r"(d[98]), "+r"(d[99]), "+r"(d[100]), "+r"(d[101]), "+r"(d[102]), "+r"(d[103]),
          "+r"(d[104]), "+r"(d[105]), "+r"(d[106]), "+r"(d[107]), "+r"(d[108]), "+r"(d[109]), "+r"(d[110]), "+r"(d[111]),
          "+r"(d[112]), "+r"(d[113]), "+r"(d[114]), "+r"(d[115]), "+r"(d[116]), "+r"(d[117]), "+r"(d[118]), "+r"(d[119]),
          "+r"(d[120]), "+r"(d[121]), "+r"(d[122]), "+r"(d[123]), "+r"(d[124]), "+r"(d[125]), "+r"(d[126]), "+r"(d[127])
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
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + s)) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(empty + s)), "r"(2 * CLUSTER)
                         : "memory");
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
                    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES)
                                 : "memory");
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
