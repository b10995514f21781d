//! Checks of training over several processes, for any communicator.

use std::ops::Range;
use std::path::PathBuf;

use mmfree_train::architecture::Architecture;
use mmfree_train::backend::CpuBackend;
use mmfree_train::communicator::Communicator;
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

fn config(sequences: usize, length: usize) -> TrainConfig {
    let set = [
        "data.train=none".to_owned(),
        format!("batch.sequences={sequences}"),
        "batch.micro_batch=1".to_owned(),
        format!("batch.sequence_length={length}"),
    ];
    let set: Vec<_> = set.iter().map(|text| text.parse().unwrap()).collect();
    TrainConfig::parse("test", "", &set).unwrap()
}

fn engine(
    processes: Processes,
    architecture: &Architecture,
    parameters: &[f32],
    config: &TrainConfig,
) -> DataParallel<CpuBackend> {
    let backend = CpuBackend::new(Some(1), None).unwrap();
    DataParallel::new(backend, processes, architecture, config, parameters).unwrap()
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
    let config = config(sequences, length - 1);
    let mut engine = engine(processes, &architecture, &parameters, &config);
    let loss = engine.accumulate(&mut rows).unwrap();
    let mut found = vec![0.0; parameters.len()];
    engine.read_gradients(&mut found).unwrap();
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
    let (architecture, parameters) = weights::load(&fixture("")).unwrap();
    let (vocab_size, length) = (architecture.vocab_size() as u64, 24);
    let config = config(8, length);
    let mut engine = engine(processes, &architecture, &parameters, &config);
    let mut curve = Vec::new();
    for step in 0..steps {
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
        let loss = engine.accumulate(&mut rows).unwrap();
        let norm = engine.gradient_norm().unwrap();
        let rates = Rates { learning_rate: 4e-3, weight_decay_factor: 1.0 };
        engine.update(step + 1, rates, norm).unwrap();
        curve.push([loss.to_bits(), norm.to_bits()]);
    }
    let mut weights = vec![0.0; engine.len()];
    engine.read_parameters(&mut weights).unwrap();
    engine.communicator().barrier().unwrap();
    let weights = weights.iter().map(|weight| weight.to_bits()).collect();
    ((curve, weights), engine.into_communicator())
}
