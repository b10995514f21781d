//! What is packed or written back is what was read.
#![allow(missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use mmfree::checkpoint::info::describe;
use mmfree::checkpoint::{
    Checkpoint, EmbeddingStorage, FloatType, PackOptions, TokenizerKind, pack,
};
use mmfree_kernels::ternary::tq::TqFormat;
use mmfree_kernels::ternary::{absmean_scale, quantize_trits};
use serde_json::json;
use support::{Sizes, Tensor, fixture, load, names_in, open, safetensors};
use tempfile::tempdir;

const FORMATS: [TqFormat; 2] = [TqFormat::Tq1_0, TqFormat::Tq2_0];

fn options(format: TqFormat) -> PackOptions {
    PackOptions { format, embeddings: EmbeddingStorage::Source, name: None }
}

fn packed(checkpoint: &Checkpoint, format: TqFormat, directory: &Path) -> Checkpoint {
    let path = directory.join(format!("{}.gguf", format.ggml_type()));
    pack(checkpoint, &path, &options(format), &mut |_, _| {}).unwrap();
    Checkpoint::open(path).unwrap()
}

#[test]
fn trits_are_those_of_the_quantiser() {
    let source = Checkpoint::open(fixture("tiny")).unwrap();
    let loaded = load(&source).unwrap();
    let sizes = Sizes { hidden: 64, intermediate: 160, vocab: 97, layers: 3 };
    for ((name, rows, cols), matrix) in sizes.ternary().iter().zip(&loaded.ternary) {
        let weights = source.matrix_f32(&format!("{name}.weight"), *rows, *cols).unwrap();
        let scale = absmean_scale(&weights).unwrap();
        assert_eq!(matrix.scale(), scale, "{name}");
        let (mut expected, mut found) = (vec![0; *cols], vec![9; *cols]);
        for (row, weights) in weights.chunks(*cols).enumerate() {
            quantize_trits(weights, scale, &mut expected);
            matrix.read_row(row, &mut found);
            assert_eq!(found, expected, "{name} row {row}");
        }
    }
}

#[test]
fn packed_models_hold_what_their_source_holds() {
    let directory = tempdir().unwrap();
    let odd = Sizes { hidden: 37, intermediate: 301, vocab: 53, layers: 2 };
    let wide = Sizes { hidden: 256, intermediate: 512, vocab: 17, layers: 1 };
    let mut sources = vec![Checkpoint::open(fixture("tiny")).unwrap()];
    for (sizes, float) in [
        (odd, FloatType::F32),
        (odd, FloatType::F16),
        (wide, FloatType::Bf16),
        (Sizes::SMALL, FloatType::F32),
    ] {
        sources.push(open(&sizes.config(), &sizes.tensors(float)).unwrap());
    }
    for source in &sources {
        let expected = load(source).unwrap();
        let models = FORMATS.map(|format| packed(source, format, directory.path()));
        for model in &models {
            assert!(model.is_packed());
            assert_eq!(model.config(), source.config());
            assert_eq!(load(model).unwrap(), expected);
            let (table, original) = (model.embeddings().unwrap(), source.embeddings().unwrap());
            assert_eq!(table.float_type(), original.float_type());
            assert_eq!(table.bytes(), original.bytes());
            model.release("lm_head.weight");
            assert_eq!(load(model).unwrap(), expected);
        }
        // From one packed format to the other and back is the same file.
        let path = directory.path().join("again.gguf");
        let again = PackOptions { name: Some("x".into()), ..options(TqFormat::Tq1_0) };
        pack(&models[1], &path, &again, &mut |_, _| {}).unwrap();
        let first = fs::read(&path).unwrap();
        pack(&models[0], &path, &again, &mut |_, _| {}).unwrap();
        assert_eq!(fs::read(&path).unwrap(), first);
    }
}

#[test]
fn a_model_without_lower_bounds_has_no_such_tensor() {
    let sizes = Sizes::SMALL;
    let mut config = sizes.config();
    config["use_lower_bound"] = json!(false);
    let mut tensors = sizes.tensors(FloatType::F32);
    assert!(open(&config, &tensors).is_err());
    tensors.retain(|tensor| tensor.name != "model.lower_bounds");
    let source = open(&config, &tensors).unwrap();
    let directory = tempdir().unwrap();
    let model = packed(&source, TqFormat::Tq2_0, directory.path());
    assert!(!model.config().use_lower_bound);
    assert_eq!(load(&model).unwrap(), load(&source).unwrap());
}

