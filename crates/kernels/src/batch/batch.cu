// Steps of a batch of sequences, a token of each, in one launch: a persistent grid of one block an SM.
//
// Teams of blocks have 16 sequences each, and a warp of every block of the team belongs to each of them; a block owns channels,
// with all rows of the weights that lead to them. Behind a product a warp computes what belongs to its sequence and the block's channels
// (gates, recurrence, residual), once. Then it tells the other owners of the team the largest |u| of its channels and their sum of
// squares, and with those of all it quantises its channels and sends them; and it waits for the whole row, for the next product.
// So rows need no blocks of their own, and there is no barrier of the grid: data tell that they have come.
//
// The weights that a block needs are read once for its 16 sequences, or the 32 of two teams whose blocks share a product, by teams one
// after the other mostly from the L2 cache. u and R are those of the decoding kernel: floats are multiplied in another order than on
// the CPU.

__device__ __forceinline__ float embedding(const Args& a, u32 token, u32 k) {
    return embedding_at(a.embeddings, a.embedding_type, (size_t)token * WIDTH + k);
}

// A sequence's residual stream at own channels, and what the next product's input is made of.
struct Residual {
    float2 x[PAIRS];
    float2 u[3][PAIRS];  // of i, f and g, or the first
    float square;

    // Behind a norm and those of the quantisers.
    __device__ __forceinline__ void normalize(u32 pair, float2 norm, float2 wi, float2 wf, float2 wg) {
        float2 y = x[pair] * norm;
        square += y.x * y.x + 1e-6f * (x[pair].x * x[pair].x);
        square += y.y * y.y + 1e-6f * (x[pair].y * x[pair].y);
        u[0][pair] = y * wi, u[1][pair] = y * wf, u[2][pair] = y * wg;
    }
    __device__ __forceinline__ void clear() {
        square = 0.0f;
#pragma unroll
        for (u32 p = 0; p < PAIRS; ++p) u[0][p] = u[1][p] = u[2][p] = make_float2(0, 0);
    }
    // The first of `u`, for a product of one layer.
    __device__ __forceinline__ void first(float2 (&one)[1][PAIRS]) const {
#pragma unroll
        for (u32 p = 0; p < PAIRS; ++p) one[0][p] = u[0][p];
    }
};

// The token's embedding, and the first layer's norms.
__device__ __forceinline__ void begin_step(const Worker& w, u32 token, Residual& r) {
    r.clear();
#pragma unroll
    for (u32 p = 0; p < PAIRS; ++p) {
        if (tile_of(p) >= w.own.groups) continue;
        u32 first = w.own.begin * TILE_ROWS, channel = first + channel_of(p);
        r.x[p] = make_float2(embedding(w.a, token, channel), embedding(w.a, token, channel + 8));
        auto v = [&](u32 which) { return pair_at(w.a.vectors + which * WIDTH + first, p); };
        r.normalize(p, v(0), v(1), v(2), v(3));
    }
}

