// Norms and the quantiser as in norms.cu, for rows whose width is a multiple of eight: a row in the registers of its block,
// 16 bytes an access. What makes the row can be part of it:
//
//   ROWS        x
//   SWIGLU      x = silu(a) * b
//   NORM_GATE   RMSNorm(g; outer) * silu(h): the norm of g whose weight, in this row, is outer * silu(h)
//
// A block takes some rows, one after the other. While it works on one, each thread copies its own elements of the next ones
// to its own places in shared memory.

enum Input { ROWS, SWIGLU, NORM_GATE };

// Places in shared memory for PIECES times 16 bytes of each vector of a row, for AHEAD rows.
template <u32 PIECES, u32 AHEAD>
struct Pipeline {
    static __device__ __forceinline__ uint4* at(u32 m, u32 piece, u32 j) {
        return (uint4*)memory + (((m % AHEAD) * PIECES + piece) * VECTORS + j) * blockDim.x + threadIdx.x;
    }
    static __device__ __forceinline__ uint4 bits(u32 m, u32 piece, u32 j) { return *at(m, piece, j); }
};

// An element of a row before its norms, z = x w, and what its gradient needs.
struct Element {
    float x, w, sigmoid;
};

// Eight elements, of bits that are x, a or g, of b or h, of the factor of the row and of `outer` (or ones).
template <Input INPUT>
__device__ __forceinline__ void elements(uint4 first, uint4 second, float factor, const float (&outer)[8],
                                         Element (&out)[8]) {
    float x[8], y[8];
    unpack(first, x);
    if (INPUT != ROWS) unpack(second, y);
#pragma unroll
    for (u32 e = 0; e < 8; ++e) {
        Element z = {x[e], outer[e], 0.0f};
        if (INPUT == SWIGLU) {
            float a = x[e] * factor;
            z.sigmoid = fast_sigmoid(a);
            z.x = a * z.sigmoid * (y[e] * factor);
        }
        if (INPUT == NORM_GATE) {
            z.x = x[e] * factor;
            z.sigmoid = fast_sigmoid(y[e]);
            z.w = outer[e] * (y[e] * z.sigmoid);
        }
        out[e] = z;
    }
}

// Begins to copy the parts of row m that the input is made of.
template <Input INPUT, typename Places>
__device__ __forceinline__ void fetch_input(const u16* x, const u16* h, u32 m, u32 n) {
#pragma unroll
    for (u32 j = 0; j < VECTORS; ++j) {
        u32 k = vector_at(j);
        if (k >= n) break;
        const u16* row = x + (size_t)m * (INPUT == SWIGLU ? 2 * n : n) + k;
        copy_ahead<16>(Places::at(m, 0, j), row);
        if (INPUT == SWIGLU) copy_ahead<16>(Places::at(m, 1, j), row + n);
        if (INPUT == NORM_GATE) copy_ahead<16>(Places::at(m, 1, j), h + (size_t)m * n + k);
    }
}

// `outer` of a thread's vectors, ones where there is none.
__device__ __forceinline__ void load_or_ones(const float* at, float (&w)[8]) {
    if (at) return load_eight(at, w);
#pragma unroll
    for (u32 e = 0; e < 8; ++e) w[e] = 1.0f;
}

// The rows of this block.
__device__ __forceinline__ u32 row_of_block(u32 rows, u32 block) { return (u32)((u64)rows * block / gridDim.x); }

