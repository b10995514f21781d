//! Speed of the products of a few tokens on a GPU, weights from device memory (more of them than its cache holds).
//!
//!     cargo run --release -p mmfree-kernels --example gpu-product-speed [rows cols tokens]
//!
//! Without arguments: the shapes of Microsoft's BitNet W2A8 benchmark, one token, and those of a 1.3B model, 1 to 64.

use mmfree_kernels::bandwidth::cuda::DeviceReadBuffer;
use mmfree_kernels::cuda::{Buffer, Device};
use mmfree_kernels::ternary_gemm::cuda::{Gemm, Products, Quantized, Sums, TILE_WORDS, TileMatrix};

/// Shapes [N, K] and tokens.
const CASES: [(usize, usize, usize); 19] = [
    (2560, 2560, 1),
    (13824, 2560, 1),
    (2560, 6912, 1),
    (20480, 3200, 1),
    (3200, 10240, 1),
    (55296, 5120, 1),
    (5120, 27648, 1),
    (6144, 2048, 1),
    (2048, 2048, 1),
    (11264, 2048, 1),
    (2048, 5632, 1),
    (6144, 2048, 8),
    (2048, 2048, 8),
    (11264, 2048, 8),
    (2048, 5632, 8),
    (6144, 2048, 64),
    (2048, 2048, 64),
    (11264, 2048, 64),
    (2048, 5632, 64),
];
/// Weights that are cycled through, at least.
const CYCLED_BYTES: usize = 512 << 20;
const REPETITIONS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<usize> =
        std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let cases = match args[..] {
        [] => CASES.to_vec(),
        [rows, cols, tokens] => vec![(rows, cols, tokens)],
        _ => return Err("expected no arguments, or rows, cols and tokens".into()),
    };
    let device = Device::open(0)?;
    let gemm = Gemm::new(&device)?;
    let memory = DeviceReadBuffer::new(&device, 2 << 30)?;
    let mut bandwidths = (0..9).map(|_| memory.measure()).collect::<Result<Vec<_>, _>>()?;
    bandwidths.sort_by(f64::total_cmp);
    let bandwidth = bandwidths[bandwidths.len() / 2];
    println!("{}, reading {:.0} GB/s", device.name(), bandwidth / 1e9);
    println!("  rows   cols tokens      us   GB/s  share of reading   smallest, largest us");
    for (rows, cols, tokens) in cases {
        let matrix = TileMatrix::single(0, rows, cols);
        let bytes = matrix.tiles() * TILE_WORDS * 4;
        let copies = CYCLED_BYTES.div_ceil(bytes);
        let words: Vec<u32> = (0..matrix.tiles() * TILE_WORDS)
            .map(|i| (i as u32).wrapping_mul(0x9e37_79b9) & 0x5555_5555)
            .collect();
        let mut tiles = Buffer::zeros(&device, copies * words.len())?;
        for copy in 0..copies {
            tiles.write(copy * words.len(), &words)?;
        }
        let q: Vec<i8> = (0..tokens * cols).map(|i| (i % 255) as u8 as i8).collect();
        let (mut input, mut sums) = (Quantized::new(&device)?, Sums::new(&device)?);
        let products = Products::of(&device, tokens, cols);
        input.assign(products, 1, tokens, cols, &q)?;
        sums.begin(products, tokens, matrix.columns())?;
        let mut cycles = |count| {
            device.time(|| {
                device.repeat(count, || {
                    (0..copies).try_for_each(|copy| {
                        let matrix = TileMatrix { first: copy * matrix.tiles(), ..matrix };
                        gemm.multiply(&tiles, matrix, &input, &mut sums)
                    })
                })
            })
        };
        // What recording costs is in both, and goes.
        const CYCLES: usize = 20;
        let mut seconds = (0..REPETITIONS)
            .map(|_| Ok((cycles(2 * CYCLES)? - cycles(CYCLES)?) / (CYCLES * copies) as f64))
            .collect::<Result<Vec<f64>, mmfree_kernels::cuda::CudaError>>()?;
        seconds.sort_by(f64::total_cmp);
        let (median, read) = (seconds[REPETITIONS / 2], bytes as f64);
        println!(
            "{rows:6} {cols:6} {tokens:6} {:7.2} {:6.0} {:15.1} %   {:.2}, {:.2}",
            median * 1e6,
            read / median / 1e9,
            100.0 * read / median / bandwidth,
            seconds[0] * 1e6,
            seconds[REPETITIONS - 1] * 1e6
        );
    }
    Ok(())
}
