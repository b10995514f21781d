//! `mmfree logits`: what a model computes, for other programs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use mmfree::output::OutputFile;
use mmfree::state::State;
use serde_json::json;

use crate::interrupt;
use crate::model_arg::{self, EngineArgs};
use crate::token_ids::{self, TokenIds};

/// Write the logits of every position to a safetensors file
///
/// The file has tensor `logits` [T, V] f32, the logits after each of the T tokens, and tensor `state`
/// [L, D] f32, the recurrent state after the last. Several lists of ids, all of one length, are
/// independent sequences: they give [B, T, V] and [B, L, D].
///
///   mmfree logits model.gguf --token-ids 1,5,9 -o out.safetensors
///   mmfree logits model.gguf --token-ids 1,5,9 --token-ids 1,5,7 -o out.safetensors
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    model: Option<PathBuf>,
    /// Token ids, as in 1,5,9; may be repeated
    #[arg(long, value_name = "IDS", required_unless_present = "token_ids_file")]
    token_ids: Vec<TokenIds>,
    /// JSON file with a list of lists of token ids
    #[arg(long, value_name = "FILE", conflicts_with = "token_ids")]
    token_ids_file: Option<PathBuf>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Computes and writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    let (sequences, is_batch) = match &args.token_ids_file {
        Some(path) => (token_ids::read_file(path)?, true),
        None => {
            let lists: Vec<_> = args.token_ids.iter().map(|TokenIds(ids)| ids.clone()).collect();
            let is_batch = lists.len() > 1;
            (lists, is_batch)
        }
    };
    let length = token_ids::sequence_length(&sequences)?;

    let checkpoint = model_arg::open(args.model.as_deref())?;
    let config = checkpoint.config();
    for ids in &sequences {
        token_ids::check(ids, config.vocab_size)?;
    }
    let batch = is_batch.then_some(sequences.len());
    let shapes = [[length, config.vocab_size], [config.num_hidden_layers, config.hidden_size]]
        .map(|shape| batch.into_iter().chain(shape).collect::<Vec<_>>());
    let header = header(&shapes).context("the tensors are too large for a file")?;
    let mut file = OutputFile::create(&args.output)?;
    let mut engine = model_arg::load(&checkpoint, &args.engine)?.engine;

    let cancel = interrupt::catch()?;
    file.put(&header)?;
    let model = engine.model().clone();
    let mut states = Vec::new();
    for ids in &sequences {
        let mut state = State::new(&model);
        engine.logits(&mut state, ids, &mut |_, logits| {
            interrupt::check(cancel)?;
            file.put(&to_bytes(logits))
        })?;
        states.push(state);
    }
    for state in &states {
        file.put(&to_bytes(state.hidden()))?;
    }
    file.commit()?;
    Ok(ExitCode::SUCCESS)
}

/// Length and JSON header of a safetensors file with f32 tensors `logits` and `state`, in this order;
/// `None` if a size overflows.
fn header(shapes: &[Vec<usize>; 2]) -> Option<Vec<u8>> {
    let bytes = |shape: &[usize]| shape.iter().try_fold(4u64, |n, &d| n.checked_mul(d as u64));
    let middle = bytes(&shapes[0])?;
    let end = middle.checked_add(bytes(&shapes[1])?)?;
    let tensor = |shape: &[usize], from: u64, to: u64| json!({"dtype": "F32", "shape": shape, "data_offsets": [from, to]});
    let mut text = json!({
        "logits": tensor(&shapes[0], 0, middle),
        "state": tensor(&shapes[1], middle, end),
    })
    .to_string();
    // The data that follow are aligned.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    Some([&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat())
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_where_the_tensors_are() {
        let bytes = header(&[vec![2, 3, 5], vec![2, 1, 4]]).unwrap();
        let (length, text) = bytes.split_first_chunk::<8>().unwrap();
        assert_eq!(u64::from_le_bytes(*length) as usize, text.len());
        assert_eq!(bytes.len() % 8, 0);
        let parsed: serde_json::Value = serde_json::from_slice(text).unwrap();
        assert_eq!(parsed["logits"]["data_offsets"], json!([0, 120]));
        assert_eq!(parsed["state"]["data_offsets"], json!([120, 152]));
        assert_eq!(parsed["state"]["shape"], json!([2, 1, 4]));
        assert!(header(&[vec![usize::MAX, 2], vec![1]]).is_none());
    }
}
