//! The Transformer++: outputs against PyTorch's Llama (`tests/fixtures/transformer`), a program in f64 against
//! the same, and gradients against central differences of that program.

use std::collections::HashMap;
use std::path::PathBuf;

use mmfree::config::TransformerConfig;
use mmfree_train::architecture::Architecture;
use mmfree_train::backend::{BatchShape, CpuBackend, IGNORED};
use mmfree_train::model::{Batch, Model, ModelOptions};
use mmfree_train::parameters::ParameterLayout;
use mmfree_train::weights;
use safetensors::SafeTensors;

const LENGTH: usize = 9;

struct Fixture {
    architecture: Architecture,
    config: TransformerConfig,
    layout: ParameterLayout,
    parameters: Vec<f32>,
    /// [2, 9]
    ids: Vec<u32>,
    /// What PyTorch computed: `logits`, `loss`, and gradients by name.
    expected: HashMap<String, Vec<f32>>,
}

fn fixture() -> Fixture {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/transformer");
    let (architecture, parameters) = weights::load(&path).unwrap();
    let Architecture::Transformer(config) = architecture.clone() else { panic!("another model") };
    let bytes = std::fs::read(path.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = |data: &[u8]| -> Vec<[u8; 4]> { data.as_chunks().0.to_vec() };
    let ids = words(tensors.tensor("input_ids").unwrap().data());
    let ids = ids.into_iter().map(u32::from_le_bytes).collect();
    let expected = tensors
        .iter()
        .filter(|(name, _)| *name != "input_ids")
        .map(|(name, view)| {
            let values = words(view.data()).into_iter().map(f32::from_le_bytes).collect();
            (name.to_owned(), values)
        })
        .collect();
    let layout = architecture.layout();
    Fixture { architecture, config, layout, parameters, ids, expected }
}

impl Fixture {
    fn model(
        &self,
        backend: &mut CpuBackend,
        shape: BatchShape,
        recompute: bool,
    ) -> Model<CpuBackend> {
        let options = ModelOptions { recompute, head_chunk: 5, ..ModelOptions::default() };
        let mut model = Model::new(backend, &self.architecture, shape, &options).unwrap();
        model.update_weights(backend, &self.parameters).unwrap();
        model
    }

    /// Loss and gradients, each token predicting the next.
    fn gradients(&self, backend: &mut CpuBackend, recompute: bool) -> (f64, Vec<f32>) {
        let rows = || self.ids.chunks(LENGTH);
        let ids: Vec<u32> = rows().flat_map(|row| &row[..LENGTH - 1]).copied().collect();
        let targets: Vec<u32> = rows().flat_map(|row| &row[1..]).copied().collect();
        let shape = BatchShape { sequences: 2, length: LENGTH - 1 };
        let mut model = self.model(backend, shape, recompute);
        let mut gradients = vec![0.0; self.parameters.len()];
        let batch = Batch { ids: &ids, targets: &targets };
        model.accumulate(backend, &self.parameters, batch, 1.0, &mut gradients).unwrap();
        (model.take_loss(backend).unwrap(), gradients)
    }
}

/// Llama in f64, one sequence at a time, as its equations read.
struct Oracle<'a> {
    config: &'a TransformerConfig,
    layout: &'a ParameterLayout,
}

