//! Parameters from and to Hugging Face directories.

use std::path::Path;

use mmfree::checkpoint::safetensors::TensorData;
use mmfree::checkpoint::{FloatType, FullPrecision, write_full_precision};
use mmfree::error::Result;

use crate::architecture::Architecture;
use crate::parameters::ParameterLayout;

/// Reads a checkpoint: which model it is, and its parameters in the order of the architecture's
/// [layout](Architecture::layout).
///
/// # Errors
/// An unknown `model_type`, a configuration that is not supported, tensors that do not fit it, weights
/// that are NaN or infinite.
pub fn load(directory: &Path) -> Result<(Architecture, Vec<f32>)> {
    let checkpoint = FullPrecision::open(directory)?;
    let (file, json) = checkpoint.config();
    let architecture = Architecture::from_json(file, json)?;
    let layout = architecture.layout();
    checkpoint.check(layout.parameters().iter().map(|p| (p.name.clone(), p.shape.clone())))?;
    let mut values = vec![0.0; layout.len()];
    for parameter in layout.parameters() {
        checkpoint.read(&parameter.name, &mut values[parameter.range.clone()])?;
    }
    Ok((architecture, values))
}

/// Writes a Hugging Face directory with the authors' tensor names, and further files by name, for example
/// a tokenizer. It appears complete or not at all.
///
/// # Errors
/// A directory that exists and is not empty; errors of writing.
pub fn save(
    directory: &Path,
    architecture: &Architecture,
    parameters: &[f32],
    float: FloatType,
    files: &[(String, Vec<u8>)],
) -> Result<()> {
    let layout = architecture.layout();
    let tensors = tensors(&layout, parameters);
    write_full_precision(directory, &architecture.to_json(), &tensors, float, files)
}

/// The tensors of a flat buffer, to write.
///
/// # Panics
/// If the buffer has another length than the layout.
pub fn tensors<'a>(layout: &'a ParameterLayout, flat: &'a [f32]) -> Vec<TensorData<'a>> {
    assert_eq!(flat.len(), layout.len(), "length of the flat buffer");
    let tensor = |p: &'a crate::parameters::Parameter| TensorData {
        name: &p.name,
        shape: &p.shape,
        values: &flat[p.range.clone()],
    };
    layout.parameters().iter().map(tensor).collect()
}
