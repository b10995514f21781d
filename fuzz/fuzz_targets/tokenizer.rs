//! A tokenizer file of any content is read or refused, and what is read encodes and decodes or says why not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::tokenizer::Tokenizer;

const TEXT: &str = "The a\u{301} <s>\u{fb01}\u{1f600} ...\n  x 1234\r\n\u{65e5}\u{672c}";

fuzz_target!(|bytes: &[u8]| {
    // As a file is told apart when it is opened.
    let is_json = bytes.trim_ascii_start().starts_with(b"{");
    let kind = if is_json { TokenizerKind::HuggingFace } else { TokenizerKind::SentencePiece };
    let source = TokenizerSource { kind: kind(bytes.to_vec()), tokenizer_config: None, chat_template: None };
    let Ok(tokenizer) = Tokenizer::from_source(&source) else { return };
    let ids = tokenizer.encode(TEXT, true).unwrap_or_default();
    let _ = tokenizer.decode(&ids, true);
    let mut decoder = tokenizer.stream_decoder(false);
    let mut text = String::new();
    for id in ids.into_iter().chain([0, 1, 2, 300, u32::MAX]) {
        let _ = tokenizer.token(id);
        let _ = decoder.push(id, &mut text);
    }
    let _ = decoder.finish(&mut text);
    if let Some(mut splitter) = tokenizer.splitter() {
        let _ = splitter.push(TEXT, &mut |stretch| tokenizer.encode_stretch(&stretch).map(drop));
        let _ = tokenizer.encode_stretch(&splitter.finish());
    }
});
