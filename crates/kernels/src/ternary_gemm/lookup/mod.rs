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
//! The look-ups use no multiplier. On a core whose 512-bit load and byte-dot-product instructions both
//! start once a cycle they do 128 products a load where the dot product does 64. With AVX-512 the
//! multipliers get a part of the rows meanwhile (see `dots`).

// Only AVX-512 weaves dot products in so far.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
mod dots;
mod lanes;

use std::io;
use std::sync::Mutex;

use super::{Kernels, MAX_PRODUCTS, Product, Work, run_on};
use crate::activations::QuantizedRows;
use crate::memory::{ArenaBox, WeightArena};
use crate::pool::{Pool, SharedMut};
use crate::ternary::{PANEL_ROWS, TernaryMatrix, WORD_TRITS};
use crate::tier::Backend;

#[cfg_attr(not(target_arch = "x86_64"), expect(unused_imports))]
pub(super) use dots::{DOT_PANELS, DOT_TOKENS, DotSums, DotUnit, Dots, PASS_STEPS};
use lanes::PASS_WORDS;
pub(super) use lanes::{Lanes, PassIndices, PlainLanes, Sweep};

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

/// Working memory of the products of many tokens. Grows when a larger matrix comes.
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

    /// Makes room for some bytes in the memory of every thread.
    ///
    /// # Errors
    /// The system's refusal.
    pub(super) fn reserve_threads(&mut self, bytes: usize) -> io::Result<()> {
        for thread in &mut self.threads {
            let thread = thread.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
            reserve(&self.arena, &mut thread.0, bytes)?;
        }
        Ok(())
    }

    /// Hands a thread's memory to what this thread does.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn with_thread(&self, thread: usize, work: impl FnOnce(&mut [u8])) {
        let mut thread =
            self.threads[thread].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        work(reserved(&mut thread.0));
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
    /// Activations of the tile for dot products, `[input / 4][token]`, four bytes each.
    fours: &'a mut [i32],
}

impl ThreadScratch {
    /// Bytes of the parts of [`Buffers`]. Each is a multiple of the 64 or 32 bytes of a row of lanes,
    /// so all parts stay aligned.
    fn sizes(tokens: usize, passes: usize, rows: usize) -> [usize; 5] {
        let tables = PASS_TABLES * ENTRIES * tokens;
        let inputs = passes * PASS_INPUTS;
        [2 * tables, 2 * inputs * tokens, 2 * rows * tokens, 4 * rows * tokens, inputs * tokens]
    }

    /// The parts, for which room was made.
    fn buffers(&mut self, tokens: usize, passes: usize, rows: usize) -> Buffers<'_> {
        let sizes = Self::sizes(tokens, passes, rows);
        let (tables, rest) = reserved(&mut self.0).split_at_mut(sizes[0]);
        let (inputs, rest) = rest.split_at_mut(sizes[1]);
        let (short_sums, rest) = rest.split_at_mut(sizes[2]);
        let (sums, rest) = rest.split_at_mut(sizes[3]);
        Buffers {
            tables: bytemuck::cast_slice_mut(tables),
            inputs: bytemuck::cast_slice_mut(inputs),
            short_sums: bytemuck::cast_slice_mut(short_sums),
            sums: bytemuck::cast_slice_mut(sums),
            fours: bytemuck::cast_slice_mut(&mut rest[..sizes[4]]),
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
    scratch.reserve_threads(bytes)?;
    let LookupScratch { arena, indices, threads } = scratch;
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

/// Lays out the indices of some panels, `[pass][panel of the wave][row]`; in their places, the words of
/// panels that are not looked up.
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
            for (panel, indices) in (self.first..).zip(indices) {
                let units = job.weights.panel(first_panel + panel);
                let (layout, words) = (job.weights.layout(), job.weights.words());
                let first = pass * PASS_WORDS;
                // SAFETY: the caller's promise about features.
                *indices = unsafe {
                    if self.wave.is_looked_up::<K::Lanes>(panel) {
                        K::Lanes::pass_indices(layout, units, words, first)
                    } else {
                        K::Lanes::pass_words(layout, units, words, first)
                    }
                };
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
    /// Panels of a block.
    fn block_panels(&self) -> usize {
        self.panels.div_ceil(self.blocks)
    }

    /// Whether a panel of the wave is looked up: the first ones of each block are.
    fn is_looked_up<V: Lanes>(&self, panel: usize) -> bool {
        let per_block = self.block_panels();
        let first = panel / per_block * per_block;
        panel - first < looked_up_panels::<V>(per_block.min(self.panels - first))
    }

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
        let per_block = self.block_panels();
        let first_panel = (task % self.blocks * per_block).min(self.panels);
        let panels = per_block.min(self.panels - first_panel);
        if panels == 0 {
            return; // Blocks are cut equal, so the last ones may be empty.
        }
        let looked_up = looked_up_panels::<V>(panels);
        let rows = looked_up * PANEL_ROWS;
        let passes = passes(job.weights);
        let buffers = scratch.buffers(V::TOKENS, passes, rows);
        let all_tokens = first_token..first_token + tokens;
        // SAFETY: the caller's promise about features.
        unsafe {
            V::transpose_inputs(job.input, all_tokens.clone(), buffers.inputs, buffers.fours);
        }
        let part = &indices[job.first_index..][..passes * self.panels];
        let mut dots = Dots::new(
            job,
            all_tokens,
            self.first_panel,
            first_panel + looked_up..first_panel + panels,
            part,
            self.panels,
            buffers.fours,
        );
        for (pass, indices) in part.chunks_exact(self.panels).enumerate() {
            let inputs =
                &buffers.inputs[pass * PASS_INPUTS * V::TOKENS..][..PASS_INPUTS * V::TOKENS];
            // SAFETY: the caller's promise about features.
            unsafe { build_tables::<V>(inputs, buffers.tables) };
            let sweep = Sweep::<V>::new(
                indices[first_panel..][..looked_up].as_flattened(),
                buffers.tables,
                buffers.short_sums,
                buffers.sums,
            );
            let first = pass % PASSES_IN_16_BITS == 0;
            let last = pass % PASSES_IN_16_BITS == PASSES_IN_16_BITS - 1 || pass + 1 == passes;
            let initial = pass < PASSES_IN_16_BITS;
            // SAFETY: the caller's promises about features and indices.
            unsafe {
                match (first, last, initial) {
                    (true, true, true) => V::sweep::<true, true, true>(sweep, &mut dots),
                    (true, true, false) => V::sweep::<true, true, false>(sweep, &mut dots),
                    (true, false, _) => V::sweep::<true, false, false>(sweep, &mut dots),
                    (false, true, true) => V::sweep::<false, true, true>(sweep, &mut dots),
                    (false, true, false) => V::sweep::<false, true, false>(sweep, &mut dots),
                    (false, false, _) => V::sweep::<false, false, false>(sweep, &mut dots),
                }
            }
        }
        let sums = &buffers.sums[..rows * V::TOKENS];
        // SAFETY: the caller's promise about features.
        unsafe {
            V::finish_dots(&mut dots);
            job.write_outputs::<V>(self.first_panel + first_panel, first_token, tokens, sums);
        }
    }
}

/// Of the panels of a block, those that are looked up.
fn looked_up_panels<V: Lanes>(panels: usize) -> usize {
    panels - panels * V::DOTS_OF_64 / 64 / DOT_PANELS * DOT_PANELS
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

#[cfg(target_endian = "big")]
compile_error!("code words are read as little-endian bytes");
