//! Hugging Face directories: `config.json`, safetensors in one file or in shards, a tokenizer.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use mmfree_kernels::memory::Bytes;
use serde_json::Value;

use super::layout::expected_tensors;
use super::packed::{Demand, check_tensors};
use super::safetensors::TensorData;
use super::tokenizer::TokenizerFiles;
use super::{Checkpoint, Container, Encoding, FileSlice, FloatType, StoredTensor, safetensors};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::json;
use crate::output::OutputDirectory;

pub(super) const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
pub(super) const TOKENIZER_JSON: &str = "tokenizer.json";
pub(super) const TOKENIZER_MODEL: &str = "tokenizer.model";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Every file of a checkpoint but the weights. Those that are not read are written back with the rest.
pub(super) const SMALL_FILES: [&str; 11] = [
    CONFIG,
    INDEX,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];
/// Most shards of a checkpoint.
const MAX_SHARDS: usize = 1024;

/// Finds a file by name: `None` if there is none.
type Lookup<'a> = &'a dyn Fn(&str) -> Result<Option<Bytes>>;

/// Opens a directory.
pub(super) fn open_directory(label: &str, directory: &Path) -> Result<Checkpoint> {
    open(label, Some(directory), &in_directory(directory))
}

/// Maps files of a directory.
fn in_directory(directory: &Path) -> impl Fn(&str) -> Result<Option<Bytes>> {
    |name| map_if_there(&directory.join(name))
}

/// Maps a file, `None` if there is none.
pub(super) fn map_if_there(path: &Path) -> Result<Option<Bytes>> {
    match Bytes::map(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(Error::Read { file: path.display().to_string(), reason }),
    }
}

/// Opens the files that `lookup` finds.
pub(super) fn open(label: &str, directory: Option<&Path>, lookup: Lookup) -> Result<Checkpoint> {
    let mut files = Files { label, lookup, found: Vec::new() };
    let config = files.config()?;
    let config = ModelConfig::from_json(&config.file, config.get())?;
    let tensors = files.tensors()?;
    let expected = expected_tensors(&config);
    let demands = expected.into_iter().map(|spec| (spec.name, spec.shape, Demand::Float));
    check_tensors(label, demands, &tensors)?;
    let tokenizer = TokenizerFiles {
        hugging_face: files.get(TOKENIZER_JSON)?,
        sentence_piece: files.get(TOKENIZER_MODEL)?,
        config: files.get(TOKENIZER_CONFIG)?,
        chat_template: files.get(CHAT_TEMPLATE)?,
    };
    for name in SMALL_FILES {
        if files.found.iter().all(|(found, _)| found != name) {
            files.get(name)?;
        }
    }
    let container =
        Container::HuggingFace { files: files.found, directory: directory.map(Path::to_path_buf) };
    Ok(Checkpoint { label: label.to_owned(), config, container, tensors, tokenizer })
}

/// The files of a checkpoint, each remembered when it is first asked for.
struct Files<'a> {
    label: &'a str,
    lookup: Lookup<'a>,
    found: Vec<(String, Bytes)>,
}

