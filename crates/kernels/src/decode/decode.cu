// One token of one sequence in one launch: a persistent grid of one block an SM that walks through all layers.
//
// A layer has four phases; a phase is a product, whose sums are added to 32-bit accumulators in global memory, and
// before it everything that lies between two products (norms, gates, recurrence, quantiser), which every block does by
// itself for the whole row: rows are short, and a barrier costs more. So there is one barrier of the grid a phase.
//
// Weights do not depend on activations: each warp streams the tiles that it will need into a ring of its own in shared
// memory, through phases and layers, whatever the barriers do.
//
// An accumulator is cleared two phases after it was read, that is after the next barrier and before the one that lets
// anybody add to it again.

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 TILE_BYTES = 512;
constexpr u32 CHUNK_TILES = 2;
constexpr u32 CHUNK_BYTES = CHUNK_TILES * TILE_BYTES;

enum Phase : u32 { MIX, OUT, GLU, DOWN, HEAD, PHASES };

struct Args {
    const uint4* weights;        // tiles: [layer][phase], then the head
    const float* vectors;        // [layer][VECTORS], then the last norm and the head's
    const float* gammas;         // [layer][6]: i, f, g, o, gate, down; then the head's
    const void* embeddings;      // [V][D]
    float* state;                // [L][D]
    int* sums;                   // accumulators of the phases, see `sums_at`
    float* logits;               // [V]
    u64* best;                   // the largest logit and its token, as a key; read for `token` < 0
    u32* not_finite;             // set to 1 if a logit is not
    u32* history;                // where the token that was read from `best` is noted; null for nowhere
    u32* barrier;                // counts arrivals
    u64 tile_at[PHASES];         // first tile of a phase in its layer (the head's: of all)
    u64 layer_tiles;             // tiles of a layer
    u32 row_tiles[PHASES];
    u32 col_tiles[PHASES];
    u32 sums_at[PHASES];         // offsets of the accumulators
    u32 layers, width, inner, vocab;
    u32 segment_tiles;           // row tiles of each of i, f, g
    u32 embedding_type;          // 0: f32, 1: f16, 2: bf16
    u32 slots;                   // chunks of a warp's ring
    u32 row_floats;              // of the second row in shared memory
    u32 barrier_base;            // arrivals before this launch
    int token;
    float eps;
};

// ---- Offsets of a layer's vectors, in floats ----

struct Vectors {
    const float *attn_norm, *i, *f, *g, *beta, *g_norm, *o, *mlp_norm, *gate, *down;
    __device__ __forceinline__ Vectors(const float* base, u32 d) {
        attn_norm = base;
        i = base + d, f = base + 2 * d, g = base + 3 * d, beta = base + 4 * d, g_norm = base + 5 * d;
        o = base + 6 * d, mlp_norm = base + 7 * d, gate = base + 8 * d, down = base + 9 * d;
    }
};

__device__ __forceinline__ float4 load(const float* vector, u32 k) { return __ldg((const float4*)vector + k); }

// ---- Weight stream ----

// All tiles of a phase, row by row, in equal contiguous parts.
__device__ __forceinline__ u32 part_begin(u32 tiles, u32 part, u32 parts) { return (u32)((u64)tiles * part / parts); }

// What a warp does in a phase; computed once, for divisions are slow.
struct Work {
    u32 begin, end;         // tiles
    u32 row_tile, col_tile; // of the first
};

struct Plan {
    Work work[PHASES][WARPS];
    u32 clear_begin[PHASES], clear_end[PHASES];  // this block's share of the accumulators, in int4

