// What blocks send each other. No barrier of the grid: the lowest bit of a float tells in which round it was sent. Rounds
// are layers, one after the other. A place is written again when all have read it, for what is sent depends on floats of
// all blocks that read it.

__device__ __forceinline__ float look(const float* from) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ float4 look4(const float* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void send(float* to, float value, u32 round) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"((__float_as_uint(value) & ~1u) | (round & 1)) : "memory");
}

__device__ __forceinline__ u64 look_key(const u64* from) {
    u64 key;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(key) : "l"(from) : "memory");
    return key;
}

__device__ __forceinline__ void send_key(u64* to, u64 key) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(key) : "memory");
}

__device__ __forceinline__ bool was_sent(float v, u32 round) { return ((__float_as_uint(v) ^ round) & 1) == 0; }

__device__ __forceinline__ bool was_sent(float4 v, u32 round) {
    u32 x = __float_as_uint(v.x), y = __float_as_uint(v.y), z = __float_as_uint(v.z), w = __float_as_uint(v.w);
    return (((x ^ round) | (y ^ round) | (z ^ round) | (w ^ round)) & 1) == 0;
}

__device__ __forceinline__ float without_round(float v) { return __uint_as_float(__float_as_uint(v) & ~1u); }

__device__ __forceinline__ float4 without_round(float4 v) {
    return make_float4(without_round(v.x), without_round(v.y), without_round(v.z), without_round(v.w));
}

// Sends for the next product what an own channel contributes, and its group's sum. By whole warps.
template <u32 PHASE>
__device__ __forceinline__ void send_channel(const Args& a, bool has, u32 channel, float y, float square,
                                             const float (&w)[layers_of(PHASE)], u32 round) {
    float* to = a.exchange + place_of(PHASE);
    constexpr u32 N = inputs_of(PHASE);
    if (has)
#pragma unroll
        for (u32 j = 0; j < layers_of(PHASE); ++j) send(to + j * N + channel, y * w[j], round);
    // Over a group of 16 neighbouring lanes.
    float sum = has ? square : 0.0f;
#pragma unroll
    for (u32 width = 8; width > 0; width /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, width);
    if (has && channel % TILE_ROWS == 0) send(a.exchange + sums_of(PHASE) + channel / TILE_ROWS, sum, round);
}

constexpr u64 ROUND_OF_KEY = 1ull << 31;  // vocabularies are smaller

// Waits for the keys of all blocks that have a part in the head: the most likely token.
__device__ __noinline__ u32 receive_token(const Args& a, u32 round) {
    u32 groups = groups_of(a.vocab);
    u64 best = 0, expected = round & 1 ? ROUND_OF_KEY : 0;
    for (u32 b = threadIdx.x % 32; b < gridDim.x; b += 32) {
        if (part_begin(groups, b, gridDim.x) == part_begin(groups, b + 1, gridDim.x)) continue;
        u64 key;
        do key = look_key(a.keys + b);
        while ((key & ROUND_OF_KEY) != expected);
        key |= ROUND_OF_KEY;
        best = key > best ? key : best;
    }
    u32 high = __reduce_max_sync(ALL_LANES, (u32)(best >> 32));
    return ~__reduce_max_sync(ALL_LANES, (u32)(best >> 32) == high ? (u32)best : 0);
}

// ---- The serving warp: sums of squares, and the vectors that the block's channels need behind a phase ----

