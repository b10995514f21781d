//! Logits to a token.

use mmfree_kernels::sampling::{self, MAX_LOGITS, weight};
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
/// The same parameters, logits and recent tokens give the same token on every platform, drawn on the host or on a GPU. In
/// order:
///
/// 1. Repetition penalty r, once for each distinct token among the last `repetition_window`: logit / r
///    if positive, logit · r if not (f32).
/// 2. Temperature 0: the highest logit, of equals the lowest id. No random number is used.
/// 3. Likelihoods e = exp((logit − highest logit) · (1 / temperature)), in f32, by the kernels' exponential, which uses
///    additions and multiplications only. Weights w = e · 2⁴⁰, rounded to an integer, half to even: from here on sums are exact,
///    whatever their order. A vocabulary has 2²² tokens at most, so they stay below 2⁶³.
/// 4. Top-k, top-p (among what top-k left), min-p: the first two keep the first tokens in the order of descending
///    likelihood, of equals ascending id: k of them, or as few as have a sum of weights of at least top-p · their total. Top-p
///    keeps at least one. Min-p keeps tokens whose weight is at least min-p · 2⁴⁰.
/// 5. u = the upper 53 bits of the next 64-bit word of ChaCha8; ChaCha8's key is the seed (little-endian, followed by
///    zeros). The token is the first in order of id at which the sum of the kept weights exceeds
///    floor(u · their total / 2⁵³).
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// The same as the drawing computes with them.
    numbers: sampling::Params,
    random: ChaCha8Rng,
    /// Scratch: likelihoods by id.
    likelihoods: Vec<f32>,
    /// Scratch: tokens by rank as far as ranks are needed.
    ranked: Vec<Candidate>,
    /// Scratch: the recent tokens.
    recent: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    likelihood: f32,
    id: u32,
}

