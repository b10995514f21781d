// What a warp does in a phase: it exchanges the row of its sequence with the blocks of its team, and multiplies.

// ---- Words of quantised rows ----

// A word that has not been sent: integers are never -128.
constexpr u32 NOTHING = 0x80808080;

__device__ __forceinline__ u32 missing(uint4 v) {
    return ((v.x & 255) == 128) | ((v.y & 255) == 128) | ((v.z & 255) == 128) | ((v.w & 255) == 128);
}

__device__ __forceinline__ uint4 look4(const u32* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void look_again(uint4& v, const u32* from, u32 condition) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(from), "r"(condition)
                 : "memory");
}

__device__ __forceinline__ void send_word(u32* to, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

// ---- Pairs of channels ----

__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }
__device__ __forceinline__ float2 dequantize(int2 sum, float factor) {
    return make_float2(dequantize(sum.x, factor), dequantize(sum.y, factor));
}

// The row of tiles of a lane's pair, and its first channel; the other one is 8 behind it.
__device__ __forceinline__ u32 tile_of(u32 pair) { return threadIdx.x % 32 / 8 + 4 * pair; }
__device__ __forceinline__ u32 channel_of(u32 pair) { return tile_of(pair) * TILE_ROWS + threadIdx.x % 8; }
__device__ __forceinline__ float2 pair_at(const float* from, u32 pair) {
    return make_float2(from[channel_of(pair)], from[channel_of(pair) + 8]);
}

// Keeps the compiler from computing addresses long before they are needed: registers are few.
__device__ __forceinline__ u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ---- Products ----

// d += codes (64 x 32) * activations (32 x 16, 32 x 32).
__device__ __forceinline__ void wgmma(int (&d)[8], const u32 (&codes)[4], u64 activations) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k32.s32.u8.s8 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7])
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "l"(activations));
}
__device__ __forceinline__ void wgmma(int (&d)[16], const u32 (&codes)[4], u64 activations) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "l"(activations));
}

// Sums are 64 times too large, for codes are where they were in their bytes.
constexpr float PER_SUM = 1.0f / 64.0f;
constexpr u32 SUMS = GROUP > 1 ? 4 * OPERANDS : 8;  // of a thread

// Sequences whose channels of a phase's input a warp makes: its own and, behind a product by rows, those of the other blocks.
__device__ constexpr u32 made_of(u32 phase) { return phase == DOWN ? SHARING : 1; }
// Of how many it needs to know the scale.
__device__ constexpr u32 known_of(u32 phase) { return phase == DOWN || is_by_rows(phase) ? SHARING : 1; }
// Blocks that make a sequence's channels.
__device__ constexpr u32 makers_of(u32 phase) { return phase == DOWN ? MAKERS : OWNERS; }

struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

struct Worker {
    const Args& a;
    Shared& shared;
    u8* region;
    Stream stream;
    u32 warp, lane, owner, rank, sequence;
    Own own;
    bool is_real;                 // a warp without a sequence only multiplies
    u32 turn = 0;                 // of own vectors, and the parity of `sums_read`
    u32 inbox_turn = 0;           // the parity of the inbox's barrier
    float step[SHARING][3] = {};  // of the last quantised rows: R max|u| / 127 / 64
    int total[SHARING][3] = {};   // 64 times the sums of their integers, those that were received, of a round's layers

    // Computed again where they are needed: registers are few.
    __device__ __forceinline__ Own inner() const { return Own::of<MAKERS>(opaque(owner) * SHARING + rank, INNER); }
    __device__ __forceinline__ Own head() const { return Own::of<MAKERS>(opaque(owner) * SHARING + rank, VOCAB); }
    template <u32 PHASE>
    __device__ __forceinline__ Own own_input() const {
        return PHASE == DOWN ? inner() : own;
    }
    // The warp's sequence, or that of the same warp in the other block of the cluster.
    __device__ __forceinline__ u32 sequence_of(u32 which) const { return sequence ^ which; }
    __device__ __forceinline__ bool is_wanted(u32 which) const { return sequence_of(which) < a.m; }
    template <u32 PHASE>
    __device__ __forceinline__ u32* row(u32 round, u32 which, u32 layer) const {
        u32 at = ((round & 1) * layers_of(PHASE) + layer) * SEQUENCES + sequence_of(which);
        return a.rows + rows_at(PHASE) + at * row_words_of(PHASE);
    }

