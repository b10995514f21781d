//! The processes of a launch, and the GPU of each.

use anyhow::Result;
use mmfree_train::backend::{CudaBackend, Memory};
use mmfree_train::communicator::{Communicator, Launch, Launcher, Local, Nccl, Tcp};

/// How hosts exchange what they have to say; on CPUs also what they compute.
pub type Processes = Box<dyn Communicator<Vec<f32>>>;
/// What computes, and how the processes exchange that.
pub type Joined<B> = (B, Box<dyn Communicator<<B as Memory>::Flat>>);

/// Joins the other processes of a launch, if there are any.
pub fn join(launch: &Launch) -> Result<Processes> {
    if launch.launcher == Launcher::Mpi {
        #[cfg(feature = "mpi")]
        return Ok(Box::new(mmfree_train::communicator::Mpi::join()?));
        #[cfg(not(feature = "mpi"))]
        if launch.world_size > 1 && launch.master.is_none() {
            anyhow::bail!(
                "started by mpirun as process {} of {}, but this program was built without MPI: build it with \
                 `cargo build --release --features mpi`, or pass MASTER_ADDR (`mpirun -x MASTER_ADDR=HOST`) to \
                 join over TCP",
                launch.rank,
                launch.world_size
            );
        }
    }
    if launch.world_size == 1 {
        return Ok(Box::new(Local));
    }
    Ok(Box::new(Tcp::join(launch)?))
}

/// The GPU of a process, joined with those of the others by NCCL. The first process of each machine takes the GPU of
/// number `first`, the next one the one behind it; a launcher may also show each process its own GPU alone.
///
/// # Errors
/// No such GPU, no NCCL, two processes with one GPU.
pub fn gpu(
    first: usize,
    launch: &Launch,
    processes: Processes,
) -> mmfree_train::error::Result<Joined<CudaBackend>> {
    let device = match CudaBackend::devices()? {
        1 => first,
        _ => first + launch.local_rank,
    };
    let backend = CudaBackend::new(device)?;
    let communicator: Box<dyn Communicator<_>> = match processes.world_size() {
        1 => Box::new(Local),
        _ => Box::new(Nccl::join(backend.device(), processes)?),
    };
    Ok((backend, communicator))
}
