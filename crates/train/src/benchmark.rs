//! How fast a model trains: whole optimiser steps on random tokens.

use std::time::Instant;

use mmfree::benchmark::{Spread, peak_rss_bytes};
use mmfree::config::{ModelConfig, TransformerConfig};
use serde::Serialize;

use crate::architecture::Architecture;
use crate::backend::Backend;
use crate::communicator::Communicator;
use crate::config::TrainConfig;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::parameters::ParameterKind;
use crate::schedule::Rates;
use crate::trainer::DataParallel;

/// What bf16 products of one H100 or H200 reach in practice, in operations a second.
pub const PEAK_FLOPS: f64 = 790e12;
/// Sizes beside the published ones: (name, V, D, F, L).
const SMALL_SIZES: [(&str, usize, usize, usize, usize); 2] =
    [("tiny", 256, 64, 192, 2), ("20m", 8192, 384, 1024, 8)];
/// Channels of a head of Transformer++, at least, and heads, at least.
const HEAD_SIZE: usize = 64;
const HEADS: usize = 16;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the size.
    pub size: String,
    /// Transformer++ in place of the MatMul-free model.
    pub transformer: bool,
    /// Sequences of a step, over all processes.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Sequences that are computed at once; the gradients of the others are accumulated.
    pub micro_batch: usize,
    /// Compute activations again in the backward pass.
    pub recompute: bool,
    /// In so many blocks, compute the input of the gated linear unit again.
    pub recompute_gates: usize,
    /// Steps that count.
    pub repetitions: usize,
    /// Steps before them that do not.
    pub warmup: usize,
}

/// Time of one kind of operation in a step.
#[derive(Clone, Debug, Serialize)]
pub struct Share {
    /// What it is.
    pub kind: String,
    /// Seconds in a step.
    pub seconds: f64,
    /// Share of the step.
    pub share: f64,
}

/// What was measured. Serialised as the one object of `mmfree bench train --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the size.
    pub size: String,
    /// `matmul-free` or `transformer`.
    pub architecture: &'static str,
    /// What computed.
    pub backend: String,
    /// How many processes.
    pub processes: usize,
    /// Parameters.
    pub parameters: usize,
    /// Sequences of a step, over all processes.
    pub batch: usize,
    /// Sequences computed at once.
    pub micro_batch: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Whether activations were computed again.
    pub recompute: bool,
    /// In how many blocks the input of the gated linear unit was.
    pub recompute_gates: usize,
    /// Steps that counted.
    pub repetitions: usize,
    /// Tokens a second of all processes, over whole steps.
    pub tokens_per_second: Spread,
    /// Seconds of a step.
    pub step_seconds: Spread,
    /// Floating-point operations of the matrix products of a token: six for each weight, and the attention's.
    /// What recomputation repeats does not count.
    pub flops_per_token: f64,
    /// Share of [`PEAK_FLOPS`] of each; GPUs only.
    pub share_of_peak: Option<f64>,
    /// The most device memory that buffers had at one time.
    pub peak_device_bytes: Option<usize>,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: Option<u64>,
    /// Loss of the first and of the last step, in nats.
    pub losses: [f64; 2],
    /// Where the time of one more step went; GPUs only.
    pub breakdown: Vec<Share>,
    /// What the host did in one more step; GPUs only.
    pub host: Option<Host>,
}

/// The host's part of a step: what does not show as long as it is less than the device's, which goes on meanwhile.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Kernels and products submitted, exchanges aside.
    pub launches: usize,
    /// Seconds for them, and for making the batch, without waiting for the device.
    pub seconds: f64,
}

/// The names of all sizes.
pub fn size_names() -> impl Iterator<Item = &'static str> {
    SMALL_SIZES.iter().map(|size| size.0).chain(ModelConfig::preset_names())
}

