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

// ---- Rows ----

// Rounds four floats of at most 127 to even, each to a byte.
__device__ __forceinline__ u32 round4(float4 y) {
    auto one = [](float y) { return __float_as_uint(y + 12582912.0f); };
    return __byte_perm(__byte_perm(one(y.x), one(y.y), 0x0040), __byte_perm(one(y.z), one(y.w), 0x0040), 0x5410);
}

// Where a lane looks in `exchange`: for four floats of the first of its warp's columns of a row at the beginning, and for the
// sum of squares of a group at the beginning.
struct Looks {
    const float *row, *squares;

    __device__ __forceinline__ explicit Looks(const float* exchange) {
        u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        row = kept(exchange + warp * TILE_COLS + 4 * lane);
        squares = kept(exchange + (warp + lane / 8 * WARPS) * (TILE_COLS / TILE_ROWS) + lane % 8);
    }
};

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
    __device__ __forceinline__ void look_for(const Looks& looks) {
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) value[i] = has(i) ? look(from(looks, i)) : 0.0f;
    }

    __device__ __forceinline__ static const float* from(const Looks& looks, u32 i) {
        return looks.squares + sums_of(PHASE) + 4 * i * WARPS * (TILE_COLS / TILE_ROWS);
    }

    // Waits for them, and leaves this lane's part of their sum.
    __device__ __forceinline__ void post(const Looks& looks, u32 round, u32 base, u32 turn) {
        u32 any, mask = mask_of(round);
        do {
            any = 0;
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) {
                u32 one = has(i) ? missing(value[i], mask) & 1 : 0;
                look_again(value[i], from(looks, i), one);
                any |= one;
            }
        } while (__any_sync(ALL_LANES, any));
        float part = 0.0f;
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) part += without_round(value[i]);
        store_shared(base + SHARED_AT(squares) + 4 * (turn * THREADS + threadIdx.x), 0, __float_as_uint(part));
        squares_are_posted(base);
    }
};

// A warp's activations of a phase.
template <u32 PHASE>
struct Activations {
    u32 words;                    // quantised, where they are in shared memory: [layer][column][32]
    float step[layers_of(PHASE)]; // max|u| / 127
    int total[layers_of(PHASE)];  // this lane's part of the sum of the integers
    Squares<PHASE> squares;
};

// Waits for the activations of this warp's columns and quantises them, four a lane of each column: a warp needs no others.
// `norms` are the second norms' weights of i, f and g, [3][D]; `meanwhile` is done while the first look is on its way.
// Synchronises the workers.
template <u32 PHASE, class Meanwhile>
__device__ __forceinline__ void receive(const Looks& looks, u32 base, u32 round, u32 turn, Patience& patience,
                                        const float* norms, Activations<PHASE>& to, Meanwhile meanwhile) {
    constexpr u32 N = inputs_of(PHASE), LAYERS = layers_of(PHASE), COLUMNS = columns_of(PHASE);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, largest_at = base + SHARED_AT(largest) + 12 * WARPS * turn;
    auto channel = [&](u32 k) { return (warp + k * WARPS) * TILE_COLS + 4 * lane; };
    auto is_inside = [&](u32 k) { return (k + 1) * WARPS * TILE_COLS <= N || channel(k) < N; };
    auto place = [&](u32 k) { return looks.row + place_of(PHASE) + k * WARPS * TILE_COLS; };
    float4 v[COLUMNS][LAYERS], norm[COLUMNS][LAYERS];
    if (PHASE == MIX)
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k)
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j)
                norm[k][j] = is_inside(k) ? *(const float4*)(norms + j * N + channel(k)) : make_float4(0, 0, 0, 0);
    patience.wait();
