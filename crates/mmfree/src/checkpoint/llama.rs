//! The Transformer++ in GGUF files, with the names and the order of llama.cpp.
//!
//! Weights stay in floating point. llama.cpp rotates neighbouring channels of queries and keys, Hugging Face channels
//! half a head apart: rows of their projections are stored in the former's order, row `2 j + half` of a head for row
//! `half · d/2 + j`, and are put back when they are read.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mmfree_kernels::memory::Bytes;

use super::gguf::read;
use super::gguf::write::{HeaderWriter, NewTensor};
use super::pack::{output_is_source, put_name};
use super::packed::{self, Demand, Metadata, check_tensors, key};
use super::tokenizer::TokenizerFiles;
use super::{Encoding, FileSlice, FloatType, FullPrecision, StoredTensor, gguf};
use crate::config::TransformerConfig;
use crate::error::{Error, Result};
use crate::output::OutputFile;

/// Value of `general.architecture`, and `model_type` of a configuration.
pub(super) const ARCHITECTURE: &str = "llama";
/// ggml's `general.file_type` of files that are mostly F32, F16 and BF16.
const FILE_TYPES: [(FloatType, u32); 3] =
    [(FloatType::F32, 0), (FloatType::F16, 1), (FloatType::Bf16, 32)];

const VOCAB_SIZE: &str = "llama.vocab_size";
const HIDDEN_SIZE: &str = "llama.embedding_length";
const INTERMEDIATE_SIZE: &str = "llama.feed_forward_length";
const LAYERS: &str = "llama.block_count";
const HEADS: &str = "llama.attention.head_count";
const KEY_HEADS: &str = "llama.attention.head_count_kv";
const RMS_NORM_EPS: &str = "llama.attention.layer_norm_rms_epsilon";
const ROPE_THETA: &str = "llama.rope.freq_base";
const ROPE_CHANNELS: &str = "llama.rope.dimension_count";
const CONTEXT_LENGTH: &str = "llama.context_length";
/// Present if the rotary embedding is scaled.
const ROPE_SCALING: &str = "llama.rope.scaling.type";
/// llama.cpp's own vocabulary: "none", for the file has the tokenizer as Hugging Face stores it.
const VOCABULARY: &str = "tokenizer.ggml.model";

/// Names of tensors, Hugging Face's and llama.cpp's.
const OUTER_NAMES: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];
/// Those of a layer, behind `model.layers.N.` and `blk.N.`.
const LAYER_NAMES: [(&str, &str); 9] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

/// Whether a file is GGUF and says that it is a Llama.
pub(super) fn is_llama(bytes: &Bytes) -> bool {
    if !bytes.starts_with(&gguf::MAGIC) {
        return false;
    }
    let Ok(header) = read::parse("", bytes) else { return false };
    let architecture = header.metadata.get(key::ARCHITECTURE);
    matches!(architecture, Some(read::Value::Text(at)) if bytes[at.clone()] == *ARCHITECTURE.as_bytes())
}

/// Opens a file: its configuration, and its tensors under Hugging Face's names.
pub(super) fn open(
    label: &str,
    bytes: Bytes,
) -> Result<(TransformerConfig, BTreeMap<String, StoredTensor>)> {
    let header = read::parse(label, &bytes)?;
    let slice = FileSlice::whole(label, bytes);
    let config = config(&Metadata { header: &header, file: &slice })?;
    let tensors = header
        .tensors
        .into_iter()
        .map(|info| {
            let data = FileSlice { range: info.range, ..slice.clone() };
            let stored = StoredTensor { encoding: info.encoding, shape: info.shape, data };
            // A name that nobody expects stays, and is reported as it is.
            (hugging_face_name(&info.name).unwrap_or(info.name), stored)
        })
        .collect();
    let demands = config.tensors().into_iter().map(|(name, shape)| (name, shape, Demand::Float));
    check_tensors(label, demands, &tensors)?;
    Ok((config, tensors))
}

