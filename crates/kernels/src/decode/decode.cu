// Decoding of one sequence in one launch: a persistent grid of one block an SM that walks through tokens and layers.
//
// A layer has four phases, and each is a product between two exchanges. A block owns groups of 16 channels, with all rows
// of the weights that lead to them: behind a product it computes what belongs to its channels (gates, recurrence,
// residual), once, and sends what the next product reads of them.
//
// What is sent is the next quantiser's input without its factor. With y = x r1 w1 and z = y r2 w2 (two norms), the
// quantiser's input is z = u R for u = x w1 w2, which only the channel's owner needs to know the weights for, and
// R = r1 r2 = 1 / sqrt(mean((x w1)^2) + 1e-6 (mean(x^2) + eps)), for which owners send one sum for each group. All that
// blocks do with a whole row is to find its maximum and to round u 127 / max|u|; i, f and g, whose w2 differ, get x w1, and
// each block multiplies. (The CPU and the other kernels multiply one after the other, so bits differ.)

__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

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

// The sums of squares that belong to a warp's columns: eight groups a column, each group's sum in a lane.
template <u32 PHASE>
struct Squares {
    static constexpr u32 LOADS = (columns_of(PHASE) + 3) / 4;
    float value[LOADS];

    __device__ __forceinline__ static u32 group(u32 i) {
        return (threadIdx.x / 32 + (4 * i + threadIdx.x % 32 / 8) * WARPS) * (TILE_COLS / TILE_ROWS) + threadIdx.x % 8;
    }
    __device__ __forceinline__ static bool has(u32 i) {
        return 4 * i + threadIdx.x % 32 / 8 < columns_of(PHASE) && group(i) * TILE_ROWS < inputs_of(PHASE);
    }

    // They were sent behind the floats, so that they may not be there yet.
    __device__ __forceinline__ void look_for(const Args& a) {
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) value[i] = has(i) ? look(a.exchange + sums_of(PHASE) + group(i)) : 0.0f;
    }

    // Waits for them, and leaves this lane's part of their sum.
    __device__ __forceinline__ void post(const Args& a, u32 round, float& part) {
        u32 any, mask = mask_of(round);
        do {
            any = 0;
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) {
                u32 one = has(i) ? missing(value[i], mask) & 1 : 0;
                look_again(value[i], a.exchange + sums_of(PHASE) + group(i), one);
                any |= one;
            }
        } while (__any_sync(ALL_LANES, any));
        part = 0.0f;
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) part += without_round(value[i]);
        squares_are_posted();
    }
};

// A warp's activations of a phase.
template <u32 PHASE>
struct Activations {
    u32* words;                   // quantised, in shared memory: [layer][column][32]
    float step[layers_of(PHASE)]; // max|u| / 127
    int total[layers_of(PHASE)];  // this lane's part of the sum of the integers
    Squares<PHASE> squares;
};

// Waits for the activations of this warp's columns and quantises them, four a lane of each column: a warp needs no others.
// `norms` are the second norms' weights of i, f and g, [3][D]. Synchronises the workers.
template <u32 PHASE>
__device__ __forceinline__ void receive(const Args& a, Shared& shared, u32 round, u32 turn, Patience& patience,
                                        const float* norms, Activations<PHASE>& to) {
    constexpr u32 N = inputs_of(PHASE), LAYERS = layers_of(PHASE), COLUMNS = columns_of(PHASE);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto channel = [&](u32 k) { return (warp + k * WARPS) * TILE_COLS + 4 * lane; };
    auto is_inside = [&](u32 k) { return (k + 1) * WARPS * TILE_COLS <= N || channel(k) < N; };
    const float* row = a.exchange + place_of(PHASE);
    float4 v[COLUMNS][LAYERS], norm[COLUMNS][LAYERS];
    if (PHASE == MIX)
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k)
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j)
                norm[k][j] = is_inside(k) ? *(const float4*)(norms + j * N + channel(k)) : make_float4(0, 0, 0, 0);
    patience.wait();
