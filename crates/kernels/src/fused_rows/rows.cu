// What lies between the products of a block, one block of threads a row (token): dequantise the sums of the last
// product, residual, norms, gates, quantise for the next product.
//
// A thread holds up to PER times four values of a row in registers, those at 4 (threadIdx.x + i * blockDim.x). All that a
// pass reads is asked for before any of it is used, and weights before the kernel waits for the one before it: a row
// is a chain of waits for memory, and nothing else. Shared memory serves the sums, which have an order. For the widest
// rows there are not enough registers, and what is read is asked for where it is used.

constexpr u32 THREADS = 512;       // of a row, at most
constexpr u32 GLU_THREADS = 1024;  // of the gated unit's where PER is 8: no other row is so wide
constexpr u32 LINE_THREADS = 256;  // of kernels that take no row as a whole
constexpr u32 BEST_THREADS = 1024;

// Quantises RMSNorm(row; weight_j, 1e-6) of one or several layers into row m of q, with scales and sums.
template <u32 LAYERS, u32 PER>
__device__ __forceinline__ void quantize_row(const float4 (&row)[PER], u32 fours,
                                             const Held<float4, PER> (&weights)[LAYERS], const Quantized& q, u32 m) {
    __shared__ QuantizerMemory<LAYERS> memory;
    float scale[LAYERS];
    store_quantized(row, fours, weights, q, m, memory, scale);
    memory.finish(q, m, scale);
}

// Sums of a product, [M][stride], and what turns them into floats.
struct Sums {
    int* values;
    const float* scales;  // s, [M]
    float gamma;
    u32 stride;
    u32 clear;            // leave zeros, for a product that adds
};

// The sums from a column on, as floats; zeros are left where they are asked for.
template <u32 PER>
struct HeldSums {
    Held<int4, PER> held;
    int4* zeros;
    float factor;

    __device__ __forceinline__ void ask(const Sums& sums, u32 m, u32 column, u32 fours) {
        int4* at = (int4*)(sums.values + (size_t)m * sums.stride + column);
        held.ask(at, fours);
        zeros = sums.clear ? at : nullptr;
        factor = sums.gamma / sums.scales[m];
    }
    __device__ __forceinline__ float4 take(u32 i, u32 k) {
        int4 sum = held.get(i, k);
        if (zeros) zeros[k] = make_int4(0, 0, 0, 0);
        return dequantize(sum, factor);
    }
};

struct ResidualArgs {
    float* x;             // residual stream [M][D]
    const u32* rows;      // row of x for each row of the result, or null for the same
    Sums sums;            // what is added to x; values may be null
    const float* norm;    // [D]
    const float* weights[3];
    float eps;
    u32 width;
    Quantized q;
    u32 count;            // M
};

// x += sums; quantises BitLinear inputs of RMSNorm(x; norm, eps).
template <u32 LAYERS, u32 PER>
__device__ __forceinline__ void residual_rows(const ResidualArgs& a) {
    let_next_begin();
    __shared__ float scalar;
    u32 m = blockIdx.x, fours = a.width / 4;
    Held<float4, PER> norm, weights[LAYERS];
    norm.ask(a.norm, fours);
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) weights[j].ask(a.weights[j], fours);
    wait_for_previous();
    u32 from = a.rows ? a.rows[m] : m;
    float4* x = (float4*)(a.x + (size_t)from * a.width);
    float4 row[PER];
    each<PER>(fours, [&](u32 i, u32 k) { row[i] = x[k]; });
    if (a.sums.values) {
        HeldSums<PER> sums;
        sums.ask(a.sums, from, 0, fours);
        each<PER>(fours, [&](u32 i, u32 k) {
            row[i] = row[i] + sums.take(i, k);
            x[k] = row[i];
        });
    }
    float r = row_inverse_rms(row, fours, a.eps, &scalar);
    each<PER>(fours, [&](u32 i, u32 k) { row[i] = row[i] * r * norm.get(i, k); });
    quantize_row<LAYERS>(row, fours, weights, a.q, m);
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
    u32 count;            // M
};

// Quantises the BitLinear input of RMSNorm(g; norm, eps) * silu(h).
template <u32 PER>
__device__ __forceinline__ void gate_rows(const GateArgs& a) {
    let_next_begin();
    __shared__ float scalar;
    u32 m = blockIdx.x, fours = a.width / 4;
    Held<float4, PER> norm, weights[1], h;
    HeldSums<PER> g;
    norm.ask(a.norm, fours);
    weights[0].ask(a.weight, fours);
    wait_for_previous();
    g.ask(a.g, m, a.column, fours);
    h.ask(a.h + (size_t)m * a.width, fours);
    float4 row[PER];
    each<PER>(fours, [&](u32 i, u32 k) { row[i] = g.take(i, k); });
    float r = row_inverse_rms(row, fours, a.eps, &scalar);
    each<PER>(fours, [&](u32 i, u32 k) { row[i] = row[i] * r * norm.get(i, k) * silu(h.get(i, k)); });
    quantize_row<1>(row, fours, weights, a.q, m);
}

struct StepArgs {
    GateArgs gate;          // of the new states, so h is not read
    const float* beta;      // [D]
    float* const* states;   // the layer's state of each row comes `state_offset` floats behind these
    u64 state_offset;
    Sums i, f;
    u32 f_column;           // of f in the sums; i begins them
};

