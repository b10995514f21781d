//! Program images: a program with everything that has to be in DRAM before it runs.
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | `MMFACCEL` |
//! | 8..12 | version of the instruction set |
//! | 12..16 | bytes of the header, 256 |
//! | 16..44 | configuration: cores, weight_bytes, row_lanes, vector_words, activation_bytes, fifo_beats, burst_beats |
//! | 44..48 | packing of weights: 0 for t2, 1 for t5 |
//! | 48..64 | V, D, F, L of the model; zeros for a program of another kind |
//! | 64..68 | instructions |
//! | 72..80 | bytes of the data memory that the file holds |
//! | 80..88 | bytes of the data memory; what the file does not hold begins as zero |
//! | 88..96 | bytes of the weight stream of one core |
//! | 96..112 | recurrent state in data memory: address, bytes |
//! | 112..128 | logits in data memory: address, elements |
//! | 128..136 | checksum: XXH3-64 of the whole file with these 8 bytes zero |
//! | 136..168 | name of the configuration, UTF-8, zeros behind |
//! | 256.. | program, data memory, the stream of each core; each padded with zeros to 4096 bytes |
//!
//! All numbers are little-endian. The file has exactly the length that these sizes give.

use std::hash::Hasher;
use std::io::Write;
use std::path::Path;

use mmfree::output::OutputFile;
use twox_hash::XxHash3_64;

use crate::config::{Configuration, Packing};
use crate::error::{Error, Result};
use crate::isa::{INSTRUCTION_BYTES, Instruction, PROGRAM_LIMIT, VERSION};

const MAGIC: &[u8; 8] = b"MMFACCEL";
const HEADER_BYTES: usize = 256;
const CHECKSUM: std::ops::Range<usize> = 128..136;
const NAME: std::ops::Range<usize> = 136..168;
/// Alignment of segments, in the file and in memory: no burst crosses it.
pub const PAGE: u64 = 4096;
/// Most bytes of data memory that an image may ask for beyond what it holds.
const ZEROED_LIMIT: u64 = 1 << 29;

/// V, D, F and L; zeros for a program that is no language model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Shape {
    /// V.
    pub vocab_size: u32,
    /// D.
    pub hidden_size: u32,
    /// F.
    pub intermediate_size: u32,
    /// L.
    pub num_hidden_layers: u32,
}

/// A part of data memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Region {
    /// First byte.
    pub address: u64,
    /// Bytes (elements, in the header's field of the logits).
    pub bytes: u64,
}

/// A program and its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The hardware that it is compiled for.
    pub configuration: Configuration,
    /// How its weights are packed.
    pub packing: Packing,
    /// The model.
    pub shape: Shape,
    /// Instruction memory.
    pub program: Vec<Instruction>,
    /// Data memory from address 0, as far as it is not zero.
    pub data: Vec<u8>,
    /// Bytes of data memory, a multiple of a page.
    pub data_bytes: u64,
    /// Weight memory of each core from address 0.
    pub streams: Vec<Vec<u8>>,
    /// The recurrent state.
    pub state: Region,
    /// The logits of the last token.
    pub logits: Region,
}

fn padding(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE as usize) - bytes
}

impl Image {
    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut header = [0u8; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &(HEADER_BYTES as u32).to_le_bytes());
        let c = &self.configuration;
        let shape = &self.shape;
        let words = [
            c.cores,
            c.weight_bytes,
            c.row_lanes,
            c.vector_words,
            c.activation_bytes,
            c.fifo_beats,
            c.burst_beats,
            self.packing.flag().into(),
            shape.vocab_size,
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_hidden_layers,
            self.program.len() as u32,
        ];
        for (i, word) in words.iter().enumerate() {
            put(16 + 4 * i, &word.to_le_bytes());
        }
        let stream_bytes = self.streams.first().map_or(0, Vec::len) as u64;
        let longs = [
            self.data.len() as u64,
            self.data_bytes,
            stream_bytes,
            self.state.address,
            self.state.bytes,
            self.logits.address,
            self.logits.bytes / 4,
        ];
        for (i, long) in longs.iter().enumerate() {
            put(72 + 8 * i, &long.to_le_bytes());
        }
        let mut end = c.name.len().min(NAME.len());
        while !c.name.is_char_boundary(end) {
            end -= 1;
        }
        put(NAME.start, &c.name.as_bytes()[..end]);

