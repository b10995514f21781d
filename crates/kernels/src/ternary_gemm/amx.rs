//! AMX: many tokens by tiles of 8-bit integers.
//!
//! A tile register holds sixteen rows of 64 bytes. One instruction adds to sixteen by sixteen sums the
//! products of 64 inputs, 16,384 of them in 16 cycles:
//!
//! ```text
//! C [16 tokens, 16 outputs] i32 += A [16 tokens, 64 inputs] i8 · B [16 outputs, 64 inputs]ᵀ i8
//! ```
//!
//! A is read where the activations lie. A row of B holds four neighbouring inputs of sixteen outputs, and so
//! does every field of a panel's code word: a word is unpacked into four rows of B, by one instruction each.
//!
//! ```text
//! for each eight panels:
//!   for each group of panels:
//!     for each block of inputs:
//!       unpack the panels' words        into the first cache level
//!       for each strip of tokens:       four tiles of sums: two of tokens by two panels, or one by four
//!         add the block's products
//!   for each token:
//!     write the outputs
//! ```

use std::arch::asm;
use std::arch::x86_64::*;
use std::io;
use std::ops::Range;

use super::avx512::{corrections, load};
use super::lookup::LookupScratch;
use super::{MAX_PRODUCTS, Product};
use crate::activations::QuantizedRows;
use crate::pool::{Pool, SharedMut};
use crate::ternary::base3::{CORRECTIONS, GROUP_UNITS, GROUP_WORDS, QUADS};
use crate::ternary::{Layout, PANEL_ROWS, PanelVector, TernaryMatrix, WORD_TRITS};

/// Fewer tokens than this are multiplied faster by dot products (measured).
pub(super) const MIN_TOKENS: usize = 4;
/// Tokens of a tile.
const TILE_TOKENS: usize = 16;
/// Words of a row that fill a tile of weights.
const TILE_WORDS: usize = 4;
/// Bytes of a row of a tile.
const TILE_ROW: usize = 64;
/// Tiles of sums.
const SUM_TILES: usize = 4;
/// Words of a block of inputs and of a tile of tokens in a strip: whole groups of base 3 and whole tiles, and
/// few enough that a group's weights stay in the first cache level beside a strip's activations (measured).
const BLOCK_WORDS: usize = 20;
/// Bytes of activations that are kept in the second cache level while all weights pass, at most.
const TOKENS_BYTES: usize = 3 << 19;
/// Panels whose outputs are written together. Those of one token lie side by side, those of different tokens
/// a multiple of 4 KiB apart: written one by one, almost each costs a miss in the cache and the page table.
const WIDE_PANELS: usize = 8;
/// Products of a task, at least: starting one costs little beside it.
const TASK_PRODUCTS: usize = 2 << 20;

/// The four rows of B that a word of a panel makes.
type WordRows = [PanelVector; 4];
/// `[token][output]`.
type SumTile = [[i32; PANEL_ROWS]; TILE_TOKENS];
/// `[tile of tokens][panel of the group]`.
type StripSums = [SumTile; SUM_TILES];

/// One product.
struct Job<'a> {
    weights: &'a TernaryMatrix,
    input: &'a QuantizedRows,
    output: SharedMut<f32>,
    /// Blocks of tokens, each with tasks of its own.
    token_blocks: usize,
    /// Panels of a task.
    task_panels: usize,
    first_task: usize,
}

/// Tiles of tokens of a strip: with few tokens, one of these meets four panels instead of two.
fn strip_tiles(tokens: usize) -> usize {
    if tokens > TILE_TOKENS { 2 } else { 1 }
}

