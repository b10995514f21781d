//! Exchange of f32 buffers among the GPUs of several processes, by NCCL's sends and receives.
//!
//! Sums are added here and not by NCCL: each process gets the pieces of all others for its part and adds them in a
//! balanced binary tree over the ranks, as processes on CPUs do. As many bytes cross the links as in a ring, and the
//! order does not depend on topology or version. It costs scratch memory and one pass over what was received.
//!
//! Exchanges run on a stream of their own, beside what the device computes meanwhile. Ranks are meant to be processes: if
//! several are threads of one, NCCL wants NCCL_P2P_DIRECT_DISABLE=1, since memory in stream order is its own GPU's alone.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};

use super::OPTIMIZER;
use super::nccl::{FLOAT, Nccl, ncclComm_t, ncclUniqueId};
use super::optimizer::{AddArgs, elementwise};
use super::pace::{Lookout, Pace};
use crate::cuda::{Buffer, CudaError, Device, Kernel};

/// Elements that are received at a time and wait to be added, from all others together: 64 MiB.
const SCRATCH: usize = 1 << 24;

/// What NCCL calls the unique id of a communicator.
pub type UniqueId = [u8; 128];

/// This process's GPU among those that train together.
pub struct GpuGroup {
    device: Arc<Device>,
    nccl: &'static Nccl,
    communicator: ncclComm_t,
    rank: usize,
    world_size: usize,
    stream: Arc<CudaStream>,
    pace: Pace,
    add: Kernel,
    scratch: Buffer<f32>,
    /// End of what was submitted last.
    newest: Option<CudaEvent>,
    /// Whether all processes are done, so that none waits in vain for another one's farewell.
    finished: bool,
}

impl GpuGroup {
    /// A name for a new group, made by one process for all.
    ///
    /// # Errors
    /// No NCCL; NCCL's.
    pub fn unique_id() -> Result<UniqueId, CudaError> {
        Ok(Nccl::get()?.unique_id()?.internal.map(|byte| byte.to_ne_bytes()[0]))
    }

    /// Joins a group. Waits until all `world_size` processes do so.
    ///
    /// # Errors
    /// No NCCL; NCCL's; no memory.
    pub fn join(
        device: &Arc<Device>,
        id: UniqueId,
        rank: usize,
        world_size: usize,
    ) -> Result<Self, CudaError> {
        let nccl = Nccl::get()?;
        device.make_current()?;
        let scratch = if world_size > 1 { block_len(world_size) * (world_size - 1) } else { 1 };
        let (stream, add) = (device.stream_beside()?, device.kernel(OPTIMIZER, "add_elements", 0)?);
        let scratch = Buffer::zeros(device, scratch)?;
        let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
        let communicator = nccl.join(id, rank, world_size)?;
        Ok(Self {
            device: Arc::clone(device),
            nccl,
            communicator,
            rank,
            world_size,
            stream,
            pace: Pace::default(),
            add,
            scratch,
            newest: None,
            finished: false,
        })
    }

    /// What looks, whenever the host waits for exchanges that it wants to submit more of, whether that makes sense.
    pub fn set_lookout(&mut self, lookout: Option<Lookout>) {
        self.pace.set_lookout(lookout);
    }

    /// Version of the library.
    pub fn version(&self) -> String {
        let (major, minor, patch) = self.nccl.version();
        format!("{major}.{minor}.{patch}")
    }

    /// Adds up a buffer over all processes: process r gets the sum in `shards[r]`, and keeps what it has elsewhere.
    /// Begins after what was submitted on the device before, and runs beside what is submitted afterwards, which
    /// must leave the shards alone until [`join_device`](Self::join_device).
    ///
    /// # Errors
    /// Shards outside the buffer, or not one for each process; NCCL's.
    pub fn reduce_scatter(
        &mut self,
        buffer: &mut Buffer<f32>,
        shards: &[Range<usize>],
    ) -> Result<(), CudaError> {
        self.check_shards(buffer, shards)?;
        self.begin()?;
        let step = block_len(self.world_size);
        let longest = shards.iter().map(Range::len).max().unwrap_or(0);
        let tree = tree(self.world_size, self.rank);
        for from in (0..longest).step_by(step) {
            let own = block(&shards[self.rank], from, step);
            let mut messages = Vec::with_capacity(2 * self.world_size);
            for peer in self.peers() {
                let theirs = block(&shards[peer], from, step);
                messages.push(Message::send(peer, buffer, &theirs));
                let slot = self.slot(peer) * step;
                messages.push(Message::receive(peer, &self.scratch, &(slot..slot + own.len())));
            }
            self.exchange(&messages)?;
            for (into, from) in tree.iter().copied() {
                let piece = |rank: usize| match rank == self.rank {
                    true => buffer.address(own.start),
                    false => self.scratch.address(self.slot(rank) * step),
                };
                let (from, into) = (piece(from), piece(into));
                self.add(from, into, own.len())?;
            }
        }
        self.end()
    }