    // ---- The exchange ----

    // One lane waits, and remembers how long.
    __device__ __forceinline__ void be_patient(u32 which) const {
        if (lane == 0) Patience{shared.patience[warp][which]}.wait();
        __syncwarp();
    }
    __device__ __forceinline__ void learn_patience(u32 which, u32 early_looks) const {
        if (lane != 0) return;
        Patience patience = {shared.patience[warp][which]};
        patience.learn(early_looks);
        shared.patience[warp][which] = patience.cycles;
    }

    // Tells the team the largest |u| of own channels and the sum of squares, waits for those of the others, and leaves the row's
    // step and factor, 127 / max|u|.
    template <u32 PHASE, u32 P, typename Meanwhile>
    __device__ __forceinline__ void exchange_scale(const float2 (&u)[made_of(PHASE) * layers_of(PHASE)][P],
                                                   const float (&square)[made_of(PHASE)], u32 round,
                                                   float (&factor)[made_of(PHASE) * layers_of(PHASE)],
                                                   const Meanwhile& meanwhile) {
        constexpr u32 LAYERS = layers_of(PHASE), MADE = made_of(PHASE), KNOWN = known_of(PHASE), FROM = makers_of(PHASE);
        constexpr u32 LOADS = parts(FROM, 32);
        auto messages = [&](u32 which) { return a.messages + (PHASE * SEQUENCES + sequence_of(which)) * MAKERS * 4; };
#pragma unroll
        for (u32 k = 0; k < MADE; ++k) {
            float largest[LAYERS], all = square[k];
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j) {
                float most = 0.0f;
#pragma unroll
                for (u32 p = 0; p < P; ++p) {
                    float2 v = u[k * LAYERS + j][p];
                    most = fmaxf(most, fmaxf(fabsf(v.x), fabsf(v.y)));
                }
                // The bits of floats that are not negative are in their order.
                largest[j] = __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(most)));
            }
#pragma unroll
            for (u32 width = 16; width > 0; width /= 2) all += __shfl_xor_sync(ALL_LANES, all, width);
            float4 mine = make_float4(largest[0], largest[LAYERS > 1], largest[LAYERS - 1], all);
            u32 maker = PHASE == DOWN ? owner * SHARING + rank : owner;
            if (lane == 0) send4(messages(k) + maker * 4, mine, round);
        }
        meanwhile();
        be_patient(PHASE);
        float4 v[KNOWN][LOADS];
        u32 mask = mask_of(round);
        auto has = [&](u32 i) { return (i + 1) * 32 <= FROM || lane + 32 * i < FROM; };
        auto from = [&](u32 k, u32 i) { return messages(k) + (lane + 32 * i) * 4; };
#pragma unroll
        for (u32 k = 0; k < KNOWN; ++k)
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) v[k][i] = has(i) ? look4(from(k, i)) : make_float4(0, 0, 0, 0);
        for (u32 early_looks = 0;; ++early_looks) {
            u32 any = 0;
#pragma unroll
            for (u32 k = 0; k < KNOWN; ++k)
#pragma unroll
                for (u32 i = 0; i < LOADS; ++i) {
                    u32 one = has(i) ? missing(v[k][i], mask) & 1 : 0;
                    look_again(v[k][i], from(k, i), one);
                    any |= one;
                }
            if (!__any_sync(ALL_LANES, any)) {
                learn_patience(PHASE, early_looks);
                break;
            }
        }
#pragma unroll
        for (u32 k = 0; k < KNOWN; ++k) {
            float4 all = make_float4(0, 0, 0, 0);
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) {
                float4 one = without_round(v[k][i]);
                all = make_float4(fmaxf(all.x, one.x), fmaxf(all.y, one.y), fmaxf(all.z, one.z), all.w + one.w);
            }
