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

// The lowest bit is set if something was not sent in the round that `mask` stands for.
__device__ __forceinline__ u32 mask_of(u32 round) { return 0 - (round & 1); }
__device__ __forceinline__ u32 missing(float v, u32 mask) { return __float_as_uint(v) ^ mask; }
__device__ __forceinline__ u32 missing(float4 v, u32 mask) {
    return missing(v.x, mask) | missing(v.y, mask) | missing(v.z, mask) | missing(v.w, mask);
}

// Looks again if a condition is not 0. Without a branch, or the loads of a thread would wait for each other.
__device__ __forceinline__ void look_again(float& v, const float* from, u32 condition) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.relaxed.gpu.global.f32 %0, [%1]; }"
                 : "+f"(v)
                 : "l"(from), "r"(condition)
                 : "memory");
}

__device__ __forceinline__ void look_again(float4& v, const float* from, u32 condition) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4]; }"
                 : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
                 : "l"(from), "r"(condition)
                 : "memory");
}

// How long a warp waits before it looks for a phase's row. Looks of all blocks for the same lines keep each other, and what
// is sent, waiting: so a warp learns when its floats come. It waits longer where looks were too early, and less where the
// first one was not.
struct Patience {
    u32 cycles;

    __device__ __forceinline__ static u32 now() {
        u32 c;
        asm volatile("mov.u32 %0, %%clock;" : "=r"(c)::"memory");
        return c;
    }

    __device__ __forceinline__ void wait() const {
        u32 begin = now();
        while (now() - begin < cycles) {}
    }

    __device__ __forceinline__ void learn(u32 early_looks) {
        cycles = early_looks == 0 ? cycles - min(cycles, 32u) : cycles + 32 * min(early_looks, 16u);
    }
};

__device__ __forceinline__ float without_round(float v) { return __uint_as_float(__float_as_uint(v) & ~1u); }

__device__ __forceinline__ float4 without_round(float4 v) {
    return make_float4(without_round(v.x), without_round(v.y), without_round(v.z), without_round(v.w));
}

// Sends for the next product what an own channel contributes, and its group's sum of squares. By whole warps.
template <u32 PHASE>
__device__ __forceinline__ void send_channel(const Args& a, bool has, u32 channel, float value, float square, u32 round) {
    if (has) send(a.exchange + place_of(PHASE) + channel, value, round);
    // Over a group of 16 neighbouring lanes.
    float sum = has ? square : 0.0f;
#pragma unroll
    for (u32 width = 8; width > 0; width /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, width);
    if (has && channel % TILE_ROWS == 0) send(a.exchange + sums_of(PHASE) + channel / TILE_ROWS, sum, round);
}

constexpr u64 ROUND_OF_KEY = 1ull << 31;  // vocabularies are smaller

// The largest of a warp's keys.
__device__ __forceinline__ u64 largest_key(u64 key) {
    u32 high = __reduce_max_sync(ALL_LANES, (u32)(key >> 32));
    return (u64)high << 32 | __reduce_max_sync(ALL_LANES, (u32)(key >> 32) == high ? (u32)key : 0);
}

// Waits for the keys of all blocks that have a part in the head: the most likely token.
__device__ __noinline__ u32 receive_token(const Args& a, u32 round) {
    constexpr u32 KEYS = (NUM_BLOCKS + 31) / 32;
    u32 groups = groups_of(a.vocab);
    u64 keys[KEYS], best = 0, expected = round & 1 ? ROUND_OF_KEY : 0;
    bool has[KEYS], any;
#pragma unroll
    for (u32 k = 0; k < KEYS; ++k) {
        u32 block = threadIdx.x % 32 + 32 * k;
        has[k] = block < NUM_BLOCKS && part_begin(groups, block, NUM_BLOCKS) < part_begin(groups, block + 1, NUM_BLOCKS);
    }
    do {
        any = false;
#pragma unroll
        for (u32 k = 0; k < KEYS; ++k) keys[k] = has[k] ? look_key(a.keys + threadIdx.x % 32 + 32 * k) : expected;
#pragma unroll
        for (u32 k = 0; k < KEYS; ++k) any |= (keys[k] & ROUND_OF_KEY) != expected;
    } while (__any_sync(ALL_LANES, any));
#pragma unroll
    for (u32 k = 0; k < KEYS; ++k)
        if (has[k] && (keys[k] | ROUND_OF_KEY) > best) best = keys[k] | ROUND_OF_KEY;
    return ~(u32)largest_key(best);
}

