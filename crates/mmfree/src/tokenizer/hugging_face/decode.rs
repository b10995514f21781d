//! Ids to text, one id at a time.

use std::collections::HashMap;
use std::sync::LazyLock;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::strip::Strip;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{Decoder, Model};

use super::HuggingFace;
use crate::error::{Error, Result};

/// Turns ids into text as they come. The concatenated output is what the tokenizer's decoder makes
/// of all ids at once.
///
/// The decoder's stages are run one token at a time, each with the state that crosses from token to
/// token. `ByteFallback` judges a run of byte tokens as a whole (one bad byte and all of them become
/// U+FFFD), so a run is held back until it ends. A decoder with a stage that is not known here
/// (`WordPiece`, `BPEDecoder`, `CTC`) is run once, at the end of the text.
pub(in crate::tokenizer) struct TokenDecoder<'a> {
    tokenizer: &'a HuggingFace,
    skip_special: bool,
    stages: Stages<'a>,
}

enum Stages<'a> {
    /// No decoder: tokens are joined by spaces.
    SpaceJoined {
        is_first: bool,
    },
    Chain(Vec<Stage<'a>>),
    Deferred(Vec<String>),
}

enum Stage<'a> {
    /// A stage that treats every token alike.
    EachToken(&'a DecoderWrapper),
    Metaspace {
        stage: &'a Metaspace,
        is_first: bool,
    },
    /// Joins all tokens: `Fuse`.
    Fuse,
    /// A `Strip` that sees one token, the whole text.
    StripText {
        stage: &'a Strip,
        stripped: usize,
        at_start: bool,
        /// Trailing characters that are dropped if the text ends here.
        held: usize,
    },
    ByteFallback {
        run: Vec<u8>,
    },
    ByteLevel {
        bytes: Vec<u8>,
    },
}

impl<'a> TokenDecoder<'a> {
    pub(in crate::tokenizer) fn new(tokenizer: &'a HuggingFace, skip_special: bool) -> Self {
        let stages = match tokenizer.inner.get_decoder() {
            None => Stages::SpaceJoined { is_first: true },
            Some(decoder) => {
                let mut chain = Vec::new();
                let mut is_fused = false;
                if push_stages(decoder, &mut chain, &mut is_fused) {
                    Stages::Chain(chain)
                } else {
                    Stages::Deferred(Vec::new())
                }
            }
        };
        Self { tokenizer, skip_special, stages }
    }

    /// Appends the text that `id` completes. An id without a token has no text.
    pub(in crate::tokenizer) fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        let inner = &self.tokenizer.inner;
        let added = inner.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id));
        let Some(token) = token else { return Ok(()) };
        if self.skip_special && added.is_special_token(&token) {
            return Ok(());
        }
        match &mut self.stages {
            Stages::SpaceJoined { is_first } => {
                if !std::mem::take(is_first) {
                    out.push(' ');
                }
                out.push_str(&token);
            }
            Stages::Chain(stages) => run_chain(stages, vec![token], false, out)?,
            Stages::Deferred(tokens) => tokens.push(token),
        }
        Ok(())
    }

    /// Ends the text and appends what was held back.
    pub(in crate::tokenizer) fn finish(&mut self, out: &mut String) -> Result<()> {
        match &mut self.stages {
            Stages::SpaceJoined { .. } => Ok(()),
            Stages::Chain(stages) => run_chain(stages, Vec::new(), true, out),
            Stages::Deferred(tokens) => {
                let tokens = std::mem::take(tokens);
                if let (Some(decoder), false) =
                    (self.tokenizer.inner.get_decoder(), tokens.is_empty())
                {
                    out.push_str(&decoder.decode(tokens).map_err(|e| decoder_error(&*e))?);
                }
                Ok(())
            }
        }
    }
}

/// Appends the stages of a decoder; `false` if one cannot be run token by token.
fn push_stages<'a>(
    decoder: &'a DecoderWrapper,
    chain: &mut Vec<Stage<'a>>,
    is_fused: &mut bool,
) -> bool {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            return sequence.get_decoders().iter().all(|stage| push_stages(stage, chain, is_fused));
        }
        // Once the tokens are one text, a stage that works on each token is another thing.
        DecoderWrapper::Strip(stage) if *is_fused => {
            chain.push(Stage::StripText { stage, stripped: 0, at_start: true, held: 0 })
        }
        _ if *is_fused => return false,
        DecoderWrapper::Replace(_) | DecoderWrapper::Strip(_) => {
            chain.push(Stage::EachToken(decoder));
        }
        DecoderWrapper::Metaspace(stage) => {
            chain.push(Stage::Metaspace { stage, is_first: true });
        }
        DecoderWrapper::Fuse(_) => {
            chain.push(Stage::Fuse);
            *is_fused = true;
        }
        DecoderWrapper::ByteFallback(_) => chain.push(Stage::ByteFallback { run: Vec::new() }),
        DecoderWrapper::ByteLevel(_) => {
            chain.push(Stage::ByteLevel { bytes: Vec::new() });
            *is_fused = true;
        }
        _ => return false,
    }
    true
}

