// One row (token) in the registers and the shared memory of a block: norms and quantiser.

constexpr u32 MOST_HELD = 4;  // fours of a vector that a thread can hold
template <u32 PER>
constexpr bool FITS_REGISTERS = PER <= MOST_HELD;
extern __shared__ __align__(128) float4 row_memory[];

struct Quantized {
    i8* values;       // [layers][M][stride], or tiled: [layers][token tile][stride / 128][8][tile tokens][16]; for prompts see below
    float* scales;    // [layers][M]
    int* sums;        // [layers][M]
    u32 rows;         // M, padded to whole token tiles where tiled
    u32 stride;       // K padded to whole weight tiles
    u32 tile_tokens;  // for a warpgroup product; 0: not tiled
};

// Tokens of a prompt's tile. The 128 bytes of each lie together, their chunks swizzled: [tile tokens][8][16].
constexpr u32 PROMPT_TOKENS = 128;

// Where word `n` (four activations) of a row lies.
__device__ __forceinline__ u32* word_of(const Quantized& q, u32 layer, u32 row, u32 n) {
    size_t base = (size_t)layer * q.rows * q.stride;
    if (q.tile_tokens == 0) return (u32*)(q.values + base + (size_t)row * q.stride) + n;
    // Natural word 8 t + 4 half + f of a tile is word t of chunk 2 f + half.
    u32 tile = n / 32, t = n / 8 % 4, chunk = n % 4 * 2 + n / 4 % 2, token = row % q.tile_tokens;
    size_t block = ((size_t)(row / q.tile_tokens) * (q.stride / 128) + tile) * (q.tile_tokens * 128);
    u32 place = q.tile_tokens == PROMPT_TOKENS ? token * 128 + (chunk ^ token % 8) * 16 : (chunk * q.tile_tokens + token) * 16;
    return (u32*)(q.values + base + block + place) + t;
}

// Quantises four values, already scaled, and adds the integers to a sum. As `quantize`: a NaN becomes -127.
__device__ __forceinline__ u32 quantize_word(float4 y, int& sum) {
    auto bits = [](float y) { return __float_as_uint(fminf(fmaxf(y, -127.0f), 127.0f) + 12582912.0f); };
    u32 low = __byte_perm(bits(y.x), bits(y.y), 0x0040), high = __byte_perm(bits(y.z), bits(y.w), 0x0040);
    u32 word = __byte_perm(low, high, 0x5410);
    sum = __dp4a((int)word, 0x01010101, sum);
    return word;
}

// The largest of values that are not negative; a NaN is none.
__device__ __forceinline__ float largest_of(float largest, float4 v) {
    return fmaxf(fmaxf(fmaxf(fmaxf(largest, fabsf(v.x)), fabsf(v.y)), fabsf(v.z)), fabsf(v.w));
}

// f(i, k) for each of the thread's fours, the number k among those of the row.
template <u32 PER, class F>
__device__ __forceinline__ void each(u32 fours, F f) {
#pragma unroll
    for (u32 i = 0; i < PER; ++i) {
        u32 k = threadIdx.x + i * blockDim.x;
        if (k < fours) f(i, k);
    }
}

// Values in device memory that a thread asks for early.
template <class T, u32 PER>
struct Held {
    T at[FITS_REGISTERS<PER> ? PER : 1] = {};  // else a loop around a row would keep what the last one left
    const T* from;

    __device__ __forceinline__ void ask(const void* memory, u32 fours) {
        from = (const T*)memory;
        if constexpr (FITS_REGISTERS<PER>) each<PER>(fours, [&](u32 i, u32 k) { at[i] = from[k]; });
    }
    __device__ __forceinline__ T get(u32 i, u32 k) const {
        if constexpr (FITS_REGISTERS<PER>) return at[i];
        return from[k];
    }
};

// 1 / sqrt(mean(x^2) + eps) of the row that the threads hold.
template <u32 PER>
__device__ __forceinline__ float row_inverse_rms(const float4 (&row)[PER], u32 fours, float eps, float* scalar) {
    each<PER>(fours, [&](u32 i, u32 k) { row_memory[k] = row[i]; });
    __syncthreads();
    if (threadIdx.x < 32) {
        float r = warp_inverse_rms((const float*)row_memory, 4 * fours, eps);
        if (threadIdx.x == 0) *scalar = r;
    }
    __syncthreads();
    return *scalar;
}

// What the threads of a row share while they quantise it for several layers.
template <u32 LAYERS>
struct QuantizerMemory {
    float scalar;
    u32 parts[LAYERS][32];
    int totals[LAYERS];

    // Takes the largest value that a thread has seen; before `scale`, with a barrier in between.
    __device__ __forceinline__ void offer(u32 layer, float largest) {
        // The bits of floats that are not negative are in their order.
        u32 part = __reduce_max_sync(ALL_LANES, __float_as_uint(largest));
        if (threadIdx.x % 32 == 0) parts[layer][threadIdx.x / 32] = part;
        if (threadIdx.x == 0) totals[layer] = 0;
    }
    __device__ __forceinline__ float scale(u32 layer) const {
        u32 lane = threadIdx.x % 32;
        return quantizer_scale(
            __uint_as_float(__reduce_max_sync(ALL_LANES, lane < blockDim.x / 32 ? parts[layer][lane] : 0)));
    }
    // Takes the sum of the integers that a thread has stored.
    __device__ __forceinline__ void add(u32 layer, int sum) {
        sum = __reduce_add_sync(ALL_LANES, sum);
        if (threadIdx.x % 32 == 0) atomicAdd(&totals[layer], sum);
    }
    // All that belongs to the row beside its integers.
    __device__ __forceinline__ void finish(const Quantized& q, u32 m, const float (&scale)[LAYERS], bool is_row = true) {
        __syncthreads();
        if (threadIdx.x == 0 && is_row) {
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j) {
                q.scales[j * q.rows + m] = scale[j];
                q.sums[j * q.rows + m] = totals[j];
            }
        }
    }
};

// Quantises RMSNorm(row; weight_j, 1e-6) of one or several layers into row m of q. Sums of the integers are in `memory` behind
// the next barrier.
template <u32 LAYERS, u32 PER>
__device__ __forceinline__ void store_quantized(const float4 (&row)[PER], u32 fours,
                                                const Held<float4, PER> (&weights)[LAYERS], const Quantized& q, u32 m,
                                                QuantizerMemory<LAYERS>& memory, float (&scale)[LAYERS]) {
    float r = row_inverse_rms(row, fours, 1e-6f, &memory.scalar);
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        float largest = 0.0f;
        each<PER>(fours, [&](u32 i, u32 k) { largest = largest_of(largest, row[i] * r * weights[j].get(i, k)); });
        memory.offer(j, largest);
    }
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        scale[j] = memory.scale(j);
        int sum = 0;
        each<PER>(fours, [&](u32 i, u32 k) {
            *word_of(q, j, m, k) = quantize_word(row[i] * r * weights[j].get(i, k) * scale[j], sum);
        });
        for (u32 k = fours + threadIdx.x; k < q.stride / 4; k += blockDim.x) *word_of(q, j, m, k) = 0;
        memory.add(j, sum);
    }
}
