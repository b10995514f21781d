//! The parameters of a model in one flat buffer, and their initial values.

use std::collections::HashMap;
use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a parameter is, for optimiser groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParameterKind {
    /// Weight of a dense layer [N, K], the head included.
    Matrix,
    /// Weight of an RMSNorm, those inside BitLinear included.
    Norm,
    /// The embedding table [V, D].
    Embedding,
    /// The learned lower bounds of the forget gates [L, D].
    LowerBounds,
}

/// A tensor of the model and its place in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name in a Hugging Face checkpoint.
    pub name: String,
    /// Outermost dimension first; stored row-major.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParameterKind,
    /// Elements of the flat buffer.
    pub range: Range<usize>,
}

/// Every parameter of a model, in the order of the flat buffer, without gaps.
///
/// Gradients and the optimiser's moments are flat buffers of the same layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterLayout {
    parameters: Vec<Parameter>,
    by_name: HashMap<String, usize>,
}

impl ParameterLayout {
    /// Places tensors one behind the other.
    pub(crate) fn new(
        tensors: impl IntoIterator<Item = (String, Vec<usize>, ParameterKind)>,
    ) -> Self {
        let mut end = 0;
        let place = |(name, shape, kind): (String, Vec<usize>, ParameterKind)| {
            let start = end;
            end += shape.iter().product::<usize>();
            Parameter { name, shape, kind, range: start..end }
        };
        let parameters: Vec<_> = tensors.into_iter().map(place).collect();
        let by_name = parameters.iter().enumerate().map(|(at, p)| (p.name.clone(), at)).collect();
        Self { parameters, by_name }
    }

    /// The parameters, in the order of the flat buffer.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.parameters.last().map_or(0, |parameter| parameter.range.end)
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Weights in matrices: what a token is multiplied with. The embedding table is only looked up.
    pub fn matrix_weights(&self) -> usize {
        let matrices = self.parameters.iter().filter(|p| p.kind == ParameterKind::Matrix);
        matrices.map(|parameter| parameter.range.len()).sum()
    }

    /// Parts of the flat buffer in the order in which a backward pass is done with their gradients: what is behind the
    /// blocks, the blocks from the last to the first, what is before them.
    pub fn backward_order(&self, blocks: usize) -> Vec<Range<usize>> {
        let of_block = |block: usize| {
            let prefix = format!("model.layers.{block}.");
            let mut own = self.parameters.iter().filter(|p| p.name.starts_with(&prefix));
            own.next().map(|first| first.range.start)
        };
        let mut end = self.len();
        let behind =
            self.parameters.iter().rev().take_while(|p| !p.name.starts_with("model.layers."));
        let tail = behind.last().map_or(end, |parameter| parameter.range.start);
        let starts = std::iter::once(Some(tail)).chain((0..blocks).rev().map(of_block));
        let mut parts: Vec<_> = starts
            .flatten()
            .map(|start| {
                let part = start..end;
                end = start;
                part
            })
            .collect();
        parts.push(0..end);
        parts
    }

    /// A parameter by name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name).map(|&at| &self.parameters[at])
    }

    /// The place of a parameter that the architecture has.
    ///
    /// # Panics
    /// If it has none of this name.
    pub(crate) fn range(&self, name: &str) -> Range<usize> {
        let parameter = self.get(name).unwrap_or_else(|| panic!("no parameter {name}"));
        parameter.range.clone()
    }

    /// Initial values, as the authors' released code draws them: matrices and embeddings from a normal
    /// distribution with standard deviation `initializer_range`, then the two projections of each block
    /// that write to the residual stream (`o_proj`, `down_proj`) divided by sqrt(2 L); norms 1, lower
    /// bounds 0. The values of a tensor depend on the seed and its name only.
    pub fn initialize(&self, seed: u64, initializer_range: f32) -> Vec<f32> {
        let is_residual =
            |name: &str| name.ends_with(".o_proj.weight") || name.ends_with(".down_proj.weight");
        let residuals = self.parameters.iter().filter(|p| is_residual(&p.name)).count();
        let mut values = vec![0.0; self.len()];
        for parameter in &self.parameters {
            let values = &mut values[parameter.range.clone()];
            match parameter.kind {
                ParameterKind::Norm => values.fill(1.0),
                ParameterKind::LowerBounds => {}
                ParameterKind::Matrix | ParameterKind::Embedding => {
                    // Every block has two such projections, so their number is 2 L.
                    let shrink =
                        if is_residual(&parameter.name) { (residuals as f64).sqrt() } else { 1.0 };
                    let deviation = f64::from(initializer_range) / shrink;
                    fill_normal(values, seed, &parameter.name, deviation);
                }
            }
        }
        values
    }
}

/// Normal values by Box and Muller's method from ChaCha8, whose key is the seed and a hash of the name.
fn fill_normal(values: &mut [f32], seed: u64, name: &str, deviation: f64) {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let hash = twox_hash::XxHash3_64::oneshot(name.as_bytes());
    key[8..16].copy_from_slice(&hash.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    // In (0, 1], so that the logarithm is finite.
    let mut uniform = || ((random.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    for pair in values.chunks_mut(2) {
        let radius = deviation * (-2.0 * uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
        for (value, part) in pair.iter_mut().zip([cos, sin]) {
            *value = (radius * part) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backward_order_goes_from_the_head_to_the_embeddings() {
        let names =
            ["e", "model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "norm", "head"];
        let tensors = names.iter().enumerate();
        let layout = ParameterLayout::new(
            tensors.map(|(n, name)| (name.to_string(), vec![n + 1], ParameterKind::Matrix)),
        );
        assert_eq!(layout.backward_order(2), [10..21, 6..10, 1..6, 0..1]);
        for size in ["tiny", "20m"] {
            for transformer in [false, true] {
                let architecture = crate::benchmark::architecture(size, transformer).unwrap();
                let layout = architecture.layout();
                let parts = layout.backward_order(architecture.layers());
                assert_eq!(parts.len(), architecture.layers() + 2);
                assert_eq!((parts[0].end, parts[parts.len() - 1].start), (layout.len(), 0));
                assert!(parts.windows(2).all(|pair| pair[1].end == pair[0].start));
                assert!(parts.iter().all(|part| !part.is_empty()));
                let head = layout.range("lm_head.weight");
                assert!(parts[0].start < head.start && head.end == parts[0].end);
            }
        }
    }

    #[test]
    fn initial_values_have_the_asked_spread_and_depend_on_seed_and_name_only() {
        let tensors = |names: &[&str]| {
            let tensor = |name: &&str| (name.to_string(), vec![100, 101], ParameterKind::Matrix);
            ParameterLayout::new(names.iter().map(tensor).collect::<Vec<_>>())
        };
        let layout = tensors(&["a.weight", "l.0.o_proj.weight", "l.0.down_proj.weight"]);
        let values = layout.initialize(7, 0.02);
        let deviation = |values: &[f32]| {
            let n = values.len() as f64;
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt()
        };
        assert!((deviation(&values[layout.range("a.weight")]) / 0.02 - 1.0).abs() < 0.03);
        let shrunk = deviation(&values[layout.range("l.0.o_proj.weight")]);
        assert!((shrunk / (0.02 / 2f64.sqrt()) - 1.0).abs() < 0.03);
        let other = tensors(&["b.weight", "a.weight"]);
        let again = other.initialize(7, 0.02);
        assert_eq!(values[layout.range("a.weight")], again[other.range("a.weight")]);
        assert_ne!(again[other.range("b.weight")], again[other.range("a.weight")]);
        assert_ne!(again, other.initialize(8, 0.02));
    }
}
