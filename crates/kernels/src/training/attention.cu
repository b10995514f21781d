// Causal softmax attention without a [T, T] matrix, by bf16 tensor cores, and RoPE.
//
// A block works on 64 queries (forward, dQ) or 64 keys (dK, dV) of one head and walks over the others in tiles; four
// warps have 16 rows each. Heads are padded with zeros to HD channels in shared memory.

constexpr u32 ROWS = 64;
constexpr u32 ATTENTION_THREADS = 128;

struct AttentionArgs {
    const u16* qkv;         // [M][3D]
    u16* y;                 // [M][D]; read by the backward pass
    float* log_sums;        // [M][H]: ln sum exp(q k / sqrt(head))
    const u16* dy;          // [M][D]
    float* deltas;          // [M][H]: sum of dy y over a head
    u16* d_qkv;             // [M][3D]
    u32 length, heads, head, width;  // T, H, D / H, D
    float scale;            // 1 / sqrt(head)
};

__device__ __forceinline__ void load_matrices(u32 (&r)[4], const u16* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(at))
                 : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], const u16* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(at))
                 : "memory");
}

// c += a b for 16 rows, 8 columns, 16 inputs.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rows of a tile lie HD + 8 elements apart, so that eight of them meet all banks.
template <u32 HD>
constexpr u32 STRIDE = HD + 8;

// `count` rows of one head from row `first` of a sequence on; zeros behind the sequence and the head.
template <u32 HD>
__device__ __forceinline__ void load_tile(u16* tile, const u16* from, size_t stride, u32 first, u32 count, u32 length,
                                          u32 head) {
    if (head % 8 == 0) {
        for (u32 n = threadIdx.x; n < count * (HD / 8); n += ATTENTION_THREADS) {
            u32 row = n / (HD / 8), column = n % (HD / 8) * 8;
            uint4 value = make_uint4(0, 0, 0, 0);
            if (first + row < length && column < head)
                value = *(const uint4*)(from + (size_t)(first + row) * stride + column);
            *(uint4*)(tile + row * STRIDE<HD> + column) = value;
        }
        return;
    }
    for (u32 n = threadIdx.x; n < count * HD; n += ATTENTION_THREADS) {
        u32 row = n / HD, column = n % HD;
        bool inside = first + row < length && column < head;
        tile[row * STRIDE<HD> + column] = inside ? from[(size_t)(first + row) * stride + column] : (u16)0;
    }
}

// c[16][8 N] += rows [16][HD] of `a` times rows [8 N][HD] of `b`, transposed.
template <u32 HD, u32 N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const u16* a, const u16* b) {
    u32 lane = threadIdx.x % 32;
    const u16* a_at = a + (lane % 16) * STRIDE<HD> + lane / 16 * 8;
    const u16* b_at = b + (lane % 8 + lane / 16 * 8) * STRIDE<HD> + lane / 8 % 2 * 8;
#pragma unroll
    for (u32 k = 0; k < HD; k += 16) {
        u32 left[4];
        load_matrices(left, a_at + k);
#pragma unroll
        for (u32 n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrices(right, b_at + n * 8 * STRIDE<HD> + k);
            mma_bf16(c[n], left, right[0], right[1]);
            mma_bf16(c[n + 1], left, right[2], right[3]);
        }
    }
}

// c[16][HD] += p[16][8 N], held as the result of a product, times rows [8 N][HD] of `b`.
template <u32 HD, u32 N>
__device__ __forceinline__ void multiply_held(float (&c)[HD / 8][4], const float (&p)[N][4], const u16* b) {
    u32 lane = threadIdx.x % 32;
    const u16* b_at = b + (lane % 16) * STRIDE<HD> + lane / 16 * 8;
#pragma unroll
    for (u32 k = 0; k < N; k += 2) {
        u32 left[4] = {pack_bf16(p[k][0], p[k][1]), pack_bf16(p[k][2], p[k][3]), pack_bf16(p[k + 1][0], p[k + 1][1]),
                       pack_bf16(p[k + 1][2], p[k + 1][3])};
#pragma unroll
        for (u32 n = 0; n < HD / 8; n += 2) {
            u32 right[4];
            load_transposed(right, b_at + k * 8 * STRIDE<HD> + n * 8);
            mma_bf16(c[n], left, right[0], right[1]);
            mma_bf16(c[n + 1], left, right[2], right[3]);
        }
    }
}

