//! Files of text to a directory of token shards.
//!
//! One thread reads, any number of threads encode, and the calling thread writes what they made, in the order of
//! the corpus. A bounded number of pieces is on its way at any time, so memory does not grow with the corpus. The
//! bytes that are written depend on the corpus, the tokenizer and the options, not on the number of threads, and
//! not on whether the work was interrupted: every few seconds the writer makes its work durable and records how
//! far it has come, and a later call with the same options goes on from there.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::error::{Error, Result};
use mmfree::tokenizer::Tokenizer;

use self::encode::{Encoded, Encoder};
use self::journal::{Job, Journal, Progress as Recorded, replace};
use self::writer::Writer;
use super::dataset::{hex, tokenizer_sha256};
use super::manifest::{Manifest, ManifestSource, ManifestTokenizer, PartOf};
use super::pipeline::Corpus;
use super::source::{self, Position, Source};

mod encode;
mod journal;
mod writer;

/// Tokens that end a document, tried in this order if the tokenizer names none.
const USUAL_ENDS: [&str; 5] =
    ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|end▁of▁sentence|>"];

/// What to tokenise, and how.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// Files of text, and directories that are searched for them.
    pub inputs: Vec<PathBuf>,
    /// Directory to write.
    pub output: PathBuf,
    /// The tokenizer.
    pub tokenizer: TokenizerSource,
    /// JSON field or parquet column that holds the text.
    pub field: String,
    /// Line that stands between two documents of a `.txt` file; without it a file is one document.
    pub separator: Option<String>,
    /// Text of the token after every document, if not the one that the tokenizer names.
    pub eos_token: Option<String>,
    /// Which part of the corpus this job takes.
    pub part: PartOf,
    /// A shard ends with the first document that reaches so many tokens.
    pub shard_tokens: u64,
    /// Threads that encode.
    pub threads: usize,
    /// What to do about broken documents.
    pub on_error: OnError,
    /// Time between two records of how far the work has come.
    pub sync_interval: Duration,
}

impl TokenizeOptions {
    /// The usual choices: field `text`, shards of 100 million tokens, a thread for each core, stop at what is
    /// broken.
    pub fn new(inputs: Vec<PathBuf>, output: PathBuf, tokenizer: TokenizerSource) -> Self {
        Self {
            inputs,
            output,
            tokenizer,
            field: "text".to_owned(),
            separator: None,
            eos_token: None,
            part: PartOf::WHOLE,
            shard_tokens: 100_000_000,
            threads: thread::available_parallelism().map_or(1, usize::from),
            on_error: OnError::Stop,
            sync_interval: Duration::from_secs(5),
        }
    }
}

/// What to do about a line, row or file that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// Stop with an error. What comes before it is kept, so that the work goes on once it is mended.
    Stop,
    /// Leave it out, report it and count it. Of a file that breaks off, what comes before the break is kept.
    Skip,
}

/// What a job tells while it runs.
#[derive(Debug)]
pub enum Event {
    /// How far it has come.
    Progress {
        /// Bytes of the files that were read.
        read_bytes: u64,
        /// Bytes of all its files.
        total_bytes: u64,
        /// Tokens so far.
        tokens: u64,
    },
    /// The work of an earlier call is continued; so many documents are done.
    Resumed(u64),
    /// All of it was done before.
    AlreadyDone,
    /// All of it was done before, but this file was changed since, though not in its size.
    Changed(String),
    /// Something broken was left out.
    Skipped(Error),
}

