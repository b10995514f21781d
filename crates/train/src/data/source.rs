//! Files of text: which there are, and their documents in order.

use std::fs;
use std::path::{Path, PathBuf};

use mmfree::error::{Error, Result};
use mmfree::tokenizer::Stretch;
use serde::{Deserialize, Serialize};

use super::manifest::PartOf;

mod documents;
mod json;
mod lines;
#[cfg(feature = "parquet")]
mod parquet;

pub use self::documents::read_documents;
pub(super) use self::json::json_field;
pub(super) use self::lines::{check_utf8, checksum_before, read_lines, read_text};
#[cfg(feature = "parquet")]
pub(super) use self::parquet::read_parquet;

/// What a file's name says that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Plain text: one document, or several with a line between them.
    Text,
    /// One JSON object a line.
    JsonLines,
    /// One row a document.
    Parquet,
}

/// Formats by the end of the name, and whether it is compressed.
const EXTENSIONS: [(&str, Format, bool); 7] = [
    (".txt", Format::Text, false),
    (".txt.zst", Format::Text, true),
    (".jsonl", Format::JsonLines, false),
    (".jsonl.zst", Format::JsonLines, true),
    (".ndjson", Format::JsonLines, false),
    (".ndjson.zst", Format::JsonLines, true),
    (".parquet", Format::Parquet, false),
];

impl Format {
    /// The format of a file and whether it is compressed with zstd.
    pub(super) fn of(path: &str) -> Option<(Self, bool)> {
        let path = path.to_ascii_lowercase();
        let fits = |(end, format, is_compressed): (&str, Self, bool)| {
            path.ends_with(end).then_some((format, is_compressed))
        };
        EXTENSIONS.into_iter().find_map(fits)
    }
}

/// A file of text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Source {
    /// Its path, as it was given or found in a directory that was given.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Which of its documents are read: all, or every `1` of them whose number is `0`, counted modulo.
    pub dealt: Option<(u64, u64)>,
}

impl Source {
    /// Whether a document of this file belongs to this job.
    pub(super) fn has(&self, document: u64) -> bool {
        self.dealt.is_none_or(|(number, of)| document % of == number)
    }
}

/// A place between two documents of the sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    /// Which source.
    pub source: usize,
    /// Bytes of it that were read, after decompression; rows of a parquet file.
    pub offset: u64,
    /// Lines that were read.
    pub line: u64,
    /// Documents that were read, those of other jobs included.
    pub document: u64,
}

/// A piece of the corpus on its way to the tokenizer: a document, a part of one, or a place where one should be.
#[derive(Debug)]
pub(super) struct Item {
    pub content: Content,
    /// Whether it begins and ends a document.
    pub begins: bool,
    pub ends: bool,
    /// Where reading goes on after it.
    pub after: Position,
}

#[derive(Debug)]
pub(super) enum Content {
    /// A line of JSON.
    Json(Vec<u8>),
    /// Text of a document.
    Text(Stretch),
    /// Ids of text that could only be encoded as it was read.
    Ids { ids: Vec<u32>, text_bytes: usize },
    /// The end of a document that had only white space.
    Blank,
    /// Nothing: what is wrong.
    Broken(Error),
}

impl Content {
    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Json(line) => line.len(),
            Self::Text(stretch) => stretch.text().len(),
            Self::Ids { ids, .. } => 4 * ids.len(),
            Self::Blank | Self::Broken(_) => 0,
        }
    }
}

/// Takes items; false asks to stop.
pub(super) type Emit<'a> = &'a mut dyn FnMut(Item) -> bool;

/// Lists the files that are named and those in directories that are named, each directory's sorted by path, and
/// takes this job's share.
///
/// If there are at least as many files as jobs, each job gets whole files, the largest dealt first, so that
/// the shares are of about one size. Otherwise the documents are dealt in turn, and every job reads all files.
///
/// # Errors
/// A name that nothing has, a file of an unknown format, a file that is named twice, or none.
pub(super) fn list(inputs: &[PathBuf], part: PartOf) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for input in inputs {
        let file = input.display().to_string();
        let metadata =
            fs::metadata(input).map_err(|reason| Error::Read { file: file.clone(), reason })?;
        if metadata.is_dir() {
            let before = sources.len();
            walk(input, &mut sources)?;
            if sources.len() == before {
                let what = format!("there is no text in this directory; {}", known_names());
                return Err(Error::Malformed { file, what });
            }
        } else if let Some((format, _)) = Format::of(&file) {
            if format == Format::Parquet && cfg!(not(feature = "parquet")) {
                let what = "this program was built without the feature `parquet`".to_owned();
                return Err(Error::Malformed { file, what });
            }
            sources.push(Source { file, bytes: metadata.len(), dealt: None });
        } else {
            let what = format!("a file of unknown format; {}", known_names());
            return Err(Error::Malformed { file, what });
        }
    }
    let mut names: Vec<_> = sources.iter().map(|source| &source.file).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::Invalid(format!("{} is named twice", pair[0])));
    }
    if sources.is_empty() {
        return Err(Error::Invalid("no file of text was named".to_owned()));
    }
    Ok(share(sources, part))
}

