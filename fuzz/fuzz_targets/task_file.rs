//! Task files of any content are read whole or refused, and what is read has prompts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmfree::eval::files::parse_rows;
use mmfree::eval::tasks::TASKS;

fuzz_target!(|bytes: &[u8]| {
    let Some((&number, bytes)) = bytes.split_first() else { return };
    let task = &TASKS[usize::from(number) % TASKS.len()];
    let Ok(rows) = parse_rows("items.jsonl", &mut &bytes[..]) else { return };
    for row in rows {
        let label = usize::from(number & 1);
        let Ok(doc) = task.doc(row, Some(label)) else { continue };
        assert!(doc.gold < doc.choices.len());
        assert!(doc.requests().count() >= doc.choices.len().min(2));
        assert!(doc.requests().all(|(_, continuation)| !continuation.is_empty()));
    }
});