#pragma unroll
    for (u32 k = 0; k < COLUMNS; ++k) v[k][0] = is_inside(k) ? look4(row + channel(k)) : make_float4(0, 0, 0, 0);
    u32 mask = mask_of(round);
    for (u32 early_looks = 0;; ++early_looks) {
        u32 any = 0;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) {
            u32 one = is_inside(k) ? missing(v[k][0], mask) & 1 : 0;
            look_again(v[k][0], row + channel(k), one);
            any |= one;
        }
        if (!__any_sync(ALL_LANES, any)) {
            to.squares.look_for(a);
            patience.learn(early_looks);
            break;
        }
    }
#pragma unroll
    for (u32 k = 0; k < COLUMNS; ++k) {
        float4 y = without_round(v[k][0]);
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) v[k][j] = PHASE == MIX ? y * norm[k][j] : y;
    }
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
        float largest = fmaxf(__uint_as_float(__reduce_max_sync(ALL_LANES, of_warp)), 1e-35f);
        to.step[j] = largest * (1.0f / 127.0f);
        float factor = 127.0f * reciprocal(largest);
        to.total[j] = 0;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) {
            u32 word = round4(v[k][j] * factor);
            to.words[(j * COLUMNS + k) * 32 + lane] = word;
            to.total[j] = __dp4a((int)word, 0x01010101, to.total[j]);
        }
    }
    __syncwarp();
}

// ---- Product ----

// How a warp goes through its tiles of a phase.
template <u32 PHASE>
struct Steps {
    static constexpr u32 LAYERS = layers_of(PHASE), COLUMNS = columns_of(PHASE), ROWS = stage_rows_of(PHASE);
    static constexpr bool ONE_STAGE = is_one_stage(PHASE);
    // All tiles are in registers before the activations are there.
    static constexpr u32 TILES = LAYERS * ROWS * COLUMNS;
    static constexpr bool EARLY = ONE_STAGE && TILES <= 6;
    // The activations of all columns stay in registers through the rows.
    static constexpr bool KEEPS = Column::IS_SMALL || COLUMNS <= 4;

    // Rows of the stage that begins at a row of a layer: fewer in its last one.
    __device__ __forceinline__ static u32 rows_from(u32 first, u32 layer_rows) {
        return ROWS == 1 ? 1 : min(ROWS, layer_rows - first);
    }
    // Row r of so many, or the last one once more.
    __device__ __forceinline__ static u32 row(u32 r, u32 count) { return ROWS == 1 ? 0 : min(r, count - 1); }
};

// The tiles of a warp that are in registers early.
template <u32 PHASE>
struct EarlyTiles {
    using S = Steps<PHASE>;
    uint4 tile[S::EARLY ? S::TILES : 1];

    __device__ __forceinline__ static constexpr u32 at(u32 j, u32 r, u32 k) {
        return S::EARLY ? (j * S::ROWS + r) * S::COLUMNS + k : 0;
    }
};

// This warp's tile of a column; behind the last one that again, to be multiplied by zeros.
template <u32 PHASE>
__device__ __forceinline__ uint4 take_tile(const Rows& way, u32 row, u32 k) {
    constexpr u32 LAST = col_tiles_of(PHASE) - 1;
    u32 column = threadIdx.x / 32 + k * WARPS;
    if (k * WARPS + WARPS - 1 > LAST) column = min(column, LAST);
    return way.tile<PHASE>(row, column);
}

// Waits for a phase's first stage, and takes its tiles to registers if they are few.
template <u32 PHASE>
__device__ __forceinline__ void take_first(Rows& way, u32 rows, EarlyTiles<PHASE>& early) {
    using S = Steps<PHASE>;
    u32 layer_rows = rows / S::LAYERS;
    way.take<PHASE>(0, S::ONE_STAGE ? rows : S::rows_from(0, layer_rows));
    if (S::EARLY)
#pragma unroll
        for (u32 j = 0; j < S::LAYERS; ++j)
#pragma unroll
            for (u32 r = 0; r < S::ROWS; ++r)
#pragma unroll
                for (u32 k = 0; k < S::COLUMNS; ++k)
                    early.tile[early.at(j, r, k)] = take_tile<PHASE>(way, j * layer_rows + S::row(r, layer_rows), k);
}

