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
#define NUM_SHARING 2
#define NUM_MIX_ROUNDS 1
#define NUM_GLU_ROUNDS 1
#define NUM_HEAD_ROUNDS 1
#define NUM_COLUMNS 64
#define NUM_STAGES 4
#endif

// Sequences are divided among teams of blocks, channels among the blocks of a team, their owners. A block has a warp for each
// of its sequences, and perhaps some that only multiply.
constexpr u32 WARPS = 16, THREADS = 32 * WARPS, SLOTS = 8 * NUM_OPERANDS;
static_assert(SLOTS <= WARPS, "a sequence needs a warp");
constexpr u32 TEAMS = NUM_TEAMS, OWNERS = NUM_OWNERS, SEQUENCES = SLOTS * TEAMS;
// Two blocks of a cluster, of the same owner and neighbouring teams, multiply for the sequences of both: instructions take nearly as
// long for twice as many. In some phases each has half of K, and then they exchange sums; in the others half of the rows, and of
// what these make they go on with both teams' sequences.
constexpr u32 SHARING = NUM_SHARING, MAKERS = OWNERS * SHARING;
constexpr u32 OPERANDS = NUM_OPERANDS * SHARING;  // of a product, of eight sequences each

enum Phase : u32 { MIX, OUT, GLU, DOWN, HEAD, PHASES };  // products; all but the last in every layer

__device__ constexpr u32 larger_of(u32 a, u32 b) { return a > b ? a : b; }
__device__ constexpr u32 parts(u32 a, u32 b) { return (a + b - 1) / b; }
__device__ constexpr u32 groups_of(u32 n) { return parts(n, TILE_ROWS); }
__device__ constexpr u32 inputs_of(u32 phase) { return phase == DOWN ? INNER : WIDTH; }
__device__ constexpr u32 outputs_of(u32 phase) { return phase == GLU ? INNER : phase == HEAD ? VOCAB : WIDTH; }
__device__ constexpr u32 layers_of(u32 phase) { return phase == MIX ? 3 : 1; }
__device__ constexpr u32 columns_of(u32 phase) { return parts(inputs_of(phase), TILE_COLS); }
// Whether the blocks of a cluster divide rows among them, not K.
__device__ constexpr bool is_by_rows(u32 phase) { return phase == GLU || phase == HEAD; }
// Blocks that a phase's rows are divided among.
__device__ constexpr u32 owners_of(u32 phase) { return is_by_rows(phase) ? MAKERS : OWNERS; }
__device__ constexpr u32 most_groups_of(u32 phase) { return parts(groups_of(outputs_of(phase)), owners_of(phase)); }

// Groups of 16 channels that a block owns.
struct Own {
    u32 begin, groups;

    template <u32 OWNERS>
    __device__ __forceinline__ static Own of(u32 owner, u32 outputs) {
        u32 all = groups_of(outputs);
        bool is_even = all % OWNERS == 0;  // then without a division
        u32 begin = is_even ? owner * (all / OWNERS) : all * owner / OWNERS;
        return {begin, is_even ? all / OWNERS : all * (owner + 1) / OWNERS - begin};
    }
    // Of so many in turn.
    __device__ __forceinline__ Own part(u32 number, u32 size) const {
        u32 first = min(number * size, groups);
        return {begin + first, min(size, groups - first)};
    }
};

// Columns of tiles that a block multiplies.
__device__ constexpr u32 sharing_of(u32 phase) { return is_by_rows(phase) ? 1 : SHARING; }
__device__ constexpr u32 most_columns_of(u32 phase) { return parts(columns_of(phase), sharing_of(phase)); }
// Where there is no room for the activations of all of them, they are received and multiplied in parts.
__device__ constexpr u32 input_parts_of(u32 phase) { return parts(most_columns_of(phase), NUM_COLUMNS); }
__device__ constexpr u32 part_columns_of(u32 phase) { return parts(most_columns_of(phase), input_parts_of(phase)); }
// Those of a part. All parts are multiplied as if they had as many, by tiles that are none where they have fewer.
template <u32 PHASE>
struct Columns {
    u32 begin, count;