/// The model of a size.
///
/// # Errors
/// An unknown size.
pub fn architecture(size: &str, transformer: bool) -> Result<Architecture> {
    let small = SMALL_SIZES.iter().find(|(name, ..)| *name == size);
    let preset = ModelConfig::preset(small.map_or(size, |_| "370m")).ok_or_else(|| {
        let names: Vec<_> = size_names().collect();
        Error::Invalid(format!("no size {size}: expected one of {}", names.join(", ")))
    })?;
    let config = match small {
        None => preset,
        Some(&(_, vocab_size, hidden_size, intermediate_size, num_hidden_layers)) => {
            ModelConfig { vocab_size, hidden_size, intermediate_size, num_hidden_layers, ..preset }
        }
    };
    if !transformer {
        return Ok(Architecture::MatMulFree(config));
    }
    Ok(Architecture::Transformer(TransformerConfig {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        // As the configurations of the baselines have it.
        num_attention_heads: HEADS
            .min(config.hidden_size / HEAD_SIZE)
            .max(config.hidden_size / 128),
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: 10_000.0,
        max_position_embeddings: 2048,
        bos_token_id: config.bos_token_id,
        eos_token_ids: config.eos_token_ids,
    }))
}

/// Trains a model of random weights on random tokens and takes the time of whole steps: batch to the device,
/// forward, backward, exchange with the other processes, norm of the gradients, clipping, AdamW, new weights prepared.
/// Every process calls this.
///
/// # Errors
/// Sizes that do not fit; errors of the device or the other processes.
pub fn run<B: Backend + 'static>(
    options: &Options,
    backend: B,
    communicator: Box<dyn Communicator<B::Flat>>,
    progress: &mut dyn FnMut(usize),
) -> Result<Report> {
    let architecture = architecture(&options.size, options.transformer)?;
    let mut config = TrainConfig::default();
    config.batch.sequences = options.batch;
    config.batch.micro_batch = options.micro_batch;
    config.batch.sequence_length = options.sequence_length;
    config.batch.reduction_groups = 1;
    config.batch.recompute_activations = options.recompute;
    config.batch.recompute_gates = options.recompute_gates;
    let batch = (options.batch, options.micro_batch, options.sequence_length);
    let whole = batch.0 > 0 && batch.1 > 0 && batch.0.is_multiple_of(batch.1);
    if !whole || batch.2 == 0 || options.repetitions == 0 {
        return Err(Error::Invalid(format!(
            "a batch of {} in parts of {} with {} tokens, {} repetitions: all must be at least 1, and parts \
             divide the batch",
            batch.0, batch.1, batch.2, options.repetitions
        )));
    }
    let (rank, processes) = (communicator.rank(), communicator.world_size());
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ rank as u64);
    let layout = architecture.layout();
    let mut parameters = vec![0.0f32; layout.len()];
    for parameter in layout.parameters() {
        let values = &mut parameters[parameter.range.clone()];
        match parameter.kind {
            ParameterKind::Norm => values.fill(1.0),
            ParameterKind::LowerBounds => {}
            // Uniform with the deviation of the usual initial weights: quicker to draw.
            ParameterKind::Matrix | ParameterKind::Embedding => {
                values.iter_mut().for_each(|value| *value = random.uniform() * 0.02 * 3f32.sqrt());
            }
        }
    }
    let mut engine = DataParallel::new(backend, communicator, &architecture, &config, &parameters)?;
    drop(parameters);
    let vocabulary = architecture.vocab_size() as u64;
    let mut step = |engine: &mut DataParallel<B>, number: usize| -> Result<()> {
        engine.accumulate(&mut |rows| {
            let count = rows.len() * options.sequence_length;
            let ids: Vec<u32> = (0..=count).map(|_| (random.next() % vocabulary) as u32).collect();
            Ok(Batch {
                rows: rows.len(),
                seq_len: options.sequence_length,
                targets: ids[1..].to_vec(),
                ids: ids[..count].to_vec(),
            })
        })?;
        let rates = Rates { learning_rate: 1e-4, weight_decay_factor: 1.0 };
        engine.update(number as u64, rates)
    };
    // One step after the other, as in training: the host submits a step while a device computes the one before it, and looks
    // then whether that is done. So there is one more step behind those that count: else the last would seem shorter, as the
    // end of the one before it was seen late.
    let steps = options.warmup + options.repetitions;
    let submitted = steps + usize::from(engine.backend().is_asynchronous());
    let (mut losses, mut seconds) = (Vec::new(), Vec::new());
    let mut clock = Instant::now();
    for number in 1..=submitted {
        step(&mut engine, number)?;
        while let Some(outcome) = engine.next_outcome(false)? {
            losses.push(outcome.loss);
            let now = Instant::now();
            if losses.len() > options.warmup {
                seconds.push((now - clock).as_secs_f64());
            }
            clock = now;
            progress(losses.len());
        }
    }
    engine.next_outcome(true)?;
    engine.backend().begin_timeline()?;
    step(&mut engine, submitted + 1)?;
    let breakdown = engine.backend().end_timeline()?;
    engine.next_outcome(true)?;
    engine.backend().begin_submission()?;
    step(&mut engine, submitted + 2)?;
    let submission = engine.backend().end_submission();
    engine.next_outcome(true)?;
    let whole: f64 = breakdown.iter().map(|(_, seconds)| seconds).sum();
    let tokens = (options.batch * options.sequence_length) as f64;
    let flops_per_token = flops_per_token(&architecture, options.sequence_length);
    let tokens_per_second = Spread::of(seconds.iter().map(|seconds| tokens / seconds).collect());
    let peak_device_bytes = engine.backend().peak_device_bytes();
    engine.communicator().barrier()?;
    engine.communicator().finish();
    Ok(Report {
        size: options.size.clone(),
        architecture: if options.transformer { "transformer" } else { "matmul-free" },
        backend: engine.describe(),
        processes,
        parameters: layout.len(),
        batch: options.batch,
        micro_batch: options.micro_batch,
        sequence_length: options.sequence_length,
        recompute: options.recompute,
        recompute_gates: options.recompute_gates,
        repetitions: options.repetitions,
        tokens_per_second,
        step_seconds: Spread::of(seconds),
        flops_per_token,
        share_of_peak: peak_device_bytes
            .map(|_| tokens_per_second.median * flops_per_token / (PEAK_FLOPS * processes as f64)),
        peak_device_bytes,
        peak_rss_bytes: peak_rss_bytes(),
        losses: [losses[0], losses[steps - 1]],
        breakdown: breakdown
            .into_iter()
            .map(|(kind, seconds)| Share { kind: kind.to_owned(), seconds, share: seconds / whole })
            .collect(),
        host: submission.map(|(launches, seconds)| Host { launches, seconds }),
    })
}

