use std::cell::RefCell;

use super::*;
use crate::data::Dataset;

fn tokenizer() -> TokenizerSource {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = path.join("../../tests/fixtures/tokenizers/byte-level.json");
    TokenizerSource::open(&path).unwrap()
}

/// Documents of all sizes, among them one that is cut into many parts.
fn documents() -> Vec<String> {
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    };
    let words =
        ["the", "sea", "größer", "日本", "a\n\n", "ship's", "1234", "\"quoted\"", "—", "🐟"];
    let lengths = [1, 3, 90_000, 2, 500, 40, 7, 3000, 12, 25_000];
    let mut text = |length| -> String {
        let words: Vec<_> = (0..length).map(|_| words[random() % words.len()]).collect();
        words.join(" ")
    };
    lengths.into_iter().cycle().take(40).map(&mut text).collect()
}

fn json_lines(documents: &[String]) -> String {
    let line =
        |text: &String| serde_json::json!({"meta": {"n": 1}, "text": text}).to_string() + "\n";
    documents.iter().map(line).collect()
}

/// A directory with files of text, and another for what becomes of them.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn options(&self, inputs: &[PathBuf], output: &str) -> TokenizeOptions {
        let output = self.0.path().join(output);
        let mut options = TokenizeOptions::new(inputs.to_vec(), output, tokenizer());
        options.shard_tokens = 50_000;
        options.threads = 3;
        options
    }

    fn tokenize(&self, inputs: &[PathBuf], output: &str) -> Manifest {
        tokenize(&self.options(inputs, output), &AtomicBool::new(false), &mut |_| {}).unwrap()
    }
}

/// The documents in a directory of shards.
fn ids(directory: &Path) -> Vec<Vec<u32>> {
    let dataset = Dataset::open(&[directory]).unwrap();
    dataset.verify(&mut |_, _| {}).unwrap();
    let mut start = 0;
    (0..dataset.documents())
        .map(|document| {
            let end = dataset.document_end(document);
            let mut ids = Vec::new();
            dataset.read(start..end, &mut ids).unwrap();
            start = end;
            ids
        })
        .collect()
}

/// Names and contents of a directory.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn compressed(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// What the ids of a document must be.
fn expected(texts: &[String]) -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_source(&tokenizer()).unwrap();
    let (prefix, suffix) = around(&tokenizer, None).unwrap();
    let document = |text: &String| {
        [prefix.clone(), tokenizer.encode(text, false).unwrap(), suffix.clone()].concat()
    };
    texts.iter().map(document).collect()
}

#[test]
fn every_format_gives_the_ids_of_the_whole_documents() {
    let bench = Bench::new();
    let texts = documents();
    let expected = expected(&texts);
    let lines = json_lines(&texts);
    let (head, tail) = lines.split_at(lines.len() / 2);
    let frames = [compressed(head.as_bytes()), compressed(tail.as_bytes())].concat();
    let separated = texts.join("\n=====\n");
    let inputs = [
        bench.file("a.jsonl", lines.as_bytes()),
        bench.file("b.jsonl.zst", &compressed(lines.as_bytes())),
        bench.file("c.jsonl.zst", &frames),
        bench.file("d.txt", separated.as_bytes()),
        bench.file("e.txt.zst", &compressed(format!("\u{feff}{separated}").as_bytes())),
    ];
    for input in inputs {
        let output = format!("out-{}", input.file_name().unwrap().display());
        let mut options = bench.options(&[input], &output);
        options.separator = Some("=====".to_owned());
        let manifest = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
        let found = ids(&options.output);
        assert!(found == expected, "{output}");
        assert_eq!(manifest.documents, 40);
        assert!(manifest.shards.len() > 3, "{}", manifest.shards.len());
        assert_eq!(manifest.tokens, found.iter().map(|ids| ids.len() as u64).sum::<u64>());
    }
}

#[test]
fn a_file_of_plain_text_is_one_document() {
    let bench = Bench::new();
    let text = documents().concat();
    let input = bench.file("a.txt", text.as_bytes());
    let manifest = bench.tokenize(&[input], "out");
    assert_eq!((manifest.documents, manifest.text_bytes), (1, text.len() as u64));
    assert!(ids(&bench.0.path().join("out")) == expected(&[text]));
}

#[test]
fn sentencepiece_texts_are_encoded_as_they_are_read() {
    let bench = Bench::new();
    let text = documents().concat();
    let input = bench.file("a.txt", text.as_bytes());
    let path = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = path.join("../../tests/fixtures/tokenizers/bpe-byte-fallback.model");
    let mut options = bench.options(&[input], "out");
    options.tokenizer = TokenizerSource::open(&path).unwrap();
    tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    let tokenizer = Tokenizer::from_source(&options.tokenizer).unwrap();
    let mut expected = tokenizer.encode(&text, true).unwrap();
    expected.extend(tokenizer.eos());
    assert!(ids(&options.output) == [expected]);
}

