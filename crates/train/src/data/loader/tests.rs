use std::collections::HashSet;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::data::dataset::hex;
use crate::data::{Manifest, ManifestShard, ManifestTokenizer, PartOf, ShardWriter};

const VOCAB: u32 = 200_000;

/// A corpus whose token i has the id i, so that every token tells where it comes from. Each inner list is a
/// shard and has the lengths of its documents.
fn corpus(directory: &Path, shards: &[Vec<u64>]) -> Arc<Dataset> {
    let hash = [3; 32];
    let tokenizer = ManifestTokenizer {
        file: "tokenizer.json".to_owned(),
        sha256: hex(&hash),
        vocab_size: VOCAB,
        bos: None,
        eos: None,
    };
    let mut manifest = Manifest::new(PartOf::WHOLE, tokenizer, "text".to_owned(), None);
    for (number, documents) in shards.iter().enumerate() {
        let name = PartOf::WHOLE.shard_name(number);
        let mut writer = ShardWriter::create(&directory.join(&name), VOCAB, hash).unwrap();
        for &length in documents {
            let first = (manifest.tokens + writer.tokens()) as u32;
            writer.push(&(first..first + length as u32).collect::<Vec<_>>()).unwrap();
            writer.end_document().unwrap();
        }
        let header = writer.finish().unwrap();
        manifest.tokens += header.tokens;
        manifest.documents += header.documents;
        manifest.shards.push(ManifestShard::new(name, &header));
    }
    std::fs::write(directory.join("manifest.json"), manifest.to_json()).unwrap();
    Arc::new(Dataset::open(&[directory]).unwrap())
}

fn options(seq_len: usize, batch_size: usize, part: Part) -> LoaderOptions {
    LoaderOptions { seq_len, batch_size, part, order: Order::Epochs { seed: 1 } }
}

/// The inputs of the first `sequences` rows in order.
fn rows(loader: &Loader, sequences: u64) -> Vec<Vec<u32>> {
    let (size, seq_len) = (loader.options.batch_size, loader.options.seq_len);
    let steps = sequences.div_ceil(size as u64);
    let mut rows = Vec::new();
    for step in 0..steps {
        let batch = loader.batch(step, 0, 1).unwrap();
        rows.extend(batch.ids.chunks(seq_len).map(<[u32]>::to_vec));
    }
    rows.truncate(sequences as usize);
    rows
}