#pragma unroll
    for (u32 k = 0; k < COLUMNS; ++k) v[k][0] = is_inside(k) ? look4(place(k)) : make_float4(0, 0, 0, 0);
    meanwhile();
    u32 mask = mask_of(round), early_looks = 0;
    for (;; ++early_looks) {
        u32 one[COLUMNS], any = 0;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) any |= one[k] = is_inside(k) ? missing(v[k][0], mask) & 1 : 0;
        if (!__any_sync(ALL_LANES, any)) break;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) look_again(v[k][0], place(k), one[k]);
    }
    to.squares.look_for(looks);
    patience.learn(early_looks);
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
        if (lane == 0) store_shared(largest_at + 4 * warp, 4 * j * WARPS, of_warp);
    }
    sync_workers();
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) {
        u32 of_warp = lane < WARPS ? load_shared(largest_at + 4 * lane, 4 * j * WARPS) : 0;
        float largest = fmaxf(__uint_as_float(__reduce_max_sync(ALL_LANES, of_warp)), 1e-35f);
        to.step[j] = largest * (1.0f / 127.0f);
        float factor = 127.0f * reciprocal(largest);
        to.total[j] = 0;
#pragma unroll
        for (u32 k = 0; k < COLUMNS; ++k) {
            u32 word = round4(v[k][j] * factor);
            store_shared(to.words + 4 * lane, (j * COLUMNS + k) * 128, word);
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
    // Of a layer.
    static constexpr u32 MOST_ROWS = most_rows_of(PHASE);
    static constexpr bool EARLY = is_early(PHASE);
    // The activations of all columns stay in registers through the rows.
    static constexpr bool KEEPS = Column::IS_SMALL || COLUMNS <= 4;

    // Rows of the stage that begins at a row of a layer: fewer in its last one.
    __device__ __forceinline__ static u32 rows_from(u32 first, u32 layer_rows) {
        return ROWS == 1 ? 1 : min(ROWS, layer_rows - first);
    }
};

// The tiles of a warp that are in registers early.
template <u32 PHASE>
struct EarlyTiles {
    using S = Steps<PHASE>;
    uint4 tile[S::EARLY ? S::LAYERS : 1][S::EARLY ? S::MOST_ROWS : 1][S::COLUMNS];
};

// Waits for a phase's first stage, or takes all of its tiles to registers if they are few.
template <u32 PHASE>
__device__ __forceinline__ void take_first(Rows& way, u32 rows, EarlyTiles<PHASE>& early) {
    using S = Steps<PHASE>;
    u32 layer_rows = rows / S::LAYERS;
    if constexpr (S::EARLY) {
        way.take_all<PHASE>(rows);
#pragma unroll
        for (u32 j = 0; j < S::LAYERS; ++j)
#pragma unroll
            for (u32 r = 0; r < S::MOST_ROWS; ++r)
#pragma unroll
                for (u32 k = 0; k < S::COLUMNS; ++k) early.tile[j][r][k] = way.tile<PHASE>(j * layer_rows + r, k, rows - 1);
        way.release_all<PHASE>(rows);
    } else {
        way.take<PHASE>(0);
    }
}

// Words of the sums of a row of tiles.
constexpr u32 ROW_SUMS = QUADS * TILE_ROWS * 4;

// Adds up over the four lanes of a row the parts of N rows of tiles, two rows at a time, and leaves the first `count` sums
// from a place on, without `total`.
template <u32 N>
__device__ __forceinline__ void leave_sums(const int2 (&parts)[N], int total, u32 to, u32 count) {
    u32 odd = threadIdx.x % 2, upper = threadIdx.x / 2 % 2;
    int sums[(N + 1) / 2];
#pragma unroll
    for (u32 i = 0; i < N; i += 2) {
        // Odd lanes get the second row; the upper two lanes then channels g + 8.
        int2 a = parts[i], b = parts[i + 1 < N ? i + 1 : i];
        int low = (odd ? b.x : a.x) + __shfl_xor_sync(ALL_LANES, odd ? a.x : b.x, 1);
        int high = (odd ? b.y : a.y) + __shfl_xor_sync(ALL_LANES, odd ? a.y : b.y, 1);
        sums[i / 2] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, 2) - total;
    }
#pragma unroll
    for (u32 i = 0; i < N; i += 2)
        if (i + odd < count) store_shared(to, 4 * i * ROW_SUMS, sums[i / 2]);
}

