//! Checks of training over several processes, for any communicator.

#![allow(dead_code, reason = "each test program uses its part")]

use std::net::TcpListener;
use std::ops::Range;
use std::path::PathBuf;
use std::thread;

use mmfree_train::backend::{Backend, CpuBackend};
use mmfree_train::communicator::{Communicator, Launch, Launcher};
use mmfree_train::config::TrainConfig;
use mmfree_train::data::Batch;
use mmfree_train::error::Result;
use mmfree_train::schedule::Rates;
use mmfree_train::trainer::DataParallel;
use mmfree_train::weights;
use safetensors::SafeTensors;

pub type Processes = Box<dyn Communicator<Vec<f32>>>;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny").join(name)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn config(sequences: usize, length: usize, set: &[&str]) -> TrainConfig {
    let own = [
        "data.train=none".to_owned(),
        format!("batch.sequences={sequences}"),
        "batch.micro_batch=1".to_owned(),
        format!("batch.sequence_length={length}"),
    ];
    let set = own.iter().map(String::as_str).chain(set.iter().copied());
    let set: Vec<_> = set.map(|text| text.parse().unwrap()).collect();
    TrainConfig::parse("test", "", &set).unwrap()
}

fn cpu() -> CpuBackend {
    CpuBackend::new(Some(1), None).unwrap()
}

/// What a check came to, once all processes are done with it.
pub fn finished<T>((result, mut processes): (T, Processes)) -> T {
    processes.finish();
    result
}

