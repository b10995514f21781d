//! What the tests of the engine on a GPU share.

use std::sync::Arc;

use mmfree::benchmark::DISTINCT_TOKENS;
use mmfree::builtin;
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

pub fn random(
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

pub fn built_in() -> Arc<Model> {
    Arc::new(Model::load(&builtin::checkpoint().expect("opens")).expect("loads"))
}
