//! Files of text as documents, for those who want the text itself.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use mmfree::error::{Error, Result};

use super::lines::read_utf8;
use super::{Content, Format, Item, Position, Source, json_field, list, read_lines};
use crate::data::PartOf;

/// Takes a part of a document, or `None` at its end, and how many bytes of how many were read.
pub type TakeText<'a> = dyn FnMut(Option<&str>, (u64, u64)) -> Result<()> + 'a;

/// Reads the documents of files, or of directories of them, in order: a plain text (of any name that is not
/// another format's) is one document and is handed on in parts; a line of JSON or a row of parquet is one each,
/// with the text in `field`. Behind the end of a format, `.zst` is decompressed.
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
            _ => text(source, &read, &mut |part| take(part, progress()))?,
        }
        result?;
        before += source.bytes;
    }
    Ok(())
}

/// Reads a plain text in parts, without a byte order mark.
fn text(
    source: &Source,
    read: &AtomicU64,
    take: &mut dyn FnMut(Option<&str>) -> Result<()>,
) -> Result<()> {
    let mut is_first = true;
    read_utf8(source, read, &mut |part| {
        let is_first = std::mem::take(&mut is_first);
        take(part.strip_prefix('\u{feff}').filter(|_| is_first).or(Some(part)))
    })?;
    take(None)
}
