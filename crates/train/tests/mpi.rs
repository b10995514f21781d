//! What `mpirun -np N` computes is what one process computes. Not a test of the usual harness, whose threads
//! MPI would not like: every process runs `main`.

mod support;

use mmfree_train::communicator::{Local, Mpi};

fn main() {
    // MPI is initialised once in a process: one of the checks, chosen by an argument.
    let check = std::env::args().nth(1).unwrap_or_default();
    let processes = Box::new(Mpi::join().expect("MPI"));
    let size = mmfree_train::communicator::Communicator::<Vec<f32>>::world_size(&*processes);
    match check.as_str() {
        "gradients" => {
            let together = support::golden_gradients(processes);
            assert_eq!(together, support::golden_gradients(Box::new(Local)));
        }
        "trajectory" => {
            let together = support::trajectory(processes, 12);
            assert!(together == support::trajectory(Box::new(Local), 12), "other bits");
        }
        other => panic!("expected gradients or trajectory, not {other:?}"),
    }
    println!("test result: ok. 1 passed: {check} over {size} MPI processes");
}
