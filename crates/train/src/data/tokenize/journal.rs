//! How far a job has come, so that it goes on after a kill to the same bytes.

use std::cmp::Ordering;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use mmfree::error::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::data::manifest::Manifest;
use crate::data::shard::sync_directory;
use crate::data::source::{Position, Source, checksum_before};

/// What the names of a job's own files begin with.
const PROGRESS: &str = "progress-of-";
const LOCK: &str = "lock-of-";

/// Everything that decides which bytes a job writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Job {
    pub sources: Vec<Source>,
    /// Ids before and after every document.
    pub prefix: Vec<u32>,
    pub suffix: Vec<u32>,
    pub shard_tokens: u64,
}

/// What is known to be on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    pub job: Job,
    /// The manifest so far: complete shards, and counts up to the position.
    pub manifest: Manifest,
    /// Tokens and documents of the shard that is being written.
    pub shard_tokens: u64,
    pub shard_documents: u64,
    /// Where reading goes on.
    pub position: Position,
    /// If something broken stopped the job: checksum of what was read of the file at the position.
    pub read: Option<u64>,
}

impl Progress {
    /// Takes over the sizes of files that were changed behind what was read of them, as by mending what was broken.
    pub(super) fn accept_mended(&mut self, now: &[Source]) {
        let Position { source: at, offset, .. } = self.position;
        let sources = self.job.sources.iter_mut().zip(&mut self.manifest.sources).zip(now);
        for (index, ((then, counts), now)) in sources.enumerate() {
            let is_unread = || match index.cmp(&at) {
                Ordering::Less => false,
                Ordering::Equal => {
                    self.read.is_some_and(|sum| checksum_before(now, offset) == Some(sum))
                }
                Ordering::Greater => true,
            };
            if then.file == now.file && then.bytes != now.bytes && is_unread() {
                (then.bytes, counts.bytes) = (now.bytes, now.bytes);
            }
        }
    }

    /// Whether its parts can belong together, so that the work can go on from it.
    fn is_possible(&self) -> bool {
        // More than any corpus has, with room to count on.
        const MOST: u64 = 1 << 52;
        let (manifest, position) = (&self.manifest, &self.position);
        let mut counts = vec![manifest.documents, manifest.tokens, manifest.text_bytes];
        counts.extend([manifest.empty_documents, manifest.skipped]);
        counts.extend([position.offset, position.line, position.document]);
        counts.extend([self.shard_tokens, self.shard_documents]);
        for source in &manifest.sources {
            counts.extend([source.documents, source.tokens, source.text_bytes]);
            counts.extend([source.empty_documents, source.skipped]);
        }
        let files = manifest.sources.iter().map(|source| &source.file);
        files.eq(self.job.sources.iter().map(|source| &source.file))
            && position.source <= self.job.sources.len()
            && counts.into_iter().all(|count| count <= MOST)
    }
}

/// The journal of one job in the output directory.
pub(super) struct Journal {
    path: PathBuf,
    /// Held as long as the job runs, so that no second one writes the same files.
    lock: PathBuf,
    _locked: File,
}

impl Journal {
    /// Takes the lock of a job.
    ///
    /// # Errors
    /// Another process holds it; a directory that cannot be written.
    pub(super) fn open(directory: &Path, manifest_name: &str) -> Result<Self> {
        let path = directory.join(format!("{PROGRESS}{manifest_name}"));
        let lock = directory.join(format!("{LOCK}{manifest_name}"));
        let write_error = |reason| Error::Write { file: lock.display().to_string(), reason };
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&lock);
        let file = file.map_err(write_error)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path, lock, _locked: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Invalid(format!(
                "{}: another `mmfree tokenize` is writing the same part here",
                directory.display()
            ))),
            // A file system without locks: the user has to see to it.
            Err(TryLockError::Error(_)) => Ok(Self { path, lock, _locked: file }),
        }
    }

    /// Whether a job still runs, or was stopped before it could clean up.
    pub(super) fn is_left(directory: &Path, manifest_name: &str) -> bool {
        [PROGRESS, LOCK]
            .iter()
            .any(|name| directory.join(format!("{name}{manifest_name}")).exists())
    }

    /// What an earlier process left.
    ///
    /// # Errors
    /// A journal that cannot be read.
    pub(super) fn read(&self) -> Result<Option<Progress>> {
        let file = self.path.display().to_string();
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(reason) => return Err(Error::Read { file, reason }),
        };
        let malformed = |what| Error::Malformed {
            file: file.clone(),
            what: format!("{what}; remove the output directory and begin anew"),
        };
        let progress: Progress =
            serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        if progress.is_possible() {
            Ok(Some(progress))
        } else {
            Err(malformed("the record of the work that was done is damaged".to_owned()))
        }
    }

    /// Records what is on the disk.
    ///
    /// # Errors
    /// Errors of writing.
    pub(super) fn write(&self, progress: &Progress) -> Result<()> {
        replace(&self.path, &serde_json::to_vec(progress).expect("plain data"))
    }

    /// Removes the journal: the job is done.
    pub(super) fn remove(self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(&self.lock);
    }
}

/// Writes a file that is whole or as it was before. A kill leaves at most one file of a known name, unlike
/// `mmfree::output`, whose names differ each time.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&partial, path)?;
        sync_directory(path)
    };
    write().map_err(|reason| Error::Write { file: path.display().to_string(), reason })
}
