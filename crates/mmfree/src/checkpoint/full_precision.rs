//! Full-precision tensors of any architecture: a Hugging Face directory, or a Transformer++ in a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use mmfree_kernels::memory::Bytes;
use serde_json::Value;

use super::packed::{Demand, check_tensors};
use super::tensors::not_finite;
use super::{Encoding, FloatType, StoredTensor, gguf, hugging_face, llama};
use crate::error::{Error, Result, TensorProblem};
use crate::json;

/// A configuration and full-precision tensors, under Hugging Face's names.
#[derive(Debug)]
pub struct FullPrecision {
    label: String,
    config_file: String,
    config: Vec<u8>,
    tensors: BTreeMap<String, StoredTensor>,
    /// Heads whose rows of the query and key projections are stored as llama.cpp orders them.
    reordered_heads: Option<usize>,
}

impl FullPrecision {
    /// Opens a directory (`config.json` and safetensors in one file or in shards), or a GGUF file whose
    /// architecture is `llama`.
    ///
    /// # Errors
    /// Errors of reading, files that are missing, malformed or truncated; a file of another kind; a GGUF file of another
    /// architecture.
    pub fn open(model: &Path) -> Result<Self> {
        let label = model.display().to_string();
        if model.is_dir() {
            let (config, tensors) = hugging_face::open_full_precision(&label, model)?;
            let config_file = config.file.to_string();
            let config = config.get().to_vec();
            return Ok(Self { label, config_file, config, tensors, reordered_heads: None });
        }
        let bytes =
            Bytes::map(model).map_err(|reason| Error::Read { file: label.clone(), reason })?;
        if !bytes.starts_with(&gguf::MAGIC) {
            let reason = "expected a Hugging Face directory with config.json and model.safetensors, or a \
                          GGUF file of a Transformer++";
            return Err(Error::NoModel { model: label, reason: reason.to_owned() });
        }
        let (config, tensors) = llama::open(&label, bytes)?;
        Ok(Self {
            config_file: label.clone(),
            config: config.to_json().to_string().into_bytes(),
            tensors,
            reordered_heads: Some(config.num_attention_heads),
            label,
        })
    }

    /// Whether a path holds a Transformer++: a directory whose configuration says `llama`, or a GGUF file of that
    /// architecture. Whatever else is wrong with it is told when it is opened.
    pub fn is_transformer(model: &Path) -> bool {
        if model.is_dir() {
            let config = std::fs::read(model.join(hugging_face::CONFIG)).ok();
            let config = config.and_then(|bytes| json::parse(&bytes).ok());
            return config.is_some_and(|config: Value| config["model_type"] == llama::ARCHITECTURE);
        }
        Bytes::map(model).is_ok_and(|bytes| llama::is_llama(&bytes))
    }

    /// Name of the file that has the configuration, and the configuration as `config.json`.
    pub fn config(&self) -> (&str, &[u8]) {
        (&self.config_file, &self.config)
    }

    /// Compares the tensors with those that an architecture demands, by name and shape.
    ///
    /// # Errors
    /// [`Error::Tensors`] with everything that is missing, misshapen or too much.
    pub fn check(&self, expected: impl Iterator<Item = (String, Vec<usize>)>) -> Result<()> {
        let demands = expected.map(|(name, shape)| (name, shape, Demand::Float));
        check_tensors(&self.label, demands, &self.tensors)
    }

    /// Reads a tensor, widened to f32, row-major.
    ///
    /// # Errors
    /// A tensor that is not there or has another number of elements; a value that is NaN or infinite.
    pub fn read(&self, name: &str, values: &mut [f32]) -> Result<()> {
        let tensor = self.stored(name)?;
        let elements: usize = tensor.shape.iter().product();
        match tensor.encoding {
            Encoding::Float(float) if elements == values.len() => {
                float.decode(tensor.data.get(), values);
            }
            _ => {
                let problem = TensorProblem::Shape {
                    tensor: name.to_owned(),
                    expected: vec![values.len()],
                    found: tensor.shape.clone(),
                };
                return Err(Error::Tensors { file: self.label.clone(), problems: vec![problem] });
            }
        }
        tensor.data.release();
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(not_finite(tensor, name, index, values[index]));
        }
        if let Some(heads) = self.reordered_heads.filter(|_| llama::is_rotated(name)) {
            llama::restore_order(values, heads);
        }
        Ok(())
    }

    /// The type that a tensor is stored in.
    ///
    /// # Errors
    /// A tensor that is not there or is not stored as floats.
    pub(super) fn float_type(&self, name: &str) -> Result<FloatType> {
        match self.stored(name)?.encoding {
            Encoding::Float(float) => Ok(float),
            Encoding::Ternary(_) => {
                Err(Error::Invalid(format!("tensor {name} is not stored as floats")))
            }
        }
    }

    fn stored(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).ok_or_else(|| Error::Tensors {
            file: self.label.clone(),
            problems: vec![TensorProblem::Missing { tensor: name.to_owned() }],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_opened_has_the_systems_reason_or_what_is_expected() {
        let work = tempfile::tempdir().unwrap();
        let (missing, text) = (work.path().join("none.gguf"), work.path().join("text"));
        std::fs::write(&text, "no model").unwrap();
        for (path, expected) in
            [(&missing, "os error 2"), (&text, "a GGUF file of a Transformer++")]
        {
            let error = FullPrecision::open(path).unwrap_err().to_string();
            let named = error.contains(&path.display().to_string());
            assert!(named && error.contains(expected), "{error}");
        }
    }
}
