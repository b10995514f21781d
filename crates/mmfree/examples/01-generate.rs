//! Lesson 1: text out of a model.
//!
//! ```text
//! cargo run --release --example 01-generate
//! ```

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mmfree::builtin;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::error::{Error, Result};
use mmfree::model::Model;
use mmfree::sampler::SamplingParams;
use mmfree::state::State;
use mmfree::text::generate::{Event, GenerateOptions, generate};
use mmfree::tokenizer::Tokenizer;

fn main() -> Result<()> {
    // A checkpoint is weights, configuration and tokenizer. `Checkpoint::open` reads one from a path.
    let checkpoint = builtin::checkpoint()?;
    let source = checkpoint.tokenizer()?;
    let source = source.ok_or_else(|| Error::Invalid("the checkpoint has no tokenizer".into()))?;
    let tokenizer = Tokenizer::from_source(&source)?;

    // A model is immutable and can be shared; an engine runs it; a state is the memory of one text.
    let model = Arc::new(Model::load(&checkpoint)?);
    let mut engine = Engine::new(model.clone(), &EngineOptions::default())?;
    let mut state = State::new(&model);

    let prompt = tokenizer.encode("Once upon a time", true)?;
    let options = GenerateOptions {
        max_tokens: Some(40),
        sampling: SamplingParams { top_p: 0.9, seed: 1, ..Default::default() },
        ..Default::default()
    };
    // Another thread may set it to stop the generation.
    let cancel = AtomicBool::new(false);
    let mut text = String::new();
    let generation = generate(
        &mut engine,
        &mut state,
        Some(&tokenizer),
        [Ok(prompt)],
        &options,
        &cancel,
        &mut |event| {
            if let Event::Text(new) = event {
                text.push_str(new);
            }
            Ok(())
        },
    )?;
    println!("Once upon a time{text}");
    assert!(generation.generated_tokens <= 40);
    Ok(())
}

#[test]
fn the_lesson_runs() {
    main().unwrap();
}
