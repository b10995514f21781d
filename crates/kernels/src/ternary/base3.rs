//! Five trits a byte, in a code that byte look-ups of 64 entries decode.
//!
//! Five words of a row are a group of four units; what is left of a row is a shorter group of as many
//! units as words. Byte `b` of unit `i` holds the four trits of byte `b` of word `i`, its **quad**, and
//! the trit in field `i` of byte `b` of word 4, its **fifth** (zero in a shorter group).
//!
//! With `c` the low six bits of the byte and `h` the top two:
//!
//! ```text
//! h < 3:  quad = QUADS[c]                         fifth + 1 = h               64 of 81 quads
//! h = 3:  quad = QUADS[c] ^ CORRECTIONS[c + 1]    fifth + 1 = h ^ (CORRECTIONS[c + 1] >> 6)
//! ```
//!
//! so 51 bytes with `h = 3` stand for the other 17 quads with each fifth. Each of them has the field 3 of
//! `QUADS[c]`, so that the top two bits of a correction are free to mend `h`. With `s = max(byte, 191) -
//! 191`, which is 0 unless `h = 3`, and `CORRECTIONS[0] = 0`, there is nothing to decide:
//!
//! ```text
//! quad = QUADS[byte & 63] ^ (CORRECTIONS[s] & 63)      fifth + 1 = (byte ^ CORRECTIONS[s]) >> 6
//! ```

use super::layout::{PanelVector, ZERO_WORD};
use crate::ternary::PANEL_ROWS;

/// Words of a group.
pub(crate) const GROUP_WORDS: usize = 5;
/// Units of a group.
pub(crate) const GROUP_UNITS: usize = 4;
/// Bytes above this one have `h = 3`.
pub(crate) const LAST_PLAIN: u8 = 191;

/// Quads that are no [`QUADS`] entry, by their field 3: few enough that three times as many entries
/// have the same field 3.
const CORRECTED: [usize; 3] = [6, 6, 5];

struct Tables {
    quads: [u8; 64],
    corrections: [u8; 64],
    /// The byte of a quad and a fifth + 1; 0 where the quad has a field 3.
    bytes: [[u8; 256]; 3],
}

const TABLES: Tables = tables();
/// Four 2-bit fields by the low six bits of a byte.
pub(crate) static QUADS: [u8; 64] = TABLES.quads;
/// What to change in fields 0 to 2 of the quad (bits 0 to 5) and in the top two bits of the byte.
pub(crate) static CORRECTIONS: [u8; 64] = TABLES.corrections;
static BYTES: [[u8; 256]; 3] = TABLES.bytes;

const fn tables() -> Tables {
    /// The quad of a number below 27 in fields 0 to 2 and a trit + 1 in field 3.
    const fn quad(low: usize, high: usize) -> u8 {
        ((low % 3) | ((low / 3 % 3) << 2) | ((low / 9) << 4) | (high << 6)) as u8
    }
    let mut tables = Tables { quads: [0; 64], corrections: [0; 64], bytes: [[0; 256]; 3] };
    let (mut code, mut high) = (0, 0);
    while high < 3 {
        let first = code;
        let plain = 27 - CORRECTED[high];
        let mut low = 0;
        while low < plain {
            let quad = quad(low, high);
            tables.quads[code] = quad;
            let mut fifth = 0;
            while fifth < 3 {
                tables.bytes[fifth][quad as usize] = (fifth << 6 | code) as u8;
                fifth += 1;
            }
            code += 1;
            low += 1;
        }
        let mut borrowed = first;
        while low < 27 {
            let quad = quad(low, high);
            let mut fifth = 0;
            while fifth < 3 {
                let change = tables.quads[borrowed] ^ quad;
                assert!(change < 64, "field 3 must agree");
                tables.corrections[borrowed + 1] = change | (3 ^ fifth as u8) << 6;
                tables.bytes[fifth][quad as usize] = 3 << 6 | borrowed as u8;
                borrowed += 1;
                fifth += 1;
            }
            low += 1;
        }
        assert!(borrowed <= code, "more corrections than entries to correct");
        high += 1;
    }
    assert!(code == 64, "64 entries are plain");
    tables
}

