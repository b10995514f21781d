//! Causal softmax attention, forward and backward, block by block: no [T, T] matrix exists.
//!
//! ```text
//! p_ts = exp(q_t · k_s · c − lse_t) for s ≤ t,  c = 1 / sqrt(head_size),  lse_t = ln Σ_s exp(q_t · k_s · c)
//! y_t = Σ_s p_ts v_s
//! δ_t = dy_t · y_t        a_ts = p_ts (dy_t · v_s − δ_t) c
//! dq_t = Σ_s a_ts k_s     dk_s = Σ_t a_ts q_t     dv_s = Σ_t p_ts dy_t
//! ```
//!
//! The forward pass keeps a running maximum and sum for each query (online softmax). One task is one head
//! of one sequence.

use std::sync::Mutex;

use crate::gemm::{Matrix, multiply_alone};
use crate::lanes::{exp, lane_sum, lane_sum3};
use crate::pool::{Pool, SharedMut};
use crate::tier::{Backend, compiled_for_each_tier};

/// Queries and keys of a block.
const BLOCK: usize = 64;

/// Sizes of a batch of attention.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// B.
    pub sequences: usize,
    /// T.
    pub length: usize,
    /// H.
    pub heads: usize,
    /// Width of a head.
    pub head_size: usize,
}

impl Shape {
    /// D.
    fn width(self) -> usize {
        self.heads * self.head_size
    }

    fn tokens(self) -> usize {
        self.sequences * self.length
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_size as f32).sqrt()
    }

    /// Elements of one head of one sequence.
    fn head(self) -> usize {
        self.length * self.head_size
    }
}

/// Working memory, a part for each thread.
#[derive(Debug)]
pub struct AttentionScratch {
    threads: Vec<Mutex<Vec<f32>>>,
}

impl AttentionScratch {
    /// Scratch for a pool of `threads` threads.
    pub fn new(threads: usize) -> Self {
        Self { threads: (0..threads).map(|_| Mutex::default()).collect() }
    }

    /// Runs `task(sequence, head, memory)` for every head, with `len` floats of memory.
    fn for_each_head(
        &self,
        pool: &Pool,
        shape: Shape,
        len: usize,
        task: &(dyn Fn(usize, usize, &mut [f32]) + Sync),
    ) {
        assert!(self.threads.len() >= pool.threads(), "scratch is for fewer threads");
        pool.run(shape.sequences * shape.heads, &|thread, index| {
            let memory = &self.threads[thread];
            let mut memory = memory.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if memory.len() < len {
                memory.resize(len, 0.0);
            }
            task(index / shape.heads, index % shape.heads, &mut memory[..len]);
        });
    }
}

/// Cuts memory into pieces.
fn pieces<const N: usize>(memory: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    let mut rest = memory;
    sizes.map(|size| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(size);
        rest = others;
        piece
    })
}

/// Copies columns `first ..` of the rows of one sequence, `stride` apart, to a matrix [T, head_size].
fn gather(from: &[f32], stride: usize, first: usize, to: &mut [f32], head_size: usize) {
    for (from, to) in from.chunks_exact(stride).zip(to.chunks_exact_mut(head_size)) {
        to.copy_from_slice(&from[first..first + head_size]);
    }
}