fn config(metadata: &Metadata<'_>) -> Result<TransformerConfig> {
    let mut problems = Vec::new();
    metadata.expect_architecture(ARCHITECTURE, &mut problems)?;
    let heads = metadata.size(HEADS, &mut problems);
    let table = metadata.header.tensors.iter().find(|tensor| tensor.name == OUTER_NAMES[0].1);
    let config = TransformerConfig {
        vocab_size: match (metadata.header.metadata.get(VOCAB_SIZE), table) {
            (None, Some(table)) => table.shape.first().copied().unwrap_or(0),
            _ => metadata.size(VOCAB_SIZE, &mut problems),
        },
        hidden_size: metadata.size(HIDDEN_SIZE, &mut problems),
        intermediate_size: metadata.size(INTERMEDIATE_SIZE, &mut problems),
        num_hidden_layers: metadata.size(LAYERS, &mut problems),
        num_attention_heads: heads,
        rms_norm_eps: metadata.float(RMS_NORM_EPS, None, &mut problems),
        rope_theta: metadata.float(ROPE_THETA, Some(10_000.0), &mut problems),
        max_position_embeddings: metadata.size(CONTEXT_LENGTH, &mut problems),
        bos_token_id: metadata.token_id(key::BOS, &mut problems),
        eos_token_ids: metadata.eos_token_ids(&mut problems),
    };
    for (key, expected) in
        [(KEY_HEADS, Some(heads)), (ROPE_CHANNELS, config.hidden_size.checked_div(heads))]
    {
        if metadata.header.metadata.contains_key(key) {
            let found = metadata.size(key, &mut problems);
            if let Some(expected) = expected.filter(|&expected| expected != found) {
                problems.push(format!(
                    "{key} is {found}, expected {expected} (grouped queries and heads that are rotated \
                     in part are not supported)"
                ));
            }
        }
    }
    if metadata.text(ROPE_SCALING)?.is_some_and(|scaling| scaling.get() != b"none") {
        problems.push(format!("{ROPE_SCALING} is not supported"));
    }
    if problems.is_empty() {
        problems = config.problems();
    }
    if problems.is_empty() {
        return Ok(config);
    }
    Err(Error::Config { file: metadata.file.file.to_string(), problems })
}

/// Writes a Transformer++ as one GGUF file, tokenizer included. `float` is the type of its matrices, `name` that of
/// the model, by default those of the source; norms are F32, as llama.cpp wants them. Memory: one tensor at a time.
/// `progress(done, total)` is called with elements.
///
/// # Errors
/// A checkpoint that is no Transformer++ or does not fit its configuration; an output that belongs to it; weights
/// that are NaN or infinite, also after rounding; errors of writing. Nothing is left under the name then, or the
/// old file.
pub fn pack_transformer(
    model: &Path,
    output: &Path,
    float: Option<FloatType>,
    name: Option<&str>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let source = FullPrecision::open(model)?;
    refuse_source(model, output)?;
    let (file, json) = source.config();
    let config = TransformerConfig::from_json(file, json)?;
    let tensors = config.tensors();
    source.check(tensors.iter().cloned())?;
    let mut planned = Vec::new();
    for (name, shape) in &tensors {
        let float = match float {
            _ if shape.len() == 1 => FloatType::F32,
            Some(float) => float,
            None => source.float_type(name)?,
        };
        let encoding = Encoding::Float(float);
        let too_large = || Error::Invalid(format!("tensor {name} is too large to be packed"));
        let bytes = encoding.tensor_bytes(shape).ok_or_else(too_large)?;
        let name = gguf_name(name).unwrap_or_else(|| name.clone());
        planned.push((float, NewTensor { name, shape: shape.clone(), encoding, bytes }));
    }
    let matrices = planned.iter().map(|(float, _)| *float).find(|&float| float != FloatType::F32);
    let mut header = HeaderWriter::new();
    header.text(key::ARCHITECTURE, ARCHITECTURE);
    put_name(&mut header, name, model);
    let file_type = FILE_TYPES.iter().find(|(float, _)| Some(*float) == matrices);
    header.u32(key::FILE_TYPE, file_type.map_or(0, |(_, number)| *number));
    put_config(&mut header, &config);
    TokenizerFiles::open(model)?.put(&mut header)?;
    let new: Vec<_> = planned.iter().map(|(_, tensor)| tensor.clone()).collect();
    let mut file = OutputFile::create(output)?;
    file.put(&header.finish(&new))?;
    let total = new.iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum();
    let mut done = 0;
    for ((name, shape), (float, tensor)) in tensors.iter().zip(&planned) {
        let mut values = vec![0.0; shape.iter().product()];
        source.read(name, &mut values)?;
        if is_rotated(name) {
            store_order(&mut values, config.num_attention_heads);
        }
        let mut bytes = Vec::with_capacity(tensor.bytes);
        float.encode(&values, &mut bytes);
        // Checked after rounding: a large single is infinite as a half.
        float.decode(&bytes, &mut values);
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::Invalid(format!(
                "tensor {name} has the value {value} as {}; choose another --format",
                float.name()
            )));
        }
        bytes.resize(bytes.len() + tensor.padding(), 0);
        file.put(&bytes)?;
        done += values.len() as u64;
        progress(done, total);
    }
    file.commit()
}

