//! Fetches a checkpoint from the Hugging Face hub into the cache that other tools share.

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;

use hf_hub::Cache;
use hf_hub::api::sync::ApiBuilder;

/// The directory with the files of a repository. What the cache has is not fetched again; without a
/// network, what the cache has must do.
///
/// The environment variables `HF_HOME` and `HF_ENDPOINT` are honoured.
pub(super) fn fetch(repository: &str) -> Result<PathBuf, String> {
    let fetched = fetch_all(repository);
    let cached = || Cache::from_env().model(repository.to_owned()).get("config.json");
    let config = fetched.or_else(|error| cached().ok_or(error))?;
    config.parent().map(PathBuf::from).ok_or_else(|| "the cache has no directory for it".to_owned())
}

/// Fetches every file that belongs to a checkpoint and returns the path of its `config.json`.
fn fetch_all(repository: &str) -> Result<PathBuf, String> {
    let api = ApiBuilder::from_env().with_progress(stderr().is_terminal()).build();
    let repository = api.map_err(|error| error.to_string())?.model(repository.to_owned());
    let listing = repository.info().map_err(|error| error.to_string())?;
    let mut config = None;
    for file in listing.siblings.iter().map(|file| file.rfilename.as_str()) {
        let is_weights = file.starts_with("model") && file.ends_with(".safetensors");
        if is_weights || super::hugging_face::SMALL_FILES.contains(&file) {
            let path = repository.get(file).map_err(|error| format!("{file}: {error}"))?;
            if file == super::hugging_face::CONFIG {
                config = Some(path);
            }
        }
    }
    config.ok_or_else(|| "it has no config.json".to_owned())
}