// Sequences of one token each: one step of the recurrence, h = forget * h + input, and then the same.
template <u32 PER>
__device__ __forceinline__ void step_rows(const StepArgs& a) {
    let_next_begin();
    __shared__ float scalar;
    u32 m = blockIdx.x, fours = a.gate.width / 4;
    Held<float4, PER> norm, weights[1], beta;
    HeldSums<PER> i_sums, f_sums, g;
    beta.ask(a.beta, fours);
    wait_for_previous();
    float4* states = (float4*)(a.states[m] + a.state_offset);
    i_sums.ask(a.i, m, 0, fours);
    f_sums.ask(a.f, m, a.f_column, fours);
    g.ask(a.gate.g, m, a.gate.column, fours);
    float4 row[PER], h[PER];
    each<PER>(fours, [&](u32 i, u32 k) { h[i] = states[k]; });
    each<PER>(fours, [&](u32 i, u32 k) {
        float4 b = beta.get(i, k), forget = b + (1.0f - b) * sigmoid(f_sums.take(i, k));
        h[i] = forget * h[i] + silu(i_sums.take(i, k)) * (1.0f - forget);
        states[k] = h[i];
        row[i] = g.take(i, k);
    });
    // Held from here on, for registers; they come while the squares are summed.
    norm.ask(a.gate.norm, fours);
    weights[0].ask(a.gate.weight, fours);
    float r = row_inverse_rms(row, fours, a.gate.eps, &scalar);
    each<PER>(fours, [&](u32 i, u32 k) { row[i] = row[i] * r * norm.get(i, k) * silu(h[i]); });
    quantize_row<1>(row, fours, weights, a.gate.q, m);
}

struct GluArgs {
    Sums ab;              // [M][2F padded]; of a prompt silu(a) * b as floats, [M][F]
    const float* weight;  // [F]
    u32 width;            // F
    Quantized q;
    u32 count;            // M
};

// Quantises the BitLinear input of silu(a) * b.
template <u32 PER>
__device__ __forceinline__ void glu_rows(const GluArgs& a) {
    let_next_begin();
    u32 m = blockIdx.x, fours = a.width / 4;
    Held<float4, PER> weights[1];
    HeldSums<PER> left, right;
    weights[0].ask(a.weight, fours);
    wait_for_previous();
    left.ask(a.ab, m, 0, fours);
    right.ask(a.ab, m, a.width, fours);
    float4 row[PER];
    each<PER>(fours, [&](u32 i, u32 k) { row[i] = silu(left.take(i, k)) * right.take(i, k); });
    quantize_row<1>(row, fours, weights, a.q, m);
}

// Names end with the fours of a thread.
#define ROW_KERNELS(PER)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) residual_1_##PER(const __grid_constant__ ResidualArgs a) { \
        residual_rows<1, PER>(a);                                                                               \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) residual_3_##PER(const __grid_constant__ ResidualArgs a) { \
        residual_rows<3, PER>(a);                                                                               \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) gate_##PER(const __grid_constant__ GateArgs a) {      \
        gate_rows<PER>(a);                                                                                      \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) step_##PER(const __grid_constant__ StepArgs a) {      \
        step_rows<PER>(a);                                                                                      \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(PER == 8 ? GLU_THREADS : THREADS)                     \
        glu_##PER(const __grid_constant__ GluArgs a) {                                                      \
        glu_rows<PER>(a);                                                                                       \
    }

ROW_KERNELS(2)
ROW_KERNELS(4)
ROW_KERNELS(8)

struct LogitArgs {
    Sums sums;
    float* logits;  // [M][width]
    u32 width;
};

extern "C" __global__ void __launch_bounds__(LINE_THREADS) logit_rows(const __grid_constant__ LogitArgs a) {
    let_next_begin();
    wait_for_previous();
    u32 m = blockIdx.y, n = blockIdx.x * LINE_THREADS + threadIdx.x;
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
    u32 type;            // as `embedding_at` says
    u32* passes;         // counts this pass; may be null
};

// x = embeddings[token], widened exactly.
extern "C" __global__ void __launch_bounds__(LINE_THREADS) embed_rows(const __grid_constant__ EmbedArgs a) {
    let_next_begin();
    wait_for_previous();
    if (a.passes && blockIdx.x == 0 && threadIdx.x == 0) ++*a.passes;
    size_t from = (size_t)a.tokens[blockIdx.x] * a.width, to = (size_t)blockIdx.x * a.width;
    for (u32 k = threadIdx.x; k < a.width; k += LINE_THREADS) a.x[to + k] = embedding_at(a.table, a.type, from + k);
}

struct BestArgs {
    const float* logits;  // [M][width]
    u32* tokens;          // [M]
    u32* not_finite;      // set to 1 if a logit is not
    const u32* passes;    // passes so far, this one among them
    u32* history;         // [capacity][M]: the tokens of each pass
    u32 capacity;
    u32 width;
};

// The token of the highest logit, of equals the lowest.
extern "C" __global__ void __launch_bounds__(BEST_THREADS) best_rows(const __grid_constant__ BestArgs a) {
    let_next_begin();
    __shared__ u64 keys[BEST_THREADS / 32];
    wait_for_previous();
    const float* logits = a.logits + (size_t)blockIdx.x * a.width;
    u64 best = 0;
    bool finite = true;
#pragma unroll 4
    for (u32 n = threadIdx.x; n < a.width; n += BEST_THREADS) {
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
        for (u32 w = 1; w < BEST_THREADS / 32; ++w) best = max(best, keys[w]);
        a.tokens[blockIdx.x] = ~(u32)best;
        u32 pass = *a.passes - 1;
        if (pass < a.capacity) a.history[(size_t)pass * gridDim.x + blockIdx.x] = ~(u32)best;
    }
}
