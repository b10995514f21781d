//! What is kept on the GPU: activations, token ids, weights as products take them.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use mmfree::error::{Error, Result};
use mmfree_kernels::cuda::{Buffer, CudaError, Device, Pinned};
use mmfree_kernels::training::{View, ViewMut};

use crate::backend::numbers::ELEMENTS;
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

    /// Sets the values from the host, for tests and tools.
    ///
    /// # Errors
    /// Another length; the driver's.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        if values.len() != self.len {
            let what = format!("{} values for a tensor of {}", values.len(), self.len);
            return Err(Error::Invalid(what));
        }
        let halves: Vec<u16> =
            values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
        self.half.write(0, &halves)?;
        self.scaled = false;
        if let Some(full) = &mut self.full {
            full.write(0, values)?;
        }
        Ok(())
    }

    /// The values, rows times their factors, on the host. Waits for the device.
    pub(super) fn read(&self, values: &mut [f32]) -> Result<()> {
        if let Some(full) = &self.full {
            return Ok(full.read(0, values)?);
        }
        let mut halves = vec![0; values.len()];
        self.half.read(0, &mut halves)?;
        values
            .iter_mut()
            .zip(&halves)
            .for_each(|(value, &bits)| *value = bf16::from_bits(bits).to_f32());
        if let (Some(buffer), true) = (&self.factors, self.scaled) {
            let mut factors = vec![0.0; buffer.len()];
            buffer.read(0, &mut factors)?;
            let width = (values.len() / factors.len()).max(1);
            for (row, factor) in values.chunks_mut(width).zip(&factors) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
        }
        Ok(())
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
    len: usize,
    /// Ids, their order, and where the rows of each distinct one begin in it.
    values: Buffer<u32>,
    distinct: usize,
    /// The same on the host, in turns: the device copies one while the other one is filled.
    staged: [Pinned<u32>; 2],
    turn: usize,
}

impl CudaTokens {
    pub(super) fn new(device: &Arc<Device>, len: usize) -> Result<Self> {
        let all = 3 * len + 1;
        Ok(Self {
            len,
            values: Buffer::zeros(device, all)?,
            distinct: 0,
            staged: [Pinned::zeros(device, all)?, Pinned::zeros(device, all)?],
            turn: 0,
        })
    }

    /// Whether the memory of the host that comes next may be filled.
    pub(super) fn is_free(&self) -> std::result::Result<bool, CudaError> {
        self.staged[self.turn].is_done()
    }

    /// Sets ids, and their order and starts as [`rows_by_token`] has them if they are needed.
    pub(super) fn write(
        &mut self,
        ids: &[u32],
        sorted: Option<(Vec<u32>, Vec<u32>)>,
    ) -> Result<()> {
        if ids.len() != self.len {
            return Err(Error::Invalid(format!("{} ids for {}", ids.len(), self.len)));
        }
        let (order, starts) = sorted.unwrap_or_default();
        self.distinct = starts.len().saturating_sub(1);
        let staged = &mut self.staged[self.turn];
        self.turn = 1 - self.turn;
        let (memory, mut end) = (staged.wait()?, 0);
        for part in [ids, &order, &starts] {
            memory[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        Ok(staged.send(end, &mut self.values)?)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn ids(&self) -> View<'_, u32> {
        self.rows(0, self.len)
    }

    /// The ids of some rows.
    pub(super) fn rows(&self, first: usize, rows: usize) -> View<'_, u32> {
        View::new(&self.values, first, rows)
    }

    pub(super) fn order(&self) -> View<'_, u32> {
        View::new(&self.values, self.len, self.len)
    }

    pub(super) fn starts(&self) -> View<'_, u32> {
        View::new(&self.values, 2 * self.len, self.distinct + 1)
    }

    /// The ids, on the host. Waits for the device.
    pub(super) fn read(&self) -> Result<Vec<u32>> {
        let mut ids = vec![0; self.len];
        self.values.read(0, &mut ids)?;
        Ok(ids)
    }
}

/// Weights of all projections in bf16: trits, or rounded values.
#[derive(Debug)]
pub struct CudaWeights {
    pub(super) values: Buffer<u16>,
    /// Trits once more, a byte each, if there are any.
    pub(super) bytes: Buffer<u16>,
    pub(super) starts: Vec<usize>,
    /// γ of each projection.
    pub(super) gammas: Buffer<f32>,
}

impl CudaWeights {
    pub(super) fn of(&self, projection: &Projection) -> View<'_, u16> {
        View::new(&self.values, self.starts[projection.index], projection.weight.len())
    }

    /// Place of a projection's trits in `bytes`, and how many elements they take.
    pub(super) fn byte_place(&self, projection: &Projection) -> (usize, usize) {
        (self.starts[projection.index] / 2, projection.weight.len().div_ceil(2))
    }

    pub(super) fn bytes_of(&self, projection: &Projection) -> View<'_, u16> {
        let (start, len) = self.byte_place(projection);
        View::new(&self.bytes, start, len)
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

/// So many [`numbers`](crate::backend::numbers) from number `at` on.
pub(super) fn numbers_mut(flat: &mut Buffer<f32>, at: usize, count: usize) -> ViewMut<'_, f32> {
    ViewMut::new(flat, at * ELEMENTS, count * ELEMENTS)
}

/// Rows sorted by their token and then by row, and where the rows of each token begin among them; the end behind
/// the last. [`IGNORED`] rows come last and are no token.
pub(super) fn rows_by_token(ids: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let known = |id: u32| (id != IGNORED).then_some(id as usize);
    // Counted, not compared: where each token's rows begin, then each row behind those before it.
    let bound = ids.iter().filter_map(|&id| known(id)).max().map_or(0, |id| id + 1);
    let mut places = vec![0u32; bound + 1];
    ids.iter().for_each(|&id| places[known(id).unwrap_or(bound)] += 1);
    let (mut starts, mut end) = (Vec::new(), 0);
    for (token, place) in places.iter_mut().enumerate() {
        let count = std::mem::replace(place, end);
        if count > 0 || token == bound {
            starts.push(end);
        }
        end += count;
    }
    let mut order = vec![0; ids.len()];
    for (row, &id) in (0..).zip(ids) {
        let place = &mut places[known(id).unwrap_or(bound)];
        order[*place as usize] = row;
        *place += 1;
    }
    (order, starts)
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