    __device__ __forceinline__ void make(const Args& a) {
        if (threadIdx.x < PHASES * WARPS) {
            u32 phase = threadIdx.x / WARPS, warp = threadIdx.x % WARPS, parts = gridDim.x * WARPS;
            u32 tiles = a.row_tiles[phase] * a.col_tiles[phase], part = blockIdx.x * WARPS + warp;
            Work w;
            w.begin = part_begin(tiles, part, parts);
            w.end = part_begin(tiles, part + 1, parts);
            w.row_tile = w.begin / a.col_tiles[phase];
            w.col_tile = w.begin % a.col_tiles[phase];
            work[phase][warp] = w;
            if (warp == 0) {
                u32 words = a.row_tiles[phase] * (TILE_ROWS / 4);
                clear_begin[phase] = part_begin(words, blockIdx.x, gridDim.x);
                clear_end[phase] = part_begin(words, blockIdx.x + 1, gridDim.x);
            }
        }
        __syncthreads();
    }
};

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

struct Stream {
    // Next chunk to fetch (used by lane 0).
    u32 layer, phase, at, end, fetch_slot;
    // Next chunk to use.
    u32 slot, parity;
    uint4* ring;
    u64* full;

    __device__ __forceinline__ void find_work(const Args& a, const Plan& plan) {
        while (at == end && phase != PHASES) {
            if (phase < DOWN) ++phase;
            else if (phase == DOWN && layer + 1 < a.layers) ++layer, phase = MIX;
            else ++phase;
            if (phase < PHASES) {
                const Work& w = plan.work[phase][threadIdx.x / 32];
                at = w.begin, end = w.end;
            }
        }
    }

    __device__ __forceinline__ void fetch(const Args& a, const Plan& plan) {
        find_work(a, plan);
        if (phase == PHASES) return;
        u32 count = min(CHUNK_TILES, end - at);
        u64 tile = a.tile_at[phase] + (phase == HEAD ? 0 : (u64)layer * a.layer_tiles) + at;
        u32 barrier = shared_address(full + fetch_slot), bytes = count * TILE_BYTES;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(ring + fetch_slot * (CHUNK_BYTES / 16))),
            "l"(a.weights + tile * 32), "r"(bytes), "r"(barrier)
            : "memory");
        at += count;
        fetch_slot = fetch_slot + 1 == a.slots ? 0 : fetch_slot + 1;
    }

    __device__ __forceinline__ void begin(const Args& a, const Plan& plan, uint4* my_ring, u64* my_full) {
        ring = my_ring, full = my_full;
        layer = phase = slot = parity = fetch_slot = 0;
        const Work& w = plan.work[MIX][threadIdx.x / 32];
        at = w.begin, end = w.end;
        if (threadIdx.x % 32 == 0) {
            for (u32 s = 0; s < a.slots; ++s)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + s)) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            for (u32 s = 0; s < a.slots; ++s) fetch(a, plan);
        }
        __syncwarp();
    }

    // Waits for the next chunk.
    __device__ __forceinline__ const uint4* wait() {
        u32 barrier = shared_address(full + slot), done = 0;
        while (!done)
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                : "=r"(done)
                : "r"(barrier), "r"(parity)
                : "memory");
        return ring + slot * (CHUNK_BYTES / 16);
    }

    // Gives the chunk back and fetches another into its place.
    __device__ __forceinline__ void release(const Args& a, const Plan& plan) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) fetch(a, plan);
        if (++slot == a.slots) slot = 0, parity ^= 1;
    }
};
#endif

