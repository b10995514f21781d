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

// Many tokens: a warp walks through a tile of steps in shared memory, where all others have left the gates, and leaves the
// states there; meanwhile these compute the gates of the next tile into the other half, four channels of a step a thread.
// What a thread reads was asked for a tile ahead.
constexpr u32 GROUP = 8;   // steps that the walker reads at once, ahead

struct GateSums {
    int4 i, f;
    float scale_i, scale_f;
};

// The gates of a tile, then in place of the inputs its states; a channel's steps one behind the other.
template <u32 CHANNELS, u32 STEPS>
struct ScanTile {
    // Four steps more: walkers of eight channels meet in no bank.
    float forgets[CHANNELS][STEPS + 4], inputs[CHANNELS][STEPS + 4];
};

// Whole groups of steps, from `h` on.
template <u32 CHANNELS, u32 STEPS>
__device__ __forceinline__ float walk(ScanTile<CHANNELS, STEPS>& tile, u32 channel, u32 steps, float h) {
    const float4* forgets = (const float4*)tile.forgets[channel];
    float4* inputs = (float4*)tile.inputs[channel];
    float4 forget[GROUP / 4], input[GROUP / 4];
#pragma unroll
    for (u32 s = 0; s < GROUP / 4; ++s) {
        forget[s] = forgets[s];
        input[s] = inputs[s];
    }
    u32 whole = steps / GROUP;
    for (u32 group = 0; group < whole; ++group) {
        // The last group is read again instead of one beyond it: no branch keeps the loads behind the sums.
        u32 next = min(group + 1, STEPS / GROUP - 1) * (GROUP / 4);
        float4 next_forget[GROUP / 4], next_input[GROUP / 4];
#pragma unroll
        for (u32 s = 0; s < GROUP / 4; ++s) {
            next_forget[s] = forgets[next + s];
            next_input[s] = inputs[next + s];
        }
#pragma unroll
        for (u32 s = 0; s < GROUP / 4; ++s) {
            float4 state;
            h = state.x = forget[s].x * h + input[s].x;
            h = state.y = forget[s].y * h + input[s].y;
            h = state.z = forget[s].z * h + input[s].z;
            h = state.w = forget[s].w * h + input[s].w;
            inputs[group * (GROUP / 4) + s] = state;
        }
#pragma unroll
        for (u32 s = 0; s < GROUP / 4; ++s) {
            forget[s] = next_forget[s];
            input[s] = next_input[s];
        }
    }
    for (u32 s = whole * GROUP; s < steps; ++s) h = tile.inputs[channel][s] = tile.forgets[channel][s] * h + tile.inputs[channel][s];
    return h;
}

// Every fourth warp shares the walker's scheduler. APART: none of these computes gates.
template <u32 CHANNELS, u32 GATES, bool APART>
__device__ __forceinline__ void scan(const Args& a) {
    constexpr u32 FOURS = CHANNELS / 4, STEPS = GATES / FOURS;
    __shared__ __align__(16) ScanTile<CHANNELS, STEPS> halves[2];
    u32 sequence = blockIdx.y, base = blockIdx.x * CHANNELS;
    wait_for_previous();
    u32 first = a.first_rows[sequence], count = a.first_rows[sequence + 1] - first;
    u32 tiles = (count + STEPS - 1) / STEPS;
    u32 warp = threadIdx.x / 32;
    if (APART && warp > 0 && warp % 4 == 0) {
        for (u32 tile = 0; tile < tiles + 2; ++tile) __syncthreads();
        let_next_begin();
        return;
    }
    if (warp == 0) {
        u32 lane = threadIdx.x;
        bool walks = lane < CHANNELS && base + lane < a.width;
        float* state = a.states[sequence] + a.state_offset + base + lane;
        float h = walks ? *state : 0.0f;
        for (u32 tile = 0; tile < tiles + 2; ++tile) {
            if (walks && tile > 0 && tile <= tiles)
                h = walk(halves[(tile - 1) % 2], lane, min(STEPS, count - (tile - 1) * STEPS), h);
            __syncthreads();
        }
        if (walks) *state = h;
        let_next_begin();
        return;
    }
    u32 gate = threadIdx.x - 32 * (1 + (APART ? warp / 4 : 0)), step = gate / FOURS, four = gate % FOURS, channel = base + 4 * four;
    auto has = [&](u32 tile) { return channel < a.width && tile * STEPS + step < count; };
    GateSums next;
    auto ask = [&](u32 tile) {
        if (!has(tile)) return;
        u32 m = first + tile * STEPS + step;
        int4* sums = (int4*)(a.sums + (size_t)m * a.stride + channel);
        next.i = *sums;
        next.f = sums[a.f_offset / 4];
        next.scale_i = a.scales[m];
        next.scale_f = a.scales[a.rows + m];
        if (a.clear) *sums = sums[a.f_offset / 4] = make_int4(0, 0, 0, 0);
    };
    float4 beta = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (has(0)) beta = *(const float4*)(a.beta + channel);
    ask(0);
    for (u32 tile = 0; tile < tiles + 2; ++tile) {
        auto &forgets = halves[tile % 2].forgets, &inputs = halves[tile % 2].inputs;
        if (tile >= 2 && has(tile - 2))
            *(float4*)(a.h + (size_t)(first + (tile - 2) * STEPS + step) * a.width + channel) =
                make_float4(inputs[4 * four][step], inputs[4 * four + 1][step], inputs[4 * four + 2][step],
                            inputs[4 * four + 3][step]);
        if (has(tile)) {
            float4 i = dequantize(next.i, a.gamma_i / next.scale_i), f = dequantize(next.f, a.gamma_f / next.scale_f);
            ask(tile + 1);
            float4 forget, input;
            recurrence_gates(i, f, beta, forget, input);
            forgets[4 * four][step] = forget.x;
            forgets[4 * four + 1][step] = forget.y;
            forgets[4 * four + 2][step] = forget.z;
            forgets[4 * four + 3][step] = forget.w;
            inputs[4 * four][step] = input.x;
            inputs[4 * four + 1][step] = input.y;
            inputs[4 * four + 2][step] = input.z;
            inputs[4 * four + 3][step] = input.w;
        }
        __syncthreads();
    }
    let_next_begin();
}

// Names: channels of a block and threads for their gates. BLOCKS: that a multiprocessor has room for.
#define SCAN(CHANNELS, GATES, APART, BLOCKS)                                                                           \
    extern "C" __global__ void __launch_bounds__(APART ? GATES / 3 * 4 : GATES + 32, BLOCKS)                           \
        mlgru_scan_##CHANNELS##_##GATES(const __grid_constant__ Args a) {                                              \
        scan<CHANNELS, GATES, APART>(a);                                                                               \
    }

SCAN(8, 384, true, 2)
SCAN(20, 480, true, 1)
SCAN(8, 192, true, 4)
SCAN(16, 256, false, 4)