/// The error of a corpus in which nothing is to be read.
pub(super) fn no_text<'a>(
    files: impl Iterator<Item = &'a str>,
    empty_documents: u64,
    skipped: u64,
) -> Error {
    const NAMED: usize = 3;
    let mut names: Vec<_> = files.take(NAMED + 1).collect();
    if names.len() > NAMED {
        names[NAMED] = "…";
    }
    let broken = if skipped > 0 { format!("; broken ones: {skipped}") } else { String::new() };
    Error::Malformed {
        file: names.join(", "),
        what: format!(
            "there is no text (documents that are empty or only white space: {empty_documents}{broken}); name \
             files that have some"
        ),
    }
}

/// Adds to the error of something broken what to do about it.
pub(super) fn advised(error: Error, advice: &str) -> Error {
    match error {
        Error::Malformed { file, what } => {
            Error::Malformed { file, what: format!("{what}; {advice}") }
        }
        error => error,
    }
}

fn known_names() -> String {
    let ends: Vec<_> = EXTENSIONS.iter().map(|(end, ..)| *end).collect();
    format!("names that end in {} are read", ends.join(", "))
}

/// Adds the files below a directory whose names are known.
fn walk(directory: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let read_error = |reason| Error::Read { file: directory.display().to_string(), reason };
    let entries = fs::read_dir(directory).map_err(read_error)?;
    let mut entries = entries.collect::<std::io::Result<Vec<_>>>().map_err(read_error)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let metadata = fs::metadata(&path).map_err(read_error)?;
        let file = path.display().to_string();
        if metadata.is_dir() {
            walk(&path, sources)?;
        } else if Format::of(&file)
            .is_some_and(|(format, _)| format != Format::Parquet || cfg!(feature = "parquet"))
        {
            sources.push(Source { file, bytes: metadata.len(), dealt: None });
        }
    }
    Ok(())
}

/// The share of one of several jobs.
fn share(mut sources: Vec<Source>, part: PartOf) -> Vec<Source> {
    let (job, jobs) = (part.index as usize - 1, part.count as usize);
    if jobs == 1 {
        return sources;
    }
    if sources.len() < jobs {
        for (number, source) in sources.iter_mut().enumerate() {
            // The first document of the second file belongs to the second job.
            let first = (job + jobs - number % jobs) % jobs;
            source.dealt = Some((first as u64, jobs as u64));
        }
        return sources;
    }
    let mut order: Vec<_> = (0..sources.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(sources[index].bytes));
    let mut loads = vec![0; jobs];
    let mut owners = vec![0; sources.len()];
    for index in order {
        let least = (0..jobs).min_by_key(|&job| loads[job]).unwrap_or(0);
        // An empty file is work, too, if there are only such.
        loads[least] += sources[index].bytes.max(1);
        owners[index] = least;
    }
    let mut owners = owners.into_iter();
    sources.retain(|_| owners.next() == Some(job));
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_belongs_to_one_job() {
        for (files, jobs) in [(1, 4), (3, 4), (4, 4), (9, 4), (2, 7)] {
            let sources: Vec<_> = (0..files)
                .map(|i| Source { file: i.to_string(), bytes: i * 37 % 11, dealt: None })
                .collect();
            let mut counts = std::collections::BTreeMap::new();
            let mut sizes = Vec::new();
            for index in 1..=jobs {
                let part = share(sources.clone(), PartOf { index, count: jobs });
                let mut size = 0;
                for source in part {
                    for document in (0..50).filter(|&document| source.has(document)) {
                        *counts.entry((source.file.clone(), document)).or_insert(0) += 1;
                        size += 1;
                    }
                }
                sizes.push(size);
            }
            assert_eq!(counts.len() as u64, files * 50);
            assert!(counts.values().all(|&count| count == 1));
            assert!(sizes.iter().all(|&size| size > 0), "{files} files, {jobs} jobs: {sizes:?}");
        }
    }

    #[test]
    fn formats_are_known_by_name() {
        assert_eq!(Format::of("a/b.JSONL.zst"), Some((Format::JsonLines, true)));
        assert_eq!(Format::of("b.txt"), Some((Format::Text, false)));
        assert_eq!(Format::of("b.json"), None);
        assert_eq!(Format::of("zst"), None);
    }
}
