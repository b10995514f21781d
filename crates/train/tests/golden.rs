//! Gradients and training of `tests/fixtures/tiny` against what the authors' implementation computed.

use std::collections::HashMap;
use std::path::PathBuf;

use mmfree_train::architecture::Architecture;
use mmfree_train::backend::{AdamW, Backend, BatchShape, CpuBackend};
use mmfree_train::communicator::{Local, shards};
use mmfree_train::model::{Batch, Model, ModelOptions};
use mmfree_train::outcome::{NORM_UNIT, Outcomes};
use mmfree_train::weights;
use safetensors::SafeTensors;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny").join(name)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// The gradients that the authors' implementation computed, by name.
fn expected_gradients() -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(fixture("gradients.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), floats(view.data()))).collect()
}

struct Example {
    architecture: Architecture,
    parameters: Vec<f32>,
    /// [2, 19]
    ids: Vec<u32>,
    loss: f64,
}

const LENGTH: usize = 19;

fn example() -> Example {
    let (architecture, parameters) = weights::load(&fixture("")).unwrap();
    let bytes = std::fs::read(fixture("activations.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor("input_ids").unwrap();
    assert_eq!(ids.shape(), [2, LENGTH]);
    let ids = match ids.dtype() {
        safetensors::Dtype::I64 => {
            ids.data().as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as u32).collect()
        }
        _ => ids.data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b) as u32).collect(),
    };
    let loss = f64::from(floats(tensors.tensor("loss").unwrap().data())[0]);
    Example { architecture, parameters, ids, loss }
}

/// Ids and targets of some sequences of the example: each token predicts the next.
fn next_tokens(ids: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let rows = || ids.chunks(LENGTH);
    (
        rows().flat_map(|row| &row[..LENGTH - 1]).copied().collect(),
        rows().flat_map(|row| &row[1..]).copied().collect(),
    )
}

/// Loss and gradients with the batch in `parts` equal parts.
fn gradients(
    example: &Example,
    backend: &mut CpuBackend,
    options: &ModelOptions,
    parts: usize,
) -> (f64, Vec<f32>) {
    let (ids, targets) = next_tokens(&example.ids);
    let shape = BatchShape { sequences: 2 / parts, length: LENGTH - 1 };
    let mut model = Model::new(backend, &example.architecture, shape, options).unwrap();
    model.update_weights(backend, &example.parameters).unwrap();
    let mut gradients = vec![0.0; example.parameters.len()];
    for (ids, targets) in ids.chunks(shape.tokens()).zip(targets.chunks(shape.tokens())) {
        let batch = Batch { ids, targets };
        let scale = 1.0 / parts as f32;
        model.accumulate(backend, &example.parameters, batch, scale, &mut gradients).unwrap();
    }
    (model.take_loss(backend).unwrap(), gradients)
}

fn backend(threads: usize, tier: Option<&str>) -> CpuBackend {
    CpuBackend::new(Some(threads), tier).unwrap()
}

/// ‖found − expected‖ / ‖expected‖
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 =
        found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
    (difference / norm).sqrt()
}

#[test]
fn gradients_of_every_parameter_agree_with_the_authors_implementation() {
    let example = example();
    let expected = expected_gradients();
    let layout = example.architecture.layout();
    assert_eq!(expected.len(), layout.parameters().len());
    for recompute in [false, true] {
        for (parts, head_chunk) in [(1, 512), (1, 7), (2, 5)] {
            let options = ModelOptions { recompute, head_chunk, recompute_gates: 0 };
            let (loss, found) = gradients(&example, &mut backend(2, None), &options, parts);
            assert!((loss - example.loss).abs() < 2e-6, "{loss} instead of {}", example.loss);
            let mut worst = (0.0, "");
            for parameter in layout.parameters() {
                let found = &found[parameter.range.clone()];
                let error = relative_error(found, &expected[&parameter.name]);
                assert!(error < 1e-5, "{}: relative error {error:.2e}", parameter.name);
                if error > worst.0 {
                    worst = (error, &parameter.name);
                }
            }
            println!("recompute {recompute}, {parts} parts: worst {:.1e}, {}", worst.0, worst.1);
        }
    }
}

#[test]
fn recomputation_and_threads_change_no_bit() {
    let example = example();
    let keep = ModelOptions { head_chunk: 16, ..ModelOptions::default() };
    let recompute = ModelOptions { recompute: true, ..keep.clone() };
    let gates = ModelOptions { recompute_gates: 2, ..keep.clone() };
    let first = gradients(&example, &mut backend(1, None), &keep, 1);
    assert_eq!(first, gradients(&example, &mut backend(1, None), &recompute, 1));
    assert_eq!(first, gradients(&example, &mut backend(1, None), &gates, 1));
    assert_eq!(first, gradients(&example, &mut backend(2, None), &keep, 1));
    assert_eq!(first, gradients(&example, &mut backend(5, None), &recompute, 1));
}

#[test]
fn thirty_steps_of_adamw_follow_the_recorded_losses() {
    let json = std::fs::read(fixture("expected.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let expected: Vec<f64> = serde_json::from_value(json["train"]["losses"].clone()).unwrap();
    let Example { architecture, mut parameters, ids, .. } = example();
    let (ids, targets) = next_tokens(&ids);
    let mut backend = backend(2, None);
    let shape = BatchShape { sequences: 2, length: LENGTH - 1 };
    let options = ModelOptions::default();
    let mut model = Model::new(&mut backend, &architecture, shape, &options).unwrap();
    let len = parameters.len();
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    let mut outcomes: Outcomes<CpuBackend> =
        Outcomes::new(&mut backend, 0, &shards(len, NORM_UNIT, 1), 1).unwrap();
    let mut worst = (0.0f64, 0.0f64);
    for (step, expected) in expected.iter().enumerate() {
        let mut gradients = vec![0.0; len];
        model.update_weights(&mut backend, &parameters).unwrap();
        let batch = Batch { ids: &ids, targets: &targets };
        model.accumulate(&mut backend, &parameters, batch, 1.0, &mut gradients).unwrap();
        outcomes.move_loss(&mut backend, 0).unwrap();
        outcomes.clip(&mut backend, &mut Local, &gradients, 0..len, 1.0).unwrap();
        let constants = AdamW {
            learning_rate: 4e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            step: step as u64 + 1,
        };
        let clip = outcomes.numbers();
        backend
            .adamw(&constants, clip, 0..len, &mut parameters, &gradients, 0, &mut m, &mut v)
            .unwrap();
        outcomes.begin_copy(&mut backend).unwrap();
        let loss = outcomes.next(&mut backend, &mut Local, true).unwrap().unwrap().loss;
        let error = (loss / expected - 1.0).abs();
        println!("step {step}: {loss:.6} for {expected:.6}, {:.2} %", 100.0 * error);
        worst = (if step < 10 { worst.0.max(error) } else { worst.0 }, worst.1.max(error));
    }
    assert!(worst.0 < 0.01 && worst.1 < 0.03, "worst deviations {worst:?}");
}
