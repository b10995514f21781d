//! Several processes compute what one does.

mod support;

use std::ops::Range;

use mmfree_train::backend::CpuBackend;
use mmfree_train::communicator::{Communicator, Local, Tcp};
use mmfree_train::error::Result;
use support::{Processes, assert_same, finished, golden_gradients, train, trajectory, world};

const STEPS: u64 = 12;

/// Runs a function as each of several processes, joined by TCP.
fn joined<T: Send>(size: usize, run: impl Fn(Processes) -> T + Sync) -> Vec<T> {
    world(size, |launch| run(Box::new(Tcp::join(&launch).unwrap())))
}

#[test]
fn gradients_over_two_processes_are_those_of_the_authors_and_of_one_process() {
    let alone = finished(golden_gradients(Box::new(Local)));
    for together in joined(2, |processes| finished(golden_gradients(processes))) {
        assert_eq!(together, alone);
    }
}

#[test]
fn powers_of_two_give_the_same_bits_and_others_the_same_curve() {
    let run = |processes| finished(trajectory(processes, STEPS));
    let alone = run(Box::new(Local));
    for size in [2, 4, 8] {
        for together in joined(size, run) {
            assert_same(&together, &alone, &format!("{size} processes"));
        }
    }
    let three = joined(3, run);
    assert!(three.iter().all(|process| process == &three[0]));
    for ([found, _], [expected, _]) in three[0].0.iter().zip(&alone.0) {
        let (found, expected) = (f64::from_bits(*found), f64::from_bits(*expected));
        assert!((found - expected).abs() < 2e-3 * expected, "{found} instead of {expected}");
    }
}

/// Asks for gradients part by part, as an exchange beside the computation does.
struct InParts {
    processes: Processes,
    /// All elements, and those of the parts so far in this step.
    len: usize,
    reduced: usize,
    parts: usize,
}

impl Communicator<Vec<f32>> for InParts {
    fn rank(&self) -> usize {
        self.processes.rank()
    }

    fn world_size(&self) -> usize {
        self.processes.world_size()
    }

    fn describe(&self) -> String {
        self.processes.describe()
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn reduce_scatter(&mut self, buffer: &mut Vec<f32>, shards: &[Range<usize>]) -> Result<()> {
        self.reduced += shards.iter().map(Range::len).sum::<usize>();
        self.parts += 1;
        self.processes.reduce_scatter(buffer, shards)
    }

    fn all_gather(&mut self, buffer: &mut Vec<f32>, shards: &[Range<usize>]) -> Result<()> {
        // By the first of a step everything was reduced, once.
        if std::mem::take(&mut self.parts) > 0 {
            assert_eq!(std::mem::take(&mut self.reduced), self.len);
        }
        self.processes.all_gather(buffer, shards)
    }

    fn broadcast(&mut self, buffer: &mut Vec<f32>) -> Result<()> {
        self.len = buffer.len();
        self.processes.broadcast(buffer)
    }

    fn gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.processes.gather_bytes(bytes)
    }

    fn finish(&mut self) {
        self.processes.finish();
    }
}

#[test]
fn gradients_that_are_reduced_in_parts_have_the_same_bits() {
    let cpu = || CpuBackend::new(Some(1), None).unwrap();
    for recompute in ["false", "true"] {
        let set = [&*format!("batch.recompute_activations={recompute}")];
        let (alone, state, _) = train(cpu(), Box::new(Local), 0..STEPS, &set, None);
        for size in [1, 2, 4] {
            let results = joined(size, |processes| {
                let processes = Box::new(InParts { processes, len: 0, reduced: 0, parts: 0 });
                let (trajectory, state, mut processes) =
                    train(cpu(), processes, 0..STEPS, &set, None);
                processes.finish();
                (trajectory, state)
            });
            for together in results {
                assert_same(&together.0, &alone, &format!("{size} processes"));
                assert!(together.1 == state, "moments, {size} processes");
            }
        }
    }
}
