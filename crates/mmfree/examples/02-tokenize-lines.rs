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
    let (mut is_json, mut decode, mut chunk_bytes) = (false, false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => is_json = true,
            "--decode" => decode = true,
            "--chunk-bytes" => {
                chunk_bytes =
                    Some(arguments.next().ok_or("--chunk-bytes needs a number")?.parse()?);
            }
            _ => path = Some(argument),
        }
    }
    let path =
        path.ok_or("usage: 02-tokenize-lines TOKENIZER [--json] [--decode] [--chunk-bytes N]")?;
    let tokenizer = open(Path::new(&path))?;

    let mut out = std::io::BufWriter::new(stdout().lock());
    for line in stdin().lock().split(b'\n') {
        let line = line?;
        if decode {
            let ids: Vec<u32> = serde_json::from_str(&format!("[{}]", String::from_utf8(line)?))?;
            serde_json::to_writer(&mut out, &tokenizer.decode(&ids, true)?)?;
            writeln!(out)?;
            continue;
        }
        let text = if is_json { serde_json::from_slice(&line)? } else { String::from_utf8(line)? };
        let ids = match chunk_bytes {
            None => tokenizer.encode(&text, false)?,
            Some(bytes) => {
                let chunks =
                    tokenizer.encode_reader(text.as_bytes(), false).with_chunk_bytes(bytes);
                chunks.collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        writeln!(out, "{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","))?;
    }
    Ok(())
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
