//! Loss and gradients of a model, written once over the operations of a backend.

mod matmul_free;
mod transformer;

use std::ops::Range;

use mmfree::engine::TokenScore;
use mmfree::error::{Error, Result};

use crate::architecture::Architecture;
use crate::backend::{
    Backend, BatchShape, Head, IGNORED, Memory, Norm, Parameters, Precision, Projection, Update,
};
use crate::parameters::ParameterLayout;

/// How a model is computed. No option changes a bit of the results but `head_chunk`, which changes the
/// order in which the head's gradient is added up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Keep only the input of each block and compute the rest again in the backward pass: about a third
    /// more arithmetic for a fraction of the memory.
    pub recompute: bool,
    /// Tokens whose logits exist at a time.
    pub head_chunk: usize,
    /// In so many blocks, compute the input of the gated linear unit again: the largest of what is kept, for a few
    /// percent more arithmetic. MatMul-free model only; nothing with `recompute`.
    pub recompute_gates: usize,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { recompute: false, head_chunk: 512, recompute_gates: 0 }
    }
}

/// Token ids and what should follow each, both [B, T].
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Ids below V.
    pub ids: &'a [u32],
    /// Ids below V, or [`IGNORED`].
    pub targets: &'a [u32],
}

/// What is done with a part of the gradients that is final.
pub type Done<'a, B, E> =
    dyn FnMut(&mut B, &mut <B as Memory>::Flat, Range<usize>) -> std::result::Result<(), E> + 'a;

/// A model with the memory to train on batches of one shape.
///
/// Parameters belong to the caller. After every change of them but by [`update`](Self::update), and before the first batch,
/// [`update_weights`](Self::update_weights) must be called.
pub struct Model<B: Backend> {
    layout: ParameterLayout,
    /// Its parts, in the order in which their gradients become final.
    parts: Vec<Range<usize>>,
    shape: BatchShape,
    vocab_size: usize,
    projections: Vec<Projection>,
    embeddings: Range<usize>,
    head: Head,
    blocks: Box<dyn Blocks<B>>,
    recompute: bool,
    weights: B::Weights,
    ids: B::Tokens,
    targets: B::Tokens,
    /// The residual stream before each block and after the last, [M, D] each.
    residual: Vec<B::Tensor>,
    /// Its gradient.
    d_residual: B::Tensor,
}

/// The blocks of an architecture, with the activations that their backward pass needs.
trait Blocks<B: Backend> {
    /// What all blocks share, before the first.
    fn begin(&mut self, backend: &mut B, parameters: Parameters<'_, B>) -> Result<()>;

    /// Computes block `layer` and keeps its activations in `slot`. Without `output` the block is only
    /// computed as far as its backward pass needs it.
    fn forward(
        &mut self,
        backend: &mut B,
        parameters: Parameters<'_, B>,
        layer: usize,
        slot: usize,
        x: &B::Tensor,
        output: Option<&mut B::Tensor>,
    ) -> Result<()>;

    /// Turns the gradient of the block's output into that of its input `x`.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &mut self,
        backend: &mut B,
        parameters: Parameters<'_, B>,
        layer: usize,
        slot: usize,
        x: &B::Tensor,
        dx: &mut B::Tensor,
        gradients: &mut B::Flat,
    ) -> Result<()>;

    /// Gradients of what all blocks share, after the first block's.
    fn finish(
        &mut self,
        backend: &mut B,
        parameters: Parameters<'_, B>,
        gradients: &mut B::Flat,
    ) -> Result<()>;
}

