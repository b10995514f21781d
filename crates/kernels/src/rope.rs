//! Rotary position embedding, in the arrangement of Llama as Hugging Face stores it: element j of a head
//! is paired with element j + head_size / 2.
//!
//! ```text
//! angle = position · theta^(−2j / head_size)
//! (x_j, x_{j + half}) = (x_j cos − x_{j + half} sin, x_{j + half} cos + x_j sin)
//! ```

use crate::pool::Pool;

/// Cosines and sines of every position and pair, [T, head_size / 2], computed in f64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RopeTable {
    /// T, head_size / 2 and theta.
    key: (usize, usize, f32),
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills the table, unless it holds this already.
    pub fn assign(&mut self, length: usize, head_size: usize, theta: f32) {
        let half = head_size / 2;
        if self.key == (length, half, theta) {
            return;
        }
        self.key = (length, half, theta);
        self.cos.clear();
        self.sin.clear();
        for position in 0..length {
            for j in 0..half {
                let frequency = f64::from(theta).powf(-2.0 * j as f64 / head_size as f64);
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Rotates every head in the first `columns` columns of each row of `x` [B, T, stride] by its position;
    /// backward with `inverse`, which is the gradient.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    pub fn rotate(&self, pool: &Pool, x: &mut [f32], stride: usize, columns: usize, inverse: bool) {
        let (length, half, _) = self.key;
        assert!(columns <= stride && columns.is_multiple_of(2 * half));
        assert!(x.len().is_multiple_of(stride * length), "rows are no whole sequences");
        let sign = if inverse { -1.0 } else { 1.0 };
        pool.for_each_chunk(x, stride, &|_, row, x| {
            let at = row % length * half;
            let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
            for head in x[..columns].chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let sin = sign * sin;
                    (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
                }
            }
        });
    }
}
