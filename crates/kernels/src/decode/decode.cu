// One token of one sequence in one launch: a persistent grid of one block an SM that walks through all layers.
//
// A layer has four phases, and the grid one barrier behind each. A phase is a product. Before it, every block that has
// a part in it normalises and quantises the whole row by itself, for the sums have an order and a barrier costs more.
// Behind it, what belongs to a channel (gates, recurrence, residual) is computed once, by the block that has all sums
// of the channel: a block owns groups of 16 channels, with all rows of the weights that lead to them. Blocks exchange
// one or two floats a channel and nothing is added across blocks.
//
// Neither weights nor vectors depend on activations: each warp streams the tiles that it will need into a ring of its
// own in shared memory, through phases and layers, whatever the barriers do, and the norms of the next phase are copied
// to shared memory during a product.
//
// Loops over a row are not unrolled: all of a layer's code is fetched anew in each layer, and long code costs time.

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
    float* exchange;             // what blocks tell each other: x, g, silu(h) [D] each; the gated unit's output [F]
    float* logits;               // [V]
    u64* best;                   // the largest logit and its token, as a key; read for `token` < 0
    u32* not_finite;             // set to 1 if a logit is not
    u32* history;                // where the token that was read from `best` is noted; null for nowhere
    u32* barrier;                // counts arrivals
    u64 tile_at[PHASES];         // first tile of a phase in its layer (the head's: of all)
    u64 layer_tiles;             // tiles of a layer
    u32 row_tiles[PHASES];
    u32 col_tiles[PHASES];
    u32 layers, width, inner, vocab;
    u32 segment_tiles;           // row tiles of each of i, f, g
    u32 embedding_type;          // 0: f32, 1: f16, 2: bf16
    u32 slots;                   // chunks of a warp's ring
    u32 row_floats, vector_floats, q_bytes, block_sums;  // of what lies in shared memory
    u32 barrier_base;            // arrivals before this launch
    int token;
    float eps;
};

// ---- Weight stream ----

__device__ __forceinline__ u32 part_begin(u32 whole, u32 part, u32 parts) { return whole * part / parts; }

// What a block does in a phase. Its tiles are numbered row by row, through up to three pieces of the weights: i, f, g
// or gate and value. Warps take equal contiguous parts.
struct Part {
    u32 channel, channels;  // own channels
    u32 piece_end[2];       // tiles
    u32 piece_at[3];        // what has to be added to the number of a tile of a piece
    u32 piece_rows;         // row tiles of the first piece
    u32 second_at;          // where the sums of the first own channel of the second piece are
    u32 unit;               // tiles of a chunk; divides a row of tiles
};

// What a warp does in a phase.
struct Work {
    u32 begin, end;         // tiles
    u32 row_tile, col_tile; // of the first
};

// Computed once, for divisions are slow.
struct Plan {
    Part part[PHASES];
    Work work[PHASES][WARPS];

    __device__ __forceinline__ void make(const Args& a) {
        if (threadIdx.x < PHASES * WARPS) {
            u32 phase = threadIdx.x / WARPS, warp = threadIdx.x % WARPS;
            u32 outputs = phase == HEAD ? a.vocab : phase == GLU ? a.inner : a.width, col_tiles = a.col_tiles[phase];
            u32 groups = (outputs + TILE_ROWS - 1) / TILE_ROWS;
            u32 begin = part_begin(groups, blockIdx.x, gridDim.x);
            u32 rows = part_begin(groups, blockIdx.x + 1, gridDim.x) - begin;
            u32 all_rows = rows;
            Part p;
            p.channel = begin * TILE_ROWS;
            p.channels = min(p.channel + rows * TILE_ROWS, outputs) - min(p.channel, outputs);
            p.piece_rows = rows;
            p.second_at = rows * TILE_ROWS;
            p.unit = col_tiles % CHUNK_TILES == 0 ? CHUNK_TILES : 1;
            p.piece_end[0] = p.piece_end[1] = rows * col_tiles;
            p.piece_at[0] = p.piece_at[1] = p.piece_at[2] = begin * col_tiles;
            if (phase == MIX) {
                all_rows = 3 * rows;
                p.piece_end[1] = 2 * rows * col_tiles;
                for (u32 s = 1; s < 3; ++s) p.piece_at[s] += s * (a.segment_tiles - rows) * col_tiles;
            } else if (phase == GLU && rows > 0) {
                // The values' rows begin anywhere in a tile.
                u32 first = (a.inner + p.channel) / TILE_ROWS, shift = a.inner % TILE_ROWS;
                all_rows = rows + min(rows + (shift != 0), a.row_tiles[GLU] - first);
                p.piece_end[1] = all_rows * col_tiles;
                p.piece_at[1] = p.piece_at[2] = (first - rows) * col_tiles;
                p.second_at += shift;
            }
            Work w;
            u32 units = all_rows * col_tiles / p.unit;
            w.begin = part_begin(units, warp, WARPS) * p.unit;
            w.end = part_begin(units, warp + 1, WARPS) * p.unit;
            w.row_tile = w.begin / col_tiles;
            w.col_tile = w.begin % col_tiles;
            work[phase][warp] = w;
            if (warp == 0) part[phase] = p;
        }
        __syncthreads();
    }
};

