//! The CUDA kernels: they compile without a GPU, and on one they agree with a naive reference.

use std::sync::Mutex;
use std::thread;

use mmfree_kernels::cuda::{self, Buffer, CudaError, Device};
use mmfree_kernels::memory::WeightArena;
use mmfree_kernels::mlgru;
use mmfree_kernels::mlgru::cuda::{Layer, Recurrence, Sequences};
use mmfree_kernels::pool::Pool;
use mmfree_kernels::swiglu;
use mmfree_kernels::ternary::{Layout, TernaryMatrix};
use mmfree_kernels::ternary_gemm::cuda::{Gemm, Products, Quantized, Sums, TILE_WORDS, TileMatrix};
use mmfree_kernels::tier::Backend;
use mmfree_kernels::training::{Training, View, ViewMut};

/// `MMFREE_REQUIRE_NVRTC=1` makes the compiler's absence a failure.
#[test]
fn every_kernel_compiles_within_its_register_budget() {
    if !cuda::is_compiler_present() {
        assert!(std::env::var_os("MMFREE_REQUIRE_NVRTC").is_none(), "libnvrtc is not there");
        eprintln!("!!! SKIPPED, kernels NOT COMPILED: no libnvrtc");
        return;
    }
    let architectures = ["sm_80", "sm_90a"];
    let jobs = architectures.iter().flat_map(|&on| cuda::SOURCES.map(|source| (source, on)));
    // Seconds each, so every processor takes the next one.
    let jobs = Mutex::new(jobs.filter(|(source, on)| !source.hopper_only || *on == "sm_90a"));
    let checked = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let next = || jobs.lock().expect("no other thread failed").next();
                while let Some((source, architecture)) = next() {
                    let found = checked_kernels(source, architecture);
                    checked.lock().expect("no other thread failed").extend(found);
                }
            });
        }
    });
    let checked = checked.into_inner().expect("no thread failed");
    for (kernel, _) in REGISTERS {
        assert!(checked.iter().any(|name| name == kernel), "{kernel} was not compiled");
    }
}

/// Compiles a source; those of its kernels whose registers were compared with their budget.
fn checked_kernels(source: cuda::Source, architecture: &str) -> Vec<String> {
    let compiled = cuda::compile_for(source, architecture).expect("compiles");
    assert!(!compiled.code.is_empty());
    // "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...".
    assert!(!compiled.log.contains("serialized"), "{}: {}", source.name, compiled.log);
    let kernels = compiled.log.matches("Compiling entry function").count();
    println!("{} for {architecture}: {kernels} kernels", source.name);
    let (mut checked, mut kernel) = (Vec::new(), "");
    for line in compiled.log.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function '") {
            kernel = name.split('\'').next().unwrap_or_default();
        }
        let spilled = number_before(line, " bytes spill stores");
        assert!(spilled <= MAX_SPILLED_BYTES, "{kernel} {architecture}: {line}");
        // Counts on older devices differ by a few; there no launch depends on them.
        let used = number_before(line, " registers");
        let budget = REGISTERS.iter().find(|(name, _)| *name == kernel);
        if let (Some((_, budget)), "sm_90a") = (budget, architecture) {
            assert!(used <= *budget, "{kernel}: {used} registers, {budget} at most");
            checked.extend((used > 0).then_some(kernel.to_owned()));
        }
    }
    checked
}

/// Registers a thread of some kernels on Hopper, at most: what their launches count on, or what lets enough blocks share a
/// multiprocessor.
const REGISTERS: [(&str, usize); 30] = [
    ("few_tokens", 64),
    ("prompt_product", 168),
    ("wide_prompt_product", 168),
    ("gated_prompt_product", 168),
    ("mlgru_scan_8_384", 64),
    ("mlgru_scan_20_480", 96),
    ("mlgru_scan_8_192", 64),
    ("mlgru_scan_16_256", 56),
    ("residual_1_many_2", 64),
    ("residual_3_many_2", 64),
    ("gate_many_2", 64),
    ("gated_many_2", 64),
    ("norm_quantize_vectors_1", 56),
    ("norm_quantize_vectors_2", 80),
    ("norm_quantize_vectors_3", 112),
    ("swiglu_quantize", 56),
    ("norm_gate_quantize", 64),
    ("norm_backward_vectors_0", 72),
    ("norm_backward_vectors_1", 128),
    ("norm_backward_vectors_2", 152),
    ("norm_backward_vectors_3", 160),
    ("swiglu_norm_backward", 80),
    ("norm_gate_norm_backward", 136),
    ("recurrence_forward", 64),
    ("recurrence_backward", 64),
    ("cross_entropy_vectors", 64),
    ("adamw_step", 48),
    ("adamw_and_weights", 48),
    ("integer_product_half", 168),
    ("integer_product_full", 168),
];

