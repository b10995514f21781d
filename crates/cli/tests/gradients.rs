//! `mmfree gradients` as other programs run it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn run(model: &Path, work: &Path, ids: &str, more: &[&str]) -> Output {
    std::fs::write(work.join("ids.json"), ids).unwrap();
    Command::new(env!("CARGO_BIN_EXE_mmfree"))
        .arg("gradients")
        .arg(model)
        .args(["--token-ids-file".as_ref(), work.join("ids.json").as_os_str()])
        .args(["-o".as_ref(), work.join("out.safetensors").as_os_str()])
        .args(more)
        .output()
        .expect("runs")
}

#[test]
fn writes_loss_and_gradients_under_the_names_of_the_checkpoint() {
    let work = tempfile::tempdir().unwrap();
    for (name, tensor) in
        [("tiny", "lm_head.norm.weight"), ("transformer", "model.embed_tokens.weight")]
    {
        let mut outputs = Vec::new();
        for more in [&[][..], &["--recompute", "--threads", "1"], &["--micro-batch", "1"]] {
            let output = run(&fixture(name), work.path(), "[[1,2,3,4],[5,6,7,8]]", more);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            outputs.push(std::fs::read(work.path().join("out.safetensors")).unwrap());
        }
        assert!(outputs[0] == outputs[1], "recomputation changed the gradients");
        let length = u64::from_le_bytes(outputs[0][..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&outputs[0][8..8 + length]).unwrap();
        assert_eq!(header["loss"]["shape"], serde_json::json!([1]));
        assert!(header[tensor]["shape"].is_array(), "{tensor} is not there");
    }
}

#[test]
fn mistakes_have_clear_errors_and_leave_no_file() {
    let work = tempfile::tempdir().unwrap();
    let tiny = fixture("tiny");
    for (ids, more, expected) in [
        ("[[1,2],[3]]", &[][..], "the first has 2, number 2 has 1"),
        ("[[1],[3]]", &[], "needs a token and the one that follows"),
        ("[]", &[], "no token ids"),
        ("[[1,97]]", &[], "outside the vocabulary of 97"),
        ("{}", &[], "no JSON list"),
        ("[[1,2],[3,4]]", &["--micro-batch", "3", "--threads", "0"], "0 threads"),
        ("[[1,2],[3,4],[5,6]]", &["--micro-batch", "2"], "does not divide"),
        // There may be no driver, or there may be GPUs, but not so many.
        ("[[1,2]]", &["--backend", "cuda", "--device", "60000"], "no "),
        ("[[1,2]]", &["--backend", "tpu"], "possible values"),
    ] {
        let output = run(&tiny, work.path(), ids, more);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{ids} {more:?}: {error}");
        assert!(error.contains(expected), "{ids} {more:?}: {error}");
        assert!(!work.path().join("out.safetensors").exists());
    }
    let output = run(&fixture("tokenizers"), work.path(), "[[1,2]]", &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && error.contains("no config.json"), "{error}");
}
