//! GPUs joined by NCCL, one of each process.
//!
//! The processes find each other as they do on CPUs. That exchange hands round NCCL's unique id and carries what the
//! host has to say; flat buffers go from GPU to GPU.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use mmfree_kernels::cuda::{Buffer, CudaError, Device};
use mmfree_kernels::training::{GpuGroup, Lookout, UniqueId, wait_until};

use super::Communicator;
use crate::error::{Error, Result};

/// Most processes whose exchanges go part by part. A part lies in few shards, so that few processes receive it, from all
/// others: that takes (P - 1) times what it does to exchange everything at once at the end.
const MAX_OVERLAPPING: usize = 8;

/// What carries the words of hosts, shared with those that watch over it.
type Host = Rc<RefCell<Box<dyn Communicator<Vec<f32>>>>>;

/// GPUs joined by NCCL, one of each process.
pub struct Nccl {
    /// Dropped first: the others notice before this process leaves the group.
    host: Host,
    group: GpuGroup,
}

impl Nccl {
    /// Joins the GPUs of processes that have found each other as `host`. Every process calls this.
    ///
    /// # Errors
    /// No NCCL, a process that is gone, two processes with one GPU.
    pub fn join(device: &Arc<Device>, mut host: Box<dyn Communicator<Vec<f32>>>) -> Result<Self> {
        let (rank, world_size) = (host.rank(), host.world_size());
        let uuid = device.uuid().map_err(failed)?;
        let uuids = host.gather_bytes(uuid.as_bytes())?;
        if let Some([first, second]) = same(&uuids) {
            return Err(Error::Communication(format!(
                "processes {first} and {second} both have the GPU {}: each needs its own; start fewer processes on \
                 that machine",
                String::from_utf8_lossy(&uuids[first])
            )));
        }
        let own = GpuGroup::unique_id().map_err(failed)?;
        let ids = host.gather_bytes(&own)?;
        let id: UniqueId = ids[0].as_slice().try_into().map_err(|_| {
            Error::Communication("process 0 sent something else than an id of NCCL".to_owned())
        })?;
        let mut group = GpuGroup::join(device, id, rank, world_size).map_err(failed)?;
        let host = Rc::new(RefCell::new(host));
        group.set_lookout(Some(lookout(&host)));
        Ok(Self { host, group })
    }
}

fn lookout(host: &Host) -> Lookout {
    let host = Rc::clone(host);
    Box::new(move || {
        host.borrow_mut().check().map_err(|error| CudaError::Abandoned(error.to_string()))
    })
}

/// The first two that are the same.
fn same(all: &[Vec<u8>]) -> Option<[usize; 2]> {
    let before = |second: usize| all[..second].iter().position(|first| *first == all[second]);
    (0..all.len()).find_map(|second| Some([before(second)?, second]))
}

fn failed(error: CudaError) -> Error {
    Error::Communication(error.to_string())
}

impl Communicator<Buffer<f32>> for Nccl {
    fn rank(&self) -> usize {
        self.host.borrow().rank()
    }

    fn world_size(&self) -> usize {
        self.host.borrow().world_size()
    }

    fn describe(&self) -> String {
        format!("{}, gradients over NCCL {}", self.host.borrow().describe(), self.group.version())
    }

    fn overlaps(&self) -> bool {
        self.host.borrow().world_size() <= MAX_OVERLAPPING
    }

    fn reduce_scatter(&mut self, buffer: &mut Buffer<f32>, shards: &[Range<usize>]) -> Result<()> {
        self.group.reduce_scatter(buffer, shards).map_err(failed)
    }

    fn all_gather(&mut self, buffer: &mut Buffer<f32>, shards: &[Range<usize>]) -> Result<()> {
        self.group.all_gather(buffer, shards).map_err(failed)
    }

    fn broadcast(&mut self, buffer: &mut Buffer<f32>) -> Result<()> {
        self.group.broadcast(buffer).map_err(failed)
    }

    fn join_device(&mut self) -> Result<()> {
        self.group.join_device().map_err(failed)
    }

    /// NCCL itself waits for a lost process for ever: this looks for it meanwhile.
    fn wait(&mut self) -> Result<()> {
        self.join_device()?;
        let look = &mut || self.host.borrow_mut().check();
        wait_until(&mut || self.group.is_done().map_err(failed), look)
    }

    fn check(&mut self) -> Result<()> {
        self.group.check().map_err(failed)?;
        self.host.borrow_mut().check()
    }

    fn lookout(&self) -> Option<Lookout> {
        Some(lookout(&self.host))
    }

    fn gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.host.borrow_mut().gather_bytes(bytes)
    }

    fn finish(&mut self) {
        self.group.finish();
        self.host.borrow_mut().finish();
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Else the group would hold on to `host`.
        self.group.set_lookout(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_with_two_processes_is_found() {
        let all = |names: &[&str]| names.iter().map(|n| n.as_bytes().to_vec()).collect::<Vec<_>>();
        assert_eq!(same(&all(&["a", "b", "c"])), None);
        assert_eq!(same(&all(&["a", "b", "c", "b"])), Some([1, 3]));
    }
}