#if __CUDA_ARCH__ >= 900
struct Stream {
    // Next chunk to fetch (used by lane 0).
    u32 layer, phase, at, end, fetch_slot;
    // Next chunk to use.
    u32 slot, parity;
    bool owes;  // a fetch into the place of the last chunk
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
        const Part& p = plan.part[phase];
        u32 piece = (at >= p.piece_end[0]) + (at >= p.piece_end[1]), count = p.unit;
        u64 tile = a.tile_at[phase] + (phase == HEAD ? 0 : (u64)layer * a.layer_tiles) + (at + p.piece_at[piece]);
        u32 barrier = shared_address(full + fetch_slot), bytes = count * TILE_BYTES;
        expect_bytes(barrier, bytes);
        bulk_copy(ring + fetch_slot * (CHUNK_BYTES / 16), a.weights + tile * 32, bytes, barrier);
        at += count;
        fetch_slot = fetch_slot + 1 == a.slots ? 0 : fetch_slot + 1;
    }

    __device__ __forceinline__ void begin(const Args& a, const Plan& plan, uint4* my_ring, u64* my_full) {
        ring = my_ring, full = my_full;
        layer = phase = slot = parity = fetch_slot = 0;
        owes = false;
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
        wait_for(shared_address(full + slot), parity);
        return ring + slot * (CHUNK_BYTES / 16);
    }

    // Gives the chunk back; `settle` fetches another into its place.
    __device__ __forceinline__ void release(const Args& a) {
        owes = true;
        if (++slot == a.slots) slot = 0, parity ^= 1;
    }

    __device__ __forceinline__ void settle(const Args& a, const Plan& plan) {
        if (!owes) return;
        owes = false;
        __syncwarp();
        if (threadIdx.x % 32 == 0) fetch(a, plan);
    }
};
#else
// Older devices read weights where they need them.
struct Stream {
    __device__ __forceinline__ void settle(const Args&, const Plan&) {}
};
#endif

// Adds this warp's part of a phase's product to the block's sums, [rows of the block's tiles]. `q` are the quantised
// inputs in shared memory, one behind the other for each `segment` of row tiles, `totals` their sums.
__device__ __forceinline__ void product(const Args& a, const Plan& plan, Phase phase, u32 layer, const u32* q,
                                        const int* totals, u32 segment, int* sums, Stream& stream) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Work& work = plan.work[phase][threadIdx.x / 32];
    u32 col_tiles = a.col_tiles[phase], at = work.begin, end = work.end;
    [[maybe_unused]] u32 unit = plan.part[phase].unit;
    if (at == end) return;
    u32 row_tile = work.row_tile, col_tile = work.col_tile;
    int c[4][4] = {};
    bool first = col_tile == 0;
    // Of at most three segments.
    u32 input_of = (row_tile >= segment) + (row_tile >= 2 * segment);
    const uint4* input = (const uint4*)q + input_of * col_tiles * (TILE_COLS / 16) + 2 * t;

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
            input = (const uint4*)q + input_of * col_tiles * (TILE_COLS / 16) + 2 * t;
        }
    };
