//! AVX-512 with VNNI: one load brings a word of sixteen rows, four masks and four byte-dot-product
//! instructions consume its 256 trits. With VBMI, two look-ups first turn a unit in base 3 into 320.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Kernels;
use super::lookup::{
    DOT_PANELS, DOT_TOKENS, DotSums, DotUnit, Dots, Lanes, PASS_STEPS, PassIndices, Sweep,
};
use crate::activations::QuantizedRows;
use crate::ternary::base3::{CORRECTIONS, GROUP_UNITS, GROUP_WORDS, LAST_PLAIN, QUADS, quad_index};
use crate::ternary::{Layout, PANEL_ROWS, PanelVector, WORD_TRITS};

/// Kernels with VNNI.
pub(super) struct Avx512;

/// Bytes of weights in base 3 that Intel's processors with AMX are told to fetch before they are used (measured: one core
/// then reads 1.6 times as fast). AMD's Zen 4 reads slower with it.
pub(super) const INTEL_FETCH_AHEAD: usize = 8 << 10;

/// Kernels with VNNI and VBMI; with weights in base 3 fetched so many bytes ahead, if any.
pub(super) struct Avx512Vbmi<const FETCH_AHEAD: usize>;

impl Kernels for Avx512 {
    type Lanes = Lanes32<false>;
    const LOOKUP_MIN_ROWS: usize = 1024;
    const LOOKUP_MIN_TOKENS: usize = 28;

    #[inline(always)]
    unsafe fn word_dots<const M: usize>(
        words: &[PanelVector],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        // SAFETY: the caller runs with this tier's features.
        unsafe { dots(words, inputs) }
    }
}

impl<const FETCH_AHEAD: usize> Kernels for Avx512Vbmi<FETCH_AHEAD> {
    type Lanes = Lanes32<true>;
    const LOOKUP_MIN_ROWS: usize = Avx512::LOOKUP_MIN_ROWS;
    const LOOKUP_MIN_TOKENS: usize = Avx512::LOOKUP_MIN_TOKENS;

    #[inline(always)]
    unsafe fn word_dots<const M: usize>(
        words: &[PanelVector],
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        // SAFETY: the caller runs with this tier's features.
        unsafe { dots(words, inputs) }
    }

    #[inline(always)]
    unsafe fn base3_dots<const M: usize>(
        units: &[PanelVector],
        words: usize,
        inputs: [&[i8]; M],
    ) -> [[i32; PANEL_ROWS]; M] {
        // SAFETY: the caller runs with this tier's features.
        unsafe { base3_dots::<M, FETCH_AHEAD>(units, words, inputs) }
    }
}

/// Masks of the four fields of a byte.
#[target_feature(enable = "avx512f")]
#[inline]
fn field_masks() -> [__m512i; 4] {
    [
        _mm512_set1_epi8(0b11),
        _mm512_set1_epi8(0b11 << 2),
        _mm512_set1_epi8(0b11 << 4),
        _mm512_set1_epi8((0b11u8 << 6) as i8),
    ]
}

/// The vector at the start of an array of 64 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load<T: bytemuck::Pod>(from: &T) -> __m512i {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: 64 bytes, by the assertion.
    unsafe { _mm512_loadu_si512(std::ptr::from_ref(from).cast()) }
}

/// Adds the products of the four bytes of every word of `codes` with four activations.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_dot(sum: &mut __m512i, codes: __m512i, input: &[i8], at: usize) {
    debug_assert!(at + 4 <= input.len());
    // SAFETY: callers check the length of their inputs once.
    let four = unsafe { input.as_ptr().add(at).cast::<i32>().read_unaligned() };
    *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(four));
}

/// Field `f` of the words is used where it stands, as `(t + 1) · 4^f`, in a sum of its own that is
/// shifted down at the end: exact, and cheaper than shifting every word. A sum stays below
/// `2 · 64 · 4 · 127` = 65,024 a word, so below 2^31 for any K up to half a million.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn dots<const M: usize>(words: &[PanelVector], inputs: [&[i8]; M]) -> [[i32; PANEL_ROWS]; M] {
    assert!(inputs.iter().all(|input| input.len() >= words.len() * WORD_TRITS));
    let masks = field_masks();
    let mut sums = [[_mm512_setzero_si512(); 4]; M];
    for (at, word) in words.iter().enumerate() {
        let codes = load(word);
        for field in 0..4 {
            let trits = _mm512_and_si512(codes, masks[field]);
            for (sums, input) in sums.iter_mut().zip(inputs) {
                add_dot(&mut sums[field], trits, input, at * WORD_TRITS + 4 * field);
            }
        }
    }
    sum_of_fields(sums)
}