/// Computes the products; shapes were checked by the caller.
///
/// # Errors
/// The system's refusal of memory for unpacked weights and sums. Nothing has been computed then.
pub(super) fn multiply(
    pool: &Pool,
    scratch: &mut LookupScratch,
    products: &mut [Product<'_>],
) -> io::Result<()> {
    let (mut tasks, mut bytes) = (0, 0);
    let mut jobs = [const { None }; MAX_PRODUCTS];
    for (job, product) in jobs.iter_mut().zip(products) {
        let (tokens, inputs) = (product.input.rows(), product.input.cols());
        let panels = product.weights.panels();
        let most_tokens = (TOKENS_BYTES / inputs).max(2 * TILE_TOKENS);
        let token_blocks = tokens.div_ceil(most_tokens);
        let block_tokens = tokens.div_ceil(token_blocks);
        let group_panels = SUM_TILES / strip_tiles(block_tokens);
        let products = panels * PANEL_ROWS * inputs * block_tokens;
        let tasks_wanted = (products / TASK_PRODUCTS).clamp(1, panels.div_ceil(WIDE_PANELS));
        let equal = panels.div_ceil(tasks_wanted.next_multiple_of(pool.threads()));
        let task_panels = equal.next_multiple_of(group_panels);
        bytes = bytes.max(Buffers::sizes(block_tokens).iter().sum());
        *job = Some(Job {
            weights: product.weights,
            input: product.input,
            output: SharedMut::new(product.output),
            token_blocks,
            task_panels,
            first_task: tasks,
        });
        tasks += token_blocks * panels.div_ceil(task_panels);
    }
    scratch.reserve_threads(bytes)?;
    let scratch = &*scratch;
    pool.run(tasks, &|thread, task| {
        if let Some(job) = jobs.iter().flatten().rfind(|job| job.first_task <= task) {
            scratch.with_thread(thread, |memory| job.run(task - job.first_task, memory));
        }
    });
    Ok(())
}

/// The parts of a thread's memory.
struct Buffers<'a> {
    /// Unpacked words of a group and block, `[tile][panel][word]`.
    weights: &'a mut [WordRows],
    /// Of panels whose outputs are written together, `[group][strip]`.
    sums: &'a mut [StripSums],
    /// What turns the sums of a token into its outputs.
    factors: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    /// Bytes of the parts, for the tokens of a block.
    fn sizes(tokens: usize) -> [usize; 3] {
        let tiles = strip_tiles(tokens);
        let strips = tokens.div_ceil(tiles * TILE_TOKENS);
        [
            BLOCK_WORDS * SUM_TILES * size_of::<WordRows>(),
            WIDE_PANELS * tiles * strips * size_of::<SumTile>(),
            tokens * size_of::<f32>(),
        ]
    }

    fn new(memory: &'a mut [u8], tokens: usize) -> Self {
        let sizes = Self::sizes(tokens);
        let (weights, rest) = memory.split_at_mut(sizes[0]);
        let (sums, rest) = rest.split_at_mut(sizes[1]);
        Self {
            weights: bytemuck::cast_slice_mut(weights),
            sums: bytemuck::cast_slice_mut(sums),
            factors: bytemuck::cast_slice_mut(&mut rest[..sizes[2]]),
        }
    }
}

