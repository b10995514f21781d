//! All shards of a corpus as one stream of tokens.

use std::hash::Hasher;
use std::ops::Range;
use std::path::{Path, PathBuf};

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::error::{Error, Result};
use sha2::{Digest, Sha256};
use twox_hash::XxHash3_64;

use super::manifest::{Manifest, ManifestTokenizer};
use super::shard::TokenShard;

/// Token shards of one or more directories, in the order in which they were given, as one stream of tokens.
///
/// Nothing is read but headers and document ends until a method asks for tokens.
#[derive(Debug)]
pub struct Dataset {
    label: String,
    shards: Vec<TokenShard>,
    /// Tokens before each shard, and in all.
    first_tokens: Vec<u64>,
    /// Documents before each shard, and in all.
    first_documents: Vec<u64>,
    tokenizer: ManifestTokenizer,
    tokenizer_sha256: [u8; 32],
    directory: PathBuf,
}

impl Dataset {
    /// Opens directories that `mmfree tokenize` made. All must be of one tokenizer, and of each corpus that
    /// was made in parts every part must be there.
    ///
    /// # Errors
    /// No directory, no manifest in one of them, parts that are missing, shards of different tokenizers, and
    /// whatever [`Manifest::read`] and [`TokenShard::open`] refuse.
    pub fn open(directories: &[impl AsRef<Path>]) -> Result<Self> {
        let Some(first) = directories.first() else {
            return Err(Error::Invalid("no directory of token shards was named".to_owned()));
        };
        let mut all = Self {
            label: first.as_ref().display().to_string(),
            shards: Vec::new(),
            first_tokens: vec![0],
            first_documents: vec![0],
            // Replaced by that of the first manifest.
            tokenizer: ManifestTokenizer {
                file: String::new(),
                sha256: String::new(),
                vocab_size: 0,
                bos: None,
                eos: None,
            },
            tokenizer_sha256: [0; 32],
            directory: first.as_ref().to_owned(),
        };
        for directory in directories {
            all.add_directory(directory.as_ref())?;
        }
        Ok(all)
    }

    fn add_directory(&mut self, directory: &Path) -> Result<()> {
        let paths = Manifest::find(directory)?;
        let malformed = |what| Error::Malformed { file: directory.display().to_string(), what };
        let manifests =
            paths.iter().map(|path| Manifest::read(path)).collect::<Result<Vec<_>>>()?;
        let Some(first) = manifests.first() else {
            let what = "there is no manifest of token shards; make them with `mmfree tokenize`, or \
                        run it again if it was interrupted";
            return Err(malformed(what.to_owned()));
        };
        let count = first.part.count;
        let mut parts: Vec<_> = manifests.iter().map(|manifest| manifest.part).collect();
        parts.sort_by_key(|part| part.index);
        if parts.iter().any(|part| part.count != count) {
            let what = format!("manifests of {count} parts and of another number of parts");
            return Err(malformed(what));
        }
        let has = |index| parts.binary_search_by_key(&index, |part| part.index).is_ok();
        let missing: Vec<_> = (1..=count).filter(|&index| !has(index)).take(10).collect();
        if !missing.is_empty() {
            let what = format!(
                "parts of the corpus are missing: {missing:?} of {count}; run `mmfree tokenize --shard \
                 {}/{count}` and so on",
                missing[0]
            );
            return Err(malformed(what));
        }
        for (manifest, path) in manifests.iter().zip(&paths) {
            if let Some(list) = first.compare_options(manifest).list() {
                return Err(malformed(format!(
                    "{} was made otherwise than {} ({list}); make all parts with the same options",
                    path.display(),
                    paths[0].display()
                )));
            }
            self.add_manifest(directory, manifest)?;
        }
        Ok(())
    }

    fn add_manifest(&mut self, directory: &Path, manifest: &Manifest) -> Result<()> {
        let sha256 = manifest.tokenizer_sha256().expect("a manifest that was read has a hash");
        if self.tokenizer.file.is_empty() {
            self.tokenizer = manifest.tokenizer.clone();
            self.tokenizer_sha256 = sha256;
        } else if self.tokenizer != manifest.tokenizer {
            return Err(Error::Malformed {
                file: directory.display().to_string(),
                what: format!(
                    "shards of another tokenizer: {} and {} tokens; those of {} have {} and {} tokens; \
                     tokenise both texts with the same one",
                    manifest.tokenizer.sha256,
                    manifest.tokenizer.vocab_size,
                    self.label,
                    self.tokenizer.sha256,
                    self.tokenizer.vocab_size
                ),
            });
        }
        for entry in &manifest.shards {
            let shard = TokenShard::open(&directory.join(&entry.file))?;
            let malformed = |what| Error::Malformed { file: shard.file().to_owned(), what };
            let header = shard.header();
            if header.tokenizer_sha256 != sha256
                || header.vocab_size != manifest.tokenizer.vocab_size
            {
                let what = "the shard is of another tokenizer than its manifest";
                return Err(malformed(what.to_owned()));
            }
            let checksum = format!("{:016x}", header.checksum());
            if checksum != entry.checksum {
                return Err(malformed(format!(
                    "checksum {checksum}, but the manifest has {}; make the shards anew",
                    entry.checksum
                )));
            }
            let overflow = || malformed("more tokens than a number holds".to_owned());
            let (tokens, documents) = (self.tokens(), self.documents());
            let tokens = tokens.checked_add(header.tokens).ok_or_else(overflow)?;
            let documents = documents.checked_add(header.documents).ok_or_else(overflow)?;
            self.first_tokens.push(tokens);
            self.first_documents.push(documents);
            self.shards.push(shard);
        }
        Ok(())
    }

