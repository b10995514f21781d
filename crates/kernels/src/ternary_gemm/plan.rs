//! How products on a GPU are cut into parts: what every block would compute alike.

use super::cuda::{
    FEW_TOKENS_THREADS, PROMPT_TOKENS, TILE_COLS, TILE_ROWS, TILE_WORDS, TileMatrix,
    WIDE_PROMPT_TOKENS,
};

const FEW_TOKENS_WARPS: usize = FEW_TOKENS_THREADS / 32;
/// Rings of six tiles, as in the source.
const FEW_TOKENS_RING_BYTES: usize = FEW_TOKENS_WARPS * 6 * TILE_WORDS * 4;
/// Rows of a prompt's tile.
const PROMPT_ROWS: usize = 256;

/// How a product of few tokens is cut into parts, as its source says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FewTokensPlan {
    log_sharers: u32,
    each: u32,
    rest: u32,
    window: u32,
}

impl FewTokensPlan {
    /// Parts for so many blocks.
    pub fn new(matrix: TileMatrix, blocks: usize) -> Self {
        let log_warps = FEW_TOKENS_WARPS.ilog2();
        let log_regions = matrix.row_tiles.trailing_zeros().min(log_warps);
        let log_sharers = log_warps - log_regions;
        let (tiles, parts) = (matrix.tiles() >> log_regions, blocks << log_sharers);
        let window = (tiles.div_ceil(parts) << log_sharers).min(matrix.col_tiles);
        Self {
            log_sharers,
            each: (tiles / parts) as u32,
            rest: (tiles % parts) as u32,
            window: window as u32,
        }
    }

    /// Shared memory of a block for so many rows of activations: the rings, then those rows, each padded by 16 bytes.
    pub fn shared_bytes(&self, rows: usize) -> usize {
        FEW_TOKENS_RING_BYTES + rows * (self.window as usize * TILE_COLS + 16)
    }
}

/// How a prompt's product is cut into tiles, as its source says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptPlan {
    by_pair_blocks: u64,
    by_token_blocks: u64,
    by_last_each: u64,
    pairs: u32,
    pair_blocks: u32,
    token_blocks: u32,
    whole: u32,
    tiles: u32,
    last_tokens: u32,
    last_halves: u32,
    last_token: u32,
    last_first: u32,
    last_each: u32,
}

impl PromptPlan {
    /// Tiles of 128 tokens, for so many blocks. In the last round, which has not enough of them for all blocks, they are smaller
    /// where that gives none of the blocks a second one: 48 tokens, half of the rows, 80 or 96 tokens.
    pub fn regular(matrix: TileMatrix, m: usize, is_gated: bool, blocks: usize) -> Self {
        let whole_plan = Self::whole(matrix, m, is_gated, PROMPT_TOKENS);
        let (token_blocks, tiles) = (whole_plan.token_blocks as usize, whole_plan.tiles as usize);
        let rest = tiles % blocks;
        if rest == 0 {
            return whole_plan;
        }
        let whole = tiles - rest;
        let last_token = whole % token_blocks * PROMPT_TOKENS;
        let others = tiles / token_blocks - 1 - whole / token_blocks;
        let first_of = |tokens| (m - last_token).div_ceil(tokens);
        let tiles_of = |tokens| first_of(tokens) + others * m.div_ceil(tokens);
        let fits = |&tokens: &usize| tiles_of(tokens) <= blocks;
        let has_halves = 2 * rest <= blocks;
        let smaller: &[usize] = if has_halves { &[48] } else { &[48, 80, 96] };
        let (tokens, halves) = match smaller.iter().copied().find(fits) {
            Some(tokens) => (tokens, 1),
            None => (PROMPT_TOKENS, 1 + usize::from(has_halves)),
        };
        Self {
            whole: whole as u32,
            tiles: (whole + halves * tiles_of(tokens)) as u32,
            last_tokens: tokens as u32,
            last_halves: halves as u32,
            last_token: last_token as u32,
            last_first: first_of(tokens) as u32,
            last_each: m.div_ceil(tokens) as u32,
            by_last_each: reciprocal(m.div_ceil(tokens)),
            ..whole_plan
        }
    }

    /// Tiles of 160 tokens.
    pub fn wide(matrix: TileMatrix, m: usize) -> Self {
        Self::whole(matrix, m, false, WIDE_PROMPT_TOKENS)
    }

    /// Whole tiles of so many tokens.
    fn whole(matrix: TileMatrix, m: usize, is_gated: bool, tokens: usize) -> Self {
        // Of a gated unit a pair is a row tile of a and the same one of b.
        let (pairs, segments) = if is_gated {
            (matrix.row_tiles / 2, 1)
        } else {
            (matrix.segment_tiles.div_ceil(2), matrix.row_tiles / matrix.segment_tiles)
        };
        let pair_blocks = pairs.div_ceil(PROMPT_ROWS / (2 * TILE_ROWS));
        let token_blocks = m.div_ceil(tokens);
        let tiles = pair_blocks * segments * token_blocks;
        Self {
            pairs: pairs as u32,
            pair_blocks: pair_blocks as u32,
            token_blocks: token_blocks as u32,
            whole: tiles as u32,
            tiles: tiles as u32,
            last_tokens: tokens as u32,
            last_halves: 1,
            last_token: 0,
            last_first: 0,
            last_each: 1,
            by_pair_blocks: reciprocal(pair_blocks),
            by_token_blocks: reciprocal(token_blocks),
            by_last_each: reciprocal(1),
        }
    }
}

