//! Decoding must not allocate: after the first token every buffer has its size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mmfree::builtin;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::model::Model;
use mmfree::state::State;

/// The system's allocator, counting. Alone in this program, so that no other test is counted.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn decoding_allocates_nothing() {
    let model = Arc::new(Model::load(&builtin::checkpoint().expect("opens")).expect("loads"));
    let options = EngineOptions { threads: Some(2), backend: None };
    let mut engine = Engine::new(Arc::clone(&model), &options).expect("engine");
    let mut state = State::new(&model);
    let start = ALLOCATIONS.load(Ordering::Relaxed);
    engine.prefill(&mut state, &[1, 2, 3], &AtomicBool::new(false)).expect("runs");
    engine.decode(&mut state, 4).expect("runs");
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > start, "the counter sees nothing");
    // What happens once is no defect: on a busy machine a worker thread may begin, and allocate what a
    // thread needs, only after the first tokens. What the loop itself allocates is in every round.
    let mut allocations = || {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for token in 0..20 {
            engine.decode(&mut state, token).expect("runs");
        }
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    let counts: Vec<_> = (0..10).map(|_| allocations()).take_while(|&count| count > 0).collect();
    assert!(counts.len() < 10, "allocations while decoding 20 tokens, again and again: {counts:?}");
}
