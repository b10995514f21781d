//! One file of token ids. `docs/token-shards.md` has the byte layout.

use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use mmfree::error::{Error, Result};
use mmfree_kernels::memory::Bytes;
use twox_hash::XxHash3_64;

const MAGIC: [u8; 8] = *b"MMTOKENS";
const VERSION: u32 = 1;
/// Bytes of the header.
const HEADER_BYTES: usize = 128;
/// Where the header's own checksum lies: the last eight bytes.
const HEADER_CHECKSUM: usize = HEADER_BYTES - 8;
/// Token bytes that share a checksum.
const BLOCK_BYTES: usize = 64 << 10;
/// Largest vocabulary: that of the largest model that is read.
const MAX_VOCAB: u32 = 1 << 22;

/// Bytes of a stored token id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenWidth {
    /// Two bytes: vocabularies of up to 65,536 tokens.
    U16,
    /// Four bytes.
    U32,
}

impl TokenWidth {
    /// The narrowest that holds every id of a vocabulary.
    pub fn for_vocab(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes of one id.
    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// What the first bytes of a shard say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardHeader {
    /// V of the tokenizer: every id is below it.
    pub vocab_size: u32,
    /// Ids in the shard.
    pub tokens: u64,
    /// Documents in the shard.
    pub documents: u64,
    /// SHA-256 of the tokenizer file.
    pub tokenizer_sha256: [u8; 32],
    /// XXH3-64 of the tables behind the tokens: document ends, then block checksums.
    tables_checksum: u64,
}

impl ShardHeader {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let width = TokenWidth::for_vocab(self.vocab_size).bytes() as u32;
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&width.to_le_bytes());
        put(&self.vocab_size.to_le_bytes());
        put(&(BLOCK_BYTES as u32).to_le_bytes());
        put(&self.tokens.to_le_bytes());
        put(&self.documents.to_le_bytes());
        put(&self.tokenizer_sha256);
        put(&self.tables_checksum.to_le_bytes());
        let checksum = XxHash3_64::oneshot(&bytes[..HEADER_CHECKSUM]);
        bytes[HEADER_CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks a header; the error says what is wrong.
    fn parse(bytes: &[u8; HEADER_BYTES]) -> std::result::Result<Self, String> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if bytes[..8] != MAGIC {
            return Err("this is no token shard: it does not begin with MMTOKENS".to_owned());
        }
        if u32_at(8) != VERSION {
            return Err(format!(
                "version {} of the format; this program reads version {VERSION}",
                u32_at(8)
            ));
        }
        let found = u64_at(bytes, HEADER_CHECKSUM);
        let expected = XxHash3_64::oneshot(&bytes[..HEADER_CHECKSUM]);
        if found != expected {
            return Err(corrupt("header", expected, found));
        }
        let (width, vocab_size, block_bytes) = (u32_at(12), u32_at(16), u32_at(20));
        if vocab_size == 0 || vocab_size > MAX_VOCAB {
            return Err(format!("a vocabulary of {vocab_size}; expected 1 to {MAX_VOCAB}"));
        }
        let expected = TokenWidth::for_vocab(vocab_size).bytes();
        if width as usize != expected {
            return Err(format!(
                "{width} bytes a token; expected {expected} for a vocabulary of {vocab_size}"
            ));
        }
        if block_bytes as usize != BLOCK_BYTES {
            return Err(format!("blocks of {block_bytes} bytes; expected {BLOCK_BYTES}"));
        }
        Ok(Self {
            vocab_size,
            tokens: u64_at(bytes, 24),
            documents: u64_at(bytes, 32),
            tokenizer_sha256: bytes[40..72].try_into().expect("32 bytes"),
            tables_checksum: u64_at(bytes, 72),
        })
    }

    /// The checksum that stands for the whole file: the header's, which covers the tables', which cover
    /// every block of tokens.
    pub fn checksum(&self) -> u64 {
        u64_at(&self.to_bytes(), HEADER_CHECKSUM)
    }

