//! Every gradient that an operation returns, against central differences of its equation in f64, at awkward
//! shapes, with poisoned or filled outputs, and with the same bits on every tier and number of threads.

mod support;

use mmfree_kernels::attention::{self, AttentionScratch, Shape};
use mmfree_kernels::bit_linear::{self, BitLinear, BitLinearScratch};
use mmfree_kernels::column_sum::ColumnScratch;
use mmfree_kernels::cross_entropy::{self, IGNORED};
use mmfree_kernels::gemm::{self, Matrix};
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::rope::RopeTable;
use mmfree_kernels::ternary::{Layout, TernaryMatrix, absmean_scale, quantize_trits};
use mmfree_kernels::tier::Backend;
use mmfree_kernels::{adamw, embedding, mlgru, norm_gate, rms_norm, swiglu};

use support::{Random, pools, same_on_every_tier, sigmoid, within_budget};

/// Rows and width: single elements, around the number of lanes, around the rows of a partial sum.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 2), (2, 33), (33, 31), (65, 7), (2, 129)];

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn detected() -> (Backend, Pool) {
    let [_, pool] = pools();
    (Backend::detect(), pool)
}

fn dot(x: &[f64], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, &y)| x * f64::from(y)).sum()
}

/// Demands that `found` are the derivatives of `function` at `inputs`, each within 2e-5 of its size or of
/// that of a typical one.
fn are_derivatives(what: &str, found: &[f32], inputs: &[f32], function: impl Fn(&[f64]) -> f64) {
    assert_eq!(found.len(), inputs.len(), "{what}");
    let mut at = widen(inputs);
    let typical =
        (found.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>() / found.len() as f64).sqrt();
    // At most 150 elements: differences cost two evaluations each.
    for index in (0..found.len()).step_by(found.len().div_ceil(150)) {
        let (here, step) = (at[index], 1e-4);
        let mut value = |x: f64| {
            at[index] = x;
            function(&at)
        };
        let slope = |step: f64, value: &mut dyn FnMut(f64) -> f64| {
            (value(here + step) - value(here - step)) / (2.0 * step)
        };
        // Richardson's extrapolation: the error is of the fourth order.
        let expected = (4.0 * slope(step, &mut value) - slope(2.0 * step, &mut value)) / 3.0;
        at[index] = here;
        let error = (f64::from(found[index]) - expected).abs();
        let budget = 2e-5 * (expected.abs() + typical) + 2e-6;
        assert!(error <= budget, "{what}[{index}]: {} instead of {expected}", found[index]);
    }
}

#[test]
#[should_panic(expected = "instead of")]
fn a_wrong_derivative_is_noticed() {
    are_derivatives("x²", &[2.0001], &[1.0], |x| x[0] * x[0]);
}

fn rms_norm_f64(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let rows = x.chunks(w.len()).flat_map(|x| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let inverse = 1.0 / (mean + eps).sqrt();
        x.iter().zip(w).map(move |(x, w)| x * inverse * w)
    });
    rows.collect()
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// `found` minus what was there before: an operation that adds must leave the sum.
fn added(found: &[f32], before: f32) -> Vec<f32> {
    found.iter().map(|x| x - before).collect()
}

#[test]
fn rms_norm() {
    for (rows, width) in SHAPES {
        let mut random = Random(width as u64);
        let (x, w) = (random.floats(rows * width), random.floats(width));
        let dy = random.floats(rows * width);
        let run = |backend, pool: &Pool, before: f32| {
            let (mut dx, mut dw) = (vec![before; x.len()], vec![before; width]);
            let mut scratch = ColumnScratch::new();
            rms_norm::backward(backend, pool, &mut scratch, &x, &w, 1e-3, &dy, &mut dx, &mut dw);
            (dx, dw)
        };
        same_on_every_tier("rms_norm", |backend, pool| {
            let (dx, dw) = run(backend, pool, 0.0);
            [dx, dw].concat()
        });
        let (backend, pool) = detected();
        let (dx, dw) = run(backend, &pool, 0.0);
        let (x64, w64) = (widen(&x), widen(&w));
        are_derivatives("dx", &dx, &x, |x| dot(&rms_norm_f64(x, &w64, 1e-3), &dy));
        are_derivatives("dw", &dw, &w, |w| dot(&rms_norm_f64(&x64, w, 1e-3), &dy));
        let (dx_added, dw_added) = run(backend, &pool, 8.0);
        within_budget(&added(&dw_added, 8.0), &widen(&dw));
        within_budget(&added(&dx_added, 8.0), &widen(&dx));
    }
}

