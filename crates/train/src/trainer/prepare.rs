//! Raw text to token shards, once.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use mmfree::checkpoint::TokenizerSource;
use mmfree::output;

use crate::config::TrainConfig;
use crate::data::tokenize::{Event, TokenizeOptions, tokenize};
use crate::data::{Dataset, Manifest, TokenizerTraining, train_tokenizer};
use crate::error::{Error, Result};

/// Directories of token shards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// To train on.
    pub train: Vec<PathBuf>,
    /// Held out; none if a part of `train` is.
    pub validation: Vec<PathBuf>,
}

/// What happens meanwhile.
pub trait PrepareObserver {
    /// Something worth a line.
    fn note(&mut self, message: &str);
    /// `done` of `total` bytes of text are read.
    fn progress(&mut self, done: u64, total: u64);
}

/// Finds the shards of `data.train` and `data.validation`. Texts among them are tokenised into
/// [`TrainConfig::cache`] first, with `data.tokenizer`, with that of shards that are named beside them, or
/// with one that is trained on them. What is there already is not made again, and what was interrupted
/// goes on.
///
/// # Errors
/// Texts that cannot be read or are broken, a cache made from other texts or with other options, errors of
/// writing, and [`mmfree::error::Error::Cancelled`] once `cancel` is set.
pub fn prepare(
    config: &TrainConfig,
    cancel: &AtomicBool,
    observer: &mut dyn PrepareObserver,
) -> Result<Prepared> {
    let (shards, texts) = split(&config.data.train)?;
    let (held_out_shards, held_out_texts) = split(&config.data.validation)?;
    let mut prepared = Prepared { train: shards, validation: held_out_shards };
    if texts.is_empty() && held_out_texts.is_empty() {
        return Ok(prepared);
    }
    let cache = config.cache();
    std::fs::create_dir_all(&cache)
        .map_err(|reason| Error::Write { file: cache.display().to_string(), reason })?;
    let tokenizer = if let Some(named) = named_tokenizer(config)? {
        named
    } else if let [first, ..] = &prepared.train[..] {
        Dataset::open(&[first])?.tokenizer_source()?
    } else {
        trained_tokenizer(config, &cache, &texts, cancel, observer)?
    };
    for (name, texts, shards) in [
        ("train", texts, &mut prepared.train),
        ("validation", held_out_texts, &mut prepared.validation),
    ] {
        if texts.is_empty() {
            continue;
        }
        let output = cache.join(name);
        let mut options = TokenizeOptions::new(texts, output.clone(), tokenizer.clone());
        options.field.clone_from(&config.data.text_field);
        options.separator = separator(config);
        let mut done = false;
        let manifest = tokenize(&options, cancel, &mut |event| match event {
            Event::Progress { read_bytes, total_bytes, .. } => {
                observer.progress(read_bytes, total_bytes);
            }
            Event::AlreadyDone => done = true,
            Event::Resumed(documents) => {
                observer.note(&format!("going on after {documents} documents"));
            }
            Event::Changed(file) => {
                observer.note(&format!(
                    "{file} was changed after its tokens were made; if its text is another now, \
                     remove {} or choose another data.cache",
                    cache.display()
                ));
            }
            Event::Skipped(_) => {}
        })
        .map_err(|error| named_cache(error, &cache))?;
        if !done {
            observer.note(&format!(
                "tokenised {} tokens into {}",
                manifest.tokens,
                output.display()
            ));
        }
        shards.push(output);
    }
    Ok(prepared)
}

/// The tokenizer of `data.tokenizer`, if it names one.
pub(super) fn named_tokenizer(config: &TrainConfig) -> Result<Option<TokenizerSource>> {
    if config.data.tokenizer.is_empty() {
        return Ok(None);
    }
    let opened = TokenizerSource::open(Path::new(&config.data.tokenizer));
    Ok(Some(opened.map_err(|error| match error {
        mmfree::error::Error::Read { file, reason } => {
            Error::Read { file: format!("{file} (data.tokenizer)"), reason }
        }
        error => error.into(),
    })?))
}

/// Names the key of the configuration in an error about a file of the cache.
fn named_cache(error: mmfree::error::Error, cache: &Path) -> Error {
    match error {
        mmfree::error::Error::Malformed { file, what } if Path::new(&file).starts_with(cache) => {
            mmfree::error::Error::Malformed { file: format!("{file} (data.cache)"), what }.into()
        }
        error => error.into(),
    }
}

/// The tokenizer in the cache, trained if it is not there yet.
fn trained_tokenizer(
    config: &TrainConfig,
    cache: &Path,
    texts: &[PathBuf],
    cancel: &AtomicBool,
    observer: &mut dyn PrepareObserver,
) -> Result<TokenizerSource> {
    let directory = cache.join("tokenizer");
    let vocab_size = config.data.tokenizer_vocab_size;
    let mut training = TokenizerTraining::new(texts.to_vec(), directory.clone(), vocab_size);
    training.field.clone_from(&config.data.text_field);
    training.separator = separator(config);
    if directory.exists() {
        if let Some(list) = training.difference_from(&directory)? {
            return Err(Error::Invalid(format!(
                "{} was trained otherwise ({list}); choose another data.cache, remove {} to make tokenizer \
                 and tokens anew, or name this tokenizer as data.tokenizer to keep it",
                directory.display(),
                cache.display()
            )));
        }
    } else {
        output::remove_unfinished(cache)?;
        let trained =
            train_tokenizer(&training, cancel, &mut |done, total| observer.progress(done, total))?;
        observer.note(&format!(
            "trained a tokenizer of {} tokens: {}",
            trained.vocab_size,
            directory.display()
        ));
    }
    Ok(TokenizerSource::open(&directory)?)
}

fn separator(config: &TrainConfig) -> Option<String> {
    Some(config.data.separator.clone()).filter(|separator| !separator.is_empty())
}

/// Directories of shards, and everything else.
fn split(paths: &[String]) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut shards, mut texts) = (Vec::new(), Vec::new());
    for path in paths.iter().map(PathBuf::from) {
        let is_shards = path.is_dir() && !Manifest::find(&path)?.is_empty();
        if is_shards { shards.push(path) } else { texts.push(path) }
    }
    Ok((shards, texts))
}
