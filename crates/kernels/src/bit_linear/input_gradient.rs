//! Products of gradients in f32 with trits, by table look-up.
//!
//! ```text
//! out[m, k] = γ · Σ_n dy[m, n] · t[n, k]
//! ```
//!
//! As in [`ternary_gemm`](crate::ternary_gemm): of four neighbouring n there are only 81 sums `±dy`; they are
//! tabulated for a tile of 16 tokens, and a code of four trits selects one. A load and an addition do 64
//! products, where a fused multiply-add does 16.
//!
//! ```text
//! for each pass of 32 outputs n:
//!   build eight tables                     81 additions each
//!   for each input k:  sums[k] += table_0[code_0] + … + table_7[code_7]
//! ```
//!
//! Written over fixed arrays, so that every tier adds in the same order.

use std::sync::Mutex;

use crate::pool::Pool;
use crate::tier::{Backend, compiled_for_each_tier};

/// Tokens of a tile: one 512-bit register of sums.
const TOKENS: usize = 16;
/// Sums that four trits select from.
const ENTRIES: usize = 81;
/// Tables of a pass.
const TABLES: usize = 8;
/// Outputs n of a pass.
const PASS: usize = 4 * TABLES;

/// A value for each token of a tile.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Lanes([f32; TOKENS]);

impl Lanes {
    const ZERO: Self = Self([0.0; TOKENS]);

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }
}

/// The codes of a pass for one input k: where in its table each selects, in units of eight bytes.
type Offsets = [u16; TABLES];

/// Units of eight bytes in an entry.
const ENTRY_UNITS: u16 = (size_of::<Lanes>() / 8) as u16;

/// Working memory.
#[derive(Debug)]
pub(super) struct InputGradientScratch {
    /// `[pass][k]`
    offsets: Vec<Offsets>,
    threads: Vec<Mutex<TileScratch>>,
}

#[derive(Debug, Default)]
struct TileScratch {
    /// `[table][entry]`
    tables: Vec<Lanes>,
    /// `[k]`
    sums: Vec<Lanes>,
}

impl InputGradientScratch {
    pub(super) fn new(threads: usize) -> Self {
        Self { offsets: Vec::new(), threads: (0..threads).map(|_| Mutex::default()).collect() }
    }

    pub(super) fn reserve(&mut self, outputs: usize, inputs: usize) {
        let len = outputs.div_ceil(PASS) * inputs;
        if self.offsets.len() < len {
            self.offsets.resize(len, [0; TABLES]);
        }
    }
}

/// Sets `out` [M, K], given `dy` [M, N] and the weights [N, K] in full precision with their scale γ.
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply(
    backend: Backend,
    pool: &Pool,
    scratch: &mut InputGradientScratch,
    dy: &[f32],
    weight: &[f32],
    scale: f32,
    inputs: usize,
    out: &mut [f32],
) {
    let outputs = weight.len() / inputs;
    assert!(weight.len() == outputs * inputs && out.len().is_multiple_of(inputs));
    assert!(dy.len() == out.len() / inputs * outputs);
    assert!(scratch.threads.len() >= pool.threads(), "scratch is for fewer threads");
    scratch.reserve(outputs, inputs);
    let offsets = &mut scratch.offsets[..outputs.div_ceil(PASS) * inputs];
    pool.for_each_chunk(offsets, inputs, &|_, pass, offsets| {
        encode_pass(backend, weight, 1.0 / scale, pass, offsets);
    });
    let (offsets, threads) = (&*offsets, &scratch.threads);
    pool.for_each_chunk(out, TOKENS * inputs, &|thread, tile, out| {
        let tokens = out.len() / inputs;
        let dy = &dy[tile * TOKENS * outputs..][..tokens * outputs];
        let mut memory = threads[thread].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let TileScratch { tables, sums } = &mut *memory;
        tables.resize(TABLES * ENTRIES, Lanes::ZERO);
        sums.clear();
        sums.resize(inputs, Lanes::ZERO);
        multiply_tile(backend, dy, outputs, offsets, tables, sums);
        for (token, out) in out.chunks_exact_mut(inputs).enumerate() {
            for (out, sum) in out.iter_mut().zip(&*sums) {
                *out = sum.0[token] * scale;
            }
        }
    });
}