    /// The first directory, for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Tokens in all shards.
    pub fn tokens(&self) -> u64 {
        *self.first_tokens.last().expect("never empty")
    }

    /// Documents in all shards.
    pub fn documents(&self) -> u64 {
        *self.first_documents.last().expect("never empty")
    }

    /// XXH3-64 of the checksums of all shards, in order: other tokens have another one.
    pub fn checksum(&self) -> u64 {
        let mut hasher = XxHash3_64::new();
        for shard in &self.shards {
            hasher.write(&shard.header().checksum().to_le_bytes());
        }
        hasher.finish()
    }

    /// V: all ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size as usize
    }

    /// What the manifest says of the tokenizer.
    pub fn tokenizer(&self) -> &ManifestTokenizer {
        &self.tokenizer
    }

    /// SHA-256 of the tokenizer file.
    pub fn tokenizer_sha256(&self) -> [u8; 32] {
        self.tokenizer_sha256
    }

    /// Where the tokenizer lies, beside the shards.
    pub fn tokenizer_path(&self) -> PathBuf {
        self.directory.join(&self.tokenizer.file)
    }

    /// The tokenizer that lies beside the shards: what a checkpoint trained on them needs.
    ///
    /// # Errors
    /// A file that cannot be read, or is not the one that made the shards.
    pub fn tokenizer_source(&self) -> Result<TokenizerSource> {
        let path = self.tokenizer_path();
        let source = TokenizerSource::open(&path)?;
        self.require_tokenizer(&path.display().to_string(), &source)?;
        Ok(source)
    }

    /// Checks that a tokenizer is the one that made these shards; `label` names it in the error.
    ///
    /// # Errors
    /// It is another one.
    pub fn require_tokenizer(&self, label: &str, source: &TokenizerSource) -> Result<()> {
        let sha256 = tokenizer_sha256(source);
        if sha256 == self.tokenizer_sha256 {
            return Ok(());
        }
        Err(Error::Malformed {
            file: self.label.clone(),
            what: format!(
                "the shards are of another tokenizer ({}, {} tokens) than {label} ({}); tokenise the \
                 text again with `mmfree tokenize --tokenizer {label}`",
                self.tokenizer.sha256,
                self.tokenizer.vocab_size,
                hex(&sha256)
            ),
        })
    }

    /// Token after the last one of a document, in the stream of all shards.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn document_end(&self, document: u64) -> u64 {
        let shard = containing(&self.first_documents, document);
        let end = self.shards[shard].document_end(document - self.first_documents[shard]);
        self.first_tokens[shard] + end
    }

    /// Appends the ids of a range of the stream to `out`.
    ///
    /// # Errors
    /// As [`TokenShard::read`].
    ///
    /// # Panics
    /// If the range does not lie inside the stream.
    pub fn read(&self, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        let mut start = range.start;
        while start < range.end {
            let shard = containing(&self.first_tokens, start);
            let first = self.first_tokens[shard];
            let end = range.end.min(self.first_tokens[shard + 1]);
            self.shards[shard].read(start - first..end - first, out)?;
            start = end;
        }
        Ok(())
    }

    /// Reads every token and compares every checksum; `progress` is told how many of how many tokens.
    ///
    /// # Errors
    /// As [`TokenShard::read`]; a tokenizer file that is not the one that made the shards.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        self.tokenizer_source()?;
        let (mut done, total) = (0, self.tokens());
        for shard in &self.shards {
            shard.verify(&mut |tokens| {
                done += tokens;
                progress(done, total);
            })?;
        }
        Ok(())
    }
}

/// The part that holds `position`, given where each part begins and where the last one ends.
///
/// # Panics
/// If `position` is not before the last end.
pub(super) fn containing(starts: &[u64], position: u64) -> usize {
    assert!(position < *starts.last().expect("never empty"), "position {position}");
    starts.partition_point(|&start| start <= position) - 1
}

/// SHA-256 of a tokenizer file: what `sha256sum` prints for it.
pub(super) fn tokenizer_sha256(source: &TokenizerSource) -> [u8; 32] {
    let (TokenizerKind::HuggingFace(bytes) | TokenizerKind::SentencePiece(bytes)) = &source.kind;
    Sha256::digest(bytes).into()
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
