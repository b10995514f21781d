//! The engine against what the authors' implementation computed: `tests/fixtures/tiny` (random weights,
//! every recorded tensor) and `tests/fixtures/trained` (the built-in model's source).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mmfree::checkpoint::Checkpoint;
use mmfree::engine::{Activation, Engine, EngineOptions, Sequence};
use mmfree::model::Model;
use mmfree::state::State;
use mmfree_kernels::tier::Tier;
use safetensors::SafeTensors;
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

struct Golden(Vec<u8>);

impl Golden {
    fn read(name: &str) -> Self {
        Self(std::fs::read(fixture(name)).expect("fixture"))
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).expect("safetensors");
        let data = tensors.tensor(name).expect(name).data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// Token ids [B, T].
    fn sequences(&self) -> Vec<Vec<u32>> {
        let tensors = SafeTensors::deserialize(&self.0).expect("safetensors");
        let tensor = tensors.tensor("input_ids").expect("input_ids");
        let ids = tensor.data().chunks_exact(4);
        let ids: Vec<u32> = ids.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        ids.chunks(tensor.shape()[1]).map(<[u32]>::to_vec).collect()
    }
}

fn tiny() -> Arc<Model> {
    Arc::new(Model::load(&Checkpoint::open(fixture("tiny")).expect("opens")).expect("loads"))
}

fn trained() -> Arc<Model> {
    Arc::new(
        Model::load(&Checkpoint::open(fixture("trained/model.gguf")).expect("opens"))
            .expect("loads"),
    )
}

fn engine(model: &Arc<Model>, threads: usize) -> Engine {
    let options = EngineOptions { threads: Some(threads), ..EngineOptions::default() };
    let engine = Engine::new(Arc::clone(model), &options).expect("engine");
    println!("{}", engine.describe());
    engine
}

/// Demands `|found − expected| ≤ 1e-5` everywhere and prints the worst.
fn within_1e_5(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
    println!("{what}: worst difference {worst:.2e}");
    assert!(worst <= 1e-5, "{what}: worst difference {worst:.2e}");
    assert!(found.iter().all(|f| f.is_finite()), "{what}: not finite");
}

#[test]
#[should_panic(expected = "worst difference")]
fn the_budget_rejects_a_wrong_value() {
    within_1e_5("probe", &[1.0, 2.0], &[1.0, 2.000_1]);
}

#[test]
fn every_recorded_tensor_of_tiny_agrees() {
    let golden = Golden::read("tiny/activations.safetensors");
    let model = tiny();
    let mut engine = engine(&model, 2);
    let (layers, width) = (model.config().num_hidden_layers, model.config().hidden_size);
    let names = |layer: usize, what: Activation| match what {
        Activation::TokenMixerOutput => format!("layer.{layer}.token_mixer_output"),
        Activation::ChannelMixerOutput => format!("layer.{layer}.channel_mixer_output"),
        Activation::BlockOutput => format!("layer.{layer}.output"),
    };
    let (mut all_logits, mut states) = (Vec::new(), Vec::new());
    let sequences = golden.sequences();
    for (b, tokens) in sequences.iter().enumerate() {
        let mut seen = 0;
        engine
            .observe(&mut State::new(&model), tokens, &mut |layer, what, found| {
                let name = names(layer, what);
                let expected = golden.floats(&name);
                let size = expected.len() / sequences.len();
                within_1e_5(&name, found, &expected[b * size..][..size]);
                seen += 1;
            })
            .expect("runs");
        assert_eq!(seen, 3 * layers);
        let mut state = State::new(&model);
        engine
            .logits(&mut state, tokens, &mut |_, logits| {
                all_logits.extend_from_slice(logits);
                Ok(())
            })
            .expect("runs");
        states.push(state);
    }
    within_1e_5("logits", &all_logits, &golden.floats("logits"));
    within_1e_5("decode_logits", &all_logits, &golden.floats("decode_logits"));
    // Recorded as [L, B, 1, D].
    let final_state: Vec<f32> = (0..layers)
        .flat_map(|layer| states.iter().map(move |state| &state.hidden()[layer * width..][..width]))
        .flatten()
        .copied()
        .collect();
    within_1e_5("final_state", &final_state, &golden.floats("final_state"));
    let vocab = model.config().vocab_size;
    let losses: Vec<f64> = all_logits
        .chunks(vocab * sequences[0].len())
        .zip(&sequences)
        .flat_map(|(logits, tokens)| token_losses(logits, tokens, vocab))
        .collect();
    let loss = losses.iter().sum::<f64>() / losses.len() as f64;
    within_1e_5("loss", &[loss as f32], &golden.floats("loss"));
}

/// Cross-entropy of each next token.
fn token_losses(logits: &[f32], tokens: &[u32], vocab: usize) -> Vec<f64> {
    let next = tokens.iter().skip(1);
    logits.chunks(vocab).zip(next).map(|(logits, &id)| -log_probability(logits, id)).collect()
}