#[test]
fn norm_gate() {
    for (rows, width) in SHAPES {
        let mut random = Random(width as u64 + 1);
        let (g, h) = (random.floats(rows * width), random.floats(rows * width));
        let (w, dy) = (random.floats(width), random.floats(rows * width));
        let run = |backend, pool: &Pool| {
            let (mut dg, mut dh) = (vec![f32::NAN; g.len()], vec![f32::NAN; g.len()]);
            let mut dw = vec![0.0; width];
            let mut scratch = ColumnScratch::new();
            norm_gate::backward(
                backend,
                pool,
                &mut scratch,
                &g,
                &h,
                &w,
                1e-3,
                &dy,
                &mut dg,
                &mut dh,
                &mut dw,
            );
            [dg, dh, dw]
        };
        same_on_every_tier("norm_gate", |backend, pool| run(backend, pool).concat());
        let (backend, pool) = detected();
        let [dg, dh, dw] = run(backend, &pool);
        let loss = |g: &[f64], h: &[f64], w: &[f64]| {
            let y: Vec<f64> =
                rms_norm_f64(g, w, 1e-3).iter().zip(h).map(|(n, &h)| n * silu(h)).collect();
            dot(&y, &dy)
        };
        let (g64, h64, w64) = (widen(&g), widen(&h), widen(&w));
        are_derivatives("dg", &dg, &g, |g| loss(g, &h64, &w64));
        are_derivatives("dh", &dh, &h, |h| loss(&g64, h, &w64));
        are_derivatives("dw", &dw, &w, |w| loss(&g64, &h64, w));
    }
}

#[test]
fn swiglu() {
    for (rows, width) in SHAPES {
        let mut random = Random(width as u64 + 2);
        let (ab, dy) = (random.floats(2 * rows * width), random.floats(rows * width));
        let run = |backend, pool: &Pool| {
            let mut d_ab = vec![f32::NAN; ab.len()];
            swiglu::backward(backend, pool, &ab, width, &dy, &mut d_ab);
            d_ab
        };
        same_on_every_tier("swiglu", run);
        let (backend, pool) = detected();
        are_derivatives("d_ab", &run(backend, &pool), &ab, |ab| {
            let rows = ab.chunks(2 * width);
            let y: Vec<f64> =
                rows.flat_map(|row| (0..width).map(|c| silu(row[c]) * row[width + c])).collect();
            dot(&y, &dy)
        });
    }
}

/// States [B, T, D] and last states [B, D] of the recurrence.
fn mlgru_f64(i: &[f64], f: &[f64], beta: &[f64], initial: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (width, sequences) = (beta.len(), initial.len() / beta.len());
    let steps = i.len() / initial.len();
    let (mut all, mut last) = (Vec::new(), initial.to_vec());
    for sequence in 0..sequences {
        let state = &mut last[sequence * width..][..width];
        for step in 0..steps {
            for (c, h) in state.iter_mut().enumerate() {
                let at = (sequence * steps + step) * width + c;
                let forget = beta[c] + (1.0 - beta[c]) * sigmoid(f[at]);
                *h = forget * *h + silu(i[at]) * (1.0 - forget);
                all.push(*h);
            }
        }
    }
    (all, last)
}