/// Operations of the products of one token, forward and backward.
fn flops_per_token(architecture: &Architecture, length: usize) -> f64 {
    let weights = architecture.layout().matrix_weights();
    let attention = match architecture {
        Architecture::MatMulFree(_) => 0,
        // Two products over half the positions on average, and twice that backward.
        Architecture::Transformer(config) => {
            6 * length * config.hidden_size * config.num_hidden_layers
        }
    };
    (6 * weights + attention) as f64
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CpuBackend;
    use crate::communicator::Local;

    #[test]
    fn steps_of_both_architectures_are_measured() {
        for transformer in [false, true] {
            let options = Options {
                size: "tiny".to_owned(),
                transformer,
                batch: 2,
                sequence_length: 16,
                micro_batch: 1,
                recompute: transformer,
                recompute_gates: 1,
                repetitions: 2,
                warmup: 1,
            };
            let mut steps = 0;
            let backend = CpuBackend::new(Some(1), None).unwrap();
            let report = run(&options, backend, Box::new(Local), &mut |step| steps = step).unwrap();
            assert_eq!(steps, 3);
            assert!(report.tokens_per_second.median > 0.0 && report.flops_per_token > 0.0);
            // Random tokens cannot be predicted.
            assert!((report.losses[0] - 256f64.ln()).abs() < 0.5, "{:?}", report.losses);
            assert!(report.share_of_peak.is_none() && report.breakdown.is_empty());
            assert!(report.host.is_none());
        }
        assert!(architecture("nothing", false).is_err());
    }
}
