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
    gradient_scale: u64,
    len: u64,
    factors: Factors,
}

#[repr(C)]
struct MoveArgs {
    from: u64,
    into: u64,
}

#[repr(C)]
struct ClipArgs {
    numbers: u64,
    losses: u64,
    squares: u64,
    max_norm: f64,
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

/// Elements of f32 that hold the bits of a number in f64.
const NUMBER: usize = size_of::<f64>() / size_of::<f32>();

/// How many f64 numbers a view of f32 holds the bits of.
pub(super) fn numbers(len: usize, address: u64) -> Result<usize, CudaError> {
    let whole = len.is_multiple_of(NUMBER) && address.is_multiple_of(size_of::<f64>() as u64);
    require(whole, "a view of f64 numbers")?;
    Ok(len / NUMBER)
}

impl Training {
    /// Moves a number to where two elements hold its bits, and leaves zero.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn move_number(
        &mut self,
        from: ViewMut<'_, f64>,
        into: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        require(from.len == 1 && numbers(into.len, into.address())? == 1, "a number")?;
        let args = MoveArgs { from: from.address(), into: into.address() };
        self.mark("loss")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "move_number", Launch::new([1, 1, 1], 1, 0), &args) }
    }

    /// [`clip`](crate::adamw::clip) of f64 numbers, two elements each.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn clip(
        &mut self,
        all: ViewMut<'_, f32>,
        losses: usize,
        max_norm: f64,
    ) -> Result<(), CudaError> {
        let count = numbers(all.len, all.address())?;
        require(count >= 2 + losses, "numbers")?;
        let args = ClipArgs {
            numbers: all.address(),
            losses: losses as u64,
            squares: (count - 2 - losses) as u64,
            max_norm,
        };
        self.mark("optimiser")?;
        let launch = Launch::new([1, 1, 1], THREADS, 0);
        // SAFETY: the view lies in a live buffer, and all numbers lie in it.
        unsafe { self.launch(OPTIMIZER, "clip_gradients", launch, &args) }
    }

    /// A step of the optimiser, with the factor of gradients that [`clip`](Self::clip) computed: nothing is changed if it is
    /// NaN.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn adamw(
        &mut self,
        step: &AdamW,
        gradient_scale: View<'_, f32>,
        parameters: ViewMut<'_, f32>,
        gradients: View<'_, f32>,
        first_moment: ViewMut<'_, f32>,
        second_moment: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let len = parameters.len;
        let all = [gradients.len, first_moment.len, second_moment.len];
        require(all == [len; 3], "gradients or moments")?;
        let scales = numbers(gradient_scale.len, gradient_scale.address())?;
        require(scales == 1, "the factor of gradients")?;
        let args = AdamWArgs {
            p: parameters.address(),
            g: gradients.address(),
            m: first_moment.address(),
            v: second_moment.address(),
            gradient_scale: gradient_scale.address(),
            len: len as u64,
            factors: step.factors(),
        };
        self.mark("optimiser")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "adamw_step", elementwise(len), &args) }
    }

    /// `Σ x²` of each `unit` elements, in f64: two elements of `sums` hold the bits of each.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn sums_of_squares(
        &mut self,
        x: View<'_, f32>,
        unit: usize,
        sums: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let units = x.len.div_ceil(unit.max(1));
        let fits = numbers(sums.len, sums.address())? == units;
        require(fits && unit > 0 && unit < 1 << 31, "sums")?;
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