#[test]
fn threads_do_not_change_a_byte() {
    let bench = Bench::new();
    let input = bench.file("a.jsonl", json_lines(&documents()).as_bytes());
    let outputs = [1, 2, 7].map(|threads| {
        let options = TokenizeOptions {
            threads,
            ..bench.options(std::slice::from_ref(&input), &threads.to_string())
        };
        tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
        files(&options.output)
    });
    assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2]);
    let names: Vec<_> = outputs[0].iter().map(|(name, _)| name.as_str()).collect();
    assert!(
        names.iter().all(|name| !name.contains("partial") && !name.contains("progress")),
        "{names:?}"
    );
}

#[test]
fn parts_together_are_the_whole() {
    let bench = Bench::new();
    let texts = documents();
    let inputs: Vec<_> = texts
        .chunks(10)
        .enumerate()
        .map(|(i, texts)| bench.file(&format!("{i}.jsonl"), json_lines(texts).as_bytes()))
        .collect();
    let mut expected = expected(&texts);
    expected.sort();
    for (inputs, count) in [(&inputs[..], 3), (&inputs[..], 7)] {
        let output = format!("out-{count}");
        for index in 1..=count {
            let options = bench.options(inputs, &output);
            if index > 1 {
                let error = Dataset::open(&[&options.output]).unwrap_err().to_string();
                assert!(error.contains("parts of the corpus are missing"), "{error}");
            }
            let options = TokenizeOptions { part: PartOf { index, count }, ..options };
            tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
        }
        let mut found = ids(&bench.0.path().join(&output));
        found.sort();
        assert!(found == expected, "{count} parts");
    }
}

#[test]
fn parts_that_were_made_with_other_options_are_no_corpus() {
    let bench = Bench::new();
    let input = bench.file("a.txt", b"one\n--\ntwo\n--\nthree");
    for (index, separator) in [(1, "--"), (2, "==")] {
        let part = PartOf { index, count: 2 };
        let separator = Some(separator.to_owned());
        let options = bench.options(std::slice::from_ref(&input), "out");
        let options = TokenizeOptions { part, separator, ..options };
        tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    }
    let error = Dataset::open(&[bench.0.path().join("out")]).unwrap_err().to_string();
    assert!(error.contains("document separator: \"--\" then, \"==\" now"), "{error}");
}

#[test]
fn an_interrupted_job_goes_on_to_the_same_bytes() {
    let bench = Bench::new();
    let texts = documents();
    let inputs = [
        bench.file("a.jsonl.zst", &compressed(json_lines(&texts[..20]).as_bytes())),
        bench.file("b.txt", texts[20..30].join("\n--\n").as_bytes()),
        bench.file("c.jsonl", json_lines(&texts[30..]).as_bytes()),
    ];
    let options = |output: &str| TokenizeOptions {
        separator: Some("--".to_owned()),
        sync_interval: Duration::ZERO,
        ..bench.options(&inputs, output)
    };
    tokenize(&options("whole"), &AtomicBool::new(false), &mut |_| {}).unwrap();
    let whole = files(&options("whole").output);
    let (mut interruptions, mut finished) = (0, false);
    while !finished {
        let (cancel, events) = (AtomicBool::new(false), RefCell::new(0));
        let mut resumed = 0;
        let result = tokenize(&options("parts"), &cancel, &mut |event| {
            *events.borrow_mut() += 1;
            if let Event::Resumed(documents) = event {
                resumed = documents;
            }
            // More each time: a long document has many parts.
            if *events.borrow() > 6 + interruptions {
                cancel.store(true, Ordering::Relaxed);
            }
        });
        assert!(interruptions == 0 || resumed > 0 || result.is_ok());
        finished = result.is_ok();
        interruptions += 1;
        assert!(interruptions < 200);
    }
    assert!(interruptions > 4, "{interruptions}");
    assert!(files(&options("parts").output) == whole);
    // Once more changes nothing.
    let mut was_done = false;
    let again = tokenize(&options("parts"), &AtomicBool::new(false), &mut |event| {
        was_done |= matches!(event, Event::AlreadyDone);
    });
    assert!(again.is_ok() && was_done && files(&options("parts").output) == whole);
}