/// `Σ_f sums[f] / 4^f`. A loop and no `map`: its closure would not be compiled with these features.
#[target_feature(enable = "avx512f")]
#[inline]
fn sum_of_fields<const M: usize>(sums: [[__m512i; 4]; M]) -> [[i32; PANEL_ROWS]; M] {
    let mut out = [[0; PANEL_ROWS]; M];
    for token in 0..M {
        let [one, four, sixteen, sixty_four] = sums[token];
        let low = _mm512_add_epi32(one, _mm512_srai_epi32::<2>(four));
        let high =
            _mm512_add_epi32(_mm512_srai_epi32::<4>(sixteen), _mm512_srai_epi32::<6>(sixty_four));
        // SAFETY: the array is sixteen i32 long.
        unsafe {
            _mm512_storeu_si512(out[token].as_mut_ptr().cast(), _mm512_add_epi32(low, high));
        }
    }
    out
}

/// `(a ^ b) & mask`.
#[target_feature(enable = "avx512f")]
#[inline]
fn xor_and(a: __m512i, b: __m512i, mask: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0x28>(a, b, mask)
}

/// The corrections of a unit's bytes (see [`base3`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
pub(super) fn corrections(codes: __m512i, table: __m512i) -> __m512i {
    let index = _mm512_subs_epu8(codes, _mm512_set1_epi8(LAST_PLAIN as i8));
    _mm512_permutexvar_epi8(index, table)
}

/// [`dots`] from base 3: two look-ups give the four fields of the quads and what mends the fifths.
/// Mending is part of masking, so that a unit takes 13 operations for 320 trits. The sums of field 3
/// and of the fifths stay below 65,024 a unit each, so below 2^31 together for K up to 330,000.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
#[inline]
fn base3_dots<const M: usize, const FETCH_AHEAD: usize>(
    units: &[PanelVector],
    words: usize,
    inputs: [&[i8]; M],
) -> [[i32; PANEL_ROWS]; M] {
    assert!(inputs.iter().all(|input| input.len() >= words * WORD_TRITS));
    assert!(units.len() == Layout::Base3.units(words));
    let masks = field_masks();
    let (quads, mends) = (load(&QUADS), load(&CORRECTIONS));
    let mut sums = [[_mm512_setzero_si512(); 4]; M];
    let mut fifth_sums = [_mm512_setzero_si512(); M];
    let (groups, rest) = units.split_at(words / GROUP_WORDS * GROUP_UNITS);
    let mut add_quads = |unit: __m512i, mend: __m512i, at: usize| {
        let base = _mm512_permutexvar_epi8(unit, quads);
        for field in 0..4 {
            // A correction leaves field 3 as it is: its top two bits are for the fifth.
            let trits = if field < 3 {
                xor_and(base, mend, masks[field])
            } else {
                _mm512_and_si512(base, masks[3])
            };
            for (sums, input) in sums.iter_mut().zip(inputs) {
                add_dot(&mut sums[field], trits, input, at + 4 * field);
            }
        }
    };
    for (group, units) in groups.chunks_exact(GROUP_UNITS).enumerate() {
        let first = group * GROUP_WORDS * WORD_TRITS;
        for (i, unit) in units.iter().enumerate() {
            if FETCH_AHEAD > 0 {
                let ahead = unit.as_ptr().wrapping_byte_add(FETCH_AHEAD).cast();
                // SAFETY: fetching is a hint, which any address may be given to. Older compilers call it unsafe.
                #[allow(unused_unsafe)]
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(ahead)
                };
            }
            let unit = load(unit);
            let mend = corrections(unit, mends);
            add_quads(unit, mend, first + i * WORD_TRITS);
            let fifths = xor_and(unit, mend, masks[3]);
            for (sum, input) in fifth_sums.iter_mut().zip(inputs) {
                add_dot(sum, fifths, input, first + GROUP_UNITS * WORD_TRITS + 4 * i);
            }
        }
    }
    let first = words / GROUP_WORDS * GROUP_WORDS;
    for (i, unit) in rest.iter().enumerate() {
        let unit = load(unit);
        add_quads(unit, corrections(unit, mends), (first + i) * WORD_TRITS);
    }
    for (sums, fifths) in sums.iter_mut().zip(fifth_sums) {
        sums[3] = _mm512_add_epi32(sums[3], fifths);
    }
    sum_of_fields(sums)
}

