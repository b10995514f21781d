//! Log-probabilities of tokens.

/// The log-probability of a token, and of the likeliest ones in its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenLogprob {
    pub id: u32,
    /// Natural logarithm.
    pub logprob: f32,
    /// Likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// `ln softmax(logits)` of `id` and of the `count` likeliest tokens, by the model's own distribution: before
/// temperature, penalties and masks.
pub(crate) fn token_logprob(logits: &[f32], id: u32, count: usize) -> TokenLogprob {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - highest).exp()).sum();
    let norm = highest + sum.ln();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - norm) as f32;
    let mut top: Vec<u32> = Vec::with_capacity(count + 1);
    if count > 0 {
        // `count` is small: an insertion into a short sorted list beats sorting V logits.
        for (id, &logit) in (0..).zip(logits) {
            let is_full = top.len() == count;
            if is_full && top.last().is_some_and(|&last| logits[last as usize] >= logit) {
                continue;
            }
            let at = top.partition_point(|&other| logits[other as usize] >= logit);
            top.insert(at, id);
            top.truncate(count);
        }
    }
    TokenLogprob {
        id,
        logprob: logprob(id),
        top: top.into_iter().map(|id| (id, logprob(id))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_ranks_are_right() {
        let logits = [1.0, 3.0, -2.0, 3.0, 0.5];
        let found = token_logprob(&logits, 2, 5);
        let sum: f64 = found.top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        let ids: Vec<u32> = found.top.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, [1, 3, 0, 4, 2]);
        assert_eq!(found.logprob, found.top[4].1);
        assert_eq!(token_logprob(&logits, 0, 2).top.len(), 2);
        assert!(token_logprob(&logits, 0, 0).top.is_empty());
    }
}
