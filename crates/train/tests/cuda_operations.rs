//! Operations of training on a GPU against the CPU in f32.
//!
//! Without a GPU every test says that it was skipped; `MMFREE_REQUIRE_CUDA=1` makes that a failure.
//!
//! Tensors are bf16 there: a value carries a relative error of 2^-9 for each rounding on its way, so that results are
//! compared by the norm of the difference over the norm, which for one operation stays below 1 %.

use std::ops::Range;

use mmfree_train::backend::numbers::{self, ELEMENTS, FACTOR, LOSSES};
use mmfree_train::backend::{
    AdamW, AttentionShape, Backend, BatchShape, CpuBackend, CudaBackend, Group, Head, IGNORED,
    Norm, Parameters, Precision, Projection, Update,
};

#[path = "support/gpu.rs"]
mod support;

use support::{Random, cpu, gpu, relative_error};

/// A step of the optimiser.
const STEP: AdamW =
    AdamW { learning_rate: 4e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, step: 3 };
/// Of one operation: the inputs are the same bf16 values on both sides.
const OPERATION: f64 = 0.01;
/// Of operations with a quantiser behind a rounding: some integers differ by one.
const QUANTISED: f64 = 0.02;

impl Random {
    /// About normal, rounded to bf16.
    fn values(&mut self, len: usize, size: f32) -> Vec<f32> {
        let mut one = || (0..4).map(|_| self.next() as f32 / (1u64 << 31) as f32).sum::<f32>();
        (0..len).map(|_| to_bf16((one() - 2.0) * 1.7 * size)).collect()
    }
}

/// The nearest bf16 value.
fn to_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// Parameters of the operations' tests: norms, matrices, a table and lower bounds, one behind the other.
struct Setting {
    rows: usize,
    inputs: usize,
    outputs: Vec<usize>,
    norm: Norm,
    projections: Vec<Projection>,
    flat: Vec<f32>,
}

impl Setting {
    fn new(
        random: &mut Random,
        rows: usize,
        inputs: usize,
        outputs: &[usize],
        ternary: bool,
    ) -> Self {
        let mut flat = Vec::new();
        let mut place = |values: Vec<f32>| {
            let start = flat.len();
            flat.extend(values);
            start..flat.len()
        };
        let weights = |random: &mut Random| {
            random.values(inputs, 0.2).iter().map(|w| 1.0 + w).collect::<Vec<_>>()
        };
        let norm = Norm { weight: place(weights(random)), eps: 1e-6 };
        let projections = outputs
            .iter()
            .enumerate()
            .map(|(index, &outputs)| Projection {
                inner_norm: ternary.then(|| place(weights(random))),
                weight: place(random.values(inputs * outputs, 0.05)),
                outputs,
                inputs,
                index,
            })
            .collect();
        Self { rows, inputs, outputs: outputs.to_vec(), norm, projections, flat }
    }

    fn head(&self) -> Head {
        Head { norm: self.norm.clone(), projection: self.projections[0].clone(), chunk: self.rows }
    }
}

/// Sets tensors, which backends do in their own ways.
trait Fill: Backend {
    fn fill(&mut self, tensor: &mut Self::Tensor, values: &[f32]);

    fn filled(&mut self, values: &[f32], precision: Precision) -> Self::Tensor {
        let mut tensor = self.tensor(values.len(), precision).unwrap();
        self.fill(&mut tensor, values);
        tensor
    }

    fn values(&mut self, tensor: &Self::Tensor, len: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; len];
        self.read(tensor, &mut values).unwrap();
        values
    }

    fn flat_values(&mut self, flat: &Self::Flat, len: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; len];
        self.read_flat(flat, 0, &mut values).unwrap();
        values
    }
}

impl Fill for CpuBackend {
    fn fill(&mut self, tensor: &mut Vec<f32>, values: &[f32]) {
        tensor.copy_from_slice(values);
    }
}

impl Fill for CudaBackend {
    fn fill(&mut self, tensor: &mut Self::Tensor, values: &[f32]) {
        tensor.write(values).unwrap();
    }
}

/// Named results of one test on one backend.
type Results = Vec<(&'static str, Vec<f32>)>;

fn compare(what: &str, budget: f64, found: Results, expected: Results) {
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        let error = relative_error(found, expected);
        println!("{what}, {name}: {error:.1e}");
        assert!(error < budget, "{what}, {name}: relative error {error:.2e}, budget {budget}");
    }
}

