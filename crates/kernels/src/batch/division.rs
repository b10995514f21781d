//! How a step's work is divided among blocks, and a block's shared memory, as the source does it.

use super::PHASES;
use crate::cuda::Constant;
use crate::decode::Shape;
use crate::ternary_gemm::cuda::{TILE_COLS, TILE_ROWS};

// As in the source.
const TILE_BYTES: usize = 512;
const MATRIX_BYTES: usize = 128;
/// Behind a matrix for warpgroups, for its banks.
const PAD_BYTES: usize = 16;
/// Layers that share a phase, each with activations of its own.
const LAYERS: [usize; PHASES] = [3, 1, 1, 1, 1];
const GLU: usize = 2;
const HEAD: usize = 4;
/// A word of quantised channels that has not been sent: integers are never -128.
const NOTHING: u32 = 0x8080_8080;

/// Of a block.
pub(super) const WARPS: usize = 16;

/// How many sequences take part in a step, and how they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Groups of sequences, each with blocks of its own.
    pub teams: usize,
    /// Operands of a block's products, of eight sequences each.
    pub operands: usize,
    /// Warps that multiply together: four if blocks have several rows of tiles.
    pub together: usize,
    /// Blocks of a cluster, of as many teams, that multiply for all their sequences.
    pub sharing: usize,
}

impl Size {
    /// Sequences that a block has room for.
    fn slots(self) -> usize {
        8 * self.operands
    }
}

const fn size(teams: usize, operands: usize, together: usize, sharing: usize) -> Size {
    Size { teams, operands, together, sharing }
}

/// In the order of what they have room for: the fewest teams that have, for each reads all weights. Of those that have room
/// for as many the first that fits is used.
const SIZES: [Size; 9] = [
    size(1, 1, 1, 1),
    size(1, 2, 1, 1),
    size(2, 1, 1, 1),
    size(2, 2, 1, 1),
    size(4, 1, 1, 1),
    size(4, 2, 4, 2),
    size(4, 2, 4, 1),
    size(8, 2, 4, 2),
    size(8, 2, 4, 1),
];
/// Tiles on their way to a warp: as many as fit.
const STAGES: [usize; 5] = [16, 8, 6, 5, 4];
/// In how many rounds the head may be multiplied, if there is no room for all its sums.
const ROUNDS: [usize; 3] = [1, 2, 4];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Division {
    pub size: Size,
    /// Blocks of a team, each of which owns channels.
    pub owners: usize,
    rounds: usize,
    stages: usize,
    pub shared_bytes: usize,
}

/// Of a block's phases: columns of tiles, and rows of each layer, or round, at most.
struct Tiles {
    columns: [usize; PHASES],
    rows: [usize; PHASES],
    size: Size,
    rounds: usize,
}

/// How a phase's rows of tiles are multiplied.
struct Sets {
    /// That a group of warps has each.
    whole: usize,
    /// Whose K the groups share, in so many parts.
    shared: usize,
    parts: usize,
    groups: usize,
    /// Layers that are multiplied one after the other.
    passes: usize,
}

impl Tiles {
    fn new(shape: Shape, owners: usize, size: Size, rounds: usize) -> Self {
        let Shape { width, inner, vocab, .. } = shape;
        // The blocks of a cluster divide rows among them, or K.
        let is_by_rows = |phase| phase == GLU || phase == HEAD;
        let groups = |n: usize, owners: usize| n.div_ceil(TILE_ROWS).div_ceil(owners);
        let width_groups = groups(width, owners);
        let [inner_groups, head_groups] = [inner, vocab].map(|n| groups(n, owners * size.sharing));
        let mut columns = inputs(shape).map(|n| n.div_ceil(TILE_COLS));
        for (phase, columns) in columns.iter_mut().enumerate() {
            *columns = if is_by_rows(phase) { *columns } else { columns.div_ceil(size.sharing) };
        }
        let head_rows = head_groups.div_ceil(rounds);
        let rows = [width_groups, width_groups, 2 * inner_groups, width_groups, head_rows];
        Self { columns, rows, size, rounds }
    }