/// For the source's `quotient`.
fn reciprocal(divisor: usize) -> u64 {
    u64::MAX / divisor as u64
}

/// Whether tiles of 160 tokens take a prompt's product less time than those of 128 on so many multiprocessors. A round of them takes 10 units of
/// time instead of 8; but the last round of tiles of 128 tokens, whose tiles may be smaller, about 7.
pub fn has_wide_tiles(matrix: TileMatrix, tokens: usize, multiprocessors: usize) -> bool {
    let row_blocks = (matrix.segment_tiles * TILE_ROWS).div_ceil(PROMPT_ROWS)
        * (matrix.row_tiles / matrix.segment_tiles);
    let tiles = row_blocks * tokens.div_ceil(PROMPT_TOKENS);
    let wide_tiles = row_blocks * tokens.div_ceil(WIDE_PROMPT_TOKENS);
    let last_round = if tiles.is_multiple_of(multiprocessors) { 0 } else { 7 };
    10 * wide_tiles.div_ceil(multiprocessors) < 8 * (tiles / multiprocessors) + last_round
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_few_tokens_needs_few_columns_of_activations() {
        let plan = |n, k| FewTokensPlan::new(TileMatrix::single(0, n, k), 132);
        // Sixteen regions of 20 rows of 216 tiles, 32 or 33 tiles for each of 132 blocks.
        let wide = FewTokensPlan { log_sharers: 0, each: 32, rest: 96, window: 33 };
        assert_eq!(plan(5120, 27_648), wide);
        // More tiles than columns: all of them.
        assert_eq!(plan(55_296, 5120).window, 40);
        // An odd number of row tiles is one region, which sixteen warps share.
        let odd = FewTokensPlan { log_sharers: 4, each: 0, rest: 63 * 25, window: 16 };
        assert_eq!(plan(1008, 3200), odd);
    }

    #[test]
    fn the_last_round_of_a_prompt_has_smaller_tiles_where_they_suffice() {
        let plan = |matrix, m, is_gated| PromptPlan::regular(matrix, m, is_gated, 132);
        let last = |plan: PromptPlan| {
            let PromptPlan { whole, tiles, last_tokens, last_halves, .. } = plan;
            (whole, tiles, last_tokens, last_halves)
        };
        // 370M: halves of the rows, of the 60 tiles beyond a round and of 64; of 88 tiles tokens instead.
        assert_eq!(
            last(plan(TileMatrix::stacked(0, 3, 1024, 1024), 2048, false)),
            (132, 252, 128, 2)
        );
        assert_eq!(last(plan(TileMatrix::single(0, 1024, 2816), 2048, false)), (0, 128, 128, 2));
        let gated = plan(TileMatrix::single(0, 5632, 1024), 2048, true);
        assert_eq!(last(gated), (264, 264 + 121, 96, 1));
        assert_eq!((gated.last_token, gated.last_first, gated.last_each), (1024, 11, 22));
        // Few tokens of few rows: 48 at a time.
        assert_eq!(last(plan(TileMatrix::single(0, 256, 128), 2048, false)), (0, 43, 48, 1));
        // A whole number of rounds.
        assert_eq!(
            last(plan(TileMatrix::single(0, 33 * 256, 128), 512, false)),
            (132, 132, 128, 1)
        );
    }

    #[test]
    fn quotients_need_no_division() {
        for divisor in (1..400).chain([4099, 1 << 20, (1 << 31) - 1]) {
            let by = u128::from(reciprocal(divisor));
            let multiples = (1..130).map(|i| i * divisor).chain([u32::MAX as usize + 1]);
            for n in multiples.flat_map(|n| [n - 1, n]).filter(|&n| n <= u32::MAX as usize) {
                assert_eq!((((n as u128 + 1) * by) >> 64) as usize, n / divisor, "{n} / {divisor}");
            }
        }
    }

    #[test]
    fn wide_tiles_are_for_shapes_that_would_leave_the_last_round_half_empty() {
        let has_wide = |n, k, tokens| has_wide_tiles(TileMatrix::single(0, n, k), tokens, 132);
        // Outputs of 2.7B and 13B: 160 and 320 tiles of 128 tokens, 130 and 260 of 160.
        assert!(has_wide(2560, 6912, 2048) && has_wide(5120, 13824, 2048));
        assert!(has_wide_tiles(TileMatrix::stacked(0, 3, 2560, 2560), 2048, 132));
        // Of 1.3B: 128 tiles, one round. Of 370M: half a round.
        assert!(!has_wide(2048, 5632, 2048) && !has_wide(1024, 2816, 2048));
        assert!(!has_wide_tiles(TileMatrix::stacked(0, 3, 2048, 2048), 2048, 132));
    }
}
