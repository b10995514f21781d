//! How something that is there was made, and how it would be made now.

use std::fmt::{Debug, Display};

/// What differs, each as a line with both values.
#[derive(Debug, Default)]
pub(super) struct Differences(Vec<String>);

impl Differences {
    /// Compares a value that a user knows under a name.
    pub(super) fn value<T: PartialEq + Display>(&mut self, name: &str, then: T, now: T) {
        if then != now {
            self.0.push(format!("{name}: {then} then, {now} now"));
        }
    }

    /// Compares a value that may be missing.
    pub(super) fn option<T: PartialEq + Debug>(
        &mut self,
        name: &str,
        then: Option<T>,
        now: Option<T>,
    ) {
        let shown =
            |value: Option<T>| value.map_or("none".to_owned(), |value| format!("{value:?}"));
        self.value(name, shown(then), shown(now));
    }

    /// Compares files in order, by name and size: names the first that is another one.
    pub(super) fn files<'a>(
        &mut self,
        then: impl Iterator<Item = (&'a str, u64)>,
        now: impl Iterator<Item = (&'a str, u64)>,
    ) {
        let (mut then, mut now) = (then, now);
        let shown = |file: Option<(&str, u64)>| {
            file.map_or("none".to_owned(), |(file, bytes)| format!("{file} of {bytes} bytes"))
        };
        loop {
            let (before, after) = (then.next(), now.next());
            if before != after {
                return self.value("files", shown(before), shown(after));
            }
            if before.is_none() {
                return;
            }
        }
    }

    /// All of them in one line; `None` if there are none.
    pub(super) fn list(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join("; "))
    }
}
