// The recurrence, parallel over sequences, channels and chunks of time: each chunk as if its state began at zero, the
// chunks one after the other, each chunk again from the state before it; where none follows, nothing is needed of the first
// pass. One chunk is enough where there are channels
// enough: then everything is read once.
//
//   s = sigmoid(f)    r = beta + (1 - beta) s    h_t = r h_(t-1) + silu(i) (1 - r)
//
// A thread has a channel. Its warp copies the inputs of its 32 channels to a ring of tiles of STEPS steps in shared
// memory, far ahead of the steps that it computes, because few threads must keep many bytes on their way.

constexpr u32 CHANNELS = 128;
constexpr u32 STEPS = 16;
constexpr u32 STAGES = 4;

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
    u32 vectors;             // rows are aligned to 16 bytes
};

struct Place {
    u32 channel, first, end;
    size_t carry, half;  // of this chunk in `carries`, and from the products to the states
    float beta;
    bool inside;         // the channel exists
};

__device__ __forceinline__ Place place_of(const RecurrenceArgs& a, u32 chunk) {
    Place p;
    p.channel = blockIdx.x * CHANNELS + threadIdx.x;
    p.first = chunk * a.chunk_length;
    p.end = min(p.first + a.chunk_length, a.length);
    p.carry = ((size_t)blockIdx.z * a.chunks + chunk) * a.width + p.channel;
    p.half = (size_t)a.sequences * a.chunks * a.width;
    p.inside = p.channel < a.width;
    p.beta = p.inside ? a.beta[p.channel] : 0.0f;
    return p;
}

// A warp's ring of tiles of several tensors, and the factors of i and f. The host knows its size, too.
template <u32 TENSORS>
struct Ring {
    u16 values[STAGES][TENSORS][STEPS][32];
    float factors[STAGES][2][STEPS];
};

// Results take the places of the first OUTPUTS tensors in a tile, and leave it together.
template <u32 TENSORS, u32 OUTPUTS>
__device__ __forceinline__ void store(const Ring<TENSORS>& ring, u32 stage, u16* const (&to)[OUTPUTS],
                                      const RecurrenceArgs& a, u32 channel, int first, int low, int end) {
    u32 lane = threadIdx.x % 32;
    size_t sequence = (size_t)blockIdx.z * a.length;
#pragma unroll
    for (u32 k = 0; k < OUTPUTS; ++k) {
        if (a.vectors) {
#pragma unroll
            for (u32 piece = lane; piece < STEPS * 4; piece += 32) {
                int t = first + (int)(piece / 4);
                u32 at = channel - lane + piece % 4 * 8;
                if (t < low || t >= end || at >= a.width) continue;
                *(uint4*)(to[k] + (sequence + t) * a.width + at) =
                    *(const uint4*)(ring.values[stage][k][piece / 4] + piece % 4 * 8);
            }
        } else if (channel < a.width) {
            for (u32 j = 0; j < STEPS; ++j) {
                int t = first + (int)j;
                if (t >= low && t < end) to[k][(sequence + t) * a.width + channel] = ring.values[stage][k][j][lane];
            }
        }
    }
}

// The tensors that a pass reads, f at GATE; with BEFORE the last one is read one step earlier, zero before the first.
template <u32 TENSORS, u32 GATE, bool BEFORE>
struct Inputs {
    const u16* tensors[TENSORS];
    const float* factors[2];  // of tile rows 0 and 1, or null

