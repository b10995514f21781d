//! Draws tokens from logits: what the host and the GPU do alike.
//!
//! With the highest logit h and scale s = 1 / temperature, a token's likelihood relative to the most likely one is
//! e = exp((logit − h) · s), in f32 by the exponential of all kernels, and its weight the integer w = e · 2⁴⁰, rounded half to
//! even. From there on everything is a sum of integers, which has no order: a GPU draws the token that the host draws.

mod cuda;

pub(crate) use cuda::SOURCE;
pub use cuda::{Next, Request, Sampling};

use crate::lanes::exp;

/// Bits of the weight of the most likely token.
const WEIGHT_BITS: u32 = 40;
/// Logits of a row, at most: their weights' sum stays below 2⁶³.
pub const MAX_LOGITS: usize = 1 << 22;
/// Bits of a fraction: of the random one in \[0, 1), and of what top-p asks for.
const FRACTION_BITS: u32 = 53;

/// How tokens are drawn from a row, in the numbers that the drawing computes with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params {
    /// 1 / temperature; 0 takes the most likely token.
    pub scale: f32,
    /// Of recent tokens positive logits are divided by it, others multiplied; 1 changes nothing.
    pub penalty: f32,
    /// How many of the recent tokens count.
    pub window: usize,
    /// Keeps so many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens whose weights have this share of the total, in 2⁻⁵³.
    pub top_p: u64,
    /// Keeps tokens of at least this weight; at least 1.
    pub min_weight: u64,
}

impl Params {
    /// From a temperature of at least 0, a share `top_p` and a relative likelihood `min_p`, both in \[0, 1].
    pub fn new(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> Self {
        let min_weight = (f64::from(min_p) * (1u64 << WEIGHT_BITS) as f64).ceil() as u64;
        Self {
            scale: if temperature == 0.0 { 0.0 } else { (1.0 / temperature).min(f32::MAX) },
            penalty: 1.0,
            window: 0,
            top_k,
            top_p: (f64::from(top_p) * (1u64 << FRACTION_BITS) as f64) as u64,
            min_weight: min_weight.max(1),
        }
    }

    /// Whether all weights take part.
    pub fn keeps_all_ranks(&self, vocab: usize) -> bool {
        (self.top_k == 0 || self.top_k >= vocab) && self.top_p >= 1 << FRACTION_BITS
    }

    /// The sum of weights that is enough for top-p, of a total: at least 1.
    pub fn enough(&self, total: u64) -> u64 {
        let product = u128::from(self.top_p) * u128::from(total);
        (product.div_ceil(1 << FRACTION_BITS) as u64).max(1)
    }
}

/// e = exp((logit − highest) · scale) of each logit `[V]`.
pub fn likelihoods(logits: &[f32], highest: f32, scale: f32, likelihoods: &mut Vec<f32>) {
    likelihoods.clear();
    likelihoods.extend(logits.iter().map(|&logit| exp((logit - highest) * scale)));
}

/// The weight of a likelihood in \[0, 1].
#[inline(always)]
pub fn weight(likelihood: f32) -> u64 {
    // The sum's last bit is worth 1: the bits of its fraction are the rounded integer.
    const ROUND: f64 = (1u64 << 52) as f64;
    let sum = f64::from(likelihood) * (1u64 << WEIGHT_BITS) as f64 + ROUND;
    sum.to_bits() & ((1 << 52) - 1)
}

/// Of a total, the part that a random word says: below the total.
pub fn threshold(word: u64, total: u64) -> u64 {
    let uniform = word >> (u64::BITS - FRACTION_BITS);
    ((u128::from(uniform) * u128::from(total)) >> FRACTION_BITS) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_rounded_half_to_even_and_of_full_range() {
        let unit = (-40f32).exp2();
        for (likelihood, expected) in
            [(0.0, 0), (0.5, 0), (0.75, 1), (1.0, 1), (1.5, 2), (2.5, 2), (3.5, 4), (7.0, 7)]
        {
            assert_eq!(weight(likelihood * unit), expected, "{likelihood}");
        }
        assert_eq!(weight(1.0), 1 << 40);
        assert_eq!(weight(0.5), 1 << 39);
        assert_eq!(weight(exp(-87.0)), 0);
    }

    #[test]
    fn likelihoods_do_not_leave_their_range() {
        let mut found = Vec::new();
        for scale in [1e-45f32, 1e-3, 1.0, 1e30, f32::MAX] {
            likelihoods(&[3.0, -3.0e38, f32::NEG_INFINITY, 2.999_999_8], 3.0, scale, &mut found);
            assert_eq!(found[0], 1.0);
            assert!(found.iter().all(|likelihood| (0.0..=1.0).contains(likelihood)), "{found:?}");
        }
    }

    #[test]
    fn fractions_are_of_the_total() {
        let total = (MAX_LOGITS as u64) << WEIGHT_BITS;
        assert_eq!(threshold(u64::MAX, total), total - total.div_ceil(1 << FRACTION_BITS));
        assert_eq!(threshold(0, total), 0);
        assert_eq!(threshold(1 << 63, total), total / 2);
        assert_eq!(Params::new(1.0, 0, 0.5, 0.0).enough(7), 4);
        assert_eq!(Params::new(1.0, 0, 1.0, 0.0).enough(total), total);
        assert_eq!(Params::new(1.0, 0, 1e-30, 0.0).enough(total), 1);
        assert_eq!(Params::new(1.0, 0, 1.0, 1.0).min_weight, 1 << WEIGHT_BITS);
        assert_eq!(Params::new(f32::from_bits(1), 0, 1.0, 0.0).scale, f32::MAX);
    }
}