/// Tokenises a corpus, or the rest of one.
///
/// The output directory gets the shards, a copy of the tokenizer and at last the manifest, which says that all
/// is complete. While the work is not complete it also has files whose names begin with `progress-of-` and
/// `lock-of-` or end in `.partial`.
///
/// # Errors
/// Inputs that cannot be read or are broken ([`OnError`]), or have no text at all; a tokenizer with neither BOS
/// nor EOS; an output directory that holds something else, or the same made with other options; errors of
/// writing; [`Error::Cancelled`] once `cancel` is set. Whatever happens, a later call continues.
pub fn tokenize(
    options: &TokenizeOptions,
    cancel: &AtomicBool,
    events: &mut dyn FnMut(Event),
) -> Result<Manifest> {
    let tokenizer = Tokenizer::from_source(&options.tokenizer)?;
    let (prefix, suffix) = around(&tokenizer, options.eos_token.as_deref())?;
    let sources = source::list(&options.inputs, options.part)?;
    let output = &options.output;
    fs::create_dir_all(output)
        .map_err(|reason| Error::Write { file: output.display().to_string(), reason })?;
    let sha256 = tokenizer_sha256(&options.tokenizer);
    let description = ManifestTokenizer {
        file: write_tokenizer(output, &options.tokenizer)?,
        sha256: hex(&sha256),
        vocab_size: u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX),
        bos: prefix.first().copied(),
        eos: suffix.last().copied(),
    };
    let (field, separator) = (options.field.clone(), options.separator.clone());
    let mut manifest = Manifest::new(options.part, description, field, separator);
    let source_entry = |source: &Source| ManifestSource {
        file: source.file.clone(),
        bytes: source.bytes,
        ..ManifestSource::default()
    };
    manifest.sources = sources.iter().map(source_entry).collect();
    let files: Vec<_> = sources.iter().map(|source| source.file.clone()).collect();
    let job = Job { sources, prefix, suffix, shard_tokens: options.shard_tokens };

    let manifest_path = output.join(options.part.manifest_name());
    let mut already_done = || {
        let done = Manifest::read(&manifest_path)?;
        check_done(&manifest_path, &done, &manifest)?;
        events(Event::AlreadyDone);
        let changed = files.iter().filter(|file| is_newer(Path::new(file), &manifest_path));
        changed.for_each(|file| events(Event::Changed(file.clone())));
        Ok(done)
    };
    // Without the lock: the processes of a run look at the same complete corpus at the same time.
    if manifest_path.exists() && !Journal::is_left(output, &options.part.manifest_name()) {
        return already_done();
    }
    let journal = Journal::open(output, &options.part.manifest_name())?;
    if manifest_path.exists() {
        journal.remove();
        return already_done();
    }
    let recorded = match journal.read()? {
        Some(mut recorded) => {
            recorded.accept_mended(&job.sources);
            check_recorded(output, &recorded, &job, &manifest)?;
            events(Event::Resumed(recorded.manifest.documents));
            recorded
        }
        None => Recorded {
            job,
            manifest,
            shard_tokens: 0,
            shard_documents: 0,
            position: Position::default(),
            read: None,
        },
    };
    let encoder = Encoder {
        tokenizer: &tokenizer,
        field: &options.field,
        prefix: &recorded.job.prefix.clone(),
        suffix: &recorded.job.suffix.clone(),
        files: &files,
    };
    let mut writer = Writer::new(output, sha256, journal, recorded, options.sync_interval)?;
    run(options, &encoder, &mut writer, cancel, events)?;
    writer.finish(&manifest_path)
}

/// Reads, encodes and writes until all is done or something stops it. What was done is recorded either way.
fn run(
    options: &TokenizeOptions,
    encoder: &Encoder,
    writer: &mut Writer,
    cancel: &AtomicBool,
    events: &mut dyn FnMut(Event),
) -> Result<()> {
    let sources = writer.sources().to_vec();
    let corpus = Corpus {
        sources: &sources,
        tokenizer: encoder.tokenizer,
        separator: options.separator.as_deref(),
        field: &options.field,
    };
    let total_bytes = corpus.total_bytes();
    let start = writer.position();
    let encode = |item| encoder.encode(item);
    let outcome = corpus.process(start, options.threads, &encode, &mut |encoded, read_bytes| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let Encoded { result, text_bytes, ends, after } = encoded;
        match result {
            Ok(ids) => writer.push(ids.as_deref(), text_bytes, ends, after)?,
            Err(error) if options.on_error == OnError::Skip => {
                events(Event::Skipped(error));
                writer.skip(ends, after)?;
            }
            Err(error) => {
                let advice = "mend it and run the same command again, or leave out what is broken with \
                              `mmfree tokenize --on-error skip`";
                return Err(source::advised(error, advice));
            }
        }
        events(Event::Progress { read_bytes, total_bytes, tokens: writer.tokens() });
        Ok(())
    });
    match outcome {
        // The disk is full, for example: what was recorded before stays.
        Err(error @ Error::Write { .. }) => Err(error),
        Ok(()) | Err(Error::Cancelled) => writer.record().and(outcome),
        Err(error) => writer.record_broken().and(Err(error)),
    }
}

