//! MatMul-free language models: configuration, checkpoints, tokenizers, the model and its engine.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`ModelConfig`](config::ModelConfig): sizes and constants, from `config.json` or GGUF metadata |
//! | [`checkpoint`] | Hugging Face directories and GGUF files, in and out |
//! | [`tokenizer`] | text to token ids and back, whole or as a stream |
//! | [`sampler`] | [`Sampler`](sampler::Sampler): logits to a token |
//! | [`text`] | text out of a model: generation, stop strings, chat templates |
//! | [`error`] | [`Error`](error::Error), the one error type of this crate |
//!
//! Dimension letters: B batch, T time, D hidden size, F intermediate size, L layers, V vocabulary.
#![forbid(unsafe_code)]

pub mod builtin;
pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod error;
pub mod model;
pub mod output;
pub mod sampler;
pub mod state;
pub mod text;
pub mod tokenizer;
