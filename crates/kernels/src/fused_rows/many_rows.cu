// The same for many rows. A block takes ROWS of them, which lie in shared memory and nowhere else: weights are read once for
// all of them, and each row's sum of squares, which has an order, has a warp of its own. Launches do not overlap: a product's
// block takes all shared memory of a multiprocessor, from rows that have not begun.

constexpr u32 MANY_THREADS = 256;  // of a block, at most

// Which rows a block takes.
template <u32 ROWS>
struct ManyRows {
    u32 first, fours, count;  // `count`: rows in all

    __device__ __forceinline__ ManyRows(u32 width, u32 count) : first(blockIdx.x * ROWS), fours(width / 4), count(count) {}
    __device__ __forceinline__ bool has(u32 r) const { return first + r < count; }
    // Rows beyond the last one repeat it; nothing is stored for them.
    __device__ __forceinline__ u32 number(u32 r) const { return min(first + r, count - 1); }
    __device__ __forceinline__ float4& at(u32 r, u32 k) const { return row_memory[r * fours + k]; }
    // f(k) for the thread's fours of each row.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        for (u32 k = threadIdx.x; k < fours; k += blockDim.x) f(k);
    }
    // 1 / sqrt(mean(x^2) + eps) of each row. Synchronises before and after.
    __device__ __forceinline__ void inverse_rms(float eps, float (&shared)[ROWS], float (&result)[ROWS]) const {
        __syncthreads();
        for (u32 r = threadIdx.x / 32; r < ROWS; r += blockDim.x / 32) {
            float inverse = warp_inverse_rms((const float*)&at(r, 0), 4 * fours, eps);
            if (threadIdx.x % 32 == 0) shared[r] = inverse;
        }
        __syncthreads();
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) result[r] = shared[r];
    }
};

// A product's sums in rows of given numbers, from a column on. They are read once: no place in the first cache.
template <u32 ROWS>
struct ManySums {
    int4* from[ROWS];
    float factor[ROWS];
    bool clear;

    template <class Number>
    __device__ __forceinline__ ManySums(const Sums& sums, u32 column, Number number) : clear(sums.clear) {
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            from[r] = (int4*)(sums.values + (size_t)number(r) * sums.stride + column);
            factor[r] = sums.gamma / sums.scales[number(r)];
        }
    }
    __device__ __forceinline__ int4 ask(u32 r, u32 k) const { return __ldcg(from[r] + k); }
    __device__ __forceinline__ float4 as_floats(u32 r, u32 k, int4 sum) const {
        if (clear) from[r][k] = make_int4(0, 0, 0, 0);
        return dequantize(sum, factor[r]);
    }
};

// As `store_quantized`.
template <u32 LAYERS, u32 ROWS>
__device__ __forceinline__ void quantize_rows(const ManyRows<ROWS>& rows, const float4* const (&weights)[LAYERS],
                                              const Quantized& q) {
    __shared__ QuantizerMemory<LAYERS> memory[ROWS];
    __shared__ float shared[ROWS];
    float r_of[ROWS];
    rows.inverse_rms(1e-6f, shared, r_of);
    float largest[ROWS][LAYERS] = {};
    rows.each([&](u32 k) {
        float4 w[LAYERS];
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) w[j] = weights[j][k];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            float4 v = rows.at(r, k) * r_of[r];
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j) largest[r][j] = largest_of(largest[r][j], v * w[j]);
        }
    });
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r)
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) memory[r].offer(j, largest[r][j]);
    __syncthreads();
    float scale[ROWS][LAYERS];
    int sum[ROWS][LAYERS] = {};
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r)
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) scale[r][j] = memory[r].scale(j);
    // A thread's words are whole tiles apart, at the same place of each: blocks are whole warps, a warp's words a tile.
    u32* to[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) to[r] = word_of(q, 0, rows.number(r), threadIdx.x);
    u32 step = q.tile_tokens != 0 ? blockDim.x * q.tile_tokens : blockDim.x;
    size_t next_layer = (size_t)q.rows * q.stride / 4;
    u32 k = threadIdx.x;
    for (; k < rows.fours; k += blockDim.x) {
        float4 w[LAYERS];
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) w[j] = weights[j][k];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            float4 v = rows.at(r, k) * r_of[r];
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j) {
                u32 word = quantize_word(v * w[j] * scale[r][j], sum[r][j]);
                if (rows.has(r)) to[r][j * next_layer] = word;
            }
            to[r] += step;
        }
    }
    // Up to a whole tile of weights.
    for (; k < q.stride / 4; k += blockDim.x)
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j)
                if (rows.has(r)) to[r][j * next_layer] = 0;
            to[r] += step;
        }
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r)
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) memory[r].add(j, sum[r][j]);
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) memory[r].finish(q, rows.first + r, scale[r], rows.has(r));
}