/// Refuses an output that is a file of the model that is being read.
fn refuse_source(model: &Path, output: &Path) -> Result<()> {
    let Ok(output) = fs::canonicalize(output) else { return Ok(()) };
    let model = fs::canonicalize(model).unwrap_or_else(|_| model.to_owned());
    let is_beside = output.parent() == Some(&model);
    if output == model || is_beside && output.extension().is_none_or(|end| end != "gguf") {
        return Err(output_is_source(&output));
    }
    Ok(())
}

fn put_config(header: &mut HeaderWriter, config: &TransformerConfig) {
    for (key, size) in [
        (VOCAB_SIZE, config.vocab_size),
        (HIDDEN_SIZE, config.hidden_size),
        (INTERMEDIATE_SIZE, config.intermediate_size),
        (LAYERS, config.num_hidden_layers),
        (HEADS, config.num_attention_heads),
        (KEY_HEADS, config.num_attention_heads),
        (ROPE_CHANNELS, config.hidden_size / config.num_attention_heads),
        (CONTEXT_LENGTH, config.max_position_embeddings),
    ] {
        header.u32(key, u32::try_from(size).unwrap_or(u32::MAX));
    }
    header.f32(RMS_NORM_EPS, config.rms_norm_eps);
    header.f32(ROPE_THETA, config.rope_theta);
    header.text(VOCABULARY, "none");
    packed::put_token_ids(header, config.bos_token_id, &config.eos_token_ids);
}

/// llama.cpp's name of a tensor.
fn gguf_name(name: &str) -> Option<String> {
    renamed(name, "model.layers.", "blk.", |&(ours, theirs)| (ours, theirs))
}

/// Hugging Face's name of a tensor.
fn hugging_face_name(name: &str) -> Option<String> {
    renamed(name, "blk.", "model.layers.", |&(ours, theirs)| (theirs, ours))
}

fn renamed(
    name: &str,
    from: &str,
    to: &str,
    order: fn(&(&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    let find = |names: &[(&'static str, &'static str)], name: &str| {
        names.iter().map(order).find(|(known, _)| *known == name).map(|(_, new)| new)
    };
    match name.strip_prefix(from).and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => Some(format!("{to}{layer}.{}", find(&LAYER_NAMES, rest)?)),
        None => find(&OUTER_NAMES, name).map(str::to_owned),
    }
}

/// Whether a tensor makes what is rotated: queries or keys.
pub(super) fn is_rotated(name: &str) -> bool {
    name.ends_with("self_attn.q_proj.weight") || name.ends_with("self_attn.k_proj.weight")
}

/// Puts the rows of a projection [D, D] into llama.cpp's order.
fn store_order(values: &mut [f32], heads: usize) {
    reorder(values, heads, |half, j, channels| (2 * j + half, half * channels / 2 + j));
}

/// Puts the rows back into Hugging Face's order.
pub(super) fn restore_order(values: &mut [f32], heads: usize) {
    reorder(values, heads, |half, j, channels| (half * channels / 2 + j, 2 * j + half));
}

/// For each head, half and pair j of channels: row `into` becomes what row `from` was.
fn reorder(
    values: &mut [f32],
    heads: usize,
    rows: fn(half: usize, j: usize, channels: usize) -> (usize, usize),
) {
    let width = values.len().isqrt();
    let channels = width / heads;
    for head in values.chunks_exact_mut(channels * width) {
        let old = head.to_vec();
        for half in 0..2 {
            for j in 0..channels / 2 {
                let (into, from) = rows(half, j, channels);
                head[into * width..][..width].copy_from_slice(&old[from * width..][..width]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for name in ["model.embed_tokens.weight", "model.layers.11.self_attn.q_proj.weight"] {
            let theirs = gguf_name(name).unwrap();
            assert_ne!(theirs, name);
            assert_eq!(hugging_face_name(&theirs).unwrap(), name);
        }
        assert_eq!(gguf_name("model.layers.0.bias"), None);
        assert_eq!(hugging_face_name("rope_freqs.weight"), None);
    }

    #[test]
    fn channels_of_a_head_are_interleaved_and_restored() {
        // Two heads of four channels; every row has its number.
        let mut values: Vec<f32> = (0..8).flat_map(|row| [row as f32; 8]).collect();
        let original = values.clone();
        store_order(&mut values, 2);
        let rows: Vec<_> = values.iter().step_by(8).copied().collect();
        assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        restore_order(&mut values, 2);
        assert_eq!(values, original);
    }
}