// The scales 1 / rms only multiply, so that sums and largest values of z w_j are taken in one go.
template <Input INPUT, u32 LAYERS>
__device__ __forceinline__ void norm_quantize_vectors(const QuantizeArgs& a) {
    constexpr u32 AHEAD = 4;
    using Places = Pipeline<INPUT == ROWS ? 1 : 2, AHEAD>;
    __shared__ float parts[2][VECTOR_THREADS / 32 * (2 + LAYERS)];
    u32 n = a.width;
    float outer[VECTORS][8], inner[LAYERS][VECTORS][8], gamma[LAYERS];
#pragma unroll
    for (u32 j = 0; j < VECTORS; ++j) {
        u32 k = vector_at(j);
        if (k >= n) break;
        load_or_ones(a.outer ? a.outer + k : nullptr, outer[j]);
#pragma unroll
        for (u32 l = 0; l < LAYERS; ++l) load_eight(a.inner[l] + k, inner[l][j]);
    }
#pragma unroll
    for (u32 l = 0; l < LAYERS; ++l) gamma[l] = *a.gamma[l];
    u32 first = row_of_block(a.rows, blockIdx.x), end = row_of_block(a.rows, blockIdx.x + 1);
    for (u32 m = first; m < first + AHEAD - 1; ++m) {
        if (m < end) fetch_input<INPUT, Places>(a.x, a.h, m, n);
        commit_ahead();
    }
    for (u32 m = first; m < end; ++m) {
        if (m + AHEAD - 1 < end) fetch_input<INPUT, Places>(a.x, a.h, m + AHEAD - 1, n);
        commit_ahead();
        wait_ahead<AHEAD - 1>();
        float factor = INPUT == ROWS ? 1.0f : factor_of(a.x_factors, m);
        float z[VECTORS][8], all[2 + LAYERS];
#pragma unroll
        for (u32 i = 0; i < 2 + LAYERS; ++i) all[i] = 0.0f;
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            if (vector_at(j) >= n) break;
            Element element[8];
            elements<INPUT>(Places::bits(m, 0, j), INPUT == ROWS ? uint4{} : Places::bits(m, 1, j), factor, outer[j],
                            element);
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                z[j][e] = element[e].x * element[e].w;
                all[0] += element[e].x * element[e].x;
                all[1] += z[j][e] * z[j][e];
#pragma unroll
                for (u32 l = 0; l < LAYERS; ++l) all[2 + l] = fmaxf(all[2 + l], fabsf(z[j][e] * inner[l][j][e]));
            }
        }
        block_reduce<2>(all, parts[m % 2]);
        float r1 = a.outer ? 1.0f / sqrtf(all[0] / (float)n + a.eps) : 1.0f;
        float r = r1 / sqrtf(r1 * r1 * all[1] / (float)n + 1e-6f);
#pragma unroll
        for (u32 l = 0; l < LAYERS; ++l) {
            float scale = quantizer_scale(all[2 + l] * r);
            float multiplier = r * scale, step = a.divide ? 1.0f / scale : 1.0f;
#pragma unroll
            for (u32 j = 0; j < VECTORS; ++j) {
                u32 k = vector_at(j);
                if (k >= n) break;
                int integers[8];
#pragma unroll
                for (u32 e = 0; e < 8; ++e) integers[e] = quantize(z[j][e] * inner[l][j][e] * multiplier);
                if (a.bytes) {
                    *(uint2*)((i8*)a.q[l] + (size_t)m * n + k) = make_uint2(pack_bytes(integers), pack_bytes(integers + 4));
                } else {
                    float q[8];
#pragma unroll
                    for (u32 e = 0; e < 8; ++e) q[e] = (float)integers[e] * step;
                    *(uint4*)(a.q[l] + (size_t)m * n + k) = pack(q);
                }
            }
            if (threadIdx.x == 0 && !a.divide) a.factors[l][m] = gamma[l] / scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS) norm_quantize_vectors_1(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_vectors<ROWS, 1>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS) norm_quantize_vectors_2(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_vectors<ROWS, 2>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS) norm_quantize_vectors_3(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_vectors<ROWS, 3>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS) swiglu_quantize(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_vectors<SWIGLU, 1>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS) norm_gate_quantize(const __grid_constant__ QuantizeArgs a) {
    norm_quantize_vectors<NORM_GATE, 1>(a);
}

