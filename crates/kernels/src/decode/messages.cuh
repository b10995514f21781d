// What the blocks of a persistent grid send each other while all of them run: through the L2 cache, without a barrier of the grid.
//
// The lowest bit of a float, and one of a key, tells in which round it was sent. Rounds are layers, or tokens, one after the
// other. A place is written again when all have read it, for what is sent depends on what all blocks sent that read it.

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

__device__ __forceinline__ u32 of_round(float value, u32 round) { return (__float_as_uint(value) & ~1u) | (round & 1); }

__device__ __forceinline__ void send(float* to, float value, u32 round) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(of_round(value, round)) : "memory");
}

// All four in one round.
__device__ __forceinline__ void send4(float* to, float4 v, u32 round) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(of_round(v.x, round)),
                 "r"(of_round(v.y, round)), "r"(of_round(v.z, round)), "r"(of_round(v.w, round))
                 : "memory");
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

constexpr u64 ROUND_OF_KEY = 1ull << 31;  // vocabularies are smaller

// The largest of a warp's keys.
__device__ __forceinline__ u64 largest_key(u64 key) {
    u32 high = __reduce_max_sync(ALL_LANES, (u32)(key >> 32));
    return (u64)high << 32 | __reduce_max_sync(ALL_LANES, (u32)(key >> 32) == high ? (u32)key : 0);
}

// ---- Functions without the compiler's checks ----

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

// Off by a few units in the last place.
__device__ __forceinline__ float inverse_root(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r * (1.5f - 0.5f * x * r * r);
}

