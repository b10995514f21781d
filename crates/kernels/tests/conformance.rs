//! One suite for every tier: each must agree with a naive reference, or with the scalar tier, to the bit.
//!
//! `MMFREE_REQUIRE_TIERS=avx2,avx512` makes the absence of a tier a failure; otherwise the tiers that
//! ran are printed.

mod support;

use mmfree_kernels::activations::QuantizedRows;
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::ternary::{Layout, TernaryMatrix};
use mmfree_kernels::ternary_gemm::{LookupScratch, Product, multiply};
use mmfree_kernels::tier::Backend;
use mmfree_kernels::{mlgru, norm_gate, rms_norm, swiglu};

use support::{Random, backends, pools, same_on_every_tier, sigmoid, within_budget};

fn reference(n: usize, k: usize, q: &[i8], trits: &[i8], factor: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(q.len() / k * n);
    for q in q.chunks(k) {
        for trits in trits.chunks(k) {
            let sum: i32 = q.iter().zip(trits).map(|(&q, &t)| i32::from(q) * i32::from(t)).sum();
            out.push(sum as f32 * factor);
        }
    }
    out
}

fn check_product(m: usize, n: usize, k: usize, fill: impl Fn(&mut Random) -> (i8, i8)) {
    let mut random = Random((m * 1_000_003 + n * 1009 + k) as u64);
    let q: Vec<i8> = (0..m * k).map(|_| fill(&mut random).0).collect();
    let trits: Vec<i8> = (0..n * k).map(|_| fill(&mut random).1).collect();
    let input = QuantizedRows::from_parts(m, k, &q, &vec![3.0; m]).expect("valid parts");
    let arena = WeightArena::new();
    let matrices = [Layout::TwoBit, Layout::Base3]
        .map(|layout| TernaryMatrix::from_trits(&arena, layout, n, k, 0.5, &trits).expect("packs"));
    let expected = reference(n, k, &q, &trits, 0.5 / 3.0);
    for (weights, pool) in matrices.iter().flat_map(|weights| pools().map(|pool| (weights, pool))) {
        for backend in backends() {
            let mut output = vec![f32::NAN; m * n];
            let mut scratch = LookupScratch::new(pool.threads());
            multiply(
                backend,
                &pool,
                &mut scratch,
                &mut [Product { weights, input: &input, output: &mut output }],
            );
            for (i, (y, e)) in output.iter().zip(&expected).enumerate() {
                assert!(
                    y == e,
                    "{} with {:?} at {m} x {n} x {k}, token {} row {}: {y} instead of {e}",
                    backend.tier(),
                    weights.layout(),
                    i / n,
                    i % n
                );
            }
        }
    }
}

#[test]
fn products_are_exact_at_awkward_shapes() {
    for (m, n, k) in [
        (1, 1, 1),
        (1, 16, 16),
        (1, 15, 17),
        (1, 97, 64),
        (1, 509, 192),
        (1, 33, 1031),
        (2, 17, 33),
        (3, 31, 31),
        (4, 64, 63),
        (5, 16, 15),
        (7, 97, 65),
        (11, 40, 47),
        (12, 16, 1),
        (12, 17, 31),
        (13, 97, 64),
        (16, 33, 257),
        (17, 31, 255),
        (31, 16, 256),
        (32, 48, 288),
        (33, 509, 192),
        (47, 18, 513),
        (64, 2100, 40),
        (33, 1024, 97),
        (60, 1100, 300),
        (31, 1042, 31),
        (32, 1025, 1),
        (33, 1027, 257),
        (64, 1032, 1030),
        (65, 16, 1030),
        // Tiles of tokens (16), of inputs (64), blocks of inputs (320 or 640) and groups of panels (32 and 64 rows).
        (4, 33, 320),
        (5, 65, 640),
        (9, 129, 321),
        (15, 64, 704),
        (17, 33, 639),
        (31, 47, 1281),
        (49, 32, 64),
        (100, 1000, 1344),
        // Two blocks of tokens.
        (40, 16, 60_000),
        (33, 6000, 33),
    ] {
        check_product(m, n, k, |random| {
            let q = (random.next() % 255) as i16 - 127;
            (q as i8, (random.next() % 3) as i8 - 1)
        });
    }
}