// With z = x w, every mean follows from the sums of x^2, z^2 and v z, so that one reduction a row is enough. Then on through
// what made the row, from dx or from the gradient of w.
template <Input INPUT, u32 LAYERS>
__device__ __forceinline__ void norm_backward_vectors(const NormBackwardArgs& a) {
    constexpr u32 GRADIENTS = LAYERS > 0 ? LAYERS : 1, AHEAD = 2;
    // Places: the input, the products' gradients, dx.
    constexpr u32 DN = INPUT == ROWS ? 1 : 2, DX = DN + GRADIENTS;
    using Places = Pipeline<DX + (INPUT == ROWS ? 2 : 0), AHEAD>;
    __shared__ float parts[2][VECTOR_THREADS / 32 * 3];
    u32 n = a.width, sums = LAYERS + (a.outer ? 1 : 0);
    float total[LAYERS + 1][VECTORS][8];
#pragma unroll
    for (u32 i = 0; i <= LAYERS; ++i)
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j)
#pragma unroll
            for (u32 e = 0; e < 8; ++e) total[i][j][e] = 0.0f;
    float gamma[GRADIENTS];
#pragma unroll
    for (u32 l = 0; l < GRADIENTS; ++l) gamma[l] = LAYERS > 0 ? *a.gamma[l] : 1.0f;
    auto fetch = [&](u32 m) {
        fetch_input<INPUT, Places>(a.x, a.h, m, n);
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
            size_t at = (size_t)m * n + k;
#pragma unroll
            for (u32 l = 0; l < GRADIENTS; ++l) copy_ahead<16>(Places::at(m, DN + l, j), a.dn[l] + at);
            if (INPUT == ROWS && a.add) {
                copy_ahead<16>(Places::at(m, DX, j), a.dx + at);
                copy_ahead<16>(Places::at(m, DX + 1, j), a.dx + at + 4);
            }
        }
    };
    u32 first = row_of_block(a.rows, blockIdx.x), end = row_of_block(a.rows, blockIdx.x + 1);
    for (u32 m = first; m < first + AHEAD - 1; ++m) {
        if (m < end) fetch(m);
        commit_ahead();
    }
    for (u32 m = first; m < end; ++m) {
        if (m + AHEAD - 1 < end) fetch(m + AHEAD - 1);
        commit_ahead();
        wait_ahead<AHEAD - 1>();
        float factor = INPUT == ROWS ? 1.0f : factor_of(a.x_factors, m);
        float v[VECTORS][8], all[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
            float w[8];
#pragma unroll
            for (u32 e = 0; e < 8; ++e) v[j][e] = 0.0f;
#pragma unroll
            for (u32 l = 0; l < GRADIENTS; ++l) {
                float d[8];
                unpack(Places::bits(m, DN + l, j), d);
                load_or_ones(LAYERS > 0 ? a.inner[l] + k : nullptr, w);
#pragma unroll
                for (u32 e = 0; e < 8; ++e) v[j][e] += d[e] * gamma[l] * w[e];
            }
            Element element[8];
            load_or_ones(a.outer ? a.outer + k : nullptr, w);
            elements<INPUT>(Places::bits(m, 0, j), INPUT == ROWS ? uint4{} : Places::bits(m, 1, j), factor, w, element);
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                float z = element[e].x * element[e].w;
                all[0] += element[e].x * element[e].x;
                all[1] += z * z;
                all[2] += v[j][e] * z;
            }
        }
        block_reduce<3>(all, parts[m % 2]);
        float count = (float)n;
        float r1 = a.outer ? 1.0f / sqrtf(all[0] / count + a.eps) : 1.0f;
        float r2 = LAYERS > 0 ? 1.0f / sqrtf(r1 * r1 * all[1] / count + 1e-6f) : 1.0f;
        // Means of v u r2 and of du w x r1, where u = z r1 and du = r2 (v - u r2 mean1).
        float mean1 = LAYERS > 0 ? r1 * r2 * all[2] / count : 0.0f;
        float mean2 = r1 * r2 * (all[2] - r1 * r2 * mean1 * all[1]) / count;
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
            size_t at = (size_t)m * n + k;
            float outer[8], second[8], du[8], dx[8];
            Element element[8];
            load_or_ones(a.outer ? a.outer + k : nullptr, outer);
            if (INPUT != ROWS) unpack(Places::bits(m, 1, j), second);
            elements<INPUT>(Places::bits(m, 0, j), INPUT == ROWS ? uint4{} : Places::bits(m, 1, j), factor, outer,
                            element);