template <u32 N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

// Writes 16 rows of a result, each times a factor.
template <u32 HD>
__device__ __forceinline__ void store_rows(const float (&c)[HD / 8][4], u16* to, size_t stride, u32 first, u32 length,
                                           u32 head, float upper, float lower) {
    u32 lane = threadIdx.x % 32, row = first + lane / 4;
#pragma unroll
    for (u32 n = 0; n < HD / 8; ++n) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            u32 r = row + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
            if (r < length && column < head) to[(size_t)r * stride + column] = to_bf16(c[n][e] * (e < 2 ? upper : lower));
        }
    }
}

template <u32 HD>
__device__ __forceinline__ void forward(const AttentionArgs& a) {
    u16 *q = (u16*)memory, *k = q + ROWS * STRIDE<HD>, *v = k + ROWS * STRIDE<HD>;
    u32 first = (gridDim.x - 1 - blockIdx.x) * ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t stride = 3 * (size_t)a.width, base = (size_t)blockIdx.z * a.length;
    const u16* queries = a.qkv + base * stride + blockIdx.y * a.head;
    load_tile<HD>(q, queries, stride, first, ROWS, a.length, a.head);
    float out[HD / 8][4], top[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
    clear(out);
    for (u32 from = 0; from <= first; from += ROWS) {
        __syncthreads();
        load_tile<HD>(k, queries + a.width, stride, from, ROWS, a.length, a.head);
        load_tile<HD>(v, queries + 2 * a.width, stride, from, ROWS, a.length, a.head);
        __syncthreads();
        float s[ROWS / 8][4];
        clear(s);
        multiply_rows<HD>(s, q + warp * 16 * STRIDE<HD>, k);
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; ++n) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                u32 query = first + warp * 16 + lane / 4 + e / 2 * 8, key = from + n * 8 + lane % 4 * 2 + e % 2;
                s[n][e] = key <= query ? s[n][e] * a.scale : -1e30f;
                higher[e / 2] = fmaxf(higher[e / 2], s[n][e]);
            }
        }
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(ALL_LANES, higher[h], 1));
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(ALL_LANES, higher[h], 2));
            float shrink = __expf(top[h] - higher[h]);
            top[h] = higher[h];
            sum[h] *= shrink;
#pragma unroll
            for (u32 n = 0; n < HD / 8; ++n) {
                out[n][2 * h] *= shrink;
                out[n][2 * h + 1] *= shrink;
            }
        }
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; ++n) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                s[n][e] = __expf(s[n][e] - top[e / 2]);
                sum[e / 2] += s[n][e];
            }
        }
        multiply_held<HD>(out, s, v);
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], 1);
        sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], 2);
        u32 query = first + warp * 16 + lane / 4 + h * 8;
        if (lane % 4 == 0 && query < a.length)
            a.log_sums[(base + query) * a.heads + blockIdx.y] = top[h] + logf(sum[h]);
    }
    store_rows<HD>(out, a.y + base * a.width + blockIdx.y * a.head, a.width, first + warp * 16, a.length, a.head,
                   1.0f / sum[0], 1.0f / sum[1]);
}

