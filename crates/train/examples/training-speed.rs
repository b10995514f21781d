//! Times whole training steps (gradients, clipping, AdamW) of a model with random weights on random tokens, for
//! `benchmarks/training.py`. Prints the seconds of each step, one a line.
//!
//!     training-speed CONFIG_JSON SEQUENCES LENGTH STEPS THREADS

use std::error::Error;
use std::time::Instant;

use mmfree::config::ModelConfig;
use mmfree_train::architecture::Architecture;
use mmfree_train::backend::{AdamW, Backend, BatchShape, CpuBackend};
use mmfree_train::model::{Batch, Model, ModelOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, sequences, length, steps, threads] = &arguments[..] else {
        return Err("expected CONFIG_JSON SEQUENCES LENGTH STEPS THREADS".into());
    };
    let architecture =
        Architecture::MatMulFree(ModelConfig::from_json(config, &std::fs::read(config)?)?);
    let shape = BatchShape { sequences: sequences.parse()?, length: length.parse()? };
    let mut backend = CpuBackend::new(Some(threads.parse()?), None)?;
    let mut model = Model::new(&mut backend, &architecture, shape, &ModelOptions::default())?;
    let len = model.layout().len();
    let mut parameters = model.layout().initialize(0, 0.02);
    let (mut gradients, mut m, mut v) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
    let mut state = 1u64;
    let mut tokens = || -> Vec<u32> {
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 33) % architecture.vocab_size() as u64) as u32
        };
        (0..shape.tokens()).map(next).collect()
    };
    for step in 1..=steps.parse()? {
        let (ids, targets) = (tokens(), tokens());
        let start = Instant::now();
        backend.clear_flat(&mut gradients, 0..len)?;
        model.update_weights(&mut backend, &parameters)?;
        let batch = Batch { ids: &ids, targets: &targets };
        model.accumulate(&mut backend, &parameters, batch, 1.0, &mut gradients)?;
        let loss = model.take_loss(&mut backend)?;
        let norm = backend.sum_of_squares(&gradients, 0..len)?.sqrt();
        let constants = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            step,
            gradient_scale: (1.0 / (norm + 1e-6)).min(1.0) as f32,
        };
        backend.adamw(&constants, 0..len, &mut parameters, &gradients, 0, &mut m, &mut v)?;
        println!("{}", start.elapsed().as_secs_f64());
        eprintln!("step {step}: loss {loss:.4}");
    }
    Ok(())
}