// i, f and g, one step of the recurrence, the gate, and o. Gives the factor of its sums.
__device__ __forceinline__ float mix(Worker& w, float* state, u32 layer, u32 round, const Residual& r) {
    const float* v = w.a.vectors + (size_t)layer * LAYER_FLOATS;
    const float* gammas = w.a.gammas + GAMMAS * layer;
    float2 h[PAIRS] = {}, u[1][PAIRS] = {};
    float gamma[3], square[1] = {};
    float* own_state = state + (size_t)layer * WIDTH + w.own.begin * TILE_ROWS;
    auto turn = [&] { w.stream.turn_to(layer, false); };
    if (w.is_real) w.send_row<MIX>(r.u, {r.square}, round, turn);
    else turn();
    float4 vectors = w.ask_vectors<OWN, WIDTH>(v + 4 * WIDTH, 3, w.own);
#pragma unroll
    for (u32 j = 0; j < 3; ++j) gamma[j] = __ldg(gammas + j);
    auto bring_state = [&](float2 (&h)[PAIRS]) {
#pragma unroll
        for (u32 p = 0; p < PAIRS; ++p)
            if (tile_of(p) < w.own.groups) h[p] = pair_at(own_state, p);
    };
    if (w.is_real && MIX_ROUNDS == 1) bring_state(h);
    // Of a pair of own channels. `u` is i first, then the new state: registers are few.
    auto take = [&](u32 p, u32 layer, float2 h) {
        auto sum = [&](u32 j) { return dequantize(w.sum_of<MIX>(p, MIX_ROUNDS > 1 ? 0 : j), gamma[j] * w.step[0][j]); };
        float2& now = u[0][p];
        if (layer == 0) {
            now = sum(0);
        } else if (layer == 1) {
            float2 f = sum(1), beta = w.vector(0, p);
            auto one = [&](float i, float f, float beta, float h) {
                float forget = beta + (1.0f - beta) * quick_sigmoid(f);
                return forget * h + quick_silu(i) * (1.0f - forget);
            };
            now = make_float2(one(now.x, f.x, beta.x, h.x), one(now.y, f.y, beta.y, h.y));
            own_state[channel_of(p)] = now.x, own_state[channel_of(p) + 8] = now.y;
        } else {
            float2 g = sum(2), norm = w.vector(1, p), weight = w.vector(2, p);
            auto one = [&](float g, float h, float norm, float weight) {
                float y = g * norm * quick_silu(h);
                square[0] += y * y + 1e-6f * (g * g);
                return y * weight;
            };
            now = make_float2(one(g.x, now.x, norm.x, weight.x), one(g.y, now.y, norm.y, weight.y));
        }
    };
#pragma unroll 1
    for (u32 number = 0; number < MIX_ROUNDS; ++number) {
        w.multiply<MIX>(round, vectors, number);
        if (w.is_real) {
            float2 state[PAIRS] = {};
            if (MIX_ROUNDS > 1 && number == 1) bring_state(state);
            w.exchange_sums<MIX>(number);
#pragma unroll
            for (u32 p = 0; p < PAIRS; ++p) {
                if (tile_of(p) >= w.own.groups) continue;
#pragma unroll
                for (u32 j = 0; j < layers_at_once_of(MIX); ++j) take(p, number + j, MIX_ROUNDS > 1 ? state[p] : h[p]);
            }
            if (number + 1 < MIX_ROUNDS) w.have_read_inbox();
        }
    }
    w.have_read_sums();
    if (w.is_real) w.send_row<OUT>(u, square, round);
    vectors = w.ask_vectors<OWN, WIDTH>(v + 7 * WIDTH, 2, w.own);
    float factor = __ldg(gammas + 3) * w.step[0][0];
    w.multiply<OUT>(round, vectors);
    return factor;
}

// Adds the product's output to the residual stream, and takes the norms in front of the next product, one or three layers.
template <u32 PHASE>
__device__ __forceinline__ void add_output(Worker& w, Residual& r, float factor) {
    constexpr bool HAS_THREE = PHASE == DOWN;
    r.clear();
    if (w.is_real) {
        w.exchange_sums<PHASE>();
#pragma unroll
        for (u32 p = 0; p < PAIRS; ++p) {
            if (tile_of(p) >= w.own.groups) continue;
            float2 added = dequantize(w.sum_of<PHASE>(p), factor);
            r.x[p].x += added.x, r.x[p].y += added.y;
            float2 none = make_float2(0, 0);
            // Behind the last layer the last two are not used.
            r.normalize(p, w.vector(0, p), w.vector(1, p), HAS_THREE ? w.vector(2, p) : none, HAS_THREE ? w.vector(3, p) : none);
        }
    }
    w.have_read_sums();
}

