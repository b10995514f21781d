//! Processes that train together: what they exchange, and how they find each other.
//!
//! | implementation | processes | made for |
//! |---|---|---|
//! | [`Local`] | one | everything without a launcher |
//! | [`Tcp`] | any number, over sockets | `torchrun`, SLURM, Kubernetes: launchers that set RANK and WORLD_SIZE |
//! | `Mpi` (feature `mpi`) | any number, over MPI | `mpirun`, `srun --mpi` |
//! | [`Nccl`] | any number, each with a GPU | beside one of the others, which carries what the host has to say |
//!
//! Sums are added in one fixed order, a binary tree over the ranks, so that they do not depend on who is
//! fastest; and the tree over 2ⁿ ranks continues the one over partial sums within a rank
//! ([`tree_sum`]), so that the number of processes does not change the bits.

use std::ops::Range;

use mmfree_kernels::training::{Lookout, wait_until};

use crate::error::Result;

mod launch;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod tcp;

pub use launch::{Launch, Launcher};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use nccl::Nccl;
pub use tcp::Tcp;

/// Exchange among the processes of a run, on flat buffers of type `F`: host memory here, device memory on
/// a GPU.
///
/// Every process calls the same operations in the same order. Operations on a part of a buffer may be
/// called as soon as that part is final, so that an implementation on a device can let them overlap with
/// what is still computed.
pub trait Communicator<F> {
    /// This process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn world_size(&self) -> usize;

    /// What it is, for the header of a run.
    fn describe(&self) -> String;

    /// Whether exchanges go on beside what the device computes, and it pays to call
    /// [`reduce_scatter`](Self::reduce_scatter) part by part, as parts become final.
    fn overlaps(&self) -> bool {
        false
    }

    /// Adds up a buffer over all processes; process r then has the sum in `shards[r]`. Elsewhere in the shards its
    /// buffer is undefined, and outside of them it is as before. On a device this may only have begun: nothing may
    /// touch the shards before [`join_device`](Self::join_device).
    ///
    /// # Errors
    /// A process is gone.
    fn reduce_scatter(&mut self, buffer: &mut F, shards: &[Range<usize>]) -> Result<()>;

    /// Gives every process `shards[r]` of process r.
    ///
    /// # Errors
    /// A process is gone.
    fn all_gather(&mut self, buffer: &mut F, shards: &[Range<usize>]) -> Result<()>;

    /// Gives every process the buffer of process 0.
    ///
    /// # Errors
    /// A process is gone.
    fn broadcast(&mut self, buffer: &mut F) -> Result<()>;

    /// What is submitted on the device from here on waits for every exchange that was begun. The host does not.
    ///
    /// # Errors
    /// Those of the device.
    fn join_device(&mut self) -> Result<()> {
        Ok(())
    }

    /// Waits until every exchange that was begun is done.
    ///
    /// # Errors
    /// A process is gone.
    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    /// Waits until `done` says so: for work of a device that may depend on other processes.
    ///
    /// # Errors
    /// Those of `done`; a process is gone.
    fn wait_for(&mut self, done: &mut dyn FnMut() -> mmfree::error::Result<bool>) -> Result<()> {
        wait_until(&mut || Ok(done()?), &mut || self.check())
    }

    /// Looks whether all processes are still there, as far as that can be seen without waiting for them.
    ///
    /// # Errors
    /// A process is gone.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    /// [`check`](Self::check), for whoever waits for a device that waits for other processes.
    fn lookout(&self) -> Option<Lookout> {
        None
    }

    /// Gives every process the bytes of every process, in the order of ranks. For small things: losses,
    /// norms, decisions.
    ///
    /// # Errors
    /// A process is gone.
    fn gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits until every process is here.
    ///
    /// # Errors
    /// A process is gone.
    fn barrier(&mut self) -> Result<()> {
        self.gather_bytes(&[]).map(drop)
    }

    /// Takes leave: every process is done. One that ends without this has failed, and the others notice.
    fn finish(&mut self) {}
}

/// Elements that are exchanged at a time.
const BLOCK: usize = 1 << 18;

/// The only process.
#[derive(Debug, Default)]
pub struct Local;

impl<F> Communicator<F> for Local {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn describe(&self) -> String {
        "1 process".to_owned()
    }

    fn reduce_scatter(&mut self, _: &mut F, _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn all_gather(&mut self, _: &mut F, _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&mut self, _: &mut F) -> Result<()> {
        Ok(())
    }

    fn gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }
}

