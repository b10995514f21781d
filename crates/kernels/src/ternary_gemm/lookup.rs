//! Products by table look-up, for many tokens.
//!
//! For a tile of T tokens, and for each group of four inputs that one weight byte covers, the 81 sums
//! `Σ (c_f − 1)·q_f`, `c` in {0, 1, 2}⁴, are tabulated as T 16-bit lanes. A weight byte, turned from
//! four 2-bit fields into a base-3 number, is then an index: one load and one addition give four
//! products for each of T tokens. Two code words a row (32 inputs, eight tables) are one pass:
//!
//! ```text
//! for 256 inputs:                        sums stay below 64 · 4 · 127 = 32,512, so 16 bits hold them
//!   for each pass of 32 inputs:
//!     build eight tables                 81 additions each; they live in the first two cache levels
//!     for each row:  sums[row] += table_0[code_0] + … + table_7[code_7]
//!   widen sums to 32 bits
//! ```
//!
//! No multiplier is used. On a core whose 512-bit load and byte-dot-product instructions both start
//! once a cycle this does 128 products a load where the dot product does 64.

use std::io;
use std::sync::Mutex;

use super::{Kernels, MAX_PRODUCTS, Product, Work, run_on};
use crate::activations::QuantizedRows;
use crate::memory::{ArenaBox, WeightArena};
use crate::pool::{Pool, SharedMut};
use crate::ternary::base3::quad_index;
use crate::ternary::{Layout, PANEL_ROWS, PanelVector, TernaryMatrix, WORD_TRITS};
use crate::tier::Backend;

/// Sums that four trits select from.
const ENTRIES: usize = 81;
/// Code words of a row that one pass consumes.
const PASS_WORDS: usize = 2;
/// Tables of a pass, one for each byte of its words.
const PASS_TABLES: usize = 4 * PASS_WORDS;
/// Inputs of a pass.
const PASS_INPUTS: usize = PASS_WORDS * WORD_TRITS;
/// Passes whose sums fit 16 bits: `8 · 8 · 4 · 127` = 32,512.
const PASSES_IN_16_BITS: usize = 8;
/// Tokens of the widest tile.
const MAX_TOKENS: usize = 32;
/// Panels of one task, at most: the more rows share a table, the less building it costs, until their
/// sums no longer fit the second cache level (measured).
const TASK_PANELS: usize = 352;
/// Panels of one task, at least, when there are more threads than tiles of tokens.
const MIN_TASK_PANELS: usize = 64;

/// The 16-bit sums of a tile of tokens, in registers.
///
/// # Safety
/// Every method demands that the calling function is compiled with, and runs on a processor with, the
/// features of the implementing tier, and that pointers have `TOKENS` lanes behind them.
pub(super) trait Lanes: Copy {
    /// T, the number of lanes.
    const TOKENS: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const i16) -> Self;
    unsafe fn store(self, to: *mut i16);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    /// Adds the lanes to 32-bit sums, or sets these if `INIT`.
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32);

    /// Turns the sums of a panel, `[row][token]`, into `[token][row]`. `out` has as many.
    #[inline(always)]
    unsafe fn transpose_panel(sums: &[i32], out: &mut [i32]) {
        for (token, out) in out.chunks_exact_mut(PANEL_ROWS).enumerate() {
            for (row, out) in out.iter_mut().enumerate() {
                *out = sums[row * Self::TOKENS + token];
            }
        }
    }

    /// Turns each byte of a word of a panel's rows into the offset of its table entry.
    #[inline(always)]
    unsafe fn word_offsets(
        layout: Layout,
        units: &[PanelVector],
        word: usize,
        offsets: &mut WordOffsets,
    ) {
        for (offsets, word) in offsets.iter_mut().zip(layout.word(units, word)) {
            *offsets = word.to_le_bytes().into_iter().rev().fold(0, |offsets, quad| {
                // Fields are at most 2 (a packing invariant); `min` keeps even a broken invariant inside
                // the table.
                let index = usize::from(quad_index(quad)).min(ENTRIES - 1);
                offsets << 16 | (index * Self::TOKENS / 4) as u64
            });
        }
    }
}

/// Table offsets of one word of each row, in units of eight bytes: four 16-bit offsets to a `u64`, that of
/// the word's first byte lowest.
pub(super) type WordOffsets = [u64; PANEL_ROWS];

/// Lanes of the scalar tier.
#[derive(Clone, Copy)]
pub(super) struct PlainLanes([i16; 16]);