impl Job<'_> {
    fn run(&self, task: usize, memory: &mut [u8]) {
        let blocks = self.weights.panels().div_ceil(self.task_panels);
        let (all, block) = (self.input.rows(), task / blocks);
        // Equal parts, so that each has whole tiles of tokens if there is more than one.
        let tokens = block * all / self.token_blocks..(block + 1) * all / self.token_blocks;
        let first = task % blocks * self.task_panels;
        let panels = first..(first + self.task_panels).min(self.weights.panels());
        let buffers = Buffers::new(memory, all.div_ceil(self.token_blocks));
        // SAFETY: only the backend of this tier comes here, so the processor has its features.
        unsafe {
            if strip_tiles(all.div_ceil(self.token_blocks)) == 2 {
                self.multiply_panels::<2>(tokens, panels, buffers);
            } else {
                self.multiply_panels::<1>(tokens, panels, buffers);
            }
        }
    }

    /// Some panels' products with some tokens, in strips of `TILES` tiles of tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    fn multiply_panels<const TILES: usize>(
        &self,
        tokens: Range<usize>,
        panels: Range<usize>,
        buffers: Buffers<'_>,
    ) {
        let Buffers { weights, sums, factors } = buffers;
        for (factor, token) in factors.iter_mut().zip(tokens.clone()) {
            *factor = self.weights.scale() / self.input.scale(token);
        }
        let strips = Strips::<TILES>::new(tokens);
        let _tiles = Tiles::configure::<TILES>(strips.tile_tokens as u8);
        for first in panels.clone().step_by(WIDE_PANELS) {
            let wide = first..panels.end.min(first + WIDE_PANELS);
            let groups = wide.clone().step_by(Strips::<TILES>::PANELS);
            for (group, sums) in groups.zip(sums.chunks_exact_mut(strips.count)) {
                let group = group..wide.end.min(group + Strips::<TILES>::PANELS);
                self.multiply_group(&strips, group, weights, sums);
            }
            self.write_outputs(&strips, wide, sums, factors);
        }
    }

    /// The sums of a group of panels, `[strip][tile]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    #[inline]
    fn multiply_group<const TILES: usize>(
        &self,
        strips: &Strips<TILES>,
        group: Range<usize>,
        weights: &mut [WordRows],
        sums: &mut [StripSums],
    ) {
        let (layout, words) = (self.weights.layout(), self.weights.words());
        for first in (0..words).step_by(TILES * BLOCK_WORDS) {
            let block = first..words.min(first + TILES * BLOCK_WORDS);
            for (at, panel) in group.clone().enumerate() {
                let units = self.weights.panel(panel);
                unpack(layout, units, block.clone(), weights, at, Strips::<TILES>::PANELS);
            }
            for (strip, sums) in sums.iter_mut().enumerate() {
                // No closure: it would not be compiled with these features.
                let mut inputs: [&[i8]; TILES] = [&[]; TILES];
                for (tile, input) in inputs.iter_mut().enumerate() {
                    let token = strips.first_token(TILES * strip + tile);
                    *input = &self.input.padded_row(token)[first * WORD_TRITS..];
                }
                let (stride, tiles) = (self.input.stride(), block.len().div_ceil(TILE_WORDS));
                // SAFETY: the registers are configured for these strips. The tokens of their tiles exist, and
                // rows of activations are padded to whole tiles.
                unsafe {
                    multiply_strip::<TILES>(inputs, stride, weights, tiles, sums, first == 0)
                };
            }
        }
    }

    /// `y = sum · (γ / s)` for some panels, whose sums are `[group][strip][tile]`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn write_outputs<const TILES: usize>(
        &self,
        strips: &Strips<TILES>,
        panels: Range<usize>,
        sums: &[StripSums],
        factors: &[f32],
    ) {
        let rows = self.weights.rows();
        let row = panels.start * PANEL_ROWS;
        let count = (panels.len() * PANEL_ROWS).min(rows - row);
        for (token, &factor) in strips.tokens.clone().zip(factors) {
            // SAFETY: tasks have disjoint tokens or disjoint panels, so these outputs are written by this task
            // alone, and `multiply` holds the output borrowed until all tasks are done.
            let output = unsafe { self.output.slice(token * rows + row, count) };
            let tile = (token - strips.tokens.start) / TILE_TOKENS;
            let token = token - strips.first_token(tile);
            for (panel, output) in output.chunks_mut(PANEL_ROWS).enumerate() {
                let (group, panel) =
                    (panel / Strips::<TILES>::PANELS, panel % Strips::<TILES>::PANELS);
                let strip = &sums[group * strips.count + tile / TILES];
                let sums = &strip[tile % TILES * Strips::<TILES>::PANELS + panel][token];
                let y = _mm512_mul_ps(_mm512_cvtepi32_ps(load(sums)), _mm512_set1_ps(factor));
                let mask = (u32::MAX >> (32 - output.len())) as __mmask16;
                // SAFETY: the mask leaves as many lanes as there are outputs.
                unsafe { _mm512_mask_storeu_ps(output.as_mut_ptr(), mask, y) };
            }
        }
    }
}

