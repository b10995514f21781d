//! Dot products that are woven into look-ups.
//!
//! Look-ups keep the load units busy and leave the multipliers idle. So the last panels of a block meet their
//! activations by dot products, in the loop that looks up the others. The work is cut into units: three panels,
//! eight tokens, up to 256 inputs; their 24 sums stay in registers for the whole unit.

use std::ops::Range;

use super::{Job, MAX_TOKENS, PASS_INPUTS, PassIndices};
use crate::ternary::PANEL_ROWS;

/// Panels of a unit.
pub(in crate::ternary_gemm) const DOT_PANELS: usize = 3;
/// Tokens of a unit.
pub(in crate::ternary_gemm) const DOT_TOKENS: usize = 8;
/// Steps of a pass: four inputs each.
pub(in crate::ternary_gemm) const PASS_STEPS: usize = PASS_INPUTS / 4;
/// Passes of a unit, at most.
const UNIT_PASSES: usize = 8;

/// The sums of a unit, `Σ q·(t + 1)`.
pub(in crate::ternary_gemm) type DotSums = [[[i32; PANEL_ROWS]; DOT_PANELS]; DOT_TOKENS];

/// The dot products of one task.
pub(in crate::ternary_gemm) struct Dots<'a> {
    job: &'a Job<'a>,
    tokens: Range<usize>,
    /// Panel of the matrix with which the wave begins.
    wave: usize,
    /// Panels of the wave.
    panels: Range<usize>,
    /// `[pass][panel of the wave]`: words at the panels of dot products.
    words: &'a [PassIndices],
    stride: usize,
    /// `[input / 4][token of the tile]`.
    fours: &'a [i32],
    // The next unit.
    panel: usize,
    token: usize,
    pass: usize,
    sums: DotSums,
}

/// One unit of work.
#[derive(Clone, Copy)]
pub(in crate::ternary_gemm) struct DotUnit<'a> {
    /// Words `[word][row]` of three neighbouring panels, then, `stride` further, those of the next pass.
    pub words: &'a [PassIndices],
    pub stride: usize,
    /// Activations, `[input / 4][token of the tile]`, from the unit's first token on.
    pub fours: &'a [i32],
    pub passes: usize,
}

impl<'a> Dots<'a> {
    pub(super) fn new(
        job: &'a Job<'a>,
        tokens: Range<usize>,
        wave: usize,
        panels: Range<usize>,
        words: &'a [PassIndices],
        stride: usize,
        fours: &'a [i32],
    ) -> Self {
        let panel = panels.start;
        let sums = [[[0; PANEL_ROWS]; DOT_PANELS]; DOT_TOKENS];
        Self { job, tokens, wave, panels, words, stride, fours, panel, token: 0, pass: 0, sums }
    }

    /// The next unit and its sums so far.
    #[inline(always)]
    pub fn unit(&mut self) -> Option<(DotUnit<'a>, &mut DotSums)> {
        if self.panel >= self.panels.end {
            return None;
        }
        let all = self.words.len() / self.stride;
        let passes = UNIT_PASSES.min(all - self.pass);
        let unit = DotUnit {
            words: &self.words[self.pass * self.stride + self.panel..],
            stride: self.stride,
            fours: &self.fours[PASS_STEPS * MAX_TOKENS * self.pass + self.token..],
            passes,
        };
        // Both are what the loop over the unit relies on.
        assert!(unit.words.len() >= (passes - 1) * self.stride + DOT_PANELS);
        assert!(unit.fours.len() >= (PASS_STEPS * passes - 1) * MAX_TOKENS + DOT_TOKENS);
        Some((unit, &mut self.sums))
    }

    /// The unit's sums are complete.
    pub fn advance(&mut self) {
        self.pass += UNIT_PASSES;
        if self.pass < self.words.len() / self.stride {
            return;
        }
        self.write_outputs();
        self.sums.as_flattened_mut().as_flattened_mut().fill(0);
        self.pass = 0;
        self.token += DOT_TOKENS;
        if self.token >= self.tokens.len() {
            self.token = 0;
            self.panel += DOT_PANELS;
        }
    }

    /// `y = sum · (γ / s)`.
    fn write_outputs(&self) {
        let Job { weights, input, output, .. } = self.job;
        let tokens = self.tokens.clone().skip(self.token);
        for (token, sums) in tokens.zip(&self.sums) {
            let (offset, factor) = (input.sum(token), weights.scale() / input.scale(token));
            let row = (self.wave + self.panel) * PANEL_ROWS;
            let count = (DOT_PANELS * PANEL_ROWS).min(weights.rows() - row);
            // SAFETY: tasks have disjoint tiles or disjoint panels, so these outputs are written by this task
            // alone, and `multiply` holds the output borrowed until all tasks are done.
            let output = unsafe { output.slice(token * weights.rows() + row, count) };
            for (y, &sum) in output.iter_mut().zip(sums.as_flattened()) {
                *y = (sum - offset) as f32 * factor;
            }
        }
    }
}
