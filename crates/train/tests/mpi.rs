//! What `mpirun -np N` computes is what one process computes. Not a test of the usual harness, whose threads
//! MPI would not like: every process runs `main`. MPI is initialised once in a process, so all checks are one.

mod support;

use mmfree_train::communicator::{Local, Mpi};
use support::{Processes, finished, golden_gradients, trajectory};

fn main() {
    const STEPS: u64 = 12;
    let processes: Processes = Box::new(Mpi::join().expect("MPI"));
    let size = processes.world_size();
    let (gradients, processes) = golden_gradients(processes);
    assert_eq!(gradients, finished(golden_gradients(Box::new(Local))));
    let together = finished(trajectory(processes, STEPS));
    assert!(together == finished(trajectory(Box::new(Local), STEPS)), "other bits");
    println!("test result: ok. 2 passed: gradients and {STEPS} steps over {size} MPI processes");
}