/// Sizes (rows, inputs, outputs): around vector widths and block sizes, and odd.
const SIZES: [(usize, usize, usize); 8] = [
    (1, 8, 8),
    (3, 40, 24),
    (17, 64, 97),
    (64, 256, 160),
    (129, 257, 33),
    (200, 384, 384),
    (1000, 512, 1031),
    (600, 1024, 2816),
];

fn projections<B: Fill>(backend: &mut B, setting: &Setting, seed: u64) -> Results {
    let mut random = Random(seed);
    let Setting { rows, inputs, ref outputs, ref norm, ref projections, ref flat } = *setting;
    let shape = BatchShape { sequences: 1, length: rows };
    let mut weights = backend.weights(projections).unwrap();
    let flat_buffer = backend.flat_from(flat).unwrap();
    backend.reserve(projections, shape, &setting.head(), None).unwrap();
    backend.prepare(projections, &flat_buffer, &mut weights).unwrap();
    let parameters = Parameters { flat: &flat_buffer, weights: &weights };
    let x = random.values(rows * inputs, 1.0);
    let x = backend.filled(&x, Precision::Activation);
    let mut results = Vec::new();
    let mut y: Vec<_> = outputs.iter().map(|&n| backend.product_tensor(rows, n).unwrap()).collect();
    let all: Vec<&Projection> = projections.iter().collect();
    backend.project(parameters, norm, &x, &all, &mut y.iter_mut().collect::<Vec<_>>()).unwrap();
    for (y, n) in y.iter().zip(outputs) {
        results.push(("output", backend.values(y, rows * n)));
    }
    let mut gradients = backend.flat_zeros(flat.len()).unwrap();
    let dy: Vec<_> = outputs
        .iter()
        .map(|n| {
            let values = random.values(rows * n, 1e-3);
            backend.filled(&values, Precision::Activation)
        })
        .collect();
    let dx = random.values(rows * inputs, 1e-3);
    let mut dx = backend.filled(&dx, Precision::Full);
    let d_outputs: Vec<_> = dy.iter().collect();
    backend
        .project_backward(parameters, norm, &x, &all, &d_outputs, &mut dx, &mut gradients)
        .unwrap();
    results.push(("dx", backend.values(&dx, rows * inputs)));
    let found = backend.flat_values(&gradients, flat.len());
    results.push(("d norm", found[norm.weight.clone()].to_vec()));
    for projection in projections {
        results.push(("d weight", found[projection.weight.clone()].to_vec()));
        if let Some(inner) = &projection.inner_norm {
            results.push(("d inner norm", found[inner.clone()].to_vec()));
        }
    }

    // The first projection again, onto a residual stream.
    let (first, n) = (&projections[0], outputs[0]);
    let residual = random.values(rows * n, 1.0);
    let residual = backend.filled(&residual, Precision::Activation);
    let mut sum = backend.tensor(rows * n, Precision::Activation).unwrap();
    backend.project_residual(parameters, first, &x, &residual, &mut sum).unwrap();
    results.push(("sum", backend.values(&sum, rows * n)));
    let d_sum = random.values(rows * n, 1e-3);
    let d_sum = backend.filled(&d_sum, Precision::Full);
    let mut d_input = backend.tensor(rows * inputs, Precision::Activation).unwrap();
    let mut gradients = backend.flat_zeros(flat.len()).unwrap();
    backend
        .project_residual_backward(parameters, first, &x, &d_sum, &mut d_input, &mut gradients)
        .unwrap();
    results.push(("d input", backend.values(&d_input, rows * inputs)));
    let found = backend.flat_values(&gradients, flat.len());
    results.push(("d weight on the stream", found[first.weight.clone()].to_vec()));
    results
}

#[test]
fn projections_agree_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (rows, inputs, outputs) in SIZES {
        for ternary in [true, false] {
            let counts: &[usize] = &[outputs; 3];
            for count in if ternary { vec![1, 2, 3] } else { vec![1] } {
                let mut random = Random(rows as u64);
                let setting = Setting::new(&mut random, rows, inputs, &counts[..count], ternary);
                let what = format!("{rows} x {inputs} x {outputs}, {count}, ternary {ternary}");
                let found = projections(&mut gpu, &setting, 7);
                let expected = projections(&mut cpu(), &setting, 7);
                compare(&what, if ternary { QUANTISED } else { OPERATION }, found, expected);
            }
        }
    }
}