/// Loss and gradients of the fixture's two sequences, one a micro-batch, after comparing them with what the
/// authors' implementation computed: at most 1e-5 relative, each parameter.
pub fn golden_gradients(processes: Processes) -> ((f64, Vec<f32>), Processes) {
    let (architecture, parameters) = weights::load(&fixture("")).unwrap();
    let bytes = std::fs::read(fixture("activations.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("input_ids").unwrap();
    let [sequences, length] = view.shape()[..] else { panic!("ids are [B, T]") };
    let width = view.data().len() / (sequences * length);
    let ids: Vec<u32> = view
        .data()
        .chunks_exact(width)
        .map(|id| u32::from_le_bytes(id[..4].try_into().unwrap()))
        .collect();
    let row = |row: usize| &ids[row * length..(row + 1) * length];
    let mut rows = |range: Range<usize>| -> Result<Batch> {
        Ok(Batch {
            rows: range.len(),
            seq_len: length - 1,
            ids: range.clone().flat_map(|at| row(at)[..length - 1].to_vec()).collect(),
            targets: range.flat_map(|at| row(at)[1..].to_vec()).collect(),
        })
    };
    let config = config(sequences, length - 1, &[]);
    let mut engine =
        DataParallel::new(cpu(), processes, &architecture, &config, &parameters).unwrap();
    engine.accumulate(&mut rows).unwrap();
    let mut found = vec![0.0; parameters.len()];
    engine.read_gradients(&mut found).unwrap();
    engine.update(1, Rates { learning_rate: 0.0, weight_decay_factor: 1.0 }).unwrap();
    let loss = engine.next_outcome(true).unwrap().unwrap().loss;
    let expected_loss = f64::from(floats(tensors.tensor("loss").unwrap().data())[0]);
    assert!((loss - expected_loss).abs() < 2e-6, "{loss} instead of {expected_loss}");
    let bytes = std::fs::read(fixture("gradients.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    for parameter in architecture.layout().parameters() {
        let expected = floats(expected.tensor(&parameter.name).unwrap().data());
        let found = &found[parameter.range.clone()];
        let square = |difference: f32| f64::from(difference).powi(2);
        let error: f64 = found.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let norm: f64 = expected.iter().map(|&b| square(b)).sum();
        let relative = (error / norm).sqrt();
        assert!(relative < 1e-5, "{}: relative error {relative:.1e}", parameter.name);
    }
    ((loss, found), engine.into_communicator())
}

/// Loss and gradient norm of each step, and the weights: as bits.
pub type Trajectory = (Vec<[u64; 2]>, Vec<u32>);

/// Loss and gradient norm of some steps on invented tokens, then the weights: as bits.
pub fn trajectory(processes: Processes, steps: u64) -> (Trajectory, Processes) {
    let (trajectory, _, processes) = train(cpu(), processes, 0..steps, &[], None);
    (trajectory, processes)
}

/// Weights and moments between steps.
#[derive(Clone, Debug, PartialEq)]
pub struct State([Vec<f32>; 3]);

/// [`trajectory`] on any backend, with further keys of the configuration, from a state on if one is given.
pub fn train<B: Backend + 'static>(
    backend: B,
    processes: Box<dyn Communicator<B::Flat>>,
    steps: Range<u64>,
    set: &[&str],
    from: Option<&State>,
) -> (Trajectory, State, Box<dyn Communicator<B::Flat>>) {
    let (architecture, parameters) = weights::load(&fixture("")).unwrap();
    let (vocab_size, length) = (architecture.vocab_size() as u64, 24);
    let config = config(8, length, set);
    let mut engine =
        DataParallel::new(backend, processes, &architecture, &config, &parameters).unwrap();
    if let Some(State([parameters, first, second])) = from {
        engine.write_parameters(parameters).unwrap();
        for (which, moment) in [first, second].into_iter().enumerate() {
            engine.write_moment(which, Some(moment)).unwrap();
        }
    }
    let mut curve = Vec::new();
    let last = steps.end - 1;
    for step in steps {
        let id = |row: usize, at: usize| {
            let number = step * 1000 + (row * 31 + at * at * (row + 1)) as u64;
            (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32 % vocab_size as u32
        };
        let mut rows = |range: Range<usize>| -> Result<Batch> {
            let all = |from: usize| {
                let ids = move |row| (from..from + length).map(move |at| id(row, at));
                range.clone().flat_map(ids).collect()
            };
            Ok(Batch { rows: range.len(), seq_len: length, ids: all(0), targets: all(1) })
        };
        engine.accumulate(&mut rows).unwrap();
        let rates = Rates { learning_rate: 4e-3, weight_decay_factor: 1.0 };
        engine.update(step + 1, rates).unwrap();
        while let Some(outcome) = engine.next_outcome(step == last).unwrap() {
            curve.push([outcome.loss.to_bits(), outcome.norm.to_bits()]);
        }
    }
    let mut state = [0; 3].map(|_| vec![0.0; engine.len()]);
    engine.read_parameters(&mut state[0]).unwrap();
    for which in 0..2 {
        engine.read_moment(which, Some(&mut state[1 + which])).unwrap();
    }
    engine.communicator().barrier().unwrap();
    let weights = state[0].iter().map(|weight| weight.to_bits()).collect();
    ((curve, weights), State(state), engine.into_communicator())
}

/// Launches as of `size` processes on this machine.
pub fn launches(size: usize) -> Vec<Launch> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let launch = |rank| Launch {
        launcher: Launcher::Environment,
        rank,
        world_size: size,
        local_rank: rank,
        local_world_size: Some(size),
        master: Some(("127.0.0.1".to_owned(), port)),
    };
    (0..size).map(launch).collect()
}

/// Runs a function as each of several processes.
pub fn world<T: Send>(size: usize, run: impl Fn(Launch) -> T + Sync) -> Vec<T> {
    let run = &run;
    thread::scope(|scope| {
        let threads: Vec<_> =
            launches(size).into_iter().map(|launch| scope.spawn(move || run(launch))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Compares bits, and says where the first differ.
pub fn assert_same(found: &Trajectory, expected: &Trajectory, what: &str) {
    for (step, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
        let [found, expected] = [found, expected].map(|bits| bits.map(f64::from_bits));
        assert_eq!(found, expected, "loss and norm of step {step}, {what}");
    }
    let differ = found.1.iter().zip(&expected.1).position(|(a, b)| a != b);
    assert_eq!(differ, None, "first weight that differs, {what}");
}
