//! What the tests of the engine on a GPU share.

use std::sync::Arc;

use mmfree::benchmark::DISTINCT_TOKENS;
use mmfree::builtin;
use mmfree::checkpoint::Checkpoint;
use mmfree::config::ModelConfig;
use mmfree::engine::{Engine, EngineOptions};
use mmfree::model::Model;
use mmfree_kernels::cuda::Device;
use mmfree_kernels::ternary::Layout;

/// The first GPU; `None` where there is none.
pub fn device() -> Option<Arc<Device>> {
    match Device::open(0) {
        Ok(device) => Some(device),
        Err(reason) => {
            assert!(std::env::var_os("MMFREE_REQUIRE_CUDA").is_none(), "{reason}");
            eprintln!("!!! SKIPPED, no GPU: {reason}");
            None
        }
    }
}

/// How much a test does: all of it, or a little of everything with `MMFREE_FEW_GPU_STEPS` set, so that it ends in minutes under
/// a tool that watches each access to memory.
pub fn all_or_few<T>(all: T, few: T) -> T {
    if std::env::var_os("MMFREE_FEW_GPU_STEPS").is_some() { few } else { all }
}

/// An engine on the first GPU; `None` where there is none.
pub fn gpu(model: &Arc<Model>) -> Option<Engine> {
    device().map(|_| engine(model, "cuda"))
}

pub fn engine(model: &Arc<Model>, backend: &str) -> Engine {
    let options = EngineOptions { threads: Some(2), backend: Some(backend.to_owned()) };
    Engine::new(Arc::clone(model), &options).expect("engine")
}

/// A test for each model, in a module of the name of the function that takes the model.
#[macro_export]
macro_rules! for_each_model {
    ($($test:ident)*) => {$(
        for_each_model! { @ $test: tiny built_in odd_sizes wide uneven_tiles widest rounds parts }
    )*};
    (@ $test:ident: $($model:ident)*) => {
        mod $test {$(
            #[test]
            fn $model() {
                super::$test(&super::support::$model());
            }
        )*}
    };
}

pub fn tiny() -> Arc<Model> {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny");
    Arc::new(Model::load(&Checkpoint::open(fixture).expect("opens")).expect("loads"))
}

pub fn built_in() -> Arc<Model> {
    Arc::new(Model::load(&builtin::checkpoint().expect("opens")).expect("loads"))
}

pub fn odd_sizes() -> Arc<Model> {
    random(132, 340, 2, 1003)
}

pub fn wide() -> Arc<Model> {
    random(1024, 2816, 2, 32000)
}

/// Whole tiles of the width and none of the others.
pub fn uneven_tiles() -> Arc<Model> {
    random(256, 328, 3, 1003)
}

/// A thread holds two fours of a row of the others, four and eight of these.
pub fn widest() -> Arc<Model> {
    random(4100, 8204, 1, 300)
}

/// Of large batches blocks multiply layers and channels in rounds,
pub fn rounds() -> Arc<Model> {
    random(2048, 5632, 1, 300)
}

/// and activations in parts.
pub fn parts() -> Arc<Model> {
    random(4096, 5632, 1, 300)
}

fn random(
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    vocab_size: usize,
) -> Arc<Model> {
    let config = ModelConfig {
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        vocab_size,
        ..ModelConfig::preset("370m").expect("preset")
    };
    Arc::new(Model::random(&config, Layout::Base3, DISTINCT_TOKENS, 5).expect("random model"))
}
