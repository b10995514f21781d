//! How packed trits lie in memory.
//!
//! Every layout stores the same **words**: trits `16w .. 16w + 16` of a row are one little-endian `u32`;
//! trit `4f + b` of them is `t + 1` in bits `2f .. 2f + 2` (field `f`) of byte `b`, so that four
//! neighbouring activations meet the four bytes of one word. Sixteen rows are a panel and lie side by
//! side, `codes[panel][unit][row]`, so that a 512-bit load brings one unit of sixteen rows and a panel is
//! one contiguous stream.

use super::PANEL_ROWS;
use super::base3;
use crate::tier::{Backend, Tier};

/// Trits of a row in one word.
pub const WORD_TRITS: usize = 16;
/// A word of sixteen zero trits.
pub(crate) const ZERO_WORD: u32 = 0x5555_5555;

/// One word or unit of each row of a panel.
pub(crate) type PanelVector = [u32; PANEL_ROWS];

/// A way to pack trits. All kernels take either; each tier has one that suits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Two bits a trit: a unit is a word.
    TwoBit,
    /// Five trits a byte, 1.6 bits a trit: four units hold five words (see the module `base3`).
    Base3,
}

impl Layout {
    /// The layout that a tier runs fastest: base 3 where bytes are looked up in a register (VBMI), since
    /// decoding is bound by memory; elsewhere unpacking five trits costs more than it saves.
    pub fn preferred(backend: Backend) -> Self {
        match backend.tier() {
            Tier::Avx512Vbmi | Tier::Amx => Self::Base3,
            _ => Self::TwoBit,
        }
    }

    /// Units that hold a number of words.
    pub(crate) fn units(self, words: usize) -> usize {
        match self {
            Self::TwoBit => words,
            Self::Base3 => base3::units(words),
        }
    }

    /// Packs the words of a panel.
    pub(super) fn pack(self, words: &[PanelVector], units: &mut [PanelVector]) {
        match self {
            Self::TwoBit => units.copy_from_slice(words),
            Self::Base3 => base3::pack(words, units),
        }
    }

    /// Word `index` of each row of a panel.
    pub(crate) fn word(self, units: &[PanelVector], index: usize) -> PanelVector {
        match self {
            Self::TwoBit => units[index],
            Self::Base3 => base3::word(units, index),
        }
    }
}
