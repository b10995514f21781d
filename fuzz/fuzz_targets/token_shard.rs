//! A token shard and a manifest of any content are read whole or refused.
//!
//! Shards get right checksums of header and tables, so that what is behind them is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree_fuzz::Borrowed;
use mmfree_kernels::memory::Bytes;
use mmfree_train::data::{Manifest, TokenShard};
use mmfree_train::log::EventReader;
use twox_hash::XxHash3_64;

/// Puts the checksums right that `docs/token-shards.md` describes.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes.len() < 128 {
        return bytes;
    }
    let width = u64::from(u32::from_le_bytes(bytes[12..16].try_into().unwrap()));
    let tokens = u64::from_le_bytes(bytes[24..32].try_into().unwrap());
    let tables = tokens.checked_mul(width).and_then(|data| data.checked_add(128)?.checked_next_multiple_of(8));
    if let Some(tables) = tables.and_then(|at| bytes.get(usize::try_from(at).ok()?..)) {
        let checksum = XxHash3_64::oneshot(tables).to_le_bytes();
        bytes[72..80].copy_from_slice(&checksum);
    }
    let checksum = XxHash3_64::oneshot(&bytes[..120]).to_le_bytes();
    bytes[120..128].copy_from_slice(&checksum);
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::parse("manifest", bytes);
    let _ = EventReader::new(bytes).count();
    let bytes = Borrowed::new(&with_checksums(bytes));
    // SAFETY: the shard is dropped before the bytes.
    let mapped = Bytes::from_static(unsafe { bytes.get() });
    if let Ok(shard) = TokenShard::from_bytes("shard".to_owned(), mapped) {
        let _ = shard.verify(&mut |_| {});
        for document in 0..shard.header().documents {
            assert!(shard.document_end(document) <= shard.header().tokens);
        }
    }
});