impl Oracle<'_> {
    fn get<'p>(&self, parameters: &'p [f64], name: &str) -> &'p [f64] {
        &parameters[self.layout.get(&format!("{name}.weight")).unwrap().range.clone()]
    }

    fn linear(weight: &[f64], x: &[f64]) -> Vec<f64> {
        let rows = weight.chunks(x.len());
        rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn norm(&self, weight: &[f64], x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let inverse = 1.0 / (mean + f64::from(self.config.rms_norm_eps)).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * inverse * w).collect()
    }

    fn rotate(&self, x: &mut [f64], position: usize) {
        let size = x.len() / self.config.num_attention_heads;
        for head in x.chunks_mut(size) {
            for j in 0..size / 2 {
                let frequency =
                    f64::from(self.config.rope_theta).powf(-2.0 * j as f64 / size as f64);
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let (low, high) = (head[j], head[j + size / 2]);
                head[j] = low * cos - high * sin;
                head[j + size / 2] = high * cos + low * sin;
            }
        }
    }

    fn logits(&self, parameters: &[f64], ids: &[u32]) -> Vec<Vec<f64>> {
        let (d, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let size = d / heads;
        let get = |name: &str| self.get(parameters, name);
        let table = get("model.embed_tokens");
        let mut x: Vec<Vec<f64>> =
            ids.iter().map(|&id| table[id as usize * d..][..d].to_vec()).collect();
        let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        for layer in 0..self.config.num_hidden_layers {
            let get = |part: &str| self.get(parameters, &format!("model.layers.{layer}.{part}"));
            let project = |name: &str, position: usize, x: &[f64]| {
                let normed = self.norm(get("input_layernorm"), x);
                let mut y = Self::linear(get(&format!("self_attn.{name}_proj")), &normed);
                if name != "v" {
                    self.rotate(&mut y, position);
                }
                y
            };
            let [q, k, v] = ["q", "k", "v"].map(|name| -> Vec<Vec<f64>> {
                x.iter().enumerate().map(|(position, x)| project(name, position, x)).collect()
            });
            for (position, x) in x.iter_mut().enumerate() {
                let mut mixed = vec![0.0; d];
                for head in 0..heads {
                    let part = head * size..(head + 1) * size;
                    let score = |key: &Vec<f64>| {
                        let pairs = q[position][part.clone()].iter().zip(&key[part.clone()]);
                        (pairs.map(|(q, k)| q * k).sum::<f64>() / (size as f64).sqrt()).exp()
                    };
                    let scores: Vec<f64> = k[..=position].iter().map(score).collect();
                    let total: f64 = scores.iter().sum();
                    for (score, v) in scores.iter().zip(&v) {
                        for c in part.clone() {
                            mixed[c] += score / total * v[c];
                        }
                    }
                }
                add(x, Self::linear(get("self_attn.o_proj"), &mixed));
                let normed = self.norm(get("post_attention_layernorm"), x);
                let gate = Self::linear(get("mlp.gate_proj"), &normed);
                let up = Self::linear(get("mlp.up_proj"), &normed);
                let z: Vec<f64> =
                    gate.iter().zip(&up).map(|(a, b)| a / (1.0 + (-a).exp()) * b).collect();
                add(x, Self::linear(get("mlp.down_proj"), &z));
            }
        }
        x.iter().map(|x| Self::linear(get("lm_head"), &self.norm(get("model.norm"), x))).collect()
    }

    /// Mean next-token cross-entropy.
    fn loss(&self, parameters: &[f64], ids: &[u32]) -> f64 {
        let rows = ids.chunks(LENGTH);
        let losses = rows.flat_map(|row| {
            let logits = self.logits(parameters, &row[..LENGTH - 1]);
            let pairs = logits.into_iter().zip(&row[1..]);
            pairs.map(|(z, &id)| -log_softmax(&z)[id as usize]).collect::<Vec<_>>()
        });
        let losses: Vec<f64> = losses.collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    }
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let log_sum = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
    logits.iter().map(|z| z - log_sum).collect()
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn backend(threads: usize) -> CpuBackend {
    CpuBackend::new(Some(threads), None).unwrap()
}

#[test]
fn outputs_agree_with_pytorch() {
    let fixture = fixture();
    let vocabulary = fixture.config.vocab_size;
    let expected: Vec<f64> = widen(&fixture.expected["logits"]);
    let expected: Vec<Vec<f64>> = expected.chunks(vocabulary).map(log_softmax).collect();

    let oracle = Oracle { config: &fixture.config, layout: &fixture.layout };
    let parameters = widen(&fixture.parameters);
    // PyTorch keeps norms and angles in f32 even in a model of f64.
    let sequences = fixture.ids.chunks(LENGTH);
    let found = sequences.flat_map(|ids| oracle.logits(&parameters, ids));
    for (found, expected) in found.zip(&expected) {
        for (found, expected) in log_softmax(&found).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "f64: {found} instead of {expected}");
        }
    }

    // The loss with a single target is the logarithm of that token's probability.
    let mut backend = backend(1);
    let shape = BatchShape { sequences: 2, length: LENGTH };
    let mut model = fixture.model(&mut backend, shape, false);
    for (position, expected) in expected.iter().enumerate() {
        for (id, expected) in expected.iter().enumerate() {
            let mut targets = vec![IGNORED; fixture.ids.len()];
            targets[position] = id as u32;
            let batch = Batch { ids: &fixture.ids, targets: &targets };
            model.evaluate(&mut backend, &fixture.parameters, batch, 1.0).unwrap();
            let found = -model.take_loss(&mut backend).unwrap();
            assert!((found - expected).abs() < 1e-5, "{found} instead of {expected}");
        }
    }
}

#[test]
fn gradients_agree_with_pytorch_and_with_finite_differences() {
    let fixture = fixture();
    let (loss, found) = fixture.gradients(&mut backend(2), false);
    assert!((loss - f64::from(fixture.expected["loss"][0])).abs() < 1e-6);
    assert_eq!((loss, found.clone()), fixture.gradients(&mut backend(1), true));
    let oracle = Oracle { config: &fixture.config, layout: &fixture.layout };
    let mut at = widen(&fixture.parameters);
    for parameter in fixture.layout.parameters() {
        let found = &found[parameter.range.clone()];
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let expected = &fixture.expected[&parameter.name];
        let mut differences =
            found.iter().zip(expected).map(|(&a, &b)| f64::from(a) - f64::from(b));
        let size = norm(&mut widen(expected).into_iter());
        let error = norm(&mut differences) / size;
        assert!(error < 1e-5, "{}: relative error {error:.1e}", parameter.name);
        // Some elements of each tensor: a difference costs four evaluations.
        let count = found.len();
        for index in (0..count).step_by(count.div_ceil(12)) {
            let place = parameter.range.start + index;
            let here = at[place];
            let mut slope = |step: f64| {
                at[place] = here + step;
                let above = oracle.loss(&at, &fixture.ids);
                at[place] = here - step;
                let below = oracle.loss(&at, &fixture.ids);
                at[place] = here;
                (above - below) / (2.0 * step)
            };
            let expected = (4.0 * slope(1e-4) - slope(2e-4)) / 3.0;
            let error = (f64::from(found[index]) - expected).abs();
            let typical = size / (count as f64).sqrt();
            assert!(
                error < 1e-5 * (expected.abs() + typical) + 1e-8,
                "{}[{index}]: {} instead of {expected}",
                parameter.name,
                found[index]
            );
        }
    }
}