impl<B: Backend + 'static> Model<B> {
    /// Plans and allocates everything that batches of `shape` need.
    ///
    /// # Errors
    /// An empty shape, no memory.
    pub fn new(
        backend: &mut B,
        architecture: &Architecture,
        shape: BatchShape,
        options: &ModelOptions,
    ) -> Result<Self> {
        let parts = Parts::allocate(backend, architecture, shape, options)?;
        let layout = architecture.layout();
        Ok(Self {
            shape,
            vocab_size: architecture.vocab_size(),
            embeddings: parts.embeddings,
            head: parts.head,
            blocks: match parts.blocks {
                Kind::MatMulFree(blocks) => Box::new(blocks),
                Kind::Transformer(blocks) => Box::new(blocks),
            },
            recompute: options.recompute,
            weights: parts.weights,
            ids: parts.ids,
            targets: parts.targets,
            residual: parts.residual,
            d_residual: parts.d_residual,
            projections: parts.projections,
            parts: layout.backward_order(architecture.layers()),
            layout,
        })
    }

    /// The layout of parameters and gradients.
    pub fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// B and T of the batches that the model takes.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// Brings the weights that products use up to date with the parameters.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn update_weights(&mut self, backend: &mut B, parameters: &B::Flat) -> Result<()> {
        backend.prepare(&self.projections, parameters, &mut self.weights)
    }

    /// [`update_weights`](Self::update_weights) for the projections whose weights do not all lie in a part of the parameters.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn update_weights_outside(
        &mut self,
        backend: &mut B,
        parameters: &B::Flat,
        part: &Range<usize>,
    ) -> Result<()> {
        for projection in self.projections.iter().filter(|projection| !projection.lies_in(part)) {
            backend.prepare(std::slice::from_ref(projection), parameters, &mut self.weights)?;
        }
        Ok(())
    }

    /// A step of the optimiser, after which the weights of projections are up to date that lie in its shard.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn update(&mut self, backend: &mut B, update: Update<'_, B::Flat>) -> Result<()> {
        backend.update(update, &self.projections, &mut self.weights)
    }

    /// Adds `scale` times the mean cross-entropy of a batch to the loss, and its gradients to
    /// `gradients`. With `scale = 1 / n`, n calls accumulate the gradient of one large batch (of equal
    /// numbers of targets). Does not wait for the device.
    ///
    /// # Errors
    /// A batch of another shape, ids outside the vocabulary, no target at all.
    pub fn accumulate(
        &mut self,
        backend: &mut B,
        parameters: &B::Flat,
        batch: Batch<'_>,
        scale: f32,
        gradients: &mut B::Flat,
    ) -> Result<()> {
        let nothing = &mut |_: &mut B, _: &mut B::Flat, _| Ok(());
        self.accumulate_in_parts(backend, parameters, batch, scale, gradients, nothing)
    }

    /// [`accumulate`](Self::accumulate), which calls `done` with each part of the gradients as soon as it is final: the
    /// parts of [`ParameterLayout::backward_order`], one after the other.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate), and those of `done`.
    pub fn accumulate_in_parts<E: From<Error>>(
        &mut self,
        backend: &mut B,
        parameters: &B::Flat,
        batch: Batch<'_>,
        scale: f32,
        gradients: &mut B::Flat,
        done: &mut Done<'_, B, E>,
    ) -> std::result::Result<(), E> {
        let scale = self.load(backend, batch, scale)?;
        self.forward(backend, parameters)?;
        let parameters = Parameters { flat: parameters, weights: &self.weights };
        let (last, blocks) = (self.residual.len() - 1, &mut self.blocks);
        let mut parts = self.parts.iter().cloned();
        let mut next = |backend: &mut B, gradients: &mut B::Flat| match parts.next() {
            Some(part) => done(backend, gradients, part),
            None => Ok(()),
        };
        backend.cross_entropy_backward(
            parameters,
            &self.head,
            &self.residual[last],
            &self.targets,
            scale,
            &mut self.d_residual,
            gradients,
        )?;
        next(backend, gradients)?;
        for layer in (0..last).rev() {
            let x = &self.residual[layer];
            let slot = if self.recompute { 0 } else { layer };
            if self.recompute && layer + 1 < last {
                blocks.forward(backend, parameters, layer, slot, x, None)?;
            }
            let dx = &mut self.d_residual;
            blocks.backward(backend, parameters, layer, slot, x, dx, gradients)?;
            next(backend, gradients)?;
        }
        blocks.finish(backend, parameters, gradients)?;
        let table = self.embeddings.clone();
        backend.embed_backward(&self.ids, &self.d_residual, table, gradients)?;
        next(backend, gradients)
    }

    /// Adds `scale` times the mean cross-entropy of a batch to the loss. Does not wait for the device.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate).
    pub fn evaluate(
        &mut self,
        backend: &mut B,
        parameters: &B::Flat,
        batch: Batch<'_>,
        scale: f32,
    ) -> Result<()> {
        let scale = self.load(backend, batch, scale)?;
        self.forward(backend, parameters)?;
        let parameters = Parameters { flat: parameters, weights: &self.weights };
        let last = &self.residual[self.residual.len() - 1];
        backend.cross_entropy(parameters, &self.head, last, &self.targets, scale)
    }

    /// What the model thinks of each target of a batch that is not [`IGNORED`], in order.
    /// Waits for the device.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate); logits that are not finite.
    pub fn token_scores(
        &mut self,
        backend: &mut B,
        parameters: &B::Flat,
        batch: Batch<'_>,
    ) -> Result<Vec<TokenScore>> {
        self.load(backend, batch, 1.0)?;
        self.forward(backend, parameters)?;
        let parameters = Parameters { flat: parameters, weights: &self.weights };
        let last = &self.residual[self.residual.len() - 1];
        let scores = backend.token_scores(parameters, &self.head, last, &self.targets)?;
        if scores.iter().all(|score| score.log_likelihood.is_finite()) {
            return Ok(scores);
        }
        Err(Error::Invalid(
            "the model produced logits that are not finite; its weights are damaged or diverged"
                .to_owned(),
        ))
    }

    /// The loss that was added up since the last call. Waits for the device.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn take_loss(&mut self, backend: &mut B) -> Result<f64> {
        backend.take_loss()
    }

    /// Checks a batch and brings it to the device; returns the factor of each target's cross-entropy.
    fn load(&mut self, backend: &mut B, batch: Batch<'_>, scale: f32) -> Result<f32> {
        let expected = self.shape.tokens();
        for (what, found) in [("ids", batch.ids.len()), ("targets", batch.targets.len())] {
            if found != expected {
                return Err(Error::Invalid(format!(
                    "{found} {what}, expected {} sequences of {}",
                    self.shape.sequences, self.shape.length
                )));
            }
        }
        let outside = |id: &&u32| **id as usize >= self.vocab_size;
        let targets = || batch.targets.iter().filter(|&&id| id != IGNORED);
        if let Some(&id) = batch.ids.iter().find(outside).or_else(|| targets().find(outside)) {
            return Err(Error::TokenId { id, vocab_size: self.vocab_size });
        }
        let count = targets().count();
        if count == 0 {
            return Err(Error::Invalid("the batch has no target: no loss is defined".to_owned()));
        }
        backend.write_tokens(&mut self.ids, batch.ids)?;
        backend.write_targets(&mut self.targets, batch.targets)?;
        Ok((f64::from(scale) / count as f64) as f32)
    }

    /// Fills the residual stream and the activations.
    fn forward(&mut self, backend: &mut B, parameters: &B::Flat) -> Result<()> {
        let parameters = Parameters { flat: parameters, weights: &self.weights };
        let table = self.embeddings.clone();
        backend.embed(parameters.flat, table, &self.ids, &mut self.residual[0])?;
        self.blocks.begin(backend, parameters)?;
        for layer in 0..self.residual.len() - 1 {
            let (before, after) = self.residual.split_at_mut(layer + 1);
            let slot = if self.recompute { 0 } else { layer };
            let output = Some(&mut after[0]);
            self.blocks.forward(backend, parameters, layer, slot, &before[layer], output)?;
        }
        Ok(())
    }
}

