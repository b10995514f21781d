//! `mmfree accel` as a user runs it: text, images, assembly, reports, and everything that is refused.

use std::path::Path;
use std::process::{Output, Stdio};

use assert_cmd::Command;
use serde_json::Value;

/// A directory with a model of 97 tokens, D = 64 and L = 3, and without a tokenizer.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny");

fn accel(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mmfree")).arg("accel").args(arguments).output().unwrap()
}

/// Standard output of a run that succeeds.
fn stdout(arguments: &[&str]) -> String {
    let output = accel(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout(&[arguments, &["--json"]].concat())).unwrap()
}

/// Expects exit code 2 and all of `words` on standard error.
fn refused(arguments: &[&str], words: &[&str]) {
    let output = accel(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments:?}: no {word:?} in {stderr:?}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_built_in_model_writes_text_on_the_simulated_chip() {
    let found = json(&["run", "Once upon a time", "--greedy", "--max-tokens", "6", "--ignore-eos"]);
    assert_eq!(found["generated_tokens"], 6);
    assert_eq!(found["finish_reason"], "length");
    assert!(found["text"].as_str().unwrap().len() > 6, "{found}");
    assert!(found["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(found["configuration"]["name"], "sim");
}

#[test]
fn a_compiled_image_runs_and_its_program_reads_as_assembly() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (image, source, again) = (path("model.mma"), path("model.s"), path("again.mma"));
    let report = json(&["compile", TINY, "--config", "tiny", "-o", text(&image)]);
    let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("{name}: {report}"));
    assert!(number("cycles_per_token") > 1000.0);
    assert_eq!(report["cost"]["weight_bytes"], report["bytes_streamed_per_token"]);
    assert!((1.6..2.0).contains(&number("bits_per_weight")));
    let map = report["data_map"].as_array().unwrap();
    let end = map
        .iter()
        .map(|entry| entry["address"].as_u64().unwrap() + entry["bytes"].as_u64().unwrap());
    assert!(map.len() == 4 && end.max().unwrap() <= report["data_bytes"].as_u64().unwrap());
    assert_eq!(report["weight_map"].as_array().unwrap().len(), 2);
    let readable = stdout(&["compile", TINY, "--config", "tiny"]);
    for words in ["cycles a token", "weights a token", "memory map", "recurrent state", "core 1"] {
        assert!(readable.contains(words), "no {words:?} in {readable}");
    }

    let ids =
        ["--token-ids", "5,9", "--greedy", "--max-tokens", "4", "--ignore-eos", "--print-ids"];
    let from_image = stdout(&[&["run", "--image", text(&image), TINY][..], &ids].concat());
    let compiled = stdout(&[&["run", "--config", "tiny", TINY][..], &ids].concat());
    assert_eq!((&from_image, from_image.trim().split(',').count()), (&compiled, 4));

    let listing = stdout(&["disasm", text(&image)]);
    assert!(listing.contains("matvec") && listing.trim_end().ends_with("halt"), "{listing}");
    std::fs::write(&source, &listing).unwrap();
    stdout(&["asm", text(&source), "--config", "tiny", "-o", text(&again)]);
    assert_eq!(stdout(&["disasm", text(&again)]), listing);
    // Another model has no use for this image, and none for a program without weights.
    refused(&["run", "--image", text(&image), "Once"], &["model.mma", "the built-in model"]);
    refused(&["run", "--image", text(&again), "Once"], &["again.mma", "holds no model"]);
}

#[test]
fn assembler_errors_name_every_place_and_write_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (source, image) = (directory.path().join("bad.s"), directory.path().join("bad.mma"));
    std::fs::write(&source, "halt\n  load v1, a9+, 3\nlod v1\nend\n").unwrap();
    refused(
        &["asm", text(&source), "-o", text(&image)],
        &[
            "3 errors",
            "bad.s",
            "a9+",
            "largest possible is 7",
            "\"lod\"",
            "no loop is open",
            "2:12",
            "3:1",
        ],
    );
    assert!(!image.exists());
    refused(&["asm", text(&directory.path().join("none.s"))], &["cannot read", "none.s"]);
}

