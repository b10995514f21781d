//! The ggml block formats TQ1_0 and TQ2_0: ternary weights as files hold them.
//!
//! A row is cut into blocks of 256 trits; the last block is filled up with zero trits. A block ends in
//! an IEEE half that multiplies its trits. Here it is always 1.0: the scale γ belongs to the tensor.
//!
//! TQ2_0, 66 bytes (2.06 bits a weight): two groups of 128 trits. Byte `m` (of 32) of a group holds
//! trit `32·l + m` of the group as `t + 1` in bits `2l .. 2l + 2`; 3 stands for nothing.
//!
//! TQ1_0, 54 bytes (1.69 bits a weight): base-3 digits `d = t + 1`, most significant first. With
//! `v = Σ d_n · 3^(4-n)` a byte holds `ceil(v · 256 / 243)`, so that digit `n` is
//! `((byte · 3^n mod 256) · 3) >> 8`.
//!
//! | bytes | byte `m`, digit `n` is trit |
//! |---|---|
//! | 0..32 | `32·n + m`, n < 5 |
//! | 32..48 | `160 + 16·n + m`, n < 5 |
//! | 48..52 | `240 + 4·n + m`, n < 4 |
//!
//! 13 bytes in 256 are not what the encoder writes but decode to trits all the same; they are decoded
//! as ggml decodes them.

use super::{Layout, PANEL_ROWS, PanelVector, TernaryError, TernaryMatrix, WORD_TRITS, ZERO_WORD};
use crate::memory::WeightArena;

/// Trits in a block.
pub const BLOCK_TRITS: usize = 256;
/// Code words of a [`TernaryMatrix`] that a block fills.
const BLOCK_WORDS: usize = BLOCK_TRITS / WORD_TRITS;
/// 1.0 as an IEEE half.
const ONE_F16: u16 = 0x3c00;
/// Low bit of each 2-bit field of a word.
const LOW_BITS: u32 = 0x5555_5555;
/// Field 0 of each byte of a word.
const FIELD_0: u32 = 0x0303_0303;

/// A ggml block format for ternary weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TqFormat {
    /// Base 3, five trits a byte.
    Tq1_0,
    /// Two bits a trit.
    Tq2_0,
}

impl TqFormat {
    /// Bytes of a block of [`BLOCK_TRITS`] trits.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Tq1_0 => 54,
            Self::Tq2_0 => 66,
        }
    }

    /// Bytes of a row of `cols` trits, the padding to whole blocks included. `None` on overflow.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        cols.div_ceil(BLOCK_TRITS).checked_mul(self.block_bytes())
    }

    /// ggml's number for the type.
    pub const fn ggml_type(self) -> u32 {
        match self {
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
        }
    }

    /// The format with a ggml type number.
    pub const fn from_ggml_type(number: u32) -> Option<Self> {
        match number {
            34 => Some(Self::Tq1_0),
            35 => Some(Self::Tq2_0),
            _ => None,
        }
    }

    /// Encodes a row of K trits into `row_bytes(K)` bytes.
    ///
    /// # Panics
    /// If `out` has another length. Values other than -1, 0, 1 give an undefined (but safe) encoding.
    pub fn encode_row(self, trits: &[i8], out: &mut [u8]) {
        assert_eq!(Some(out.len()), self.row_bytes(trits.len()), "length of an encoded row");
        let blocks = out.chunks_exact_mut(self.block_bytes());
        for (group, block) in trits.chunks(BLOCK_TRITS).zip(blocks) {
            let mut digits = [1u8; BLOCK_TRITS];
            for (digit, &trit) in digits.iter_mut().zip(group) {
                *digit = trit.wrapping_add(1) as u8;
            }
            let (codes, scale) = block.split_at_mut(self.block_bytes() - 2);
            match self {
                Self::Tq1_0 => encode_tq1(&digits, codes),
                Self::Tq2_0 => encode_tq2(&digits, codes),
            }
            scale.copy_from_slice(&ONE_F16.to_le_bytes());
        }
    }

    /// Decodes `row_bytes(K)` bytes into a row of K trits.
    ///
    /// # Errors
    /// A wrong number of bytes, a 2-bit field that holds 3, a block scale other than 1.0, padding that
    /// is not zero. Offsets in errors count from the start of `bytes`.
    pub fn decode_row(self, bytes: &[u8], trits: &mut [i8]) -> Result<(), TernaryError> {
        check_length(self, 1, trits.len(), bytes)?;
        let cols = trits.len();
        let mut decoded = [0i8; BLOCK_TRITS];
        for (index, (block, group)) in
            bytes.chunks_exact(self.block_bytes()).zip(trits.chunks_mut(BLOCK_TRITS)).enumerate()
        {
            check_block(self, index * self.block_bytes(), block)?;
            match self {
                Self::Tq1_0 => decode_tq1(block, &mut decoded),
                Self::Tq2_0 => decode_tq2(block, &mut decoded),
            }
            let (used, padding) = decoded.split_at(group.len());
            if padding.iter().any(|&t| t != 0) {
                return Err(TernaryError::Padding { row: 0, cols });
            }
            group.copy_from_slice(used);
        }
        Ok(())
    }
}