#[test]
fn broken_documents_stop_the_work_or_are_left_out() {
    let bench = Bench::new();
    let good = r#"{"text": "fine"}"#;
    let lines: [(&[u8], &str); 7] = [
        (b"{\"text\": \"open", "not a JSON object"),
        (b"[1, 2]", "expected an object"),
        (b"{\"title\": \"x\"}", "no field \"text\" (--field, data.text_field); it has \"title\""),
        (b"{\"text\": 7}", "is a number; expected a string"),
        (b"{\"text\": \"\xff\xfe\"}", "not UTF-8"),
        (b"{\"text\": \"a\"} x", "trailing characters"),
        (b"{\"text\": \"\\ud800\"}", "not a JSON object"),
    ];
    for (number, (line, expected)) in lines.into_iter().enumerate() {
        let text = [good.as_bytes(), b"\n\n", line, b"\n", good.as_bytes()].concat();
        let input = bench.file(&format!("{number}.jsonl"), &text);
        let options = bench.options(&[input], &format!("out-{number}"));
        let error =
            tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(".jsonl:3"), "{error}");
        let options = TokenizeOptions { on_error: OnError::Skip, ..options };
        let mut skipped = Vec::new();
        let manifest = tokenize(&options, &AtomicBool::new(false), &mut |event| {
            if let Event::Skipped(error) = event {
                skipped.push(error.to_string());
            }
        });
        let manifest = manifest.unwrap();
        assert_eq!((manifest.documents, manifest.skipped, skipped.len()), (2, 1, 1));
        assert_eq!(manifest.sources[0].skipped, 1);
        assert_eq!(ids(&options.output).len(), 2);
    }
}

/// The lines before the broken one must be as they were; what follows may be anything.
#[test]
fn a_mended_corpus_goes_on_to_the_bytes_of_a_good_one() {
    let bench = Bench::new();
    let texts = documents();
    let (head, tail) = (json_lines(&texts[..25]), json_lines(&texts[25..]));
    for (name, pack) in
        [("a.jsonl", <[u8]>::to_vec as fn(&[u8]) -> Vec<u8>), ("b.jsonl.zst", compressed)]
    {
        let write = |text: &str| bench.file(name, &pack(text.as_bytes()));
        let input = write(&format!("{head}{{\"text\": \"open\n{tail}"));
        let last = bench.file("last.jsonl", b"{}");
        let inputs = [input, last];
        let options = |output: &str| bench.options(&inputs, &format!("{output}-{name}"));
        let run = |output| tokenize(&options(output), &AtomicBool::new(false), &mut |_| {});
        let error = run("mended").unwrap_err().to_string();
        assert!(error.contains(&format!("{name}:26")), "{error}");
        // Another line before it, and then the same ones.
        write(&format!("{{\"text\": \"new\"}}\n{head}{tail}"));
        let error = run("mended").unwrap_err().to_string();
        assert!(error.contains("interrupted job") && error.contains(name), "{error}");
        write(&format!("{head}{tail}"));
        assert!(run("mended").unwrap_err().to_string().contains("last.jsonl:1"));
        bench.file("last.jsonl", b"{\"text\": \"last\"}\n");
        run("mended").unwrap();
        run("whole").unwrap();
        assert!(files(&options("mended").output) == files(&options("whole").output));
    }
}

#[test]
fn files_that_break_off_keep_what_comes_before() {
    let bench = Bench::new();
    let texts = documents();
    let whole = compressed(json_lines(&texts).as_bytes());
    let truncated = bench.file("a.jsonl.zst", &whole[..whole.len() * 2 / 3]);
    let text = bench.file("b.txt", b"one\ntwo\n\xc3\x28\n");
    let last = bench.file("c.jsonl", b"{\"text\": \"last\"}\n{\"text\": \" \\n\"}\n\n");
    let options = bench.options(&[truncated, text, last], "out");
    let error = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("a.jsonl.zst") && error.contains("truncated"), "{error}");
    let options = TokenizeOptions { on_error: OnError::Skip, ..options };
    let mut skipped = Vec::new();
    let manifest = tokenize(&options, &AtomicBool::new(false), &mut |event| {
        if let Event::Skipped(error) = event {
            skipped.push(error.to_string());
        }
    })
    .unwrap();
    assert_eq!((manifest.skipped, manifest.empty_documents), (2, 1), "{skipped:?}");
    assert!(skipped[1].contains("b.txt:3") && skipped[1].contains("offset 8"), "{skipped:?}");
    let kept = ids(&options.output);
    assert!(kept.len() > 5 && kept[..kept.len() - 1] == expected(&texts)[..kept.len() - 1]);
    assert_eq!(kept.last(), expected(&["last".to_owned()]).first());
}

