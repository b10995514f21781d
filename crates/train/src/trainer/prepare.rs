//! Raw text to token shards, once.

use std::path::{Path, PathBuf};

use crate::config::TrainConfig;
use crate::error::{Error, Result};

/// Directories of token shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// To train on.
    pub train: Vec<PathBuf>,
    /// Held out; none if a part of `train` is.
    pub validation: Vec<PathBuf>,
}

/// Finds the shards of `data.train` and `data.validation`.
pub fn prepare(
    config: &TrainConfig,
    _cancel: &std::sync::atomic::AtomicBool,
    _observer: &mut dyn PrepareObserver,
) -> Result<Prepared> {
    let shards = |paths: &[String]| -> Result<Vec<PathBuf>> {
        paths
            .iter()
            .map(|path| match !crate::data::Manifest::find(Path::new(path))?.is_empty() {
                true => Ok(PathBuf::from(path)),
                false => Err(Error::Invalid(format!("{path} has no token shards"))),
            })
            .collect()
    };
    Ok(Prepared {
        train: shards(&config.data.train)?,
        validation: shards(&config.data.validation)?,
    })
}
/// What happens meanwhile.
pub trait PrepareObserver {
    /// Something worth a line.
    fn note(&mut self, message: &str);
    /// Bytes.
    fn progress(&mut self, done: u64, total: u64);
}