    /// Gives every process `shards[r]` of process r. What is submitted on the device afterwards waits for it.
    ///
    /// # Errors
    /// As [`reduce_scatter`](Self::reduce_scatter).
    pub fn all_gather(
        &mut self,
        buffer: &mut Buffer<f32>,
        shards: &[Range<usize>],
    ) -> Result<(), CudaError> {
        self.check_shards(buffer, shards)?;
        self.begin()?;
        let mut messages = Vec::with_capacity(2 * self.world_size);
        for peer in self.peers() {
            messages.push(Message::send(peer, buffer, &shards[self.rank]));
            messages.push(Message::receive(peer, buffer, &shards[peer]));
        }
        self.exchange(&messages)?;
        self.end()?;
        self.join_device()
    }

    /// Gives every process the buffer of process 0. What is submitted on the device afterwards waits for it.
    ///
    /// # Errors
    /// NCCL's.
    pub fn broadcast(&mut self, buffer: &mut Buffer<f32>) -> Result<(), CudaError> {
        self.begin()?;
        let whole = 0..buffer.len();
        let messages: Vec<_> = match self.rank {
            0 => self.peers().map(|peer| Message::send(peer, buffer, &whole)).collect(),
            _ => vec![Message::receive(0, buffer, &whole)],
        };
        self.exchange(&messages)?;
        self.end()?;
        self.join_device()
    }

    /// What is submitted on the device from here on waits for all exchanges.
    ///
    /// # Errors
    /// The driver's.
    pub fn join_device(&self) -> Result<(), CudaError> {
        self.device.join()
    }

    /// Looks whether an exchange has failed, as far as NCCL knows.
    ///
    /// # Errors
    /// Such a failure.
    pub fn check(&self) -> Result<(), CudaError> {
        // SAFETY: the communicator lives as long as this.
        unsafe { self.nccl.check_earlier(self.communicator) }
    }

    /// Whether all exchanges are done. Does not wait.
    ///
    /// # Errors
    /// A failure of any of them.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.check()?;
        let Some(event) = &self.newest else { return Ok(true) };
        event.try_is_complete().map_err(|error| CudaError::driver("an exchange", error))
    }

    /// All processes are done. Without this the group is left at once, whatever it has under way.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank;
        (0..self.world_size).filter(move |&rank| rank != own)
    }

    /// Place of another process's piece in the scratch memory.
    fn slot(&self, rank: usize) -> usize {
        if rank < self.rank { rank } else { rank - 1 }
    }

    fn check_shards(&self, buffer: &Buffer<f32>, shards: &[Range<usize>]) -> Result<(), CudaError> {
        let inside = |shard: &Range<usize>| shard.start <= shard.end && shard.end <= buffer.len();
        if shards.len() == self.world_size && shards.iter().all(inside) {
            return Ok(());
        }
        Err(CudaError::Shape(format!(
            "{} shards of a buffer of {} for {} processes: one each is expected, inside the buffer",
            shards.len(),
            buffer.len(),
            self.world_size
        )))
    }

    /// Exchanges wait for what was submitted on the device.
    fn begin(&self) -> Result<(), CudaError> {
        self.stream
            .join(self.device.stream())
            .map_err(|error| CudaError::driver("beginning an exchange", error))
    }

    fn end(&mut self) -> Result<(), CudaError> {
        let record = || self.stream.record_event(None);
        let failed = |error| CudaError::driver("ending an exchange", error);
        self.newest = Some(record().map_err(failed)?);
        self.device.set_beside(record().map_err(failed)?);
        Ok(())
    }

    /// Submits messages that all go at once. Those without elements are left out, on both sides.
    fn exchange(&mut self, messages: &[Message]) -> Result<(), CudaError> {
        let (nccl, stream) = (self.nccl, self.stream.cu_stream());
        self.device.make_current()?;
        // SAFETY: the calls of a group follow each other on this thread.
        nccl.check("ncclGroupStart", unsafe { (nccl.group_start)() })?;
        let mut submitted = Ok(());
        for message in messages.iter().filter(|message| message.len > 0) {
            let (address, len, peer) = (message.address as *mut _, message.len, message.peer);
            let communicator = self.communicator;
            // SAFETY: the communicator lives as long as this; the address is that of `len` elements of a buffer of
            // this device, whose memory is not returned before the stream has done this.
            let (what, code) = unsafe {
                match message.receives {
                    true => (
                        "ncclRecv",
                        (nccl.receive)(address, len, FLOAT, peer, communicator, stream),
                    ),
                    false => {
                        ("ncclSend", (nccl.send)(address, len, FLOAT, peer, communicator, stream))
                    }
                }
            };
            submitted = submitted.and(nccl.check(what, code));
        }
        // SAFETY: as above.
        let ended = nccl.check("ncclGroupEnd", unsafe { (nccl.group_end)() });
        submitted.and(ended)?;
        self.pace.count(&self.stream)
    }

    /// `into += from`, on the stream of the exchanges.
    fn add(&mut self, from: u64, into: u64, len: usize) -> Result<(), CudaError> {
        if len == 0 {
            return Ok(());
        }
        let args = AddArgs { from, into, len: len as u64 };
        // SAFETY: both are parts of live buffers, whose bounds were checked, and the kernel takes these arguments.
        unsafe { self.add.launch_on(&self.stream, elementwise(len), &args)? };
        self.pace.count(&self.stream)
    }
}

