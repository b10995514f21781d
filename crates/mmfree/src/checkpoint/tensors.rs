//! Reads tensors of a checkpoint.

use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::ternary::{Layout, TernaryError, TernaryMatrix, quantize_trits};

use super::layout::EMBEDDINGS;
use super::{Checkpoint, EmbeddingTable, Encoding, FileSlice, FloatType, StoredTensor};
use crate::error::{Error, Result, TensorProblem};

/// Mapped bytes that stay resident behind a reader: enough for the system to read ahead, and little
/// beside a model.
const WINDOW_BYTES: usize = 8 << 20;

impl Checkpoint {
    /// Reads a vector, for example the weight of a norm.
    ///
    /// # Errors
    /// A name that the model does not have, another length, a value that is NaN or infinite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.floats(name, &[len])
    }

    /// Reads a small matrix, row-major, for example the lower bounds [L, D].
    ///
    /// # Errors
    /// As [`vector`](Self::vector).
    pub fn matrix_f32(&self, name: &str, rows: usize, cols: usize) -> Result<Vec<f32>> {
        self.floats(name, &[rows, cols])
    }

    /// [`ternary_in`](Self::ternary_in) at two bits a trit, which is the quickest to read trits from.
    ///
    /// # Errors
    /// As there.
    pub fn ternary(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        arena: &WeightArena,
    ) -> Result<TernaryMatrix> {
        self.ternary_in(name, rows, cols, Layout::TwoBit, arena)
    }

    /// Reads the ternary weight of a BitLinear layer; `name` has no `.weight`. Full-precision weights
    /// are quantised, packed ones repacked. Pages of the file are released behind the reader, so that
    /// peak resident memory stays near the size of the result.
    ///
    /// ```text
    /// γ = max(mean |W|, 1e-5)     t = clamp(round_half_even(W · (1/γ)), -1, 1)
    /// ```
    ///
    /// # Errors
    /// A name that the model does not have, another shape, weights that are NaN or infinite, invalid
    /// codes, no memory.
    pub fn ternary_in(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        layout: Layout,
        arena: &WeightArena,
    ) -> Result<TernaryMatrix> {
        let scale = self.ternary_scale(name, rows, cols)?;
        let mut trits = self.trit_rows(name, rows, cols, scale)?;
        let tensor = trits.tensor;
        let matrix = match tensor.encoding {
            Encoding::Ternary(format) => {
                TernaryMatrix::from_tq(arena, layout, format, rows, cols, scale, tensor.data.get())
            }
            Encoding::Float(_) => {
                TernaryMatrix::from_rows(arena, layout, rows, cols, scale, |row, out| {
                    trits.read(row, out)
                })
            }
        };
        matrix.map_err(|source| ternary_error(tensor, name, source))
    }

    /// The embedding table. Nothing of it is read.
    ///
    /// # Errors
    /// None for an opened checkpoint; its shape was checked then.
    pub fn embeddings(&self) -> Result<EmbeddingTable> {
        let (rows, cols) = (self.config().vocab_size, self.config().hidden_size);
        let (tensor, float) = self.float_tensor(EMBEDDINGS, &[rows, cols])?;
        Ok(EmbeddingTable { data: tensor.data.clone(), float, rows, cols })
    }

    /// Lets the pages of a tensor's file go that this process has read. They come back from the file
    /// when they are read again. `name` is the name in the file.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensors.get(name) {
            tensor.data.release();
        }
    }

    /// γ of a ternary tensor: stored in a packed file, else computed in one pass over the weights.
    pub(super) fn ternary_scale(&self, name: &str, rows: usize, cols: usize) -> Result<f32> {
        let weight = format!("{name}.weight");
        let tensor = self.matrix_tensor(&weight, rows, cols)?;
        match tensor.encoding {
            Encoding::Float(float) => absmean_scale(tensor, float, &weight, rows, cols),
            Encoding::Ternary(_) => {
                let stored = format!("{name}.scale");
                let scale = self.floats(&stored, &[1])?[0];
                if scale > 0.0 {
                    Ok(scale)
                } else {
                    Err(ternary_error(tensor, &stored, TernaryError::Scale(scale)))
                }
            }
        }
    }

    /// Reader of the trits of a ternary tensor with scale γ.
    pub(super) fn trit_rows(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        scale: f32,
    ) -> Result<TritRows<'_>> {
        let tensor = self.matrix_tensor(&format!("{name}.weight"), rows, cols)?;
        let source = RowReader::new(&tensor.data, rows);
        let weights = match tensor.encoding {
            Encoding::Float(_) => vec![0.0; cols],
            Encoding::Ternary(_) => Vec::new(),
        };
        Ok(TritRows { tensor, scale, source, weights })
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (tensor, float) = self.float_tensor(name, shape)?;
        let mut values = vec![0.0; shape.iter().product()];
        float.decode(tensor.data.get(), &mut values);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => Err(not_finite(tensor, name, index, values[index])),
        }
    }

    fn float_tensor(&self, name: &str, shape: &[usize]) -> Result<(&StoredTensor, FloatType)> {
        let tensor = self.tensor(name)?;
        match tensor.encoding {
            Encoding::Float(float) if tensor.shape == shape => Ok((tensor, float)),
            _ => Err(self.misshapen(name, shape, tensor)),
        }
    }

    /// The tensor of a matrix whose rows, in a packed file, may be padded to whole blocks.
    fn matrix_tensor(&self, name: &str, rows: usize, cols: usize) -> Result<&StoredTensor> {
        let tensor = self.tensor(name)?;
        if tensor.shape == super::packed::stored_shape(tensor.encoding, &[rows, cols]) {
            Ok(tensor)
        } else {
            Err(self.misshapen(name, &[rows, cols], tensor))
        }
    }

    fn tensor(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).ok_or_else(|| Error::Tensors {
            file: self.label().to_owned(),
            problems: vec![TensorProblem::Missing { tensor: name.to_owned() }],
        })
    }

    fn misshapen(&self, name: &str, expected: &[usize], tensor: &StoredTensor) -> Error {
        let problem = TensorProblem::Shape {
            tensor: name.to_owned(),
            expected: expected.to_vec(),
            found: tensor.shape.clone(),
        };
        Error::Tensors { file: self.label().to_owned(), problems: vec![problem] }
    }
}