fn losses<B: Fill>(backend: &mut B, setting: &Setting, chunk: usize) -> Results {
    let mut random = Random(3);
    let Setting { rows, inputs, ref projections, ref flat, .. } = *setting;
    let vocabulary = projections[0].outputs;
    let head = Head { chunk, ..setting.head() };
    let shape = BatchShape { sequences: 1, length: rows };
    let mut weights = backend.weights(projections).unwrap();
    let flat_buffer = backend.flat_from(flat).unwrap();
    backend.reserve(projections, shape, &head, None).unwrap();
    backend.prepare(projections, &flat_buffer, &mut weights).unwrap();
    let parameters = Parameters { flat: &flat_buffer, weights: &weights };
    let x = random.values(rows * inputs, 1.0);
    let x = backend.filled(&x, Precision::Activation);
    let mut ids: Vec<u32> = (0..rows).map(|_| (random.next() % vocabulary as u64) as u32).collect();
    ids[rows / 2] = if rows > 1 { IGNORED } else { ids[0] };
    let mut targets = backend.tokens(rows).unwrap();
    backend.write_tokens(&mut targets, &ids).unwrap();
    let scale = 1.0 / rows as f32;
    backend.cross_entropy(parameters, &head, &x, &targets, scale).unwrap();
    let only = backend.take_loss().unwrap() as f32;
    let mut dx = backend.tensor(rows * inputs, Precision::Full).unwrap();
    let mut gradients = backend.flat_zeros(flat.len()).unwrap();
    backend
        .cross_entropy_backward(parameters, &head, &x, &targets, scale, &mut dx, &mut gradients)
        .unwrap();
    let both = backend.take_loss().unwrap() as f32;
    assert_eq!(only, both);
    let dx = backend.values(&dx, rows * inputs);
    let found = backend.flat_values(&gradients, flat.len());
    vec![
        ("loss", vec![both]),
        ("dx", dx),
        ("d norm", found[head.norm.weight.clone()].to_vec()),
        ("d weight", found[projections[0].weight.clone()].to_vec()),
    ]
}

/// Log-likelihoods of every token of a vocabulary at one place: that many equal rows, each with another target, and
/// one row without a target.
fn scores_of_a_vocabulary<B: Fill>(backend: &mut B, setting: &Setting) -> Vec<f32> {
    let Setting { inputs, ref projections, ref flat, .. } = *setting;
    let vocabulary = projections[0].outputs;
    let rows = vocabulary + 1;
    let head = Head { chunk: 8, ..setting.head() };
    let mut weights = backend.weights(projections).unwrap();
    let flat = backend.flat_from(flat).unwrap();
    let shape = BatchShape { sequences: 1, length: rows };
    backend.reserve(projections, shape, &head, None).unwrap();
    backend.prepare(projections, &flat, &mut weights).unwrap();
    let parameters = Parameters { flat: &flat, weights: &weights };
    let x = backend.filled(&Random(5).values(inputs, 1.0).repeat(rows), Precision::Activation);
    let mut ids: Vec<u32> = (0..vocabulary as u32).collect();
    ids.insert(3, IGNORED);
    let mut targets = backend.tokens(rows).unwrap();
    backend.write_tokens(&mut targets, &ids).unwrap();
    let scores = backend.token_scores(parameters, &head, &x, &targets).unwrap();
    assert_eq!(scores.len(), vocabulary);
    let sum: f64 = scores.iter().map(|score| score.log_likelihood.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    let best = scores.iter().map(|score| score.log_likelihood).fold(f64::NEG_INFINITY, f64::max);
    for score in &scores {
        assert_eq!(score.is_greedy, score.log_likelihood == best, "{score:?}, best {best}");
    }
    assert_eq!(backend.take_loss().unwrap(), 0.0, "scores are no loss");
    scores.iter().map(|score| score.log_likelihood as f32).collect()
}

#[test]
fn scores_of_tokens_are_a_distribution_and_agree_with_the_cpu() {
    let mut gpu = gpu();
    for ternary in [true, false] {
        let setting = Setting::new(&mut Random(9), 1, 48, &[37], ternary);
        let expected = scores_of_a_vocabulary(&mut cpu(), &setting);
        let Some(gpu) = &mut gpu else { continue };
        let error = relative_error(&scores_of_a_vocabulary(gpu, &setting), &expected);
        assert!(error < QUANTISED, "ternary {ternary}: {error}");
    }
}

#[test]
fn cross_entropy_agrees_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (rows, inputs, outputs) in SIZES {
        for (ternary, chunk) in [(true, rows), (true, rows.div_ceil(3)), (false, rows)] {
            let mut random = Random(rows as u64 + 1);
            let setting = Setting::new(&mut random, rows, inputs, &[outputs], ternary);
            let what = format!("head {rows} x {inputs} x {outputs}, {chunk}, ternary {ternary}");
            let found = losses(&mut gpu, &setting, chunk);
            let expected = losses(&mut cpu(), &setting, chunk);
            compare(&what, if ternary { QUANTISED } else { OPERATION }, found, expected);
        }
    }
}

