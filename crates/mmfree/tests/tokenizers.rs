//! Tokenizers against what the Python packages answer (`tests/python/make_tokenizer_fixtures.py` made
//! the fixtures), streams against whole texts, and corrupt files.

use std::io::{BufReader, Read};
use std::path::PathBuf;

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::error::Error;
use mmfree::tokenizer::{MAX_UNCUT_BYTES, Tokenizer};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

const SENTENCE_PIECE: [&str; 4] =
    ["bpe-byte-fallback", "bpe-user-defined", "unigram", "unigram-byte-fallback"];
const HUGGING_FACE: [&str; 5] = ["byte-level", "llama", "llama-3", "metaspace", "word-piece"];

fn names() -> impl Iterator<Item = &'static str> {
    SENTENCE_PIECE.into_iter().chain(HUGGING_FACE)
}

fn fixture(name: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tokenizers");
    PathBuf::from(root).join(name)
}

fn source(kind: TokenizerKind) -> TokenizerSource {
    TokenizerSource { kind, tokenizer_config: None, chat_template: None }
}

fn kind(name: &str) -> TokenizerKind {
    match HUGGING_FACE.contains(&name) {
        true => {
            TokenizerKind::HuggingFace(std::fs::read(fixture(&format!("{name}.json"))).unwrap())
        }
        false => {
            TokenizerKind::SentencePiece(std::fs::read(fixture(&format!("{name}.model"))).unwrap())
        }
    }
}

fn load(name: &str) -> Tokenizer {
    Tokenizer::from_source(&source(kind(name))).unwrap()
}

/// Encodes as a stream that comes `read_bytes` at a time and is looked at `chunk_bytes` at a time.
fn stream(tokenizer: &Tokenizer, text: &[u8], read_bytes: usize, chunk_bytes: usize) -> Vec<u32> {
    let reader = BufReader::with_capacity(read_bytes, text);
    let chunks = tokenizer.encode_reader(reader, true).with_chunk_bytes(chunk_bytes);
    chunks.collect::<Result<Vec<_>, _>>().unwrap().concat()
}

fn decode_by_id(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = tokenizer.stream_decoder(skip_special);
    let mut text = String::new();
    for &id in ids {
        decoder.push(id, &mut text).unwrap();
    }
    decoder.finish(&mut text).unwrap();
    text
}

#[test]
fn ids_and_texts_are_those_of_the_python_packages() {
    for name in names() {
        let tokenizer = load(name);
        let file = std::fs::read_to_string(fixture(&format!("{name}.expected.jsonl"))).unwrap();
        let (encodings, decodings) = file.split_once("\n\n").unwrap();
        let mut count = 0;
        for line in encodings.lines() {
            let (text, ids, decoded): (String, Vec<u32>, String) =
                serde_json::from_str(line).unwrap();
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), decoded, "{name}: {ids:?}");
            assert_eq!(decode_by_id(&tokenizer, &ids, true), decoded, "{name}: {ids:?}");
            count += 1;
        }
        for line in decodings.lines() {
            let (ids, decoded): (Vec<u32>, String) = serde_json::from_str(line).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), decoded, "{name}: {ids:?}");
            assert_eq!(decode_by_id(&tokenizer, &ids, true), decoded, "{name}: {ids:?}");
            count += 1;
        }
        assert!(count > 300, "{name}: only {count} lines were checked");
    }
}

/// Text of every kind that could trip a cut: words, runs of white space, line ends, scripts without
/// spaces, combining marks, special tokens and parts of them.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => "[a-zA-Z]{1,8}",
        6 => Just(" ".to_owned()),
        2 => "[ \t\n\r]{1,6}",
        1 => "\r\n|\n\n\n|\u{a0}|\u{3000}|\u{2581}|\u{2581}\u{2581}",
        2 => "[0-9.,!?'/-]{1,5}",
        1 => "[\u{4e00}-\u{4e20}\u{3042}-\u{3060}]{1,6}",
        1 => "[e\u{301}\u{308}\u{fb01}\u{bd}\u{1f600}\u{200d}\u{0}\u{7f}]{1,4}",
        1 => "<s>|</s>|<mark>|<mask>|<\\|end\\|>|<\\|begin\\|>|a b|ab|aba|ing |<0x41>|<",
        1 => "'s|'LL|don't",
        1 => "\\PC{0,6}",
    ];
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