#if __CUDA_ARCH__ >= 900
    for (; at < end; at += unit) {
        stream.settle(a, plan);
        const uint4* chunk = stream.wait() + lane;
        uint4 w[CHUNK_TILES];
#pragma unroll
        for (u32 i = 0; i < CHUNK_TILES; ++i) w[i] = chunk[i * 32];
        stream.release(a);
#pragma unroll
        for (u32 i = 0; i < CHUNK_TILES; ++i)
            if (i < unit) multiply(w[i]);
    }
#else
    const Part& p = plan.part[phase];
    const uint4* tiles = a.weights + (a.tile_at[phase] + (phase == HEAD ? 0 : (u64)layer * a.layer_tiles)) * 32 + lane;
    auto read = [&](u32 at) {
        u32 piece = (at >= p.piece_end[0]) + (at >= p.piece_end[1]);
        return __ldg(tiles + (size_t)(at + p.piece_at[piece]) * 32);
    };
    uint4 next = read(at);
    for (; at < end; ++at) {
        uint4 w = next;
        if (at + 1 < end) next = read(at + 1);
        multiply(w);
    }
#endif
    if (col_tile != 0) flush();
}

// ---- Grid ----

// Everything that any thread wrote before is visible to all threads behind it. Meanwhile, what was owed to the stream
// is fetched, and copies to shared memory end.
__device__ __forceinline__ void grid_barrier(const Args& a, const Plan& plan, u32& arrivals, Stream& stream) {
    __syncthreads();
    arrivals += gridDim.x;
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.barrier) : "memory");
    stream.settle(a, plan);
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (threadIdx.x == 0) {
        u32 count;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(a.barrier) : "memory");
        } while ((int)(count - arrivals) < 0);
    }
    __syncthreads();
}

// ---- Rows ----

// Begins to copy vectors to shared memory; they are there behind the next barrier of the grid.
__device__ __forceinline__ void copy_vectors(float* to, const float* from, u32 floats) {
    u32 target = (u32)__cvta_generic_to_shared(to);
#pragma unroll 1
    for (u32 k = threadIdx.x; k < floats / 4; k += THREADS)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + 16 * k), "l"(from + 4 * k) : "memory");
}

// As `norm_quantize`, with the norms' weights [LAYERS][n] in shared memory and q for [LAYERS][padded].
template <u32 LAYERS>
__device__ __forceinline__ void quantize_row(const float4* row, u32 n, u32 padded, const float4* weights, float* scalar,
                                             u32* parts, float (&scale)[LAYERS], int* totals, u32* q) {
    float r = inverse_rms((const float*)row, n, 1e-6f, scalar);
    float largest[LAYERS];
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) largest[j] = 0.0f;
#pragma unroll 1
    for (u32 k = threadIdx.x; k < n / 4; k += THREADS) {
        float4 y = row[k] * r;
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) {
            float4 value = y * weights[j * (n / 4) + k];
            largest[j] = larger(larger(larger(larger(largest[j], fabsf(value.x)), fabsf(value.y)), fabsf(value.z)),
                                fabsf(value.w));
        }
    }
    if (threadIdx.x < LAYERS) totals[threadIdx.x] = 0;
    block_max<THREADS>(largest, parts);
    int sum[LAYERS];
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        scale[j] = quantizer_scale(largest[j]);
        sum[j] = 0;
    }
#pragma unroll 1
    for (u32 k = threadIdx.x; k < padded / 4; k += THREADS) {
        bool inside = k < n / 4;
        float4 y = inside ? row[k] * r : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) {
            float4 value = y;
            if (inside) value = y * weights[j * (n / 4) + k] * scale[j];
            int a = quantize(value.x), b = quantize(value.y), c = quantize(value.z), d = quantize(value.w);
            sum[j] += a + b + c + d;
            q[j * (padded / 4) + k] = (u32)(a & 255) | (u32)(b & 255) << 8 | (u32)(c & 255) << 16 | (u32)d << 24;
        }
    }
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        int part = __reduce_add_sync(ALL_LANES, sum[j]);
        if (threadIdx.x % 32 == 0) atomicAdd(&totals[j], part);
    }
    __syncthreads();
}

