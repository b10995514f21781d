//! Documents to ids: what the threads do.

use mmfree::error::{Error, Result};
use mmfree::tokenizer::{Stretch, Tokenizer};

use crate::data::source::{Content, Item, Position, json_field};

/// A text longer than this is encoded in parts: that takes less memory.
const WHOLE_BYTES: usize = 256 << 10;

/// What becomes of an item.
#[derive(Debug)]
pub(super) struct Encoded {
    /// Ids of a document or of a part of one; none if there is none.
    pub result: Result<Option<Vec<u32>>>,
    pub text_bytes: u64,
    pub ends: bool,
    pub after: Position,
}

/// Encodes items.
pub(super) struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Field of a line that has the text.
    pub field: &'a str,
    /// Ids before and after every document.
    pub prefix: &'a [u32],
    pub suffix: &'a [u32],
    /// Files by [`Position::source`], for messages.
    pub files: &'a [String],
}

impl Encoder<'_> {
    /// Encodes one item.
    pub(super) fn encode(&self, item: Item) -> Encoded {
        let Item { content, begins, ends, after } = item;
        let mut ids = Vec::new();
        if begins {
            ids.extend(self.prefix);
        }
        let text_bytes = match self.content(content, after, &mut ids) {
            Ok(Some(text_bytes)) => text_bytes,
            Ok(None) => return Encoded { result: Ok(None), text_bytes: 0, ends, after },
            Err(error) => return Encoded { result: Err(error), text_bytes: 0, ends, after },
        };
        if ends {
            ids.extend(self.suffix);
        }
        Encoded { result: Ok(Some(ids)), text_bytes, ends, after }
    }

    /// Appends the ids of an item's text and returns its length in bytes; `None` if it has no text.
    fn content(&self, content: Content, at: Position, ids: &mut Vec<u32>) -> Result<Option<u64>> {
        match content {
            Content::Blank => Ok(None),
            Content::Broken(error) => Err(error),
            Content::Ids { ids: done, text_bytes } => {
                ids.extend(done);
                Ok(Some(text_bytes as u64))
            }
            Content::Text(stretch) => {
                let located = |error| self.located(error, at);
                self.text(&stretch, ids).map_err(located)?;
                Ok(Some(stretch.text().len() as u64))
            }
            Content::Json(line) => {
                let text = json_field(&line, self.field, || self.place(at))?;
                if text.trim().is_empty() {
                    return Ok(None);
                }
                let length = text.len() as u64;
                self.text(&Stretch::whole(text), ids).map_err(|error| self.located(error, at))?;
                Ok(Some(length))
            }
        }
    }

    fn text(&self, stretch: &Stretch, ids: &mut Vec<u32>) -> Result<()> {
        if stretch.has_context() || stretch.text().len() <= WHOLE_BYTES {
            ids.extend(self.tokenizer.encode_stretch(stretch)?);
            return Ok(());
        }
        let mut session = self.tokenizer.encode_session();
        session.push(stretch.text(), ids)?;
        session.finish(ids)
    }

    fn located(&self, error: Error, at: Position) -> Error {
        Error::Malformed { file: self.place(at), what: error.to_string() }
    }

    fn place(&self, at: Position) -> String {
        format!("{}:{}", self.files[at.source], at.line)
    }
}
