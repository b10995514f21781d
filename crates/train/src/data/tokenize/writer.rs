//! Ids to shards, with a record of how far the work has come.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mmfree::error::{Error, Result};

use super::journal::{Journal, Progress, replace};
use crate::data::manifest::{Manifest, ManifestShard, ManifestSource, PartOf};
use crate::data::shard::{ShardWriter, TokenShard};
use crate::data::source::{Position, Source, checksum_before, no_text};

/// Most documents of a shard: bounds what opening one costs.
const MAX_DOCUMENTS: u64 = 1 << 24;

/// Writes documents in order.
pub(super) struct Writer {
    output: PathBuf,
    tokenizer_sha256: [u8; 32],
    journal: Journal,
    progress: Progress,
    /// The shard that is being written, from its first document on.
    shard: Option<ShardWriter>,
    /// Bytes of text and tokens of the document that is being written.
    document: (u64, u64),
    /// A part of the document was broken: the rest of it is left out, too.
    abandons: bool,
    last_record: Instant,
    sync_interval: Duration,
}

impl Writer {
    /// Goes on from what was recorded.
    pub(super) fn new(
        output: &Path,
        tokenizer_sha256: [u8; 32],
        journal: Journal,
        progress: Progress,
        sync_interval: Duration,
    ) -> Result<Self> {
        let mut writer = Self {
            output: output.to_owned(),
            tokenizer_sha256,
            journal,
            progress,
            shard: None,
            document: (0, 0),
            abandons: false,
            last_record: Instant::now(),
            sync_interval,
        };
        let (tokens, documents) = (writer.progress.shard_tokens, writer.progress.shard_documents);
        if documents > 0 {
            let path = writer.shard_path();
            if path.exists() {
                writer.adopt(&path)?;
            } else {
                writer.shard = Some(ShardWriter::resume(
                    &path,
                    writer.progress.manifest.tokenizer.vocab_size,
                    tokenizer_sha256,
                    tokens,
                    documents,
                )?);
                // The process may have ended between the record of a full shard and its completion.
                writer.finish_full_shard()?;
            }
        }
        Ok(writer)
    }

    /// Takes a shard that was completed just before the process ended, after all of it was recorded but for
    /// its name.
    fn adopt(&mut self, path: &Path) -> Result<()> {
        let shard = TokenShard::open(path)?;
        let header = shard.header();
        let recorded = (self.progress.shard_tokens, self.progress.shard_documents);
        if (header.tokens, header.documents) != recorded
            || header.tokenizer_sha256 != self.tokenizer_sha256
        {
            return Err(Error::Malformed {
                file: shard.file().to_owned(),
                what: "the shard is not the one that was being written here; remove the output \
                       directory and begin anew"
                    .to_owned(),
            });
        }
        ShardWriter::remove_partial(path);
        let header = header.clone();
        self.add_shard(ManifestShard::new(self.shard_name(), &header));
        self.journal.write(&self.progress)
    }

    pub(super) fn position(&self) -> Position {
        self.progress.position
    }

    pub(super) fn sources(&self) -> &[Source] {
        &self.progress.job.sources
    }

    pub(super) fn tokens(&self) -> u64 {
        self.progress.manifest.tokens
    }

    /// Takes ids of a document or of a part of one; `None` if the document turned out to have no text.
    pub(super) fn push(
        &mut self,
        ids: Option<&[u32]>,
        text_bytes: u64,
        ends: bool,
        after: Position,
    ) -> Result<()> {
        if self.abandons {
            self.abandons = !ends;
            return if ends { self.advance(after) } else { Ok(()) };
        }
        let Some(ids) = ids else {
            self.source(after).empty_documents += 1;
            self.progress.manifest.empty_documents += 1;
            return self.advance(after);
        };
        if self.shard.is_none() {
            let vocab_size = self.progress.manifest.tokenizer.vocab_size;
            let path = self.shard_path();
            self.shard = Some(ShardWriter::create(&path, vocab_size, self.tokenizer_sha256)?);
        }
        let shard = self.shard.as_mut().expect("just made");
        shard.push(ids)?;
        self.document.0 += text_bytes;
        self.document.1 += ids.len() as u64;
        if !ends {
            return Ok(());
        }
        shard.end_document()?;
        let (bytes, tokens) = std::mem::take(&mut self.document);
        let source = self.source(after);
        source.documents += 1;
        source.tokens += tokens;
        source.text_bytes += bytes;
        let manifest = &mut self.progress.manifest;
        manifest.documents += 1;
        manifest.tokens += tokens;
        manifest.text_bytes += bytes;
        self.advance(after)?;
        self.finish_full_shard()
    }

