// The recurrence over the tokens of each sequence: h = forget * h + input, channel by channel.
//
// Steps are taken one after the other, so that a text gives the same bits however it is cut. A step is two dependent
// operations; the gates, which are most of the work, are computed in parallel ahead of it.

struct Args {
    int* sums;              // sums of the i, f (and g) projections, [M][stride]
    const float* scales;    // s of i, f (and g), [3][rows]
    float* h;               // [M][D]
    const u32* first_rows;  // first row of each sequence, and M
    float* const* states;   // the layer's state of each sequence comes `state_offset` floats behind these
    const float* beta;      // [D]
    u64 state_offset;
    float gamma_i, gamma_f;
    u32 width, stride, f_offset, rows;
    u32 clear;              // leave zeros in the sums, for a product that adds
};

__device__ __forceinline__ void gates(const Args& a, u32 m, u32 channel, float beta, float& forget, float& input) {
    int* i = a.sums + (size_t)m * a.stride + channel;
    int* f = i + a.f_offset;
    recurrence_gates(dequantize(*i, a.gamma_i / a.scales[m]), dequantize(*f, a.gamma_f / a.scales[a.rows + m]), beta,
                     forget, input);
    if (a.clear) *i = *f = 0;
}

// Few tokens a sequence: a thread walks through one channel.
extern "C" __global__ void __launch_bounds__(128) mlgru_step(const __grid_constant__ Args a) {
    let_next_begin();
    wait_for_previous();
    u32 channel = blockIdx.x * 128 + threadIdx.x, sequence = blockIdx.y;
    if (channel >= a.width) return;
    float* state = a.states[sequence] + a.state_offset + channel;
    float h = *state, beta = a.beta[channel];
    for (u32 m = a.first_rows[sequence]; m < a.first_rows[sequence + 1]; ++m) {
        float forget, input;
        gates(a, m, channel, beta, forget, input);
        h = forget * h + input;
        a.h[(size_t)m * a.width + channel] = h;
    }
    *state = h;
}

// Many tokens: one warp walks, seven compute the gates of the next steps into the other half of a buffer.
constexpr u32 STEPS = 64;

template <u32 CHANNELS>
__device__ void scan(const Args& a) {
    let_next_begin();
    wait_for_previous();
    __shared__ float forgets[2][STEPS][CHANNELS], inputs[2][STEPS][CHANNELS];
    u32 sequence = blockIdx.y, base = blockIdx.x * CHANNELS;
    u32 first = a.first_rows[sequence], count = a.first_rows[sequence + 1] - first;
    u32 tiles = (count + STEPS - 1) / STEPS;
    u32 lane = threadIdx.x, walker = base + lane;
    bool walks = lane < CHANNELS && walker < a.width;
    float* state = a.states[sequence] + a.state_offset + walker;
    float h = walks ? *state : 0.0f;
    for (u32 tile = 0; tile <= tiles; ++tile) {
        if (threadIdx.x >= 32 && tile < tiles) {
            for (u32 at = threadIdx.x - 32; at < STEPS * CHANNELS; at += 224) {
                u32 step = at / CHANNELS, channel = at % CHANNELS, m = tile * STEPS + step;
                if (m < count && base + channel < a.width)
                    gates(a, first + m, base + channel, a.beta[base + channel], forgets[tile % 2][step][channel],
                          inputs[tile % 2][step][channel]);
            }
        } else if (walks && tile > 0) {
            u32 begin = (tile - 1) * STEPS, steps = min(STEPS, count - begin);
            float* out = a.h + (size_t)(first + begin) * a.width + walker;
#pragma unroll 8
            for (u32 step = 0; step < steps; ++step) {
                h = forgets[(tile - 1) % 2][step][lane] * h + inputs[(tile - 1) % 2][step][lane];
                out[(size_t)step * a.width] = h;
            }
        }
        __syncthreads();
    }
    if (walks) *state = h;
}

extern "C" __global__ void __launch_bounds__(256) mlgru_scan_8(const __grid_constant__ Args a) { scan<8>(a); }

extern "C" __global__ void __launch_bounds__(256) mlgru_scan_32(const __grid_constant__ Args a) { scan<32>(a); }
