//! What a step comes to: computed on the device, and read once the next step is under way.

use std::ops::Range;

use crate::backend::numbers::{ELEMENTS, LOSSES, NORM};
use crate::backend::{Backend, Memory, numbers};
use crate::communicator::{Communicator, tree_sum};
use crate::error::{Error, Result};

/// Elements whose squares are added up at once, whatever the shards: shards end at multiples of it.
pub const NORM_UNIT: usize = 1 << 16;

/// Steps whose outcome may be on its way to the host.
const UNDER_WAY: usize = 2;

/// Loss and gradient norm of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean loss over all micro-batches of all processes, in nats.
    pub loss: f64,
    /// L2 norm of the gradients of all processes, before clipping.
    pub norm: f64,
}

/// The numbers of a step on the device, and those of the last steps on their way to the host:
///
/// ```text
/// norm  clip factor  losses of all processes' groups  sums of squares of all processes' shards
/// ```
///
/// The factor is computed from the others and read by the optimiser without the host. It is NaN from the first step on whose
/// norm or losses are not finite: that step and those that are under way behind it leave the weights alone.
#[derive(Debug)]
pub struct Outcomes<M: Memory> {
    numbers: M::Flat,
    rank: usize,
    /// Places of each process's losses among the numbers, and of its sums of squares.
    losses: Vec<Range<usize>>,
    squares: Vec<Range<usize>>,
    copies: [M::HostCopy; UNDER_WAY],
    /// Steps whose outcome was asked for, and those whose outcome was taken.
    begun: usize,
    taken: usize,
}

impl<M: Memory> Outcomes<M> {
    /// For process `rank` of those that have `shards`, each with so many `losses` a step.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        memory: &mut M,
        rank: usize,
        shards: &[Range<usize>],
        losses: usize,
    ) -> mmfree::error::Result<Self> {
        let places = |from: usize, counts: &mut dyn Iterator<Item = usize>| -> Vec<Range<usize>> {
            let ends = counts.scan(from, |end, count| {
                *end += count;
                Some(*end - count..*end)
            });
            ends.collect()
        };
        let losses = places(LOSSES, &mut shards.iter().map(|_| losses));
        let end = LOSSES + losses.iter().map(Range::len).sum::<usize>();
        let units = shards.iter().map(|shard| shard.len().div_ceil(NORM_UNIT));
        let squares = places(end, &mut units.clone());
        Ok(Self {
            numbers: memory.flat_zeros((end + units.sum::<usize>()) * ELEMENTS)?,
            rank,
            losses,
            squares,
            copies: [memory.host_copy(end * ELEMENTS)?, memory.host_copy(end * ELEMENTS)?],
            begun: 0,
            taken: 0,
        })
    }

    /// The numbers, for the optimiser.
    pub fn numbers(&self) -> &M::Flat {
        &self.numbers
    }
}

