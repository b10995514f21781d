//! The accelerator beside the float engine: what its arithmetic costs in quality.

use mmfree::engine::Engine;
use mmfree::state::State;
use serde::Serialize;

use crate::error::Result;
use crate::generate;
use crate::machine::Machine;

/// Both on the same text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Mean cross-entropy of the float engine, nats.
    pub engine_loss: f64,
    /// Mean cross-entropy of the accelerator, nats.
    pub accelerator_loss: f64,
    /// The second over the first.
    pub loss_ratio: f64,
    /// Share of positions at which both find the same token most likely.
    pub same_best_token: f64,
    /// Root mean square of the logits' difference over the engine's logits' standard deviation.
    pub rms_share: f64,
}

/// Feeds the tokens to both. `progress` hears how many were read.
///
/// # Errors
/// Errors of the engine and of the machine.
pub fn compare(
    engine: &mut Engine,
    state: &mut State,
    machine: &mut Machine,
    tokens: &[u32],
    progress: &mut dyn FnMut(usize),
) -> Result<Comparison> {
    let mut totals = [0.0f64; 2];
    let (mut same, mut difference, mut variance, mut predicted) = (0usize, 0.0, 0.0, 0usize);
    for (at, pair) in tokens.windows(2).enumerate() {
        let &[token, next] = pair else { continue };
        let best = machine.run(token)?;
        let ours = generate::logits(machine);
        let theirs = engine.decode(state, token)?;
        totals[0] += cross_entropy(theirs, next as usize);
        totals[1] += cross_entropy(&ours, next as usize);
        let likeliest =
            theirs.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
        same += usize::from(likeliest.is_some_and(|(id, _)| id == best as usize));
        let count = theirs.len() as f64;
        let mean = theirs.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        variance += theirs.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        let squares =
            theirs.iter().zip(&ours).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
        difference += squares.sum::<f64>() / count;
        predicted += 1;
        progress(at + 1);
    }
    let [engine_loss, accelerator_loss] = totals.map(|total| total / predicted.max(1) as f64);
    Ok(Comparison {
        tokens: predicted,
        engine_loss,
        accelerator_loss,
        loss_ratio: accelerator_loss / engine_loss,
        same_best_token: same as f64 / predicted.max(1) as f64,
        rms_share: (difference / variance).sqrt(),
    })
}

/// `log(sum exp(logits)) - logits[target]`, in f64.
fn cross_entropy(logits: &[f32], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    sum.ln() + f64::from(largest) - f64::from(logits[target])
}
