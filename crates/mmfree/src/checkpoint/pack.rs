//! Writes packed models.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mmfree_kernels::ternary::TernaryError;
use mmfree_kernels::ternary::tq::TqFormat;

use super::gguf::write::{HeaderWriter, NewTensor};
use super::layout::{TensorKind, TensorSpec, expected_tensors};
use super::packed::{ARCHITECTURE, key, put_config, scale_name, stored_shape};
use super::tensors::{RowReader, not_finite};
use super::{Checkpoint, Container, Encoding, FloatType};
use crate::error::{Error, Result};
use crate::output::OutputFile;

/// ggml's `general.file_type` of files that are mostly TQ1_0 and TQ2_0.
const FILE_TYPE_TQ1_0: u32 = 36;
const FILE_TYPE_TQ2_0: u32 = 37;
/// ggml's version of its quantised formats.
const QUANTIZATION_VERSION: u32 = 2;

/// How a packed file stores the embeddings, which stay in floating point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EmbeddingStorage {
    /// As the source does, so that the packed model computes bit for bit what its source computes.
    #[default]
    Source,
    /// In this type, rounded half to even.
    As(FloatType),
}

/// How a model is packed.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Block format of the ternary weights.
    pub format: TqFormat,
    /// Type of the embeddings.
    pub embeddings: EmbeddingStorage,
    /// Name of the model in the file; by default the name of the source.
    pub name: Option<String>,
}

/// Writes a checkpoint as one packed GGUF file, tokenizer included. Memory is constant: weights are
/// quantised row by row. `progress(done, total)` is called with bytes of the source.
///
/// # Errors
/// Weights that are NaN or infinite, also after rounding to the type of the embeddings; an output that
/// belongs to the source; errors of writing. Nothing is left under the name then, or the old file.
pub fn pack(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &PackOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    refuse_source(checkpoint, output)?;
    let (small, large) = plan(checkpoint, options.format, options.embeddings)?;
    let header = header(checkpoint, options)?;
    let tensors: Vec<NewTensor> =
        small.iter().chain(&large).map(|part| part.tensor.clone()).collect();
    let mut packer = Packer {
        checkpoint,
        output: OutputFile::create(output)?,
        done: 0,
        total: small.iter().chain(&large).map(|part| part.source_bytes(checkpoint)).sum(),
        progress,
        scales: BTreeMap::new(),
    };
    packer.output.put(&header.finish(&tensors))?;
    for part in small.iter().chain(&large) {
        packer.write(part)?;
        packer.output.put(&vec![0; part.tensor.padding()])?;
    }
    packer.output.commit()
}

/// What one tensor of the file is made of.
struct Part {
    tensor: NewTensor,
    /// Name and shape in the source.
    source: TensorSpec,
    content: Content,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    /// γ of a weight.
    Scale,
    /// Floating-point values, stored in this type.
    Floats(FloatType),
    /// Trits.
    Trits(TqFormat),
}

impl Part {
    fn new(name: String, source: &TensorSpec, shape: &[usize], content: Content) -> Result<Self> {
        let encoding = match content {
            Content::Scale => Encoding::Float(FloatType::F32),
            Content::Floats(float) => Encoding::Float(float),
            Content::Trits(format) => Encoding::Ternary(format),
        };
        let shape = stored_shape(encoding, shape);
        let bytes = encoding.tensor_bytes(&shape).ok_or_else(|| {
            Error::Invalid(format!("tensor {name} of shape {shape:?} is too large to be packed"))
        })?;
        let tensor = NewTensor { name, shape, encoding, bytes };
        Ok(Self { tensor, source: source.clone(), content })
    }

    /// Bytes of the source that have to be read for it.
    fn source_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        match checkpoint.tensors.get(&self.source.name) {
            Some(stored) if self.content != Content::Scale || !checkpoint.is_packed() => {
                stored.data.range.len() as u64
            }
            _ => 0,
        }
    }
}

/// The tensors of the file, in its order: small ones together at the front, so that opening touches
/// few pages, then the embeddings and the weights in the order of a forward pass.
fn plan(
    checkpoint: &Checkpoint,
    format: TqFormat,
    embeddings: EmbeddingStorage,
) -> Result<(Vec<Part>, Vec<Part>)> {
    let (mut small, mut large) = (Vec::new(), Vec::new());
    for spec in expected_tensors(checkpoint.config()) {
        let name = spec.name.clone();
        match spec.kind {
            TensorKind::Norm | TensorKind::LowerBounds => {
                let content = Content::Floats(FloatType::F32);
                small.push(Part::new(name, &spec, &spec.shape, content)?);
            }
            TensorKind::Embeddings => {
                let float = match embeddings {
                    EmbeddingStorage::Source => checkpoint.embeddings()?.float_type(),
                    EmbeddingStorage::As(float) => float,
                };
                large.push(Part::new(name, &spec, &spec.shape, Content::Floats(float))?);
            }
            TensorKind::Ternary => {
                small.push(Part::new(scale_name(&name), &spec, &[1], Content::Scale)?);
                large.push(Part::new(name, &spec, &spec.shape, Content::Trits(format))?);
            }
        }
    }
    Ok((small, large))
}

