//! Training of MatMul-free language models, from raw text to a checkpoint.
//!
//! | module | holds |
//! |---|---|
#![forbid(unsafe_code)]
