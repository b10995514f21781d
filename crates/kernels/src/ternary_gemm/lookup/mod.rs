//! Products by table look-up, for many tokens.
//!
//! For a tile of T tokens, and for each group of four inputs that one weight byte covers, the 81 sums
//! `Σ (c_f − 1)·q_f`, `c` in {0, 1, 2}⁴, are tabulated as T 16-bit lanes. A weight byte, turned from
//! four 2-bit fields into a base-3 number, is then an index: one load and one addition give four
//! products for each of T tokens. Two code words a row (32 inputs, eight tables) are one pass.
//!
//! ```text
//! for each wave of rows:
//!   lay out the indices of all passes    [pass][row], 8 bytes each, once for all tokens
//!   for each tile of T tokens:
//!     for 256 inputs:                    sums stay below 64 · 4 · 127 = 32,512, so 16 bits hold them
//!       for each pass of 32 inputs:
//!         build eight tables             81 additions each; they live in the first two cache levels
//!         for each row:  sums[row] += table_0[index_0] + … + table_7[index_7]
//!       widen sums to 32 bits
//! ```
//!
//! No multiplier is used. On a core whose 512-bit load and byte-dot-product instructions both start
//! once a cycle this does 128 products a load where the dot product does 64.

mod lanes;

use std::io;
use std::sync::Mutex;

use super::{Kernels, MAX_PRODUCTS, Product, Work, run_on};
use crate::activations::QuantizedRows;
use crate::memory::{ArenaBox, WeightArena};
use crate::pool::{Pool, SharedMut};
use crate::ternary::{PANEL_ROWS, TernaryMatrix, WORD_TRITS};
use crate::tier::Backend;

use lanes::PASS_WORDS;
pub(super) use lanes::{Lanes, PassIndices, PlainLanes};

/// Sums that four trits select from.
const ENTRIES: usize = 81;
/// Tables of a pass, one for each byte of its words.
const PASS_TABLES: usize = 4 * PASS_WORDS;
/// Inputs of a pass.
const PASS_INPUTS: usize = PASS_WORDS * WORD_TRITS;
/// Passes whose sums fit 16 bits: `8 · 8 · 4 · 127` = 32,512.
const PASSES_IN_16_BITS: usize = 8;
/// Tokens of the widest tile.
const MAX_TOKENS: usize = 32;
/// Panels of one wave, at most: the more rows share a table, the less building it costs, until their
/// sums no longer fit the second cache level (measured).
const WAVE_PANELS: usize = 352;
/// Indices of one product's part of a wave, at most, in bytes: more would not stay in the third cache level.
const WAVE_BYTES: usize = 8 << 20;
/// Panels of one task, at least, when there are more threads than tiles of tokens.
const MIN_TASK_PANELS: usize = 64;
/// Panels whose indices one task lays out.
const INDEX_TASK_PANELS: usize = 8;

/// Working memory of the look-up products. Grows when a larger matrix comes.
#[derive(Debug)]
pub struct LookupScratch {
    arena: WeightArena,
    /// Table indices of a wave.
    indices: Option<ArenaBox>,
    threads: Vec<Mutex<ThreadScratch>>,
}

impl LookupScratch {
    /// Scratch for a pool of `threads` threads.
    pub fn new(threads: usize) -> Self {
        let threads = (0..threads).map(|_| Mutex::default()).collect();
        Self { arena: WeightArena::new(), indices: None, threads }
    }
}

/// Working memory of one thread.
#[derive(Debug, Default)]
struct ThreadScratch(Option<ArenaBox>);

/// Makes room for some bytes.
fn reserve(arena: &WeightArena, memory: &mut Option<ArenaBox>, bytes: usize) -> io::Result<()> {
    if memory.as_ref().is_none_or(|memory| memory.bytes().len() < bytes) {
        *memory = Some(arena.allocate(bytes)?);
    }
    Ok(())
}

/// The memory for which room was made.
fn reserved(memory: &mut Option<ArenaBox>) -> &mut [u8] {
    memory.as_mut().map(ArenaBox::bytes_mut).unwrap_or_default()
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
    fn sizes(tokens: usize, passes: usize, rows: usize) -> [usize; 4] {
        let tables = PASS_TABLES * ENTRIES * tokens;
        let inputs = passes * PASS_INPUTS;
        [2 * tables, 2 * inputs * tokens, 2 * rows * tokens, 4 * rows * tokens]
    }

    /// The parts, for which room was made.
    fn buffers(&mut self, tokens: usize, passes: usize, rows: usize) -> Buffers<'_> {
        let sizes = Self::sizes(tokens, passes, rows);
        let (tables, rest) = reserved(&mut self.0).split_at_mut(sizes[0]);
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

/// One product, cut into waves of panels.
struct Job<'a> {
    weights: &'a TernaryMatrix,
    input: &'a QuantizedRows,
    output: SharedMut<f32>,
    /// Tokens that are looked up.
    tokens: usize,
    /// Panels of a wave. The last one may have fewer.
    wave_panels: usize,
    /// Where the job's indices begin in the scratch memory.
    first_index: usize,
}

