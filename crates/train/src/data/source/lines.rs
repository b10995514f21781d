//! Files that are read from start to end: lines of JSON and plain text, compressed or not.

use std::fs::File;
use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicU64, Ordering};

use mmfree::error::{Error, Result};
use mmfree::tokenizer::{EncodeSession, TextSplitter, Tokenizer};
use twox_hash::XxHash3_64;

use super::{Content, Emit, Format, Item, Position, Source};

/// Longest line of JSON that is read, in bytes.
const MAX_LINE_BYTES: u64 = 256 << 20;
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of a plain text that are handed on at a time, about.
const PART_BYTES: usize = 1 << 16;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Adds the bytes of the file itself to a counter as they are read.
struct Counted<'a> {
    file: File,
    read: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        self.read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

/// Opens a file at an offset of what is in it. `read` gets the bytes of the file that were read or skipped.
pub(super) fn open<'a>(
    source: &Source,
    offset: u64,
    read: &'a AtomicU64,
) -> io::Result<Box<dyn BufRead + 'a>> {
    let is_compressed = Format::of(&source.file).is_some_and(|(_, is_compressed)| is_compressed);
    let mut file = File::open(&source.file)?;
    if !is_compressed {
        file.seek(SeekFrom::Start(offset))?;
        read.fetch_add(offset, Ordering::Relaxed);
        return Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, Counted { file, read })));
    }
    let mut decoder = zstd::Decoder::new(Counted { file, read })?;
    // What `zstd --ultra --long=31` writes; the window is allocated as far as it is used.
    decoder.window_log_max(31)?;
    io::copy(&mut (&mut decoder).take(offset), &mut io::sink())?;
    Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder)))
}

/// XXH3-64 of what a file of JSON lines has before an offset, after decompression; none of another format, and if
/// there is not so much or it cannot be read.
pub(in crate::data) fn checksum_before(source: &Source, offset: u64) -> Option<u64> {
    let (Format::JsonLines, _) = Format::of(&source.file)? else { return None };
    let mut hasher = XxHash3_64::new();
    let read = AtomicU64::new(0);
    let mut reader = open(source, 0, &read).ok()?.take(offset);
    loop {
        let buffer = reader.fill_buf().ok()?;
        if buffer.is_empty() {
            return (reader.limit() == 0).then(|| hasher.finish());
        }
        hasher.write(buffer);
        let length = buffer.len();
        reader.consume(length);
    }
}

/// An error while reading, with the line at which it happened.
fn read_error(source: &Source, line: u64, reason: io::Error) -> Error {
    let reason = match reason.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other(format!(
            "it ends in the middle of compressed data, after line {line}; is it truncated?"
        )),
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => reason,
        _ => io::Error::new(reason.kind(), format!("after line {line}: {reason}")),
    };
    Error::Read { file: source.file.clone(), reason }
}

/// Reads a line with its end; at most [`MAX_LINE_BYTES`] of it.
fn read_line(reader: &mut dyn BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    line.clear();
    reader.take(MAX_LINE_BYTES + 1).read_until(b'\n', line)
}

/// Reads lines of JSON from a position. Blank lines are no documents.
pub(in crate::data) fn read_lines(
    source: &Source,
    mut at: Position,
    read: &AtomicU64,
    emit: Emit,
) -> Result<()> {
    let failed = |line, reason| read_error(source, line, reason);
    let mut reader = open(source, at.offset, read).map_err(|reason| failed(at.line, reason))?;
    let mut line = Vec::new();
    loop {
        let length = read_line(&mut *reader, &mut line).map_err(|r| failed(at.line, r))? as u64;
        if length == 0 {
            return Ok(());
        }
        at.offset += length;
        at.line += 1;
        let is_too_long = length > MAX_LINE_BYTES;
        if is_too_long {
            at.offset += skip_line(&mut *reader).map_err(|reason| failed(at.line, reason))?;
        }
        if at.line == 1 && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        at.document += 1;
        if !source.has(at.document - 1) {
            continue;
        }
        let content = if is_too_long {
            Content::Broken(Error::Malformed {
                file: format!("{}:{}", source.file, at.line),
                what: format!("a line of more than {} MiB", MAX_LINE_BYTES >> 20),
            })
        } else {
            Content::Json(std::mem::take(&mut line))
        };
        if !emit(Item { content, begins: true, ends: true, after: at }) {
            return Ok(());
        }
    }
}

