//! Files of text as documents, for those who want the text itself.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use mmfree::error::{Error, Result};

use super::lines::open;
use super::{Content, Format, Item, Position, Source, json_field, list, read_lines};
use crate::data::PartOf;

/// Bytes of a plain text that are handed on at a time, about.
const PART_BYTES: usize = 1 << 16;

/// Takes a part of a document, or `None` at its end, and how many bytes of how many were read.
pub type TakeText<'a> = dyn FnMut(Option<&str>, (u64, u64)) -> Result<()> + 'a;

/// Reads the documents of files, or of directories of them, in order: a plain text (of any name that is not
/// another format's) is one document and is handed on in parts; a line of JSON or a row of parquet is one each,
/// with the text in `field`. Files that end in `.zst` are decompressed.
///
/// # Errors
/// Files that cannot be read, are not UTF-8 or malformed, with file and line; whatever `take` reports.
pub fn read_documents(inputs: &[PathBuf], field: &str, take: &mut TakeText<'_>) -> Result<()> {
    let mut sources = Vec::new();
    for input in inputs {
        if input.is_file() && Format::of(&input.display().to_string()).is_none() {
            let file = input.display().to_string();
            let bytes = std::fs::metadata(input)
                .map_err(|reason| Error::Read { file: file.clone(), reason })?
                .len();
            sources.push(Source { file, bytes, dealt: None });
        } else {
            sources.extend(list(std::slice::from_ref(input), PartOf::WHOLE)?);
        }
    }
    let total = sources.iter().map(|source| source.bytes).sum();
    let mut before = 0;
    for source in &sources {
        let read = AtomicU64::new(0);
        let progress = || (before + read.load(Ordering::Relaxed), total);
        let mut result = Ok(());
        let mut emit = |item: Item| {
            let document = || match item.content {
                Content::Json(line) => {
                    let place = || format!("{}:{}", source.file, item.after.line);
                    json_field(&line, field, place)
                }
                Content::Text(stretch) => Ok(stretch.text().to_owned()),
                Content::Broken(error) => Err(error),
                Content::Ids { .. } | Content::Blank => Ok(String::new()),
            };
            result = document().and_then(|text| {
                take(Some(&text), progress())?;
                take(None, progress())
            });
            result.is_ok()
        };
        match Format::of(&source.file) {
            Some((Format::JsonLines, _)) => {
                read_lines(source, Position::default(), &read, &mut emit)?;
            }
            #[cfg(feature = "parquet")]
            Some((Format::Parquet, _)) => {
                super::read_parquet(source, Position::default(), field, &read, &mut emit)?;
            }
            _ => {
                text(source, &read, &mut |part| take(part, progress()))?;
            }
        }
        result?;
        before += source.bytes;
    }
    Ok(())
}

/// Reads a plain text in parts that end with whole characters.
fn text(
    source: &Source,
    read: &AtomicU64,
    take: &mut dyn FnMut(Option<&str>) -> Result<()>,
) -> Result<()> {
    let failed = |reason| Error::Read { file: source.file.clone(), reason };
    let mut reader = open(source, 0, read).map_err(failed)?;
    let (mut bytes, mut offset, mut is_first) = (Vec::new(), 0_u64, true);
    loop {
        let buffer = reader.fill_buf().map_err(failed)?;
        let taken = buffer.len().min(PART_BYTES);
        let is_end = taken == 0;
        bytes.extend_from_slice(&buffer[..taken]);
        reader.consume(taken);
        let valid = match std::str::from_utf8(&bytes) {
            Ok(_) => bytes.len(),
            Err(error) if error.error_len().is_none() && !is_end => error.valid_up_to(),
            Err(error) => {
                return Err(Error::Malformed {
                    file: source.file.clone(),
                    what: format!(
                        "the text is not UTF-8: invalid byte at offset {}; convert it to UTF-8",
                        offset + error.valid_up_to() as u64
                    ),
                });
            }
        };
        let part = std::str::from_utf8(&bytes[..valid]).unwrap_or_default();
        let part = if is_first { part.strip_prefix('\u{feff}').unwrap_or(part) } else { part };
        is_first &= valid == 0;
        take(Some(part))?;
        offset += valid as u64;
        bytes.drain(..valid);
        if is_end {
            return take(None);
        }
    }
}
