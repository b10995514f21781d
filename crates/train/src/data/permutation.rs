//! A shuffle that is computed instead of stored.

/// A bijection of `0..len` that looks random, chosen by a key.
///
/// A Feistel network over the smallest even number of bits that holds `len` values; what falls outside
/// is sent through again until it lies inside (cycle walking, fewer than four rounds on average), so that
/// it is a bijection whatever the round function is. Shuffling any number of sequences needs no memory.
///
/// ```
/// use mmfree_train::data::Permutation;
///
/// let shuffle = Permutation::new(5, 42);
/// let mut order: Vec<u64> = (0..5).map(|index| shuffle.apply(index)).collect();
/// order.sort();
/// assert_eq!(order, [0, 1, 2, 3, 4]);
/// ```
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

/// Four rounds make a pseudorandom permutation of a good round function; tiny domains want more.
const ROUNDS: usize = 8;

impl Permutation {
    /// The permutation of `0..len` that belongs to `key`. `len` is at most 2⁶².
    ///
    /// # Panics
    /// If `len` is larger.
    pub fn new(len: u64, key: u64) -> Self {
        assert!(len <= 1 << 62, "a permutation of {len} values");
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let mut state = key;
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        });
        Self { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// If `index` is not below the length.
    pub fn apply(&self, index: u64) -> u64 {
        assert!(index < self.len, "index {index} of a permutation of {}", self.len);
        let mut value = index;
        loop {
            value = self.network(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ mix(right ^ key) & mask);
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64: every bit of the input changes every bit of the output with probability
/// one half (Steele, Lea, Flood 2014).
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_comes_once() {
        for len in (1..70).chain([127, 128, 129, 1000, 4096, 4097, 99_991]) {
            for key in [0, 1, u64::MAX] {
                let shuffle = Permutation::new(len, key);
                let mut seen = vec![false; len as usize];
                for index in 0..len {
                    let value = shuffle.apply(index) as usize;
                    assert!(!seen[value], "{value} twice, length {len}, key {key}");
                    seen[value] = true;
                }
            }
        }
    }

    #[test]
    fn keys_choose_among_all_orders_evenly() {
        // All 24 orders of four values over 24,000 keys: 1000 each, standard deviation 31.
        let mut counts = std::collections::HashMap::new();
        for key in 0..24_000 {
            let shuffle = Permutation::new(4, key);
            let order: [u64; 4] = std::array::from_fn(|index| shuffle.apply(index as u64));
            *counts.entry(order).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|&count| (800..1200).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_largest_domain_works() {
        let len = 1 << 62;
        let shuffle = Permutation::new(len, 7);
        assert!([0, 1, len - 1].map(|index| shuffle.apply(index)).iter().all(|&v| v < len));
    }
}