fn recurrences<B: Fill>(backend: &mut B, batch: BatchShape, width: usize) -> Results {
    let mut random = Random(11);
    let (rows, layers) = (batch.tokens(), 3);
    let bounds = random.values(layers * width, 1.0);
    let flat = backend.flat_from(&bounds).unwrap();
    let mut betas = backend.tensor(layers * width, Precision::Full).unwrap();
    backend.lower_bounds(&flat, 0..bounds.len(), layers, &mut betas).unwrap();
    let mut tensor = |backend: &mut B, size| {
        let values = random.values(rows * width, size);
        backend.filled(&values, Precision::Activation)
    };
    // Gates near one, so that states reach far.
    let (i, f, dh) = (tensor(backend, 1.0), tensor(backend, 3.0), tensor(backend, 1e-2));
    let mut h = backend.tensor(rows * width, Precision::Activation).unwrap();
    backend.mlgru(batch, &i, &f, &betas, 1, &mut h).unwrap();
    let mut di = backend.tensor(rows * width, Precision::Activation).unwrap();
    let mut df = backend.tensor(rows * width, Precision::Activation).unwrap();
    let mut d_betas = backend.filled(&vec![0.0; layers * width], Precision::Full);
    backend
        .mlgru_backward(batch, &i, &f, &betas, 1, &h, &dh, &mut di, &mut df, &mut d_betas)
        .unwrap();
    let mut d_bounds = backend.flat_zeros(bounds.len()).unwrap();
    backend.lower_bounds_backward(&flat, 0..bounds.len(), layers, &d_betas, &mut d_bounds).unwrap();
    vec![
        ("betas", backend.values(&betas, layers * width)),
        ("h", backend.values(&h, rows * width)),
        ("di", backend.values(&di, rows * width)),
        ("df", backend.values(&df, rows * width)),
        ("d betas", backend.values(&d_betas, layers * width)),
        ("d bounds", backend.flat_values(&d_bounds, bounds.len())),
    ]
}

#[test]
fn the_recurrence_agrees_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (sequences, length, width) in [
        (1, 1, 1),
        (2, 3, 40),
        (1, 63, 129),
        (3, 200, 64),
        (1, 2048, 256),
        (2, 1000, 130),
        (5, 130, 384),
        (9, 77, 1024),
    ] {
        let batch = BatchShape { sequences, length };
        let found = recurrences(&mut gpu, batch, width);
        let expected = recurrences(&mut cpu(), batch, width);
        compare(
            &format!("recurrence {sequences} x {length} x {width}"),
            OPERATION,
            found,
            expected,
        );
    }
}

fn gates<B: Fill>(backend: &mut B, rows: usize, width: usize) -> Results {
    let mut random = Random(5);
    let weight: Vec<f32> = random.values(width, 0.2).iter().map(|w| 1.0 + w).collect();
    let flat = backend.flat_from(&weight).unwrap();
    let norm = Norm { weight: 0..width, eps: 1e-6 };
    let mut tensor = |backend: &mut B, columns, size| {
        let values = random.values(rows * columns, size);
        backend.filled(&values, Precision::Activation)
    };
    let (g, h) = (tensor(backend, width, 2.0), tensor(backend, width, 1.0));
    let dy = tensor(backend, width, 1e-2);
    let ab = tensor(backend, 2 * width, 1.5);
    let empty =
        |backend: &mut B, columns| backend.tensor(rows * columns, Precision::Activation).unwrap();
    let (mut y, mut dg, mut dh) =
        (empty(backend, width), empty(backend, width), empty(backend, width));
    let (mut z, mut d_ab) = (empty(backend, width), empty(backend, 2 * width));
    let mut gradients = backend.flat_zeros(width).unwrap();
    backend.norm_gate(&flat, &norm, &g, &h, &mut y).unwrap();
    backend
        .norm_gate_backward(&flat, &norm, &g, &h, &dy, &mut dg, &mut dh, &mut gradients)
        .unwrap();
    backend.swiglu(&ab, width, &mut z).unwrap();
    backend.swiglu_backward(&ab, &dy, width, &mut d_ab).unwrap();
    vec![
        ("norm gate", backend.values(&y, rows * width)),
        ("dg", backend.values(&dg, rows * width)),
        ("dh", backend.values(&dh, rows * width)),
        ("d weight", backend.flat_values(&gradients, width)),
        ("swiglu", backend.values(&z, rows * width)),
        ("d ab", backend.values(&d_ab, rows * 2 * width)),
    ]
}

