//! Damaged and lying files give errors, never a panic and never other weights.
#![allow(missing_docs)]

mod support;

use std::fs;

use mmfree::checkpoint::info::describe;
use mmfree::checkpoint::{Checkpoint, EmbeddingStorage, FloatType, PackOptions, pack};
use mmfree::error::{Error, TensorProblem};
use mmfree_kernels::ternary::tq::TqFormat;
use serde_json::json;
use support::{Loaded, Sizes, fixture, leak, load, open, safetensors};
use tempfile::tempdir;

fn packed_bytes(format: TqFormat) -> Vec<u8> {
    let sizes = Sizes::SMALL;
    let source = open(&sizes.config(), &sizes.tensors(FloatType::F32)).unwrap();
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.gguf");
    let options = PackOptions { format, embeddings: EmbeddingStorage::Source, name: None };
    pack(&source, &path, &options, &mut |_, _| {}).unwrap();
    fs::read(path).unwrap()
}

/// Opens bytes and reads everything in them.
fn load_gguf(bytes: Vec<u8>) -> Result<Loaded, Error> {
    let checkpoint = Checkpoint::from_static_gguf(leak(bytes))?;
    describe(&checkpoint, &mut |_, _| {})?;
    load(&checkpoint)
}

fn load_hugging_face(config: &[u8], weights: Vec<u8>) -> Result<Loaded, Error> {
    let checkpoint = Checkpoint::from_static_files(&[
        ("config.json", leak(config.to_vec())),
        ("model.safetensors", leak(weights)),
    ])?;
    load(&checkpoint)
}

#[test]
fn no_flipped_byte_of_a_packed_file_panics() {
    for format in [TqFormat::Tq1_0, TqFormat::Tq2_0] {
        let good = packed_bytes(format);
        assert!(load_gguf(good.clone()).is_ok());
        for at in 0..good.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                // A flipped bit of a name is an error; one of an epsilon is another model.
                let _ = load_gguf(bad);
            }
        }
    }
}

#[test]
fn every_truncated_packed_file_is_refused() {
    let good = packed_bytes(TqFormat::Tq1_0);
    // The last tensor has 6 blocks of 54 bytes; what follows is padding.
    let end = good.len() - (6usize * 54).next_multiple_of(64) + 6 * 54;
    assert!(load_gguf(good[..end].to_vec()).is_ok());
    for length in 0..end {
        assert!(load_gguf(good[..length].to_vec()).is_err(), "{length} of {end} bytes");
    }
}

#[test]
fn flipped_and_truncated_safetensors_are_refused() {
    let sizes = Sizes::SMALL;
    let config = sizes.config().to_string().into_bytes();
    let good = safetensors(&sizes.tensors(FloatType::F16));
    let expected = load_hugging_face(&config, good.clone()).unwrap();
    for length in 0..good.len() {
        assert!(load_hugging_face(&config, good[..length].to_vec()).is_err(), "{length}");
    }
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        for flip in [0x01, 0x20, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            if let Ok(loaded) = load_hugging_face(&config, bad) {
                // Only F16 that turned into another 16-bit type can still fit.
                assert!(good[at..].starts_with(b"F16") || loaded == expected, "byte {at}");
            }
        }
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(load_hugging_face(&config, longer).is_err());
}

#[test]
fn flipped_configurations_never_panic() {
    let sizes = Sizes::SMALL;
    let config = sizes.config().to_string().into_bytes();
    let weights = leak(safetensors(&sizes.tensors(FloatType::F32)));
    for at in 0..config.len() {
        for flip in [0x01, 0x04, 0x10, 0x80, 0xff] {
            let mut bad = config.clone();
            bad[at] ^= flip;
            let files = [("config.json", leak(bad)), ("model.safetensors", weights)];
            // A flipped digit of an optional field is another model; sizes must fit the tensors.
            if let Ok(checkpoint) = Checkpoint::from_static_files(&files) {
                assert_eq!(checkpoint.config().hidden_size, sizes.hidden);
            }
        }
    }
}

#[test]
fn every_tensor_that_does_not_fit_is_named() {
    let sizes = Sizes::SMALL;
    let mut tensors = sizes.tensors(FloatType::F32);
    tensors.retain(|tensor| tensor.name != "model.norm.weight");
    let head = tensors.iter_mut().find(|tensor| tensor.name == "lm_head.weight").unwrap();
    head.shape = vec![sizes.hidden, sizes.vocab];
    let mut extra = tensors[0].clone();
    extra.name = "lm_head.bias".to_owned();
    tensors.push(extra);
    let error = open(&sizes.config(), &tensors).unwrap_err();
    let Error::Tensors { problems, .. } = &error else { panic!("{error}") };
    assert_eq!(problems.len(), 3);
    assert!(problems.contains(&TensorProblem::Missing { tensor: "model.norm.weight".into() }));
    assert!(problems.contains(&TensorProblem::Unexpected { tensor: "lm_head.bias".into() }));
    assert!(problems.contains(&TensorProblem::Shape {
        tensor: "lm_head.weight".into(),
        expected: vec![6, 5],
        found: vec![5, 6],
    }));

    // A configuration of another model.
    let mut config = sizes.config();
    config["num_hidden_layers"] = json!(2);
    config["vocab_size"] = json!(7);
    let error = open(&config, &sizes.tensors(FloatType::F32)).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.attn.i_proj.weight is missing"), "{error}");
    assert!(error.contains("lm_head.weight has shape [6, 5], expected [7, 5]"), "{error}");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let sizes = Sizes::SMALL;
    let directory = tempdir().unwrap();
    let output = directory.path().join("x.gguf");
    let options =
        PackOptions { format: TqFormat::Tq2_0, embeddings: EmbeddingStorage::Source, name: None };
    for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        let good = sizes.tensors(float);
        for at in 0..good.len() {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut tensors = good.clone();
                let bad = support::Tensor::new("", float, &[1], &[value]).data;
                let width = bad.len();
                tensors[at].data[2 * width..3 * width].copy_from_slice(&bad);
                let checkpoint = open(&sizes.config(), &tensors).unwrap();
                let error = load(&checkpoint).unwrap_err();
                let Error::NotFinite { tensor, index, .. } = &error else { panic!("{error}") };
                assert_eq!((tensor, *index), (&tensors[at].name, 2));
                assert!(pack(&checkpoint, &output, &options, &mut |_, _| {}).is_err());
                assert!(!output.exists());
            }
        }
    }
}

