//! Parquet files: one column of strings, a row a document.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use mmfree::error::{Error, Result};
use mmfree::tokenizer::Stretch;
use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::{Content, Emit, Item, Position, Source};

/// Rows that are decoded at a time.
const ROWS: usize = 64;

/// Reads a column from a position. An absent value is a broken document.
pub(in crate::data) fn read_parquet(
    source: &Source,
    at: Position,
    column: &str,
    read: &AtomicU64,
    emit: Emit,
) -> Result<()> {
    let file = File::open(&source.file)
        .map_err(|reason| Error::Read { file: source.file.clone(), reason })?;
    // The reader checks a file's sizes as it goes, but not every one that a hostile file could have.
    let result = catch_unwind(AssertUnwindSafe(|| read_file(source, file, at, column, read, emit)));
    let malformed = |what| Error::Malformed { file: source.file.clone(), what };
    match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Failure::Refused(what))) => Err(malformed(what)),
        Ok(Err(Failure::Parquet(error))) => {
            Err(malformed(format!("not a complete parquet file: {error}; is it truncated?")))
        }
        Err(_) => Err(malformed("this parquet file is corrupt".to_owned())),
    }
}

enum Failure {
    Refused(String),
    Parquet(ParquetError),
}

impl From<ParquetError> for Failure {
    fn from(error: ParquetError) -> Self {
        Self::Parquet(error)
    }
}

fn read_file(
    source: &Source,
    file: File,
    mut at: Position,
    column: &str,
    read: &AtomicU64,
    emit: Emit,
) -> std::result::Result<(), Failure> {
    let reader = SerializedFileReader::new(file)?;
    let metadata = reader.metadata();
    let columns = metadata.file_metadata().schema_descr().columns();
    let named = columns.iter().position(|descriptor| descriptor.path().string() == column);
    let Some(index) = named else {
        let names: Vec<_> = columns.iter().take(20).map(|c| c.path().string()).collect();
        let what = format!(
            "there is no column {column:?} (--field, data.text_field); it has {}",
            names.join(", ")
        );
        return Err(Failure::Refused(what));
    };
    let descriptor = &columns[index];
    if descriptor.physical_type() != Type::BYTE_ARRAY || descriptor.max_rep_level() != 0 {
        let what = format!("the column {column:?} does not hold one text a row");
        return Err(Failure::Refused(what));
    }
    let all_present = descriptor.max_def_level();
    let (mut values, mut levels) = (Vec::new(), Vec::new());
    let mut first = 0_u64;
    let groups = metadata.num_row_groups();
    for group in 0..groups {
        let rows = u64::try_from(metadata.row_group(group).num_rows()).unwrap_or(0);
        let skipped = at.offset.saturating_sub(first).min(rows);
        first += rows;
        read.fetch_add(source.bytes / groups as u64, Ordering::Relaxed);
        if skipped == rows {
            continue;
        }
        let ColumnReader::ByteArrayColumnReader(mut pages) =
            reader.get_row_group(group)?.get_column_reader(index)?
        else {
            return Err(Failure::Refused(format!("the column {column:?} holds no text")));
        };
        pages.skip_records(skipped as usize)?;
        let mut left = rows - skipped;
        while left > 0 {
            values.clear();
            levels.clear();
            let (records, ..) = pages.read_records(ROWS, Some(&mut levels), None, &mut values)?;
            if records == 0 {
                let what = format!("row group {group} ends {left} rows early; is it truncated?");
                return Err(Failure::Refused(what));
            }
            left = left.saturating_sub(records as u64);
            let mut present = values.drain(..);
            for row in 0..records {
                at.offset += 1;
                at.line += 1;
                at.document += 1;
                let is_present =
                    all_present == 0 || levels.get(row).is_some_and(|&level| level == all_present);
                let value = if is_present { present.next() } else { None };
                if !source.has(at.document - 1) {
                    continue;
                }
                let broken = |what: &str| {
                    let file = format!("{}: row {}", source.file, at.line);
                    Content::Broken(Error::Malformed { file, what: what.to_owned() })
                };
                let content = match value.map(|value| String::from_utf8(value.data().to_vec())) {
                    Some(Ok(text)) if text.trim().is_empty() => Content::Blank,
                    Some(Ok(text)) => Content::Text(Stretch::whole(text)),
                    Some(Err(_)) => broken("the text is not UTF-8"),
                    None => broken(&format!("the column {column:?} is null")),
                };
                if !emit(Item { content, begins: true, ends: true, after: at }) {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}