    __device__ __forceinline__ Columns(u32 rank, u32 part) {
        constexpr u32 ALL = columns_of(PHASE), MOST = most_columns_of(PHASE), SIZE = part_columns_of(PHASE);
        constexpr bool IS_EVEN = sharing_of(PHASE) * input_parts_of(PHASE) * SIZE == ALL;
        u32 first = sharing_of(PHASE) == 1 ? 0 : rank * MOST, end = min(first + MOST, ALL);
        begin = first + part * SIZE;
        count = IS_EVEN ? SIZE : min(SIZE, end - min(begin, end));
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
// Where there is no room for all sums of a phase, its rows are multiplied in rounds, and the sums of each are used before the next:
// a round is a layer of i, f and g, whose activations come with it, or so many groups of channels of the gated unit or the head.
constexpr u32 MIX_ROUNDS = NUM_MIX_ROUNDS, GLU_ROUNDS = NUM_GLU_ROUNDS, HEAD_ROUNDS = NUM_HEAD_ROUNDS;
static_assert(MIX_ROUNDS == 1 || MIX_ROUNDS == 3, "all layers, or one");
// Of the gated unit in whole pairs of a lane.
constexpr u32 GLU_GROUPS = GLU_ROUNDS == 1 ? most_groups_of(GLU) : parts(most_groups_of(GLU), 4 * GLU_ROUNDS) * 4;
constexpr u32 HEAD_GROUPS = parts(most_groups_of(HEAD), HEAD_ROUNDS);
// Rows of tiles of a layer and a round.
__device__ constexpr u32 rows_of(u32 phase) {
    return phase == HEAD ? HEAD_GROUPS : phase == GLU ? 2 * GLU_GROUPS : most_groups_of(phase);
}
__device__ constexpr u32 layer_sets_of(u32 phase) { return parts(rows_of(phase), GROUP); }
// Layers of a round.
__device__ constexpr u32 layers_at_once_of(u32 phase) { return phase == MIX ? layers_of(MIX) / MIX_ROUNDS : 1; }
// They are multiplied one after the other, or together.
__device__ constexpr u32 passes_of(u32 phase) { return GROUP > 1 ? 1 : layers_at_once_of(phase); }
__device__ constexpr u32 sets_of(u32 phase) { return layer_sets_of(phase) * (layers_at_once_of(phase) / passes_of(phase)); }
__device__ constexpr u32 whole_sets_of(u32 phase) { return sets_of(phase) / GROUPS * GROUPS; }
__device__ constexpr u32 shared_sets_of(u32 phase) { return sets_of(phase) % GROUPS; }
__device__ constexpr u32 parts_of(u32 phase) {
    // In a cluster sums have little room, and of layers that are multiplied together there are enough sets.
    if (shared_sets_of(phase) == 0 || passes_of(phase) < layers_at_once_of(phase)) return 1;
    u32 most = 1;
    while (2 * most * shared_sets_of(phase) <= GROUPS && 2 * most <= larger_of(part_columns_of(phase), GROUP)) most *= 2;
    return most;
}
// What a group of warps multiplies one after the other: a set of rows by columns.
__device__ constexpr u32 pass_runs_of(u32 phase) {
    return parts(whole_sets_of(phase) + shared_sets_of(phase) * parts_of(phase), GROUPS);
}
// Tiles of a warp in a round, at most.
__device__ constexpr u32 tiles_of(u32 phase) {
    u32 whole = whole_sets_of(phase) / GROUPS, shared = pass_runs_of(phase) - whole, columns = part_columns_of(phase);
    return input_parts_of(phase) * passes_of(phase) * (whole * columns + shared * parts(columns, parts_of(phase)));
}
constexpr u32 LAYER_TILES = MIX_ROUNDS * tiles_of(MIX) + tiles_of(OUT) + GLU_ROUNDS * tiles_of(GLU) + tiles_of(DOWN);
constexpr u32 HEAD_TILES = HEAD_ROUNDS * tiles_of(HEAD);
constexpr u32 STAGES = NUM_STAGES;  // tiles on their way to a warp
// In a list of a warp's tiles there are at least as many as are on their way; behind it come those that follow, and one word more.
constexpr u32 LAYER_LIST = larger_of(LAYER_TILES, STAGES) + STAGES + 1, HEAD_LIST = larger_of(HEAD_TILES, STAGES) + STAGES + 1;

// A run of a pass.
template <u32 PHASE>
struct Run {
    u32 set, part, begin, end;  // of a part's columns
    bool is_none;               // the last run may be one of some groups only

    __device__ __forceinline__ Run(u32 group, u32 run) {
        constexpr u32 WHOLE = whole_sets_of(PHASE), PARTS = parts_of(PHASE), COLUMNS = part_columns_of(PHASE);
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

// Activations in shared memory, of a column of tiles: 16 or 32 matrices of 8 sequences by 16 channels for warpgroups, apart for their
// banks; otherwise 8 or 16 sequences by 128 channels, of every other one with neighbouring pieces of 16 exchanged, likewise.
constexpr u32 MATRIX_BYTES = GROUP > 1 ? 128 + 16 : 128, COLUMN_BYTES = SHARING * SLOTS * MATRIX_BYTES;
__device__ constexpr u32 input_bytes_of(u32 phase) { return layers_at_once_of(phase) * part_columns_of(phase) * COLUMN_BYTES; }
// Behind them, sums of a part of a row of tiles: [sequence][8][2], and some words for the banks.
constexpr u32 SUM_WORDS = SHARING * SLOTS * TILE_ROWS + 16;
__device__ constexpr u32 pass_sums_of(u32 phase) {
    return GROUP * (whole_sets_of(phase) + shared_sets_of(phase) * parts_of(phase));
}
__device__ constexpr u32 region_of(u32 phase) {
    return input_bytes_of(phase) + passes_of(phase) * pass_sums_of(phase) * SUM_WORDS * 4;
}
constexpr u32 REGION = larger_of(larger_of(larger_of(region_of(MIX), region_of(OUT)), larger_of(region_of(GLU), region_of(DOWN))),
                                 region_of(HEAD));

// At the beginning of a block's shared memory.
struct Shared {
    float vectors[2][OWN_VECTORS];  // of this phase and the last
    u64 sums_read;                  // a barrier
    u64 inbox_full[WARPS];          // barriers
    u64 inbox_read[WARPS];          // by the other block, between rounds
    // Sums of each layer and pair that the other block of the cluster has made for this one's sequences.
    int2 inbox[SHARING > 1 ? WARPS : 1][SHARING > 1 ? layers_at_once_of(MIX) * PAIRS : 1][32];
    u32 patience[WARPS][2 * PHASES];           // for messages, and for rows
    u32 tiles[WARPS][LAYER_LIST + HEAD_LIST];  // see `list_tiles`
    u32 counts[WARPS][2];                      // of a layer's tiles, and of the head's
};
constexpr u32 SHARED_BYTES = parts(sizeof(Shared), 128) * 128;
// Then the region, then the tiles on their way.
constexpr u32 TILE_BYTES = 512;
#ifdef NUM_SHARED_BYTES
static_assert(SHARED_BYTES + REGION + STAGES * WARPS * TILE_BYTES == NUM_SHARED_BYTES, "the host computes this number");
#endif

// Quantised rows that blocks send each other: of each phase [layer][sequence][K], in words of four channels, as many as there are
// in whole tiles.
__device__ constexpr u32 row_words_of(u32 phase) { return columns_of(phase) * (TILE_COLS / 4); }
// Each has two places, in turn.
__device__ constexpr u32 rows_at(u32 phase) {
    u32 at = 0;
    for (u32 p = 0; p < phase; ++p) at += 2 * layers_of(p) * SEQUENCES * row_words_of(p);
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
    float* messages;         // [phase][sequence][maker][4]: the largest |u|, of i, f and g each, and the sum of squares
    u32* rows;               // see `rows_at`; words that have not been sent, and zeros where there are no channels
    u64* keys;               // [sequence][maker]
    float* spare_state;      // of a sequence that only fills a cluster up
    u64 tile_at[PHASES];     // first tile of a phase in its layer (the head's: of all)
    u64 layer_tiles;         // tiles of a layer
    u32 m, layers, steps;    // sequences
    u32 embedding_type;      // as `embedding_at` says
    u32 segment_tiles;       // row tiles of each of i, f, g
    u32 steps_before;        // made with these messages, rows and keys
    float eps;
};

// ---- Weights ----

constexpr u32 NO_TILE = ~0u;

// Lists a warp's tiles of a round of a phase, from a layer on, in the order of its products, from the first tile of the layer, or of
// the head, on. Of rows and columns that are not there, and behind the last one, none.
template <u32 PHASE>
__device__ __forceinline__ u32 list_tiles(const Args& a, u32* tiles, const Own& own, u32 rank, u32 at, u32 first_layer = 0) {
    constexpr u32 PART_RUNS = passes_of(PHASE) * pass_runs_of(PHASE);
    u32 warp = threadIdx.x / 32, rows = own.groups * (PHASE == GLU ? 2 : 1);
#pragma unroll 1
    for (u32 k = 0; k < input_parts_of(PHASE) * PART_RUNS; ++k) {
        Columns<PHASE> columns(rank, k / PART_RUNS);
        u32 pass = k % PART_RUNS / pass_runs_of(PHASE);
        Run<PHASE> run(warp / GROUP, k % pass_runs_of(PHASE));
        u32 layer = first_layer + pass + run.set / layer_sets_of(PHASE), r = run.set % layer_sets_of(PHASE) * GROUP + warp % GROUP;
        // A gate's row, then its value's.
        u32 row = own.begin + (PHASE == GLU ? r / 2 + r % 2 * groups_of(INNER) : r) + layer * a.segment_tiles;
        u32 first = (PHASE == HEAD ? 0 : (u32)a.tile_at[PHASE]) + row * columns_of(PHASE) + columns.begin;
        for (u32 column = run.begin + threadIdx.x % 32; column < run.end; column += 32)
            tiles[at + column - run.begin] = r < rows && column < columns.count ? first + column : NO_TILE;
        at += run.end - run.begin;
    }
    return at;
}

// Fills a list up that is too short.
__device__ __forceinline__ void fill_list(u32* tiles, u32 count) {
    for (u32 k = count + threadIdx.x % 32; k < STAGES; k += 32) tiles[k] = NO_TILE;
}

// A warp's tiles on their way, one after the other, through phases, layers and steps: each thread copies the 16 bytes that it will
// read itself. A layer behind the last one is the head.
struct Stream {
    const Args& a;
    Shared& shared;
    u32 ring, slot;
    u32 base, next;  // the layer's first tile, and the next one from there on
    const u32* at;   // in the list

    // Behind a head, where the first layer comes.
    __device__ __forceinline__ Stream(const Args& a, Shared& shared, u32 ring)
        : a(a), shared(shared), ring(ring), slot(0), base(first_tile(a.layers)) {
        end_list(a.layers, 0, false);
        at = list(a.layers) + count(a.layers), next = *at;
#pragma unroll 1
        for (u32 k = 0; k < STAGES; ++k) fetch();
    }

    // Asks for one more, in the place of the oldest.
    __device__ __forceinline__ void fetch() {
        u32 bytes = next == NO_TILE ? 0 : 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place(slot)), "l"(tile(base + next)), "r"(bytes)
                     : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
        slot = (slot + 1) % STAGES, next = *++at;
    }

    // Goes on to a layer, whose first tiles are on their way. Behind it comes the next one, unless it is the end.
    __device__ __forceinline__ void turn_to(u32 layer, bool is_end) {
        // Those that only fill the last list up.
        for (u32 k = count(layer == 0 ? a.layers : layer - 1); k < STAGES; ++k) {
            wait<STAGES - 1>();
            fetch();
        }
        base = first_tile(layer);
        end_list(layer, layer == a.layers ? 0 : layer + 1, is_end);
        at = list(layer) + STAGES, next = *at;
    }

    // The oldest one, or the one behind it.
    __device__ __forceinline__ uint4 oldest() const { return read<STAGES - 1>(slot); }
    __device__ __forceinline__ uint4 second() const { return read<STAGES - 2>((slot + 1) % STAGES); }

private:
    __device__ __forceinline__ u32* list(u32 layer) const {
        return shared.tiles[threadIdx.x / 32] + (layer == a.layers ? LAYER_LIST : 0);
    }
    __device__ __forceinline__ u32 count(u32 layer) const { return shared.counts[threadIdx.x / 32][layer == a.layers]; }
    __device__ __forceinline__ u32 first_tile(u32 layer) const {
        return layer == a.layers ? (u32)a.tile_at[HEAD] : layer * (u32)a.layer_tiles;
    }
    __device__ __forceinline__ const uint4* tile(u32 index) const { return a.weights + (size_t)index * 32 + threadIdx.x % 32; }
    // Puts the first tiles of the layer that follows behind a layer's list, or none.
    __device__ __forceinline__ void end_list(u32 layer, u32 following, bool is_end) {
        u32 lane = threadIdx.x % 32;
        __syncwarp();
        if (lane < STAGES) {
            u32 tile = list(following)[lane], to = max(count(layer), STAGES) + lane;
            list(layer)[to] = is_end || tile == NO_TILE ? NO_TILE : tile + first_tile(following) - first_tile(layer);
        }
        __syncwarp();
    }
    __device__ __forceinline__ u32 place(u32 slot) const { return ring + slot * (WARPS * TILE_BYTES); }
    // Until no more than the last ones are on their way.
    template <u32 LAST>
    __device__ __forceinline__ static void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(LAST) : "memory");
    }
    // With so many behind it.
    template <u32 BEHIND>
    __device__ __forceinline__ uint4 read(u32 slot) const {
        wait<BEHIND>();
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(place(slot))
                     : "memory");
        return v;
    }
};
