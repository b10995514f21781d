//! Sizes and constants of a model.

/// Configuration of a MatMul-free language model (`model_type` `hgrn_bit`), validated.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// V, rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// D, width of the residual stream and of the recurrent state.
    pub hidden_size: usize,
    /// F, width of the GLU channel mixer; `gate_proj` is [2F, D].
    pub intermediate_size: usize,
    /// L, number of blocks.
    pub num_hidden_layers: usize,
    /// ε of the norms outside BitLinear (inside it is always 1e-6).
    pub rms_norm_eps: f32,
    /// Whether forget gates have the learned lower bounds β; without them β = 0.
    pub use_lower_bound: bool,
    /// Token that begins a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}