impl Drop for GpuGroup {
    fn drop(&mut self) {
        let nccl = self.nccl;
        // SAFETY: the communicator was made with this and ends with it.
        unsafe {
            if self.finished && self.stream.synchronize().is_ok() {
                (nccl.destroy)(self.communicator);
            } else {
                (nccl.abort)(self.communicator);
            }
        }
    }
}

impl std::fmt::Debug for GpuGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuGroup")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .finish_non_exhaustive()
    }
}

/// Elements that go to or come from another process.
struct Message {
    peer: c_int,
    receives: bool,
    address: u64,
    len: usize,
}

impl Message {
    fn send(peer: usize, buffer: &Buffer<f32>, range: &Range<usize>) -> Self {
        Self { receives: false, ..Self::receive(peer, buffer, range) }
    }

    fn receive(peer: usize, buffer: &Buffer<f32>, range: &Range<usize>) -> Self {
        let peer = c_int::try_from(peer).unwrap_or(c_int::MAX);
        Self { peer, receives: true, address: buffer.address(range.start), len: range.len() }
    }
}

/// Elements of each process that are received at a time.
fn block_len(world_size: usize) -> usize {
    (SCRATCH / world_size.saturating_sub(1).max(1)).max(1)
}

/// The block of a shard that begins `from` elements behind its start; empty behind its end.
fn block(shard: &Range<usize>, from: usize, len: usize) -> Range<usize> {
    let start = (shard.start + from).min(shard.end);
    start..(start + len).min(shard.end)
}

/// Additions `(into, from)` of a balanced binary tree over pieces by rank, after which the sum of all is in piece `own`.
/// A subtree's sum is kept in its first piece, or in `own` if it has that: the operands are those of the tree, and
/// a + b is b + a.
fn tree(pieces: usize, own: usize) -> Vec<(usize, usize)> {
    /// Returns the piece that has the sum.
    fn add(ranks: Range<usize>, own: usize, steps: &mut Vec<(usize, usize)>) -> usize {
        if ranks.len() == 1 {
            return ranks.start;
        }
        let middle = ranks.start + ranks.len() / 2;
        let left = add(ranks.start..middle, own, steps);
        let right = add(middle..ranks.end, own, steps);
        let (into, from) = if right == own { (right, left) } else { (left, right) };
        steps.push((into, from));
        into
    }
    let mut steps = Vec::new();
    add(0..pieces.max(1), own, &mut steps);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first half, the second half, and their sum: as processes on CPUs add.
    fn expected(values: &[f32]) -> f32 {
        match values {
            [one] => *one,
            _ => {
                let (left, right) = values.split_at(values.len() / 2);
                expected(left) + expected(right)
            }
        }
    }

    #[test]
    fn every_process_adds_the_same_tree() {
        let values = [1e8f32, 1.0, -1e8, 3.0, 0.1, 1e-3, 7.0, -0.3, 5e7];
        for world in 1..=values.len() {
            for own in 0..world {
                let mut pieces = values[..world].to_vec();
                for (into, from) in tree(world, own) {
                    pieces[into] += pieces[from];
                }
                assert_eq!(pieces[own], expected(&values[..world]), "{own} of {world}");
            }
        }
    }

    #[test]
    fn blocks_cover_every_shard_and_agree_between_processes() {
        let len = block_len(3);
        assert!(2 * len <= SCRATCH && block_len(1) == SCRATCH);
        let shard = 5..5 + 2 * len + 7;
        let blocks: Vec<_> = (0..4).map(|n| block(&shard, n * len, len)).collect();
        assert_eq!(blocks[0], 5..5 + len);
        assert_eq!(blocks[2], 5 + 2 * len..shard.end);
        assert!(blocks[3].is_empty() && blocks[1].end == blocks[2].start);
    }
}
