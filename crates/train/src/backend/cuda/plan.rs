//! How much memory training takes, without a device.

use mmfree::error::Result;
use mmfree_kernels::training::Reserve;

use super::MAX_SHARED;
use crate::backend::{AttentionShape, BatchShape, Head, Memory, Precision, Projection};

/// Weights of a projection begin at multiples of so many elements, as fast products want it.
const WEIGHT_ALIGNMENT: usize = 128;

/// Elements of the scratch buffers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lengths {
    pub operands: [usize; MAX_SHARED],
    pub product: usize,
    pub factors: usize,
    pub logits: usize,
    pub losses: usize,
    pub operations: Reserve,
}

impl Lengths {
    pub fn new(
        projections: &[Projection],
        shape: BatchShape,
        head: &Head,
        attention: Option<AttentionShape>,
    ) -> Self {
        let (tokens, width) = (shape.tokens(), head.projection.inputs);
        let blocks = || projections.iter().filter(|p| p.index != head.projection.index);
        let widest = blocks().map(|p| p.inputs).max().unwrap_or(width).max(width);
        // Only layers on the residual stream share an input, and only BitLinear layers need one each.
        let shared = if blocks().any(|p| p.inner_norm.is_some()) { tokens * width } else { 1 };
        let mut operands = [shared; MAX_SHARED];
        operands[0] = tokens * widest;
        Self {
            operands,
            product: tokens * width,
            factors: tokens,
            logits: head.chunk * head.projection.outputs,
            losses: head.chunk,
            operations: Reserve {
                width: widest,
                sequences: shape.sequences,
                length: shape.length,
                heads: attention.map(|shape| (shape.heads, shape.head_size)),
            },
        }
    }

    fn bytes(&self) -> usize {
        // Operands and their gradients, the product and the gradient of logits are bf16, losses f64.
        let halves = 2 * self.operands.iter().sum::<usize>() + self.product + self.logits;
        2 * halves + 4 * (self.factors + self.logits) + 8 * self.losses + self.operations.bytes()
    }
}

/// Where the weights of each projection begin among all, and how many elements these have.
pub(super) fn weight_places(projections: &[Projection]) -> (Vec<usize>, usize) {
    let mut end = 0;
    let starts = projections
        .iter()
        .map(|projection| {
            let start = end;
            end += projection.weight.len().next_multiple_of(WEIGHT_ALIGNMENT);
            start
        })
        .collect();
    (starts, end)
}

/// Elements of two bytes that take the trits of all projections once more, a byte each.
pub(super) fn byte_elements(projections: &[Projection]) -> usize {
    let ternary = projections.iter().any(|projection| projection.inner_norm.is_some());
    if ternary { weight_places(projections).1 / 2 } else { 0 }
}

/// Counts the bytes that a model would take on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaPlan {
    /// Parameters, gradients, moments, and the weights as products take them.
    pub weights: usize,
    /// What the backward pass needs, and its own tensors.
    pub activations: usize,
    /// Scratch memory of the operations.
    pub scratch: usize,
}

impl CudaPlan {
    /// All of it.
    pub fn bytes(&self) -> usize {
        self.weights + self.activations + self.scratch
    }
}

impl Memory for CudaPlan {
    type Flat = ();
    type Tensor = ();
    type Tokens = ();
    type Weights = ();
    type HostCopy = ();

    fn flat_zeros(&mut self, len: usize) -> Result<()> {
        self.weights += 4 * len;
        Ok(())
    }

    fn host_copy(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn tensor(&mut self, len: usize, precision: Precision) -> Result<()> {
        self.activations += if precision == Precision::Full { 6 * len } else { 2 * len };
        Ok(())
    }

    fn product_tensor(&mut self, rows: usize, width: usize) -> Result<()> {
        self.activations += 2 * rows * width + 4 * rows;
        Ok(())
    }

    fn clear(&mut self, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn tokens(&mut self, len: usize) -> Result<()> {
        self.activations += 4 * (3 * len + 1);
        Ok(())
    }

    fn weights(&mut self, projections: &[Projection]) -> Result<()> {
        let elements = weight_places(projections).1 + byte_elements(projections);
        self.weights += 2 * elements + 4 * projections.len();
        Ok(())
    }

    fn reserve(
        &mut self,
        projections: &[Projection],
        shape: BatchShape,
        head: &Head,
        attention: Option<AttentionShape>,
    ) -> Result<()> {
        self.scratch += Lengths::new(projections, shape, head, attention).bytes();
        Ok(())
    }
}
