// What blocks of the decoding kernel send each other, and how warps of a block wait for each other.

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

__device__ __forceinline__ void wait_for_sums() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS + 32) : "memory"); }
// Warps that multiply go on while the serving one adds.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void squares_are_posted(u32 base) { arrive(base + SHARED_AT(squares_posted)); }
__device__ __forceinline__ void wait_for_squares(u32 base, u32 turn) {
    wait_for(base + SHARED_AT(squares_posted), turn ^ 1);
    __syncwarp();
}
#else
__device__ __forceinline__ void squares_are_posted(u32) { asm volatile("bar.arrive 3, %0;" ::"n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void wait_for_squares(u32, u32) { asm volatile("bar.sync 3, %0;" ::"n"(THREADS + 32) : "memory"); }
#endif
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
        wait_for_squares(shared_address(&shared), turn);
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
