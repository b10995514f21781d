// What a launch of `batch_step` gets, and which part of the work each block and warp has.

// Sizes that the host compiles this for; here those of a model of 1.3 billion parameters and 64 sequences.
#ifndef WIDTH
#define WIDTH 2048
#define INNER 5632
#define VOCAB 32000
#define NUM_TEAMS 4
#define NUM_OWNERS 32
#define NUM_OPERANDS 2
#define NUM_TOGETHER 4
#define NUM_STAGES 8
#endif

// Sequences are divided among teams of blocks, channels among the blocks of a team, their owners. A block has a warp for each
// of its sequences.
constexpr u32 SLOTS = 16, WARPS = SLOTS, THREADS = 32 * WARPS;
constexpr u32 TEAMS = NUM_TEAMS, OWNERS = NUM_OWNERS, SEQUENCES = SLOTS * TEAMS;
constexpr u32 OPERANDS = NUM_OPERANDS;  // of a product, of eight sequences each

enum Phase : u32 { MIX, OUT, GLU, DOWN, HEAD, PHASES };  // products; all but the last in every layer

__device__ constexpr u32 larger_of(u32 a, u32 b) { return a > b ? a : b; }
__device__ constexpr u32 parts(u32 a, u32 b) { return (a + b - 1) / b; }
__device__ constexpr u32 groups_of(u32 n) { return parts(n, TILE_ROWS); }
__device__ constexpr u32 inputs_of(u32 phase) { return phase == DOWN ? INNER : WIDTH; }
__device__ constexpr u32 outputs_of(u32 phase) { return phase == GLU ? INNER : phase == HEAD ? VOCAB : WIDTH; }
__device__ constexpr u32 layers_of(u32 phase) { return phase == MIX ? 3 : 1; }
__device__ constexpr u32 columns_of(u32 phase) { return parts(inputs_of(phase), TILE_COLS); }
__device__ constexpr u32 most_groups_of(u32 phase) { return parts(groups_of(outputs_of(phase)), OWNERS); }

// Groups of 16 channels that a block owns.
struct Own {
    u32 begin, groups;

    __device__ __forceinline__ Own(u32 owner, u32 outputs) {
        u32 all = groups_of(outputs);
        bool is_even = all % OWNERS == 0;  // then without a division
        begin = is_even ? owner * (all / OWNERS) : all * owner / OWNERS;
        groups = is_even ? all / OWNERS : all * (owner + 1) / OWNERS - begin;
    }
};
constexpr u32 OWN = most_groups_of(MIX) * TILE_ROWS, OWN_INNER = most_groups_of(GLU) * TILE_ROWS;
// A lane has the channels c and c + 8 of a row of tiles, of each fourth row.
constexpr u32 PAIRS = parts(OWN, 64), INNER_PAIRS = parts(OWN_INNER, 64);
// Floats of the vectors that own channels need behind a phase, at most.
constexpr u32 OWN_VECTORS = larger_of(4 * OWN, OWN_INNER);
static_assert(OWN_VECTORS <= 4 * THREADS, "each thread brings four");

// ---- Products ----

// Four warps multiply four rows of tiles together (warpgroup instructions), or, where blocks have few rows, each warp one.
// Such sets of rows that are as many as groups of warps have a group each; the groups share K of the rest.
constexpr u32 GROUP = NUM_TOGETHER, GROUPS = WARPS / GROUP;
__device__ constexpr u32 rows_of(u32 phase) { return most_groups_of(phase) * (phase == GLU ? 2 : 1); }  // of a layer
__device__ constexpr u32 whole_sets_of(u32 phase) { return parts(rows_of(phase), GROUP) / GROUPS * GROUPS; }
__device__ constexpr u32 shared_sets_of(u32 phase) { return parts(rows_of(phase), GROUP) - whole_sets_of(phase); }
__device__ constexpr u32 parts_of(u32 phase) {
    if (shared_sets_of(phase) == 0) return 1;
    u32 most = 1;
    while (2 * most * shared_sets_of(phase) <= GROUPS && 2 * most <= larger_of(columns_of(phase), GROUP)) most *= 2;
    // Three of four groups would wait for nothing.
    return GROUP > 1 && shared_sets_of(phase) == GROUPS - 1 ? GROUPS : most;
}
// What a group of warps multiplies one after the other: sets of rows by columns.
__device__ constexpr u32 layer_runs_of(u32 phase) {
    return parts(whole_sets_of(phase) + shared_sets_of(phase) * parts_of(phase), GROUPS);
}
__device__ constexpr u32 runs_of(u32 phase) { return layers_of(phase) * layer_runs_of(phase); }
constexpr u32 LAYER_RUNS = runs_of(MIX) + runs_of(OUT) + runs_of(GLU) + runs_of(DOWN), HEAD_RUNS = runs_of(HEAD);

