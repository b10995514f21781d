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

/// Moving average with weights that fall exponentially to both sides, so that it does not lag behind the curve:
/// y\_k = Σ\_j w^|x\_k − x\_j| y\_j / Σ\_j w^|x\_k − x\_j|. The weight w is `per_hundredth` for every hundredth of the
/// curve's length on the horizontal axis, so that curves with few and with many points are smoothed alike.
pub fn smooth(points: &[Point], per_hundredth: f64) -> Vec<Point> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    if per_hundredth == 0.0 {
        return points.to_vec();
    }
    let unit = ((last.0 - first.0) / 100.0).max(f64::MIN_POSITIVE);
    // Weighted sums over a point and all on one side of it, one step from those of its neighbour.
    let side = |points: &mut dyn Iterator<Item = &Point>| -> Vec<(f64, f64)> {
        let (mut sum, mut total, mut previous) = (0.0, 0.0, None);
        let add = |&(x, y): &Point| {
            let weight = previous.map_or(0.0, |at: f64| per_hundredth.powf((x - at).abs() / unit));
            previous = Some(x);
            sum = weight * sum + y;
            total = weight * total + 1.0;
            (sum, total)
        };
        points.map(add).collect()
    };
    let before = side(&mut points.iter());
    let after = side(&mut points.iter().rev());
    // Both sides have the point itself.
    let average = |(index, &(x, y)): (usize, &Point)| {
        let (before, after) = (before[index], after[points.len() - 1 - index]);
        (x, (before.0 + after.0 - y) / (before.1 + after.1 - 1.0))
    };
    points.iter().enumerate().map(average).collect()
}
