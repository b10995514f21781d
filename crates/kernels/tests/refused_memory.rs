//! What the products do if the system refuses the memory of their tables. A process of its own: the limit is the
//! process's.
#![cfg(target_os = "linux")]

use std::fs;
use std::num::NonZeroUsize;

use mmfree_kernels::activations::QuantizedRows;
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::ternary::{Layout, TernaryMatrix};
use mmfree_kernels::ternary_gemm::{LookupScratch, Product, multiply};
use mmfree_kernels::tier::{Backend, Tier};

/// Limits the address space of this process to `room` bytes more than it has; until it is dropped.
struct Limit(libc::rlimit);

impl Limit {
    fn new(room: u64) -> Self {
        let pages = fs::read_to_string("/proc/self/statm").expect("readable");
        let pages: u64 = pages.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the pointer is to a structure of the right type that lives during the call.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut before) }, 0);
        set(libc::rlimit { rlim_cur: 4096 * pages + room, ..before });
        Self(before)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        set(self.0);
    }
}

fn set(limit: libc::rlimit) {
    // SAFETY: the pointer is to a structure of the right type that lives during the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
}

/// Dot products need no tables: the result is the same to the bit.
#[test]
fn products_are_the_same_without_memory_for_tables() {
    let (m, n, k) = (64, 2100, 1030);
    let q: Vec<i8> = (0..m * k).map(|i| (i * 37 % 255) as i16 - 127).map(|q| q as i8).collect();
    let trits: Vec<i8> = (0..n * k).map(|i| (i * 7 / 5 % 3) as i8 - 1).collect();
    let input = QuantizedRows::from_parts(m, k, &q, &vec![3.0; m]).expect("valid parts");
    let arena = WeightArena::new();
    let pool = Pool::new(NonZeroUsize::new(2).expect("not zero"));
    for layout in [Layout::TwoBit, Layout::Base3] {
        let weights = TernaryMatrix::from_trits(&arena, layout, n, k, 0.5, &trits).expect("packs");
        for backend in Tier::available().map(|tier| Backend::new(tier).expect("available")) {
            let product = |output: &mut [f32]| {
                let mut scratch = LookupScratch::new(pool.threads());
                let product = Product { weights: &weights, input: &input, output };
                multiply(backend, &pool, &mut scratch, &mut [product]);
            };
            let (mut with, mut without) = (vec![0.0; m * n], vec![f32::NAN; m * n]);
            product(&mut with);
            {
                let _limit = Limit::new(64 << 20);
                if WeightArena::new().allocate(1).is_ok() {
                    eprintln!("nothing was refused: this system does not keep the limit");
                    return;
                }
                product(&mut without);
            }
            assert!(with == without, "{} with {layout:?}", backend.tier());
        }
    }
}