// Elements 4 k ... of the token's embedding.
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
    u32 d = a.width, padded = a.col_tiles[MIX] * TILE_COLS, padded_inner = a.col_tiles[DOWN] * TILE_COLS;
    float4* row = (float4*)(memory + WARPS * a.slots * CHUNK_BYTES);
    float4* weights = row + a.row_floats / 4;  // of norms
    u32* q = (u32*)(weights + a.vector_floats / 4);
    int* sums = (int*)((u8*)q + a.q_bytes);
    float *shared_x = a.exchange, *shared_g = a.exchange + d, *shared_h = a.exchange + 2 * d;
    float* shared_z = a.exchange + 3 * d;
    u32 arrivals = a.barrier_base;
    Stream stream;
#if __CUDA_ARCH__ >= 900
    u32 warp = threadIdx.x / 32;
    u64* full = (u64*)(sums + a.block_sums);
    stream.begin(a, plan, (uint4*)memory + warp * a.slots * (CHUNK_BYTES / 16), full + warp * a.slots);
#endif

    u32 token = a.token >= 0 ? (u32)a.token : ~(u32)__ldcg(a.best);
    // One thread for each own channel of the width; x stays with it.
    bool is_owner = threadIdx.x < plan.part[OUT].channels, takes_part = plan.part[OUT].channels > 0;
    u32 channel = plan.part[OUT].channel + threadIdx.x;
    u32 inner_channels = plan.part[GLU].channels, inner_channel = plan.part[GLU].channel;
    u32 layer_floats = 9 * d + a.inner;
    float x = 0.0f;
    if (is_owner) {
        float4 four = embedding(a, token, channel / 4);
        x = channel % 4 == 0 ? four.x : channel % 4 == 1 ? four.y : channel % 4 == 2 ? four.z : four.w;
    }
    auto clear_sums = [&] {
#pragma unroll 1
        for (u32 k = threadIdx.x; k < a.block_sums; k += THREADS) sums[k] = 0;
    };
    // The row becomes RMSNorm(row; the first of the vectors).
    auto norm_row = [&] {
        float r = inverse_rms((const float*)row, d, a.eps, &scalar);
#pragma unroll 1
        for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = row[k] * r * weights[k];
    };

    copy_vectors((float*)weights, a.vectors, 4 * d);
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (u32 layer = 0; layer < a.layers; ++layer) {
        const float* vectors = a.vectors + (size_t)layer * layer_floats;
        const float* gammas = a.gammas + layer * 6;
        float gamma[6], scale[1];
#pragma unroll
        for (u32 k = 0; k < 6; ++k) gamma[k] = __ldg(gammas + k);
        bool is_last = layer + 1 == a.layers;
        u32 next_floats = is_last ? 2 * d : layer_floats;
#pragma unroll 1
        for (u32 k = 32 * (blockIdx.x + threadIdx.x * gridDim.x); k < next_floats; k += 32 * THREADS * gridDim.x)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(vectors + layer_floats + k));

        // i, f, g, recurrence
        if (takes_part) {
            float* state = a.state + (size_t)layer * d + channel;
            float h = 0.0f, beta = 0.0f, scale_mix[3];
            if (is_owner) h = __ldcg(state), beta = __ldg(vectors + 4 * d + channel);
#pragma unroll 1
            for (u32 k = threadIdx.x; k < d / 4; k += THREADS)
                row[k] = layer == 0 ? embedding(a, token, k) : __ldcg((const float4*)shared_x + k);
            clear_sums();
            norm_row();
            quantize_row<3>(row, d, padded, weights + d / 4, &scalar, parts, scale_mix, totals, q);
            copy_vectors((float*)weights, vectors + 5 * d, 2 * d);
            u32 rows = plan.part[MIX].piece_rows;
            product(a, plan, MIX, layer, q, totals, rows, sums, stream);
            __syncthreads();
            if (is_owner) {
                const int* own = sums + threadIdx.x;
                float i = dequantize(own[0], gamma[0] / scale_mix[0]);
                float f = dequantize(own[rows * TILE_ROWS], gamma[1] / scale_mix[1]);
                float g = dequantize(own[2 * rows * TILE_ROWS], gamma[2] / scale_mix[2]);
                float forget, input;
                recurrence_gates(i, f, beta, forget, input);
                h = forget * h + input;
                *state = h;
                __stcg(shared_g + channel, g);
                __stcg(shared_h + channel, silu(h));
            }
        }
        grid_barrier(a, plan, arrivals, stream);

        // o, residual
        if (layer == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
            *a.best = 0;
            if (a.history) *a.history = token;
        }
        if (takes_part) {
#pragma unroll 1
            for (u32 k = threadIdx.x; k < d / 4; k += THREADS) {
                row[k] = __ldcg((const float4*)shared_g + k);
                row[d / 4 + k] = __ldcg((const float4*)shared_h + k);
            }
            clear_sums();
            float r = inverse_rms((const float*)row, d, a.eps, &scalar);
#pragma unroll 1
            for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = row[k] * r * weights[k] * row[d / 4 + k];
            quantize_row<1>(row, d, padded, weights + d / 4, &scalar, parts, scale, totals, q);
        }
        if (inner_channels > 0) copy_vectors((float*)weights, vectors + 7 * d, 2 * d);
        if (takes_part) {
            product(a, plan, OUT, layer, q, totals, ~0u / 2, sums, stream);
            __syncthreads();
            if (is_owner) {
                x = x + dequantize(sums[threadIdx.x], gamma[3] / scale[0]);
                __stcg(shared_x + channel, x);
            }
        }
        grid_barrier(a, plan, arrivals, stream);

        // Gate and value, gated unit
        if (inner_channels > 0) {
#pragma unroll 1
            for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = __ldcg((const float4*)shared_x + k);
            clear_sums();
            norm_row();
            quantize_row<1>(row, d, padded, weights + d / 4, &scalar, parts, scale, totals, q);
        }
        if (takes_part) copy_vectors((float*)weights, vectors + 9 * d, a.inner);
        if (inner_channels > 0) {
            product(a, plan, GLU, layer, q, totals, ~0u / 2, sums, stream);
            __syncthreads();
            float factor = gamma[4] / scale[0];
            u32 second = plan.part[GLU].second_at;
#pragma unroll 1
            for (u32 n = threadIdx.x; n < inner_channels; n += THREADS)
                __stcg(shared_z + inner_channel + n,
                       silu(dequantize(sums[n], factor)) * dequantize(sums[second + n], factor));
        }
        grid_barrier(a, plan, arrivals, stream);

        // down, residual
        if (takes_part) {
#pragma unroll 1
            for (u32 k = threadIdx.x; k < a.inner / 4; k += THREADS) row[k] = __ldcg((const float4*)shared_z + k);
            clear_sums();
            quantize_row<1>(row, a.inner, padded_inner, weights, &scalar, parts, scale, totals, q);
        }
        copy_vectors((float*)weights, vectors + layer_floats, is_last ? 2 * d : 4 * d);
        if (takes_part) {
            product(a, plan, DOWN, layer, q, totals, ~0u / 2, sums, stream);
            __syncthreads();
            if (is_owner) {
                x = x + dequantize(sums[threadIdx.x], gamma[5] / scale[0]);
                __stcg(shared_x + channel, x);
            }
        }
        grid_barrier(a, plan, arrivals, stream);
    }

    // Head
    float scale[1];
#pragma unroll 1
    for (u32 k = threadIdx.x; k < d / 4; k += THREADS) row[k] = __ldcg((const float4*)shared_x + k);
    clear_sums();
    if (threadIdx.x == 0) best = 0;
    norm_row();
    quantize_row<1>(row, d, padded, weights + d / 4, &scalar, parts, scale, totals, q);
    product(a, plan, HEAD, 0, q, totals, ~0u / 2, sums, stream);
    __syncthreads();
    float factor = __ldg(a.gammas + a.layers * 6) / scale[0];
    u64 mine = 0;
    bool finite = true;
#pragma unroll 1
    for (u32 n = threadIdx.x; n < plan.part[HEAD].channels; n += THREADS) {
        u32 id = plan.part[HEAD].channel + n;
        float logit = dequantize(sums[n], factor);
        a.logits[id] = logit;
        finite = finite && is_finite(logit);
        u64 key = logit_key(logit, id);
        mine = key > mine ? key : mine;
    }
    if (mine) atomicMax(&best, mine);
    if (!finite) *a.not_finite = 1;
    __syncthreads();
    if (threadIdx.x == 0 && best) atomicMax(a.best, best);
}
