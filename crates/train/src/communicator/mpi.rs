//! Processes joined by MPI.

use mpi::environment::Universe;
use mpi::topology::{Communicator as _, SimpleCommunicator};
use mpi::traits::{Destination as _, Source as _};

use super::Exchange;
use crate::error::{Error, Result};

/// Processes joined by MPI. There is one value of it in a process.
pub struct Mpi {
    world: SimpleCommunicator,
    /// Finalises MPI when it is dropped, which waits for all processes.
    universe: Option<Universe>,
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // After an error the others may never come to finalise: `mpirun` ends them when this process exits
        // without having done so.
        std::mem::forget(self.universe.take());
    }
}

impl Mpi {
    /// Joins the processes that `mpirun` (or `srun --mpi`) started.
    ///
    /// # Errors
    /// MPI was initialised before.
    pub fn join() -> Result<Self> {
        let universe = mpi::initialize().ok_or_else(|| {
            Error::Communication("MPI has been initialised in this process already".to_owned())
        })?;
        Ok(Self { world: universe.world(), universe: Some(universe) })
    }
}

impl Exchange for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn world_size(&self) -> usize {
        self.world.size() as usize
    }

    fn describe(&self) -> String {
        let version = mpi::environment::library_version().unwrap_or_default();
        let name = version.split(',').next().unwrap_or_default().trim();
        format!("{} processes over MPI ({name})", self.world.size())
    }

    fn exchange(&mut self, outgoing: &[&[u8]], incoming: &mut [&mut [u8]]) -> Result<()> {
        let (world, own) = (&self.world, self.world.rank());
        let others = outgoing.iter().zip(incoming.iter_mut()).zip(0..).filter(|(_, r)| *r != own);
        mpi::request::multiple_scope(2 * outgoing.len(), |scope, requests| {
            for ((sent, received), rank) in others {
                let peer = world.process_at_rank(rank);
                if !received.is_empty() {
                    requests.add(peer.immediate_receive_into(scope, *received));
                }
                if !sent.is_empty() {
                    requests.add(peer.immediate_send(scope, *sent));
                }
            }
            let mut finished = Vec::new();
            requests.wait_all(&mut finished);
        });
        Ok(())
    }

    fn finish(&mut self) {
        self.universe = None;
    }
}
