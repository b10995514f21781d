//! The GGUF container, version 3: metadata, a tensor directory and aligned tensor data.
//!
//! [`read`] parses untrusted files, [`write`] makes the header of new ones. What the tensors mean is
//! not decided here.

pub(super) mod read;
pub(super) mod write;

/// First bytes of every file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is read and written.
const VERSION: u32 = 3;
/// Alignment of tensor data where the file does not say otherwise.
const DEFAULT_ALIGNMENT: usize = 32;
/// Key of the alignment.
const ALIGNMENT_KEY: &str = "general.alignment";

/// Numbers of the metadata types.
pub(super) mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

#[cfg(test)]
mod tests;