// Adds this warp's part of a phase's product to the accumulators. `q` are the quantised inputs in shared memory, one
// behind the other for each `segment` of row tiles, `totals` their sums.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void product(const Args& a, const Plan& plan, Phase phase, u32, const i8* q,
                                        const int* totals, u32 segment, Stream& stream) {
#else
__device__ __forceinline__ void product(const Args& a, const Plan& plan, Phase phase, u32 layer, const i8* q,
                                        const int* totals, u32 segment) {
#endif
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Work& work = plan.work[phase][threadIdx.x / 32];
    u32 col_tiles = a.col_tiles[phase], at = work.begin, end = work.end;
    if (at == end) return;
    u32 row_tile = work.row_tile, col_tile = work.col_tile;
    int* sums = a.sums + a.sums_at[phase];
    int c[4][4] = {};
    bool first = col_tile == 0;
    // Of at most three segments.
    u32 input_of = (row_tile >= segment) + (row_tile >= 2 * segment);
    const uint4* input = (const uint4*)(q + input_of * col_tiles * TILE_COLS) + 2 * t;

    auto flush = [&] {
        // All eight columns of the result are the same; field f's sums are 4^f times too large.
        u32 half = 2 * (t & 1);
        int sum = half ? c[0][2] + (c[1][2] >> 2) + (c[2][2] >> 4) + (c[3][2] >> 6)
                       : c[0][0] + (c[1][0] >> 2) + (c[2][0] >> 4) + (c[3][0] >> 6);
        if (first) sum -= totals[input_of];
        if (t < 2) atomicAdd(sums + row_tile * TILE_ROWS + g + 4 * half, sum);
#pragma unroll
        for (u32 f = 0; f < 4; ++f) c[f][0] = c[f][1] = c[f][2] = c[f][3] = 0;
    };
    auto multiply = [&](uint4 w) {
        uint4 low = input[col_tile * 8], high = input[col_tile * 8 + 1];
        const u32 b0[4] = {low.x, low.y, low.z, low.w}, b1[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (u32 f = 0; f < 4; ++f) {
            u32 mask = FIELD << 2 * f;
            mma_u8_s8(c[f], w.x & mask, w.y & mask, w.z & mask, w.w & mask, b0[f], b1[f]);
        }
        if (++col_tile == col_tiles) {
            flush();
            col_tile = 0;
            first = true;
            ++row_tile;
            input_of = (row_tile >= segment) + (row_tile >= 2 * segment);
            input = (const uint4*)(q + input_of * col_tiles * TILE_COLS) + 2 * t;
        }
    };
#if __CUDA_ARCH__ >= 900
    while (at < end) {
        const uint4* chunk = stream.wait() + lane;
        u32 count = min(CHUNK_TILES, end - at);
        uint4 w[CHUNK_TILES];
#pragma unroll
        for (u32 i = 0; i < CHUNK_TILES; ++i) w[i] = chunk[i * 32];
        stream.release(a, plan);
#pragma unroll
        for (u32 i = 0; i < CHUNK_TILES; ++i)
            if (i < count) multiply(w[i]);
        at += count;
    }
#else
    const uint4* tile = a.weights + (a.tile_at[phase] + (phase == HEAD ? 0 : (u64)layer * a.layer_tiles)) * 32 + lane;
    uint4 next = __ldg(tile + (size_t)at * 32);
    for (; at < end; ++at) {
        uint4 w = next;
        if (at + 1 < end) next = __ldg(tile + (size_t)(at + 1) * 32);
        multiply(w);
    }
#endif
    if (col_tile != 0) flush();
}

// ---- Grid ----

// Everything that any thread wrote before is visible to all threads behind it.
__device__ __forceinline__ void grid_barrier(const Args& a, u32& arrivals) {
    __syncthreads();
    arrivals += gridDim.x;
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.barrier) : "memory");
        u32 count;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(a.barrier) : "memory");
        } while ((int)(count - arrivals) < 0);
    }
    __syncthreads();
}

// Clears this block's share of a phase's accumulators.
__device__ __forceinline__ void clear(const Args& a, const Plan& plan, Phase phase) {
    for (u32 k = plan.clear_begin[phase] + threadIdx.x; k < plan.clear_end[phase]; k += THREADS)
        __stcg((int4*)(a.sums + a.sums_at[phase]) + k, make_int4(0, 0, 0, 0));
}

__device__ __forceinline__ float4 sums_of(const Args& a, Phase phase, u32 column, u32 k, float factor) {
    return dequantize(__ldcg((const int4*)(a.sums + a.sums_at[phase] + column) + k), factor);
}