// Leaves this warp's part of a phase's product: [layer][row][quad of warps][channel of the row][warp of the quad]. A lane's
// first place is `to`. In place of rows that a block does not have its last one is multiplied again, and nobody reads those sums.
template <u32 PHASE>
__device__ __forceinline__ void product(const Activations<PHASE>& activations, const EarlyTiles<PHASE>& early, u32 to,
                                        u32 rows, Rows& way) {
    using S = Steps<PHASE>;
    constexpr u32 COLUMNS = S::COLUMNS;
    u32 layer_rows = rows / S::LAYERS;
    auto read = [&](u32 j, u32 k, Column& column) { column.read(activations.words + (j * COLUMNS + k) * 128); };
    // Makes up for codes t + 1.
    int total[S::LAYERS];
    int2 parts[S::LAYERS][S::EARLY ? S::MOST_ROWS : 1];
#pragma unroll
    for (u32 j = 0; j < S::LAYERS; ++j) {
        Column columns[S::KEEPS ? COLUMNS : 1];
        if (S::KEEPS)
#pragma unroll
            for (u32 k = 0; k < COLUMNS; ++k) read(j, k, columns[S::KEEPS ? k : 0]);
        total[j] = __reduce_add_sync(ALL_LANES, activations.total[j]);
        auto part = [&](const uint4* tiles) {
            Dots dots;
#pragma unroll
            for (u32 k = 0; k < COLUMNS; ++k) {
                Column& column = columns[S::KEEPS ? k : 0];
                if (!S::KEEPS) read(j, k, column);
                dots.add(tiles[k], column);
            }
            return dots.sums();
        };
        if constexpr (S::EARLY) {
#pragma unroll
            for (u32 r = 0; r < S::MOST_ROWS; ++r) parts[j][r] = part(early.tile[j][r]);
        } else {
            u32 first = 0;
#pragma unroll 1
            do {
                u32 count = S::rows_from(first, layer_rows);
                if (!S::ONE_STAGE && (j > 0 || first > 0)) way.take<PHASE>(j * layer_rows + first);
                int2 of_stage[S::ROWS];
                uint4 tiles[S::ROWS][COLUMNS];
#pragma unroll
                for (u32 r = 0; r < S::ROWS; ++r)
#pragma unroll
                    for (u32 k = 0; k < COLUMNS; ++k)
                        tiles[r][k] = way.tile<PHASE>((S::ONE_STAGE ? j * layer_rows : 0) + r, k, (S::ONE_STAGE ? rows : count) - 1);
#pragma unroll
                for (u32 r = 0; r < S::ROWS; ++r) of_stage[r] = part(tiles[r]);
                if (!S::ONE_STAGE) way.release<PHASE>(count);
                leave_sums(of_stage, total[j], to + 4 * (j * S::MOST_ROWS + first) * ROW_SUMS, S::MOST_ROWS - first);
                first += S::ROWS;
            } while (!S::ONE_STAGE && first < layer_rows);
        }
    }
    if constexpr (S::EARLY)
#pragma unroll
        for (u32 j = 0; j < S::LAYERS; ++j) leave_sums(parts[j], total[j], to + 4 * j * S::MOST_ROWS * ROW_SUMS, S::MOST_ROWS);
    else if (S::ONE_STAGE) way.release<PHASE>(rows);
}

// Of the phase that has most: words of a warp's activations, and a block's partial sums.
template <u32 PHASE>
constexpr u32 WORDS_OF = layers_of(PHASE) * columns_of(PHASE) * 32;
constexpr u32 WARP_WORDS = larger_of(WORDS_OF<MIX>, WORDS_OF<DOWN>);
constexpr u32 SUMS = larger_of(larger_of(3 * most_rows_of(MIX), most_rows_of(GLU)), most_rows_of(HEAD)) * ROW_SUMS;

// The host allocates both.
#ifdef NUM_SHARED_BYTES
static_assert(SHARED_BYTES + RING_TILES * TILE_BYTES + 4 * (SUMS + WARPS * WARP_WORDS + 2 * 4 * OWN_FLOATS) == NUM_SHARED_BYTES,
              "the host computes this number");
static_assert(place_of(PHASES) == NUM_EXCHANGE_FLOATS, "the host computes this number");
#endif

// ---- The walk ----

// Channel k of a token's embedding.
__device__ __forceinline__ float embedding(const Args& a, u32 token, u32 k) {
    return embedding_at(a.embeddings, a.embedding_type, (size_t)token * WIDTH + k);
}

// Where a lane leaves its sum of the first row of tiles, or, an odd lane, of the second one.
__device__ __forceinline__ u32 first_place(const int* sums) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 channel = lane / 4 + TILE_ROWS / 2 * (lane / 2 % 2);
    return shared_address(sums + lane % 2 * ROW_SUMS + (warp / 4 * TILE_ROWS + channel) * 4 + warp % 4);
}

// Where the sums of a block's channel are.
__device__ __forceinline__ u32 place_of_sum(const int* sums, u32 k) {
    return shared_address(sums + k / TILE_ROWS * ROW_SUMS + k % TILE_ROWS * 4);
}

// What a thread knows of its block.
struct Walker {
    const Args& a;
    // Addresses in shared memory.
    u32 words;        // of this warp's activations
    u32 sums;         // where this lane leaves the first sum
    u32 own_sums;     // of this thread's channel in the first layer of a phase
    u32 own_vectors;  // this thread's, of this phase and the next
    Looks looks;
    Rows& way;
    u32 turn;
    Patience patience[PHASES];

