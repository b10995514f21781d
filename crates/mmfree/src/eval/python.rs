//! What Python does with strings and random numbers, where the harness' prompts depend on it.

/// Whether `str.isspace` is true of a character: Unicode's white space and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `text.strip()`
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `text.capitalize()`: the first character in title case, the rest in lower case.
pub(super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return String::new() };
    let mut title: String = match first {
        // The letters whose title case is not their upper case.
        '\u{1c4}'..='\u{1c6}' => "\u{1c5}".to_owned(),
        '\u{1c7}'..='\u{1c9}' => "\u{1c8}".to_owned(),
        '\u{1ca}'..='\u{1cc}' => "\u{1cb}".to_owned(),
        '\u{1f1}'..='\u{1f3}' => "\u{1f2}".to_owned(),
        // ß becomes Ss, ﬁ becomes Fi.
        first => {
            let mut upper = first.to_uppercase();
            let head: String = upper.next().into_iter().collect();
            head + &upper.collect::<String>().to_lowercase()
        }
    };
    title.push_str(&chars.as_str().to_lowercase());
    title
}

/// The Mersenne Twister MT19937 as `random.Random(seed)` uses it.
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: Box<[u32; SIZE]>,
    next: usize,
}

const SIZE: usize = 624;
const MIDDLE: usize = 397;

impl Random {
    /// `random.Random(seed)`
    pub(super) fn new(seed: u32) -> Self {
        let mut state = Box::new([0_u32; SIZE]);
        state[0] = 19_650_218;
        for i in 1..SIZE {
            let previous = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = 1_812_433_253_u32.wrapping_mul(previous).wrapping_add(i as u32);
        }
        // The key has one word, the seed.
        let mut i = 1;
        let mut mix = |factor: u32, added: &dyn Fn(usize) -> u32| {
            let previous = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = (state[i] ^ previous.wrapping_mul(factor)).wrapping_add(added(i));
            i += 1;
            if i == SIZE {
                state[0] = state[SIZE - 1];
                i = 1;
            }
        };
        for _ in 0..SIZE {
            mix(1_664_525, &|_| seed);
        }
        for _ in 1..SIZE {
            mix(1_566_083_941, &|i| (i as u32).wrapping_neg());
        }
        state[0] = 0x8000_0000;
        Self { state, next: SIZE }
    }

    fn word(&mut self) -> u32 {
        if self.next == SIZE {
            for i in 0..SIZE {
                let joined =
                    (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % SIZE] & 0x7fff_ffff);
                let twist = if joined & 1 == 0 { 0 } else { 0x9908_b0df };
                self.state[i] = self.state[(i + MIDDLE) % SIZE] ^ (joined >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number below `n`, which is at least 1 and below 2³¹.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let number = (self.word() >> (32 - bits)) as usize;
            if number < n {
                return number;
            }
        }
    }

    /// `random.sample(range(n), k)`, with k at most n.
    pub(super) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut set_size = 21;
        if k > 5 {
            set_size += 4_usize.saturating_pow(((k * 3) as f64).log(4.0).ceil() as u32);
        }
        let mut picked = Vec::with_capacity(k);
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below(n - i);
                picked.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut seen = std::collections::HashSet::new();
            while picked.len() < k {
                let j = self.below(n);
                if seen.insert(j) {
                    picked.push(j);
                }
            }
        }
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_pythons() {
        for (text, expected) in [
            ("he SAID", "He said"),
            ("", ""),
            ("éa", "Éa"),
            ("ßA", "Ssa"),
            ("ﬁX", "Fix"),
            ("ǆX", "ǅx"),
            ("1A", "1a"),
            (" a", " a"),
        ] {
            assert_eq!(capitalize(text), expected);
        }
        assert_eq!(strip("\u{1f}\u{a0} a b\u{2003}\n"), "a b");
    }

    /// `r = random.Random(1234); [r.sample(range(n), k) for n, k in …]` of CPython 3.11.
    #[test]
    fn samples_are_pythons() {
        let mut random = Random::new(1234);
        assert_eq!(random.sample(10, 5), EXPECTED_SMALL);
        assert_eq!(random.sample(40_000, 6), EXPECTED_LARGE);
        assert_eq!(random.sample(30, 25), EXPECTED_MANY);
        assert_eq!(random.sample(1, 1), [0]);
        // Past the first 624 words.
        let mut last = Vec::new();
        for _ in 0..500 {
            last = random.sample(1000, 3);
        }
        assert_eq!(last, EXPECTED_LATE);
    }

    const EXPECTED_SMALL: [usize; 5] = [7, 1, 0, 9, 4];
    const EXPECTED_LARGE: [usize; 6] = [2288, 5500, 6450, 23241, 15519, 1142];
    const EXPECTED_MANY: [usize; 25] =
        [0, 25, 29, 11, 20, 19, 15, 24, 14, 4, 2, 5, 3, 27, 23, 21, 17, 1, 10, 8, 7, 12, 26, 28, 6];
    const EXPECTED_LATE: [usize; 3] = [369, 465, 778];
}
