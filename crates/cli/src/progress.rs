//! A progress bar on stderr, when it is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that shows itself once something takes long, and goes when it is dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar for an activity.
    pub fn new(activity: &'static str) -> Self {
        // Draws nothing where stderr is not a terminal.
        let bar = ProgressBar::new(0).with_message(activity);
        let style = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} % {eta:>5}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(bar)
    }

    /// `done` of `total` are done, in any unit.
    pub fn set(&self, done: u64, total: u64) {
        if self.0.elapsed() > Duration::from_millis(500) {
            self.0.set_length(total);
            self.0.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