template <u32 LAYERS, u32 ROWS>
__device__ __forceinline__ void residual_of_many(const ResidualArgs& a) {
    __shared__ float shared[ROWS];
    ManyRows<ROWS> rows(a.width, a.count);
    auto number = [&](u32 r) { return a.rows ? a.rows[rows.number(r)] : rows.number(r); };
    float4* x[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) x[r] = (float4*)(a.x + (size_t)number(r) * a.width);
    if (a.sums.values) {
        ManySums<ROWS> sums(a.sums, 0, number);
        rows.each([&](u32 k) {
            float4 old[ROWS];
            int4 sum[ROWS];
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                old[r] = __ldcg(x[r] + k);
                sum[r] = sums.ask(r, k);
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                float4 now = rows.at(r, k) = old[r] + sums.as_floats(r, k, sum[r]);
                if (rows.has(r)) x[r][k] = now;
            }
        });
    } else {
        rows.each([&](u32 k) {
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) rows.at(r, k) = __ldcg(x[r] + k);
        });
    }
    float r_of[ROWS];
    rows.inverse_rms(a.eps, shared, r_of);
    const float4* norm = (const float4*)a.norm;
    rows.each([&](u32 k) {
        float4 w = norm[k];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) rows.at(r, k) = rows.at(r, k) * r_of[r] * w;
    });
    const float4* weights[LAYERS];
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) weights[j] = (const float4*)a.weights[j];
    quantize_rows<LAYERS>(rows, weights, a.q);
}

template <u32 ROWS>
__device__ __forceinline__ void gate_of_many(const GateArgs& a) {
    __shared__ float shared[ROWS];
    ManyRows<ROWS> rows(a.width, a.count);
    auto number = [&](u32 r) { return rows.number(r); };
    ManySums<ROWS> g(a.g, a.column, number);
    rows.each([&](u32 k) {
        int4 sum[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) sum[r] = g.ask(r, k);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) rows.at(r, k) = g.as_floats(r, k, sum[r]);
    });
    float r_of[ROWS];
    rows.inverse_rms(a.eps, shared, r_of);
    const float4 *norm = (const float4*)a.norm, *h[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) h[r] = (const float4*)(a.h + (size_t)number(r) * a.width);
    rows.each([&](u32 k) {
        float4 w = norm[k], state[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) state[r] = __ldcg(h[r] + k);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) rows.at(r, k) = rows.at(r, k) * r_of[r] * w * silu(state[r]);
    });
    const float4* weights[] = {(const float4*)a.weight};
    quantize_rows<1>(rows, weights, a.q);
}

// Of a gated unit: its product has left silu(a) * b.
template <u32 ROWS>
__device__ __forceinline__ void gated_of_many(const GluArgs& a) {
    ManyRows<ROWS> rows(a.width, a.count);
    rows.each([&](u32 k) {
        float4 gated[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r)
            gated[r] = __ldcg((const float4*)(a.ab.values + (size_t)rows.number(r) * a.ab.stride) + k);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) rows.at(r, k) = gated[r];
    });
    const float4* weights[] = {(const float4*)a.weight};
    quantize_rows<1>(rows, weights, a.q);
}

// Names end with the rows of a block.
#define MANY_ROW_KERNELS(ROWS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) residual_1_many_##ROWS(const __grid_constant__ ResidualArgs a) { \
        residual_of_many<1, ROWS>(a);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) residual_3_many_##ROWS(const __grid_constant__ ResidualArgs a) { \
        residual_of_many<3, ROWS>(a);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) gate_many_##ROWS(const __grid_constant__ GateArgs a) { \
        gate_of_many<ROWS>(a);                                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MANY_THREADS, 4) gated_many_##ROWS(const __grid_constant__ GluArgs a) { \
        gated_of_many<ROWS>(a);                                                                                          \
    }

MANY_ROW_KERNELS(1)
MANY_ROW_KERNELS(2)
