//! Tokens that are drawn where the logits are: on a GPU without a look from the host.

use super::{Engine, Executor, Sequence, steps_of};
use crate::error::{Error, Result};
use crate::sampler::Sampler;
use crate::state::State;

/// Tokens that a GPU draws of one text before the host looks at them: some milliseconds' worth.
const TOKENS_AHEAD: usize = 16;

/// How the next tokens of a sequence are drawn.
#[derive(Debug)]
pub struct Draw<'a> {
    /// Draws, and goes on with its random sequence.
    pub sampler: &'a mut Sampler,
    /// The tokens so far, the one that is fed included.
    pub recent: &'a [u32],
}

/// What is wanted of a sequence after a pass.
#[derive(Debug)]
pub enum Want<'a> {
    /// Its logits.
    Logits,
    /// The next token if the engine's device draws tokens, otherwise its logits.
    Token(Draw<'a>),
    /// Its state only.
    Nothing,
}

impl Engine {
    /// How many tokens of one text to ask [`sample`](Self::sample) for: more than one costs nothing but
    /// what is drawn in vain.
    pub fn tokens_ahead(&self, sampler: &Sampler) -> usize {
        match &self.executor {
            Executor::Cuda(engine) if engine.has_decoder() && sampler.on_device().is_some() => {
                TOKENS_AHEAD
            }
            _ => 1,
        }
    }

    /// Feeds a token and then, one after the other, those that are drawn, `count` steps in all. Returns the token
    /// drawn after each step. On a GPU no step waits for the host.
    ///
    /// # Errors
    /// As [`decode`](Self::decode) and [`Sampler::sample`].
    pub fn sample(
        &mut self,
        state: &mut State,
        token: u32,
        count: usize,
        mut draw: Draw<'_>,
    ) -> Result<Vec<u32>> {
        self.check_tokens(&[token])?;
        if draw.sampler.is_greedy() {
            return self.greedy(state, token, count);
        }
        if let Executor::Cuda(engine) = &mut self.executor
            && count > 0
            && let Some(tokens) = engine.sample(state, token, count, &mut draw)?
        {
            return Ok(tokens);
        }
        let Draw { sampler, recent } = draw;
        let mut recent = recent.to_vec();
        let before = recent.len();
        for _ in 0..count {
            let next = recent[before..].last().copied().unwrap_or(token);
            let drawn = sampler.sample(self.decode(state, next)?, &recent)?;
            recent.push(drawn);
        }
        Ok(recent.split_off(before))
    }

    /// [`sample`](Self::sample) for a batch: each state has its first token and its sampler. Returns the tokens drawn after
    /// each step, [count, B].
    ///
    /// # Errors
    /// As [`forward`](Self::forward) and [`Sampler::sample`], and different numbers of states, tokens and samplers.
    pub fn sample_batch(
        &mut self,
        states: &mut [&mut State],
        tokens: &[u32],
        count: usize,
        draws: &mut [Draw<'_>],
    ) -> Result<Vec<u32>> {
        self.check_tokens(tokens)?;
        let rows = states.len();
        if rows != tokens.len() || rows != draws.len() {
            return Err(Error::Invalid(format!(
                "{rows} states, {} tokens and {} samplers",
                tokens.len(),
                draws.len()
            )));
        }
        if let Executor::Cuda(engine) = &mut self.executor
            && draws.iter().all(|draw| draw.sampler.on_device().is_some())
        {
            return engine.decode_batch(states, tokens, count, Some(draws));
        }
        let mut recent: Vec<Vec<u32>> = draws.iter().map(|draw| draw.recent.to_vec()).collect();
        let mut found = Vec::with_capacity(count * rows);
        let mut next = tokens.to_vec();
        for _ in 0..count {
            self.forward(&mut steps_of(states, &next))?;
            let mut drawn: Vec<_> = draws
                .iter_mut()
                .zip(&recent)
                .map(|(draw, recent)| (&mut *draw.sampler, &recent[..], Ok(0)))
                .collect();
            self.for_each_row(&mut drawn, &|(sampler, recent, token), logits| {
                *token = sampler.sample(logits, recent);
            });
            next = drawn.into_iter().map(|(.., token)| token).collect::<Result<_>>()?;
            recent.iter_mut().zip(&next).for_each(|(recent, &token)| recent.push(token));
            found.extend_from_slice(&next);
        }
        Ok(found)
    }

    /// [`forward`](Self::forward) that computes what is wanted of each sequence only. Returns the tokens that were drawn. Where
    /// there is none, the sequence's row of logits is there for [`for_each_row`](Self::for_each_row), unless nothing was wanted.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and different numbers of sequences and wants.
    pub fn forward_and_draw(
        &mut self,
        batch: &mut [Sequence<'_>],
        wants: &mut [Want<'_>],
    ) -> Result<Vec<Option<u32>>> {
        if batch.len() != wants.len() {
            let (batch, wants) = (batch.len(), wants.len());
            return Err(Error::Invalid(format!("{batch} sequences of which {wants} are wanted")));
        }
        batch.iter().try_for_each(|sequence| self.check_tokens(sequence.tokens))?;
        match &mut self.executor {
            Executor::Cpu(_) => {
                self.forward(batch)?;
                Ok(vec![None; batch.len()])
            }
            Executor::Cuda(engine) => engine.forward_and_draw(batch, wants),
        }
    }
}