#[test]
fn packed_scales_and_codes_are_checked() {
    for format in [TqFormat::Tq1_0, TqFormat::Tq2_0] {
        let good = packed_bytes(format);
        let Ok(expected) = load_gguf(good.clone()) else { panic!("a good file") };
        let scale = expected.ternary[0].scale().to_le_bytes();
        let at = good.windows(4).position(|bytes| bytes == scale).unwrap();
        for bad_scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&f32::to_le_bytes(bad_scale));
            assert!(load_gguf(bad).is_err(), "{bad_scale}");
        }
        let mut bad = good.clone();
        let block_scale =
            good.len() - (6 * format.block_bytes()).next_multiple_of(64) + format.block_bytes() - 1;
        assert_eq!(bad[block_scale], 0x3c);
        bad[block_scale] = 0x38;
        let error = load_gguf(bad).unwrap_err().to_string();
        assert!(error.contains("lm_head") && error.contains("0x3800"), "{error}");
    }
}

#[test]
fn shards_must_agree_with_their_index() {
    let sizes = Sizes::SMALL;
    let tensors = sizes.tensors(FloatType::F32);
    let config = leak(sizes.config().to_string().into_bytes());
    let shard = leak(safetensors(&tensors));
    let check = |index: String, expected: &str| {
        let opened = Checkpoint::from_static_files(&[
            ("config.json", config),
            ("model.safetensors.index.json", leak(index.into_bytes())),
            ("a.safetensors", shard),
            ("b.safetensors", shard),
        ]);
        match opened {
            Ok(_) => assert_eq!(expected, ""),
            Err(error) => {
                let error = error.to_string();
                assert!(!expected.is_empty() && error.contains(expected), "{error}");
            }
        }
    };
    let map = |file: &str| {
        let entries = tensors.iter().map(|tensor| (tensor.name.clone(), json!(file)));
        entries.collect::<serde_json::Map<_, _>>()
    };
    let index = |map| json!({ "weight_map": map }).to_string();
    check(index(map("a.safetensors")), "");
    check(index(map("c.safetensors")), "c.safetensors is not beside the index");
    for outside in ["../a.safetensors", "/etc/passwd", "x\\a.safetensors", "", "config.json"] {
        check(index(map(outside)), "expected the name of a file beside the index");
    }
    let mut lying = map("a.safetensors");
    lying.insert("lm_head.weight".into(), json!("b.safetensors"));
    check(index(lying), "the index maps it to");
    let mut more = map("a.safetensors");
    more.insert("lm_head.bias".into(), json!("a.safetensors"));
    check(index(more), "is not in the shard");
    let mut fewer = map("a.safetensors");
    fewer.remove("lm_head.weight");
    check(index(fewer), "maps it to null");
    check("{}".to_owned(), "no weight_map");
    check("{".to_owned(), "not valid JSON");
    check(r#"{"weight_map": {"a": 1}}"#.to_owned(), "mapped to 1");
    check(r#"{"weight_map": {}, "weight_map": {}}"#.to_owned(), "appears twice");
}

#[test]
fn names_that_are_no_models_say_what_was_tried() {
    let directory = tempdir().unwrap();
    let error = |path: &std::path::Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(error(&directory.path().join("absent")).contains("no such file"));
    assert!(error("absent".as_ref()).contains("no such file"));
    assert!(error("owner/absent.gguf".as_ref()).contains("no such file"));
    #[cfg(not(feature = "hub"))]
    assert!(error("owner/absent".as_ref()).contains("feature `hub`"));
    assert!(error(directory.path()).contains("config.json"));
    assert!(error(&fixture("tiny/model.safetensors")).contains("name the directory"));
    assert!(error(&fixture("tiny/config.json")).contains("expected \"GGUF\""));
    let empty = directory.path().join("empty");
    fs::write(&empty, []).unwrap();
    assert!(error(&empty).contains("truncated"));
    fs::create_dir(directory.path().join("d")).unwrap();
    fs::write(directory.path().join("d/config.json"), Sizes::SMALL.config().to_string()).unwrap();
    assert!(error(&directory.path().join("d")).contains("neither model.safetensors nor"));
}

#[test]
fn ids_outside_the_vocabulary_are_refused() {
    let sizes = Sizes::SMALL;
    let checkpoint = open(&sizes.config(), &sizes.tensors(FloatType::F32)).unwrap();
    let table = checkpoint.embeddings().unwrap();
    let mut row = vec![0.0; sizes.hidden];
    assert!(table.row_into(5, &mut row).is_ok());
    for id in [6, u32::MAX] {
        let error = table.row_into(id, &mut row).unwrap_err();
        assert!(matches!(error, Error::TokenId { vocab_size: 6, .. }));
    }
}
