//! AdamW and the weights that products stream, in one launch.

use std::ops::Range;

use super::optimizer::{WEIGHT_BLOCKS, numbers};
use super::{OPTIMIZER, THREADS, Training, View, ViewMut, require};
use crate::adamw::{AdamW, Factors};
use crate::cuda::{Buffer, CudaError, Launch};

/// Parts of a launch, at most.
pub(super) const MOST_PARTS: usize = 160;
/// Numbers that the blocks of a launch count with.
pub(super) const COUNTERS: usize = 1 + 2 * MOST_PARTS;
/// Blocks that share a multiprocessor.
const RESIDENT_BLOCKS: usize = 5;
/// Elements that a thread takes at once.
const VECTOR: usize = 4;
/// In place of the number of a γ.
const NOT_PREPARED: u32 = u32::MAX;
const AS_HALVES: u32 = u32::MAX - 1;

/// A part of the parameters that a step changes, and what is made of it.
#[derive(Clone, Debug)]
pub struct UpdatePart {
    /// Its elements.
    pub range: Range<usize>,
    /// Weight decay, as in [`AdamW::weight_decay`].
    pub weight_decay: f64,
    /// What products stream, if it is the weight of a projection.
    pub prepared: Option<Prepared>,
}

/// Where a projection's weights lie as products stream them.
#[derive(Clone, Copy, Debug)]
pub struct Prepared {
    /// First element among the weights, in bf16 and in bytes.
    pub place: usize,
    /// Number of γ of trits; none: the weights themselves in bf16.
    pub gamma: Option<usize>,
}

/// What a step reads and writes.
#[derive(Debug)]
pub struct Update<'a> {
    /// The factor of [`Training::clip`]: nothing is changed if it is NaN.
    pub gradient_scale: View<'a, f32>,
    /// All parameters, and all gradients.
    pub parameters: &'a mut Buffer<f32>,
    /// See `parameters`.
    pub gradients: &'a Buffer<f32>,
    /// First and second moment of the parameters from `first` on.
    pub moments: [&'a mut Buffer<f32>; 2],
    /// See `moments`.
    pub first: usize,
    /// Weights of all projections in bf16.
    pub halves: &'a mut Buffer<u16>,
    /// Trits of all projections, a byte each, two in an element.
    pub bytes: &'a mut Buffer<u16>,
    /// γ of all projections.
    pub gammas: &'a mut Buffer<f32>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PartArgs {
    start: u32,
    place: u32,
    len: u32,
    gamma: u32,
    pieces_end: u32,
    keep: f32,
}

#[repr(C)]
struct UpdateArgs {
    parameters: u64,
    gradients: u64,
    moments: [u64; 2],
    gradient_scale: u64,
    halves: u64,
    bytes: u64,
    gammas: u64,
    partials: u64,
    counters: u64,
    parts_len: u32,
    factors: Factors,
    parts: [PartArgs; MOST_PARTS],
}

/// What a launch takes at most in arguments.
const _: () = assert!(size_of::<UpdateArgs>() <= 4096);

impl UpdatePart {
    /// Pieces of work, each for a block.
    fn pieces(&self) -> u32 {
        self.range.len().div_ceil(VECTOR * THREADS).min(WEIGHT_BLOCKS) as u32
    }

    /// Elements of the prepared weights.
    fn prepared_range(&self) -> Option<Range<usize>> {
        self.prepared.map(|prepared| prepared.place..prepared.place + self.range.len())
    }

    /// The part as the kernel takes it, without the end of its pieces; none if it does not consist of whole vectors.
    fn args(&self, first: usize, step: &AdamW) -> Option<PartArgs> {
        let place = self.prepared.map_or(0, |prepared| prepared.place);
        let number = |n: usize| {
            let whole = n.is_multiple_of(VECTOR).then_some(n / VECTOR)?;
            u32::try_from(whole).ok()
        };
        number(first)?;
        Some(PartArgs {
            start: number(self.range.start)?,
            place: number(place)?,
            len: number(self.range.len())?,
            gamma: match self.prepared {
                None => NOT_PREPARED,
                Some(Prepared { gamma, .. }) => gamma.map_or(AS_HALVES, |gamma| gamma as u32),
            },
            pieces_end: 0,
            keep: AdamW { weight_decay: self.weight_decay, ..*step }.factors().keep,
        })
    }
}