/// A wave's part of a job.
struct Wave<'a> {
    job: &'a Job<'a>,
    first_panel: usize,
    panels: usize,
    /// Blocks of panels, a task for each of them and each tile of tokens.
    blocks: usize,
    first_task: usize,
    first_index_task: usize,
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
    let wanted_blocks = (2 * pool.threads()).div_ceil(tiles);
    let (mut waves, mut bytes, mut index_count) = (0, 0, 0);
    let mut jobs = [const { None }; MAX_PRODUCTS];
    for (job, product) in jobs.iter_mut().zip(products) {
        let (panels, passes) = (product.weights.panels(), passes(product.weights));
        let most = WAVE_BYTES / (passes * size_of::<PassIndices>());
        let wave_panels = panels.div_ceil(panels.div_ceil(most.clamp(1, WAVE_PANELS)));
        let rows = wave_panels * PANEL_ROWS;
        bytes = bytes.max(ThreadScratch::sizes(tile_tokens, passes, rows).iter().sum());
        waves = waves.max(panels.div_ceil(wave_panels));
        *job = Some(Job {
            weights: product.weights,
            input: product.input,
            output: SharedMut::new(product.output),
            tokens,
            wave_panels,
            first_index: index_count,
        });
        index_count += passes * wave_panels;
    }
    let LookupScratch { arena, indices, threads } = scratch;
    for thread in threads.iter_mut() {
        let thread = thread.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        reserve(arena, &mut thread.0, bytes)?;
    }
    reserve(arena, indices, index_count * size_of::<PassIndices>())?;
    let indices: &mut [PassIndices] = bytemuck::cast_slice_mut(reserved(indices));
    for wave in 0..waves {
        let (mut tasks, mut index_tasks) = (0, 0);
        let mut parts = [const { None }; MAX_PRODUCTS];
        for (part, job) in parts.iter_mut().zip(jobs.iter().flatten()) {
            let first_panel = (wave * job.wave_panels).min(job.weights.panels());
            let panels = job.wave_panels.min(job.weights.panels() - first_panel);
            let blocks = wanted_blocks.min(panels.div_ceil(MIN_TASK_PANELS));
            let (first_task, first_index_task) = (tasks, index_tasks);
            *part = Some(Wave { job, first_panel, panels, blocks, first_task, first_index_task });
            tasks += tiles * blocks;
            index_tasks += panels.div_ceil(INDEX_TASK_PANELS);
        }
        let parts = || parts.iter().flatten();
        let shared = SharedMut::new(indices);
        pool.run(index_tasks, &|_, task| {
            if let Some(wave) = parts().rfind(|part| part.first_index_task <= task) {
                let first = (task - wave.first_index_task) * INDEX_TASK_PANELS;
                run_on(backend, IndexTask { wave, first, indices: &shared });
            }
        });
        pool.run(tasks, &|thread, task| {
            let mut scratch =
                threads[thread].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if let Some(wave) = parts().rfind(|part| part.first_task <= task) {
                let task = task - wave.first_task;
                run_on(backend, LookupTask { wave, task, indices, scratch: &mut scratch });
            }
        });
    }
    Ok(())
}

/// Passes over the inputs of a matrix.
fn passes(weights: &TernaryMatrix) -> usize {
    weights.words().div_ceil(PASS_WORDS)
}

/// Lays out the indices of some panels, `[pass][panel of the wave][row]`.
struct IndexTask<'a> {
    wave: &'a Wave<'a>,
    /// In the wave.
    first: usize,
    indices: &'a SharedMut<PassIndices>,
}

impl Work for IndexTask<'_> {
    #[inline(always)]
    unsafe fn run<K: Kernels>(self) {
        let Wave { job, first_panel, panels, .. } = *self.wave;
        let count = INDEX_TASK_PANELS.min(panels - self.first);
        for pass in 0..passes(job.weights) {
            let at = job.first_index + pass * panels + self.first;
            // SAFETY: tasks have disjoint panels, and the indices stay borrowed until all are done.
            let indices = unsafe { self.indices.slice(at, count) };
            for (panel, indices) in indices.iter_mut().enumerate() {
                let units = job.weights.panel(first_panel + self.first + panel);
                let (layout, words) = (job.weights.layout(), job.weights.words());
                // SAFETY: the caller's promise about features.
                *indices =
                    unsafe { K::Lanes::pass_indices(layout, units, words, pass * PASS_WORDS) };
            }
        }
    }
}