/// `y` [M, D] and `log_sums` [M, H] of `qkv` [M, 3D].
///
/// # Panics
/// If the shapes do not fit together.
pub fn forward(
    backend: Backend,
    pool: &Pool,
    scratch: &AttentionScratch,
    shape: Shape,
    qkv: &[f32],
    y: &mut [f32],
    log_sums: &mut [f32],
) {
    let (width, size, length) = (shape.width(), shape.head_size, shape.length);
    assert!(qkv.len() == shape.tokens() * 3 * width && y.len() == shape.tokens() * width);
    assert!(log_sums.len() == shape.tokens() * shape.heads);
    let (y, log_sums) = (SharedMut::new(y), SharedMut::new(log_sums));
    let head = shape.head();
    let sizes = [head, head, head, BLOCK * BLOCK, BLOCK * size, BLOCK, BLOCK];
    scratch.for_each_head(pool, shape, sizes.iter().sum(), &|sequence, number, memory| {
        let [q, k, v, scores, out, largest, sums] = pieces(memory, sizes);
        let rows = &qkv[sequence * length * 3 * width..][..length * 3 * width];
        for (part, to) in [&mut *q, &mut *k, &mut *v].into_iter().enumerate() {
            gather(rows, 3 * width, part * width + number * size, to, size);
        }
        for first in (0..length).step_by(BLOCK) {
            let queries = BLOCK.min(length - first);
            let out = &mut out[..queries * size];
            out.fill(0.0);
            largest.fill(f32::NEG_INFINITY);
            sums.fill(0.0);
            for first_key in (0..=first).step_by(BLOCK) {
                let keys = BLOCK.min(length - first_key);
                let scores = &mut scores[..queries * keys];
                products(q, first, queries, k, first_key, keys, size, shape.scale(), scores);
                for (query, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    // Keys behind the query do not count.
                    let seen = (first + query + 1).saturating_sub(first_key).min(keys);
                    let out = &mut out[query * size..][..size];
                    let state = (&mut largest[query], &mut sums[query]);
                    online_softmax(backend, scores, seen, state.0, state.1, out);
                }
                let p = Matrix::new(scores, queries, keys);
                let v = Matrix::new(&v[first_key * size..][..keys * size], keys, size);
                multiply_alone(p, v, 1.0, true, out);
            }
            for query in 0..queries {
                let row = sequence * length + first + query;
                // SAFETY: each task has its own head of its own sequence, and both slices stay borrowed
                // until all are done.
                let (y, log_sum) = unsafe {
                    (
                        y.slice(row * width + number * size, size),
                        log_sums.slice(row * shape.heads + number, 1),
                    )
                };
                log_sum[0] = largest[query] + sums[query].ln();
                for (y, out) in y.iter_mut().zip(&out[query * size..]) {
                    *y = out / sums[query];
                }
            }
        }
    });
}

/// Scores of a block: `q · k · scale`, [queries, keys].
#[allow(clippy::too_many_arguments)]
fn products(
    q: &[f32],
    first_query: usize,
    queries: usize,
    k: &[f32],
    first_key: usize,
    keys: usize,
    size: usize,
    scale: f32,
    scores: &mut [f32],
) {
    let q = Matrix::new(&q[first_query * size..][..queries * size], queries, size);
    let k = Matrix::new(&k[first_key * size..][..keys * size], keys, size);
    multiply_alone(q, k.transposed(), scale, false, scores);
}

compiled_for_each_tier! {
    /// Turns the first `seen` scores of a query into `exp(score − largest)` and the others into zero, after
    /// bringing maximum, sum and output so far up to date.
    fn online_softmax(
        scores: &mut [f32],
        seen: usize,
        largest: &mut f32,
        sum: &mut f32,
        out: &mut [f32],
    ) = online_softmax_body
}

#[inline(always)]
fn online_softmax_body(
    scores: &mut [f32],
    seen: usize,
    largest: &mut f32,
    sum: &mut f32,
    out: &mut [f32],
) {
    let (scores, rest) = scores.split_at_mut(seen);
    rest.fill(0.0);
    let new = scores.iter().fold(*largest, |a, &b| if b > a { b } else { a });
    if new > *largest {
        // exp of minus infinity would not be zero here: its argument is clamped.
        let shrink = if *sum == 0.0 { 0.0 } else { exp(*largest - new) };
        *sum *= shrink;
        out.iter_mut().for_each(|out| *out *= shrink);
        *largest = new;
    }
    for score in scores.iter_mut() {
        *score = exp(*score - *largest);
    }
    *sum += lane_sum(scores, |e| e);
}