__device__ __forceinline__ float4 embedding(const Args& a, u32 token, u32 k) {
    size_t at = (size_t)token * (a.width / 4) + k;
    if (a.embedding_type == 0) return __ldg((const float4*)a.embeddings + at);
    ushort4 b = __ldg((const ushort4*)a.embeddings + at);
    if (a.embedding_type == 1) return make_float4(f16_to_f32(b.x), f16_to_f32(b.y), f16_to_f32(b.z), f16_to_f32(b.w));
    return make_float4(__uint_as_float((u32)b.x << 16), __uint_as_float((u32)b.y << 16),
                       __uint_as_float((u32)b.z << 16), __uint_as_float((u32)b.w << 16));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float scalar;
    __shared__ u32 parts[3 * WARPS];
    __shared__ int totals[3];
    __shared__ u64 best;
    __shared__ Plan plan;
    plan.make(a);
    u32 d = a.width;
    float4* x = (float4*)(memory + WARPS * a.slots * CHUNK_BYTES);
    float4* row = x + d / 4;                        // [row_floats]
    float* row_values = (float*)row;
    float4* new_state = row + a.row_floats / 4;     // this block's share of h
    u32 own_begin = part_begin(d / 4, blockIdx.x, gridDim.x), own_end = part_begin(d / 4, blockIdx.x + 1, gridDim.x);
    u32* q = (u32*)(new_state + (d / 4 + gridDim.x - 1) / gridDim.x);
    u32 padded = a.col_tiles[MIX] * TILE_COLS, padded_inner = a.col_tiles[DOWN] * TILE_COLS;
    u32 q_bytes = max(3 * padded, padded_inner);
    u32 arrivals = a.barrier_base;

#if __CUDA_ARCH__ >= 900
    u32 warp = threadIdx.x / 32;
    u64* full = (u64*)((u8*)q + q_bytes);
    uint4* ring = (uint4*)memory;
    Stream stream;
    stream.begin(a, plan, ring + warp * a.slots * (CHUNK_BYTES / 16), full + warp * a.slots);
#define PRODUCT(phase, layer, segment) \
    product(a, plan, phase, layer, (const i8*)q, totals, segment, stream)
#else
#define PRODUCT(phase, layer, segment) product(a, plan, phase, layer, (const i8*)q, totals, segment)
#endif

    u32 token = a.token >= 0 ? (u32)a.token : ~(u32)__ldcg(a.best);
    float scale_down[1];
    auto store = [&](u32 layer, u32 k, u32 word) { q[layer * (padded / 4) + k] = word; };

    for (u32 layer = 0; layer < a.layers; ++layer) {
        const Vectors v(a.vectors + (size_t)layer * (9 * d + a.inner), d);
        const float* gammas = a.gammas + layer * 6;
        float* state = a.state + (size_t)layer * d;

        // i, f, g
        float down_factor = layer > 0 ? __ldg(gammas - 1) / scale_down[0] : 0.0f;
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) {
            float4 value = layer == 0 ? embedding(a, token, k) : x[k] + sums_of(a, DOWN, 0, k, down_factor);
            x[k] = value;
        }
        clear(a, plan, GLU);
        float r = inverse_rms((float*)x, d, a.eps, &scalar);
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = x[k] * r * load(v.attn_norm, k);
        float scale_mix[3];
        const float* mix_weights[3] = {v.i, v.f, v.g};
        norm_quantize<THREADS>(row_values, d, padded, mix_weights, &scalar, parts, scale_mix, totals, store);
        PRODUCT(MIX, layer, a.segment_tiles);
        grid_barrier(a, arrivals);

        // Recurrence, gate, o
        if (layer == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
            *a.best = 0;
            if (a.history) *a.history = token;
        }
        float i_factor = __ldg(gammas) / scale_mix[0], f_factor = __ldg(gammas + 1) / scale_mix[1];
        float g_factor = __ldg(gammas + 2) / scale_mix[2];
        u32 segment_columns = a.segment_tiles * TILE_ROWS;
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) {
            float4 i = sums_of(a, MIX, 0, k, i_factor), f = sums_of(a, MIX, segment_columns, k, f_factor);
            float4 g = sums_of(a, MIX, 2 * segment_columns, k, g_factor);
            float4 h = __ldcg((const float4*)state + k), beta = load(v.beta, k);
            float4 forget = beta + (1.0f - beta) * sigmoid(f);
            h = forget * h + silu(i) * (1.0f - forget);
            row[k] = g;
            row[d / 4 + k] = silu(h);
            if (own_begin <= k && k < own_end) new_state[k - own_begin] = h;
        }
        clear(a, plan, DOWN);
        r = inverse_rms(row_values, d, a.eps, &scalar);
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = row[k] * r * load(v.g_norm, k) * row[d / 4 + k];
        float scale[1];
        const float* out_weights[1] = {v.o};
        norm_quantize<THREADS>(row_values, d, padded, out_weights, &scalar, parts, scale, totals, store);
        PRODUCT(OUT, layer, a.row_tiles[OUT]);
        grid_barrier(a, arrivals);

        // Residual, gate_proj
        float out_factor = __ldg(gammas + 3) / scale[0];
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) x[k] = x[k] + sums_of(a, OUT, 0, k, out_factor);
        for (u32 k = own_begin + threadIdx.x; k < own_end; k += THREADS) ((float4*)state)[k] = new_state[k - own_begin];
        clear(a, plan, MIX);
        r = inverse_rms((float*)x, d, a.eps, &scalar);
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = x[k] * r * load(v.mlp_norm, k);
        const float* glu_weights[1] = {v.gate};
        norm_quantize<THREADS>(row_values, d, padded, glu_weights, &scalar, parts, scale, totals, store);
        PRODUCT(GLU, layer, a.row_tiles[GLU]);
        grid_barrier(a, arrivals);

        // Gated unit, down_proj
        float glu_factor = __ldg(gammas + 4) / scale[0];
        for (u32 k = threadIdx.x; k < a.inner / 4; k += THREADS)
            row[k] = silu(sums_of(a, GLU, 0, k, glu_factor)) * sums_of(a, GLU, a.inner, k, glu_factor);
        clear(a, plan, OUT);
        const float* down_weights[1] = {v.down};
        norm_quantize<THREADS>(row_values, a.inner, padded_inner, down_weights, &scalar, parts, scale_down, totals,
                               store);
        PRODUCT(DOWN, layer, a.row_tiles[DOWN]);
        grid_barrier(a, arrivals);
    }

    // Head
    const float* last = a.vectors + (size_t)a.layers * (9 * d + a.inner);
    const float* gammas = a.gammas + a.layers * 6;
    float down_factor = __ldg(gammas - 1) / scale_down[0];
    for (u32 k = threadIdx.x; k < d / 4; k += THREADS) x[k] = x[k] + sums_of(a, DOWN, 0, k, down_factor);
    clear(a, plan, GLU);
    float r = inverse_rms((float*)x, d, a.eps, &scalar);
    for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = x[k] * r * load(last, k);
    const float* head_weights[1] = {last + d};
    float scale[1];
    norm_quantize<THREADS>(row_values, d, padded, head_weights, &scalar, parts, scale, totals, store);
    if (threadIdx.x == 0) best = 0;
    PRODUCT(HEAD, 0, a.row_tiles[HEAD]);
    grid_barrier(a, arrivals);

    clear(a, plan, DOWN);
    float factor = __ldg(gammas) / scale[0];
    u64 mine = 0;
    bool finite = true;
    for (u32 n = blockIdx.x * THREADS + threadIdx.x; n < a.vocab; n += gridDim.x * THREADS) {
        int* at = a.sums + a.sums_at[HEAD] + n;
        float logit = dequantize(__ldcg(at), factor);
        __stcg(at, 0);
        a.logits[n] = logit;
        finite = finite && is_finite(logit);
        u64 key = logit_key(logit, n);
        mine = key > mine ? key : mine;
    }
    if (mine) atomicMax(&best, mine);
    if (!finite) *a.not_finite = 1;
    __syncthreads();
    if (threadIdx.x == 0 && best) atomicMax(a.best, best);
}
