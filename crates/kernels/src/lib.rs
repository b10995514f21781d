//! CPU kernels of MatMul-free language models, and the only crate of the workspace with unsafe code.
//!
//! | module | holds |
//! |---|---|
//! | [`memory`] | files mapped into memory, and the arena that holds packed weights |
//! | [`ternary`] | ternary quantiser, packed formats, [`TernaryMatrix`](ternary::TernaryMatrix) |
//!
//! Dimension letters: M tokens (rows of activations), N outputs, K inputs.

pub mod activations;
pub mod adamw;
pub mod attention;
pub mod bandwidth;
pub mod bit_linear;
pub mod column_sum;
pub mod cross_entropy;
pub mod embedding;
pub mod gemm;
mod lanes;
pub mod memory;
pub mod mlgru;
pub mod norm_gate;
pub mod pool;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
pub mod ternary;
pub mod ternary_gemm;
pub mod tier;