// The gated unit and down. Gives the factor of its sums.
__device__ __forceinline__ float glu(Worker& w, const Residual& r, u32 layer, u32 round) {
    const float* v = w.a.vectors + (size_t)layer * LAYER_FLOATS;
    if (w.is_real) {
        float2 u[1][PAIRS];
        r.first(u);
        w.send_row<GLU>(u, {r.square}, round);
    }
    Own inner = w.inner();
    float4 vectors = w.ask_vectors<OWN_INNER, 0>(v + 9 * WIDTH, 1, inner);
    float gamma = __ldg(w.a.gammas + GAMMAS * layer + 4);
    float2 u[SHARING][INNER_PAIRS] = {};
    float square[SHARING] = {};
#pragma unroll
    for (u32 number = 0; number < GLU_ROUNDS; ++number) {
        w.multiply<GLU>(round, vectors, number);
        if (!w.is_real) continue;
#pragma unroll
        for (u32 k = 0; k < SHARING; ++k)
#pragma unroll
            for (u32 p = 0; p < INNER_PAIRS; ++p) {
                u32 of_round = GLU_ROUNDS == 1 ? INNER_PAIRS : GLU_GROUPS / 4;
                if (p / of_round != number || tile_of(p) >= inner.groups) continue;
                u32 row = 2 * tile_of(p % of_round);
                float2 gate = dequantize(w.local_sum<GLU>(row, 0, k), gamma * w.step[k][0]);
                float2 value = dequantize(w.local_sum<GLU>(row + 1, 0, k), gamma * w.step[k][0]);
                float2 y = make_float2(quick_silu(gate.x) * value.x, quick_silu(gate.y) * value.y);
                square[k] += y.x * y.x;
                square[k] += y.y * y.y;
                u[k][p] = y * pair_at(w.shared.vectors[w.turn], p);
            }
    }
    w.have_read_sums();
    if (w.is_real) w.send_row<DOWN>(u, square, round);
    // Of the next layer, or the head's two.
    vectors = w.ask_vectors<OWN, WIDTH>(v + LAYER_FLOATS, layer + 1 == w.a.layers ? 2 : 4, w.own);
    float factor = __ldg(w.a.gammas + GAMMAS * layer + 5) * w.step[0][0];
    w.multiply<DOWN>(round, vectors);
    return factor;
}

// The largest logits of own tokens, as keys.
__device__ __forceinline__ void head(Worker& w, const Residual& r, u32 round, bool stores, bool is_last, u64 (&best)[SHARING]) {
    const Args& a = w.a;
    float gamma = __ldg(a.gammas + GAMMAS * a.layers);
    auto turn = [&] { w.stream.turn_to(a.layers, is_last); };
    if (w.is_real) {
        float2 u[1][PAIRS];
        r.first(u);
        w.send_row<HEAD>(u, {r.square}, round, turn);
    } else turn();
    Own own = w.head();
    bool finite[SHARING];
#pragma unroll
    for (u32 k = 0; k < SHARING; ++k) best[k] = 0, finite[k] = true;
#pragma unroll 1
    for (u32 number = 0; number < HEAD_ROUNDS; ++number) {
        w.multiply<HEAD>(round, make_float4(0, 0, 0, 0), number);
        Own rows = own.part(number, HEAD_GROUPS);
        if (!w.is_real) continue;
#pragma unroll
        for (u32 k = 0; k < SHARING; ++k) {
            float* logits = stores && w.is_wanted(k) ? a.logits + (size_t)w.sequence_of(k) * VOCAB : nullptr;
#pragma unroll 2
            for (u32 row = w.lane / 8; row < rows.groups; row += 4) {
                float2 pair = dequantize(w.local_sum<HEAD>(row, 0, k), gamma * w.step[k][0]);
                u32 token = (rows.begin + row) * TILE_ROWS + w.lane % 8;
#pragma unroll
                for (u32 e = 0; e < 2; ++e, token += 8) {
                    if (token >= VOCAB) continue;
                    float logit = e ? pair.y : pair.x;
                    finite[k] = finite[k] && is_finite(logit);
                    best[k] = max(best[k], logit_key(logit, token));
                    if (logits) logits[token] = logit;
                }
            }
        }
    }
    w.have_read_sums();
#pragma unroll
    for (u32 k = 0; k < SHARING; ++k) {
        if (!finite[k] && w.is_wanted(k)) *a.not_finite = 1;
        best[k] = largest_key(best[k]);
    }
}