// A run of a layer's rows.
template <u32 PHASE>
struct Run {
    u32 set, part, begin, end;  // columns
    bool is_none;               // the last run may be one of some groups only

    __device__ __forceinline__ Run(u32 group, u32 run) {
        constexpr u32 WHOLE = whole_sets_of(PHASE), PARTS = parts_of(PHASE), COLUMNS = columns_of(PHASE);
        bool is_whole = run < WHOLE / GROUPS;
        u32 at = group + (run - WHOLE / GROUPS) * GROUPS;
        is_none = !is_whole && at >= shared_sets_of(PHASE) * PARTS;
        set = is_whole ? run * GROUPS + group : WHOLE + at / PARTS;
        part = is_whole ? 0 : at % PARTS;
        begin = is_whole || is_none ? 0 : COLUMNS * part / PARTS;
        end = is_none ? 0 : is_whole ? COLUMNS : COLUMNS * (part + 1) / PARTS;
    }
    // Where its sums are, in rows of tiles.
    __device__ __forceinline__ u32 sums_at() const {
        constexpr u32 WHOLE = whole_sets_of(PHASE);
        return GROUP * (set < WHOLE ? set : WHOLE + (set - WHOLE) * parts_of(PHASE) + part);
    }
};

// ---- Memory ----

// Activations in shared memory: of a column of tiles 16 matrices of 8 sequences by 16 channels for warpgroups, otherwise 16
// sequences; apart for their banks.
constexpr u32 MATRIX_BYTES = 128 + 16, COLUMN_BYTES = SLOTS * MATRIX_BYTES;
__device__ constexpr u32 input_bytes_of(u32 phase) { return layers_of(phase) * columns_of(phase) * COLUMN_BYTES; }
// Behind them, sums of a part of a row of tiles: [sequence][8][2], and some words for the banks.
constexpr u32 SUM_WORDS = SLOTS * TILE_ROWS + 16;
__device__ constexpr u32 layer_sums_of(u32 phase) {
    return GROUP * (whole_sets_of(phase) + shared_sets_of(phase) * parts_of(phase));
}
__device__ constexpr u32 region_of(u32 phase) {
    return input_bytes_of(phase) + layers_of(phase) * layer_sums_of(phase) * SUM_WORDS * 4;
}
constexpr u32 REGION = larger_of(larger_of(larger_of(region_of(MIX), region_of(OUT)), larger_of(region_of(GLU), region_of(DOWN))),
                                 region_of(HEAD));

// At the beginning of a block's shared memory.
struct Shared {
    float vectors[2][OWN_VECTORS];            // of this phase and the last
    u64 sums_read;                            // a barrier
    u32 patience[WARPS][2 * PHASES];          // for messages, and for rows
    u32 runs[WARPS][LAYER_RUNS + HEAD_RUNS];  // see `list_runs`
};
constexpr u32 SHARED_BYTES = parts(sizeof(Shared), 128) * 128;
// Then the region, then the tiles on their way.
constexpr u32 TILE_BYTES = 512, STAGES = NUM_STAGES;
#ifdef NUM_SHARED_BYTES
static_assert(SHARED_BYTES + REGION + STAGES * WARPS * TILE_BYTES == NUM_SHARED_BYTES, "the host computes this number");
#endif

// Quantised rows that blocks send each other: of each phase [layer][sequence][K], in words of four channels, as many as there are
// in whole tiles.
__device__ constexpr u32 row_words_of(u32 phase) { return columns_of(phase) * (TILE_COLS / 4); }
__device__ constexpr u32 rows_at(u32 phase) {
    u32 at = 0;
    for (u32 p = 0; p < phase; ++p) at += layers_of(p) * SEQUENCES * row_words_of(p);
    return at;
}
// Words that become a row of a matrix, or an operand of one warp, lie side by side.
__device__ __forceinline__ u32 place_of_word(u32 word) {
    return GROUP > 1 ? (word & ~31u) | (word & 3) << 3 | (word & 4) | (word >> 3 & 3)
                     : (word & ~7u) | (word & 3) << 1 | (word >> 2 & 1);
}

constexpr u32 LAYER_FLOATS = 9 * WIDTH + INNER, GAMMAS = 6;