/// The number below 81 whose base-3 digits are the four fields of a quad, field 0 lowest.
pub(crate) const fn quad_index(quad: u8) -> u8 {
    (quad & 3) + 3 * (quad >> 2 & 3) + 9 * (quad >> 4 & 3) + 27 * (quad >> 6)
}

/// Units that hold a number of words.
pub(super) fn units(words: usize) -> usize {
    words / GROUP_WORDS * GROUP_UNITS + words % GROUP_WORDS
}

/// Quad and fifth + 1 of a byte.
fn decode(byte: u8) -> (u8, u8) {
    let correction = CORRECTIONS[usize::from(byte.saturating_sub(LAST_PLAIN))];
    (QUADS[usize::from(byte & 63)] ^ correction & 63, (byte ^ correction) >> 6)
}

/// Packs the words of a panel.
pub(super) fn pack(words: &[PanelVector], units: &mut [PanelVector]) {
    for (words, units) in words.chunks(GROUP_WORDS).zip(units.chunks_mut(GROUP_UNITS)) {
        let fifths = words.get(GROUP_UNITS).unwrap_or(&[ZERO_WORD; PANEL_ROWS]);
        for (i, (word, unit)) in words.iter().zip(units).enumerate() {
            for ((unit, word), fifths) in unit.iter_mut().zip(word).zip(fifths) {
                let (quads, fifths) = (word.to_le_bytes(), (fifths >> (2 * i)).to_le_bytes());
                *unit = u32::from_le_bytes(std::array::from_fn(|b| {
                    BYTES[usize::from(fifths[b] & 3).min(2)][usize::from(quads[b])]
                }));
            }
        }
    }
}

/// Word `index` of each row of a panel.
pub(super) fn word(units: &[PanelVector], index: usize) -> PanelVector {
    let (group, at) = (index / GROUP_WORDS, index % GROUP_WORDS);
    if at < GROUP_UNITS {
        return units[group * GROUP_UNITS + at]
            .map(|unit| u32::from_le_bytes(unit.to_le_bytes().map(|byte| decode(byte).0)));
    }
    let mut fifths = [0; PANEL_ROWS];
    for (i, unit) in units[group * GROUP_UNITS..][..GROUP_UNITS].iter().enumerate() {
        for (fifths, unit) in fifths.iter_mut().zip(unit) {
            let field = unit.to_le_bytes().map(|byte| decode(byte).1);
            *fifths |= u32::from_le_bytes(field) << (2 * i);
        }
    }
    fifths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_five_trits_have_a_byte_of_their_own() {
        let mut seen = [false; 256];
        for value in 0..243usize {
            let digits: [usize; 5] = std::array::from_fn(|n| value / 3usize.pow(n as u32) % 3);
            let quad = (digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6) as u8;
            let byte = BYTES[digits[4]][usize::from(quad)];
            assert_eq!(decode(byte), (quad, digits[4] as u8));
            assert!(!std::mem::replace(&mut seen[usize::from(byte)], true));
        }
    }

    #[test]
    fn groups_of_any_length_keep_their_words() {
        for count in 0..12 {
            let words: Vec<PanelVector> = (0..count)
                .map(|w: usize| {
                    std::array::from_fn(|row| {
                        let trit = |f: usize| ((w * w + 7 * row + f * f / 3 + f) % 3) as u32;
                        (0..16).fold(0, |word, f| word | trit(f) << (2 * f))
                    })
                })
                .collect();
            let mut packed = vec![[0; PANEL_ROWS]; units(count)];
            pack(&words, &mut packed);
            for (index, expected) in words.iter().enumerate() {
                assert_eq!(word(&packed, index), *expected);
            }
        }
    }
}
