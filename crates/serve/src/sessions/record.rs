//! A session as bytes.

use mmfree::model::Model;
use mmfree::state::State;
use twox_hash::XxHash3_64;

/// What a session remembers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Session {
    /// Behind everything that was read.
    pub state: State,
    /// Tokens that were drawn and not read yet: they come first in the next turn. At most one.
    pub unread: Vec<u32>,
    /// Whether the last reply ended with a stop string, which the model has then read or will read as part
    /// of `unread`.
    pub has_seen_stop: bool,
}

/// Begins a session.
const MAGIC: [u8; 8] = *b"MMFSESS1";
const HEADER_BYTES: usize = 8 + 1 + 1 + 4;
const CHECKSUM_BYTES: usize = 8;
/// Larger than any value that a model computes (they are averages of activations) and small enough that
/// its squares sum to a finite number: a state from outside cannot make a step fail that others share.
const MAX_HIDDEN: f32 = 1e6;

impl Session {
    /// A session that begins with a state from outside.
    pub(crate) fn new(state: State) -> Self {
        Self { state, unread: Vec::new(), has_seen_stop: false }
    }

    /// | bytes | what |
    /// |---|---|
    /// | 0..8 | `MMFSESS1` |
    /// | 8 | 1 if the last reply ended with a stop string |
    /// | 9 | number of unread tokens, 0 or 1 |
    /// | 10..14 | the unread token, u32 |
    /// | 14.. | the state ([`State::to_bytes`]) |
    /// | last 8 | XXH3 (64 bits, seed 0) of everything before |
    pub(crate) fn to_bytes(&self, model: &Model) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(self.has_seen_stop.into());
        bytes.push(u8::from(!self.unread.is_empty()));
        bytes.extend(self.unread.first().copied().unwrap_or(0).to_le_bytes());
        bytes.extend(self.state.to_bytes(model));
        bytes.extend(XxHash3_64::oneshot(&bytes).to_le_bytes());
        bytes
    }

    /// Reads [`to_bytes`](Self::to_bytes) back.
    ///
    /// # Errors
    /// What is wrong: bytes that are damaged, of another version, or of another model.
    pub(crate) fn from_bytes(model: &Model, bytes: &[u8]) -> Result<Self, String> {
        let damaged = || "the saved session is damaged, or of another version".to_owned();
        let body_end = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or_else(damaged)?;
        let (body, sum) = bytes.split_at(body_end);
        if body.len() < HEADER_BYTES
            || body[..8] != MAGIC
            || XxHash3_64::oneshot(body).to_le_bytes() != sum
        {
            return Err(damaged());
        }
        let token = u32::from_le_bytes([body[10], body[11], body[12], body[13]]);
        let unread = if body[9] == 1 { vec![token] } else { Vec::new() };
        if unread.iter().any(|&token| token as usize >= model.config().vocab_size) {
            return Err(damaged());
        }
        let state = state_from_bytes(model, &body[HEADER_BYTES..])?;
        Ok(Self { state, unread, has_seen_stop: body[8] == 1 })
    }
}

/// Reads a state that came from outside.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn state_from_bytes(model: &Model, bytes: &[u8]) -> Result<State, String> {
    let state = State::from_bytes(model, bytes).map_err(|error| error.to_string())?;
    match state.hidden().iter().find(|h| h.abs() > MAX_HIDDEN) {
        None => Ok(state),
        Some(h) => {
            Err(format!("cannot restore the state: it has a value of {h}, which no model computes"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_come_back_and_damaged_ones_do_not() {
        let model = Model::load(&mmfree::builtin::checkpoint().unwrap()).unwrap();
        for (unread, has_seen_stop) in [(vec![], false), (vec![77], true)] {
            let session = Session { state: State::new(&model), unread, has_seen_stop };
            let bytes = session.to_bytes(&model);
            assert_eq!(Session::from_bytes(&model, &bytes).unwrap(), session);
            for at in [0, 8, 9, 10, 14, 40, 60, bytes.len() - 1] {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                assert!(Session::from_bytes(&model, &damaged).is_err(), "byte {at}");
            }
            for length in [0, 7, 20, bytes.len() - 1] {
                assert!(Session::from_bytes(&model, &bytes[..length]).is_err());
            }
        }
    }

    #[test]
    fn a_state_that_no_model_computes_is_refused() {
        let model = Model::load(&mmfree::builtin::checkpoint().unwrap()).unwrap();
        let mut bytes = State::new(&model).to_bytes(&model);
        assert!(state_from_bytes(&model, &bytes).is_ok());
        let end = bytes.len() - CHECKSUM_BYTES;
        bytes[end - 4..end].copy_from_slice(&1e30f32.to_le_bytes());
        let sum = XxHash3_64::oneshot(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&sum);
        let error = state_from_bytes(&model, &bytes).unwrap_err();
        assert!(error.contains("no model computes"), "{error}");
    }
}
