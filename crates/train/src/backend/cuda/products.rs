//! Products of one input, their norms and quantisers, and the head.

use mmfree::engine::TokenScore;
use mmfree::error::{Error, Result};
use mmfree_kernels::cuda::Buffer;
use mmfree_kernels::training::{NormBackward, NormQuantize, Training, View, ViewMut};

use super::tensors::{CudaTensor, CudaTokens, CudaWeights, flat_view, flat_view_mut};
use super::{CudaBackend, MAX_SHARED};
use crate::backend::{Head, IGNORED, Norm, Parameters, Projection};

/// Inputs of products [M, K], and their gradients.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) operands: [Buffer<u16>; MAX_SHARED],
    pub(super) d_operands: [Buffer<u16>; MAX_SHARED],
}

/// Norms before projections, as the kernels take them.
pub(super) struct Norms<'a> {
    pub(super) outer: Option<(View<'a, f32>, f32)>,
    pub(super) inner: Vec<View<'a, f32>>,
    pub(super) gamma: Vec<View<'a, f32>>,
    /// Places of the norms' weights.
    pub(super) places: Vec<usize>,
}

impl<'a> Norms<'a> {
    pub(super) fn new(
        parameters: Parameters<'a, CudaBackend>,
        outer: Option<&Norm>,
        projections: &[&Projection],
    ) -> Self {
        let inner: Vec<_> = projections.iter().filter_map(|p| p.inner_norm.as_ref()).collect();
        let quantised = projections.iter().filter(|p| p.inner_norm.is_some());
        let places = inner.iter().map(|range| range.start);
        Self {
            places: places.chain(outer.map(|norm| norm.weight.start)).collect(),
            outer: outer.map(|norm| (flat_view(parameters.flat, &norm.weight), norm.eps)),
            inner: inner.iter().map(|range| flat_view(parameters.flat, range)).collect(),
            gamma: quantised.map(|p| parameters.weights.gamma(p)).collect(),
        }
    }

    pub(super) fn of<'b>(&'b self, x: View<'b, u16>) -> NormQuantize<'b> {
        NormQuantize { x, outer: self.outer, inner: &self.inner, gamma: &self.gamma }
    }
}

impl Scratch {
    /// Gradients of the weights of projections of one input, and of what the products take, in `d_operands`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn products_backward(
        &mut self,
        ops: &mut Training,
        weights: &CudaWeights,
        norms: &Norms<'_>,
        x: View<'_, u16>,
        len: usize,
        projections: &[&Projection],
        d_outputs: &[View<'_, u16>],
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let quantised = !norms.inner.is_empty();
        if quantised {
            let q = self.operands.iter_mut().take(projections.len());
            let q = q.map(|buffer| ViewMut::new(buffer, 0, len)).collect();
            ops.norm_quantize(norms.of(x), q, None)?;
        } else if let Some((weight, eps)) = norms.outer {
            ops.norm(x, weight, eps, ViewMut::new(&mut self.operands[0], 0, len))?;
        }
        for (j, (projection, dy)) in projections.iter().zip(d_outputs).enumerate() {
            let input = View::new(&self.operands[if quantised { j } else { 0 }], 0, len);
            let gradient = flat_view_mut(gradients, &projection.weight);
            ops.multiply_weights(*dy, input, projection.outputs, gradient)?;
            let into = &mut self.d_operands[if quantised { j } else { 0 }];
            let (into, add) = (ViewMut::new(into, 0, len), !quantised && j > 0);
            let weight = weights.of(projection);
            ops.multiply_inputs(*dy, weight, projection.outputs, add, into)?;
        }
        Ok(())
    }
}