    fn width(&self) -> TokenWidth {
        TokenWidth::for_vocab(self.vocab_size)
    }

    /// Where the parts of the file begin; `None` if a size overflows.
    fn layout(&self) -> Option<Layout> {
        let data_bytes = self.tokens.checked_mul(self.width().bytes() as u64)?;
        let tables = (HEADER_BYTES as u64).checked_add(data_bytes)?.checked_next_multiple_of(8)?;
        let blocks = data_bytes.div_ceil(BLOCK_BYTES as u64);
        let checksums = tables.checked_add(self.documents.checked_mul(8)?)?;
        let end = checksums.checked_add(blocks * 8)?;
        Some(Layout { data_bytes, tables, checksums, end })
    }
}

/// Byte offsets in a shard.
struct Layout {
    data_bytes: u64,
    tables: u64,
    checksums: u64,
    end: u64,
}

/// A memory-mapped shard. Opening checks header, sizes and tables; tokens are checked block by block when
/// they are first read.
#[derive(Debug)]
pub struct TokenShard {
    file: String,
    header: ShardHeader,
    bytes: Bytes,
    data_bytes: usize,
    tables: usize,
    checksums: usize,
    /// One bit a block: its checksum has been found right.
    verified: Vec<AtomicU64>,
}

impl TokenShard {
    /// Maps a shard.
    ///
    /// # Errors
    /// A file that is not a shard, is truncated, or whose header or tables are corrupt.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.display().to_string();
        match Bytes::map(path) {
            Ok(bytes) => Self::from_bytes(file, bytes),
            Err(reason) => Err(Error::Read { file, reason }),
        }
    }

    /// A shard in memory; `file` names it in messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(file: String, bytes: Bytes) -> Result<Self> {
        let length = bytes.len() as u64;
        let truncated = |what: &str, expected| Error::Truncated {
            file: file.clone(),
            what: what.to_owned(),
            expected,
            found: length,
        };
        let malformed = |what| Error::Malformed { file: file.clone(), what };
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(truncated("the header of a token shard", HEADER_BYTES as u64));
        };
        let header = ShardHeader::parse(head).map_err(malformed)?;
        let layout = header.layout().ok_or_else(|| {
            malformed(format!(
                "impossible sizes: {} tokens, {} documents",
                header.tokens, header.documents
            ))
        })?;
        if length < layout.end {
            return Err(truncated("the token shard", layout.end));
        }
        if length > layout.end {
            return Err(malformed(format!(
                "{} bytes follow the end of the shard at byte {}",
                length - layout.end,
                layout.end
            )));
        }
        // The file is in memory, so its offsets fit.
        let (tables, checksums) = (layout.tables as usize, layout.checksums as usize);
        let found = XxHash3_64::oneshot(&bytes[tables..]);
        if found != header.tables_checksum {
            return Err(malformed(corrupt("tables", header.tables_checksum, found)));
        }
        let mut previous = 0;
        for (document, end) in bytes[tables..checksums].chunks_exact(8).enumerate() {
            let end = u64::from_le_bytes(end.try_into().expect("8 bytes"));
            if end <= previous || end > header.tokens {
                return Err(malformed(format!(
                    "document {document} ends at token {end}, after {previous} of {} tokens",
                    header.tokens
                )));
            }
            previous = end;
        }
        if previous != header.tokens {
            return Err(malformed(format!(
                "the last document ends at token {previous} of {}",
                header.tokens
            )));
        }
        let blocks = (bytes.len() - checksums) / 8;
        let verified = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let data_bytes = layout.data_bytes as usize;
        Ok(Self { file, header, bytes, data_bytes, tables, checksums, verified })
    }

    /// The header.
    pub fn header(&self) -> &ShardHeader {
        &self.header
    }

    /// Name of the file, for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Token after the last one of a document.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn document_end(&self, document: u64) -> u64 {
        assert!(
            document < self.header.documents,
            "document {document} of {}",
            self.header.documents
        );
        u64_at(&self.bytes, self.tables + 8 * document as usize)
    }

    /// Appends the ids of a range of tokens to `out`.
    ///
    /// # Errors
    /// A block that does not have its checksum; an id outside the vocabulary.
    ///
    /// # Panics
    /// If the range does not lie inside the shard.
    pub fn read(&self, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        assert!(range.start <= range.end && range.end <= self.header.tokens, "tokens {range:?}");
        let width = self.header.width().bytes();
        let (start, end) = (range.start as usize * width, range.end as usize * width);
        for block in start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            self.verify_block(block)?;
        }
        let stored = &self.bytes[HEADER_BYTES..][start..end];
        let first = out.len();
        match self.header.width() {
            TokenWidth::U16 => out.extend(
                stored.chunks_exact(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))),
            ),
            TokenWidth::U32 => out.extend(
                stored
                    .chunks_exact(4)
                    .map(|id| u32::from_le_bytes(id.try_into().expect("4 bytes"))),
            ),
        }
        let vocab_size = self.header.vocab_size;
        match out[first..].iter().position(|&id| id >= vocab_size) {
            None => Ok(()),
            Some(at) => Err(self.malformed(format!(
                "token {} has the id {}, outside the vocabulary of {vocab_size}",
                range.start + at as u64,
                out[first + at]
            ))),
        }
    }

    /// Reads everything.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let step = (BLOCK_BYTES / self.header.width().bytes()) as u64;
        let mut ids = Vec::new();
        for start in (0..self.header.tokens).step_by(step as usize) {
            ids.clear();
            let end = self.header.tokens.min(start + step);
            self.read(start..end, &mut ids)?;
            progress(end - start);
        }
        Ok(())
    }

    fn verify_block(&self, block: usize) -> Result<()> {
        let (word, bit) = (&self.verified[block / 64], 1 << (block % 64));
        if word.load(Ordering::Relaxed) & bit != 0 {
            return Ok(());
        }
        let start = block * BLOCK_BYTES;
        let end = self.data_bytes.min(start + BLOCK_BYTES);
        let found = XxHash3_64::oneshot(&self.bytes[HEADER_BYTES..][start..end]);
        let expected = u64_at(&self.bytes, self.checksums + 8 * block);
        if found != expected {
            let what = format!("bytes {} to {}", HEADER_BYTES + start, HEADER_BYTES + end);
            return Err(self.malformed(corrupt(&what, expected, found)));
        }
        word.fetch_or(bit, Ordering::Relaxed);
        Ok(())
    }

    fn malformed(&self, what: String) -> Error {
        Error::Malformed { file: self.file.clone(), what }
    }
}