#[test]
fn streams_have_the_ids_of_the_whole_text() {
    for name in names() {
        let tokenizer = load(name);
        let mut runner = TestRunner::new(Config::with_cases(400));
        let sizes = (prop_oneof![1usize..20, Just(1000)], prop_oneof![1usize..40, Just(300)]);
        let result = runner.run(&(text(), sizes), |(text, (read_bytes, chunk_bytes))| {
            let whole = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(stream(&tokenizer, text.as_bytes(), read_bytes, chunk_bytes), whole);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn streams_of_arbitrary_characters_have_the_ids_of_the_whole_text() {
    for name in names() {
        let tokenizer = load(name);
        let mut runner = TestRunner::new(Config::with_cases(200));
        let result = runner.run(&(any::<String>(), 1usize..30), |(text, chunk_bytes)| {
            let whole = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(stream(&tokenizer, text.as_bytes(), 7, chunk_bytes), whole);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Were every place taken for a safe cut, ids would differ: the properties above can fail.
#[test]
fn careless_cuts_do_change_ids() {
    for name in names() {
        let tokenizer = load(name);
        let text = "The wood  was\n\nsinging, in the morning.";
        let whole = tokenizer.encode(text, false).unwrap();
        let differs = (1..text.len()).any(|cut| {
            let (left, right) = text.split_at(cut);
            [left, right].map(|part| tokenizer.encode(part, false).unwrap()).concat() != whole
        });
        assert!(differs, "{name}");
    }
}

#[test]
fn long_texts_without_line_ends_are_cut() {
    let words = std::fs::read_to_string(fixture("pinocchio.txt")).unwrap().replace('\n', " ");
    let text = words.repeat(60);
    for name in names() {
        let tokenizer = load(name);
        assert_eq!(tokenizer.is_cuttable(), name != "word-piece", "{name}");
        let whole = tokenizer.encode(&text, false).unwrap();
        let chunks: Result<Vec<_>, _> = tokenizer.encode_reader(text.as_bytes(), false).collect();
        let chunks = chunks.unwrap();
        let longest = chunks.iter().map(Vec::len).max().unwrap();
        let limit = if tokenizer.is_cuttable() { whole.len() / 2 } else { whole.len() };
        assert!(longest <= limit, "{name}: {longest} of {} ids at once", whole.len());
        assert_eq!(chunks.concat(), whole, "{name}");
    }
}

#[test]
fn a_text_that_cannot_be_cut_is_an_error_before_it_fills_memory() {
    /// One word without end, of two letters that follow each other in pieces either way round.
    struct Endless;
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let length = buffer.len() / 2 * 2;
            buffer[..length].chunks_mut(2).for_each(|pair| pair.copy_from_slice(b"er"));
            Ok(length)
        }
    }
    for name in ["bpe-byte-fallback", "byte-level", "word-piece"] {
        let tokenizer = load(name);
        let mut chunks = tokenizer.encode_reader(BufReader::new(Endless.take(1 << 30)), false);
        let error = chunks.find_map(Result::err).unwrap().to_string();
        assert!(error.contains(&format!("{} MiB", MAX_UNCUT_BYTES >> 20)), "{error}");
        assert!(chunks.next().is_none());
    }
}

#[test]
fn a_byte_that_is_no_text_is_named() {
    let cases: [(&[u8], u64); 5] = [
        (b"\xff", 0),
        (b"abc\xe4\xbd", 3),
        (b"ab\xe4\xbd\xa0\xe4x", 5),
        (b"ab\xed\xa0\x80", 2),
        (b"abcdefghij\xf0\x9f\x98\x80\x80", 14),
    ];
    for name in ["bpe-byte-fallback", "byte-level"] {
        let tokenizer = load(name);
        for (bytes, expected) in cases {
            for read_bytes in [1, 2, 3, 100] {
                let reader = BufReader::with_capacity(read_bytes, bytes);
                let error = tokenizer.encode_reader(reader, false).find_map(Result::err);
                match error {
                    Some(Error::NotUtf8 { offset }) => assert_eq!(offset, expected, "{bytes:?}"),
                    other => panic!("{other:?} for {bytes:?}"),
                }
            }
        }
    }
}

#[test]
fn streams_decode_to_the_text_of_all_ids() {
    for name in names() {
        let tokenizer = load(name);
        let size = tokenizer.vocab_size() as u32;
        // Favours the first ids: special tokens and bytes.
        let id = prop_oneof![0..size, 0..size.min(262)];
        let mut runner = TestRunner::new(Config::with_cases(500));
        let ids = prop::collection::vec(id, 0..30);
        let result = runner.run(&(ids, any::<bool>()), |(ids, skip_special)| {
            let whole = tokenizer.decode(&ids, skip_special).unwrap();
            prop_assert_eq!(decode_by_id(&tokenizer, &ids, skip_special), whole);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn special_tokens_go_where_the_checkpoint_says() {
    let tokenizer = load("byte-level");
    let ids = tokenizer.encode("Hi", true).unwrap();
    assert_eq!((ids[0], *ids.last().unwrap()), (0, 1));
    assert_eq!(tokenizer.encode("", true).unwrap(), [0, 1]);
    assert_eq!(stream(&tokenizer, b"", 10, 10), [0, 1]);

    let load_with = |config: Value| {
        let kind = kind("bpe-byte-fallback");
        let source = TokenizerSource { tokenizer_config: Some(config), ..source(kind) };
        Tokenizer::from_source(&source).unwrap()
    };
    let plain = load("bpe-byte-fallback");
    assert_eq!((plain.bos(), plain.eos()), (Some(1), Some(2)));
    assert_eq!(plain.encode("", true).unwrap(), [1]);
    let neither = load_with(json!({"add_bos_token": false}));
    assert!(neither.encode("", true).unwrap().is_empty());
    let other = load_with(json!({"eos_token": {"content": "<s>"}, "add_eos_token": true}));
    assert_eq!((other.eos(), other.encode("", true).unwrap()), (Some(1), vec![1, 1]));
    assert_eq!(load("unigram-byte-fallback").bos(), None);
}

#[test]
fn a_rendered_template_may_name_special_tokens() {
    let tokenizer = load("bpe-user-defined");
    let control = tokenizer.token_id("<ctl>").unwrap();
    let ids = tokenizer.encode_with_special_text("<s>a<ctl></s>").unwrap();
    assert_eq!(ids.first(), Some(&1));
    assert_eq!(ids[ids.len() - 2..], [control, 2]);
    assert_eq!(tokenizer.encode("<s>", false).unwrap().iter().find(|&&id| id == 1), None);
    assert_eq!(tokenizer.token(1).as_deref(), Some("<s>"));
    assert_eq!(tokenizer.token(1 << 20), None);
}

/// Loading and using a damaged file may fail but not panic, hang or exhaust memory.
fn try_use(kind: TokenizerKind) {
    let Ok(tokenizer) = Tokenizer::from_source(&source(kind)) else { return };
    let _ = tokenizer.encode("The a\u{301} <s>\u{fb01}\u{1f600} ...\n  x ", true);
    let _ = tokenizer.decode(&[0, 1, 2, 5, 50, 300, 4_000_000_000], false);
    let mut decoder = tokenizer.stream_decoder(true);
    let mut text = String::new();
    for id in [0, 1, 2, 5, 50, 300] {
        let _ = decoder.push(id, &mut text);
    }
    let _ = decoder.finish(&mut text);
    for id in [0, 7, u32::MAX] {
        let _ = tokenizer.token(id);
    }
}

#[test]
fn truncated_files_are_errors() {
    for name in names() {
        match kind(name) {
            TokenizerKind::HuggingFace(bytes) => {
                for end in (0..bytes.len() - 1).step_by(97) {
                    let kind = TokenizerKind::HuggingFace(bytes[..end].to_vec());
                    assert!(Tokenizer::from_source(&source(kind)).is_err(), "{name} to {end}");
                }
            }
            // A message that ends between two fields is whole, so that only some ends are errors.
            TokenizerKind::SentencePiece(bytes) => {
                for end in (0..bytes.len()).step_by(23) {
                    try_use(TokenizerKind::SentencePiece(bytes[..end].to_vec()));
                }
                let kind = TokenizerKind::SentencePiece(bytes[..bytes.len() / 2].to_vec());
                let error = Tokenizer::from_source(&source(kind)).unwrap_err().to_string();
                assert!(error.contains("SentencePiece model"), "{error}");
            }
        }
    }
    for kind in [TokenizerKind::SentencePiece(vec![]), TokenizerKind::HuggingFace(vec![])] {
        assert!(Tokenizer::from_source(&source(kind)).is_err());
    }
}

#[test]
fn damaged_files_do_not_panic() {
    for name in names() {
        let original = kind(name);
        let mut runner = TestRunner::new(Config::with_cases(300));
        let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
        let result = runner.run(&damage, |damage| {
            let mut kind = original.clone();
            let (TokenizerKind::HuggingFace(bytes) | TokenizerKind::SentencePiece(bytes)) =
                &mut kind;
            for (index, byte) in damage {
                let index = index.index(bytes.len());
                bytes[index] = byte;
            }
            try_use(kind);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn pipelines_that_lie_are_errors_or_harmless() {
    let TokenizerKind::HuggingFace(bytes) = kind("metaspace") else { unreachable!() };
    let original: Value = serde_json::from_slice(&bytes).unwrap();
    let edits: [(&str, Value); 8] = [
        // A compiled normaliser whose trie points outside itself.
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8BAAAA"})),
        ("/model/unk_id", json!(1_000_000)),
        ("/model/vocab", json!([])),
        (
            "/truncation",
            json!({"max_length": 1, "strategy": "LongestFirst", "stride": 0,
                               "direction": "Right"}),
        ),
        (
            "/padding",
            json!({"strategy": {"Fixed": 1_000_000_000}, "direction": "Right",
                            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
                            "pad_token": "x"}),
        ),
        (
            "/post_processor",
            json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "no such token", "type_id": 0}}], "pair": [],
            "special_tokens": {}}),
        ),
        (
            "/pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "("},
                                  "behavior": "Isolated", "invert": false}),
        ),
        ("/decoder", json!({"type": "Strip", "content": "a", "start": 0, "stop": 1000})),
    ];
    for (pointer, value) in edits {
        let mut edited = original.clone();
        *edited.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        try_use(TokenizerKind::HuggingFace(serde_json::to_vec(&edited).unwrap()));
    }
    let mut truncating = original.clone();
    truncating["truncation"] = json!({"max_length": 1, "strategy": "LongestFirst", "stride": 0,
                                      "direction": "Right"});
    let kind = TokenizerKind::HuggingFace(serde_json::to_vec(&truncating).unwrap());
    let tokenizer = Tokenizer::from_source(&source(kind)).unwrap();
    assert!(tokenizer.encode("never truncated, as texts are not", false).unwrap().len() > 1);
}
