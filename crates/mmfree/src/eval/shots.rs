//! Which examples stand before a question: the harness' sampler.

use super::python::Random;
use super::tasks::Doc;
use crate::error::{Error, Result};

/// The harness' default seed of few-shot examples.
pub const DEFAULT_SEED: u32 = 1234;

/// Draws examples for one question after the other, in the order of the questions.
#[derive(Debug)]
pub(super) struct Sampler<'a> {
    examples: &'a [Doc],
    shots: usize,
    /// Whether one more is drawn, so that the question itself can be left out.
    avoids_question: bool,
    random: Random,
}

impl<'a> Sampler<'a> {
    /// # Errors
    /// Fewer examples than are asked for.
    pub(super) fn new(
        examples: &'a [Doc],
        shots: usize,
        avoids_question: bool,
        seed: u32,
    ) -> Result<Self> {
        let needed = if shots == 0 { 0 } else { shots + usize::from(avoids_question) };
        if examples.len() < needed {
            let file = examples.first().map_or("", |doc| &doc.row.file);
            return Err(Error::Invalid(format!(
                "{shots} shots need {needed} examples, but {file} has {}",
                examples.len()
            )));
        }
        Ok(Self { examples, shots, avoids_question, random: Random::new(seed) })
    }

    /// The examples before a question, as text.
    pub(super) fn context(&mut self, question: &Doc) -> String {
        if self.shots == 0 {
            return String::new();
        }
        let (n, k) = (self.examples.len(), self.shots);
        let is_other = |&index: &usize| self.examples[index].row.value != question.row.value;
        let mut picked = self.random.sample(n, k + usize::from(self.avoids_question));
        if self.avoids_question {
            picked.retain(is_other);
            picked.truncate(k);
            if picked.len() < k {
                let others: Vec<usize> = (0..n).filter(is_other).collect();
                let k = k.min(others.len());
                picked = self.random.sample(others.len(), k).iter().map(|&i| others[i]).collect();
            }
        }
        picked.iter().map(|&index| self.examples[index].example.as_str()).collect()
    }
}