/// Thirty-two tokens: one register of 16-bit sums.
#[derive(Clone, Copy)]
pub(super) struct Lanes32<const VBMI: bool>(__m512i);

impl<const VBMI: bool> Lanes for Lanes32<VBMI> {
    const TOKENS: usize = 32;
    const DOTS_OF_64: usize = 27;

    #[inline(always)]
    unsafe fn sweep<const FIRST: bool, const LAST: bool, const INITIAL: bool>(
        sweep: Sweep<'_, Self>,
        dots: &mut Dots<'_>,
    ) {
        // SAFETY: the caller runs with this tier's features and promises the rest.
        unsafe { sweep_and_dots::<VBMI, FIRST, LAST, INITIAL>(sweep, dots) }
    }

    #[inline(always)]
    unsafe fn finish_dots(dots: &mut Dots<'_>) {
        while let Some((unit, sums)) = dots.unit() {
            // SAFETY: the caller runs with this tier's features.
            unsafe { dot_unit(unit, sums, Nothing) };
            dots.advance();
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm512_setzero_si512() })
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> Self {
        // SAFETY: 32 lanes are readable by the caller's promise, and it runs with this tier's features.
        Self(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i16) {
        // SAFETY: as in `load`, writable.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm512_add_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller runs with this tier's features.
        Self(unsafe { _mm512_sub_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn add_to<const INIT: bool>(self, sums: *mut i32) {
        // SAFETY: 32 sums are readable and writable by the caller's promise, and it runs with this
        // tier's features.
        unsafe {
            let mut low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(self.0));
            let mut high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64::<1>(self.0));
            if !INIT {
                low = _mm512_add_epi32(low, _mm512_loadu_si512(sums.cast()));
                high = _mm512_add_epi32(high, _mm512_loadu_si512(sums.add(16).cast()));
            }
            _mm512_storeu_si512(sums.cast(), low);
            _mm512_storeu_si512(sums.add(16).cast(), high);
        }
    }

    #[inline(always)]
    unsafe fn transpose_panel(sums: &[i32], out: &mut [i32]) {
        // SAFETY: the caller runs with this tier's features.
        unsafe { transpose_panel(sums, out) }
    }

    #[inline(always)]
    unsafe fn transpose_inputs(
        input: &QuantizedRows,
        tokens: Range<usize>,
        out: &mut [i16],
        fours: &mut [i32],
    ) {
        // SAFETY: the caller runs with this tier's features.
        unsafe { transpose_inputs(input, tokens, out, fours) }
    }

    #[inline(always)]
    unsafe fn pass_words(
        layout: Layout,
        units: &[PanelVector],
        words: usize,
        first: usize,
    ) -> PassIndices {
        let word = |at: usize| match layout {
            _ if at >= words => [0; PANEL_ROWS],
            // SAFETY: the caller runs with this tier's features, and with VBMI if `VBMI` says so.
            Layout::Base3 if VBMI => unsafe { base3_word(units, at) },
            layout => layout.word(units, at),
        };
        bytemuck::cast([word(first), word(first + 1)])
    }

    #[inline(always)]
    unsafe fn pass_indices(
        layout: Layout,
        units: &[PanelVector],
        words: usize,
        first: usize,
    ) -> PassIndices {
        // SAFETY: the caller runs with this tier's features, and with VBMI if `VBMI` says so.
        unsafe {
            let indices = |word: usize| {
                if word >= words {
                    return _mm512_setzero_si512();
                }
                match layout {
                    Layout::TwoBit => quad_indices(load(&units[word])),
                    Layout::Base3 if VBMI => base3_indices(units, word),
                    Layout::Base3 => quad_indices(load(&layout.word(units, word))),
                }
            };
            interleave(indices(first), indices(first + 1))
        }
    }
}

/// Four base-3 digits of each byte to one number, below 81 for valid trits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quad_indices(words: __m512i) -> __m512i {
    let pairs = _mm512_set1_epi8(0x33);
    let low = _mm512_and_si512(words, pairs);
    let high = _mm512_and_si512(_mm512_srli_epi16::<2>(words), pairs);
    // Two digits to each nibble, 0 to 8; then low + 9 · high of both nibbles, by look-ups.
    let nibbles = _mm512_add_epi8(low, _mm512_add_epi8(high, _mm512_add_epi8(high, high)));
    let nibble = _mm512_set1_epi8(0x0f);
    let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), nibble);
    let nines = _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, 9, 18, 27, 36, 45, 54, 63, 72, 72, 72, 72, 72, 72, 72, 72,
    ));
    _mm512_add_epi8(_mm512_and_si512(nibbles, nibble), _mm512_shuffle_epi8(nines, upper))
}