#[test]
fn mlgru_with_initial_and_last_states() {
    for (sequences, steps, width) in [(1, 1, 1), (2, 3, 33), (3, 7, 5), (2, 2, 131)] {
        let mut random = Random(width as u64 + 3);
        let len = sequences * steps * width;
        let (i, f, dh) = (random.floats(len), random.floats(len), random.floats(len));
        let beta: Vec<f32> = random.floats(width).iter().map(|x| x.abs() / 4.0).collect();
        let states = sequences * width;
        let (initial, d_last) = (random.floats(states), random.floats(states));
        let run = |backend, pool: &Pool, initial: Option<&[f32]>| {
            let (mut h, mut last) = (vec![f32::NAN; len], vec![f32::NAN; states]);
            mlgru::forward_batch(backend, pool, &i, &f, &beta, initial, &mut h, &mut last);
            let (mut di, mut df) = (vec![f32::NAN; len], vec![f32::NAN; len]);
            let (mut d_beta, mut d_state) = (vec![0.0; width], d_last.clone());
            let mut scratch = ColumnScratch::new();
            mlgru::backward_batch(
                backend,
                pool,
                &mut scratch,
                &i,
                &f,
                &beta,
                initial,
                &h,
                &dh,
                &mut di,
                &mut df,
                &mut d_beta,
                &mut d_state,
            );
            [h, last, di, df, d_beta, d_state]
        };
        for with_initial in [true, false] {
            let start = with_initial.then_some(&initial[..]);
            same_on_every_tier("mlgru", |backend, pool| run(backend, pool, start).concat());
            let (backend, pool) = detected();
            let [h, last, di, df, d_beta, d_state] = run(backend, &pool, start);
            let zeros = vec![0.0; states];
            let start = widen(start.unwrap_or(&zeros));
            let (i64, f64s, beta64) = (widen(&i), widen(&f), widen(&beta));
            let expected = mlgru_f64(&i64, &f64s, &beta64, &start);
            within_budget(&h, &expected.0);
            within_budget(&last, &expected.1);
            let loss = |i: &[f64], f: &[f64], beta: &[f64], start: &[f64]| {
                let (all, last) = mlgru_f64(i, f, beta, start);
                dot(&all, &dh) + dot(&last, &d_last)
            };
            are_derivatives("di", &di, &i, |i| loss(i, &f64s, &beta64, &start));
            are_derivatives("df", &df, &f, |f| loss(&i64, f, &beta64, &start));
            are_derivatives("dβ", &d_beta, &beta, |beta| loss(&i64, &f64s, beta, &start));
            let at: Vec<f32> = start.iter().map(|&x| x as f32).collect();
            are_derivatives("dh_0", &d_state, &at, |start| loss(&i64, &f64s, &beta64, start));
        }
    }
}

#[test]
fn lower_bounds() {
    for (layers, channels) in [(1, 3), (2, 1), (5, 4)] {
        let mut random = Random(layers as u64);
        let bounds = random.floats(layers * channels);
        let d_betas = random.floats(layers * channels);
        let mut found = vec![2.0; bounds.len()];
        mlgru::lower_bounds_backward(&bounds, channels, &d_betas, &mut found);
        are_derivatives("bounds", &added(&found, 2.0), &bounds, |bounds| {
            let mut loss = 0.0;
            for c in 0..channels {
                let p = |layer: usize| bounds[layer * channels + c].exp();
                let total: f64 = (0..layers).map(p).sum();
                let mut beta = 0.0;
                for layer in 1..layers {
                    beta += p(layer) / total;
                    loss += beta * f64::from(d_betas[layer * channels + c]);
                }
            }
            loss
        });
    }
}

