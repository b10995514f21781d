//! What a run reports while it trains.
//!
//! [`RunLog`] writes each [`Record`] to `log.jsonl`, one JSON object a line, and to TensorBoard event files in
//! the same directory. Both survive a kill in the middle of a line, and both are cut back to the step of the
//! checkpoint from which a run resumes, so that no step is reported twice.

mod event_file;
mod record;
mod run_log;

pub use event_file::{Event, EventFile, EventReader};
pub use record::Record;
pub use run_log::{LOG_FILE, RunLog, read_log};
