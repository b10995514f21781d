//! Power laws: fitting, confidence, crossing.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;

/// `loss = floor + coefficient · flops^(−exponent)`
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PowerLaw {
    /// What no amount of compute falls below, in nats.
    pub floor: f64,
    /// The rest at one FLOP, in nats.
    pub coefficient: f64,
    /// How fast the rest falls.
    pub exponent: f64,
}

/// Which law is fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// With a floor, by least squares of the loss.
    Floor,
    /// Without a floor: a straight line on logarithmic axes, by least squares of the logarithm.
    Pure,
}

/// Exponents that are tried.
const EXPONENTS: (f64, f64) = (1e-3, 2.0);
const GRID: usize = 400;

impl PowerLaw {
    /// The loss at a compute.
    pub fn loss(&self, flops: f64) -> f64 {
        self.floor + (self.coefficient.ln() - self.exponent * flops.ln()).exp()
    }

    /// Fits points of compute and loss, both positive. `None` if there are fewer different computes than the
    /// form has parameters, or the loss does not fall.
    pub fn fit(points: &[(f64, f64)], form: Form) -> Option<Self> {
        let needed = match form {
            Form::Floor => 3,
            Form::Pure => 2,
        };
        if distinct(points) < needed {
            return None;
        }
        let n = points.len() as f64;
        let middle = points.iter().map(|point| point.0.ln()).sum::<f64>() / n;
        // x = ln(flops) around its mean, so that no power overflows.
        let centred: Vec<(f64, f64)> = points.iter().map(|&(c, l)| (c.ln() - middle, l)).collect();
        let law = match form {
            Form::Pure => {
                let mean = centred.iter().map(|point| point.1.ln()).sum::<f64>() / n;
                let products: f64 = centred.iter().map(|(x, l)| x * (l.ln() - mean)).sum();
                let squares: f64 = centred.iter().map(|(x, _)| x * x).sum();
                let exponent = -products / squares;
                let coefficient = (mean + exponent * middle).exp();
                Self { floor: 0.0, coefficient, exponent }
            }
            Form::Floor => {
                let ratio = (EXPONENTS.1 / EXPONENTS.0).ln() / (GRID - 1) as f64;
                let exponent = |step: f64| EXPONENTS.0 * (ratio * step).exp();
                let error = |step: f64| linear(&centred, exponent(step)).2;
                let steps = (0..GRID).map(|step| step as f64);
                let best = steps.min_by(|a, b| error(*a).total_cmp(&error(*b)))?;
                let step = golden_section(&error, best - 1.0, best + 1.0);
                let exponent = exponent(step);
                let (floor, rest, _) = linear(&centred, exponent);
                Self { floor, coefficient: (rest.ln() + exponent * middle).exp(), exponent }
            }
        };
        let is_law = law.exponent > 0.0 && law.coefficient > 0.0 && law.coefficient.is_finite();
        is_law.then_some(law)
    }
}

fn distinct(points: &[(f64, f64)]) -> usize {
    let mut computes: Vec<f64> = points.iter().map(|point| point.0).collect();
    computes.sort_by(f64::total_cmp);
    computes.dedup();
    computes.len()
}

/// The best floor and rest, both at least 0, for an exponent, and the sum of squared errors.
fn linear(centred: &[(f64, f64)], exponent: f64) -> (f64, f64, f64) {
    let powers: Vec<f64> = centred.iter().map(|(x, _)| (-exponent * x).exp()).collect();
    let n = centred.len() as f64;
    let mean_power = powers.iter().sum::<f64>() / n;
    let mean_loss = centred.iter().map(|point| point.1).sum::<f64>() / n;
    let pairs = || powers.iter().zip(centred.iter().map(|point| point.1));
    let products: f64 = pairs().map(|(p, l)| (p - mean_power) * (l - mean_loss)).sum();
    let squares: f64 = powers.iter().map(|p| (p - mean_power) * (p - mean_power)).sum();
    let mut rest = (products / squares).max(0.0);
    let mut floor = mean_loss - rest * mean_power;
    if floor < 0.0 {
        floor = 0.0;
        rest = pairs().map(|(p, l)| p * l).sum::<f64>() / powers.iter().map(|p| p * p).sum::<f64>();
    }
    let error = pairs().map(|(p, l)| (floor + rest * p - l) * (floor + rest * p - l)).sum();
    (floor, rest, error)
}

