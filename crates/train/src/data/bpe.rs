//! Files of text to a byte-level BPE tokenizer.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

use ahash::AHashMap;
use compact_str::CompactString;
use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::error::{Error, Result};
use mmfree::output::OutputDirectory;
use mmfree::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::differences::Differences;
use super::manifest::PartOf;
use super::pipeline::Corpus;
use super::source::{self, Content, Item, Position, Source, json_field};

/// Tokens of single bytes.
const BYTES: usize = 256;
/// Most different words that are counted, about 2 GB of memory; beyond that the rarest are forgotten.
const MAX_WORDS: usize = 16 << 20;
/// Longest word that is counted, in bytes: what is longer is no word, and no token should be made of it.
const MAX_WORD_BYTES: usize = 256;

/// File beside a tokenizer that says what it was trained on.
const RECORD: &str = "training.json";

/// How to train a tokenizer.
#[derive(Clone, Debug)]
pub struct TokenizerTraining {
    /// Files of text, and directories that are searched for them.
    pub inputs: Vec<PathBuf>,
    /// Directory to write; it must not exist or be empty.
    pub output: PathBuf,
    /// V: special tokens, 256 bytes, and merges.
    pub vocab_size: usize,
    /// Pairs that occur less often are not merged.
    pub min_frequency: u64,
    /// Token of what is unknown, by the custom of checkpoints; a byte-level tokenizer never makes it.
    pub unk_token: String,
    /// Token before a text.
    pub bos_token: String,
    /// Token after a document.
    pub eos_token: String,
    /// More special tokens, whose ids follow those of the three above.
    pub special_tokens: Vec<String>,
    /// JSON field or parquet column that holds the text.
    pub field: String,
    /// Line that stands between two documents of a `.txt` file.
    pub separator: Option<String>,
    /// Threads that count words.
    pub threads: usize,
}

impl TokenizerTraining {
    /// The usual choices, with the special tokens of the built-in model: `<unk>`, `<s>`, `</s>`.
    pub fn new(inputs: Vec<PathBuf>, output: PathBuf, vocab_size: usize) -> Self {
        Self {
            inputs,
            output,
            vocab_size,
            min_frequency: 2,
            unk_token: "<unk>".to_owned(),
            bos_token: "<s>".to_owned(),
            eos_token: "</s>".to_owned(),
            special_tokens: Vec::new(),
            field: "text".to_owned(),
            separator: None,
            threads: thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// How the tokenizer in a directory was trained otherwise than this says, in a line; `None` if it was trained
    /// so, or if nothing is known of that.
    ///
    /// # Errors
    /// A record that cannot be read; inputs that are not there.
    pub fn difference_from(&self, directory: &Path) -> Result<Option<String>> {
        let path = directory.join(RECORD);
        if !path.exists() {
            return Ok(None);
        }
        let file = path.display().to_string();
        let read = |reason| Error::Read { file: file.clone(), reason };
        let malformed = |error: serde_json::Error| Error::Malformed {
            file: file.clone(),
            what: format!("this is no record of a tokenizer's training: {error}"),
        };
        let then: Record =
            serde_json::from_slice(&fs::read(&path).map_err(read)?).map_err(malformed)?;
        let now = Record::new(self, &source::list(&self.inputs, PartOf::WHOLE)?);
        let mut differences = Differences::default();
        differences.value("size of the vocabulary", then.vocab_size, now.vocab_size);
        differences.value("least frequency of a pair", then.min_frequency, now.min_frequency);
        differences.value("field of the text", &then.field, &now.field);
        differences.option("document separator", then.separator.as_ref(), now.separator.as_ref());
        differences.files(then.files(), now.files());
        Ok(differences.list())
    }

    /// All special tokens in the order of their ids.
    fn all_special(&self) -> Vec<String> {
        let first = [&self.unk_token, &self.bos_token, &self.eos_token];
        first.into_iter().chain(&self.special_tokens).cloned().collect()
    }
}

/// What a tokenizer was trained on, and how.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    vocab_size: usize,
    min_frequency: u64,
    field: String,
    separator: Option<String>,
    sources: Vec<RecordedFile>,
}

/// A file of text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordedFile {
    file: String,
    bytes: u64,
}