impl Lanes for PlainLanes {
    const TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0; 16])
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> Self {
        // SAFETY: 16 lanes are readable by the caller's promise.
        Self(unsafe { from.cast::<[i16; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i16) {
        // SAFETY: 16 lanes are writable by the caller's promise.
        unsafe { to.cast::<[i16; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].wrapping_add(other.0[i])))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].wrapping_sub(other.0[i])))
    }

    #[inline(always)]
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32) {
        for (i, lane) in self.0.into_iter().enumerate() {
            // SAFETY: 16 sums are readable and writable by the caller's promise.
            unsafe {
                let before = if INIT { 0 } else { sums.add(i).read() };
                sums.add(i).write(before + i32::from(lane));
            }
        }
    }
}

/// Working memory of the look-up products, a part for each thread. Grows when a larger matrix comes.
#[derive(Debug)]
pub struct LookupScratch {
    threads: Vec<Mutex<ThreadScratch>>,
}

impl LookupScratch {
    /// Scratch for a pool of `threads` threads.
    pub fn new(threads: usize) -> Self {
        let arena = WeightArena::new();
        let part = || Mutex::new(ThreadScratch { arena: arena.clone(), memory: None });
        Self { threads: (0..threads).map(|_| part()).collect() }
    }
}

#[derive(Debug)]
struct ThreadScratch {
    arena: WeightArena,
    memory: Option<ArenaBox>,
}

/// The parts of a thread's scratch memory.
struct Buffers<'a> {
    /// `[table][entry][token]`.
    tables: &'a mut [i16],
    /// Activations of the tile, `[input][token]`.
    inputs: &'a mut [i16],
    /// `[row][token]`.
    short_sums: &'a mut [i16],
    /// `[row][token]`.
    sums: &'a mut [i32],
}

impl ThreadScratch {
    /// Bytes of the four parts of [`Buffers`]. Each is a multiple of the 64 or 32 bytes of a row of lanes,
    /// so all parts stay aligned.
    fn sizes(tokens: usize, inputs: usize, rows: usize) -> [usize; 4] {
        let tables = PASS_TABLES * ENTRIES * tokens;
        [2 * tables, 2 * inputs * tokens, 2 * rows * tokens, 4 * rows * tokens]
    }

    /// Makes room for some bytes.
    fn reserve(&mut self, bytes: usize) -> io::Result<()> {
        if self.memory.as_ref().is_none_or(|memory| memory.bytes().len() < bytes) {
            self.memory = Some(self.arena.allocate(bytes)?);
        }
        Ok(())
    }

    /// The parts, for which room was made.
    fn buffers(&mut self, tokens: usize, inputs: usize, rows: usize) -> Buffers<'_> {
        let sizes = Self::sizes(tokens, inputs, rows);
        let memory = self.memory.as_mut().map(ArenaBox::bytes_mut).unwrap_or_default();
        let (tables, rest) = memory.split_at_mut(sizes[0]);
        let (inputs, rest) = rest.split_at_mut(sizes[1]);
        let (short_sums, rest) = rest.split_at_mut(sizes[2]);
        Buffers {
            tables: bytemuck::cast_slice_mut(tables),
            inputs: bytemuck::cast_slice_mut(inputs),
            short_sums: bytemuck::cast_slice_mut(short_sums),
            sums: bytemuck::cast_slice_mut(&mut rest[..sizes[3]]),
        }
    }
}

/// One product, cut into tasks of one tile of tokens and one block of panels.
struct Job<'a> {
    weights: &'a TernaryMatrix,
    input: &'a QuantizedRows,
    output: SharedMut<f32>,
    /// Tokens that are looked up.
    tokens: usize,
    first_task: usize,
    /// Blocks of panels.
    blocks: usize,
}

/// What decides between look-ups and dot products on a tier.
pub(super) struct Tile {
    /// T.
    pub tokens: usize,
    /// See [`Kernels::LOOKUP_MIN_TOKENS`].
    pub min_tokens: usize,
    /// See [`Kernels::LOOKUP_MIN_ROWS`].
    pub min_rows: usize,
}

