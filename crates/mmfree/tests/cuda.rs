//! The engine on a GPU against the engine on the processor: prompts and most batches give the same bits, decoding of one
//! sequence, and of some with one launch a step, logits within a budget. Skipped, loudly, without a GPU.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mmfree::benchmark::DISTINCT_TOKENS;
use mmfree::engine::{Activation, Engine, EngineOptions, Sequence};
use mmfree::error::Error;
use mmfree::model::Model;
use mmfree::state::State;

#[path = "support/gpu.rs"]
mod support;

use support::{all_or_few, engine, gpu};

for_each_model! {
    prompts_give_the_bits_of_the_processor_and_decoding_stays_close
    batches_agree_with_the_processor
    logits_and_activations_of_every_position_agree
    greedy_text_agrees_and_states_move_between_devices
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    let vocab = model.config().vocab_size.min(DISTINCT_TOKENS);
    (0..count).map(|i| ((i * i * 37 + 11 * i + 5) % vocab) as u32).collect()
}

/// Of decoding: the difference of logits, and of states, in units of their spread (RMS). A last bit can flip the rounding of
/// an activation, and flips spread: two correct evaluations, in f32 and f64, are 0.014 apart for the trained model.
const BUDGET: f32 = 0.1;
/// How far below the largest logit the chosen one may be, in the same units.
const GAP: f32 = 0.3;

fn spread(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / values.len() as f32).sqrt()
}

/// RMS of the difference in units of the spread of the expected.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let squares = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
    (squares / found.len() as f32).sqrt() / spread(expected)
}

