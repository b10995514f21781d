//! Stops a run that learns nothing any more.

use crate::checkpoint::GuardState;
use crate::error::{Error, Result};

/// Weight of a new loss in the smoothed one: about the last 20 steps count.
const WEIGHT: f64 = 0.05;

/// Watches the loss.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    pub state: GuardState,
    margin: f64,
}

impl Guard {
    /// `margin` nats above the best smoothed loss are too much; 0 lets everything finite pass.
    pub fn new(state: GuardState, margin: f64) -> Self {
        Self { state, margin }
    }

    /// Looks at the loss and the gradient norm of a step. If one is not finite, the step has changed nothing: see
    /// [`Outcomes`](crate::outcome::Outcomes).
    pub fn check(&mut self, step: u64, loss: f64, norm: f64) -> Result<()> {
        let advice = "lower optimizer.learning_rate or lengthen schedule.warmup_steps, and go on from the \
                      last checkpoint with --resume --allow-changes";
        for (what, value) in [("loss", loss), ("gradient norm", norm)] {
            if !value.is_finite() {
                return Err(Error::Diverged(format!(
                    "stopped at step {step}: the {what} is {value}; {advice}"
                )));
            }
        }
        let smoothed = match self.state.smoothed {
            None => loss,
            Some(before) => before + WEIGHT * (loss - before),
        };
        let best = self.state.best.map_or(smoothed, |best| best.min(smoothed));
        self.state = GuardState { smoothed: Some(smoothed), best: Some(best) };
        if self.margin > 0.0 && smoothed > best + self.margin {
            return Err(Error::Diverged(format!(
                "stopped at step {step}: the smoothed loss is {smoothed:.3}, more than guard.divergence = \
                 {} above its best of {best:.3}; {advice}",
                self.margin
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lasting_rise_or_no_number_stops() {
        let mut guard = Guard::new(GuardState::default(), 1.0);
        for step in 0..100 {
            let spike = if step % 30 == 29 { 5.0 } else { 0.0 };
            guard.check(step, 8.0 - step as f64 * 0.05 + spike, 1.0).unwrap();
        }
        let rise = (100..200).find(|&step| guard.check(step, 6.0, 1.0).is_err());
        assert!(rise.is_some_and(|step| step > 102), "{rise:?}");
        let mut guard = Guard::new(GuardState::default(), 0.0);
        guard.check(0, 1.0, 1.0).unwrap();
        guard.check(1, 1e9, 1.0).unwrap();
        let error = guard.check(2, f64::NAN, 1.0).unwrap_err().to_string();
        assert!(error.contains("step 2: the loss is NaN"), "{error}");
        assert!(guard.check(2, 1.0, f64::INFINITY).is_err());
    }
}
