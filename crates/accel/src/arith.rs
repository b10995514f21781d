//! The arithmetic of the accelerator, defined to the bit. `docs/numerics.md` has the same in words.
//!
//! A vector element is an `i32` with 20 fraction bits ("Q20"): -2048 to 2048 in steps of 2^-20. A [`Scale`] is an
//! unsigned mantissa and an exponent. Every rounding is to the nearest, halves up; every result that
//! does not fit saturates. The hardware computes these functions, one multiplier a step; only the sums
//! of a ternary product are exact integers that need none.

/// Fraction bits of a vector element.
pub const FRACTION_BITS: u32 = 20;
/// The element that stands for 1.0.
pub const ONE: i32 = 1 << FRACTION_BITS;
/// Fraction bits of a mean of squares and of ε.
pub const MEAN_FRACTION_BITS: u32 = 28;
/// Bits that are dropped from each square before they are added up.
pub const SQUARE_SHIFT: u32 = 2 * FRACTION_BITS - MEAN_FRACTION_BITS;
/// Smallest `max |y|` that the quantiser divides by: 1e-5 in Q20.
pub const QUANT_FLOOR: u32 = 10;
/// Segments of the sigmoid: [0, 16) in steps of 1/16.
pub const SIGMOID_SEGMENTS: usize = 256;

/// A positive factor: `mantissa · 2^-exponent`, with a mantissa below 2^31 and an exponent of 0 to 63.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scale {
    /// Below 2^31.
    pub mantissa: u32,
    /// 0 to 63; one that does not fit is clamped.
    pub exponent: u32,
}

impl Scale {
    /// The nearest scale with a full mantissa, in `[2^30, 2^31)`; zero for anything that is not positive.
    pub fn from_f64(value: f64) -> Self {
        if value.is_nan() || value <= 0.0 {
            return Self::default();
        }
        let mut exponent = 30 - value.log2().floor() as i64;
        let mut mantissa = (value * (exponent as f64).exp2()).round();
        if mantissa >= 2f64.powi(31) {
            mantissa /= 2.0;
            exponent -= 1;
        } else if mantissa < 2f64.powi(30) {
            exponent += 1;
            mantissa = (value * (exponent as f64).exp2()).round();
        }
        if exponent > 63 {
            return Self {
                mantissa: (mantissa / ((exponent - 63) as f64).exp2()) as u32,
                exponent: 63,
            };
        }
        if exponent < 0 {
            return Self { mantissa: (1 << 31) - 1, exponent: 0 };
        }
        Self { mantissa: mantissa as u32, exponent: exponent as u32 }
    }

    /// From the two elements of a vector that hold a scale: the low bits count.
    pub fn from_words(mantissa: i32, exponent: i32) -> Self {
        Self { mantissa: mantissa as u32 & 0x7fff_ffff, exponent: exponent as u32 & 63 }
    }

    /// The value.
    pub fn to_f64(self) -> f64 {
        f64::from(self.mantissa) * (-f64::from(self.exponent)).exp2()
    }

    /// `round(a · scale)`, saturated to an element.
    #[inline]
    pub fn apply(self, a: i32) -> i32 {
        saturate(round_shift(i64::from(a) * i64::from(self.mantissa), self.exponent))
    }
}

/// `floor((x + 2^(shift-1)) / 2^shift)`; `x` itself for a shift of 0.
#[inline]
pub fn round_shift(x: i64, shift: u32) -> i64 {
    if shift == 0 { x } else { x.wrapping_add(1 << (shift - 1)) >> shift }
}

/// To the nearest element.
#[inline]
pub fn saturate(x: i64) -> i32 {
    x.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32
}

/// Sum of two elements.
#[inline]
pub fn add(a: i32, b: i32) -> i32 {
    a.saturating_add(b)
}

/// Product of two elements.
#[inline]
pub fn mul(a: i32, b: i32) -> i32 {
    saturate(round_shift(i64::from(a) * i64::from(b), FRACTION_BITS))
}

/// A square as it is added up: Q28, rounded down.
#[inline]
pub fn square(a: i32) -> u64 {
    (i64::from(a) * i64::from(a)) as u64 >> SQUARE_SHIFT
}

/// `1 / sqrt(sum / count + epsilon)`, the mean and ε in Q28. `sum` are [`square`]s. ε of 0 counts as 1.
pub fn inverse_rms(sum: u64, count: u32, epsilon: u32) -> Scale {
    let mean = (sum / u64::from(count.max(1))).saturating_add(u64::from(epsilon.max(1)));
    // An even shift, so that the root's exponent is whole.
    let shift = mean.leading_zeros() & !1;
    let root = (mean << shift).isqrt(); // [2^31, 2^32)
    Scale { mantissa: divide(1 << 62, root as u32), exponent: 48 - shift / 2 }
}

/// `127 / maximum`, the factor of the 8-bit quantiser for elements whose largest magnitude is `maximum`.
pub fn quant_factor(maximum: u32) -> Scale {
    let maximum = maximum.max(QUANT_FLOOR);
    let shift = maximum.leading_zeros();
    Scale { mantissa: divide(127 << 55, maximum << shift), exponent: 55 - shift }
}

/// `factor · maximum`: what a sum of quantised elements times trits has to be multiplied with, to be an
/// element, if `factor` is `γ / 127`.
pub fn dequant_scale(maximum: u32, factor: Scale) -> Scale {
    let maximum = maximum.max(QUANT_FLOOR);
    let shift = maximum.leading_zeros();
    let product = u64::from(maximum << shift) * u64::from(factor.mantissa);
    let exponent = (factor.exponent as i32 + shift as i32 - 32).clamp(0, 63);
    Scale { mantissa: (product >> 32) as u32, exponent: exponent as u32 }
}