    fn sets(&self, phase: usize) -> Sets {
        let together = self.size.together;
        let passes = if together > 1 { 1 } else { LAYERS[phase] };
        let groups = WARPS / together;
        let sets = self.rows[phase].div_ceil(together) * (LAYERS[phase] / passes);
        let shared = sets % groups;
        let most = self.columns[phase].max(together);
        let fits = |&parts: &usize| parts * shared <= groups && parts <= most;
        let powers = (0..).map(|bits| 1 << bits).take_while(|&parts| parts <= groups);
        // In a cluster sums have little room, and of layers that are multiplied together there are enough sets.
        let is_whole = shared == 0 || self.size.sharing > 1 && passes < LAYERS[phase];
        let parts = if is_whole { 1 } else { powers.filter(fits).last().unwrap_or(1) };
        Sets { whole: sets - shared, shared, parts, groups, passes }
    }

    fn region_bytes(&self, phase: usize) -> usize {
        let Size { together, sharing, .. } = self.size;
        let Sets { whole, shared, parts, passes, .. } = self.sets(phase);
        let matrix_bytes = MATRIX_BYTES + if together > 1 { PAD_BYTES } else { 0 };
        let inputs =
            LAYERS[phase] * self.columns[phase] * sharing * self.size.slots() * matrix_bytes;
        let sum_words = sharing * self.size.slots() * TILE_ROWS + 16;
        inputs + passes * together * (whole + shared * parts) * 4 * sum_words
    }

    /// That a warp multiplies, at most.
    fn of_warp(&self, phase: usize) -> usize {
        let Sets { whole, shared, parts, groups, passes } = self.sets(phase);
        let columns = self.columns[phase];
        passes
            * (whole / groups * columns
                + (shared * parts).div_ceil(groups) * columns.div_ceil(parts))
    }

    /// That a block reads of a layer.
    fn of_layer(&self) -> usize {
        (0..HEAD).map(|phase| LAYERS[phase] * self.rows[phase] * self.columns[phase]).sum()
    }

    /// What lies at the beginning of a block's shared memory. `None` if its threads cannot bring all vectors.
    fn first_bytes(&self, stages: usize) -> Option<usize> {
        let own = TILE_ROWS * self.rows[0];
        // Each thread brings four floats of the vectors.
        let vectors = (4 * own).max(TILE_ROWS * self.rows[GLU] / 2);
        let inboxes = if self.size.sharing > 1 { WARPS * 3 * own.div_ceil(64) } else { 1 };
        let list = |tiles: usize| tiles.max(stages) + stages + 1;
        let lists = list((0..HEAD).map(|phase| self.of_warp(phase)).sum())
            + list(self.rounds * self.of_warp(HEAD));
        let bytes = 2 * 4 * vectors
            + 8 * (1 + WARPS)
            + inboxes * 32 * 8
            + 4 * WARPS * (2 * PHASES + lists + 2);
        (vectors <= 4 * 32 * WARPS).then(|| bytes.next_multiple_of(128))
    }
}

/// K of each phase.
fn inputs(Shape { width, inner, .. }: Shape) -> [usize; PHASES] {
    [width, width, width, inner, width]
}

impl Division {
    /// For more and more sequences, whatever fits.
    pub fn all(shape: Shape, multiprocessors: usize, shared_bytes: usize) -> Vec<Self> {
        let mut all: Vec<Self> = SIZES
            .into_iter()
            .filter_map(|size| Self::new(shape, size, multiprocessors, shared_bytes))
            .collect();
        all.dedup_by_key(|division| division.sequences());
        all
    }

    /// `None` if a model's rows do not fit.
    fn new(shape: Shape, size: Size, multiprocessors: usize, shared_bytes: usize) -> Option<Self> {
        // The fewest owners whose busiest one has as few tiles of a layer as with all of them.
        let tiles = |owners: usize, rounds: usize| Tiles::new(shape, owners, size, rounds);
        let busiest = |owners: usize| tiles(owners, 1).of_layer();
        let most = (multiprocessors / size.teams).min(shape.width.div_ceil(TILE_ROWS));
        let owners = (1..=most).min_by_key(|&owners| (busiest(owners), owners))?;
        let with = |rounds: usize, stages: usize| {
            let tiles = tiles(owners, rounds);
            let region = (0..PHASES).map(|phase| tiles.region_bytes(phase)).max()?;
            let bytes = tiles.first_bytes(stages)? + region + stages * WARPS * TILE_BYTES;
            (bytes <= shared_bytes).then_some(Self {
                size,
                owners,
                rounds,
                stages,
                shared_bytes: bytes,
            })
        };
        let choices = ROUNDS.into_iter().flat_map(|r| STAGES.map(|stages| (r, stages)));
        choices.into_iter().find_map(|(rounds, stages)| with(rounds, stages))
    }

    /// Sequences that there is room for.
    pub fn sequences(&self) -> usize {
        self.size.slots() * self.size.teams
    }