impl Files<'_> {
    fn malformed(&self, what: &str) -> Error {
        Error::Malformed { file: self.label.to_owned(), what: what.to_owned() }
    }

    fn get(&mut self, name: &str) -> Result<Option<FileSlice>> {
        let Some(bytes) = (self.lookup)(name)? else { return Ok(None) };
        self.found.push((name.to_owned(), bytes.clone()));
        let file = Path::new(self.label).join(name).display().to_string();
        Ok(Some(FileSlice::whole(&file, bytes)))
    }

    fn config(&mut self) -> Result<FileSlice> {
        self.get(CONFIG)?.ok_or_else(|| {
            self.malformed(
                "there is no config.json; expected a Hugging Face directory with config.json and \
                 model.safetensors",
            )
        })
    }

    /// Tensors of the single file of weights, or of all shards.
    fn tensors(&mut self) -> Result<BTreeMap<String, StoredTensor>> {
        if let Some(single) = self.get(SINGLE)? {
            return Ok(tensors_of(&single)?.collect());
        }
        match self.get(INDEX)? {
            Some(index) => self.shards(&index),
            None => Err(self.malformed(&format!("there is neither {SINGLE} nor {INDEX}"))),
        }
    }

    /// Tensors of every shard that the index names. The index and the shards must agree.
    fn shards(&mut self, index: &FileSlice) -> Result<BTreeMap<String, StoredTensor>> {
        let malformed = |what| Error::Malformed { file: index.file.to_string(), what };
        let document = json::parse(index.get())
            .map_err(|error| malformed(format!("not valid JSON: {error}")))?;
        let Some(map) = document.get("weight_map").and_then(Value::as_object) else {
            return Err(malformed("there is no weight_map".to_owned()));
        };
        let mut names: Vec<&str> = Vec::new();
        for (tensor, shard) in map {
            match shard.as_str() {
                Some(shard) if is_plain_file_name(shard) => names.push(shard),
                _ => {
                    return Err(malformed(format!(
                        "tensor {tensor} is mapped to {shard}, expected the name of a file beside \
                         the index"
                    )));
                }
            }
        }
        names.sort_unstable();
        names.dedup();
        if names.len() > MAX_SHARDS {
            return Err(malformed(format!(
                "{} shards, more than the limit of {MAX_SHARDS}",
                names.len()
            )));
        }
        let mut tensors = BTreeMap::new();
        for name in names {
            let shard = self
                .get(name)?
                .ok_or_else(|| malformed(format!("the shard {name} is not beside the index")))?;
            for (tensor, stored) in tensors_of(&shard)? {
                if map.get(&tensor).and_then(Value::as_str) != Some(name) {
                    return Err(malformed(format!(
                        "tensor {tensor} is in {name}, but the index maps it to {}",
                        map.get(&tensor).unwrap_or(&Value::Null)
                    )));
                }
                tensors.insert(tensor, stored);
            }
        }
        if let Some((tensor, shard)) = map.iter().find(|(tensor, _)| !tensors.contains_key(*tensor))
        {
            return Err(malformed(format!("tensor {tensor} is not in the shard {shard}")));
        }
        Ok(tensors)
    }
}

/// A name that cannot lead out of the directory.
fn is_plain_file_name(name: &str) -> bool {
    name.ends_with(".safetensors") && name.len() <= 255 && !name.contains(['/', '\\', '\0'])
}

fn tensors_of(file: &FileSlice) -> Result<impl Iterator<Item = (String, StoredTensor)> + use<>> {
    let entries = safetensors::parse(&file.file, file.get())?;
    let file = file.clone();
    Ok(entries.into_iter().map(move |(name, entry)| {
        let stored = StoredTensor {
            encoding: Encoding::Float(entry.float),
            shape: entry.shape,
            data: FileSlice { range: entry.range, ..file.clone() },
        };
        (name, stored)
    }))
}

/// `config.json` and the tensors of a directory, whatever its architecture.
pub(super) fn open_full_precision(
    label: &str,
    directory: &Path,
) -> Result<(FileSlice, BTreeMap<String, StoredTensor>)> {
    let lookup = in_directory(directory);
    let mut files = Files { label, lookup: &lookup, found: Vec::new() };
    Ok((files.config()?, files.tensors()?))
}

/// Writes a Hugging Face directory: `config.json`, `model.safetensors` with the tensors in the type
/// `float`, and further `files` by name, for example a tokenizer. It appears complete or not at all.
///
/// # Errors
/// A directory that exists and is not empty; errors of writing.
pub fn write_full_precision(
    directory: &Path,
    config: &Value,
    tensors: &[TensorData<'_>],
    float: FloatType,
    files: &[(String, Vec<u8>)],
) -> Result<()> {
    let output = OutputDirectory::create(directory)?;
    output.write_file(CONFIG, format!("{config:#}\n").as_bytes())?;
    output.write_with(SINGLE, |file| safetensors::write(file, tensors, float))?;
    for (name, bytes) in files {
        output.write_file(name, bytes)?;
    }
    output.commit()
}

/// Writes every file of a full-precision checkpoint to a new directory.
pub(super) fn write(checkpoint: &Checkpoint, directory: &Path) -> Result<()> {
    let Container::HuggingFace { files, .. } = &checkpoint.container else {
        return Err(Error::Invalid(format!(
            "{} is packed: its full-precision weights are gone, so it cannot be written as a Hugging \
             Face directory",
            checkpoint.label()
        )));
    };
    let output = OutputDirectory::create(directory)?;
    for (name, bytes) in files {
        output.write_file(name, bytes)?;
        bytes.release(0..bytes.len());
    }
    output.commit()
}
