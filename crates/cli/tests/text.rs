//! The text commands as a user runs them, on the built-in model and on a model without tokenizer.

use std::io::Read;
use std::path::Path;
use std::process::{Output, Stdio};

use assert_cmd::Command;
use serde_json::{Value, json};

/// A directory with a model of 97 tokens, D = 64 and L = 3, and without a tokenizer.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny");
/// A model that the authors' implementation trained.
const TRAINED: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/trained/model.gguf");
/// What the authors' implementation computes with it.
const EXPECTED: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/trained/expected.json");

fn run(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmfree"));
    command.args(arguments).write_stdin(input).output().unwrap()
}

/// Standard output of a run that succeeds.
fn stdout(arguments: &[&str], input: &str) -> String {
    let output = run(arguments, input);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Expects exit code 2 and all of `words` on standard error.
fn assert_error(arguments: &[&str], input: &str, words: &[&str]) {
    let output = run(arguments, input);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments:?}: no {word:?} in {stderr:?}");
    }
}

fn generate_json(arguments: &[&str]) -> Value {
    let arguments = [&["generate"], arguments, &["--json"]].concat();
    serde_json::from_str(&stdout(&arguments, "")).unwrap()
}

fn entries(path: &Path) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn the_built_in_model_writes_text() {
    let base = ["generate", "Once upon a time", "--greedy", "--max-tokens", "20"];
    let text = stdout(&base, "");
    assert!(text.trim().len() > 20 && text.ends_with('\n'), "{text:?}");
    let echoed = stdout(&[&base[..], &["--echo"]].concat(), "");
    assert_eq!(echoed, format!("Once upon a time{text}"));
}

#[test]
fn greedy_ids_are_those_of_the_authors_implementation() {
    let expected: Value = serde_json::from_slice(&std::fs::read(EXPECTED).unwrap()).unwrap();
    for generation in expected["generations"].as_array().unwrap() {
        let prompt = generation["prompt"].as_str().unwrap();
        let object =
            generate_json(&[TRAINED, "--prompt", prompt, "--greedy", "--max-tokens", "64"]);
        let prompt_tokens = generation["prompt_ids"].as_array().unwrap().len();
        assert_eq!(object["prompt_tokens"], prompt_tokens, "{prompt}");
        let ours = object["ids"].as_array().unwrap();
        let theirs = generation["greedy_ids"].as_array().unwrap();
        if let Some(at) = (0..ours.len().min(theirs.len())).find(|&i| ours[i] != theirs[i]) {
            // Two correct evaluations may part where the best two logits are close.
            let gap = generation["top2_gap"][at].as_f64().unwrap();
            assert!(gap < 0.3, "{prompt}: token {at} is {}, expected {}", ours[at], theirs[at]);
        }
    }
}

#[test]
fn a_seed_fixes_the_text() {
    let text = |seed| stdout(&["generate", "The", "--seed", seed, "--max-tokens", "30"], "");
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn ids_in_and_out_work_without_a_tokenizer() {
    let base = ["generate", TINY, "--token-ids", "1,5,9", "--greedy", "--max-tokens", "7"];
    let line = stdout(&[&base[..], &["--print-ids"]].concat(), "");
    let ids: Vec<u32> = line.trim_end().split(',').map(|id| id.parse().unwrap()).collect();
    assert!(line.ends_with('\n') && ids.len() <= 7 && ids.iter().all(|&id| id < 97), "{line}");
    let object = generate_json(&base[1..]);
    assert_eq!(object["ids"], json!(ids));
    assert_eq!(object["prompt_tokens"], 3);

    assert_error(&base, "", &["no tokenizer", "--print-ids"]);
    assert_error(&["generate", TINY, "Hi", "--print-ids"], "", &["no tokenizer", "--token-ids"]);
    let stop = [&base[..], &["--print-ids", "--stop", "x"]].concat();
    assert_error(&stop, "", &["stop strings", "tokenizer"]);
    assert_error(&["chat", TINY], "Hi\n", &["no tokenizer"]);
    let outside = ["generate", TINY, "--token-ids", "1,97", "--print-ids"];
    assert_error(&outside, "", &["token id 97", "vocabulary of 97"]);
}

#[test]
fn a_prompt_comes_from_anywhere() {
    let end = ["--greedy", "--max-tokens", "12"];
    let prompt = "It was the best of times,\nit was the worst of times";
    let expected = stdout(&[&["generate", prompt][..], &end].concat(), "");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, prompt).unwrap();
    let file = file.to_str().unwrap();
    for (source, input) in [
        (["--prompt", prompt], ""),
        (["--prompt-file", file], ""),
        (["--prompt-file", "-"], prompt),
    ] {
        assert_eq!(stdout(&[&["generate"][..], &source, &end].concat(), input), expected);
    }
    std::fs::write(file, "").unwrap();
    // Nothing is the BOS token.
    for empty in [&[""][..], &[], &["--prompt", ""], &["--prompt-file", file]] {
        let object = generate_json(&[empty, &["--max-tokens", "1"]].concat());
        assert_eq!(object["prompt_tokens"], 1, "{empty:?}");
    }
    std::fs::write(file, b"abc\xff").unwrap();
    assert_error(&["generate", "--prompt-file", file], "", &["not UTF-8", "offset 3"]);
}

