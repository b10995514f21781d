//! What the suites share: tiers and pools to run on, a generator, and budgets.

use std::num::NonZeroUsize;

use mmfree_kernels::pool::Pool;
use mmfree_kernels::tier::{Backend, Tier};

pub fn backends() -> Vec<Backend> {
    let tiers: Vec<_> = Tier::available().collect();
    let names: Vec<_> = tiers.iter().map(|tier| tier.name()).collect();
    println!("tiers that ran: {}", names.join(", "));
    if let Ok(required) = std::env::var("MMFREE_REQUIRE_TIERS") {
        for tier in required.split(',').filter(|tier| !tier.is_empty()) {
            assert!(names.contains(&tier), "required tier {tier} does not run on this processor");
        }
    }
    tiers.into_iter().map(|tier| Backend::new(tier).expect("available")).collect()
}

pub fn pools() -> [Pool; 2] {
    [1, 3].map(|threads| Pool::new(NonZeroUsize::new(threads).expect("not zero")))
}

/// A small generator with a good spread (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn float(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * 4.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

/// Runs an operation on every tier and pool and demands the same bits.
pub fn same_on_every_tier(what: &str, run: impl Fn(Backend, &Pool) -> Vec<f32>) {
    let mut first: Option<Vec<u32>> = None;
    for pool in pools() {
        for backend in backends() {
            let bits: Vec<u32> = run(backend, &pool).iter().map(|y| y.to_bits()).collect();
            let first = first.get_or_insert_with(|| bits.clone());
            assert!(
                *first == bits,
                "{what} differs on {} with {} threads",
                backend.tier(),
                pool.threads()
            );
        }
    }
}

/// Demands `|found − expected| ≤ 2e-6 · (1 + |expected|)` and reports the worst share of that budget.
pub fn within_budget(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let mut worst = 0.0f64;
    for (f, e) in found.iter().zip(expected) {
        let used = (f64::from(*f) - e).abs() / (2e-6 * (1.0 + e.abs()));
        assert!(used <= 1.0, "found {f}, expected {e}: {:.0} % of the budget", used * 100.0);
        worst = worst.max(used);
    }
    println!("used {:.0} % of the budget", worst * 100.0);
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
