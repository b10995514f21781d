//! Scaling laws: loss against compute, for each architecture, and where they cross.
//!
//! A run's compute is `6 N D` FLOPs: N its weights in matrices (the head's are among them, the embedding table
//! is only looked up), D the tokens that it was trained on. Every product counts alike, also those with
//! ternary weights, as in the paper; the products between activations in attention are left out.

mod draw;
mod fit;
mod run;

use std::fmt::Write;
use std::path::PathBuf;

use mmfree::error::{Error, Result};
use serde::Serialize;

pub use self::draw::draw;
pub use self::fit::{Form, Interval, PowerLaw, crossing};
pub use self::run::{Points, Run};

/// The paper's projection: the compute at which the MatMul-free model overtakes the Transformer++.
pub const PAPER_CROSSING: f64 = 1e23;
/// Names of the architectures, the one that is to overtake first.
const ARCHITECTURES: [&str; 2] = ["matmul-free", "transformer++"];

/// How laws are fitted.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which losses of a run count.
    pub points: Points,
    /// Draws of the bootstrap.
    pub draws: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { points: Points::Final, draws: 1000 }
    }
}

/// A law of one architecture.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// `matmul-free` or `transformer++`.
    pub architecture: &'static str,
    /// Points that were fitted.
    pub points: usize,
    /// The law.
    pub law: PowerLaw,
    /// Root of the mean squared error of the loss, in nats.
    pub error: f64,
    /// 90 % of the bootstrap's exponents.
    pub exponent_interval: Option<Interval>,
    /// 90 % of the bootstrap's floors.
    pub floor_interval: Option<Interval>,
}

/// Both architectures' laws of one form.
#[derive(Clone, Debug, Serialize)]
pub struct Projection {
    /// The form.
    pub form: Form,
    /// A law of each architecture that has enough runs.
    pub fits: Vec<Fit>,
    /// FLOPs at which the MatMul-free model's loss falls below the Transformer++'s, if it is above at the
    /// largest compute that was measured and the lines cross before 10^40.
    pub crossing_flops: Option<f64>,
    /// 90 % of the crossings that the bootstrap found.
    pub crossing_interval: Option<Interval>,
    /// Share of the bootstrap's draws that cross.
    pub crossing_share: Option<f64>,
    /// Which architecture has the lower loss at the largest compute that was measured, by the laws.
    pub better_at_largest: Option<&'static str>,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The runs.
    pub runs: Vec<Run>,
    /// Laws with a floor, then without one, as a straight line on logarithmic axes (the paper's projection).
    pub projections: Vec<Projection>,
    /// The paper's projection, in FLOPs.
    pub paper_crossing_flops: f64,
}

/// Reads runs (directories, or their logs) and fits laws.
///
/// # Errors
/// Runs that cannot be read, without a loss or without a configuration; too few runs for any law.
pub fn analyse(paths: &[PathBuf], options: &Options) -> Result<Report> {
    let names = crate::plot::names(paths);
    let runs = paths
        .iter()
        .zip(names)
        .map(|(path, name)| Run::read(path, name, options.points))
        .collect::<Result<Vec<_>>>()?;
    let projections: Vec<_> =
        [Form::Floor, Form::Pure].map(|form| project(&runs, form, options.draws)).into();
    if projections.iter().all(|projection| projection.fits.is_empty()) {
        let counts = ARCHITECTURES.map(|name| {
            let count = runs.iter().filter(|run| run.architecture == name).count();
            format!("{count} of {name}")
        });
        return Err(Error::Invalid(format!(
            "no law can be fitted to {}: a line needs two runs of an architecture with different compute and a \
             loss that falls, a law with a floor needs three",
            counts.join(" and ")
        )));
    }
    Ok(Report { runs, projections, paper_crossing_flops: PAPER_CROSSING })
}