// Leaves this warp's part of a phase's product in `sums`: [row][quad of warps][channel of the row][warp of the quad].
template <u32 PHASE>
__device__ __forceinline__ void product(const Activations<PHASE>& activations, const EarlyTiles<PHASE>& early, int* sums,
                                        u32 rows, Rows& way) {
    using S = Steps<PHASE>;
    constexpr u32 COLUMNS = S::COLUMNS;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, layer_rows = rows / S::LAYERS;
    bool is_odd = t & 1;
    int* mine = sums + (warp / 4 * TILE_ROWS + g + 8 * is_odd) * 4 + warp % 4;
    auto read = [&](u32 j, u32 k, Column& column) { column.read(activations.words + (j * COLUMNS + k) * 32); };
#pragma unroll
    for (u32 j = 0; j < S::LAYERS; ++j) {
        Column columns[S::KEEPS ? COLUMNS : 1];
        u32 first = 0;
        if (S::KEEPS)
#pragma unroll
            for (u32 k = 0; k < COLUMNS; ++k) read(j, k, columns[S::KEEPS ? k : 0]);
        // Makes up for codes t + 1.
        int total = S::ONE_STAGE ? 0 : __reduce_add_sync(ALL_LANES, activations.total[j]);
#pragma unroll 1
        do {
            u32 count = S::rows_from(first, layer_rows);
            if (!S::ONE_STAGE && (j > 0 || first > 0)) way.take<PHASE>(j * layer_rows + first, count);
#pragma unroll
            for (u32 r = 0; r < S::ROWS; ++r) {
                u32 row = S::row(r, count);
                Dots dots;
#pragma unroll
                for (u32 k = 0; k < COLUMNS; ++k) {
                    uint4 tile = S::EARLY ? early.tile[early.at(j, r, k)]
                                          : take_tile<PHASE>(way, (S::ONE_STAGE ? j * layer_rows : 0) + row, k);
                    Column& column = columns[S::KEEPS ? k : 0];
                    if (!S::KEEPS) read(j, k, column);
                    dots.add(tile, column);
                }
                // Here, for the sum to be on its way beside the dot products.
                if (S::ONE_STAGE && r == 0) total = __reduce_add_sync(ALL_LANES, activations.total[j]);
                int2 rows_sums = dots.sums();
                // Over the four lanes of a row: odd ones get row g + 8.
                int sum = (is_odd ? rows_sums.y : rows_sums.x) +
                          __shfl_xor_sync(ALL_LANES, is_odd ? rows_sums.x : rows_sums.y, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                if (t < 2) mine[(j * layer_rows + first + row) * QUADS * TILE_ROWS * 4] = sum - total;
            }
            if (!S::ONE_STAGE) way.release<PHASE>(count);
            first += S::ROWS;
        } while (!S::ONE_STAGE && first < layer_rows);
    }
    if (S::ONE_STAGE) way.release<PHASE>(rows);
}

// Of the phase that has most: words of a warp's activations, and a block's partial sums.
template <u32 PHASE>
constexpr u32 WORDS_OF = layers_of(PHASE) * columns_of(PHASE) * 32;
constexpr u32 WARP_WORDS = larger_of(WORDS_OF<MIX>, WORDS_OF<DOWN>);
constexpr u32 SUMS =
    larger_of(larger_of(3 * most_rows_of(MIX), most_rows_of(GLU)), most_rows_of(HEAD)) * QUADS * TILE_ROWS * 4;

// The host allocates both.
#ifdef NUM_SHARED_BYTES
constexpr u32 OWN_FLOATS = larger_of(NUM_GROUPS, NUM_INNER_GROUPS) * TILE_ROWS;
static_assert(SHARED_BYTES + RING_TILES * TILE_BYTES + 4 * (SUMS + WARPS * WARP_WORDS + 2 * 4 * OWN_FLOATS) == NUM_SHARED_BYTES,
              "the host computes this number");
static_assert(place_of(PHASES) == NUM_EXCHANGE_FLOATS, "the host computes this number");
#endif

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
    u32* words;                // of this warp's activations
    int* sums;                 // of the product
    const float* own_vectors;  // of this phase and the next
    Rows& way;
    u32 turn;
    Patience patience[PHASES];

    // Waits for a phase's row and multiplies. Then the sums are there for those who read them, with their factors:
    // R max|u| / 127.
    template <u32 PHASE>
    __device__ __forceinline__ void run(u32 layer, u32 round, bool reads_sums, float (&factor)[layers_of(PHASE)],
                                        const float* norms = nullptr) {
        turn ^= 1;
        u32 rows = shared.plan.part[PHASE].rows;
        Activations<PHASE> activations = {words};
        EarlyTiles<PHASE> early;
        way.begin<PHASE>(a, layer);
        take_first<PHASE>(way, rows, early);
        receive<PHASE>(a, shared, round, turn, patience[PHASE], norms, activations);
        activations.squares.post(a, round, shared.squares[turn][threadIdx.x]);
        product<PHASE>(activations, early, sums, rows, way);
        if (reads_sums) {
            wait_for_sums();
            float r = shared.row_factor[turn];
#pragma unroll
            for (u32 j = 0; j < layers_of(PHASE); ++j) factor[j] = activations.step[j] * r;
        } else {
            sums_are_added();
        }
    }

    // Vector `which` at this thread's own channel.
    __device__ __forceinline__ float own_vector(u32 which) const {
        return own_vectors[(4 * turn + which) * a.own_floats + threadIdx.x];
    }

    // The product's sum for a channel, counted from the block's first row.
    __device__ __forceinline__ int sum_of(u32 k) const {
        const int4* from = (const int4*)sums + k / TILE_ROWS * QUADS * TILE_ROWS + k % TILE_ROWS;
        int sum = 0;
#pragma unroll
        for (u32 q = 0; q < QUADS; ++q) {
            int4 part = from[q * TILE_ROWS];
            sum += part.x + part.y + (part.z + part.w);
        }
        return sum;
    }

    // Adds a mixer's output to the residual stream of this thread's own channel; gives x w1 of the norm behind it.
    __device__ __forceinline__ float add_output(float& x, float factor) const {
        x = x + dequantize(sum_of(threadIdx.x), factor);
        return x * own_vector(0);
    }
};

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    Plan& plan = shared.plan;
    u32 warp = threadIdx.x / 32;
    u8* ring = memory + SHARED_BYTES;
    int* sums = (int*)(ring + RING_TILES * TILE_BYTES);
    u32* all_words = (u32*)(sums + SUMS);
    plan.make(a);
    if (threadIdx.x == THREADS) make_ring(shared);
    // Parts of warps that do not exist stay 0.
    for (u32 k = threadIdx.x; k < SUMS; k += ALL_THREADS) sums[k] = 0;
    __syncthreads();
    if (warp == WARPS) {
        if (threadIdx.x % 32 == 0) fetch_weights(a, shared, ring);
        return;
    }
    float* own_vectors = (float*)(all_words + WARPS * WARP_WORDS);
    if (warp > WARPS) return serve(a, shared, own_vectors);

    Rows way = {shared, ring, {}};
    Walker walker = {a, shared, all_words + warp * WARP_WORDS, sums, own_vectors, way, 0, {}};
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
            float y = 0.0f;
            if (has_channel) {
                x = embedding(a, token, channel);
                y = x * __ldg(v + channel);
                if (channel == 0) a.history[token_at] = token;
            }
            send_channel<MIX>(a, has_channel, channel, y, y * y + 1e-6f * (x * x), round);
        }
