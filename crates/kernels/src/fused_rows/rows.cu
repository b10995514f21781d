// What lies between the products of a block, one block of threads a row (token): dequantise the sums of the last
// product, residual, norms, gates, quantise for the next product.

constexpr u32 THREADS = 256;

extern __shared__ float4 row_memory[];

struct Quantized {
    i8* values;       // natural: [layers][M][stride]; tiled: [layers][token tile][stride / 128][8][256][16]
    float* scales;    // [layers][M]
    int* sums;        // [layers][M]
    u32 rows;         // M, padded to whole token tiles where tiled
    u32 stride;       // K padded to whole weight tiles
    u32 tiled;        // for the warpgroup product
};

// Where word `n` (four activations) of a row lies.
__device__ __forceinline__ u32* word_of(const Quantized& q, u32 layer, u32 row, u32 n) {
    size_t base = (size_t)layer * q.rows * q.stride;
    if (!q.tiled) return (u32*)(q.values + base + (size_t)row * q.stride) + n;
    // Natural word 8 t + 4 half + f of a tile is word t of chunk 2 f + half.
    u32 tile = n / 32, t = n / 8 % 4, half = n / 4 % 2, f = n % 4;
    size_t block = ((size_t)(row / 256) * (q.stride / 128) + tile) * (256 * 128);
    return (u32*)(q.values + base + block + ((2 * f + half) * 256 + row % 256) * 16) + t;
}

// Quantises a row's BitLinear inputs into row m of q.
template <u32 LAYERS>
__device__ void store_quantized(const float* row, u32 n, const float* const (&weights)[LAYERS], const Quantized& q,
                                u32 m) {
    __shared__ float scalar;
    __shared__ u32 parts[LAYERS * THREADS / 32];
    __shared__ int totals[LAYERS];
    float scale[LAYERS];
    norm_quantize<THREADS>(row, n, q.stride, weights, &scalar, parts, scale, totals,
                           [&](u32 layer, u32 k, u32 word) { *word_of(q, layer, m, k) = word; });
    if (threadIdx.x == 0) {
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) {
            q.scales[j * q.rows + m] = scale[j];
            q.sums[j * q.rows + m] = totals[j];
        }
    }
}

// Sums of a product, [M][stride], and what turns them into floats.
struct Sums {
    int* values;
    const float* scales;  // s, [M]
    float gamma;
    u32 stride;
    u32 clear;            // leave zeros, for a product that adds
};

// Four sums from column 4 k on, as floats.
__device__ __forceinline__ float4 take(const Sums& sums, u32 m, u32 column, u32 k, float factor) {
    int4* at = (int4*)(sums.values + (size_t)m * sums.stride + column) + k;
    int4 sum = *at;
    if (sums.clear) *at = make_int4(0, 0, 0, 0);
    return dequantize(sum, factor);
}

struct ResidualArgs {
    float* x;             // residual stream [M][D]
    const u32* rows;      // row of x for each row of the result, or null for the same
    Sums sums;            // what is added to x; values may be null
    const float* norm;    // [D]
    const float* weights[3];
    float eps;
    u32 width;
    Quantized q;
};

// x += sums; quantises BitLinear inputs of RMSNorm(x; norm, eps).
template <u32 LAYERS>
__device__ void residual_rows(const ResidualArgs& a) {
    __shared__ float scalar;
    float* row = (float*)row_memory;
    u32 m = blockIdx.x;
    u32 from = a.rows ? a.rows[m] : m;
    float4* x = (float4*)(a.x + (size_t)from * a.width);
    float factor = a.sums.values ? a.sums.gamma / a.sums.scales[from] : 0.0f;
    for (u32 k = threadIdx.x; k < a.width / 4; k += THREADS) {
        float4 value = x[k];
        if (a.sums.values) {
            value = value + take(a.sums, from, 0, k, factor);
            x[k] = value;
        }
        row_memory[k] = value;
    }
    float r = inverse_rms(row, a.width, a.eps, &scalar);
    for (u32 k = threadIdx.x; k < a.width / 4; k += THREADS)
        row_memory[k] = row_memory[k] * r * ((const float4*)a.norm)[k];
    const float* weights[LAYERS];
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) weights[j] = a.weights[j];
    store_quantized<LAYERS>(row, a.width, weights, a.q, m);
}

extern "C" __global__ void __launch_bounds__(THREADS) residual_rows_1(const __grid_constant__ ResidualArgs a) {
    residual_rows<1>(a);
}