#[test]
fn cross_entropy() {
    for (rows, vocabulary) in [(1, 1), (3, 2), (2, 33), (4, 97), (3, 1031)] {
        let mut random = Random(vocabulary as u64);
        let mut logits = random.floats(rows * vocabulary);
        logits[0] += 40.0;
        let mut targets: Vec<u32> =
            (0..rows).map(|_| (random.next() % vocabulary as u64) as u32).collect();
        if rows > 2 {
            targets[1] = IGNORED;
        }
        let run = |backend, pool: &Pool, scale| {
            let (mut z, mut losses) = (logits.clone(), vec![f64::NAN; rows]);
            cross_entropy::forward_backward(backend, pool, &mut z, &targets, scale, &mut losses);
            (z, losses)
        };
        same_on_every_tier("cross_entropy", |backend, pool| {
            let (z, losses) = run(backend, pool, Some(0.25));
            z.into_iter().chain(losses.into_iter().map(|loss| loss as f32)).collect()
        });
        let (backend, pool) = detected();
        let (gradient, losses) = run(backend, &pool, Some(0.25));
        assert_eq!(losses, run(backend, &pool, None).1);
        let loss = |z: &[f64]| -> Vec<f64> {
            let rows = z.chunks(vocabulary).zip(&targets);
            rows.map(|(z, &target)| match target {
                IGNORED => 0.0,
                _ => {
                    let largest = z.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = z.iter().map(|z| (z - largest).exp()).sum();
                    sum.ln() + largest - z[target as usize]
                }
            })
            .collect()
        };
        let losses: Vec<f32> = losses.iter().map(|&loss| loss as f32).collect();
        within_budget(&losses, &loss(&widen(&logits)));
        are_derivatives("logits", &gradient, &logits, |z| 0.25 * loss(z).iter().sum::<f64>());
    }
}

#[test]
fn embedding_rows_and_their_gradients() {
    for width in [1, 63, 64, 200] {
        let mut random = Random(width as u64);
        let table = random.floats(7 * width);
        let tokens = [3, 0, 3, 6, 3];
        let dx = random.floats(tokens.len() * width);
        for pool in pools() {
            let mut x = vec![f32::NAN; tokens.len() * width];
            embedding::forward(&pool, &table, &tokens, &mut x);
            let mut d_table = vec![1.0; table.len()];
            embedding::backward(&pool, &tokens, &dx, &mut d_table);
            let mut expected = vec![1.0f32; table.len()];
            for (m, &token) in tokens.iter().enumerate() {
                let row = token as usize * width..(token as usize + 1) * width;
                assert_eq!(x[m * width..(m + 1) * width], table[row.clone()]);
                for (sum, dx) in expected[row].iter_mut().zip(&dx[m * width..]) {
                    *sum += dx;
                }
            }
            assert_eq!(d_table, expected);
        }
    }
}

/// Trits as [`quantize_trits`] gives them.
fn trits(weights: &[f32]) -> (Vec<i8>, f32) {
    let scale = absmean_scale(weights).expect("finite");
    let mut trits = vec![0; weights.len()];
    quantize_trits(weights, scale, &mut trits);
    (trits, scale)
}

#[test]
fn a_ternary_matrix_takes_new_weights_in_place() {
    let arena = WeightArena::new();
    for (n, k) in [(1, 1), (15, 17), (16, 16), (33, 200), (97, 31)] {
        let mut random = Random((n * k) as u64);
        for pool in pools() {
            for backend in support::backends() {
                let mut matrix = TernaryMatrix::new(&arena, n, k).expect("allocates");
                for _ in 0..2 {
                    let weights = random.floats(n * k);
                    matrix.assign(backend, &pool, &weights).expect("finite");
                    let (expected, scale) = trits(&weights);
                    assert_eq!(matrix.scale(), scale);
                    let same =
                        TernaryMatrix::from_trits(&arena, Layout::TwoBit, n, k, scale, &expected);
                    assert_eq!(matrix.codes(), same.expect("packs").codes());
                }
                assert!(matrix.assign(backend, &pool, &vec![f32::NAN; n * k]).is_err());
                assert!(matrix.assign(backend, &pool, &vec![1.0; n * k + 1]).is_err());
            }
        }
    }
}

