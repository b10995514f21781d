//! What a directory of token shards was made of.

use std::fs;
use std::path::{Path, PathBuf};

use mmfree::error::{Error, Result};
use serde::{Deserialize, Serialize};

use super::differences::Differences;
use super::shard::ShardHeader;

/// Value of `format` in a manifest.
const FORMAT: &str = "mmfree-tokens";
const VERSION: u32 = 1;
/// Largest manifest that is read.
const MAX_BYTES: u64 = 1 << 30;

/// `manifest.json`, written when all shards are complete. A corpus that several jobs made has one for each,
/// `manifest-I-of-N.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `mmfree-tokens`.
    pub format: String,
    /// Version of the format, 1.
    pub version: u32,
    /// Which part of the corpus this is.
    pub part: PartOf,
    /// The tokenizer that made the ids.
    pub tokenizer: ManifestTokenizer,
    /// JSON field or parquet column that held the text.
    pub field: String,
    /// Line that stood between two documents of a `.txt` file; none if a file was one document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Documents in all shards.
    pub documents: u64,
    /// Token ids in all shards.
    pub tokens: u64,
    /// UTF-8 bytes of text that were tokenised.
    pub text_bytes: u64,
    /// Documents without text, which are left out.
    pub empty_documents: u64,
    /// Lines, rows and files that were left out because they were broken (`--on-error skip`).
    pub skipped: u64,
    /// What was read, in order.
    pub sources: Vec<ManifestSource>,
    /// What was written, in order.
    pub shards: Vec<ManifestShard>,
}

/// Part `index` of `count` of a corpus, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartOf {
    /// Which part, from 1.
    pub index: u32,
    /// How many parts there are.
    pub count: u32,
}

impl PartOf {
    /// All of it.
    pub const WHOLE: Self = Self { index: 1, count: 1 };

    /// Name of the part's manifest.
    pub fn manifest_name(self) -> String {
        match self.count {
            1 => "manifest.json".to_owned(),
            _ => format!("manifest-{}.json", self.label()),
        }
    }

    /// Name of the part's shard `number`.
    pub fn shard_name(self, number: usize) -> String {
        match self.count {
            1 => format!("shard-{number:05}.tokens"),
            _ => format!("part-{}-shard-{number:05}.tokens", self.label()),
        }
    }

    /// The part in file names, `002-of-010`.
    fn label(self) -> String {
        let width = self.count.to_string().len();
        format!("{:0width$}-of-{}", self.index, self.count)
    }
}

/// The tokenizer of a corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestTokenizer {
    /// Name of the copy beside the manifest: `tokenizer.json` or `tokenizer.model`.
    pub file: String,
    /// SHA-256 of that file, in hexadecimal.
    pub sha256: String,
    /// V: ids are below it.
    pub vocab_size: u32,
    /// Id before every document.
    pub bos: Option<u32>,
    /// Id after every document.
    pub eos: Option<u32>,
}

/// One file of text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestSource {
    /// Its path, as it was given.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Documents that were taken from it.
    pub documents: u64,
    /// Tokens that were made of it.
    pub tokens: u64,
    /// UTF-8 bytes of text that were taken from it.
    pub text_bytes: u64,
    /// Documents without text.
    pub empty_documents: u64,
    /// Lines and rows that were left out because they were broken.
    pub skipped: u64,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestShard {
    /// Its name, in the directory of the manifest.
    pub file: String,
    /// Documents in it.
    pub documents: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// [`ShardHeader::checksum`], in hexadecimal.
    pub checksum: String,
}

impl ManifestShard {
    /// The entry of a shard.
    pub fn new(file: String, header: &ShardHeader) -> Self {
        let checksum = format!("{:016x}", header.checksum());
        Self { file, documents: header.documents, tokens: header.tokens, checksum }
    }
}

