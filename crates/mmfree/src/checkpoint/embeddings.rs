//! The embedding table, read in place.

use mmfree_kernels::memory::Bytes;

use super::{FileSlice, FloatType};
use crate::error::{Error, Result};

/// The embedding table [V, D], kept in the mapped file and in its stored type: only the rows that are
/// used are ever read.
#[derive(Clone, Debug)]
pub struct EmbeddingTable {
    pub(super) data: FileSlice,
    pub(super) float: FloatType,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl EmbeddingTable {
    /// A table of random values in f16 whose first `filled` rows are written; the others are zero and
    /// take no memory.
    pub(crate) fn random(rows: usize, cols: usize, filled: usize, seed: u64) -> Result<Self> {
        let float = FloatType::F16;
        let row_bytes = cols * float.bytes();
        let bytes = Bytes::sparse(rows * row_bytes, |bytes| {
            let mut state = seed;
            for value in bytes[..filled.min(rows) * row_bytes].chunks_exact_mut(2) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                value.copy_from_slice(&half::f16::from_f32(uniform).to_le_bytes());
            }
        })
        .map_err(|reason| Error::Read { file: "random embeddings".to_owned(), reason })?;
        Ok(Self { data: FileSlice::whole("random embeddings", bytes), float, rows, cols })
    }

    /// V.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// D.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The stored type.
    pub fn float_type(&self) -> FloatType {
        self.float
    }

    /// Bytes of the whole table.
    pub fn stored_bytes(&self) -> usize {
        self.data.range.len()
    }

    /// The stored bytes of the whole table, row-major and little-endian.
    pub fn bytes(&self) -> &[u8] {
        self.data.get()
    }

    /// Writes the embedding of a token, D values widened exactly.
    ///
    /// # Errors
    /// [`Error::TokenId`]; [`Error::NotFinite`], because a table in a file is not checked before it is
    /// used. `out` is then undefined.
    ///
    /// # Panics
    /// If `out` does not have D values.
    pub fn row_into(&self, id: u32, out: &mut [f32]) -> Result<()> {
        assert_eq!(out.len(), self.cols, "width of an embedding");
        let row = id as usize;
        if row >= self.rows {
            return Err(Error::TokenId { id, vocab_size: self.rows });
        }
        let row_bytes = self.cols * self.float.bytes();
        self.float.decode(&self.data.get()[row * row_bytes..(row + 1) * row_bytes], out);
        match out.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::NotFinite {
                file: self.data.file.to_string(),
                tensor: super::layout::EMBEDDINGS.to_owned(),
                index: row * self.cols + at,
                value: out[at],
            }),
        }
    }
}
