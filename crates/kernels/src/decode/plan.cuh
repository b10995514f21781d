// What a launch of `decode` gets, and which part of the work each block has.

// Sizes that the host compiles this for; here those of a model of 370 million parameters.
#ifndef WIDTH
#define WIDTH 1024
#define INNER 2816
#define NUM_WARPS 8
#define NUM_RING_TILES 400
#define NUM_MOVING_TILES 32
#define NUM_GROUPS 1
#define NUM_INNER_GROUPS 2
#define NUM_HEAD_GROUPS 23
#define NUM_BLOCKS 88
#define NUM_TENSOR_CORES 0
#endif

// Warps that multiply; two more fetch weights, and serve.
constexpr u32 WARPS = NUM_WARPS, THREADS = 32 * WARPS, ALL_THREADS = THREADS + 64;
constexpr u32 TILE_BYTES = 512, RING_TILES = NUM_RING_TILES, STAGES = 64;
constexpr u32 QUADS = (WARPS + 3) / 4;  // of warps

enum Phase : u32 { MIX, OUT, GLU, DOWN, HEAD, PHASES };

__device__ constexpr u32 tiles_of(u32 n) { return (n + TILE_COLS - 1) / TILE_COLS; }
__device__ constexpr u32 groups_of(u32 n) { return (n + TILE_ROWS - 1) / TILE_ROWS; }
__device__ constexpr u32 inputs_of(u32 phase) { return phase == DOWN ? INNER : WIDTH; }
__device__ constexpr u32 col_tiles_of(u32 phase) { return tiles_of(inputs_of(phase)); }
// Columns of tiles that a warp has, for all rows of its block: `warp + k WARPS`.
__device__ constexpr u32 columns_of(u32 phase) { return (col_tiles_of(phase) + WARPS - 1) / WARPS; }

__device__ constexpr u32 smaller_of(u32 a, u32 b) { return a < b ? a : b; }
__device__ constexpr u32 larger_of(u32 a, u32 b) { return a > b ? a : b; }

__device__ constexpr u32 layers_of(u32 phase) { return phase == MIX ? 3 : 1; }
// Rows of tiles that a block has of a phase's layer, at most. The values' rows begin anywhere in a tile.
__device__ constexpr u32 most_rows_of(u32 phase) {
    return phase == HEAD  ? NUM_HEAD_GROUPS
           : phase == GLU ? 2 * NUM_INNER_GROUPS + (INNER % TILE_ROWS != 0)
                          : NUM_GROUPS;
}

// Of each vector that a block needs, at most.
constexpr u32 OWN_FLOATS = larger_of(NUM_GROUPS, NUM_INNER_GROUPS) * TILE_ROWS;

// Weights arrive in stages: all of a block's tiles of a phase if they are few, otherwise some rows of one layer.
constexpr u32 STAGE_TILES = 48, STAGE_ROWS = 4;
__device__ constexpr bool is_one_stage(u32 phase) {
    return layers_of(phase) * most_rows_of(phase) * col_tiles_of(phase) <= STAGE_TILES;
}
__device__ constexpr u32 stage_rows_of(u32 phase) {
    u32 fit = smaller_of(larger_of(STAGE_TILES / col_tiles_of(phase), 1), STAGE_ROWS);
    return is_one_stage(phase) ? most_rows_of(phase) : smaller_of(fit, most_rows_of(phase));
}
__device__ constexpr u32 layer_stages_of(u32 phase) {
    return (most_rows_of(phase) + stage_rows_of(phase) - 1) / stage_rows_of(phase);
}

// If a lane has few tiles of a phase, all are in registers before the activations are there. The stages of such a phase lie
// one behind the other in the ring.
constexpr u32 EARLY_TILES = NUM_TENSOR_CORES ? 16 : 6;
__device__ constexpr bool is_early(u32 phase) {
    return layers_of(phase) * layer_stages_of(phase) * stage_rows_of(phase) * columns_of(phase) <= EARLY_TILES;
}
// Tiles that lie together, of such a phase or of a stage, as many as there are at most.
__device__ constexpr u32 tiles_together(u32 phase) {
    u32 rows = is_early(phase) || is_one_stage(phase) ? layers_of(phase) * layer_stages_of(phase) : 1;
    return rows * stage_rows_of(phase) * col_tiles_of(phase);
}

struct Args {
    const uint4* weights;        // tiles: [layer][phase], then the head
    const float* vectors;        // [layer][9 D + F], then the last norm and the head's
    const float* gammas;         // [layer][6]: i, f, g, o, gate, down; then the head's
    const void* embeddings;      // [V][D]
    float* state;                // [L][D]
    float* exchange;             // what blocks send each other, see `place_of`
    float* logits;               // [V], of the last token
    u64* keys;                   // of each block the largest logit and its token
    u32* not_finite;             // set to 1 if a logit is not
    u32* history;                // where tokens that are fed are noted
    u64 tile_at[PHASES];         // first tile of a phase in its layer (the head's: of all)
    u64 layer_tiles;             // tiles of a layer
    u32 layers, vocab;
    u32 segment_tiles;           // row tiles of each of i, f, g
    u32 glu_row_tiles;
    u32 embedding_type;          // as `embedding_at` says
    u32 tokens_before;           // fed since the exchange was cleared
    u32 count;                   // tokens to feed: `token`, then the most likely ones
    int token;                   // negative: the most likely one
    float eps;
};