#[test]
fn damaged_and_foreign_images_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (source, image) = (directory.path().join("p.s"), directory.path().join("p.mma"));
    std::fs::write(&source, "clearmax\nhalt\n").unwrap();
    stdout(&["asm", text(&source), "--config", "tiny", "-o", text(&image)]);
    let good = std::fs::read(&image).unwrap();
    let damaged = |name: &str, bytes: &[u8], words: &[&str]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let words = [&[name], words].concat();
        refused(&["disasm", text(&path)], &words);
        refused(&["run", "--image", text(&path), TINY, "--token-ids", "1", "--print-ids"], &words);
    };
    let mut flipped = good.clone();
    flipped[260] ^= 1;
    damaged("flipped.mma", &flipped, &["checksum"]);
    damaged("short.mma", &good[..good.len() - 1], &["truncated"]);
    damaged("header.mma", &good[..99], &["cut off after 99 bytes"]);
    damaged("foreign.mma", b"GGUF\x03\0\0\0", &["no program image"]);
    damaged("empty.mma", b"", &["no program image"]);
    let mut version = good;
    version[8] = 77;
    damaged("version.mma", &version, &["version 77", "compile it anew"]);
    refused(&["disasm", text(&directory.path().join("missing.mma"))], &["missing.mma"]);
}

#[test]
fn models_and_sizes_that_do_not_fit_say_what_to_change() {
    refused(
        &["report", "--size", "1.3b", "--config", "tiny"],
        &["activation_bytes is 512", "choose at least"],
    );
    refused(
        &["compile", TINY, "--config", "tiny", "--vector-words", "64"],
        &["vector_words is 64", "choose at least"],
    );
    refused(
        &["compile", TINY, "--config", "tiny", "--row-lanes", "3"],
        &["row_lanes is 3", "power of two"],
    );
    refused(&["compile", TINY, "--config", "tiny", "--row-lanes", "16"], &["weight_bytes is 8"]);
    refused(&["compile", TINY, "--config", "tiny", "--cores", "0"], &["cores is 0"]);
    refused(&["compile", TINY, "--config", "tiny", "--burst-beats", "64"], &["burst_beats is 64"]);
    refused(&["compile", TINY, "--config", "huge"], &["huge", "d5005"]);
    refused(&["report", "--size", "9z"], &["9z", "1.3b"]);
    refused(&["report", "--size", "1.3b", "--board", "abacus"], &["abacus", "d5005"]);
    refused(&["compile", "/nowhere/at/all"], &["/nowhere/at/all"]);
}

#[test]
fn the_report_gives_speed_energy_and_what_limits() {
    let found = json(&["report", "--size", "1.3b", "--board", "d5005"]);
    let number = |name: &str| found[name].as_f64().unwrap_or_else(|| panic!("{name}: {found}"));
    assert!(number("tokens_per_s") > 200.0);
    assert!(
        (number("watts") / number("tokens_per_s") / number("joules_per_token") - 1.0).abs() < 1e-6
    );
    assert!((0.8..1.0).contains(&number("share_of_memory_bandwidth")));
    assert!((0.8..1.0).contains(&number("share_of_memory_limit")));
    assert_eq!(found["limited_by"], "memory");
    assert!(number("speed_ratio") > 8.0 && found["energy_ratio"].as_array().unwrap().len() == 3);
    for range in ["low", "likely", "high"] {
        assert!(found["energy"]["watts"][range].as_f64().unwrap() > 0.0);
    }
    let readable = stdout(&["report", "--size", "1.3b", "--board", "d5005"]);
    for words in [
        "basis:",
        "clock: 250 MHz, an assumption",
        "tokens/s",
        "memory alone allows",
        "limited by           memory",
        "J, estimated",
        "basis of the energy: ",
        "published",
        "0.55 J a token",
    ] {
        assert!(readable.contains(words), "no {words:?} in {readable}");
    }
    let slower = stdout(&["report", "--size", "1.3b", "--clock-mhz", "100"]);
    assert!(slower.contains("clock: 100 MHz, as asked for"), "{slower}");
    // The built-in model on the small board.
    assert!(json(&["report", "--board", "ecp5"])["tokens_per_s"].as_f64().unwrap() > 1.0);
}

#[test]
fn a_model_larger_than_the_board_s_memory_is_refused() {
    let large = ["--activation-bytes", "16384", "--vector-words", "65536"];
    refused(
        &[&["report", "--size", "2.7b", "--board", "ecp5"][..], &large].concat(),
        &["first memory channel takes", "ecp5"],
    );
}

/// `mmfree accel report | head -0`
#[test]
fn a_reader_that_has_gone_is_no_error() {
    for arguments in [&["report", "--size", "370m"][..], &["compile", TINY, "--config", "tiny"]] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_mmfree"))
            .arg("accel")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{arguments:?}");
    }
}