#pragma unroll
            for (u32 width = 16; width > 0; width /= 2) all.w += __shfl_xor_sync(ALL_LANES, all.w, width);
            // Where only the quantiser's own norm is, the other has no part in it.
            float r =
                inverse_root(all.w * (PHASE == DOWN ? 1.0f / INNER : 1.0f / WIDTH) + (PHASE == DOWN ? 1e-6f : 1e-6f * a.eps));
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j) {
                u32 of_lane = __float_as_uint(j == 0 ? all.x : j == 1 ? all.y : all.z);
                float most = fmaxf(__uint_as_float(__reduce_max_sync(ALL_LANES, of_lane)), 1e-35f);
                step[k][j] = most * (1.0f / 127.0f) * r * PER_SUM;
                if (k < MADE) factor[k * LAYERS + j] = 127.0f * reciprocal(most);
            }
        }
    }

    // Quantises own channels of a row, of which the whole team sends its parts, and sends them. `meanwhile` is called while messages
    // are on their way.
    template <u32 PHASE, u32 P, typename Meanwhile = Nothing>
    __device__ __forceinline__ void send_row(const float2 (&u)[made_of(PHASE) * layers_of(PHASE)][P],
                                             const float (&square)[made_of(PHASE)], u32 round, const Meanwhile& meanwhile = {}) {
        constexpr u32 LAYERS = layers_of(PHASE), MADE = made_of(PHASE), ROWS = MADE * LAYERS;
        float factor[ROWS];
        exchange_scale<PHASE>(u, square, round, factor, meanwhile);
        // Of four lanes the first has their eight channels.
        u32 low[ROWS][P], high[ROWS][P];
#pragma unroll
        for (u32 j = 0; j < ROWS; ++j)
#pragma unroll
            for (u32 p = 0; p < P; ++p) {
                auto rounded = [&](float v) { return __float_as_uint(v * factor[j] + 12582912.0f); };
                u32 bytes = __byte_perm(rounded(u[j][p].x), rounded(u[j][p].y), 0x5410) & 0x00ff00ff;
                bytes |= __shfl_down_sync(ALL_LANES, bytes, 1) << 8;
                u32 next = __shfl_down_sync(ALL_LANES, bytes, 2);
                low[j][p] = __byte_perm(bytes, next, 0x5410), high[j][p] = __byte_perm(bytes, next, 0x7632);
            }
        Own mine = own_input<PHASE>();
#pragma unroll
        for (u32 p = 0; p < P; ++p)
            if (lane % 4 == 0 && tile_of(p) < mine.groups) {
                u32 word = (mine.begin + tile_of(p)) * (TILE_ROWS / 4) + lane % 8 / 4;
#pragma unroll
                for (u32 j = 0; j < ROWS; ++j) {
                    u32* to = row<PHASE>(round, j / LAYERS, j % LAYERS);
                    send_word(to + place_of_word(word), low[j][p]);
                    send_word(to + place_of_word(word + 2), high[j][p]);
                }
            }
        // Whose messages have come has done the product before this one, and so has read its rows: the team those of its own
        // sequences. The last product's rows are of both teams, so they wait for the first phase in which the messages of both are
        // seen.
        if (PHASE == OUT) clear_row<MIX>(round);
        if (PHASE == GLU) clear_row<OUT>(round), clear_row<DOWN>(round - 1);
        if (PHASE == DOWN) clear_row<GLU>(round);
        // Who sees a later message of this warp sees, behind a fence of its own, that words were cleared, two layers later: so
        // nobody takes another layer's row for that one's.
        if (PHASE == DOWN) asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }

    // Own words of a phase's row become such as have not been sent.
    template <u32 PHASE>
    __device__ __forceinline__ void clear_row(u32 round) {
        Own mine = own_input<PHASE>();
#pragma unroll
        for (u32 j = 0; j < made_of(PHASE) * layers_of(PHASE); ++j) {
            u32* of = row<PHASE>(round, j / layers_of(PHASE), j % layers_of(PHASE));
#pragma unroll 1
            for (u32 k = lane; k < mine.groups * (TILE_ROWS / 4); k += 32)
                send_word(of + place_of_word(mine.begin * (TILE_ROWS / 4) + k), NOTHING);
        }
    }

    // Waits for the row, and that of the other sequence, and leaves what this block multiplies of them in shared memory: of a round
    // the layers from `layer` on, and a part of the columns. Loads from number FIRST on, for registers are few.
    template <u32 PHASE, u32 FIRST = 0>
    __device__ __forceinline__ void receive_row(u32 round, u32 layer, u32 part, bool is_first) {
        constexpr u32 LAYERS = layers_at_once_of(PHASE), PIECES = TILE_COLS / 16, ALL = parts(part_columns_of(PHASE) * PIECES, 32);
        // Of very wide rows fewer at a time are faster (7 % with 13 billion parameters and 8 sequences).
        constexpr u32 NUM_LOADS = SHARING * LAYERS * ALL, MOST_HELD = NUM_LOADS > 24 ? 6 : 12;
        constexpr u32 AT_ONCE = parts(ALL, parts(NUM_LOADS, MOST_HELD));
        constexpr u32 LOADS = FIRST + AT_ONCE < ALL ? AT_ONCE : ALL - FIRST;
        u32 first = opaque(this->lane) + 32 * FIRST;
        Columns<PHASE> columns(rank, part);
        if (FIRST == 0 && is_first) be_patient(PHASES + PHASE);
        uint4 v[SHARING][LAYERS][LOADS];
        u32 count = columns.count * PIECES;
        auto has = [&](u32 i) { return first + 32 * i < count; };
        auto from = [&](u32 k, u32 j, u32 i) {
            return row<PHASE>(round, k, layer + j) + (columns.begin * PIECES + first + 32 * i) * 4;
        };
#pragma unroll
        for (u32 k = 0; k < SHARING; ++k)
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j)
#pragma unroll
                for (u32 i = 0; i < LOADS; ++i) v[k][j][i] = has(i) ? look4(from(k, j, i)) : make_uint4(0, 0, 0, 0);
        for (u32 early_looks = 0;; ++early_looks) {
            u32 any = 0;
#pragma unroll
            for (u32 k = 0; k < SHARING; ++k)
#pragma unroll
                for (u32 j = 0; j < LAYERS; ++j)
#pragma unroll
                    for (u32 i = 0; i < LOADS; ++i) {
                        u32 one = missing(v[k][j][i]);
                        look_again(v[k][j][i], from(k, j, i), one);
                        any |= one;
                    }
            if (!__any_sync(ALL_LANES, any)) {
                if (FIRST == 0 && is_first) learn_patience(PHASES + PHASE, early_looks);
                break;
            }
        }
        // Codes are weights + 1.
