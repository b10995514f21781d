//! `mmfree tokenize`, `mmfree tokenizer` and `mmfree plot` as a user runs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn mmfree(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mmfree")).args(arguments).output().expect("runs")
}

fn succeeded(output: &Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{message}");
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn failed(output: &Output, expected: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(expected), "{message}");
}

/// Text of this repository: its pages, as JSON lines, many times over.
fn corpus(directory: &Path, copies: usize) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let pages = ["README.md", "CONTRIBUTING.md", "docs/LOG.md", "docs/checkpoint-format.md"];
    let mut lines = String::new();
    for copy in 0..copies {
        for page in pages {
            let text = fs::read_to_string(root.join(page)).expect("a page");
            for paragraph in text.split("\n\n") {
                let text = format!("{copy} {paragraph}");
                lines += &serde_json::json!({"text": text}).to_string();
                lines.push('\n');
            }
        }
    }
    let path = directory.join("corpus.jsonl");
    fs::write(&path, lines).expect("written");
    path.display().to_string()
}

/// Names and contents of a directory.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("UTF-8");
        (name, fs::read(entry.path()).expect("a file"))
    });
    let mut files: Vec<_> = entries.collect();
    files.sort();
    files
}

#[test]
fn a_job_that_is_killed_again_and_again_ends_in_the_same_bytes() {
    let scratch = tempfile::tempdir().expect("a directory");
    let corpus = corpus(scratch.path(), 150);
    let path = |name: &str| scratch.path().join(name);
    let command = |output: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mmfree"));
        command.args(["tokenize", &corpus, "--shard-tokens", "30000", "--sync-seconds", "0.02"]);
        command.arg("-o").arg(output).stderr(Stdio::null()).stdout(Stdio::null());
        command
    };
    let start = Instant::now();
    assert!(command(&path("whole")).status().expect("runs").success());
    let whole_time = start.elapsed();
    let output = path("killed");
    let (mut state, mut kills, mut seen) = (1_u32, 0, 0);
    while kills < 20 {
        let mut child = command(&output).spawn().expect("runs");
        // Anywhere from the start to well into the work.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        std::thread::sleep(whole_time.mul_f64(f64::from(state >> 8) / f64::from(1 << 24) * 0.9));
        child.kill().expect("killed");
        let status = child.wait().expect("ends");
        if status.success() {
            // It was done: once more, from the start.
            assert!(files(&output) == files(&path("whole")));
            fs::remove_dir_all(&output).expect("removed");
        } else {
            kills += 1;
            seen += usize::from(output.join("progress-of-manifest.json").exists());
        }
    }
    assert!(seen >= 5, "only {seen} of {kills} kills came while it worked");
    assert!(command(&output).status().expect("runs").success());
    assert!(files(&output) == files(&path("whole")));
    succeeded(&mmfree(&["tokenize", "--verify", &output.display().to_string()]));
}

#[cfg(unix)]
#[test]
fn an_interrupt_is_obeyed_and_the_work_goes_on() {
    let scratch = tempfile::tempdir().expect("a directory");
    let corpus = corpus(scratch.path(), 300);
    let output = scratch.path().join("out").display().to_string();
    let arguments = ["tokenize", &corpus, "-o", &output];
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmfree"));
    let child = command.args(arguments).stderr(Stdio::piped()).spawn().expect("runs");
    let lock = Path::new(&output).join("lock-of-manifest.json");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !lock.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.expect("runs").success());
    let interrupted = child.wait_with_output().expect("ends");
    assert_eq!(interrupted.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&interrupted.stderr).contains("run the same command again"));
    let text = succeeded(&mmfree(&arguments));
    assert!(text.contains("tokens of"), "{text}");
}

