//! Tokens drawn on a GPU are those that the host draws from the same logits. Skipped, loudly, without a GPU.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mmfree::benchmark::DISTINCT_TOKENS;
use mmfree::engine::{Draw, Sequence, Want};
use mmfree::model::Model;
use mmfree::sampler::{Sampler, SamplingParams};
use mmfree::state::State;
use mmfree::text::generate::{Event, FinishReason, GenerateOptions, generate};
use mmfree_kernels::cuda::{Buffer, Device};
use mmfree_kernels::sampling::{Next, Params, Request, Sampling};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

#[path = "support/gpu.rs"]
mod support;

use support::{all_or_few, device, gpu};

for_each_model! {
    text_drawn_ahead_is_the_text_drawn_token_by_token
    batches_draw_what_each_sequence_draws
    a_step_computes_what_is_wanted_of_each_sequence
}

/// Sampling of every kind.
fn kinds() -> Vec<SamplingParams> {
    let all = SamplingParams::default;
    vec![
        all(),
        SamplingParams { temperature: 0.8, top_p: 0.95, ..all() },
        SamplingParams { temperature: 1.3, top_k: 40, ..all() },
        SamplingParams { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.02, ..all() },
        SamplingParams { temperature: 2.0, min_p: 0.1, ..all() },
        SamplingParams { top_k: 1, ..all() },
        SamplingParams { top_p: 1e-6, ..all() },
        SamplingParams { top_p: 0.999_999, ..all() },
        SamplingParams { min_p: 1.0, ..all() },
        SamplingParams { temperature: 1e-30, ..all() },
        SamplingParams { temperature: 1e30, top_k: 3, ..all() },
        SamplingParams { temperature: 0.0, ..all() },
        SamplingParams { repetition_penalty: 1.3, ..all() },
        SamplingParams { temperature: 0.0, repetition_penalty: 1.7, ..all() },
        SamplingParams { repetition_penalty: 0.6, repetition_window: 5, top_p: 0.5, ..all() },
        SamplingParams { repetition_penalty: 1.1, repetition_window: 0, top_k: 7, ..all() },
    ]
}

