//! The compiler: a model of the family to a program and its memories.
//!
//! A [`Plan`] needs sizes only: it holds the program, the memory map and which rows every `matvec`
//! streams in which order. [`Plan::image`] fills it with a checkpoint's weights.
//!
//! Norms, lower bounds and scales lie in data memory in the order in which the program loads them, and
//! weights in the order in which it multiplies, so that the program only ever moves on: pointers with
//! post-increment, and one stream a core that is read ahead as far as the FIFO holds.

use mmfree::checkpoint::Checkpoint;
use mmfree::config::ModelConfig;
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::mlgru;
use mmfree_kernels::ternary::TernaryMatrix;
use serde::Serialize;

use crate::arith::{self, Scale};
use crate::config::{Configuration, Packing};
use crate::error::{Error, Result};
use crate::image::{Image, PAGE, Region, Shape};
use crate::isa::{ADDRESS_UNIT, Instruction, VECTOR_LIMIT};

mod program;

use program::{ALIGNED_ELEMENTS, Bases, Builder, Vectors, matrices};

/// A dense layer's weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// Name in a checkpoint, without `.weight`.
    pub name: String,
    /// N.
    pub rows: usize,
    /// K.
    pub cols: usize,
}

/// Rows of a matrix that one `matvec` streams.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tile {
    matrix: usize,
    first_row: usize,
    rows: usize,
}

/// A vector of parameters in data memory.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Parameter {
    Norm {
        name: String,
        len: usize,
    },
    LowerBound {
        layer: usize,
    },
    /// γ / 127 of these matrices.
    Scales {
        matrices: Vec<usize>,
    },
}

/// A part of a memory, for the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapEntry {
    /// What it holds.
    pub name: String,
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A compiled model without its weights.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The hardware.
    pub configuration: Configuration,
    /// How weights are packed.
    pub packing: Packing,
    /// The program of one token.
    pub program: Vec<Instruction>,
    /// Bytes that each core streams a token.
    pub stream_bytes: u64,
    /// Data memory, in bytes.
    pub data_map: Vec<MapEntry>,
    /// Words of vector memory that are used.
    pub vector_words_used: usize,
    model: ModelConfig,
    matrices: Vec<Matrix>,
    tiles: Vec<Tile>,
    parameters: Vec<Parameter>,
    state: Region,
    logits: Region,
    embeddings: Region,
}