impl Tile {
    pub fn of(backend: Backend) -> Self {
        struct Ask<'a>(&'a mut Tile);
        impl Work for Ask<'_> {
            #[inline(always)]
            unsafe fn run<K: Kernels>(self) {
                *self.0 = Tile {
                    tokens: K::Lanes::TOKENS,
                    min_tokens: K::LOOKUP_MIN_TOKENS,
                    min_rows: K::LOOKUP_MIN_ROWS,
                };
            }
        }
        let mut tile = Tile { tokens: 0, min_tokens: 0, min_rows: 0 };
        run_on(backend, Ask(&mut tile));
        tile
    }
}

/// Computes the products of the first `tokens` tokens; shapes were checked by the caller.
///
/// # Errors
/// The system's refusal of memory for the tables. Nothing has been computed then.
pub(super) fn multiply(
    backend: Backend,
    pool: &Pool,
    scratch: &mut LookupScratch,
    products: &mut [Product<'_>],
    tokens: usize,
) -> io::Result<()> {
    let tile_tokens = Tile::of(backend).tokens;
    let tiles = tokens.div_ceil(tile_tokens);
    let (mut tasks, mut bytes) = (0, 0);
    let mut jobs = [const { None }; MAX_PRODUCTS];
    for (job, product) in jobs.iter_mut().zip(products) {
        let panels = product.weights.panels();
        let wanted = (2 * pool.threads()).div_ceil(tiles).min(panels.div_ceil(MIN_TASK_PANELS));
        let blocks = panels.div_ceil(TASK_PANELS).max(wanted);
        let rows = panels.div_ceil(blocks) * PANEL_ROWS;
        let inputs = passes(product.weights) * PASS_INPUTS;
        bytes = bytes.max(ThreadScratch::sizes(tile_tokens, inputs, rows).iter().sum());
        *job = Some(Job {
            weights: product.weights,
            input: product.input,
            output: SharedMut::new(product.output),
            tokens,
            first_task: tasks,
            blocks,
        });
        tasks += tiles * blocks;
    }
    for scratch in &mut scratch.threads {
        scratch.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).reserve(bytes)?;
    }
    pool.run(tasks, &|thread, task| {
        let mut scratch =
            scratch.threads[thread].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(job) = jobs.iter().flatten().rfind(|job| job.first_task <= task) {
            run_on(backend, LookupTask { job, task: task - job.first_task, scratch: &mut scratch });
        }
    });
    Ok(())
}

/// Passes over the inputs of a matrix.
fn passes(weights: &TernaryMatrix) -> usize {
    weights.words().div_ceil(PASS_WORDS)
}

struct LookupTask<'a> {
    job: &'a Job<'a>,
    task: usize,
    scratch: &'a mut ThreadScratch,
}

impl Work for LookupTask<'_> {
    #[inline(always)]
    unsafe fn run<K: Kernels>(self) {
        // SAFETY: the caller's promise about features.
        unsafe { self.job.run::<K::Lanes>(self.task, self.scratch) }
    }
}

