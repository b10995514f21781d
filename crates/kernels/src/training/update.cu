// AdamW and the weights that products stream, in one launch.
//
// Parameters are cut into parts: weights of a projection, or what lies between two of them. A part is as many pieces of work
// as `weight_sums` has blocks with something to do, each with the same elements in the same order, so that gamma has the same
// bits. Blocks draw tickets, for AdamW of all pieces and then for their trits. Trits wait for gamma, which the last block to
// end with a part leaves; they wait only for tickets drawn before their own, and AdamW waits for none.
//
// Trits right behind their part's AdamW would find the weights in the L2 cache, but every part then waits for its last piece:
// 370M 3.76 ms for 3.27 on an H200.

constexpr u32 SUM_BLOCKS = 1024;
constexpr u32 MOST_PARTS = 160;
constexpr u32 UPDATE_BLOCKS = 5;  // that share a multiprocessor
constexpr u32 AS_HALVES = 0xfffffffeu;

struct UpdatePart {
    u32 start, place, len;  // in the parameters and in the prepared weights, and how many, in fours
    u32 gamma;              // number of gamma; AS_HALVES: none, the weights as bf16; above: neither
    u32 pieces_end;         // behind its last piece among those of all parts
    float keep;
};

struct UpdateArgs {
    float* p;
    const float* g;
    float* m;  // as if they began where the parameters do
    float* v;
    const double* gradient_scale;  // NaN: nothing is changed
    u16* halves;
    i8* bytes;
    float* gammas;
    double* partials;  // [MOST_PARTS][SUM_BLOCKS]
    u32* counters;     // zeros: tickets drawn, [MOST_PARTS] pieces done, [MOST_PARTS] whether gamma is there
    u32 parts_len;
    AdamWFactors factors;  // but for keep
    UpdatePart parts[MOST_PARTS];
};

__device__ __forceinline__ u32 load_acquire(const u32* at) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(u32* at, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ u32 pieces(const UpdatePart& part) { return min((part.len + THREADS - 1) / THREADS, SUM_BLOCKS); }

// Number of a piece in its part, given that among all.
__device__ __forceinline__ u32 piece_of(const UpdatePart& part, u32 piece) { return piece + pieces(part) - part.pieces_end; }

// A piece of a part: AdamW, sums of |w| or weights as bf16. The last piece of a matrix leaves gamma.
__device__ __forceinline__ void update_piece(const UpdateArgs& a, u32 index, u32 piece, float scale, double* sums) {
    __shared__ bool is_last;
    const UpdatePart& part = a.parts[index];
    piece = piece_of(part, piece);
    float4 *p = (float4*)a.p + part.start, *m = (float4*)a.m + part.start, *v = (float4*)a.v + part.start;
    const float4* g = (const float4*)a.g + part.start;
    AdamWFactors f = a.factors;
    f.keep = part.keep;
    double sum = 0.0;
    for (u32 k = piece * THREADS + threadIdx.x; k < part.len; k += SUM_BLOCKS * THREADS) {
        float4 gradient = g[k], w = p[k], first = m[k], second = v[k];
        adamw_four(f, scale, gradient, w, first, second);
        p[k] = w;
        m[k] = first;
        v[k] = second;
        if (part.gamma == AS_HALVES) ((uint2*)a.halves)[part.place + k] = halves_of(w);
        sum += sum_of_four(w);
    }
    if (part.gamma >= AS_HALVES) return;
    double* partials = a.partials + index * SUM_BLOCKS;
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        partials[piece] = sum;
        __threadfence();
        is_last = atomicAdd(a.counters + 1 + index, 1) + 1 == pieces(part);
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    float gamma = gamma_of(partials, pieces(part), (u64)part.len * 4, sums);
    if (threadIdx.x == 0) {
        a.gammas[part.gamma] = gamma;
        store_release(a.counters + 1 + MOST_PARTS + index, 1);
    }
}

// The trits of a piece, if it has any.
__device__ __forceinline__ void trits_piece(const UpdateArgs& a, u32 index, u32 piece) {
    const UpdatePart& part = a.parts[index];
    if (part.gamma >= AS_HALVES) return;
    piece = piece_of(part, piece);
    if (threadIdx.x == 0)
        while (!load_acquire(a.counters + 1 + MOST_PARTS + index)) __nanosleep(64);
    __syncthreads();
    float inverse = 1.0f / __ldcg(a.gammas + part.gamma);
    const float4* p = (const float4*)a.p + part.start;
    // Other blocks have written the weights meanwhile: from the L2 cache.
    for (u32 k = piece * THREADS + threadIdx.x; k < part.len; k += SUM_BLOCKS * THREADS)
        store_trits(__ldcg(p + k), inverse, (uint2*)a.halves + part.place + k, (u32*)a.bytes + part.place + k);
}

extern "C" __global__ void __launch_bounds__(THREADS, UPDATE_BLOCKS)
    adamw_and_weights(const __grid_constant__ UpdateArgs a) {
    __shared__ double sums[WARPS];
    __shared__ u32 drawn[2];
    float scale = (float)*a.gradient_scale;
    if (isnan(scale)) return;
    u32 all = a.parts[a.parts_len - 1].pieces_end, next = 0, turn = 0, ticket;
    if (threadIdx.x == 0) next = atomicAdd(a.counters, 1);
    // A ticket for all threads; the next one is drawn while they work.
    auto draw = [&] {
        turn ^= 1;
        if (threadIdx.x == 0) drawn[turn] = next;
        __syncthreads();
        if (threadIdx.x == 0) next = atomicAdd(a.counters, 1);
        return drawn[turn];
    };
    u32 index = 0;
    while ((ticket = draw()) < all) {
        while (ticket >= a.parts[index].pieces_end) ++index;
        update_piece(a, index, ticket, scale, sums);
    }
    for (index = 0; ticket < 2 * all; ticket = draw()) {
        while (ticket - all >= a.parts[index].pieces_end) ++index;
        trits_piece(a, index, ticket - all);
    }
}