impl<B: Backend> Outcomes<B> {
    /// Takes the loss that was added up since the last call as loss number `index` of this process.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn move_loss(&mut self, backend: &mut B, index: usize) -> Result<()> {
        Ok(backend.move_loss(&mut self.numbers, self.losses[self.rank].start + index)?)
    }

    /// Computes norm and clip factor, from all losses of the step and this process's `shard` of the gradients. Does not wait
    /// for the device, where the communicator does not.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn clip(
        &mut self,
        backend: &mut B,
        communicator: &mut dyn Communicator<B::Flat>,
        gradients: &B::Flat,
        shard: Range<usize>,
        max_norm: f64,
    ) -> Result<()> {
        let (numbers, at) = (&mut self.numbers, self.squares[self.rank].start);
        backend.sums_of_squares(gradients, shard, NORM_UNIT, numbers, at)?;
        for places in [&self.losses, &self.squares] {
            let elements = |place: &Range<usize>| place.start * ELEMENTS..place.end * ELEMENTS;
            communicator.all_gather(numbers, &places.iter().map(elements).collect::<Vec<_>>())?;
        }
        let losses = self.losses.iter().map(Range::len).sum();
        Ok(backend.clip(numbers, losses, max_norm)?)
    }

    /// Sends the outcome of the step on its way to the host, after all that was submitted.
    ///
    /// # Errors
    /// Errors of the device; two outcomes that were not taken.
    pub fn begin_copy(&mut self, backend: &mut B) -> Result<()> {
        if self.begun - self.taken == UNDER_WAY {
            let what = format!("the outcomes of {UNDER_WAY} steps were not taken");
            return Err(Error::Invalid(what));
        }
        backend.begin_copy(&self.numbers, &mut self.copies[self.begun % UNDER_WAY])?;
        self.begun += 1;
        Ok(())
    }

    /// The outcome of the oldest step whose outcome was not taken; none if all were. On an asynchronous device there is also
    /// none while the next step was not submitted, unless `wait` asks for it: all processes learn it at the same time.
    ///
    /// # Errors
    /// Errors of the device; a process is gone.
    pub fn next(
        &mut self,
        backend: &mut B,
        communicator: &mut dyn Communicator<B::Flat>,
        wait: bool,
    ) -> Result<Option<Outcome>> {
        let under_way = self.begun - self.taken;
        let due = wait || under_way == UNDER_WAY || !backend.is_asynchronous();
        if under_way == 0 || !due {
            return Ok(None);
        }
        let copy = &mut self.copies[self.taken % UNDER_WAY];
        communicator.wait_for(&mut || backend.is_copied(copy))?;
        self.taken += 1;
        let numbers = numbers::all(backend.copied(copy)?);
        Ok(Some(Outcome { loss: tree_sum(&numbers[LOSSES..]), norm: numbers[NORM] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{AdamW, CpuBackend};
    use crate::communicator::{Local, shards};

    const LEN: usize = 2 * NORM_UNIT + 5;
    const STEP: AdamW = AdamW {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        step: 1,
    };

    #[test]
    fn a_norm_that_is_no_number_leaves_the_weights_alone_from_then_on() {
        let mut cpu = CpuBackend::new(Some(1), None).unwrap();
        let mut outcomes: Outcomes<CpuBackend> =
            Outcomes::new(&mut cpu, 0, &shards(LEN, NORM_UNIT, 1), 1).unwrap();
        let (mut weights, mut m, mut v) = (vec![1.0; LEN], vec![0.0; LEN], vec![0.0; LEN]);
        let mut gradients = vec![0.5; LEN];
        let mut step = |gradients: &Vec<f32>| {
            outcomes.move_loss(&mut cpu, 0).unwrap();
            outcomes.clip(&mut cpu, &mut Local, gradients, 0..LEN, 1.0).unwrap();
            let numbers = outcomes.numbers();
            cpu.adamw(&STEP, numbers, 0..LEN, &mut weights, gradients, 0, &mut m, &mut v).unwrap();
            outcomes.begin_copy(&mut cpu).unwrap();
            let outcome = outcomes.next(&mut cpu, &mut Local, false).unwrap().unwrap();
            assert_eq!(outcomes.next(&mut cpu, &mut Local, true).unwrap(), None);
            (outcome, weights.clone(), m[0])
        };
        let (outcome, first, moment) = step(&gradients);
        assert!((outcome.norm - 0.5 * (LEN as f64).sqrt()).abs() < 1e-6, "{outcome:?}");
        assert!(first.iter().all(|&weight| weight < 0.95), "clipped, but not to nothing");
        // Clipped: the moment is a tenth of the gradient that was scaled to norm 1.
        assert!((f64::from(moment) * (LEN as f64).sqrt() - 0.1).abs() < 1e-6, "{moment}");
        gradients[NORM_UNIT + 1] = f32::INFINITY;
        let (outcome, second, same) = step(&gradients);
        assert_eq!((outcome.norm, same), (f64::INFINITY, moment));
        gradients[NORM_UNIT + 1] = 0.5;
        let (outcome, third, same) = step(&gradients);
        assert!(outcome.norm.is_finite() && same == moment);
        assert!(second == first && third == first);
    }
}