/// Cuts a buffer into one piece a process, at multiples of `unit`, as evenly as that allows. Pieces may
/// be empty.
pub fn shards(len: usize, unit: usize, world_size: usize) -> Vec<Range<usize>> {
    let units = len.div_ceil(unit);
    let edge = |rank: usize| (units * rank / world_size * unit).min(len);
    (0..world_size).map(|rank| edge(rank)..edge(rank + 1)).collect()
}

/// The part of each shard that lies in a range; empty parts keep their order.
pub fn parts(shards: &[Range<usize>], range: &Range<usize>) -> Vec<Range<usize>> {
    let inside = |at: usize| at.clamp(range.start, range.end);
    shards.iter().map(|shard| inside(shard.start)..inside(shard.end)).collect()
}

/// Adds values in a balanced binary tree: the first half, the second half, and their sum.
pub fn tree_sum(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [one] => *one,
        _ => {
            let (left, right) = values.split_at(values.len() / 2);
            tree_sum(left) + tree_sum(right)
        }
    }
}

/// [`tree_sum`] of each element over pieces of one length. The result is in the first piece.
fn tree_add(pieces: &mut [&mut [f32]]) {
    if pieces.len() > 1 {
        let (left, right) = pieces.split_at_mut(pieces.len() / 2);
        tree_add(left);
        tree_add(right);
        for (sum, addend) in left[0].iter_mut().zip(&*right[0]) {
            *sum += *addend;
        }
    }
}

/// A collective on host memory, cut into blocks that each process exchanges with each other one.
///
/// What remains for a transport is one operation: [`exchange`](Exchange::exchange).
pub(crate) trait Exchange {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    fn describe(&self) -> String;

    /// Sends `outgoing[r]` to process r and receives its piece for this process into `incoming[r]`, whose
    /// length both know. Own pieces are not touched.
    fn exchange(&mut self, outgoing: &[&[u8]], incoming: &mut [&mut [u8]]) -> Result<()>;

    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self) {}
}

impl<F: AsMut<[f32]>, E: Exchange> Communicator<F> for E {
    fn rank(&self) -> usize {
        Exchange::rank(self)
    }

    fn world_size(&self) -> usize {
        Exchange::world_size(self)
    }

    fn describe(&self) -> String {
        Exchange::describe(self)
    }

    fn reduce_scatter(&mut self, buffer: &mut F, shards: &[Range<usize>]) -> Result<()> {
        let (buffer, own) = (buffer.as_mut(), shards[Exchange::rank(self)].clone());
        let longest = shards.iter().map(Range::len).max().unwrap_or(0);
        let mut received = vec![vec![0.0f32; BLOCK.min(own.len())]; shards.len()];
        for from in (0..longest).step_by(BLOCK) {
            let outgoing: Vec<&[u8]> = shards
                .iter()
                .map(|shard| bytemuck::cast_slice(&buffer[block(shard, from)]))
                .collect();
            let target = block(&own, from);
            let mut incoming: Vec<&mut [u8]> = received
                .iter_mut()
                .map(|piece| bytemuck::cast_slice_mut(&mut piece[..target.len()]))
                .collect();
            self.exchange(&outgoing, &mut incoming)?;
            received[Exchange::rank(self)][..target.len()].copy_from_slice(&buffer[target.clone()]);
            let mut pieces: Vec<_> =
                received.iter_mut().map(|piece| &mut piece[..target.len()]).collect();
            tree_add(&mut pieces);
            buffer[target].copy_from_slice(pieces[0]);
        }
        Ok(())
    }

    fn all_gather(&mut self, buffer: &mut F, shards: &[Range<usize>]) -> Result<()> {
        let (buffer, own) = (buffer.as_mut(), shards[Exchange::rank(self)].clone());
        let longest = shards.iter().map(Range::len).max().unwrap_or(0);
        let mut sent = vec![0.0f32; BLOCK.min(own.len())];
        for from in (0..longest).step_by(BLOCK) {
            let source = block(&own, from);
            let sent = &mut sent[..source.len()];
            sent.copy_from_slice(&buffer[source]);
            let outgoing: Vec<&[u8]> = vec![bytemuck::cast_slice(sent); shards.len()];
            // The blocks of all shards, in the order of ranks: shards follow each other.
            let mut rest = &mut *buffer;
            let mut done = 0;
            let mut incoming: Vec<&mut [u8]> = Vec::with_capacity(shards.len());
            for shard in shards {
                let target = block(shard, from);
                let (_, after) = rest.split_at_mut(target.start - done);
                let (piece, after) = after.split_at_mut(target.len());
                done = target.end;
                rest = after;
                incoming.push(bytemuck::cast_slice_mut(piece));
            }
            self.exchange(&outgoing, &mut incoming)?;
        }
        Ok(())
    }

