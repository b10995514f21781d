//! Recurrent states in files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use mmfree::model::Model;
use mmfree::output::OutputFile;
use mmfree::state::State;

/// What a state file may have besides the state itself, in bytes.
const MAX_OVERHEAD: u64 = 1 << 20;

/// Reads a state that belongs to a model.
pub fn load(model: &Model, path: &Path) -> Result<State> {
    let context = || format!("cannot load the state {}", path.display());
    let config = model.config();
    let limit = (config.num_hidden_layers * config.hidden_size * 4) as u64 + MAX_OVERHEAD;
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(context)?;
    file.take(limit + 1).read_to_end(&mut bytes).with_context(context)?;
    ensure!(
        bytes.len() as u64 <= limit,
        "{}: it has more than {limit} bytes, more than any state of this model",
        context()
    );
    State::from_bytes(model, &bytes).with_context(context)
}

/// Writes a state into a file that was begun for it.
pub fn save(model: &Model, state: &State, mut file: OutputFile) -> Result<()> {
    file.put(&state.to_bytes(model))?;
    Ok(file.commit()?)
}