#[test]
fn a_corpus_without_text_is_an_error_and_leaves_no_shards() {
    let bench = Bench::new();
    let blank = "{\"text\": \"\"}\n{\"text\": \" \\n\"}\n";
    let inputs = [bench.file("a.jsonl", blank.as_bytes()), bench.file("b.txt", b"")];
    let options = bench.options(&inputs, "out");
    let error = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("a.jsonl") && error.contains("only white space: 3)"), "{error}");
    let left: Vec<_> = files(&options.output).into_iter().map(|(name, _)| name).collect();
    assert_eq!(left, ["tokenizer.json"]);
    // Of a corpus in parts, one may have nothing to do.
    for index in 1..=2 {
        let part = PartOf { index, count: 2 };
        let inputs = [inputs[0].clone(), bench.file("c.jsonl", b"{\"text\": \"some\"}\n")];
        let options = TokenizeOptions { part, ..bench.options(&inputs, "parts") };
        tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    }
    assert_eq!(ids(&bench.0.path().join("parts")).len(), 1);
    // Text where there was none: the same directory serves.
    bench.file("b.txt", b"text");
    bench.tokenize(&inputs, "out");
}

#[test]
fn an_output_of_something_else_is_left_alone() {
    let bench = Bench::new();
    let input = bench.file("a.jsonl", b"{\"text\": \"one\"}\n");
    bench.tokenize(std::slice::from_ref(&input), "out");
    let other = bench.file("b.jsonl", b"{\"text\": \"two\"}\n");
    let refused = |options: &TokenizeOptions, expected: &str| {
        let files = |directory: &Path| {
            let mut files = files(directory);
            files.retain(|(name, _)| !name.starts_with("lock-of"));
            files
        };
        let before = files(&options.output);
        let error =
            tokenize(options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(files(&options.output) == before);
    };
    let first = format!("files: {} of 16 bytes then", input.display());
    refused(&bench.options(&[other], "out"), &first);
    let options = bench.options(std::slice::from_ref(&input), "out");
    let separated = TokenizeOptions { separator: Some("--".to_owned()), ..options.clone() };
    refused(&separated, "document separator: none then, \"--\" now");
    let field = TokenizeOptions { field: "body".to_owned(), ..options.clone() };
    refused(&field, "field of the text: text then, body now");
    let eos = TokenizeOptions { eos_token: Some("<s>".to_owned()), ..options };
    refused(&eos, "token after a document");
    let mut options = bench.options(std::slice::from_ref(&input), "out");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers");
    options.tokenizer = TokenizerSource::open(&fixtures.join("llama-3.json")).unwrap();
    options.eos_token = Some("<|end|>".to_owned());
    refused(&options, "another tokenizer");

    let options = bench.options(std::slice::from_ref(&input), "stopped");
    let _ = tokenize(&options, &AtomicBool::new(true), &mut |_| {});
    let small = TokenizeOptions { shard_tokens: 7, ..options.clone() };
    refused(&small, "--shard-tokens: 50000 then, 7 now");
    let separated = TokenizeOptions { separator: Some("--".to_owned()), ..options };
    refused(&separated, "document separator: none then, \"--\" now");
    assert!(source::list(&[input.clone(), input], PartOf::WHOLE).is_err());
    assert!(source::list(&[bench.0.path().join("absent")], PartOf::WHOLE).is_err());
}

#[test]
fn shards_of_equal_size_that_changed_places_are_noticed() {
    let bench = Bench::new();
    let texts = ["the sea", "ship's 1234", "ship's 1234", "the sea"].map(str::to_owned);
    let mut options = bench.options(&[bench.file("a.jsonl", json_lines(&texts).as_bytes())], "out");
    options.shard_tokens = expected(&texts[..2]).concat().len() as u64;
    tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    let paths = ["shard-00000.tokens", "shard-00001.tokens"].map(|name| options.output.join(name));
    let shards = paths.each_ref().map(|path| fs::read(path).unwrap());
    assert!(shards[0].len() == shards[1].len() && shards[0] != shards[1]);
    fs::write(&paths[0], &shards[1]).unwrap();
    fs::write(&paths[1], &shards[0]).unwrap();
    let error = Dataset::open(&[&options.output]).unwrap_err().to_string();
    assert!(error.contains("shard-00000.tokens: checksum"), "{error}");
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_columns_are_read() {
    use std::sync::Arc;

    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    let bench = Bench::new();
    let texts = documents();
    let path = bench.0.path().join("a.parquet");
    let schema = "message m { optional int64 id; optional binary text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(parquet::basic::Compression::SNAPPY)
        .set_data_page_row_count_limit(4)
        .build();
    let file = fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for group in texts.chunks(15) {
        let mut rows = writer.next_row_group().unwrap();
        while let Some(mut column) = rows.next_column().unwrap() {
            match column.untyped() {
                ColumnWriter::Int64ColumnWriter(column) => {
                    column
                        .write_batch(&vec![7; group.len()], Some(&vec![1; group.len()]), None)
                        .unwrap();
                }
                ColumnWriter::ByteArrayColumnWriter(column) => {
                    // The third row of each group is null.
                    let levels: Vec<i16> = (0..group.len()).map(|i| i16::from(i != 2)).collect();
                    let values = group.iter().enumerate().filter(|(i, _)| *i != 2);
                    let values: Vec<_> = values.map(|(_, t)| ByteArray::from(t.as_str())).collect();
                    column.write_batch(&values, Some(&levels), None).unwrap();
                }
                _ => unreachable!(),
            }
            column.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.close().unwrap();

    let options = bench.options(std::slice::from_ref(&path), "out");
    let error = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("row 3") && error.contains("null"), "{error}");
    // Goes on where it stopped.
    let options = TokenizeOptions { on_error: OnError::Skip, ..options };
    let manifest = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    assert_eq!((manifest.documents, manifest.skipped), (37, 3));
    let mut kept = texts;
    for null in [32, 17, 2] {
        kept.remove(null);
    }
    assert!(ids(&options.output) == expected(&kept));

    let mut options = bench.options(std::slice::from_ref(&path), "other");
    options.field = "body".to_owned();
    let error = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("no column \"body\"") && error.contains("id, text"), "{error}");
    let whole = fs::read(&path).unwrap();
    for length in [0, 3, 100, whole.len() / 2, whole.len() - 1] {
        let path = bench.file(&format!("{length}.parquet"), &whole[..length]);
        let options = bench.options(&[path], &format!("out-{length}"));
        let error =
            tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(".parquet: not a complete parquet file"), "{error}");
    }
}

#[test]
fn a_text_that_cannot_be_encoded_in_parts_is_left_out_whole() {
    let bench = Bench::new();
    // One word of more than the longest stretch, after text that has gone out already.
    let long = format!("{} {}", "word ".repeat(100_000), "x".repeat(40 << 20));
    let inputs = [
        bench.file("a.txt", b"first"),
        bench.file("b.txt", long.as_bytes()),
        bench.file("c.txt", b"last"),
    ];
    let options = bench.options(&inputs, "out");
    assert!(tokenize(&options, &AtomicBool::new(false), &mut |_| {}).is_err());
    let options = TokenizeOptions { on_error: OnError::Skip, ..options };
    let manifest = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    assert_eq!((manifest.documents, manifest.skipped), (2, 1));
    assert!(ids(&options.output) == expected(&["first".to_owned(), "last".to_owned()]));
}

/// The processes of a run do this to one corpus at the same time.
#[test]
fn a_complete_corpus_is_found_by_many_at_once() {
    let bench = Bench::new();
    let input = bench.file("a.jsonl", json_lines(&documents()).as_bytes());
    let options = bench.options(&[input], "out");
    let manifest = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    std::thread::scope(|scope| {
        let look = || {
            for _ in 0..50 {
                let found = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
                assert_eq!(found, manifest);
            }
        };
        for _ in 0..4 {
            scope.spawn(look);
        }
    });
}

#[test]
fn a_second_job_at_the_same_time_is_refused() {
    let bench = Bench::new();
    let input = bench.file("a.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
    let options = bench.options(&[input], "out");
    let mut refused = None;
    tokenize(&options, &AtomicBool::new(false), &mut |event| {
        if matches!(event, Event::Progress { .. }) && refused.is_none() {
            refused = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).err();
        }
    })
    .unwrap();
    let error = refused.unwrap().to_string();
    assert!(error.contains("another `mmfree tokenize`"), "{error}");
}

#[test]
fn a_full_disk_is_an_error_and_the_work_goes_on_later() {
    let bench = Bench::new();
    let input = bench.file("a.jsonl", json_lines(&documents()).as_bytes());
    let options = bench.options(std::slice::from_ref(&input), "out");
    fs::create_dir(&options.output).unwrap();
    // Every write to it fails as on a full disk.
    let full = options.output.join("shard-00001.tokens.partial");
    std::os::unix::fs::symlink("/dev/full", &full).unwrap();
    let error = tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("cannot write") && error.contains("shard-00001"), "{error}");
    fs::remove_file(full).unwrap();
    tokenize(&options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    bench.tokenize(std::slice::from_ref(&input), "whole");
    assert!(files(&options.output) == files(&bench.0.path().join("whole")));
}
