// Products of one to eight tokens, as fast as the weights arrive: y[m, n] = sum_k q[m, k] t[n, k], added to `out`.
//
// The rows of tiles are cut into regions, as many of up to 16 as divide them evenly, and each region, tile by tile and wherever rows
// begin and end, into equal parts, one for each warp that works on it. The warps of a block take the parts of the same number: they need the
// same columns, and few activations. A warp streams its part through a ring of its own in shared memory; each lane copies what
// itself will read, so the ring needs no synchronisation. The instruction multiplies eight columns whether there are eight tokens or
// one. Two blocks share a multiprocessor, so that the next launch's weights are on their way when this one ends. A longer ring delays
// this launch's activations, which wait behind the next one's weights.

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 DEPTH = 6;         // tiles on their way, a warp
constexpr u32 TILE_BYTES = 512;
constexpr u32 RING_BYTES = DEPTH * TILE_BYTES;
constexpr u32 CHUNKS = TILE_COLS / 16;

// As in plan.rs.
struct FewTokensArgs {
    Args product;
    u32 log_sharers;  // of the warps of a block that share a region
    u32 each, rest;   // tiles of a part, and how many parts have one more
    u32 window;       // columns of tiles whose activations a block has
};

__device__ __forceinline__ uint4 load_16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

// Has values computed here, before a wait, and not where they are used.
template <class... Values>
__device__ __forceinline__ void compute_here(Values... values) {
    (..., [&] { asm volatile("" ::"r"(values)); }());
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) few_tokens(const __grid_constant__ FewTokensArgs args) {
    let_next_begin();
    extern __shared__ uint4 memory[];  // rings [warp][DEPTH][lane], q [segment][token][chunk]
    const Args& a = args.product;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 cols = a.col_tiles, sharers = 1u << args.log_sharers, first_part = blockIdx.x << args.log_sharers;
    u32 region = warp >> args.log_sharers, part = first_part + (warp & sharers - 1), region_rows = (a.row_tiles << args.log_sharers) / WARPS;
    u32 at = part * args.each + min(part, args.rest), left = args.each + (part < args.rest);  // to fetch
    const u32 ring = shared_address(memory) + warp * RING_BYTES + lane * 16;
    const uint4* next = a.weights + ((size_t)region * region_rows * cols + at) * 32 + lane;
    u32 tiles = left;  // to multiply
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    auto fetch = [&](u32 to) {
        if (left > 0) {
            asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(next), "l"(policy) : "memory");
            --left;
            next += 32;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll 1
    for (u32 slot = 0; slot < DEPTH; ++slot) fetch(ring + slot * TILE_BYTES);

    bool is_window = args.window < cols;  // else a block has all columns, from the first one on
    u32 row = region * region_rows + at / cols, col = at % cols, window_at = first_part * args.each + min(first_part, args.rest);
    u32 first_col = is_window ? window_at % cols : 0, within = is_window ? at - window_at : col;
    u32 chunks = args.window * CHUNKS, all_chunks = cols * CHUNKS, pitch = (chunks + 1) * 16;  // eight rows meet in no bank
    u32 segment = row / a.segment_tiles, segment_left = (segment + 1) * a.segment_tiles - row, q_rows = a.row_tiles / a.segment_tiles * a.m;
    u32 q = shared_address(memory) + WARPS * RING_BYTES, token = min(g, a.m - 1), segment_bytes = a.m * pitch;
    u32 q_first = q + token * pitch + 2 * t * 16, input = q_first + segment * segment_bytes + within * TILE_COLS;
    u32 q_row = threadIdx.x / chunks, q_chunk = threadIdx.x % chunks, next_row = THREADS / chunks, next_chunk = THREADS % chunks;
    u32 first_chunk = first_col * CHUNKS, row_left = cols - col, out_at = 2 * t * a.row_tiles * TILE_ROWS + row * TILE_ROWS + g;
    compute_here(q_row, q_chunk, next_row, next_chunk, first_chunk, all_chunks, pitch, segment_left, q_rows, input, row_left, out_at, segment);
    wait_for_previous();
    for (; q_row < q_rows; q_row += next_row, q_chunk += next_chunk) {
        if (q_chunk >= chunks) {
            q_chunk -= chunks;
            if (++q_row >= q_rows) break;
        }
        u32 from_chunk = first_chunk + q_chunk;
        if (from_chunk >= all_chunks) from_chunk -= all_chunks;
        async_copy_16(q + q_row * pitch + q_chunk * 16, (const uint4*)a.q + (size_t)q_row * all_chunks + from_chunk);
    }
    int q_sums[2];  // of the tokens whose sums the thread has
    auto ask_for_q_sums = [&] {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) q_sums[i] = 2 * t + i < a.m ? a.q_sums[segment * a.rows + 2 * t + i] : 0;
    };
    if (tiles > 0) ask_for_q_sums();
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    int c[2][2][4];  // of the first and the last words of a lane; of fields 0 and 1, and of 2 and 3, whose sums are 16 times too large
    auto begin_row = [&](bool is_begin) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) c[0][0][i] = is_begin ? -q_sums[i % 2] : 0, c[0][1][i] = c[1][0][i] = c[1][1][i] = 0;
    };
    begin_row(col == 0);
    int* out = a.out + out_at;
    u32 slot = ring;
    while (tiles > 0) {
        u32 n = min(row_left, tiles);
        tiles -= n;
#pragma unroll 1
        for (; n > 0; --n) {
            asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
            uint4 w = load_16(slot), low = load_16(input), high = load_16(input + 16);
            // Neighbouring words of activations are an operand's two registers without a copy, so fields f and f + 1 share an instruction.
            uint4 v = make_uint4(w.x >> 2, w.y >> 2, w.z >> 2, w.w >> 2);
            constexpr u32 FIRST = FIELD, THIRD = FIELD << 4;
            mma_u8_s8(c[0][0], w.x & FIRST, w.y & FIRST, v.x & FIRST, v.y & FIRST, low.x, low.y);
            mma_u8_s8(c[0][1], w.x & THIRD, w.y & THIRD, v.x & THIRD, v.y & THIRD, low.z, low.w);
            mma_u8_s8(c[1][0], w.z & FIRST, w.w & FIRST, v.z & FIRST, v.w & FIRST, high.x, high.y);
            mma_u8_s8(c[1][1], w.z & THIRD, w.w & THIRD, v.z & THIRD, v.w & THIRD, high.z, high.w);
            input += TILE_COLS;
            fetch(slot);
            slot += TILE_BYTES;
            if (slot == ring + RING_BYTES) slot = ring;
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            int sum = c[0][0][i] + c[1][0][i] + (c[0][1][i] + c[1][1][i] >> 4);
            if (2 * t + i % 2 < a.m) atomicAdd(out + i % 2 * a.row_tiles * TILE_ROWS + i / 2 * 8, sum);
        }
        out += TILE_ROWS;
        row_left = cols;
        if (!is_window) input = q_first + segment * segment_bytes;
        if (--segment_left == 0 && tiles > 0) {
            ++segment;
            segment_left = a.segment_tiles;
            input += segment_bytes;
            ask_for_q_sums();
        }
        begin_row(true);
    }
}
