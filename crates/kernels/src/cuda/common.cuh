// Shared by every kernel; put in front of each source before it is compiled. Needs no headers.
//
// Compiled without contraction of products and sums (--fmad=false), but for training's: every float operation is the one
// that the CPU performs, in the same order, so that results are the same bits. See docs/numerics.md.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 ALL_LANES = 0xffffffffu;

// ---- Kernels that begin before the one before them has ended (`Launch::overlapping`) ----

// Everything that earlier kernels of the stream wrote is visible behind this, and nothing is read by them any more. It
// comes before the first access to what they touch; weights may be fetched before it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin as soon as multiprocessors have room for it.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Shared memory: barriers and bulk copies ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies 16 bytes from global to shared memory while the thread goes on.
__device__ __forceinline__ void async_copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void async_copy_16(void* to, const void* from) { async_copy_16(shared_address(to), from); }

#if __CUDA_ARCH__ >= 900
// A phase of the barrier is over after so many arrivals, and when the bytes that it expects are there.
__device__ __forceinline__ void make_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers visible to bulk copies.
__device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Whether the barrier's phase of a parity is over, after a little waiting.
__device__ __forceinline__ bool is_over(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// Waits until the barrier's phase of a parity is over.
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    while (!is_over(barrier, parity)) {}
}

// Arrives at the barrier and tells it how many bytes are on their way to this phase.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Brings bytes to shared memory; the barrier counts them.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The 128 sums that a thread holds of a warpgroup's 64 x 256, as registers and as operands of `asm`.
#define SUM_REGISTERS_128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define SUM_OPERANDS_128(d) \
    "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), \
    "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), \
    "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), \
    "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), \
    "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), \
    "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), \
    "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), \
    "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63]), \
    "+r"(d[64]), "+r"(d[65]), "+r"(d[66]), "+r"(d[67]), "+r"(d[68]), "+r"(d[69]), "+r"(d[70]), "+r"(d[71]), \
    "+r"(d[72]), "+r"(d[73]), "+r"(d[74]), "+r"(d[75]), "+r"(d[76]), "+r"(d[77]), "+r"(d[78]), "+r"(d[79]), \
    "+r"(d[80]), "+r"(d[81]), "+r"(d[82]), "+r"(d[83]), "+r"(d[84]), "+r"(d[85]), "+r"(d[86]), "+r"(d[87]), \
    "+r"(d[88]), "+r"(d[89]), "+r"(d[90]), "+r"(d[91]), "+r"(d[92]), "+r"(d[93]), "+r"(d[94]), "+r"(d[95]), \
    "+r"(d[96]), "+r"(d[97]), "+r"(d[98]), "+r"(d[99]), "+r"(d[100]), "+r"(d[101]), "+r"(d[102]), "+r"(d[103]), \
    "+r"(d[104]), "+r"(d[105]), "+r"(d[106]), "+r"(d[107]), "+r"(d[108]), "+r"(d[109]), "+r"(d[110]), "+r"(d[111]), \
    "+r"(d[112]), "+r"(d[113]), "+r"(d[114]), "+r"(d[115]), "+r"(d[116]), "+r"(d[117]), "+r"(d[118]), "+r"(d[119]), \
    "+r"(d[120]), "+r"(d[121]), "+r"(d[122]), "+r"(d[123]), "+r"(d[124]), "+r"(d[125]), "+r"(d[126]), "+r"(d[127])
#endif

// ---- Functions (the CPU's `lanes` module) ----

// e^x as 2^n e^r, clamped to normal numbers.
__device__ __forceinline__ float exp_f32(float x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + ROUND;
    float n = shifted - ROUND;
    float r = (x - n * 0.6933594f) - n * -2.1219444e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.50000006f;
    float e_r = p * (r * r) + r + 1.0f;
    return __uint_as_float(__float_as_uint(e_r) + (__float_as_uint(shifted) << 23));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// 1 / x, rounded correctly, for x from 1 to 2^125: what the compiler's division does without its checks, which keep it
// from interleaving several.
__device__ __forceinline__ float reciprocal_in_range(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
}

// Several fours at a time, so that one check serves them all and their operations interleave.
template <u32 N>
__device__ __forceinline__ void sigmoids(const float4 (&x)[N], float4 (&s)[N]) {
    float4 d[N];
    bool in_range = true;
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        d[i] = make_float4(1.0f + exp_f32(-x[i].x), 1.0f + exp_f32(-x[i].y), 1.0f + exp_f32(-x[i].z), 1.0f + exp_f32(-x[i].w));
        s[i] = make_float4(reciprocal_in_range(d[i].x), reciprocal_in_range(d[i].y), reciprocal_in_range(d[i].z),
                           reciprocal_in_range(d[i].w));
        // A NaN fails the comparison.
        in_range = in_range && d[i].x < 4e37f && d[i].y < 4e37f && d[i].z < 4e37f && d[i].w < 4e37f;
    }
    if (in_range) return;
#pragma unroll
    for (u32 i = 0; i < N; ++i) s[i] = make_float4(1.0f / d[i].x, 1.0f / d[i].y, 1.0f / d[i].z, 1.0f / d[i].w);
}

__device__ __forceinline__ float4 sigmoid(float4 a) {
    float4 x[] = {a}, s[1];
    sigmoids(x, s);
    return s[0];
}

