//! What the tests of the GPU backend share.

use mmfree_train::backend::{CpuBackend, CudaBackend};

pub fn gpu() -> Option<CudaBackend> {
    match CudaBackend::new(0) {
        Ok(backend) => Some(backend),
        Err(reason) => {
            assert!(std::env::var_os("MMFREE_REQUIRE_CUDA").is_none(), "{reason}");
            eprintln!("!!! SKIPPED, no GPU: {reason}");
            None
        }
    }
}

pub fn cpu() -> CpuBackend {
    CpuBackend::new(Some(2), None).unwrap()
}

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// ‖found − expected‖ / ‖expected‖
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
    (difference / norm.max(1e-30)).sqrt()
}