/// Trits of a ternary tensor, to be read row by row from the first.
pub(super) struct TritRows<'a> {
    tensor: &'a StoredTensor,
    scale: f32,
    source: RowReader<'a>,
    /// Scratch for a full-precision row.
    weights: Vec<f32>,
}

impl TritRows<'_> {
    /// Writes the trits `[K]` of a row.
    pub(super) fn read(
        &mut self,
        row: usize,
        trits: &mut [i8],
    ) -> std::result::Result<(), TernaryError> {
        let bytes = self.source.row(row);
        match self.tensor.encoding {
            Encoding::Ternary(format) => format.decode_row(bytes, trits),
            Encoding::Float(float) => {
                float.decode(bytes, &mut self.weights);
                quantize_trits(&self.weights, self.scale, trits);
                Ok(())
            }
        }
    }

    /// An error of [`read`](Self::read) with the place where it happened.
    pub(super) fn error(&self, name: &str, source: TernaryError) -> Error {
        ternary_error(self.tensor, name, source)
    }
}

/// Rows of a mapped tensor. Releases the pages behind the row that is read, and the rest when dropped.
pub(super) struct RowReader<'a> {
    data: &'a FileSlice,
    row_bytes: usize,
    released: usize,
}

impl<'a> RowReader<'a> {
    pub(super) fn new(data: &'a FileSlice, rows: usize) -> Self {
        Self { data, row_bytes: data.range.len() / rows, released: data.range.start }
    }

    pub(super) fn row(&mut self, row: usize) -> &'a [u8] {
        let start = self.data.range.start + row * self.row_bytes;
        if start.saturating_sub(self.released) >= WINDOW_BYTES {
            self.data.bytes.release(self.released..start);
            self.released = start;
        }
        &self.data.bytes[start..start + self.row_bytes]
    }
}

impl Drop for RowReader<'_> {
    fn drop(&mut self) {
        self.data.bytes.release(self.released..self.data.range.end);
    }
}

/// `max(mean |W|, 1e-5)`, summed in f64 over eight interleaved partial sums.
fn absmean_scale(
    tensor: &StoredTensor,
    float: FloatType,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<f32> {
    let mut source = RowReader::new(&tensor.data, rows);
    let mut weights = vec![0.0f32; cols];
    let mut sums = [0.0f64; 8];
    for row in 0..rows {
        float.decode(source.row(row), &mut weights);
        for group in weights.chunks(8) {
            for (sum, w) in sums.iter_mut().zip(group) {
                *sum += f64::from(w.abs());
            }
        }
        // No finite weights add up to infinity in f64, so a sum shows every bad one.
        if !sums.iter().sum::<f64>().is_finite() {
            let at = weights.iter().position(|w| !w.is_finite()).unwrap_or(0);
            return Err(not_finite(tensor, name, row * cols + at, weights[at]));
        }
    }
    let mean = sums.iter().sum::<f64>() / (rows * cols) as f64;
    Ok((mean as f32).max(1e-5))
}

pub(super) fn not_finite(tensor: &StoredTensor, name: &str, index: usize, value: f32) -> Error {
    Error::NotFinite { file: tensor.data.file.to_string(), tensor: name.to_owned(), index, value }
}

fn ternary_error(tensor: &StoredTensor, name: &str, reason: TernaryError) -> Error {
    Error::Ternary { file: tensor.data.file.to_string(), tensor: name.to_owned(), reason }
}