#pragma unroll
        for (u32 k = 0; k < SHARING; ++k)
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j) {
                int sum = 0;
#pragma unroll
                for (u32 i = 0; i < LOADS; ++i) {
                    sum = __dp4a((int)v[k][j][i].x, 0x40404040, __dp4a((int)v[k][j][i].y, 0x40404040, sum));
                    sum = __dp4a((int)v[k][j][i].z, 0x40404040, __dp4a((int)v[k][j][i].w, 0x40404040, sum));
                }
                sum = __reduce_add_sync(ALL_LANES, sum);
                total[k][j] = FIRST == 0 && part == 0 ? sum : total[k][j] + sum;
            }
        if (FIRST == 0 && is_first) {
            // Sums of the last phase may lie there.
            wait_for(shared_address(&shared.sums_read), turn);
            __syncwarp();
        }
        constexpr u32 PIECE_BYTES = GROUP > 1 ? MATRIX_BYTES : 16;
        u8* to = region + (GROUP > 1 ? warp / 8 * (8 * MATRIX_BYTES) + warp % 8 * 16 : warp * MATRIX_BYTES);
        u32 exchanged = GROUP > 1 ? 0 : warp % 2;
#pragma unroll
        for (u32 k = 0; k < SHARING; ++k)
#pragma unroll
            for (u32 j = 0; j < LAYERS; ++j)