/// Calls `place(byte, digit, trit)` for the three sections of a TQ1_0 block, in runs of equal digit:
/// `place(start of the bytes, bytes in the section, digit, first trit)`.
fn tq1_runs(mut run: impl FnMut(usize, usize, usize, usize)) {
    for (start, bytes, digits, first) in [(0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)] {
        for digit in 0..digits {
            run(start, bytes, digit, first + digit * bytes);
        }
    }
}

fn encode_tq1(digits: &[u8; BLOCK_TRITS], codes: &mut [u8]) {
    const PLACES: [u16; 5] = [81, 27, 9, 3, 1];
    let mut values = [0u16; 52];
    tq1_runs(|start, bytes, digit, first| {
        let run = &digits[first..first + bytes];
        for (value, &d) in values[start..start + bytes].iter_mut().zip(run) {
            *value += u16::from(d) * PLACES[digit];
        }
    });
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (u32::from(value) * 256).div_ceil(243) as u8;
    }
}

fn decode_tq1(block: &[u8], trits: &mut [i8; BLOCK_TRITS]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    tq1_runs(|start, bytes, digit, first| {
        let codes = &block[start..start + bytes];
        for (trit, &code) in trits[first..first + bytes].iter_mut().zip(codes) {
            let rest = code.wrapping_mul(POWERS[digit]);
            *trit = ((u16::from(rest) * 3) >> 8) as i8 - 1;
        }
    });
}

fn encode_tq2(digits: &[u8; BLOCK_TRITS], codes: &mut [u8]) {
    for (group, codes) in digits.chunks_exact(128).zip(codes.chunks_exact_mut(32)) {
        for (m, code) in codes.iter_mut().enumerate() {
            *code = group[m] | group[32 + m] << 2 | group[64 + m] << 4 | group[96 + m] << 6;
        }
    }
}

fn decode_tq2(block: &[u8], trits: &mut [i8; BLOCK_TRITS]) {
    for (group, codes) in trits.chunks_exact_mut(128).zip(block.chunks_exact(32)) {
        for (field, run) in group.chunks_exact_mut(32).enumerate() {
            for (trit, &code) in run.iter_mut().zip(codes) {
                *trit = (code >> (2 * field) & 3) as i8 - 1;
            }
        }
    }
}

