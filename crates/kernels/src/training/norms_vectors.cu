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

// A thread's places in shared memory for PIECES times 16 bytes of each of its vectors, for AHEAD of its block's rows. A
// piece's places of neighbouring threads are neighbours: a warp's copies are whole lines. The host knows the size, too.
template <u32 PIECES, u32 AHEAD>
struct Pipeline {
    static __device__ __forceinline__ uint4* row(u32 turn) {
        return (uint4*)memory + turn % AHEAD * PIECES * VECTORS * blockDim.x + threadIdx.x;
    }
    static __device__ __forceinline__ uint4* at(uint4* row, u32 piece, u32 j) {
        return row + (piece * VECTORS + j) * blockDim.x;
    }
};

// Whether there is a norm before the inner one.
template <Input INPUT>
__device__ __forceinline__ bool has_outer(const float* outer) {
    return INPUT == NORM_GATE || (INPUT == ROWS && outer);
}

// Elements of a row before its norms, z = x w, and what their gradients need.
struct Elements {
    float x[8], w[8];
    float sigmoid[8], gate[8], other[8];  // of a or h; silu of it; b or h
};

// Of bits that are x, a or g, of b or h, of the factor of the row and of the norm's weight (or null).
template <Input INPUT>
__device__ __forceinline__ Elements elements(uint4 first, const uint4* second, float factor, const float* outer) {
    Elements z;
    unpack(first, z.x);
    if (INPUT != ROWS) unpack(*second, z.other);
    if (INPUT == SWIGLU) {
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            float a = z.x[e] * factor;
            z.other[e] *= factor;
            z.sigmoid[e] = fast_sigmoid(a);
            z.gate[e] = a * z.sigmoid[e];
            z.x[e] = z.gate[e] * z.other[e];
        }
        return z;
    }
    if (outer) {
        load_eight(outer, z.w);
    } else {
#pragma unroll
        for (u32 e = 0; e < 8; ++e) z.w[e] = 1.0f;
    }
    if (INPUT == NORM_GATE) {
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            z.x[e] *= factor;
            z.sigmoid[e] = fast_sigmoid(z.other[e]);
            z.gate[e] = z.other[e] * z.sigmoid[e];
            z.w[e] *= z.gate[e];
        }
    }
    return z;
}

template <Input INPUT>
__device__ __forceinline__ float weighted(const Elements& z, u32 e) {
    return INPUT == SWIGLU ? z.x[e] : z.x[e] * z.w[e];
}

// Begins to copy the parts of row m that the input is made of.
template <Input INPUT, typename Places>
__device__ __forceinline__ void fetch_input(uint4* places, const u16* x, const u16* h, u32 m, u32 n) {
#pragma unroll
    for (u32 j = 0; j < VECTORS; ++j) {
        u32 k = vector_at(j);
        if (k >= n) break;
        const u16* row = x + (size_t)m * (INPUT == SWIGLU ? 2 * n : n) + k;
        copy_ahead<16>(Places::at(places, 0, j), row);
        if (INPUT == SWIGLU) copy_ahead<16>(Places::at(places, 1, j), row + n);
        if (INPUT == NORM_GATE) copy_ahead<16>(Places::at(places, 1, j), h + (size_t)m * n + k);
    }
}

// The rows of this block.
__device__ __forceinline__ u32 row_of_block(u32 rows, u32 block) { return (u32)((u64)rows * block / gridDim.x); }

// Rounds half to even. The integer is in the lowest byte of what is returned, and what is left of it without ROUND is the
// integer as a float. Nothing is clamped: the largest value of a row becomes 127 but for roundings far below one half.
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23
__device__ __forceinline__ float rounded(float y) { return y + ROUND; }

__device__ __forceinline__ u32 lowest_bytes(const float* x) {
    u32 low = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x0040);
    u32 high = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// The scales 1 / rms only multiply, so that sums and largest values of z w_j are taken in one go.
