// Steps of a batch of sequences, a token of each, in one launch: a persistent grid of one block an SM.
//
// A layer is four products with what lies between them. Products are cut into units of 128 rows by a part of K, rows
// (tokens) belong to blocks; both are the same ones in every layer. There is no barrier of the grid: two counters say how many
// rows have been quantised and how many units' sums have been stored, and who needs all of them waits for that. One warp
// streams the block's weights through a ring in shared memory, through phases and layers, as far ahead as there is room;
// one waits for quantised rows and brings them; the others multiply, and in between compute the block's rows.
//
// Integers are exact, and floats come from the functions of the kernels of single steps: the same bits.

enum Phase { MIX, OUT, GLU, DOWN, HEAD, PHASES };  // products; all but the last in every layer

constexpr u32 TOKENS = 64;                       // of a tile of activations
constexpr u32 TILE_BYTES = TOKENS * TILE_COLS;
constexpr u32 UNIT_TILES = 8;                    // row tiles of a unit
constexpr u32 WEIGHT_BYTES = UNIT_TILES * 512;   // of a stage of weights: a column of a unit's tiles
constexpr u32 MOST_STAGES = 32;
constexpr u32 MOST_ROWS = 2;                     // of a block
constexpr u32 WIDTH_TILES = WIDTH / TILE_COLS, INNER_TILES = (INNER + TILE_COLS - 1) / TILE_COLS;
constexpr u32 WIDTH_FOURS = WIDTH / 4, INNER_FOURS = INNER / 4;
constexpr u32 WIDTH_PER = (WIDTH_FOURS + CONSUMERS - 1) / CONSUMERS, INNER_PER = (INNER_FOURS + CONSUMERS - 1) / CONSUMERS;
constexpr u32 LAYER_FLOATS = 9 * WIDTH + INNER;
constexpr u32 GAMMAS = 6;                        // of a layer

__device__ constexpr u32 col_tiles_of(u32 phase) { return phase == DOWN ? INNER_TILES : WIDTH_TILES; }
__device__ constexpr u32 row_tiles_of(u32 phase) {
    return ((phase == MIX ? 3 * WIDTH : phase == GLU ? 2 * INNER : phase == HEAD ? VOCAB : WIDTH) + TILE_ROWS - 1) / TILE_ROWS;
}
__device__ constexpr u32 tiles_before(u32 phase) {
    u32 tiles = 0;
    for (u32 p = 0; p < phase; ++p) tiles += row_tiles_of(p) * col_tiles_of(p);
    return tiles;
}
__device__ constexpr u32 columns_of(u32 phase) { return row_tiles_of(phase) * TILE_ROWS; }

struct Counters {
    u32 rows, pad[31];   // quantised: blocks that have finished theirs, phase after phase
    u32 sums, pad2[31];  // stored
    u32 ended, pad3[31];
};

struct Args {
    const uint4* weights;    // tiles of all layers
    const float* vectors;
    const float* gammas;     // [L][6], then the head's
    const void* embeddings;  // [V][D]
    float* x;                // residual stream [M][D]
    float* const* states;    // [M], each [L][D]
    u32* tokens;             // [M]: those of the first step; then those that the last one chose
    u32* history;            // [steps][M]: tokens that each step chose
    float* logits;           // [M][V] of the last step; null if nobody wants them
    u32* not_finite;         // set to 1 if a logit is not
    int* sums;               // for each phase [capacity][columns]; zeros where parts of K are added
    i8* q[PHASES];           // inputs of the products, tiled as `Quantized`
    Counters* counters;      // zeros, and left so
    u64 sums_at[PHASES];
    u32 splits[PHASES];
    u32 m, capacity, layers; // sequences, and padded to whole tiles
    u32 steps;
    u32 embedding_type;      // as `embedding` says
    u32 input_stages, weight_stages;
    float eps;
};

// ---- Counters ----

__device__ __forceinline__ void count_up(u32* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait_for_count(const u32* counter, u32 target) {
    u32 count;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    } while ((int)(count - target) < 0);
}

// ---- Units ----

struct Unit {
    u32 row_block, begin, end;  // column tiles
};

// A step's products, one after the other.
__device__ __forceinline__ u32 products_of(const Args& a) { return a.layers * HEAD + 1; }
__device__ __forceinline__ u32 phase_of(const Args& a, u32 product) {
    return product == a.layers * HEAD ? (u32)HEAD : product % HEAD;
}

