//! Training of MatMul-free language models, from raw text to a checkpoint.
//!
//! | module | holds |
//! |---|---|
//! | [`architecture`] | [`Architecture`](architecture::Architecture): the MatMul-free model or Transformer++ |
//! | [`parameters`] | [`ParameterLayout`](parameters::ParameterLayout): all parameters in one flat buffer |
//! | [`backend`] | [`Backend`](backend::Backend): the fused operations, forward and backward; the CPU |
//! | [`model`] | [`Model`](model::Model): loss and gradients, written once over a backend |
//! | [`weights`] | parameters from and to Hugging Face directories |
//! | [`data`] | raw text to token shards, token shards to batches |
//! | [`log`] | what a run reports: JSON lines and TensorBoard event files |
//! | [`plot`] | loss curves of runs |
#![forbid(unsafe_code)]

pub mod architecture;
pub mod backend;
pub mod data;
pub mod log;
pub mod model;
pub mod parameters;
pub mod plot;
pub mod weights;
