// Gates and what lies on the residual stream. Products of BitLinear layers come as integers [M][N] in bf16 and one factor
// a row; with null factors they are the values themselves.

struct NormGateArgs {
    const u16* g;            // [M][D]
    const float* g_factors;  // [M] or null
    const u16* h;            // [M][D]
    const float* weight;     // [D]
    u16* y;                  // [M][D], forward
    const u16* dy;           // [M][D], backward from here
    u16* dg;
    u16* dh;
    float* partials;         // [blocks][D]
    u32 rows, width;
    float eps;
};

// y = RMSNorm(g; weight) * silu(h). Rows of whole vectors have it in norms_vectors.cu.
extern "C" __global__ void __launch_bounds__(THREADS) norm_gate_forward(const __grid_constant__ NormGateArgs a) {
    __shared__ float scalar;
    float* row = memory;
    size_t at = (size_t)blockIdx.x * a.width;
    float factor = factor_of(a.g_factors, blockIdx.x);
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) row[k] = to_f32(a.g[at + k]) * factor;
    float r = inverse_rms(row, a.width, a.eps, &scalar);
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) {
        float h = to_f32(a.h[at + k]);
        a.y[at + k] = to_bf16(row[k] * r * a.weight[k] * (h * fast_sigmoid(h)));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_gate_backward(const __grid_constant__ NormGateArgs a) {
    __shared__ float scalar;
    __shared__ float parts[WARPS];
    u32 n = a.width;
    float *row = memory, *v = memory + n, *total = memory + 2 * n;
    for (u32 k = threadIdx.x; k < n; k += THREADS) total[k] = 0.0f;
    u32 first = (u32)((u64)a.rows * blockIdx.x / gridDim.x), end = (u32)((u64)a.rows * (blockIdx.x + 1) / gridDim.x);
    for (u32 m = first; m < end; ++m) {
        size_t at = (size_t)m * n;
        float factor = factor_of(a.g_factors, m);
        for (u32 k = threadIdx.x; k < n; k += THREADS) row[k] = to_f32(a.g[at + k]) * factor;
        float r = inverse_rms(row, n, a.eps, &scalar);
        float dot = 0.0f;
        for (u32 k = threadIdx.x; k < n; k += THREADS) {
            float x = row[k] * r, h = to_f32(a.h[at + k]), dy = to_f32(a.dy[at + k]), w = a.weight[k];
            float s = fast_sigmoid(h);
            float dn = dy * (h * s);
            total[k] += dn * x;
            a.dh[at + k] = to_bf16(dy * (x * w) * silu_derivative(h, s));
            v[k] = dn * w;
            dot += dn * w * x;
        }
        float mean = block_sum(dot, parts) / (float)n;
        for (u32 k = threadIdx.x; k < n; k += THREADS) a.dg[at + k] = to_bf16(r * (v[k] - row[k] * r * mean));
        __syncthreads();
    }
    for (u32 k = threadIdx.x; k < n; k += THREADS) a.partials[(size_t)blockIdx.x * n + k] = total[k];
}

struct SwigluArgs {
    const u16* ab;         // [M][2F]
    const float* factors;  // [M] or null
    u16* y;                // [M][F], forward
    const u16* dy;         // [M][F], backward
    u16* d_ab;             // [M][2F]
    u32 rows, width;       // M, F
};

// y = silu(a) * b.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu_forward(const __grid_constant__ SwigluArgs a) {
    u32 m = blockIdx.x, n = a.width;
    const u16 *left = a.ab + (size_t)m * 2 * n, *right = left + n;
    u16* y = a.y + (size_t)m * n;
    float factor = factor_of(a.factors, m);
#pragma unroll 4
    for (u32 k = threadIdx.x; k < n; k += THREADS) {
        float x = to_f32(left[k]) * factor, b = to_f32(right[k]) * factor;
        y[k] = to_bf16(x * fast_sigmoid(x) * b);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) swiglu_backward(const __grid_constant__ SwigluArgs a) {
    u32 m = blockIdx.x, n = a.width;
    const u16 *left = a.ab + (size_t)m * 2 * n, *right = left + n, *dy = a.dy + (size_t)m * n;
    u16 *d_left = a.d_ab + (size_t)m * 2 * n, *d_right = d_left + n;
    float factor = factor_of(a.factors, m);
#pragma unroll 4
    for (u32 k = threadIdx.x; k < n; k += THREADS) {
        float x = to_f32(left[k]) * factor, b = to_f32(right[k]) * factor, d = to_f32(dy[k]);
        float s = fast_sigmoid(x);
        d_left[k] = to_bf16(d * b * silu_derivative(x, s));
        d_right[k] = to_bf16(d * x * s);
    }
}

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    swiglu_forward_vectors(const __grid_constant__ SwigluArgs a) {
    u32 n = a.width;
    const u16 *left = a.ab + (size_t)blockIdx.x * 2 * n, *right = left + n;
    float factor = factor_of(a.factors, blockIdx.x);
    for (u32 k = threadIdx.x * 8; k < n; k += blockDim.x * 8) {
        float x[8], b[8];
        unpack(load_bits(left + k), x);
        unpack(load_bits(right + k), b);
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            x[e] *= factor;
            x[e] = x[e] * fast_sigmoid(x[e]) * (b[e] * factor);
        }
        *(uint4*)(a.y + (size_t)blockIdx.x * n + k) = pack(x);
    }
}

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    swiglu_backward_vectors(const __grid_constant__ SwigluArgs a) {
    u32 n = a.width;
    size_t at = (size_t)blockIdx.x * 2 * n;
    float factor = factor_of(a.factors, blockIdx.x);
    for (u32 k = threadIdx.x * 8; k < n; k += blockDim.x * 8) {
        float x[8], b[8], d[8];
        unpack(load_bits(a.ab + at + k), x);
        unpack(load_bits(a.ab + at + n + k), b);
        unpack(load_bits(a.dy + (size_t)blockIdx.x * n + k), d);
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            x[e] *= factor;
            float s = fast_sigmoid(x[e]);
            b[e] = d[e] * (b[e] * factor) * silu_derivative(x[e], s);
            x[e] = d[e] * x[e] * s;
        }
        *(uint4*)(a.d_ab + at + k) = pack(b);
        *(uint4*)(a.d_ab + at + n + k) = pack(x);
    }
}

