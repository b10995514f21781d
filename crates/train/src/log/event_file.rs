//! TensorBoard event files.
//!
//! An event file is a sequence of TFRecords, each a protobuf message `Event`. A TFRecord is
//!
//! | bytes | content |
//! |---|---|
//! | 8 | length n of the message |
//! | 4 | masked CRC-32C of these 8 bytes |
//! | n | message |
//! | 4 | masked CRC-32C of the message |
//!
//! all little-endian, where masked means `rotate_right(crc, 15) + 0xa282ead8`. Of `Event` the fields
//! `wall_time` (1, double), `step` (2, int64), `file_version` (3, string), `summary` (5) and `session_log` (7)
//! are written; of a summary's values `tag` (1) and `simple_value` (2, float).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use mmfree::error::{Error, Result};

/// What every event file's name contains.
const INFIX: &str = ".tfevents.";
/// Largest message that is read back: ours have a few hundred bytes.
const MAX_MESSAGE_BYTES: u64 = 1 << 20;

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins an event file for a run that has done `step` steps, and cuts later steps off the run's earlier
    /// files (removes them if `step` is 0, since they belong to another run). `time` is in seconds since 1970.
    ///
    /// Each process writes a file of its own, which says that later steps of earlier files do not count: a
    /// TensorBoard that is watching drops them, too.
    ///
    /// # Errors
    /// Errors of reading and writing.
    pub fn resume(directory: &Path, step: u64, time: f64) -> Result<Self> {
        let write_error =
            |path: &Path, reason| Error::Write { file: path.display().to_string(), reason };
        let mut number = 0;
        let entries = fs::read_dir(directory).map_err(|reason| write_error(directory, reason))?;
        for entry in entries {
            let path = entry.map_err(|reason| write_error(directory, reason))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(rest) = name.strip_prefix("events.out.tfevents.") else { continue };
            let before = rest.split('.').next().and_then(|time| time.parse::<u64>().ok());
            number = number.max(before.unwrap_or(0) + 1);
            let cut = if step == 0 { fs::remove_file(&path) } else { cut_after(&path, step) };
            cut.map_err(|reason| write_error(&path, reason))?;
        }
        // TensorBoard reads files in the order of their names, which begin with the time of their start.
        let number = number.max(time as u64);
        let path = directory.join(format!("events.out{INFIX}{number:010}.mmfree"));
        let file = OpenOptions::new().append(true).create_new(true).open(&path);
        let file = file.map_err(|reason| write_error(&path, reason))?;
        let mut events = Self { path, file };
        let mut version = Message::event(time, 0);
        version.bytes_field(3, b"brain.Event:2");
        events.write(&version.0)?;
        if step > 0 {
            const START: u64 = 1;
            let mut session = Message::default();
            session.varint_field(1, START);
            let mut event = Message::event(time, step + 1);
            event.bytes_field(7, &session.0);
            events.write(&event.0)?;
        }
        Ok(events)
    }

    /// Writes scalars of one step.
    ///
    /// # Errors
    /// Errors of writing.
    pub fn scalars<'a>(
        &mut self,
        time: f64,
        step: u64,
        values: impl Iterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut entry = Message::default();
            entry.bytes_field(1, tag.as_bytes());
            entry.float_field(2, value as f32);
            summary.bytes_field(1, &entry.0);
        }
        let mut event = Message::event(time, step);
        event.bytes_field(5, &summary.0);
        self.write(&event.0)
    }

    /// Makes everything written so far outlast the machine.
    ///
    /// # Errors
    /// Errors of writing.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|reason| self.failed(reason))
    }

    /// Writes a record in one call, so that a kill leaves it whole or cut short.
    fn write(&mut self, message: &[u8]) -> Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(message.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(message);
        record.extend(masked_crc(message).to_le_bytes());
        self.file.write_all(&record).map_err(|reason| self.failed(reason))
    }

    fn failed(&self, reason: std::io::Error) -> Error {
        Error::Write { file: self.path.display().to_string(), reason }
    }
}

/// Cuts an event file before its first event after `step`, or where it is broken.
fn cut_after(path: &Path, step: u64) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    file.read_to_end(&mut bytes)?;
    let mut reader = EventReader::new(&bytes);
    let mut end = 0;
    for event in &mut reader {
        // A session that began after `step` is past it, too.
        if event.step > step + 1 || event.step > step && !event.scalars.is_empty() {
            break;
        }
        end = event.end;
    }
    file.set_len(end as u64)
}

/// An event as it is read back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    /// Its step.
    pub step: u64,
    /// Its scalars by tag.
    pub scalars: Vec<(String, f32)>,
    /// Offset of the record's end in the file.
    pub end: usize,
}