// dQ = (P * (dY V' - delta)) K / sqrt(head).
template <u32 HD>
__device__ __forceinline__ void backward_queries(const AttentionArgs& a) {
    u16 *q = (u16*)memory, *dy = q + ROWS * STRIDE<HD>, *k = dy + ROWS * STRIDE<HD>, *v = k + ROWS * STRIDE<HD>;
    u32 first = (gridDim.x - 1 - blockIdx.x) * ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t stride = 3 * (size_t)a.width, base = (size_t)blockIdx.z * a.length;
    const u16* queries = a.qkv + base * stride + blockIdx.y * a.head;
    load_tile<HD>(q, queries, stride, first, ROWS, a.length, a.head);
    load_tile<HD>(dy, a.dy + base * a.width + blockIdx.y * a.head, a.width, first, ROWS, a.length, a.head);
    float log_sum[2], delta[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        u32 query = first + warp * 16 + lane / 4 + h * 8;
        size_t at = (base + query) * a.heads + blockIdx.y;
        log_sum[h] = query < a.length ? a.log_sums[at] : 0.0f;
        delta[h] = query < a.length ? a.deltas[at] : 0.0f;
    }
    float dq[HD / 8][4];
    clear(dq);
    for (u32 from = 0; from <= first; from += ROWS) {
        __syncthreads();
        load_tile<HD>(k, queries + a.width, stride, from, ROWS, a.length, a.head);
        load_tile<HD>(v, queries + 2 * a.width, stride, from, ROWS, a.length, a.head);
        __syncthreads();
        float s[ROWS / 8][4], dp[ROWS / 8][4];
        clear(s);
        clear(dp);
        multiply_rows<HD>(s, q + warp * 16 * STRIDE<HD>, k);
        multiply_rows<HD>(dp, dy + warp * 16 * STRIDE<HD>, v);
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; ++n) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                u32 query = first + warp * 16 + lane / 4 + e / 2 * 8, key = from + n * 8 + lane % 4 * 2 + e % 2;
                bool seen = key <= query && query < a.length;
                float p = seen ? __expf(s[n][e] * a.scale - log_sum[e / 2]) : 0.0f;
                s[n][e] = p * (dp[n][e] - delta[e / 2]);
            }
        }
        multiply_held<HD>(dq, s, k);
    }
    store_rows<HD>(dq, a.d_qkv + base * stride + blockIdx.y * a.head, stride, first + warp * 16, a.length, a.head,
                   a.scale, a.scale);
}

