//! Every file that training reads, changed at random: it is read or refused, and nothing panics.
//!
//! MMFREE_FUZZ_FILES says how many changed files of each kind are tried, 30 if it does not.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use mmfree::checkpoint::TokenizerSource;
use mmfree::checkpoint::{FullPrecision, pack_transformer};
use mmfree_train::architecture::Architecture;
use mmfree_train::checkpoint::{Checkpoints, GuardState, State, Values};
use mmfree_train::config::TrainConfig;
use mmfree_train::data::tokenize::{OnError, TokenizeOptions, tokenize};
use mmfree_train::data::{Dataset, Manifest, TokenizerTraining, train_tokenizer};
use mmfree_train::log::{EventReader, read_log};
use mmfree_train::weights;
use twox_hash::XxHash3_64;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Changes of files, always the same.
struct Changes(u64);

impl Changes {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end.max(1)
    }

    fn part(&mut self, length: usize) -> Range<usize> {
        let start = self.below(length);
        start..start + self.below((length - start).min(40))
    }

    /// One to four changes: bits, bytes, numbers, and parts that are left out, doubled or moved.
    fn apply(&mut self, whole: &[u8]) -> Vec<u8> {
        const PIECES: [&str; 12] = [
            "\"",
            "{",
            "}]",
            "\0",
            "\u{ff}",
            "-1",
            "18446744073709551615",
            "1e400",
            "null",
            "\\ud800",
            "[[[[[[[[",
            "\n",
        ];
        let mut bytes = whole.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.below(256) as u8,
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(self.part(bytes.len()))),
                4 => {
                    let copy = bytes[self.part(bytes.len())].to_vec();
                    bytes.splice(at..at, copy);
                }
                5 => {
                    let piece = PIECES[self.below(PIECES.len())].bytes();
                    bytes.splice(at..at, piece);
                }
                6 => {
                    // A number becomes another one.
                    let digit = |byte: &u8| byte.is_ascii_digit();
                    let Some(start) = bytes[at..].iter().position(digit) else { continue };
                    let start = at + start;
                    let length = bytes[start..].iter().take_while(|byte| digit(byte)).count();
                    let number = ["0", "1", "4294967296", "9223372036854775807", "99999"];
                    let number = number[self.below(number.len())].bytes();
                    bytes.splice(start..start + length, number);
                }
                _ if at + 8 <= bytes.len() => {
                    bytes[at..at + 8].fill([0, 0x7f, 0xff][self.below(3)]);
                }
                _ => {}
            }
        }
        bytes
    }
}