    pub fn blocks(&self) -> usize {
        self.size.teams * self.owners
    }

    pub fn constants(&self, shape: Shape) -> [Constant; 11] {
        [
            ("WIDTH", shape.width),
            ("INNER", shape.inner),
            ("VOCAB", shape.vocab),
            ("NUM_TEAMS", self.size.teams),
            ("NUM_OPERANDS", self.size.operands),
            ("NUM_TOGETHER", self.size.together),
            ("NUM_SHARING", self.size.sharing),
            ("NUM_OWNERS", self.owners),
            ("NUM_ROUNDS", self.rounds),
            ("NUM_STAGES", self.stages),
            // The source compares it with its own.
            ("NUM_SHARED_BYTES", self.shared_bytes),
        ]
    }

    /// Blocks that make a row's channels.
    fn makers(&self) -> usize {
        self.owners * self.size.sharing
    }

    /// Floats of the messages: of each phase four from each maker to each sequence.
    pub fn messages(&self) -> usize {
        4 * PHASES * self.sequences() * self.makers()
    }

    /// Keys: of each maker to each sequence.
    pub fn keys(&self) -> usize {
        self.sequences() * self.makers()
    }

    /// What the quantised rows are before any has been sent, in words of four channels: of each phase two places of
    /// [layer][sequence][K].
    pub fn rows(&self, shape: Shape) -> Vec<u32> {
        let row = |inputs: usize| {
            // Zeros where there are no channels.
            let mut row = vec![0; inputs.next_multiple_of(TILE_COLS) / 4];
            for word in 0..inputs / 4 {
                row[self.place_of_word(word)] = NOTHING;
            }
            row
        };
        let rows = inputs(shape).into_iter().zip(LAYERS);
        rows.flat_map(|(inputs, layers)| row(inputs).repeat(2 * layers * self.sequences()))
            .collect()
    }

    /// Words that become a row of a matrix, or an operand of one warp, lie side by side.
    fn place_of_word(&self, word: usize) -> usize {
        if self.size.together > 1 {
            word & !31 | (word & 3) << 3 | word & 4 | word >> 3 & 3
        } else {
            word & !7 | (word & 3) << 1 | word >> 2 & 1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an H100 or H200: multiprocessors, bytes of shared memory.
    const HOPPER: (usize, usize) = (132, 232_448);

    #[test]
    fn published_sizes_are_divided_evenly() {
        // Sequences and owners. Clusters do not fit 2.7B; blocks of 16 sequences do not fit 7B and 13B.
        for (width, inner, expected) in [
            (1024, 2816, &[(8, 64), (16, 64), (32, 64), (64, 32), (128, 16)][..]),
            (2048, 5632, &[(8, 128), (16, 128), (32, 64), (64, 32), (128, 16)]),
            (2560, 6912, &[(8, 108), (16, 108), (32, 62), (64, 32)]),
            (4096, 11008, &[(8, 128), (16, 64), (32, 33)]),
            (5120, 13824, &[(8, 124), (16, 64), (32, 32)]),
        ] {
            let shape = Shape { layers: 2, width, inner, vocab: 32000 };
            let all = Division::all(shape, HOPPER.0, HOPPER.1);
            let found: Vec<_> = all.iter().map(|one| (one.sequences(), one.owners)).collect();
            assert_eq!(found, expected, "{width}");
            for division in all {
                assert!(division.blocks() <= HOPPER.0);
                assert!(division.shared_bytes <= HOPPER.1);
                assert!(division.stages >= 4, "{width}: {division:?}");
                let has_clusters = division.size.sharing > 1;
                assert_eq!(has_clusters, division.sequences() > 32 && width < 2560);
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let shape = |width, inner, vocab| Shape { layers: 2, width, inner, vocab };
        let all = |shape, bytes| Division::all(shape, HOPPER.0, bytes);
        assert_eq!(all(shape(128, 160, 4_000_000), HOPPER.1), []);
        assert_eq!(all(shape(16384, 43008, 32000), HOPPER.1), []);
        assert_eq!(all(shape(2048, 5632, 32000), 1 << 16), []);
    }

    #[test]
    fn every_channel_has_a_place_of_its_own() {
        let shape = Shape { layers: 1, width: 256, inner: 336, vocab: 100 };
        for division in Division::all(shape, HOPPER.0, HOPPER.1) {
            let mut places: Vec<usize> = (0..96).map(|word| division.place_of_word(word)).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..96));
        }
    }
}
