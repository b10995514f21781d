//! A model's weights in device memory: layer after layer at a constant stride.

use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device};
use crate::fused_rows::{EmbeddingType, check_multiple};
use crate::ternary::TernaryMatrix;
use crate::ternary_gemm::cuda::{Gemm, TILE_WORDS, TileMatrix};

/// Sizes of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// L
    pub layers: usize,
    /// D
    pub width: usize,
    /// F
    pub inner: usize,
    /// V
    pub vocab: usize,
}

/// A ternary matrix of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Projection {
    I,
    F,
    G,
    Out,
    Glu,
    Down,
}

/// A vector of a layer: norms, those inside a BitLinear by its name, and β. In the order of their storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Vector {
    AttnNorm,
    I,
    F,
    G,
    LowerBound,
    GNorm,
    Out,
    MlpNorm,
    Glu,
    /// Of width F, and the last.
    Down,
}

/// Four trits of zero.
const ZERO_TRITS: u8 = 0x55;
/// γ of a layer's matrices.
const GAMMAS: usize = 6;

/// Weights in device memory.
#[derive(Debug)]
pub struct Weights {
    shape: Shape,
    pub(crate) tiles: Buffer<u32>,
    pub(crate) vectors: Buffer<f32>,
    /// [L][6], then the head's.
    pub(crate) gammas: Buffer<f32>,
    host_gammas: Vec<f32>,
    pub(crate) embeddings: Buffer<u8>,
    pub(crate) embedding_type: EmbeddingType,
    staging: Option<Buffer<u32>>,
}

impl Weights {
    /// Room for a model; [`set_matrix`](Self::set_matrix) and the others fill it.
    ///
    /// # Errors
    /// Sizes that the kernels do not handle; a model larger than the device's memory.
    pub fn new(
        device: &Arc<Device>,
        shape: Shape,
        embeddings: (&[u8], EmbeddingType),
    ) -> Result<Self, CudaError> {
        check_multiple(shape.width)?;
        check_multiple(shape.inner)?;
        let ((table, embedding_type), Shape { layers, width, vocab, .. }) = (embeddings, shape);
        if table.len() != vocab * width * embedding_type.bytes() {
            return Err(CudaError::Shape(format!("{} bytes of embeddings", table.len())));
        }
        let head = TileMatrix::single(0, vocab, width);
        let words = (layers * layer_tiles(shape) + head.tiles()) * TILE_WORDS;
        let floats = layers * layer_floats(shape) + 2 * width;
        let bytes = 4 * (words + floats) + table.len();
        let (free, total) = device.memory()?;
        if bytes > free {
            return Err(CudaError::ModelTooLarge { bytes, free, total });
        }
        Ok(Self {
            shape,
            // Tiles that only fill a matrix up hold zero trits.
            tiles: Buffer::filled(device, words, ZERO_TRITS)?,
            vectors: Buffer::zeros(device, floats)?,
            gammas: Buffer::zeros(device, layers * GAMMAS + 1)?,
            host_gammas: vec![0.0; layers * GAMMAS + 1],
            embeddings: Buffer::from_slice(device, table)?,
            embedding_type,
            staging: Some(Buffer::zeros(device, 1)?),
        })
    }

    /// Takes a layer's matrix.
    ///
    /// # Errors
    /// A matrix of another shape; no memory.
    pub fn set_matrix(
        &mut self,
        gemm: &Gemm,
        layer: usize,
        projection: Projection,
        matrix: &TernaryMatrix,
    ) -> Result<(), CudaError> {
        let Shape { width: d, inner, .. } = self.shape;
        let (place, at, shape) = match projection {
            Projection::I => (self.mix(layer), 0, (d, d)),
            Projection::F => (self.mix(layer), 1, (d, d)),
            Projection::G => (self.mix(layer), 2, (d, d)),
            Projection::Out => (self.out(layer), 0, (d, d)),
            Projection::Glu => (self.glu(layer), 0, (2 * inner, d)),
            Projection::Down => (self.down(layer), 0, (d, inner)),
        };
        let first = place.first + at * place.segment_tiles * place.col_tiles;
        self.host_gammas[layer * GAMMAS + projection as usize] = matrix.scale();
        self.upload(gemm, first, shape, matrix)
    }

    /// Takes the head's matrix and norms, and finishes: nothing can be set after it.
    ///
    /// # Errors
    /// Another shape; the driver's, also those of earlier copies.
    pub fn set_head(
        &mut self,
        gemm: &Gemm,
        norm: &[f32],
        inner_norm: &[f32],
        matrix: &TernaryMatrix,
    ) -> Result<(), CudaError> {
        let Shape { layers, width, vocab, .. } = self.shape;
        self.host_gammas[layers * GAMMAS] = matrix.scale();
        self.upload(gemm, self.head().first, (vocab, width), matrix)?;
        for (at, values) in [(self.last_norm(), norm), (self.head_norm(), inner_norm)] {
            check_len("norm", values.len(), width)?;
            self.vectors.write(at, values)?;
        }
        self.gammas.write(0, &self.host_gammas)?;
        self.tiles.device().synchronize()?;
        self.staging = None;
        Ok(())
    }

