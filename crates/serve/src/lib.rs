//! An OpenAI-compatible HTTP server for MatMul-free language models.
//!
//! Such a model remembers a text in a state of constant size, some kilobytes. So a server holds thousands of
//! conversations, puts one aside at no cost, resumes it in a millisecond and hands it to another machine.
//!
//! | module | holds |
//! |---|---|
//! | `scheduler` | continuous batching: one thread that owns the engine, queues, fairness, the prefix cache |
//! | `api` | routes, requests and answers, streams |
//! | `sessions` | named sessions, in this process or in Redis or Valkey |
//! | `constraint` | structured output |
//! | `server` | [`Server`]: connections, TLS, limits, the end |
//! | [`log`] | [`Log`](log::Log): JSON lines |
//! | [`options`] | [`Options`](options::Options) and [`Limits`](options::Limits) |
//!
//! Async code lives in this crate only; the engine's thread is an ordinary one.
#![forbid(unsafe_code)]

mod api;
mod constraint;
mod error;
pub mod log;
mod metrics;
pub mod options;
mod scheduler;
mod server;
mod sessions;
mod vocabulary;

pub use server::{ServeError, ServedModel, Server, serve_until_signal};