/// The ids before and after every document.
fn around(tokenizer: &Tokenizer, eos_token: Option<&str>) -> Result<(Vec<u32>, Vec<u32>)> {
    let both = tokenizer.encode("", true)?;
    let prefix = tokenizer.prefix().to_vec();
    let mut suffix = both.get(prefix.len()..).unwrap_or_default().to_vec();
    let usual = || USUAL_ENDS.into_iter().find_map(|token| tokenizer.token_id(token));
    let eos = match eos_token {
        Some(token) => Some(tokenizer.token_id(token).ok_or_else(|| {
            Error::Tokenizer(format!("there is no token {token:?} to end documents with"))
        })?),
        None => tokenizer.eos().or_else(usual),
    };
    if let Some(eos) = eos
        && suffix.last() != Some(&eos)
    {
        suffix.push(eos);
    }
    if prefix.is_empty() && suffix.is_empty() {
        return Err(Error::Tokenizer(
            "the tokenizer names neither a BOS nor an EOS token, so that documents would run into each \
             other; name the token that ends a document with --eos-token, or put tokenizer_config.json \
             beside it"
                .to_owned(),
        ));
    }
    Ok((prefix, suffix))
}

/// Puts a copy of the tokenizer beside the shards: checkpoints that are trained on them need it. Returns the
/// file's name.
fn write_tokenizer(output: &Path, source: &TokenizerSource) -> Result<String> {
    let (name, bytes) = match &source.kind {
        TokenizerKind::HuggingFace(bytes) => ("tokenizer.json", bytes),
        TokenizerKind::SentencePiece(bytes) => ("tokenizer.model", bytes),
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = output.join(name);
        match fs::read(&path) {
            Ok(found) if found == bytes => Ok(()),
            Ok(_) => Err(Error::Malformed {
                file: path.display().to_string(),
                what: "the output directory has shards of another tokenizer; choose another \
                       directory"
                    .to_owned(),
            }),
            Err(_) => replace(&path, bytes),
        }
    };
    write(name, bytes)?;
    if let Some(config) = &source.tokenizer_config {
        let json = serde_json::to_vec_pretty(config).expect("JSON can be written");
        write("tokenizer_config.json", &json)?;
    }
    if let Some(template) = &source.chat_template {
        write("chat_template.jinja", template.as_bytes())?;
    }
    Ok(name.to_owned())
}

/// Whether a complete manifest is what this job would write.
fn check_done(path: &Path, done: &Manifest, expected: &Manifest) -> Result<()> {
    let mut differences = done.compare_options(expected);
    differences.files(done.files(), expected.files());
    match differences.list() {
        None => Ok(()),
        Some(list) => Err(Error::Malformed {
            file: path.display().to_string(),
            what: format!(
                "the directory holds a complete corpus that was made otherwise ({list}); choose another \
                 directory, or remove this one to make it anew"
            ),
        }),
    }
}

/// Whether a file was changed after another one, as far as that can be known.
fn is_newer(file: &Path, than: &Path) -> bool {
    let changed = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    matches!((changed(file), changed(than)), (Ok(file), Ok(than)) if file > than)
}

/// Whether an interrupted job is this one.
fn check_recorded(
    output: &Path,
    recorded: &Recorded,
    job: &Job,
    manifest: &Manifest,
) -> Result<()> {
    let mut differences = recorded.manifest.compare_options(manifest);
    differences.files(recorded.manifest.files(), manifest.files());
    differences.value("--shard-tokens", recorded.job.shard_tokens, job.shard_tokens);
    match differences.list() {
        None => Ok(()),
        Some(list) => Err(Error::Malformed {
            file: output.display().to_string(),
            what: format!(
                "the directory holds an interrupted job that began otherwise ({list}); run it with the \
                 same options to go on, choose another directory, or remove this one"
            ),
        }),
    }
}

#[cfg(test)]
mod tests;
