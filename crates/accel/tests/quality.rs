//! The built-in model on the simulated accelerator beside the float engine: the same weights, the same text.

use std::sync::Arc;

use mmfree::builtin;
use mmfree::checkpoint::Checkpoint;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::model::Model;
use mmfree::state::State;
use mmfree::tokenizer::Tokenizer;
use mmfree_accel::compare::compare;
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::generate::{Finish, generate};
use mmfree_accel::machine::Machine;

fn machine(checkpoint: &Checkpoint, configuration: &str, packing: Packing) -> Machine {
    let configuration = Configuration::preset(configuration).unwrap();
    let plan = Plan::new(checkpoint.config(), &configuration, packing).unwrap();
    Machine::new(plan.image(checkpoint, &mut |_, _| {}).unwrap())
}

/// A trained model that takes a quarter of the built-in one's time.
fn small_checkpoint() -> Checkpoint {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/trained/model.gguf");
    Checkpoint::open(path).unwrap()
}

fn prose(checkpoint: &Checkpoint) -> Vec<u32> {
    let source = checkpoint.tokenizer().unwrap().unwrap();
    let text = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/tokenizers/pinocchio.txt"
    ))
    .unwrap();
    Tokenizer::from_source(&source).unwrap().encode(&text, true).unwrap()
}

#[test]
fn loss_is_within_one_percent_of_the_float_engine() {
    let checkpoint = builtin::checkpoint().unwrap();
    let tokens = prose(&checkpoint);
    let mut machine = machine(&checkpoint, "sim", Packing::T5);
    let model = Arc::new(Model::load(&checkpoint).unwrap());
    let mut state = State::new(&model);
    let mut engine = Engine::new(model, &EngineOptions::default()).unwrap();
    let tokens = &tokens[..tokens.len().min(300)];
    let found = compare(&mut engine, &mut state, &mut machine, tokens, &mut |_| {}).unwrap();
    println!("{found:?}");
    assert!((found.loss_ratio - 1.0).abs() < 0.01, "{found:?}");
    assert!(found.same_best_token > 0.95 && found.rms_share < 0.03, "{found:?}");
}

/// Cores, lanes, tiles and packing decide where and when, never what is computed.
#[test]
fn every_configuration_computes_the_same_logits() {
    let checkpoint = small_checkpoint();
    let mut first: Option<Vec<i32>> = None;
    for (name, packing) in
        [("sim", Packing::T5), ("sim", Packing::T2), ("d5005", Packing::T5), ("ecp5", Packing::T2)]
    {
        let mut machine = machine(&checkpoint, name, packing);
        for token in [1, 302, 201] {
            machine.run(token).unwrap();
        }
        let logits: Vec<i32> = machine.logits().collect();
        let best = (0..logits.len()).rev().max_by_key(|&id| logits[id]).unwrap();
        assert_eq!(machine.token() as usize, best, "{name}: argmax");
        assert_eq!(*first.get_or_insert_with(|| logits.clone()), logits, "{name} {packing:?}");
    }
}

#[test]
fn a_text_begins_anew_after_a_reset() {
    let checkpoint = small_checkpoint();
    let mut machine = machine(&checkpoint, "sim", Packing::T5);
    let image_shape =
        Plan::new(checkpoint.config(), machine.configuration(), Packing::T5).unwrap().shape();
    let mut texts = Vec::new();
    for _ in 0..2 {
        machine.reset_state();
        let mut ids = Vec::new();
        let finish = generate(&mut machine, image_shape, &[1, 302], 6, &[], None, &mut |id| {
            ids.push(id);
            Ok(true)
        });
        assert_eq!((finish.unwrap(), ids.len()), (Finish::MaxTokens, 6));
        texts.push(ids);
    }
    assert_eq!(texts[0], texts[1]);
    let outside = [checkpoint.config().vocab_size as u32];
    assert!(
        generate(&mut machine, image_shape, &outside, 1, &[], None, &mut |_| Ok(true)).is_err()
    );
}
