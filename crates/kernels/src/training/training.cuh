// Shared by the kernels of training. Activations are bf16, sums are f32; no sum depends on the order in which blocks run.

typedef unsigned short u16;

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;

extern __shared__ float memory[];

__device__ __forceinline__ float to_f32(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Reciprocal of 1 + e^-x by the fast instructions: 2 to 3 units in the last place, far below bf16.
__device__ __forceinline__ float fast_sigmoid(float x) {
    float power, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
    return reciprocal;
}

// d silu / dx, given s = sigmoid(x).
__device__ __forceinline__ float silu_derivative(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// Sum over the block in a fixed order; all threads get it.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* parts) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value += __shfl_xor_sync(ALL_LANES, value, width);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    T sum = 0;
    for (u32 w = 0; w < blockDim.x / 32; ++w) sum += parts[w];
    return sum;
}

// Copies BYTES from global to shared memory, both aligned to them, while the thread goes on. The copies of a thread between
// two commits are a group; wait_ahead<N> waits for all groups but the N newest.
template <u32 BYTES>
__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
    if (BYTES == 16)
        async_copy_16(to, from);
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void commit_ahead() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <u32 GROUPS>
__device__ __forceinline__ void wait_ahead() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Scale of a row of a product that was left as integers (or of nothing).
__device__ __forceinline__ float factor_of(const float* factors, u32 row) { return factors ? factors[row] : 1.0f; }

// ---- Rows whose width is a multiple of eight: 16 bytes an access, a row in the registers of its block ----

constexpr u32 VECTORS = 2;            // of eight elements, that a thread has of a row
constexpr u32 VECTOR_THREADS = 384;   // of a block, at most

__device__ __forceinline__ float low_f32(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float high_f32(u32 bits) { return __uint_as_float(bits & 0xffff0000u); }

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ void unpack(uint4 bits, float (&x)[8]) {
    x[0] = low_f32(bits.x), x[1] = high_f32(bits.x), x[2] = low_f32(bits.y), x[3] = high_f32(bits.y);
    x[4] = low_f32(bits.z), x[5] = high_f32(bits.z), x[6] = low_f32(bits.w), x[7] = high_f32(bits.w);
}

__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

__device__ __forceinline__ uint4 load_bits(const u16* at) { return *(const uint4*)at; }

__device__ __forceinline__ void load_eight(const float* low, const float* high, float (&x)[8]) {
    float4 a = *(const float4*)low, b = *(const float4*)high;
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void load_eight(const float* at, float (&x)[8]) { load_eight(at, at + 4, x); }

__device__ __forceinline__ void store_eight(float* at, const float (&x)[8]) {
    ((float4*)at)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)at)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ u32 pack_bytes(const int* x) {
    return (x[0] & 0xff) | (x[1] & 0xff) << 8 | (x[2] & 0xff) << 16 | (u32)x[3] << 24;
}

// First element of a thread's vector j.
__device__ __forceinline__ u32 vector_at(u32 j) { return (j * blockDim.x + threadIdx.x) * 8; }

// SUMS sums and, behind them, largest values, none negative, over the block. `parts` must not be one that the call before used.
template <u32 SUMS, u32 ALL>
__device__ __forceinline__ void block_reduce(float (&value)[ALL], float* parts) {
#pragma unroll
    for (u32 i = 0; i < ALL; ++i) {
#pragma unroll
        for (u32 width = 16; width > 0; width /= 2) {
            float other = __shfl_xor_sync(ALL_LANES, value[i], width);
            value[i] = i < SUMS ? value[i] + other : fmaxf(value[i], other);
        }
    }
    u32 warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (u32 i = 0; i < ALL; ++i) parts[threadIdx.x / 32 * ALL + i] = value[i];
    }
    __syncthreads();
    // Every warp adds the warps' values in the same order, a lane each, repeated where there are more lanes.
    u32 lanes = 1u << (32 - __clz(warps - 1)), lane = threadIdx.x & (lanes - 1);
#pragma unroll
    for (u32 i = 0; i < ALL; ++i) value[i] = lane < warps ? parts[lane * ALL + i] : 0.0f;
    for (u32 width = 1; width < lanes; width *= 2) {
#pragma unroll
        for (u32 i = 0; i < ALL; ++i) {
            float other = __shfl_xor_sync(ALL_LANES, value[i], width);
            value[i] = i < SUMS ? value[i] + other : fmaxf(value[i], other);
        }
    }
}