// The most likely token, when all owners have told theirs. By a warp with a sequence.
__device__ __forceinline__ u32 choose_token(Worker& w, const u64 (&best)[SHARING], u32 round) {
    u64 bit = round & 1 ? ROUND_OF_KEY : 0, of_lane = 0;
    auto keys = [&](u32 which) { return w.a.keys + w.sequence_of(which) * MAKERS; };
#pragma unroll
    for (u32 k = 0; k < SHARING; ++k)
        if (w.lane == 0) send_key(keys(k) + w.owner * SHARING + w.rank, (best[k] & ~ROUND_OF_KEY) | bit);
#pragma unroll
    for (u32 k = 0; k < parts(MAKERS, 32); ++k) {
        u32 maker = w.lane + 32 * k;
        if (maker >= MAKERS || Own::of<MAKERS>(maker, VOCAB).groups == 0) continue;
        u64 key;
        do key = look_key(keys(0) + maker);
        while ((key & ROUND_OF_KEY) != bit);
        of_lane = max(of_lane, key | ROUND_OF_KEY);
    }
    __syncwarp();
    // All have read the rows of the last products.
    w.clear_row<HEAD>(round);
    return ~(u32)largest_key(of_lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) batch_step(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 owner = blockIdx.x / TEAMS, sequence = blockIdx.x % TEAMS + warp * TEAMS, rank = blockIdx.x % SHARING;
    if (threadIdx.x == 0) {
        make_barrier(shared_address(&shared.sums_read), THREADS);
        for (u32 k = 0; k < WARPS; ++k) {
            make_barrier(shared_address(&shared.inbox_full[k]), 1);
            if (MIX_ROUNDS > 1) make_barrier(shared_address(&shared.inbox_read[k]), 1);
        }
        fence_barriers();
    }
    for (u32 k = threadIdx.x; k < WARPS * 2 * PHASES; k += THREADS) shared.patience[0][k] = 0;
    Own own = Own::of<OWNERS>(owner, WIDTH);
    Own inner = Own::of<MAKERS>(owner * SHARING + rank, INNER), of_head = Own::of<MAKERS>(owner * SHARING + rank, VOCAB);
    u32 *tiles = shared.tiles[warp], *head_tiles = tiles + LAYER_LIST;
    u32 count = 0;
    for (u32 k = 0; k < MIX_ROUNDS; ++k) count = list_tiles<MIX>(a, tiles, own, rank, count, k);
    count = list_tiles<OUT>(a, tiles, own, rank, count);
    for (u32 k = 0; k < GLU_ROUNDS; ++k) count = list_tiles<GLU>(a, tiles, inner.part(k, GLU_GROUPS), rank, count);
    count = list_tiles<DOWN>(a, tiles, own, rank, count);
    u32 head_count = 0;
    for (u32 k = 0; k < HEAD_ROUNDS; ++k)
        head_count = list_tiles<HEAD>(a, head_tiles, of_head.part(k, HEAD_GROUPS), rank, head_count);
    fill_list(tiles, count), fill_list(head_tiles, head_count);
    if (lane == 0) shared.counts[warp][0] = count, shared.counts[warp][1] = head_count;
    __syncthreads();
    // The other block's barriers are there.
    if (SHARING > 1) asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    u8* region = memory + SHARED_BYTES;
    // In a cluster whose other sequence is not there, a warp computes something for it.
    bool is_real = sequence / SHARING * SHARING < a.m, is_wanted = sequence < a.m;
    Stream stream(a, shared, shared_address(region + REGION + threadIdx.x * 16));
    Worker w = {a, shared, region, stream, warp, lane, owner, rank, sequence, own, is_real};
    // There are no sums yet that somebody reads.
    w.have_read_sums();
    float* state = is_wanted ? a.states[sequence] : a.spare_state;
    u32 token = is_wanted ? a.tokens[sequence] : 0;
    Residual r = {};
#pragma unroll 1
    for (u32 step = 0; step < a.steps; ++step) {
        u32 token_round = a.steps_before + step + 1, round = (token_round - 1) * a.layers + 1;
        if (w.is_real) begin_step(w, token, r);
#pragma unroll 1
        for (u32 layer = 0; layer < a.layers; ++layer, ++round) {
            float out = mix(w, state, layer, round, r);
            add_output<OUT>(w, r, out);
            float down = glu(w, r, layer, round);
            add_output<DOWN>(w, r, down);
        }
        u64 best[SHARING];
        bool is_last = step + 1 == a.steps;
        head(w, r, token_round, a.logits && is_last, is_last, best);
        if (w.is_real) {
            token = choose_token(w, best, token_round);
            if (owner == 0 && lane == 0 && w.is_wanted(0))
                a.tokens[sequence] = a.history[(size_t)step * a.m + sequence] = token;
        }
    }
}
