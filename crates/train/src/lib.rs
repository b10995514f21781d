//! Training of MatMul-free language models, from raw text to a checkpoint.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`TrainConfig`](config::TrainConfig): one TOML file, every key with a default |
//! | [`architecture`] | [`Architecture`](architecture::Architecture): the MatMul-free model or Transformer++ |
//! | [`parameters`] | [`ParameterLayout`](parameters::ParameterLayout): all parameters in one flat buffer |
//! | [`backend`] | [`Backend`](backend::Backend): the fused operations, forward and backward; the CPU, NVIDIA GPUs |
//! | [`benchmark`] | how fast a model trains |
//! | [`model`] | [`Model`](model::Model): loss and gradients, written once over a backend |
//! | [`likelihood`] | [`FullPrecisionScorer`](likelihood::FullPrecisionScorer): evaluation of the Transformer++ |
//! | [`weights`] | parameters from and to Hugging Face directories |
//! | [`data`] | raw text to token shards, token shards to batches |
//! | [`log`] | what a run reports: JSON lines and TensorBoard event files |
//! | [`plot`] | loss curves of runs |
//! | [`scaling`] | scaling laws of runs, and where architectures cross |
//! | [`optimizer`] | AdamW over parameter groups, its moments sharded over processes |
//! | [`outcome`] | [`Outcomes`](outcome::Outcomes): loss, gradient norm and clip factor of steps, on the device |
//! | [`schedule`] | learning rate and weight decay over the steps |
//! | [`communicator`] | [`Communicator`](communicator::Communicator): processes that train together |
//! | [`checkpoint`] | [`Checkpoints`](checkpoint::Checkpoints): what a run resumes from |
//! | [`trainer`] | [`Trainer`](trainer::Trainer): the loop |
//! | [`error`] | [`Error`](error::Error) |
#![forbid(unsafe_code)]

pub mod architecture;
pub mod backend;
pub mod benchmark;
pub mod checkpoint;
pub mod communicator;
pub mod config;
pub mod data;
pub mod error;
pub mod likelihood;
pub mod log;
pub mod model;
pub mod optimizer;
pub mod outcome;
pub mod parameters;
pub mod plot;
pub mod scaling;
pub mod schedule;
pub mod trainer;
pub mod weights;
