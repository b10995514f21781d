//! `mmfree train` as a user meets it: from a text to a model that writes, stopped, killed and resumed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

fn mmfree() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmfree"));
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    command
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A run of a model that takes milliseconds a step, in a directory of its own.
struct Run {
    directory: TempDir,
    name: &'static str,
}

/// Keys that make `configs/tiny.toml` a model of a few thousand parameters.
const SMALL: [&str; 13] = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "data.tokenizer_vocab_size=300",
    "batch.sequence_length=32",
    "batch.sequences=8",
    "batch.micro_batch=2",
    "batch.reduction_groups=4",
    "evaluation.sequences=8",
    "evaluation.every=5",
    "checkpoint.every=3",
    "run.steps=24",
    "run.threads=1",
];

impl Run {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), name: "run" }
    }

    /// A second run on the same tokens.
    fn beside(&self, name: &'static str) -> Beside<'_> {
        Beside { first: self, name }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(self.name)
    }

    fn command(&self, set: &[&str]) -> Command {
        command(self.directory.path(), self.name, set)
    }
}

struct Beside<'a> {
    first: &'a Run,
    name: &'static str,
}

impl Beside<'_> {
    fn path(&self) -> PathBuf {
        self.first.directory.path().join(self.name)
    }

    fn command(&self, set: &[&str]) -> Command {
        command(self.first.directory.path(), self.name, set)
    }
}

fn command(directory: &Path, name: &str, set: &[&str]) -> Command {
    let mut command = mmfree();
    command.current_dir(root()).args(["train", "configs/tiny.toml"]);
    let own = [
        format!("run.directory={}", directory.join(name).display()),
        format!("data.cache={}", directory.join("data").display()),
    ];
    for set in
        SMALL.iter().copied().chain(own.iter().map(String::as_str)).chain(set.iter().copied())
    {
        command.args(["--set", set]);
    }
    command
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    error
}

/// What a run came to: losses of every step as they are written, and the bytes of the last checkpoint.
fn result(run: &Path) -> (Vec<String>, Vec<(String, Vec<u8>)>) {
    let log = fs::read_to_string(run.join("log.jsonl")).unwrap();
    let lines = log.lines().map(|line| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let keys = ["step", "tokens", "loss", "validation_loss", "gradient_norm", "learning_rate"];
        keys.map(|key| record[key].to_string()).join(" ")
    });
    let model = fs::canonicalize(run.join("model")).unwrap();
    let mut files: Vec<_> = ["model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"]
        .iter()
        .map(|name| ((*name).to_owned(), fs::read(model.join(name)).unwrap()))
        .collect();
    files.push(("path".to_owned(), model.file_name().unwrap().as_encoded_bytes().to_vec()));
    (lines.collect(), files)
}

fn assert_same(found: &Path, expected: &Path) {
    let (found, expected) = (result(found), result(expected));
    assert_eq!(found.0, expected.0, "losses");
    for (found, expected) in found.1.iter().zip(&expected.1) {
        assert!(found == expected, "{} differs", found.0);
    }
}

