//! Training of MatMul-free language models, from raw text to a checkpoint.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`TrainConfig`](config::TrainConfig): one TOML file, every key with a default |
//! | [`architecture`] | [`Architecture`](architecture::Architecture): the MatMul-free model or Transformer++ |
//! | [`parameters`] | [`ParameterLayout`](parameters::ParameterLayout): all parameters in one flat buffer |
//! | [`backend`] | [`Backend`](backend::Backend): the fused operations, forward and backward; the CPU |
//! | [`model`] | [`Model`](model::Model): loss and gradients, written once over a backend |
//! | [`weights`] | parameters from and to Hugging Face directories |
//! | [`schedule`] | learning rate and weight decay over the steps |
//! | [`communicator`] | [`Communicator`](communicator::Communicator): processes that train together |
//! | [`error`] | [`Error`](error::Error) |
#![forbid(unsafe_code)]

pub mod architecture;
pub mod backend;
pub mod communicator;
pub mod config;
pub mod error;
pub mod model;
pub mod parameters;
pub mod schedule;
pub mod weights;
