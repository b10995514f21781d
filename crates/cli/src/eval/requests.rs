//! Log-likelihoods of somebody else's requests.

use std::path::Path;

use anyhow::{Context, Result};
use mmfree::eval::files::{Row, read_rows};
use mmfree::eval::request::{Encoder, Request};
use mmfree::eval::scorer::Scorer;
use mmfree::output::OutputFile;
use serde_json::Value;

use crate::interrupt;
use crate::progress::Progress;

/// Lines of a file of requests.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    Ok(read_rows(path)?)
}

/// Scores requests and prints one JSON object a line, in their order.
pub fn run(
    rows: &[Row],
    encoder: Option<&Encoder<'_>>,
    scorer: &mut dyn Scorer,
    file: Option<OutputFile>,
) -> Result<()> {
    // Neighbours with one beginning are a group: what they share is read once.
    let mut groups: Vec<Vec<Request>> = Vec::new();
    for row in rows {
        let request = request(row, encoder, scorer.vocab_size())?.within(scorer.window())?;
        match groups.last_mut() {
            Some(group) if shares_context(&group[0], &request) => group.push(request),
            _ => groups.push(vec![request]),
        }
    }
    let cancel = interrupt::catch()?;
    let progress = Progress::new("scoring");
    let scores = scorer.score(&groups, &mut |done| {
        progress.set(done as u64, rows.len() as u64);
        interrupt::check(cancel)
    })?;
    drop(progress);
    let mut text = String::new();
    for score in scores.iter().flatten() {
        text.push_str(&serde_json::to_string(score)?);
        text.push('\n');
    }
    match file {
        None => super::print(&text),
        Some(mut file) => {
            file.put(text.as_bytes())?;
            Ok(file.commit()?)
        }
    }
}

fn shares_context(a: &Request, b: &Request) -> bool {
    a.context == b.context && a.tokens[..a.context] == b.tokens[..b.context]
}

fn request(row: &Row, encoder: Option<&Encoder<'_>>, vocab_size: usize) -> Result<Request> {
    if row.find("context_ids").is_none() {
        let encoder = encoder.context(
            "this model has no tokenizer; give \"context_ids\" and \"continuation_ids\"",
        )?;
        let pair = encoder.pair(row.text("context")?, row.text("continuation")?);
        return pair.map_err(|error| row.error("continuation", &error.to_string()).into());
    }
    let ids = |field: &str| -> Result<Vec<u32>> {
        let id = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32);
            id.ok_or_else(|| {
                row.error(field, &format!("{value} is no token id below {vocab_size}"))
            })
        };
        let ids: Vec<u32> = row.list(field)?.iter().map(id).collect::<Result<_, _>>()?;
        if ids.is_empty() {
            return Err(row.error(field, "there are no ids").into());
        }
        Ok(ids)
    };
    let (mut tokens, continuation) = (ids("context_ids")?, ids("continuation_ids")?);
    let context = tokens.len();
    tokens.extend(continuation);
    Ok(Request { tokens, context })
}