/// Reads changed copies of a file.
fn hostile(seed: u64, whole: &[u8], read: &mut dyn FnMut(&[u8])) {
    let count = std::env::var("MMFREE_FUZZ_FILES").map_or(30, |count| count.parse().unwrap());
    let mut changes = Changes(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..count {
        read(&changes.apply(whole));
    }
}

fn tokenizer() -> TokenizerSource {
    TokenizerSource::open(&root().join("tests/fixtures/tokenizers/byte-level.json")).unwrap()
}

fn options(inputs: Vec<PathBuf>, output: &Path) -> TokenizeOptions {
    let mut options = TokenizeOptions::new(inputs, output.to_owned(), tokenizer());
    (options.threads, options.shard_tokens) = (1, 60);
    options.eos_token = Some("</s>".to_owned());
    options
}

fn run(options: &TokenizeOptions) -> mmfree::error::Result<Manifest> {
    tokenize(options, &AtomicBool::new(false), &mut |_| {})
}

const LINES: &str = "{\"text\": \"Once upon a time\", \"meta\": {\"a\": [1, 2.5, null]}}\n\
                     {\"id\": 7, \"text\": \"there was \\u00e9 \\ud83d\\ude00\"}\n\n{\"text\": \"\"}\n";

#[test]
fn texts() {
    let work = tempfile::tempdir().unwrap();
    let page = fs::read(root().join("docs/token-shards.md")).unwrap();
    let compressed = zstd::encode_all(LINES.as_bytes(), 3).unwrap();
    let kinds: [(&str, &[u8]); 4] = [
        ("a.jsonl", LINES.as_bytes()),
        ("a.jsonl.zst", &compressed),
        ("a.txt", &page[..600]),
        ("a.parquet", PARQUET),
    ];
    for (seed, (name, whole)) in (1..).zip(kinds) {
        let (path, output) = (work.path().join(name), work.path().join("out"));
        hostile(seed, whole, &mut |changed| {
            fs::write(&path, changed).unwrap();
            for on_error in [OnError::Stop, OnError::Skip] {
                let _ = fs::remove_dir_all(&output);
                let options = TokenizeOptions {
                    on_error,
                    separator: Some("".to_owned()),
                    ..options(vec![path.clone()], &output)
                };
                let done = run(&options);
                if done.is_ok_and(|manifest| manifest.tokens > 0) {
                    Dataset::open(&[&output]).unwrap().verify(&mut |_, _| {}).unwrap();
                }
            }
            let _ = fs::remove_dir_all(&output);
            let training = TokenizerTraining::new(vec![path.clone()], output.clone(), 300);
            let _ = train_tokenizer(&training, &AtomicBool::new(false), &mut |_, _| {});
        });
    }
}

#[test]
fn corpora_and_jobs_that_were_interrupted() {
    let work = tempfile::tempdir().unwrap();
    let (input, output) = (work.path().join("in.jsonl"), work.path().join("out"));
    fs::write(&input, LINES.repeat(9)).unwrap();
    run(&options(vec![input.clone()], &output)).unwrap();
    for (seed, name) in (1..).zip(["manifest.json", "shard-00000.tokens", "tokenizer.json"]) {
        let path = output.join(name);
        let whole = fs::read(&path).unwrap();
        hostile(seed, &whole, &mut |changed| {
            fs::write(&path, changed).unwrap();
            if let Ok(dataset) = Dataset::open(&[&output]) {
                let _ = dataset.verify(&mut |_, _| {});
            }
            if name != "shard-00000.tokens" {
                let _ = run(&options(vec![input.clone()], &output));
            }
        });
        fs::write(&path, whole).unwrap();
    }
    // The last line is broken, so the job stops and leaves its record.
    fs::write(&input, format!("{}{{", LINES.repeat(9))).unwrap();
    let broken = work.path().join("broken");
    let options = options(vec![input], &broken);
    assert!(run(&options).is_err());
    let left: Vec<_> = fs::read_dir(&broken).unwrap().map(|entry| entry.unwrap().path()).collect();
    let left: Vec<_> = left.iter().map(|path| (path, fs::read(path).unwrap())).collect();
    let (journal, whole) = left
        .iter()
        .find(|(path, _)| path.file_name().unwrap() == "progress-of-manifest.json")
        .expect("a record of how far it came");
    hostile(9, whole, &mut |changed| {
        let _ = fs::remove_dir_all(&broken);
        fs::create_dir(&broken).unwrap();
        left.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
        fs::write(journal, changed).unwrap();
        let _ = run(&TokenizeOptions { on_error: OnError::Skip, ..options.clone() });
    });
}

#[test]
fn records_of_trained_tokenizers() {
    let work = tempfile::tempdir().unwrap();
    let (input, output) = (work.path().join("in.jsonl"), work.path().join("out"));
    fs::write(&input, LINES).unwrap();
    let training = TokenizerTraining::new(vec![input], output.clone(), 300);
    train_tokenizer(&training, &AtomicBool::new(false), &mut |_, _| {}).unwrap();
    assert_eq!(training.difference_from(&output).unwrap(), None);
    let path = output.join("training.json");
    let whole = fs::read(&path).unwrap();
    hostile(1, &whole, &mut |changed| {
        fs::write(&path, changed).unwrap();
        let _ = training.difference_from(&output);
    });
}

#[test]
fn configurations() {
    let whole = fs::read(root().join("configs/tiny.toml")).unwrap();
    hostile(1, &whole, &mut |changed| {
        let text = String::from_utf8_lossy(changed);
        let _ = TrainConfig::parse("hostile", &text, &[]);
        let key = text.lines().nth(changed.len() % 40).unwrap_or_default();
        if let Ok(set) = key.parse() {
            let _ = TrainConfig::parse("hostile", "", &[set]);
        }
    });
}

#[test]
fn checkpoints_and_logs() {
    let work = tempfile::tempdir().unwrap();
    let source = root().join("tests/fixtures/transformer");
    let (architecture, parameters): (Architecture, _) = weights::load(&source).unwrap();
    let checkpoints = Checkpoints::open(work.path()).unwrap();
    let config = TrainConfig::parse("x", "", &["data.train=x".parse().unwrap()]).unwrap();
    let state = State::new(4, &config, architecture.vocab_size(), "tokens", GuardState::default());
    let fill = &mut |_, flat: &mut [f32]| -> mmfree_train::error::Result<()> {
        flat.copy_from_slice(&parameters);
        Ok(())
    };
    let path = checkpoints.save(&state, &architecture, &[], fill).unwrap();
    let sums = fs::read_to_string(path.join("CHECKSUMS")).unwrap();
    let names = ["trainer.json", "CHECKSUMS", "config.json", "model.safetensors"];
    for (seed, name) in (1..).zip(names) {
        let whole = fs::read(path.join(name)).unwrap();
        hostile(seed, &whole, &mut |changed| {
            fs::write(path.join(name), changed).unwrap();
            if name != "CHECKSUMS" {
                // With checksums that fit, so that more than these is looked at.
                let mut lines: Vec<_> = sums.lines().map(str::to_owned).collect();
                lines.pop();
                for line in lines.iter_mut().filter(|line| line.ends_with(&format!("  {name}"))) {
                    *line = format!("{:016x}  {name}", XxHash3_64::oneshot(changed));
                }
                let body = lines.join("\n") + "\n";
                let own = XxHash3_64::oneshot(body.as_bytes());
                fs::write(path.join("CHECKSUMS"), format!("{body}{own:016x}  CHECKSUMS\n"))
                    .unwrap();
            }
            if let Ok((Some(checkpoint), _)) = checkpoints.newest() {
                let _ = checkpoint.state.require("c", &config, 31, "tokens", true);
                let mut flat = vec![0.0; parameters.len()];
                for values in Values::ALL {
                    let _ = checkpoint.read(values, &mut flat);
                }
            }
            let _ = weights::load(&path);
        });
        fs::write(path.join(name), whole).unwrap();
        fs::write(path.join("CHECKSUMS"), &sums).unwrap();
    }
    let packed = work.path().join("model.gguf");
    pack_transformer(&path, &packed, None, None, &mut |_, _| ()).unwrap();
    assert_eq!(weights::load(&packed).unwrap(), (architecture, parameters));
    hostile(7, &fs::read(&packed).unwrap(), &mut |changed| {
        fs::write(&packed, changed).unwrap();
        let _ = weights::load(&packed);
        let _ = FullPrecision::is_transformer(&packed);
    });
    let log = "{\"step\":1,\"tokens\":10,\"loss\":3.5,\"validation_loss\":4.25}\n".repeat(3);
    hostile(8, log.as_bytes(), &mut |changed| {
        fs::write(work.path().join("log.jsonl"), changed).unwrap();
        let _ = read_log(work.path());
        let _ = EventReader::new(changed).count();
    });
}

/// Three rows of strings, written by pyarrow.
const PARQUET: &[u8] = include_bytes!("../../../tests/fixtures/small.parquet");
