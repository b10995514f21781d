//! Products of ternary weights with 8-bit activations: the GEMV of decoding and the GEMM of prefill.
//!
//! ```text
//! y[m, n] = (Σ_k q[m, k] · t[n, k]) · γ / s[m]
//! ```
//!
//! with activations `q` [M, K] i8 and their scales `s` `[M]` (divide), trits `t` [N, K] and their scale γ
//! (multiplies). The sum is an exact i32 on every tier; then one conversion and one product in f32.
//!
//! * Few tokens: **dot products** stream the packed weights once and meet each code word with the
//!   activations of every token. Codes are `t + 1`, so the dot product is `Σ q·(t+1) − Σ q`.
//! * Many tokens: **table look-ups** (the method of four Russians). For four inputs there are only
//!   81 possible sums of `±q`; they are tabulated for a tile of tokens and each weight byte then
//!   selects one: four products of every token in the tile for one load and one addition.
//! * With AMX, **tiles** from a few tokens on: a processor's unit for products of small matrices.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod cuda;
mod lookup;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plan;
mod scalar;

use crate::activations::QuantizedRows;
use crate::pool::{Pool, SharedMut};
use crate::ternary::base3::{GROUP_UNITS, GROUP_WORDS};
use crate::ternary::{Layout, PANEL_ROWS, PanelVector, TernaryMatrix, WORD_TRITS};
use crate::tier::{Backend, Tier};

pub use lookup::LookupScratch;

/// Tokens that one pass over a panel's code words serves in the dot-product path.
const DOT_TOKENS: usize = 4;
/// Weights that one task of the dot-product path passes over, at least: short enough that threads finish
/// together.
const DOT_TASK_BYTES: usize = 32 << 10;
/// Below this many bytes of weights a second thread costs more than it brings.
const SHARED_MIN_BYTES: usize = 160 << 10;

/// Products that one call computes, at most.
pub const MAX_PRODUCTS: usize = 4;

/// One product `output = input · weightsᵀ`, dequantised.
pub struct Product<'a> {
    /// Trits and γ, [N, K].
    pub weights: &'a TernaryMatrix,
    /// Activations, [M, K].
    pub input: &'a QuantizedRows,
    /// Result, [M, N], row-major.
    pub output: &'a mut [f32],
}

/// The kernels of a tier.
///
/// # Safety
/// Every method demands that the calling function is compiled with, and runs on a processor with, the
/// features of the tier; [`run_on`] sees to it.
trait Kernels {
    /// Registers of the look-up path.
    type Lanes: lookup::Lanes;
    /// Fewer outputs than this do not repay building tables (measured).
    const LOOKUP_MIN_ROWS: usize;
    /// Look-ups cost as much for a few tokens as for a whole tile: tokens beyond the last whole one are
    /// looked up only if there are at least this many (measured).
    const LOOKUP_MIN_TOKENS: usize;

    /// Dot products of the sixteen rows of a panel with `M` tokens' activations:
    /// `Σ_k q[k] · (t[row, k] + 1)`. Every input has at least 16 activations a word.
    unsafe fn word_dots<const M: usize>(
        words: &[PanelVector],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M];

    /// The same from the units of a panel in base 3, which hold `words` words. Tiers to which this layout
    /// does not come naturally unpack a group at a time.
    #[inline(always)]
    unsafe fn base3_dots<const M: usize>(
        units: &[PanelVector],
        words: usize,
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        let mut sums = [[0; PANEL_ROWS]; M];
        for (group, units) in units.chunks(GROUP_UNITS).enumerate() {
            let first = group * GROUP_WORDS;
            let count = GROUP_WORDS.min(words - first);
            let unpacked: [PanelVector; GROUP_WORDS] = std::array::from_fn(|word| {
                if word < count { Layout::Base3.word(units, word) } else { [0; PANEL_ROWS] }
            });
            let inputs = inputs.map(|input| &input[first * WORD_TRITS..]);
            // SAFETY: the caller's promise about features.
            let group_sums = unsafe { Self::word_dots::<M>(&unpacked[..count], inputs) };
            for (sum, group_sum) in
                sums.as_flattened_mut().iter_mut().zip(group_sums.as_flattened())
            {
                *sum += group_sum;
            }
        }
        sums
    }
}