#[test]
fn gates_agree_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (rows, width) in [(1, 4), (3, 40), (130, 257), (600, 64), (2000, 384), (700, 1024)] {
        let (found, expected) = (gates(&mut gpu, rows, width), gates(&mut cpu(), rows, width));
        compare(&format!("gates {rows} x {width}"), OPERATION, found, expected);
    }
}

fn embeddings<B: Fill>(backend: &mut B, rows: usize, width: usize) -> Results {
    let (mut random, vocabulary) = (Random(9), 31);
    let table = random.values(vocabulary * width, 1.0);
    let flat = backend.flat_from(&table).unwrap();
    let ids: Vec<u32> = (0..rows).map(|_| (random.next() % 40).saturating_sub(9) as u32).collect();
    let mut tokens = backend.tokens(rows).unwrap();
    backend.write_tokens(&mut tokens, &ids).unwrap();
    let mut x = backend.tensor(rows * width, Precision::Activation).unwrap();
    backend.embed(&flat, 0..table.len(), &tokens, &mut x).unwrap();
    let dx = random.values(rows * width, 1.0);
    let dx = backend.filled(&dx, Precision::Full);
    let mut gradients = backend.flat_from(&table).unwrap();
    backend.embed_backward(&tokens, &dx, 0..table.len(), &mut gradients).unwrap();
    vec![
        ("embeddings", backend.values(&x, rows * width)),
        ("d embeddings", backend.flat_values(&gradients, table.len())),
    ]
}

#[test]
fn embeddings_agree_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (rows, width) in [(1, 4), (7, 300), (1000, 64), (333, 1025)] {
        let found = embeddings(&mut gpu, rows, width);
        compare(&format!("{rows} x {width}"), 1e-5, found, embeddings(&mut cpu(), rows, width));
    }
}

fn steps<B: Fill>(backend: &mut B, len: usize) -> Results {
    let mut random = Random(13);
    let mut flat = |backend: &mut B, size| {
        let values = random.values(len, size);
        backend.flat_from(&values).unwrap()
    };
    let (mut p, g, mut m) = (flat(backend, 1.0), flat(backend, 0.1), flat(backend, 0.01));
    let v: Vec<f32> = random.values(len, 0.01).iter().map(|v| v * v).collect();
    let mut v = backend.flat_from(&v).unwrap();
    // Norm and factor, a loss, sums of squares of each 1000 elements.
    let units = len.div_ceil(1000);
    let mut clip = backend.flat_zeros((LOSSES + 1 + units) * ELEMENTS).unwrap();
    backend.sums_of_squares(&g, 0..len, 1000, &mut clip, LOSSES + 1).unwrap();
    backend.move_loss(&mut clip, LOSSES).unwrap();
    backend.clip(&mut clip, 1, 0.7).unwrap();
    let (from, part) = (len / 3, len - len / 3 - len / 5);
    backend.adamw(&STEP, &clip, from..from + part, &mut p, &g, 1, &mut m, &mut v).unwrap();
    let clip = numbers::all(&backend.flat_values(&clip, (LOSSES + 1 + units) * ELEMENTS));
    backend.add_flat(&g, &mut m, 0..len).unwrap();
    vec![
        ("parameters", backend.flat_values(&p, len)),
        ("first moment", backend.flat_values(&m, len)),
        ("second moment", backend.flat_values(&v, len)),
        ("norm, factor, loss and sums of squares", clip.iter().map(|&x| x as f32).collect()),
    ]
}

#[test]
fn the_optimiser_is_the_cpus() {
    let Some(mut gpu) = gpu() else { return };
    for len in [5, 1000, 123_457] {
        compare(&format!("{len}"), 1e-6, steps(&mut gpu, len), steps(&mut cpu(), len));
    }
}