/// Writes a directory with two shards and every kind of tokenizer file.
fn write_sharded(directory: &Path) {
    let sizes = Sizes { hidden: 20, intermediate: 30, vocab: 40, layers: 2 };
    let tensors = sizes.tensors(FloatType::Bf16);
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut map = serde_json::Map::new();
    for (name, shard) in [("model-00001-of-00002", first), ("model-00002-of-00002", second)] {
        let file = format!("{name}.safetensors");
        fs::write(directory.join(&file), safetensors(shard)).unwrap();
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(file))));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    for (name, content) in [
        ("model.safetensors.index.json", index.to_string()),
        ("config.json", sizes.config().to_string()),
        ("tokenizer.json", r#"{ "version": "1.0" }"#.to_owned()),
        ("tokenizer.model", "pieces".to_owned()),
        ("tokenizer_config.json", r#"{"chat_template": "inner", "bos_token": "<s>"}"#.to_owned()),
        ("special_tokens_map.json", "{}".to_owned()),
    ] {
        fs::write(directory.join(name), content).unwrap();
    }
}

#[test]
fn shards_are_one_model() {
    let directory = tempdir().unwrap();
    write_sharded(directory.path());
    let source = Checkpoint::open(directory.path()).unwrap();
    let sizes = Sizes { hidden: 20, intermediate: 30, vocab: 40, layers: 2 };
    let single = open(&sizes.config(), &sizes.tensors(FloatType::Bf16)).unwrap();
    assert_eq!(load(&source).unwrap(), load(&single).unwrap());
}

#[test]
fn directories_are_written_back_bit_for_bit() {
    let directory = tempdir().unwrap();
    let (sharded, output) = (directory.path().join("in"), directory.path().join("out"));
    fs::create_dir(&sharded).unwrap();
    write_sharded(&sharded);
    for source in [sharded, fixture("tiny")] {
        let checkpoint = Checkpoint::open(&source).unwrap();
        checkpoint.write_hugging_face(&output).unwrap();
        let written = names_in(&output);
        assert!(written.contains(&"config.json".to_owned()));
        let weights = |names: &[String]| names.iter().filter(|n| n.contains("model")).count();
        assert!(weights(&written) > 0);
        for name in &written {
            let (was, is) = (fs::read(source.join(name)), fs::read(output.join(name)));
            assert_eq!(was.unwrap(), is.unwrap(), "{name}");
        }
        assert_eq!(load(&Checkpoint::open(&output).unwrap()).unwrap(), load(&checkpoint).unwrap());
        assert!(checkpoint.write_hugging_face(&output).is_err(), "an existing directory is kept");
        fs::remove_dir_all(&output).unwrap();
    }
    assert_eq!(names_in(directory.path()), ["in"]);
}

#[test]
fn tokenizers_travel_inside() {
    let directory = tempdir().unwrap();
    let source = directory.path().join("in");
    fs::create_dir(&source).unwrap();
    write_sharded(&source);
    let open_packed = || {
        let checkpoint = Checkpoint::open(&source).unwrap();
        packed(&checkpoint, TqFormat::Tq2_0, directory.path()).tokenizer().unwrap().unwrap()
    };
    let tokenizer = open_packed();
    assert_eq!(tokenizer.kind, TokenizerKind::HuggingFace(br#"{ "version": "1.0" }"#.to_vec()));
    assert_eq!(tokenizer.tokenizer_config.unwrap()["bos_token"], "<s>");
    assert_eq!(tokenizer.chat_template.as_deref(), Some("inner"));

    fs::remove_file(source.join("tokenizer.json")).unwrap();
    fs::write(source.join("tokenizer.model"), [0xff, 0x00, 0x80]).unwrap();
    fs::write(source.join("chat_template.jinja"), "outer").unwrap();
    let tokenizer = open_packed();
    assert_eq!(tokenizer.kind, TokenizerKind::SentencePiece(vec![0xff, 0x00, 0x80]));
    assert_eq!(tokenizer.chat_template.as_deref(), Some("outer"));

    fs::write(source.join("tokenizer_config.json"), [0xff]).unwrap();
    let checkpoint = Checkpoint::open(&source).unwrap();
    assert!(checkpoint.tokenizer().is_err());
    let output = directory.path().join("x.gguf");
    assert!(pack(&checkpoint, &output, &options(TqFormat::Tq2_0), &mut |_, _| {}).is_err());
    assert!(!output.exists());
}

#[test]
fn embeddings_are_converted_on_request_and_must_stay_finite() {
    let directory = tempdir().unwrap();
    let output = directory.path().join("x.gguf");
    let sizes = Sizes::SMALL;
    let mut tensors = sizes.tensors(FloatType::F32);
    let source = open(&sizes.config(), &tensors).unwrap();
    let expected = load(&source).unwrap();
    for float in [FloatType::F16, FloatType::Bf16, FloatType::F32] {
        let as_float =
            PackOptions { embeddings: EmbeddingStorage::As(float), ..options(TqFormat::Tq2_0) };
        pack(&source, &output, &as_float, &mut |_, _| {}).unwrap();
        let model = Checkpoint::open(&output).unwrap();
        let table = model.embeddings().unwrap();
        assert_eq!(table.float_type(), float);
        let rounded = Tensor::new("", float, &[expected.embeddings.len()], &expected.embeddings);
        assert_eq!(table.bytes(), rounded.data);
    }
    fs::remove_file(&output).unwrap();
    tensors[0].data[4..8].copy_from_slice(&1e6f32.to_le_bytes());
    let source = open(&sizes.config(), &tensors).unwrap();
    let halves = PackOptions {
        embeddings: EmbeddingStorage::As(FloatType::F16),
        ..options(TqFormat::Tq2_0)
    };
    let error = pack(&source, &output, &halves, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("model.embeddings.weight: value 1 is inf"), "{error}");
    assert_eq!(names_in(directory.path()), [""; 0]);
}

#[test]
fn no_model_is_written_over_itself() {
    let directory = tempdir().unwrap();
    let source = directory.path().join("in");
    fs::create_dir(&source).unwrap();
    write_sharded(&source);
    let before = names_in(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    for name in ["config.json", "model-00002-of-00002.safetensors"] {
        let output = source.join("../in").join(name);
        let error = pack(&checkpoint, &output, &options(TqFormat::Tq1_0), &mut |_, _| {});
        assert!(error.unwrap_err().to_string().contains("is a file of the model"));
    }
    assert!(checkpoint.write_hugging_face(&source).is_err());
    let model = packed(&checkpoint, TqFormat::Tq1_0, directory.path());
    let own = directory.path().join("34.gguf");
    assert!(pack(&model, &own, &options(TqFormat::Tq2_0), &mut |_, _| {}).is_err());
    assert!(model.write_hugging_face(&directory.path().join("out")).is_err());
    assert_eq!(names_in(&source), before);
}

#[test]
fn the_description_adds_up() {
    let model = mmfree::builtin::checkpoint().unwrap();
    let mut last = (0, 0);
    let info = describe(&model, &mut |done, total| last = (done, total)).unwrap();
    assert_eq!(last, (72_351_744, 72_351_744));
    let (parameters, bytes) = (info.parameters, info.bytes);
    assert_eq!(parameters.total, 76_669_952);
    assert_eq!(
        parameters.total,
        parameters.ternary + parameters.embeddings + parameters.norms + parameters.lower_bounds
    );
    let stored: usize = info.tensors.iter().map(|tensor| tensor.bytes).sum();
    let scales = 4 * info.tensors.iter().filter(|tensor| tensor.scale.is_some()).count();
    assert_eq!(stored + scales + bytes.other, bytes.total);
    assert!((0.2..0.5).contains(&info.zero_share));
    assert_eq!(info.tokenizer, Some("tokenizer.json"));
    let source = Checkpoint::open(fixture("tiny")).unwrap();
    let info = describe(&source, &mut |_, _| {}).unwrap();
    assert_eq!(info.bits_per_ternary_weight, 32.0);
}