fn shapes() -> impl Strategy<Value = Vec<Vec<u64>>> {
    let documents = prop::collection::vec(1_u64..60, 1..30);
    prop::collection::vec(documents, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_epoch_has_every_sequence_once(
        shards in shapes(), seq_len in 1_usize..20, batch_size in 1_usize..9, seed: u64,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let dataset = corpus(directory.path(), &shards);
        let order = Order::Epochs { seed };
        let options = LoaderOptions { order, ..options(seq_len, batch_size, Part::All) };
        let Ok(loader) = Loader::new(Arc::clone(&dataset), options) else {
            prop_assert!(dataset.tokens() < seq_len as u64 + 1);
            return Ok(());
        };
        let sequences = loader.sequences();
        let all = rows(&loader, 3 * sequences);
        for epoch in all.chunks(sequences as usize) {
            let starts: HashSet<u32> = epoch.iter().map(|row| row[0]).collect();
            prop_assert_eq!(starts.len() as u64, sequences);
            prop_assert!(epoch.iter().all(|row| row[0] % seq_len as u32 == 0));
            prop_assert!(epoch.iter().all(|row| row.windows(2).all(|pair| pair[1] == pair[0] + 1)));
        }
        // Almost all tokens are used: fewer than T + 1 are left.
        prop_assert!(dataset.tokens() - sequences * (seq_len as u64) <= seq_len as u64);
        let step = loader.steps_per_epoch();
        let batch = loader.batch(step, 0, 1).unwrap();
        prop_assert!(batch.ids.iter().zip(&batch.targets).all(|(id, target)| id + 1 == *target));
    }

    #[test]
    fn any_number_of_processes_sees_the_same_global_batch(
        shards in shapes(), batch_size in 1_usize..20, step in 0_u64..1000, world in 1_usize..9,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let dataset = corpus(directory.path(), &shards);
        let Ok(loader) = Loader::new(dataset, options(2, batch_size, Part::All)) else { return Ok(()) };
        let whole = loader.batch(step, 0, 1).unwrap();
        let mut joined = Batch { seq_len: 2, ..Batch::default() };
        for rank in 0..world {
            let part = loader.batch(step, rank, world).unwrap();
            prop_assert!(part.rows.abs_diff(batch_size / world) <= 1);
            joined.rows += part.rows;
            joined.ids.extend(part.ids);
            joined.targets.extend(part.targets);
        }
        prop_assert_eq!(&joined, &whole);
        // Opened anew, as by a process that resumes.
        let again = Dataset::open(&[directory.path()]).unwrap();
        let again = Loader::new(Arc::new(again), options(2, batch_size, Part::All)).unwrap();
        prop_assert_eq!(again.batch(step, 0, 1).unwrap(), whole);
    }

    #[test]
    fn held_out_documents_are_whole_and_apart(
        lengths in prop::collection::vec(1_u64..30, 1..200), share in 0.0..1.0,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let dataset = corpus(directory.path(), std::slice::from_ref(&lengths));
        let held_out = Part::HeldOut { held_out: share }.ranges(&dataset);
        let training = Part::Training { held_out: share }.ranges(&dataset);
        let mut all: Vec<_> = held_out.iter().chain(&training).cloned().collect();
        all.sort_by_key(|range| range.start);
        prop_assert_eq!(all.first().unwrap().start, 0);
        prop_assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
        prop_assert_eq!(all.last().unwrap().end, dataset.tokens());
        if share * lengths.len() as f64 >= 4.0 {
            let ends: HashSet<u64> = (0..dataset.documents()).map(|d| dataset.document_end(d)).collect();
            prop_assert!(all.iter().all(|range| ends.contains(&range.end)));
            let chosen = (0..dataset.documents())
                .filter(|&d| held_out.iter().any(|r| r.contains(&(dataset.document_end(d) - 1))));
            prop_assert_eq!(chosen.count(), (share * lengths.len() as f64).round() as usize);
        }
    }
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = corpus(directory.path(), &[vec![2001]]);
    let loader = Loader::new(Arc::clone(&dataset), options(20, 10, Part::All)).unwrap();
    let all = rows(&loader, 200);
    let (first, second) = all.split_at(100);
    assert_ne!(first, second);
    assert!(first.iter().enumerate().filter(|(i, row)| row[0] as usize == i * 20).count() < 10);
    let other = LoaderOptions { order: Order::Epochs { seed: 2 }, ..options(20, 10, Part::All) };
    assert_ne!(rows(&Loader::new(dataset, other).unwrap(), 100), first);
    assert_eq!((loader.epoch(9), loader.epoch(10), loader.epoch(19)), (0, 1, 1));
}

#[test]
fn evaluation_takes_every_sequence_once_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = corpus(directory.path(), &[vec![101]]);
    let once = LoaderOptions { order: Order::Once, ..options(10, 4, Part::All) };
    let loader = Loader::new(dataset, once).unwrap();
    let sizes: Vec<_> = (0..5).map(|step| loader.batch(step, 0, 1).unwrap().rows).collect();
    assert_eq!(sizes, [4, 4, 2, 0, 0]);
    assert_eq!(loader.steps_per_epoch(), 3);
    let starts: HashSet<u32> = rows(&loader, 10).iter().map(|row| row[0]).collect();
    assert_eq!(starts.len(), 10);
}

#[test]
fn too_little_text_is_an_error_with_both_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = corpus(directory.path(), &[vec![10, 10]]);
    let error =
        Loader::new(Arc::clone(&dataset), options(20, 1, Part::All)).unwrap_err().to_string();
    assert!(error.contains("20 tokens") && error.contains("need 21"), "{error}");
    let part = Part::HeldOut { held_out: 0.1 };
    let error = Loader::new(Arc::clone(&dataset), options(5, 1, part)).unwrap_err().to_string();
    assert!(error.contains("held-out part"), "{error}");
    let part = Part::HeldOut { held_out: 1.5 };
    assert!(Loader::new(Arc::clone(&dataset), options(5, 1, part)).is_err());
    assert!(Loader::new(dataset, options(0, 1, Part::All)).is_err());
}