/// The largest sums that activations and trits can make must not overflow on the way.
#[test]
fn products_are_exact_at_the_extremes() {
    for m in [1, 4, 12, 24, 33] {
        for sign in [1i8, -1] {
            check_product(m, 1032, 1300, |_| (127 * sign, 1));
            check_product(m, 1032, 1300, |_| (127 * sign, -1));
            check_product(m, 1032, 1300, |_| (127 * sign, 0));
        }
    }
}

#[test]
fn several_products_in_one_call_equal_one_after_the_other() {
    let mut random = Random(5);
    let arena = WeightArena::new();
    let shapes = [(48, 64), (1500, 96), (7, 64)];
    let weights: Vec<_> = shapes
        .iter()
        .map(|&(n, k)| {
            let trits: Vec<i8> = (0..n * k).map(|_| (random.next() % 3) as i8 - 1).collect();
            TernaryMatrix::from_trits(&arena, Layout::Base3, n, k, 0.25, &trits).expect("packs")
        })
        .collect();
    for m in [1, 3, 9, 40] {
        let inputs: Vec<_> = shapes
            .iter()
            .map(|&(_, k)| {
                let q: Vec<i8> =
                    (0..m * k).map(|_| (random.next() % 200) as u8 as i8 / 2).collect();
                QuantizedRows::from_parts(m, k, &q, &vec![2.0; m]).expect("valid parts")
            })
            .collect();
        for pool in pools() {
            for backend in backends() {
                let mut scratch = LookupScratch::new(pool.threads());
                let mut together: Vec<_> = shapes.map(|(n, _)| vec![f32::NAN; m * n]).into();
                let mut products: Vec<_> = weights
                    .iter()
                    .zip(&inputs)
                    .zip(&mut together)
                    .map(|((weights, input), output)| Product { weights, input, output })
                    .collect();
                multiply(backend, &pool, &mut scratch, &mut products);
                for ((weights, input), together) in weights.iter().zip(&inputs).zip(&together) {
                    let mut alone = vec![f32::NAN; together.len()];
                    let product = Product { weights, input, output: &mut alone };
                    multiply(backend, &pool, &mut scratch, &mut [product]);
                    assert_eq!(&alone, together);
                }
            }
        }
    }
}

const WIDTHS: [usize; 9] = [1, 2, 31, 32, 33, 64, 97, 192, 1031];

#[test]
#[should_panic(expected = "% of the budget")]
fn the_budget_rejects_a_wrong_value() {
    within_budget(&[1.0 + 1e-5], &[1.0]);
}

fn rms_norm_f64(x: &[f32], w: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean + eps).sqrt();
    x.iter().zip(w).map(|(&x, &w)| f64::from(x) * inverse * f64::from(w)).collect()
}

#[test]
fn rms_norm_follows_its_equation_with_the_same_bits_everywhere() {
    for width in WIDTHS {
        let mut random = Random(width as u64);
        let (x, w) = (random.floats(3 * width), random.floats(width));
        let run = |backend, pool: &Pool| {
            let mut y = vec![f32::NAN; 3 * width];
            rms_norm::forward(backend, pool, &x, &w, 1e-6, &mut y);
            y
        };
        same_on_every_tier("rms_norm", run);
        let y = run(Backend::detect(), &pools()[0]);
        for (x, y) in x.chunks(width).zip(y.chunks(width)) {
            within_budget(y, &rms_norm_f64(x, &w, 1e-6));
        }
    }
}

#[test]
fn the_quantiser_follows_its_equation_with_the_same_bits_everywhere() {
    for width in WIDTHS {
        let mut random = Random(width as u64 + 77);
        let (x, w) = (random.floats(4 * width), random.floats(width));
        let run = |backend, pool: &Pool| {
            let mut rows = QuantizedRows::new();
            // A former, larger shape must leave nothing behind.
            rows.assign_rms_norm(backend, pool, &[9.0; 2000], &[1.0; 1000], 1e-6);
            rows.assign_rms_norm(backend, pool, &x, &w, 1e-6);
            (0..4)
                .flat_map(|row| {
                    let scale = rows.scale(row);
                    rows.row(row).iter().map(|&q| f32::from(q)).chain([scale]).collect::<Vec<_>>()
                })
                .collect()
        };
        same_on_every_tier("Q8(RMSNorm)", run);
        let found = run(Backend::detect(), &pools()[0]);
        for (x, found) in x.chunks(width).zip(found.chunks(width + 1)) {
            let y = rms_norm_f64(x, &w, 1e-6);
            let scale = 127.0 / y.iter().fold(1e-5f64, |a, y| a.max(y.abs()));
            assert!((f64::from(found[width]) / scale - 1.0).abs() < 1e-6);
            for (y, q) in y.iter().zip(found) {
                assert!((y * scale - f64::from(*q)).abs() < 0.5001, "{} became {q}", y * scale);
            }
        }
    }
}

