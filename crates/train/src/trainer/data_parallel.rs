//! One optimiser step over any number of processes.
//!
//! ```text
//! each process   gradients of its micro-batches, added up in groups of a fixed tree
//! reduce-scatter the sum of all processes, each its shard
//! each process   sums of squares of its shard
//! all-gather     losses and sums of squares
//! each process   norm, clipping, AdamW on its shard (ZeRO-1)
//! all-gather     the new weights
//! ```
//!
//! Where exchanges run beside the computation, the reduce-scatter goes part by part, as the last micro-batch's backward pass
//! is done with them.
//!
//! On a GPU the host waits for none of this: what a step came to is read when the next one is under way. Whenever the host waits
//! for the device after all, since it is far enough ahead, it looks whether all processes are still there.
//!
//! The tree makes the sum independent of the number of processes: the micro-batches of a step are cut
//! into 2ᵏ groups; each group is added up in order, then the groups pairwise. With 2ʲ ≤ 2ᵏ processes the
//! lower levels of the tree are added within processes and the upper ones between them, so that every
//! addition has the same operands. Other numbers of processes add in another order: their results differ
//! by rounding.

use std::ops::Range;

use super::memory;
use crate::architecture::Architecture;
use crate::backend::{Backend, BatchShape, Memory};
use crate::communicator::{self, Communicator};
use crate::config::TrainConfig;
use crate::data::{Batch, share};
use crate::error::{Error, Result};
use crate::model::{self, Model, ModelOptions};
use crate::optimizer::Optimizer;
use crate::outcome::{NORM_UNIT, Outcome, Outcomes};
use crate::schedule::Rates;

/// Micro-batches of a step, by number: each process has some groups of some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Micro-batches of a step over all processes.
    pub micro_batches: usize,
    /// The groups of this process, one or a power of two.
    pub groups: Vec<Range<usize>>,
    /// Whether the sums are those of one process alone, bit for bit.
    pub exact: bool,
}

impl Plan {
    /// Divides micro-batches among processes. At most `groups`, a power of two, are made.
    ///
    /// # Errors
    /// More processes than micro-batches.
    pub fn new(micro_batches: usize, groups: usize, rank: usize, world: usize) -> Result<Self> {
        if world > micro_batches {
            return Err(Error::Invalid(format!(
                "{world} processes for {micro_batches} micro-batches a step: every process needs one; lower \
                 batch.micro_batch or start fewer processes"
            )));
        }
        let groups = groups.min(1 << micro_batches.trailing_zeros());
        let exact = groups.is_multiple_of(world);
        let own = share(micro_batches, rank, world);
        let count = if exact { groups / world } else { 1 };
        let size = own.len() / count;
        let groups = (0..count)
            .map(|group| {
                let start = own.start + group * size;
                start..if group + 1 == count { own.end } else { start + size }
            })
            .collect();
        Ok(Self { micro_batches, groups, exact })
    }
}

/// A model with its weights, gradients and optimiser, trained together with other processes.
pub struct DataParallel<B: Backend> {
    backend: B,
    communicator: Box<dyn Communicator<B::Flat>>,
    model: Model<B>,
    plan: Plan,
    micro_batch: usize,
    clip: f64,
    shards: Vec<Range<usize>>,
    parameters: B::Flat,
    /// Sums of groups that wait for their other half; the first is the whole.
    gradients: Vec<B::Flat>,
    optimizer: Optimizer<B::Flat>,
    outcomes: Outcomes<B>,
}

