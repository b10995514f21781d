//! `mmfree eval` and `mmfree scaling` as a user runs them.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn run(arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmfree"));
    command.args(arguments).output().unwrap()
}

fn succeed(arguments: &[&str]) -> String {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(arguments)).unwrap()
}

/// Expects exit code 2, nothing on standard output, and words on standard error.
fn fail(arguments: &[&str], words: &[&str]) {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty() && !stderr.contains("panicked"), "{arguments:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments:?}: no {word:?} in {stderr}");
    }
}

const TASKS: &str = "arc-easy,arc-challenge,hellaswag,openbookqa,piqa,winogrande,lambada";

#[test]
fn tasks_are_a_table_and_json() {
    let directory = tempfile::tempdir().unwrap();
    let data = fixtures("eval/data");
    let data = data.to_str().unwrap();
    let table = succeed(&["eval", "--tasks", TASKS, "--data", data]);
    assert_eq!(table.lines().count(), 1 + 5 * 3 + 1 + 2, "{table}");
    let file = directory.path().join("result.json");
    let report = json(&[
        "eval",
        "--tasks",
        "piqa,arc_easy",
        "--data",
        data,
        "--shots",
        "1",
        "--limit",
        "2",
        "--prompts",
        "--json",
        "-o",
        file.to_str().unwrap(),
    ]);
    assert_eq!(report, serde_json::from_slice::<Value>(&fs::read(&file).unwrap()).unwrap());
    assert_eq!(report["model"], "built-in model");
    let tasks = report["tasks"].as_array().unwrap();
    assert_eq!(tasks[0]["items"].as_array().unwrap().len(), 2);
    let item = &tasks[1]["items"][1];
    assert_eq!((item["id"].as_str(), item["gold"].as_u64()), (Some("E2"), Some(1)));
    assert_eq!(item["log_likelihoods"].as_array().unwrap().len(), 3);
    let prompt = item["prompts"][0][0].as_str().unwrap();
    assert!(prompt.matches("Question: ").count() == 2 && prompt.ends_with("\nAnswer:"), "{prompt}");
    let metric = &tasks[1]["metrics"][0];
    assert!(metric["name"] == "acc" && metric["value"].is_f64() && metric["stderr"].is_f64());
}