struct ResidualArgs {
    const u16* residual;   // [M][N]
    const u16* product;    // [M][N]
    const float* factors;  // [M]
    u16* out;              // [M][N]
    u32 rows, width;
};

// out = residual + product * factor.
extern "C" __global__ void __launch_bounds__(THREADS) add_residual(const __grid_constant__ ResidualArgs a) {
    size_t at = (size_t)blockIdx.x * a.width;
    float factor = a.factors[blockIdx.x];
#pragma unroll 4
    for (u32 k = threadIdx.x; k < a.width; k += THREADS)
        a.out[at + k] = to_bf16(to_f32(a.residual[at + k]) + to_f32(a.product[at + k]) * factor);
}

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    add_residual_vectors(const __grid_constant__ ResidualArgs a) {
    size_t at = (size_t)blockIdx.x * a.width;
    float factor = a.factors[blockIdx.x];
    for (u32 k = threadIdx.x * 8; k < a.width; k += blockDim.x * 8) {
        float x[8], product[8];
        unpack(load_bits(a.residual + at + k), x);
        unpack(load_bits(a.product + at + k), product);
#pragma unroll
        for (u32 e = 0; e < 8; ++e) x[e] += product[e] * factor;
        *(uint4*)(a.out + at + k) = pack(x);
    }
}

struct EmbedArgs {
    const float* table;  // [V][D]
    const u32* tokens;   // [M]
    u16* x;              // [M][D]
    u32 width;
};

// x = table[token].
extern "C" __global__ void __launch_bounds__(THREADS) embed_forward(const __grid_constant__ EmbedArgs a) {
    size_t from = (size_t)a.tokens[blockIdx.x] * a.width, to = (size_t)blockIdx.x * a.width;
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) a.x[to + k] = to_bf16(a.table[from + k]);
}

struct EmbedBackwardArgs {
    const float* dx;         // [M][D]
    const u32* order;        // rows sorted by token, then by row
    const u32* starts;       // where each distinct token's rows begin in `order`, and the end
    const u32* tokens;       // [M]
    float* gradients;        // [V][D]
    u32 distinct, width;
};

// gradients[token] += its rows of dx, in their order. A block has one token.
extern "C" __global__ void __launch_bounds__(THREADS) embed_backward(const __grid_constant__ EmbedBackwardArgs a) {
    u32 start = a.starts[blockIdx.x], end = a.starts[blockIdx.x + 1];
    u32 k = blockIdx.y * THREADS + threadIdx.x;
    if (k >= a.width) return;
    float* gradient = a.gradients + (size_t)a.tokens[a.order[start]] * a.width + k;
    float sum = 0.0f;
    u32 i = start;
    for (; i + 4 <= end; i += 4) {
        float x0 = a.dx[(size_t)a.order[i] * a.width + k], x1 = a.dx[(size_t)a.order[i + 1] * a.width + k];
        float x2 = a.dx[(size_t)a.order[i + 2] * a.width + k], x3 = a.dx[(size_t)a.order[i + 3] * a.width + k];
        sum += x0;
        sum += x1;
        sum += x2;
        sum += x3;
    }
    for (; i < end; ++i) sum += a.dx[(size_t)a.order[i] * a.width + k];
    *gradient += sum;
}
