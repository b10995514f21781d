//! Ends a text at the first stop string, however tokens divide it.

use crate::error::{Error, Result};

/// Takes text piece by piece and lets through what comes before the first stop string.
///
/// Text is held back exactly as long as it can be the start of a stop string. The string that is complete
/// first ends the text (of several at once, the longest); neither it nor what follows is let through.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// A matcher for these strings, which may be none.
    ///
    /// # Errors
    /// An empty stop string, which would end every text at once.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Invalid("a stop string is empty".into()));
        }
        Ok(Self { stops, held: String::new() })
    }

    /// Takes text and appends to `out` what is certain to come before any stop string. Returns the stop
    /// string that ended the text, if one did; nothing may be pushed after that.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<&str> {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        if let Some((_, start, stop)) = found.min_by_key(|&(end, start, _)| (end, start)) {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return Some(stop);
        }
        let certain = self.held.len() - self.possible_start();
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// Ends the text: what was held back is not the start of a stop string after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of the held text that a stop string starts with.
    fn possible_start(&self) -> usize {
        let overlap = |stop: &String| {
            let starts = stop.char_indices().map(|(length, _)| length).rev();
            starts.into_iter().find(|&length| self.held.ends_with(&stop[..length])).unwrap_or(0)
        };
        self.stops.iter().map(overlap).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|&s| s.into()).collect()).unwrap();
        let mut shown = Vec::new();
        for piece in pieces {
            let mut out = String::new();
            let stop = matcher.push(piece, &mut out).map(str::to_owned);
            shown.push(out);
            if stop.is_some() {
                return (shown, stop);
            }
        }
        let mut out = String::new();
        matcher.finish(&mut out);
        shown.push(out);
        (shown, None)
    }

    #[test]
    fn text_is_held_back_only_while_it_can_be_a_stop_string() {
        let (shown, stop) = run(&["\nUser:"], &["Hello", "\n", "Us", "ual", "\nUser", ": x"]);
        assert_eq!(shown, ["Hello", "", "", "\nUsual", "", ""]);
        assert_eq!(stop.as_deref(), Some("\nUser:"));
        assert_eq!(run(&["ab"], &["xa"]), (vec!["x".into(), "a".into()], None));
        assert_eq!(run(&[], &["a"]).0, ["a", ""]);
        assert!(StopMatcher::new(vec!["".into()]).is_err());
    }

    #[test]
    fn the_first_complete_stop_string_wins() {
        assert_eq!(run(&["abc", "b"], &["ab"]), (vec!["a".into()], Some("b".into())));
        assert_eq!(run(&["c", "abc"], &["abc"]), (vec!["".into()], Some("abc".into())));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            stops in prop::collection::vec("[ab\u{e9}]{1,4}", 0..4),
            pieces in prop::collection::vec("[ab\u{e9}]{0,4}", 0..12),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let text = pieces.concat();
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (by_piece, by_char) = (run(&stops, &pieces), run(&stops, &chars));
            prop_assert_eq!(by_piece.0.concat(), by_char.0.concat());
            prop_assert_eq!(&by_piece.1, &by_char.1);
            match by_piece.1 {
                None => prop_assert_eq!(by_piece.0.concat(), text),
                Some(stop) => {
                    let shown = by_piece.0.concat();
                    prop_assert!(text.starts_with(&(shown.clone() + &stop)));
                    prop_assert!(stops.iter().all(|stop| !shown.contains(stop)));
                }
            }
        }
    }
}