/// Reads on to the end of a line and returns how many bytes that took.
fn skip_line(reader: &mut dyn BufRead) -> io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let length = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(length);
        skipped += length as u64;
        if end.is_some() || length == 0 {
            return Ok(skipped);
        }
    }
}

/// Checks that a whole file of text is UTF-8, so that it is taken or left as a whole.
///
/// # Errors
/// As [`read_parts`].
pub(in crate::data) fn check_utf8(source: &Source) -> Result<()> {
    read_parts(source, &AtomicU64::new(0), &mut |_| Ok(()))
}

/// Reads a text from start to end and hands it on, without a byte order mark, in parts that end with whole
/// characters.
///
/// # Errors
/// The first byte that is part of no character, with its line; errors of reading; whatever `take` reports.
pub(super) fn read_parts(
    source: &Source,
    read: &AtomicU64,
    take: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let (mut line, mut offset) = (1, 0_u64);
    let failed = |line, reason| read_error(source, line - 1, reason);
    let mut reader = open(source, 0, read).map_err(|reason| failed(line, reason))?;
    let mut pending = Vec::new();
    loop {
        let buffer = reader.fill_buf().map_err(|reason| failed(line, reason))?;
        let length = buffer.len().min(PART_BYTES);
        pending.extend_from_slice(&buffer[..length]);
        reader.consume(length);
        let (text, error) = match std::str::from_utf8(&pending) {
            Ok(text) => (text, None),
            Err(error) => {
                let valid = &pending[..error.valid_up_to()];
                (std::str::from_utf8(valid).unwrap_or_default(), Some(error))
            }
        };
        let end = offset + text.len() as u64;
        line += text.bytes().filter(|&byte| byte == b'\n').count() as u64;
        // A character that a part cuts is completed by the next, if there is one.
        if error.is_some_and(|error| error.error_len().is_some() || length == 0) {
            return Err(Error::Malformed {
                file: format!("{}:{line}", source.file),
                what: format!(
                    "the text is not UTF-8: invalid byte at offset {end}; convert it to UTF-8"
                ),
            });
        }
        let mark = if offset == 0 { "\u{feff}" } else { "" };
        take(text.strip_prefix(mark).unwrap_or(text))?;
        pending.drain(..(end - offset) as usize);
        offset = end;
        if length == 0 {
            return Ok(());
        }
    }
}

/// Reads plain text from a position: one document, or with a `separator` one between each two lines that are
/// equal to it. The file must be UTF-8.
pub(in crate::data) fn read_text(
    source: &Source,
    mut at: Position,
    separator: Option<&str>,
    tokenizer: &Tokenizer,
    read: &AtomicU64,
    emit: Emit,
) -> Result<()> {
    let failed = |line, reason| read_error(source, line, reason);
    let mut reader = open(source, at.offset, read).map_err(|reason| failed(at.line, reason))?;
    let mut document = Document::new(tokenizer, source.has(at.document));
    let mut line = Vec::new();
    let mut starts_line = true;
    // The line break before a separator belongs to neither document: it waits for what follows.
    let mut line_break = "";
    loop {
        // The file may be one long line.
        let length = {
            line.clear();
            let reader = &mut (&mut *reader).take(BUFFER_BYTES as u64);
            reader.read_until(b'\n', &mut line).map_err(|reason| failed(at.line, reason))? as u64
        };
        if length == BUFFER_BYTES as u64 {
            complete_character(&mut *reader, &mut line).map_err(|r| failed(at.line, r))?;
        }
        at.offset += line.len() as u64;
        at.line += u64::from(line.last() == Some(&b'\n'));
        let is_start = at.offset == line.len() as u64;
        let text = line.strip_prefix(if is_start { BYTE_ORDER_MARK } else { b"" }).unwrap_or(&line);
        let text = std::str::from_utf8(text).map_err(|_| Error::Malformed {
            file: source.file.clone(),
            what: "the file was changed while it was read".to_owned(),
        })?;
        let is_end = length == 0;
        let is_separator = starts_line && separator.is_some_and(|line| text.trim_end() == line);
        starts_line = line.last() == Some(&b'\n');
        if is_end || is_separator {
            // What follows the last separator is a document only if there is something.
            if is_end && document.is_blank && at.document > 0 {
                return Ok(());
            }
            at.document += 1;
            if !document.finish(at, emit)? || is_end {
                return Ok(());
            }
            document = Document::new(tokenizer, source.has(at.document));
            line_break = "";
            continue;
        }
        let mut goes_on = document.push(line_break, at, emit)?;
        line_break = match separator {
            Some(_) if text.ends_with("\r\n") => "\r\n",
            Some(_) if text.ends_with('\n') => "\n",
            _ => "",
        };
        let text = &text[..text.len() - line_break.len()];
        goes_on = goes_on && document.push(text, at, emit)?;
        if !goes_on {
            return Ok(());
        }
    }
}