/// The table indices of a word in base 3. `Σ_i 3^i · fifth_i` for the word that the fifths make.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn base3_indices(units: &[PanelVector], word: usize) -> __m512i {
    let (group, at) = (word / GROUP_WORDS, word % GROUP_WORDS);
    let units = &units[group * GROUP_UNITS..];
    if at < GROUP_UNITS {
        let unit = load(&units[at]);
        let plain = _mm512_permutexvar_epi8(unit, load(&QUAD_INDICES));
        return _mm512_xor_si512(plain, corrections(unit, load(&INDEX_CORRECTIONS)));
    }
    let (mask, mends) = (_mm512_set1_epi8(3), load(&CORRECTIONS));
    let mut sum = _mm512_setzero_si512();
    for unit in units[..GROUP_UNITS].iter().rev() {
        let unit = load(unit);
        let mended = _mm512_xor_si512(unit, corrections(unit, mends));
        let fifth = _mm512_and_si512(_mm512_srli_epi16::<6>(mended), mask);
        sum = _mm512_add_epi8(_mm512_add_epi8(sum, fifth), _mm512_add_epi8(sum, sum));
    }
    sum
}

/// A word in base 3 at two bits a trit.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn base3_word(units: &[PanelVector], word: usize) -> PanelVector {
    let (group, at) = (word / GROUP_WORDS, word % GROUP_WORDS);
    let units = &units[group * GROUP_UNITS..];
    let mends = load(&CORRECTIONS);
    let mut fields = _mm512_setzero_si512();
    if at < GROUP_UNITS {
        let unit = load(&units[at]);
        let quads = _mm512_permutexvar_epi8(unit, load(&QUADS));
        let mend = _mm512_and_si512(corrections(unit, mends), _mm512_set1_epi8(63));
        fields = _mm512_xor_si512(quads, mend);
    } else {
        for unit in units[..GROUP_UNITS].iter().rev() {
            let unit = load(unit);
            let mended = _mm512_xor_si512(unit, corrections(unit, mends));
            let fifth = _mm512_and_si512(_mm512_srli_epi16::<6>(mended), _mm512_set1_epi8(3));
            // Fields of earlier units are below 64, so none leaves its byte.
            fields = _mm512_or_si512(_mm512_slli_epi16::<2>(fields), fifth);
        }
    }
    let mut word = [0; PANEL_ROWS];
    // SAFETY: sixteen u32 are 64 bytes.
    unsafe { _mm512_storeu_si512(word.as_mut_ptr().cast(), fields) };
    word
}

/// [`quad_index`] of the quads, and what turns it into that of a corrected quad.
static QUAD_INDICES: [u8; 64] = index_tables().0;
static INDEX_CORRECTIONS: [u8; 64] = index_tables().1;

const fn index_tables() -> ([u8; 64], [u8; 64]) {
    let (mut plain, mut corrections) = ([0; 64], [0; 64]);
    let mut code = 0;
    while code < 64 {
        plain[code] = quad_index(QUADS[code]);
        code += 1;
    }
    let mut code = 0;
    while code < 63 {
        let corrected = QUADS[code] ^ CORRECTIONS[code + 1] & 63;
        corrections[code + 1] = plain[code] ^ quad_index(corrected);
        code += 1;
    }
    (plain, corrections)
}

/// The indices of two words of sixteen rows, those of a row side by side.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn interleave(first: __m512i, second: __m512i) -> PassIndices {
    // A broken packing invariant must not leave the table.
    let last = _mm512_set1_epi8(80);
    let (first, second) = (_mm512_min_epu8(first, last), _mm512_min_epu8(second, last));
    let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    let mut indices = [0; PANEL_ROWS];
    // SAFETY: sixteen u64 are twice 64 bytes.
    unsafe {
        let out: *mut u64 = indices.as_mut_ptr();
        _mm512_storeu_si512(out.cast(), _mm512_permutex2var_epi32(first, low, second));
        _mm512_storeu_si512(out.add(8).cast(), _mm512_permutex2var_epi32(first, high, second));
    }
    indices
}

