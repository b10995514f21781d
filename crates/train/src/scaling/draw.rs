//! The drawing: runs as points, laws as lines.

use mmfree::error::{Error, Result};
use plotters::prelude::*;

use super::{ARCHITECTURES, Form, Report};
use crate::plot::{COLOURS, DrawingResult, FONT, legend};

/// Points of a line.
const STEPS: usize = 200;

/// Draws loss against compute as an SVG document: a mark for each loss that was fitted, a line for each law with
/// a floor, a dashed one for each without, and a mark where lines cross. The axis reaches `farthest` FLOPs, or
/// what was measured if that is more.
///
/// # Errors
/// A drawing that fails.
pub fn draw(report: &Report, farthest: f64, size: (u32, u32)) -> Result<String> {
    let computes = || report.runs.iter().flat_map(|run| &run.points).map(|point| point.0);
    let first = computes().fold(f64::INFINITY, f64::min) / 2.0;
    let last = computes().fold(farthest, f64::max) * 2.0;
    let losses = || report.runs.iter().flat_map(|run| &run.points).map(|point| point.1);
    let lines = || report.projections.iter().flat_map(|projection| &projection.fits);
    let low = lines().map(|fit| fit.law.loss(last)).chain(losses()).fold(f64::INFINITY, f64::min);
    let high = losses().fold(0.0, f64::max);
    let margin = ((high - low) * 0.06).max(0.01);
    let mut svg = String::new();
    let drawn = (|| -> DrawingResult {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption("Loss against compute", (FONT, 24))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d((first..last).log_scale(), low - margin..high + margin)?;
        chart
            .configure_mesh()
            .x_desc("training compute (FLOPs)")
            .y_desc("loss (nats per token)")
            .axis_desc_style((FONT, 17))
            .label_style((FONT, 14))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .x_labels(8)
            .x_label_formatter(&|flops| format!("{flops:.0e}"))
            .y_label_formatter(&|loss| format!("{loss:.2}"))
            .draw()?;
        for (colour, architecture) in COLOURS.into_iter().zip(ARCHITECTURES) {
            let runs = report.runs.iter().filter(|run| run.architecture == architecture);
            let points: Vec<_> = runs.flat_map(|run| run.points.iter().copied()).collect();
            if points.is_empty() {
                continue;
            }
            chart
                .draw_series(points.iter().map(|&point| Circle::new(point, 4, colour.filled())))?
                .label(architecture)
                .legend(move |(x, y)| Circle::new((x + 14, y), 4, colour.filled()));
            for projection in &report.projections {
                let Some(fit) = projection.fits.iter().find(|fit| fit.architecture == architecture)
                else {
                    continue;
                };
                let at = |step: usize| {
                    let flops = first * (last / first).powf(step as f64 / STEPS as f64);
                    (flops, fit.law.loss(flops))
                };
                let line = (0..=STEPS).map(at).filter(|point| point.1 <= high + margin);
                let label = format!("{architecture}, {}", projection.form.name());
                let style = colour.stroke_width(2);
                match projection.form {
                    Form::Floor => {
                        chart
                            .draw_series(LineSeries::new(line, style))?
                            .label(label)
                            .legend(move |(x, y)| PathElement::new([(x, y), (x + 28, y)], style));
                    }
                    Form::Pure => {
                        chart
                            .draw_series(DashedLineSeries::new(line, 7, 5, style))?
                            .label(label)
                            .legend(move |(x, y)| {
                                EmptyElement::at((x, y))
                                    + PathElement::new([(0, 0), (9, 0)], style)
                                    + PathElement::new([(18, 0), (28, 0)], style)
                            });
                    }
                }
            }
        }
        for projection in &report.projections {
            let Some(flops) = projection.crossing_flops.filter(|flops| *flops < last) else {
                continue;
            };
            let loss = projection.fits[0].law.loss(flops);
            chart.draw_series([TriangleMarker::new((flops, loss), 8, BLACK.filled())])?;
            chart.draw_series([Text::new(
                format!("crossing, {}: {flops:.1e}", projection.form.name()),
                (flops, loss + margin),
                (FONT, 14),
            )])?;
        }
        legend(&mut chart)?;
        root.present()?;
        Ok(())
    })();
    drawn.map_err(|error| Error::Invalid(format!("the chart cannot be drawn: {error}")))?;
    Ok(svg)
}
