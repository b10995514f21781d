//! CPU and CUDA kernels of MatMul-free language models and their training, and the only crate of the workspace with unsafe code.
//!
//! | module | holds |
//! |---|---|
//! | [`cuda`] | GPU: device, memory, kernels compiled at first use |
//! | [`memory`] | files mapped into memory, and the arena that holds packed weights |
//! | [`ternary`] | ternary quantiser, packed formats, [`TernaryMatrix`](ternary::TernaryMatrix) |
//! | [`activations`], [`ternary_gemm`] | 8-bit activations and their products with trits |
//! | [`rms_norm`], [`norm_gate`], [`swiglu`], [`mlgru`], [`embedding`] | float operations, forward and backward |
//! | [`bit_linear`], [`cross_entropy`], [`adamw`] | what training adds: gradients of ternary layers, loss, optimiser |
//! | [`attention`], [`rope`] | the Transformer++ baseline |
//! | [`gemm`] | dense products in f32 |
//! | [`sampling`] | weights of logits, and tokens drawn from them on a GPU |
//! | [`decode`], [`batch`] | one token of one or of many sequences through all layers, in one launch |
//! | [`training`] | the operations of a training step on a GPU |
//! | [`column_sum`] | sums over the tokens of a batch that no number of threads changes |
//! | [`pool`], [`tier`] | threads, and instruction sets chosen at run time |
//!
//! Dimension letters: M tokens (rows of activations), N outputs, K inputs.

pub mod activations;
pub mod adamw;
pub mod attention;
pub mod bandwidth;
pub mod batch;
pub mod bit_linear;
pub mod column_sum;
pub mod cross_entropy;
pub mod cuda;
pub mod decode;
pub mod embedding;
pub mod fused_rows;
pub mod gemm;
mod lanes;
pub mod memory;
pub mod mlgru;
pub mod norm_gate;
pub mod pool;
pub mod rms_norm;
pub mod rope;
pub mod sampling;
pub mod swiglu;
pub mod ternary;
pub mod ternary_gemm;
pub mod tier;
pub mod training;
