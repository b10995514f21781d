//! What happens to all parameters once a step: sums, AdamW, the weights that products take.

use super::{OPTIMIZER, THREADS, Training, View, ViewMut, require};
use crate::adamw::{AdamW, Factors};
use crate::cuda::{CudaError, Launch};

/// Blocks of the sums for scales of weights.
pub(super) const WEIGHT_BLOCKS: usize = 1024;

#[repr(C)]
struct AdamWArgs {
    p: u64,
    g: u64,
    m: u64,
    v: u64,
    len: u64,
    factors: Factors,
}

#[repr(C)]
struct SquaresArgs {
    x: u64,
    sums: u64,
    len: u64,
    unit: u32,
}

#[repr(C)]
pub(super) struct AddArgs {
    pub from: u64,
    pub into: u64,
    pub len: u64,
}

#[repr(C)]
struct WeightArgs {
    weights: u64,
    partials: u64,
    gamma: u64,
    out: u64,
    bytes: u64,
    len: u64,
    blocks: u32,
}

impl Training {
    /// A step of the optimiser.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn adamw(
        &mut self,
        step: &AdamW,
        parameters: ViewMut<'_, f32>,
        gradients: View<'_, f32>,
        first_moment: ViewMut<'_, f32>,
        second_moment: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let len = parameters.len;
        let all = [gradients.len, first_moment.len, second_moment.len];
        require(all == [len; 3], "gradients or moments")?;
        let args = AdamWArgs {
            p: parameters.address(),
            g: gradients.address(),
            m: first_moment.address(),
            v: second_moment.address(),
            len: len as u64,
            factors: step.factors(),
        };
        self.mark("optimiser")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "adamw_step", elementwise(len), &args) }
    }

    /// `Σ x²` of each `unit` elements.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn sums_of_squares(
        &mut self,
        x: View<'_, f32>,
        unit: usize,
        sums: ViewMut<'_, f64>,
    ) -> Result<(), CudaError> {
        let units = x.len.div_ceil(unit.max(1));
        require(sums.len >= units && unit > 0 && unit < 1 << 31, "sums")?;
        let args = SquaresArgs {
            x: x.address(),
            sums: sums.address(),
            len: x.len as u64,
            unit: unit as u32,
        };
        self.mark("optimiser")?;
        let launch = Launch::new([units, 1, 1], THREADS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "sums_of_squares", launch, &args) }
    }

    /// `into += from`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn add(&mut self, from: View<'_, f32>, into: ViewMut<'_, f32>) -> Result<(), CudaError> {
        require(from.len == into.len, "what is added")?;
        let args = AddArgs { from: from.address(), into: into.address(), len: into.len as u64 };
        self.mark("optimiser")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "add_elements", elementwise(into.len), &args) }
    }

    /// The trits of weights as bf16, once more as bytes, two in an element, and `gamma = max(mean |w|, 1e-5)`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn ternary_weights(
        &mut self,
        weights: View<'_, f32>,
        trits: ViewMut<'_, u16>,
        bytes: ViewMut<'_, u16>,
        gamma: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        require(trits.len == weights.len && gamma.len == 1, "trits")?;
        require(bytes.len == weights.len.div_ceil(2), "bytes")?;
        let mut args = self.weight_args(weights, &trits, gamma.address());
        args.bytes = bytes.address();
        self.mark("weights")?;
        let sums = Launch::new([WEIGHT_BLOCKS, 1, 1], THREADS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            self.launch(OPTIMIZER, "weight_sums", sums, &args)?;
            self.launch(OPTIMIZER, "weight_trits", elementwise(weights.len), &args)
        }
    }

    /// Weights as bf16.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn half_weights(
        &mut self,
        weights: View<'_, f32>,
        halves: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        require(halves.len == weights.len, "halves")?;
        let args = self.weight_args(weights, &halves, 0);
        self.mark("weights")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "weight_halves", elementwise(weights.len), &args) }
    }

    fn weight_args(
        &self,
        weights: View<'_, f32>,
        out: &ViewMut<'_, u16>,
        gamma: u64,
    ) -> WeightArgs {
        WeightArgs {
            weights: weights.address(),
            partials: self.weight_partials.address(0),
            gamma,
            out: out.address(),
            bytes: 0,
            len: weights.len as u64,
            blocks: WEIGHT_BLOCKS as u32,
        }
    }
}

/// Threads for `len` elements, four of them each.
pub(super) fn elementwise(len: usize) -> Launch {
    Launch::new([len.div_ceil(4 * THREADS).min(4096), 1, 1], THREADS, 0)
}
