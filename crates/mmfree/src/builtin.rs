//! The trained model inside the program.

use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// Opens the built-in model.
///
/// # Errors
/// None, unless the program was built with a damaged file.
pub fn checkpoint() -> Result<Checkpoint> {
    unimplemented!()
}
