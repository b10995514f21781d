//! The drawing.

use std::ops::Range;

use mmfree::error::{Error, Result};
use plotters::coord::{CoordTranslate, Shift};
use plotters::prelude::*;

use super::curve::{Curve, Point, smooth};
use super::{Axis, PlotOptions};

/// Colours that people with any kind of colour vision can tell apart (Okabe and Ito 2008), without its yellow,
/// which is too light for a line on white.
pub(crate) const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];
pub(crate) const FONT: &str = "sans-serif";
/// Share of a range that is left free at each end of the vertical axis.
const MARGIN: f64 = 0.05;
/// A loss at the start that is far above the rest would flatten the curves: the vertical axis ends at this share
/// of the way through the sorted losses, and what is above is cut.
const SHOWN_SHARE: f64 = 0.985;
/// More runs than this have their names beside the chart and not in its corner, and no raw losses: there would be
/// no place for them.
const CORNER_RUNS: usize = 3;
/// Pixels beside the chart for the names of runs: their lines, and a character of a name.
const SAMPLE_WIDTH: i32 = 28;
const CHARACTER_WIDTH: u32 = 9;
const NAME_HEIGHT: i32 = 24;
/// Most points of a line: more would only make a larger file.
const MAX_POINTS: usize = 2000;

/// Draws curves as an SVG document: the smoothed training loss as a line over the raw one in a pale colour, the
/// validation loss as a dashed line with a mark at each evaluation. With many runs the names stand beside the chart.
///
/// # Errors
/// A size too small or too large; no points.
pub fn draw(curves: &[Curve], options: &PlotOptions) -> Result<String> {
    let (width, height) = options.size;
    if !(320..=10_000).contains(&width) || !(200..=10_000).contains(&height) {
        let what =
            format!("a chart of {width} by {height} pixels; expected 320 by 200 to 10000 each");
        return Err(Error::Invalid(what));
    }
    let Some((x, y)) = ranges(curves, options) else {
        return Err(Error::Invalid("there is nothing to draw".to_owned()));
    };
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, options.size).into_drawing_area();
    let drawn = chart(&root, curves, options, x, y);
    drawn.map_err(|error| Error::Invalid(format!("the chart cannot be drawn: {error}")))?;
    drop(root);
    Ok(svg)
}

/// What the axes show.
fn ranges(curves: &[Curve], options: &PlotOptions) -> Option<(Range<f64>, Range<f64>)> {
    let smoothed: Vec<_> =
        curves.iter().map(|curve| smooth(&curve.training, options.smoothing)).collect();
    let all = || curves.iter().map(|curve| &curve.validation).chain(&smoothed).flatten();
    let end = all().map(|point| point.0).reduce(f64::max)?;
    let mut losses: Vec<_> = all().map(|point| point.1).collect();
    losses.sort_by(f64::total_cmp);
    let top = losses[((losses.len() - 1) as f64 * SHOWN_SHARE) as usize];
    let (low, high) = (losses[0], top.max(losses[0] + 1e-3));
    let margin = (high - low) * MARGIN;
    Some((0.0..end.max(1.0) * 1.01, low - margin..high + margin))
}

pub(crate) type DrawingResult = std::result::Result<(), Box<dyn std::error::Error>>;

