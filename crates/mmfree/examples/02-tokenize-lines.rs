//! Lesson 2: text to token ids and back, without a model.
//!
//! ```text
//! cargo run --example 02-tokenize-lines -- tokenizer.json < text.txt       # ids of each line
//! cargo run --example 02-tokenize-lines -- tokenizer.model --decode < ids  # text of each line of ids
//! ```
//!
//! A line is ended by `\n` alone. `--json` takes each line as a JSON string, so that it may hold any
//! character; texts are always printed that way. `--chunk-bytes N` encodes each line as a stream that
//! is looked at N bytes at a time, which must not change an id. `tests/python/check_tokenizers.py`
//! compares the output with the Python packages.

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::Path;

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::tokenizer::Tokenizer;

fn main() -> Result<(), Box<dyn Error>> {
    let mut path = None;
    let mut task = Task { is_json: false, decodes: false, chunk_bytes: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => task.is_json = true,
            "--decode" => task.decodes = true,
            "--chunk-bytes" => {
                let bytes = arguments.next().ok_or("--chunk-bytes needs a number")?;
                task.chunk_bytes = Some(bytes.parse()?);
            }
            _ => path = Some(argument),
        }
    }
    let usage = "usage: 02-tokenize-lines TOKENIZER [--json] [--decode] [--chunk-bytes N]";
    let tokenizer = open(Path::new(&path.ok_or(usage)?))?;
    let mut out = std::io::BufWriter::new(stdout().lock());
    for line in stdin().lock().split(b'\n') {
        writeln!(out, "{}", task.line(&tokenizer, &String::from_utf8(line?)?)?)?;
    }
    Ok(())
}

/// What is done with a line.
struct Task {
    is_json: bool,
    decodes: bool,
    chunk_bytes: Option<usize>,
}

impl Task {
    fn line(&self, tokenizer: &Tokenizer, line: &str) -> Result<String, Box<dyn Error>> {
        if self.decodes {
            let ids: Vec<u32> = serde_json::from_str(&format!("[{line}]"))?;
            return Ok(serde_json::to_string(&tokenizer.decode(&ids, true)?)?);
        }
        let text = if self.is_json { serde_json::from_str(line)? } else { line.to_owned() };
        let ids = match self.chunk_bytes {
            None => tokenizer.encode(&text, false)?,
            Some(bytes) => {
                let stream = tokenizer.encode_reader(text.as_bytes(), false);
                stream.with_chunk_bytes(bytes).collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        Ok(ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
    }
}

/// A `.json` file is a Hugging Face pipeline, any other a SentencePiece model.
fn open(path: &Path) -> Result<Tokenizer, Box<dyn Error>> {
    let bytes = std::fs::read(path)?;
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let kind = match is_json {
        true => TokenizerKind::HuggingFace(bytes),
        false => TokenizerKind::SentencePiece(bytes),
    };
    let source = TokenizerSource { kind, tokenizer_config: None, chat_template: None };
    Ok(Tokenizer::from_source(&source)?)
}

#[test]
fn a_line_comes_back_as_it_was() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tokenizers");
    for name in ["bpe-byte-fallback.model", "byte-level.json"] {
        let tokenizer = open(&Path::new(fixtures).join(name)).unwrap();
        let encode = Task { is_json: false, decodes: false, chunk_bytes: Some(3) };
        let decode = Task { is_json: false, decodes: true, chunk_bytes: None };
        let ids = encode.line(&tokenizer, "a wooden\tboy").unwrap();
        assert_eq!(decode.line(&tokenizer, &ids).unwrap(), r#""a wooden\tboy""#);
    }
}
