//! Loss curves of runs, as SVG.

mod chart;
mod curve;

use std::path::PathBuf;

use mmfree::error::{Error, Result};

pub use self::chart::draw;
pub(crate) use self::chart::{COLOURS, DrawingResult, FONT, legend};
pub use self::curve::{Curve, Point, smooth};
use crate::log::read_log;

/// What is on the horizontal axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Tokens seen: compares runs with different batch sizes.
    Tokens,
    /// Optimiser steps.
    Steps,
}

/// How to draw.
#[derive(Clone, Debug)]
pub struct PlotOptions {
    /// What is on the horizontal axis.
    pub axis: Axis,
    /// Above the chart.
    pub title: String,
    /// Smoothing of the training loss, 0 (none) to below 1: the weight of what is a hundredth of the run away.
    pub smoothing: f64,
    /// Size in pixels.
    pub size: (u32, u32),
}

impl Default for PlotOptions {
    fn default() -> Self {
        let title = "Loss".to_owned();
        Self { axis: Axis::Tokens, title, smoothing: 0.6, size: (960, 600) }
    }
}

/// Draws the losses of runs as an SVG document. A run is its directory or its `log.jsonl`.
///
/// # Errors
/// A log that cannot be read; runs without any loss; a smoothing that is no share; a size that cannot be drawn.
pub fn plot(runs: &[PathBuf], options: &PlotOptions) -> Result<String> {
    if !(0.0..1.0).contains(&options.smoothing) {
        let what = format!("smoothing {}: expected 0 or more and less than 1", options.smoothing);
        return Err(Error::Invalid(what));
    }
    let names = names(runs);
    let mut curves = Vec::new();
    for (path, name) in runs.iter().zip(names) {
        let curve = Curve::new(name, &read_log(path)?, options.axis);
        if curve.training.is_empty() && curve.validation.is_empty() {
            return Err(Error::Malformed {
                file: path.display().to_string(),
                what: "the log has no loss yet".to_owned(),
            });
        }
        curves.push(curve);
    }
    draw(&curves, options)
}

/// What runs are called: the last parts of their paths that tell them apart.
pub(crate) fn names(runs: &[PathBuf]) -> Vec<String> {
    let parts: Vec<Vec<String>> = runs
        .iter()
        .map(|path| {
            let is_log = path.file_name().is_some_and(|name| name == crate::log::LOG_FILE);
            let path = if is_log { path.parent().unwrap_or(path) } else { path };
            path.iter().map(|part| part.to_string_lossy().into_owned()).collect()
        })
        .collect();
    let name =
        |parts: &Vec<String>, length: usize| parts[parts.len().saturating_sub(length)..].join("/");
    let longest = parts.iter().map(Vec::len).max().unwrap_or(1).max(1);
    let tells_apart = |length: &usize| {
        let mut names: Vec<_> = parts.iter().map(|parts| name(parts, *length)).collect();
        names.sort();
        names.windows(2).all(|pair| pair[0] != pair[1])
    };
    let length = (1..longest).find(tells_apart).unwrap_or(longest);
    parts.iter().map(|parts| name(parts, length)).collect()
}

#[cfg(test)]
mod tests;