/// Some tokens, cut into strips of `TILES` tiles.
struct Strips<const TILES: usize> {
    tokens: Range<usize>,
    count: usize,
    /// Sixteen, or all tokens if there are fewer.
    tile_tokens: usize,
}

impl<const TILES: usize> Strips<TILES> {
    /// Panels of a group, which a strip meets at once.
    const PANELS: usize = SUM_TILES / TILES;

    fn new(tokens: Range<usize>) -> Self {
        let count = tokens.len().div_ceil(TILES * TILE_TOKENS);
        let tile_tokens = TILE_TOKENS.min(tokens.len());
        Self { tokens, count, tile_tokens }
    }

    /// Where a tile begins. One that would reach beyond the last token begins earlier, and computes some
    /// tokens again.
    #[inline(always)]
    fn first_token(&self, tile: usize) -> usize {
        (self.tokens.start + tile * TILE_TOKENS).min(self.tokens.end - self.tile_tokens)
    }
}

/// Unpacks some words of a panel to trits, `[tile][panel of the group][word]`, the last tile filled up with
/// zeros. The words begin with a group of base 3.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn unpack(
    layout: Layout,
    units: &[PanelVector],
    words: Range<usize>,
    out: &mut [WordRows],
    panel: usize,
    group_panels: usize,
) {
    let count = words.len();
    let units = &units[layout.units(words.start)..][..layout.units(count)];
    let place =
        |word: usize| (word / TILE_WORDS * group_panels + panel) * TILE_WORDS + word % TILE_WORDS;
    match layout {
        Layout::TwoBit => {
            for (word, unit) in units.iter().enumerate() {
                let codes = load(unit);
                let rows = &mut out[place(word)];
                for (field, row) in rows.iter_mut().enumerate() {
                    store(row, trits(codes, field));
                }
            }
        }
        Layout::Base3 => {
            let (quads, mends) = (load(&QUADS), load(&CORRECTIONS));
            for (group, units) in units.chunks(GROUP_UNITS).enumerate() {
                let first = group * GROUP_WORDS;
                let has_fifths = first + GROUP_UNITS < count;
                for (i, unit) in units.iter().enumerate() {
                    let unit = load(unit);
                    let mend = corrections(unit, mends);
                    let base = _mm512_permutexvar_epi8(unit, quads);
                    let mended = _mm512_xor_si512(base, mend);
                    let rows = &mut out[place(first + i)];
                    for (field, row) in rows.iter_mut().enumerate() {
                        // The top two bits of a correction are for the fifth.
                        store(row, trits(if field < 3 { mended } else { base }, field));
                    }
                    if has_fifths {
                        let fifths = trits(_mm512_xor_si512(unit, mend), 3);
                        store(&mut out[place(first + GROUP_UNITS)][i], fifths);
                    }
                }
            }
        }
    }
    for word in count..count.next_multiple_of(TILE_WORDS) {
        out[place(word)] = [[0; PANEL_ROWS]; 4];
    }
}

/// The trits, −1 to 1, whose codes are a field of every byte.
///
/// With code bits h and l, `t = h·2 + l − 1`: bit 0 of it is `l ^ 1`, all others are `h ^ l ^ 1`. That is an
/// affine map of bits, which one instruction computes. It takes the row of the matrix for bit 0 from the
/// highest byte.
#[target_feature(enable = "avx512f,gfni")]
#[inline]
fn trits(codes: __m512i, field: usize) -> __m512i {
    let matrix = 0x01_03_03_03_03_03_03_03_i64 << (2 * field);
    _mm512_gf2p8affine_epi64_epi8::<0xff>(codes, _mm512_set1_epi64(matrix))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(to: &mut PanelVector, vector: __m512i) {
    // SAFETY: sixteen u32 are 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), vector) };
}

/// How the tile registers are used, in the processor's format (palette 1).
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each register.
    row_bytes: [u16; 16],
    /// Rows of each register.
    rows: [u8; 16],
}

