//! Several processes compute what one does.

mod support;

use std::net::TcpListener;
use std::thread;

use mmfree_train::communicator::{Launch, Launcher, Local, Tcp};
use support::{Processes, Trajectory, finished, golden_gradients, trajectory};

/// Runs a function as each of several processes, joined by TCP.
fn world<T: Send>(size: usize, run: impl Fn(Processes) -> T + Sync) -> Vec<T> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let run = &run;
    thread::scope(|scope| {
        let process = |rank| Launch {
            launcher: Launcher::Environment,
            rank,
            world_size: size,
            local_rank: rank,
            local_world_size: Some(size),
            master: Some(("127.0.0.1".to_owned(), port)),
        };
        let threads: Vec<_> = (0..size)
            .map(|rank| scope.spawn(move || run(Box::new(Tcp::join(&process(rank)).unwrap()))))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn gradients_over_two_processes_are_those_of_the_authors_and_of_one_process() {
    let alone = finished(golden_gradients(Box::new(Local)));
    for together in world(2, |processes| finished(golden_gradients(processes))) {
        assert_eq!(together, alone);
    }
}

fn assert_same(found: &Trajectory, expected: &Trajectory, size: usize) {
    for (step, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
        let [found, expected] = [found, expected].map(|bits| bits.map(f64::from_bits));
        assert_eq!(found, expected, "loss and norm of step {step}, {size} processes");
    }
    let differ = found.1.iter().zip(&expected.1).position(|(a, b)| a != b);
    assert_eq!(differ, None, "first weight that differs, {size} processes");
}

#[test]
fn powers_of_two_give_the_same_bits_and_others_the_same_curve() {
    const STEPS: u64 = 12;
    let run = |processes| finished(trajectory(processes, STEPS));
    let alone = run(Box::new(Local));
    for size in [2, 4, 8] {
        for together in world(size, run) {
            assert_same(&together, &alone, size);
        }
    }
    let three = world(3, run);
    assert!(three.iter().all(|process| process == &three[0]));
    for ([found, _], [expected, _]) in three[0].0.iter().zip(&alone.0) {
        let (found, expected) = (f64::from_bits(*found), f64::from_bits(*expected));
        assert!((found - expected).abs() < 2e-3 * expected, "{found} instead of {expected}");
    }
}