/// Parameters and moments after a step for a shard of the parameters, and what products then give with the weights: all in
/// one, or operation by operation.
fn updated<B: Fill>(
    backend: &mut B,
    setting: &Setting,
    shard: &Range<usize>,
    factor: f64,
    at_once: bool,
) -> Vec<Vec<f32>> {
    let mut random = Random(29);
    let Setting { rows, inputs, ref outputs, ref norm, ref projections, ref flat } = *setting;
    let mut weights = backend.weights(projections).unwrap();
    let mut parameters = backend.flat_from(flat).unwrap();
    let shape = BatchShape { sequences: 1, length: rows };
    backend.reserve(projections, shape, &setting.head(), None).unwrap();
    backend.prepare(projections, &parameters, &mut weights).unwrap();
    let gradients = backend.flat_from(&random.values(flat.len(), 0.1)).unwrap();
    let first = random.values(shard.len(), 0.01);
    let second: Vec<_> = random.values(shard.len(), 0.01).iter().map(|v| v * v).collect();
    let mut moments = [first, second].map(|moment| backend.flat_from(&moment).unwrap());
    let mut clip = vec![0.0; LOSSES * ELEMENTS];
    numbers::set(&mut clip, FACTOR, &[factor]);
    let numbers = &backend.flat_from(&clip).unwrap();
    // The first norm in pieces of four, matrices, and what lies between them.
    let pieces = (0..norm.weight.end).step_by(4).map(|at| (at..(at + 4).min(norm.weight.end), 0.2));
    let between = projections.iter().scan(norm.weight.end, |end, projection| {
        let weight = projection.weight.clone();
        let gap = std::mem::replace(end, weight.end)..weight.start;
        Some([(gap, 0.0), (weight, 0.1)])
    });
    let groups: Vec<_> = pieces
        .chain(between.flatten())
        .map(|(range, weight_decay)| Group {
            range: range.start.max(shard.start)..range.end.min(shard.end),
            weight_decay,
        })
        .filter(|group| group.range.start < group.range.end)
        .collect();
    if at_once {
        let update = Update {
            step: STEP,
            shard: shard.clone(),
            groups: &groups,
            numbers,
            parameters: &mut parameters,
            gradients: &gradients,
            moments: &mut moments,
        };
        backend.update(update, projections, &mut weights).unwrap();
    } else {
        let (p, [m, v]) = (&mut parameters, &mut moments);
        for Group { range, weight_decay } in groups {
            let step = AdamW { weight_decay, ..STEP };
            let from = range.start - shard.start;
            backend.adamw(&step, numbers, range, p, &gradients, from, m, v).unwrap();
        }
        for projection in projections.iter().filter(|projection| projection.lies_in(shard)) {
            backend.prepare(std::slice::from_ref(projection), p, &mut weights).unwrap();
        }
    }
    let mut results = vec![backend.flat_values(&parameters, flat.len())];
    results.extend(moments.iter().map(|moment| backend.flat_values(moment, shard.len())));
    let parameters = Parameters { flat: &parameters, weights: &weights };
    let x = random.values(rows * inputs, 1.0);
    let x = backend.filled(&x, Precision::Activation);
    let mut y: Vec<_> = outputs.iter().map(|&n| backend.product_tensor(rows, n).unwrap()).collect();
    let all: Vec<&Projection> = projections.iter().collect();
    backend.project(parameters, norm, &x, &all, &mut y.iter_mut().collect::<Vec<_>>()).unwrap();
    let mut dx = backend.filled(&vec![0.0; rows * inputs], Precision::Full);
    let mut gradients = backend.flat_zeros(flat.len()).unwrap();
    let dy: Vec<_> = y.iter().collect();
    backend.project_backward(parameters, norm, &x, &all, &dy, &mut dx, &mut gradients).unwrap();
    results.extend(y.iter().zip(outputs).map(|(y, n)| backend.values(y, rows * n)));
    results.push(backend.values(&dx, rows * inputs));
    results
}

#[test]
fn a_step_with_its_weights_is_operation_by_operation_bit_for_bit() {
    let mut gpu = gpu();
    for (rows, inputs, outputs, count, ternary) in [
        (17, 64, 96, 2, true),
        (5, 40, 24, 1, false),
        (3, 33, 7, 1, true),
        // More parts than a launch takes, and pieces that are not next to each other.
        (20, 1024, 1536, 1, true),
    ] {
        let counts = vec![outputs; count];
        let setting = Setting::new(&mut Random(31), rows, inputs, &counts, ternary);
        let end = setting.flat.len();
        let inside = setting.projections[0].weight.start + 4;
        let shards = [
            (0..end, 0.6),
            (0..end - 8, 0.6),
            (inside..end, 0.6),
            (inside + 1..end, 0.6),
            (0..end, f64::NAN),
        ];
        for (shard, factor) in shards.into_iter().take(if count > 1 { 5 } else { 2 }) {
            let what =
                format!("{rows} x {inputs} x {outputs}, {count}, {ternary}, {shard:?}, {factor}");
            if end < 1 << 18 {
                let run = |at_once| updated(&mut cpu(), &setting, &shard, factor, at_once);
                assert!(run(true) == run(false), "CPU, {what}");
            }
            let Some(gpu) = &mut gpu else { continue };
            let mut run = |at_once| updated(gpu, &setting, &shard, factor, at_once);
            let (found, expected) = (run(true), run(false));
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found == expected, "{what}: result {at}");
            }
        }
    }
}