template <Input INPUT, u32 LAYERS>
__device__ __forceinline__ void norm_quantize_vectors(const QuantizeArgs& a) {
    constexpr u32 AHEAD = INPUT == ROWS ? 4 : 2;
    using Places = Pipeline<INPUT == ROWS ? 1 : 2, AHEAD>;
    __shared__ float parts[2][VECTOR_THREADS / 32 * (2 + LAYERS)];
    u32 n = a.width;
    bool outer = has_outer<INPUT>(a.outer);
    float inner[LAYERS][VECTORS][8], gamma[LAYERS];
#pragma unroll
    for (u32 j = 0; j < VECTORS; ++j) {
        u32 k = vector_at(j);
        if (k >= n) break;
#pragma unroll
        for (u32 l = 0; l < LAYERS; ++l) load_eight(a.inner[l] + k, inner[l][j]);
    }
#pragma unroll
    for (u32 l = 0; l < LAYERS; ++l) gamma[l] = *a.gamma[l];
    u32 first = row_of_block(a.rows, blockIdx.x), end = row_of_block(a.rows, blockIdx.x + 1);
    auto fetch = [&](u32 m) { fetch_input<INPUT, Places>(Places::row(m - first), a.x, a.h, m, n); };
    for (u32 m = first; m < first + AHEAD - 1; ++m) {
        if (m < end) fetch(m);
        commit_ahead();
    }
    for (u32 m = first; m < end; ++m) {
        if (m + AHEAD - 1 < end) fetch(m + AHEAD - 1);
        commit_ahead();
        wait_ahead<AHEAD - 1>();
        float factor = INPUT == ROWS ? 1.0f : factor_of(a.x_factors, m);
        uint4* places = Places::row(m - first);
        // z, or z times its weight if there is only one.
        float z[VECTORS][8], all[2 + LAYERS];
#pragma unroll
        for (u32 i = 0; i < 2 + LAYERS; ++i) all[i] = 0.0f;
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
            Elements row = elements<INPUT>(*Places::at(places, 0, j), Places::at(places, 1, j), factor,
                                           outer ? a.outer + k : nullptr);
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                z[j][e] = weighted<INPUT>(row, e);
                if (INPUT != SWIGLU) all[0] += row.x[e] * row.x[e];
                all[1] += z[j][e] * z[j][e];
                if (LAYERS == 1) {
                    z[j][e] *= inner[0][j][e];
                    all[2] = fmaxf(all[2], fabsf(z[j][e]));
                } else {
#pragma unroll
                    for (u32 l = 0; l < LAYERS; ++l) all[2 + l] = fmaxf(all[2 + l], fabsf(z[j][e] * inner[l][j][e]));
                }
            }
        }
        block_reduce<2>(all, parts[m % 2]);
        float r1 = outer ? 1.0f / sqrtf(all[0] / (float)n + a.eps) : 1.0f;
        float r = r1 / sqrtf(r1 * r1 * all[1] / (float)n + 1e-6f);
