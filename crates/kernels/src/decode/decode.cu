// Decoding of one sequence in one launch: a persistent grid of one block an SM that walks through tokens and layers.
//
// A layer has four phases, and each is a product between two exchanges. A block owns groups of 16 channels, with all rows
// of the weights that lead to them: behind a product it computes what belongs to its channels (gates, recurrence,
// residual), once, and sends what the next product reads of them.
//
// What is sent is the next quantiser's input without its factor. With y = x r1 w1 and z = y r2 w2 (two norms), the
// quantiser's input is z = u R for u = x w1 w2, which only the channel's owner needs to know the weights for, and
// R = r1 r2 = 1 / sqrt(mean((x w1)^2) + 1e-6 (mean(x^2) + eps)), for which owners send one sum for each group. All that
// blocks do with a whole row is to find its maximum and to round u 127 / max|u|. (The CPU and the other kernels multiply
// one after the other, so bits differ.)

// Without the compiler's checks; off by a few units in the last place.
__device__ __forceinline__ float quick_sigmoid(float x) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
    return reciprocal(1.0f + e);
}
__device__ __forceinline__ float quick_silu(float x) { return x * quick_sigmoid(x); }

// ---- Rows ----

// Rounds four floats of at most 127 to even, each to a byte.
__device__ __forceinline__ u32 round4(float4 y) {
    auto one = [](float y) { return __float_as_uint(y + 12582912.0f); };
    return __byte_perm(__byte_perm(one(y.x), one(y.y), 0x0040), __byte_perm(one(y.z), one(y.w), 0x0040), 0x5410);
}

// Waits for the activations of this warp's columns and quantises them, four a lane of each column: a warp needs no others.
// Gives max|u| / 127 of each layer. Synchronises the workers.
template <u32 PHASE>
__device__ __forceinline__ void quantize_columns(const Args& a, Shared& shared, u32 round, u32 turn,
                                                 u32 (&words)[layers_of(PHASE)][columns_of(PHASE)],
                                                 float (&step)[layers_of(PHASE)]) {
    constexpr u32 N = inputs_of(PHASE), LAYERS = layers_of(PHASE), COLUMNS = columns_of(PHASE);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* row = a.exchange + place_of(PHASE) + warp * TILE_COLS + 4 * lane;
    float4 v[COLUMNS][LAYERS];
    auto is_inside = [&](u32 k) { return (warp + k * WARPS) * TILE_COLS + 4 * lane < N; };
    auto address = [&](u32 k, u32 j) { return row + j * N + k * WARPS * TILE_COLS; };
#pragma unroll
    for (u32 k = 0; k < COLUMNS; ++k)
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) v[k][j] = is_inside(k) ? look4(address(k, j)) : make_float4(0, 0, 0, 0);
    bool all;
    do {
        all = true;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k)
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j)
                if (is_inside(k) && !was_sent(v[k][j], round)) v[k][j] = look4(address(k, j)), all = false;
    } while (!all);
    __syncwarp();
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        float largest = 0.0f;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) {
            float4 u = v[k][j];
            largest = fmaxf(largest, fmaxf(fmaxf(fabsf(u.x), fabsf(u.y)), fmaxf(fabsf(u.z), fabsf(u.w))));
        }
        // The bits of floats that are not negative are in their order.
        u32 of_warp = __reduce_max_sync(ALL_LANES, __float_as_uint(largest));
        if (lane == 0) shared.largest[turn][j][warp] = of_warp;
    }
    sync_workers();
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        u32 of_warp = lane < WARPS ? shared.largest[turn][j][lane] : 0;
        float largest = fmaxf(without_round(__uint_as_float(__reduce_max_sync(ALL_LANES, of_warp))), 1e-35f);
        step[j] = largest * (1.0f / 127.0f);
        float factor = 127.0f * reciprocal(largest);
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) words[j][k] = round4(without_round(v[k][j]) * factor);
    }
}

// ---- Product ----

// As in common.cuh, for the compiler to move.
__device__ __forceinline__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// This warp's tile of a column.
template <u32 PHASE>
__device__ __forceinline__ uint4 take_tile(const Rows& way, u32 k) {
    constexpr u32 LAST = col_tiles_of(PHASE) - 1;
    u32 column = threadIdx.x / 32 + k * WARPS;
    if (k * WARPS + WARPS - 1 > LAST) column = min(column, LAST);
    return way.tile<PHASE>(column);
}