fn header(checkpoint: &Checkpoint, options: &PackOptions) -> Result<HeaderWriter> {
    let mut header = HeaderWriter::new();
    header.text(key::ARCHITECTURE, ARCHITECTURE);
    put_name(&mut header, options.name.as_deref(), Path::new(checkpoint.label()));
    header.u32(
        key::FILE_TYPE,
        match options.format {
            TqFormat::Tq1_0 => FILE_TYPE_TQ1_0,
            TqFormat::Tq2_0 => FILE_TYPE_TQ2_0,
        },
    );
    header.u32(key::QUANTIZATION_VERSION, QUANTIZATION_VERSION);
    put_config(&mut header, checkpoint.config());
    checkpoint.tokenizer.put(&mut header)?;
    Ok(header)
}

/// Writes the model's name, by default that of its source.
pub(super) fn put_name(header: &mut HeaderWriter, name: Option<&str>, source: &Path) {
    let of_source = || {
        let path = fs::canonicalize(source).ok()?;
        Some(path.file_stem()?.to_string_lossy().into_owned())
    };
    if let Some(name) = name.map(str::to_owned).or_else(of_source) {
        header.text(key::NAME, &name);
    }
}

struct Packer<'a> {
    checkpoint: &'a Checkpoint,
    output: OutputFile,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    /// γ of each weight, kept until its trits are written.
    scales: BTreeMap<String, f32>,
}

impl Packer<'_> {
    fn write(&mut self, part: &Part) -> Result<()> {
        let spec = &part.source;
        let name = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        match part.content {
            Content::Scale => {
                let scale = self.checkpoint.ternary_scale(name, spec.shape[0], spec.shape[1])?;
                self.scales.insert(spec.name.clone(), scale);
                self.output.put(&scale.to_le_bytes())?;
            }
            Content::Floats(float) => self.write_floats(spec, float)?,
            Content::Trits(format) => {
                // Scales come first in the plan.
                return self.write_trits(name, spec, self.scales[&spec.name], format);
            }
        }
        self.advance(part.source_bytes(self.checkpoint));
        Ok(())
    }

    fn write_floats(&mut self, spec: &TensorSpec, float: FloatType) -> Result<()> {
        let stored = &self.checkpoint.tensors[&spec.name];
        let Encoding::Float(source) = stored.encoding else {
            return Err(Error::Invalid(format!("tensor {} is not stored as floats", spec.name)));
        };
        let (rows, cols) = match spec.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, spec.elements()),
        };
        let mut reader = RowReader::new(&stored.data, rows);
        let mut values = vec![0.0; cols];
        let mut bytes = Vec::with_capacity(cols * float.bytes());
        for row in 0..rows {
            bytes.clear();
            source.decode(reader.row(row), &mut values);
            float.encode(&values, &mut bytes);
            // Checked after rounding: a large single is infinite as a half.
            float.decode(&bytes, &mut values);
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Err(not_finite(stored, &spec.name, row * cols + at, values[at]));
            }
            self.output.put(&bytes)?;
        }
        Ok(())
    }

    fn write_trits(
        &mut self,
        name: &str,
        spec: &TensorSpec,
        scale: f32,
        format: TqFormat,
    ) -> Result<()> {
        let (rows, cols) = (spec.shape[0], spec.shape[1]);
        let mut source = self.checkpoint.trit_rows(name, rows, cols, scale)?;
        let row_bytes = format.row_bytes(cols).ok_or(TernaryError::Shape { rows, cols });
        let mut encoded = vec![0; row_bytes.map_err(|error| source.error(name, error))?];
        let mut trits = vec![0; cols];
        let stored = self.checkpoint.tensors[&spec.name].data.range.len() / rows;
        for row in 0..rows {
            source.read(row, &mut trits).map_err(|error| source.error(name, error))?;
            format.encode_row(&trits, &mut encoded);
            self.output.put(&encoded)?;
            self.advance(stored as u64);
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.total);
    }
}

/// Refuses an output that is one of the files that are being read.
fn refuse_source(checkpoint: &Checkpoint, output: &Path) -> Result<()> {
    let Ok(output) = fs::canonicalize(output) else { return Ok(()) };
    let sources: Vec<_> = match &checkpoint.container {
        Container::Gguf { path, .. } => path.iter().cloned().collect(),
        Container::HuggingFace { files, directory } => directory
            .iter()
            .flat_map(|directory| files.iter().map(|(name, _)| directory.join(name)))
            .collect(),
    };
    if sources.iter().filter_map(|path| fs::canonicalize(path).ok()).any(|path| path == output) {
        return Err(output_is_source(&output));
    }
    Ok(())
}

pub(super) fn output_is_source(output: &Path) -> Error {
    Error::Invalid(format!(
        "the output {} is a file of the model that is being packed",
        output.display()
    ))
}
