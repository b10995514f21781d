//! Training of MatMul-free language models, from raw text to a checkpoint.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`TrainConfig`](config::TrainConfig): one TOML file, every key with a default |
//! | [`schedule`] | learning rate and weight decay over the steps |
//! | [`communicator`] | [`Communicator`](communicator::Communicator): processes that train together |
//! | [`error`] | [`Error`](error::Error) |
#![forbid(unsafe_code)]

pub mod communicator;
pub mod config;
pub mod error;
pub mod schedule;
