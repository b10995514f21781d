//! What is kept on the GPU: activations, token ids, weights as products take them.

use std::ops::Range;
use std::sync::Arc;

use mmfree::error::{Error, Result};
use mmfree_kernels::cuda::{Buffer, Device};
use mmfree_kernels::training::{View, ViewMut};

use crate::backend::{IGNORED, Projection};

/// Activations on the GPU.
#[derive(Debug)]
pub struct CudaTensor {
    pub(super) len: usize,
    pub(super) half: Buffer<u16>,
    /// The values themselves, where they are kept in f32; `half` has them in bf16.
    pub(super) full: Option<Buffer<f32>>,
    /// A factor of each row, for what BitLinear layers write.
    pub(super) factors: Option<Buffer<f32>>,
    /// Whether the factors are those of the values that are there.
    pub(super) scaled: bool,
}

impl CudaTensor {
    pub(super) fn new(device: &Arc<Device>, len: usize, full: bool, rows: usize) -> Result<Self> {
        Ok(Self {
            len,
            half: Buffer::zeros(device, len)?,
            full: if full { Some(Buffer::zeros(device, len)?) } else { None },
            factors: if rows > 0 { Some(Buffer::zeros(device, rows)?) } else { None },
            scaled: false,
        })
    }

    pub(super) fn view(&self) -> View<'_, u16> {
        View::new(&self.half, 0, self.len)
    }

    pub(super) fn view_mut(&mut self) -> ViewMut<'_, u16> {
        self.scaled = false;
        ViewMut::new(&mut self.half, 0, self.len)
    }

    /// The values and what multiplies their rows.
    pub(super) fn scaled_view(&self) -> (View<'_, u16>, Option<View<'_, f32>>) {
        let factors = self.factors.as_ref().filter(|_| self.scaled);
        (self.view(), factors.map(|factors| View::new(factors, 0, factors.len())))
    }

    pub(super) fn full(&self) -> Result<&Buffer<f32>> {
        self.full.as_ref().ok_or_else(|| Error::Invalid("a tensor is not kept in f32".to_owned()))
    }

    pub(super) fn full_mut(&mut self) -> Result<(&mut Buffer<f32>, &mut Buffer<u16>)> {
        match &mut self.full {
            Some(full) => Ok((full, &mut self.half)),
            None => Err(Error::Invalid("a tensor is not kept in f32".to_owned())),
        }
    }
}

/// Token ids on the GPU, and the order in which the rows of each id follow each other.
#[derive(Debug)]
pub struct CudaTokens {
    pub(super) len: usize,
    pub(super) ids: Buffer<u32>,
    pub(super) order: Buffer<u32>,
    pub(super) starts: Buffer<u32>,
    pub(super) distinct: usize,
}

/// Weights of all projections in bf16: trits, or rounded values.
#[derive(Debug)]
pub struct CudaWeights {
    pub(super) values: Buffer<u16>,
    pub(super) starts: Vec<usize>,
    /// γ of each projection.
    pub(super) gammas: Buffer<f32>,
}

impl CudaWeights {
    pub(super) fn of(&self, projection: &Projection) -> View<'_, u16> {
        View::new(&self.values, self.starts[projection.index], projection.weight.len())
    }

    pub(super) fn gamma(&self, projection: &Projection) -> View<'_, f32> {
        View::new(&self.gammas, projection.index, 1)
    }
}

pub(super) fn flat_view<'a>(flat: &'a Buffer<f32>, range: &Range<usize>) -> View<'a, f32> {
    View::new(flat, range.start, range.len())
}

pub(super) fn flat_view_mut<'a>(
    flat: &'a mut Buffer<f32>,
    range: &Range<usize>,
) -> ViewMut<'a, f32> {
    ViewMut::new(flat, range.start, range.len())
}

/// Rows sorted by their token and then by row, and where the rows of each token begin among them; the end behind
/// the last. [`IGNORED`] rows come last and are no token.
pub(super) fn rows_by_token(ids: &[u32]) -> (Vec<u32>, Vec<u32>) {
    // Token and row in one word each: the largest token is IGNORED.
    let mut order: Vec<u64> =
        ids.iter().zip(0..).map(|(&id, row): (_, u64)| u64::from(id) << 32 | row).collect();
    order.sort_unstable();
    let token = |word: u64| (word >> 32) as u32;
    let mut starts = Vec::new();
    let mut last = None;
    let rows = order.partition_point(|&word| token(word) != IGNORED);
    for (at, &word) in order[..rows].iter().enumerate() {
        if last.replace(token(word)) != Some(token(word)) {
            starts.push(at as u32);
        }
    }
    starts.push(rows as u32);
    (order.into_iter().map(|word| word as u32).collect(), starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_token_and_then_by_row() {
        let (order, starts) = rows_by_token(&[7, 2, 7, 0, 2, 7]);
        assert_eq!(order, [3, 1, 4, 0, 2, 5]);
        assert_eq!(starts, [0, 1, 3, 6]);
        let (order, starts) = rows_by_token(&[IGNORED, 5, IGNORED, 5]);
        assert_eq!(order, [1, 3, 0, 2]);
        assert_eq!(starts, [0, 2]);
        assert_eq!(rows_by_token(&[IGNORED]), (vec![0], vec![0]));
        let far = [1 << 23, 4, 1 << 23];
        assert_eq!(rows_by_token(&far), (vec![1, 0, 2], vec![0, 1, 3]));
    }
}
