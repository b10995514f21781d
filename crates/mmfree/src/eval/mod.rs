//! Evaluation: zero-shot and few-shot tasks, and perplexity of texts.
//!
//! Prompts, token boundaries and metrics are those of EleutherAI's lm-evaluation-harness (0.4), so that its
//! figures can be compared with these. `docs/evaluation.md` says how that was checked and where they differ.
//!
//! | module | holds |
//! |---|---|
//! | [`tasks`] | the tasks: their published files, prompts and metrics |
//! | [`files`] | JSON lines and label lists, with file, line and field in every error |
//! | `shots` | which examples stand before a question |
//! | [`request`] | texts to tokens, and where the continuation begins |
//! | [`scorer`] | [`Scorer`](scorer::Scorer): log-likelihoods of continuations; the engine as one |
//! | [`metrics`] | accuracies and their standard errors |
//! | [`harness`] | a task from file to result |
//! | [`perplexity`] | perplexity and bits per byte of texts of any length |
//! | `python` | what Python's strings and random numbers do, where prompts depend on it |

pub mod files;
pub mod harness;
pub mod metrics;
pub mod perplexity;
mod python;
pub mod request;
pub mod scorer;
mod shots;
pub mod tasks;