// The forget gate's and the input's part of one step: h = forget * h + input.
__device__ __forceinline__ void recurrence_gates(float i, float f, float beta, float& forget, float& input) {
    forget = beta + (1.0f - beta) * sigmoid(f);
    input = silu(i) * (1.0f - forget);
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

__device__ __forceinline__ float f16_to_f32(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Element `at` of a table of embeddings, widened exactly. Types: 0: f32, 1: f16, 2: bf16.
__device__ __forceinline__ float embedding_at(const void* table, u32 type, size_t at) {
    if (type == 0) return __ldg((const float*)table + at);
    unsigned short bits = __ldg((const unsigned short*)table + at);
    return type == 1 ? f16_to_f32(bits) : __uint_as_float((u32)bits << 16);
}

// A key whose order is that of the logits, of equal ones the lower token first.
__device__ __forceinline__ u64 logit_key(float logit, u32 token) {
    u32 bits = __float_as_uint(logit + 0.0f);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (u64)bits << 32 | ~token;
}

// ---- Rows: one block works on one row that lies in shared memory. Widths are multiples of four ----

// 1 / sqrt(mean(x^2) + eps), by one warp. Element k goes to partial sum k % 32; partial sums are combined in halves.
__device__ __forceinline__ float warp_inverse_rms(const float* row, u32 n, float eps) {
    // A batch is loaded while the one before it is summed.
    constexpr u32 BATCH = 8;
    float sum = 0.0f, next[BATCH];
    u32 k = threadIdx.x % 32, batches = n / (32 * BATCH);
    if (batches > 0)
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) next[j] = row[k + 32 * j];
    auto add = [&](u32 batch) {
        float square[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) square[j] = next[j] * next[j];
        k += 32 * BATCH;
        if (batch < batches)
#pragma unroll
            for (u32 j = 0; j < BATCH; ++j) next[j] = row[k + 32 * j];
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) sum += square[j];
    };
    for (u32 batch = 1; batch <= batches; ++batch) add(batch);
    for (; k < n; k += 32) sum += row[k] * row[k];
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, width);
    return 1.0f / sqrtf(sum / (float)n + eps);
}

// The same for a block: one warp sums, for the order is fixed; all threads get the result. Synchronises before and after.
__device__ __forceinline__ float inverse_rms(const float* row, u32 n, float eps, float* result) {
    __syncthreads();
    if (threadIdx.x < 32) {
        float r = warp_inverse_rms(row, n, eps);
        if (threadIdx.x == 0) *result = r;
    }
    __syncthreads();
    return *result;
}

// Largest of non-negative values over the block, for J values a thread. `parts` holds J * THREADS / 32 words.
template <u32 THREADS, u32 J>
__device__ __forceinline__ void block_max(float (&value)[J], u32* parts) {
    constexpr u32 WARPS = THREADS / 32;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (u32 j = 0; j < J; ++j) {
        // The bits of floats that are not negative are in their order.
        u32 largest = __reduce_max_sync(ALL_LANES, __float_as_uint(value[j]));
        if (lane == 0) parts[j * WARPS + warp] = largest;
    }
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < J; ++j) {
        u32 part = lane < WARPS ? parts[j * WARPS + lane] : 0;
        value[j] = __uint_as_float(__reduce_max_sync(ALL_LANES, part));
    }
}

// 127 / max(largest, 1e-5), the scale s of a quantised row (divides).
__device__ __forceinline__ float quantizer_scale(float largest) { return 127.0f / fmaxf(largest, 1e-5f); }

// Rounds half to even, clamps to +-127; a NaN becomes -127.
__device__ __forceinline__ int quantize(float y) {
    y = y > -127.0f ? y : -127.0f;
    y = y < 127.0f ? y : 127.0f;
    return (i8)(u8)__float_as_uint(y + 12582912.0f);
}

__device__ __forceinline__ float larger(float largest, float value) { return value > largest ? value : largest; }

__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ __forceinline__ float4 operator*(float4 a, float b) {
    return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 operator-(float a, float4 b) { return make_float4(a - b.x, a - b.y, a - b.z, a - b.w); }

__device__ __forceinline__ float4 silu(float4 a) { return a * sigmoid(a); }

// The forget gate's and the input's part of one step of four channels.
__device__ __forceinline__ void recurrence_gates(float4 i, float4 f, float4 beta, float4& forget, float4& input) {
    float4 x[] = {i, f}, s[2];
    sigmoids(x, s);
    forget = beta + (1.0f - beta) * s[1];
    input = i * s[0] * (1.0f - forget);
}

// A sum of a ternary product becomes a float by one conversion and one product with gamma / s.
__device__ __forceinline__ float dequantize(int sum, float factor) { return (float)sum * factor; }

__device__ __forceinline__ float4 dequantize(int4 sum, float factor) {
    return make_float4(dequantize(sum.x, factor), dequantize(sum.y, factor), dequantize(sum.z, factor),
                       dequantize(sum.w, factor));
}

// ---- Ternary weights ----
//
// A tile is 16 rows by 128 inputs, 512 bytes, for a warp to load with 16 bytes a lane. Lane l = 4g + t holds four
// code words: word j is row g + 8 (j % 2), inputs 32 t + 16 (j / 2) ...; the word's 2-bit field at bit 8 b + 2 f is
// t + 1 of input 4 f + b of these sixteen. So (word >> 2 f) & 0x03030303 is a register of the first operand of
// mma.m16n8k32, and the other operand's registers are words f and 4 + f of the 32 activations from input 32 t on.

constexpr u32 TILE_ROWS = 16;
constexpr u32 TILE_COLS = 128;
constexpr u32 FIELD = 0x03030303;

// c += codes * activations for 16 rows and 8 tokens: codes are unsigned (t + 1), activations signed.
__device__ __forceinline__ void mma_u8_s8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