impl Training {
    /// A step of the optimiser for parts of the parameters, as [`adamw`](Self::adamw), and of each what products stream, as
    /// [`ternary_weights`](Self::ternary_weights) and [`half_weights`](Self::half_weights): the same bits. `step` has the
    /// constants but for the weight decay.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn update(
        &mut self,
        step: &AdamW,
        parts: &[UpdatePart],
        update: Update<'_>,
    ) -> Result<(), CudaError> {
        check(parts, &update)?;
        let args: Option<Vec<_>> = parts.iter().map(|part| part.args(update.first, step)).collect();
        let Some(args) = args else { return self.update_apart(step, parts, update) };
        self.mark("optimiser")?;
        let Update { gradient_scale, first, .. } = update;
        let moment = |moment: &Buffer<f32>| {
            moment.address(0).wrapping_sub((first * size_of::<f32>()) as u64)
        };
        for (parts, args) in parts.chunks(MOST_PARTS).zip(args.chunks(MOST_PARTS)) {
            let (args, pieces) = with_ends(parts, args);
            let args = UpdateArgs {
                parameters: update.parameters.address(0),
                gradients: update.gradients.address(0),
                moments: [moment(update.moments[0]), moment(update.moments[1])],
                gradient_scale: gradient_scale.address(),
                halves: update.halves.address(0),
                bytes: update.bytes.address(0),
                gammas: update.gammas.address(0),
                partials: self.weight_partials.address(0),
                counters: self.update_counters.address(0),
                parts_len: parts.len() as u32,
                factors: step.factors(),
                parts: args,
            };
            self.update_counters.clear()?;
            let blocks = (RESIDENT_BLOCKS * self.device.multiprocessors()).min(pieces);
            let launch = Launch::new([blocks, 1, 1], THREADS, 0);
            // SAFETY: all parts lie in the live buffers, which was checked.
            unsafe { self.launch(OPTIMIZER, "adamw_and_weights", launch, &args)? };
        }
        Ok(())
    }

    /// The same part by part, in launches of their own.
    fn update_apart(
        &mut self,
        step: &AdamW,
        parts: &[UpdatePart],
        update: Update<'_>,
    ) -> Result<(), CudaError> {
        let Update { gradient_scale, parameters, gradients, moments, first, .. } = update;
        let [first_moment, second_moment] = moments;
        for part in parts {
            let (at, len) = (part.range.start, part.range.len());
            let step = AdamW { weight_decay: part.weight_decay, ..*step };
            self.adamw(
                &step,
                gradient_scale,
                ViewMut::new(parameters, at, len),
                View::new(gradients, at, len),
                ViewMut::new(first_moment, at - first, len),
                ViewMut::new(second_moment, at - first, len),
            )?;
            let Some(Prepared { place, gamma }) = part.prepared else { continue };
            let weights = View::new(parameters, at, len);
            let halves = ViewMut::new(update.halves, place, len);
            match gamma {
                Some(gamma) => {
                    let bytes = ViewMut::new(update.bytes, place / 2, len.div_ceil(2));
                    let gamma = ViewMut::new(update.gammas, gamma, 1);
                    self.ternary_weights(weights, halves, bytes, gamma)?;
                }
                None => self.half_weights(weights, halves)?,
            }
        }
        Ok(())
    }
}

/// Whether all parts lie in the buffers.
fn check(parts: &[UpdatePart], update: &Update<'_>) -> Result<(), CudaError> {
    let len = update.parameters.len();
    require(update.gradients.len() == len, "gradients")?;
    let scale = update.gradient_scale;
    require(numbers(scale.len, scale.address())? == 1, "the factor of gradients")?;
    for part in parts {
        let Range { start, end } = part.range;
        require(update.first <= start && start <= end && end <= len, "a part")?;
        let moments = update.moments.iter().all(|moment| end - update.first <= moment.len());
        require(moments, "moments")?;
        if let (Some(place), Some(prepared)) = (part.prepared_range(), part.prepared) {
            require(place.end <= update.halves.len(), "weights")?;
            if let Some(gamma) = prepared.gamma {
                let fits =
                    place.start.is_multiple_of(2) && place.end.div_ceil(2) <= update.bytes.len();
                require(fits && gamma < update.gammas.len(), "trits")?;
            }
        }
    }
    Ok(())
}

/// Parts with the ends of their pieces, and how many pieces there are.
fn with_ends(parts: &[UpdatePart], args: &[PartArgs]) -> ([PartArgs; MOST_PARTS], usize) {
    let mut all = [PartArgs::default(); MOST_PARTS];
    let mut end = 0;
    for ((part, args), all) in parts.iter().zip(args).zip(&mut all) {
        end += part.pieces();
        *all = PartArgs { pieces_end: end, ..*args };
    }
    (all, end as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_as_the_sums_of_weights_are() {
        let step = AdamW {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.5,
            step: 1,
        };
        let (trits, halves) = (Some(Some(1)), Some(None));
        let lens = [(40, None), (1 << 20, trits), (0, None), (8, trits), (1 << 21, halves)];
        let more =
            [(3 << 20, trits), (1 << 20, trits), (4096, None), (1 << 20, trits), (60, trits)];
        let mut end = 0;
        let parts: Vec<_> = lens
            .into_iter()
            .chain(more)
            .map(|(len, prepared)| {
                end += len;
                UpdatePart {
                    range: end - len..end,
                    weight_decay: 0.25,
                    prepared: prepared.map(|gamma| Prepared { place: end - len, gamma }),
                }
            })
            .collect();
        let args: Option<Vec<_>> = parts.iter().map(|part| part.args(0, &step)).collect();
        let args = args.unwrap();
        assert!(args.iter().all(|part| (part.keep - 0.975).abs() < 1e-6));
        let (args, pieces) = with_ends(&parts, &args);
        // Of 1024 elements a piece, at most 1024 pieces.
        let ends = args[..parts.len()].iter().map(|part| part.pieces_end);
        let counts = [1, 1024, 0, 1, 1024, 1024, 1024, 4, 1024, 1];
        assert!(ends.eq(counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end)
        })));
        assert_eq!(counts.iter().sum::<u32>() as usize, pieces);
        // Not whole vectors: in launches of their own.
        assert!(parts[0].args(2, &step).is_none());
        assert!(UpdatePart { range: 4..9, ..parts[0].clone() }.args(0, &step).is_none());
    }
}