/// What a model allocates.
struct Parts<M: Memory> {
    blocks: Kind<M>,
    projections: Vec<Projection>,
    embeddings: Range<usize>,
    head: Head,
    weights: M::Weights,
    ids: M::Tokens,
    targets: M::Tokens,
    residual: Vec<M::Tensor>,
    d_residual: M::Tensor,
}

enum Kind<M: Memory> {
    MatMulFree(matmul_free::MatMulFree<M>),
    Transformer(transformer::Transformer<M>),
}

impl<M: Memory> Parts<M> {
    fn allocate(
        memory: &mut M,
        architecture: &Architecture,
        shape: BatchShape,
        options: &ModelOptions,
    ) -> Result<Self> {
        if shape.sequences == 0 || shape.length == 0 || options.head_chunk == 0 {
            return Err(Error::Invalid(format!(
                "a batch of {} x {} tokens with logits of {} at a time: all must be at least 1",
                shape.sequences, shape.length, options.head_chunk
            )));
        }
        let layout = architecture.layout();
        let slots = if options.recompute { 1 } else { architecture.layers() };
        let gates = if options.recompute { 0 } else { options.recompute_gates };
        let mut builder = Builder { layout: &layout, projections: Vec::new() };
        let names = &mut builder;
        let (blocks, attention, width, eps, embeddings) = match architecture {
            Architecture::MatMulFree(config) => {
                let blocks =
                    matmul_free::MatMulFree::new(memory, names, config, shape, slots, gates)?;
                let embeddings = layout.range("model.embeddings.weight");
                let (width, eps) = (config.hidden_size, config.rms_norm_eps);
                (Kind::MatMulFree(blocks), None, width, eps, embeddings)
            }
            Architecture::Transformer(config) => {
                let blocks = transformer::Transformer::new(memory, names, config, shape, slots)?;
                let embeddings = layout.range("model.embed_tokens.weight");
                let (width, eps) = (config.hidden_size, config.rms_norm_eps);
                let attention = Some(blocks.attention());
                (Kind::Transformer(blocks), attention, width, eps, embeddings)
            }
        };
        let head = Head {
            norm: builder.norm("model.norm", eps),
            projection: match architecture {
                Architecture::MatMulFree(_) => builder.bit_linear("lm_head"),
                Architecture::Transformer(_) => builder.linear(&["lm_head"]),
            },
            chunk: options.head_chunk.min(shape.tokens()),
        };
        let projections = builder.projections;
        let stream = shape.tokens() * width;
        memory.reserve(&projections, shape, &head, attention)?;
        Ok(Self {
            weights: memory.weights(&projections)?,
            ids: memory.tokens(shape.tokens())?,
            targets: memory.tokens(shape.tokens())?,
            residual: (0..=architecture.layers())
                .map(|_| memory.tensor(stream, Precision::Activation))
                .collect::<Result<_>>()?,
            d_residual: memory.tensor(stream, Precision::Full)?,
            blocks,
            projections,
            embeddings,
            head,
        })
    }
}

