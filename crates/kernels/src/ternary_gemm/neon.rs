//! NEON with the dot-product extension: a panel is four registers of four rows.

use std::arch::aarch64::*;
use std::arch::asm;

use super::Kernels;
use super::lookup::Lanes;
use crate::ternary::{PANEL_ROWS, PanelVector, WORD_TRITS};

/// Kernels with these instructions.
pub(super) struct Neon;

impl Kernels for Neon {
    type Lanes = Lanes16;
    const LOOKUP_MIN_ROWS: usize = 64;
    const LOOKUP_MIN_TOKENS: usize = 11;

    #[inline(always)]
    unsafe fn word_dots<const M: usize>(
        words: &[PanelVector],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        // SAFETY: the caller runs with this tier's features.
        unsafe { dots(words, inputs) }
    }
}

#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dots<const M: usize>(words: &[PanelVector], inputs: [&[i8]; M]) -> [[i32; PANEL_ROWS]; M] {
    assert!(inputs.iter().all(|input| input.len() >= words.len() * WORD_TRITS));
    let field_mask = vdupq_n_u8(3);
    let mut sums = [[vdupq_n_s32(0); 4]; M];
    for (at, words) in words.iter().enumerate() {
        for quarter in 0..4 {
            // SAFETY: four of the sixteen words at 0, 4, 8 or 12.
            let mut codes = unsafe { vld1q_u8(words.as_ptr().add(4 * quarter).cast::<u8>()) };
            for field in 0..4 {
                let trits = vreinterpretq_s8_u8(vandq_u8(codes, field_mask));
                codes = vshrq_n_u8::<2>(codes);
                for (sums, input) in sums.iter_mut().zip(inputs) {
                    // SAFETY: the assertion above leaves 16 activations for every word.
                    let four = unsafe {
                        input
                            .as_ptr()
                            .add(at * WORD_TRITS + 4 * field)
                            .cast::<i32>()
                            .read_unaligned()
                    };
                    let four = vreinterpretq_s8_s32(vdupq_n_s32(four));
                    sums[quarter] = dot(sums[quarter], trits, four);
                }
            }
        }
    }
    // A loop and no `map`: its closure would not be compiled with these features.
    let mut out = [[0; PANEL_ROWS]; M];
    for (out, quarters) in out.iter_mut().zip(sums) {
        for (quarter, sum) in quarters.into_iter().enumerate() {
            // SAFETY: four i32 fit at 0, 4, 8 and 12 of the sixteen.
            unsafe { vst1q_s32(out.as_mut_ptr().add(4 * quarter), sum) };
        }
    }
    out
}

/// `sum + Σ` of four byte products in each lane. The intrinsic is not stable yet.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: one register-to-register instruction that the enabled features include.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Sixteen tokens: two registers of 16-bit sums.
#[derive(Clone, Copy)]
pub(super) struct Lanes16(int16x8_t, int16x8_t);

impl Lanes for Lanes16 {
    const TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller runs with this tier's features.
        unsafe { Self(vdupq_n_s16(0), vdupq_n_s16(0)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> Self {
        // SAFETY: 16 lanes are readable by the caller's promise, and it runs with this tier's features.
        unsafe { Self(vld1q_s16(from), vld1q_s16(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i16) {
        // SAFETY: as in `load`, writable.
        unsafe {
            vst1q_s16(to, self.0);
            vst1q_s16(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        unsafe { Self(vaddq_s16(self.0, other.0), vaddq_s16(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        unsafe { Self(vsubq_s16(self.0, other.0), vsubq_s16(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32) {
        // SAFETY: 16 sums are readable and writable by the caller's promise, and it runs with this
        // tier's features.
        unsafe {
            for (i, lanes) in [self.0, self.1].into_iter().enumerate() {
                for (j, half) in [vget_low_s16(lanes), vget_high_s16(lanes)].into_iter().enumerate()
                {
                    let at = sums.add(8 * i + 4 * j);
                    let before = if INIT { vdupq_n_s32(0) } else { vld1q_s32(at) };
                    vst1q_s32(at, vaddw_s16(before, half));
                }
            }
        }
    }
}