// dV = P' dY and dK = (P * (dY V' - delta))' Q / sqrt(head), QUERIES at a time.
template <u32 HD, u32 QUERIES>
__device__ __forceinline__ void backward_keys(const AttentionArgs& a) {
    __shared__ float log_sums[QUERIES], deltas[QUERIES];
    u16 *k = (u16*)memory, *v = k + ROWS * STRIDE<HD>, *q = v + ROWS * STRIDE<HD>, *dy = q + QUERIES * STRIDE<HD>;
    u32 first = blockIdx.x * ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t stride = 3 * (size_t)a.width, base = (size_t)blockIdx.z * a.length;
    const u16* queries = a.qkv + base * stride + blockIdx.y * a.head;
    load_tile<HD>(k, queries + a.width, stride, first, ROWS, a.length, a.head);
    load_tile<HD>(v, queries + 2 * a.width, stride, first, ROWS, a.length, a.head);
    float dk[HD / 8][4], dv[HD / 8][4];
    clear(dk);
    clear(dv);
    for (u32 from = first; from < a.length; from += QUERIES) {
        __syncthreads();
        load_tile<HD>(q, queries, stride, from, QUERIES, a.length, a.head);
        load_tile<HD>(dy, a.dy + base * a.width + blockIdx.y * a.head, a.width, from, QUERIES, a.length, a.head);
        if (threadIdx.x < QUERIES) {
            u32 query = from + threadIdx.x;
            size_t at = (base + query) * a.heads + blockIdx.y;
            log_sums[threadIdx.x] = query < a.length ? a.log_sums[at] : 0.0f;
            deltas[threadIdx.x] = query < a.length ? a.deltas[at] : 0.0f;
        }
        __syncthreads();
        float s[QUERIES / 8][4], dp[QUERIES / 8][4];
        clear(s);
        clear(dp);
        multiply_rows<HD>(s, k + warp * 16 * STRIDE<HD>, q);
        multiply_rows<HD>(dp, v + warp * 16 * STRIDE<HD>, dy);
#pragma unroll
        for (u32 n = 0; n < QUERIES / 8; ++n) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                u32 column = n * 8 + lane % 4 * 2 + e % 2;
                u32 query = from + column, key = first + warp * 16 + lane / 4 + e / 2 * 8;
                bool seen = key <= query && query < a.length;
                float p = seen ? __expf(s[n][e] * a.scale - log_sums[column]) : 0.0f;
                s[n][e] = p;
                dp[n][e] = p * (dp[n][e] - deltas[column]);
            }
        }
        multiply_held<HD>(dv, s, dy);
        multiply_held<HD>(dk, dp, q);
    }
    u16* to = a.d_qkv + base * stride + blockIdx.y * a.head;
    store_rows<HD>(dk, to + a.width, stride, first + warp * 16, a.length, a.head, a.scale, a.scale);
    store_rows<HD>(dv, to + 2 * a.width, stride, first + warp * 16, a.length, a.head, 1.0f, 1.0f);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_forward_64(const __grid_constant__ AttentionArgs a) {
    forward<64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_forward_128(const __grid_constant__ AttentionArgs a) {
    forward<128>(a);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_queries_64(const __grid_constant__ AttentionArgs a) {
    backward_queries<64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_queries_128(const __grid_constant__ AttentionArgs a) {
    backward_queries<128>(a);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_keys_64(const __grid_constant__ AttentionArgs a) {
    backward_keys<64, 64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_keys_128(const __grid_constant__ AttentionArgs a) {
    backward_keys<128, 32>(a);
}

// deltas = sum of dy y over each head. A warp has one head of one row.
extern "C" __global__ void __launch_bounds__(THREADS) attention_deltas(const __grid_constant__ AttentionArgs a) {
    u32 n = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n / a.heads >= a.length) return;  // here the rows of all sequences
    size_t at = (size_t)(n / a.heads) * a.width + n % a.heads * a.head;
    float sum = 0.0f;
    for (u32 k = lane; k < a.head; k += 32) sum += to_f32(a.dy[at + k]) * to_f32(a.y[at + k]);
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, width);
    if (lane == 0) a.deltas[n] = sum;
}

struct RopeArgs {
    u16* qkv;       // [M][3D]
    float* table;   // [T][head / 2][2]: cosine and sine
    u32 rows, length, heads, head, width;
    float theta, sign;
};

extern "C" __global__ void __launch_bounds__(THREADS) rope_table(const __grid_constant__ RopeArgs a) {
    u32 half = a.head / 2, n = blockIdx.x * THREADS + threadIdx.x;
    if (n >= a.length * half) return;
    double angle = (double)(n / half) * pow((double)a.theta, -2.0 * (double)(n % half) / (double)a.head);
    a.table[2 * n] = (float)cos(angle);
    a.table[2 * n + 1] = (float)sin(angle);
}

// Rotates queries and keys by their position.
extern "C" __global__ void __launch_bounds__(THREADS) rope_rows(const __grid_constant__ RopeArgs a) {
    u32 half = a.head / 2, m = blockIdx.x;
    const float* table = a.table + (size_t)(m % a.length) * half * 2;
    for (u32 n = threadIdx.x; n < 2 * a.heads * half; n += THREADS) {
        u32 j = n % half;
        // Heads of the queries, then of the keys, lie one behind the other.
        u16* low = a.qkv + (size_t)m * 3 * a.width + n / half * a.head + j;
        float x = to_f32(low[0]), y = to_f32(low[half]), c = table[2 * j], s = table[2 * j + 1] * a.sign;
        low[0] = to_bf16(x * c - y * s);
        low[half] = to_bf16(y * c + x * s);
    }
}