fn log_probability(logits: &[f32], id: u32) -> f64 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    f64::from(logits[id as usize] - largest) - sum.ln()
}

/// Best token and its lead over the second.
fn best(logits: &[f32]) -> (u32, f32) {
    let (mut best, mut second) = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate().skip(1) {
        if logit > logits[best] {
            (second, best) = (logits[best], id);
        } else {
            second = second.max(logit);
        }
    }
    (best as u32, logits[best] - second)
}

/// Follows a recorded greedy continuation: wherever the recorded lead exceeds `gap` the engine must choose
/// the same token. The recorded token is fed in any case, so that one near-tie does not hide the rest.
fn follow_greedy(engine: &mut Engine, prompt: &[u32], greedy: &[u32], gaps: &[f64], gap: f64) {
    assert_eq!(greedy.len(), gaps.len());
    let model = Arc::clone(engine.model());
    let mut state = State::new(&model);
    let mut logits = engine.prefill(&mut state, prompt, &AtomicBool::new(false)).expect("runs");
    let mut compared = 0;
    for (at, (&token, &recorded_gap)) in greedy.iter().zip(gaps).enumerate() {
        let (found, lead) = best(logits);
        if recorded_gap > gap {
            assert_eq!(found, token, "token {at}, recorded lead {recorded_gap}, found lead {lead}");
            compared += 1;
        }
        logits = engine.decode(&mut state, token).expect("runs");
    }
    println!("compared {compared} of {} tokens", greedy.len());
    assert!(compared * 2 > greedy.len(), "too few tokens have a clear lead: {compared}");
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).expect("fixture")).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

fn numbers(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).expect("numbers")
}

#[test]
fn the_greedy_continuation_of_tiny_agrees() {
    let expected = json("tiny/expected.json");
    let prompt = ids(&expected["prompt"]);
    let greedy = ids(&expected["greedy"]);
    // The recorded continuation includes the prompt.
    let continuation = &greedy[prompt.len()..];
    let gaps = numbers(&expected["top2_gap"]);
    follow_greedy(&mut engine(&tiny(), 1), &prompt, continuation, &gaps, 2e-5);
}

#[test]
fn the_trained_model_agrees_in_logits_loss_and_greedy_text() {
    let golden = Golden::read("trained/expected.safetensors");
    let model = trained();
    let mut engine = engine(&model, 2);
    let vocab = model.config().vocab_size;
    let (recorded, log_probabilities) =
        (golden.floats("logits_last32"), golden.floats("token_logprob"));
    let sequences = golden.sequences();
    let tail = recorded.len() / vocab / sequences.len();
    let (mut squares, mut agree, mut clear) = (0.0f64, 0, 0);
    let mut loss = 0.0;
    for (b, tokens) in sequences.iter().enumerate() {
        let recorded = &recorded[b * tail * vocab..][..tail * vocab];
        engine
            .logits(&mut State::new(&model), tokens, &mut |position, logits| {
                if let Some(&next) = tokens.get(position + 1) {
                    loss -= log_probability(logits, next);
                }
                if let Some(at) = (position + tail).checked_sub(tokens.len()) {
                    let expected = &recorded[at * vocab..][..vocab];
                    squares += logits
                        .iter()
                        .zip(expected)
                        .map(|(f, e)| f64::from(f - e).powi(2))
                        .sum::<f64>();
                    if best(expected).1 > 0.3 {
                        clear += 1;
                        agree += usize::from(best(expected).0 == best(logits).0);
                    }
                }
                Ok(())
            })
            .expect("runs");
    }
    let count = recorded.len() as f64;
    let mean = recorded.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let deviation =
        (recorded.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count).sqrt();
    let rms = (squares / count).sqrt() / deviation;
    let recorded_loss = -log_probabilities.iter().map(|&p| f64::from(p)).sum::<f64>();
    let difference = (loss / recorded_loss - 1.0).abs();
    println!(
        "RMS {:.3} % of the deviation, loss off by {:.4} %, {agree} of {clear} clear tokens",
        rms * 100.0,
        difference * 100.0
    );
    assert!(rms < 0.02, "logits differ by {:.2} % RMS of their deviation", rms * 100.0);
    assert!(difference < 0.002, "loss {loss} instead of {recorded_loss}");
    assert!(clear > 20 && agree == clear, "{agree} of {clear} tokens with a clear lead agree");

    let expected = json("trained/expected.json");
    for generation in expected["generations"].as_array().expect("generations") {
        let (prompt, greedy) = (ids(&generation["prompt_ids"]), ids(&generation["greedy_ids"]));
        follow_greedy(&mut engine, &prompt, &greedy, &numbers(&generation["top2_gap"]), 0.3);
    }
}