impl CudaBackend {
    /// The head over chunks of tokens; with `gradients` also its backward pass.
    pub(super) fn head(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &CudaTensor,
        targets: &CudaTokens,
        scale: f32,
        mut backward: Option<(&mut CudaTensor, &mut Buffer<f32>)>,
    ) -> Result<()> {
        let projection = &head.projection;
        let (width, vocabulary) = (projection.inputs, projection.outputs);
        let norms = Norms::new(parameters, Some(&head.norm), &[projection]);
        let quantised = projection.inner_norm.is_some();
        for first in (0..targets.len).step_by(head.chunk) {
            let rows = head.chunk.min(targets.len - first);
            let (from, len) = (first * width, rows * width);
            let x = View::new(&x.half, from, len);
            self.chunk_logits(parameters, head, &norms, x, rows)?;
            let gradient =
                backward.is_some().then(|| ViewMut::new(&mut self.d_logits, 0, rows * vocabulary));
            self.ops.cross_entropy(
                View::new(&self.logits, 0, rows * vocabulary),
                quantised.then(|| View::new(&self.factors, 0, rows)),
                View::new(&targets.ids, first, rows),
                scale,
                gradient,
                ViewMut::new(&mut self.losses, 0, rows),
                ViewMut::new(&mut self.loss, 0, 1),
            )?;
            if let Some((dx, gradients)) = &mut backward {
                let dz = View::new(&self.d_logits, 0, rows * vocabulary);
                self.scratch.products_backward(
                    &mut self.ops,
                    parameters.weights,
                    &norms,
                    x,
                    len,
                    &[projection],
                    &[dz],
                    gradients,
                )?;
                let (full, half) = dx.full_mut()?;
                let backward = NormBackward {
                    norms: norms.of(x),
                    d_products: &[View::new(&self.scratch.d_operands[0], 0, len)],
                    dx: Some(ViewMut::new(full, from, len)),
                    dx_half: ViewMut::new(half, from, len),
                    add: false,
                    d_weights: &norms.places,
                };
                self.ops.norm_backward(backward, gradients)?;
            }
        }
        Ok(())
    }

    /// The logits of some tokens, in `logits`, and their rows' factors if the head is ternary.
    fn chunk_logits(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        norms: &Norms<'_>,
        x: View<'_, u16>,
        rows: usize,
    ) -> Result<()> {
        let Projection { inputs: width, outputs: vocabulary, .. } = head.projection;
        let len = rows * width;
        let operand = ViewMut::new(&mut self.scratch.operands[0], 0, len);
        if head.projection.inner_norm.is_some() {
            let factors = ViewMut::new(&mut self.factors, 0, rows);
            self.ops.norm_quantize(norms.of(x), vec![operand], Some(vec![factors]))?;
        } else {
            let weight = flat_view(parameters.flat, &head.norm.weight);
            self.ops.norm(x, weight, head.norm.eps, operand)?;
        }
        let logits = ViewMut::new(&mut self.logits, 0, rows * vocabulary);
        let operand = View::new(&self.scratch.operands[0], 0, len);
        let weight = parameters.weights.of(&head.projection);
        Ok(self.ops.multiply_full(operand, weight, vocabulary, logits)?)
    }

    /// Scores of the tokens that have a target.
    pub(super) fn scores(
        &mut self,
        parameters: Parameters<'_, Self>,
        head: &Head,
        x: &CudaTensor,
        targets: &CudaTokens,
    ) -> Result<Vec<TokenScore>> {
        let (width, vocabulary) = (head.projection.inputs, head.projection.outputs);
        let norms = Norms::new(parameters, Some(&head.norm), &[&head.projection]);
        let quantised = head.projection.inner_norm.is_some();
        let mut ids = vec![0; targets.len];
        targets.ids.read(0, &mut ids)?;
        let mut greedy = Buffer::zeros(&self.device, head.chunk)?;
        let mut scores = Vec::new();
        for (chunk, ids) in ids.chunks(head.chunk).enumerate() {
            let (first, rows) = (chunk * head.chunk, ids.len());
            let x = View::new(&x.half, first * width, rows * width);
            self.chunk_logits(parameters, head, &norms, x, rows)?;
            self.ops.token_losses(
                View::new(&self.logits, 0, rows * vocabulary),
                quantised.then(|| View::new(&self.factors, 0, rows)),
                View::new(&targets.ids, first, rows),
                ViewMut::new(&mut self.losses, 0, rows),
                ViewMut::new(&mut greedy, 0, rows),
            )?;
            let (mut losses, mut flags) = (vec![0.0; rows], vec![0; rows]);
            self.losses.read(0, &mut losses)?;
            greedy.read(0, &mut flags)?;
            let rows = ids.iter().zip(losses).zip(flags).filter(|((id, _), _)| **id != IGNORED);
            scores.extend(rows.map(|((_, loss), greedy)| TokenScore {
                log_likelihood: -loss,
                is_greedy: greedy == 1,
            }));
        }
        Ok(scores)
    }
}

/// Projections of one input are all BitLinear or all plain.
pub(super) fn check_kinds(projections: &[&Projection]) -> Result<()> {
    let quantised = projections.iter().filter(|p| p.inner_norm.is_some()).count();
    if projections.is_empty()
        || projections.len() > MAX_SHARED
        || (quantised != 0 && quantised != projections.len())
    {
        return Err(Error::Invalid(format!(
            "{} projections of one input, {quantised} of them ternary: expected 1 to {MAX_SHARED} of one kind",
            projections.len()
        )));
    }
    Ok(())
}