/// Rows that are looked up beside one step of the dot products, which is four inputs.
const ROWS_A_STEP: usize = 2;

/// One pass over the rows that are looked up; beside them, as many units of dot products as take no longer.
///
/// # Safety
/// As for [`Sweep::row`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn sweep_and_dots<
    const VBMI: bool,
    const FIRST: bool,
    const LAST: bool,
    const INITIAL: bool,
>(
    sweep: Sweep<'_, Lanes32<VBMI>>,
    dots: &mut Dots<'_>,
) {
    let mut row = 0;
    while let Some((unit, sums)) = dots.unit() {
        let end = row + unit.passes * PASS_STEPS * ROWS_A_STEP;
        if end > sweep.rows {
            break;
        }
        // SAFETY: all rows are below `end`; the caller's promise.
        unsafe {
            dot_unit(unit, sums, LookUps::<VBMI, FIRST, LAST, INITIAL> { sweep: &sweep, row });
        }
        dots.advance();
        row = end;
    }
    for row in row..sweep.rows {
        // SAFETY: one of the rows; the caller's promise.
        unsafe { sweep.row::<FIRST, LAST, INITIAL>(row) };
    }
}

/// What is done beside each step of a unit. No closure: it would be a call, around which every sum would be
/// saved.
trait Beside {
    /// # Safety
    /// As for [`Sweep::row`].
    unsafe fn step(&self, step: usize);
}

/// Nothing is done.
struct Nothing;

impl Beside for Nothing {
    #[inline(always)]
    unsafe fn step(&self, _: usize) {}
}

/// Some rows are looked up, from `row` on.
struct LookUps<'a, const VBMI: bool, const FIRST: bool, const LAST: bool, const INITIAL: bool> {
    sweep: &'a Sweep<'a, Lanes32<VBMI>>,
    row: usize,
}

impl<const VBMI: bool, const FIRST: bool, const LAST: bool, const INITIAL: bool> Beside
    for LookUps<'_, VBMI, FIRST, LAST, INITIAL>
{
    #[inline(always)]
    unsafe fn step(&self, step: usize) {
        for i in 0..ROWS_A_STEP {
            // SAFETY: the caller's promise.
            unsafe {
                self.sweep.row::<FIRST, LAST, INITIAL>(self.row + ROWS_A_STEP * step + i);
            }
        }
    }
}

/// Adds a unit's products to its sums, and does something beside every step.
///
/// # Safety
/// As for what is done beside.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn dot_unit(unit: DotUnit<'_>, sums: &mut DotSums, beside: impl Beside) {
    let mut lanes = [[_mm512_setzero_si512(); DOT_PANELS]; DOT_TOKENS];
    for token in 0..DOT_TOKENS {
        for panel in 0..DOT_PANELS {
            lanes[token][panel] = load(&sums[token][panel]);
        }
    }
    let mask = _mm512_set1_epi8(3);
    for pass in 0..unit.passes {
        for word in 0..2 {
            let mut codes = [mask; DOT_PANELS];
            for (panel, codes) in codes.iter_mut().enumerate() {
                // SAFETY: `Dots::unit` checked that there are words for three panels of every pass, 128 bytes
                // each.
                unsafe {
                    let words = unit.words.as_ptr().add(pass * unit.stride + panel);
                    *codes = _mm512_loadu_si512(words.cast::<PanelVector>().add(word).cast());
                    // The other passes lie far apart: no prefetcher of the processor finds them.
                    let next = words.wrapping_add(unit.stride).cast::<PanelVector>();
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(word).cast());
                }
            }
            for field in 0..4 {
                let step = PASS_STEPS * pass + 4 * word + field;
                // SAFETY: the caller's promise.
                unsafe { beside.step(step) };
                let mut trits = codes;
                for panel in 0..DOT_PANELS {
                    trits[panel] = _mm512_and_si512(codes[panel], mask);
                    codes[panel] = _mm512_srli_epi32::<2>(codes[panel]);
                }
                for (token, lanes) in lanes.iter_mut().enumerate() {
                    // SAFETY: `Dots::unit` checked that every step has eight activations.
                    let four = unsafe { *unit.fours.as_ptr().add(32 * step + token) };
                    let four = _mm512_set1_epi32(four);
                    for (lanes, trits) in lanes.iter_mut().zip(trits) {
                        *lanes = _mm512_dpbusd_epi32(*lanes, trits, four);
                    }
                }
            }
        }
    }
    for token in 0..DOT_TOKENS {
        for panel in 0..DOT_PANELS {
            // SAFETY: sixteen i32 are 64 bytes.
            unsafe {
                _mm512_storeu_si512(sums[token][panel].as_mut_ptr().cast(), lanes[token][panel]);
            }
        }
    }
}