/// `min(numerator / denominator, 2^31 - 1)`.
fn divide(numerator: u64, denominator: u32) -> u32 {
    (numerator / u64::from(denominator)).min((1 << 31) - 1) as u32
}

/// An element as an 8-bit integer: `clamp(round(y · factor), -127, 127)`.
#[inline]
pub fn quantize(y: i32, factor: Scale) -> i8 {
    factor.apply(y).clamp(-127, 127) as i8
}

/// Value and rise of each segment of the sigmoid, in Q20, from f64.
pub fn sigmoid_table() -> [(u32, u32); SIGMOID_SEGMENTS] {
    let knot = |i: usize| {
        let x = i as f64 / 16.0;
        (f64::from(ONE) / (1.0 + (-x).exp())).round() as u32
    };
    std::array::from_fn(|i| (knot(i), knot(i + 1) - knot(i)))
}

/// A table for [`Sigmoid::eval`].
#[derive(Clone, Debug)]
pub struct Sigmoid(Box<[(u32, u32); SIGMOID_SEGMENTS]>);

impl Default for Sigmoid {
    fn default() -> Self {
        Self(Box::new(sigmoid_table()))
    }
}

impl Sigmoid {
    /// `1 / (1 + exp(-a))`, piecewise linear: within 5e-5 of the function.
    #[inline]
    pub fn eval(&self, a: i32) -> i32 {
        let magnitude = a.unsigned_abs();
        let (value, rise) = self.0[(magnitude >> 16) as usize & (SIGMOID_SEGMENTS - 1)];
        let inside = value + ((rise * (magnitude & 0xffff)) >> 16);
        let positive = if magnitude >= 16 << FRACTION_BITS { ONE } else { inside as i32 };
        if a < 0 { ONE - positive } else { positive }
    }

    /// `a · sigmoid(a)`.
    #[inline]
    pub fn silu(&self, a: i32) -> i32 {
        mul(a, self.eval(a))
    }
}

/// The forget gate: `s + β · (1 - s)` with `s = sigmoid(f)`.
#[inline]
pub fn forget_gate(sigmoid: &Sigmoid, f: i32, lower_bound: i32) -> i32 {
    let s = sigmoid.eval(f);
    add(mul(lower_bound, ONE - s), s)
}

/// The recurrence: `c + f · (h - c)` with `c = silu(i)`, which is `f · h + (1 - f) · c`.
#[inline]
pub fn recurrence(sigmoid: &Sigmoid, i: i32, gate: i32, h: i32) -> i32 {
    let candidate = sigmoid.silu(i);
    add(mul(h.saturating_sub(candidate), gate), candidate)
}

/// A real number as an element.
pub fn from_f32(value: f32) -> i32 {
    (f64::from(value) * f64::from(ONE)).round().clamp(f64::from(i32::MIN), f64::from(i32::MAX))
        as i32
}

/// An element as a real number.
pub fn to_f32(element: i32) -> f32 {
    (f64::from(element) / f64::from(ONE)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn inverse_rms_is_near_the_real_function(sum in 0u64.., count in 1u32..16384, epsilon in 1u32..1_000_000) {
            let mean = (sum / u64::from(count)) as f64 + f64::from(epsilon);
            let expected = 1.0 / (mean / 2f64.powi(28)).sqrt();
            let found = inverse_rms(sum, count, epsilon).to_f64();
            prop_assert!((found / expected - 1.0).abs() < 2e-9, "{found} {expected}");
        }

        #[test]
        fn quantising_and_back_is_within_half_a_step(maximum in 127u32..i32::MAX as u32, share in -1.0f64..1.0) {
            let y = (share * f64::from(maximum)) as i32;
            let q = quantize(y, quant_factor(maximum));
            let step = dequant_scale(maximum, Scale::from_f64(1.0 / 127.0));
            let back = step.apply(i32::from(q));
            let budget = f64::from(maximum) / 254.0 * 1.000_001 + 1.5;
            prop_assert!((f64::from(back) - f64::from(y)).abs() <= budget, "{y} {q} {back}");
        }

        #[test]
        fn scales_keep_31_bits(value in 1e-12f64..1e8) {
            let scale = Scale::from_f64(value);
            prop_assert!((scale.to_f64() / value - 1.0).abs() < 1e-6 || scale.exponent == 63);
        }

        #[test]
        fn the_sigmoid_is_close_and_symmetric(a in any::<i32>()) {
            let table = Sigmoid::default();
            let exact = 1.0 / (1.0 + (-f64::from(a) / f64::from(ONE)).exp());
            prop_assert!((f64::from(table.eval(a)) / f64::from(ONE) - exact).abs() < 5e-5);
            if a != i32::MIN {
                prop_assert_eq!(table.eval(a) + table.eval(-a), ONE);
            }
        }
    }

    #[test]
    fn extremes_saturate() {
        assert_eq!(mul(i32::MIN, i32::MIN), i32::MAX);
        assert_eq!(add(i32::MIN, -1), i32::MIN);
        assert_eq!(inverse_rms(0, 0, 0), Scale { mantissa: (1 << 31) - 1, exponent: 48 - 31 });
        assert_eq!(quantize(i32::MIN, quant_factor(1 << 31)), -127);
        assert_eq!(Scale::from_f64(f64::NAN), Scale::default());
        assert_eq!(Scale::from_f64(-1.0), Scale::default());
        assert_eq!(square(i32::MIN), 1 << 50);
    }
}
