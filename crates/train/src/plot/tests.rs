use std::path::Path;

use super::*;
use crate::log::{Record, RunLog};

fn run(directory: &Path, steps: u64, scale: f64) {
    let mut log = RunLog::open(directory, 0).unwrap();
    for step in 1..=steps {
        let loss =
            scale * (2.0 + 6.0 / (step as f64).sqrt() + ((step * 7919 % 13) as f64 - 6.0) * 0.02);
        let validation_loss = (step % 50 == 0).then_some(loss + 0.1);
        let record = Record {
            step,
            tokens: step * 4096,
            loss: Some(loss),
            validation_loss,
            ..Record::default()
        };
        log.write(&record).unwrap();
    }
}

#[test]
fn runs_are_drawn_with_their_names_and_units() {
    let directory = tempfile::tempdir().unwrap();
    let runs = ["a/small", "b/small"].map(|name| directory.path().join(name));
    run(&runs[0], 200, 1.0);
    run(&runs[1], 300, 0.9);
    let svg = plot(&runs, &PlotOptions::default()).unwrap();
    for expected in
        ["<svg", "a/small, training", "b/small, validation", "tokens seen", "nats per token"]
    {
        assert!(svg.contains(expected), "{expected}");
    }
    let log = [runs[0].join("log.jsonl")];
    let options = PlotOptions { axis: Axis::Steps, ..PlotOptions::default() };
    let svg = plot(&log, &options).unwrap();
    assert!(svg.contains("steps") && svg.contains("small, training"), "{svg}");
}

#[test]
fn names_of_many_runs_stand_beside_the_chart() {
    let directory = tempfile::tempdir().unwrap();
    let runs: Vec<_> = (0..9).map(|i| directory.path().join(format!("run-{i}"))).collect();
    runs.iter().for_each(|path| run(path, 100, 1.0));
    let svg = plot(&runs, &PlotOptions::default()).unwrap();
    let lines: Vec<_> = svg.lines().collect();
    for name in (0..9).map(|i| format!("run-{i}")) {
        let at = lines.iter().position(|line| line.trim() == name).expect(&name);
        let x = lines[at - 1].split("x=\"").nth(1).and_then(|x| x.split('"').next()).unwrap();
        assert!(x.parse::<f64>().unwrap() > 700.0, "{x}");
    }
    // A name longer than the chart leaves half of it to the curves.
    let long = directory.path().join("x".repeat(200));
    run(&long, 100, 1.0);
    assert!(plot(&[runs, vec![long]].concat(), &PlotOptions::default()).is_ok());
}

#[test]
fn what_cannot_be_drawn_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    let run = |options| plot(std::slice::from_ref(&path), &options);
    assert!(run(PlotOptions::default()).is_err());
    let mut log = RunLog::open(&path, 0).unwrap();
    log.write(&Record { step: 1, ..Record::default() }).unwrap();
    assert!(run(PlotOptions::default()).unwrap_err().to_string().contains("no loss"));
    log.write(&Record { step: 2, loss: Some(3.0), ..Record::default() }).unwrap();
    assert!(run(PlotOptions::default()).is_ok());
    assert!(run(PlotOptions { smoothing: 1.0, ..PlotOptions::default() }).is_err());
    assert!(run(PlotOptions { size: (10, 10), ..PlotOptions::default() }).is_err());
}

#[test]
fn smoothing_keeps_a_constant_and_damps_noise() {
    let flat: Vec<Point> = (0..50).map(|i| (f64::from(i), 3.0)).collect();
    assert!(smooth(&flat, 0.9).iter().all(|point| (point.1 - 3.0).abs() < 1e-12));
    let noisy: Vec<Point> = (0..1000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
    assert!(smooth(&noisy, 0.6)[500..].iter().all(|point| (point.1 - 0.5).abs() < 0.1));
    assert_eq!(smooth(&noisy, 0.0), noisy);
    // A straight line stays where it is, away from its ends: nothing lags. So with a tenth of the points.
    let dense: Vec<Point> = noisy.iter().map(|&(x, _)| (x, x)).collect();
    let sparse: Vec<Point> = dense.iter().step_by(10).copied().collect();
    for line in [dense, sparse] {
        let middle = line.len() / 5..line.len() * 4 / 5;
        let smoothed = smooth(&line, 0.6);
        assert!(smoothed[middle].iter().all(|point| (point.1 - point.0).abs() < 0.1), "it lags");
        assert!(smoothed[0].1 > 1.0);
    }
}