// Where things are in `exchange`: of each phase a row and the sums of its groups.
__device__ constexpr u32 whole_fours(u32 n) { return (n + 3) / 4 * 4; }
__device__ constexpr u32 place_of(u32 phase) {
    u32 at = 0;
    for (u32 p = 0; p < phase; ++p) at += inputs_of(p) + whole_fours(groups_of(inputs_of(p)));
    return at;
}
__device__ constexpr u32 sums_of(u32 phase) { return place_of(phase) + inputs_of(phase); }

// ---- Who does what ----

__device__ __forceinline__ u32 part_begin(u32 whole, u32 part, u32 parts) { return whole * part / parts; }

// What a block does in a phase. Its rows of tiles are numbered through up to three pieces of the weights: i, f, g or gate
// and value.
struct Part {
    u32 channel, channels;  // own channels
    u32 rows;               // of tiles
    u32 layer_rows;         // of these in a layer, or all of them in one stage
    u32 stage_rows;         // in a stage, at most
    u32 together[2];        // tiles that lie together from the first stage on, and from each later one on
    u32 second_at;          // where the sums of the first own channel of the second piece are
    u32 piece_end[2];       // rows
    u32 piece_at[3];        // what has to be added to the number of a row of a piece

    // Where a row is among those of the phase's matrix.
    __device__ __forceinline__ u32 row_at(u32 row) const {
        return row + piece_at[(row >= piece_end[0]) + (row >= piece_end[1])];
    }
};

// Computed once, for divisions are slow.
struct Plan {
    Part part[PHASES];

    __device__ __forceinline__ void make(const Args& a) {
        u32 phase = threadIdx.x;
        if (phase >= PHASES) return;
        u32 outputs = phase == HEAD ? a.vocab : phase == GLU ? INNER : WIDTH, groups = groups_of(outputs);
        u32 begin = part_begin(groups, blockIdx.x, gridDim.x), rows = part_begin(groups, blockIdx.x + 1, gridDim.x) - begin;
        Part& p = part[phase];
        p.channel = begin * TILE_ROWS;
        p.channels = min(p.channel + rows * TILE_ROWS, outputs) - min(p.channel, outputs);
        p.stage_rows = stage_rows_of(phase);
        p.together[0] = tiles_together(phase);
        p.together[1] = is_early(phase) ? 0 : p.together[0];
        p.rows = p.piece_end[0] = p.piece_end[1] = rows;
        p.second_at = rows * TILE_ROWS;
        p.piece_at[0] = p.piece_at[1] = p.piece_at[2] = begin;
        if (phase == MIX) {
            p.rows = 3 * rows;
            p.piece_end[1] = 2 * rows;
            for (u32 s = 1; s < 3; ++s) p.piece_at[s] += s * (a.segment_tiles - rows);
        } else if (phase == GLU && rows > 0) {
            // The values' rows begin anywhere in a tile.
            u32 first = (INNER + p.channel) / TILE_ROWS, shift = INNER % TILE_ROWS;
            p.rows = p.piece_end[1] = rows + min(rows + (shift != 0), a.glu_row_tiles - first);
            p.piece_at[1] = p.piece_at[2] = first - rows;
            p.second_at += shift;
        }
        p.layer_rows = p.rows / layers_of(phase);
        if (is_one_stage(phase)) p.layer_rows = p.stage_rows = p.rows;
    }
};

// The tiles of a phase's matrix.
__device__ __forceinline__ const uint4* tiles_of_phase(const Args& a, u32 layer, u32 phase) {
    return a.weights + (a.tile_at[phase] + (phase == HEAD ? 0 : layer * a.layer_tiles)) * (TILE_BYTES / 16);
}

// ---- Shared memory ----

// By address: pointers would be made anew in each phase, from a special register.

// A value that the compiler keeps in a register instead of computing it again.
__device__ __forceinline__ u32 kept(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

template <class T>
__device__ __forceinline__ T* kept(T* value) {
    asm volatile("" : "+l"(value));
    return value;
}

__device__ __forceinline__ u32 load_shared(u32 from, u32 offset) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from + offset) : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_shared_4(u32 from, u32 offset) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from + offset)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 to, u32 offset, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + offset), "r"(value) : "memory");
}

// At the beginning of a block's shared memory.
struct Shared {
    Plan plan;
    u64 keys[WARPS];                          // the largest of a warp's logits
    u64 full[STAGES], empty[STAGES];          // barriers of the ring
    u64 squares_posted;                       // a barrier
    u32 stage_tiles[STAGES];
    float squares[2][THREADS];                // parts of sums of squares
    float row_factor[2];                      // R of a phase's row
    u32 largest[2][3][WARPS];                 // |u| of a warp's columns
};

// Where a part of it begins.
#define SHARED_AT(part) ((u32)(u64) & ((const Shared*)0)->part)

constexpr u32 SHARED_BYTES = 6656;
static_assert(sizeof(Shared) <= SHARED_BYTES, "the host knows this number");
