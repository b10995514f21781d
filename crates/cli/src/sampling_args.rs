//! How tokens are drawn.

use std::hash::{BuildHasher, Hasher, RandomState};

use anyhow::Result;
use mmfree::sampler::SamplingParams;

/// Sampling, shared by the commands that generate text.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Always take the most likely token; the same as --temperature 0
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    greedy: bool,
    /// Below 1 favours likely tokens, above 1 unlikely ones; 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Draw from the K most likely tokens only; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the most likely tokens that have this probability together; 1 is all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Draw from tokens at least this fraction as likely as the most likely one; 0 is all
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Above 1 makes tokens that came up recently less likely
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// How many tokens back --repetition-penalty looks
    #[arg(long, value_name = "N", default_value_t = 64)]
    repetition_window: usize,
    /// The same seed gives the same text [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The parameters, validated.
    pub fn params(&self) -> Result<SamplingParams> {
        let params = SamplingParams {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            repetition_window: self.repetition_window,
            // The standard library's hash keys are random.
            seed: self.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()),
        };
        params.validate()?;
        Ok(params)
    }
}
