//! `mmfree pack` and `mmfree info` as a user runs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn mmfree(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mmfree")).args(arguments).output().expect("runs")
}

fn fixture() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny");
    path.display().to_string()
}

/// An empty directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mmfree-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a fresh directory");
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(&self.0).expect("a directory").next().is_none()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn assert_error(output: &Output, expected: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(expected), "{message}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_packed_model_describes_itself_like_its_source() {
    let scratch = Scratch::new("pack");
    let describe = |model: &str| -> serde_json::Value {
        let output = mmfree(&["info", model, "--json"]);
        assert_eq!(output.status.code(), Some(0));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let source = describe(&fixture());
    for (format, stored_as) in [("tq1_0", "TQ1_0"), ("tq2_0", "TQ2_0")] {
        let packed = scratch.path(format);
        let output = mmfree(&["pack", &fixture(), "-o", &packed, "--format", format]);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stdout.is_empty());
        let described = describe(&packed);
        for key in ["config", "parameters", "zero_share"] {
            assert_eq!(described[key], source[key], "{key}");
        }
        let tensors = described["tensors"].as_array().expect("a list");
        let head = tensors.iter().find(|tensor| tensor["name"] == "lm_head.weight");
        assert_eq!(head.expect("a head")["stored_as"], stored_as);
        assert!(described["bytes"]["total"].as_u64() < source["bytes"]["total"].as_u64());
    }
    let copy = scratch.path("copy");
    let output = mmfree(&["pack", &fixture(), "-o", &copy, "--format", "safetensors"]);
    assert_eq!(output.status.code(), Some(0));
    let same = |name| {
        fs::read(Path::new(&copy).join(name)).ok()
            == fs::read(Path::new(&fixture()).join(name)).ok()
    };
    assert!(same("model.safetensors") && same("config.json"));
}

#[test]
fn the_built_in_model_is_described_when_none_is_named() {
    let output = mmfree(&["info"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.starts_with("built-in model") && text.contains("76669952"), "{text}");
}

#[test]
fn errors_have_exit_code_2_and_leave_nothing() {
    let scratch = Scratch::new("errors");
    let (output, fixture) = (scratch.path("x.gguf"), fixture());
    assert_error(&mmfree(&["info", &scratch.path("absent")]), "no such file");
    assert_error(&mmfree(&["pack", &scratch.path("absent"), "-o", &output]), "no such file");
    assert_error(&mmfree(&["pack", &fixture, "-o", &scratch.path("no/x.gguf")]), "no directory");
    assert_error(
        &mmfree(&[
            "pack",
            &fixture,
            "-o",
            &output,
            "--format",
            "safetensors",
            "--embeddings",
            "f16",
        ]),
        "do not go with",
    );
    #[cfg(unix)]
    assert_error(&mmfree(&["pack", &fixture, "-o", "/dev/full"]), "not a regular file");
    assert!(scratch.is_empty());
}