fn chart(
    root: &DrawingArea<SVGBackend, Shift>,
    curves: &[Curve],
    options: &PlotOptions,
    x: Range<f64>,
    y: Range<f64>,
) -> DrawingResult {
    root.fill(&WHITE)?;
    let many = curves.len() > CORNER_RUNS;
    let (width, _) = options.size;
    let longest = curves.iter().map(|curve| curve.name.chars().count()).max().unwrap_or(0);
    // Names never take more than half of the width.
    let side = ((longest as u32 + 6) * CHARACTER_WIDTH).max(200).min(width / 2);
    let (area, names) = root.split_horizontally(if many { width - side } else { width });
    let mut chart = ChartBuilder::on(&area)
        .caption(&options.title, (FONT, 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y.clone())?;
    let axis = match options.axis {
        Axis::Tokens => "tokens seen",
        Axis::Steps => "steps",
    };
    chart
        .configure_mesh()
        .x_desc(axis)
        .y_desc("loss (nats per token)")
        .axis_desc_style((FONT, 17))
        .label_style((FONT, 14))
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|&value| short(value))
        .y_label_formatter(&|&value| decimals(value, &y))
        .draw()?;
    for (number, curve) in curves.iter().enumerate() {
        let line = line_of(number);
        let colour = COLOURS[number % COLOURS.len()];
        if options.smoothing > 0.0 && !many {
            let raw = thinned(&curve.training);
            chart.draw_series(LineSeries::new(raw, colour.mix(0.22).stroke_width(1)))?;
        }
        let smoothed = thinned(&smooth(&curve.training, options.smoothing));
        if !smoothed.is_empty() {
            chart
                .draw_series(LineSeries::new(smoothed, line))?
                .label(format!("{}, training", curve.name))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 28, y)], line));
        }
        if !curve.validation.is_empty() {
            let points = curve.validation.iter().copied();
            chart
                .draw_series(DashedLineSeries::new(points.clone(), 7, 4, line))?
                .label(format!("{}, validation", curve.name))
                .legend(move |(x, y)| {
                    EmptyElement::at((x, y))
                        + PathElement::new([(0, 0), (10, 0)], line)
                        + PathElement::new([(18, 0), (28, 0)], line)
                        + Circle::new((14, 0), 4, colour.filled())
                });
            chart.draw_series(points.map(|point| Circle::new(point, 4, colour.filled())))?;
        }
    }
    if many {
        list(&names, curves)?;
    } else {
        legend(&mut chart)?;
    }
    root.present()?;
    Ok(())
}

/// The line of a run. The eighth has the colour of the first, but a thinner line.
fn line_of(number: usize) -> ShapeStyle {
    let width = if number < COLOURS.len() { 2 } else { 1 };
    COLOURS[number % COLOURS.len()].stroke_width(width)
}

/// Draws a line and the name of each run into an area of its own.
fn list(area: &DrawingArea<SVGBackend, Shift>, curves: &[Curve]) -> DrawingResult {
    let mut y = 2 * NAME_HEIGHT;
    let mut write = |text: &str, line: Option<ShapeStyle>| -> DrawingResult {
        let indent = if let Some(line) = line {
            area.draw(&PathElement::new([(0, y + 8), (SAMPLE_WIDTH, y + 8)], line))?;
            SAMPLE_WIDTH + 8
        } else {
            0
        };
        area.draw(&Text::new(text.to_owned(), (indent, y), (FONT, 15)))?;
        y += NAME_HEIGHT;
        Ok(())
    };
    for (number, curve) in curves.iter().enumerate() {
        write(&curve.name, Some(line_of(number)))?;
    }
    write("lines: training, smoothed", None)?;
    write("dashes and marks: validation", None)
}

/// Draws the labels of a chart's series into its upper right corner.
pub(crate) fn legend<'a, 's: 'a, C: CoordTranslate>(
    chart: &mut ChartContext<'a, SVGBackend<'s>, C>,
) -> DrawingResult {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .legend_area_size(36)
        .label_font((FONT, 15))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// At most [`MAX_POINTS`] of a line's points, its ends among them.
fn thinned(points: &[Point]) -> Vec<Point> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let last = points.len() - 1;
    (0..MAX_POINTS).map(|index| points[index * last / (MAX_POINTS - 1)]).collect()
}

/// A count in a few characters: 0, 500, 20k, 1.5M, 226M, 15B.
fn short(value: f64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")];
    let (unit, name) =
        units.into_iter().find(|(unit, _)| value.abs() >= *unit).unwrap_or((1.0, ""));
    // Three digits at most, without zeros that say nothing.
    let text = format!("{:.2}", value / unit);
    format!("{}{name}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A loss with as many decimals as tell the labels of the axis apart.
fn decimals(value: f64, range: &Range<f64>) -> String {
    let digits = (1.0 - (range.end - range.start).log10().floor()).clamp(1.0, 6.0) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_the_axes_are_short() {
        let counts = [0.0, 500.0, 20_000.0, 1_500_000.0, 226e6, 15e9];
        assert_eq!(counts.map(short), ["0", "500", "20k", "1.5M", "226M", "15B"]);
        assert_eq!(decimals(3.5, &(2.0..9.0)), "3.5");
        assert_eq!(decimals(3.5, &(3.45..3.55)), "3.500");
    }

    #[test]
    fn long_lines_are_thinned_and_keep_their_ends() {
        let points: Vec<_> = (0..100_000).map(|i| (f64::from(i), 1.0)).collect();
        let thin = thinned(&points);
        assert_eq!(thin.len(), MAX_POINTS);
        assert_eq!((thin[0].0, thin[MAX_POINTS - 1].0), (0.0, 99_999.0));
    }
}
