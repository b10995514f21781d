//! Learning rate and weight decay over the steps.

use std::f64::consts::PI;

use crate::config::{ScheduleConfig, ScheduleKind, TrainConfig};

/// What the optimiser uses at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub learning_rate: f64,
    /// What the weight decays of the groups are multiplied by.
    pub weight_decay_factor: f64,
}

/// The learning rate as a function of the step:
///
/// ```text
/// warm-up    peak · (s + 1) / W                                                for s < W
/// cosine     peak · (r + (1 − r) · (1 + cos(π · (s − W) / (S − W))) / 2)       for s ≥ W
/// two-stage  the same, multiplied by `second_stage_learning_rate` from `second_stage_at` · S on
/// ```
///
/// with the step s from 0, S steps in all, W steps of warm-up and r the final fraction.
#[derive(Clone, Debug)]
pub struct Schedule {
    config: ScheduleConfig,
    peak: f64,
    steps: u64,
}

impl Schedule {
    /// The schedule of a configuration.
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            config: config.schedule.clone(),
            peak: config.optimizer.learning_rate,
            steps: config.run.steps,
        }
    }

    /// The rates of a step, counted from 0.
    pub fn at(&self, step: u64) -> Rates {
        let config = &self.config;
        let warmup = config.warmup_steps;
        let shape = if step < warmup {
            (step + 1) as f64 / warmup as f64
        } else if config.kind == ScheduleKind::Constant {
            1.0
        } else {
            let progress = (step - warmup) as f64 / (self.steps - warmup).max(1) as f64;
            let cosine = (1.0 + (PI * progress.min(1.0)).cos()) / 2.0;
            config.final_fraction + (1.0 - config.final_fraction) * cosine
        };
        let second = config.kind == ScheduleKind::TwoStage
            && step as f64 >= config.second_stage_at * self.steps as f64;
        let (rate, decay) = if second {
            (config.second_stage_learning_rate, config.second_stage_weight_decay)
        } else {
            (1.0, 1.0)
        };
        Rates { learning_rate: self.peak * shape * rate, weight_decay_factor: decay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(set: &[&str]) -> Schedule {
        let mut overrides = vec!["data.train=x", "run.steps=100", "optimizer.learning_rate=0.5"];
        overrides.extend(set);
        let overrides: Vec<_> = overrides.iter().map(|text| text.parse().unwrap()).collect();
        Schedule::new(&TrainConfig::parse("x", "", &overrides).unwrap())
    }

    #[test]
    fn the_cosine_rises_to_its_peak_and_falls_to_its_end() {
        let schedule = schedule(&["schedule.warmup_steps=10", "schedule.final_fraction=0.1"]);
        let rate = |step| schedule.at(step).learning_rate;
        assert_eq!(rate(0), 0.05);
        assert_eq!(rate(9), 0.5);
        assert_eq!(rate(10), 0.5);
        assert!((rate(55) - 0.5 * 0.55).abs() < 1e-12);
        assert!((rate(100) - 0.05).abs() < 1e-12);
        assert!((10..100).all(|step| rate(step + 1) < rate(step)));
    }

    #[test]
    fn the_second_stage_halves_the_cosine() {
        let cosine = schedule(&[]);
        let two = schedule(&[
            "schedule.kind=two-stage",
            "schedule.second_stage_at=0.3",
            "schedule.second_stage_weight_decay=0.0",
        ]);
        assert_eq!(two.at(29), cosine.at(29));
        assert_eq!(two.at(30).learning_rate, cosine.at(30).learning_rate / 2.0);
        assert_eq!(two.at(30).weight_decay_factor, 0.0);
    }

    #[test]
    fn a_constant_rate_stays_and_a_warm_up_may_take_the_whole_run() {
        let constant = schedule(&["schedule.kind=constant", "schedule.warmup_steps=2"]);
        assert_eq!(constant.at(0).learning_rate, 0.25);
        assert_eq!(constant.at(99).learning_rate, 0.5);
        let warm_up = schedule(&["schedule.warmup_steps=100"]);
        assert!(warm_up.at(100).learning_rate.is_finite());
    }
}
