use std::path::Path;

use super::*;
use crate::log::{Record, RunLog};

const LAWS: [PowerLaw; 2] = [
    PowerLaw { floor: 1.2, coefficient: 90.0, exponent: 0.11 },
    PowerLaw { floor: 1.3, coefficient: 60.0, exponent: 0.105 },
];

/// A run of an architecture whose final loss is on its law.
fn run(directory: &Path, which: usize, width: usize) -> PathBuf {
    let path = directory.join(format!("{}-{width}", ["hgrn_bit", "llama"][which]));
    std::fs::create_dir_all(path.join("model")).unwrap();
    let config = match which {
        0 => format!(
            r#"{{"model_type": "hgrn_bit", "vocab_size": 512, "hidden_size": {width}, "num_hidden_layers": 4,
                "intermediate_size": 256, "num_heads": 1, "expand_ratio": 1, "hidden_act": "swish",
                "use_short_conv": false, "tie_word_embeddings": false}}"#
        ),
        _ => format!(
            r#"{{"model_type": "llama", "vocab_size": 512, "hidden_size": {width}, "num_hidden_layers": 4,
                "intermediate_size": 256, "num_attention_heads": 2, "hidden_act": "silu"}}"#
        ),
    };
    std::fs::write(path.join("model/config.json"), config).unwrap();
    let matrices = configuration_of(&path).layout().matrix_weights();
    let mut log = RunLog::open(&path, 0).unwrap();
    for step in 1..=20 {
        let tokens = step * 1_000_000 * width as u64;
        let loss = LAWS[which].loss(6.0 * matrices as f64 * tokens as f64);
        let validation_loss = (step % 5 == 0).then_some(loss);
        log.write(&Record { step, tokens, loss: Some(loss), validation_loss, ..Record::default() })
            .unwrap();
    }
    path
}

fn configuration_of(path: &Path) -> crate::architecture::Architecture {
    let file = path.join("model/config.json");
    let json = std::fs::read(&file).unwrap();
    crate::architecture::Architecture::from_json("config.json", &json).unwrap()
}

#[test]
fn laws_of_runs_are_found_and_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let runs: Vec<_> = (0..2)
        .flat_map(|which| [32, 64, 128, 256].map(|width| run(directory.path(), which, width)))
        .collect();
    let report = analyse(&runs, &Options { draws: 50, ..Options::default() }).unwrap();
    assert_eq!(report.runs.len(), 8);
    assert!(report.runs.iter().all(|run| run.points.len() == 1 && run.is_held_out));
    let floor = &report.projections[0];
    for (fit, law) in floor.fits.iter().zip(LAWS) {
        assert!((fit.law.floor - law.floor).abs() < 0.01, "{fit:?}");
        assert!((fit.law.exponent - law.exponent).abs() < 0.001, "{fit:?}");
        assert!(fit.error < 1e-6);
    }
    let expected = crossing(&LAWS[0], &LAWS[1], 1e15).unwrap();
    let found = floor.crossing_flops.unwrap();
    assert!((found.log10() - expected.log10()).abs() < 0.1, "{found:e}, expected {expected:e}");
    let svg = draw(&report, 1e24, (960, 600)).unwrap();
    for expected in ["<svg", "transformer++", "matmul-free, with a floor", "FLOPs", "crossing"] {
        assert!(svg.contains(expected), "{expected}");
    }
    let table = report.markdown();
    assert!(
        table.contains("hgrn_bit-32") && table.contains("the MatMul-free model overtakes"),
        "{table}"
    );
    let undrawn = analyse(&runs, &Options { draws: 0, ..Options::default() }).unwrap();
    assert!(!undrawn.markdown().contains("draws"));
    let all = Options { points: Points::All, draws: 10 };
    assert_eq!(analyse(&runs, &all).unwrap().runs[0].points.len(), 4);
}

#[test]
fn what_cannot_be_fitted_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let one = run(directory.path(), 0, 32);
    let fails = |paths: &[PathBuf]| analyse(paths, &Options::default()).unwrap_err().to_string();
    assert!(fails(std::slice::from_ref(&one)).contains("1 of matmul-free and 0 of transformer++"));
    std::fs::write(one.join("log.jsonl"), "").unwrap();
    assert!(fails(std::slice::from_ref(&one)).contains("no loss"));
    let two = run(directory.path(), 1, 32);
    std::fs::remove_dir_all(two.join("model")).unwrap();
    assert!(fails(std::slice::from_ref(&two)).contains("config.json"));
    assert!(fails(&[directory.path().join("absent")]).contains("absent"));
    std::fs::write(two.join("log.jsonl"), "{}\n{}\n").unwrap();
    assert!(fails(&[two]).contains("log.jsonl:1"));
}