/// The tile registers, in use until this is dropped: no thread carries them into other code.
struct Tiles;

impl Tiles {
    /// Registers 0 to 3 hold sums. With two tiles of tokens, 4 and 5 hold activations and 6 and 7 weights;
    /// with one, 4 and then 5 to 7.
    fn configure<const TILES: usize>(tokens: u8) -> Self {
        let mut config = TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for tile in 0..8 {
            config.row_bytes[tile] = TILE_ROW as u16;
            config.rows[tile] = if tile < SUM_TILES + TILES { tokens } else { 16 };
        }
        // SAFETY: the processor has tiles and the system lets this process use them, or there would be no
        // backend of this tier; the configuration is a valid one of 64 bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags));
        }
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as above; nothing uses the registers afterwards.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

/// Adds the products of a block of inputs to a strip's sums, or begins these.
///
/// # Safety
/// The tiles are configured for `TILES` tiles of tokens; `inputs` are the beginnings of rows that are followed
/// by the tile's other rows, `stride` bytes apart, each with `64 · tiles` bytes.
#[inline(always)]
unsafe fn multiply_strip<const TILES: usize>(
    inputs: [&[i8]; TILES],
    stride: usize,
    weights: &[WordRows],
    tiles: usize,
    sums: &mut StripSums,
    initial: bool,
) {
    assert!(tiles > 0 && weights.len() >= tiles * TILE_WORDS * SUM_TILES / TILES);
    /// `$step` multiplies a tile of inputs and advances the pointers.
    macro_rules! block {
        ([$($step:literal),* $(,)?], $($operands:tt)*) => {
            asm!(
                "test {initial:e}, {initial:e}",
                "jz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{sums} + {row}]",
                "tileloadd tmm1, [{sums} + {row} + 1024]",
                "tileloadd tmm2, [{sums} + {row} + 2048]",
                "tileloadd tmm3, [{sums} + {row} + 3072]",
                "3:",
                $($step,)*
                "dec {tiles}",
                "jnz 3b",
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 1024], tmm1",
                "tilestored [{sums} + {row} + 2048], tmm2",
                "tilestored [{sums} + {row} + 3072], tmm3",
                initial = in(reg) u32::from(initial),
                sums = in(reg) sums.as_mut_ptr(),
                row = in(reg) TILE_ROW,
                stride = in(reg) stride,
                weights = inout(reg) weights.as_ptr() => _,
                tiles = inout(reg) tiles => _,
                $($operands)*
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }
    // SAFETY: the caller's promises; the weights have enough tiles by the assertion; a tile of sums is 1,024
    // bytes.
    unsafe {
        if TILES == 2 {
            block!(
                [
                    "tileloaddt1 tmm4, [{first} + {stride}]",
                    "tileloadd tmm6, [{weights} + {row}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{weights} + {row} + 1024]",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tileloaddt1 tmm5, [{second} + {stride}]",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "add {first}, 64",
                    "add {second}, 64",
                    "add {weights}, 2048",
                ],
                first = inout(reg) inputs[0].as_ptr() => _,
                second = inout(reg) inputs[TILES - 1].as_ptr() => _,
            );
        } else {
            block!(
                [
                    "tileloaddt1 tmm4, [{first} + {stride}]",
                    "tileloadd tmm5, [{weights} + {row}]",
                    "tdpbssd tmm0, tmm4, tmm5",
                    "tileloadd tmm6, [{weights} + {row} + 1024]",
                    "tdpbssd tmm1, tmm4, tmm6",
                    "tileloadd tmm7, [{weights} + {row} + 2048]",
                    "tdpbssd tmm2, tmm4, tmm7",
                    "tileloadd tmm5, [{weights} + {row} + 3072]",
                    "tdpbssd tmm3, tmm4, tmm5",
                    "add {first}, 64",
                    "add {weights}, 4096",
                ],
                first = inout(reg) inputs[0].as_ptr() => _,
            );
        }
    }
}