struct Args {
    const uint4* weights;    // tiles: [layer][phase], then the head
    const float* vectors;    // [layer][9 D + F], then the last norm and the head's
    const float* gammas;     // [layer][6]: i, f, g, o, gate, down; then the head's
    const void* embeddings;  // [V][D]
    float* const* states;    // [M], each [L][D]
    u32* tokens;             // [M]: those of the first step; then those that the last one chose
    u32* history;            // [steps][M]: tokens that each step chose
    float* logits;           // [M][V] of the last step; null if nobody wants them
    u32* not_finite;         // set to 1 if a logit is not
    float* messages;         // [phase][sequence][owner][4]: the largest |u|, of i, f and g each, and the sum of squares
    u32* rows;               // see `rows_at`; words that have not been sent, and zeros where there are no channels
    u64* keys;               // [sequence][owner]
    u64 tile_at[PHASES];     // first tile of a phase in its layer (the head's: of all)
    u64 layer_tiles;         // tiles of a layer
    u32 m, layers, steps;    // sequences
    u32 embedding_type;      // as `embedding_at` says
    u32 segment_tiles;       // row tiles of each of i, f, g
    u32 steps_before;        // made with these messages, rows and keys
    float eps;
};

// ---- Weights ----

constexpr u32 HAS_ROW = 1 << 23;

// Lists what a warp multiplies of a phase: the first tile in its layer, whether there is such a row, and in the upper byte how
// many columns.
template <u32 PHASE>
__device__ __forceinline__ u32 list_runs(const Args& a, Shared& shared, const Own& own, u32 at) {
    u32 rows = own.groups * (PHASE == GLU ? 2 : 1);
    for (u32 k = threadIdx.x; k < WARPS * runs_of(PHASE); k += THREADS) {
        u32 warp = k % WARPS, of_phase = k / WARPS, layer = of_phase / layer_runs_of(PHASE);
        Run<PHASE> run(warp / GROUP, of_phase % layer_runs_of(PHASE));
        u32 r = run.set * GROUP + warp % GROUP;
        bool has_row = r < rows;
        // A gate's row, then its value's.
        u32 own_row = PHASE == GLU ? r / 2 + r % 2 * groups_of(INNER) : r;
        u32 row = own.begin + (has_row ? own_row : 0) + layer * a.segment_tiles;
        u32 tile = (PHASE == HEAD ? 0 : (u32)a.tile_at[PHASE]) + row * columns_of(PHASE) + run.begin;
        shared.runs[warp][at + of_phase] = tile | (has_row ? HAS_ROW : 0) | run.end - run.begin << 24;
    }
    return at + runs_of(PHASE);
}

// A warp's tiles on their way, one after the other, through phases, layers and steps: each thread copies the 16 bytes that it will
// read itself.
struct Stream {
    const Args& a;
    const u32* runs;
    u32 ring, slot;
    const uint4* from;
    u32 left, bytes, run, layer, steps_left;

    __device__ __forceinline__ Stream(const Args& a, const u32* runs, u32 ring)
        : a(a), runs(runs), ring(ring), slot(0), left(0), run(~0u), layer(0), steps_left(a.steps) {
        follow();
#pragma unroll 1
        for (u32 k = 0; k < STAGES; ++k) fetch();
    }

    // Goes on to the next run that has columns.
    __device__ __forceinline__ void follow() {
        do {
            bool is_head = layer == a.layers;
            if (++run == (is_head ? LAYER_RUNS + HEAD_RUNS : LAYER_RUNS)) {
                if (is_head && steps_left > 0) --steps_left;
                layer = is_head ? 0 : layer + 1;
                run = layer == a.layers ? LAYER_RUNS : 0;
            }
            u32 entry = runs[run], first = layer == a.layers ? (u32)a.tile_at[HEAD] : layer * (u32)a.layer_tiles;
            left = entry >> 24;
            // Rows that are not there are zeros.
            bytes = entry & HAS_ROW && steps_left > 0 ? 16 : 0;
            from = a.weights + ((u64)first + (entry & (HAS_ROW - 1))) * 32 + threadIdx.x % 32;
        } while (left == 0 && steps_left > 0);
    }

    // Asks for one more.
    __device__ __forceinline__ void fetch() {
        u32 to = ring + slot * (WARPS * TILE_BYTES);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
        from += 32;
        slot = (slot + 1) % STAGES;
        if (--left == 0) follow();
    }

    // The oldest one; `fetch` fills its place again.
    __device__ __forceinline__ uint4 take() const {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(ring + slot * (WARPS * TILE_BYTES))
                     : "memory");
        return v;
    }
};