#[test]
fn a_transformer_is_judged_by_its_own_forward_pass() {
    // A tokenizer of 31 tokens for the fixture's vocabulary: bytes are its unknown token.
    let directory = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixtures("transformer").join(file), directory.path().join(file)).unwrap();
    }
    let letters: Vec<_> = "abcdefghijklmnopqrstuvwxyz .".chars().enumerate().collect();
    let mut vocabulary = serde_json::json!({"<unk>": 0, "<s>": 1, "</s>": 2});
    for (index, letter) in letters {
        vocabulary[letter.to_string()] = (index + 3).into();
    }
    let added = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    });
    fs::write(directory.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let names = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    fs::write(directory.path().join("tokenizer_config.json"), names).unwrap();
    let model = directory.path().to_str().unwrap();

    let requests = directory.path().join("requests.jsonl");
    // The fixture's ids, of which the loss is known from PyTorch, and a pair of texts.
    fs::write(
        &requests,
        "{\"context_ids\": [5], \"continuation_ids\": [6, 7, 8]}\n{\"context_ids\": [5, 6], \"continuation_ids\": [7, 8]}\n{\"context_ids\": [5], \"continuation_ids\": [6]}\n{\"context\": \"a cat\", \"continuation\": \" sat\"}\n",
    )
    .unwrap();
    let scores = succeed(&["eval", model, "--requests", requests.to_str().unwrap()]);
    let scores: Vec<Value> =
        scores.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ll = |index: usize| scores[index]["log_likelihood"].as_f64().unwrap();
    // The chain rule.
    assert!((ll(0) - ll(1) - ll(2)).abs() < 1e-5, "{scores:?}");
    assert_eq!(scores[3]["tokens"], 4);

    // Packed it is the same model; in half precision nearly.
    let packed = directory.path().join("packed.gguf");
    let packed = packed.to_str().unwrap();
    for (format, budget) in
        [(None, 0.0), (Some("f32"), 0.0), (Some("f16"), 5e-3), (Some("bf16"), 5e-2)]
    {
        let options = format.map(|format| ["--format", format]);
        let pack = [&["pack", model, "-o", packed][..], options.as_ref().map_or(&[], |o| &o[..])];
        succeed(&pack.concat());
        let found = succeed(&["eval", packed, "--requests", requests.to_str().unwrap()]);
        for (found, expected) in found.lines().zip(&scores) {
            let found: Value = serde_json::from_str(found).unwrap();
            let difference = found["log_likelihood"].as_f64().unwrap()
                - expected["log_likelihood"].as_f64().unwrap();
            assert!(difference.abs() <= budget, "{format:?}: {found}, expected {expected}");
            assert_eq!(found["tokens"], expected["tokens"]);
        }
    }
    fail(&["pack", model, "-o", packed, "--format", "tq2_0"], &["Transformer++", "f16"]);
    // Named after its source, unless told otherwise.
    let name = directory.path().file_name().unwrap().as_encoded_bytes();
    assert!(fs::read(packed).unwrap().windows(name.len()).any(|bytes| bytes == name));
    let weights = directory.path().join("model.safetensors");
    for (source, output) in [(model, weights.to_str().unwrap()), (packed, packed)] {
        fail(&["pack", source, "-o", output], &["is a file of the model"]);
    }
    fail(&["generate", packed, "a"], &["general.architecture", "llama", "hgrn_bit"]);

    // More than the model's 512 positions.
    let long = serde_json::json!({"context_ids": [5], "continuation_ids": vec![6; 513]});
    fs::write(&requests, format!("{}\n{long}\n", r#"{"context": "a", "continuation": "b"}"#))
        .unwrap();
    fail(
        &["eval", model, "--requests", requests.to_str().unwrap()],
        &["requests.jsonl:2", "continuation_ids", "512 tokens"],
    );

    let data = fixtures("eval/data");
    let report =
        json(&["eval", model, "--tasks", "openbookqa", "--data", data.to_str().unwrap(), "--json"]);
    assert_eq!(report["tasks"][0]["items"].as_array().unwrap().len(), 3);
    let text = directory.path().join("text.txt");
    fs::write(&text, "a cat sat on a mat. ".repeat(100)).unwrap();
    let text = text.to_str().unwrap();
    let report = json(&["eval", model, "--perplexity", text, "--json"]);
    assert_eq!(report["window"], 512);
    assert_eq!(report["tokens"], 2000);
    fail(&["eval", model, "--perplexity", text, "--window", "513"], &["512 tokens at most"]);
}

#[test]
fn perplexity_is_of_files_and_directories() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (first, second) = ("Once upon a time there was a king.\n", "He had a daughter. ");
    fs::write(path("a.txt"), first).unwrap();
    fs::write(path("b.raw"), second).unwrap();
    let line = |text: &str| serde_json::json!({"text": text, "body": "x"}).to_string();
    fs::write(path("c.jsonl"), format!("{}\n{}\n", line(first), line(second))).unwrap();
    let texts = json(&["eval", "--perplexity", &path("a.txt"), &path("b.raw"), "--json"]);
    let lines = json(&["eval", "--perplexity", &path("c.jsonl"), "--json"]);
    for name in ["documents", "tokens", "words", "bytes", "log_likelihood", "bits_per_byte"] {
        assert_eq!(texts[name], lines[name], "{name}");
    }
    assert_eq!(texts["bytes"], first.len() + second.len());
    assert_eq!(texts["documents"], 2);
    let bits = texts["bits_per_byte"].as_f64().unwrap();
    assert!((0.3..4.0).contains(&bits), "{bits}");
    assert!(
        succeed(&["eval", "--perplexity", &path("a.txt"), "--window", "8"])
            .contains("windows of 8 tokens")
    );
    fail(&["eval", "--perplexity", &path("absent.txt")], &["absent.txt"]);
    fail(
        &["eval", "--perplexity", &path("c.jsonl"), "--field", "no"],
        &["c.jsonl:1", "no field \"no\""],
    );
    fs::write(path("bad.txt"), b"abc\xff").unwrap();
    fail(&["eval", "--perplexity", &path("bad.txt")], &["bad.txt", "not UTF-8", "offset 3"]);
    fs::write(path("empty.txt"), "").unwrap();
    fail(&["eval", "--perplexity", &path("empty.txt")], &["no text"]);
}

#[test]
fn mistakes_are_told_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let data = fixtures("eval/data");
    let data = data.to_str().unwrap();
    let output = path("result.json");
    fail(
        &["eval", "--tasks", "mmlu", "--data", data, "-o", &output],
        &["mmlu", "winogrande, lambada"],
    );
    fail(&["eval", "--tasks", "piqa", "--data", &path(""), "-o", &output], &["valid.jsonl"]);
    fail(
        &["eval", "--tasks", "piqa", "--data", &path("none"), "-o", &output],
        &["no such directory"],
    );
    fail(&["eval", "--tasks", "piqa"], &["--data"]);
    fail(&["eval"], &["--tasks", "--perplexity"]);
    fail(&["eval", "--tasks", "lambada", "--data", data, "--split", "train"], &["no train split"]);
    fs::write(path("lambada_test.jsonl"), "{\"text\": \"a b\"}\n{\"txt\": 1}\n").unwrap();
    let words = ["lambada_test.jsonl:2", "\"text\""];
    fail(&["eval", "--tasks", "lambada", "--data", &path(""), "-o", &output], &words);
    fs::write(path("requests.jsonl"), "{\"context_ids\": [1], \"continuation_ids\": [8192]}\n")
        .unwrap();
    fail(
        &["eval", "--requests", &path("requests.jsonl"), "-o", &output],
        &["requests.jsonl:1", "8192"],
    );
    // Another model's tokenizer.
    let model = path("model");
    fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixtures("tiny").join(file), Path::new(&model).join(file)).unwrap();
    }
    fail(&["eval", &model, "--tasks", "piqa", "--data", data, "-o", &output], &["no tokenizer"]);
    let tokenizer = fixtures("tokenizers/llama-3.json");
    fs::copy(tokenizer, Path::new(&model).join("tokenizer.json")).unwrap();
    fail(
        &["eval", &model, "--tasks", "piqa", "--data", data, "-o", &output],
        &["vocabulary has 97"],
    );
    assert!(!Path::new(&output).exists());
    assert!(
        fs::read_dir(directory.path())
            .unwrap()
            .all(|entry| { !entry.unwrap().file_name().to_string_lossy().starts_with(".mmfree") })
    );
}

