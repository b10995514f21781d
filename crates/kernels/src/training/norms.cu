// Norms and the 8-bit quantiser before a product, and their gradients behind it. A block works on a row (token).

struct QuantizeArgs {
    const u16* x;              // [M][K]; of a gated linear unit a and b, [M][2K]; of a norm gate g
    const u16* h;              // [M][K], of a norm gate
    const float* x_factors;    // [M] or null, of gates
    const float* outer;        // weight of the norm before the projections, or of a norm gate, or null
    const float* inner[3];     // weights of the norms inside the BitLinear layers
    const float* gamma[3];     // scale of each layer's trits
    u16* q[3];                 // [M][K]: integers, or with `divide` integers over their scale
    float* factors[3];         // [M]: gamma / s
    u32 rows, width;
    float eps;
    u32 divide;
    u32 bytes;                 // integers of a byte each in place of bf16
};

// q_j = Q8(RMSNorm(RMSNorm(x; outer); inner_j)).
template <u32 LAYERS>
__device__ __forceinline__ void norm_quantize_rows(const QuantizeArgs& a) {
    __shared__ float scalar;
    __shared__ u32 parts[LAYERS * WARPS];
    float* row = memory;
    u32 m = blockIdx.x, n = a.width;
    const u16* x = a.x + (size_t)m * n;
    for (u32 k = threadIdx.x; k < n; k += THREADS) row[k] = to_f32(x[k]);
    if (a.outer) {
        float r = inverse_rms(row, n, a.eps, &scalar);
        for (u32 k = threadIdx.x; k < n; k += THREADS) row[k] = row[k] * r * a.outer[k];
    }
    float r = inverse_rms(row, n, 1e-6f, &scalar);
    float largest[LAYERS];
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) largest[j] = 0.0f;
    for (u32 k = threadIdx.x; k < n; k += THREADS) {
        float y = row[k] * r;
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) largest[j] = larger(largest[j], fabsf(y * a.inner[j][k]));
    }
    block_max<THREADS>(largest, parts);
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        float scale = quantizer_scale(largest[j]);
        float step = a.divide ? 1.0f / scale : 1.0f;
        u16* q = a.q[j] + (size_t)m * n;
        for (u32 k = threadIdx.x; k < n; k += THREADS) {
            int integer = quantize(row[k] * r * a.inner[j][k] * scale);
            if (a.bytes)
                ((i8*)a.q[j])[(size_t)m * n + k] = (i8)integer;
            else
                q[k] = to_bf16((float)integer * step);
        }
        if (threadIdx.x == 0 && !a.divide) a.factors[j][m] = *a.gamma[j] / scale;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_quantize_1(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_rows<1>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_quantize_2(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_rows<2>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_quantize_3(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_rows<3>(a);
}

struct NormArgs {
    const u16* x;         // [M][K]
    const float* weight;  // [K]
    u16* y;               // [M][K]
    u32 rows, width;
    float eps;
};

// y = RMSNorm(x; weight).
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(const __grid_constant__ NormArgs a) {
    __shared__ float scalar;
    float* row = memory;
    size_t at = (size_t)blockIdx.x * a.width;
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) row[k] = to_f32(a.x[at + k]);
    float r = inverse_rms(row, a.width, a.eps, &scalar);
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) a.y[at + k] = to_bf16(row[k] * r * a.weight[k]);
}

struct NormBackwardArgs {
    const u16* x;              // as in QuantizeArgs
    const u16* h;
    const float* x_factors;
    const float* outer;
    const float* inner[3];
    const float* gamma[3];
    const u16* dn[3];          // [M][K]: gradients of the products' inputs, over gamma; without BitLinear that of RMSNorm(x)
    float* dx;                 // [M][K] f32, or null
    u16* dx_half;              // the gradient of x in bf16, shaped as x
    u16* dh;                   // [M][K], of a norm gate
    float* partials;           // [blocks][layers + (outer ? 1 : 0)][K]: sums for the norms' weights
    u32 rows, width;
    float eps;
    u32 add;                   // add to dx, or set it
};

