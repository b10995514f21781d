//! How kernels take rows, and sums over rows.

use super::{NORMS, THREADS, Training};
use crate::cuda::{CudaError, Launch};

/// Blocks of kernels that sum over rows: fixed, so that the order of sums does not depend on the GPU.
pub(super) const ROW_BLOCKS: usize = 1056;
/// Kernels that sum over rows held in registers have as many blocks as an H100 or H200 has room for at a time: of its
/// multiprocessors, each with so many registers and with so many threads that have work enough.
const MULTIPROCESSORS: usize = 132;
const REGISTERS: usize = 1 << 16;
const RESIDENT_THREADS: usize = 1024;
/// Threads of a block that has a row in registers, at most, and elements that each has of it.
const VECTOR_THREADS: usize = 384;
const VECTOR_ELEMENTS: usize = 16;

#[repr(C)]
struct ReduceArgs {
    partials: u64,
    out: [u64; 4],
    blocks: u32,
    sums: u32,
    width: u32,
}

impl Training {
    /// Adds the partial sums of blocks to vectors.
    pub(super) fn reduce(
        &mut self,
        blocks: usize,
        width: usize,
        out: &[u64],
    ) -> Result<(), CudaError> {
        let sums = out.len();
        let args = ReduceArgs {
            partials: self.partials.address(0),
            out: addresses(out.iter().copied()),
            blocks: blocks as u32,
            sums: sums as u32,
            width: width as u32,
        };
        let launch = Launch::new([(sums * width).div_ceil(32), 1, 1], THREADS, 0);
        // SAFETY: the partial sums were written by the launch before; the callers checked the vectors.
        unsafe { self.launch(NORMS, "reduce_columns", launch, &args) }
    }
}

/// Threads of a block that takes rows of `width` elements 16 bytes at a time, if width and addresses allow that.
pub(super) fn vector_threads(width: usize, addresses: &[u64]) -> Option<usize> {
    let threads = width.div_ceil(VECTOR_ELEMENTS).next_multiple_of(32);
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    (width.is_multiple_of(8) && threads <= VECTOR_THREADS && aligned).then_some(threads)
}

/// Blocks that add up `rows` rows in registers, of so many threads with so many registers each: fixed, whatever the GPU.
pub(super) fn vector_blocks(rows: usize, threads: usize, registers: usize) -> usize {
    let resident = (REGISTERS / (registers * threads)).min(RESIDENT_THREADS / threads);
    (MULTIPROCESSORS * resident.max(1)).min(rows)
}

/// Elements of the partial sums of rows of at most `width` elements, for each weight: narrow rows have more blocks.
pub(super) fn partial_elements(width: usize) -> usize {
    let narrow = MULTIPROCESSORS * RESIDENT_THREADS * VECTOR_ELEMENTS;
    (ROW_BLOCKS * width).max(narrow)
}

/// As [`vector_threads`] for kernels without sums over rows, whose blocks may walk along a row.
pub(super) fn walking_threads(width: usize, addresses: &[u64]) -> Option<usize> {
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    let threads = (width / 8).next_multiple_of(32).min(VECTOR_THREADS);
    (width.is_multiple_of(8) && aligned).then_some(threads)
}

/// One address each, zeros behind them.
pub(super) fn addresses<const N: usize>(given: impl Iterator<Item = u64>) -> [u64; N] {
    let mut all = [0; N];
    all.iter_mut().zip(given).for_each(|(to, from)| *to = from);
    all
}