#[test]
fn bit_linear_passes_gradients_straight_through() {
    for (m, n, k) in [(1, 1, 1), (3, 17, 31), (33, 64, 40), (2, 130, 97), (70, 1032, 64)] {
        let mut random = Random((m * n * k) as u64);
        let (x, dy) = (random.floats(m * k), random.floats(m * n));
        let (norm, weight) = (random.floats(k), random.floats(n * k));
        let (trits, scale) = trits(&weight);
        let layer = BitLinear { norm: &norm, eps: 1e-6, weight: &weight, scale };
        let run = |backend, pool: &Pool, before: f32| {
            let (mut dx, mut d_norm) = (vec![before; m * k], vec![before; k]);
            let mut d_weight = vec![before; n * k];
            let mut scratch = BitLinearScratch::new();
            bit_linear::backward(
                backend,
                pool,
                &mut scratch,
                layer,
                &x,
                &dy,
                &mut dx,
                &mut d_norm,
                &mut d_weight,
            );
            [dx, d_norm, d_weight]
        };
        let (backend, pool) = detected();
        let [dx, d_norm, d_weight] = run(backend, &pool, 0.0);
        for pool in pools() {
            assert_eq!(run(backend, &pool, 0.0).concat(), [&dx[..], &d_norm, &d_weight].concat());
        }
        for (added_up, alone) in run(backend, &pool, 1.0).iter().zip([&dx, &d_norm, &d_weight]) {
            let size = alone.iter().fold(1.0f32, |a, &b| a.max(b.abs()));
            for (sum, alone) in added_up.iter().zip(alone) {
                assert!((sum - 1.0 - alone).abs() <= 1e-6 * size, "{sum} is not 1 + {alone}");
            }
        }
        // What the quantised layer would give if its quantisers were the identity with these trits. That is linear in the
        // normed inputs: their coefficients are summed up once, and not again for each of the differences.
        let (norm64, x64) = (widen(&norm), widen(&x));
        let mut coefficients = vec![0.0f64; m * k];
        for (row, dy) in coefficients.chunks_mut(k).zip(dy.chunks(n)) {
            for (trits, &dy) in trits.chunks(k).zip(dy) {
                for (sum, &trit) in row.iter_mut().zip(trits) {
                    *sum += f64::from(dy) * f64::from(trit) * f64::from(scale);
                }
            }
        }
        let product =
            |normed: &[f64]| -> f64 { normed.iter().zip(&coefficients).map(|(x, c)| x * c).sum() };
        are_derivatives("dx", &dx, &x, |x| product(&rms_norm_f64(x, &norm64, 1e-6)));
        are_derivatives("dw_n", &d_norm, &norm, |w| product(&rms_norm_f64(&x64, w, 1e-6)));
        let mut expected = vec![0.0f64; n * k];
        for (x, dy) in x.chunks(k).zip(dy.chunks(n)) {
            let normed = rms_norm_f64(&widen(x), &norm64, 1e-6);
            let s = 127.0 / normed.iter().fold(1e-5f64, |a, y| a.max(y.abs()));
            for (row, &dy) in expected.chunks_mut(k).zip(dy) {
                for (sum, y) in row.iter_mut().zip(&normed) {
                    *sum += f64::from(dy) * ((y * s).round_ties_even() / s);
                }
            }
        }
        let size = expected.iter().fold(1.0f64, |a, b| a.max(b.abs()));
        for (found, expected) in d_weight.iter().zip(&expected) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 3e-6 * size, "{found} instead of {expected}");
        }
    }
}

#[test]
fn dense_products_at_awkward_shapes() {
    for (m, n, k) in [(1, 1, 1), (0, 3, 2), (3, 0, 2), (5, 7, 0), (127, 33, 65), (300, 129, 200)] {
        let mut random = Random((m + n + k) as u64);
        let (a, b) = (random.floats(m * k), random.floats(k * n));
        for transposed in [false, true] {
            let (a, b) = if transposed {
                (Matrix::new(&a, k, m).transposed(), Matrix::new(&b, n, k).transposed())
            } else {
                (Matrix::new(&a, m, k), Matrix::new(&b, k, n))
            };
            let mut first: Option<Vec<f32>> = None;
            for pool in pools() {
                let mut set = vec![f32::NAN; m * n];
                gemm::multiply(&pool, a, b, 0.5, false, &mut set);
                let mut sum = vec![3.0; m * n];
                gemm::multiply(&pool, a, b, 0.5, true, &mut sum);
                for row in 0..m {
                    for col in 0..n {
                        let terms =
                            (0..k).map(|i| f64::from(a.get(row, i)) * f64::from(b.get(i, col)));
                        let size: f64 = terms.clone().map(f64::abs).sum();
                        let budget = 4.0 * 6e-8 * size + 1e-6;
                        let expected = 0.5 * terms.sum::<f64>();
                        let (set, sum) =
                            (f64::from(set[row * n + col]), f64::from(sum[row * n + col]));
                        assert!((set - expected).abs() <= budget);
                        assert!((sum - 3.0 - expected).abs() <= budget);
                    }
                }
                assert_eq!(first.get_or_insert_with(|| set.clone()), &set);
            }
        }
    }
}