compiled_for_each_tier! {
    /// The codes of weights' rows 32 · pass and following; rows beyond the last are zero trits.
    fn encode_pass(weight: &[f32], inverse: f32, pass: usize, offsets: &mut [Offsets])
        = encode_pass_body
}

#[inline(always)]
fn encode_pass_body(weight: &[f32], inverse: f32, pass: usize, offsets: &mut [Offsets]) {
    let inputs = offsets.len();
    // Every field is 1, the zero trit: 1 + 3 + 9 + 27.
    offsets.fill([40 * ENTRY_UNITS; TABLES]);
    let rows = weight[pass * PASS * inputs..].chunks_exact(inputs).take(PASS);
    for (row, weights) in rows.enumerate() {
        let digit = [1, 3, 9, 27][row % 4] * ENTRY_UNITS;
        for (offsets, &w) in offsets.iter_mut().zip(weights) {
            let scaled = w * inverse;
            let trit = u16::from(scaled > 0.5).wrapping_sub(u16::from(scaled < -0.5));
            let offset = &mut offsets[row / 4];
            *offset = offset.wrapping_add(digit.wrapping_mul(trit));
        }
    }
}

compiled_for_each_tier! {
    /// Adds the products of a tile to `sums`. `dy` has at most 16 rows of N.
    fn multiply_tile(
        dy: &[f32],
        outputs: usize,
        offsets: &[Offsets],
        tables: &mut [Lanes],
        sums: &mut [Lanes],
    ) = multiply_tile_body
}

#[inline(always)]
fn multiply_tile_body(
    dy: &[f32],
    outputs: usize,
    offsets: &[Offsets],
    tables: &mut [Lanes],
    sums: &mut [Lanes],
) {
    assert!(tables.len() == TABLES * ENTRIES && dy.len() <= TOKENS * outputs);
    for (pass, offsets) in offsets.chunks_exact(sums.len()).enumerate() {
        let first = pass * PASS;
        let count = PASS.min(outputs - first);
        let mut inputs = [Lanes::ZERO; PASS];
        for (token, dy) in dy.chunks_exact(outputs).enumerate() {
            for (lanes, &dy) in inputs.iter_mut().zip(&dy[first..first + count]) {
                lanes.0[token] = dy;
            }
        }
        for (table, inputs) in tables.chunks_exact_mut(ENTRIES).zip(inputs.as_chunks::<4>().0) {
            let low = nine_sums(inputs[0], inputs[1]);
            let high = nine_sums(inputs[2], inputs[3]);
            for (entries, &high) in table.chunks_exact_mut(9).zip(&high) {
                for (entry, &low) in entries.iter_mut().zip(&low) {
                    *entry = low.add(high);
                }
            }
        }
        let tables = tables.as_ptr().cast::<u64>();
        for (sum, offsets) in sums.iter_mut().zip(offsets) {
            let mut total = *sum;
            for (table, &offset) in offsets.iter().enumerate() {
                let from = table * ENTRIES * usize::from(ENTRY_UNITS) + usize::from(offset);
                // SAFETY: `encode_pass_body` makes of four trits an entry below 81 (40 plus at most
                // 1 + 3 + 9 + 27 either way), in units of eight bytes, so the read stays inside its table; the
                // assertion above says that all eight are there. Every entry is aligned.
                total = total.add(unsafe { *tables.add(from).cast::<Lanes>() });
            }
            *sum = total;
        }
    }
}

/// `(c_0 − 1)·a + (c_1 − 1)·b` at index `c_0 + 3·c_1`.
#[inline(always)]
fn nine_sums(a: Lanes, b: Lanes) -> [Lanes; 9] {
    let zero = Lanes::ZERO;
    let (minus_a, minus_b) = (zero.sub(a), zero.sub(b));
    [minus_a.sub(b), minus_b, a.sub(b), minus_a, zero, a, b.sub(a), b, a.add(b)]
}