fn project(runs: &[Run], form: Form, draws: usize) -> Projection {
    let points = ARCHITECTURES.map(|name| {
        let runs = runs.iter().filter(|run| run.architecture == name);
        runs.flat_map(|run| run.points.iter().copied()).collect::<Vec<(f64, f64)>>()
    });
    let laws = points.each_ref().map(|points| PowerLaw::fit(points, form));
    let mut random = fit::generator();
    let mut drawn: [Vec<PowerLaw>; 2] = Default::default();
    let (mut crossings, mut pairs) = (Vec::new(), 0_usize);
    let largest = points.iter().flatten().map(|point| point.0).fold(0.0, f64::max);
    for _ in 0..draws {
        let draw = points
            .each_ref()
            .map(|points| PowerLaw::fit(&fit::resample(points, &mut random), form));
        if let [Some(first), Some(second)] = &draw {
            pairs += 1;
            crossings.extend(crossing(first, second, largest));
        }
        for (drawn, law) in drawn.iter_mut().zip(draw) {
            drawn.extend(law);
        }
    }
    let mut fits = Vec::new();
    for (((law, points), drawn), architecture) in
        laws.iter().zip(&points).zip(&drawn).zip(ARCHITECTURES)
    {
        let Some(law) = *law else { continue };
        let squares: f64 = points.iter().map(|(c, l)| (law.loss(*c) - l).powi(2)).sum();
        let interval =
            |value: fn(&PowerLaw) -> f64| Interval::of(drawn.iter().map(value).collect());
        fits.push(Fit {
            architecture,
            points: points.len(),
            law,
            error: (squares / points.len() as f64).sqrt(),
            exponent_interval: interval(|law| law.exponent),
            floor_interval: (form == Form::Floor).then(|| interval(|law| law.floor)).flatten(),
        });
    }
    let both = match laws {
        [Some(first), Some(second)] => Some((first, second)),
        _ => None,
    };
    Projection {
        form,
        fits,
        crossing_flops: both.and_then(|(first, second)| crossing(&first, &second, largest)),
        crossing_share: (pairs > 0).then(|| crossings.len() as f64 / pairs as f64),
        crossing_interval: Interval::of(crossings),
        better_at_largest: both.map(|(first, second)| {
            let first_is_better = first.loss(largest) < second.loss(largest);
            ARCHITECTURES[usize::from(!first_is_better)]
        }),
    }
}

impl Report {
    /// Tables in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| run | architecture | weights in matrices | tokens | FLOPs | loss |\n|---|---|---|---|---|---|\n",
        );
        for run in &self.runs {
            let (flops, loss) = run.points[run.points.len() - 1];
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {flops:.3e} | {loss:.4} |",
                run.name, run.architecture, run.matrix_parameters, run.tokens
            );
        }
        text.push_str(
            "\nloss = floor + coefficient · FLOPs^(-exponent); in brackets 90 % of the bootstrap\n\n\
             | form | architecture | points | floor | coefficient | exponent | error |\n|---|---|---|---|---|---|---|\n",
        );
        let range = |interval: &Option<Interval>| {
            interval.map_or(String::new(), |i| format!(" ({:.4} to {:.4})", i.low, i.high))
        };
        for projection in &self.projections {
            for fit in &projection.fits {
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {:.4}{} | {:.4e} | {:.4}{} | {:.4} |",
                    projection.form.name(),
                    fit.architecture,
                    fit.points,
                    fit.law.floor,
                    range(&fit.floor_interval),
                    fit.law.coefficient,
                    fit.law.exponent,
                    range(&fit.exponent_interval),
                    fit.error
                );
            }
        }
        text.push('\n');
        for projection in &self.projections {
            let _ = writeln!(text, "{}", projection.sentence());
        }
        text
    }
}

impl Form {
    /// What the form is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "with a floor",
            Self::Pure => "straight line",
        }
    }
}

impl Projection {
    /// The crossing in words.
    pub fn sentence(&self) -> String {
        let form = self.form.name();
        let Some(better) = self.better_at_largest else {
            return format!("- {form}: no crossing without a law of both architectures.");
        };
        let found = match self.crossing_flops {
            Some(flops) => format!("the MatMul-free model overtakes at {flops:.2e} FLOPs"),
            None if better == ARCHITECTURES[0] => {
                "the MatMul-free model is better already at the largest compute".to_owned()
            }
            None => "the lines do not cross before 1e40 FLOPs".to_owned(),
        };
        let interval = self.crossing_interval.map_or(String::new(), |interval| {
            format!(", 90 % of them from {:.1e} to {:.1e}", interval.low, interval.high)
        });
        let share = self.crossing_share.map_or(String::new(), |share| {
            format!("; {:.0} % of the bootstrap's draws cross{interval}", 100.0 * share)
        });
        format!("- {form}: {found} (paper: {PAPER_CROSSING:.0e}){share}.")
    }
}

#[cfg(test)]
mod tests;