    fn broadcast(&mut self, buffer: &mut F) -> Result<()> {
        let (world, root) = (Exchange::world_size(self), Exchange::rank(self) == 0);
        let mut copy = Vec::new();
        for piece in buffer.as_mut().chunks_mut(BLOCK) {
            let mut outgoing: Vec<&[u8]> = vec![&[]; world];
            let mut incoming: Vec<&mut [u8]> = (0..world).map(|_| Default::default()).collect();
            if root {
                copy.clear();
                copy.extend_from_slice(piece);
                outgoing.fill(bytemuck::cast_slice(&copy));
            } else {
                incoming[0] = bytemuck::cast_slice_mut(piece);
            }
            self.exchange(&outgoing, &mut incoming)?;
        }
        Ok(())
    }

    fn gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (rank, world) = (Exchange::rank(self), Exchange::world_size(self));
        let length = (bytes.len() as u64).to_le_bytes();
        let mut lengths = vec![[0u8; 8]; world];
        let mut incoming: Vec<&mut [u8]> = lengths.iter_mut().map(|l| &mut l[..]).collect();
        self.exchange(&vec![&length[..]; world], &mut incoming)?;
        lengths[rank] = length;
        let mut gathered: Vec<Vec<u8>> = lengths
            .iter()
            .map(|length| match usize::try_from(u64::from_le_bytes(*length)) {
                Ok(length) if length <= MAX_GATHERED => Ok(vec![0; length]),
                _ => Err(crate::error::Error::Communication(
                    "a process sends something else than this program's data".to_owned(),
                )),
            })
            .collect::<Result<_>>()?;
        let mut incoming: Vec<&mut [u8]> = gathered.iter_mut().map(|g| &mut g[..]).collect();
        self.exchange(&vec![bytes; world], &mut incoming)?;
        gathered[rank] = bytes.to_vec();
        Ok(gathered)
    }

    fn check(&mut self) -> Result<()> {
        Exchange::check(self)
    }

    fn finish(&mut self) {
        Exchange::finish(self);
    }
}

/// Most bytes of one process that are gathered.
const MAX_GATHERED: usize = 1 << 26;

/// The block of a shard that begins `from` elements behind its start; empty behind its end.
fn block(shard: &Range<usize>, from: usize) -> Range<usize> {
    let start = (shard.start + from).min(shard.end);
    start..(start + BLOCK).min(shard.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_everything_once() {
        for (len, unit, world) in [(0, 4, 3), (1, 4, 3), (100, 7, 4), (64, 16, 4), (1000, 1, 7)] {
            let shards = shards(len, unit, world);
            assert_eq!(shards.len(), world);
            assert_eq!((shards[0].start, shards[world - 1].end), (0, len));
            assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(shards.iter().all(|shard| shard.start % unit == 0 || shard.start == len));
        }
    }

    #[test]
    fn parts_of_shards_cover_a_range_in_order() {
        let shards = shards(100, 8, 3);
        for range in [0..100, 0..5, 30..70, 90..100, 40..40] {
            let parts = parts(&shards, &range);
            assert_eq!(parts.len(), 3);
            assert_eq!((parts[0].start, parts[2].end), (range.start, range.end));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            let inside = |(part, shard): (&Range<usize>, &Range<usize>)| {
                part.is_empty() || (shard.start <= part.start && part.end <= shard.end)
            };
            assert!(parts.iter().zip(&shards).all(inside));
        }
    }

    #[test]
    fn the_tree_is_the_same_for_numbers_and_for_buffers() {
        let values = [1e8f32, 1.0, -1e8, 3.0, 0.1, 1e-3, 7.0];
        let mut buffers: Vec<Vec<f32>> = values.iter().map(|&value| vec![value]).collect();
        let mut pieces: Vec<&mut [f32]> = buffers.iter_mut().map(|b| &mut b[..]).collect();
        tree_add(&mut pieces);
        let (left, right) = ((1e8f32 + (1.0f32 + -1e8)), ((3.0f32 + 0.1) + (1e-3f32 + 7.0)));
        assert_eq!(buffers[0][0], left + right);
        assert_eq!(tree_sum(&[1.0, 2.0, 3.0]), 6.0);
    }
}
