// Cross-entropy of logits and its gradient. A block works on a row (token).

constexpr u32 LOSS_THREADS = 512;
constexpr u32 IGNORED = 0xffffffffu;

struct LossArgs {
    const float* logits;   // [M][V]
    const float* factors;  // [M] or null
    const u32* targets;    // [M]
    u16* gradient;         // [M][V], or null
    double* losses;        // [M]
    u32* greedy;           // [M]: whether no token is more likely than the target; or null
    u32 vocabulary;
    float scale;
};

extern "C" __global__ void __launch_bounds__(LOSS_THREADS) cross_entropy_rows(const __grid_constant__ LossArgs a) {
    __shared__ float tops[LOSS_THREADS / 32];
    __shared__ float parts[LOSS_THREADS / 32];
    u32 m = blockIdx.x, n = a.vocabulary, target = a.targets[m];
    const float* logits = a.logits + (size_t)m * n;
    u16* gradient = a.gradient ? a.gradient + (size_t)m * n : nullptr;
    if (target == IGNORED) {
        if (threadIdx.x == 0) a.losses[m] = 0.0;
        if (gradient)
            for (u32 k = threadIdx.x; k < n; k += LOSS_THREADS) gradient[k] = 0;
        return;
    }
    float factor = factor_of(a.factors, m);
    // Largest value, and the sum of exponentials over it, kept up to date together.
    float top = -3.0e38f, sum = 0.0f;
#pragma unroll 4
    for (u32 k = threadIdx.x; k < n; k += LOSS_THREADS) {
        float z = logits[k] * factor;
        float higher = fmaxf(top, z);
        sum = sum * __expf(top - higher) + __expf(z - higher);
        top = higher;
    }
    float own = top;
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, width));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (u32 w = 0; w < LOSS_THREADS / 32; ++w) top = fmaxf(top, tops[w]);
    sum = block_sum(sum * __expf(own - top), parts);
    if (threadIdx.x == 0) {
        float z = logits[target] * factor;
        // A NaN among the logits must reach the loss: fmaxf passes over it, the sum does not.
        a.losses[m] = (double)logf(sum) + (double)top - (double)z;
    }
    if (a.greedy) {
        // Of equals, the lowest id counts as the most likely.
        float z = logits[target];
        bool beaten = false;
        for (u32 k = threadIdx.x; k < n; k += LOSS_THREADS) beaten |= k < target ? logits[k] >= z : logits[k] > z;
        bool any = __syncthreads_or(beaten);
        if (threadIdx.x == 0) a.greedy[m] = !any;
    }
    if (!gradient) return;
    float each = a.scale / sum;
#pragma unroll 4
    for (u32 k = threadIdx.x; k < n; k += LOSS_THREADS) {
        float d = __expf(logits[k] * factor - top) * each;
        if (k == target) d -= a.scale;
        gradient[k] = to_bf16(d);
    }
}

// The same with a row in registers: it is read once.
constexpr u32 ROW_THREADS = 1024;
constexpr u32 ROW_VECTORS = 8;  // of four logits, that a thread has of a row

extern "C" __global__ void __launch_bounds__(ROW_THREADS) cross_entropy_vectors(const __grid_constant__ LossArgs a) {
    __shared__ float tops[ROW_THREADS / 32];
    __shared__ float parts[ROW_THREADS / 32];
    u32 m = blockIdx.x, n = a.vocabulary, target = a.targets[m];
    const float* logits = a.logits + (size_t)m * n;
    u16* gradient = a.gradient ? a.gradient + (size_t)m * n : nullptr;
    bool ignored = target == IGNORED;
    float z[ROW_VECTORS][4], factor = factor_of(a.factors, m), top = -3.0e38f, sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < ROW_VECTORS; ++j) {
        u32 k = (j * blockDim.x + threadIdx.x) * 4;
        if (k >= n || ignored) break;
        float4 v = *(const float4*)(logits + k);
        z[j][0] = v.x, z[j][1] = v.y, z[j][2] = v.z, z[j][3] = v.w;
    }
#pragma unroll
    for (u32 j = 0; j < ROW_VECTORS; ++j) {
        if ((j * blockDim.x + threadIdx.x) * 4 >= n || ignored) break;
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            z[j][e] *= factor;
            top = fmaxf(top, z[j][e]);
        }
    }
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, width));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (u32 w = 0; w < blockDim.x / 32; ++w) top = fmaxf(top, tops[w]);
#pragma unroll
    for (u32 j = 0; j < ROW_VECTORS; ++j) {
        if ((j * blockDim.x + threadIdx.x) * 4 >= n || ignored) break;
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            z[j][e] = __expf(z[j][e] - top);
            sum += z[j][e];
        }
    }
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0)
        // A NaN among the logits must reach the loss: fmaxf passes over it, the sum does not.
        a.losses[m] = ignored ? 0.0 : (double)logf(sum) + (double)top - (double)(logits[target] * factor);
    if (!gradient) return;
    float each = ignored ? 0.0f : a.scale / sum;
#pragma unroll
    for (u32 j = 0; j < ROW_VECTORS; ++j) {
        u32 k = (j * blockDim.x + threadIdx.x) * 4;
        if (k >= n) break;
        float d[4];
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            d[e] = ignored ? 0.0f : z[j][e] * each;
            if (k + e == target) d[e] -= a.scale;
        }
        *(uint2*)(gradient + k) = make_uint2(pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]));
    }
}

struct AddLossArgs {
    const double* losses;  // [M]
    double* total;
    u32 rows;
    float scale;
};

// total += scale * sum of the losses.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS) add_losses(const __grid_constant__ AddLossArgs a) {
    __shared__ double parts[LOSS_THREADS / 32];
    double sum = 0.0;
    for (u32 m = threadIdx.x; m < a.rows; m += LOSS_THREADS) sum += a.losses[m];
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) *a.total += (double)a.scale * sum;
}
