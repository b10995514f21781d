//! `mmfree accel run`: generates text on the simulated accelerator.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Result, ensure};
use mmfree::sampler::Sampler;
use mmfree::tokenizer::Tokenizer;
use mmfree_accel::generate::{Finish, generate};
use mmfree_accel::machine::Machine;
use serde_json::json;

use super::HardwareArgs;
use crate::prompt::{Prompt, split_positionals};
use crate::sampling_args::SamplingArgs;
use crate::streamed_text::print;
use crate::token_ids::TokenIds;
use crate::{interrupt, model_arg};

/// Continue a text on the simulated accelerator
///
/// Compiles the model and runs it in the bit-exact simulator. With --greedy, tokens are those that the
/// accelerator itself chooses; otherwise the host draws them from its logits.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory or GGUF file [default: the built-in model]
    #[arg(value_name = "MODEL")]
    first: Option<String>,
    /// Text to continue
    #[arg(value_name = "PROMPT")]
    second: Option<String>,
    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "prompt_option")]
    prompt: Option<String>,
    /// Token ids to continue, as in 1,5,9; nothing is put before them
    #[arg(long, value_name = "IDS", group = "prompt_option")]
    token_ids: Option<TokenIds>,
    /// Program image that `accel compile` wrote from the same model [default: compile now]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "cores", "weight_bytes", "row_lanes",
        "vector_words", "activation_bytes", "fifo_beats", "burst_beats", "packing"])]
    image: Option<PathBuf>,
    /// End after so many tokens
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: u64,
    /// Go on after the model has ended its text
    #[arg(long)]
    ignore_eos: bool,
    /// Print the ids of the generated tokens instead of text
    #[arg(long, conflicts_with = "json")]
    print_ids: bool,
    /// Print one JSON object at the end: text, ids, finish_reason, tokens_per_second of the simulator
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    hardware: HardwareArgs,
}

/// Generates.
pub fn run(args: &Args) -> Result<ExitCode> {
    let has_option = args.prompt.is_some() || args.token_ids.is_some();
    let (model, text) =
        split_positionals(args.first.as_deref(), args.second.as_deref(), has_option)?;
    let checkpoint = model_arg::open(model.as_deref())?;
    let tokenizer = checkpoint.tokenizer()?.as_ref().map(Tokenizer::from_source).transpose()?;
    ensure!(
        tokenizer.is_some() || args.print_ids || args.json,
        "this model has no tokenizer, so it has no text to print: use --print-ids"
    );
    let prompt = match &args.token_ids {
        Some(TokenIds(ids)) => Prompt::Ids(ids.clone()),
        None => Prompt::Text(args.prompt.clone().or(text).unwrap_or_default()),
    };
    let chunks = prompt.into_ids(tokenizer.as_ref(), checkpoint.config(), true)?;
    let prompt = chunks.collect::<mmfree::error::Result<Vec<_>>>()?.concat();

    let sampling = args.sampling.params()?;
    let mut sampler = (sampling.temperature > 0.0 || sampling.repetition_penalty != 1.0)
        .then(|| Sampler::new(sampling))
        .transpose()?;
    let name = super::model_name(model.as_deref(), &checkpoint);
    let image = super::image(args.image.as_deref(), name, &checkpoint, &args.hardware)?;
    let shape = image.shape;
    let mut machine = Machine::new(image);

    let cancel = interrupt::catch()?;
    let eos = if args.ignore_eos { &[][..] } else { &checkpoint.config().eos_token_ids[..] };
    let mut stream = tokenizer.as_ref().map(|tokenizer| tokenizer.stream_decoder(true));
    let (mut text, mut ids) = (String::new(), Vec::new());
    let start = Instant::now();
    let mut printed = 0;
    let finish = generate(
        &mut machine,
        shape,
        &prompt,
        args.max_tokens,
        eos,
        sampler.as_mut(),
        &mut |id| {
            ids.push(id);
            if !eos.contains(&id)
                && let Some(stream) = &mut stream
            {
                stream.push(id, &mut text)?;
            }
            if !args.json && !args.print_ids {
                print(&text[printed..])?;
                printed = text.len();
            }
            Ok(!cancel.load(Ordering::Relaxed))
        },
    )?;
    if let Some(stream) = &mut stream {
        stream.finish(&mut text)?;
    }
    let steps = (prompt.len() + ids.len()).saturating_sub(1).max(1);
    if args.json {
        let object = json!({
            "text": text,
            "ids": ids,
            "finish_reason": match finish {
                Finish::EndOfText => "stop",
                Finish::MaxTokens => "length",
                Finish::Cancelled => "cancelled",
            },
            "prompt_tokens": prompt.len(),
            "generated_tokens": ids.len(),
            "configuration": machine.configuration(),
            "tokens_per_second": steps as f64 / start.elapsed().as_secs_f64(),
        });
        print(&format!("{object}\n"))?;
    } else if args.print_ids {
        let ids: Vec<_> = ids.iter().map(u32::to_string).collect();
        print(&format!("{}\n", ids.join(",")))?;
    } else {
        print(&text[printed..])?;
        print(if text.ends_with('\n') { "" } else { "\n" })?;
    }
    Ok(if finish == Finish::Cancelled { interrupt::EXIT_CODE.into() } else { ExitCode::SUCCESS })
}