/// Reads the events of a file up to its end or to the first record that is broken.
#[derive(Debug)]
pub struct EventReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> EventReader<'a> {
    /// Reads the bytes of an event file.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn record(&mut self) -> Option<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (length_crc, rest) = rest.split_first_chunk::<4>()?;
        let bytes = u64::from_le_bytes(*length);
        if u32::from_le_bytes(*length_crc) != masked_crc(length) || bytes > MAX_MESSAGE_BYTES {
            return None;
        }
        let (message, rest) = rest.split_at_checked(bytes as usize)?;
        let crc = rest.first_chunk::<4>()?;
        if u32::from_le_bytes(*crc) != masked_crc(message) {
            return None;
        }
        self.at += 16 + message.len();
        Some(message)
    }
}

impl Iterator for EventReader<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let message = self.record()?;
        let mut event = Event { end: self.at, ..Event::default() };
        for (number, field) in Fields(message) {
            match (number, field) {
                (2, Field::Varint(step)) => event.step = step,
                (5, Field::Bytes(summary)) => {
                    event.scalars = Fields(summary).filter_map(scalar).collect();
                }
                _ => {}
            }
        }
        Some(event)
    }
}

/// A summary's value, if it is a scalar.
fn scalar((number, field): (u64, Field)) -> Option<(String, f32)> {
    let (1, Field::Bytes(value)) = (number, field) else { return None };
    let (mut tag, mut scalar) = (None, None);
    for (number, field) in Fields(value) {
        match (number, field) {
            (1, Field::Bytes(bytes)) => tag = String::from_utf8(bytes.to_vec()).ok(),
            (2, Field::Fixed32(bits)) => scalar = Some(f32::from_bits(bits)),
            _ => {}
        }
    }
    tag.zip(scalar)
}

/// A protobuf message that is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` with its first two fields.
    fn event(time: f64, step: u64) -> Self {
        let mut event = Self::default();
        event.key(1, 1);
        event.0.extend(time.to_le_bytes());
        event.varint_field(2, step);
        event
    }

    fn key(&mut self, number: u64, wire_type: u64) {
        self.varint(number << 3 | wire_type);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint_field(&mut self, number: u64, value: u64) {
        self.key(number, 0);
        self.varint(value);
    }

    fn bytes_field(&mut self, number: u64, bytes: &[u8]) {
        self.key(number, 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn float_field(&mut self, number: u64, value: f32) {
        self.key(number, 5);
        self.0.extend(value.to_le_bytes());
    }
}

/// The fields of a protobuf message, up to its end or to the first that is broken.
struct Fields<'a>(&'a [u8]);

enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, field))
    }
}

/// CRC-32C (Castagnoli), masked as TFRecords have it: a checksum over data that itself contains checksums
/// would otherwise be weak.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                value = value >> 1 ^ if value & 1 == 1 { 0x82f6_3b78 } else { 0 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, &byte| TABLE[((crc ^ u32::from(byte)) & 0xff) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_has_its_published_values() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    fn write(directory: &Path, from: u64, to: u64) {
        let mut file = EventFile::resume(directory, from, 1000.0).unwrap();
        for step in from + 1..=to {
            file.scalars(1.0, step, [("loss", 2.5)].into_iter()).unwrap();
        }
    }

    fn steps(directory: &Path) -> Vec<u64> {
        let mut files: Vec<_> =
            fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        let mut steps = Vec::new();
        for file in files {
            let bytes = fs::read(file).unwrap();
            let events = EventReader::new(&bytes).filter(|event| !event.scalars.is_empty());
            steps.extend(events.map(|event| event.step));
        }
        steps
    }

    #[test]
    fn later_steps_are_cut_when_a_run_resumes() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), 0, 8);
        write(directory.path(), 5, 7);
        assert_eq!(steps(directory.path()), [1, 2, 3, 4, 5, 6, 7]);
        write(directory.path(), 2, 4);
        assert_eq!(steps(directory.path()), [1, 2, 3, 4]);
        write(directory.path(), 0, 1);
        assert_eq!(steps(directory.path()), [1]);
    }

    #[test]
    fn a_broken_end_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), 0, 3);
        let path = fs::read_dir(directory.path()).unwrap().next().unwrap().unwrap().path();
        let whole = fs::read(&path).unwrap();
        let last = EventReader::new(&whole).map(|event| event.end).nth(2).unwrap();
        for cut in [last + 1, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            cut_after(&path, 100).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), last as u64);
        }
        let mut flipped = whole.clone();
        flipped[last + 14] ^= 1;
        assert_eq!(EventReader::new(&flipped).count(), 3);
        assert_eq!(EventReader::new(&whole).count(), 4);
    }
}
