// The optimiser, and the weights as products stream them.

struct AdamWArgs {
    float* p;
    const float* g;
    float* m;
    float* v;
    u64 len;
    float gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size;
};

// As the CPU computes it, operation by operation.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_step(const __grid_constant__ AdamWArgs a) {
    u64 stride = (u64)gridDim.x * THREADS;
    for (u64 k = (u64)blockIdx.x * THREADS + threadIdx.x; k < a.len; k += stride) {
        float g = a.g[k] * a.gradient_scale;
        float m = a.m[k], v = a.v[k];
        m += a.one_minus_beta1 * (g - m);
        v = a.beta2 * v + a.one_minus_beta2 * (g * g);
        float denominator = sqrtf(v) * a.correction2 + a.eps;
        a.p[k] = a.p[k] * a.keep - a.step_size * (m / denominator);
        a.m[k] = m;
        a.v[k] = v;
    }
}

struct SquaresArgs {
    const float* x;
    double* sums;  // one a unit
    u64 len;
    u32 unit;
};

// Sum of squares of each `unit` elements. A block has one unit.
extern "C" __global__ void __launch_bounds__(THREADS) sums_of_squares(const __grid_constant__ SquaresArgs a) {
    __shared__ double parts[WARPS];
    u64 first = (u64)blockIdx.x * a.unit, end = min(first + a.unit, a.len);
    double sum = 0.0;
#pragma unroll 4
    for (u64 k = first + threadIdx.x; k < end; k += THREADS) {
        double x = (double)a.x[k];
        sum += x * x;
    }
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

struct AddArgs {
    const float* from;
    float* into;
    u64 len;
};

// into += from.
extern "C" __global__ void __launch_bounds__(THREADS) add_elements(const __grid_constant__ AddArgs a) {
    u64 stride = (u64)gridDim.x * THREADS;
    for (u64 k = (u64)blockIdx.x * THREADS + threadIdx.x; k < a.len; k += stride) a.into[k] += a.from[k];
}

struct WeightArgs {
    const float* weights;
    double* partials;  // [blocks]: sums of |w|
    float* gamma;
    u16* out;
    u64 len;
    u32 blocks;
};

// Sums of |w| for gamma.
extern "C" __global__ void __launch_bounds__(THREADS) weight_sums(const __grid_constant__ WeightArgs a) {
    __shared__ double parts[WARPS];
    u64 stride = (u64)gridDim.x * THREADS;
    double sum = 0.0;
    for (u64 k = (u64)blockIdx.x * THREADS + threadIdx.x; k < a.len; k += stride) sum += (double)fabsf(a.weights[k]);
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}

// gamma = max(mean |w|, 1e-5) and trits as bf16.
extern "C" __global__ void __launch_bounds__(THREADS) weight_trits(const __grid_constant__ WeightArgs a) {
    __shared__ double parts[WARPS];
    double sum = 0.0;
    for (u32 b = threadIdx.x; b < a.blocks; b += THREADS) sum += a.partials[b];
    sum = block_sum(sum, parts);
    float gamma = fmaxf((float)(sum / (double)a.len), 1e-5f);
    float inverse = 1.0f / gamma;
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.gamma = gamma;
    u64 stride = (u64)gridDim.x * THREADS;
    for (u64 k = (u64)blockIdx.x * THREADS + threadIdx.x; k < a.len; k += stride) {
        float scaled = a.weights[k] * inverse;
        a.out[k] = scaled > 0.5f ? 0x3f80 : scaled < -0.5f ? 0xbf80 : 0;
    }
}

// Full-precision weights as bf16.
extern "C" __global__ void __launch_bounds__(THREADS) weight_halves(const __grid_constant__ WeightArgs a) {
    u64 stride = (u64)gridDim.x * THREADS;
    for (u64 k = (u64)blockIdx.x * THREADS + threadIdx.x; k < a.len; k += stride) a.out[k] = to_bf16(a.weights[k]);
}