impl Record {
    fn new(options: &TokenizerTraining, sources: &[Source]) -> Self {
        let file =
            |source: &Source| RecordedFile { file: source.file.clone(), bytes: source.bytes };
        Self {
            vocab_size: options.vocab_size,
            min_frequency: options.min_frequency,
            field: options.field.clone(),
            separator: options.separator.clone(),
            sources: sources.iter().map(file).collect(),
        }
    }

    fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sources.iter().map(|source| (source.file.as_str(), source.bytes))
    }
}

/// What came of a training.
#[derive(Clone, Debug)]
pub struct TrainedTokenizer {
    /// V: less than was asked for if the text has too few pairs to merge.
    pub vocab_size: usize,
    /// UTF-8 bytes of text that were counted.
    pub text_bytes: u64,
    /// Different words that were counted.
    pub words: usize,
    /// Whether there were so many that the rarest were forgotten.
    pub forgot_words: bool,
}

/// Trains a byte-level BPE tokenizer and writes `tokenizer.json`, `tokenizer_config.json` and
/// `special_tokens_map.json`, which is what a checkpoint needs, and `training.json`, which says what it was
/// trained on ([`TokenizerTraining::difference_from`]).
///
/// Texts are split into words as GPT-2 does, words into bytes; then the pair of neighbours that is most frequent
/// becomes a token, again and again (Sennrich, Haddow, Birch 2016). Memory grows with the number of different
/// words, up to a bound, and not with the text. The result depends on the text and the options only. `progress`
/// is told how many of how many bytes of the files are read.
///
/// # Errors
/// Inputs that cannot be read or have a broken line; a vocabulary too small for the bytes and special tokens; an
/// output directory that is not empty; [`Error::Cancelled`].
pub fn train_tokenizer(
    options: &TokenizerTraining,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<TrainedTokenizer> {
    let special = options.all_special();
    let mut sorted = special.clone();
    sorted.sort();
    sorted.dedup();
    if sorted.len() != special.len() || special.iter().any(String::is_empty) {
        return Err(Error::Invalid("special tokens must be different and not empty".to_owned()));
    }
    let least = BYTES + special.len();
    if options.vocab_size < least {
        return Err(Error::Invalid(format!(
            "a vocabulary of {} tokens; {BYTES} bytes and {} special tokens need {least}",
            options.vocab_size,
            special.len()
        )));
    }
    let sources = source::list(&options.inputs, PartOf::WHOLE)?;
    let output = OutputDirectory::create(&options.output)?;

    // The cuts of a text depend on how words are split only, so an empty vocabulary has the right ones.
    let cutter = Tokenizer::from_source(&TokenizerSource {
        kind: TokenizerKind::HuggingFace(pipeline(&json!({}), &json!([]), &[]).to_string().into()),
        tokenizer_config: None,
        chat_template: None,
    })?;
    let corpus = Corpus {
        sources: &sources,
        tokenizer: &cutter,
        separator: options.separator.as_deref(),
        field: &options.field,
    };
    let total = corpus.total_bytes();
    let splitter = byte_level();
    let mut words: AHashMap<CompactString, u64> = AHashMap::new();
    let (mut text_bytes, mut documents, mut has_text, mut forgot_words) = (0, 0_u64, false, false);
    let count = |item: Item| count_words(&splitter, item, &sources, &options.field);
    corpus.process(Position::default(), options.threads, &count, &mut |counted, read| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let counted = counted
            .map_err(|error| source::advised(error, "mend it and run the same command again"))?;
        for (word, count) in counted.words {
            *words.entry(word).or_insert(0) += count;
        }
        text_bytes += counted.text_bytes;
        documents += counted.documents;
        has_text |= counted.has_text;
        forgot_words |= forget_rarest(&mut words, MAX_WORDS);
        progress(read, total);
        Ok(())
    })?;
    if !has_text {
        return Err(source::no_text(sources.iter().map(|source| &*source.file), documents, 0));
    }

    let trainer = BpeTrainer::builder()
        .vocab_size(options.vocab_size)
        .min_frequency(options.min_frequency)
        .special_tokens(
            special.iter().map(|token| AddedToken::from(token.as_str(), true)).collect(),
        )
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut model = BPE::default();
    let trained = trainer.do_train(&words, &mut model);
    trained.map_err(|error| Error::Tokenizer(format!("training failed: {error}")))?;
    let model = serde_json::to_value(&model)
        .map_err(|error| Error::Tokenizer(format!("cannot write the vocabulary: {error}")))?;
    let vocab_size = model["vocab"].as_object().map_or(0, serde_json::Map::len);
    let pipeline = pipeline(&model["vocab"], &model["merges"], &special);
    output.write_file("tokenizer.json", &pretty(&with_bos(pipeline, &options.bos_token)))?;
    output.write_file("tokenizer_config.json", &pretty(&config(options)))?;
    let map = json!({
        "bos_token": options.bos_token,
        "eos_token": options.eos_token,
        "unk_token": options.unk_token,
        "additional_special_tokens": options.special_tokens,
    });
    output.write_file("special_tokens_map.json", &pretty(&map))?;
    let record = serde_json::to_value(Record::new(options, &sources)).expect("plain data");
    output.write_file(RECORD, &pretty(&record))?;
    output.commit()?;
    Ok(TrainedTokenizer { vocab_size, text_bytes, words: words.len(), forgot_words })
}