impl Job<'_> {
    /// # Safety
    /// As for [`Lanes`].
    #[inline(always)]
    unsafe fn run<V: Lanes>(&self, task: usize, scratch: &mut ThreadScratch) {
        let first_token = task / self.blocks * V::TOKENS;
        let tokens = V::TOKENS.min(self.tokens - first_token);
        let panels = self.weights.panels();
        let per_block = panels.div_ceil(self.blocks);
        let first_panel = (task % self.blocks * per_block).min(panels);
        let last_panel = (first_panel + per_block).min(panels);
        let rows = (last_panel - first_panel) * PANEL_ROWS;
        if rows == 0 {
            return; // Blocks are cut equal, so the last ones of a very tall matrix may be empty.
        }
        let passes = passes(self.weights);
        let buffers = scratch.buffers(V::TOKENS, passes * PASS_INPUTS, rows);
        transpose_inputs::<V>(self.input, first_token, tokens, passes, buffers.inputs);

        let block = Block { weights: self.weights, first_panel, panels: last_panel - first_panel };
        for pass in 0..passes {
            let inputs =
                &buffers.inputs[pass * PASS_INPUTS * V::TOKENS..][..PASS_INPUTS * V::TOKENS];
            // SAFETY: the caller's promise about features.
            unsafe { build_tables::<V>(inputs, buffers.tables) };
            let first = pass % PASSES_IN_16_BITS == 0;
            let last = pass % PASSES_IN_16_BITS == PASSES_IN_16_BITS - 1 || pass + 1 == passes;
            let initial = pass < PASSES_IN_16_BITS;
            // Called directly, not through a pointer: only an inlined body gets the tier's features.
            macro_rules! sweep {
                ($first:literal, $last:literal, $initial:literal) => {
                    // SAFETY: the caller's promise about features.
                    unsafe {
                        sweep_panels::<V, $first, $last, $initial>(
                            block,
                            pass,
                            buffers.tables,
                            buffers.short_sums,
                            buffers.sums,
                        )
                    }
                };
            }
            match (first, last, initial) {
                (true, true, true) => sweep!(true, true, true),
                (true, true, false) => sweep!(true, true, false),
                (true, false, _) => sweep!(true, false, false),
                (false, true, true) => sweep!(false, true, true),
                (false, true, false) => sweep!(false, true, false),
                (false, false, _) => sweep!(false, false, false),
            }
        }
        let sums = &buffers.sums[..rows * V::TOKENS];
        // SAFETY: the caller's promise about features.
        unsafe { self.write_outputs::<V>(first_panel, first_token, tokens, sums) };
    }

    /// `y = sum · (γ / s)`, from `[row][token]` to `[token][row]`.
    ///
    /// # Safety
    /// As for [`Lanes`].
    #[inline(always)]
    unsafe fn write_outputs<V: Lanes>(
        &self,
        first_panel: usize,
        first_token: usize,
        tokens: usize,
        sums: &[i32],
    ) {
        let all_rows = self.weights.rows();
        let mut transposed = [0i32; PANEL_ROWS * MAX_TOKENS];
        let transposed = &mut transposed[..PANEL_ROWS * V::TOKENS];
        for (panel, sums) in sums.chunks_exact(PANEL_ROWS * V::TOKENS).enumerate() {
            // SAFETY: the caller's promise about features.
            unsafe { V::transpose_panel(sums, transposed) };
            let row = (first_panel + panel) * PANEL_ROWS;
            let count = PANEL_ROWS.min(all_rows - row);
            for (token, sums) in transposed.chunks_exact(PANEL_ROWS).take(tokens).enumerate() {
                let factor = self.weights.scale() / self.input.scale(first_token + token);
                // SAFETY: tasks have disjoint tiles or disjoint panels, so these outputs are written by
                // this task alone, and `multiply` holds the output borrowed until all tasks are done.
                let output =
                    unsafe { self.output.slice((first_token + token) * all_rows + row, count) };
                for (y, &sum) in output.iter_mut().zip(sums) {
                    *y = sum as f32 * factor;
                }
            }
        }
    }
}

/// Activations of a tile from `[token][input]` i8 to `[input][token]` i16; absent tokens are zero.
#[inline(always)]
fn transpose_inputs<V: Lanes>(
    input: &QuantizedRows,
    first_token: usize,
    tokens: usize,
    passes: usize,
    out: &mut [i16],
) {
    if tokens < V::TOKENS {
        out.fill(0);
    }
    // Eight inputs of every token, then the next eight: the lines that are written stay in the cache.
    for (block, out) in
        out.chunks_exact_mut(8 * V::TOKENS).take(passes * PASS_INPUTS / 8).enumerate()
    {
        for token in 0..tokens {
            let row = &input.padded_row(first_token + token)[8 * block..][..8];
            for (i, &q) in row.iter().enumerate() {
                out[i * V::TOKENS + token] = i16::from(q);
            }
        }
    }
}

/// Fills the eight tables of a pass from its 32 inputs.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn build_tables<V: Lanes>(inputs: &[i16], tables: &mut [i16]) {
    assert!(inputs.len() == PASS_INPUTS * V::TOKENS);
    assert!(tables.len() == PASS_TABLES * ENTRIES * V::TOKENS);
    for table in 0..PASS_TABLES {
        // Byte b of word w holds the trits of inputs 16w + b, + 4, + 8 and + 12.
        let first = table / 4 * WORD_TRITS + table % 4;
        // SAFETY: inputs `first`, `first + 4`, `+ 8` and `+ 12` are below 32, and 81 entries follow the
        // start of every table, by the two assertions; features by the caller's promise.
        unsafe {
            let input =
                |field: usize| V::load(inputs.as_ptr().add((first + 4 * field) * V::TOKENS));
            let low = nine_sums(input(0), input(1));
            let high = nine_sums(input(2), input(3));
            let entries = tables.as_mut_ptr().add(table * ENTRIES * V::TOKENS);
            for (h, &high) in high.iter().enumerate() {
                for (l, &low) in low.iter().enumerate() {
                    low.add(high).store(entries.add((9 * h + l) * V::TOKENS));
                }
            }
        }
    }
}