#pragma unroll 1
        for (u32 layer = 0; layer < a.layers; ++layer, ++round, v += LAYER_FLOATS) {
            const float* gammas = a.gammas + 6 * layer;
            if (channels > 0) {
                {
                    float gamma[3], f[3];
#pragma unroll
                    for (u32 j = 0; j < 3; ++j) gamma[j] = __ldg(gammas + j);
                    walker.run<MIX>(layer, round, has_warp_channels, f, v + WIDTH);
                    if (has_warp_channels) {
                        float g = 0.0f, y = 0.0f, h = 0.0f, w = 0.0f;
                        if (has_channel) {
                            u32 rows = plan.part[MIX].second_at;
                            float i_gate = dequantize(walker.sum_of(threadIdx.x), gamma[0] * f[0]);
                            float f_gate = dequantize(walker.sum_of(threadIdx.x + rows), gamma[1] * f[1]);
                            g = dequantize(walker.sum_of(threadIdx.x + 2 * rows), gamma[2] * f[2]);
                            float beta = walker.own_vector(0), forget = beta + (1.0f - beta) * quick_sigmoid(f_gate);
                            h = forget * walker.own_vector(3) + quick_silu(i_gate) * (1.0f - forget);
                            y = g * walker.own_vector(1) * quick_silu(h);
                            w = walker.own_vector(2);
                        }
                        send_channel<OUT>(a, has_channel, channel, y * w, y * y + 1e-6f * (g * g), round);
                        if (has_channel) a.state[(size_t)layer * WIDTH + channel] = h;
                    }
                }
                {
                    float gamma = __ldg(gammas + 3), f[1];
                    walker.run<OUT>(layer, round, has_warp_channels, f);
                    if (has_warp_channels) {
                        float y = 0.0f, w = 0.0f;
                        if (has_channel) {
                            y = walker.add_output(x, gamma * f[0]);
                            w = walker.own_vector(1);
                        }
                        send_channel<GLU>(a, has_channel, channel, y * w, y * y + 1e-6f * (x * x), round);
                    }
                }
            }
            if (inner_channels > 0) {
                float gamma = __ldg(gammas + 4), f[1];
                walker.run<GLU>(layer, round, has_warp_inner, f);
                if (has_warp_inner) {
                    float y = 0.0f, w = 0.0f;
                    if (has_inner) {
                        y = quick_silu(dequantize(walker.sum_of(threadIdx.x), gamma * f[0])) *
                            dequantize(walker.sum_of(threadIdx.x + plan.part[GLU].second_at), gamma * f[0]);
                        w = walker.own_vector(0);
                    }
                    send_channel<DOWN>(a, has_inner, inner_channel, y * w, y * y, round);
                }
            }
            if (channels > 0) {
                bool is_last = layer + 1 == a.layers;
                float gamma = __ldg(gammas + 5), f[1];
                walker.run<DOWN>(layer, round, has_warp_channels, f);
                if (has_warp_channels) {
                    float y = 0.0f, w = 0.0f;
                    if (has_channel) {
                        y = walker.add_output(x, gamma * f[0]);
                        if (is_last) w = walker.own_vector(1);
                    }
                    float square = y * y + 1e-6f * (x * x);
                    if (is_last) send_channel<HEAD>(a, has_channel, channel, y * w, square, token_round + 1);
                    else send_channel<MIX>(a, has_channel, channel, y, square, round + 1);
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
                float logit = dequantize(walker.sum_of(k), gamma * f[0]);
                a.logits[id] = logit;
                finite = finite && is_finite(logit);
                u64 key = logit_key(logit, id);
                mine = key > mine ? key : mine;
            }
            mine = largest_key(mine);
            if (threadIdx.x % 32 == 0) shared.keys[warp] = mine;
            if (!finite) *a.not_finite = 1;
            sync_workers();
            if (warp == 0) {
                mine = largest_key(threadIdx.x < WARPS ? shared.keys[threadIdx.x] : 0);
                u64 round_bit = token_round + 1 & 1 ? ROUND_OF_KEY : 0;
                if (threadIdx.x == 0) send_key(a.keys + blockIdx.x, (mine & ~ROUND_OF_KEY) | round_bit);
            }
        }
    }
}