#pragma unroll
        for (u32 l = 0; l < LAYERS; ++l) {
            float scale = quantizer_scale(all[2 + l] * r);
            float multiplier = r * scale, step = a.divide ? 1.0f / scale : 1.0f;
#pragma unroll
            for (u32 j = 0; j < VECTORS; ++j) {
                u32 k = vector_at(j);
                if (k >= n) break;
                size_t at = (size_t)m * n + k;
                float q[8];
#pragma unroll
                for (u32 e = 0; e < 8; ++e)
                    q[e] = rounded((LAYERS == 1 ? z[j][e] : z[j][e] * inner[l][j][e]) * multiplier);
                if (a.bytes) {
                    *(uint2*)((i8*)a.q[l] + at) = make_uint2(lowest_bytes(q), lowest_bytes(q + 4));
                } else {
#pragma unroll
                    for (u32 e = 0; e < 8; ++e) q[e] = (q[e] - ROUND) * step;
                    *(uint4*)(a.q[l] + at) = pack(q);
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
    bool outer = has_outer<INPUT>(a.outer);
    float total[LAYERS + 1][VECTORS][8];
#pragma unroll
    for (u32 i = 0; i <= LAYERS; ++i)
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j)
#pragma unroll
            for (u32 e = 0; e < 8; ++e) total[i][j][e] = 0.0f;
    // One layer's gamma multiplies everything: it waits for the end.
    float gamma[GRADIENTS], last = LAYERS == 1 ? *a.gamma[0] : 1.0f;
#pragma unroll
    for (u32 l = 0; l < GRADIENTS; ++l) gamma[l] = LAYERS > 1 ? *a.gamma[l] : 1.0f;
    u32 first = row_of_block(a.rows, blockIdx.x), end = row_of_block(a.rows, blockIdx.x + 1);
    auto fetch = [&](u32 m) {
        uint4* places = Places::row(m - first);
        fetch_input<INPUT, Places>(places, a.x, a.h, m, n);
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
            size_t at = (size_t)m * n + k;
#pragma unroll
            for (u32 l = 0; l < GRADIENTS; ++l) copy_ahead<16>(Places::at(places, DN + l, j), a.dn[l] + at);
            if (INPUT == ROWS && a.add) {
                copy_ahead<16>(Places::at(places, DX, j), a.dx + at);
                copy_ahead<16>(Places::at(places, DX + 1, j), a.dx + at + 4);
            }
        }
    };
    for (u32 m = first; m < first + AHEAD - 1; ++m) {
        if (m < end) fetch(m);
        commit_ahead();
    }
    for (u32 m = first; m < end; ++m) {
        if (m + AHEAD - 1 < end) fetch(m + AHEAD - 1);
        commit_ahead();
        wait_ahead<AHEAD - 1>();
        float factor = INPUT == ROWS ? 1.0f : factor_of(a.x_factors, m);
        uint4* places = Places::row(m - first);
        float v[VECTORS][8], all[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
#pragma unroll
            for (u32 l = 0; l < GRADIENTS; ++l) {
                float d[8], w[8];
                unpack(*Places::at(places, DN + l, j), d);
                if (LAYERS > 0) load_eight(a.inner[l] + k, w);
#pragma unroll
                for (u32 e = 0; e < 8; ++e) {
                    if (LAYERS > 1) w[e] *= gamma[l];
                    v[j][e] = LAYERS == 0 ? d[e] : l == 0 ? d[e] * w[e] : v[j][e] + d[e] * w[e];
                }
            }
            Elements row = elements<INPUT>(*Places::at(places, 0, j), Places::at(places, 1, j), factor,
                                           outer ? a.outer + k : nullptr);
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                float z = weighted<INPUT>(row, e);
                if (INPUT != SWIGLU) all[0] += row.x[e] * row.x[e];
                all[1] += z * z;
                all[2] += v[j][e] * z;
            }
        }
        block_reduce<3>(all, parts[m % 2]);
        float count = (float)n;
        float r1 = outer ? 1.0f / sqrtf(all[0] / count + a.eps) : 1.0f;
        float r2 = LAYERS > 0 ? 1.0f / sqrtf(r1 * r1 * all[1] / count + 1e-6f) : 1.0f;
        // Means of v u r2 and of du w x r1, where u = z r1 and du = r2 (v - u r2 mean1).
        float mean1 = LAYERS > 0 ? r1 * r2 * all[2] / count : 0.0f;
        float mean2 = r1 * r2 * (all[2] - r1 * r2 * mean1 * all[1]) / count;
        // du = v_part v - z_part z, dx = r1 w du - x_part x.
        float u_part = r1 * r2, v_part = r2 * last, z_part = r2 * r1 * r2 * mean1 * last, x_part = r1 * r1 * mean2 * last;
#pragma unroll
        for (u32 j = 0; j < VECTORS; ++j) {
            u32 k = vector_at(j);
            if (k >= n) break;
            size_t at = (size_t)m * n + k;
            float du[8], dx[8];
            Elements row = elements<INPUT>(*Places::at(places, 0, j), Places::at(places, 1, j), factor,
                                           outer ? a.outer + k : nullptr);
#pragma unroll
            for (u32 l = 0; l < LAYERS; ++l) {
                float d[8];
                unpack(*Places::at(places, DN + l, j), d);
#pragma unroll
                for (u32 e = 0; e < 8; ++e) total[l][j][e] += d[e] * (weighted<INPUT>(row, e) * u_part);
            }
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                du[e] = v_part * v[j][e] - z_part * weighted<INPUT>(row, e);
                dx[e] = outer ? r1 * row.w[e] * du[e] - x_part * row.x[e] : du[e];
            }
            if (INPUT == ROWS) {
#pragma unroll
                for (u32 e = 0; e < 8; ++e) total[LAYERS][j][e] += du[e] * (row.x[e] * r1);
                if (a.add) {
                    float before[8];
                    load_eight((const float*)Places::at(places, DX, j), (const float*)Places::at(places, DX + 1, j), before);
#pragma unroll
                    for (u32 e = 0; e < 8; ++e) dx[e] += before[e];
                }
                if (a.dx) store_eight(a.dx + at, dx);
                *(uint4*)(a.dx_half + at) = pack(dx);
            }
            if (INPUT == NORM_GATE) {
                float weight[8], dh[8];
                load_eight(a.outer + k, weight);
#pragma unroll
                for (u32 e = 0; e < 8; ++e) {
                    // The gradient of w = outer * silu(h).
                    float dw = du[e] * (row.x[e] * r1);
                    total[LAYERS][j][e] += dw * row.gate[e];
                    dh[e] = dw * weight[e] * silu_derivative(row.other[e], row.sigmoid[e]);
                }
                *(uint4*)(a.dx_half + at) = pack(dx);
                *(uint4*)(a.dh + at) = pack(dh);
            }
            if (INPUT == SWIGLU) {
                float da[8], db[8];
#pragma unroll
                for (u32 e = 0; e < 8; ++e) {
                    // silu' = s + silu (1 - s)
                    float derivative = row.sigmoid[e] + (row.gate[e] - row.gate[e] * row.sigmoid[e]);
                    da[e] = dx[e] * row.other[e] * derivative;
                    db[e] = dx[e] * row.gate[e];
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
        for (u32 i = 0; i <= LAYERS; ++i) {
            // The outer norm's sums have gamma already.
            float scale = i == LAYERS ? 1.0f : LAYERS == 1 ? last : gamma[i];
#pragma unroll
            for (u32 e = 0; e < 8; ++e) total[i][j][e] *= scale;
            if (i < sums) store_eight(out + (size_t)i * n + k, total[i][j]);
        }
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