/// Outputs [T, size] of one head.
fn attention_f64(q: &[f64], k: &[f64], v: &[f64], size: usize) -> Vec<f64> {
    let scale = 1.0 / (size as f64).sqrt();
    let mut y = Vec::new();
    for (t, q) in q.chunks(size).enumerate() {
        let product = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale;
        let p: Vec<f64> = k.chunks(size).take(t + 1).map(|k| product(k).exp()).collect();
        let total: f64 = p.iter().sum();
        for c in 0..size {
            y.push(p.iter().enumerate().map(|(s, p)| p * v[s * size + c]).sum::<f64>() / total);
        }
    }
    y
}

/// Outputs of every head, from `qkv` [M, 3D] to [M, D].
fn all_heads_f64(shape: Shape, qkv: &[f64]) -> Vec<f64> {
    let Shape { sequences, length, heads, head_size } = shape;
    let width = heads * head_size;
    let mut y = vec![0.0; sequences * length * width];
    for sequence in 0..sequences {
        for head in 0..heads {
            let part = |which: usize| -> Vec<f64> {
                let rows = qkv[sequence * length * 3 * width..].chunks(3 * width).take(length);
                let first = which * width + head * head_size;
                rows.flat_map(|row| &row[first..first + head_size]).copied().collect()
            };
            let out = attention_f64(&part(0), &part(1), &part(2), head_size);
            for (step, out) in out.chunks(head_size).enumerate() {
                let at = (sequence * length + step) * width + head * head_size;
                y[at..at + head_size].copy_from_slice(out);
            }
        }
    }
    y
}

#[test]
fn attention_forward_and_backward() {
    for (sequences, length, heads, head_size) in
        [(1, 1, 1, 2), (2, 5, 3, 4), (1, 64, 2, 6), (1, 65, 1, 8), (2, 131, 1, 2)]
    {
        let shape = Shape { sequences, length, heads, head_size };
        let mut random = Random(length as u64);
        let width = heads * head_size;
        let tokens = sequences * length;
        let (qkv, dy) = (random.floats(tokens * 3 * width), random.floats(tokens * width));
        let run = |backend, pool: &Pool| {
            let scratch = AttentionScratch::new(pool.threads());
            let (mut y, mut log_sums) =
                (vec![f32::NAN; tokens * width], vec![f32::NAN; tokens * heads]);
            attention::forward(backend, pool, &scratch, shape, &qkv, &mut y, &mut log_sums);
            let mut d_qkv = vec![f32::NAN; qkv.len()];
            attention::backward(
                backend, pool, &scratch, shape, &qkv, &y, &log_sums, &dy, &mut d_qkv,
            );
            [y, d_qkv]
        };
        same_on_every_tier("attention", |backend, pool| run(backend, pool).concat());
        let (backend, pool) = detected();
        let [y, d_qkv] = run(backend, &pool);
        for (found, expected) in y.iter().zip(all_heads_f64(shape, &widen(&qkv))) {
            assert!((f64::from(*found) - expected).abs() < 2e-5, "{found} instead of {expected}");
        }
        are_derivatives("d_qkv", &d_qkv, &qkv, |qkv| dot(&all_heads_f64(shape, qkv), &dy));
    }
}