/// Gradients: sets `d_qkv` [M, 3D].
///
/// # Panics
/// If the shapes do not fit together.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    backend: Backend,
    pool: &Pool,
    scratch: &AttentionScratch,
    shape: Shape,
    qkv: &[f32],
    y: &[f32],
    log_sums: &[f32],
    dy: &[f32],
    d_qkv: &mut [f32],
) {
    let (width, size, length) = (shape.width(), shape.head_size, shape.length);
    assert!(qkv.len() == shape.tokens() * 3 * width && d_qkv.len() == qkv.len());
    assert!(y.len() == shape.tokens() * width && dy.len() == y.len());
    assert!(log_sums.len() == shape.tokens() * shape.heads);
    let d_qkv = SharedMut::new(d_qkv);
    let head = shape.head();
    let sizes = [head, head, head, head, head, head, head, length, BLOCK * BLOCK, BLOCK * BLOCK];
    scratch.for_each_head(pool, shape, sizes.iter().sum(), &|sequence, number, memory| {
        let [q, k, v, dy_head, dq, dk, dv, deltas, scores, slopes] = pieces(memory, sizes);
        let rows = &qkv[sequence * length * 3 * width..][..length * 3 * width];
        for (part, to) in [&mut *q, &mut *k, &mut *v].into_iter().enumerate() {
            gather(rows, 3 * width, part * width + number * size, to, size);
        }
        let tokens = sequence * length * width..(sequence + 1) * length * width;
        gather(&dy[tokens.clone()], width, number * size, dy_head, size);
        let outputs = y[tokens].chunks_exact(width);
        for ((delta, dy), y) in deltas.iter_mut().zip(dy_head.chunks_exact(size)).zip(outputs) {
            let y = &y[number * size..][..size];
            *delta = lane_sum3(dy, y, y, |dy, y, _| dy * y);
        }
        for gradient in [&mut *dq, &mut *dk, &mut *dv] {
            gradient.fill(0.0);
        }
        for first in (0..length).step_by(BLOCK) {
            let queries = BLOCK.min(length - first);
            let query_part = first * size..(first + queries) * size;
            for first_key in (0..=first).step_by(BLOCK) {
                let keys = BLOCK.min(length - first_key);
                let key_part = first_key * size..(first_key + keys) * size;
                let scores = &mut scores[..queries * keys];
                let slopes = &mut slopes[..queries * keys];
                products(q, first, queries, k, first_key, keys, size, shape.scale(), scores);
                products(dy_head, first, queries, v, first_key, keys, size, 1.0, slopes);
                let both = scores.chunks_exact_mut(keys).zip(slopes.chunks_exact_mut(keys));
                for (query, (scores, slopes)) in both.enumerate() {
                    let seen = (first + query + 1).saturating_sub(first_key).min(keys);
                    let token = first + query;
                    let row = (sequence * length + token) * shape.heads + number;
                    let delta = deltas[token];
                    softmax_back(
                        backend,
                        scores,
                        slopes,
                        seen,
                        log_sums[row],
                        delta,
                        shape.scale(),
                    );
                }
                let p = Matrix::new(scores, queries, keys);
                let a = Matrix::new(slopes, queries, keys);
                let dy_block = Matrix::new(&dy_head[query_part.clone()], queries, size);
                let q_block = Matrix::new(&q[query_part.clone()], queries, size);
                let k_block = Matrix::new(&k[key_part.clone()], keys, size);
                multiply_alone(p.transposed(), dy_block, 1.0, true, &mut dv[key_part.clone()]);
                multiply_alone(a.transposed(), q_block, 1.0, true, &mut dk[key_part]);
                multiply_alone(a, k_block, 1.0, true, &mut dq[query_part.clone()]);
            }
        }
        for (part, gradient) in [&*dq, &*dk, &*dv].into_iter().enumerate() {
            for (step, gradient) in gradient.chunks_exact(size).enumerate() {
                let at = (sequence * length + step) * 3 * width + part * width + number * size;
                // SAFETY: each task has its own head of its own sequence, and the slice stays borrowed
                // until all are done.
                unsafe { d_qkv.slice(at, size) }.copy_from_slice(gradient);
            }
        }
    });
}

compiled_for_each_tier! {
    /// Turns scores into probabilities and `dy · v` into the gradients of the scores' products.
    fn softmax_back(
        scores: &mut [f32],
        slopes: &mut [f32],
        seen: usize,
        log_sum: f32,
        delta: f32,
        scale: f32,
    ) = softmax_back_body
}

#[inline(always)]
fn softmax_back_body(
    scores: &mut [f32],
    slopes: &mut [f32],
    seen: usize,
    log_sum: f32,
    delta: f32,
    scale: f32,
) {
    for (score, slope) in scores[..seen].iter_mut().zip(&mut slopes[..seen]) {
        let p = exp(*score - log_sum);
        *slope = p * (*slope - delta) * scale;
        *score = p;
    }
    scores[seen..].fill(0.0);
    slopes[seen..].fill(0.0);
}