/// Norm and factor for given losses and sums of squares after a factor, and parameters after a step with them: as bits.
fn clipped<B: Fill>(backend: &mut B, factor: f64, losses: &[f64], squares: &[f64]) -> Vec<u64> {
    let all = [&[0.0, factor], losses, squares].concat();
    let mut clip = vec![0.0; all.len() * ELEMENTS];
    numbers::set(&mut clip, 0, &all);
    let mut clip = backend.flat_from(&clip).unwrap();
    backend.clip(&mut clip, losses.len(), 1.5).unwrap();
    let mut flat = |value| backend.flat_from(&[value; 7]).unwrap();
    let (mut p, g, mut m, mut v) = (flat(0.3), flat(0.7), flat(0.1), flat(0.2));
    backend.adamw(&STEP, &clip, 0..7, &mut p, &g, 0, &mut m, &mut v).unwrap();
    let found = numbers::all(&backend.flat_values(&clip, LOSSES * ELEMENTS));
    let changed = [p, m, v].map(|flat| backend.flat_values(&flat, 7));
    // NaNs differ in their sign.
    let bits = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
    let floats = changed.concat().into_iter().map(f64::from);
    found.into_iter().chain(floats).map(bits).collect()
}

#[test]
fn clipping_is_the_cpus_bit_for_bit() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(23);
    for count in [1, 255, 256, 257, 5000] {
        let squares: Vec<f64> =
            random.values(count, 1.0).iter().map(|&x| f64::from(x * x) / 3.0).collect();
        for (factor, loss) in [(0.0, 2.0), (1.0, f64::NAN), (1.0, f64::INFINITY), (f64::NAN, 2.0)] {
            for poisoned in [false, true] {
                let mut squares = squares.clone();
                if poisoned {
                    squares[count / 2] = f64::INFINITY;
                }
                let run = [
                    clipped(&mut gpu, factor, &[1.0, loss], &squares),
                    clipped(&mut cpu(), factor, &[1.0, loss], &squares),
                ];
                assert_eq!(run[0], run[1], "{count} sums, factor {factor}, loss {loss}");
                let untouched = f64::from(0.3f32).to_bits();
                let changes = factor == 0.0 && loss == 2.0 && !poisoned;
                assert_eq!(run[0][2] != untouched, changes);
            }
        }
    }
}

fn attentions<B: Fill>(backend: &mut B, shape: AttentionShape) -> Results {
    let mut random = Random(17);
    let (rows, width) = (shape.batch.tokens(), shape.heads * shape.head_size);
    let qkv = random.values(rows * 3 * width, 1.0);
    let mut qkv = backend.filled(&qkv, Precision::Activation);
    backend.rope(shape, 10_000.0, &mut qkv, false).unwrap();
    let rotated = backend.values(&qkv, rows * 3 * width);
    let mut y = backend.tensor(rows * width, Precision::Activation).unwrap();
    let mut log_sums = backend.tensor(rows * shape.heads, Precision::Full).unwrap();
    backend.attention(shape, &qkv, &mut y, &mut log_sums).unwrap();
    let dy = random.values(rows * width, 1e-2);
    let dy = backend.filled(&dy, Precision::Activation);
    let mut d_qkv = backend.tensor(rows * 3 * width, Precision::Activation).unwrap();
    backend.attention_backward(shape, &qkv, &y, &log_sums, &dy, &mut d_qkv).unwrap();
    let d_rotated = backend.values(&d_qkv, rows * 3 * width);
    backend.rope(shape, 10_000.0, &mut d_qkv, true).unwrap();
    vec![
        ("rotated", rotated),
        ("attention", backend.values(&y, rows * width)),
        ("log sums", backend.values(&log_sums, rows * shape.heads)),
        ("d rotated", d_rotated),
        ("d qkv", backend.values(&d_qkv, rows * 3 * width)),
    ]
}