impl Plan {
    /// Compiles a model of these sizes.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] and [`Error::Configuration`].
    pub fn new(
        model: &ModelConfig,
        configuration: &Configuration,
        packing: Packing,
    ) -> Result<Self> {
        configuration.check()?;
        let (d, f) = (model.hidden_size, model.intermediate_size);
        let layers = model.num_hidden_layers;
        let does_not_fit =
            |what| Error::DoesNotFit { configuration: configuration.name.clone(), what };
        let longest = d.max(f);
        if longest > VECTOR_LIMIT {
            return Err(does_not_fit(format!(
                "its vectors have {longest} elements, the instruction set allows {VECTOR_LIMIT}"
            )));
        }
        let width = configuration.weight_bytes as usize;
        if longest.next_multiple_of(width) > configuration.activation_bytes as usize {
            return Err(does_not_fit(format!(
                "its vectors have {longest} elements, activation_bytes is {}; choose at least {}",
                configuration.activation_bytes,
                longest.next_power_of_two()
            )));
        }
        let vectors = Vectors::place(model, configuration, packing).map_err(does_not_fit)?;
        let mut builder = Builder::new(configuration, packing, matrices(model));
        // Addresses are known when everything has been placed: a first pass finds the sizes.
        builder.token(model, &vectors, &Bases::default());
        let bytes = |elements: usize| elements.next_multiple_of(ALIGNED_ELEMENTS) as u64 * 4;
        let parameter_bytes: u64 =
            builder.parameters.iter().map(|parameter| bytes(parameter.len(d))).sum();
        let mut next = 0;
        let mut place = |bytes: u64| {
            let region = Region { address: next, bytes };
            next = (next + bytes).next_multiple_of(PAGE);
            region
        };
        let parameters = place(parameter_bytes);
        let embeddings = place(bytes(d) * model.vocab_size as u64);
        let state = place(bytes(d) * layers as u64);
        let logits = place(4 * model.vocab_size as u64);
        if next / ADDRESS_UNIT > u64::from(u32::MAX) {
            return Err(does_not_fit(format!("{next} bytes of data memory exceed its addresses")));
        }
        let beats: usize = builder
            .tiles
            .iter()
            .map(|tile| configuration.beats(packing, tile.rows, builder.matrices[tile.matrix].cols))
            .sum();
        let stream_bytes = (beats * width) as u64;
        (builder.program, builder.tiles, builder.parameters) = Default::default();
        let bases = Bases {
            parameters: parameters.address,
            state: state.address,
            embeddings: embeddings.address,
            logits: logits.address,
            beats: beats as u32,
        };
        builder.token(model, &vectors, &bases);
        let entry = |name: &str, region: Region| MapEntry {
            name: name.to_owned(),
            address: region.address,
            bytes: region.bytes,
        };
        Ok(Self {
            configuration: configuration.clone(),
            packing,
            program: builder.program,
            stream_bytes,
            data_map: vec![
                entry("norms, lower bounds, scales", parameters),
                entry("embeddings", embeddings),
                entry("recurrent state", state),
                entry("logits", logits),
            ],
            vector_words_used: vectors.used,
            model: model.clone(),
            matrices: builder.matrices,
            tiles: builder.tiles,
            parameters: builder.parameters,
            state,
            logits,
            embeddings,
        })
    }

    /// The sizes that the plan was made for.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// Bytes of the whole data memory.
    pub fn data_bytes(&self) -> u64 {
        (self.logits.address + self.logits.bytes).next_multiple_of(PAGE)
    }

    /// An image without weights, for looking at the program.
    pub fn shape(&self) -> Shape {
        Shape {
            vocab_size: self.model.vocab_size as u32,
            hidden_size: self.model.hidden_size as u32,
            intermediate_size: self.model.intermediate_size as u32,
            num_hidden_layers: self.model.num_hidden_layers as u32,
        }
    }

