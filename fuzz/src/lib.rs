//! What the fuzz targets share.

use mmfree::checkpoint::Checkpoint;
use mmfree::checkpoint::info::describe;
use mmfree::error::Result;
use mmfree_kernels::memory::WeightArena;

/// Bytes that a checkpoint can borrow for as long as it wants, freed when this is dropped.
pub struct Borrowed(*mut [u8]);

impl Borrowed {
    /// Copies bytes to the heap, so that the address sanitizer sees where they end.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Box::into_raw(bytes.to_vec().into_boxed_slice()))
    }

    /// The bytes.
    ///
    /// # Safety
    /// Nothing that was made from them may be used after `self` is dropped.
    pub unsafe fn get(&self) -> &'static [u8] {
        // SAFETY: the pointer came from a box that is freed in `drop` only; the caller sees to it that
        // nothing outlives that.
        unsafe { &*self.0 }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::into_raw` and is given back once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// Reads everything that a model is loaded from.
///
/// # Errors
/// Whatever is wrong with the checkpoint.
pub fn read_everything(checkpoint: &Checkpoint) -> Result<()> {
    let info = describe(checkpoint, &mut |_, _| {})?;
    let table = checkpoint.embeddings()?;
    let mut row = vec![0.0; table.cols()];
    for id in [0, table.rows() as u32 - 1, table.rows() as u32] {
        let _ = table.row_into(id, &mut row);
    }
    let arena = WeightArena::new();
    for tensor in &info.tensors {
        let name = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        match (tensor.scale, &tensor.shape[..]) {
            (Some(_), &[rows, cols]) => {
                checkpoint.ternary(name, rows, cols, &arena)?;
            }
            (None, &[len]) => drop(checkpoint.vector(&tensor.name, len)?),
            (None, &[rows, cols]) => drop(checkpoint.matrix_f32(&tensor.name, rows, cols)?),
            _ => unreachable!("tensors are vectors or matrices"),
        }
    }
    Ok(())
}