/// Writes a shard document by document.
///
/// While it grows it lies in two files beside its final name, `NAME.partial` (header and tokens) and
/// `NAME.ends.partial` (document ends). [`sync`](Self::sync) makes what was written so far last, and
/// [`resume`](Self::resume) goes on from there after the process was killed, to the same bytes.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    header: ShardHeader,
    /// Tokens of the documents that are complete.
    document_start: u64,
    tokens: BufWriter<File>,
    ends: BufWriter<File>,
    /// Token bytes since the last whole block.
    block: Vec<u8>,
    checksums: Vec<u64>,
}

impl ShardWriter {
    /// Begins a shard.
    ///
    /// # Errors
    /// A directory that cannot be written.
    pub fn create(path: &Path, vocab_size: u32, tokenizer_sha256: [u8; 32]) -> Result<Self> {
        Self::resume(path, vocab_size, tokenizer_sha256, 0, 0)
    }

    /// Goes on after the first `documents` documents, which have `tokens` tokens.
    ///
    /// # Errors
    /// The partial files are shorter than that, or cannot be written.
    pub fn resume(
        path: &Path,
        vocab_size: u32,
        tokenizer_sha256: [u8; 32],
        tokens: u64,
        documents: u64,
    ) -> Result<Self> {
        let header =
            ShardHeader { vocab_size, tokens, documents, tokenizer_sha256, tables_checksum: 0 };
        let layout =
            header.layout().ok_or_else(|| Error::Invalid("a shard too large".to_owned()))?;
        let is_new = documents == 0;
        let open = |path: PathBuf, length: u64| {
            let open = || {
                let mut options = fs::OpenOptions::new();
                let mut file =
                    options.read(true).write(true).create(is_new).truncate(is_new).open(&path)?;
                if file.metadata()?.len() < length && !is_new {
                    let what = format!("it has fewer than the {length} bytes that were recorded");
                    return Err(std::io::Error::other(what));
                }
                file.set_len(length)?;
                file.seek(SeekFrom::Start(length))?;
                Ok(file)
            };
            open().map_err(|reason| Error::Write { file: path.display().to_string(), reason })
        };
        let document_start = tokens;
        let tokens = open(partial(path, ""), HEADER_BYTES as u64 + layout.data_bytes)?;
        let ends = open(partial(path, ".ends"), documents * 8)?;
        let mut writer = Self {
            path: path.to_owned(),
            header,
            document_start,
            tokens: BufWriter::with_capacity(1 << 20, tokens),
            ends: BufWriter::with_capacity(1 << 16, ends),
            block: Vec::with_capacity(BLOCK_BYTES),
            checksums: Vec::new(),
        };
        writer.read_back(layout.data_bytes).map_err(|reason| writer.failed(reason))?;
        Ok(writer)
    }