// Warps that do not read a product's sums need not wait for them.
__device__ __forceinline__ void sums_are_added() { asm volatile("bar.arrive 1, %0;" ::"n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void wait_for_sums() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ float inverse_root(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r * (1.5f - 0.5f * x * r * r);
}

__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// By one warp: R of a phase's row.
template <u32 PHASE>
__device__ __forceinline__ void add_sums(const Args& a, Shared& shared, u32 round, u32 turn) {
    constexpr u32 N = inputs_of(PHASE), SUMS = (groups_of(N) + 31) / 32;
    u32 lane = threadIdx.x % 32;
    const float* from = a.exchange + sums_of(PHASE) + lane;
    float part[SUMS], sum = 0.0f;
    auto is_inside = [&](u32 k) { return lane + 32 * k < groups_of(N); };
#pragma unroll
    for (u32 k = 0; k < SUMS; ++k) part[k] = is_inside(k) ? look(from + 32 * k) : 0.0f;
    bool all;
    do {
        all = true;
#pragma unroll
        for (u32 k = 0; k < SUMS; ++k)
            if (is_inside(k) && !was_sent(part[k], round)) part[k] = look(from + 32 * k), all = false;
        if (!all) __nanosleep(20);
    } while (!all);
    __syncwarp();
#pragma unroll
    for (u32 k = 0; k < SUMS; ++k) sum += without_round(part[k]);
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, width);
    // Where only the quantiser's own norm is, the other has no part in it.
    float r = inverse_root(sum * (1.0f / N) + (PHASE == DOWN ? 1e-6f : 1e-6f * a.eps));
    if (lane == 0) shared.factor[turn] = r;
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The vectors that a block's channels need behind a phase, four at most, by one warp.
__device__ __forceinline__ void copy_vectors(const Args& a, Shared& shared, float* own_vectors, u32 layer, u32 phase) {
    const Part& part = shared.plan.part[phase];
    const float* v = a.vectors + (size_t)layer * (9 * WIDTH + INNER);
    u32 first = phase == MIX ? 4 : phase == OUT ? 7 : 9, count = phase == OUT ? 2 : phase == GLU ? 1 : 3;
    if (phase == DOWN) {
        // Of the next layer, or the head's two.
        v += 9 * WIDTH + INNER;
        first = 0, count = layer + 1 == a.layers ? 2 : 4;
    }
    if (phase != HEAD)
#pragma unroll 1
        for (u32 k = threadIdx.x % 32; k < part.channels / 4; k += 32) {
            u32 to = shared_address(own_vectors) + 16 * k, channel = part.channel + 4 * k;
            for (u32 n = 0; n < count; ++n) async_copy_16(to + 4 * n * a.own_floats, v + (first + n) * WIDTH + channel);
            if (phase == MIX) async_copy_16(to + 12 * a.own_floats, a.state + (size_t)layer * WIDTH + channel);
        }
}

// By one warp, beside the others: the sums of squares, and the vectors of the phase to come.
__device__ __forceinline__ void serve(const Args& a, Shared& shared, float* own_vectors) {
    auto has = [&](u32 phase) { return shared.plan.part[phase].channels > 0; };
    u32 turn = 0, steps = 4 * a.layers, step = ~0u;
    auto next_of = [&](u32 step) {
        do step = step == steps ? 0 : step + 1;
        while (!has(step == steps ? (u32)HEAD : step % 4));
        return step;
    };
    auto copy = [&](u32 step, u32 turn) {
        copy_vectors(a, shared, own_vectors + turn * 4 * a.own_floats, step / 4, step == steps ? (u32)HEAD : step % 4);
    };
    u32 token = 0;
    step = next_of(steps);
    copy(step, 1);
#pragma unroll 1
    for (;;) {
        turn ^= 1;
        u32 phase = step == steps ? (u32)HEAD : step % 4, round = (a.tokens_before + token) * a.layers + step / 4 + 1;
        if (phase == MIX) add_sums<MIX>(a, shared, round, turn);
        else if (phase == OUT) add_sums<OUT>(a, shared, round, turn);
        else if (phase == GLU) add_sums<GLU>(a, shared, round, turn);
        else if (phase == DOWN) add_sums<DOWN>(a, shared, round, turn);
        else add_sums<HEAD>(a, shared, a.tokens_before + token + 1, turn);
        wait_for_copies();
        __syncwarp();
        sums_are_added();
        // All have read the vectors of the phase before: the sums depend on them.
        u32 next = next_of(step);
        copy(next, turn ^ 1);
        if (next <= step && ++token == a.count) return;
        step = next;
    }
}
