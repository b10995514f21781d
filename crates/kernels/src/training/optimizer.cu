// The optimiser, and the weights as products stream them.

__device__ __forceinline__ bool are_vectors(const void* p) { return (u64)p % 16 == 0; }

// Calls four(k) for each four neighbours from k on, where they are vectors, and one(k) for what is left.
template <typename Four, typename One>
__device__ __forceinline__ void for_all(u64 len, bool vectors, Four four, One one) {
    u64 start = (u64)blockIdx.x * THREADS + threadIdx.x, stride = (u64)gridDim.x * THREADS;
    u64 fours = vectors ? len / 4 : 0;
    for (u64 k = start; k < fours; k += stride) four(k * 4);
    for (u64 k = fours * 4 + start; k < len; k += stride) one(k);
}

// Takes a number away: *into = *from, *from = 0.
struct MoveArgs {
    double* from;
    double* into;
};

extern "C" __global__ void move_number(const __grid_constant__ MoveArgs a) {
    *a.into = *a.from;
    *a.from = 0.0;
}

struct ClipArgs {
    double* numbers;  // [norm, factor, losses, squares]
    u64 losses, squares;
    double max_norm;
};

// The norm of gradients from sums of squares, and the factor that clips them: as the CPU computes them, in its order.
// The factor is NaN once a norm or a loss is not finite, from then on.
extern "C" __global__ void __launch_bounds__(THREADS) clip_gradients(const __grid_constant__ ClipArgs a) {
    __shared__ double parts[THREADS];
    const double *losses = a.numbers + 2, *squares = losses + a.losses;
    double sum = 0.0;
    for (u64 first = 0; first < a.squares; first += THREADS) {
        u32 count = (u32)min((u64)THREADS, a.squares - first);
        if (threadIdx.x < count) parts[threadIdx.x] = squares[first + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) {
#pragma unroll 16
            for (u32 k = 0; k < count; ++k) sum += parts[k];
        }
        __syncthreads();
    }
    if (threadIdx.x > 0) return;
    double norm = sqrt(sum), factor = 1.0;
    bool usable = isfinite(norm) && !isnan(a.numbers[1]);
    for (u64 k = 0; k < a.losses; ++k) usable = usable && isfinite(losses[k]);
    if (a.max_norm > 0.0) factor = (double)(float)fmin(a.max_norm / (norm + 1e-6), 1.0);
    a.numbers[0] = norm;
    a.numbers[1] = usable ? factor : nan("");
}

struct AdamWFactors {
    float keep, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size;
};

// As the CPU computes it, operation by operation.
__device__ __forceinline__ void adamw(
    const AdamWFactors& f, float scale, float gradient, float& p, float& m, float& v) {
    float g = gradient * scale;
    m += f.one_minus_beta1 * (g - m);
    v = f.beta2 * v + f.one_minus_beta2 * (g * g);
    float denominator = sqrtf(v) * f.correction2 + f.eps;
    p = p * f.keep - f.step_size * (m / denominator);
}

__device__ __forceinline__ void adamw_four(
    const AdamWFactors& f, float scale, float4 g, float4& p, float4& m, float4& v) {
    adamw(f, scale, g.x, p.x, m.x, v.x);
    adamw(f, scale, g.y, p.y, m.y, v.y);
    adamw(f, scale, g.z, p.z, m.z, v.z);
    adamw(f, scale, g.w, p.w, m.w, v.w);
}

struct AdamWArgs {
    float* p;
    const float* g;
    float* m;
    float* v;
    const double* gradient_scale;  // NaN: nothing is changed
    u64 len;
    AdamWFactors factors;
};

extern "C" __global__ void __launch_bounds__(THREADS) adamw_step(const __grid_constant__ AdamWArgs a) {
    float scale = (float)*a.gradient_scale;
    if (isnan(scale)) return;
    bool vectors = are_vectors(a.p) && are_vectors(a.g) && are_vectors(a.m) && are_vectors(a.v);
    for_all(
        a.len, vectors,
        [&](u64 k) {
            float4 g = *(const float4*)(a.g + k), p = *(float4*)(a.p + k);
            float4 m = *(float4*)(a.m + k), v = *(float4*)(a.v + k);
            adamw_four(a.factors, scale, g, p, m, v);
            *(float4*)(a.p + k) = p;
            *(float4*)(a.m + k) = m;
            *(float4*)(a.v + k) = v;
        },
        [&](u64 k) { adamw(a.factors, scale, a.g[k], a.p[k], a.m[k], a.v[k]); });
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
    auto add = [&](float x) { sum += (double)x * (double)x; };
    u64 fours = are_vectors(a.x + first) ? (end - first) / 4 : 0;
#pragma unroll 4
    for (u64 k = threadIdx.x; k < fours; k += THREADS) {
        float4 x = *(const float4*)(a.x + first + k * 4);
        add(x.x), add(x.y), add(x.z), add(x.w);
    }
    for (u64 k = first + fours * 4 + threadIdx.x; k < end; k += THREADS) add(a.x[k]);
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
    for_all(
        a.len, are_vectors(a.into) && are_vectors(a.from),
        [&](u64 k) {
            float4 from = *(const float4*)(a.from + k), sum = *(float4*)(a.into + k);
            *(float4*)(a.into + k) = make_float4(sum.x + from.x, sum.y + from.y, sum.z + from.z, sum.w + from.w);
        },
        [&](u64 k) { a.into[k] += a.from[k]; });
}