// Waits for a row of tiles, and takes those of this warp if they are few.
template <u32 PHASE>
__device__ __forceinline__ void take_row(Rows& way, u32 row, uint4 (&w)[columns_of(PHASE)]) {
    way.take<PHASE>(row);
    if (columns_of(PHASE) <= EARLY_COLUMNS)
#pragma unroll
        for (u32 k = 0; k < columns_of(PHASE); ++k) w[k] = take_tile<PHASE>(way, k);
}

// Adds this warp's part of a phase's product to the block's sums, [rows of the block's tiles]. The first row was taken.
template <u32 PHASE>
__device__ __forceinline__ void product(const u32 (&words)[layers_of(PHASE)][columns_of(PHASE)],
                                        uint4 (&w)[columns_of(PHASE)], int* sums, Rows& way) {
    constexpr u32 COLUMNS = columns_of(PHASE), LAYERS = layers_of(PHASE);
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rows = way.shared.plan.part[PHASE].rows, layer_rows = rows / LAYERS;
    constexpr bool KEEPS = COLUMNS <= 4;  // second operands, through all rows
    u32 b[KEEPS ? COLUMNS : 1][8], row_of_layer = 0, layer = 0;
    int total = 0;
#pragma unroll 1
    for (u32 row = 0; row < rows; ++row, sums += TILE_ROWS) {
        if (row_of_layer == 0) {
            // A column's second operands are words 8 t ... 8 t + 7; the sum of its activations makes up for codes t + 1.
            total = 0;
#pragma unroll
            for (u32 k = 0; k < COLUMNS; ++k) {
                u32 word = words[0][k];
                if (LAYERS == 3) word = layer == 0 ? word : layer == 1 ? words[1 % LAYERS][k] : words[2 % LAYERS][k];
                total = __dp4a((int)word, 0x01010101, total);
                if (KEEPS)
#pragma unroll
                    for (u32 f = 0; f < 8; ++f) b[k % (KEEPS ? COLUMNS : 1)][f] = __shfl_sync(ALL_LANES, word, 8 * t + f);
            }
            total = __reduce_add_sync(ALL_LANES, total);
            row_of_layer = LAYERS == 1 ? rows : layer_rows;
            ++layer;
        }
        --row_of_layer;
        int c[4][4] = {};
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) {
            uint4 tile = COLUMNS > EARLY_COLUMNS ? take_tile<PHASE>(way, k) : w[k];
            u32(&of_column)[8] = b[KEEPS ? k : 0];
            if (!KEEPS)
#pragma unroll
                for (u32 f = 0; f < 8; ++f) of_column[f] = __shfl_sync(ALL_LANES, words[0][k], 8 * t + f);
#pragma unroll
            for (u32 f = 0; f < 4; ++f) {
                u32 mask = FIELD << 2 * f;
                multiply(c[f], tile.x & mask, tile.y & mask, tile.z & mask, tile.w & mask, of_column[f], of_column[4 + f]);
            }
        }
        way.release<PHASE>();
        if (row + 1 < rows) take_row<PHASE>(way, row + 1, w);
        // All eight columns of the result are the same; field f's sums are 4^f times too large.
        u32 half = 2 * (t & 1);
        int sum = half ? c[0][2] + (c[1][2] >> 2) + (c[2][2] >> 4) + (c[3][2] >> 6)
                       : c[0][0] + (c[1][0] >> 2) + (c[2][0] >> 4) + (c[3][0] >> 6);
        if (t < 2) atomicAdd(sums + g + 4 * half, sum - total);
    }
}

// ---- The walk ----

// Channel k of a token's embedding.
__device__ __forceinline__ float embedding(const Args& a, u32 token, u32 k) {
    size_t at = (size_t)token * WIDTH + k;
    if (a.embedding_type == 0) return __ldg((const float*)a.embeddings + at);
    unsigned short bits = __ldg((const unsigned short*)a.embeddings + at);
    return a.embedding_type == 1 ? f16_to_f32(bits) : __uint_as_float((u32)bits << 16);
}

// What a thread knows of its block.
struct Walker {
    const Args& a;
    Shared& shared;
    int* all_sums;
    const float* own_vectors;  // of this phase and the next
    Rows& way;
    u32 turn;