struct Product {
    u32 row_blocks, units, col_tiles, splits;

    __device__ __forceinline__ Product(const Args& a, u32 phase) {
        row_blocks = (row_tiles_of(phase) + UNIT_TILES - 1) / UNIT_TILES;
        col_tiles = col_tiles_of(phase);
        splits = a.splits[phase];
        units = row_blocks * splits;
    }
    __device__ __forceinline__ Unit unit(u32 u) const {
        u32 split = u / row_blocks;
        return {u - split * row_blocks, col_tiles * split / splits, col_tiles * (split + 1) / splits};
    }
};

// A ring's place, and the parity of its use.
struct Place {
    u32 stage = 0, parity = 0;

    __device__ __forceinline__ void advance(u32 stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

struct Shared {
    u64 input_full[MOST_STAGES], input_empty[MOST_STAGES], weight_full[MOST_STAGES], weight_empty[MOST_STAGES];
    float scalar;
    // Of the block's rows: scales and sums of the integers of the last quantisation.
    float scale[MOST_ROWS][3];
    int total[MOST_ROWS][3];
    u32 token[MOST_ROWS];
    u64 keys[CONSUMERS / 32];
    QuantizerMemory<1> one;
    QuantizerMemory<3> three;
};

// ---- The streams ----

// Arrives at the barrier when the thread's copies so far are there.
__device__ __forceinline__ void arrive_behind_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// One warp.
__device__ __forceinline__ void stream_weights(const Args& a, Shared& shared, u8* ring) {
    u32 lane = threadIdx.x % 32;
    Place place;
    for (u32 step = 0; step < a.steps; ++step)
        for (u32 p = 0; p < products_of(a); ++p) {
            u32 phase = phase_of(a, p);
            Product product(a, phase);
            size_t first = (size_t)(p / HEAD) * tiles_before(HEAD) + (phase == HEAD ? 0 : tiles_before(phase));
            const uint4* from = a.weights + first * 32;
            for (u32 u = blockIdx.x; u < product.units; u += gridDim.x) {
                Unit unit = product.unit(u);
                u32 row_tile = unit.row_block * UNIT_TILES;
                u32 row_tiles = min(UNIT_TILES, row_tiles_of(phase) - unit.row_block * UNIT_TILES);
                const uint4* tile = from + ((size_t)row_tile * product.col_tiles + unit.begin) * 32 + lane;
                for (u32 c = unit.begin; c < unit.end; ++c, tile += 32) {
                    u32 full = shared_address(shared.weight_full + place.stage);
                    wait_for(shared_address(shared.weight_empty + place.stage), place.parity ^ 1);
                    // A bulk copy keeps the multiprocessor's engine busy for 60 cycles, however short it is.
                    u32 to = shared_address(ring + place.stage * WEIGHT_BYTES) + lane * 16;
#pragma unroll
                    for (u32 r = 0; r < UNIT_TILES; ++r)
                        if (r < row_tiles) async_copy_16(to + r * 512, tile + (size_t)r * product.col_tiles * 32);
                    arrive_behind_copies(full);
                    place.advance(a.weight_stages);
                }
            }
        }
}

// One warp.
__device__ __forceinline__ void stream_inputs(const Args& a, Shared& shared, u8* ring, u32 row_blocks) {
    Place place;
    u32 token_tiles = a.capacity / TOKENS, rows = 0, lane = threadIdx.x % 32;
    for (u32 step = 0; step < a.steps; ++step)
        for (u32 p = 0; p < products_of(a); ++p) {
            u32 phase = phase_of(a, p);
            Product product(a, phase);
            rows += row_blocks;
            if (blockIdx.x >= product.units) continue;
            if (lane == 0) wait_for_count(&a.counters->rows, rows);
            __syncwarp();
            for (u32 u = blockIdx.x; u < product.units; u += gridDim.x) {
                Unit unit = product.unit(u);
                u32 segment = phase == MIX ? unit.row_block / (WIDTH / TILE_ROWS / UNIT_TILES) : 0;
                const i8* from = a.q[phase] + (size_t)segment * token_tiles * product.col_tiles * TILE_BYTES;
                for (u32 c = unit.begin; c < unit.end; ++c) {
                    u32 full = shared_address(shared.input_full + place.stage);
                    wait_for(shared_address(shared.input_empty + place.stage), place.parity ^ 1);
                    u8* to = ring + place.stage * (TOKEN_TILES * TILE_BYTES);
                    for (u32 t = 0; t < token_tiles; ++t) {
                        const i8* tile = from + ((size_t)t * product.col_tiles + c) * TILE_BYTES + lane * 16;
#pragma unroll
                        for (u32 k = 0; k < TILE_BYTES; k += 512) async_copy_16(to + t * TILE_BYTES + k + lane * 16, tile + k);
                    }
                    arrive_behind_copies(full);
                    place.advance(a.input_stages);
                }
            }
        }
}

// ---- Products ----

// A warp's part of a tile of a unit, as registers of the first operand.
__device__ __forceinline__ void take_codes(const Args& a, Shared& shared, const u8* weights, Place& place, u32 row_tile,
                                           u32 (&codes)[4][4]) {
    wait_for(shared_address(shared.weight_full + place.stage), place.parity);
    // Rows beyond the last tile multiply what happens to lie there; they are dropped.
    unpack(((const uint4*)(weights + place.stage * WEIGHT_BYTES + row_tile * 512))[threadIdx.x % 32], codes);
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared_address(shared.weight_empty + place.stage));
    place.advance(a.weight_stages);
}

// Multiplies and stores one unit's sums: [tokens][columns].
__device__ __forceinline__ void multiply_unit(const Args& a, Shared& shared, const u8* inputs, const u8* weights,
                                              Place& input, Place& weight, u32 tiles, int* out, u32 columns,
                                              u32 unit_columns, bool adds) {
    u32 lane = threadIdx.x % 32, row_tile = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int d[TOKEN_TILES][TOKENS / 2];
#pragma unroll
    for (u32 n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (u32 i = 0; i < TOKENS / 2; ++i) d[n][i] = 0;
    // While a tile is multiplied, the next one's codes are unpacked, and its activations waited for; it follows without a gap.
    constexpr u32 NONE = ~0u;
    u32 even[4][4], odd[4][4], left = tiles, before = NONE;
    auto wait_for_input = [&] {
        wait_for(shared_address(shared.input_full + input.stage), input.parity);
        // What was written by ordinary stores is read by the tensor cores.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    };
    auto release = [&] {
        if (lane == 0 && before != NONE) arrive(shared_address(shared.input_empty + before));
    };
    auto multiply = [&](u32 (&codes)[4][4], u32 (&next)[4][4]) {
        u32 address = shared_address(inputs) + input.stage * (TOKEN_TILES * TILE_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 f = 0; f < 4; ++f)
#pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; ++n)
                wgmma(d[n], codes[f][0], codes[f][1], codes[f][2], codes[f][3],
                      descriptor<TOKENS>(address + n * TILE_BYTES + 2 * f * TOKENS * 16));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release();
        before = input.stage;
        input.advance(a.input_stages);
        if (--left > 0) {
            take_codes(a, shared, weights, weight, row_tile, next);
            wait_for_input();
        }
    };
    take_codes(a, shared, weights, weight, row_tile, even);
    wait_for_input();
#pragma unroll 1
    for (;;) {
        multiply(even, odd);
        if (left == 0) break;
        multiply(odd, even);
        if (left == 0) break;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release();
    if (row_tile * TILE_ROWS < unit_columns) {
        int* to = out + row_tile * TILE_ROWS + g;
#pragma unroll
        for (u32 n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (u32 i = 0; i < TOKENS / 2; i += 4)
#pragma unroll
                for (u32 side = 0; side < 2; ++side) {
                    u32 token = n * TOKENS + 2 * i + 2 * t + side;
                    if (token >= a.m) continue;
                    int* at = to + (size_t)token * columns;
                    if (adds) {
                        atomicAdd(at, d[n][i + side]);
                        atomicAdd(at + 8, d[n][i + 2 + side]);
                    } else {
                        at[0] = d[n][i + side];
                        at[8] = d[n][i + 2 + side];
                    }
                }
    }
    sync_row();
    // No branch, for behind one the compiler would serialise the next unit's instructions.
    asm volatile("{ .reg .pred p; setp.eq.u32 p, %1, 0; @p red.release.gpu.global.add.u32 [%0], 1; }" ::"l"(&a.counters->sums),
                 "r"(threadIdx.x)
                 : "memory");
}

// ---- Rows ----

// Sums of a row's product from a column on, as floats.
template <u32 PER>
struct RowSums {
    int4 sum[PER] = {};
    float factor;
    int total;

    // Of a layer's input of the product; before the sums are there.
    __device__ __forceinline__ RowSums(const Shared& shared, u32 own, u32 layer, float gamma)
        : factor(gamma / shared.scale[own][layer]), total(shared.total[own][layer]) {}

    __device__ __forceinline__ void ask(const Args& a, u32 phase, u32 columns, u32 m, u32 column, u32 fours) {
        int4* from = (int4*)(a.sums + a.sums_at[phase] + (size_t)m * columns + column);
        each<PER>(fours, [&](u32 i, u32 k) { sum[i] = from[k]; });
        if (a.splits[phase] > 1) each<PER>(fours, [&](u32, u32 k) { from[k] = make_int4(0, 0, 0, 0); });
    }
    __device__ __forceinline__ float4 get(u32 i) const {
        int4 v = sum[i];
        return dequantize(make_int4(v.x - total, v.y - total, v.z - total, v.w - total), factor);
    }
};

// Waits until the sums of a product are there. By all consumers.
__device__ __forceinline__ void wait_for_sums(const Args& a, u32 sums) {
    if (threadIdx.x == 0) wait_for_count(&a.counters->sums, sums);
    sync_row();
}

template <u32 LAYERS, u32 PER>
__device__ __forceinline__ void quantize_row(const float4 (&row)[PER], u32 fours, const Held<float4, PER> (&weights)[LAYERS],
                                             i8* to, const Args& a, u32 m, QuantizerMemory<LAYERS>& memory, Shared& shared,
                                             u32 own) {
    Quantized q = {to, nullptr, nullptr, a.capacity, (fours * 4 + TILE_COLS - 1) / TILE_COLS * TILE_COLS, TOKENS};
    float scale[LAYERS];
    store_quantized(row, fours, weights, q, m, memory, scale);
    sync_row();
    if (threadIdx.x == 0)
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j) {
            shared.scale[own][j] = scale[j];
            shared.total[own][j] = memory.totals[j];
        }
}

__device__ __forceinline__ float embedding(const Args& a, size_t at) {
    if (a.embedding_type == 0) return ((const float*)a.embeddings)[at];
    unsigned short bits = ((const unsigned short*)a.embeddings)[at];
    return a.embedding_type == 1 ? f16_to_f32(bits) : __uint_as_float((u32)bits << 16);
}

// x += the last product's output, or becomes the token's embedding where there is none, and is quantised for one or three
// layers.
template <u32 LAYERS>
__device__ __forceinline__ void residual_row(const Args& a, Shared& shared, QuantizerMemory<LAYERS>& memory, u32 own,
                                             u32 phase, float gamma, u32 sums, const float* norm_from,
                                             const float* weights_from, i8* to) {
    u32 m = blockIdx.x + own * gridDim.x;
    Held<float4, WIDTH_PER> norm, weights[LAYERS];
    norm.ask(norm_from, WIDTH_FOURS);
#pragma unroll
    for (u32 j = 0; j < LAYERS; ++j) weights[j].ask(weights_from + j * WIDTH, WIDTH_FOURS);
    float4* x = (float4*)(a.x + (size_t)m * WIDTH);
    float4 row[WIDTH_PER] = {};
    if (phase == MIX) {
        size_t from = (size_t)shared.token[own] * WIDTH;
        each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) {
            x[k] = row[i] = make_float4(embedding(a, from + 4 * k), embedding(a, from + 4 * k + 1),
                                        embedding(a, from + 4 * k + 2), embedding(a, from + 4 * k + 3));
        });
    } else {
        each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) { row[i] = x[k]; });
        RowSums<WIDTH_PER> added(shared, own, 0, gamma);
        if (own == 0) wait_for_sums(a, sums);
        added.ask(a, phase, WIDTH, m, 0, WIDTH_FOURS);
        each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) {
            row[i] = row[i] + added.get(i);
            x[k] = row[i];
        });
    }
    float r = row_inverse_rms(row, WIDTH_FOURS, a.eps, &shared.scalar);
    each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) { row[i] = row[i] * r * norm.get(i, k); });
    quantize_row<LAYERS>(row, WIDTH_FOURS, weights, to, a, m, memory, shared, own);
}