    /// Fills the plan with a checkpoint's weights. `progress` hears of bytes written and of all.
    ///
    /// # Errors
    /// Errors of reading; values that the number format does not hold.
    ///
    /// # Panics
    /// If the checkpoint has other sizes than the plan.
    pub fn image(
        &self,
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Image> {
        assert_eq!(checkpoint.config(), &self.model, "the plan is for another model");
        let cores = self.configuration.cores as usize;
        let total = self.stream_bytes * cores as u64 + self.embeddings.bytes;
        let mut scales = vec![Scale::default(); self.matrices.len()];
        let mut streams: Vec<Vec<u8>> =
            (0..cores).map(|_| Vec::with_capacity(self.stream_bytes as usize)).collect();
        let mut loaded: Option<(usize, TernaryMatrix)> = None;
        let arena = WeightArena::new();
        for tile in &self.tiles {
            if loaded.as_ref().is_none_or(|(index, _)| *index != tile.matrix) {
                let Matrix { name, rows, cols } = &self.matrices[tile.matrix];
                let matrix = checkpoint.ternary(name, *rows, *cols, &arena)?;
                scales[tile.matrix] = Scale::from_f64(f64::from(matrix.scale()) / 127.0);
                loaded = Some((tile.matrix, matrix));
            }
            if let Some((_, matrix)) = &loaded {
                self.pack_tile(tile, matrix, &mut streams);
            }
            progress(streams[0].len() as u64 * cores as u64, total);
        }
        let streamed = self.stream_bytes * cores as u64;
        let data = self.data(checkpoint, &scales, &mut |done| progress(streamed + done, total))?;
        progress(total, total);
        Ok(Image {
            configuration: self.configuration.clone(),
            packing: self.packing,
            shape: self.shape(),
            program: self.program.clone(),
            data,
            data_bytes: self.data_bytes(),
            streams,
            state: self.state,
            logits: self.logits,
        })
    }

    /// Appends the rows of a tile: bytes of a group's rows, column by column, groups dealt out to cores.
    fn pack_tile(&self, tile: &Tile, matrix: &TernaryMatrix, streams: &mut [Vec<u8>]) {
        let rows = self.packing.trits();
        let cols = matrix.cols();
        let width = cols.next_multiple_of(self.configuration.weight_bytes as usize);
        let mut trits = vec![0i8; rows * width];
        for group in 0..self.configuration.groups(self.packing, tile.rows) {
            for (core, stream) in streams.iter_mut().enumerate() {
                let first = (group * self.configuration.cores as usize + core) * rows;
                for (r, row) in trits.chunks_exact_mut(width).enumerate() {
                    row.fill(0);
                    if first + r < tile.rows {
                        matrix.read_row(tile.first_row + first + r, &mut row[..cols]);
                    }
                }
                stream.extend((0..width).map(|k| {
                    let mut group = [0i8; 5];
                    for (r, trit) in group[..rows].iter_mut().enumerate() {
                        *trit = trits[r * width + k];
                    }
                    self.packing.encode(&group[..rows])
                }));
            }
        }
    }

    /// What is stored of data memory: parameters and embeddings.
    fn data(
        &self,
        checkpoint: &Checkpoint,
        scales: &[Scale],
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<u8>> {
        let (d, layers) = (self.model.hidden_size, self.model.num_hidden_layers);
        let bounds = if self.model.use_lower_bound {
            mlgru::lower_bounds(&checkpoint.matrix_f32("model.lower_bounds", layers, d)?, d)
        } else {
            vec![0.0; layers * d]
        };
        let mut data = Vec::with_capacity(self.state.address as usize);
        for parameter in &self.parameters {
            match parameter {
                Parameter::Norm { name, len } => {
                    self.elements(&mut data, name, &checkpoint.vector(name, *len)?)?;
                }
                Parameter::LowerBound { layer } => {
                    self.elements(&mut data, "lower_bounds", &bounds[layer * d..(layer + 1) * d])?;
                }
                Parameter::Scales { matrices } => {
                    for scale in matrices.iter().map(|&matrix| scales[matrix]) {
                        data.extend_from_slice(&scale.mantissa.to_le_bytes());
                        data.extend_from_slice(&scale.exponent.to_le_bytes());
                    }
                    data.resize(data.len().next_multiple_of(ADDRESS_UNIT as usize), 0);
                }
            }
        }
        data.resize(self.embeddings.address as usize, 0);
        let table = checkpoint.embeddings()?;
        let mut row = vec![0.0; d];
        for id in 0..self.model.vocab_size as u32 {
            table.row_into(id, &mut row)?;
            self.elements(&mut data, "embeddings", &row)?;
            if id % 1024 == 0 {
                progress(data.len() as u64 - self.embeddings.address);
            }
        }
        Ok(data)
    }

    /// Appends a vector as elements, filled up to a whole address unit.
    fn elements(&self, data: &mut Vec<u8>, name: &str, values: &[f32]) -> Result<()> {
        if let Some(value) = values.iter().find(|value| value.abs() >= 2048.0) {
            return Err(Error::DoesNotFit {
                configuration: self.configuration.name.clone(),
                what: format!("{name} holds {value}, but elements are smaller than 2048"),
            });
        }
        data.extend(values.iter().flat_map(|&value| arith::from_f32(value).to_le_bytes()));
        data.resize(data.len().next_multiple_of(ADDRESS_UNIT as usize), 0);
        Ok(())
    }
}

impl Parameter {
    fn len(&self, d: usize) -> usize {
        match self {
            Self::Norm { len, .. } => *len,
            Self::LowerBound { .. } => d,
            Self::Scales { matrices } => 2 * matrices.len(),
        }
    }
}
