// The recurrence, parallel over sequences, channels and chunks of time: each chunk as if its state began at zero, the
// chunks one after the other, each chunk again from the state before it.
//
//   s = sigmoid(f)    r = beta + (1 - beta) s    h_t = r h_(t-1) + silu(i) (1 - r)

constexpr u32 CHANNELS = 128;
constexpr u32 AHEAD = 8;  // steps whose inputs are loaded together

struct RecurrenceArgs {
    const u16* i;            // [B][T][D]
    const u16* f;
    const float* i_factors;  // [B T] or null
    const float* f_factors;
    const float* beta;       // [D]
    u16* h;                  // [B][T][D]; read by the backward pass
    const u16* dh;           // backward from here
    u16* di;
    u16* df;
    float* carries;          // [2][B][chunks][D]: product of the forget gates and end state of each chunk, then its first state
    float* partials;         // [B chunks][D]: sums for beta
    u32 sequences, length, width, chunks, chunk_length;
};

struct Place {
    u32 channel, first, end;
    size_t carry, half;  // of this chunk in `carries`, and from the products to the states
    float beta;
};

__device__ __forceinline__ Place place_of(const RecurrenceArgs& a) {
    Place p;
    p.channel = blockIdx.x * CHANNELS + threadIdx.x;
    p.first = blockIdx.y * a.chunk_length;
    p.end = min(p.first + a.chunk_length, a.length);
    p.carry = ((size_t)blockIdx.z * a.chunks + blockIdx.y) * a.width + p.channel;
    p.half = (size_t)a.sequences * a.chunks * a.width;
    p.beta = p.channel < a.width ? a.beta[p.channel] : 0.0f;
    return p;
}

template <bool KEEP>
__device__ __forceinline__ void walk(const RecurrenceArgs& a) {
    Place p = place_of(a);
    if (p.channel >= a.width) return;
    float product = 1.0f, state = 0.0f;
    if (KEEP && a.chunks > 1) state = a.carries[p.half + p.carry];
    for (u32 t0 = p.first; t0 < p.end; t0 += AHEAD) {
        float i[AHEAD], f[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            u32 row = blockIdx.z * a.length + min(t0 + j, p.end - 1);
            size_t at = (size_t)row * a.width + p.channel;
            i[j] = to_f32(a.i[at]) * factor_of(a.i_factors, row);
            f[j] = to_f32(a.f[at]) * factor_of(a.f_factors, row);
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            if (t0 + j >= p.end) break;
            float r = p.beta + (1.0f - p.beta) * fast_sigmoid(f[j]);
            state = r * state + i[j] * fast_sigmoid(i[j]) * (1.0f - r);
            product *= r;
            if (KEEP) a.h[((size_t)blockIdx.z * a.length + t0 + j) * a.width + p.channel] = to_bf16(state);
        }
    }
    if (!KEEP) {
        a.carries[p.carry] = product;
        a.carries[p.half + p.carry] = state;
    }
}

extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_chunks(const __grid_constant__ RecurrenceArgs a) {
    walk<false>(a);
}
extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_forward(const __grid_constant__ RecurrenceArgs a) {
    walk<true>(a);
}

// End states of the chunks become the states before them; with `reverse` time runs backward.
__device__ __forceinline__ void join(const RecurrenceArgs& a, bool reverse) {
    u32 channel = blockIdx.x * CHANNELS + threadIdx.x;
    if (channel >= a.width) return;
    size_t half = (size_t)a.sequences * a.chunks * a.width;
    float state = 0.0f;
    for (u32 n = 0; n < a.chunks; ++n) {
        u32 chunk = reverse ? a.chunks - 1 - n : n;
        size_t at = ((size_t)blockIdx.z * a.chunks + chunk) * a.width + channel;
        float product = a.carries[at], end = a.carries[half + at];
        a.carries[half + at] = state;
        state = product * state + end;
    }
}

extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_join(const __grid_constant__ RecurrenceArgs a) {
    join(a, false);
}
extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_join_back(const __grid_constant__ RecurrenceArgs a) {
    join(a, true);
}