/// The place of a minimum between two bounds.
fn golden_section(error: &dyn Fn(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    const SHARE: f64 = 0.618_033_988_749_894_8;
    for _ in 0..80 {
        let (a, b) = (high - SHARE * (high - low), low + SHARE * (high - low));
        if error(a) < error(b) { high = b } else { low = a }
    }
    (low + high) / 2.0
}

/// Logarithm (base 10) of the largest compute at which a crossing is looked for.
const FARTHEST: f64 = 40.0;

/// The first compute from `from` on at which `first` has become better than `second`, if it was worse before.
pub fn crossing(first: &PowerLaw, second: &PowerLaw, from: f64) -> Option<f64> {
    const STEPS: usize = 2000;
    let start = from.log10();
    let is_better = |log: f64| {
        let flops = 10f64.powf(log);
        first.loss(flops) < second.loss(flops)
    };
    if is_better(start) {
        return None;
    }
    let at = |step: usize| start + (FARTHEST - start) * step as f64 / STEPS as f64;
    let step = (1..=STEPS).find(|&step| is_better(at(step)))?;
    let (mut low, mut high) = (at(step - 1), at(step));
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if is_better(middle) { high = middle } else { low = middle }
    }
    Some(10f64.powf(high))
}

/// Draws as many points with replacement as there are.
pub fn resample(points: &[(f64, f64)], random: &mut ChaCha8Rng) -> Vec<(f64, f64)> {
    let index = |word: u32| ((u64::from(word) * points.len() as u64) >> 32) as usize;
    points.iter().map(|_| points[index(random.next_u32())]).collect()
}

/// The generator of the bootstrap: always the same draws.
pub fn generator() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(0)
}

/// An interval that holds 90 % of what the bootstrap found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// 5th percentile.
    pub low: f64,
    /// 95th percentile.
    pub high: f64,
}

impl Interval {
    /// Of some values; `None` of none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let at = |share: f64| values[(last as f64 * share).round() as usize];
        Some(Self { low: at(0.05), high: at(0.95) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(law: &PowerLaw, noise: f64) -> Vec<(f64, f64)> {
        (0..8)
            .map(|i| {
                let flops = 10f64.powf(14.0 + 0.6 * f64::from(i));
                (flops, law.loss(flops) + noise * (f64::from(i * 7919 % 5) - 2.0))
            })
            .collect()
    }

    #[test]
    fn known_laws_are_found_again() {
        let law = PowerLaw { floor: 1.7, coefficient: 400.0, exponent: 0.155 };
        let found = PowerLaw::fit(&points(&law, 0.0), Form::Floor).unwrap();
        assert!((found.floor - law.floor).abs() < 1e-4, "{found:?}");
        assert!((found.exponent - law.exponent).abs() < 1e-5, "{found:?}");
        assert!((found.coefficient / law.coefficient - 1.0).abs() < 1e-3, "{found:?}");
        let noisy = PowerLaw::fit(&points(&law, 0.01), Form::Floor).unwrap();
        assert!((noisy.exponent - law.exponent).abs() < 0.03, "{noisy:?}");
        let pure = PowerLaw { floor: 0.0, coefficient: 30.0, exponent: 0.05 };
        let found = PowerLaw::fit(&points(&pure, 0.0), Form::Pure).unwrap();
        assert!((found.exponent - 0.05).abs() < 1e-12 && found.floor == 0.0, "{found:?}");
        assert!((found.coefficient - 30.0).abs() < 1e-9);
    }

    #[test]
    fn too_few_points_and_rising_losses_are_no_law() {
        let two = [(1e15, 3.0), (1e16, 2.5), (1e16, 2.6)];
        assert!(PowerLaw::fit(&two, Form::Floor).is_none());
        assert!(PowerLaw::fit(&two, Form::Pure).is_some());
        assert!(PowerLaw::fit(&two[1..], Form::Pure).is_none());
        let rising = [(1e15, 2.0), (1e16, 2.5), (1e17, 2.6)];
        assert!(PowerLaw::fit(&rising, Form::Pure).is_none());
        assert!(PowerLaw::fit(&rising, Form::Floor).is_none());
    }

    #[test]
    fn lines_cross_where_they_are_equal() {
        let steep = PowerLaw { floor: 0.0, coefficient: 100.0, exponent: 0.06 };
        let flat = PowerLaw { floor: 0.0, coefficient: 50.0, exponent: 0.05 };
        let expected = 2f64.powf(100.0);
        let found = crossing(&steep, &flat, 1e15).unwrap();
        assert!((found / expected - 1.0).abs() < 1e-6, "{found}");
        assert_eq!(crossing(&flat, &steep, 1e15), None);
        assert_eq!(crossing(&flat, &flat, 1e15), None);
    }

    #[test]
    fn resampling_keeps_the_number_and_repeats_itself() {
        let points: Vec<_> = (0..9).map(|i| (f64::from(i), 1.0)).collect();
        let draw = || resample(&points, &mut generator());
        assert_eq!(draw().len(), 9);
        assert_eq!(draw(), draw());
        assert!(draw() != points);
        let interval = Interval::of((0..=100).map(f64::from).collect()).unwrap();
        assert_eq!((interval.low, interval.high), (5.0, 95.0));
    }
}