impl Candidate {
    /// Likelier first, of equals the lower id.
    fn rank(&self, other: &Self) -> std::cmp::Ordering {
        other.likelihood.total_cmp(&self.likelihood).then(self.id.cmp(&other.id))
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
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = params;
        Ok(Self {
            numbers: sampling::Params {
                penalty: params.repetition_penalty,
                window: params.repetition_window,
                ..sampling::Params::new(temperature, top_k, top_p, min_p)
            },
            params,
            random: ChaCha8Rng::from_seed(key),
            likelihoods: Vec::new(),
            ranked: Vec::new(),
            recent: Vec::new(),
        })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The parameters as the drawing computes with them; `None` if a GPU cannot.
    pub(crate) fn on_device(&self) -> Option<sampling::Params> {
        let has_window = self.numbers.window <= sampling::Sampling::MAX_WINDOW;
        (has_window || self.numbers.penalty == 1.0).then_some(self.numbers)
    }

    /// Whether the most likely token is taken whatever came before it.
    pub(crate) fn is_greedy(&self) -> bool {
        self.numbers.scale == 0.0 && self.numbers.penalty == 1.0
    }

    /// The random word for a token that is drawn elsewhere.
    pub(crate) fn next_word(&mut self) -> u64 {
        if self.numbers.scale == 0.0 { 0 } else { self.random.next_u64() }
    }

    /// Draws a token from `logits`, one for each of V tokens; the repetition penalty changes them in
    /// place. `recent` are the tokens so far, of which the last `repetition_window` count. Allocates on
    /// the first call only.
    ///
    /// # Errors
    /// No logits, or more than 2²²; a logit that is NaN or +∞; all logits −∞.
    pub fn sample(&mut self, logits: &mut [f32], recent: &[u32]) -> Result<u32> {
        if logits.len() > MAX_LOGITS {
            let count = logits.len();
            return Err(Error::Invalid(format!("{count} logits, expected {MAX_LOGITS} at most")));
        }
        self.penalise(logits, recent);
        let (id, highest) = highest(logits)?;
        let sampling::Params { scale, min_weight, .. } = self.numbers;
        if scale == 0.0 {
            return Ok(id);
        }
        sampling::likelihoods(logits, highest, scale, &mut self.likelihoods);
        let last = self.last_by_rank();
        let word = self.random.next_u64();
        if last.is_none() && min_weight == 1 {
            let weights = self.likelihoods.iter().map(|&likelihood| weight(likelihood));
            return Ok(first_exceeding((0..).zip(weights), word));
        }
        let kept = (0..).zip(&self.likelihoods).filter_map(|(id, &likelihood)| {
            let weight = weight(likelihood);
            let is_kept = weight >= min_weight
                && last.is_none_or(|last| Candidate { likelihood, id }.is_before_or_same(&last));
            is_kept.then_some((id, weight))
        });
        Ok(first_exceeding(kept, word))
    }

    fn penalise(&mut self, logits: &mut [f32], recent: &[u32]) {
        let sampling::Params { penalty, window, .. } = self.numbers;
        if penalty == 1.0 {
            return;
        }
        let start = recent.len().saturating_sub(window);
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

    /// The last token in rank that top-k and top-p keep, if they drop any.
    fn last_by_rank(&mut self) -> Option<Candidate> {
        let vocab = self.likelihoods.len();
        if self.numbers.keeps_all_ranks(vocab) {
            return None;
        }
        self.ranked.clear();
        let likelihoods = (0..).zip(&self.likelihoods);
        self.ranked.extend(likelihoods.map(|(id, &likelihood)| Candidate { likelihood, id }));
        let mut last = None;
        let top_k = self.numbers.top_k;
        if top_k > 0 && top_k < vocab {
            let (_, &mut kth, _) = self.ranked.select_nth_unstable_by(top_k - 1, Candidate::rank);
            last = Some(kth);
            self.ranked.truncate(top_k);
        }
        if self.params.top_p < 1.0 {
            last = Some(self.nucleus());
        }
        last
    }

    /// The last of the most likely tokens whose weights sum to at least top-p of the total. Ranks only
    /// as many tokens as that takes, in blocks that double.
    fn nucleus(&mut self) -> Candidate {
        let weights = self.ranked.iter().map(|candidate| weight(candidate.likelihood));
        let enough = self.numbers.enough(weights.sum());
        let mut sum = 0;
        let mut rest = &mut self.ranked[..];
        let mut block = 64;
        loop {
            if block < rest.len() {
                rest.select_nth_unstable_by(block, Candidate::rank);
            }
            let (head, tail) = rest.split_at_mut(block.min(rest.len()));
            head.sort_unstable_by(Candidate::rank);
            for candidate in head.iter() {
                sum += weight(candidate.likelihood);
                if sum >= enough {
                    return *candidate;
                }
            }
            rest = tail;
            block *= 2;
        }
    }
}

/// The first token at which the sum of weights exceeds the part of their total that a random word says.
fn first_exceeding(weights: impl Iterator<Item = (u32, u64)> + Clone, word: u64) -> u32 {
    let threshold = sampling::threshold(word, weights.clone().map(|(_, weight)| weight).sum());
    let mut sum = 0;
    let mut weights = weights;
    let drawn = weights.find(|&(_, weight)| {
        sum += weight;
        sum > threshold
    });
    drawn.expect("the threshold is below the total: the best token is always kept").0
}

/// The highest logit, of equals the one with the lowest id.
fn highest(logits: &[f32]) -> Result<(u32, f32)> {
    most_likely(logits).ok_or_else(|| {
        Error::Invalid(match logits.iter().position(is_invalid) {
            Some(id) => {
                format!("logit {id} is {}: the model computes no valid distribution", logits[id])
            }
            None => "no token has a finite logit".into(),
        })
    })
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, by a full sort.
    fn reference(params: &SamplingParams, logits: &[f32], recent: &[u32], word: u64) -> u32 {
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
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if params.temperature == 0.0 {
            return logits.iter().position(|&logit| logit == best).unwrap() as u32;
        }
        let mut e = Vec::new();
        let scale = (1.0 / params.temperature).min(f32::MAX);
        sampling::likelihoods(&logits, best, scale, &mut e);
        let weight = |id: &usize| u128::from(weight(e[*id]));
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| e[b].partial_cmp(&e[a]).unwrap().then(a.cmp(&b)));
        if params.top_k > 0 {
            order.truncate(params.top_k);
        }
        if params.top_p < 1.0 {
            let share = (f64::from(params.top_p) * 2f64.powi(53)) as u128;
            let total: u128 = order.iter().map(weight).sum();
            let mut sum = 0;
            let count = order.iter().position(|id| {
                sum += weight(id);
                sum << 53 >= share * total
            });
            order.truncate(count.unwrap() + 1);
        }
        let least = f64::from(params.min_p) * 2f64.powi(40);
        order.retain(|id| weight(id) > 0 && weight(id) as f64 >= least);
        order.sort();
        let total: u128 = order.iter().map(weight).sum();
        let threshold = (u128::from(word >> 11) * total) >> 53;
        let mut sum = 0;
        let drawn = order.iter().find(|id| {
            sum += weight(id);
            sum > threshold
        });
        *drawn.unwrap() as u32
    }

    fn words(seed: u64) -> impl Iterator<Item = u64> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut random = ChaCha8Rng::from_seed(key);
        std::iter::repeat_with(move || random.next_u64())
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
            for word in words(params.seed).take(4) {
                let expected = reference(&params, &logits, &recent, word);
                let drawn = sampler.sample(&mut logits.clone(), &recent).unwrap();
                prop_assert_eq!(drawn, expected);
            }
        }

        /// Tokens in another order have the same weights, the same total and the same tokens kept.
        #[test]
        fn the_order_of_ids_changes_no_weight(
            params in params(),
            logits in prop::collection::hash_set(-4000i32..4000, 1..200),
        ) {
            prop_assume!(params.temperature > 0.0);
            let logits: Vec<f32> = logits.into_iter().map(|x| x as f32 / 300.0).collect();
            let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 1.0, ..params }).unwrap();
            let mut kept = |logits: &[f32]| -> std::collections::HashSet<u32> {
                let draws = (0..40).map(|_| sampler.sample(&mut logits.to_vec(), &[]).unwrap());
                let drawn: Vec<u32> = draws.collect();
                let last = sampler.last_by_rank().map(|last| last.likelihood.to_bits());
                drawn.iter().for_each(|&id| {
                    let likelihood = sampler.likelihoods[id as usize];
                    assert!(last.is_none_or(|last| likelihood >= f32::from_bits(last)));
                });
                last.into_iter().collect()
            };
            let mut reversed = logits.clone();
            reversed.reverse();
            prop_assert_eq!(kept(&logits), kept(&reversed));
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
