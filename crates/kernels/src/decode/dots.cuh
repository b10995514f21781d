// Dot products of a row of tiles with a column's activations, of codes t + 1 in 2 bits with signed bytes. Exact, one way as
// the other.

#if NUM_TENSOR_CORES
// Tensor cores: they take fewer cycles, but a device that uses them runs with a lower clock (an H200 with 1.68 to 1.80 GHz
// instead of 1.975), so that they pay only where products take most of the time.
//
// With codes 2 h + l and activations q = sum of 2^p q_p for bits p of 0 to 6, less 128 q_7, they count the bits that l, and h,
// have in common with each q_p: all eight p at once, as the eight columns of a product of bits.
struct Column {
    static constexpr bool IS_SMALL = true;
    u32 first, second;  // of the channels of a tile's words x and y, and z and w

    // Bit `plane` of 16 bytes: of byte b of word f at 8 b + 2 f, where the code that it is multiplied by has its lower bit.
    __device__ __forceinline__ static u32 bits_of(uint4 q, u32 plane) {
        auto rotate = [](u32 word, u32 left) { return __funnelshift_l(word, word, left); };
        constexpr u32 MASK = 0x01010101;
        return (rotate(q.x, 0 - plane) & MASK) | (rotate(q.y, 2 - plane) & MASK << 2) |
               (rotate(q.z, 4 - plane) & MASK << 4) | (rotate(q.w, 6 - plane) & MASK << 6);
    }

    // Of 128 bytes those that belong to this lane: 32 t ... 32 t + 31 for t = lane % 4.
    __device__ __forceinline__ void read(u32 words) {
        u32 from = words + 32 * (threadIdx.x % 4), plane = threadIdx.x % 32 / 4;
        first = bits_of(load_shared_4(from, 0), plane), second = bits_of(load_shared_4(from, 16), plane);
    }
};

struct Dots {
    int l[4] = {}, h[4] = {};  // of rows g (twice) and g + 8, bits 2 t and 2 t + 1

    // Adds to each of 16 x 8 sums the number of bits that a row of the codes and a plane have in common.
    __device__ __forceinline__ static void count_common(int (&sums)[4], uint4 codes, u32 first, u32 second) {
        asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
            : "r"(codes.x), "r"(codes.y), "r"(codes.z), "r"(codes.w), "r"(first), "r"(second));
    }

    __device__ __forceinline__ void add(uint4 tile, const Column& column) {
        count_common(l, tile, column.first, column.second);
        count_common(h, tile, column.first << 1, column.second << 1);
    }

    // This lane's parts of the sums of rows g and g + 8.
    __device__ __forceinline__ int2 sums() const {
        u32 t = threadIdx.x % 4;
        int next = t == 3 ? -2 : 2;  // what bit 2 t + 1 is worth beside bit 2 t
        return make_int2((l[0] + 2 * h[0] + next * (l[1] + 2 * h[1])) << 2 * t,
                         (l[2] + 2 * h[2] + next * (l[3] + 2 * h[3])) << 2 * t);
    }
};
#else
// Dot products of four bytes: 16 a tile, and as many masks.
struct Column {
    static constexpr bool IS_SMALL = false;
    u32 q[8];  // of the channels of a tile's words x and y, then of z and w

    // Of 128 bytes those that belong to this lane: 32 t ... 32 t + 31 for t = lane % 4.
    __device__ __forceinline__ void read(u32 words) {
        u32 from = words + 32 * (threadIdx.x % 4);
        uint4 first = load_shared_4(from, 0), second = load_shared_4(from, 16);
        q[0] = first.x, q[1] = first.y, q[2] = first.z, q[3] = first.w;
        q[4] = second.x, q[5] = second.y, q[6] = second.z, q[7] = second.w;
    }
};

struct Dots {
    int low[4] = {}, high[4] = {};  // of rows g and g + 8; field f's sums are 4^f times too large

    // c + the dot product of four unsigned and four signed bytes.
    __device__ __forceinline__ static int dot4(u32 codes, u32 q, int c) {
        int sum;
        asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(codes), "r"(q), "r"(c));
        return sum;
    }

    __device__ __forceinline__ void add(uint4 tile, const Column& column) {
#pragma unroll
        for (u32 f = 0; f < 4; ++f) {
            u32 mask = FIELD << 2 * f;
            low[f] = dot4(tile.z & mask, column.q[4 + f], dot4(tile.x & mask, column.q[f], low[f]));
            high[f] = dot4(tile.w & mask, column.q[4 + f], dot4(tile.y & mask, column.q[f], high[f]));
        }
    }

    // This lane's parts of the sums of rows g and g + 8.
    __device__ __forceinline__ int2 sums() const {
        return make_int2(low[0] + (low[1] >> 2) + (low[2] >> 4) + (low[3] >> 6),
                         high[0] + (high[1] >> 2) + (high[2] >> 4) + (high[3] >> 6));
    }
};
#endif
