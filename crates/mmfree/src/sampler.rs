//! Logits to a token.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

/// How a token is drawn. `Default` draws from the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it: below 1 favours likely tokens; 0 is greedy, the most likely token.
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Makes recent tokens less likely: positive logits are divided by it, negative ones multiplied.
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// How many tokens back the repetition penalty looks.
    pub repetition_window: usize,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// # Errors
    /// A value outside its range.
    pub fn validate(&self) -> Result<()> {
        let range = |name: &str, value: f32, is_valid: bool, expected: &str| match is_valid {
            true => Ok(()),
            false => Err(Error::Invalid(format!("{name} is {value}, expected {expected}"))),
        };
        let (t, p, m, r) = (self.temperature, self.top_p, self.min_p, self.repetition_penalty);
        range("temperature", t, t.is_finite() && t >= 0.0, "a finite number of at least 0")?;
        range("top-p", p, p > 0.0 && p <= 1.0, "more than 0 and at most 1")?;
        range("min-p", m, (0.0..=1.0).contains(&m), "0 to 1")?;
        range("repetition-penalty", r, r.is_finite() && r > 0.0, "a finite number above 0")
    }
}

/// Draws tokens.
///
/// The same parameters, logits and recent tokens give the same token on every platform. In order:
///
/// 1. Repetition penalty r, once for each distinct token among the last `repetition_window`: logit / r
///    if positive, logit · r if not (f32).
/// 2. Temperature 0: the highest logit, of equals the lowest id. No random number is used.
/// 3. Weights w = exp((logit − highest logit) / temperature), in f64, by an exponential of this module
///    that uses additions and multiplications only.
/// 4. Top-k, top-p (among what top-k left), min-p: each keeps the first tokens in the order of
///    descending logit, of equals ascending id. Top-p keeps at least one.
/// 5. u = the upper 53 bits of the next 64-bit word of ChaCha8 / 2⁵³; ChaCha8's key is the seed
///    (little-endian, followed by zeros). The token is the first in order of id at which the sum of the kept
///    weights exceeds u · their total.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    random: ChaCha8Rng,
    /// Scratch: exp of every kept logit, by id.
    weights: Vec<f64>,
    /// Scratch: tokens by rank as far as ranks are needed.
    ranked: Vec<Candidate>,
    /// Scratch: the recent tokens.
    recent: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Candidate {
    /// Likelier first, of equals the lower id.
    fn rank(&self, other: &Self) -> std::cmp::Ordering {
        let by_logit = other.logit.partial_cmp(&self.logit).expect("logits are checked for NaN");
        by_logit.then(self.id.cmp(&other.id))
    }

    fn is_before_or_same(&self, last: &Self) -> bool {
        self.rank(last).is_le()
    }
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    /// Parameters outside their ranges.
    pub fn new(params: SamplingParams) -> Result<Self> {
        params.validate()?;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&params.seed.to_le_bytes());
        Ok(Self {
            params,
            random: ChaCha8Rng::from_seed(key),
            weights: Vec::new(),
            ranked: Vec::new(),
            recent: Vec::new(),
        })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Draws a token from `logits`, one for each of V tokens; the repetition penalty changes them in
    /// place. `recent` are the tokens so far, of which the last `repetition_window` count. Allocates on
    /// the first call only.
    ///
    /// # Errors
    /// No logits; a logit that is NaN or +∞; all logits −∞.
    pub fn sample(&mut self, logits: &mut [f32], recent: &[u32]) -> Result<u32> {
        self.penalise(logits, recent);
        let best = highest(logits)?;
        if self.params.temperature == 0.0 {
            return Ok(best.id);
        }
        let last = self.weigh(logits, best);
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let min_weight = f64::from(self.params.min_p);
        if last.is_none() && min_weight == 0.0 {
            return Ok(self.draw_from_all(uniform));
        }
        let is_kept = |&(id, &weight): &(usize, &f64)| {
            let candidate = Candidate { logit: logits[id], id: id as u32 };
            weight > 0.0
                && weight >= min_weight
                && last.is_none_or(|last| candidate.is_before_or_same(&last))
        };
        let kept = || self.weights.iter().enumerate().filter(is_kept);
        let total: f64 = kept().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let drawn = kept().find(|&(_, weight)| {
            sum += weight;
            sum > uniform * total
        });
        // Rounding may leave the sum at the total without exceeding it: then it is the last token.
        let (id, _) = drawn.or_else(|| kept().next_back()).expect("the best token is always kept");
        Ok(id as u32)
    }

    /// Draws when nothing was dropped. Tokens of weight 0 change no sum, so they need no look.
    fn draw_from_all(&self, uniform: f64) -> u32 {
        let threshold = uniform * self.weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let drawn = self.weights.iter().position(|&weight| {
            sum += weight;
            sum > threshold
        });
        let last = || self.weights.iter().rposition(|&weight| weight > 0.0);
        drawn.or_else(last).expect("the best token has weight 1") as u32
    }

    fn penalise(&mut self, logits: &mut [f32], recent: &[u32]) {
        let penalty = self.params.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let start = recent.len().saturating_sub(self.params.repetition_window);
        self.recent.clear();
        self.recent.extend_from_slice(&recent[start..]);
        self.recent.sort_unstable();
        self.recent.dedup();
        for &id in &self.recent {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Computes the weights, 0 for tokens that top-k drops, and returns the last token in rank that
    /// top-k and top-p keep, if they drop any.
    fn weigh(&mut self, logits: &[f32], best: Candidate) -> Option<Candidate> {
        let SamplingParams { temperature, top_k, top_p, .. } = self.params;
        let scale = 1.0 / f64::from(temperature);
        let weight = |logit: f32| exp((f64::from(logit) - f64::from(best.logit)) * scale);
        let drops_by_rank = top_k > 0 && top_k < logits.len();
        if drops_by_rank || top_p < 1.0 {
            self.ranked.clear();
            self.ranked.extend((0..).zip(logits).map(|(id, &logit)| Candidate { logit, id }));
        }
        let mut last = None;
        self.weights.clear();
        if drops_by_rank {
            let (_, &mut kth, _) = self.ranked.select_nth_unstable_by(top_k - 1, Candidate::rank);
            last = Some(kth);
            self.ranked.truncate(top_k);
            self.weights.resize(logits.len(), 0.0);
            for candidate in &self.ranked {
                self.weights[candidate.id as usize] = weight(candidate.logit);
            }
        } else {
            self.weights.extend(logits.iter().map(|&logit| weight(logit)));
        }
        if top_p < 1.0 {
            last = Some(self.nucleus(f64::from(top_p)));
        }
        last
    }

    /// The last of the most likely tokens whose weights sum to at least `top_p` of the total. Ranks only
    /// as many tokens as that takes, in blocks that double.
    fn nucleus(&mut self, top_p: f64) -> Candidate {
        let enough = top_p * self.weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let mut rest = &mut self.ranked[..];
        let mut block = 64;
        loop {
            if block < rest.len() {
                rest.select_nth_unstable_by(block, Candidate::rank);
            }
            let (head, tail) = rest.split_at_mut(block.min(rest.len()));
            head.sort_unstable_by(Candidate::rank);
            for candidate in head.iter() {
                sum += self.weights[candidate.id as usize];
                if sum >= enough {
                    return *candidate;
                }
            }
            if tail.is_empty() {
                // Rounding may leave the sum just below the total.
                return *head.last().expect("there are logits");
            }
            rest = tail;
            block *= 2;
        }
    }
}

/// The highest logit, of equals the one with the lowest id.
fn highest(logits: &[f32]) -> Result<Candidate> {
    let Some((id, logit)) = most_likely(logits) else {
        return Err(Error::Invalid(match logits.iter().position(is_invalid) {
            Some(id) => {
                format!("logit {id} is {}: the model computes no valid distribution", logits[id])
            }
            None => "no token has a finite logit".into(),
        }));
    };
    Ok(Candidate { logit, id })
}

fn is_invalid(logit: &f32) -> bool {
    logit.is_nan() | (*logit == f32::INFINITY)
}

/// Id and logit of the most likely token, of equals the lowest id. `None` if a logit is NaN or +∞, or
/// all are −∞.
pub(crate) fn most_likely(logits: &[f32]) -> Option<(u32, f32)> {
    // Sixteen at a time and without branches, which compiles to vector code.
    let mut best = [f32::NEG_INFINITY; 16];
    let mut has_invalid = [false; 16];
    let (chunks, rest) = logits.as_chunks::<16>();
    for chunk in chunks {
        for ((best, has_invalid), &logit) in best.iter_mut().zip(&mut has_invalid).zip(chunk) {
            *best = if logit > *best { logit } else { *best };
            *has_invalid |= is_invalid(&logit);
        }
    }
    if has_invalid.contains(&true) || rest.iter().any(is_invalid) {
        return None;
    }
    let highest = best.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max);
    let id = logits.iter().position(|&logit| logit == highest)?;
    (highest > f32::NEG_INFINITY).then_some((id as u32, logits[id]))
}

/// e^x for x ≤ 0 from additions and multiplications only: the system's `exp` differs from platform to
/// platform. 0 below −700.
fn exp(x: f64) -> f64 {
    // ln 2 in two parts, the first with so few bits that its product with k is exact.
    const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    // Adding it leaves no bits for a fraction, so the sum is rounded to an integer (half to even).
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    const COEFFICIENTS: [f64; 14] = inverse_factorials();
    let clamped = x.max(-700.0);
    let rounded = clamped * std::f64::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = clamped - k * LN2_HIGH - k * LN2_LOW;
    // Taylor's series: |r| ≤ ln 2 / 2, so the first term left out is below 2⁻⁵⁷.
    let series = COEFFICIENTS.iter().rev().fold(0.0, |sum, coefficient| sum * r + coefficient);
    // The low bits of `rounded` are k: a cast would keep this from becoming vector code.
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(1023);
    let power = f64::from_bits(exponent << 52);
    if x < -700.0 { 0.0 } else { series * power }
}

/// 1 / n! for n = 0 … 13.
const fn inverse_factorials() -> [f64; 14] {
    let mut inverses = [1.0; 14];
    let mut n = 1;
    let mut factorial = 1u64;
    while n < inverses.len() {
        factorial *= n as u64;
        inverses[n] = 1.0 / factorial as f64;
        n += 1;
    }
    inverses
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, by a full sort.
    fn reference(params: &SamplingParams, logits: &[f32], recent: &[u32], uniform: f64) -> u32 {
        let mut logits = logits.to_vec();
        let start = recent.len().saturating_sub(params.repetition_window);
        let distinct: std::collections::HashSet<_> = recent[start..].iter().collect();
        for &&id in &distinct {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 {
                *logit / params.repetition_penalty
            } else {
                *logit * params.repetition_penalty
            };
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
        if params.temperature == 0.0 {
            return order[0] as u32;
        }
        let best = f64::from(logits[order[0]]);
        let weight =
            |id: usize| exp((f64::from(logits[id]) - best) * (1.0 / f64::from(params.temperature)));
        if params.top_k > 0 {
            order.truncate(params.top_k);
        }
        if params.top_p < 1.0 {
            let mut by_id = order.clone();
            by_id.sort();
            let total: f64 = by_id.iter().map(|&id| weight(id)).sum();
            let mut sum = 0.0;
            let count = order.iter().position(|&id| {
                sum += weight(id);
                sum >= f64::from(params.top_p) * total
            });
            order.truncate(count.map_or(order.len(), |last| last + 1));
        }
        order.retain(|&id| weight(id) >= f64::from(params.min_p) && weight(id) > 0.0);
        order.sort();
        let total: f64 = order.iter().map(|&id| weight(id)).sum();
        let mut sum = 0.0;
        let drawn = order.iter().find(|&&id| {
            sum += weight(id);
            sum > uniform * total
        });
        *drawn.unwrap_or(order.last().unwrap()) as u32
    }

    fn uniforms(seed: u64) -> impl Iterator<Item = f64> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut random = ChaCha8Rng::from_seed(key);
        std::iter::repeat_with(move || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64)
    }

    fn logit() -> impl Strategy<Value = f32> {
        // Coarse values make ties.
        prop_oneof![
            4 => (-20i8..20).prop_map(|x| f32::from(x) / 2.0),
            4 => -30.0f32..30.0,
            1 => Just(f32::NEG_INFINITY),
            1 => Just(-0.0f32),
        ]
    }

    prop_compose! {
        fn params()(
            temperature in prop_oneof![Just(0.0f32), Just(1.0), 0.01f32..5.0, Just(1e-30)],
            top_k in 0usize..50,
            top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0, Just(1.0)],
            repetition_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
            repetition_window in 0usize..20,
            seed: u64,
        ) -> SamplingParams {
            SamplingParams {
                temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, seed,
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            params in params(),
            logits in prop::collection::vec(logit(), 1..400),
            recent in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
        ) {
            prop_assume!(logits.iter().any(|logit| logit.is_finite()));
            let recent: Vec<u32> =
                recent.iter().map(|index| index.index(logits.len()) as u32).collect();
            let mut sampler = Sampler::new(params.clone()).unwrap();
            for uniform in uniforms(params.seed).take(4) {
                let expected = reference(&params, &logits, &recent, uniform);
                let drawn = sampler.sample(&mut logits.clone(), &recent).unwrap();
                prop_assert_eq!(drawn, expected);
            }
        }

        #[test]
        fn exp_is_exact_to_a_few_units(x in -700.0f64..=0.0) {
            let (ours, system) = (exp(x), x.exp());
            prop_assert!((ours - system).abs() <= 4.0 * f64::EPSILON * system, "{} {}", ours, system);
        }
    }

    #[test]
    fn draws_as_often_as_the_probabilities_say() {
        let mut sampler = Sampler::new(SamplingParams { seed: 7, ..Default::default() }).unwrap();
        let logits = [0.5f32.ln(), 0.3f32.ln(), f32::NEG_INFINITY, 0.2f32.ln()];
        let mut counts = [0i32; 4];
        for _ in 0..20_000 {
            counts[sampler.sample(&mut logits.clone(), &[]).unwrap() as usize] += 1;
        }
        let expected = [10_000, 6_000, 0, 4_000];
        for (count, expected) in counts.into_iter().zip(expected) {
            assert!((count - expected).abs() < 400, "{counts:?}");
        }
    }

    #[test]
    fn a_seed_fixes_the_sequence_on_every_platform() {
        let mut sampler = Sampler::new(SamplingParams { seed: 42, ..Default::default() }).unwrap();
        let logits: Vec<f32> = (0..1000).map(|i| (i % 17) as f32 / 4.0).collect();
        let drawn: Vec<u32> =
            (0..8).map(|_| sampler.sample(&mut logits.clone(), &[]).unwrap()).collect();
        assert_eq!(drawn, [353, 287, 492, 371, 827, 67, 491, 269]);
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        let mut greedy = Sampler::new(SamplingParams::greedy()).unwrap();
        assert_eq!(greedy.sample(&mut [1.0, 3.0, 3.0], &[]).unwrap(), 1);
        assert_eq!(greedy.sample(&mut [-0.0, 0.0], &[]).unwrap(), 0);
        let params = SamplingParams { top_k: 1, ..Default::default() };
        let mut sampler = Sampler::new(params).unwrap();
        assert_eq!(sampler.sample(&mut [3.0, 1.0, 3.0], &[]).unwrap(), 0);
    }

    #[test]
    fn invalid_logits_and_parameters_are_errors() {
        let mut sampler = Sampler::new(SamplingParams::default()).unwrap();
        for mut logits in
            [vec![], vec![0.0, f32::NAN], vec![f32::INFINITY], vec![f32::NEG_INFINITY; 3]]
        {
            assert!(sampler.sample(&mut logits, &[]).is_err(), "{logits:?}");
        }
        let default = SamplingParams::default;
        for params in [
            SamplingParams { temperature: -1.0, ..default() },
            SamplingParams { temperature: f32::NAN, ..default() },
            SamplingParams { top_p: 0.0, ..default() },
            SamplingParams { top_p: 1.5, ..default() },
            SamplingParams { min_p: -0.1, ..default() },
            SamplingParams { repetition_penalty: 0.0, ..default() },
        ] {
            let error = Sampler::new(params).unwrap_err().to_string();
            assert!(error.contains("expected"), "{error}");
        }
    }
}
