//! Lesson 5: a model's memory of a text has constant size, and can be kept.
//!
//! ```text
//! cargo run --release --example 05-state
//! ```

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mmfree::builtin;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::error::Result;
use mmfree::model::Model;
use mmfree::state::State;

fn main() -> Result<()> {
    let model = Arc::new(Model::load(&builtin::checkpoint()?)?);
    let mut engine = Engine::new(model.clone(), &EngineOptions::default())?;
    let cancel = AtomicBool::new(false);

    // Read a text in one go.
    let text: Vec<u32> = (100..164).collect();
    let mut state = State::new(&model);
    let expected = engine.prefill(&mut state, &text, &cancel)?.to_vec();

    // Read half of it, keep the state as bytes, and go on from them: in another process, for example.
    let mut state = State::new(&model);
    engine.prefill(&mut state, &text[..32], &cancel)?;
    let bytes = state.to_bytes(&model);
    println!("{} tokens in {} bytes", state.tokens_seen(), bytes.len());
    let mut state = State::from_bytes(&model, &bytes)?;
    assert_eq!(engine.prefill(&mut state, &text[32..], &cancel)?, expected);

    // However long the text, the state does not grow.
    engine.prefill(&mut state, &text.repeat(4), &cancel)?;
    assert_eq!(state.to_bytes(&model).len(), bytes.len());
    Ok(())
}

#[test]
fn the_lesson_runs() {
    main().unwrap();
}