#[test]
fn a_corpus_in_parts_with_a_tokenizer_of_its_own() {
    let scratch = tempfile::tempdir().expect("a directory");
    let corpus = corpus(scratch.path(), 1);
    let path = |name: &str| scratch.path().join(name).display().to_string();
    let train = |output: &str, threads: &str| {
        let arguments = ["tokenizer", "train", &corpus, "-o", output, "--vocab-size", "700"];
        mmfree(&[&arguments[..], &["--special-token", "<|user|>", "--threads", threads]].concat())
    };
    let text = succeeded(&train(&path("tokenizer"), "1"));
    assert!(text.starts_with("700 tokens from "), "{text}");
    succeeded(&train(&path("again"), "3"));
    assert!(files(Path::new(&path("tokenizer"))) == files(Path::new(&path("again"))));
    failed(&train(&path("again"), "3"), "not empty");
    let small = ["tokenizer", "train", &corpus, "-o", &path("x"), "--vocab-size", "258"];
    failed(&mmfree(&small), "256 bytes and 3 special tokens need 259");

    let tokenize = |output: &str, extra: &[&str]| {
        let tokenizer = path("tokenizer");
        let arguments = ["tokenize", &corpus, "-o", output, "--tokenizer", &tokenizer];
        mmfree(&[&arguments[..], extra].concat())
    };
    let whole: serde_json::Value =
        serde_json::from_str(&succeeded(&tokenize(&path("whole"), &["--json"]))).expect("JSON");
    assert_eq!(whole["tokenizer"]["vocab_size"], 700);
    assert_eq!((&whole["tokenizer"]["bos"], &whole["tokenizer"]["eos"]), (&1.into(), &2.into()));
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(path("whole/manifest.json")).expect("there"))
            .expect("JSON");
    assert_eq!(whole, written);
    // Counted from 0 or from 1: the same parts.
    let mut tokens = 0;
    for part in ["0/2", "1/2"] {
        let text = succeeded(&tokenize(&path("parts"), &["--shard", part, "--json"]));
        let part: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        tokens += part["tokens"].as_u64().expect("a number");
    }
    assert_eq!(whole["tokens"], tokens);
    let verified = succeeded(&mmfree(&["tokenize", "--verify", &path("parts"), "--json"]));
    let verified: serde_json::Value = serde_json::from_str(&verified).expect("JSON");
    assert_eq!(verified["tokens"], tokens);

    let shard = path("whole/shard-00000.tokens");
    let mut bytes = fs::read(&shard).expect("a shard");
    bytes[1000] ^= 4;
    fs::write(&shard, &bytes).expect("written");
    failed(&mmfree(&["tokenize", "--verify", &path("whole")]), "shard-00000.tokens");
    fs::write(&shard, &bytes[..bytes.len() / 2]).expect("written");
    failed(&mmfree(&["tokenize", "--verify", &path("whole")]), "is it truncated?");
}

#[test]
fn errors_have_exit_code_2() {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = |name: &str| scratch.path().join(name).display().to_string();
    let out = path("out");
    fs::write(path("x.csv"), "a,b").expect("written");
    fs::write(path("x.jsonl"), "{\"text\": \"a\"}\n{\"text\": \"b\"\n").expect("written");
    failed(&mmfree(&["tokenize", &path("absent.txt"), "-o", &out]), "absent.txt");
    failed(&mmfree(&["tokenize", &path("x.csv"), "-o", &out]), "unknown format");
    failed(&mmfree(&["tokenize", &path("x.jsonl"), "-o", &out]), "x.jsonl:2: not a JSON object");
    failed(&mmfree(&["tokenize", &path("x.jsonl"), "-o", "/dev/null/x"]), "cannot write");
    failed(&mmfree(&["tokenize", &path("x.jsonl"), "-o", &out, "--shard", "3/2"]), "I/N");
    fs::write(path("empty.jsonl"), "{\"text\": \"\"}\n{\"text\": \" \"}\n").expect("written");
    let empty = path("empty.jsonl");
    failed(&mmfree(&["tokenize", &empty, "-o", &path("none")]), "only white space: 2)");
    let train = ["tokenizer", "train", &empty, "-o", &path("none-2"), "--vocab-size", "300"];
    failed(&mmfree(&train), "only white space: 2)");
    assert!(!Path::new(&path("none-2")).exists());
    let skipped = mmfree(&["tokenize", &path("x.jsonl"), "-o", &out, "--on-error", "skip"]);
    assert!(succeeded(&skipped).contains("1 broken one left out"));
    assert!(String::from_utf8_lossy(&skipped.stderr).contains("skipped: "));
    let full = PathBuf::from(path("full"));
    #[cfg(unix)]
    {
        fs::create_dir(&full).expect("made");
        let target = full.join("shard-00000.tokens.partial");
        std::os::unix::fs::symlink("/dev/full", target).expect("linked");
        fs::write(path("y.txt"), "text").expect("written");
        failed(&mmfree(&["tokenize", &path("y.txt"), "-o", &path("full")]), "cannot write");
    }
}

#[test]
fn loss_curves_are_drawn() {
    let scratch = tempfile::tempdir().expect("a directory");
    let path = |name: &str| scratch.path().join(name).display().to_string();
    fs::create_dir(path("run")).expect("made");
    let line =
        |step: u64| format!("{{\"step\":{step},\"tokens\":{},\"loss\":{}}}\n", step * 10, 3.0);
    let log: String = (1..50).map(line).collect();
    // The last line was not finished.
    fs::write(path("run/log.jsonl"), format!("{log}{{\"step\":50,")).expect("written");
    succeeded(&mmfree(&["plot", &path("run"), "-o", &path("loss.svg"), "--axis", "steps"]));
    let svg = fs::read_to_string(path("loss.svg")).expect("a file");
    assert!(svg.starts_with("<svg") && svg.contains("run, training"));
    failed(&mmfree(&["plot", &path("absent"), "-o", &path("loss.svg")]), "absent");
    fs::write(path("run/log.jsonl"), format!("{{\"step\":x}}\n{log}")).expect("written");
    failed(&mmfree(&["plot", &path("run"), "-o", &path("loss.svg")]), "log.jsonl:1");
}