#[test]
fn stopped_and_resumed_runs_equal_an_uninterrupted_one() {
    let whole = Run::new();
    succeed(&mut whole.command(&[]));
    // Another evaluation, log or number of threads changes nothing that is learnt.
    let stopped = whole.beside("stopped");
    for signal in ["INT", "TERM"] {
        let mut child = stopped.command(&["run.threads=2"]).arg("--resume").spawn().unwrap();
        let before = checkpoints(&stopped.path()).last().cloned();
        wait_until(&mut child, || checkpoints(&stopped.path()).last().cloned() > before);
        kill(&child, signal);
        let code = child.wait().unwrap().code();
        let expected = if signal == "INT" { 130 } else { 143 };
        assert!(code == Some(expected) || code == Some(0), "{code:?} after SIG{signal}");
    }
    succeed(stopped.command(&[]).arg("--resume"));
    assert_same(&stopped.path(), &whole.path());
    // Two checkpoints are kept, and finished means finished.
    assert_eq!(checkpoints(&whole.path()), ["step-00000021", "step-00000024"]);
    succeed(stopped.command(&[]).arg("--resume"));
    assert_same(&stopped.path(), &whole.path());
    let error = refused(&mut stopped.command(&[]));
    assert!(error.contains("--resume"), "{error}");
    let error =
        refused(stopped.command(&["optimizer.beta1=0.8", "model.hidden_size=64"]).arg("--resume"));
    assert!(error.contains("optimizer.beta1: 0.9, 0.8"), "{error}");
    assert!(error.contains("model.hidden_size: 32, 64"), "{error}");
    // The event files are there, and a plot can be drawn.
    let svg = whole.directory.path().join("loss.svg");
    succeed(mmfree().arg("plot").args([whole.path(), stopped.path()]).arg("-o").arg(&svg));
    assert!(fs::read_to_string(svg).unwrap().contains("<svg"));
}

