//! Training of MatMul-free language models, from raw text to a checkpoint.
//!
//! | module | holds |
//! |---|---|
//! | [`data`] | raw text to token shards, token shards to batches |
//! | [`log`] | what a run reports: JSON lines and TensorBoard event files |
#![forbid(unsafe_code)]

pub mod data;
pub mod log;