    // Waits for a phase's row and multiplies. Then the sums are there for those who read them, with their factors:
    // R max|u| / 127.
    template <u32 PHASE>
    __device__ __forceinline__ void run(u32 layer, u32 round, u32 rows, bool reads_sums, float (&factor)[layers_of(PHASE)],
                                        const float* norms = nullptr) {
        turn ^= 1;
        Activations<PHASE> activations = {words};
        EarlyTiles<PHASE> early;
        way.begin<PHASE>(a, layer);
        receive<PHASE>(looks, way.base, round, turn, patience[PHASE], norms, activations,
                       [&] { take_first<PHASE>(way, rows, early); });
        activations.squares.post(looks, round, way.base, turn);
        product<PHASE>(activations, early, sums, rows, way);
        wait_for_sums();
        if (reads_sums) {
            float r = __uint_as_float(load_shared(way.base + 4 * turn, SHARED_AT(row_factor)));
#pragma unroll
            for (u32 j = 0; j < layers_of(PHASE); ++j) factor[j] = activations.step[j] * r;
        }
    }

    // Vector `which` at this thread's own channel.
    __device__ __forceinline__ float own_vector(u32 which) const {
        return __uint_as_float(load_shared(own_vectors + 16 * turn * OWN_FLOATS, 4 * which * OWN_FLOATS));
    }

    // The product's sum for this thread's own channel, so many rows of tiles further on.
    __device__ __forceinline__ int own_sum(u32 rows = 0) const { return sum_at(own_sums + 4 * rows * ROW_SUMS); }

    __device__ __forceinline__ static int sum_at(u32 from) {
        int sum = 0;
#pragma unroll
        for (u32 q = 0; q < QUADS; ++q) {
            uint4 part = load_shared_4(from, 16 * q * TILE_ROWS);
            sum += part.x + part.y + (part.z + part.w);
        }
        return sum;
    }

    // Adds a mixer's output to the residual stream of this thread's own channel; gives x w1 of the norm behind it.
    __device__ __forceinline__ float add_output(float& x, float factor) const {
        x = x + dequantize(own_sum(), factor);
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
    if (threadIdx.x == THREADS) make_barriers(shared);
    // Parts of warps that do not exist stay 0.
    for (u32 k = threadIdx.x; k < SUMS; k += ALL_THREADS) sums[k] = 0;
    __syncthreads();
    if (warp == WARPS) {
        if (threadIdx.x % 32 == 0) fetch_weights(a, shared, ring);
        return;
    }
    float* own_vectors = (float*)(all_words + WARPS * WARP_WORDS);
    if (warp > WARPS) return serve(a, shared, own_vectors);

    Rows way(shared, ring);
    Walker walker = {a,
                     kept(shared_address(all_words + warp * WARP_WORDS)),
                     kept(first_place(sums)),
                     kept(place_of_sum(sums, threadIdx.x)),
                     kept(shared_address(own_vectors + threadIdx.x)),
                     Looks(a.exchange),
                     way,
                     0,
                     {}};
    u32 rows = kept(plan.part[OUT].rows), inner_rows = kept(plan.part[GLU].rows);
    u32 value_sums = kept(place_of_sum(sums, threadIdx.x + plan.part[GLU].second_at));
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
                    walker.run<MIX>(layer, round, 3 * rows, has_warp_channels, f, v + WIDTH);
                    if (has_warp_channels) {
                        float g = 0.0f, y = 0.0f, h = 0.0f, w = 0.0f;
                        if (has_channel) {
                            constexpr u32 ROWS = most_rows_of(MIX);
                            float i_gate = dequantize(walker.own_sum(), gamma[0] * f[0]);
                            float f_gate = dequantize(walker.own_sum(ROWS), gamma[1] * f[1]);
                            g = dequantize(walker.own_sum(2 * ROWS), gamma[2] * f[2]);
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
                    walker.run<OUT>(layer, round, rows, has_warp_channels, f);
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
                walker.run<GLU>(layer, round, inner_rows, has_warp_inner, f);
                if (has_warp_inner) {
                    float y = 0.0f, w = 0.0f;
                    if (has_inner) {
                        y = quick_silu(dequantize(walker.own_sum(), gamma * f[0])) *
                            dequantize(walker.sum_at(value_sums), gamma * f[0]);
                        w = walker.own_vector(0);
                    }
                    send_channel<DOWN>(a, has_inner, inner_channel, y * w, y * y, round);
                }
            }
            if (channels > 0) {
                bool is_last = layer + 1 == a.layers;
                float gamma = __ldg(gammas + 5), f[1];
                walker.run<DOWN>(layer, round, rows, has_warp_channels, f);
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
            walker.run<HEAD>(a.layers, token_round + 1, plan.part[HEAD].rows, true, f);
            u64 mine = 0;
            bool finite = true;
#pragma unroll 1
            for (u32 k = threadIdx.x; k < plan.part[HEAD].channels; k += THREADS) {
                u32 id = plan.part[HEAD].channel + k;
                float logit = dequantize(walker.sum_at(place_of_sum(sums, k)), gamma * f[0]);
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