fn random_words(seed: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Logits of a row, of different kinds.
fn logits(kind: usize, vocab: usize, random: &mut ChaCha8Rng) -> Vec<f32> {
    let mut uniform = || (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
    let mut row: Vec<f32> = (0..vocab)
        .map(|id| match kind {
            0 => 16.0 * (uniform() + uniform() + uniform()) - 24.0,
            // Many ties.
            1 => (40.0 * uniform()).floor() / 4.0 - 5.0,
            2 => 0.0,
            // A few likely ones.
            3 => {
                if uniform() < 5.0 / vocab as f32 {
                    9.0
                } else {
                    -9.0
                }
            }
            4 => {
                if uniform() < 0.7 {
                    f32::NEG_INFINITY
                } else {
                    3.0 * uniform()
                }
            }
            5 => {
                if id % 2 == 0 {
                    -0.0
                } else {
                    0.0
                }
            }
            6 => 1e-3 * id as f32 / vocab as f32,
            // The repetition penalty must not make them infinite.
            _ => 1e38 * (2.0 * uniform() - 1.0),
        })
        .collect();
    row[vocab / 2] = row[vocab / 2].max(-7.0);
    row
}

/// Draws from rows, each with its parameters, logits and recent tokens.
fn draw<const DRAWS: usize>(
    device: &Arc<Device>,
    sampling: &mut Sampling,
    rows: &[(SamplingParams, Vec<f32>, Vec<u32>)],
) -> Vec<[u32; DRAWS]> {
    let all: Vec<f32> = rows.iter().flat_map(|(_, logits, _)| logits).copied().collect();
    let requests: Vec<Request> = rows
        .iter()
        .enumerate()
        .map(|(row, (p, _, recent))| Request {
            row,
            params: Params {
                penalty: p.repetition_penalty,
                window: p.repetition_window,
                ..Params::new(p.temperature, p.top_k, p.top_p, p.min_p)
            },
            recent,
            only_finite: false,
        })
        .collect();
    let mut words = vec![0; DRAWS * rows.len()];
    for (row, (params, ..)) in rows.iter().enumerate() {
        let mut random = random_words(params.seed);
        (0..DRAWS).for_each(|draw| words[draw * rows.len() + row] = random.next_u64());
    }
    let mut buffer = Buffer::from_slice(device, &all).expect("memory");
    sampling.begin(&requests, all.len() / rows.len(), DRAWS, &words).expect("fits");
    for draw in 0..DRAWS {
        buffer.write(0, &all).expect("fits");
        sampling.draw(&mut buffer, draw, Next::Host).expect("runs");
    }
    let found = sampling.drawn().expect("runs").expect("valid logits");
    (0..rows.len()).map(|row| std::array::from_fn(|draw| found[draw * rows.len() + row])).collect()
}

#[test]
fn the_device_draws_the_tokens_of_the_host() {
    let Some(device) = device() else { return };
    let mut sampling = Sampling::new(&device).expect("compiles");
    let mut random = random_words(99);
    let mut compared = 0;
    let vocabs = &[1, 2, 31, 33, 1000, 1023, 1025, 32000, 50_257, 128_257][..];
    for &vocab in all_or_few(vocabs, &[33, 1025]) {
        const DRAWS: usize = 4;
        let kinds = kinds();
        let rows: Vec<(SamplingParams, Vec<f32>, Vec<u32>)> = (0..8 * kinds.len())
            .map(|row| {
                let params = SamplingParams { seed: random.next_u64(), ..kinds[row / 8].clone() };
                let recent = (0..row % 70).map(|_| random.next_u32() % vocab as u32).collect();
                (params, logits(row % 8, vocab, &mut random), recent)
            })
            .collect();
        let expected: Vec<[u32; DRAWS]> = rows
            .iter()
            .map(|(params, logits, recent)| {
                let mut sampler = Sampler::new(params.clone()).expect("valid");
                let mut recent = recent.clone();
                std::array::from_fn(|_| {
                    let token = sampler.sample(&mut logits.clone(), &recent).expect("valid");
                    recent.push(token);
                    token
                })
            })
            .collect();
        // As many rows at a time as have clusters of eight, four and two blocks and a block each.
        for count in [all_or_few(3, 12), 20, 60, rows.len()] {
            for (rows, expected) in rows.chunks(count).zip(expected.chunks(count)) {
                compared += DRAWS * rows.len();
                let found = draw::<DRAWS>(&device, &mut sampling, rows);
                for ((row, expected), found) in rows.iter().zip(expected).zip(&found) {
                    assert_eq!(found, expected, "{count} rows of {vocab}: {:?}", row.0);
                }
            }
        }
    }
    println!("{compared} tokens are the same");
}

#[test]
fn invalid_logits_are_found_and_the_kernel_stays_usable() {
    let Some(device) = device() else { return };
    let mut sampling = Sampling::new(&device).expect("compiles");
    let mut run = |row: &[f32], only_finite: bool, params: Params| {
        let mut buffer = Buffer::from_slice(&device, row).expect("memory");
        let request = Request { row: 0, params, recent: &[], only_finite };
        sampling.begin(&[request], row.len(), 1, &[u64::MAX]).expect("fits");
        sampling.draw(&mut buffer, 0, Next::Host).expect("runs");
        sampling.drawn().expect("runs")
    };
    for params in [Params::new(1.0, 2, 0.9, 0.1), Params::new(0.0, 0, 1.0, 0.0)] {
        for (row, is_valid) in [
            (vec![1.0, f32::NAN, 0.0], false),
            (vec![f32::INFINITY, 1.0], false),
            (vec![f32::NEG_INFINITY; 40], false),
            (vec![f32::NEG_INFINITY, 1.0], true),
        ] {
            assert_eq!(run(&row, false, params), is_valid.then(|| vec![1]), "{row:?}");
            assert_eq!(run(&row, true, params), None, "{row:?}");
            assert!(run(&[0.0, 1.0], true, params).is_some());
        }
    }
    let long =
        Params { penalty: 1.5, window: Sampling::MAX_WINDOW + 1, ..Params::new(1.0, 0, 1.0, 0.0) };
    let request = Request { row: 0, params: long, recent: &[], only_finite: true };
    sampling.begin(&[request], 10, 1, &[0]).expect_err("too long a window");
    sampling.begin(&[], 10, 1, &[]).expect_err("no rows");
}

fn text_drawn_ahead_is_the_text_drawn_token_by_token(model: &Arc<Model>) {
    let Some(mut engine) = gpu(model) else { return };
    let vocab = model.config().vocab_size.min(DISTINCT_TOKENS) as u32;
    let prompt: Vec<u32> = (0..9).map(|i| (7 * i * i + 3) % vocab).collect();
    for (kind, params) in kinds().into_iter().enumerate().take(all_or_few(usize::MAX, 2)) {
        let params = SamplingParams { seed: kind as u64, ..params };
        let mut start = State::new(model);
        engine.prefill(&mut start, &prompt, &AtomicBool::new(false)).expect("runs");
        let bytes = start.to_bytes(model);
        let state = || State::from_bytes(model, &bytes).expect("own bytes");

        let (mut on_host, mut text) = (state(), prompt.clone());
        let mut sampler = Sampler::new(params.clone()).expect("valid");
        let counts = all_or_few(&[1, 16, 3, 30][..], &[1, 4, 2]);
        for _ in 0..counts.iter().sum() {
            let last = *text.last().expect("prompt");
            let logits = engine.decode(&mut on_host, last).expect("runs");
            let token = sampler.sample(logits, &text).expect("valid");
            text.push(token);
        }
        let expected = &text[prompt.len()..];

        let (mut ahead, mut found) = (state(), prompt.clone());
        let mut sampler = Sampler::new(params.clone()).expect("valid");
        for &count in counts {
            let last = *found.last().expect("prompt");
            let draw = Draw { sampler: &mut sampler, recent: &found };
            let drawn = engine.sample(&mut ahead, last, count, draw).expect("runs");
            found.extend(drawn);
        }
        assert_eq!(&found[prompt.len()..], expected, "{params:?}");
        assert!(ahead == on_host, "state, {params:?}");
        // The sampler and the decoder go on as if nothing had been drawn ahead.
        let last = *found.last().expect("prompt");
        let logits = engine.decode(&mut ahead, last).expect("runs").to_vec();
        assert!(logits == engine.decode(&mut on_host, last).expect("runs"));
        let greedy = engine.greedy(&mut ahead, 1, 5).expect("runs");
        assert_eq!(greedy, engine.greedy(&mut on_host, 1, 5).expect("runs"));
    }
}

#[test]
fn generation_ends_where_it_should_and_leaves_that_state() {
    let model = all_or_few(support::built_in as fn() -> _, support::odd_sizes)();
    let Some(mut engine) = gpu(&model) else { return };
    let prompt = [5u32, 9, 2];
    let sampling = SamplingParams { seed: 3, top_p: 0.95, ..SamplingParams::default() };
    let cancel = AtomicBool::new(false);
    let limits = &[(0, 99), (1, 99), (2, 99), (17, 99), (18, 99), (40, 21), (40, 17)][..];
    for &(limit, cancelled_at) in all_or_few(limits, &[(2, 99), (18, 99), (40, 17)]) {
        let options = GenerateOptions {
            max_tokens: Some(limit),
            sampling: sampling.clone(),
            ignore_eos: true,
            ..GenerateOptions::default()
        };
        let (mut state, mut tokens) = (State::new(&model), Vec::new());
        cancel.store(false, std::sync::atomic::Ordering::Relaxed);
        let generation = generate(
            &mut engine,
            &mut state,
            None,
            [Ok(prompt.to_vec())],
            &options,
            &cancel,
            &mut |event| {
                if let Event::Token(id) = event {
                    tokens.push(id);
                    let is_over = tokens.len() >= cancelled_at;
                    cancel.store(is_over, std::sync::atomic::Ordering::Relaxed);
                }
                Ok(())
            },
        );
        let generation = generation.expect("runs");
        let expected_count = (limit as usize).min(cancelled_at);
        assert_eq!(generation.generated_tokens as usize, expected_count);
        let is_cancelled = generation.finish == FinishReason::Cancelled;
        assert_eq!(is_cancelled, cancelled_at < 99);

        let (mut expected, mut text) = (State::new(&model), prompt.to_vec());
        let mut sampler = Sampler::new(sampling.clone()).expect("valid");
        let logits = engine.prefill(&mut expected, &prompt, &AtomicBool::new(false));
        let mut logits = logits.expect("runs").to_vec();
        for _ in 0..expected_count {
            let token = sampler.sample(&mut logits, &text).expect("valid");
            text.push(token);
            logits = engine.decode(&mut expected, token).expect("runs").to_vec();
        }
        assert_eq!(tokens, text[prompt.len()..], "{limit} tokens");
        assert!(state == expected, "the state after {expected_count} tokens of {limit}");
    }
}

fn batches_draw_what_each_sequence_draws(model: &Arc<Model>) {
    let Some(mut gpu) = gpu(model) else { return };
    let kinds = kinds();
    let vocab = model.config().vocab_size;
    let tokens: Vec<u32> = (0..kinds.len() as u32).map(|i| 3 * i % 60).collect();
    let recent: Vec<Vec<u32>> = tokens.iter().map(|&token| vec![1, 4, token]).collect();
    let new_states = || kinds.iter().map(|_| State::new(model)).collect::<Vec<_>>();
    let new_samplers = || {
        kinds
            .iter()
            .zip(0..)
            .map(|(params, seed)| Sampler::new(SamplingParams { seed, ..params.clone() }))
            .map(|sampler| sampler.expect("valid"))
            .collect::<Vec<_>>()
    };
    let (mut states, mut samplers) = (new_states(), new_samplers());
    let mut draws: Vec<Draw> = samplers
        .iter_mut()
        .zip(&recent)
        .map(|(sampler, recent)| Draw { sampler, recent })
        .collect();
    let mut states: Vec<&mut State> = states.iter_mut().collect();
    let found = gpu.sample_batch(&mut states, &tokens, 6, &mut draws).expect("runs");

    // Step by step, drawn by the host.
    let (mut states, mut samplers) = (new_states(), new_samplers());
    let (mut fed, mut texts) = (tokens.clone(), recent.clone());
    for step in found.chunks(kinds.len()) {
        let mut batch: Vec<_> = states
            .iter_mut()
            .zip(fed.chunks(1))
            .map(|(state, tokens)| Sequence { state, tokens })
            .collect();
        let logits = gpu.forward(&mut batch).expect("runs").to_vec();
        for (at, row) in logits.chunks(vocab).enumerate() {
            let token = samplers[at].sample(&mut row.to_vec(), &texts[at]).expect("valid");
            assert_eq!(step[at], token, "sequence {at}");
            texts[at].push(token);
        }
        fed = step.to_vec();
    }
}

fn a_step_computes_what_is_wanted_of_each_sequence(model: &Arc<Model>) {
    let Some(mut engine) = gpu(model) else { return };
    let vocab = model.config().vocab_size;
    let texts: [&[u32]; 6] = [&[1], &[2, 3, 4], &[5], &[6], &[7, 8], &[9]];
    // So many steps take one launch, if something is wanted of each.
    let steps: [&[u32]; 12] = [&[10]; 12];
    let params = SamplingParams { temperature: 0.9, top_p: 0.9, seed: 8, ..Default::default() };
    for (texts, wanted) in [
        (&texts[..], "TLNTTL"),
        (&texts, "LLLNNT"),
        (&texts, "NNNNNN"),
        (&texts[..1], "T"),
        (&texts[..1], "L"),
        (&texts[..1], "N"),
        (&steps, "TLTTTTLLTTTT"),
        (&steps, "TLTTTTLNTTTT"),
    ] {
        let new_states = || texts.iter().map(|_| State::new(model)).collect::<Vec<_>>();
        let (mut states, mut plain) = (new_states(), new_states());
        fn batch<'a>(states: &'a mut [State], texts: &'a [&[u32]]) -> Vec<Sequence<'a>> {
            let pairs = states.iter_mut().zip(texts);
            pairs.map(|(state, tokens)| Sequence { state, tokens }).collect()
        }
        let mut forward = batch(&mut plain, texts);
        let expected = engine.forward(&mut forward).expect("runs").to_vec();
        let new_sampler = || Sampler::new(params.clone()).expect("valid");
        let mut samplers: Vec<_> = texts.iter().map(|_| new_sampler()).collect();
        let mut wants: Vec<Want> = wanted
            .chars()
            .zip(&mut samplers)
            .map(|(want, sampler)| match want {
                'T' => Want::Token(Draw { sampler, recent: &[] }),
                'L' => Want::Logits,
                _ => Want::Nothing,
            })
            .collect();
        let mut drawing = batch(&mut states, texts);
        let drawn = engine.forward_and_draw(&mut drawing, &mut wants).expect("runs");
        let mut rows: Vec<Vec<f32>> = vec![Vec::new(); texts.len()];
        engine.for_each_row(&mut rows, &|row, logits| row.extend_from_slice(logits));
        for (at, want) in wanted.chars().enumerate() {
            let logits = &expected[at * vocab..][..vocab];
            let token = new_sampler().sample(&mut logits.to_vec(), &[]).expect("valid");
            assert_eq!(drawn[at], (want == 'T').then_some(token), "{wanted} {at}");
            assert!(want != 'L' || rows[at] == logits, "{wanted} {at}");
        }
        assert!(states == plain, "{wanted}: states");
    }
}