/// What an item has.
struct Counted {
    /// Words and how often they occur.
    words: AHashMap<CompactString, u64>,
    text_bytes: u64,
    /// Documents that end in it.
    documents: u64,
    /// Whether there is more than white space.
    has_text: bool,
}

/// Splits an item's text into words, spelled in byte-level characters, and counts them.
fn count_words(
    splitter: &ByteLevel,
    item: Item,
    sources: &[Source],
    field: &str,
) -> Result<Counted> {
    let failed = |error| Error::Tokenizer(format!("cannot split a text: {error}"));
    let text = match item.content {
        Content::Broken(error) => return Err(error),
        Content::Blank | Content::Ids { .. } => String::new(),
        Content::Text(stretch) => stretch.text().to_owned(),
        Content::Json(line) => json_field(&line, field, || {
            format!("{}:{}", sources[item.after.source].file, item.after.line)
        })?,
    };
    let (text_bytes, has_text) = (text.len() as u64, !text.trim().is_empty());
    let mut counts = AHashMap::new();
    let mut pieces = PreTokenizedString::from(text);
    splitter.pre_tokenize(&mut pieces).map_err(failed)?;
    for (word, ..) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
        if word.len() <= MAX_WORD_BYTES {
            *counts.entry(CompactString::from(word)).or_insert(0) += 1;
        }
    }
    Ok(Counted { words: counts, text_bytes, documents: u64::from(item.ends), has_text })
}

/// If there are more than `most` words: forgets those that occurred once, then twice and so on, until at most half
/// as many are left.
fn forget_rarest(words: &mut AHashMap<CompactString, u64>, most: usize) -> bool {
    let is_full = words.len() > most;
    let mut rarest = 1;
    while is_full && words.len() > most / 2 {
        words.retain(|_, count| *count > rarest);
        rarest += 1;
    }
    is_full
}

fn byte_level() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// A `tokenizer.json`.
fn pipeline(vocab: &Value, merges: &Value, special: &[String]) -> Value {
    let added = special.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    })
}

/// Has the pipeline put BOS before a text.
fn with_bos(mut pipeline: Value, bos: &str) -> Value {
    let id = pipeline["model"]["vocab"][bos].clone();
    pipeline["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                 {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    });
    pipeline
}

fn config(options: &TokenizerTraining) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": options.bos_token,
        "eos_token": options.eos_token,
        "unk_token": options.unk_token,
        "additional_special_tokens": options.special_tokens,
        "clean_up_tokenization_spaces": false,
    })
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut json = serde_json::to_vec_pretty(value).expect("JSON can be written");
    json.push(b'\n');
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rarest_words_are_forgotten_first() {
        let mut words: AHashMap<CompactString, u64> =
            (1..=20_u64).map(|count| (CompactString::from(count.to_string()), count)).collect();
        assert!(!forget_rarest(&mut words, 20));
        assert!(forget_rarest(&mut words, 19));
        let mut left: Vec<_> = words.values().copied().collect();
        left.sort_unstable();
        assert_eq!(left, (12..=20).collect::<Vec<_>>());
    }
}