    // Begins to copy the tile of the steps first .. first + STEPS. Those outside low .. end become steps that change
    // nothing: zeros, and forget gates that are open.
    __device__ __forceinline__ void fetch(Ring<TENSORS>& ring, u32 stage, const RecurrenceArgs& a, u32 channel, int first,
                                          int low, int end) const {
        constexpr u32 OPEN = 0x7f7f7f7fu;  // two large bf16 values
        u32 lane = threadIdx.x % 32;
        size_t sequence = (size_t)blockIdx.z * a.length;
#pragma unroll
        for (u32 k = 0; k < TENSORS; ++k) {
            int back = BEFORE && k + 1 == TENSORS ? 1 : 0;
            if (a.vectors) {
                // A step's 32 channels are four pieces of 16 bytes.
#pragma unroll
                for (u32 piece = lane; piece < STEPS * 4; piece += 32) {
                    int t = first + (int)(piece / 4);
                    u32 at = channel - lane + piece % 4 * 8;
                    if (at >= a.width) continue;
                    u16* to = ring.values[stage][k][piece / 4] + piece % 4 * 8;
                    u32 fill = k == GATE ? OPEN : 0;
                    if (t >= low && t < end && t >= back)
                        copy_ahead<16>(to, tensors[k] + (sequence + t - back) * a.width + at);
                    else
                        *(uint4*)to = make_uint4(fill, fill, fill, fill);
                }
            } else if (channel < a.width) {
#pragma unroll 4
                for (u32 j = 0; j < STEPS; ++j) {
                    int t = first + (int)j;
                    u16 value = (u16)(k == GATE ? OPEN : 0);
                    if (t >= low && t < end && t >= back) value = tensors[k][(sequence + t - back) * a.width + channel];
                    ring.values[stage][k][j][lane] = value;
                }
            }
        }
        const float* of_row = lane < STEPS ? factors[0] : factors[1];
        int t = first + (int)(lane % STEPS);
        if (of_row) {
            float* to = &ring.factors[stage][lane / STEPS][lane % STEPS];
            if (t >= low && t < end)
                copy_ahead<4>(to, of_row + sequence + t);
            else
                *to = 1.0f;
        }
    }

    // Walks through the tiles of a chunk, forward or backward, and calls compute(ring, stage) for each; it leaves its
    // results in the tile, for the tensors of `to`.
    template <bool REVERSE, u32 OUTPUTS, typename Compute>
    __device__ __forceinline__ void walk(const RecurrenceArgs& a, const Place& p, u16* const (&to)[OUTPUTS],
                                         Compute compute) const {
        static_assert(STEPS == 16, "a warp copies the factors of two tensors at once");
        Ring<TENSORS>& ring = ((Ring<TENSORS>*)memory)[threadIdx.x / 32];
        if (p.channel - threadIdx.x % 32 >= a.width) return;
        for (u32 k = threadIdx.x % 32; k < STAGES * 2 * STEPS; k += 32) (&ring.factors[0][0][0])[k] = 1.0f;
        __syncwarp();
        int low = p.first, end = p.end;
        int tiles = (end - low + (int)STEPS - 1) / (int)STEPS;
        auto first_of = [&](int n) { return REVERSE ? end - (n + 1) * (int)STEPS : low + n * (int)STEPS; };
        for (int n = 0; n < (int)STAGES - 1; ++n) {
            if (n < tiles) fetch(ring, n, a, p.channel, first_of(n), low, end);
            commit_ahead();
        }
        for (int n = 0; n < tiles; ++n) {
            int next = n + STAGES - 1;
            if (next < tiles) fetch(ring, next % STAGES, a, p.channel, first_of(next), low, end);
            commit_ahead();
            wait_ahead<STAGES - 1>();
            __syncwarp();
            compute(ring, n % STAGES);
            __syncwarp();
            if (to[0]) {
                store(ring, n % STAGES, to, a, p.channel, first_of(n), low, end);
                __syncwarp();
            }
        }
    }
};

template <u32 TENSORS>
__device__ __forceinline__ float value_of(const Ring<TENSORS>& ring, u32 stage, u32 tensor, u32 j) {
    return to_f32(ring.values[stage][tensor][j][threadIdx.x % 32]);
}

template <u32 TENSORS>
__device__ __forceinline__ void put(Ring<TENSORS>& ring, u32 stage, u32 tensor, u32 j, float value) {
    ring.values[stage][tensor][j][threadIdx.x % 32] = to_bf16(value);
}

