//! Memory that kernels stream: files mapped read-only, and an arena for packed weights.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::{Arc, Mutex};

use memmap2::{Mmap, MmapMut, UncheckedAdvice};

/// A read-only byte range: a mapped file, anonymous memory, or bytes compiled into the program.
///
/// Cloning shares the bytes.
///
/// A mapped file must not be truncated by another process while it is in use: touching a page
/// that no longer exists ends the process with SIGBUS, which no library can turn into an error.
/// Writers that replace the file by rename, as this project's do, are harmless.
#[derive(Clone, Debug)]
pub struct Bytes(Source);

#[derive(Clone, Debug)]
enum Source {
    Mapped(Arc<Mmap>),
    Anonymous(Arc<Mmap>),
    Static(&'static [u8]),
}

impl Bytes {
    /// Maps a file. An empty file gives an empty range.
    ///
    /// # Errors
    /// Whatever opening or mapping the file reports.
    pub fn map(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self::from_static(&[]));
        }
        // SAFETY: the mapping is private and read-only and outlives every borrow through the Arc;
        // that nobody truncates the file meanwhile is the documented demand on the user.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(Source::Mapped(Arc::new(map))))
    }

    /// Zeroed bytes that `fill` then writes to. Pages that are never written cost no memory, as pages of
    /// a mapped file that are never read do not.
    ///
    /// # Errors
    /// The system's refusal, for example out of memory.
    pub fn sparse(len: usize, fill: impl FnOnce(&mut [u8])) -> io::Result<Self> {
        let mut map = MmapMut::map_anon(len.max(1))?;
        fill(&mut map[..len]);
        Ok(Self(Source::Anonymous(Arc::new(map.make_read_only()?))))
    }

    /// Wraps bytes that live as long as the program.
    pub fn from_static(bytes: &'static [u8]) -> Self {
        Self(Source::Static(bytes))
    }

    /// Tells the system that `range` will not be read again soon, so that a file that was read
    /// once (to repack its weights) does not stay in this process's resident memory.
    ///
    /// Reading the range later is still correct: the pages come back from the file.
    pub fn release(&self, range: Range<usize>) {
        if let Source::Mapped(map) = &self.0
            && range.end <= map.len()
            && range.start < range.end
        {
            // SAFETY: the mapping is file-backed and read-only, so dropping its pages loses nothing:
            // the next access reads the same bytes from the file.
            // A failure only means that the pages stay resident, which is harmless.
            let _ = unsafe {
                map.unchecked_advise_range(
                    UncheckedAdvice::DontNeed,
                    range.start,
                    range.end - range.start,
                )
            };
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Source::Mapped(map) | Source::Anonymous(map) => map,
            Source::Static(bytes) => bytes,
        }
    }
}

/// Grows in chunks of this many bytes. Untouched pages of a chunk cost no memory.
const CHUNK_BYTES: usize = 256 << 20;
/// Every allocation starts on a cache line, so that no 64-byte load crosses one.
const ALIGNMENT: usize = 64;

/// An arena for packed weights: anonymous memory that asks for huge pages, so that a model's
/// weights lie side by side and streaming them does not wait for page-table walks.
#[derive(Clone, Debug, Default)]
pub struct WeightArena(Arc<Mutex<Option<Chunk>>>);

#[derive(Debug)]
struct Chunk {
    region: Arc<Region>,
    used: usize,
}

#[derive(Debug)]
struct Region {
    start: *mut u8,
    map: MmapMut,
}

// SAFETY: `start` points into `map`, which the region owns; every byte of it belongs to at most one
// `ArenaBox`, which alone reads and writes it, so sharing a region shares no mutable data.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl WeightArena {
    /// An empty arena.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes `bytes` zeroed bytes, aligned to a cache line.
    ///
    /// # Errors
    /// The system's refusal, for example out of memory.
    pub fn allocate(&self, bytes: usize) -> io::Result<ArenaBox> {
        let size = bytes
            .checked_next_multiple_of(ALIGNMENT)
            .ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "allocation too large"))?;
        let mut current = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let chunk = match current.take() {
            Some(chunk) if chunk.region.map.len() - chunk.used >= size => current.insert(chunk),
            _ => current
                .insert(Chunk { region: Arc::new(Region::new(size.max(CHUNK_BYTES))?), used: 0 }),
        };
        let offset = chunk.used;
        chunk.used += size;
        Ok(ArenaBox { region: Arc::clone(&chunk.region), offset, len: bytes })
    }
}

impl Region {
    fn new(len: usize) -> io::Result<Self> {
        let mut map = MmapMut::map_anon(len)?;
        #[cfg(target_os = "linux")]
        // A system without huge pages refuses; the arena then works with ordinary ones.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { start: map.as_mut_ptr(), map })
    }
}

/// An owned piece of a [`WeightArena`].
#[derive(Debug)]
pub struct ArenaBox {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl ArenaBox {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `offset + len` lies inside the region (`allocate` reserved it), which lives as long
        // as `self`; this range belongs to `self` alone, so no `&mut` to it exists beside `&self`.
        unsafe { std::slice::from_raw_parts(self.region.start.add(self.offset), self.len) }
    }

    /// The bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only access to the range.
        unsafe { std::slice::from_raw_parts_mut(self.region.start.add(self.offset), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_an_arena_are_zeroed_aligned_and_disjoint() {
        let arena = WeightArena::new();
        let mut pieces: Vec<_> = [0, 1, 63, 64, 65, 4096, CHUNK_BYTES + 1]
            .map(|len| arena.allocate(len).expect("allocates"))
            .into();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.bytes().as_ptr() as usize % ALIGNMENT, 0);
            assert!(piece.bytes().iter().all(|&b| b == 0));
            piece.bytes_mut().fill(i as u8 + 1);
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.bytes().iter().all(|&b| b == i as u8 + 1));
        }
    }

    #[test]
    fn a_mapped_file_reads_the_same_after_release() {
        let path = std::env::temp_dir().join(format!("mmfree-map-{}", std::process::id()));
        let content: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).expect("writes");
        let bytes = Bytes::map(&path).expect("maps");
        bytes.release(100..90_000);
        assert_eq!(&bytes[..], &content[..]);
        bytes.release(0..200_000);
        std::fs::remove_file(&path).expect("removes");
    }
}