/// Reads the rest of a character whose first bytes end `bytes`.
fn complete_character(reader: &mut dyn BufRead, bytes: &mut Vec<u8>) -> io::Result<()> {
    while std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none()) {
        let Some(&byte) = reader.fill_buf()?.first() else { break };
        bytes.push(byte);
        reader.consume(1);
    }
    Ok(())
}

/// A document of plain text on its way out, in parts.
struct Document<'a> {
    /// Whether it belongs to this job.
    is_ours: bool,
    begins: bool,
    is_blank: bool,
    /// Bytes of text since the last part that went out.
    text_bytes: usize,
    cutter: Cutter<'a>,
}

/// How a document becomes parts.
enum Cutter<'a> {
    /// Parts that any thread can encode.
    Apart(TextSplitter<'a>),
    /// For tokenizers that cannot encode parts: the document is encoded here, as it is read.
    Here(EncodeSession<'a>),
}

impl<'a> Document<'a> {
    fn new(tokenizer: &'a Tokenizer, is_ours: bool) -> Self {
        let cutter = match tokenizer.splitter() {
            Some(splitter) => Cutter::Apart(splitter),
            None => Cutter::Here(tokenizer.encode_session()),
        };
        Self { is_ours, begins: true, is_blank: true, text_bytes: 0, cutter }
    }

    /// Takes more text. False if the reader is to stop.
    fn push(&mut self, text: &str, at: Position, emit: Emit) -> Result<bool> {
        self.is_blank &= text.trim().is_empty();
        if !self.is_ours {
            return Ok(true);
        }
        let begins = &mut self.begins;
        let mut goes_on = true;
        let mut emit = |content| {
            let begins = std::mem::replace(begins, false);
            goes_on = goes_on && emit(Item { content, begins, ends: false, after: at });
        };
        match &mut self.cutter {
            Cutter::Apart(splitter) => splitter.push(text, &mut |stretch| {
                emit(Content::Text(stretch));
                Ok(())
            })?,
            Cutter::Here(session) => {
                let mut ids = Vec::new();
                session.push(text, &mut ids)?;
                self.text_bytes += text.len();
                if !ids.is_empty() {
                    emit(Content::Ids { ids, text_bytes: std::mem::take(&mut self.text_bytes) });
                }
            }
        }
        Ok(goes_on)
    }

    /// Ends the document. False if the reader is to stop.
    fn finish(self, after: Position, emit: Emit) -> Result<bool> {
        if !self.is_ours {
            return Ok(true);
        }
        let content = match self.cutter {
            _ if self.is_blank && self.begins => Content::Blank,
            Cutter::Apart(mut splitter) => Content::Text(splitter.finish()),
            Cutter::Here(session) => {
                let mut ids = Vec::new();
                session.finish(&mut ids)?;
                Content::Ids { ids, text_bytes: self.text_bytes }
            }
        };
        Ok(emit(Item { content, begins: self.begins, ends: true, after }))
    }
}
