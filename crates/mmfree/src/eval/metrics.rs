//! Accuracies and their standard errors.

use serde::Serialize;

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Standard error; none of a single item.
    pub stderr: Option<f64>,
}

impl Estimate {
    /// Mean of values, with the sample's standard deviation over the root of their number.
    pub fn mean(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
        let stderr = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt());
        Self { value: mean, stderr }
    }

    /// `exp(−mean)` of log-likelihoods; its standard error to first order, `exp(−mean)` times the mean's.
    pub fn perplexity(log_likelihoods: &[f64]) -> Self {
        let mean = Self::mean(log_likelihoods);
        let value = (-mean.value).exp();
        Self { value, stderr: mean.stderr.map(|stderr| value * stderr) }
    }
}

/// The index of the largest value, of equals the first.
pub fn best(values: impl Iterator<Item = f64>) -> usize {
    let largest = values.enumerate().reduce(|best, it| if it.1 > best.1 { it } else { best });
    largest.map_or(0, |(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_the_samples() {
        let estimate = Estimate::mean(&[1.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(estimate.value, 0.6);
        // sqrt(0.3) / sqrt(5)
        assert!((estimate.stderr.unwrap() - 0.244_948_974_278_317_8).abs() < 1e-15);
        assert_eq!(Estimate::mean(&[1.0]).stderr, None);
        let perplexity = Estimate::perplexity(&[-1.0, -3.0]);
        assert!((perplexity.value - 2f64.exp()).abs() < 1e-12);
        assert!((perplexity.stderr.unwrap() - 2f64.exp()).abs() < 1e-12);
        assert_eq!(best([1.0, 3.0, 3.0, 2.0].into_iter()), 1);
    }
}