template <bool KEEP>
__device__ __forceinline__ void forward(const RecurrenceArgs& a) {
    Place p = place_of(a, blockIdx.y);
    float product = 1.0f, state = 0.0f;
    if (KEEP && a.chunks > 1 && p.inside) state = a.carries[p.half + p.carry];
    Inputs<2, 1, false> inputs = {{a.i, a.f}, {a.i_factors, a.f_factors}};
    u16* to[1] = {KEEP ? a.h : nullptr};
    inputs.walk<false>(a, p, to, [&](Ring<2>& ring, u32 stage) {
        // What does not wait for the state first, so that its loads and divisions overlap.
        float r[STEPS], input[STEPS];
#pragma unroll
        for (u32 j = 0; j < STEPS; ++j) {
            float i = value_of(ring, stage, 0, j) * ring.factors[stage][0][j];
            float f = value_of(ring, stage, 1, j) * ring.factors[stage][1][j];
            r[j] = p.beta + (1.0f - p.beta) * fast_sigmoid(f);
            input[j] = i * fast_sigmoid(i) * (1.0f - r[j]);
        }
#pragma unroll
        for (u32 j = 0; j < STEPS; ++j) {
            state = r[j] * state + input[j];
            if (!KEEP) product *= r[j];
            if (KEEP) put(ring, stage, 0, j, state);
        }
    });
    if (!KEEP && p.inside) {
        a.carries[p.carry] = product;
        a.carries[p.half + p.carry] = state;
    }
}

extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_chunks(const __grid_constant__ RecurrenceArgs a) {
    forward<false>(a);
}
extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_forward(const __grid_constant__ RecurrenceArgs a) {
    forward<true>(a);
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
        float before = state;
        if (n + 1 < a.chunks) state = a.carries[at] * state + a.carries[half + at];
        a.carries[half + at] = before;
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
    Place p = place_of(a, blockIdx.y + 1);
    float product = 1.0f, carry = 0.0f;
    Inputs<2, 0, false> inputs = {{a.f, a.dh}, {a.f_factors, nullptr}};
    u16* none[1] = {nullptr};
    inputs.walk<true>(a, p, none, [&](Ring<2>& ring, u32 stage) {
        float r[STEPS], dh[STEPS];
#pragma unroll
        for (u32 j = 0; j < STEPS; ++j) {
            float f = value_of(ring, stage, 0, j) * ring.factors[stage][0][j];
            r[j] = p.beta + (1.0f - p.beta) * fast_sigmoid(f);
            dh[j] = value_of(ring, stage, 1, j);
        }
#pragma unroll
        for (u32 j = STEPS; j-- > 0;) {
            carry = r[j] * (dh[j] + carry);
            product *= r[j];
        }
    });
    if (!p.inside) return;
    a.carries[p.carry] = product;
    a.carries[p.half + p.carry] = carry;
}

extern "C" __global__ void __launch_bounds__(CHANNELS) recurrence_backward(const __grid_constant__ RecurrenceArgs a) {
    constexpr u32 PART = 8;  // steps whose inputs are in registers together
    Place p = place_of(a, blockIdx.y);
    float d_beta = 0.0f, carry = a.chunks > 1 && p.inside ? a.carries[p.half + p.carry] : 0.0f;
    u16* to[2] = {a.di, a.df};
    Inputs<4, 1, true> inputs = {{a.i, a.f, a.dh, a.h}, {a.i_factors, a.f_factors}};
    inputs.walk<true>(a, p, to, [&](Ring<4>& ring, u32 stage) {
#pragma unroll
        for (u32 part = STEPS / PART; part-- > 0;) {
            // di = e di_over_e, dr = e dr_over_e.
            float forget[PART], dh[PART], di_over_e[PART], dr_over_e[PART];
#pragma unroll
            for (u32 k = 0; k < PART; ++k) {
                u32 j = part * PART + k;
                float i = value_of(ring, stage, 0, j) * ring.factors[stage][0][j];
                float f = value_of(ring, stage, 1, j) * ring.factors[stage][1][j];
                float gate = fast_sigmoid(i), s = fast_sigmoid(f);
                float r = p.beta + (1.0f - p.beta) * s;
                forget[k] = s;
                dh[k] = value_of(ring, stage, 2, j);
                di_over_e[k] = (1.0f - r) * silu_derivative(i, gate);
                dr_over_e[k] = value_of(ring, stage, 3, j) - i * gate;
            }
#pragma unroll
            for (u32 k = PART; k-- > 0;) {
                u32 j = part * PART + k;
                float s = forget[k], e = dh[k] + carry, dr = e * dr_over_e[k];
                put(ring, stage, 0, j, e * di_over_e[k]);
                put(ring, stage, 1, j, dr * (1.0f - p.beta) * (s * (1.0f - s)));
                d_beta += dr * (1.0f - s);
                carry = e * (p.beta + (1.0f - p.beta) * s);
            }
        }
    });
    if (p.inside) a.partials[p.carry] = d_beta;
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