// One step of the recurrence, the gate, and the quantiser.
__device__ __forceinline__ void step_row(const Args& a, Shared& shared, u32 own, u32 layer, u32 sums) {
    u32 m = blockIdx.x + own * gridDim.x;
    const float *vectors = a.vectors + (size_t)layer * LAYER_FLOATS, *gammas = a.gammas + layer * GAMMAS;
    Held<float4, WIDTH_PER> norm, weights[1], beta;
    beta.ask(vectors + 4 * WIDTH, WIDTH_FOURS);
    norm.ask(vectors + 5 * WIDTH, WIDTH_FOURS);
    weights[0].ask(vectors + 6 * WIDTH, WIDTH_FOURS);
    float4* states = (float4*)(a.states[m] + (size_t)layer * WIDTH);
    float4 row[WIDTH_PER] = {}, h[WIDTH_PER] = {};
    each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) { h[i] = states[k]; });
    RowSums<WIDTH_PER> i_sums(shared, own, 0, gammas[0]), f_sums(shared, own, 1, gammas[1]), g(shared, own, 2, gammas[2]);
    if (own == 0) wait_for_sums(a, sums);
    i_sums.ask(a, MIX, 3 * WIDTH, m, 0, WIDTH_FOURS);
    f_sums.ask(a, MIX, 3 * WIDTH, m, WIDTH, WIDTH_FOURS);
    g.ask(a, MIX, 3 * WIDTH, m, 2 * WIDTH, WIDTH_FOURS);
    each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) {
        float4 b = beta.get(i, k), forget = b + (1.0f - b) * sigmoid(f_sums.get(i));
        h[i] = forget * h[i] + silu(i_sums.get(i)) * (1.0f - forget);
        states[k] = h[i];
        row[i] = g.get(i);
    });
    float r = row_inverse_rms(row, WIDTH_FOURS, a.eps, &shared.scalar);
    each<WIDTH_PER>(WIDTH_FOURS, [&](u32 i, u32 k) { row[i] = row[i] * r * norm.get(i, k) * silu(h[i]); });
    quantize_row<1>(row, WIDTH_FOURS, weights, a.q[OUT], a, m, shared.one, shared, own);
}