impl<B: Backend + 'static> DataParallel<B> {
    /// Allocates everything. `parameters` are those of process 0 on every process, whatever is given.
    ///
    /// # Errors
    /// More processes than micro-batches, no memory.
    pub fn new(
        mut backend: B,
        mut communicator: Box<dyn Communicator<B::Flat>>,
        architecture: &Architecture,
        config: &TrainConfig,
        parameters: &[f32],
    ) -> Result<Self> {
        let (rank, world) = (communicator.rank(), communicator.world_size());
        backend.set_lookout(communicator.lookout());
        if let Some((free, total)) = backend.device_bytes()? {
            let head_chunk = backend.head_chunk();
            memory::require(free, total, architecture, config, head_chunk, rank, world)?;
        }
        let groups = config.batch.reduction_groups;
        let plan = Plan::new(config.micro_batches(), groups, rank, world)?;
        let (shape, options) = model_options(config, backend.head_chunk());
        let model = Model::new(&mut backend, architecture, shape, &options)?;
        let mut state = State::allocate(&mut backend, architecture, config, &plan, rank, world)?;
        backend.write_flat(&mut state.parameters, 0, parameters)?;
        communicator.broadcast(&mut state.parameters)?;
        let State { shards, parameters, gradients, optimizer, outcomes } = state;
        let mut this = Self {
            micro_batch: config.batch.micro_batch,
            clip: config.optimizer.clip_grad_norm,
            backend,
            communicator,
            model,
            plan,
            shards,
            parameters,
            gradients,
            optimizer,
            outcomes,
        };
        this.update_weights()?;
        Ok(this)
    }

    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.model.layout().len()
    }

    /// Whether the model has no parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How the micro-batches are divided.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The other processes.
    pub fn communicator(&mut self) -> &mut dyn Communicator<B::Flat> {
        &mut *self.communicator
    }

    /// Ends the work, for something else with the same processes.
    pub fn into_communicator(self) -> Box<dyn Communicator<B::Flat>> {
        self.communicator
    }

    /// What computes, itself.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What computes.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// Adds up the gradients of a step over all processes: afterwards this process has its shard of the
    /// mean over all micro-batches. `rows` gives rows of the step's global batch.
    ///
    /// # Errors
    /// Errors of the data, the device or the other processes.
    pub fn accumulate(
        &mut self,
        rows: &mut dyn FnMut(Range<usize>) -> Result<Batch>,
    ) -> Result<()> {
        let scale = 1.0 / self.plan.micro_batches as f32;
        let (len, last_group) = (self.model.layout().len(), self.plan.groups.len() - 1);
        // Level of the tree that the first `waiting` buffers have reached is implied by their number.
        let mut waiting = 0;
        for (done, group) in self.plan.groups.iter().enumerate() {
            let (before, gradients) = self.gradients.split_at_mut(waiting);
            let gradients = &mut gradients[0];
            self.backend.clear_flat(gradients, 0..len)?;
            for micro_batch in group.clone() {
                let first = micro_batch * self.micro_batch;
                let batch = rows(first..first + self.micro_batch)?;
                let batch = model::Batch { ids: &batch.ids, targets: &batch.targets };
                let is_last = done == last_group && micro_batch + 1 == group.end;
                let in_parts = is_last && self.communicator.overlaps();
                let mut reduce = |backend: &mut B, gradients: &mut B::Flat, part: Range<usize>| {
                    add_all(backend, before, gradients, &part)?;
                    let sum = before.first_mut().unwrap_or(gradients);
                    let shards = communicator::parts(&self.shards, &part);
                    self.communicator.reduce_scatter(sum, &shards)
                };
                let (backend, parameters) = (&mut self.backend, &self.parameters);
                if in_parts {
                    self.model.accumulate_in_parts(
                        backend,
                        parameters,
                        batch,
                        scale,
                        gradients,
                        &mut reduce,
                    )?;
                } else {
                    self.model.accumulate(backend, parameters, batch, scale, gradients)?;
                    if is_last {
                        reduce(backend, gradients, 0..len)?;
                    }
                }
            }
            self.outcomes.move_loss(&mut self.backend, done)?;
            if done == last_group {
                break;
            }
            let joined = done.trailing_ones() as usize;
            add_all(&mut self.backend, &mut before[waiting - joined..], gradients, &(0..len))?;
            waiting = waiting + 1 - joined;
        }
        self.communicator.join_device()
    }

    /// Changes the weights: step number `step`, from 1, with clipped gradients. If the norm of the gradients or the loss is
    /// not finite, neither this step nor one after it changes anything; [`next_outcome`](Self::next_outcome) tells.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn update(&mut self, step: u64, rates: Rates) -> Result<()> {
        let (backend, communicator) = (&mut self.backend, &mut *self.communicator);
        let (parameters, gradients) = (&mut self.parameters, &self.gradients[0]);
        let (outcomes, shard) = (&mut self.outcomes, self.optimizer.shard());
        outcomes.clip(backend, communicator, gradients, shard.clone(), self.clip)?;
        let (numbers, model) = (outcomes.numbers(), &mut self.model);
        self.optimizer.step(backend, model, (step, rates), numbers, parameters, gradients)?;
        communicator.all_gather(parameters, &self.shards)?;
        self.model.update_weights_outside(backend, parameters, &shard)?;
        self.outcomes.begin_copy(&mut self.backend)
    }

    /// What the oldest step came to whose outcome was not taken: see [`Outcomes::next`]. It must be taken before the step
    /// after the next one is submitted.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn next_outcome(&mut self, wait: bool) -> Result<Option<Outcome>> {
        self.outcomes.next(&mut self.backend, &mut *self.communicator, wait)
    }

    /// Mean loss over batches of one shape, each with the share of its rows that counts; batches are
    /// divided among the processes.
    ///
    /// # Errors
    /// Errors of the data, the device or the other processes.
    pub fn evaluate(
        &mut self,
        batches: usize,
        batch: &mut dyn FnMut(usize) -> Result<(Batch, usize)>,
    ) -> Result<f64> {
        let (rank, world) = (self.communicator.rank(), self.communicator.world_size());
        let mut losses = Vec::new();
        for index in share(batches, rank, world) {
            let (batch, rows) = batch(index)?;
            let batch = model::Batch { ids: &batch.ids, targets: &batch.targets };
            self.model.evaluate(&mut self.backend, &self.parameters, batch, 1.0)?;
            self.communicator.wait()?;
            losses.extend([self.model.take_loss(&mut self.backend)?, rows as f64]);
        }
        let losses = self.gather_numbers(&losses)?;
        let sum: f64 = losses.chunks_exact(2).map(|pair| pair[0] * pair[1]).sum();
        let rows: f64 = losses.chunks_exact(2).map(|pair| pair[1]).sum();
        Ok(sum / rows)
    }

    /// Whether anything is true on any process.
    ///
    /// # Errors
    /// Errors of the other processes.
    pub fn any(&mut self, flags: u8) -> Result<u8> {
        let all = self.communicator.gather_bytes(&[flags])?;
        Ok(all.iter().filter_map(|bytes| bytes.first()).fold(0, |all, flags| all | flags))
    }

    /// The weights, on the host.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn read_parameters(&mut self, values: &mut [f32]) -> Result<()> {
        self.communicator.wait()?;
        Ok(self.backend.read_flat(&self.parameters, 0, values)?)
    }

    /// Sets the weights to those of process 0.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn write_parameters(&mut self, values: &[f32]) -> Result<()> {
        self.backend.write_flat(&mut self.parameters, 0, values)?;
        self.communicator.broadcast(&mut self.parameters)?;
        self.update_weights()
    }

    /// Gathers a moment of all processes into the gradients' memory, and on process 0 reads it into
    /// `values`. Every process calls this.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn read_moment(&mut self, which: usize, values: Option<&mut [f32]>) -> Result<()> {
        let shard = self.optimizer.shard();
        let mut own = vec![0.0; shard.len()];
        self.backend.read_flat(&self.optimizer.moments()[which], 0, &mut own)?;
        self.backend.write_flat(&mut self.gradients[0], shard.start, &own)?;
        self.communicator.all_gather(&mut self.gradients[0], &self.shards)?;
        self.communicator.wait()?;
        if let Some(values) = values {
            self.backend.read_flat(&self.gradients[0], 0, values)?;
        }
        Ok(())
    }

    /// Sets a moment from the values of process 0, each process its shard. Every process calls this.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn write_moment(&mut self, which: usize, values: Option<&[f32]>) -> Result<()> {
        if let Some(values) = values {
            self.backend.write_flat(&mut self.gradients[0], 0, values)?;
        }
        self.communicator.broadcast(&mut self.gradients[0])?;
        self.communicator.wait()?;
        let shard = self.optimizer.shard();
        let mut own = vec![0.0; shard.len()];
        self.backend.read_flat(&self.gradients[0], shard.start, &mut own)?;
        Ok(self.backend.write_flat(&mut self.optimizer.moments_mut()[which], 0, &own)?)
    }

    /// This process's shard of the gradients after [`accumulate`](Self::accumulate), gathered from all
    /// processes.
    ///
    /// # Errors
    /// Errors of the device or the other processes.
    pub fn read_gradients(&mut self, values: &mut [f32]) -> Result<()> {
        self.communicator.all_gather(&mut self.gradients[0], &self.shards)?;
        self.communicator.wait()?;
        Ok(self.backend.read_flat(&self.gradients[0], 0, values)?)
    }

    fn update_weights(&mut self) -> Result<()> {
        Ok(self.model.update_weights(&mut self.backend, &self.parameters)?)
    }

    /// The numbers of all processes, in the order of ranks.
    fn gather_numbers(&mut self, own: &[f64]) -> Result<Vec<f64>> {
        let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let gathered = self.communicator.gather_bytes(&bytes)?;
        let numbers = gathered.iter().flat_map(|bytes| bytes.chunks_exact(8));
        Ok(numbers
            .map(|bytes| {
                let mut number = [0; 8];
                number.copy_from_slice(bytes);
                f64::from_le_bytes(number)
            })
            .collect())
    }
}