/// Counts what [`Model::new`] would allocate.
///
/// # Errors
/// An empty shape.
pub fn plan<M: Memory>(
    memory: &mut M,
    architecture: &Architecture,
    shape: BatchShape,
    options: &ModelOptions,
) -> Result<()> {
    Parts::allocate(memory, architecture, shape, options).map(drop)
}

/// Finds parameters by name and numbers projections.
struct Builder<'a> {
    layout: &'a ParameterLayout,
    projections: Vec<Projection>,
}

impl Builder<'_> {
    fn norm(&self, name: &str, eps: f32) -> Norm {
        Norm { weight: self.layout.range(&format!("{name}.weight")), eps }
    }

    /// A ternary layer with its inner norm.
    fn bit_linear(&mut self, name: &str) -> Projection {
        let inner_norm = Some(self.layout.range(&format!("{name}.norm.weight")));
        self.projection(&[name], inner_norm)
    }

    /// A full-precision layer: several matrices that follow each other in the layout are one.
    fn linear(&mut self, names: &[&str]) -> Projection {
        self.projection(names, None)
    }

    fn projection(&mut self, names: &[&str], inner_norm: Option<Range<usize>>) -> Projection {
        let parameter = |name: &str| {
            let name = format!("{name}.weight");
            self.layout.get(&name).unwrap_or_else(|| panic!("no parameter {name}"))
        };
        let (first, last) = (parameter(names[0]), parameter(names[names.len() - 1]));
        let weight = first.range.start..last.range.end;
        let inputs = first.shape[1];
        let outputs = names.iter().map(|name| parameter(name).shape[0]).sum();
        assert_eq!(weight.len(), inputs * outputs, "matrices do not follow each other");
        let index = self.projections.len();
        let projection = Projection { weight, outputs, inputs, inner_norm, index };
        self.projections.push(projection.clone());
        projection
    }
}