#[test]
fn scaling_laws_are_written_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let mut arguments = vec!["scaling".to_owned()];
    for (model, exponent) in [("hgrn_bit", -0.10), ("llama", -0.08)] {
        for width in [64_u32, 128, 256] {
            let run = path(&format!("{model}-{width}"));
            fs::create_dir(&run).unwrap();
            let heads = if model == "llama" {
                "\"num_attention_heads\": 2, \"hidden_act\": \"silu\""
            } else {
                "\"hidden_act\": \"swish\""
            };
            let config = format!(
                "{{\"model_type\": \"{model}\", \"vocab_size\": 64, \"hidden_size\": {width}, \
                 \"num_hidden_layers\": 2, \"intermediate_size\": 256, {heads}}}"
            );
            fs::write(format!("{run}/config.json"), config).unwrap();
            let log: String = (1..=4)
                .map(|step| {
                    let tokens = step * 100_000 * width;
                    let work = f64::from(tokens) * f64::from(width);
                    let loss = 40.0 * work.powf(exponent);
                    format!("{{\"step\": {step}, \"tokens\": {tokens}, \"loss\": {loss}}}\n")
                })
                .collect();
            fs::write(format!("{run}/log.jsonl"), log).unwrap();
            arguments.push(run);
        }
    }
    arguments.extend(["--bootstrap", "20", "-o"].map(str::to_owned));
    let out = path("out");
    let with = |more: &[&str]| -> Vec<String> {
        arguments.iter().cloned().chain(more.iter().map(|&more| more.to_owned())).collect()
    };
    fn as_strs(arguments: &[String]) -> Vec<&str> {
        arguments.iter().map(String::as_str).collect()
    }
    let table = succeed(&as_strs(&with(&[&out])));
    assert!(table.contains("transformer++") && table.contains("straight line"), "{table}");
    for file in ["scaling.svg", "curves.svg", "scaling.md", "scaling.json"] {
        assert!(fs::metadata(Path::new(&out).join(file)).unwrap().len() > 200, "{file}");
    }
    fail(&as_strs(&with(&[&out])), &["not empty"]);
    fs::write(format!("{}/log.jsonl", path("llama-64")), "").unwrap();
    let other = path("other");
    fail(&as_strs(&with(&[&other])), &["no loss"]);
    assert!(!Path::new(&other).exists());
}