struct WeightArgs {
    const float* weights;
    double* partials;  // [blocks]: sums of |w|
    float* gamma;
    u16* out;
    i8* bytes;         // trits once more
    u64 len;
    u32 blocks;
};

__device__ __forceinline__ double sum_of_four(float4 w) {
    return (double)fabsf(w.x) + (double)fabsf(w.y) + ((double)fabsf(w.z) + (double)fabsf(w.w));
}

// Sums of |w| for gamma.
extern "C" __global__ void __launch_bounds__(THREADS) weight_sums(const __grid_constant__ WeightArgs a) {
    __shared__ double parts[WARPS];
    double sum = 0.0;
    for_all(
        a.len, are_vectors(a.weights), [&](u64 k) { sum += sum_of_four(*(const float4*)(a.weights + k)); },
        [&](u64 k) { sum += (double)fabsf(a.weights[k]); });
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = sum;
}

// max(mean |w|, 1e-5) of sums that other blocks have left. All threads get it.
__device__ __forceinline__ float gamma_of(const double* partials, u32 blocks, u64 len, double* parts) {
    double sum = 0.0;
    for (u32 b = threadIdx.x; b < blocks; b += THREADS) sum += __ldcg(partials + b);
    sum = block_sum(sum, parts);
    return fmaxf((float)(sum / (double)len), 1e-5f);
}

__device__ __forceinline__ int trit(float w, float inverse) {
    float scaled = w * inverse;
    return scaled > 0.5f ? 1 : scaled < -0.5f ? -1 : 0;
}

// A trit as bf16.
__device__ __forceinline__ u32 half_of(int t) { return t == 0 ? 0 : t > 0 ? 0x3f80 : 0xbf80; }

// Four trits as bf16 and as bytes.
__device__ __forceinline__ void store_trits(float4 w, float inverse, uint2* halves, u32* bytes) {
    int t[4] = {trit(w.x, inverse), trit(w.y, inverse), trit(w.z, inverse), trit(w.w, inverse)};
    *halves = make_uint2(half_of(t[0]) | half_of(t[1]) << 16, half_of(t[2]) | half_of(t[3]) << 16);
    *bytes = pack_bytes(t);
}

// gamma and trits as bf16.
extern "C" __global__ void __launch_bounds__(THREADS) weight_trits(const __grid_constant__ WeightArgs a) {
    __shared__ double parts[WARPS];
    float gamma = gamma_of(a.partials, a.blocks, a.len, parts);
    float inverse = 1.0f / gamma;
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.gamma = gamma;
    for_all(
        a.len, are_vectors(a.weights) && are_vectors(a.out) && are_vectors(a.bytes),
        [&](u64 k) {
            store_trits(*(const float4*)(a.weights + k), inverse, (uint2*)(a.out + k), (u32*)(a.bytes + k));
        },
        [&](u64 k) {
            int t = trit(a.weights[k], inverse);
            a.out[k] = (u16)half_of(t);
            a.bytes[k] = (i8)t;
        });
}

__device__ __forceinline__ uint2 halves_of(float4 w) { return make_uint2(pack_bf16(w.x, w.y), pack_bf16(w.z, w.w)); }

// Full-precision weights as bf16.
extern "C" __global__ void __launch_bounds__(THREADS) weight_halves(const __grid_constant__ WeightArgs a) {
    for_all(
        a.len, are_vectors(a.weights) && are_vectors(a.out),
        [&](u64 k) {
            *(uint2*)(a.out + k) = halves_of(*(const float4*)(a.weights + k));
        },
        [&](u64 k) { a.out[k] = to_bf16(a.weights[k]); });
}