/// A few bytes happen where the compiler aims at an occupancy; more is a mistake.
const MAX_SPILLED_BYTES: usize = 16;

fn number_before(line: &str, what: &str) -> usize {
    let Some((before, _)) = line.split_once(what) else { return 0 };
    before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[test]
fn a_wrong_source_is_an_error_with_the_compilers_words() {
    if !cuda::is_compiler_present() {
        eprintln!("!!! SKIPPED: no libnvrtc");
        return;
    }
    let source =
        cuda::Source { name: "wrong", text: "not_a_type x;", hopper_only: false, contracts: false };
    let error = cuda::compile_for(source, "sm_90a").expect_err("does not compile").to_string();
    assert!(error.contains("not_a_type") && error.contains("wrong"), "{error}");
}

fn device() -> Option<std::sync::Arc<Device>> {
    match Device::open(0) {
        Ok(device) => Some(device),
        Err(reason) => {
            assert!(std::env::var_os("MMFREE_REQUIRE_CUDA").is_none(), "{reason}");
            eprintln!("!!! SKIPPED, no GPU: {reason}");
            None
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// How so many rows of activations are multiplied: a batch in both ways that it may be.
fn products_for(device: &Device, rows: usize, width: usize) -> Vec<Products> {
    match Products::of(device, rows, width) {
        Products::Batch => vec![Products::Batch, Products::Prompt],
        one => vec![one],
    }
}

#[test]
fn products_are_exact() {
    let Some(device) = device() else { return };
    let gemm = Gemm::new(&device).expect("compiles");
    let mut random = Random(7);
    for (layers, m, n, k) in [
        (1, 1, 1, 1),
        (1, 2, 17, 127),
        (1, 7, 16, 128),
        (1, 8, 97, 129),
        (1, 9, 130, 64),
        (1, 16, 300, 1031),
        (1, 17, 128, 256),
        (3, 5, 40, 100),
        (3, 33, 129, 300),
        (1, 64, 2100, 40),
        (1, 65, 200, 513),
        (3, 130, 140, 260),
        (1, 129, 1000, 384),
        (1, 257, 515, 700),
        (1, 700, 96, 130),
        (3, 300, 140, 260),
        (1, 520, 300, 1000),
        // More tiles than an H200 has multiprocessors: whole ones, then those of 48 tokens or halves of their rows.
        (1, 1030, 5100, 130),
        (1, 2048, 3072, 20),
        // Fewer: those of 80 and of 96 tokens.
        (1, 2048, 1280, 20),
        (1, 1900, 1536, 20),
        // Tiles of 160 tokens, one round and two.
        (1, 1900, 2560, 140),
        (1, 2048, 5120, 20),
    ] {
        for extreme in [false, true] {
            let q: Vec<i8> = (0..layers * m * k)
                .map(|_| if extreme { 127 } else { (random.next() % 255) as u8 as i8 })
                .map(|q| q.max(-127))
                .collect();
            let trits: Vec<i8> = (0..layers * n * k)
                .map(|_| if extreme { 1 } else { (random.next() % 3) as i8 - 1 })
                .collect();
            let place = if layers == 1 {
                TileMatrix::single(3, n, k)
            } else {
                TileMatrix::stacked(3, layers, n, k)
            };
            let tiles_len = (place.first + place.tiles()) * TILE_WORDS;
            let poison = vec![0x5555_5555u32; tiles_len];
            let mut tiles = Buffer::from_slice(&device, &poison).expect("memory");
            let mut staging = Buffer::zeros(&device, 1).expect("memory");
            for (layer, trits) in trits.chunks(n * k).enumerate() {
                let matrix = TernaryMatrix::from_trits(
                    &WeightArena::new(),
                    if extreme { Layout::TwoBit } else { Layout::Base3 },
                    n,
                    k,
                    1.0,
                    trits,
                );
                let first = place.first + layer * place.segment_tiles * place.col_tiles;
                gemm.upload(&matrix.expect("packs"), &mut staging, &mut tiles, first)
                    .expect("fits");
            }
            for products in products_for(&device, m, k) {
                let mut input = Quantized::new(&device).expect("memory");
                input.assign(products, layers, m, k, &q).expect("fits");
                let mut sums = Sums::new(&device).expect("memory");
                sums.begin(products, m, place.columns()).expect("memory");
                gemm.multiply(&tiles, place, &input, &mut sums).expect("runs");
                let found = sums.read(m).expect("reads");
                for (at, q) in q.chunks_exact(k).enumerate() {
                    let (layer, row) = (at / m, at % m);
                    let found = &found[row * sums.stride() + layer * place.segment_tiles * 16..];
                    let trits = trits[layer * n * k..][..n * k].chunks_exact(k);
                    for (out, (t, &sum)) in trits.zip(found).enumerate() {
                        let expected: i32 =
                            q.iter().zip(t).map(|(&q, &t)| i32::from(q) * i32::from(t)).sum();
                        let what = format_args!("{products:?} {layers} x {m} x {n} x {k}");
                        assert_eq!(sum, expected, "{what}: {layer} {row} {out}");
                    }
                }
            }
        }
    }
}

/// A prompt's gated unit comes out of its product as the CPU computes it from the sums; where the shape does not allow that, as sums.
#[test]
fn gated_products_have_the_bits_of_the_processor() {
    let Some(device) = device() else { return };
    let gemm = Gemm::new(&device).expect("compiles");
    let (backend, pool) = (Backend::detect(), Pool::new(std::num::NonZeroUsize::MIN));
    let mut random = Random(11);
    // An odd number of channels; few tokens, in both ways; whole tiles and then, on an H200, 48 tokens or half of the rows; 80 and 96 tokens.
    for (m, width, k) in [
        (300, 336, 700),
        (300, 340, 100),
        (100, 336, 100),
        (1030, 2160, 130),
        (2048, 1536, 20),
        (2048, 640, 20),
        (1900, 768, 20),
    ] {
        // The second makes sigmoids' divisors leave the range of fast reciprocals.
        for gamma in [0.01, 7.0] {
            let q: Vec<i8> =
                (0..m * k).map(|_| ((random.next() % 255) as i64 - 127) as i8).collect();
            let trits: Vec<i8> =
                (0..2 * width * k).map(|_| (random.next() % 3) as i8 - 1).collect();
            let place = TileMatrix::single(0, 2 * width, k);
            let matrix = TernaryMatrix::from_trits(
                &WeightArena::new(),
                Layout::TwoBit,
                2 * width,
                k,
                1.0,
                &trits,
            )
            .expect("packs");
            let mut tiles = Buffer::zeros(&device, place.tiles() * TILE_WORDS).expect("memory");
            let mut staging = Buffer::zeros(&device, 1).expect("memory");
            gemm.upload(&matrix, &mut staging, &mut tiles, 0).expect("fits");
            for products in products_for(&device, m, k) {
                let mut input = Quantized::new(&device).expect("memory");
                input.assign(products, 1, m, k, &q).expect("fits");
                let mut sums = Sums::new(&device).expect("memory");
                sums.begin(products, m, place.columns()).expect("memory");
                gemm.multiply(&tiles, place, &input, &mut sums).expect("runs");
                let expected_sums = sums.read(m).expect("reads");
                sums.begin(products, m, place.columns()).expect("memory");
                gemm.multiply_gated_unit(&tiles, (place, width), &input, gamma, &mut sums)
                    .expect("runs");
                let found = sums.read(m).expect("reads");
                if !products.gate_at_once(width) {
                    assert_eq!(found, expected_sums, "{products:?} {m} x {width} x {k}");
                    continue;
                }
                let ab: Vec<f32> = expected_sums
                    .chunks_exact(place.columns())
                    .flat_map(|row| row[..2 * width].iter().map(|&sum| sum as f32 * gamma))
                    .collect();
                let mut expected = vec![0.0; m * width];
                swiglu::forward(backend, &pool, &ab, width, &mut expected);
                for (at, (&found, expected)) in found.iter().zip(&expected).enumerate() {
                    let found = f32::from_bits(found as u32);
                    assert_eq!(
                        found.to_bits(),
                        expected.to_bits(),
                        "{m} x {width} x {k}, {gamma}: {at}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

/// Widths for which different numbers of channels share a block.
#[test]
fn the_recurrence_has_the_bits_of_the_processor() {
    let Some(device) = device() else { return };
    let (gemm, recurrence) =
        (Gemm::new(&device).expect("compiles"), Recurrence::new(&device).expect("compiles"));
    let (backend, pool) = (Backend::detect(), Pool::new(std::num::NonZeroUsize::MIN));
    let mut random = Random(13);
    let (k, gammas) = (32, [0.01f32, 0.02]);
    for (m, width) in [(333, 40), (270, 1024), (300, 2200), (417, 2560), (300, 4000), (300, 5120)] {
        let q: Vec<i8> =
            (0..3 * m * k).map(|_| ((random.next() % 255) as i64 - 127) as i8).collect();
        let place = TileMatrix::stacked(0, 3, width, k);
        let mut tiles = Buffer::zeros(&device, place.tiles() * TILE_WORDS).expect("memory");
        let mut staging = Buffer::zeros(&device, 1).expect("memory");
        for layer in 0..3 {
            let trits: Vec<i8> = (0..width * k).map(|_| (random.next() % 3) as i8 - 1).collect();
            let arena = WeightArena::new();
            let matrix = TernaryMatrix::from_trits(&arena, Layout::TwoBit, width, k, 1.0, &trits)
                .expect("packs");
            let first = layer * place.segment_tiles * place.col_tiles;
            gemm.upload(&matrix, &mut staging, &mut tiles, first).expect("fits");
        }
        let mut input = Quantized::new(&device).expect("memory");
        let products = Products::of(&device, m, k);
        input.assign(products, 3, m, k, &q).expect("fits");
        let mut sums = Sums::new(&device).expect("memory");
        sums.begin(products, m, place.columns()).expect("memory");
        gemm.multiply(&tiles, place, &input, &mut sums).expect("runs");
        let (all, f_offset) = (sums.read(m).expect("reads"), place.segment_tiles * 16);
        let values = |column: usize, gamma: f32| -> Vec<f32> {
            let rows = all.chunks_exact(place.columns());
            rows.flat_map(|row| row[column..][..width].iter().map(|&sum| sum as f32 * gamma))
                .collect()
        };
        let (mut expected, f) = (values(0, gammas[0]), values(f_offset, gammas[1]));
        let mut numbers = |scale: f32| -> Vec<f32> {
            (0..width).map(|_| (random.next() % 1000) as f32 * scale).collect()
        };
        let (beta, mut expected_state) = (numbers(0.001), numbers(0.01));
        let vectors = Buffer::from_slice(&device, &beta).expect("memory");
        let state = Buffer::from_slice(&device, &expected_state).expect("memory");
        let mut sequences = Sequences::new(&device).expect("memory");
        sequences.assign(&[(&state, m)]).expect("memory");
        let mut h = Buffer::zeros(&device, m * width).expect("memory");
        let layer = Layer {
            vectors: &vectors,
            beta: 0,
            gamma_i: gammas[0],
            gamma_f: gammas[1],
            state_offset: 0,
            f_offset,
            width,
        };
        recurrence.forward(layer, &input, &mut sums, &sequences, &mut h).expect("runs");
        mlgru::forward(backend, &pool, &mut expected, &f, &beta, &mut expected_state);
        let (mut found, mut found_state) = (vec![0.0; m * width], vec![0.0; width]);
        h.read(0, &mut found).expect("reads");
        state.read(0, &mut found_state).expect("reads");
        let differ =
            |a: &[f32], b: &[f32]| a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differ(&found, &expected), None, "{m} x {width}");
        assert_eq!(differ(&found_state, &expected_state), None, "{m} x {width}");
    }
}

#[test]
fn a_failing_launch_is_an_error_and_the_device_stays_usable() {
    let Some(device) = device() else { return };
    let error = cuda::launch_impossible(&device).expect_err("4096 threads a block");
    assert!(matches!(error, CudaError::Kernel { .. }), "{error}");
    println!("{error}");
    let mut buffer = Buffer::<u32>::zeros(&device, 5).expect("memory");
    buffer.write(0, &[1, 2, 3, 4, 5]).expect("writes");
    let mut found = [0; 5];
    buffer.read(0, &mut found).expect("reads");
    assert_eq!(found, [1, 2, 3, 4, 5]);
    assert!(matches!(buffer.write(4, &[1, 2]), Err(CudaError::Shape(_))));
    let (_, total) = device.memory().expect("known");
    let error = Buffer::<u8>::zeros(&device, 2 * total).expect_err("larger than the memory");
    assert!(matches!(error, CudaError::OutOfMemory { .. }), "{error}");
}

/// Products of bytes in training: around the tiles of 256 rows, 256 columns and 128 inputs, and inside one.
#[test]
fn products_of_bytes_are_exact() {
    let Some(device) = device() else { return };
    let mut training = Training::new(&device).expect("cuBLASLt is there");
    let mut random = Random(11);
    for (m, k, n) in
        [(1, 16, 8), (256, 128, 256), (300, 1040, 520), (1027, 272, 264), (90, 2816, 1024)]
    {
        if !training.multiplies_bytes(k, n) {
            eprintln!("!!! SKIPPED: products of bytes are Hopper's");
            return;
        }
        let q: Vec<i8> = (0..m * k).map(|_| (random.next() % 256) as u8 as i8).collect();
        let t: Vec<i8> = (0..n * k).map(|_| (random.next() % 3) as i8 - 1).collect();
        let pairs = |bytes: &[i8]| -> Vec<u16> {
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|&[a, b]| u16::from_le_bytes([a as u8, b as u8]))
                .collect()
        };
        let q_buffer = Buffer::from_slice(&device, &pairs(&q)).expect("fits");
        let t_buffer = Buffer::from_slice(&device, &pairs(&t)).expect("fits");
        let (mut half, mut full) = (
            Buffer::filled(&device, m * n, 0xff).expect("fits"),
            Buffer::filled(&device, m * n, 0xff).expect("fits"),
        );
        let (q_view, t_view) =
            (View::new(&q_buffer, 0, m * k / 2), View::new(&t_buffer, 0, n * k / 2));
        training
            .multiply_bytes(q_view, t_view, n, ViewMut::new(&mut half, 0, m * n))
            .expect("runs");
        training
            .multiply_bytes_full(q_view, t_view, n, ViewMut::new(&mut full, 0, m * n))
            .expect("runs");
        let (mut halves, mut fulls) = (vec![0u16; m * n], vec![0f32; m * n]);
        half.read(0, &mut halves).expect("reads");
        full.read(0, &mut fulls).expect("reads");
        for row in 0..m {
            for column in 0..n {
                let (q, t) = (&q[row * k..][..k], &t[column * k..][..k]);
                let sum: i32 = q.iter().zip(t).map(|(&q, &t)| i32::from(q) * i32::from(t)).sum();
                let (full, half) = (fulls[row * n + column], halves[row * n + column]);
                assert_eq!(full, sum as f32, "{m} x {k} x {n}: row {row}, column {column}");
                // To the nearest bf16, ties to even.
                let bits = (sum as f32).to_bits();
                let rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16;
                assert_eq!(half, rounded, "{m} x {k} x {n}: row {row}, column {column}, sum {sum}");
            }
        }
    }
}
