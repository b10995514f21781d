//! Sums over the rows of a batch, for gradients of vectors that every token shares.
//!
//! Rows are cut into blocks of a fixed number; each block has a partial sum of its own, and the partial
//! sums are added in the order of the blocks. So the result does not depend on the number of threads.

use crate::pool::{Pool, SharedMut};

/// Rows of a block.
const BLOCK_ROWS: usize = 32;

/// Memory for partial sums. Grows to the largest use.
#[derive(Debug, Default)]
pub struct ColumnScratch(Vec<f32>);

impl ColumnScratch {
    /// Empty scratch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `task(row, partial)` for every row, where `partial`, of the length of `sums`, collects what
    /// the row contributes; then adds all of it to `sums`.
    pub(crate) fn accumulate(
        &mut self,
        pool: &Pool,
        rows: usize,
        sums: &mut [f32],
        task: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let width = sums.len();
        let blocks = rows.div_ceil(BLOCK_ROWS);
        self.accumulate_parts(pool, blocks, blocks, sums, &|block, partials| {
            // SAFETY: each block has its own part.
            let partial = unsafe { partials.slice(block * width, width) };
            for row in block * BLOCK_ROWS..rows.min((block + 1) * BLOCK_ROWS) {
                task(row, partial);
            }
        });
    }

    /// Calls `task(index, partials)` for `tasks` tasks, where `partials` [parts, width of `sums`] is zero
    /// at first and each element belongs to one task; then adds the parts to `sums` in order.
    pub(crate) fn accumulate_parts(
        &mut self,
        pool: &Pool,
        tasks: usize,
        parts: usize,
        sums: &mut [f32],
        task: &(dyn Fn(usize, &SharedMut<f32>) + Sync),
    ) {
        let width = sums.len();
        if width == 0 || parts == 0 {
            return;
        }
        if self.0.len() < parts * width {
            self.0.resize(parts * width, 0.0);
        }
        let partials = &mut self.0[..parts * width];
        partials.fill(0.0);
        let shared = SharedMut::new(partials);
        pool.run(tasks, &|_, index| task(index, &shared));
        for partial in self.0[..parts * width].chunks_exact(width) {
            for (sum, part) in sums.iter_mut().zip(partial) {
                *sum += part;
            }
        }
    }
}
