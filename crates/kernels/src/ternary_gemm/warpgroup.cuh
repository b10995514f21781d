// Hopper's warpgroup instructions on ternary weights.

#if __CUDA_ARCH__ >= 900
// A warpgroup instruction's operand in shared memory: core matrices of 8 rows or tokens by 16 bytes, 128 bytes apart, a chunk
// of 16 inputs has LENGTH rows or tokens.
template <u32 LENGTH>
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(LENGTH * 16 >> 4) << 16 | (u64)(128 >> 4) << 32;
}

// A tile's codes as registers of the first operand.
__device__ __forceinline__ void unpack(uint4 w, u32 (&codes)[4][4]) {
#pragma unroll
    for (u32 f = 0; f < 4; ++f) {
        codes[f][0] = w.x >> 2 * f & FIELD;
        codes[f][1] = w.y >> 2 * f & FIELD;
        codes[f][2] = w.z >> 2 * f & FIELD;
        codes[f][3] = w.w >> 2 * f & FIELD;
    }
}

// d += codes (64 x 32) * activations (32 x 64).
__device__ __forceinline__ void wgmma(int (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
#endif