/// Feeds the first token and then those that were chosen, and checks that each was as good as the most likely one.
fn follow(cpu: &mut Engine, state: &mut State, first: u32, chosen: &[u32]) {
    let mut token = first;
    for (step, &next) in chosen.iter().enumerate() {
        let logits = cpu.decode(state, token).expect("runs");
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let (gap, unit) = (largest - logits[next as usize], spread(logits));
        // All logits are zero behind a token whose embedding is.
        assert!(gap <= GAP * unit, "step {step} chose {next}, {gap} of {unit} too low");
        token = next;
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn prompts_give_the_bits_of_the_processor_and_decoding_stays_close(model: &Arc<Model>) {
    let cancel = AtomicBool::new(false);
    let Some(mut gpu) = gpu(model) else { return };
    let mut cpu = engine(model, "cpu");
    println!("{} against {}", gpu.describe(), cpu.describe());
    let text = tokens(model, all_or_few(300, 12));
    let mut expected_state = State::new(model);
    let expected = bits(cpu.prefill(&mut expected_state, &text, &cancel).expect("runs"));

    let mut state = State::new(model);
    let found = bits(gpu.prefill(&mut state, &text, &cancel).expect("runs"));
    assert!(found == expected, "prefill");
    assert!(bits(state.hidden()) == bits(expected_state.hidden()), "state of prefill");
    assert_eq!(state.to_bytes(model), expected_state.to_bytes(model));

    for chunk in all_or_few(&[3, 9, 20, 50, 100, 130][..], &[3, 9]) {
        let mut state = State::new(model);
        let mut found = Vec::new();
        for chunk in text.chunks(*chunk) {
            found = bits(gpu.prefill(&mut state, chunk, &cancel).expect("runs"));
        }
        assert!(found == expected, "chunks of {chunk}");
        assert!(state == expected_state, "state of chunks of {chunk}");
    }

    let (mut state, mut on_cpu) = (State::new(model), State::new(model));
    let (mut worst, mut sum) = (0.0f32, 0.0f32);
    for &token in &text {
        let expected = cpu.decode(&mut on_cpu, token).expect("runs").to_vec();
        let found = gpu.decode(&mut state, token).expect("runs");
        let off = distance(found, &expected);
        worst = worst.max(off);
        sum += off;
    }
    let of_state = distance(state.hidden(), on_cpu.hidden());
    let mean = sum / text.len() as f32;
    println!("decoding is off by {mean} ({worst} at worst), its state by {of_state}");
    assert!(mean <= BUDGET && of_state <= BUDGET, "token by token");
}

/// Whether a step of so many sequences may take no launch for each product, as on Hopper.
fn is_whole_step(model: &Model, lengths: &[usize]) -> bool {
    let config = model.config();
    let has_whole_tiles =
        config.hidden_size.is_multiple_of(128) && config.intermediate_size.is_multiple_of(16);
    has_whole_tiles && lengths.len() <= 256 && lengths.iter().all(|&length| length == 1)
}

fn batches_agree_with_the_processor(model: &Arc<Model>) {
    let Some(mut gpu) = gpu(model) else { return };
    let mut cpu = engine(model, "cpu");
    let text = tokens(model, 800);
    let steps = all_or_few(&[2, 7, 33, 70, 200, 260][..], &[7, 33, 200]);
    let mut batches: Vec<_> = steps.iter().map(|&count| vec![1; count]).collect();
    batches.push(vec![1, 40, 1, 300, 5, 9]);
    for lengths in batches {
        let run = |engine: &mut Engine| {
            let mut states: Vec<State> = lengths.iter().map(|_| State::new(model)).collect();
            let mut logits = Vec::new();
            // Twice, so that the second pass begins with states that the first left.
            for round in 0..2 {
                let mut batch: Vec<_> = states
                    .iter_mut()
                    .zip(&lengths)
                    .enumerate()
                    .map(|(at, (state, &length))| Sequence {
                        state,
                        tokens: &text[3 * at + round..][..length],
                    })
                    .collect();
                logits = bits(engine.forward(&mut batch).expect("runs"));
            }
            (logits, states)
        };
        let (expected, expected_states) = run(&mut cpu);
        let (found, states) = run(&mut gpu);
        if !is_whole_step(model, &lengths) {
            assert!(found == expected, "logits of {lengths:?}");
            assert!(states == expected_states, "states of {lengths:?}");
            continue;
        }
        let logits = |bits: &[u32]| bits.iter().map(|&x| f32::from_bits(x)).collect::<Vec<_>>();
        let vocab = model.config().vocab_size;
        let (expected, found) = (logits(&expected), logits(&found));
        let rows = found.chunks(vocab).zip(expected.chunks(vocab));
        let off = rows.map(|(found, expected)| distance(found, expected)).fold(0.0, f32::max);
        let states = states.iter().zip(&expected_states);
        let of_states = states
            .map(|(found, expected)| distance(found.hidden(), expected.hidden()))
            .fold(0.0, f32::max);
        let count = lengths.len();
        println!("{count} sequences are off by {off} at worst, states by {of_states}");
        assert!(off <= BUDGET && of_states <= BUDGET, "{lengths:?}");
    }
}

fn logits_and_activations_of_every_position_agree(model: &Arc<Model>) {
    let Some(mut gpu) = gpu(model) else { return };
    let mut cpu = engine(model, "cpu");
    let text = tokens(model, 45);
    let run = |engine: &mut Engine| {
        let mut seen: Vec<(usize, Option<Activation>, Vec<u32>)> = Vec::new();
        engine
            .logits(&mut State::new(model), &text, &mut |position, logits| {
                seen.push((position, None, bits(logits)));
                Ok(())
            })
            .expect("runs");
        engine
            .observe(&mut State::new(model), &text, &mut |layer, what, values| {
                seen.push((layer, Some(what), bits(values)));
            })
            .expect("runs");
        seen
    };
    let (expected, found) = (run(&mut cpu), run(&mut gpu));
    assert_eq!(expected.len(), found.len());
    for (expected, found) in expected.iter().zip(&found) {
        assert!(expected == found, "{} {:?}", expected.0, expected.1);
    }
}

fn greedy_text_agrees_and_states_move_between_devices(model: &Arc<Model>) {
    let Some(mut gpu) = gpu(model) else { return };
    let mut cpu = engine(model, "cpu");
    let cancel = AtomicBool::new(false);
    let prompt = tokens(model, 12);
    let (mut on_cpu, mut on_gpu) = (State::new(model), State::new(model));
    cpu.prefill(&mut on_cpu, &prompt, &cancel).expect("runs");
    gpu.prefill(&mut on_gpu, &prompt, &cancel).expect("runs");
    assert!(on_cpu == on_gpu, "prompt");
    let before = on_gpu.to_bytes(model);
    let chosen = gpu.greedy(&mut on_gpu, 3, all_or_few(300, 6)).expect("runs");
    follow(&mut cpu, &mut on_cpu, 3, &chosen);
    let off = distance(on_gpu.hidden(), on_cpu.hidden());
    assert!(off <= BUDGET, "states are {off} apart");
    // Step by step the same bits as in few launches.
    let mut again = State::from_bytes(model, &before).expect("own bytes");
    let mut token = 3;
    for &next in &chosen {
        let logits = gpu.decode(&mut again, token).expect("runs");
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        token = logits.iter().position(|&logit| logit == best).expect("one") as u32;
        assert_eq!(token, next);
    }
    assert!(again == on_gpu, "one launch and many");
    // Through bytes to the other device, and on.
    let mut moved = State::from_bytes(model, &on_gpu.to_bytes(model)).expect("own bytes");
    let next = gpu.greedy(&mut on_gpu, 7, 5).expect("runs");
    follow(&mut cpu, &mut moved, 7, &next);
    let mut moved = State::from_bytes(model, &on_cpu.to_bytes(model)).expect("own bytes");
    let next = gpu.greedy(&mut moved, 7, 5).expect("runs");
    follow(&mut cpu, &mut on_cpu, 7, &next);

    for &count in all_or_few(&[2, 9, 40, 130][..], &[9, 40]) {
        let first: Vec<u32> = tokens(model, count);
        let mut states: Vec<State> = first.iter().map(|_| State::new(model)).collect();
        let mut states: Vec<_> = states.iter_mut().collect();
        let chosen = gpu.greedy_batch(&mut states, &first, all_or_few(6, 2)).expect("runs");
        for (number, &first) in first.iter().enumerate() {
            let own: Vec<u32> = chosen.iter().skip(number).step_by(count).copied().collect();
            follow(&mut cpu, &mut State::new(model), first, &own);
        }
        // Step by step the same tokens as in one launch.
        let mut again: Vec<State> = first.iter().map(|_| State::new(model)).collect();
        let mut fed = first.clone();
        for step in chosen.chunks(count) {
            let tokens = fed.chunks(1);
            let mut batch: Vec<_> = again
                .iter_mut()
                .zip(tokens)
                .map(|(state, tokens)| Sequence { state, tokens })
                .collect();
            let logits = gpu.forward(&mut batch).expect("runs");
            for (row, &token) in logits.chunks(model.config().vocab_size).zip(step) {
                let best = row.iter().copied().fold(f32::MIN, f32::max);
                let first = row.iter().position(|&logit| logit == best).expect("one");
                assert_eq!(first as u32, token, "{count} sequences");
            }
            fed = step.to_vec();
        }
    }
}

#[test]
fn wrong_calls_are_errors_and_leave_the_engine_usable() {
    let model = support::tiny();
    let no_such = EngineOptions { threads: None, backend: Some("cuda:4095".to_owned()) };
    let error = Engine::new(Arc::clone(&model), &no_such).expect_err("no such GPU").to_string();
    assert!(error.contains("4095") || error.contains("libcuda"), "{error}");
    for bad in ["cuda:", "cuda:x", "cuda:-1"] {
        let options = EngineOptions { threads: None, backend: Some(bad.to_owned()) };
        let error = Engine::new(Arc::clone(&model), &options).expect_err("bad name");
        assert!(error.to_string().contains("cuda:N"), "{error}");
    }
    let Some(mut gpu) = gpu(&model) else { return };
    let mut state = State::new(&model);
    assert!(matches!(gpu.decode(&mut state, 97), Err(Error::TokenId { .. })));
    assert_eq!(state, State::new(&model));
    gpu.decode(&mut state, 96).expect("runs");
}
