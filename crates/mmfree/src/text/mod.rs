//! Text out of a model.
//!
//! | module | holds |
//! |---|---|
//! | [`generate`](mod@generate) | [`generate()`](generate::generate): prompt to text, with events |
//! | [`stop`] | [`StopMatcher`](stop::StopMatcher): ends a text at a stop string |
//! | [`chat`] | [`ChatTemplate`](chat::ChatTemplate): a conversation to prompt text |

pub mod chat;
mod clock;
pub mod generate;
pub mod stop;
