//! Tasks: reading all, running one after the other, the table.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use mmfree::eval::harness::{Options, Prepared, TaskResult};
use mmfree::eval::request::Encoder;
use mmfree::eval::scorer::Scorer;
use mmfree::eval::tasks::Task;
use serde_json::{Value, json};

use crate::interrupt;
use crate::progress::Progress;

/// Reads the files of all tasks, so that a mistake shows before the first is run.
pub fn prepare(tasks: Vec<&'static Task>, data: &Path, options: &Options) -> Result<Vec<Prepared>> {
    Ok(tasks
        .into_iter()
        .map(|task| Prepared::load(task, data, options))
        .collect::<mmfree::error::Result<_>>()?)
}

/// Runs the tasks, prints the table and returns the JSON.
pub fn run(
    prepared: &[Prepared],
    encoder: &Encoder<'_>,
    scorer: &mut dyn Scorer,
    is_json: bool,
    with_prompts: bool,
) -> Result<Value> {
    let cancel = interrupt::catch()?;
    let total: usize = prepared.iter().map(Prepared::requests).sum();
    let progress = Progress::new("evaluating");
    let mut before = 0;
    let mut results = Vec::new();
    let start = std::time::Instant::now();
    for prepared in prepared {
        let result = prepared.run(encoder, scorer, &mut |done| {
            progress.set((before + done) as u64, total as u64);
            interrupt::check(cancel)
        })?;
        before += prepared.requests();
        results.push(result);
    }
    drop(progress);
    let seconds = start.elapsed().as_secs_f64();
    if !is_json {
        super::print(&table(&results))?;
    }
    let mut tasks = Vec::new();
    for (result, prepared) in results.iter().zip(prepared) {
        let mut task = serde_json::to_value(result)?;
        if with_prompts && let Some(items) = task["items"].as_array_mut() {
            for (item, prompts) in items.iter_mut().zip(&prepared.prompts) {
                item["prompts"] = json!(prompts);
            }
        }
        tasks.push(task);
    }
    Ok(json!({"seconds": seconds, "tasks": tasks}))
}

/// One line a metric.
fn table(results: &[TaskResult]) -> String {
    let mut text = format!(
        "{:<14} {:<10} {:>6} {:>5}  {:<10} {:>9}   {:>7}\n",
        "task", "split", "items", "shots", "metric", "value", "stderr"
    );
    for result in results {
        for metric in &result.metrics {
            let digits = if metric.name == "perplexity" { 3 } else { 4 };
            let stderr = metric.estimate.stderr;
            let stderr = stderr.map_or("unknown".to_owned(), |value| format!("{value:.digits$}"));
            let _ = writeln!(
                text,
                "{:<14} {:<10} {:>6} {:>5}  {:<10} {:>9.digits$} ± {:>7}",
                result.task,
                result.split,
                result.items.len(),
                result.shots,
                metric.name,
                metric.estimate.value,
                stderr
            );
        }
    }
    text
}