// Gradients of RMSNorm(RMSNorm(x; outer); inner_j), the quantiser passed unchanged:
//   u = x r1 w,  n_j = u r2 w_j,  v = sum_j dn_j w_j
//   dw_j = sum_m dn_j u r2,  du = r2 (v - u r2 mean(v u r2)),  dw = sum_m du x r1,  dx = r1 (du w - x r1 mean(du w x r1))
template <u32 LAYERS>
__device__ __forceinline__ void norm_backward_rows(const NormBackwardArgs& a) {
    __shared__ float scalar;
    __shared__ float parts[WARPS];
    u32 n = a.width, sums = LAYERS + (a.outer ? 1 : 0);
    float *row = memory, *v = memory + n, *total = memory + 2 * n;
    for (u32 k = threadIdx.x; k < sums * n; k += THREADS) total[k] = 0.0f;
    __syncthreads();  // `total` is cleared by other threads than those that add
    u32 first = (u32)((u64)a.rows * blockIdx.x / gridDim.x), end = (u32)((u64)a.rows * (blockIdx.x + 1) / gridDim.x);
    for (u32 m = first; m < end; ++m) {
        size_t at = (size_t)m * n;
        for (u32 k = threadIdx.x; k < n; k += THREADS) row[k] = to_f32(a.x[at + k]);
        float r1 = 1.0f, r2 = 1.0f;
        if (a.outer) {
            r1 = inverse_rms(row, n, a.eps, &scalar);
            for (u32 k = threadIdx.x; k < n; k += THREADS) row[k] = row[k] * r1 * a.outer[k];
        }
        if (LAYERS) r2 = inverse_rms(row, n, 1e-6f, &scalar);
        float dot = 0.0f;
        for (u32 k = threadIdx.x; k < n; k += THREADS) {
            if (LAYERS == 0) {
                v[k] = to_f32(a.dn[0][at + k]);
            } else {
                float u = row[k] * r2, sum = 0.0f;
#pragma unroll
                for (u32 j = 0; j < LAYERS; ++j) {
                    float d = to_f32(a.dn[j][at + k]) * *a.gamma[j];
                    total[j * n + k] += d * u;
                    sum += d * a.inner[j][k];
                }
                v[k] = sum;
                dot += sum * u;
            }
        }
        float mean = LAYERS > 0 ? block_sum(dot, parts) / (float)n : 0.0f;
        dot = 0.0f;
        for (u32 k = threadIdx.x; k < n; k += THREADS) {
            float du = LAYERS > 0 ? r2 * (v[k] - row[k] * r2 * mean) : v[k];
            if (a.outer) {
                float x = to_f32(a.x[at + k]) * r1;
                total[LAYERS * n + k] += du * x;
                du *= a.outer[k];
                dot += du * x;
            }
            v[k] = du;
        }
        mean = a.outer ? block_sum(dot, parts) / (float)n : 0.0f;
        for (u32 k = threadIdx.x; k < n; k += THREADS) {
            float dx = a.outer ? r1 * (v[k] - to_f32(a.x[at + k]) * r1 * mean) : v[k];
            if (a.add) dx += a.dx[at + k];
            if (a.dx) a.dx[at + k] = dx;
            a.dx_half[at + k] = to_bf16(dx);
        }
        // The next row's norm is summed by one warp: it must not meet this row.
        __syncthreads();
    }
    float* out = a.partials + (size_t)blockIdx.x * sums * n;
    for (u32 k = threadIdx.x; k < sums * n; k += THREADS) out[k] = total[k];
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_0(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_rows<0>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_1(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_rows<1>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_2(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_rows<2>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_3(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_rows<3>(a);
}

struct ReduceArgs {
    const float* partials;  // [blocks][sums][K]
    float* out[4];          // [K] each
    u32 blocks, sums, width;
};

// out_j[k] += sum of the partial sums, eight in parallel, each in order.
extern "C" __global__ void __launch_bounds__(THREADS) reduce_columns(const __grid_constant__ ReduceArgs a) {
    __shared__ float parts[8][33];
    u32 lane = threadIdx.x % 32, part = threadIdx.x / 32;
    u32 column = blockIdx.x * 32 + lane, columns = a.sums * a.width;
    float sum = 0.0f;
    if (column < columns)
        for (u32 b = part; b < a.blocks; b += 8) sum += a.partials[(size_t)b * columns + column];
    parts[part][lane] = sum;
    __syncthreads();
    if (part == 0 && column < columns) {
        for (u32 p = 1; p < 8; ++p) sum += parts[p][lane];
        a.out[column / a.width][column % a.width] += sum;
    }
}
