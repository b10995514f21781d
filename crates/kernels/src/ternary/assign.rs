//! Quantising full-precision weights in place, once a training step.

use super::{Layout, PANEL_ROWS, TernaryError, TernaryMatrix, WORD_TRITS, absmean_scale, bit_of};
use crate::pool::Pool;
use crate::tier::{Backend, compiled_for_each_tier};

impl TernaryMatrix {
    /// Becomes the quantised form of full-precision weights [N, K], row-major, in place: what
    /// `absmean_scale` and the quantiser of trits give.
    ///
    /// # Errors
    /// A wrong number of weights, a weight that is NaN or infinite; the matrix is then unchanged.
    ///
    /// # Panics
    /// If the matrix does not have two bits a trit.
    pub fn assign(
        &mut self,
        backend: Backend,
        pool: &Pool,
        weights: &[f32],
    ) -> Result<(), TernaryError> {
        assert!(self.layout == Layout::TwoBit, "{:?} cannot be assigned to", self.layout);
        let (rows, cols, units) = (self.rows, self.cols, self.units());
        if weights.len() != rows * cols {
            let (expected, found) = (rows * cols, weights.len());
            return Err(TernaryError::Length { what: "weights", expected, found });
        }
        self.scale = shared_absmean_scale(backend, pool, weights)?;
        let inverse = 1.0 / self.scale;
        let words: &mut [u32] = bytemuck::cast_slice_mut(self.storage.bytes_mut());
        pool.for_each_chunk(words, units * PANEL_ROWS, &|_, panel, words| {
            let first = panel * PANEL_ROWS;
            for lane in 0..PANEL_ROWS.min(rows - first) {
                let weights = &weights[(first + lane) * cols..][..cols];
                encode_row(backend, weights, inverse, &mut words[lane..]);
            }
        });
        Ok(())
    }
}

/// [`absmean_scale`] on all threads, in an order that depends on the number of weights alone.
fn shared_absmean_scale(
    backend: Backend,
    pool: &Pool,
    weights: &[f32],
) -> Result<f32, TernaryError> {
    const TASK: usize = 1 << 14;
    let mut sums = vec![0.0f64; weights.len().div_ceil(TASK)];
    pool.for_each_chunk(&mut sums, 1, &|_, task, sum| {
        let from = task * TASK;
        sum[0] = sum_of_magnitudes(backend, &weights[from..weights.len().min(from + TASK)]);
    });
    let sum: f64 = sums.into_iter().sum();
    if sum.is_finite() {
        Ok(((sum / weights.len().max(1) as f64) as f32).max(1e-5))
    } else {
        absmean_scale(weights)
    }
}

compiled_for_each_tier! {
    fn sum_of_magnitudes(weights: &[f32]) -> f64 = sum_of_magnitudes_body
}

#[inline(always)]
fn sum_of_magnitudes_body(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    for chunk in weights.chunks(lanes.len()) {
        for (lane, w) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(w.abs());
        }
    }
    lanes.into_iter().sum()
}

compiled_for_each_tier! {
    /// Quantises a row into every sixteenth word.
    fn encode_row(weights: &[f32], inverse: f32, words: &mut [u32]) = encode_row_body
}

#[inline(always)]
fn encode_row_body(weights: &[f32], inverse: f32, words: &mut [u32]) {
    let encode = |weights: &[f32; WORD_TRITS]| {
        let mut word = 0;
        for (k, &w) in weights.iter().enumerate() {
            let scaled = w * inverse;
            word |= (1 + u32::from(scaled > 0.5) - u32::from(scaled < -0.5)) << bit_of(k);
        }
        word
    };
    let (groups, rest) = weights.as_chunks();
    let mut words = words.iter_mut().step_by(PANEL_ROWS);
    for (group, word) in groups.iter().zip(&mut words) {
        *word = encode(group);
    }
    if let Some(word) = words.next()
        && !rest.is_empty()
    {
        let mut padded = [0.0; WORD_TRITS];
        padded[..rest.len()].copy_from_slice(rest);
        *word = encode(&padded);
    }
}
