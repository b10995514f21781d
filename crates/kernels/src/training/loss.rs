//! The loss, and its gradient.

use super::{LOSS, Training, View, ViewMut, address_or_null, quotient, require};
use crate::cuda::{CudaError, Launch};

const LOSS_THREADS: usize = 512;
/// Threads of a block that has a row of logits in registers, at most, and elements that each has of it.
const ROW_THREADS: usize = 1024;
const ROW_ELEMENTS: usize = 32;

#[repr(C)]
struct LossArgs {
    logits: u64,
    factors: u64,
    targets: u64,
    gradient: u64,
    losses: u64,
    greedy: u64,
    vocabulary: u32,
    scale: f32,
}

#[repr(C)]
struct AddLossArgs {
    losses: u64,
    total: u64,
    rows: u32,
    scale: f32,
}

impl Training {
    /// Adds `scale · Σ_m −ln softmax(logits[m])[targets[m]]` to `total`, and writes `scale ·` the gradient of
    /// the logits. Targets must be below V or [`IGNORED`](crate::cross_entropy::IGNORED).
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    #[allow(clippy::too_many_arguments)]
    pub fn cross_entropy(
        &mut self,
        logits: View<'_, f32>,
        factors: Option<View<'_, f32>>,
        targets: View<'_, u32>,
        scale: f32,
        gradient: Option<ViewMut<'_, u16>>,
        losses: ViewMut<'_, f64>,
        total: ViewMut<'_, f64>,
    ) -> Result<(), CudaError> {
        let rows = targets.len;
        let vocabulary = quotient(logits.len, rows)?;
        require(factors.is_none_or(|f| f.len >= rows), "factors")?;
        require(gradient.as_ref().is_none_or(|g| g.len == logits.len), "gradient")?;
        require(losses.len >= rows && total.len == 1, "losses")?;
        let args = LossArgs {
            logits: logits.address(),
            factors: address_or_null(factors),
            targets: targets.address(),
            gradient: gradient.as_ref().map_or(0, ViewMut::address),
            losses: losses.address(),
            greedy: 0,
            vocabulary: vocabulary as u32,
            scale,
        };
        let sum = AddLossArgs {
            losses: losses.address(),
            total: total.address(),
            rows: rows as u32,
            scale,
        };
        self.mark("loss")?;
        let threads = vocabulary.div_ceil(ROW_ELEMENTS).next_multiple_of(32);
        let vectors = vocabulary.is_multiple_of(4)
            && threads <= ROW_THREADS
            && [args.logits, args.gradient].iter().all(|address| address.is_multiple_of(16));
        let (name, threads) = if vectors {
            ("cross_entropy_vectors", threads)
        } else {
            ("cross_entropy_rows", LOSS_THREADS)
        };
        let launch = Launch::new([rows, 1, 1], threads, 0);
        // SAFETY: the views lie in live buffers of the sizes that were checked, and targets are below V.
        unsafe {
            self.launch(LOSS, name, launch, &args)?;
            self.launch(LOSS, "add_losses", Launch::new([1, 1, 1], LOSS_THREADS, 0), &sum)
        }
    }

    /// Writes `−ln softmax(logits[m])[targets[m]]` and whether no token is more likely than the target (1; of equals
    /// the lowest id counts as the most likely) or one is (0). Targets must be below V or
    /// [`IGNORED`](crate::cross_entropy::IGNORED), whose loss is 0 and whose `greedy` stays as it is.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn token_losses(
        &mut self,
        logits: View<'_, f32>,
        factors: Option<View<'_, f32>>,
        targets: View<'_, u32>,
        losses: ViewMut<'_, f64>,
        greedy: ViewMut<'_, u32>,
    ) -> Result<(), CudaError> {
        let rows = targets.len;
        let vocabulary = quotient(logits.len, rows)?;
        require(factors.is_none_or(|f| f.len >= rows), "factors")?;
        require(losses.len >= rows && greedy.len >= rows, "losses")?;
        let args = LossArgs {
            logits: logits.address(),
            factors: address_or_null(factors),
            targets: targets.address(),
            gradient: 0,
            losses: losses.address(),
            greedy: greedy.address(),
            vocabulary: vocabulary as u32,
            scale: 1.0,
        };
        let launch = Launch::new([rows, 1, 1], LOSS_THREADS, 0);
        // SAFETY: the views lie in live buffers of the sizes that were checked, and targets are below V.
        unsafe { self.launch(LOSS, "cross_entropy_rows", launch, &args) }
    }
}