// The gated unit, and the quantiser.
__device__ __forceinline__ void glu_row(const Args& a, Shared& shared, u32 own, u32 layer, u32 sums) {
    u32 m = blockIdx.x + own * gridDim.x;
    Held<float4, INNER_PER> weights[1];
    weights[0].ask(a.vectors + (size_t)layer * LAYER_FLOATS + 9 * WIDTH, INNER_FOURS);
    float gamma = a.gammas[layer * GAMMAS + 4];
    RowSums<INNER_PER> left(shared, own, 0, gamma), right(shared, own, 0, gamma);
    if (own == 0) wait_for_sums(a, sums);
    left.ask(a, GLU, 2 * INNER, m, 0, INNER_FOURS);
    right.ask(a, GLU, 2 * INNER, m, INNER, INNER_FOURS);
    float4 row[INNER_PER] = {};
    each<INNER_PER>(INNER_FOURS, [&](u32 i, u32 k) { row[i] = silu(left.get(i)) * right.get(i); });
    quantize_row<1>(row, INNER_FOURS, weights, a.q[DOWN], a, m, shared.one, shared, own);
}

// The head's product as logits, and the most likely token, of equals the lowest.
__device__ __forceinline__ void choose_token(const Args& a, Shared& shared, u32 own, u32 sums, u32 step) {
    u32 m = blockIdx.x + own * gridDim.x;
    if (own == 0) wait_for_sums(a, sums);
    const int4* from = (const int4*)(a.sums + a.sums_at[HEAD] + (size_t)m * columns_of(HEAD));
    float factor = a.gammas[a.layers * GAMMAS] / shared.scale[own][0];
    int total = shared.total[own][0];
    float* logits = a.logits && step + 1 == a.steps ? a.logits + (size_t)m * VOCAB : nullptr;
    u64 best = 0;
    bool finite = true;
#pragma unroll 4
    for (u32 k = threadIdx.x; k < (VOCAB + 3) / 4; k += CONSUMERS) {
        int4 sum = from[k];
        const int of[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (u32 c = 0; c < 4; ++c) {
            u32 token = 4 * k + c;
            if (VOCAB % 4 != 0 && token >= VOCAB) break;
            float logit = dequantize(of[c] - total, factor);
            finite = finite && is_finite(logit);
            best = max(best, logit_key(logit, token));
            if (logits) logits[token] = logit;
        }
    }
    if (!finite) *a.not_finite = 1;
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, width));
    if (threadIdx.x % 32 == 0) shared.keys[threadIdx.x / 32] = best;
    sync_row();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < CONSUMERS / 32; ++w) best = max(best, shared.keys[w]);
        u32 token = ~(u32)best;
        shared.token[own] = a.tokens[m] = a.history[(size_t)step * a.m + m] = token;
    }
    sync_row();
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1) batch_step(const __grid_constant__ Args a) {
    __shared__ Shared shared;
    constexpr u32 ROW_BYTES = (WIDTH > INNER ? WIDTH : INNER) * 4;
    u8 *inputs = (u8*)row_memory + (ROW_BYTES + 127) / 128 * 128, *weights = inputs + a.input_stages * (TOKEN_TILES * TILE_BYTES);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < a.input_stages; ++i) {
            make_barrier(shared_address(shared.input_full + i), 32);
            make_barrier(shared_address(shared.input_empty + i), CONSUMERS / 32);
        }
        for (u32 i = 0; i < a.weight_stages; ++i) {
            make_barrier(shared_address(shared.weight_full + i), 32);
            make_barrier(shared_address(shared.weight_empty + i), CONSUMERS / 32);
        }
        fence_barriers();
    }
    __syncthreads();
    u32 row_blocks = min(a.m, gridDim.x);
    u32 warp = threadIdx.x / 32;
    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp == CONSUMERS / 32) stream_weights(a, shared, weights);
        else if (warp == CONSUMERS / 32 + 1) stream_inputs(a, shared, inputs, row_blocks);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        u32 own_rows = a.m > blockIdx.x ? (a.m - blockIdx.x - 1) / gridDim.x + 1 : 0, sums = 0, last = a.layers * HEAD;
        if (threadIdx.x < own_rows) shared.token[threadIdx.x] = a.tokens[blockIdx.x + threadIdx.x * gridDim.x];
        sync_row();
        Place input, weight;
