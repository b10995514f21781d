//! The log of one run: JSON lines and TensorBoard events.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mmfree::error::{Error, Result};

use super::event_file::EventFile;
use super::record::Record;

/// Name of the JSON lines in a run's directory.
pub const LOG_FILE: &str = "log.jsonl";
/// Longest line that is read.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// Writes the log of one run. Of several processes only the one with rank 0 has one.
#[derive(Debug)]
pub struct RunLog {
    path: PathBuf,
    lines: File,
    events: EventFile,
}

impl RunLog {
    /// Opens the log in a run's directory for a run that has done `step` steps: 0 for a new one, the
    /// checkpoint's step for one that resumes. What an earlier process reported of later steps is cut off, as
    /// is a line that it did not finish.
    ///
    /// # Errors
    /// A directory that cannot be written, or a log with a broken line before its last.
    pub fn open(directory: &Path, step: u64) -> Result<Self> {
        let path = directory.join(LOG_FILE);
        let write_error = |reason| Error::Write { file: path.display().to_string(), reason };
        fs::create_dir_all(directory).map_err(write_error)?;
        let mut kept = 0;
        scan(&path, &mut |record, end| {
            if record.step <= step {
                kept = end;
            }
            record.step <= step
        })?;
        // A new run's log is empty: one that is there belongs to an earlier run.
        if step == 0 {
            kept = 0;
        }
        let open = || {
            let lines = OpenOptions::new().append(true).create(true).open(&path)?;
            lines.set_len(kept)?;
            Ok(lines)
        };
        let lines = open().map_err(write_error)?;
        let events = EventFile::resume(directory, step, now())?;
        Ok(Self { path, lines, events })
    }

    /// Writes one record. It is complete in the file when this returns; [`sync`](Self::sync) makes it outlast
    /// the machine, too.
    ///
    /// # Errors
    /// Errors of writing, a full disk for example.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut record = record.clone();
        if record.time == 0.0 {
            record.time = now();
        }
        let mut line = serde_json::to_vec(&record).expect("a record is plain data");
        line.push(b'\n');
        // One call, so that a kill leaves the line whole or cut short, and never two lines mixed.
        self.lines.write_all(&line).map_err(|reason| self.failed(reason))?;
        self.events.scalars(record.time, record.step, record.scalars())
    }

    /// Makes everything written so far outlast the machine. To be called before a checkpoint is committed.
    ///
    /// # Errors
    /// Errors of writing.
    pub fn sync(&mut self) -> Result<()> {
        self.lines.sync_data().map_err(|reason| self.failed(reason))?;
        self.events.sync()
    }

    fn failed(&self, reason: std::io::Error) -> Error {
        Error::Write { file: self.path.display().to_string(), reason }
    }
}

/// Reads a run's log: its directory, or the JSON lines themselves. A last line that was not finished is left
/// out.
///
/// # Errors
/// A file that cannot be read, or a broken line before the last; the error names the line.
pub fn read_log(path: &Path) -> Result<Vec<Record>> {
    let path = if path.is_dir() { path.join(LOG_FILE) } else { path.to_owned() };
    if let Err(reason) = File::open(&path) {
        return Err(Error::Read { file: path.display().to_string(), reason });
    }
    let mut records = Vec::new();
    scan(&path, &mut |record, _| {
        records.push(record);
        true
    })?;
    Ok(records)
}

/// Reads records while `take`, which gets each with the offset of its line's end, returns true. A file that is
/// not there has none.
fn scan(path: &Path, take: &mut dyn FnMut(Record, u64) -> bool) -> Result<()> {
    let read_error = |reason| Error::Read { file: path.display().to_string(), reason };
    let mut reader = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(reason) => return Err(read_error(reason)),
    };
    let (mut end, mut line) = (0, Vec::new());
    for number in 1_u64.. {
        line.clear();
        let read = (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
        end += read.map_err(read_error)? as u64;
        if line.last() != Some(&b'\n') && (line.len() as u64) < MAX_LINE_BYTES {
            break;
        }
        let record = serde_json::from_slice(&line).map_err(|error| Error::Malformed {
            file: format!("{}:{number}", path.display()),
            what: format!("this line of the log is broken: {error}; remove it to go on"),
        })?;
        if !take(record, end) {
            break;
        }
    }
    Ok(())
}

/// Seconds since 1970-01-01 UTC.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        let loss = Some(5.0 / (step as f64 + 1.0));
        Record { step, tokens: step * 100, loss, time: 1.5, ..Record::default() }
    }

    fn filled(steps: u64) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let mut log = RunLog::open(directory.path(), 0).unwrap();
        for step in 1..=steps {
            log.write(&record(step)).unwrap();
        }
        directory
    }

    fn steps(directory: &Path) -> Vec<u64> {
        read_log(directory).unwrap().iter().map(|record| record.step).collect()
    }

    #[test]
    fn a_resumed_log_goes_on_after_the_checkpoint() {
        let directory = filled(9);
        assert_eq!(read_log(directory.path()).unwrap()[4], record(5));
        let mut log = RunLog::open(directory.path(), 6).unwrap();
        log.write(&record(7)).unwrap();
        assert_eq!(steps(directory.path()), [1, 2, 3, 4, 5, 6, 7]);
        let log = RunLog::open(directory.path(), 0);
        drop(log);
        assert_eq!(steps(directory.path()), [0; 0]);
    }

    #[test]
    fn a_kill_at_any_byte_of_a_line_loses_that_line_only() {
        let directory = filled(4);
        let path = directory.path().join(LOG_FILE);
        let whole = fs::read(&path).unwrap();
        let last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
        for cut in last..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(steps(directory.path()), [1, 2, 3], "cut at {cut}");
            let mut log = RunLog::open(directory.path(), 4).unwrap();
            log.write(&record(4)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn a_broken_line_inside_is_named() {
        let directory = filled(3);
        let path = directory.path().join(LOG_FILE);
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, whole.replacen("\"step\":2", "\"step\":x", 1)).unwrap();
        let error = RunLog::open(directory.path(), 3).unwrap_err().to_string();
        assert!(error.contains("log.jsonl:2"), "{error}");
        assert!(read_log(directory.path()).is_err());
        assert!(read_log(&directory.path().join("absent")).is_err());
    }

    #[test]
    fn a_loss_that_is_not_finite_can_be_read_back() {
        let directory = filled(1);
        let mut log = RunLog::open(directory.path(), 1).unwrap();
        log.write(&Record { loss: Some(f64::NAN), ..record(2) }).unwrap();
        assert_eq!(read_log(directory.path()).unwrap()[1].loss, None);
    }
}
