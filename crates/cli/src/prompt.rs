//! The prompt of `mmfree generate`: where it comes from, and its ids.

use std::fs::File;
use std::io::{BufRead, BufReader, stdin};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use mmfree::config::ModelConfig;
use mmfree::tokenizer::Tokenizer;

use crate::model_arg::is_model;
use crate::progress::Progress;
use crate::token_ids;

/// Bytes read from a prompt file at a time.
const READ_BYTES: usize = 1 << 16;

/// Where a prompt comes from.
pub enum Prompt {
    /// The command line.
    Text(String),
    /// A file or standard input, with its size if that is known.
    Reader(Box<dyn BufRead>, Option<u64>),
    /// Ids.
    Ids(Vec<u32>),
}

/// Chunks of ids, to be fed in order.
pub type Chunks<'a> = Box<dyn Iterator<Item = mmfree::error::Result<Vec<u32>>> + 'a>;

/// Tells model and prompt apart: two positional arguments are MODEL and PROMPT. One is MODEL if the
/// prompt is given by an option or if it names a model that is there, else it is the prompt.
pub fn split_positionals(
    first: Option<&str>,
    second: Option<&str>,
    has_prompt_option: bool,
) -> Result<(Option<PathBuf>, Option<String>)> {
    Ok(match (first, second) {
        (Some(_), Some(_)) if has_prompt_option => {
            bail!("the prompt is given twice: as the second argument and by an option")
        }
        (Some(model), Some(prompt)) => (Some(model.into()), Some(prompt.to_owned())),
        (Some(model), None) if has_prompt_option || is_model(Path::new(model)) => {
            (Some(model.into()), None)
        }
        // Nobody means this as a prompt.
        (Some(path), None) if path.ends_with(".gguf") && !path.contains(char::is_whitespace) => {
            bail!("there is no file {path:?}; if it is meant as the prompt, use --prompt")
        }
        (first, _) => (None, first.map(str::to_owned)),
    })
}

impl Prompt {
    /// Opens a file, `-` for standard input.
    pub fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Reader(Box::new(BufReader::new(stdin())), None));
        }
        let context = || format!("cannot read the prompt {}", path.display());
        let file = File::open(path).with_context(context)?;
        let metadata = file.metadata().with_context(context)?;
        if metadata.is_dir() {
            bail!("{}: it is a directory", context());
        }
        let size = metadata.is_file().then_some(metadata.len());
        Ok(Self::Reader(Box::new(BufReader::with_capacity(READ_BYTES, file)), size))
    }

    /// The ids. A text that begins a sequence (`is_start`) gets what the tokenizer puts before texts; if
    /// the prompt is empty it is the BOS token.
    pub fn into_ids<'a>(
        self,
        tokenizer: Option<&'a Tokenizer>,
        config: &ModelConfig,
        is_start: bool,
    ) -> Result<Chunks<'a>> {
        if let Self::Ids(ids) = self {
            token_ids::check(&ids, config.vocab_size)?;
            return Ok(Box::new(std::iter::once(Ok(ids))));
        }
        let prefix = tokenizer.filter(|_| is_start).map_or(&[][..], Tokenizer::prefix).to_vec();
        let bos = tokenizer.and_then(Tokenizer::bos).or(config.bos_token_id);
        // What an empty text is.
        let bos = bos.filter(|_| is_start && prefix.is_empty());
        if matches!(&self, Self::Text(text) if text.is_empty()) {
            let ids: Vec<u32> = prefix.into_iter().chain(bos).collect();
            ensure!(
                !ids.is_empty(),
                match is_start {
                    true => "the prompt is empty and the model has no BOS token to begin with",
                    false => "the prompt is empty; a restored state needs text to go on with",
                }
            );
            return Ok(Box::new(std::iter::once(Ok(ids))));
        }
        let tokenizer = tokenizer.context(
            "this model has no tokenizer: give the prompt by --token-ids, and --print-ids",
        )?;
        let prefix = std::iter::once(Ok(prefix));
        Ok(match self {
            Self::Text(text) => {
                Box::new(prefix.chain(std::iter::once(tokenizer.encode(&text, false))))
            }
            Self::Reader(reader, size) => {
                let mut chunks = tokenizer.encode_reader(reader, false);
                let progress = size.map(|size| (Progress::new("reading the prompt"), size));
                let mut is_first = true;
                Box::new(prefix.chain(std::iter::from_fn(move || {
                    if let Some((progress, size)) = &progress {
                        progress.set(chunks.bytes_read(), *size);
                    }
                    let chunk = chunks.next();
                    // Without a first chunk the file is empty.
                    let bos = bos.filter(|_| std::mem::take(&mut is_first));
                    chunk.or_else(|| bos.map(|bos| Ok(vec![bos])))
                })))
            }
            Self::Ids(ids) => Box::new(std::iter::once(Ok(ids))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_argument_is_a_model_only_if_that_is_clear() {
        let dir = tempfile::tempdir().unwrap();
        let gguf = dir.path().join("m.gguf");
        std::fs::write(&gguf, b"").unwrap();
        let model_dir = dir.path().join("model");
        std::fs::create_dir(&model_dir).unwrap();
        std::fs::write(model_dir.join("config.json"), b"{}").unwrap();
        let split = |first, second, option| split_positionals(first, second, option).unwrap();
        let text = |text: &str| (None, Some(text.to_owned()));

        assert_eq!(split(None, None, false), (None, None));
        assert_eq!(split(Some("Once"), None, false), text("Once"));
        assert_eq!(split(Some("owner/name"), None, false), text("owner/name"));
        assert_eq!(split(Some("owner/name"), None, true), (Some("owner/name".into()), None));
        let path = dir.path().to_str().unwrap();
        assert_eq!(split(Some(path), None, false), text(path));
        for path in [&gguf, &model_dir] {
            assert_eq!(split(path.to_str(), None, false), (Some(path.clone()), None));
        }
        let both = (Some(gguf.clone()), Some("Once".to_owned()));
        assert_eq!(split(gguf.to_str(), Some("Once"), false), both);
        assert!(split_positionals(Some("m"), Some("Once"), true).is_err());
        assert!(split_positionals(Some("missing.gguf"), None, false).is_err());
        assert_eq!(split(Some("what is a .gguf"), None, false), text("what is a .gguf"));
    }
}