struct LookupTask<'a> {
    wave: &'a Wave<'a>,
    task: usize,
    indices: &'a [PassIndices],
    scratch: &'a mut ThreadScratch,
}

impl Work for LookupTask<'_> {
    #[inline(always)]
    unsafe fn run<K: Kernels>(self) {
        // SAFETY: the caller's promise about features.
        unsafe { self.wave.run::<K::Lanes>(self.task, self.indices, self.scratch) }
    }
}

impl Wave<'_> {
    /// # Safety
    /// As for [`Lanes`]; and the wave's indices were laid out.
    #[inline(always)]
    unsafe fn run<V: Lanes>(
        &self,
        task: usize,
        indices: &[PassIndices],
        scratch: &mut ThreadScratch,
    ) {
        let job = self.job;
        let first_token = task / self.blocks * V::TOKENS;
        let tokens = V::TOKENS.min(job.tokens - first_token);
        let per_block = self.panels.div_ceil(self.blocks);
        let first_panel = (task % self.blocks * per_block).min(self.panels);
        let panels = per_block.min(self.panels - first_panel);
        if panels == 0 {
            return; // Blocks are cut equal, so the last ones may be empty.
        }
        let rows = panels * PANEL_ROWS;
        let passes = passes(job.weights);
        let buffers = scratch.buffers(V::TOKENS, passes, rows);
        // SAFETY: the caller's promise about features.
        unsafe {
            V::transpose_inputs(job.input, first_token..first_token + tokens, buffers.inputs);
        }

        for pass in 0..passes {
            let inputs =
                &buffers.inputs[pass * PASS_INPUTS * V::TOKENS..][..PASS_INPUTS * V::TOKENS];
            // SAFETY: the caller's promise about features.
            unsafe { build_tables::<V>(inputs, buffers.tables) };
            let indices = &indices[job.first_index + pass * self.panels + first_panel..][..panels];
            let first = pass % PASSES_IN_16_BITS == 0;
            let last = pass % PASSES_IN_16_BITS == PASSES_IN_16_BITS - 1 || pass + 1 == passes;
            let initial = pass < PASSES_IN_16_BITS;
            // Called directly, not through a pointer: only an inlined body gets the tier's features.
            macro_rules! sweep {
                ($first:literal, $last:literal, $initial:literal) => {
                    // SAFETY: the caller's promises about features and indices.
                    unsafe {
                        sweep_rows::<V, $first, $last, $initial>(
                            indices.as_flattened(),
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
        unsafe {
            job.write_outputs::<V>(self.first_panel + first_panel, first_token, tokens, sums);
        }
    }
}

impl Job<'_> {
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
/// As for [`Lanes`]; and all indices are below [`ENTRIES`].
#[inline(always)]
unsafe fn sweep_rows<V: Lanes, const FIRST: bool, const LAST: bool, const INITIAL: bool>(
    indices: &[u64],
    tables: &[i16],
    short_sums: &mut [i16],
    sums: &mut [i32],
) {
    assert!(tables.len() == PASS_TABLES * ENTRIES * V::TOKENS);
    assert!(short_sums.len() >= indices.len() * V::TOKENS);
    assert!(sums.len() >= indices.len() * V::TOKENS);
    for (row, &indices) in indices.iter().enumerate() {
        let lane = row * V::TOKENS;
        // SAFETY: `lane` has `TOKENS` sums behind it by the assertions above. Indices are in bounds by the
        // caller's promise, so every look-up stays inside its table; features likewise.
        unsafe {
            let mut sum = if FIRST { V::zero() } else { V::load(short_sums.as_ptr().add(lane)) };
            for byte in 0..PASS_TABLES {
                let table = tables.as_ptr().add(byte * ENTRIES * V::TOKENS);
                sum = sum.add(V::load(table.byte_add(entry_offset::<V>(indices, byte))));
            }
            if LAST {
                sum.add_to::<INITIAL>(sums.as_mut_ptr().add(lane));
            } else {
                sum.store(short_sums.as_mut_ptr().add(lane));
            }
        }
    }
}

/// Bytes before the entry that a byte of `indices` selects: one shift and one mask.
#[inline(always)]
fn entry_offset<V: Lanes>(indices: u64, byte: usize) -> usize {
    let shift = (size_of::<i16>() * V::TOKENS).trailing_zeros();
    let at = 8 * byte as u32;
    let moved = if at < shift { indices << (shift - at) } else { indices >> (at - shift) };
    moved as usize & (0xff << shift)
}

#[cfg(target_endian = "big")]
compile_error!("code words are read as little-endian bytes");