#pragma unroll
            for (u32 l = 0; l < LAYERS; ++l) {
                float d[8];
                unpack(Places::bits(m, DN + l, j), d);
#pragma unroll
                for (u32 e = 0; e < 8; ++e)
                    total[l][j][e] += d[e] * gamma[l] * (element[e].x * element[e].w * (r1 * r2));
            }
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                float x = element[e].x, w = element[e].w;
                du[e] = r2 * (v[j][e] - x * w * (r1 * r2) * mean1);
                dx[e] = a.outer ? r1 * (du[e] * w - x * r1 * mean2) : du[e];
            }
            if (INPUT == ROWS) {
#pragma unroll
                for (u32 e = 0; e < 8; ++e) total[LAYERS][j][e] += du[e] * (element[e].x * r1);
                if (a.add) {
                    float before[8];
                    load_eight((const float*)Places::at(m, DX, j), (const float*)Places::at(m, DX + 1, j), before);
#pragma unroll
                    for (u32 e = 0; e < 8; ++e) dx[e] += before[e];
                }
                if (a.dx) store_eight(a.dx + at, dx);
                *(uint4*)(a.dx_half + at) = pack(dx);
            }
            if (INPUT == NORM_GATE) {
                float dh[8];
#pragma unroll
                for (u32 e = 0; e < 8; ++e) {
                    // The gradient of w = outer * silu(h).
                    float dw = du[e] * (element[e].x * r1);
                    total[LAYERS][j][e] += dw * (second[e] * element[e].sigmoid);
                    dh[e] = dw * outer[e] * silu_derivative(second[e], element[e].sigmoid);
                }
                *(uint4*)(a.dx_half + at) = pack(dx);
                *(uint4*)(a.dh + at) = pack(dh);
            }
            if (INPUT == SWIGLU) {
                float left[8], da[8], db[8];
                unpack(Places::bits(m, 0, j), left);
#pragma unroll
                for (u32 e = 0; e < 8; ++e) {
                    float x = left[e] * factor, s = element[e].sigmoid;
                    da[e] = dx[e] * (second[e] * factor) * silu_derivative(x, s);
                    db[e] = dx[e] * x * s;
                }
                u16* out = a.dx_half + (size_t)m * 2 * n + k;
                *(uint4*)out = pack(da);
                *(uint4*)(out + n) = pack(db);
            }
        }
    }
    float* out = a.partials + (size_t)blockIdx.x * sums * n;
#pragma unroll
    for (u32 j = 0; j < VECTORS; ++j) {
        u32 k = vector_at(j);
        if (k >= n) break;
#pragma unroll
        for (u32 i = 0; i <= LAYERS; ++i)
            if (i < sums) store_eight(out + (size_t)i * n + k, total[i][j]);
    }
}

extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    norm_backward_vectors_0(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_vectors<ROWS, 0>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    norm_backward_vectors_1(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_vectors<ROWS, 1>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    norm_backward_vectors_2(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_vectors<ROWS, 2>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    norm_backward_vectors_3(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_vectors<ROWS, 3>(a);
}
// Its rows are wide: two blocks a multiprocessor must fit.
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS, 2)
    swiglu_norm_backward(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_vectors<SWIGLU, 1>(a);
}
extern "C" __global__ void __launch_bounds__(VECTOR_THREADS)
    norm_gate_norm_backward(const __grid_constant__ NormBackwardArgs a) {
    norm_backward_vectors<NORM_GATE, 1>(a);
}