    /// Completes the shard if it has its size.
    fn finish_full_shard(&mut self) -> Result<()> {
        let most = self.progress.job.shard_tokens;
        let is_full =
            |shard: &ShardWriter| shard.tokens() >= most || shard.documents() >= MAX_DOCUMENTS;
        if self.shard.as_ref().is_some_and(is_full) { self.finish_shard() } else { Ok(()) }
    }

    /// Counts something broken that is left out, and the whole document if it is a part of one.
    pub(super) fn skip(&mut self, ends: bool, after: Position) -> Result<()> {
        if self.document.1 > 0
            && let Some(shard) = &mut self.shard
        {
            shard.abandon_document()?;
        }
        self.document = (0, 0);
        // A file that broke off is followed by the start of the next.
        let of = if after.offset == 0 { after.source.saturating_sub(1) } else { after.source };
        self.progress.manifest.sources[of].skipped += u64::from(!self.abandons);
        self.progress.manifest.skipped += u64::from(!self.abandons);
        self.abandons = !ends;
        if ends { self.advance(after) } else { Ok(()) }
    }

    fn source(&mut self, after: Position) -> &mut ManifestSource {
        &mut self.progress.manifest.sources[after.source]
    }

    /// A document is done: it is time to record that every now and then.
    fn advance(&mut self, after: Position) -> Result<()> {
        self.progress.position = after;
        if self.last_record.elapsed() >= self.sync_interval {
            self.record()?;
        }
        Ok(())
    }

    /// Makes everything up to the last document durable and records it.
    pub(super) fn record(&mut self) -> Result<()> {
        self.progress.read = None;
        (self.progress.shard_tokens, self.progress.shard_documents) = (0, 0);
        if let Some(shard) = &mut self.shard {
            shard.sync()?;
            self.progress.shard_documents = shard.documents();
            self.progress.shard_tokens = shard.tokens() - self.document.1;
        }
        self.journal.write(&self.progress)?;
        self.last_record = Instant::now();
        Ok(())
    }

    /// Records, too, what was read of the file that has something broken, so that the rest of it may be mended.
    pub(super) fn record_broken(&mut self) -> Result<()> {
        self.record()?;
        let Position { source, offset, .. } = self.progress.position;
        let source = self.progress.job.sources.get(source);
        self.progress.read = source.and_then(|source| checksum_before(source, offset));
        self.journal.write(&self.progress)
    }

    fn finish_shard(&mut self) -> Result<()> {
        // If the process ends before the shard has its name, or before that is recorded, the work goes on
        // from this record either way.
        self.record()?;
        if let Some(shard) = self.shard.take() {
            let header = shard.finish()?;
            self.add_shard(ManifestShard::new(self.shard_name(), &header));
            self.journal.write(&self.progress)?;
        }
        Ok(())
    }

    fn add_shard(&mut self, shard: ManifestShard) {
        self.progress.manifest.shards.push(shard);
        (self.progress.shard_tokens, self.progress.shard_documents) = (0, 0);
    }

    fn shard_name(&self) -> String {
        let manifest = &self.progress.manifest;
        manifest.part.shard_name(manifest.shards.len())
    }

    fn shard_path(&self) -> PathBuf {
        self.output.join(self.shard_name())
    }

    /// Completes the last shard and writes the manifest.
    ///
    /// # Errors
    /// A corpus without any text, of which nothing is left but the copy of the tokenizer; errors of writing.
    pub(super) fn finish(mut self, manifest_path: &Path) -> Result<Manifest> {
        let manifest = &self.progress.manifest;
        // A part of a corpus may have nothing to do.
        let is_missing = manifest.documents == 0 && manifest.part == PartOf::WHOLE;
        let files = manifest.files().map(|(file, _)| file);
        let error = is_missing.then(|| no_text(files, manifest.empty_documents, manifest.skipped));
        if self.shard.as_ref().is_some_and(|shard| shard.documents() > 0) {
            self.finish_shard()?;
        } else if self.shard.is_some() {
            ShardWriter::remove_partial(&self.shard_path());
        }
        if let Some(error) = error {
            self.journal.remove();
            return Err(error);
        }
        replace(manifest_path, &self.progress.manifest.to_json())?;
        self.journal.remove();
        Ok(self.progress.manifest)
    }
}
