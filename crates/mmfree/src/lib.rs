//! MatMul-free language models: configuration, checkpoints, tokenizers, the model and its engine.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`ModelConfig`](config::ModelConfig): sizes and constants, from `config.json` or GGUF metadata |
//! | [`checkpoint`] | Hugging Face directories and GGUF files, in and out |
//! | [`error`] | [`Error`](error::Error), the one error type of this crate |
//!
//! Dimension letters: B batch, T time, D hidden size, F intermediate size, L layers, V vocabulary.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod error;
pub mod model;
pub mod state;
pub mod tokenizer;
