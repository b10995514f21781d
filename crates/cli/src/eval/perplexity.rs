//! Perplexity of files.

use std::path::PathBuf;

use anyhow::{Result, bail};
use mmfree::eval::perplexity::{Meter, Perplexity};
use mmfree::eval::request::Encoder;
use mmfree::eval::scorer::Scorer;
use mmfree_train::data::read_documents;
use serde_json::{Value, json};

use crate::interrupt;
use crate::progress::Progress;

/// What is measured, and how.
pub struct Inputs<'a> {
    pub files: &'a [PathBuf],
    pub field: &'a str,
    /// Tokens of a window; none carries the state on.
    pub window: Option<usize>,
}

/// Measures, prints the figures and returns the JSON.
pub fn run(
    inputs: &Inputs<'_>,
    encoder: &Encoder<'_>,
    scorer: &mut dyn Scorer,
    is_json: bool,
) -> Result<Value> {
    let limit = scorer.window();
    let window = inputs.window.or(limit);
    if let (Some(window), Some(limit)) = (window, limit)
        && window > limit
    {
        bail!("--window {window}: this model reads {limit} tokens at most");
    }
    let cancel = interrupt::catch()?;
    let progress = Progress::new("reading");
    let mut tick = || interrupt::check(cancel);
    let mut meter = Meter::new(encoder, scorer, window, &mut tick);
    let start = std::time::Instant::now();
    read_documents(inputs.files, inputs.field, &mut |text, (done, total)| {
        match text {
            Some(text) => meter.push(text)?,
            None => meter.end_document()?,
        }
        progress.set(done, total);
        Ok(())
    })?;
    drop(progress);
    let total = meter.total();
    if total.tokens == 0 {
        bail!("there is no text in {}", inputs.files[0].display());
    }
    if !is_json {
        super::print(&table(&total, window))?;
    }
    Ok(json!({
        "seconds": start.elapsed().as_secs_f64(),
        "files": inputs.files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>(),
        "window": window,
        "documents": total.documents,
        "tokens": total.tokens,
        "words": total.words,
        "bytes": total.bytes,
        "log_likelihood": total.log_likelihood,
        "loss": total.loss(),
        "word_perplexity": total.word_perplexity(),
        "byte_perplexity": total.byte_perplexity(),
        "bits_per_byte": total.bits_per_byte(),
    }))
}

fn table(total: &Perplexity, window: Option<usize>) -> String {
    let context = window.map_or("the whole document so far".to_owned(), |window| {
        format!("windows of {window} tokens")
    });
    format!(
        "context          {context}\n\
         documents        {}\n\
         tokens           {}\n\
         words            {}\n\
         bytes            {}\n\
         word perplexity  {:.4}\n\
         byte perplexity  {:.6}\n\
         bits per byte    {:.6}\n\
         loss             {:.6} nats a token\n",
        total.documents,
        total.tokens,
        total.words,
        total.bytes,
        total.word_perplexity(),
        total.byte_perplexity(),
        total.bits_per_byte(),
        total.loss(),
    )
}
