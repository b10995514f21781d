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
__device__ __forceinline__ float fast_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// d silu / dx, given s = sigmoid(x).
__device__ __forceinline__ float silu_derivative(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// Sum over the block in a fixed order; all threads get it.
__device__ __forceinline__ float block_sum(float value, float* parts) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value += __shfl_xor_sync(ALL_LANES, value, width);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (u32 w = 0; w < blockDim.x / 32; ++w) sum += parts[w];
    return sum;
}

__device__ __forceinline__ double block_sum(double value, double* parts) {
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) value += __shfl_xor_sync(ALL_LANES, value, width);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    for (u32 w = 0; w < blockDim.x / 32; ++w) sum += parts[w];
    return sum;
}

// Scale of a row of a product that was left as integers (or of nothing).
__device__ __forceinline__ float factor_of(const float* factors, u32 row) { return factors ? factors[row] : 1.0f; }