extern "C" __global__ void __launch_bounds__(THREADS) residual_rows_3(const __grid_constant__ ResidualArgs a) {
    residual_rows<3>(a);
}

struct GateArgs {
    Sums g;
    const float* h;       // [M][D]
    const float* norm;    // [D]
    const float* weight;  // [D]
    float eps;
    u32 width;
    u32 column;           // of g in the sums
    Quantized q;
};

// Quantises the BitLinear input of RMSNorm(g; norm, eps) * silu(h).
extern "C" __global__ void __launch_bounds__(THREADS) gate_rows(const __grid_constant__ GateArgs a) {
    __shared__ float scalar;
    float* row = (float*)row_memory;
    u32 m = blockIdx.x;
    float factor = a.g.gamma / a.g.scales[m];
    for (u32 k = threadIdx.x; k < a.width / 4; k += THREADS) row_memory[k] = take(a.g, m, a.column, k, factor);
    float r = inverse_rms(row, a.width, a.eps, &scalar);
    const float4* h = (const float4*)(a.h + (size_t)m * a.width);
    for (u32 k = threadIdx.x; k < a.width / 4; k += THREADS)
        row_memory[k] = row_memory[k] * r * ((const float4*)a.norm)[k] * silu(h[k]);
    const float* weights[1] = {a.weight};
    store_quantized<1>(row, a.width, weights, a.q, m);
}

struct GluArgs {
    Sums ab;              // [M][2F padded]
    const float* weight;  // [F]
    u32 width;            // F
    Quantized q;
};

// Quantises the BitLinear input of silu(a) * b.
extern "C" __global__ void __launch_bounds__(THREADS) glu_rows(const __grid_constant__ GluArgs a) {
    u32 m = blockIdx.x;
    float factor = a.ab.gamma / a.ab.scales[m];
    for (u32 k = threadIdx.x; k < a.width / 4; k += THREADS) {
        float4 left = take(a.ab, m, 0, k, factor);
        row_memory[k] = silu(left) * take(a.ab, m, a.width, k, factor);
    }
    const float* weights[1] = {a.weight};
    store_quantized<1>((float*)row_memory, a.width, weights, a.q, m);
}

struct LogitArgs {
    Sums sums;
    float* logits;  // [M][width]
    u32 width;
};

extern "C" __global__ void __launch_bounds__(THREADS) logit_rows(const __grid_constant__ LogitArgs a) {
    u32 m = blockIdx.y, n = blockIdx.x * THREADS + threadIdx.x;
    if (n >= a.width) return;
    int* at = a.sums.values + (size_t)m * a.sums.stride + n;
    a.logits[(size_t)m * a.width + n] = dequantize(*at, a.sums.gamma / a.sums.scales[m]);
    if (a.sums.clear) *at = 0;
}

struct EmbedArgs {
    const void* table;   // [V][D], little-endian
    const u32* tokens;   // [M]
    float* x;            // [M][D]
    u32 width;
    u32 type;            // 0: f32, 1: f16, 2: bf16
};

// x = embeddings[token], widened exactly.
extern "C" __global__ void __launch_bounds__(THREADS) embed_rows(const __grid_constant__ EmbedArgs a) {
    size_t from = (size_t)a.tokens[blockIdx.x] * a.width, to = (size_t)blockIdx.x * a.width;
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) {
        float value;
        if (a.type == 0) value = ((const float*)a.table)[from + k];
        else if (a.type == 1) value = f16_to_f32(((const unsigned short*)a.table)[from + k]);
        else value = __uint_as_float((u32)((const unsigned short*)a.table)[from + k] << 16);
        a.x[to + k] = value;
    }
}

struct BestArgs {
    const float* logits;  // [M][width]
    u32* tokens;          // [M]
    u32* not_finite;      // set to 1 if a logit is not
    u32 width;
};

// The token of the highest logit, of equals the lowest.
extern "C" __global__ void __launch_bounds__(THREADS) best_rows(const __grid_constant__ BestArgs a) {
    __shared__ u64 keys[THREADS / 32];
    const float* logits = a.logits + (size_t)blockIdx.x * a.width;
    u64 best = 0;
    bool finite = true;
    for (u32 n = threadIdx.x; n < a.width; n += THREADS) {
        float logit = logits[n];
        finite = finite && is_finite(logit);
        best = max(best, logit_key(logit, n));
    }
    if (!finite) *a.not_finite = 1;
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, width));
    if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < THREADS / 32; ++w) best = max(best, keys[w]);
        a.tokens[blockIdx.x] = ~(u32)best;
    }
}
