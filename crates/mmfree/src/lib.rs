//! MatMul-free language models: configuration, checkpoints, tokenizers, the model and its engine.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`ModelConfig`](config::ModelConfig): sizes and constants, from `config.json` or GGUF metadata |
//! | [`checkpoint`] | Hugging Face directories and GGUF files, in and out |
//! | [`builtin`] | the trained model inside the program |
//! | [`model`] | [`Model`](model::Model): weights as the engine streams them |
//! | [`engine`] | [`Engine`](engine::Engine): prefill and decode of many sequences |
//! | [`state`] | [`State`](state::State): the memory of one sequence, to and from bytes |
//! | [`tokenizer`] | text to token ids and back, whole or as a stream |
//! | [`sampler`] | [`Sampler`](sampler::Sampler): logits to a token |
//! | [`text`] | text out of a model: generation, stop strings, chat templates |
//! | [`eval`] | tasks as lm-evaluation-harness scores them, and perplexity |
//! | [`benchmark`] | speed of prefill and decode against the machine's memory bandwidth |
//! | [`output`] | files that appear complete or not at all |
//! | [`error`] | [`Error`](error::Error), the one error type of this crate |
//!
//! Dimension letters: B batch, T time, D hidden size, F intermediate size, L layers, V vocabulary.
#![forbid(unsafe_code)]

pub mod benchmark;
pub mod builtin;
pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod error;
pub mod eval;
mod json;
pub mod model;
pub mod output;
pub mod sampler;
pub mod state;
pub mod text;
pub mod tokenizer;