/// `(c_0 − 1)·a + (c_1 − 1)·b` at index `c_0 + 3·c_1`.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn nine_sums<V: Lanes>(a: V, b: V) -> [V; 9] {
    // SAFETY: the caller's promise about features.
    unsafe {
        let zero = V::zero();
        let (minus_a, minus_b) = (zero.sub(a), zero.sub(b));
        [minus_a.sub(b), minus_b, a.sub(b), minus_a, zero, a, b.sub(a), b, a.add(b)]
    }
}

/// Adds one pass to the sums of every row. `FIRST`: the 16-bit sums start at zero; `LAST`: they are
/// added to the 32-bit sums, or set these if `INITIAL`.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn sweep_panels<V: Lanes, const FIRST: bool, const LAST: bool, const INITIAL: bool>(
    block: Block<'_>,
    pass: usize,
    tables: &[i16],
    short_sums: &mut [i16],
    sums: &mut [i32],
) {
    let panels = block.panels;
    assert!(tables.len() == PASS_TABLES * ENTRIES * V::TOKENS);
    assert!(short_sums.len() >= panels * PANEL_ROWS * V::TOKENS);
    assert!(sums.len() >= panels * PANEL_ROWS * V::TOKENS);
    // Offsets are made one panel ahead: a scalar load cannot be served from a wide store that is still
    // on its way to the cache, and waiting for it would stall every panel.
    let mut pair = [const { Aligned([[0; PANEL_ROWS]; PASS_WORDS]) }; 2];
    // SAFETY: the caller's promise about features, here and below.
    unsafe { block.offsets::<V>(pass, 0, &mut pair[0]) };
    for panel in 0..panels {
        if panel + 1 < panels {
            // SAFETY: as above.
            unsafe { block.offsets::<V>(pass, panel + 1, &mut pair[(panel + 1) % 2]) };
        }
        let offsets = &pair[panel % 2];
        for row in 0..PANEL_ROWS {
            let lane = (panel * PANEL_ROWS + row) * V::TOKENS;
            // SAFETY: `lane` has `TOKENS` sums behind it by the assertions above. An offset is below
            // `81 · TOKENS / 4` units of eight bytes for any weight byte (see `Lanes::word_offsets`), so every
            // look-up stays inside its table; features by the caller's promise.
            unsafe {
                let mut sum =
                    if FIRST { V::zero() } else { V::load(short_sums.as_ptr().add(lane)) };
                for word in 0..PASS_WORDS {
                    let four = offsets.0[word][row];
                    for byte in 0..4 {
                        let table = tables.as_ptr().add((4 * word + byte) * ENTRIES * V::TOKENS);
                        let offset = (four >> (16 * byte)) as u16;
                        sum = sum.add(V::load(table.cast::<u64>().add(offset.into()).cast()));
                    }
                }
                if LAST {
                    sum.add_to::<INITIAL>(sums.as_mut_ptr().add(lane));
                } else {
                    sum.store(short_sums.as_mut_ptr().add(lane));
                }
            }
        }
    }
}

/// On a cache line of its own: the vector stores that write it must not straddle two, or the scalar
/// loads that follow could not be served from the store buffer.
#[repr(align(64))]
struct Aligned<T>(T);

type Offsets = Aligned<[WordOffsets; PASS_WORDS]>;

/// Some panels of a matrix.
#[derive(Clone, Copy)]
struct Block<'a> {
    weights: &'a TernaryMatrix,
    first_panel: usize,
    panels: usize,
}

impl Block<'_> {
    /// Writes the table offsets of a panel's words of one pass. Words beyond the end of the rows meet
    /// activations that are zero, and may select anything.
    ///
    /// # Safety
    /// As for [`Lanes`].
    #[inline(always)]
    unsafe fn offsets<V: Lanes>(&self, pass: usize, panel: usize, offsets: &mut Offsets) {
        let units = self.weights.panel(self.first_panel + panel);
        for (i, offsets) in offsets.0.iter_mut().enumerate() {
            let word = pass * PASS_WORDS + i;
            if word < self.weights.words() {
                // SAFETY: the caller's promise about features.
                unsafe { V::word_offsets(self.weights.layout(), units, word, offsets) };
            }
        }
    }
}

#[cfg(target_endian = "big")]
compile_error!("code words are read as little-endian bytes");