        let mut bytes = header.to_vec();
        let program: Vec<u8> = self.program.iter().flat_map(Instruction::encode).collect();
        for part in std::iter::once(&program).chain([&self.data]).chain(&self.streams) {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len() + padding(part.len()), 0);
        }
        Self::reseal(&mut bytes);
        bytes
    }

    /// Writes the file; it appears complete or not at all.
    ///
    /// # Errors
    /// Errors of writing.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut file = OutputFile::create(path)?;
        file.put(&self.to_bytes())?;
        let flushed = file.flush();
        flushed.map_err(|reason| {
            Error::Model(mmfree::error::Error::Write { file: path.display().to_string(), reason })
        })?;
        Ok(file.commit()?)
    }

    /// Writes the checksum that fits into the bytes of a file that was changed: for those who test readers.
    pub fn reseal(bytes: &mut [u8]) {
        if bytes.len() >= HEADER_BYTES {
            bytes[CHECKSUM].fill(0);
            let checksum = XxHash3_64::oneshot(bytes);
            bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, or [`from_bytes`](Self::from_bytes)'s.
    pub fn read(path: &Path) -> Result<Self> {
        let file = path.display().to_string();
        let bytes = std::fs::read(path)
            .map_err(|reason| mmfree::error::Error::Read { file: file.clone(), reason })?;
        Self::from_bytes(&file, &bytes)
    }

    /// Reads the bytes of a file, whose name is for messages. Nothing in them is trusted.
    ///
    /// # Errors
    /// [`Error::Image`] and [`Error::Instruction`].
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self> {
        let wrong = |what: String| Error::Image { file: file.to_owned(), what };
        if !bytes.starts_with(MAGIC) {
            return Err(wrong(
                "this is no program image: it does not begin with MMFACCEL".to_owned(),
            ));
        }
        if bytes.len() < HEADER_BYTES {
            return Err(wrong(format!(
                "the header of {HEADER_BYTES} bytes is cut off after {} bytes",
                bytes.len()
            )));
        }
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if word(8) != VERSION {
            return Err(wrong(format!(
                "the image has version {} of the instruction set, this program knows {VERSION}; compile it anew",
                word(8)
            )));
        }
        if word(12) as usize != HEADER_BYTES {
            return Err(wrong(format!(
                "the header claims {} bytes, expected {HEADER_BYTES}",
                word(12)
            )));
        }
        let name: Vec<u8> = bytes[NAME].iter().copied().take_while(|&byte| byte != 0).collect();
        let configuration = Configuration {
            name: String::from_utf8(name)
                .map_err(|_| wrong("the configuration's name is not UTF-8".into()))?,
            cores: word(16),
            weight_bytes: word(20),
            row_lanes: word(24),
            vector_words: word(28),
            activation_bytes: word(32),
            fifo_beats: word(36),
            burst_beats: word(40),
        };
        configuration.check().map_err(|error| wrong(error.to_string()))?;
        let packing = match word(44) {
            0 => Packing::T2,
            1 => Packing::T5,
            other => return Err(wrong(format!("there is no packing {other}"))),
        };
        let count = word(64) as usize;
        if count > PROGRAM_LIMIT {
            return Err(wrong(format!(
                "the program has {count} instructions, at most {PROGRAM_LIMIT} fit"
            )));
        }
        let (data_len, data_bytes, stream_bytes) = (long(72), long(80), long(88));
        let padded = |bytes: u64| bytes.checked_next_multiple_of(PAGE);
        let program_bytes = (count * INSTRUCTION_BYTES) as u64;
        let expected = (|| {
            let streams = padded(stream_bytes)?.checked_mul(configuration.cores.into())?;
            let rest = padded(data_len)?.checked_add(streams)?;
            padded(program_bytes)?.checked_add(rest)?.checked_add(HEADER_BYTES as u64)
        })();
        if expected != Some(bytes.len() as u64) {
            return Err(wrong(format!(
                "its sizes add up to {} bytes, but the file has {}; is it truncated?",
                expected.map_or("too many".to_owned(), |bytes| bytes.to_string()),
                bytes.len()
            )));
        }
        let mut hash = XxHash3_64::new();
        hash.write(&bytes[..CHECKSUM.start]);
        hash.write(&[0; 8]);
        hash.write(&bytes[CHECKSUM.end..]);
        if hash.finish() != long(CHECKSUM.start) {
            return Err(wrong("the checksum is wrong: the file is damaged".to_owned()));
        }
        if data_bytes < data_len || data_bytes % PAGE != 0 || data_bytes - data_len > ZEROED_LIMIT {
            return Err(wrong(format!(
                "data memory is {data_bytes} bytes, expected whole pages of {PAGE}, at least the {data_len} that \
                 are stored and at most {ZEROED_LIMIT} more"
            )));
        }
        let region = |name: &str, address: u64, bytes: Option<u64>| {
            let end = bytes.and_then(|bytes| address.checked_add(bytes));
            match (bytes, end) {
                (Some(bytes), Some(end)) if end <= data_bytes => Ok(Region { address, bytes }),
                _ => Err(wrong(format!(
                    "the {name} at {address} lie outside of {data_bytes} bytes of data"
                ))),
            }
        };
        let state = region("state's bytes", long(96), Some(long(104)))?;
        let logits = region("logits", long(112), long(120).checked_mul(4))?;

        let mut program = Vec::with_capacity(count);
        for (index, bytes) in bytes[HEADER_BYTES..][..count * INSTRUCTION_BYTES]
            .chunks_exact(INSTRUCTION_BYTES)
            .enumerate()
        {
            let instruction = Instruction::decode(std::array::from_fn(|i| bytes[i]));
            program.push(instruction.map_err(|reason| Error::Instruction {
                file: file.to_owned(),
                index,
                reason,
            })?);
        }
        // The sum above fits the file's length, so these fit usize.
        let mut at = HEADER_BYTES + program_bytes.next_multiple_of(PAGE) as usize;
        let mut take = |len: u64| {
            let part = bytes[at..at + len as usize].to_vec();
            at += len.next_multiple_of(PAGE) as usize;
            part
        };
        let data = take(data_len);
        let streams = (0..configuration.cores).map(|_| take(stream_bytes)).collect();
        let shape = Shape {
            vocab_size: word(48),
            hidden_size: word(52),
            intermediate_size: word(56),
            num_hidden_layers: word(60),
        };
        Ok(Self {
            configuration,
            packing,
            shape,
            program,
            data,
            data_bytes,
            streams,
            state,
            logits,
        })
    }
}