// What flows from step t to t - 1 is r (dh + what flows from t + 1).
extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_chunks_back(const __grid_constant__ RecurrenceArgs a) {
    Place p = place_of(a);
    if (p.channel >= a.width) return;
    float product = 1.0f, carry = 0.0f;
    for (u32 done = 0, steps = p.end - p.first; done < steps; done += AHEAD) {
        float f[AHEAD], dh[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            u32 row = blockIdx.z * a.length + p.end - 1 - min(done + j, steps - 1);
            size_t at = (size_t)row * a.width + p.channel;
            f[j] = to_f32(a.f[at]) * factor_of(a.f_factors, row);
            dh[j] = to_f32(a.dh[at]);
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            if (done + j >= steps) break;
            float r = p.beta + (1.0f - p.beta) * fast_sigmoid(f[j]);
            carry = r * (dh[j] + carry);
            product *= r;
        }
    }
    a.carries[p.carry] = product;
    a.carries[p.half + p.carry] = carry;
}

extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_backward(const __grid_constant__ RecurrenceArgs a) {
    Place p = place_of(a);
    if (p.channel >= a.width) return;
    float d_beta = 0.0f, carry = a.chunks > 1 ? a.carries[p.half + p.carry] : 0.0f;
    for (u32 done = 0, steps = p.end - p.first; done < steps; done += AHEAD) {
        float i[AHEAD], f[AHEAD], dh[AHEAD], before[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            u32 t = p.end - 1 - min(done + j, steps - 1);
            u32 row = blockIdx.z * a.length + t;
            size_t at = (size_t)row * a.width + p.channel;
            i[j] = to_f32(a.i[at]) * factor_of(a.i_factors, row);
            f[j] = to_f32(a.f[at]) * factor_of(a.f_factors, row);
            dh[j] = to_f32(a.dh[at]);
            before[j] = t > 0 ? to_f32(a.h[at - a.width]) : 0.0f;
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            if (done + j >= steps) break;
            size_t at = ((size_t)blockIdx.z * a.length + p.end - 1 - (done + j)) * a.width + p.channel;
            float gate = fast_sigmoid(i[j]), s = fast_sigmoid(f[j]);
            float r = p.beta + (1.0f - p.beta) * s;
            float e = dh[j] + carry;
            float dr = e * (before[j] - i[j] * gate);
            a.di[at] = to_bf16(e * (1.0f - r) * silu_derivative(i[j], gate));
            a.df[at] = to_bf16(dr * (1.0f - p.beta) * (s * (1.0f - s)));
            d_beta += dr * (1.0f - s);
            carry = e * r;
        }
    }
    a.partials[p.carry] = d_beta;
}

struct BoundsArgs {
    const float* bounds;   // [L][D]
    float* betas;          // [L][D], forward
    const float* d_betas;  // backward
    float* d_bounds;
    u32 layers, width;
};

// betas = cumsum_layers(softmax_layers(bounds)) - softmax_layers(bounds)[0].
extern "C" __global__ void __launch_bounds__(CHANNELS) lower_bounds(const __grid_constant__ BoundsArgs a) {
    u32 channel = blockIdx.x * CHANNELS + threadIdx.x;
    if (channel >= a.width) return;
    double largest = -1e300, total = 0.0, sum = 0.0;
    for (u32 l = 0; l < a.layers; ++l) largest = max(largest, (double)a.bounds[l * a.width + channel]);
    for (u32 l = 0; l < a.layers; ++l) total += exp((double)a.bounds[l * a.width + channel] - largest);
    for (u32 l = 0; l < a.layers; ++l) {
        if (l > 0) sum += exp((double)a.bounds[l * a.width + channel] - largest) / total;
        a.betas[l * a.width + channel] = (float)sum;
    }
}

// d bounds_k += p_k (G_k - sum_j p_j G_j), G_k = sum of d_betas from layer k on, G_0 = 0.
extern "C" __global__ void __launch_bounds__(CHANNELS) lower_bounds_backward(const __grid_constant__ BoundsArgs a) {
    u32 channel = blockIdx.x * CHANNELS + threadIdx.x;
    if (channel >= a.width) return;
    double largest = -1e300, total = 0.0, mean = 0.0, g = 0.0;
    for (u32 l = 0; l < a.layers; ++l) largest = max(largest, (double)a.bounds[l * a.width + channel]);
    for (u32 l = 0; l < a.layers; ++l) total += exp((double)a.bounds[l * a.width + channel] - largest);
    for (u32 l = a.layers; l-- > 1;) {
        g += (double)a.d_betas[l * a.width + channel];
        mean += exp((double)a.bounds[l * a.width + channel] - largest) / total * g;
    }
    g = 0.0;
    for (u32 l = a.layers; l-- > 0;) {
        double p = exp((double)a.bounds[l * a.width + channel] - largest) / total;
        if (l > 0) g += (double)a.d_betas[l * a.width + channel];
        a.d_bounds[l * a.width + channel] += (float)(p * ((l > 0 ? g : 0.0) - mean));
    }
}