// ---- Barriers of a block, and the serving warp: what the block's channels need behind a phase ----

// Warps that do not read a product's sums need not wait for them.
__device__ __forceinline__ void sums_are_added() { asm volatile("bar.arrive 1, %0;" ::"n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void wait_for_sums() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS + 32) : "memory"); }
// Warps that multiply go on while the serving one adds.
__device__ __forceinline__ void squares_are_posted() { asm volatile("bar.arrive 3, %0;" ::"n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void wait_for_squares() { asm volatile("bar.sync 3, %0;" ::"n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The vectors that a block's channels need behind a phase, four at most, by one warp.
__device__ __forceinline__ void copy_vectors(const Args& a, Shared& shared, float* own_vectors, u32 layer, u32 phase) {
    const Part& part = shared.plan.part[phase];
    const float* v = a.vectors + (size_t)layer * (9 * WIDTH + INNER);
    u32 first = phase == MIX ? 4 : phase == OUT ? 7 : 9, count = phase == MIX ? 3 : phase == OUT ? 2 : 1;
    if (phase == DOWN) {
        // Of the next layer, or the head's two.
        v += 9 * WIDTH + INNER;
        first = 0, count = layer + 1 == a.layers ? 2 : 1;
    }
    if (phase != HEAD)
#pragma unroll 1
        for (u32 k = threadIdx.x % 32; k < part.channels / 4; k += 32) {
            u32 to = shared_address(own_vectors) + 16 * k, channel = part.channel + 4 * k;
            for (u32 n = 0; n < count; ++n) async_copy_16(to + 4 * n * OWN_FLOATS, v + (first + n) * WIDTH + channel);
            if (phase == MIX) async_copy_16(to + 12 * OWN_FLOATS, a.state + (size_t)layer * WIDTH + channel);
        }
}

// Without the compiler's checks; off by a few units in the last place.
__device__ __forceinline__ float inverse_root(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r * (1.5f - 0.5f * x * r * r);
}

// R of a phase's row, by one warp.
__device__ __forceinline__ float row_factor(const Args& a, const float* squares, u32 phase) {
    float sum = 0.0f;
#pragma unroll
    for (u32 warp = 0; warp < WARPS; ++warp) sum += squares[32 * warp + threadIdx.x % 32];
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, width);
    // Where only the quantiser's own norm is, the other has no part in it.
    return inverse_root(sum * (phase == DOWN ? 1.0f / INNER : 1.0f / WIDTH) + (phase == DOWN ? 1e-6f : 1e-6f * a.eps));
}

// By one warp, beside the others: R of each phase, and the vectors of the phase to come.
__device__ __forceinline__ void serve(const Args& a, Shared& shared, float* own_vectors) {
    auto has = [&](u32 phase) { return shared.plan.part[phase].channels > 0; };
    u32 turn = 0, steps = 4 * a.layers, step = ~0u;
    auto next_of = [&](u32 step) {
        do step = step == steps ? 0 : step + 1;
        while (!has(step == steps ? (u32)HEAD : step % 4));
        return step;
    };
    auto copy = [&](u32 step, u32 turn) {
        copy_vectors(a, shared, own_vectors + turn * 4 * OWN_FLOATS, step / 4, step == steps ? (u32)HEAD : step % 4);
    };
    u32 token = 0;
    step = next_of(steps);
    copy(step, 1);
#pragma unroll 1
    for (;;) {
        turn ^= 1;
        wait_for_squares();
        float r = row_factor(a, shared.squares[turn], step == steps ? (u32)HEAD : step % 4);
        if (threadIdx.x % 32 == 0) shared.row_factor[turn] = r;
        wait_for_copies();
        __syncwarp();
        // Behind it all have read the vectors of the phase before.
        wait_for_sums();
        u32 next = next_of(step);
        copy(next, turn ^ 1);
        if (next <= step && ++token == a.count) return;
        step = next;
    }
}