fn run_chain(
    stages: &mut [Stage],
    mut tokens: Vec<String>,
    last: bool,
    out: &mut String,
) -> Result<()> {
    for stage in stages {
        tokens = stage.run(tokens, last)?;
    }
    for token in tokens {
        out.push_str(&token);
    }
    Ok(())
}

impl Stage<'_> {
    /// Runs the stage on the next tokens; `last` if no more will come.
    fn run(&mut self, tokens: Vec<String>, last: bool) -> Result<Vec<String>> {
        match self {
            Self::EachToken(decoder) => {
                decoder.decode_chain(tokens).map_err(|error| decoder_error(&*error))
            }
            Self::Metaspace { stage, is_first } => Ok(tokens
                .into_iter()
                .map(|token| metaspace(stage, &token, std::mem::take(is_first)))
                .collect()),
            Self::Fuse => Ok(tokens),
            Self::StripText { stage, stripped, at_start, held } => {
                let mut text = String::new();
                for char in tokens.iter().flat_map(|token| token.chars()) {
                    *at_start &= char == stage.content && *stripped < stage.start;
                    if *at_start {
                        *stripped += 1;
                    } else if char == stage.content && *held < stage.stop {
                        *held += 1;
                    } else if char == stage.content {
                        text.push(char);
                    } else {
                        text.extend(std::iter::repeat_n(stage.content, std::mem::take(held)));
                        text.push(char);
                    }
                }
                Ok(vec![text])
            }
            Self::ByteFallback { run } => {
                let mut texts = Vec::new();
                for token in tokens {
                    match byte_token(&token) {
                        Some(byte) => run.push(byte),
                        None => {
                            end_byte_run(run, &mut texts);
                            texts.push(token);
                        }
                    }
                }
                if last {
                    end_byte_run(run, &mut texts);
                }
                Ok(texts)
            }
            Self::ByteLevel { bytes } => {
                for token in tokens {
                    let spelled: Option<Vec<u8>> =
                        token.chars().map(|char| CHAR_BYTES.get(&char).copied()).collect();
                    bytes.extend(spelled.unwrap_or_else(|| token.into_bytes()));
                }
                Ok(vec![take_lossy(bytes, last)])
            }
        }
    }
}

fn metaspace(stage: &Metaspace, token: &str, is_first: bool) -> String {
    let drops = is_first && stage.prepend_scheme != PrependScheme::Never;
    let written = |char| match char == stage.get_replacement() {
        true if drops => None,
        true => Some(' '),
        false => Some(char),
    };
    token.chars().filter_map(written).collect()
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn end_byte_run(run: &mut Vec<u8>, texts: &mut Vec<String>) {
    if !run.is_empty() {
        let length = run.len();
        let replaced = |_| char::REPLACEMENT_CHARACTER.to_string().repeat(length);
        texts.push(String::from_utf8(std::mem::take(run)).unwrap_or_else(replaced));
    }
}

/// Takes text from `bytes`, each broken stretch replaced by U+FFFD as `String::from_utf8_lossy` does.
/// The start of a character at the end stays unless this is the `last` call.
fn take_lossy(bytes: &mut Vec<u8>, last: bool) -> String {
    let mut kept = 0;
    if !last
        && let Some(chunk) = bytes.utf8_chunks().last()
        && std::str::from_utf8(chunk.invalid()).is_err_and(|error| error.error_len().is_none())
    {
        kept = chunk.invalid().len();
    }
    let end = bytes.len() - kept;
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    bytes.drain(..end);
    text
}

/// GPT-2's spelling of bytes as printable characters: bytes that are printable in Latin-1 stand for
/// themselves, the others, in order, for U+0100 onward.
pub(super) static BYTE_CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = '\u{100}'..;
    let mut spelled = |byte| {
        if is_printable(byte) { char::from(byte) } else { others.next().unwrap_or_default() }
    };
    std::array::from_fn(|byte| spelled(byte as u8))
});

/// The same in the other direction.
static CHAR_BYTES: LazyLock<HashMap<char, u8>> =
    LazyLock::new(|| BYTE_CHARS.iter().copied().zip(0..=255).collect());

fn decoder_error(error: &dyn std::error::Error) -> Error {
    Error::Tokenizer(format!("the tokenizer's decoder failed: {error}"))
}
