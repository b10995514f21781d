//! The numbers that are drawn.

use super::Axis;
use crate::log::Record;

/// A place on a curve: tokens or steps, and a loss in nats.
pub type Point = (f64, f64);

/// The losses of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// What the run is called.
    pub name: String,
    /// Training loss of each step that was logged.
    pub training: Vec<Point>,
    /// Validation loss of each evaluation.
    pub validation: Vec<Point>,
}

impl Curve {
    /// Takes the losses from a log. Values that are not finite are left out.
    pub fn new(name: String, records: &[Record], axis: Axis) -> Self {
        let position = |record: &Record| match axis {
            Axis::Tokens => record.tokens as f64,
            Axis::Steps => record.step as f64,
        };
        let points = |loss: fn(&Record) -> Option<f64>| {
            let finite = |record: &Record| {
                loss(record).filter(|loss| loss.is_finite()).map(|loss| (position(record), loss))
            };
            records.iter().filter_map(finite).collect()
        };
        Self {
            name,
            training: points(|record| record.loss),
            validation: points(|record| record.validation_loss),
        }
    }
}

/// Exponential moving average y\_k = w y\_{k-1} + (1 − w) x\_k, without the bias of its start: divided by the
/// total weight of the values so far. The weight w is `per_hundredth` for every hundredth of the curve's length
/// on the horizontal axis, so that curves with few and with many points are smoothed alike.
pub fn smooth(points: &[Point], per_hundredth: f64) -> Vec<Point> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    let unit = ((last.0 - first.0) / 100.0).max(f64::MIN_POSITIVE);
    let (mut mean, mut total, mut previous) = (0.0, 0.0, first.0);
    let average = |&(x, y): &Point| {
        let weight =
            if per_hundredth == 0.0 { 0.0 } else { per_hundredth.powf((x - previous) / unit) };
        previous = x;
        mean = weight * mean + y;
        total = weight * total + 1.0;
        (x, mean / total)
    };
    points.iter().map(average).collect()
}