#pragma unroll 1
        for (u32 step = 0; step < a.steps; ++step) {
#pragma unroll 1
            for (u32 p = 0; p <= last; ++p) {
                // The rows in front of a product.
                u32 layer = p / HEAD, phase = phase_of(a, p);
                const float *vectors = a.vectors + (size_t)layer * LAYER_FLOATS, *gammas = a.gammas + layer * GAMMAS;
                sync_row();  // The scales of the last quantisation are there.
#pragma unroll 1
                for (u32 own = 0; own < own_rows; ++own) {
                    if (phase == MIX) {
                        residual_row<3>(a, shared, shared.three, own, p == 0 ? MIX : DOWN,
                                        p == 0 ? 0.0f : gammas[5 - (int)GAMMAS], sums, vectors, vectors + WIDTH, a.q[MIX]);
                    } else if (phase == OUT) {
                        step_row(a, shared, own, layer, sums);
                    } else if (phase == DOWN) {
                        glu_row(a, shared, own, layer, sums);
                    } else {
                        bool is_head = phase == HEAD;
                        residual_row<1>(a, shared, shared.one, own, is_head ? DOWN : OUT,
                                        is_head ? gammas[5 - (int)GAMMAS] : gammas[3], sums,
                                        is_head ? vectors : vectors + 7 * WIDTH,
                                        is_head ? vectors + WIDTH : vectors + 8 * WIDTH, a.q[phase]);
                    }
                }
                if (own_rows > 0) {
                    // The barrier behind the last row was passed by all who have stored.
                    if (threadIdx.x == 0) count_up(&a.counters->rows);
                }
                Product product(a, phase);
                u32 columns = columns_of(phase);
                int* out = a.sums + a.sums_at[phase];
#pragma unroll 1
                for (u32 u = blockIdx.x; u < product.units; u += gridDim.x) {
                    Unit unit = product.unit(u);
                    u32 column = unit.row_block * UNIT_TILES * TILE_ROWS;
                    multiply_unit(a, shared, inputs, weights, input, weight, unit.end - unit.begin,
                                  out + column, columns,
                                  min(UNIT_TILES * TILE_ROWS, columns - column), product.splits > 1);
                }
                sums += product.units;
            }
            for (u32 own = 0; own < own_rows; ++own) choose_token(a, shared, own, sums, step);
        }
    }
    // The last block leaves zeros: no other looks at the counters any more.
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&a.counters->ended) : "memory");
        if (before == gridDim.x - 1) a.counters->rows = a.counters->sums = a.counters->ended = 0;
    }
}
