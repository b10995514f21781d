//! The yardstick for decoding: how fast this machine reads memory.

pub mod cuda;

use std::io;

use crate::memory::{ArenaBox, WeightArena};
use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// Words that one task reads; long streams, as in a matrix.
const TASK_WORDS: usize = 256 << 10;

/// Memory to read from, written once so that every page is there.
#[derive(Debug)]
pub struct ReadBuffer(ArenaBox);

impl ReadBuffer {
    /// A buffer of a given size, which should be a multiple of the last cache level's.
    ///
    /// # Errors
    /// The system's refusal, for example out of memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let mut memory = WeightArena::new().allocate(bytes)?;
        memory.bytes_mut().fill(0x5a);
        Ok(Self(memory))
    }

    /// Bytes that one [`read`](Self::read) reads.
    pub fn bytes(&self) -> usize {
        self.0.bytes().len() / 8 * 8
    }

    /// Reads the whole buffer once, on all threads, with the loads of the tier. The result depends on
    /// every byte, so that nothing can be left out.
    pub fn read(&self, backend: Backend, pool: &Pool) -> u64 {
        let words: &[u64] = bytemuck::cast_slice(&self.0.bytes()[..self.bytes()]);
        let mut sums = vec![0u64; words.len().div_ceil(TASK_WORDS)];
        let parts = SharedMut::new(&mut sums);
        pool.run(words.len().div_ceil(TASK_WORDS), &|_, task| {
            let part = &words[task * TASK_WORDS..words.len().min((task + 1) * TASK_WORDS)];
            // SAFETY: each task has its own element.
            unsafe { parts.slice(task, 1)[0] = combine(backend, part) };
        });
        sums.iter().fold(0, |a, b| a ^ b)
    }
}

compiled_for_each_tier! {
    fn combine(words: &[u64]) -> u64 = combine_body
}

#[inline(always)]
fn combine_body(words: &[u64]) -> u64 {
    words.iter().fold(0, |a, b| a ^ b)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn every_word_is_read() {
        let pool = Pool::new(NonZeroUsize::new(2).expect("not zero"));
        let mut buffer = ReadBuffer::new(TASK_WORDS * 8 * 2 + 72).expect("allocates");
        let before = buffer.read(Backend::detect(), &pool);
        for at in [0, 8 * TASK_WORDS, buffer.bytes() - 1] {
            buffer.0.bytes_mut()[at] ^= 1;
            assert_ne!(buffer.read(Backend::detect(), &pool), before);
            buffer.0.bytes_mut()[at] ^= 1;
        }
        assert_eq!(buffer.read(Backend::detect(), &pool), before);
    }
}