/// Something to do with the kernels of any tier.
trait Work {
    /// Must be `#[inline(always)]`, so that it is compiled with the tier's features.
    ///
    /// # Safety
    /// As for [`Kernels`].
    unsafe fn run<K: Kernels>(self);
}

/// Does the work with the kernels of a tier.
fn run_on(backend: Backend, work: impl Work) {
    match backend.tier() {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => {
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn run(work: impl Work) {
                // SAFETY: this function is compiled with the tier's features.
                unsafe { work.run::<avx512::Avx512>() }
            }
            // SAFETY: a `Backend` of this tier exists only where its features were detected.
            unsafe { run(work) }
        }
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512Vbmi | Tier::Amx => {
            #[target_feature(
                enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"
            )]
            fn run<const FETCH_AHEAD: usize>(work: impl Work) {
                // SAFETY: this function is compiled with the tier's features.
                unsafe { work.run::<avx512::Avx512Vbmi<FETCH_AHEAD>>() }
            }
            // SAFETY: a `Backend` of this tier exists only where its features were detected.
            unsafe {
                match backend.tier() {
                    Tier::Amx => run::<{ avx512::INTEL_FETCH_AHEAD }>(work),
                    _ => run::<0>(work),
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 => {
            #[target_feature(enable = "avx2")]
            fn run(work: impl Work) {
                // SAFETY: this function is compiled with the tier's features.
                unsafe { work.run::<avx2::Avx2>() }
            }
            // SAFETY: a `Backend` of this tier exists only where its features were detected.
            unsafe { run(work) }
        }
        #[cfg(target_arch = "aarch64")]
        Tier::Neon => {
            #[target_feature(enable = "neon,dotprod")]
            fn run(work: impl Work) {
                // SAFETY: this function is compiled with the tier's features.
                unsafe { work.run::<neon::Neon>() }
            }
            // SAFETY: a `Backend` of this tier exists only where its features were detected.
            unsafe { run(work) }
        }
        // SAFETY: the scalar kernels need no features.
        _ => unsafe { work.run::<scalar::Scalar>() },
    }
}

/// Computes several products in one parallel section.
///
/// # Panics
/// If there are more than [`MAX_PRODUCTS`], or if shapes do not fit together: mistakes in the calling
/// code.
pub fn multiply(
    backend: Backend,
    pool: &Pool,
    scratch: &mut LookupScratch,
    products: &mut [Product<'_>],
) {
    assert!(products.len() <= MAX_PRODUCTS, "{} products in one call", products.len());
    for product in products.iter() {
        let (m, k) = (product.input.rows(), product.input.cols());
        let (n, weights_k) = (product.weights.rows(), product.weights.cols());
        assert!(k == weights_k, "activations have {k} columns, weights {weights_k}");
        assert!(product.output.len() == m * n, "output of {} for {m} x {n}", product.output.len());
    }
    let tokens = products.first().map_or(0, |product| product.input.rows());
    assert!(products.iter().all(|product| product.input.rows() == tokens), "token counts differ");
    #[cfg(target_arch = "x86_64")]
    if backend.tier() == Tier::Amx
        && tokens >= amx::MIN_TOKENS
        && amx::multiply(pool, scratch, products).is_ok()
    {
        return;
    }
    let rows = products.iter().map(|product| product.weights.rows()).min().unwrap_or(0);
    let tile = lookup::Tile::of(backend);
    let rest = tokens % tile.tokens;
    let mut looked_up = if rows < tile.min_rows {
        0
    } else if rest >= tile.min_tokens {
        tokens
    } else {
        tokens - rest
    };
    if looked_up > 0 && lookup::multiply(backend, pool, scratch, products, looked_up).is_err() {
        // No memory for tables: dot products need none.
        looked_up = 0;
    }
    if looked_up < tokens {
        multiply_by_dots(backend, pool, products, looked_up);
    }
}

/// The dot-product path, for all tokens from `first_token` on.
fn multiply_by_dots(
    backend: Backend,
    pool: &Pool,
    products: &mut [Product<'_>],
    first_token: usize,
) {
    // An array, since decoding must not allocate.
    let mut jobs = [const { None }; MAX_PRODUCTS];
    let (mut tasks, mut bytes) = (0, 0);
    for (job, product) in jobs.iter_mut().zip(products) {
        let passes = (product.input.rows() - first_token).div_ceil(DOT_TOKENS);
        let panel_bytes = product.weights.units() * size_of::<PanelVector>();
        let panels = DOT_TASK_BYTES.div_ceil(panel_bytes * passes);
        bytes += product.weights.packed_bytes() * passes;
        *job = Some(DotJob {
            weights: product.weights,
            input: product.input,
            output: SharedMut::new(product.output),
            first_token,
            first_task: tasks,
            panels,
        });
        tasks += product.weights.panels().div_ceil(panels);
    }
    let run = |_, task| {
        if let Some(job) = jobs.iter().flatten().rfind(|job| job.first_task <= task) {
            run_on(backend, DotTask { job, task: task - job.first_task });
        }
    };
    if bytes < SHARED_MIN_BYTES {
        (0..tasks).for_each(|task| run(0, task));
    } else {
        pool.run(tasks, &run);
    }
}

struct DotJob<'a> {
    weights: &'a TernaryMatrix,
    input: &'a QuantizedRows,
    output: SharedMut<f32>,
    first_token: usize,
    first_task: usize,
    /// Panels of one task.
    panels: usize,
}

struct DotTask<'a> {
    job: &'a DotJob<'a>,
    task: usize,
}

impl Work for DotTask<'_> {
    #[inline(always)]
    unsafe fn run<K: Kernels>(self) {
        let job = self.job;
        let first = self.task * job.panels;
        let last = (first + job.panels).min(job.weights.panels());
        for panel in first..last {
            let units = job.weights.panel(panel);
            let mut token = job.first_token;
            while token < job.input.rows() {
                // SAFETY: the caller's promise about features.
                token += unsafe {
                    match job.input.rows() - token {
                        1 => job.dot::<K, 1>(panel, units, token),
                        2 => job.dot::<K, 2>(panel, units, token),
                        3 => job.dot::<K, 3>(panel, units, token),
                        _ => job.dot::<K, DOT_TOKENS>(panel, units, token),
                    }
                };
            }
        }
    }
}

