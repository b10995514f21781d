//! Evaluation: prompts and metrics are the harness' (`tests/fixtures/eval`), and log-likelihoods do not depend on how
//! requests are packed, on the kernel tier, or on how a text is handed over.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mmfree::checkpoint::Checkpoint;
use mmfree::engine::{Engine, EngineOptions, TokenScore};
use mmfree::eval::harness::{Options, Prepared};
use mmfree::eval::perplexity::{Meter, Perplexity};
use mmfree::eval::request::{Encoder, Request};
use mmfree::eval::scorer::{EngineScorer, Score, Scorer};
use mmfree::eval::tasks::{TASKS, Task};
use mmfree::model::Model;
use mmfree::state::State;
use mmfree::tokenizer::Tokenizer;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/eval")
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    })
}

/// The made-up model of `tests/python/lm_eval_mmfree.py`.
fn made_up(context: &str, continuation: &str) -> Score {
    let hashed = crc32(&[context.as_bytes(), b"\0", continuation.as_bytes()].concat());
    Score {
        log_likelihood: -f64::from(hashed % 9973) / 100.0,
        is_greedy: hashed.is_multiple_of(3),
        tokens: 1,
    }
}

#[test]
fn prompts_and_metrics_are_the_harness() {
    let expected = std::fs::read(fixtures().join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let cases = expected["tasks"].as_array().unwrap();
    assert_eq!(cases.len(), 2 * TASKS.len());
    for case in cases {
        let task = Task::find(case["task"].as_str().unwrap()).unwrap();
        let shots = case["shots"].as_u64().unwrap() as usize;
        let options = Options { shots, ..Options::default() };
        let prepared = Prepared::load(task, &fixtures().join("data"), &options).unwrap();
        let prompts: Vec<_> =
            prepared.prompts.iter().flatten().map(|(a, b)| vec![a.as_str(), b.as_str()]).collect();
        let requests: Vec<Vec<&str>> = case["requests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| pair.as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect())
            .collect();
        for (index, (prompt, request)) in prompts.iter().zip(&requests).enumerate() {
            assert_eq!(prompt, request, "{} with {shots} shots, request {index}", task.name);
        }
        assert_eq!(prompts.len(), requests.len(), "{}", task.name);
        let scores: Vec<Vec<Score>> = prepared
            .prompts
            .iter()
            .map(|prompts| prompts.iter().map(|(a, b)| made_up(a, b)).collect())
            .collect();
        let result = prepared.result(&scores);
        for (name, value) in case["metrics"].as_object().unwrap() {
            let found = match name.strip_suffix("_stderr") {
                Some(name) => metric(&result.metrics, name).stderr.unwrap(),
                None => metric(&result.metrics, name).value,
            };
            let value = value.as_f64().unwrap();
            assert!(
                (found - value).abs() <= 1e-9 * value.abs(),
                "{}, {shots} shots, {name}: {found}, expected {value}",
                task.name
            );
        }
    }
}

fn metric(
    metrics: &[mmfree::eval::harness::Metric],
    name: &str,
) -> mmfree::eval::metrics::Estimate {
    metrics.iter().find(|metric| metric.name == name).unwrap().estimate
}

/// A small trained model.
fn checkpoint() -> Checkpoint {
    Checkpoint::open(fixtures().join("../trained/model.gguf")).unwrap()
}

fn engine(backend: Option<&str>) -> Engine {
    let checkpoint = checkpoint();
    let options = EngineOptions { backend: backend.map(str::to_owned), threads: Some(2) };
    let model = Model::load_in(&checkpoint, options.layout().unwrap()).unwrap();
    Engine::new(Arc::new(model), &options).unwrap()
}

fn tokenizer() -> Tokenizer {
    let source = checkpoint().tokenizer().unwrap().unwrap();
    Tokenizer::from_source(&source).unwrap()
}

/// Scores one request token by token, from the logits.
fn slowly(engine: &mut Engine, request: &Request) -> Score {
    let mut state = State::new(&engine.model().clone());
    let mut score = Score::NOTHING;
    let read = &request.tokens[..request.tokens.len() - 1];
    let mut sink = |position: usize, logits: &[f32]| {
        if position + 1 >= request.context {
            score.add(TokenScore::of(logits, request.tokens[position + 1]));
        }
        Ok(())
    };
    engine.logits(&mut state, read, &mut sink).unwrap();
    score
}

#[test]
fn scores_do_not_depend_on_packing() {
    let mut plain = engine(Some("cpu"));
    let mut scorer = EngineScorer::new(engine(Some("cpu")));
    let ids = |from: u32, count: usize| -> Vec<u32> {
        (0..count as u32).map(|i| 3 + (from * 7919 + i * 104_729) % 8000).collect()
    };
    let request = |tokens: Vec<u32>, context| Request { tokens, context };
    let with = |prefix: &[u32], more: Vec<u32>| [prefix, &more].concat();
    let (short, long) = (ids(1, 5), ids(2, 700));
    let groups = vec![
        // One context, answers of several lengths, one the beginning of another, two equal.
        vec![
            request(with(&short, ids(3, 1)), 5),
            request(with(&short, ids(3, 9)), 5),
            request(with(&short, ids(4, 4)), 5),
            request(with(&short, ids(4, 4)), 5),
        ],
        // Contexts that differ, as in WinoGrande.
        vec![
            request([short.clone(), ids(5, 2), ids(6, 6)].concat(), 7),
            request([short.clone(), ids(7, 3), ids(6, 6)].concat(), 8),
        ],
        // Nothing in common; a single request; longer than a pass.
        vec![request(ids(8, 3), 1), request(ids(9, 2), 1)],
        vec![request(ids(10, 2), 1)],
        vec![request(with(&long, ids(11, 300)), 650), request(with(&long, ids(12, 2)), 700)],
        vec![],
    ];
    let mut done = Vec::new();
    let mut tick = |requests| {
        done.push(requests);
        Ok(())
    };
    let scores = scorer.score(&groups, &mut tick).unwrap();
    assert_eq!(done.last(), Some(&11));
    for (group, scores) in groups.iter().zip(&scores) {
        assert_eq!(group.len(), scores.len());
        for (request, score) in group.iter().zip(scores) {
            let expected = slowly(&mut plain, request);
            assert_eq!(score.tokens, request.tokens.len() - request.context);
            assert_eq!((score.tokens, score.is_greedy), (expected.tokens, expected.is_greedy));
            let difference = (score.log_likelihood - expected.log_likelihood).abs();
            assert!(difference < 1e-6 * expected.log_likelihood.abs(), "{score:?} {expected:?}");
        }
    }
    let mut stop = |_| Err(mmfree::error::Error::Cancelled);
    assert!(scorer.score(&groups, &mut stop).is_err());
    let outside = vec![vec![request(vec![1, 2, 9999], 1)]];
    assert!(scorer.score(&outside, &mut |_| Ok(())).is_err());
}

#[test]
fn every_tier_gives_the_same_results() {
    let tokenizer = tokenizer();
    let data = fixtures().join("data");
    let mut first = None;
    for name in ["scalar", "avx2", "avx512", "avx512vbmi", "amx", "neon", "cuda"] {
        let options = EngineOptions { backend: Some(name.to_owned()), threads: None };
        if options.layout().is_err() || name == "cuda" && !Path::new("/dev/nvidia0").exists() {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        }
        let mut scorer = EngineScorer::new(engine(Some(name)));
        let encoder = Encoder::new(&tokenizer, scorer.vocab_size(), None, None).unwrap();
        let mut results = String::new();
        for task in &TASKS {
            let prepared = Prepared::load(task, &data, &Options::default()).unwrap();
            let result = prepared.run(&encoder, &mut scorer, &mut |_| Ok(())).unwrap();
            results += &serde_json::to_string(&result).unwrap();
        }
        assert_eq!(first.get_or_insert_with(|| results.clone()), &results, "{name}");
    }
}

fn measure(
    encoder: &Encoder<'_>,
    scorer: &mut EngineScorer,
    window: Option<usize>,
    documents: &[&[&str]],
) -> Perplexity {
    let mut tick = || Ok(());
    let mut meter = Meter::new(encoder, scorer, window, &mut tick);
    for parts in documents {
        for part in *parts {
            meter.push(part).unwrap();
        }
        meter.end_document().unwrap();
    }
    meter.total()
}

/// The harness' windows, written down as it does.
fn windows(ids: &[u32], start: u32, window: usize) -> Vec<Request> {
    let mut requests = Vec::new();
    let first = window.min(ids.len());
    requests.push(Request { tokens: [&[start], &ids[..first]].concat(), context: 1 });
    let mut predicted = first;
    while predicted < ids.len() {
        let count = window.min(ids.len() - predicted);
        let end = predicted + count;
        let tokens = ids[end - window - 1..end].to_vec();
        requests.push(Request { context: window + 1 - count, tokens });
        predicted = end;
    }
    requests
}

#[test]
fn perplexity_rolls_on_and_windows_are_the_harness() {
    let tokenizer = tokenizer();
    let mut scorer = EngineScorer::new(engine(None));
    let encoder = Encoder::new(&tokenizer, scorer.vocab_size(), None, None).unwrap();
    let book = include_str!("../../../tests/fixtures/tokenizers/pinocchio.txt");
    let end = book.char_indices().nth(2000).unwrap().0;
    let text = &book[..end];
    let half = book.char_indices().nth(800).unwrap().0;

    let whole = measure(&encoder, &mut scorer, None, &[&[text]]);
    assert_eq!((whole.documents, whole.bytes), (1, text.len() as u64));
    assert_eq!(
        whole.words,
        text.split_whitespace().count() as u64
            + u64::from(text.ends_with(char::is_whitespace))
            + u64::from(text.starts_with(char::is_whitespace))
    );
    let parts = measure(&encoder, &mut scorer, None, &[&[&text[..half], "", &text[half..]]]);
    assert_eq!(whole, parts);
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(whole.tokens, ids.len() as u64);
    let start = encoder.start().unwrap();
    let request = Request { tokens: [&[start], &ids[..]].concat(), context: 1 };
    let expected = slowly(&mut engine(None), &request).log_likelihood;
    assert!((whole.log_likelihood / expected - 1.0).abs() < 1e-7);

    // Two documents begin anew each; an empty one counts nothing.
    let two = measure(&encoder, &mut scorer, None, &[&[&text[..half]], &[""], &[&text[half..]]]);
    assert_eq!(two.documents, 2);
    assert!(two.log_likelihood != whole.log_likelihood);

    for window in [1, 7, 64, 200, 100_000] {
        let found =
            measure(&encoder, &mut scorer, Some(window), &[&[&text[..half], &text[half..]]]);
        let mut with_prefix = tokenizer.prefix().to_vec();
        with_prefix.extend(&ids);
        let groups: Vec<_> =
            windows(&with_prefix, start, window).into_iter().map(|r| vec![r]).collect();
        let scores = scorer.score(&groups, &mut |_| Ok(())).unwrap();
        let expected: f64 = scores.iter().flatten().map(|score| score.log_likelihood).sum();
        assert_eq!(found.tokens, with_prefix.len() as u64, "window {window}");
        assert!((found.log_likelihood / expected - 1.0).abs() < 1e-9, "window {window}");
    }
}

#[test]
fn continuations_begin_where_the_harness_says() {
    let tokenizer = tokenizer();
    let encoder = Encoder::new(&tokenizer, 8192, None, None).unwrap();
    let whole = |text: &str| tokenizer.encode(text, true).unwrap();
    for (context, continuation, context_text) in [
        ("Question: x\nAnswer:", " yes", "Question: x\nAnswer:"),
        ("The cat sat on ", " the mat", "The cat sat on"),
        ("shots\n\n", "text", "shots"),
        ("<s> once", " upon", "<s> once"),
    ] {
        let request = encoder.pair(context, continuation).unwrap();
        if context.starts_with("<s>") {
            assert_eq!(request.tokens, tokenizer.encode("<s> once upon", false).unwrap());
            continue;
        }
        assert_eq!(request.tokens, whole(&format!("{context}{continuation}")));
        assert_eq!(request.context, whole(context_text).len());
    }
    let empty = encoder.pair("", " word").unwrap();
    assert_eq!(empty.context, 1);
    assert_eq!(empty.tokens[0], tokenizer.bos().unwrap());
    assert!(encoder.pair("a", "").is_err());
    assert!(Encoder::new(&tokenizer, 8191, None, None).is_err());
    let cut = Request { tokens: (0..10).collect(), context: 6 }.within(Some(7)).unwrap();
    assert_eq!(cut, Request { tokens: (2..10).collect(), context: 4 });
    assert!(Request { tokens: (0..10).collect(), context: 2 }.within(Some(7)).is_err());
}

#[test]
fn files_that_are_missing_or_malformed_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let load = |task: &str, shots| {
        let options = Options { shots, ..Options::default() };
        Prepared::load(Task::find(task).unwrap(), directory.path(), &options)
            .unwrap_err()
            .to_string()
    };
    assert!(load("piqa", 0).contains("valid.jsonl"));
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let piqa = r#"{"goal": "a", "sol1": "b", "sol2": "c"}"#;
    write("piqa/valid.jsonl", &format!("{piqa}\n{piqa}\n"));
    assert!(load("piqa", 0).contains("valid.jsonl:1: field \"label\""));
    write("piqa/valid-labels.lst", "1\n");
    assert!(load("piqa", 0).contains("1 labels, but"));
    write("piqa/valid-labels.lst", "1\n2\n");
    assert!(load("piqa", 0).contains("valid-labels.lst:2: label \"2\""));
    write("piqa/valid-labels.lst", "1\n0\n");
    assert!(load("piqa", 1).contains("train.jsonl"));
    write("piqa/train.jsonl", &format!("{piqa}\n"));
    write("piqa/train-labels.lst", "0\n");
    assert!(load("piqa", 1).contains("1 shots need 2 examples"));
    for (task, file, line, expected) in [
        (
            "arc-easy",
            "ARC-Easy-Test.jsonl",
            r#"{"id": 1, "question": {"stem": 3, "choices": [{"text": "a", "label": "A"}]}, "answerKey": "A"}"#,
            ":1: field \"question.stem\": expected a string",
        ),
        (
            "arc-easy",
            "ARC-Easy-Test.jsonl",
            r#"{"question": {"stem": "x", "choices": [{"text": "a"}]}, "answerKey": "A"}"#,
            "\"question.choices[0].label\"",
        ),
        (
            "arc-challenge",
            "ARC-Challenge-Test.jsonl",
            r#"{"question": {"stem": "x", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "B"}"#,
            "\"B\" is none of the labels A",
        ),
        (
            "openbookqa",
            "test.jsonl",
            r#"{"question": {"stem": "x", "choices": []}, "answerKey": "B"}"#,
            "there are no answers",
        ),
        (
            "hellaswag",
            "hellaswag_val.jsonl",
            r#"{"activity_label": "x", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": 1}"#,
            "field \"label\": expected a number from 0 to 0",
        ),
        (
            "hellaswag",
            "hellaswag_val.jsonl",
            r#"{"activity_label": "x", "ctx_a": "", "ctx_b": "", "endings": ["a", "[b]"], "label": 1}"#,
            "\"endings[1]\"",
        ),
        (
            "winogrande",
            "dev.jsonl",
            r#"{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}"#,
            "no blank",
        ),
        (
            "winogrande",
            "dev.jsonl",
            r#"{"sentence": "a _", "option1": "a", "option2": "b", "answer": "3"}"#,
            "expected \"1\" or \"2\"",
        ),
        ("lambada", "lambada_test.jsonl", r#"{"text": "x "}"#, "no last word"),
    ] {
        write(file, line);
        let error = load(task, 0);
        assert!(error.contains(file) && error.contains(expected), "{error}");
    }
    std::fs::remove_file(directory.path().join("dev.jsonl")).unwrap();
    std::fs::create_dir(directory.path().join("dev.jsonl")).unwrap();
    assert!(load("winogrande", 0).contains("dev.jsonl"));
}
