//! Products of one input, their norms and quantisers, and the head.

use mmfree::engine::TokenScore;
use mmfree::error::{Error, Result};
use mmfree_kernels::cuda::Buffer;
use mmfree_kernels::training::{
    Integers, NormBackward, NormQuantize, Rows, Training, View, ViewMut,
};

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

    pub(super) fn of<'b>(&'b self, rows: Rows<'b>) -> NormQuantize<'b> {
        NormQuantize { rows, outer: self.outer, inner: &self.inner, gamma: &self.gamma }
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
        rows: Rows<'_>,
        len: usize,
        projections: &[&Projection],
        d_outputs: &[View<'_, u16>],
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let quantised = !norms.inner.is_empty();
        if quantised {
            let q = self.operands.iter_mut().take(projections.len());
            let q = q.map(|buffer| ViewMut::new(buffer, 0, len)).collect();
            ops.norm_quantize(norms.of(rows), Integers::Divided, q, Vec::new())?;
        } else if let (Some((weight, eps)), Rows::Plain(x)) = (norms.outer, rows) {
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
        for first in (0..targets.len()).step_by(head.chunk) {
            let rows = head.chunk.min(targets.len() - first);
            let (from, len) = (first * width, rows * width);
            let x = View::new(&x.half, from, len);
            self.chunk_logits(parameters, head, &norms, x, rows)?;
            let gradient =
                backward.is_some().then(|| ViewMut::new(&mut self.d_logits, 0, rows * vocabulary));
            self.ops.cross_entropy(
                View::new(&self.logits, 0, rows * vocabulary),
                quantised.then(|| View::new(&self.factors, 0, rows)),
                targets.rows(first, rows),
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
                    Rows::Plain(x),
                    len,
                    &[projection],
                    &[dz],
                    gradients,
                )?;
                let (full, half) = dx.full_mut()?;
                let backward = NormBackward {
                    norms: norms.of(Rows::Plain(x)),
                    d_products: &[View::new(&self.scratch.d_operands[0], 0, len)],
                    dx: Some(ViewMut::new(full, from, len)),
                    dx_half: ViewMut::new(half, from, len),
                    dh: None,
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
        let (form, len) = (self.form(&[&head.projection]), rows * width);
        let logits = ViewMut::new(&mut self.logits, 0, rows * vocabulary);
        let weights = parameters.weights;
        if head.projection.inner_norm.is_none() {
            let operand = ViewMut::new(&mut self.scratch.operands[0], 0, len);
            let weight = flat_view(parameters.flat, &head.norm.weight);
            self.ops.norm(x, weight, head.norm.eps, operand)?;
            let operand = View::new(&self.scratch.operands[0], 0, len);
            let weight = weights.of(&head.projection);
            return Ok(self.ops.multiply_full(operand, weight, vocabulary, logits)?);
        }
        let len = operand_len(form, len);
        let operand = ViewMut::new(&mut self.scratch.operands[0], 0, len);
        let factors = ViewMut::new(&mut self.factors, 0, rows);
        self.ops.norm_quantize(norms.of(Rows::Plain(x)), form, vec![operand], vec![factors])?;
        let operand = View::new(&self.scratch.operands[0], 0, len);
        match form {
            Integers::Bytes => {
                let trits = weights.bytes_of(&head.projection);
                self.ops.multiply_bytes_full(operand, trits, vocabulary, logits)?;
            }
            _ => {
                let trits = weights.of(&head.projection);
                self.ops.multiply_full(operand, trits, vocabulary, logits)?;
            }
        }
        Ok(())
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
        let ids = targets.read()?;
        let mut greedy = Buffer::zeros(&self.device, head.chunk)?;
        let mut scores = Vec::new();
        for (chunk, ids) in ids.chunks(head.chunk).enumerate() {
            let (first, rows) = (chunk * head.chunk, ids.len());
            let x = View::new(&x.half, first * width, rows * width);
            self.chunk_logits(parameters, head, &norms, x, rows)?;
            self.ops.token_losses(
                View::new(&self.logits, 0, rows * vocabulary),
                quantised.then(|| View::new(&self.factors, 0, rows)),
                targets.rows(first, rows),
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

pub(super) fn swiglu_rows(ab: &CudaTensor) -> Rows<'_> {
    let (values, factors) = ab.scaled_view();
    Rows::Swiglu(values, factors)
}

pub(super) fn norm_gate_rows<'a>(g: &'a CudaTensor, h: &'a CudaTensor) -> Rows<'a> {
    let (values, factors) = g.scaled_view();
    Rows::NormGate(values, factors, h.view())
}

/// The gradient of what the rows of a projection are made of: of x, of [a b], or of g and h.
pub(super) struct RowsGradient<'a> {
    pub(super) first: ViewMut<'a, u16>,
    pub(super) h: Option<ViewMut<'a, u16>>,
}

/// Elements of an operand's buffer that hold `len` integers.
pub(super) fn operand_len(form: Integers, len: usize) -> usize {
    if form == Integers::Bytes { len / 2 } else { len }
}

/// `y = q tᵀ` of integers, rounded to bf16.
pub(super) fn integers(
    ops: &mut Training,
    form: Integers,
    weights: &CudaWeights,
    projection: &Projection,
    q: View<'_, u16>,
    y: ViewMut<'_, u16>,
) -> Result<()> {
    let outputs = projection.outputs;
    match form {
        Integers::Bytes => ops.multiply_bytes(q, weights.bytes_of(projection), outputs, y)?,
        _ => ops.multiply(q, weights.of(projection), outputs, None, y)?,
    }
    Ok(())
}

impl CudaBackend {
    /// How the inputs of ternary projections of one input are written for their products.
    pub(super) fn form(&self, projections: &[&Projection]) -> Integers {
        let bytes = projections.iter().all(|p| self.ops.multiplies_bytes(p.inputs, p.outputs));
        if bytes { Integers::Bytes } else { Integers::Halves }
    }

    /// `output = residual + BitLinear(rows)`, M rows.
    pub(super) fn quantised_residual(
        &mut self,
        weights: &CudaWeights,
        projection: &Projection,
        norms: NormQuantize<'_>,
        residual: &CudaTensor,
        output: &mut CudaTensor,
    ) -> Result<()> {
        let rows = output.len / projection.outputs;
        let len = rows * projection.inputs;
        let form = self.form(&[projection]);
        let len = operand_len(form, len);
        self.ops.norm_quantize(
            norms,
            form,
            vec![ViewMut::new(&mut self.scratch.operands[0], 0, len)],
            vec![ViewMut::new(&mut self.factors, 0, rows)],
        )?;
        let operand = View::new(&self.scratch.operands[0], 0, len);
        self.product.reserve(output.len)?;
        let product = ViewMut::new(&mut self.product, 0, output.len);
        integers(&mut self.ops, form, weights, projection, operand, product)?;
        Ok(self.ops.add_residual(
            residual.view(),
            View::new(&self.product, 0, output.len),
            View::new(&self.factors, 0, rows),
            output.view_mut(),
        )?)
    }

    /// Gradients of [`quantised_residual`](Self::quantised_residual).
    #[allow(clippy::too_many_arguments)]
    pub(super) fn quantised_residual_backward(
        &mut self,
        weights: &CudaWeights,
        projection: &Projection,
        norms: &Norms<'_>,
        rows: Rows<'_>,
        d_output: &CudaTensor,
        d_rows: RowsGradient<'_>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let len = d_output.len / projection.outputs * projection.inputs;
        let d_outputs = [d_output.view()];
        self.scratch.products_backward(
            &mut self.ops,
            weights,
            norms,
            rows,
            len,
            &[projection],
            &d_outputs,
            gradients,
        )?;
        let backward = NormBackward {
            norms: norms.of(rows),
            d_products: &[View::new(&self.scratch.d_operands[0], 0, len)],
            dx: None,
            dx_half: d_rows.first,
            dh: d_rows.h,
            add: false,
            d_weights: &norms.places,
        };
        Ok(self.ops.norm_backward(backward, gradients)?)
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
