//! The host's part: feeds tokens to a [`Machine`] and reads what comes back.

use mmfree::sampler::Sampler;

use crate::arith;
use crate::error::Result;
use crate::image::Shape;
use crate::machine::Machine;

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    EndOfText,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The caller's callback said so.
    Cancelled,
}

/// Logits of the last token, as floats.
pub fn logits(machine: &Machine) -> Vec<f32> {
    machine.logits().map(arith::to_f32).collect()
}

/// Reads a prompt and writes on. Without a sampler each token is the best one, chosen by the
/// accelerator's `argmax`; with one, the host draws it from the logits.
///
/// `on_token` is called with each generated token, the end-of-text token included; `false` ends the text.
///
/// # Errors
/// A token that the vocabulary does not have; errors of the machine and the sampler.
pub fn generate(
    machine: &mut Machine,
    shape: Shape,
    prompt: &[u32],
    max_tokens: u64,
    eos: &[u32],
    mut sampler: Option<&mut Sampler>,
    on_token: &mut dyn FnMut(u32) -> Result<bool>,
) -> Result<Finish> {
    let mut best = None;
    let mut tokens = prompt.to_vec();
    for &token in prompt {
        check_token(token, shape)?;
        best = Some(machine.run(token)?);
    }
    for turn in 0..max_tokens {
        let Some(greedy) = best else { break };
        let token = match &mut sampler {
            None => greedy,
            Some(sampler) => sampler.sample(&mut logits(machine), &tokens)?,
        };
        tokens.push(token);
        if !on_token(token)? {
            return Ok(Finish::Cancelled);
        }
        if eos.contains(&token) {
            return Ok(Finish::EndOfText);
        }
        if turn + 1 < max_tokens {
            best = Some(machine.run(token)?);
        }
    }
    Ok(Finish::MaxTokens)
}

fn check_token(id: u32, shape: Shape) -> Result<()> {
    if id < shape.vocab_size {
        return Ok(());
    }
    let vocab_size = shape.vocab_size as usize;
    Err(mmfree::error::Error::TokenId { id, vocab_size }.into())
}
