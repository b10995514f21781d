//! AdamW over parameter groups, with the moments sharded over the processes (ZeRO-1).

use std::ops::Range;

use mmfree::error::Result;

use crate::backend::{AdamW, Backend, Group, Memory, Update};
use crate::config::OptimizerConfig;
use crate::model::Model;
use crate::parameters::{ParameterKind, ParameterLayout};
use crate::schedule::Rates;

/// The optimiser of one process: it has the moments of its shard, and changes its shard of the parameters.
#[derive(Debug)]
pub struct Optimizer<F> {
    config: OptimizerConfig,
    shard: Range<usize>,
    /// With the weight decay of the configuration.
    groups: Vec<Group>,
    /// First and second moment, for the shard only.
    moments: [F; 2],
}

impl<F> Optimizer<F> {
    /// An optimiser that has done no step, for `shard` of the flat buffer.
    ///
    /// # Errors
    /// No memory.
    pub fn new<M: Memory<Flat = F>>(
        memory: &mut M,
        layout: &ParameterLayout,
        config: &OptimizerConfig,
        shard: Range<usize>,
    ) -> Result<Self> {
        let moments = [memory.flat_zeros(shard.len())?, memory.flat_zeros(shard.len())?];
        Ok(Self { config: config.clone(), groups: groups(layout, config, &shard), shard, moments })
    }

    /// The elements of the flat buffer that this process changes.
    pub fn shard(&self) -> Range<usize> {
        self.shard.clone()
    }

    /// First and second moment of the shard.
    pub fn moments(&self) -> &[F; 2] {
        &self.moments
    }

    /// First and second moment of the shard, to be set from a checkpoint.
    pub fn moments_mut(&mut self) -> &mut [F; 2] {
        &mut self.moments
    }

    /// Step number `step`, from 1, for this process's shard of the parameters, with gradients clipped as
    /// [`Outcomes::clip`](crate::outcome::Outcomes::clip) has computed in `numbers`. Weights of projections in the shard are up
    /// to date afterwards.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn step<B: Backend<Flat = F> + 'static>(
        &mut self,
        backend: &mut B,
        model: &mut Model<B>,
        (step, rates): (u64, Rates),
        numbers: &F,
        parameters: &mut F,
        gradients: &F,
    ) -> Result<()> {
        let factor = rates.weight_decay_factor;
        let groups = self.groups.iter().map(|group| Group {
            range: group.range.clone(),
            weight_decay: group.weight_decay * factor,
        });
        let update = Update {
            step: AdamW {
                learning_rate: rates.learning_rate,
                beta1: self.config.beta1,
                beta2: self.config.beta2,
                eps: self.config.eps,
                weight_decay: 0.0,
                step,
            },
            shard: self.shard.clone(),
            groups: &groups.collect::<Vec<_>>(),
            numbers,
            parameters,
            gradients,
            moments: &mut self.moments,
        };
        model.update(backend, update)
    }
}

/// The groups of a shard, neighbours of one weight decay joined.
fn groups(layout: &ParameterLayout, config: &OptimizerConfig, shard: &Range<usize>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for parameter in layout.parameters() {
        let weight_decay = match parameter.kind {
            ParameterKind::Matrix => config.weight_decay,
            ParameterKind::Embedding => config.weight_decay_embeddings,
            ParameterKind::Norm | ParameterKind::LowerBounds => config.weight_decay_norms,
        };
        let start = parameter.range.start.max(shard.start);
        let end = parameter.range.end.min(shard.end);
        if start >= end {
            continue;
        }
        match groups.last_mut() {
            Some(last) if last.weight_decay == weight_decay => last.range.end = end,
            _ => groups.push(Group { range: start..end, weight_decay }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> ParameterLayout {
        let tensors = [
            ("e", 10, ParameterKind::Embedding),
            ("n", 2, ParameterKind::Norm),
            ("b", 3, ParameterKind::LowerBounds),
            ("m", 20, ParameterKind::Matrix),
        ];
        ParameterLayout::new(tensors.map(|(name, len, kind)| (name.to_owned(), vec![len], kind)))
    }

    #[test]
    fn groups_follow_the_kinds_and_are_cut_to_the_shard() {
        let config = OptimizerConfig {
            weight_decay: 0.1,
            weight_decay_embeddings: 0.2,
            weight_decay_norms: 0.0,
            ..OptimizerConfig::default()
        };
        let cut = |shard| -> Vec<(Range<usize>, f64)> {
            let groups = groups(&layout(), &config, &shard);
            groups.into_iter().map(|group| (group.range, group.weight_decay)).collect()
        };
        assert_eq!(cut(0..35), [(0..10, 0.2), (10..15, 0.0), (15..35, 0.1)]);
        assert_eq!(cut(11..16), [(11..15, 0.0), (15..16, 0.1)]);
        assert_eq!(cut(35..35), []);
    }
}