    /// Checksums of the tokens that are there already. Leaves the file at the start of the last block, which is
    /// written again with what joins it.
    fn read_back(&mut self, data_bytes: u64) -> std::io::Result<()> {
        let file = self.tokens.get_mut();
        file.seek(SeekFrom::Start(HEADER_BYTES as u64))?;
        let mut left = data_bytes as usize;
        while left >= BLOCK_BYTES {
            self.block.resize(BLOCK_BYTES, 0);
            file.read_exact(&mut self.block)?;
            self.checksums.push(XxHash3_64::oneshot(&self.block));
            left -= BLOCK_BYTES;
        }
        self.block.resize(left, 0);
        file.read_exact(&mut self.block)?;
        file.seek_relative(-(left as i64))
    }

    /// Appends tokens to the document that is being written.
    ///
    /// # Errors
    /// Errors of writing; an id outside the vocabulary.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        if let Some(&id) = ids.iter().find(|&&id| id >= self.header.vocab_size) {
            return Err(Error::TokenId { id, vocab_size: self.header.vocab_size as usize });
        }
        for &id in ids {
            match self.header.width() {
                TokenWidth::U16 => self.block.extend((id as u16).to_le_bytes()),
                TokenWidth::U32 => self.block.extend(id.to_le_bytes()),
            }
            if self.block.len() == BLOCK_BYTES {
                self.end_block()?;
            }
        }
        self.header.tokens += ids.len() as u64;
        Ok(())
    }

    /// Takes back the tokens that were pushed since the last document ended.
    ///
    /// # Errors
    /// Errors of writing.
    pub fn abandon_document(&mut self) -> Result<()> {
        self.header.tokens = self.document_start;
        let data_bytes = self.document_start as usize * self.header.width().bytes();
        let (blocks, rest) = (data_bytes / BLOCK_BYTES, data_bytes % BLOCK_BYTES);
        if blocks == self.checksums.len() {
            self.block.truncate(rest);
            return Ok(());
        }
        self.checksums.truncate(blocks);
        let mut take_back = || {
            self.tokens.flush()?;
            let file = self.tokens.get_mut();
            file.seek(SeekFrom::Start((HEADER_BYTES + blocks * BLOCK_BYTES) as u64))?;
            self.block.resize(rest, 0);
            file.read_exact(&mut self.block)?;
            file.seek_relative(-(rest as i64))?;
            file.set_len((HEADER_BYTES + data_bytes) as u64)
        };
        take_back().map_err(|reason| self.failed(reason))
    }

    /// Ends the document that is being written.
    ///
    /// # Errors
    /// Errors of writing.
    pub fn end_document(&mut self) -> Result<()> {
        let end = self.header.tokens.to_le_bytes();
        self.ends.write_all(&end).map_err(|reason| self.failed(reason))?;
        self.header.documents += 1;
        self.document_start = self.header.tokens;
        Ok(())
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Documents so far.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// Makes everything up to here survive the process and the machine. To be called between documents.
    ///
    /// # Errors
    /// Errors of writing, a full disk for example.
    pub fn sync(&mut self) -> Result<()> {
        let mut sync = || {
            // The last block stays in memory for its checksum; the file gets what it has so far.
            let start = self.tokens.stream_position()?;
            self.tokens.write_all(&self.block)?;
            self.tokens.flush()?;
            self.tokens.get_ref().sync_data()?;
            self.tokens.seek(SeekFrom::Start(start))?;
            self.ends.flush()?;
            self.ends.get_ref().sync_data()
        };
        sync().map_err(|reason| self.failed(reason))
    }

    /// Completes the shard and gives it its name.
    ///
    /// # Errors
    /// Errors of writing. The partial files are left, so that the work can go on.
    pub fn finish(mut self) -> Result<ShardHeader> {
        let write = |writer: &mut Self| {
            let padding = writer.block.len().next_multiple_of(8) - writer.block.len();
            if !writer.block.is_empty() {
                writer.checksums.push(XxHash3_64::oneshot(&writer.block));
            }
            writer.tokens.write_all(&writer.block)?;
            writer.tokens.write_all(&[0; 8][..padding])?;
            writer.ends.flush()?;
            let ends = writer.ends.get_mut();
            ends.seek(SeekFrom::Start(0))?;
            let mut hasher = XxHash3_64::new();
            let mut buffer = vec![0; 64 << 10];
            loop {
                let read = ends.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                hasher.write(&buffer[..read]);
                writer.tokens.write_all(&buffer[..read])?;
            }
            for checksum in &writer.checksums {
                hasher.write(&checksum.to_le_bytes());
                writer.tokens.write_all(&checksum.to_le_bytes())?;
            }
            writer.header.tables_checksum = hasher.finish();
            writer.tokens.seek(SeekFrom::Start(0))?;
            writer.tokens.write_all(&writer.header.to_bytes())?;
            writer.tokens.flush()?;
            writer.tokens.get_ref().sync_all()?;
            fs::rename(partial(&writer.path, ""), &writer.path)?;
            sync_directory(&writer.path)?;
            fs::remove_file(partial(&writer.path, ".ends"))
        };
        write(&mut self).map_err(|reason| self.failed(reason))?;
        Ok(self.header)
    }

    /// Removes what there is of a shard that is not finished.
    pub fn remove_partial(path: &Path) {
        let _ = fs::remove_file(partial(path, ""));
        let _ = fs::remove_file(partial(path, ".ends"));
    }

    fn end_block(&mut self) -> Result<()> {
        self.checksums.push(XxHash3_64::oneshot(&self.block));
        self.tokens.write_all(&self.block).map_err(|reason| self.failed(reason))?;
        self.block.clear();
        Ok(())
    }

    fn failed(&self, reason: std::io::Error) -> Error {
        Error::Write { file: self.path.display().to_string(), reason }
    }
}

/// Makes a rename in the directory of `path` last.
pub(super) fn sync_directory(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Name of a file that becomes part of the shard.
fn partial(path: &Path, what: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(what);
    name.push(".partial");
    name.into()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn corrupt(what: &str, expected: u64, found: u64) -> String {
    format!(
        "the {what} are corrupt: checksum {found:016x}, expected {expected:016x}; make the shard anew"
    )
}

#[cfg(test)]
mod tests;