    // Waits for a phase's row and multiplies. Then the sums are there for those who read them, with their factors:
    // R max|u| / 127.
    template <u32 PHASE>
    __device__ __forceinline__ void run(u32 layer, u32 round, bool reads_sums, float (&factor)[layers_of(PHASE)]) {
        turn ^= 1;
        u32 words[layers_of(PHASE)][columns_of(PHASE)];
        uint4 w[columns_of(PHASE)];
        way.begin<PHASE>(a, layer);
        take_row<PHASE>(way, 0, w);
        quantize_columns<PHASE>(a, shared, round, turn, words, factor);
        product<PHASE>(words, w, all_sums + a.sums_at[PHASE], way);
        if (reads_sums) {
            wait_for_sums();
            float r = shared.factor[turn];
#pragma unroll
            for (u32 j = 0; j < layers_of(PHASE); ++j) factor[j] *= r;
        } else {
            sums_are_added();
        }
    }

    // Vector `which` at this thread's own channel.
    __device__ __forceinline__ float own_vector(u32 which) const {
        return own_vectors[(4 * turn + which) * a.own_floats + threadIdx.x];
    }

    // A sum, whose place is empty then.
    template <u32 PHASE>
    __device__ __forceinline__ int take_sum(u32 k) const {
        int* at = all_sums + a.sums_at[PHASE] + k;
        int sum = *at;
        *at = 0;
        return sum;
    }
};

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    Plan& plan = shared.plan;
    u32 warp = threadIdx.x / 32;
    u8* ring = memory + SHARED_BYTES;
    int* all_sums = (int*)(ring + RING_TILES * TILE_BYTES);
    plan.make(a);
    if (threadIdx.x == THREADS) {
        make_ring(shared);
        shared.best = 0;
    }
    for (u32 k = threadIdx.x; k < a.sums_at[PHASES]; k += ALL_THREADS) all_sums[k] = 0;
    __syncthreads();
    if (warp == WARPS) {
        if (threadIdx.x % 32 == 0) fetch_weights(a, shared, ring);
        return;
    }
    float* own_vectors = (float*)(all_sums + a.sums_at[PHASES]);
    if (warp > WARPS) return serve(a, shared, own_vectors);

    Rows way = {shared, ring, {}};
    Walker walker = {a, shared, all_sums, own_vectors, way, 0};
    u32 channels = plan.part[MIX].channels, channel = plan.part[MIX].channel + threadIdx.x;
    bool has_channel = threadIdx.x < channels, has_warp_channels = warp * 32 < channels;
    u32 inner_channels = plan.part[GLU].channels, inner_channel = plan.part[GLU].channel + threadIdx.x;
    bool has_inner = threadIdx.x < inner_channels, has_warp_inner = warp * 32 < inner_channels;
    constexpr u32 LAYER_FLOATS = 9 * WIDTH + INNER;
    float x = 0.0f;  // the residual stream's
