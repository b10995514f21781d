//! `mmfree info`: describes a model.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use mmfree::checkpoint::info::{ModelInfo, describe};

use crate::model_arg;
use crate::progress::Progress;

/// Describe a model
///
/// Prints the configuration, parameters and bytes by kind, bits a weight, and the share of zeros of
/// every ternary tensor.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory, GGUF file, or Hugging Face repository id [default: the built-in model]
    model: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints the description.
pub fn run(args: &Args) -> Result<ExitCode> {
    let checkpoint = model_arg::open(args.model.as_deref())?;
    let progress = Progress::new("reading");
    let mut info = describe(&checkpoint, &mut |done, total| progress.set(done, total))?;
    drop(progress);
    if args.model.is_none() {
        info.source = "built-in model".to_owned();
    }
    let text = if args.json { serde_json::to_string_pretty(&info)? + "\n" } else { table(&info) };
    stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The description for people.
fn table(info: &ModelInfo) -> String {
    let config = &info.config;
    let eos: Vec<String> = config.eos_token_ids.iter().map(u32::to_string).collect();
    let mut lines = vec![
        format!("{} ({})", info.source, info.container),
        String::new(),
        format!("hidden size           {}", config.hidden_size),
        format!("intermediate size     {}", config.intermediate_size),
        format!("layers                {}", config.num_hidden_layers),
        format!("vocabulary            {}", config.vocab_size),
        format!("norm epsilon          {:e}", config.rms_norm_eps),
        format!(
            "lower bounds          {}",
            if config.use_lower_bound { "learned" } else { "none" }
        ),
        format!(
            "first, last token     {}, {}",
            config.bos_token_id.map_or_else(|| "none".to_owned(), |id| id.to_string()),
            if eos.is_empty() { "none".to_owned() } else { eos.join(" or ") }
        ),
        format!(
            "tokenizer             {}{}",
            info.tokenizer.unwrap_or("none"),
            if info.chat_template { ", with a chat template" } else { "" }
        ),
        String::new(),
        format!("{:<20} {:>16} {:>16}", "", "parameters", "bytes"),
    ];
    let (parameters, bytes) = (&info.parameters, &info.bytes);
    for (kind, count, size) in [
        ("ternary", parameters.ternary, bytes.ternary),
        ("embeddings", parameters.embeddings, bytes.embeddings),
        ("norms", parameters.norms, bytes.norms),
        ("lower bounds", parameters.lower_bounds, bytes.lower_bounds),
        ("header, tokenizer", 0, bytes.other),
        ("total", parameters.total, bytes.total),
    ] {
        lines.push(format!("{kind:<20} {count:>16} {size:>16}"));
    }
    lines.extend([
        String::new(),
        format!("bits a ternary weight {:.3}", info.bits_per_ternary_weight),
        format!("bits a parameter      {:.3}", info.bits_per_parameter),
        format!("share of zeros        {:.1} %", 100.0 * info.zero_share),
        String::new(),
        format!("{:<44} {:>16} {:>7} {:>11} {:>8}", "tensor", "shape", "type", "scale", "zeros"),
    ]);
    for tensor in &info.tensors {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        let scale = tensor.scale.map_or_else(String::new, |scale| format!("{scale:.5}"));
        let zeros =
            tensor.zero_share.map_or_else(String::new, |share| format!("{:.1} %", 100.0 * share));
        let line = format!(
            "{:<44} {:>16} {:>7} {scale:>11} {zeros:>8}",
            tensor.name,
            shape.join(" x "),
            tensor.stored_as
        );
        lines.push(line.trim_end().to_owned());
    }
    lines.push(String::new());
    lines.join("\n")
}