#[test]
fn a_prompt_of_many_chunks_is_one_text() {
    // More than the 64 KiB that are read at a time.
    let text = "The wood was singing in the morning, and no one heard it.\n".repeat(1200);
    let dir = tempfile::tempdir().unwrap();
    let (file, state) = (dir.path().join("book.txt"), dir.path().join("book.state"));
    std::fs::write(&file, &text).unwrap();
    let (file, state) = (file.to_str().unwrap(), state.to_str().unwrap());
    let run = |prompt: [&str; 2]| {
        let end = ["--greedy", "--max-tokens", "3", "--save-state", state];
        let object = generate_json(&[&[TRAINED][..], &prompt, &end].concat());
        (object, std::fs::read(state).unwrap())
    };
    let (from_file, state_of_file) = run(["--prompt-file", file]);
    // On the command line a text is encoded and fed whole.
    let (from_argument, state_of_argument) = run(["--prompt", &text]);
    assert_eq!(from_file["ids"], from_argument["ids"]);
    assert_eq!(from_file["prompt_tokens"], from_argument["prompt_tokens"]);
    assert!(from_file["prompt_tokens"].as_u64().unwrap() > 10_000, "{from_file}");
    assert_eq!(state_of_file, state_of_argument);
    let (_, state_of_another) = run(["--prompt", &text[..1000]]);
    assert_ne!(state_of_file, state_of_another);
}

#[test]
fn a_text_ends_where_it_is_told_to() {
    let base = ["Once upon a time", "--greedy"];
    let object = generate_json(&[&base[..], &["--max-tokens", "30"]].concat());
    assert_eq!(object["finish_reason"], "length");
    assert_eq!(object["generated_tokens"], 30);
    let text = object["text"].as_str().unwrap();
    // Begins inside a word, so that it need not begin with a token.
    let stop: String = text.chars().skip(20).take(6).collect();
    let stopped = generate_json(&[&base[..], &["--max-tokens", "30", "--stop", &stop]].concat());
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"], text[..text.find(&stop).unwrap()]);
    assert_error(&["generate", "x", "--stop", ""], "", &["stop string is empty"]);
    let none = generate_json(&[&base[..], &["--max-tokens", "0"]].concat());
    assert_eq!((&none["text"], &none["ids"]), (&json!(""), &json!([])));
}

#[test]
fn a_saved_state_goes_on_as_if_never_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("x.state");
    let state = state.to_str().unwrap();
    let ids_after = |arguments: &[&str]| {
        let base = ["generate", TINY, "--greedy", "--print-ids", "--ignore-eos"];
        stdout(&[&base[..], arguments].concat(), "")
    };
    let whole = ids_after(&["--token-ids", "1,5,9,30,40,50", "--max-tokens", "9"]);
    ids_after(&["--token-ids", "1,5,9", "--max-tokens", "0", "--save-state", state]);
    assert_eq!(entries(dir.path()), 1);
    let rest = ["--token-ids", "30,40,50", "--load-state", state, "--max-tokens", "9"];
    assert_eq!(ids_after(&rest), whole);

    // The state after a generated text has seen all of it.
    let generated =
        ids_after(&["--token-ids", "1,5,9", "--max-tokens", "2", "--save-state", state]);
    let joined = format!("1,5,9,{},7", generated.trim_end());
    let whole = ids_after(&["--token-ids", &joined, "--max-tokens", "9"]);
    let rest = ["--token-ids", "7", "--load-state", state, "--max-tokens", "9"];
    assert_eq!(ids_after(&rest), whole);

    assert_error(&["generate", "Hi", "--load-state", state], "", &["cannot load the state"]);
    assert_error(&["generate", "Hi", "--load-state", "missing"], "", &["missing", "No such file"]);
    let mut bytes = std::fs::read(state).unwrap();
    bytes.truncate(bytes.len() - 5);
    std::fs::write(state, bytes).unwrap();
    let truncated = ["generate", TINY, "--token-ids", "7", "--load-state", state, "--print-ids"];
    assert_error(&truncated, "", &["cannot load the state"]);
    let unwritable = ["generate", "Hi", "--max-tokens", "1", "--save-state", "/no/such/file"];
    assert_error(&unwritable, "", &["cannot write /no/such/file"]);
}

