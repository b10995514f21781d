//! The optimiser, and the weights as products stream them.

use mmfree::error::Result;
use mmfree_kernels::cuda::Buffer;
use mmfree_kernels::training::{self, Prepared, UpdatePart, View, ViewMut};

use super::CudaBackend;
use super::tensors::{CudaWeights, flat_view};
use crate::backend::numbers::{ELEMENTS, FACTOR};
use crate::backend::{Group, Projection, Update};

impl CudaBackend {
    /// Weights of projections, each in launches of its own.
    pub(super) fn prepare_each(
        &mut self,
        projections: &[Projection],
        flat: &Buffer<f32>,
        weights: &mut CudaWeights,
    ) -> Result<()> {
        for projection in projections {
            let values = flat_view(flat, &projection.weight);
            let start = weights.starts[projection.index];
            let (place, len) = weights.byte_place(projection);
            let into = ViewMut::new(&mut weights.values, start, projection.weight.len());
            match projection.inner_norm {
                Some(_) => {
                    let gamma = ViewMut::new(&mut weights.gammas, projection.index, 1);
                    let bytes = ViewMut::new(&mut weights.bytes, place, len);
                    self.ops.ternary_weights(values, into, bytes, gamma)?;
                }
                None => self.ops.half_weights(values, into)?,
            }
        }
        Ok(())
    }

    /// AdamW for a shard and the weights of the projections in it, in one launch.
    pub(super) fn update_shard(
        &mut self,
        update: Update<'_, Buffer<f32>>,
        projections: &[Projection],
        weights: &mut CudaWeights,
    ) -> Result<()> {
        let mut own: Vec<&Projection> =
            projections.iter().filter(|projection| projection.lies_in(&update.shard)).collect();
        own.sort_by_key(|projection| projection.weight.start);
        let parts = parts(update.groups, &own, weights);
        let [first_moment, second_moment] = update.moments;
        let buffers = training::Update {
            gradient_scale: View::new(update.numbers, FACTOR * ELEMENTS, ELEMENTS),
            parameters: update.parameters,
            gradients: update.gradients,
            moments: [first_moment, second_moment],
            first: update.shard.start,
            halves: &mut weights.values,
            bytes: &mut weights.bytes,
            gammas: &mut weights.gammas,
        };
        Ok(self.ops.update(&update.step, &parts, buffers)?)
    }
}

/// Groups cut where weights of projections begin and end. Both are in the order of the parameters.
fn parts(groups: &[Group], own: &[&Projection], weights: &CudaWeights) -> Vec<UpdatePart> {
    let mut parts = Vec::with_capacity(groups.len() + 2 * own.len());
    for Group { range, weight_decay } in groups {
        let mut at = range.start;
        let mut part = |end, prepared| {
            if at < end {
                parts.push(UpdatePart { range: at..end, weight_decay: *weight_decay, prepared });
                at = end;
            }
        };
        for projection in own.iter().filter(|projection| projection.lies_in(range)) {
            part(projection.weight.start, None);
            let gamma = projection.inner_norm.as_ref().map(|_| projection.index);
            let place = weights.starts[projection.index];
            part(projection.weight.end, Some(Prepared { place, gamma }));
        }
        part(range.end, None);
    }
    parts
}