fn check_length(
    format: TqFormat,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<usize, TernaryError> {
    let row_bytes = format.row_bytes(cols);
    let expected = row_bytes
        .and_then(|row| row.checked_mul(rows))
        .ok_or(TernaryError::Shape { rows, cols })?;
    if bytes.len() != expected {
        return Err(TernaryError::Length {
            what: "bytes of packed trits",
            expected,
            found: bytes.len(),
        });
    }
    Ok(expected / rows.max(1))
}

/// Finds what is wrong with a block that starts at `offset`.
fn check_block(format: TqFormat, offset: usize, block: &[u8]) -> Result<(), TernaryError> {
    let (codes, scale) = block.split_at(format.block_bytes() - 2);
    let bits = u16::from_le_bytes([scale[0], scale[1]]);
    if bits != ONE_F16 {
        return Err(TernaryError::BlockScale { offset, bits });
    }
    if format == TqFormat::Tq2_0 {
        let invalid = |code: &u8| code & code >> 1 & 0x55 != 0;
        if let Some(at) = codes.iter().position(invalid) {
            return Err(TernaryError::Code { offset: offset + at, value: codes[at] });
        }
    }
    Ok(())
}

impl TernaryMatrix {
    /// Repacks `rows` rows of ggml blocks, each padded to whole blocks, into the layout that kernels
    /// stream. `scale` is γ.
    ///
    /// Works through sixteen rows at once: their words are laid side by side, and every shift and mask
    /// is then the same operation on sixteen lanes, which the compiler turns into vector code.
    ///
    /// # Errors
    /// An impossible shape or scale, a wrong number of bytes, no memory, and whatever
    /// [`TqFormat::decode_row`] refuses. Offsets in errors count from the start of `bytes`.
    pub fn from_tq(
        arena: &WeightArena,
        layout: Layout,
        format: TqFormat,
        rows: usize,
        cols: usize,
        scale: f32,
        bytes: &[u8],
    ) -> Result<Self, TernaryError> {
        let row_bytes = check_length(format, rows, cols, bytes)?;
        let mut sources = bytes.chunks(PANEL_ROWS * row_bytes);
        Self::from_panels(arena, layout, rows, cols, scale, |_, words| {
            let source = sources.next().unwrap_or_default();
            let wrong = match format {
                TqFormat::Tq1_0 => repack_panel(words, source, row_bytes, cols, format, words_tq1),
                TqFormat::Tq2_0 => repack_panel(words, source, row_bytes, cols, format, words_tq2),
            };
            if wrong == 0 { Ok(()) } else { Err(first_error(format, row_bytes, cols, bytes)) }
        })
    }

    /// Encodes a row into `format.row_bytes(cols)` bytes.
    ///
    /// # Panics
    /// If the row lies outside the matrix or `out` has another length.
    pub fn write_tq_row(&self, format: TqFormat, row: usize, out: &mut [u8]) {
        let mut trits = vec![0; self.cols()];
        self.read_row(row, &mut trits);
        format.encode_row(&trits, out);
    }
}

/// The slow way through packed bytes in which something is wrong, to say what and where.
#[cold]
fn first_error(format: TqFormat, row_bytes: usize, cols: usize, bytes: &[u8]) -> TernaryError {
    let mut trits = vec![0; cols];
    for (row, source) in bytes.chunks_exact(row_bytes).enumerate() {
        let start = row * row_bytes;
        match format.decode_row(source, &mut trits) {
            Ok(()) => {}
            Err(TernaryError::Code { offset, value }) => {
                return TernaryError::Code { offset: start + offset, value };
            }
            Err(TernaryError::BlockScale { offset, bits }) => {
                return TernaryError::BlockScale { offset: start + offset, bits };
            }
            Err(TernaryError::Padding { cols, .. }) => return TernaryError::Padding { row, cols },
            Err(other) => return other,
        }
    }
    unreachable!("the fast and the slow decoder agree on what is wrong")
}

/// Repacks up to sixteen rows. The result is not 0 if anything in them is invalid.
#[inline(always)]
fn repack_panel(
    panel: &mut [PanelVector],
    source: &[u8],
    row_bytes: usize,
    cols: usize,
    format: TqFormat,
    words_of: impl Fn(&[PanelVector; BLOCK_WORDS], &mut [PanelVector; BLOCK_WORDS]) -> u32,
) -> u32 {
    let block_bytes = format.block_bytes();
    let code_bytes = block_bytes - 2;
    let rows = source.len() / row_bytes;
    let mut wrong = 0;
    let mut codes = [[0; PANEL_ROWS]; BLOCK_WORDS];
    let mut words = [[0; PANEL_ROWS]; BLOCK_WORDS];
    for (block, group) in panel.chunks_mut(BLOCK_WORDS).enumerate() {
        for (row, bytes) in source.chunks_exact(row_bytes).enumerate() {
            let bytes = &bytes[block * block_bytes..(block + 1) * block_bytes];
            let (bytes, scale) = bytes.split_at(code_bytes);
            wrong |= u32::from(u16::from_le_bytes([scale[0], scale[1]]) ^ ONE_F16);
            for (lanes, word) in codes.iter_mut().zip(bytes.as_chunks::<4>().0) {
                lanes[row] = u32::from_le_bytes(*word);
            }
        }
        wrong |= words_of(&codes, &mut words);
        for (out, lanes) in group.iter_mut().zip(&words) {
            out[..rows].copy_from_slice(&lanes[..rows]);
        }
        // Only the last block of a row can hold padding.
        let used = cols - block * BLOCK_TRITS;
        if used < BLOCK_TRITS {
            for k in used..BLOCK_TRITS {
                let mask = 3 << super::bit_of(k % WORD_TRITS);
                let lanes = &words[k / WORD_TRITS][..rows];
                wrong |= lanes.iter().fold(0, |acc, word| acc | (word ^ ZERO_WORD) & mask);
            }
        }
    }
    wrong
}

/// TQ2_0 words to code words.
///
/// Field `l` of byte `b` of word `8·j + 4·h + f` is trit `128·j + 32·l + 16·h + 4·f + b`, which is field
/// `f` of byte `b` of code word `8·j + 2·l + h`: four words and four code words are each other's
/// transpose in (f, l).
#[inline(always)]
fn words_tq2(codes: &[PanelVector; BLOCK_WORDS], words: &mut [PanelVector; BLOCK_WORDS]) -> u32 {
    let mut wrong = [0; PANEL_ROWS];
    for quad in 0..BLOCK_WORDS / 4 {
        let (j, h) = (quad / 2, quad % 2);
        for lane in 0..PANEL_ROWS {
            let w = [0, 1, 2, 3].map(|f| codes[4 * quad + f][lane]);
            wrong[lane] |=
                (w[0] & w[0] >> 1 | w[1] & w[1] >> 1 | w[2] & w[2] >> 1 | w[3] & w[3] >> 1)
                    & LOW_BITS;
            // Two rounds of exchanges: pairs of fields between words two apart, then single
            // fields between neighbours.
            const PAIR: u32 = 0x0f0f_0f0f;
            const SINGLE: u32 = 0x3333_3333;
            let a = w[0] & PAIR | (w[2] & PAIR) << 4;
            let b = w[1] & PAIR | (w[3] & PAIR) << 4;
            let c = w[0] >> 4 & PAIR | w[2] & !PAIR;
            let d = w[1] >> 4 & PAIR | w[3] & !PAIR;
            words[8 * j + h][lane] = a & SINGLE | (b & SINGLE) << 2;
            words[8 * j + 2 + h][lane] = a >> 2 & SINGLE | b & !SINGLE;
            words[8 * j + 4 + h][lane] = c & SINGLE | (d & SINGLE) << 2;
            words[8 * j + 6 + h][lane] = c >> 2 & SINGLE | d & !SINGLE;
        }
    }
    wrong.iter().fold(0, |acc, w| acc | w)
}

/// TQ1_0 words to code words. Every byte decodes, so nothing can be wrong.
#[inline(always)]
fn words_tq1(codes: &[PanelVector; BLOCK_WORDS], words: &mut [PanelVector; BLOCK_WORDS]) -> u32 {
    // Bytes 0..32: digit n of word 4·h + f is field f of code word 2·n + h.
    for h in 0..2 {
        let mut digits = [[[0; PANEL_ROWS]; 5]; 4];
        for (f, digits) in digits.iter_mut().enumerate() {
            *digits = digits_of(&codes[4 * h + f]);
        }
        for n in 0..5 {
            words[2 * n + h] = join_fields(&digits, n);
        }
    }
    // Bytes 32..48: digit n of word 8 + f is field f of code word 10 + n.
    let digits = [8, 9, 10, 11].map(|word| digits_of(&codes[word]));
    for n in 0..5 {
        words[10 + n] = join_fields(&digits, n);
    }
    // Bytes 48..52: digit n of word 12 is field n of code word 15.
    let last = digits_of(&codes[12]);
    for lane in 0..PANEL_ROWS {
        words[15][lane] =
            last[0][lane] | last[1][lane] << 2 | last[2][lane] << 4 | last[3][lane] << 6;
    }
    0
}

/// Digit `n` of four words becomes fields 0 to 3.
#[inline(always)]
fn join_fields(digits: &[[PanelVector; 5]; 4], n: usize) -> PanelVector {
    let mut joined = [0; PANEL_ROWS];
    for (lane, joined) in joined.iter_mut().enumerate() {
        *joined = digits[0][n][lane]
            | digits[1][n][lane] << 2
            | digits[2][n][lane] << 4
            | digits[3][n][lane] << 6;
    }
    joined
}

/// The five base-3 digits of each byte, digit `n` of the four bytes of a word in field 0 of the bytes
/// of `result[n]`.
#[inline(always)]
fn digits_of(codes: &PanelVector) -> [PanelVector; 5] {
    /// Every second byte, with room above it for a product with 3.
    const EVEN_BYTES: u32 = 0x00ff_00ff;
    let mut digits = [[0; PANEL_ROWS]; 5];
    for lane in 0..PANEL_ROWS {
        let mut even = codes[lane] & EVEN_BYTES;
        let mut odd = codes[lane] >> 8 & EVEN_BYTES;
        for digit in &mut digits {
            // Tripled, a byte carries its leading digit out above bit 8.
            even += even << 1;
            odd += odd << 1;
            digit[lane] = (even >> 8 & EVEN_BYTES | odd & !EVEN_BYTES) & FIELD_0;
            even &= EVEN_BYTES;
            odd &= EVEN_BYTES;
        }
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMATS: [TqFormat; 2] = [TqFormat::Tq1_0, TqFormat::Tq2_0];

    fn encode(format: TqFormat, cols: usize, trits: &[i8]) -> Vec<u8> {
        let row_bytes = format.row_bytes(cols).unwrap();
        let mut bytes = vec![0xee; trits.len() / cols * row_bytes];
        for (row, out) in trits.chunks(cols).zip(bytes.chunks_mut(row_bytes)) {
            format.encode_row(row, out);
        }
        bytes
    }

    /// Bytes that gguf-py 0.19 writes for trit i = (i² + i / 7) mod 3 - 1, i < 256.
    #[test]
    fn blocks_are_those_of_gguf() {
        let trits: Vec<i8> = (0..256).map(|i: u32| ((i * i + i / 7) % 3) as i8 - 1).collect();
        for (format, expected) in FORMATS.into_iter().zip([GGUF_TQ1, GGUF_TQ2]) {
            let hex: String =
                encode(format, 256, &trits).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, expected);
        }
    }
    const GGUF_TQ1: &str = "4782901198581cf8b76bc2d685b033c80953e723414782901198581cf8b76bc2e429ee3d\
        35f70d501567a805705c22e38fc1e756003c";
    const GGUF_TQ2: &str = "589509901901a02a122162562542640680a84a8488589509901901a02a12216209901901\
        a02a122162562542640680a84a8488589509901901a02a1221625625003c";

    #[test]
    fn every_tq1_byte_decodes_alike_in_both_decoders() {
        let mut bytes = vec![0; TqFormat::Tq1_0.row_bytes(256 * 5).unwrap()];
        let mut next = 0u8;
        for block in bytes.chunks_mut(54) {
            for byte in &mut block[..52] {
                *byte = next;
                next = next.wrapping_add(1);
            }
            block[52..].copy_from_slice(&ONE_F16.to_le_bytes());
        }
        let mut trits = vec![0; 256 * 5];
        TqFormat::Tq1_0.decode_row(&bytes, &mut trits).unwrap();
        let matrix = TernaryMatrix::from_tq(
            &WeightArena::new(),
            Layout::Base3,
            TqFormat::Tq1_0,
            1,
            1280,
            1.0,
            &bytes,
        );
        let mut fast = vec![9; 256 * 5];
        matrix.unwrap().read_row(0, &mut fast);
        assert_eq!(fast, trits);
    }

    #[test]
    fn wrong_codes_scales_and_padding_are_found_where_they_are() {
        let arena = WeightArena::new();
        let (rows, cols) = (18, 300);
        let trits: Vec<i8> = (0..rows * cols).map(|i| (i % 3) as i8 - 1).collect();
        for format in FORMATS {
            let good = encode(format, cols, &trits);
            let row_bytes = format.row_bytes(cols).unwrap();
            let load = |bytes: &[u8]| {
                TernaryMatrix::from_tq(&arena, Layout::Base3, format, rows, cols, 1.0, bytes)
                    .map(drop)
            };
            load(&good).unwrap();
            for row in 0..rows {
                let block = row * row_bytes + format.block_bytes();
                let mut bad = good.clone();
                bad[block + format.block_bytes() - 1] ^= 0x40;
                let error = load(&bad).unwrap_err();
                assert!(
                    matches!(error, TernaryError::BlockScale { offset, bits: 0x7c00 } if offset == block)
                );
                // Trit 44 of the last block, the first beyond the row: byte 12, field 1.
                let mut bad = good.clone();
                bad[block + 12] = if format == TqFormat::Tq1_0 { 0 } else { 0x51 };
                let error = load(&bad).unwrap_err();
                assert!(matches!(error, TernaryError::Padding { row: r, cols: 300 } if r == row));
                if format == TqFormat::Tq2_0 {
                    let mut bad = good.clone();
                    bad[block + 5] |= 0x0c;
                    let error = load(&bad).unwrap_err();
                    assert!(
                        matches!(error, TernaryError::Code { offset, .. } if offset == block + 5)
                    );
                }
            }
            assert!(matches!(load(&good[1..]), Err(TernaryError::Length { .. })));
            let huge =
                TernaryMatrix::from_tq(&arena, Layout::Base3, format, usize::MAX, 300, 1.0, &good);
            assert!(matches!(huge, Err(TernaryError::Shape { .. })));
        }
    }

    proptest! {
        #[test]
        fn trits_survive_both_formats(
            rows in 1usize..40,
            cols in prop_oneof![1usize..40, 240usize..270, 500usize..530, 760usize..1030],
            seed: u64,
        ) {
            let mut state = seed | 1;
            let trits: Vec<i8> = (0..rows * cols)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ((state >> 40) % 3) as i8 - 1
                })
                .collect();
            let arena = WeightArena::new();
            for format in FORMATS {
                let bytes = encode(format, cols, &trits);
                let row_bytes = format.row_bytes(cols).unwrap();
                let direct = TernaryMatrix::from_trits(&arena, Layout::Base3, rows, cols, 0.5, &trits).unwrap();
                let packed =
                    TernaryMatrix::from_tq(&arena, Layout::Base3, format, rows, cols, 0.5, &bytes).unwrap();
                prop_assert_eq!(packed.codes(), direct.codes());
                let mut out = vec![0; row_bytes];
                let mut row_out = vec![9; cols];
                for (row, encoded) in bytes.chunks(row_bytes).enumerate() {
                    direct.write_tq_row(format, row, &mut out);
                    prop_assert_eq!(&out[..], encoded);
                    format.decode_row(encoded, &mut row_out).unwrap();
                    prop_assert_eq!(&row_out[..], &trits[row * cols..(row + 1) * cols]);
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 2 * 66 * 2),
            plausible: bool,
        ) {
            for format in FORMATS {
                let used = &mut bytes[..4 * format.block_bytes()];
                if plausible {
                    for block in used.chunks_mut(format.block_bytes()) {
                        let at = block.len() - 2;
                        block[at..].copy_from_slice(&ONE_F16.to_le_bytes());
                    }
                }
                let arena = WeightArena::new();
                let fast = TernaryMatrix::from_tq(&arena, Layout::Base3, format, 2, 300, 1.0, used);
                let mut trits = vec![0; 300];
                let slow = used
                    .chunks(2 * format.block_bytes())
                    .try_for_each(|row| format.decode_row(row, &mut trits));
                prop_assert_eq!(fast.is_ok(), slow.is_ok());
            }
        }
    }
}
