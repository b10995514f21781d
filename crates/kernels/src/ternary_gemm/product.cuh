// What every product of ternary weights with activations takes.

struct Args {
    const uint4* weights;  // tiles [row tile][column tile][lane]
    const i8* q;           // [segment][rows][K padded to whole tiles], or as `Quantized` says for a warpgroup product
    const int* q_sums;     // [segment][rows]
    int* out;              // [M][row tiles * 16]
    u32 m;                 // tokens
    u32 rows;              // rows of q and q_sums in a segment
    u32 row_tiles, col_tiles;
    u32 segment_tiles;     // row tiles that share an input
    u32 splits;            // blocks that share the column tiles of an output and add to it; not of prompts or few tokens
};
