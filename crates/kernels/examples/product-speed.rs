//! Speed of one product of ternary weights with the activations of some tokens, on random data.
//!
//!     cargo run --release -p mmfree-kernels --example product-speed [rows cols tokens threads backend]
//!
//! Without arguments: the shapes of the 1.3B, 370M and built-in models, prefill and batches.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use mmfree_kernels::activations::QuantizedRows;
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::pool::Pool;
use mmfree_kernels::ternary::{Layout, TernaryMatrix};
use mmfree_kernels::ternary_gemm::{LookupScratch, Product, multiply};
use mmfree_kernels::tier::Backend;

/// Shapes [N, K] and tokens.
const CASES: [(usize, usize, usize); 12] = [
    (11264, 2048, 256),
    (2048, 5632, 256),
    (2048, 2048, 256),
    (5632, 1024, 256),
    (1024, 2816, 256),
    (1024, 1024, 256),
    (2048, 2048, 32),
    (2048, 384, 32),
    (384, 1024, 32),
    (384, 384, 32),
    (8192, 384, 32),
    (384, 384, 8),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| args.get(at).map_or(Ok(default), |arg| arg.parse());
    let threads = NonZeroUsize::new(number(3, 1)?).ok_or("no threads")?;
    let backend = Backend::from_name(args.get(4).map_or("auto", String::as_str))?;
    let cases = match args.len() {
        0 => CASES.to_vec(),
        _ => vec![(number(0, 2048)?, number(1, 2048)?, number(2, 256)?)],
    };
    let (arena, pool) = (WeightArena::new(), Pool::new(threads));
    let mut scratch = LookupScratch::new(pool.threads());
    for (rows, cols, tokens) in cases {
        let layout = Layout::preferred(backend);
        let weights = TernaryMatrix::random(&arena, layout, rows, cols, 1.0, 1)?;
        let values: Vec<i8> = (0..tokens * cols)
            .map(|i| ((i * i + 3 * i) % 255) as i8)
            .map(|q| q.max(-127))
            .collect();
        let input = QuantizedRows::from_parts(tokens, cols, &values, &vec![1.0; tokens])
            .ok_or("activations do not fit")?;
        let mut output = vec![0.0; tokens * rows];
        let mut speeds = Vec::new();
        let begin = Instant::now();
        while speeds.len() < 5 || begin.elapsed() < Duration::from_millis(700) {
            let start = Instant::now();
            let output = &mut output;
            let product = Product { weights: &weights, input: &input, output };
            multiply(backend, &pool, &mut scratch, &mut [product]);
            speeds.push((rows * cols * tokens) as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
        speeds.sort_by(f64::total_cmp);
        let (median, best) = (speeds[speeds.len() / 2], speeds[speeds.len() - 1]);
        println!(
            "{rows:>6} x {cols:<5} {tokens:>4} tokens: {median:>6.1} G products/s, at best {best:.1}"
        );
    }
    Ok(())
}