/// Kills at random moments, often while a checkpoint is written: `checkpoint.every=1`. MMFREE_KILLS says how
/// often, 5 times if it does not.
#[test]
fn a_killed_run_loses_nothing_but_the_steps_since_its_checkpoint() {
    let kills: u64 = std::env::var("MMFREE_KILLS").map_or(5, |kills| kills.parse().unwrap());
    let set = ["checkpoint.every=1", "run.steps=60"];
    let whole = Run::new();
    let start = Instant::now();
    succeed(&mut whole.command(&set));
    let took = start.elapsed();
    let killed = whole.beside("killed");
    let mut random = 0x1234_5678_9abc_def0u64;
    let mut hit = 0;
    while hit < kills {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Long runs survive short lives; at times one gets to its end.
        let life =
            took.mul_f64((0.02 + 0.3 * (random >> 40) as f64 / (1u64 << 24) as f64).min(1.0));
        let before = checkpoints(&killed.path());
        let mut child = killed.command(&set).arg("--resume").stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(life);
        if child.try_wait().unwrap().is_some() {
            assert_same(&killed.path(), &whole.path());
            fs::remove_dir_all(killed.path()).unwrap();
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        hit += 1;
        // What was there is there.
        assert!(checkpoints(&killed.path()).last() >= before.last());
    }
    succeed(killed.command(&set).arg("--resume"));
    assert_same(&killed.path(), &whole.path());
    let left: Vec<_> = fs::read_dir(killed.path().join("checkpoints")).unwrap().collect();
    assert_eq!(left.len(), 2, "what was begun is removed");
    eprintln!("{hit} kills");
}

/// A limit on the size of files is a disk that is full: the last checkpoint stays whole, the error says
/// so, and with more room the run goes on to the same bits.
#[test]
fn a_full_disk_keeps_the_checkpoint_and_the_run_goes_on() {
    // So many steps that it is killed before its end, even by a test that has to wait for a processor.
    let set = ["run.steps=120"];
    let whole = Run::new();
    succeed(&mut whole.command(&set));
    let full = whole.beside("full");
    let mut child = full.command(&set).stderr(Stdio::null()).spawn().unwrap();
    wait_until(&mut child, || checkpoints(&full.path()).len() > 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = checkpoints(&full.path());
    let blocks = "20"; // of 1024 bytes: less than the weights
    let limited = full.command(&set);
    let mut shell = Command::new("bash");
    shell.current_dir(root()).env_remove("RANK");
    shell.args(["-c", "trap '' XFSZ; ulimit -f \"$0\"; exec \"$@\" --resume", blocks]);
    shell.arg(limited.get_program()).args(limited.get_args());
    let error = refused(&mut shell);
    assert!(error.contains("cannot write"), "{error}");
    assert!(error.contains("is whole") && error.contains("--resume"), "{error}");
    assert_eq!(checkpoints(&full.path()), before);
    succeed(full.command(&set).arg("--resume"));
    assert_same(&full.path(), &whole.path());
}

/// From a text to a model that has learnt from it, is packed and writes.
#[test]
fn a_tiny_model_learns_is_packed_and_writes() {
    let directory = tempfile::tempdir().unwrap();
    let run = directory.path().join("run");
    succeed(
        mmfree()
            .current_dir(root())
            .args(["train", "configs/tiny.toml", "--set"])
            .arg(format!("run.directory={}", run.display()))
            .args(["--set", "run.steps=60", "--set", "evaluation.every=60"]),
    );
    let (losses, _) = result(&run);
    let last: f64 = losses[losses.len() - 1].split(' ').nth(3).unwrap().parse().unwrap();
    let uniform = (1024f64).ln();
    assert!(last < LEARNT, "validation loss {last:.3}, of {uniform:.3} at the start");
    let packed = directory.path().join("model.gguf");
    succeed(mmfree().arg("pack").arg(run.join("model")).arg("-o").arg(&packed));
    let write = |model: &Path| {
        let mut command = mmfree();
        command.arg("generate").arg(model).args([
            "Once upon a time",
            "--greedy",
            "--max-tokens",
            "20",
        ]);
        String::from_utf8(succeed(&mut command).stdout).unwrap()
    };
    let text = write(&packed);
    assert!(text.split_whitespace().count() > 5, "{text}");
    assert_eq!(text, write(&run.join("model")));
}

/// Validation loss that 60 steps of `configs/tiny.toml` must get below.
const LEARNT: f64 = 4.0;

#[test]
fn processes_of_a_launcher_give_the_bits_of_one_and_resume_in_other_numbers() {
    let alone = Run::new();
    succeed(&mut alone.command(&[]));
    let together = alone.beside("together");
    // Four processes, then two, then one.
    for (size, stop) in [(4, "step-00000006"), (2, "step-00000012")] {
        let mut children = launch(&together, size);
        wait_until(&mut children[0], || {
            checkpoints(&together.path()).last().is_some_and(|last| last.as_str() >= stop)
        });
        kill(&children[1], "TERM");
        for mut child in children {
            assert!(matches!(child.wait().unwrap().code(), Some(0 | 130 | 143)));
        }
    }
    succeed(together.command(&[]).arg("--resume"));
    assert_same(&together.path(), &alone.path());
}

#[test]
fn wrong_configurations_and_data_are_refused_with_everything_that_is_wrong() {
    let run = Run::new();
    let error = refused(&mut run.command(&["batch.micro_batch=3", "schedule.warmup_steps=99"]));
    assert!(
        error.contains("batch.micro_batch is 3") && error.contains("warmup_steps is 99"),
        "{error}"
    );
    let error = refused(&mut run.command(&["batch.microbatch=2", "optimiser.beta1=0"]));
    assert!(error.contains("did you mean batch.micro_batch"), "{error}");
    assert!(error.contains("did you mean optimizer.beta1"), "{error}");
    let error = refused(&mut run.command(&["data.train=no-such-text.txt"]));
    assert!(error.contains("no-such-text.txt"), "{error}");
    let error = refused(run.command(&[]).env("RANK", "0"));
    assert!(error.contains("WORLD_SIZE"), "{error}");
    let mut config = mmfree();
    config.current_dir(root()).args(["train", "configs/370m.toml", "--print-config"]);
    let printed = succeed(&mut config);
    assert!(String::from_utf8_lossy(&printed.stdout).contains("hidden_size = 1024"));
}

/// Shards are known by what is in them, not only by how much.
#[test]
fn a_run_is_not_resumed_over_other_tokens_of_the_same_number() {
    let run = Run::new();
    let path = |name: &str| run.directory.path().join(name).display().to_string();
    let (text, shards) = (path("text.jsonl"), path("shards"));
    let page = fs::read_to_string(root().join("docs/training.md")).unwrap();
    let mut documents: Vec<_> =
        page.lines().map(|line| serde_json::json!({ "text": line }).to_string() + "\n").collect();
    let tokenizer = "tests/fixtures/tokenizers/byte-level.json";
    let make = |documents: &[String]| -> serde_json::Value {
        let _ = fs::remove_dir_all(&shards);
        fs::write(&text, documents.concat()).unwrap();
        let mut command = mmfree();
        command.current_dir(root()).args(["tokenize", &text, "-o", &shards, "--json"]);
        command.args(["--tokenizer", tokenizer, "--eos-token", "</s>"]);
        serde_json::from_slice(&succeed(&mut command).stdout).unwrap()
    };
    let data = format!("data.train={shards}");
    let set = [data.as_str()];
    let counts = make(&documents);
    succeed(&mut run.command(&set));
    documents.reverse();
    let others = make(&documents);
    for key in ["tokens", "documents"] {
        assert!(counts[key].as_u64() > Some(100) && counts[key] == others[key], "{others}");
    }
    let error = refused(run.command(&set).arg("--resume"));
    assert!(error.contains("tokens of data.train") && error.contains("checksum"), "{error}");
    documents.reverse();
    make(&documents);
    succeed(run.command(&set).arg("--resume"));
}

/// Each names the place and what is wrong, nothing is half made, and once it is mended the same command trains.
#[test]
fn broken_texts_are_refused_and_a_mended_one_is_trained_on() {
    let run = Run::new();
    let text = run.directory.path().join("text.jsonl");
    let page = fs::read_to_string(root().join("docs/training.md")).unwrap();
    let good: String =
        page.lines().map(|line| serde_json::json!({ "text": line }).to_string() + "\n").collect();
    let line = good.lines().count() + 1;
    let cache = run.directory.path().join("data");
    let data = format!("data.train={}", text.display());
    let tokenizer = "data.tokenizer=tests/fixtures/tokenizers/byte-level.json";
    let set = [data.as_str(), "run.steps=2", "schedule.warmup_steps=1", "evaluation.every=0"];
    let named = [&set[..], &[tokenizer]].concat();
    let broken: [(&[u8], &str); 3] = [
        (b"{\"text\": \"open", "not a JSON object"),
        (b"{\"text\": \"\xff\"}", "not UTF-8"),
        (b"{\"title\": \"x\"}", "no field \"text\" (--field, data.text_field); it has \"title\""),
    ];
    for set in [&set[..], &named] {
        for (bytes, expected) in broken {
            fs::write(&text, [good.as_bytes(), bytes, b"\n", good.as_bytes()].concat()).unwrap();
            let error = refused(&mut run.command(set));
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(&format!("text.jsonl:{line}")), "{error}");
            assert!(!run.path().join("checkpoints").exists());
        }
        fs::write(&text, good.repeat(2)).unwrap();
        succeed(&mut run.command(set));
        fs::remove_dir_all(run.path()).unwrap();
        fs::remove_dir_all(&cache).unwrap();
        fs::write(&text, "{\"text\": \"\"}\n".repeat(7)).unwrap();
        let error = refused(&mut run.command(set));
        assert!(error.contains("only white space: 7)"), "{error}");
        assert!(!cache.join("train/manifest.json").exists());
        assert!(!cache.join("tokenizer").exists());
        let _ = fs::remove_dir_all(&cache);
    }
}

/// The model of a checkpoint must be the one that the configuration describes, down to what no shape shows.
#[test]
fn a_run_does_not_begin_with_weights_of_another_model() {
    let run = Run::new();
    let few = ["run.steps=2", "schedule.warmup_steps=1", "evaluation.every=0"];
    succeed(&mut run.command(&few));
    let initial = format!("model.initial_checkpoint={}", run.path().join("model").display());
    let other = run.beside("other");
    let command = |set: &[&str]| other.command(&[&few[..], &[initial.as_str()], set].concat());
    let error = refused(&mut command(&["model.hidden_size=64", "model.rms_norm_eps=1e-5"]));
    for expected in ["model.initial_checkpoint", "hidden_size: 32, 64", "rms_norm_eps: "] {
        assert!(error.contains(expected), "{expected} is not in {error}");
    }
    let transformer = ["model.architecture=transformer++", "model.num_attention_heads=4"];
    let error =
        refused(&mut command(&[&transformer[..], &["model.use_lower_bound=false"]].concat()));
    assert!(error.contains("model_type: \"hgrn_bit\", \"llama\""), "{error}");
    assert!(checkpoints(&other.path()).is_empty());
    succeed(&mut command(&[]));
}

/// A tokenizer and tokens of other options are not taken for those that are asked for.
#[test]
fn a_cache_that_was_made_otherwise_is_refused() {
    let run = Run::new();
    let text = run.directory.path().join("text.txt");
    let page = fs::read_to_string(root().join("docs/training.md")).unwrap();
    fs::write(&text, page.replace("\n\n", "\n--\n")).unwrap();
    let data = format!("data.train={}", text.display());
    let few = ["run.steps=2", "schedule.warmup_steps=1", "evaluation.every=0"];
    let tokenizer = "data.tokenizer=tests/fixtures/tokenizers/byte-level.json";
    let cache = format!("data.cache={}", run.directory.path().join("named").display());
    let named = [tokenizer, cache.as_str()];
    for extra in [&[][..], &named[..]] {
        let set = [&few[..], &[data.as_str()], extra].concat();
        let (first, other) = match extra {
            [] => ("trained", "trained-2"),
            _ => ("named-1", "named-2"),
        };
        succeed(&mut run.beside(first).command(&set));
        let mut changes = vec![
            ("data.separator=--", "document separator: none then, \"--\" now"),
            ("data.text_field=body", "field of the text: text then, body now"),
        ];
        if extra.is_empty() {
            changes.push((
                "data.tokenizer_vocab_size=290",
                "size of the vocabulary: 300 then, 290 now",
            ));
        }
        for (change, expected) in changes {
            let error = refused(&mut run.beside(other).command(&[&set[..], &[change]].concat()));
            assert!(error.contains(expected) && error.contains("data.cache"), "{error}");
        }
        succeed(&mut run.beside(other).command(&set));
    }
}

#[test]
fn a_run_that_diverges_stops_and_keeps_its_checkpoint() {
    let run = Run::new();
    let set = ["optimizer.learning_rate=9", "optimizer.clip_grad_norm=0", "guard.divergence=0.5"];
    let error = refused(run.command(&set).args(["--set", "run.steps=400"]));
    assert!(error.contains("stopped at step") && error.contains("learning_rate"), "{error}");
    // Without ε a token that is not there becomes 0 / 0 in the first step.
    let error = refused(&mut run.beside("without-eps").command(&["optimizer.eps=0"]));
    assert!(error.contains("stopped at step 2") && error.contains("is NaN"), "{error}");
}

/// Starts the processes of a run as a launcher does.
fn launch(run: &Beside, size: usize) -> Vec<Child> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    (0..size)
        .map(|rank| {
            run.command(&[])
                .arg("--resume")
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", size.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .spawn()
                .unwrap()
        })
        .collect()
}

fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("step-"))
        .collect();
    names.sort();
    names
}

fn kill(child: &Child, signal: &str) {
    let id = child.id().to_string();
    // It may have ended by itself.
    let _ = Command::new("kill").args(["-s", signal, &id]).stderr(Stdio::null()).status();
}

/// Waits for something that a process does, or for its end.
fn wait_until(child: &mut Child, what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(120), "it takes too long");
        thread::sleep(Duration::from_millis(2));
    }
}