/// The shape of a micro-batch and how it is computed.
fn model_options(config: &TrainConfig, head_chunk: usize) -> (BatchShape, ModelOptions) {
    let batch = &config.batch;
    let shape = BatchShape { sequences: batch.micro_batch, length: batch.sequence_length };
    let options = ModelOptions {
        recompute: batch.recompute_activations,
        head_chunk,
        recompute_gates: batch.recompute_gates,
    };
    (shape, options)
}

/// What one process has of parameters, gradients and moments.
struct State<M: Memory> {
    shards: Vec<Range<usize>>,
    parameters: M::Flat,
    gradients: Vec<M::Flat>,
    optimizer: Optimizer<M::Flat>,
    outcomes: Outcomes<M>,
}

impl<M: Memory> State<M> {
    fn allocate(
        memory: &mut M,
        architecture: &Architecture,
        config: &TrainConfig,
        plan: &Plan,
        rank: usize,
        world: usize,
    ) -> Result<Self> {
        let layout = architecture.layout();
        let shards = communicator::shards(layout.len(), NORM_UNIT, world);
        let parameters = memory.flat_zeros(layout.len())?;
        let levels = 1 + plan.groups.len().ilog2() as usize;
        let gradients = (0..levels)
            .map(|_| memory.flat_zeros(layout.len()))
            .collect::<mmfree::error::Result<_>>()?;
        let own = shards[rank].clone();
        let optimizer = Optimizer::new(memory, &layout, &config.optimizer, own)?;
        let outcomes = Outcomes::new(memory, rank, &shards, plan.groups.len())?;
        Ok(Self { shards, parameters, gradients, optimizer, outcomes })
    }
}

