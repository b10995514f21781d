//! The embedding table: rows by token, and their gradients.

use crate::pool::{Pool, SharedMut};

/// Columns of one task of the backward pass: a cache line or a few.
const TASK_COLS: usize = 64;

/// `x[m] = table[tokens[m]]`: table [V, D], x [M, D].
///
/// # Panics
/// If the shapes do not fit together or a token is outside the table.
pub fn forward(pool: &Pool, table: &[f32], tokens: &[u32], x: &mut [f32]) {
    if tokens.is_empty() {
        return;
    }
    assert!(x.len().is_multiple_of(tokens.len()), "outputs are no whole rows");
    let width = x.len() / tokens.len();
    pool.for_each_chunk(x, width, &|_, row, x| {
        x.copy_from_slice(&table[tokens[row] as usize * width..][..width]);
    });
}

/// **Adds** to the table's gradient: `d_table[tokens[m]] += dx[m]`, in the order of m.
///
/// # Panics
/// If the shapes do not fit together or a token is outside the table.
pub fn backward(pool: &Pool, tokens: &[u32], dx: &[f32], d_table: &mut [f32]) {
    if tokens.is_empty() {
        return;
    }
    assert!(dx.len().is_multiple_of(tokens.len()), "gradients are no whole rows");
    let width = dx.len() / tokens.len();
    let d_table = SharedMut::new(d_table);
    // Tokens repeat, so tasks share the columns, not the tokens.
    pool.run(width.div_ceil(TASK_COLS), &|_, task| {
        let first = task * TASK_COLS;
        let cols = TASK_COLS.min(width - first);
        for (&token, dx) in tokens.iter().zip(dx.chunks_exact(width)) {
            // SAFETY: tasks have disjoint columns, and the table stays borrowed until all are done.
            let row = unsafe { d_table.slice(token as usize * width + first, cols) };
            for (sum, dx) in row.iter_mut().zip(&dx[first..]) {
                *sum += dx;
            }
        }
    });
}