/// One pass, token by token, in chunks, beside others, on any number of threads: the same bits.
#[test]
fn prefill_equals_decode_equals_any_chunks_to_the_bit() {
    let model = tiny();
    let tokens: Vec<u32> = (0..700).map(|i| (i * i + 3 * i + 11) % 97).collect();
    let cancel = AtomicBool::new(false);
    let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let mut whole = State::new(&model);
    let expected = bits(engine(&model, 2).prefill(&mut whole, &tokens, &cancel).expect("runs"));
    for chunk in [1, 2, 7, 31, 32, 33, 255, 256, 300] {
        for threads in [1, 3] {
            let mut engine = engine(&model, threads);
            let mut state = State::new(&model);
            let mut found = Vec::new();
            for chunk in tokens.chunks(chunk) {
                found = bits(engine.prefill(&mut state, chunk, &cancel).expect("runs"));
            }
            assert_eq!(found, expected, "chunks of {chunk} on {threads} threads");
            assert_eq!(state, whole);
        }
    }
    // Beside other sequences of other lengths.
    let mut engine = engine(&model, 2);
    let mut states = vec![State::new(&model); 5];
    let parts = [&tokens[..1], &tokens[..40], &tokens[..], &tokens[5..300], &tokens[8..10]];
    let mut batch: Vec<_> =
        states.iter_mut().zip(parts).map(|(state, tokens)| Sequence { state, tokens }).collect();
    let logits = bits(engine.forward(&mut batch).expect("runs"));
    assert_eq!(logits[2 * 97..3 * 97], expected);
    assert_eq!(states[2], whole);
    let mut alone = State::new(&model);
    let found = bits(engine.prefill(&mut alone, parts[3], &cancel).expect("runs"));
    assert_eq!(logits[3 * 97..4 * 97], found);
    assert_eq!(states[3], alone);
}

#[test]
fn every_tier_gives_the_same_bits() {
    let model = trained();
    let tokens: Vec<u32> = (0..45).map(|i| (i * i * 37 + 11) % 8192).collect();
    let mut first: Option<(Vec<u32>, State)> = None;
    for tier in Tier::available() {
        let options = EngineOptions { threads: Some(2), backend: Some(tier.name().to_owned()) };
        let mut engine = Engine::new(Arc::clone(&model), &options).expect("engine");
        assert_eq!(engine.backend(), tier.name());
        let mut state = State::new(&model);
        let logits = engine.prefill(&mut state, &tokens, &AtomicBool::new(false)).expect("runs");
        let bits = logits.iter().map(|x| x.to_bits()).collect();
        println!("{tier} ran");
        match &first {
            None => first = Some((bits, state)),
            Some((expected, expected_state)) => {
                assert!(*expected == bits && *expected_state == state, "{tier} differs");
            }
        }
    }
}

#[test]
fn a_state_survives_bytes_and_foreign_ones_are_refused() {
    let model = tiny();
    let mut engine = engine(&model, 1);
    let mut state = State::new(&model);
    engine.prefill(&mut state, &[1, 2, 3], &AtomicBool::new(false)).expect("runs");
    let bytes = state.to_bytes(&model);
    let mut restored = State::from_bytes(&model, &bytes).expect("restores");
    assert_eq!(restored, state);
    assert_eq!(restored.tokens_seen(), 3);
    let logits = engine.decode(&mut state, 5).expect("runs").to_vec();
    assert_eq!(engine.decode(&mut restored, 5).expect("runs"), logits);
    for len in 0..bytes.len() {
        State::from_bytes(&model, &bytes[..len]).expect_err("truncated");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        State::from_bytes(&model, &damaged).expect_err("damaged");
    }
    let other = trained();
    let error = State::from_bytes(&other, &bytes).expect_err("foreign");
    assert!(error.to_string().contains("8 of 384"), "{error}");
}

#[test]
fn wrong_tokens_are_errors_that_leave_the_state_alone() {
    let model = tiny();
    let mut engine = engine(&model, 1);
    let mut state = State::new(&model);
    let cancel = AtomicBool::new(false);
    assert!(engine.prefill(&mut state, &[], &cancel).is_err());
    let error = engine.prefill(&mut state, &[1, 97], &cancel).expect_err("97 is outside");
    assert!(error.to_string().contains("97"), "{error}");
    engine.decode(&mut state, u32::MAX).expect_err("outside");
    assert_eq!(state, State::new(&model));
    cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    engine.prefill(&mut state, &[1], &cancel).expect_err("cancelled");
    for options in [
        EngineOptions { threads: Some(0), backend: None },
        EngineOptions { threads: Some(1), backend: Some("mmx".to_owned()) },
    ] {
        Engine::new(Arc::clone(&model), &options).expect_err("impossible");
    }
}
