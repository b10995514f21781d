//! Times whole training steps (gradients, clipping, AdamW) of a model with random weights on random tokens, for
//! `benchmarks/training.py`. Prints the seconds of each step, one a line.
//!
//!     training-speed CONFIG_JSON SEQUENCES LENGTH STEPS THREADS

use std::error::Error;
use std::time::Instant;

use mmfree::config::ModelConfig;
use mmfree_train::architecture::Architecture;
use mmfree_train::backend::{AdamW, Backend, BatchShape, CpuBackend};
use mmfree_train::communicator::{Local, shards};
use mmfree_train::model::{Batch, Model, ModelOptions};
use mmfree_train::outcome::{NORM_UNIT, Outcomes};

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
    let mut outcomes: Outcomes<CpuBackend> =
        Outcomes::new(&mut backend, 0, &shards(len, NORM_UNIT, 1), 1)?;
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
        outcomes.move_loss(&mut backend, 0)?;
        outcomes.clip(&mut backend, &mut Local, &gradients, 0..len, 1.0)?;
        let constants = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            step,
        };
        let clip = outcomes.numbers();
        backend.adamw(&constants, clip, 0..len, &mut parameters, &gradients, 0, &mut m, &mut v)?;
        println!("{}", start.elapsed().as_secs_f64());
        outcomes.begin_copy(&mut backend)?;
        if let Some(outcome) = outcomes.next(&mut backend, &mut Local, true)? {
            eprintln!("step {step}: loss {:.4}", outcome.loss);
        }
    }
    Ok(())
}
