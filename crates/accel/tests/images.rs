//! Program images from strangers, and models that do not fit.

use mmfree::builtin;
use mmfree::config::ModelConfig;
use mmfree_accel::asm::assemble;
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::image::{Image, Region, Shape};
use mmfree_accel::machine::Machine;
use proptest::prelude::*;

fn image(text: &str) -> Image {
    let configuration = Configuration::preset("tiny").unwrap();
    Image {
        streams: vec![vec![0x79; 64]; configuration.cores as usize],
        configuration,
        packing: Packing::T5,
        shape: Shape::default(),
        program: assemble("test", text).unwrap(),
        data: (0..100u8).collect(),
        data_bytes: 8192,
        state: Region { address: 4096, bytes: 128 },
        logits: Region::default(),
    }
}

const PROGRAM: &str = "seta a0, 0\nstream a0, 4\nload v0, a0, 8\nhalt";

/// With a checksum that fits, so that what is behind it is reached.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    Image::reseal(&mut bytes);
    bytes
}

#[test]
fn images_round_trip() {
    let image = image(PROGRAM);
    assert_eq!(Image::from_bytes("x", &image.to_bytes()).unwrap(), image);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program.mma");
    image.write(&path).unwrap();
    assert_eq!(Image::read(&path).unwrap(), image);
}

#[test]
fn damage_is_named() {
    let good = image(PROGRAM).to_bytes();
    let patched = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let huge = u64::MAX.to_le_bytes();
    for (what, bytes, expected) in [
        ("a foreign file", b"GGUF and more".to_vec(), "no program image"),
        ("an empty file", Vec::new(), "no program image"),
        ("half a header", good[..100].to_vec(), "cut off after 100 bytes"),
        ("a truncated file", good[..good.len() - 1].to_vec(), "truncated"),
        ("a longer file", [&good[..], &[0]].concat(), "truncated"),
        ("a flipped bit", patched(300, &[good[300] ^ 1]), "checksum"),
        ("another version", patched(8, &[9]), "version 9"),
        ("no cores", patched(16, &[0]), "cores is 0"),
        ("another packing", patched(44, &[7]), "packing 7"),
        ("a large program", patched(64, &[255, 255]), "65535 instructions"),
        ("sizes that overflow", patched(72, &huge), "too many"),
        ("streams that overflow", patched(88, &huge), "too many"),
        ("much memory", resealed(patched(80, &(1u64 << 40).to_le_bytes())), "data memory is"),
        ("little memory", resealed(patched(80, &[0, 0])), "data memory is"),
        ("state outside", resealed(patched(96, &huge)), "state's bytes at"),
        ("logits outside", resealed(patched(120, &huge)), "logits at"),
        ("no opcode", resealed(patched(256, &[127])), "instruction 0: there is no opcode 127"),
        ("an unused field", resealed(patched(256 + 4, &[1])), "seta cannot have 0x1 in field Va"),
    ] {
        let error = Image::from_bytes("file.mma", &bytes).expect_err(what).to_string();
        assert!(error.starts_with("file.mma: ") && error.contains(expected), "{what}: {error}");
    }
}

/// Whatever the machine refuses is an error with the instruction; nothing panics or runs for ever.
#[test]
fn impossible_programs_stop_with_an_error() {
    for (program, expected) in [
        ("silu v0, v0, 8", "no halt"),
        ("load v1023, a0, 8\nhalt", "words 1023 to 1026 of a vector memory of 1024"),
        ("seta a0, 63\nload v0, a0, 64\nhalt", "lie outside of 8192 bytes of data memory"),
        ("seta a0, 0xffffffff\nstore v0, a0, 2\nhalt", "outside of 8192 bytes"),
        ("add v0, v1, v4, 8\nhalt", "vd and va overlap"),
        ("mul v0, v0, v2, 8\nhalt", "vd and vb overlap"),
        ("mlgru v0, v4, v8, v6, 8\nhalt", "must not overlap"),
        ("silu v0, v0, 0\nhalt", "1 to 16383 elements, found 0"),
        ("silu v0, v0, 16384\nhalt", "found 16384"),
        ("quant s0, v0, s0, 514\nhalt", "do not fit a buffer of 512"),
        ("matvec v0, s0, 8, 8, t5\nhalt", "needs 8 bytes of weights a core, but 0 are left"),
        ("matvec v0, s0, 0, 8, t5\nhalt", "expected at least 1"),
        ("matvec v1020, s0, 8, 10, t5\nhalt", "do not fit vector memory"),
        ("stream a0, 9\nhalt", "outside of 64 bytes of weight memory"),
        ("stream a0, 4\nhalt", "were streamed and not used"),
        ("stream a0, 4\nstream a0, 4\nhalt", "weights left"),
        ("seta a0, 1\nstream a0, 1\nhalt", "outside of 64 bytes"),
        ("sets s0, v1023, 2\nhalt", "outside of vector memory"),
        ("loop 0xffffffff\nloop 0xffffffff\nend\nend\nhalt", "without a halt"),
    ] {
        let error = Machine::new(image(program)).run(0).expect_err(program).to_string();
        assert!(error.contains(expected), "{program:?}: {error}");
    }
}

#[test]
fn models_that_do_not_fit_say_what_to_change() {
    let plan = |size: &str, configuration: Configuration| {
        let model = ModelConfig::preset(size).unwrap();
        Plan::new(&model, &configuration, Packing::T5).map(|plan| plan.program.len())
    };
    let preset = |name| Configuration::preset(name).unwrap();
    for size in ["370m", "1.3b", "2.7b", "7b", "13b"] {
        plan(size, preset("d5005")).unwrap();
    }
    let error = plan("370m", preset("tiny")).unwrap_err().to_string();
    assert!(error.contains("activation_bytes is 512; choose at least 4096"), "{error}");
    let small = Configuration { vector_words: 128, ..preset("d5005") };
    let error = plan("1.3b", small).unwrap_err().to_string();
    assert!(error.contains("vector_words is 128; choose at least"), "{error}");
    let long = ModelConfig { intermediate_size: 20_000, ..ModelConfig::preset("370m").unwrap() };
    let error = Plan::new(&long, &preset("d5005"), Packing::T5).unwrap_err().to_string();
    assert!(error.contains("20000 elements"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A resealed image with random damage is refused, or runs, or stops with an error.
    #[test]
    fn random_damage_never_panics(damage in prop::collection::vec((0usize..700, any::<u8>()), 1..6)) {
        let mut bytes = image(PROGRAM).to_bytes();
        for (at, value) in damage {
            bytes[at] = value;
        }
        if let Ok(image) = Image::from_bytes("x", &resealed(bytes)) {
            let _ = Machine::new(image).run(3);
        }
    }
}

#[test]
fn the_builtin_model_fits_small_and_large_hardware() {
    let checkpoint = builtin::checkpoint().unwrap();
    for name in ["ecp5", "sim", "d5005"] {
        let configuration = Configuration::preset(name).unwrap();
        let plan = Plan::new(checkpoint.config(), &configuration, Packing::T5).unwrap();
        assert!(plan.vector_words_used <= configuration.vector_words as usize);
        let streamed = plan.stream_bytes * u64::from(configuration.cores) * 5;
        let weights = checkpoint.config().parameters().ternary as u64;
        assert!(
            streamed >= weights && streamed < weights * 103 / 100,
            "{name}: {streamed} {weights}"
        );
    }
}
