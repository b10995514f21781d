//! Reductions and functions over lanes, written so that the compiler turns them into vector code and
//! so that every tier performs the same operations in the same order.

/// Partial results of a reduction. Element `i` goes to lane `i % 32`; lanes are then combined in
/// halves: 16 and 16, 8 and 8, ….
pub(crate) const LANES: usize = 32;

/// `Σ f(x)` in f32, in the order that [`LANES`] gives.
#[inline(always)]
pub(crate) fn lane_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    combine(lanes, |a, b| a + b)
}

/// `Σ f(x, y, z)` in f32, in the order that [`LANES`] gives. All have the same length.
#[inline(always)]
pub(crate) fn lane_sum3(x: &[f32], y: &[f32], z: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut update = |x: &[f32], y: &[f32], z: &[f32]| {
        for (((lane, &x), &y), &z) in lanes.iter_mut().zip(x).zip(y).zip(z) {
            *lane += f(x, y, z);
        }
    };
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (y_chunks, y_rest) = y.as_chunks::<LANES>();
    let (z_chunks, z_rest) = z.as_chunks::<LANES>();
    for ((x, y), z) in x_chunks.iter().zip(y_chunks).zip(z_chunks) {
        update(x, y, z);
    }
    update(x_rest, y_rest, z_rest);
    combine(lanes, |a, b| a + b)
}

/// `max f(x, w)`, at least 0. A NaN counts as absent.
#[inline(always)]
pub(crate) fn lane_max(x: &[f32], w: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut update = |x: &[f32], w: &[f32]| {
        for ((lane, &x), &w) in lanes.iter_mut().zip(x).zip(w) {
            let value = f(x, w);
            *lane = if value > *lane { value } else { *lane };
        }
    };
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (w_chunks, w_rest) = w.as_chunks::<LANES>();
    for (x, w) in x_chunks.iter().zip(w_chunks) {
        update(x, w);
    }
    update(x_rest, w_rest);
    combine(lanes, |a, b| if b > a { b } else { a })
}

#[inline(always)]
fn combine(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x`, within 2 units in the last place for |x| up to 87, clamped to normal numbers beyond.
///
/// `e^x = 2^n · e^r` with `n = round(x / ln 2)` and a degree-6 polynomial for `e^r`, |r| ≤ ln 2 / 2
/// (Cephes' coefficients), without fused operations, so that all tiers agree.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// ln 2 in two parts, the first with enough trailing zeros that `n` times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// 1.5 · 2^23: adding it leaves a float's integer part in the low bits, rounded half to even.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.500_000_06;
    let e_r = p * (r * r) + r + 1.0;
    let exponent = shifted.to_bits().wrapping_shl(23);
    f32::from_bits(e_r.to_bits().wrapping_add(exponent))
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `d silu(x) / dx = s (1 + x (1 − s))`, given `s = sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu_derivative(x: f32, s: f32) -> f32 {
    s * (1.0 + x * (1.0 - s))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..=870_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            let unit = f64::from(expected as f32) * f64::from(f32::EPSILON);
            worst = worst.max((f64::from(exp(x)) - expected).abs() / unit);
        }
        assert!(worst < 2.0, "worst error {worst} units");
        assert!(worst > 0.3, "an error of {worst} units is too good to have been measured");
    }

    #[test]
    fn sigmoid_and_silu_hold_at_the_ends() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!(sigmoid(200.0), 1.0);
        assert!(sigmoid(-200.0) < 1e-37 && sigmoid(-200.0) >= 0.0);
        assert_eq!(silu(300.0), 300.0);
        assert!(silu(-300.0).abs() < 1e-34);
    }
}
