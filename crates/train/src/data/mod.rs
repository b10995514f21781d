//! From raw text to batches of token ids.
//!
//! | type | does |
//! |---|---|
//! | [`tokenize`] | files of text to a directory of token shards |
//! | [`train_tokenizer`] | files of text to a byte-level BPE tokenizer |
//! | [`TokenShard`], [`ShardWriter`] | one file of token ids, memory-mapped |
//! | [`Manifest`] | what a directory of shards was made of, and by which tokenizer |
//! | [`Dataset`] | all shards of one or more directories as one stream of tokens |
//! | [`Loader`] | batches as a pure function of seed and step |
//! | [`Permutation`] | a shuffle that is computed instead of stored |
//!
//! `docs/token-shards.md` has the byte layout. Letters: B batch, T time.

mod bpe;
mod dataset;
mod differences;
mod held_out;
mod loader;
mod manifest;
mod permutation;
mod pipeline;
mod shard;
mod source;
pub mod tokenize;

pub use bpe::{TokenizerTraining, TrainedTokenizer, train_tokenizer};
pub use dataset::Dataset;
pub use held_out::Part;
pub use loader::{Batch, Loader, LoaderOptions, Order, share};
pub use manifest::{Manifest, ManifestShard, ManifestSource, ManifestTokenizer, PartOf};
pub use permutation::Permutation;
pub use shard::{ShardHeader, ShardWriter, TokenShard, TokenWidth};
pub use source::read_documents;