#pragma unroll 1
    for (u32 token_at = 0; token_at < a.count; ++token_at) {
        u32 token_round = a.tokens_before + token_at;
        u32 round = token_round * a.layers + 1;
        const float* v = a.vectors;
        if (has_warp_channels) {
            u32 token = token_at == 0 && a.token >= 0 ? (u32)a.token : receive_token(a, token_round);
            float w[3] = {}, w1 = 0.0f;
            if (has_channel) {
                w1 = __ldg(v + channel);
                for (u32 j = 0; j < 3; ++j) w[j] = __ldg(v + (1 + j) * WIDTH + channel);
                x = embedding(a, token, channel);
                if (channel == 0) a.history[token_at] = token;
            }
            float y = x * w1;
            send_channel<MIX>(a, has_channel, channel, y, y * y + 1e-6f * (x * x), w, round);
        }
#pragma unroll 1
        for (u32 layer = 0; layer < a.layers; ++layer, ++round, v += LAYER_FLOATS) {
            const float* gammas = a.gammas + 6 * layer;
            if (channels > 0) {
                {
                    float gamma[3], f[3];
#pragma unroll
                    for (u32 j = 0; j < 3; ++j) gamma[j] = __ldg(gammas + j);
                    walker.run<MIX>(layer, round, has_warp_channels, f);
                    if (has_warp_channels) {
                        float g = 0.0f, y = 0.0f, h = 0.0f, w[1] = {};
                        if (has_channel) {
                            u32 rows = plan.part[MIX].second_at;
                            float i_gate = dequantize(walker.take_sum<MIX>(threadIdx.x), gamma[0] * f[0]);
                            float f_gate = dequantize(walker.take_sum<MIX>(threadIdx.x + rows), gamma[1] * f[1]);
                            g = dequantize(walker.take_sum<MIX>(threadIdx.x + 2 * rows), gamma[2] * f[2]);
                            float beta = walker.own_vector(0), forget = beta + (1.0f - beta) * quick_sigmoid(f_gate);
                            h = forget * walker.own_vector(3) + quick_silu(i_gate) * (1.0f - forget);
                            y = g * walker.own_vector(1) * quick_silu(h);
                            w[0] = walker.own_vector(2);
                        }
                        send_channel<OUT>(a, has_channel, channel, y, y * y + 1e-6f * (g * g), w, round);
                        if (has_channel) a.state[(size_t)layer * WIDTH + channel] = h;
                    }
                }
                {
                    float gamma = __ldg(gammas + 3), f[1];
                    walker.run<OUT>(layer, round, has_warp_channels, f);
                    if (has_warp_channels) {
                        float y = 0.0f, w[1] = {};
                        if (has_channel) {
                            x = x + dequantize(walker.take_sum<OUT>(threadIdx.x), gamma * f[0]);
                            y = x * walker.own_vector(0);
                            w[0] = walker.own_vector(1);
                        }
                        send_channel<GLU>(a, has_channel, channel, y, y * y + 1e-6f * (x * x), w, round);
                    }
                }
            }
            if (inner_channels > 0) {
                float gamma = __ldg(gammas + 4), f[1];
                walker.run<GLU>(layer, round, has_warp_inner, f);
                if (has_warp_inner) {
                    float y = 0.0f, w[1] = {};
                    if (has_inner) {
                        y = quick_silu(dequantize(walker.take_sum<GLU>(threadIdx.x), gamma * f[0])) *
                            dequantize(walker.take_sum<GLU>(threadIdx.x + plan.part[GLU].second_at), gamma * f[0]);
                        w[0] = walker.own_vector(0);
                    }
                    send_channel<DOWN>(a, has_inner, inner_channel, y, y * y, w, round);
                }
            }
            if (channels > 0) {
                bool is_last = layer + 1 == a.layers;
                float gamma = __ldg(gammas + 5), f[1];
                walker.run<DOWN>(layer, round, has_warp_channels, f);
                if (has_warp_channels) {
                    float y = 0.0f, w[3] = {};
                    if (has_channel) {
                        x = x + dequantize(walker.take_sum<DOWN>(threadIdx.x), gamma * f[0]);
                        y = x * walker.own_vector(0);
#pragma unroll
                        for (u32 j = 0; j < 3; ++j) w[j] = walker.own_vector(1 + j);
                    }
                    float square = y * y + 1e-6f * (x * x);
                    if (!is_last) {
                        send_channel<MIX>(a, has_channel, channel, y, square, w, round + 1);
                    } else {
                        float only[1] = {w[0]};
                        send_channel<HEAD>(a, has_channel, channel, y, square, only, token_round + 1);
                    }
                }
            }
        }
        if (plan.part[HEAD].channels > 0) {
            float gamma = __ldg(a.gammas + 6 * a.layers), f[1];
            walker.run<HEAD>(a.layers, token_round + 1, true, f);
            u64 mine = 0;
            bool finite = true;
#pragma unroll 1
            for (u32 k = threadIdx.x; k < plan.part[HEAD].channels; k += THREADS) {
                u32 id = plan.part[HEAD].channel + k;
                float logit = dequantize(walker.take_sum<HEAD>(k), gamma * f[0]);
                a.logits[id] = logit;
                finite = finite && is_finite(logit);
                u64 key = logit_key(logit, id);
                mine = key > mine ? key : mine;
            }
            if (mine) atomicMax(&shared.best, mine);
            if (!finite) *a.not_finite = 1;
            sync_workers();
            if (threadIdx.x == 0) {
                u64 round_bit = token_round + 1 & 1 ? ROUND_OF_KEY : 0;
                send_key(a.keys + blockIdx.x, (shared.best & ~ROUND_OF_KEY) | round_bit);
                shared.best = 0;
            }
        }
    }
}