impl DotJob<'_> {
    /// Writes the outputs of a panel for `M` tokens; returns `M`.
    ///
    /// # Safety
    /// As for [`Kernels`].
    #[inline(always)]
    unsafe fn dot<K: Kernels, const M: usize>(
        &self,
        panel: usize,
        units: &[PanelVector],
        token: usize,
    ) -> usize {
        let inputs = std::array::from_fn(|i| self.input.padded_row(token + i));
        // SAFETY: the caller's promise about features.
        let sums = unsafe {
            match self.weights.layout() {
                Layout::TwoBit => K::word_dots::<M>(units, inputs),
                Layout::Base3 => K::base3_dots::<M>(units, self.weights.words(), inputs),
            }
        };
        let row = panel * PANEL_ROWS;
        let rows = self.weights.rows();
        let count = PANEL_ROWS.min(rows - row);
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: tasks have disjoint panels, so these outputs are written by this task alone,
            // and `multiply` holds the output borrowed until all tasks are done.
            let output = unsafe { self.output.slice((token + i) * rows + row, count) };
            let offset = self.input.sum(token + i);
            let factor = self.weights.scale() / self.input.scale(token + i);
            for (y, &sum) in output.iter_mut().zip(sums) {
                *y = (sum - offset) as f32 * factor;
            }
        }
        M
    }
}
