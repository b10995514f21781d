// Reads memory as fast as it comes, as a yardstick for decoding.

struct Args {
    const uint4* memory;
    u64 count;
    u32* result;
};

extern "C" __global__ void __launch_bounds__(512) read_all(const __grid_constant__ Args a) {
    u64 at = (u64)blockIdx.x * 512 + threadIdx.x, step = (u64)gridDim.x * 512;
    u32 bits = 0;
    for (; at + 7 * step < a.count; at += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) v[i] = __ldcs(a.memory + at + i * step);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) bits ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    for (; at < a.count; at += step) {
        uint4 v = __ldcs(a.memory + at);
        bits ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    // Never so, but the compiler does not know it.
    if (bits == 0x9e3779b9u && a.count == 0) *a.result = bits;
}