/// `[row][token]` of a panel and 32 tokens to `[token][row]`.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose_panel(sums: &[i32], out: &mut [i32]) {
    assert!(sums.len() == 16 * 32 && out.len() == 32 * 16);
    for half in 0..2 {
        let mut rows = [_mm512_setzero_si512(); 16];
        // SAFETY: sixteen rows of sixteen lanes, 32 apart in `sums` and side by side in `out`, lie inside
        // the slices by the assertion.
        unsafe {
            for (row, lanes) in rows.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(sums.as_ptr().add(32 * row + 16 * half).cast());
            }
            let out = out.as_mut_ptr().add(256 * half);
            for (token, lanes) in transpose_16x16(rows).into_iter().enumerate() {
                _mm512_storeu_si512(out.add(16 * token).cast(), lanes);
            }
        }
    }
}

/// Activations of up to 32 tokens from `[token][input]` i8 to `[input][token]` i16.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn transpose_inputs(
    input: &QuantizedRows,
    tokens: Range<usize>,
    out: &mut [i16],
    fours_out: &mut [i32],
) {
    let blocks = out.chunks_mut(64 * 32).zip(fours_out.chunks_mut(16 * 32));
    for (block, (out, fours_out)) in blocks.enumerate() {
        for half in 0..2 {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (row, token) in rows.iter_mut().zip(tokens.clone().skip(16 * half)) {
                let values: &[i8; 64] =
                    input.padded_row(token)[64 * block..].first_chunk().expect("padded to 64");
                *row = load(values);
            }
            // Four inputs of sixteen tokens in each.
            let fours = transpose_16x16(rows);
            for (four, out) in fours.iter().zip(fours_out.chunks_exact_mut(32)) {
                // SAFETY: sixteen i32 are 64 bytes.
                unsafe {
                    _mm512_storeu_si512(out[16 * half..][..16].as_mut_ptr().cast(), *four);
                }
            }
            for (four, out) in fours.iter().zip(out.chunks_exact_mut(4 * 32)) {
                for (byte, out) in out.chunks_exact_mut(32).enumerate() {
                    let up = _mm512_set1_epi32(24 - 8 * byte as i32);
                    let wide = _mm512_srai_epi32::<24>(_mm512_sllv_epi32(*four, up));
                    let out = &mut out[16 * half..][..16];
                    // SAFETY: sixteen i16 are 32 bytes.
                    unsafe {
                        _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(wide));
                    }
                }
            }
        }
    }
}

/// Transposes sixteen rows of sixteen 32-bit values. Loops and no closures: these would not be compiled with
/// this function's features.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose_16x16(rows: [__m512i; 16]) -> [__m512i; 16] {
    let (mut fours, mut out) = ([rows[0]; 16], rows);
    // fours[4g + c] holds columns c, 4 + c, 8 + c and 12 + c of rows 4g .. 4g + 4, 128 bits each.
    for g in (0..16).step_by(4) {
        let low = [
            _mm512_unpacklo_epi32(rows[g], rows[g + 1]),
            _mm512_unpacklo_epi32(rows[g + 2], rows[g + 3]),
        ];
        let high = [
            _mm512_unpackhi_epi32(rows[g], rows[g + 1]),
            _mm512_unpackhi_epi32(rows[g + 2], rows[g + 3]),
        ];
        fours[g] = _mm512_unpacklo_epi64(low[0], low[1]);
        fours[g + 1] = _mm512_unpackhi_epi64(low[0], low[1]);
        fours[g + 2] = _mm512_unpacklo_epi64(high[0], high[1]);
        fours[g + 3] = _mm512_unpackhi_epi64(high[0], high[1]);
    }
    for c in 0..4 {
        let (a, b, c_, d) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
        let first = _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b);
        let second = _mm512_shuffle_i32x4::<0b01_00_01_00>(c_, d);
        out[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
        out[4 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
        let first = _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b);
        let second = _mm512_shuffle_i32x4::<0b11_10_11_10>(c_, d);
        out[8 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
        out[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
    }
    out
}