#[test]
fn rope_turns_pairs_and_back() {
    let (length, heads, size, theta) = (5, 2, 6, 100.0f32);
    let (width, stride) = (heads * size, 3 * heads * size);
    let x = Random(1).floats(2 * length * stride);
    let mut table = RopeTable::new();
    table.assign(length, size, theta);
    for pool in pools() {
        let mut turned = x.clone();
        table.rotate(&pool, &mut turned, stride, 2 * width, false);
        for (row, (x, turned)) in x.chunks(stride).zip(turned.chunks(stride)).enumerate() {
            assert_eq!(x[2 * width..], turned[2 * width..]);
            for (column, &found) in turned[..2 * width].iter().enumerate() {
                let (head, at) = (column / size * size, column % size);
                let half = size / 2;
                let j = at % half;
                let angle =
                    (row % length) as f64 * f64::from(theta).powf(-2.0 * j as f64 / size as f64);
                let (low, high) = (f64::from(x[head + j]), f64::from(x[head + j + half]));
                let expected = if at < half {
                    low * angle.cos() - high * angle.sin()
                } else {
                    high * angle.cos() + low * angle.sin()
                };
                assert!((f64::from(found) - expected).abs() < 2e-6);
            }
        }
        table.rotate(&pool, &mut turned, stride, 2 * width, true);
        within_budget(&turned, &widen(&x));
    }
}

#[test]
fn gradients_are_clipped_down_only_and_a_loss_or_norm_that_is_no_number_ends_it() {
    assert_eq!(adamw::clip(0.0, &[1.0], &[0.25], 1.0), (0.5, 1.0));
    let (norm, factor) = adamw::clip(1.0, &[1.0, 2.0], &[9.0, 7.0], 1.0);
    assert!(norm == 4.0 && (factor - 0.25).abs() < 1e-6 && factor == f64::from(factor as f32));
    assert_eq!(adamw::clip(1.0, &[], &[16.0], 0.0), (4.0, 1.0));
    for (factor, loss, square) in [
        (1.0, f64::NAN, 1.0),
        (1.0, f64::INFINITY, 1.0),
        (1.0, 1.0, f64::NAN),
        (1.0, 1.0, f64::INFINITY),
        (f64::NAN, 1.0, 1.0),
    ] {
        for max_norm in [0.0, 1.0] {
            let (_, factor) = adamw::clip(factor, &[0.5, loss], &[square, 1.0], max_norm);
            assert!(factor.is_nan(), "{loss} {square} {max_norm}");
        }
    }
}

#[test]
fn adamw_follows_its_equation() {
    for len in [1, 33, 40_000] {
        let mut random = Random(len as u64);
        let start = random.floats(len);
        let gradients: Vec<Vec<f32>> = (0..3).map(|_| random.floats(len)).collect();
        let constants = |step| adamw::AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
        };
        let run = |backend, pool: &Pool| {
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
            for (step, g) in gradients.iter().enumerate() {
                let constants = constants(step as u64 + 1);
                adamw::step(backend, pool, &constants, 0.5, &mut p, g, &mut m, &mut v);
            }
            let norm = adamw::sum_of_squares(backend, pool, &p) as f32;
            [p, m, v, vec![norm]].concat()
        };
        same_on_every_tier("adamw", run);
        let (backend, pool) = detected();
        let found = run(backend, &pool);
        let mut expected = vec![Vec::new(); 3];
        for (index, &start) in start.iter().enumerate() {
            let (mut p, mut m, mut v) = (f64::from(start), 0.0, 0.0);
            for (step, g) in gradients.iter().enumerate() {
                let (g, t) = (0.5 * f64::from(g[index]), step as i32 + 1);
                p *= 1.0 - 0.01 * 0.1;
                m = 0.9 * m + 0.1 * g;
                v = 0.95 * v + 0.05 * g * g;
                let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.95f64.powi(t)));
                p -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            }
            [p, m, v].into_iter().zip(&mut expected).for_each(|(x, all)| all.push(x));
        }
        let squares: f64 = expected[0].iter().map(|p| p * p).sum();
        assert!((f64::from(found[3 * len]) / squares - 1.0).abs() < 1e-5);
        within_budget(&found[..3 * len], &expected.concat());
    }
}
