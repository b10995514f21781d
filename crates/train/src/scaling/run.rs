//! What a training run says about loss and compute.

use std::path::Path;

use mmfree::error::{Error, Result};
use serde::Serialize;

use super::ARCHITECTURES;
use crate::architecture::Architecture;
use crate::log::{LOG_FILE, read_log};
use crate::plot::{Axis, Curve, smooth};

/// Which losses of a run count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Points {
    /// The last one: a learning rate that falls to the end makes earlier ones worse than a shorter run's.
    Final,
    /// Every evaluation but those in the first tenth of the run.
    All,
}

/// Smoothing of the training loss where nothing was held out.
const SMOOTHING: f64 = 0.9;

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// What it is called.
    pub name: String,
    /// `matmul-free` or `transformer++`.
    pub architecture: &'static str,
    /// All parameters.
    pub parameters: usize,
    /// Weights in matrices.
    pub matrix_parameters: usize,
    /// Tokens that it was trained on.
    pub tokens: u64,
    /// Whether the loss is that of held-out text; otherwise it is the smoothed training loss.
    pub is_held_out: bool,
    /// FLOPs and loss in nats, at least one.
    pub points: Vec<(f64, f64)>,
}

impl Run {
    /// Reads a run's log (its directory, or the log itself) and the configuration of its model:
    /// `model/config.json` or `config.json` beside the log.
    ///
    /// # Errors
    /// Files that are missing or malformed; a log without a loss.
    pub fn read(path: &Path, name: String, points: Points) -> Result<Self> {
        let records = read_log(path)?;
        let log = if path.is_dir() { path.join(LOG_FILE) } else { path.to_owned() };
        let directory = log.parent().unwrap_or(Path::new("."));
        let curve = Curve::new(String::new(), &records, Axis::Tokens);
        let is_held_out = !curve.validation.is_empty();
        let losses = match is_held_out {
            true => curve.validation,
            false => smooth(&curve.training, SMOOTHING),
        };
        let losses: Vec<_> =
            losses.into_iter().filter(|&(tokens, loss)| tokens > 0.0 && loss > 0.0).collect();
        let Some(&last) = losses.last() else {
            return Err(Error::Malformed {
                file: log.display().to_string(),
                what: "the log has no loss yet".to_owned(),
            });
        };
        let architecture = configuration(directory)?;
        let layout = architecture.layout();
        let matrix_parameters = layout.matrix_weights();
        let flops = |tokens: f64| 6.0 * matrix_parameters as f64 * tokens;
        let points = match points {
            Points::Final => vec![(flops(last.0), last.1)],
            Points::All => losses
                .iter()
                .filter(|(tokens, _)| *tokens >= last.0 / 10.0)
                .map(|&(tokens, loss)| (flops(tokens), loss))
                .collect(),
        };
        Ok(Self {
            name,
            architecture: match architecture {
                Architecture::MatMulFree(_) => ARCHITECTURES[0],
                Architecture::Transformer(_) => ARCHITECTURES[1],
            },
            parameters: layout.len(),
            matrix_parameters,
            tokens: last.0 as u64,
            is_held_out,
            points,
        })
    }
}

/// The model that a run trained.
fn configuration(directory: &Path) -> Result<Architecture> {
    for place in ["model/config.json", "config.json"] {
        let place = directory.join(place);
        let file = place.display().to_string();
        match std::fs::read(&place) {
            Ok(json) => return Architecture::from_json(&file, &json),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(reason) => return Err(Error::Read { file, reason }),
        }
    }
    Err(Error::Malformed {
        file: directory.display().to_string(),
        what: "there is neither model/config.json nor config.json beside the log, so the size of the model is \
               unknown"
            .to_owned(),
    })
}
