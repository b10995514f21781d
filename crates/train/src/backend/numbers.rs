//! The numbers of a step, in f64: two elements of a flat buffer hold the bits of each, so that processes exchange them as
//! they exchange parameters.

/// Elements of a number.
pub const ELEMENTS: usize = size_of::<f64>() / size_of::<f32>();
/// Place of the gradients' norm among the numbers of [`clip`](super::Backend::clip).
pub const NORM: usize = 0;
/// Place of what gradients are multiplied by.
pub const FACTOR: usize = 1;
/// Where the losses begin.
pub const LOSSES: usize = 2;

/// Number `at`.
///
/// # Panics
/// If there are fewer.
pub fn get(flat: &[f32], at: usize) -> f64 {
    bytemuck::pod_read_unaligned(bytemuck::cast_slice(&flat[at * ELEMENTS..][..ELEMENTS]))
}

/// All numbers.
pub fn all(flat: &[f32]) -> Vec<f64> {
    (0..flat.len() / ELEMENTS).map(|at| get(flat, at)).collect()
}

/// Sets numbers from `at` on.
///
/// # Panics
/// If there are fewer.
pub fn set(flat: &mut [f32], at: usize, values: &[f64]) {
    let elements = &mut flat[at * ELEMENTS..][..values.len() * ELEMENTS];
    bytemuck::cast_slice_mut::<f32, u8>(elements).copy_from_slice(bytemuck::cast_slice(values));
}