    /// Takes a layer's vector.
    ///
    /// # Errors
    /// Another length; the driver's.
    pub fn set_vector(
        &mut self,
        layer: usize,
        vector: Vector,
        values: &[f32],
    ) -> Result<(), CudaError> {
        let Shape { width, inner, .. } = self.shape;
        check_len("vector", values.len(), if vector == Vector::Down { inner } else { width })?;
        self.vectors.write(self.vector(layer, vector), values)
    }

    fn upload(
        &mut self,
        gemm: &Gemm,
        first: usize,
        (rows, cols): (usize, usize),
        matrix: &TernaryMatrix,
    ) -> Result<(), CudaError> {
        check_len("rows", matrix.rows(), rows)?;
        check_len("columns", matrix.cols(), cols)?;
        let Some(staging) = &mut self.staging else {
            return Err(CudaError::Shape("the weights are complete".to_owned()));
        };
        gemm.upload(matrix, staging, &mut self.tiles, first)
    }

    /// The model's sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// All tiles.
    pub fn tiles(&self) -> &Buffer<u32> {
        &self.tiles
    }

    /// All vectors.
    pub fn vectors(&self) -> &Buffer<f32> {
        &self.vectors
    }

    /// The embedding table.
    pub fn embeddings(&self) -> (&Buffer<u8>, EmbeddingType) {
        (&self.embeddings, self.embedding_type)
    }

    /// The i, f and g projections.
    pub fn mix(&self, layer: usize) -> TileMatrix {
        mix(self.shape, layer * layer_tiles(self.shape))
    }

    /// The o projection.
    pub fn out(&self, layer: usize) -> TileMatrix {
        let mix = self.mix(layer);
        TileMatrix::single(mix.first + mix.tiles(), self.shape.width, self.shape.width)
    }

    /// The gate projection, [2F, D].
    pub fn glu(&self, layer: usize) -> TileMatrix {
        let out = self.out(layer);
        TileMatrix::single(out.first + out.tiles(), 2 * self.shape.inner, self.shape.width)
    }

    /// The down projection, [D, F].
    pub fn down(&self, layer: usize) -> TileMatrix {
        let glu = self.glu(layer);
        TileMatrix::single(glu.first + glu.tiles(), self.shape.width, self.shape.inner)
    }

    /// The head, [V, D].
    pub fn head(&self) -> TileMatrix {
        let first = self.shape.layers * layer_tiles(self.shape);
        TileMatrix::single(first, self.shape.vocab, self.shape.width)
    }

    /// γ of a layer's matrix.
    pub fn gamma(&self, layer: usize, projection: Projection) -> f32 {
        self.host_gammas[layer * GAMMAS + projection as usize]
    }

    /// γ of the head.
    pub fn head_gamma(&self) -> f32 {
        self.host_gammas[self.shape.layers * GAMMAS]
    }

    /// Where a layer's vector lies among [`vectors`](Self::vectors).
    pub fn vector(&self, layer: usize, vector: Vector) -> usize {
        layer * layer_floats(self.shape) + vector as usize * self.shape.width
    }

    /// Where the last norm lies.
    pub fn last_norm(&self) -> usize {
        self.shape.layers * layer_floats(self.shape)
    }

    /// Where the norm inside the head lies.
    pub fn head_norm(&self) -> usize {
        self.last_norm() + self.shape.width
    }

    /// The products of a layer, and the head's, one phase after the other.
    pub(crate) fn phases(&self) -> [TileMatrix; 5] {
        [self.mix(0), self.out(0), self.glu(0), self.down(0), self.head()]
    }

    /// Tiles from one layer to the next.
    pub(crate) fn layer_tiles(&self) -> usize {
        layer_tiles(self.shape)
    }

    /// Bytes of packed weights that one decoded token streams.
    pub fn streamed_bytes(&self) -> usize {
        self.tiles.bytes()
    }
}

fn mix(shape: Shape, first: usize) -> TileMatrix {
    TileMatrix::stacked(first, 3, shape.width, shape.width)
}

fn layer_tiles(shape: Shape) -> usize {
    let Shape { width, inner, .. } = shape;
    mix(shape, 0).tiles()
        + TileMatrix::single(0, width, width).tiles()
        + TileMatrix::single(0, 2 * inner, width).tiles()
        + TileMatrix::single(0, width, inner).tiles()
}

fn layer_floats(shape: Shape) -> usize {
    Vector::Down as usize * shape.width + shape.inner
}

fn check_len(what: &str, found: usize, expected: usize) -> Result<(), CudaError> {
    if found == expected {
        return Ok(());
    }
    Err(CudaError::Shape(format!("{found} {what}, expected {expected}")))
}
