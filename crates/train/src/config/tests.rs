use super::*;

const MINIMAL: &str = "[data]\ntrain = [\"a.txt\"]\n";

fn errors(text: &str, overrides: &[&str]) -> String {
    let overrides: Vec<Override> = overrides.iter().map(|text| text.parse().unwrap()).collect();
    TrainConfig::parse("x.toml", text, &overrides).unwrap_err().to_string()
}

#[test]
fn everything_wrong_is_named_at_once_with_its_line() {
    let text = "steps = 7
[optimizr]
x = 1
[optimizer]
lerning_rate = 1
beta1 = \"high\"
[model]
seed = 3
hidden_size = -5
colour = 1
[batch]
sequences = 10
sequences = 11
";
    let error = errors(text, &["run.stepz=5", "run.steps=many"]);
    for expected in [
        "line 1: steps stands outside its section; did you mean run.steps?",
        "line 2: [optimizr] is not a section; did you mean [optimizer]?",
        "line 5: optimizer.lerning_rate is not a key; did you mean optimizer.learning_rate?",
        "line 6: optimizer.beta1 is \"high\", expected a number",
        "line 8: model.seed is not a key; did you mean run.seed?",
        "line 9: model.hidden_size is -5, expected a whole number",
        "line 10: model.colour is not a key",
        "line 13: not valid TOML: duplicate key",
        "--set number 1: run.stepz is not a key; did you mean run.steps?",
        "--set number 2: run.steps is \"many\", expected a whole number",
    ] {
        assert!(error.contains(expected), "{expected:?} is not in:\n{error}");
    }
}

#[test]
fn contradictions_are_named_at_once() {
    let text = "[data]
train = [\"a\"]
validation = [\"a\"]
[model]
num_attention_heads = 4
[batch]
sequences = 10
micro_batch = 3
reduction_groups = 6
[run]
steps = 5
[schedule]
warmup_steps = 6
second_stage_at = 0.3
[optimizer]
learning_rate = 0
beta2 = 1.0
";
    let error = errors(text, &["checkpoint.keep=0"]);
    for expected in [
        "line 3: a is in data.train and in data.validation",
        "line 5: model.num_attention_heads belongs to transformer++",
        "line 8: batch.micro_batch is 3, which does not divide batch.sequences = 10",
        "line 9: batch.reduction_groups is 6",
        "line 13: schedule.warmup_steps is 6, more than run.steps = 5",
        "line 14: schedule.second_stage_at belongs to",
        "line 16: optimizer.learning_rate is 0",
        "line 17: optimizer.beta2 is 1",
        "--set number 1: checkpoint.keep is 0, expected 1 to",
    ] {
        assert!(error.contains(expected), "{expected:?} is not in:\n{error}");
    }
    // Beside what is no key; not what may come from it.
    let error = errors(text, &["run.stepz=7", "optimizer.beta2=x"]);
    for expected in ["run.stepz is not a key", "beta2 is \"x\"", "batch.micro_batch is 3"] {
        assert!(error.contains(expected), "{expected:?} is not in:\n{error}");
    }
    assert!(!error.contains("warmup_steps") && !error.contains("beta2 is 1"), "{error}");
    // Nor what would follow from an architecture or a section that was not understood.
    let text = "data = 1\n[model]\narchitecture = \"transfomer++\"\nnum_attention_heads = 4\n";
    let error = errors(text, &["optimizer.weight_decay=x", "optimizer.weight_decay_norms=7"]);
    for expected in ["write [data]", "architecture is \"transfomer++\"", "weight_decay_norms is 7"]
    {
        assert!(error.contains(expected), "{expected:?} is not in:\n{error}");
    }
    assert!(!error.contains("belongs to") && !error.contains("data.train"), "{error}");
    // A section that is not one puts no doubt on what another one says.
    let text = "[optimiser]\nbeta1 = 0.9\n[optimizer]\nbeta2 = 1.5\n";
    assert!(errors(text, &[]).contains("line 4: optimizer.beta2 is 1.5"));
    let text =
        "[data]\ntrain = \"a\"\n[model]\narchitecture = \"transformer++\"\nhidden_size = 64\n";
    assert!(errors(text, &[]).contains("model.num_attention_heads is 0"));
    assert!(errors(text, &["model.num_attention_heads=5"]).contains("is 5, which does not divide"));
    assert!(errors("", &[]).contains("data.train is empty"));
}

#[test]
fn overrides_take_toml_and_plain_text() {
    let overrides: Vec<Override> = [
        "run.directory=some/where",
        "run.steps = 1_000",
        "data.train=[\"x\", \"y\"]",
        "schedule.kind=two-stage",
    ]
    .iter()
    .map(|text| text.parse().unwrap())
    .collect();
    let config = TrainConfig::parse("x", MINIMAL, &overrides).unwrap();
    assert_eq!(config.run.directory, "some/where");
    assert_eq!(config.run.steps, 1000);
    assert_eq!(config.data.train, ["x", "y"]);
    assert_eq!(config.schedule.kind, ScheduleKind::TwoStage);
    assert!("nothing".parse::<Override>().is_err());
}

#[test]
fn what_is_written_reads_back() {
    let mut config = TrainConfig::parse("x", MINIMAL, &[]).unwrap();
    config.run.directory = "a \"b\"\n\\ \u{7f}".to_owned();
    config.optimizer.learning_rate = 1.5e-9;
    config.optimizer.clip_grad_norm = 1e12;
    let again = TrainConfig::parse("x", &config.to_toml(), &[]).unwrap();
    assert_eq!(again, config);
    assert_eq!(config.differences(&again), []);
}

#[test]
fn differences_are_those_that_decide_the_result() {
    let config = TrainConfig::default();
    let mut other = config.clone();
    other.run.threads = 5;
    other.model.hidden_size = 5;
    other.optimizer.beta1 = 0.5;
    let differences = config.differences(&other);
    assert_eq!(
        differences,
        [
            ("model.hidden_size", "1024".to_owned(), "5".to_owned()),
            ("optimizer.beta1", "0.9".to_owned(), "0.5".to_owned())
        ]
    );
}

#[test]
fn the_examples_write_out_every_key_and_can_be_trained() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let config = TrainConfig::load(&path, &[]).unwrap();
        // Without comments, a file is exactly what is written of its configuration.
        let plain: Vec<_> = text
            .lines()
            .map(|line| line.split("   #").next().unwrap().trim_end())
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect();
        let keys = plain.iter().filter(|line| line.contains(" = ")).count();
        assert_eq!(keys, fields().len(), "{name} does not write out every key once");
        let size = name.split('-').next().unwrap();
        if !["builtin", "study", "tiny"].contains(&size) {
            let preset = mmfree::config::ModelConfig::preset(size).unwrap();
            assert_eq!(config.model.hidden_size, preset.hidden_size, "{name}");
            assert_eq!(config.model.num_hidden_layers, preset.num_hidden_layers, "{name}");
            assert_eq!(config.intermediate_size(), preset.intermediate_size, "{name}");
        }
        names.push(name);
    }
    names.sort();
    let expected = [
        "1.3b",
        "1.3b-transformer",
        "2.7b",
        "2.7b-transformer",
        "370m",
        "370m-transformer",
        "builtin",
        "study",
        "tiny",
        "tiny-transformer",
    ];
    assert_eq!(names, expected);
}
