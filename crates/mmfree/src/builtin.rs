//! The trained model inside the program. `models/README.md` says what it is and what it is not.

use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// The packed model: weights, configuration and tokenizer.
static PACKED: &[u8] = include_bytes!("../../../models/builtin.gguf");

/// Opens the built-in model.
///
/// # Errors
/// None, unless the program was built with a damaged file.
pub fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::from_static_gguf(PACKED)
}