#[test]
fn the_quantiser_survives_zeros_and_huge_values() {
    for backend in backends() {
        let pool = &pools()[0];
        let mut rows = QuantizedRows::new();
        for x in [0.0, 1e-30, 1e30, f32::INFINITY, f32::NAN] {
            rows.assign_rms_norm(backend, pool, &[x; 40], &[1.0; 40], 1e-6);
            assert!(rows.row(0).iter().all(|&q| q >= -127));
        }
        rows.assign_rms_norm(backend, pool, &[0.0; 40], &[1.0; 40], 1e-6);
        assert_eq!(rows.row(0), [0; 40]);
        assert_eq!(rows.scale(0), 127.0 / 1e-5);
    }
}

#[test]
fn the_recurrence_follows_its_equation_with_the_same_bits_everywhere() {
    for (steps, width) in [(1, 1), (1, 33), (3, 97), (40, 520)] {
        let mut random = Random(width as u64 + 5);
        let (i, f) = (random.floats(steps * width), random.floats(steps * width));
        let beta: Vec<f32> = random.floats(width).iter().map(|x| x.abs() / 4.0).collect();
        let start = random.floats(width);
        let run = |backend, pool: &Pool| {
            let (mut h, mut state) = (i.clone(), start.clone());
            mlgru::forward(backend, pool, &mut h, &f, &beta, &mut state);
            h.extend(state);
            h
        };
        same_on_every_tier("mlgru", run);
        let found = run(Backend::detect(), &pools()[1]);
        let mut state: Vec<f64> = start.iter().map(|&h| f64::from(h)).collect();
        let mut expected = Vec::new();
        for step in 0..steps {
            for c in 0..width {
                let (i, f) = (f64::from(i[step * width + c]), f64::from(f[step * width + c]));
                let forget = f64::from(beta[c]) + (1.0 - f64::from(beta[c])) * sigmoid(f);
                state[c] = forget * state[c] + i * sigmoid(i) * (1.0 - forget);
                expected.push(state[c]);
            }
        }
        expected.extend(&state);
        within_budget(&found, &expected);
        // One step after the other is the same as all at once.
        let (mut h, mut state) = (i.clone(), start.clone());
        for (h, f) in h.chunks_mut(width).zip(f.chunks(width)) {
            mlgru::forward(Backend::detect(), &pools()[0], h, f, &beta, &mut state);
        }
        h.extend(state);
        assert_eq!(h, found);
    }
}

#[test]
fn the_gates_follow_their_equations_with_the_same_bits_everywhere() {
    for width in WIDTHS {
        let mut random = Random(width as u64 + 9);
        let (g, h, w) = (random.floats(2 * width), random.floats(2 * width), random.floats(width));
        let gate = |backend, pool: &Pool| {
            let mut g = g.clone();
            norm_gate::forward(backend, pool, &mut g, &h, &w, 1e-5);
            g
        };
        same_on_every_tier("norm_gate", gate);
        let found = gate(Backend::detect(), &pools()[0]);
        for ((g, h), found) in g.chunks(width).zip(h.chunks(width)).zip(found.chunks(width)) {
            let expected: Vec<f64> = rms_norm_f64(g, &w, 1e-5)
                .iter()
                .zip(h)
                .map(|(g, &h)| g * f64::from(h) * sigmoid(f64::from(h)))
                .collect();
            within_budget(found, &expected);
        }
        let unit = |backend, pool: &Pool| {
            let mut y = vec![f32::NAN; width];
            swiglu::forward(backend, pool, &g, width, &mut y);
            y
        };
        same_on_every_tier("swiglu", unit);
        let expected: Vec<f64> = (0..width)
            .map(|c| {
                let (a, b) = (f64::from(g[c]), f64::from(g[width + c]));
                a * sigmoid(a) * b
            })
            .collect();
        within_budget(&unit(Backend::detect(), &pools()[0]), &expected);
    }
}
