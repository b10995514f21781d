//! A task from file to result.

use std::path::Path;

use serde::Serialize;

use super::metrics::{Estimate, best};
use super::request::{Encoder, Request};
use super::scorer::{Score, Scorer, Tick};
pub use super::shots::DEFAULT_SEED;
use super::shots::Sampler;
use super::tasks::{Doc, Kind, Split, Task};
use crate::error::{Error, Result};

/// How a task is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Examples before each question.
    pub shots: usize,
    /// Seed of the examples.
    pub seed: u32,
    /// Only the first items.
    pub limit: Option<usize>,
    /// Another split than the harness evaluates.
    pub split: Option<Split>,
}

impl Default for Options {
    fn default() -> Self {
        Self { shots: 0, seed: DEFAULT_SEED, limit: None, split: None }
    }
}

/// A task with its items and prompts, ready to be scored.
#[derive(Debug)]
pub struct Prepared {
    /// The task.
    pub task: &'static Task,
    /// The file that the items came from.
    pub file: String,
    /// The split that they are.
    pub split: Split,
    /// Its items.
    pub docs: Vec<Doc>,
    /// Context and continuation of each answer of each item.
    pub prompts: Vec<Vec<(String, String)>>,
    /// Examples before each question.
    pub shots: usize,
}

impl Prepared {
    /// Reads a task's files and makes its prompts.
    ///
    /// # Errors
    /// Files that are missing or malformed, more shots than there are examples.
    pub fn load(task: &'static Task, data: &Path, options: &Options) -> Result<Self> {
        let split = options.split.unwrap_or(task.split);
        let path = task.locate(data, split)?;
        let mut docs = task.read(&path)?;
        let examples = match options.shots {
            0 => Vec::new(),
            _ if split == task.shots_from => docs.clone(),
            _ => task.read(&task.locate(data, task.shots_from)?)?,
        };
        docs.truncate(options.limit.unwrap_or(usize::MAX));
        let mut sampler =
            Sampler::new(&examples, options.shots, task.avoids_question, options.seed)?;
        let prompts = docs
            .iter()
            .map(|doc| {
                let shots = sampler.context(doc);
                let prompt = |(context, continuation): (&str, &str)| {
                    ([&shots, context].concat(), continuation.to_owned())
                };
                doc.requests().map(prompt).collect()
            })
            .collect();
        let (file, shots) = (path.display().to_string(), options.shots);
        Ok(Self { task, file, split, docs, prompts, shots })
    }

    /// Requests of all items.
    pub fn requests(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// Scores all items.
    ///
    /// # Errors
    /// Texts that the tokenizer cannot encode, errors of the model, whatever `tick` reports.
    pub fn run(
        &self,
        encoder: &Encoder<'_>,
        scorer: &mut dyn Scorer,
        tick: &mut Tick<'_>,
    ) -> Result<TaskResult> {
        let mut groups: Vec<Vec<Request>> = Vec::with_capacity(self.docs.len());
        for (doc, prompts) in self.docs.iter().zip(&self.prompts) {
            let encode = |(context, continuation): &(String, String)| {
                encoder.pair(context, continuation)?.within(scorer.window())
            };
            let group: Result<_> = prompts.iter().map(encode).collect();
            groups.push(group.map_err(|error| Error::Malformed {
                file: format!("{}:{}", self.file, doc.row.line),
                what: error.to_string(),
            })?);
        }
        let scores = scorer.score(&groups, tick)?;
        Ok(self.result(&scores))
    }

    /// Items and metrics, given the score of every request of every item.
    pub fn result(&self, scores: &[Vec<Score>]) -> TaskResult {
        let items: Vec<Item> =
            self.docs.iter().zip(scores).map(|(doc, scores)| Item::new(doc, scores)).collect();
        let mean = |value: fn(&Item) -> bool| {
            let values: Vec<_> =
                items.iter().map(|item| f64::from(u8::from(value(item)))).collect();
            Estimate::mean(&values)
        };
        let mut metrics = Vec::new();
        let mut put = |name, estimate| metrics.push(Metric { name, estimate });
        match self.task.kind {
            Kind::MultipleChoice { normalised } => {
                put("acc", mean(|item| item.predicted == item.gold));
                if normalised {
                    put("acc_norm", mean(|item| item.predicted_norm == item.gold));
                    put("acc_bytes", mean(|item| item.predicted_bytes == item.gold));
                }
            }
            Kind::LastWord => {
                put("acc", mean(|item| item.is_greedy[0]));
                let values: Vec<_> = items.iter().map(|item| item.log_likelihoods[0]).collect();
                put("perplexity", Estimate::perplexity(&values));
            }
        }
        TaskResult {
            task: self.task.name,
            harness_name: self.task.harness_name,
            file: self.file.clone(),
            split: self.split.name(),
            shots: self.shots,
            metrics,
            items,
        }
    }
}

/// A metric of a task.
#[derive(Clone, Debug, Serialize)]
pub struct Metric {
    /// What the harness calls it: `acc`, `acc_norm`, `acc_bytes`, `perplexity`.
    pub name: &'static str,
    /// Value and standard error.
    #[serde(flatten)]
    pub estimate: Estimate,
}

/// What came out of a task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskResult {
    /// The task.
    pub task: &'static str,
    /// What the harness calls it.
    pub harness_name: &'static str,
    /// The file that was evaluated.
    pub file: String,
    /// Its split.
    pub split: &'static str,
    /// Examples before each question.
    pub shots: usize,
    /// Metrics over all items.
    pub metrics: Vec<Metric>,
    /// Every item.
    pub items: Vec<Item>,
}

/// What came out of an item.
#[derive(Clone, Debug, Serialize)]
pub struct Item {
    /// What the data set calls it, or its line.
    pub id: String,
    /// Its line in the file.
    pub line: u64,
    /// The right answer.
    pub gold: usize,
    /// The most likely answer.
    pub predicted: usize,
    /// The most likely answer by log-likelihood over characters.
    pub predicted_norm: usize,
    /// The most likely answer by log-likelihood over bytes of UTF-8.
    pub predicted_bytes: usize,
    /// Of each answer, in nats.
    pub log_likelihoods: Vec<f64>,
    /// Whether each answer is what the model would say.
    pub is_greedy: Vec<bool>,
    /// Tokens of each answer that were judged.
    pub tokens: Vec<usize>,
}

impl Item {
    fn new(doc: &Doc, scores: &[Score]) -> Self {
        let best_by = |length: fn(&String) -> usize| {
            let lengths = doc.choices.iter().map(|choice| length(choice) as f64);
            best(scores.iter().zip(lengths).map(|(score, length)| score.log_likelihood / length))
        };
        Self {
            id: doc.id.clone(),
            line: doc.row.line,
            gold: doc.gold,
            predicted: best(scores.iter().map(|score| score.log_likelihood)),
            predicted_norm: best_by(|choice| choice.chars().count()),
            predicted_bytes: best_by(String::len),
            log_likelihoods: scores.iter().map(|score| score.log_likelihood).collect(),
            is_greedy: scores.iter().map(|score| score.is_greedy).collect(),
            tokens: scores.iter().map(|score| score.tokens).collect(),
        }
    }
}