/// Counts what [`DataParallel::new`] would allocate.
///
/// # Errors
/// More processes than micro-batches.
pub(super) fn plan<M: Memory>(
    memory: &mut M,
    architecture: &Architecture,
    config: &TrainConfig,
    head_chunk: usize,
    rank: usize,
    world: usize,
) -> Result<()> {
    let groups = config.batch.reduction_groups;
    let plan = Plan::new(config.micro_batches(), groups, rank, world)?;
    let (shape, options) = model_options(config, head_chunk);
    model::plan(memory, architecture, shape, &options)?;
    State::allocate(memory, architecture, config, &plan, rank, world).map(drop)
}

/// Adds up a part of gradients of neighbouring groups, the newest last: each to the one before it, the sum to the first.
fn add_all<B: Backend>(
    backend: &mut B,
    before: &mut [B::Flat],
    newest: &B::Flat,
    part: &Range<usize>,
) -> mmfree::error::Result<()> {
    let Some((into, before)) = before.split_last_mut() else { return Ok(()) };
    backend.add_flat(newest, into, part.clone())?;
    add_all(backend, before, into, part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_micro_batch_belongs_to_one_group_of_one_process() {
        for (micro_batches, groups, world, exact) in [
            (8, 8, 1, true),
            (8, 8, 2, true),
            (8, 4, 4, true),
            (8, 2, 4, false),
            (6, 8, 2, true),
            (6, 8, 3, false),
            (5, 8, 2, false),
            (7, 1, 1, true),
        ] {
            let plans: Vec<_> = (0..world)
                .map(|rank| Plan::new(micro_batches, groups, rank, world).unwrap())
                .collect();
            let all: Vec<usize> =
                plans.iter().flat_map(|plan| plan.groups.iter().cloned().flatten()).collect();
            assert_eq!(all, (0..micro_batches).collect::<Vec<_>>());
            assert!(
                plans.iter().all(|plan| plan.exact == exact),
                "{micro_batches} {groups} {world}"
            );
            assert!(plans.iter().all(|plan| plan.groups.len().is_power_of_two()));
        }
        assert!(Plan::new(2, 2, 0, 3).is_err());
    }
}
