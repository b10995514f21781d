//! Which tensors a model has: their names, kinds and shapes.

use crate::config::ModelConfig;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// Weight of a BitLinear layer [N, K].
    Ternary,
    /// The embedding table [V, D].
    Embeddings,
    /// Weight of an RMSNorm, `[width]`.
    Norm,
    /// The learned lower bounds [L, D].
    LowerBounds,
}

/// A tensor that the configuration demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in a Hugging Face checkpoint; packed files keep it.
    pub name: String,
    /// What it is for.
    pub kind: TensorKind,
    /// Logical shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(name: impl Into<String>, kind: TensorKind, shape: &[usize]) -> Self {
        Self { name: name.into(), kind, shape: shape.to_vec() }
    }

    /// How many values the tensor has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Name of the embedding table.
pub(crate) const EMBEDDINGS: &str = "model.embeddings.weight";
/// Name of the lower bounds.
pub(crate) const LOWER_BOUNDS: &str = "model.lower_bounds";

/// Every tensor of a model, in the order in which a forward pass meets them.
pub fn expected_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let (d, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let mut tensors = vec![TensorSpec::new(EMBEDDINGS, TensorKind::Embeddings, &[v, d])];
    if config.use_lower_bound {
        let shape = [config.num_hidden_layers, d];
        tensors.push(TensorSpec::new(LOWER_BOUNDS, TensorKind::LowerBounds, &shape));
    }
    let norm = |tensors: &mut Vec<TensorSpec>, name: String, width| {
        tensors.push(TensorSpec::new(name, TensorKind::Norm, &[width]));
    };
    let bit_linear = |tensors: &mut Vec<TensorSpec>, name: String, outputs, inputs| {
        norm(tensors, format!("{name}.norm.weight"), inputs);
        let shape = [outputs, inputs];
        tensors.push(TensorSpec::new(format!("{name}.weight"), TensorKind::Ternary, &shape));
    };
    for layer in 0..config.num_hidden_layers {
        let block = format!("model.layers.{layer}");
        norm(&mut tensors, format!("{block}.attn_norm.weight"), d);
        for projection in ["i_proj", "f_proj", "g_proj"] {
            bit_linear(&mut tensors, format!("{block}.attn.{projection}"), d, d);
        }
        norm(&mut tensors, format!("{block}.attn.g_norm.weight"), d);
        bit_linear(&mut tensors, format!("{block}.attn.o_proj"), d, d);
        norm(&mut tensors, format!("{block}.mlp_norm.weight"), d);
        bit_linear(&mut tensors, format!("{block}.mlp.gate_proj"), 2 * f, d);
        bit_linear(&mut tensors, format!("{block}.mlp.down_proj"), d, f);
    }
    norm(&mut tensors, "model.norm.weight".to_owned(), d);
    bit_linear(&mut tensors, "lm_head".to_owned(), v, d);
    tensors
}