#[test]
fn attention_agrees_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (sequences, length, heads, head_size) in [
        (1, 1, 1, 64),
        (2, 5, 2, 16),
        (1, 64, 1, 64),
        (1, 65, 2, 32),
        (2, 200, 3, 64),
        (1, 300, 2, 128),
        (1, 130, 2, 6),
        (1, 257, 1, 80),
    ] {
        let shape = AttentionShape { batch: BatchShape { sequences, length }, heads, head_size };
        let (found, expected) = (attentions(&mut gpu, shape), attentions(&mut cpu(), shape));
        let what = format!("attention {sequences} x {length}, {heads} heads of {head_size}");
        compare(&what, 2.0 * OPERATION, found, expected);
    }
}

/// A gated linear unit and a norm gate, each in front of a BitLinear layer on a residual stream.
fn gated_projections<B: Fill>(backend: &mut B, setting: &Setting) -> Results {
    let mut random = Random(13);
    let Setting { rows, inputs, ref outputs, ref norm, ref projections, ref flat } = *setting;
    let (projection, n) = (&projections[0], outputs[0]);
    let shape = BatchShape { sequences: 1, length: rows };
    let mut weights = backend.weights(projections).unwrap();
    let flat_buffer = backend.flat_from(flat).unwrap();
    backend.reserve(projections, shape, &setting.head(), None).unwrap();
    backend.prepare(projections, &flat_buffer, &mut weights).unwrap();
    let parameters = Parameters { flat: &flat_buffer, weights: &weights };
    let mut tensor = |backend: &mut B, columns, size, precision| {
        let values = random.values(rows * columns, size);
        backend.filled(&values, precision)
    };
    let half = Precision::Activation;
    let ab = tensor(backend, 2 * inputs, 1.5, half);
    let (g, h) = (tensor(backend, inputs, 2.0, half), tensor(backend, inputs, 1.0, half));
    let residual = tensor(backend, n, 1.0, half);
    let d_output = tensor(backend, n, 1e-3, Precision::Full);
    let empty = |backend: &mut B, columns| backend.tensor(rows * columns, half).unwrap();
    let mut scratch = [empty(backend, inputs), empty(backend, inputs)];
    let [y, dy] = &mut scratch;
    let mut output = empty(backend, n);
    let mut results = Vec::new();

    backend.project_swiglu(parameters, projection, &ab, &residual, y, &mut output).unwrap();
    results.push(("behind a gated linear unit", backend.values(&output, rows * n)));
    let mut d_ab = empty(backend, 2 * inputs);
    let mut gradients = backend.flat_zeros(flat.len()).unwrap();
    let into = &mut gradients;
    backend
        .project_swiglu_backward(parameters, projection, &ab, &d_output, y, dy, &mut d_ab, into)
        .unwrap();
    results.push(("d ab", backend.values(&d_ab, 2 * rows * inputs)));
    let found = backend.flat_values(&gradients, flat.len());
    let inner = projection.inner_norm.clone().unwrap();
    results
        .push(("d weight behind a gated linear unit", found[projection.weight.clone()].to_vec()));
    results.push(("d inner norm behind a gated linear unit", found[inner.clone()].to_vec()));

    let (mut dg, mut dh) = (empty(backend, inputs), empty(backend, inputs));
    let out = &mut output;
    backend.project_norm_gate(parameters, norm, projection, &g, &h, &residual, y, out).unwrap();
    results.push(("behind a norm gate", backend.values(&output, rows * n)));
    let mut gradients = backend.flat_zeros(flat.len()).unwrap();
    let into = &mut gradients;
    let (d_g, d_h) = (&mut dg, &mut dh);
    backend
        .project_norm_gate_backward(
            parameters, norm, projection, &g, &h, &d_output, y, dy, d_g, d_h, into,
        )
        .unwrap();
    results.push(("dg", backend.values(&dg, rows * inputs)));
    results.push(("dh", backend.values(&dh, rows * inputs)));
    let found = backend.flat_values(&gradients, flat.len());
    results.push(("d gate norm", found[norm.weight.clone()].to_vec()));
    results.push(("d weight behind a norm gate", found[projection.weight.clone()].to_vec()));
    results.push(("d inner norm behind a norm gate", found[inner].to_vec()));
    results
}

#[test]
fn gates_in_front_of_projections_agree_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    for (rows, inputs, outputs) in SIZES.into_iter().chain([(300, 2816, 1024), (70, 5632, 40)]) {
        let setting = Setting::new(&mut Random(rows as u64), rows, inputs, &[outputs], true);
        let found = gated_projections(&mut gpu, &setting);
        let expected = gated_projections(&mut cpu(), &setting);
        compare(&format!("gates {rows} x {inputs} x {outputs}"), QUANTISED, found, expected);
    }
}