impl Manifest {
    /// A manifest without sources and shards yet.
    pub fn new(
        part: PartOf,
        tokenizer: ManifestTokenizer,
        field: String,
        separator: Option<String>,
    ) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            part,
            tokenizer,
            field,
            separator,
            documents: 0,
            tokens: 0,
            text_bytes: 0,
            empty_documents: 0,
            skipped: 0,
            sources: Vec::new(),
            shards: Vec::new(),
        }
    }

    /// Reads a manifest and checks that it agrees with itself.
    ///
    /// # Errors
    /// A file that cannot be read, is no manifest, or contradicts itself.
    pub fn read(path: &Path) -> Result<Self> {
        let file = path.display().to_string();
        let read = || {
            let bytes = fs::metadata(path)?.len();
            if bytes > MAX_BYTES {
                let what = format!("a manifest of {bytes} bytes; at most {MAX_BYTES} are read");
                return Err(std::io::Error::other(what));
            }
            fs::read(path)
        };
        match read() {
            Ok(bytes) => Self::parse(&file, &bytes),
            Err(reason) => Err(Error::Read { file, reason }),
        }
    }

    /// A manifest from its bytes; `file` names it in messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let malformed = |what| Error::Malformed { file: file.to_owned(), what };
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| malformed(format!("this is no manifest of token shards: {error}")))?;
        match manifest.contradiction() {
            None => Ok(manifest),
            Some(what) => Err(malformed(what)),
        }
    }

    /// What is wrong with it.
    fn contradiction(&self) -> Option<String> {
        if self.format != FORMAT || self.version != VERSION {
            return Some(format!(
                "format {:?}, version {}; this program reads {FORMAT:?}, version {VERSION}",
                self.format, self.version
            ));
        }
        if self.part.index == 0 || self.part.index > self.part.count {
            return Some(format!("part {} of {}", self.part.index, self.part.count));
        }
        if self.tokenizer_sha256().is_none() {
            return Some(format!("{:?} is no SHA-256", self.tokenizer.sha256));
        }
        // A name with a path in it could lead anywhere.
        let names = self.shards.iter().map(|shard| &shard.file).chain([&self.tokenizer.file]);
        if let Some(name) = names.into_iter().find(|name| !is_plain_name(name)) {
            return Some(format!("{name:?} is not the name of a file beside the manifest"));
        }
        let sum = |count: fn(&ManifestShard) -> u64| -> u128 {
            self.shards.iter().map(|shard| u128::from(count(shard))).sum()
        };
        let sums = [
            ("tokens", self.tokens, sum(|shard| shard.tokens)),
            ("documents", self.documents, sum(|shard| shard.documents)),
        ];
        sums.into_iter()
            .find(|&(_, total, sum)| sum != u128::from(total))
            .map(|(what, total, sum)| format!("{total} {what} in all, but the shards have {sum}"))
    }

    /// What decides how a text becomes tokens and was decided otherwise in another manifest.
    pub(super) fn compare_options(&self, now: &Self) -> Differences {
        let mut differences = Differences::default();
        let (was, is) = (&self.tokenizer, &now.tokenizer);
        differences.value("tokenizer", &was.sha256, &is.sha256);
        differences.option("token before a document", was.bos, is.bos);
        differences.option("token after a document", was.eos, is.eos);
        differences.value("field of the text", &self.field, &now.field);
        let separators = (self.separator.as_ref(), now.separator.as_ref());
        differences.option("document separator", separators.0, separators.1);
        differences
    }

    /// Files and their sizes.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sources.iter().map(|source| (source.file.as_str(), source.bytes))
    }

    /// The tokenizer's hash as bytes.
    pub fn tokenizer_sha256(&self) -> Option<[u8; 32]> {
        let hex = self.tokenizer.sha256.as_bytes();
        let mut bytes = [0; 32];
        if hex.len() != 64 {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(bytes)
    }

    /// The manifest as it is written.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        json.push(b'\n');
        json
    }

    /// All manifests in a directory, by name.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn find(directory: &Path) -> Result<Vec<PathBuf>> {
        let list = || {
            let mut found = Vec::new();
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                let name = entry.file_name();
                let name = name.to_string_lossy();
                let is_part = name.starts_with("manifest-") && name.ends_with(".json");
                if is_part || name == PartOf::WHOLE.manifest_name() {
                    found.push(entry.path());
                }
            }
            found.sort();
            Ok(found)
        };
        list().map_err(|reason| Error::Read { file: directory.display().to_string(), reason })
    }
}

/// Whether a name has no path in it and is not hidden.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}
