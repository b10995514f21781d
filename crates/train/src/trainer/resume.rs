//! Checkpoints of a run of any number of processes: process 0 reads and writes, the others give and get
//! their shards through it, so that a run can go on with another number of processes.

use std::path::PathBuf;

use super::{Corpus, DataParallel};
use crate::architecture::Architecture;
use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, Checkpoints, GuardState, State, Values};
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::log::RunLog;

/// Writes a checkpoint. Every process calls this; process 0 has the files. Returns the path on process 0.
pub(super) fn save<B: Backend + 'static>(
    files: Option<(&Checkpoints, &mut RunLog)>,
    step: u64,
    config: &TrainConfig,
    architecture: &Architecture,
    corpus: &Corpus,
    engine: &mut DataParallel<B>,
    guard: GuardState,
) -> Result<Option<PathBuf>> {
    let Some((checkpoints, log)) = files else {
        // The same exchanges as those of process 0, in its order.
        engine.read_moment(0, None)?;
        engine.read_moment(1, None)?;
        return match engine.any(0)? {
            0 => Ok(None),
            _ => Err(Error::Communication("process 0 could not write the checkpoint".to_owned())),
        };
    };
    let state = State::new(step, config, architecture.vocab_size(), &corpus.fingerprint(), guard);
    let mut exchanged = 0;
    let saved = log.sync().map_err(Error::from).and_then(|()| {
        let files = corpus.tokenizer_files();
        checkpoints.save(&state, architecture, &files, &mut |values, flat| match values {
            Values::Parameters => engine.read_parameters(flat),
            Values::FirstMoment | Values::SecondMoment => {
                exchanged += 1;
                engine.read_moment(exchanged - 1, Some(flat))
            }
        })
    });
    // After a failure the others still wait for the rest.
    for which in exchanged..2 {
        engine.read_moment(which, None)?;
    }
    engine.any(u8::from(saved.is_err()))?;
    saved.map(Some)
}

/// Sets weights and moments from a checkpoint, which process 0 has if there is one. Every process calls
/// this. Returns the step and the guard's memory.
pub(super) fn load<B: Backend + 'static>(
    checkpoint: Option<&Checkpoint>,
    config: &TrainConfig,
    architecture: &Architecture,
    corpus: &Corpus,
    engine: &mut DataParallel<B>,
    allow_changes: bool,
    len: usize,
) -> Result<Option<(u64, GuardState)>> {
    let found = checkpoint.map(|checkpoint| &checkpoint.state);
    if let (Some(state), Some(checkpoint)) = (found, checkpoint) {
        state.require(
            &checkpoint.path().display().to_string(),
            config,
            architecture.vocab_size(),
            &corpus.fingerprint(),
            allow_changes,
        )?;
    }
    let message = serde_json::to_vec(&found.map(|state| (state.step, state.guard)))
        .map_err(|error| Error::Invalid(error.to_string()))?;
    let messages = engine.communicator().gather_bytes(&message)?;
    let agreed: Option<(u64, GuardState)> = serde_json::from_slice(&messages[0])
        .map_err(|error| Error::Communication(format!("process 0 sent no state: {error}")))?;
    if agreed.is_none() {
        return Ok(None);
    }
    let mut flat = vec![0.0; len];
    for (values, moment) in [
        (Values::Parameters, None),
        (Values::FirstMoment, Some(0)),
        (Values::SecondMoment, Some(1)),
    ] {
        if let Some(checkpoint) = checkpoint {
            checkpoint.read(values, &mut flat)?;
        }
        match moment {
            None => engine.write_parameters(&flat)?,
            Some(which) => engine.write_moment(which, checkpoint.map(|_| &flat[..]))?,
        }
    }
    Ok(agreed)
}