#pragma unroll
                for (u32 i = 0; i < LOADS; ++i) {
                    u32 piece = first + 32 * i, column = j * part_columns_of(PHASE) + piece / PIECES;
                    u8* place = to + k * (SLOTS * MATRIX_BYTES) + column * COLUMN_BYTES + (piece % PIECES ^ exchanged) * PIECE_BYTES;
                    if (has(i)) *(uint4*)place = v[k][j][i];
                }
        if constexpr (FIRST + LOADS < ALL) receive_row<PHASE, FIRST + LOADS>(round, layer, part, is_first);
    }

    // ---- The product ----

    // A tile's codes as registers of the first operand; the first and third 16 times too large, the others 64 times.
    __device__ __forceinline__ static void unpack(uint4 tile, u32 (&codes)[4][4]) {
        const u32 words[4] = {tile.x, tile.y, tile.z, tile.w};
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            u32 low = words[j] << 4;
            codes[0][j] = low & FIELD << 4, codes[1][j] = low & FIELD << 6;
            codes[2][j] = words[j] & FIELD << 4, codes[3][j] = words[j] & FIELD << 6;
        }
    }

    // Adds the columns of a run to the sums of four rows of tiles.
    __device__ __forceinline__ void multiply_together(u32 begin, u32 end, u32 inputs, int (&sums)[2][SUMS]) {
        // Of an address the upper byte tells the block of the cluster.
        u32 first = (inputs + begin * COLUMN_BYTES & 0x3ffff) / 16;
        u64 matrix = (u64)(8 * MATRIX_BYTES / 16) << 32 | (u64)(MATRIX_BYTES / 16) << 16 | first;
        uint4 tile = stream.oldest();
        u32 left = end - begin;
#pragma unroll 2
        do {
            u32 codes[4][4];
            unpack(tile, codes);
            // Before the fence, or instructions would wait for them one after the other.
#pragma unroll
            for (u32 f = 0; f < 4; ++f)
                asm volatile("" : "+r"(codes[f][0]), "+r"(codes[f][1]), "+r"(codes[f][2]), "+r"(codes[f][3]));
            // Behind the last column it belongs to another run.
            tile = stream.second();
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (u32 f = 0; f < 4; ++f) wgmma(sums[f % 2], codes[f], matrix + f * (2 * MATRIX_BYTES / 16));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            stream.fetch();
            matrix += COLUMN_BYTES / 16;
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        } while (--left > 0);
    }

    // The same of one row of tiles, by a warp alone.
    __device__ __forceinline__ void multiply_alone(u32 begin, u32 end, const u8* inputs, int (&sums)[2][SUMS]) {
        const u8* from = inputs + begin * COLUMN_BYTES + lane / 4 * MATRIX_BYTES + lane % 4 * 32;
        u32 exchanged = lane / 4 % 2;
#pragma unroll 2
        for (u32 column = begin; column < end; ++column, from += COLUMN_BYTES) {
            uint4 q[OPERANDS][2];
#pragma unroll
            for (u32 n = 0; n < OPERANDS; ++n)
#pragma unroll
                for (u32 side = 0; side < 2; ++side) q[n][side] = *(const uint4*)(from + n * 8 * MATRIX_BYTES + (side ^ exchanged) * 16);
            u32 codes[4][4];
            unpack(stream.oldest(), codes);
            stream.fetch();
#pragma unroll
            for (u32 f = 0; f < 4; ++f)
#pragma unroll
                for (u32 n = 0; n < OPERANDS; ++n) {
                    uint4 of = q[n][f / 2];
                    mma_u8_s8(*(int(*)[4]) & sums[f % 2][4 * n], codes[f][0], codes[f][1], codes[f][2], codes[f][3],
                              f % 2 ? of.z : of.x, f % 2 ? of.w : of.y);
                }
        }
    }

    // Leaves the sums of a pass's rows of tiles, each by 16 or 32 sequences, or adds those of a further part of the columns.
    template <u32 PHASE>
    __device__ __forceinline__ void product(u32 pass, u32 part) {
        // The compiler knows then that branches do not part the warps of a group.
        u32 uniform_warp = __shfl_sync(ALL_LANES, warp, 0), lane = opaque(this->lane), g = lane / 4, t = lane % 4;
        u32* sums_to = (u32*)(region + input_bytes_of(PHASE)) +
                       (pass * pass_sums_of(PHASE) + uniform_warp % GROUP) * SUM_WORDS + t * 16 + (g ^ t / 2 * 4) * 2;
#pragma unroll 1
        for (u32 of_pass = 0; of_pass < pass_runs_of(PHASE); ++of_pass) {
            Run<PHASE> run(uniform_warp / GROUP, of_pass);
            if (run.is_none) continue;
            u8* inputs = region + (pass + run.set / layer_sets_of(PHASE)) * part_columns_of(PHASE) * COLUMN_BYTES;
            int sums[2][SUMS] = {};  // of codes that are 16 and 64 times too large
            // Known when this is compiled, but for narrow models.
            constexpr bool HAS_COLUMNS = parts_of(PHASE) <= part_columns_of(PHASE);
            if (GROUP == 1) multiply_alone(run.begin, run.end, inputs, sums);
            else if (HAS_COLUMNS || run.begin < run.end) multiply_together(run.begin, run.end, shared_address(inputs), sums);
            u32* to = sums_to + run.sums_at() * SUM_WORDS;
#pragma unroll
            for (u32 n = 0; n < OPERANDS; ++n)
#pragma unroll
                for (u32 e = 0; e < 2; ++e) {
                    u32 i = n * 4 + e;
                    int2 sum = make_int2(sums[1][i] + 4 * sums[0][i], sums[1][i + 2] + 4 * sums[0][i + 2]);
                    int2* at = (int2*)(to + (n * 8 + e * 4) * 16);
                    if (input_parts_of(PHASE) > 1) sum.x += part > 0 ? at->x : 0, sum.y += part > 0 ? at->y : 0;
                    *at = sum;
                }
        }
    }

    // Brings four floats of the vectors that own channels need behind a phase: `count` of them, STRIDE floats apart, each of
    // CHANNELS.
    template <u32 CHANNELS, u32 STRIDE>
    __device__ __forceinline__ float4 ask_vectors(const float* from, u32 count, const Own& mine) const {
        constexpr u32 FOURS = CHANNELS / 4;
        u32 which = threadIdx.x / FOURS, four = threadIdx.x % FOURS;
        if (which >= count || four >= mine.groups * (TILE_ROWS / 4)) return make_float4(0, 0, 0, 0);
        return __ldg((const float4*)(from + which * STRIDE + mine.begin * TILE_ROWS) + four);
    }

    // Receives and multiplies; then the sums of a round are there, and the vectors.
    template <u32 PHASE>
    __device__ __forceinline__ void multiply(u32 round, float4 vectors, u32 number = 0) {
        constexpr bool IS_BY_LAYERS = PHASE == MIX && MIX_ROUNDS > 1;
#pragma unroll 1
        for (u32 part = 0; part < input_parts_of(PHASE); ++part) {
            bool is_first = number == 0 && part == 0;
            if (is_real && (is_first || IS_BY_LAYERS || input_parts_of(PHASE) > 1))
                receive_row<PHASE>(round, IS_BY_LAYERS ? number : 0, part, is_first);
            // What was written by ordinary stores is read by the tensor cores.
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            if (is_first) {
                turn ^= 1;
                if (threadIdx.x * 4 < OWN_VECTORS) *(float4*)&shared.vectors[turn][threadIdx.x * 4] = vectors;
            }
            // All warps have received, and read the sums of the round before.
            __syncthreads();
#pragma unroll 1
            for (u32 pass = 0; pass < passes_of(PHASE); ++pass) product<PHASE>(pass, part);
            __syncthreads();
        }
    }

    // ---- Behind the product ----

    // The sums that this block has made of a pair of channels of a row of tiles.
    template <u32 PHASE>
    __device__ __forceinline__ int2 local_sum(u32 row, u32 layer, u32 which) const {
        constexpr u32 WHOLE = whole_sets_of(PHASE), PARTS = parts_of(PHASE), PASSES = passes_of(PHASE);
        u32 lane = opaque(this->lane), order = warp / 8 * 8 + warp % 2 * 4 + warp % 8 / 2;
        u32 set = (PASSES > 1 ? 0 : layer * layer_sets_of(PHASE)) + row / GROUP;
        bool is_whole = set < WHOLE;
        u32 at = (PASSES > 1 ? layer * pass_sums_of(PHASE) : 0) +
                 GROUP * (is_whole ? set : WHOLE + (set - WHOLE) * PARTS) + row % GROUP;
        const u32* from = (const u32*)(region + input_bytes_of(PHASE)) + at * SUM_WORDS + (order + which * SLOTS) * 16 +
                          (lane % 8 ^ (order / 2 & 1) * 4) * 2;
        int2 sum = make_int2(-total[which][layer], -total[which][layer]);
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part)
            if (part == 0 || !is_whole) {
                int2 v = *(const int2*)(from + part * (GROUP * SUM_WORDS));
                sum.x += v.x, sum.y += v.y;
            }
        return sum;
    }

    // Gives the other block of the cluster the sums of its sequence's pairs, of the layers of this round, and waits for one's own.
    template <u32 PHASE>
    __device__ __forceinline__ void exchange_sums(u32 number = 0) {
        if (SHARING == 1) return;
        constexpr u32 LAYERS = layers_at_once_of(PHASE);
        // The other one has read those of the round before. (Those of the phase before it has used, if its row has come.)
        if (PHASE == MIX && MIX_ROUNDS > 1 && number > 0) wait_for(shared_address(&shared.inbox_read[warp]), number - 1 & 1);
#pragma unroll
        for (u32 j = 0; j < LAYERS; ++j)
#pragma unroll
            for (u32 p = 0; p < PAIRS; ++p) {
                int2 sum = tile_of(p) < own.groups ? local_sum<PHASE>(tile_of(p), j, 1) : make_int2(0, 0);
                asm volatile(
                    "{ .reg .b32 there, over; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 over, %1, %2; "
                    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {%3, %4}, [over]; }" ::"r"(
                        shared_address(&shared.inbox[warp][j * PAIRS + p][lane])),
                    "r"(shared_address(&shared.inbox_full[warp])), "r"(rank ^ 1), "r"(sum.x), "r"(sum.y)
                    : "memory");
            }
        u32 barrier = shared_address(&shared.inbox_full[warp]);
        if (lane == 0) expect_bytes(barrier, LAYERS * PAIRS * 32 * sizeof(int2));
        wait_for(barrier, inbox_turn);
        inbox_turn ^= 1;
    }

    // Lets the other block send the sums of the next round.
    __device__ __forceinline__ void have_read_inbox() const {
        if (SHARING == 1) return;
        __syncwarp();
        if (lane == 0)
            asm volatile(
                "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(&shared.inbox_read[warp])),
                "r"(rank ^ 1)
                : "memory");
    }

    // The sums of a pair of own channels, of a layer of the round.
    template <u32 PHASE>
    __device__ __forceinline__ int2 sum_of(u32 pair, u32 layer = 0) const {
        int2 sum = local_sum<PHASE>(tile_of(pair), layer, 0);
        if (SHARING > 1) {
            int2 other = shared.inbox[warp][layer * PAIRS + pair][lane];
            sum.x += other.x, sum.y += other.y;
        }
        return sum;
    }

    // Vector `which` at a pair of own channels.
    __device__ __forceinline__ float2 vector(u32 which, u32 pair) const {
        return pair_at(&shared.vectors[turn][which * OWN], pair);
    }

    __device__ __forceinline__ void have_read_sums() const { arrive(shared_address(&shared.sums_read)); }
};
