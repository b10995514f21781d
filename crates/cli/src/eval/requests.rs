//! Log-likelihoods of somebody else's requests.

use anyhow::{Context, Result};
use mmfree::eval::files::Row;
use mmfree::eval::request::{Encoder, Request};
use mmfree::eval::scorer::Scorer;
use mmfree::output::OutputFile;
use serde_json::Value;

use crate::interrupt;
use crate::progress::Progress;

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
        let request = request(row, encoder, scorer)?;
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

fn request(row: &Row, encoder: Option<&Encoder<'_>>, scorer: &dyn Scorer) -> Result<Request> {
    let (field, request) = if row.find("context_ids").is_some() {
        ("continuation_ids", Ok(of_ids(row, scorer.vocab_size())?))
    } else {
        let encoder = encoder.context(
            "this model has no tokenizer; give \"context_ids\" and \"continuation_ids\"",
        )?;
        ("continuation", encoder.pair(row.text("context")?, row.text("continuation")?))
    };
    let request = request.and_then(|request| request.within(scorer.window()));
    Ok(request.map_err(|error| row.error(field, &error.to_string()))?)
}

fn of_ids(row: &Row, vocab_size: usize) -> Result<Request> {
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
