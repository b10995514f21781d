//! Arguments of the text commands that are wrong by themselves: exit code 2, nothing on standard
//! output, and words that say what to do.

use assert_cmd::Command;

fn mmfree(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_mmfree")).args(arguments).output().unwrap()
}

/// Runs, expects exit code 2 and all of `words` on standard error.
fn assert_error(arguments: &[&str], words: &[&str]) {
    let output = mmfree(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?} printed something");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments:?}: no {word:?} in {stderr:?}");
    }
}

#[test]
fn sampling_values_have_ranges() {
    assert_error(&["generate", "x", "--temperature=-1"], &["temperature is -1", "at least 0"]);
    assert_error(&["generate", "x", "--temperature", "nan"], &["temperature is NaN"]);
    assert_error(&["generate", "x", "--top-p", "0"], &["top-p is 0", "more than 0"]);
    assert_error(&["generate", "x", "--top-p", "1.1"], &["top-p is 1.1", "at most 1"]);
    assert_error(&["generate", "x", "--min-p", "2"], &["min-p is 2", "0 to 1"]);
    assert_error(&["chat", "--repetition-penalty", "0"], &["repetition-penalty is 0"]);
    assert_error(&["generate", "x", "--top-k=-1"], &["--top-k"]);
    assert_error(&["generate", "x", "--seed", "x"], &["--seed"]);
    assert_error(&["generate", "x", "--greedy", "--temperature", "1"], &["cannot be used with"]);
    assert_error(&["generate", "x", "--threads", "0"], &["--threads", "1..=1024"]);
}

#[test]
fn there_is_one_prompt() {
    assert_error(&["generate", "a", "b", "--prompt", "c"], &["given twice"]);
    assert_error(&["generate", "--prompt", "a", "--token-ids", "1"], &["cannot be used with"]);
    assert_error(&["generate", "a", "b", "c"], &["unexpected argument"]);
    assert_error(&["generate", "missing.gguf"], &["no file \"missing.gguf\"", "--prompt"]);
    assert_error(&["generate", "--prompt-file", "missing"], &["prompt missing", "No such file"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_error(&["generate", "--prompt-file", path], &[path, "directory"]);
}

#[test]
fn token_ids_are_numbers() {
    for ids in ["", "1,,2", "x", "-1", "4294967296", "1;2"] {
        let flag = format!("--token-ids={ids}");
        assert_error(&["generate", &flag], &["--token-ids", "1,5,9"]);
        assert_error(&["logits", &flag, "-o", "x"], &["--token-ids", "1,5,9"]);
    }
}

#[test]
fn output_is_of_one_kind() {
    assert_error(&["generate", "x", "--json", "--print-ids"], &["cannot be used with"]);
    assert_error(&["generate", "x", "--echo", "--json"], &["cannot be used with"]);
}

#[test]
fn logits_need_sequences_of_one_length() {
    assert_error(&["logits", "-o", "x"], &["--token-ids"]);
    assert_error(&["logits", "--token-ids", "1"], &["--output"]);
    let lists = ["logits", "--token-ids", "1,2", "--token-ids", "3", "-o", "x"];
    assert_error(&lists, &["one length", "the first has 2, number 2 has 1"]);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ids.json");
    let run = |content: &str, words: &[&str]| {
        std::fs::write(&file, content).unwrap();
        let path = file.to_str().unwrap();
        assert_error(&["logits", "--token-ids-file", path, "-o", "x"], words);
    };
    run("[[1,2],[3]]", &["number 2 has 1"]);
    run("[]", &["no token ids"]);
    run("[[]]", &["empty"]);
    run("[1,2]", &["ids.json", "[[1,5,9],[1,5,7]]"]);
    run("[[-1]]", &["ids.json"]);
    run("[[1,2", &["ids.json", "EOF"]);
    let missing = ["logits", "--token-ids-file", "missing", "-o", "x"];
    assert_error(&missing, &["cannot read missing"]);
    assert!(!std::path::Path::new("x").exists());
}

#[test]
fn commands_and_flags_are_known() {
    assert_error(&[], &["Usage"]);
    assert_error(&["frobnicate"], &["frobnicate"]);
    assert_error(&["generate", "--frobnicate"], &["--frobnicate"]);
}

#[test]
fn help_goes_to_standard_output() {
    for command in ["generate", "chat", "logits", "bench"] {
        let output = mmfree(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0));
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.contains("MODEL") && help.contains("--threads"), "{help}");
        assert!(output.stderr.is_empty());
    }
    let output = mmfree(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("mmfree "));
}