#[test]
fn what_is_not_there_cannot_be_used() {
    assert_error(&["generate", "no/such/model", "Hi"], "", &["no/such/model"]);
    let logits = ["logits", "missing.gguf", "--token-ids", "1", "-o", "x"];
    assert_error(&logits, "", &["missing.gguf"]);
    assert_error(&["generate", "Hi", "--backend", "abacus"], "", &["abacus"]);
}

/// Shape and values of a tensor.
fn tensor(file: &[u8], name: &str) -> (Vec<usize>, Vec<f32>) {
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).unwrap();
    let entry = &header[name];
    assert_eq!(entry["dtype"], "F32");
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
    let range = number(&entry["data_offsets"][0])..number(&entry["data_offsets"][1]);
    let values = data[range].chunks(4).map(|v| f32::from_le_bytes(v.try_into().unwrap()));
    (shape, values.collect())
}

#[test]
fn logits_of_a_batch_are_those_of_each_sequence() {
    let dir = tempfile::tempdir().unwrap();
    let write = |arguments: &[&str]| {
        let path = dir.path().join("out.safetensors");
        let output = ["-o", path.to_str().unwrap()];
        assert_eq!(stdout(&[&["logits", TINY][..], arguments, &output].concat(), ""), "");
        std::fs::read(&path).unwrap()
    };
    let one = write(&["--token-ids", "1,5,9"]);
    let (shape, logits) = tensor(&one, "logits");
    assert_eq!(shape, [3, 97]);
    let (shape, state) = tensor(&one, "state");
    assert_eq!(shape, [3, 64]);
    let other = write(&["--token-ids", "4,4,96"]);
    let both = write(&["--token-ids", "1,5,9", "--token-ids", "4,4,96"]);
    let (shape, batch) = tensor(&both, "logits");
    assert_eq!(shape, [2, 3, 97]);
    assert_eq!(batch, [logits, tensor(&other, "logits").1].concat());
    let (shape, states) = tensor(&both, "state");
    assert_eq!(shape, [2, 3, 64]);
    assert_eq!(states, [state, tensor(&other, "state").1].concat());

    let ids = dir.path().join("ids.json");
    std::fs::write(&ids, "[[1,5,9],[4,4,96]]").unwrap();
    assert_eq!(write(&["--token-ids-file", ids.to_str().unwrap()]), both);
    std::fs::write(&ids, "[[1,5,9]]").unwrap();
    let batch_of_one = write(&["--token-ids-file", ids.to_str().unwrap()]);
    assert_eq!(tensor(&batch_of_one, "logits").0, [1, 3, 97]);
}

#[test]
fn logits_are_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.safetensors");
    let path = path.to_str().unwrap();
    let outside = ["logits", TINY, "--token-ids", "1,97", "-o", path];
    assert_error(&outside, "", &["token id 97", "vocabulary of 97"]);
    assert_eq!(entries(dir.path()), 0);
    let unwritable = ["logits", TINY, "--token-ids", "1", "-o", "/no/such/out"];
    assert_error(&unwritable, "", &["cannot write /no/such/out"]);
    let directory = dir.path().to_str().unwrap();
    assert_error(&["logits", TINY, "--token-ids", "1", "-o", directory], "", &["cannot write"]);
}

#[test]
fn chat_takes_lines_and_commands() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("chat.state");
    let state = state.to_str().unwrap();
    let base = ["chat", "--greedy", "--max-tokens", "8"];
    let replies = stdout(&base, &format!("Hello\n/save {state}\nWho are \\\nyou?\n"));
    assert!(replies.lines().count() >= 2 && replies.ends_with('\n'), "{replies:?}");
    assert_eq!(entries(dir.path()), 1);
    // A conversation that was saved goes on with the same words.
    let rest = stdout(&base, &format!("/load {state}\nWho are \\\nyou?\n"));
    assert!(replies.ends_with(&rest), "{replies:?} {rest:?}");
    // One that was forgotten begins anew.
    let again = stdout(&base, "Hello\n/reset\nHello\n/exit\nnever read\n");
    assert_eq!(again, stdout(&base, "Hello\n").repeat(2));
    assert_ne!(stdout(&base, "/system Speak like a pirate.\nHello\n"), "");
    assert_eq!(stdout(&base, "/help\n\n   \n"), "");
    assert_error(&base, "/frobnicate\n", &["no command", "/help"]);
    assert_error(&base, "/save\n", &["needs the name of a file"]);
    assert_error(&base, "/load missing\n", &["cannot load the state missing"]);
}

/// Starts an endless text and waits for its first bytes.
fn endless() -> (std::process::Child, [u8; 8]) {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_mmfree"))
        .args(["generate", "Once", "--ignore-eos", "--max-tokens", "1000000000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut start = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
    (child, start)
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let (mut child, _) = endless();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(unix)]
#[test]
fn an_interrupted_text_keeps_what_was_printed() {
    let (child, start) = endless();
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let text = String::from_utf8([&start[..], &output.stdout].concat()).unwrap();
    assert!(text.ends_with('\n'), "{text:?}");
}
