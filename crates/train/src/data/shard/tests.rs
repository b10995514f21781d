use std::fs;

use super::*;

const HASH: [u8; 32] = [7; 32];

/// Writes documents and returns the path of the shard.
fn write(directory: &Path, vocab_size: u32, documents: &[Vec<u32>]) -> PathBuf {
    let path = directory.join("x.tokens");
    let mut writer = ShardWriter::create(&path, vocab_size, HASH).unwrap();
    for document in documents {
        writer.push(document).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish().unwrap();
    path
}

/// Documents of awkward lengths over more than two blocks.
fn documents(vocab_size: u32) -> Vec<Vec<u32>> {
    let lengths = [1, 2, 32_767, 1, 3, 40_000, 7];
    let ids =
        |length: u32| (0..length).map(|i| i.wrapping_mul(2_654_435_761) % vocab_size).collect();
    lengths.map(ids).into()
}

fn read_all(shard: &TokenShard) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    shard.read(0..shard.header().tokens, &mut ids)?;
    Ok(ids)
}

fn from_bytes(bytes: Vec<u8>) -> Result<TokenShard> {
    TokenShard::from_bytes("memory".to_owned(), Bytes::from_static(bytes.leak()))
}

#[test]
fn documents_come_back_in_both_widths() {
    let directory = tempfile::tempdir().unwrap();
    for (vocab_size, width) in [(97, 2), (65_536, 2), (65_537, 4), (200_000, 4)] {
        let documents = documents(vocab_size);
        let path = write(directory.path(), vocab_size, &documents);
        let shard = TokenShard::open(&path).unwrap();
        assert_eq!(read_all(&shard).unwrap(), documents.concat());
        assert_eq!(shard.header().tokenizer_sha256, HASH);
        let mut end = 0;
        for (index, document) in documents.iter().enumerate() {
            end += document.len() as u64;
            assert_eq!(shard.document_end(index as u64), end);
        }
        assert!(fs::metadata(&path).unwrap().len() / end == width);
        let mut part = Vec::new();
        shard.read(32_765..32_775, &mut part).unwrap();
        assert_eq!(part, documents.concat()[32_765..32_775]);
        // No partial file is left.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

#[test]
fn an_interrupted_writer_goes_on_to_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let documents = documents(300);
    let expected = fs::read(write(directory.path(), 300, &documents)).unwrap();
    for stop in 0..documents.len() {
        let path = directory.path().join(format!("{stop}.tokens"));
        let mut writer = ShardWriter::create(&path, 300, HASH).unwrap();
        for document in &documents[..stop] {
            writer.push(document).unwrap();
            writer.end_document().unwrap();
        }
        writer.sync().unwrap();
        let (tokens, done) = (writer.tokens(), writer.documents());
        // Begun and given up.
        writer.push(&vec![7; if stop % 2 == 0 { 5 } else { 100_000 }]).unwrap();
        writer.abandon_document().unwrap();
        // Written, but not recorded, when the process ends.
        writer.push(&[1, 2, 3]).unwrap();
        writer.end_document().unwrap();
        drop(writer);
        let mut writer = ShardWriter::resume(&path, 300, HASH, tokens, done).unwrap();
        for document in &documents[stop..] {
            writer.push(&[1; 70_000]).unwrap();
            writer.abandon_document().unwrap();
            writer.push(document).unwrap();
            writer.end_document().unwrap();
            writer.sync().unwrap();
        }
        writer.finish().unwrap();
        assert!(fs::read(&path).unwrap() == expected, "stopped after {stop}");
    }
    let path = directory.path().join("absent.tokens");
    assert!(ShardWriter::resume(&path, 300, HASH, 5, 1).is_err());
}

#[test]
fn ids_outside_the_vocabulary_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(&directory.path().join("x"), 97, HASH).unwrap();
    assert!(writer.push(&[1, 97]).is_err());
}

#[test]
fn a_shard_of_any_shorter_length_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let whole = fs::read(write(directory.path(), 97, &[vec![1, 2, 3], vec![4]])).unwrap();
    for length in 0..whole.len() {
        let error = from_bytes(whole[..length].to_vec()).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{length}: {error}");
    }
    let longer = [whole.as_slice(), &[0]].concat();
    assert!(from_bytes(longer).unwrap_err().to_string().contains("1 bytes follow"));
}

#[test]
fn a_flipped_bit_anywhere_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let whole = fs::read(write(directory.path(), 97, &[vec![1, 2, 3], vec![4, 5]])).unwrap();
    let padding = HEADER_BYTES + 5 * 2..HEADER_BYTES + 16;
    for byte in (0..whole.len()).filter(|byte| !padding.contains(byte)) {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[byte] ^= 1 << bit;
            let result = from_bytes(bytes).and_then(|shard| read_all(&shard));
            assert!(result.is_err(), "byte {byte}, bit {bit}");
        }
    }
    let mut bytes = whole;
    bytes[HEADER_BYTES] ^= 1;
    let shard = from_bytes(bytes).unwrap();
    let error = shard.verify(&mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("memory") && error.contains("bytes 128 to 138"), "{error}");
}

#[test]
fn sizes_that_lie_are_refused_before_anything_is_allocated() {
    let huge = ShardHeader {
        vocab_size: 97,
        tokens: u64::MAX / 2,
        documents: u64::MAX / 8,
        tokenizer_sha256: HASH,
        tables_checksum: 0,
    };
    assert!(from_bytes(huge.to_bytes().to_vec()).is_err());
    let large = ShardHeader { tokens: 1 << 50, documents: 1 << 40, ..huge };
    assert!(from_bytes(large.to_bytes().to_vec()).is_err());
}
