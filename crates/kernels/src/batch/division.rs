//! How a step's work is divided among blocks, and a block's shared memory, as the source does it.

use super::PHASES;
use crate::cuda::Constant;
use crate::decode::Shape;
use crate::ternary_gemm::cuda::{TILE_COLS, TILE_ROWS};

// As in the source.
const TILE_BYTES: usize = 512;
const MATRIX_BYTES: usize = 128 + 16;
const SUM_WORDS: usize = SLOTS * TILE_ROWS + 16;
/// Warps that multiply together, and groups of such warps.
const GROUP: usize = 4;
const GROUPS: usize = SLOTS / GROUP;
/// Layers that share a phase, each with activations of its own.
const LAYERS: [usize; PHASES] = [3, 1, 1, 1, 1];
const GLU: usize = 2;
/// A word of quantised channels that has not been sent: integers are never -128.
const NOTHING: u32 = 0x8080_8080;

/// Sequences of a block, and warps.
pub(super) const SLOTS: usize = 16;
/// Teams of blocks, each with sequences of its own: the fewest that have room for all, for each reads all weights.
pub(super) const TEAMS: [usize; 4] = [1, 2, 4, 8];
/// Tiles on their way to a warp: as many as fit.
const STAGES: [usize; 4] = [16, 8, 4, 2];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Division {
    pub teams: usize,
    /// Blocks of a team, each of which owns channels.
    pub owners: usize,
    stages: usize,
    pub shared_bytes: usize,
}

/// Of a block's phases: columns of tiles, and rows of each layer at most.
struct Tiles {
    columns: [usize; PHASES],
    rows: [usize; PHASES],
}

impl Tiles {
    fn new(shape: Shape, owners: usize) -> Self {
        let Shape { width, inner, vocab, .. } = shape;
        let groups = |n: usize| n.div_ceil(TILE_ROWS).div_ceil(owners);
        let [width_groups, inner_groups] = [width, inner].map(groups);
        Self {
            columns: inputs(shape).map(|n| n.div_ceil(TILE_COLS)),
            rows: [width_groups, width_groups, 2 * inner_groups, width_groups, groups(vocab)],
        }
    }

    /// Fours of rows by columns that a group of warps multiplies of each layer, one after the other.
    fn layer_runs(&self, phase: usize) -> usize {
        let fours = self.rows[phase].div_ceil(GROUP);
        let shared = fours % GROUPS;
        // The groups share K of those that are not as many as they are.
        let parts = if shared == GROUPS / 2 { 2 } else { GROUPS };
        (fours - shared + shared * parts) / GROUPS
    }

    fn region_bytes(&self, phase: usize) -> usize {
        let inputs = self.columns[phase] * SLOTS * MATRIX_BYTES;
        LAYERS[phase] * (inputs + 4 * SUM_WORDS * GROUP * GROUPS * self.layer_runs(phase))
    }

    /// Tiles of a layer that a block reads.
    fn of_layer(&self) -> usize {
        (0..PHASES - 1).map(|phase| LAYERS[phase] * self.rows[phase] * self.columns[phase]).sum()
    }
}

/// K of each phase.
fn inputs(Shape { width, inner, .. }: Shape) -> [usize; PHASES] {
    [width, width, width, inner, width]
}

impl Division {
    /// For so many teams. `None` if a model's rows do not fit.
    pub fn new(
        shape: Shape,
        teams: usize,
        multiprocessors: usize,
        shared_bytes: usize,
    ) -> Option<Self> {
        // The fewest owners whose busiest one has as few tiles of a layer as with all of them.
        let busiest = |owners: usize| Tiles::new(shape, owners).of_layer();
        let most = (multiprocessors / teams).min(shape.width.div_ceil(TILE_ROWS));
        let owners = (1..=most).min_by_key(|&owners| (busiest(owners), owners))?;
        let tiles = Tiles::new(shape, owners);
        let own = TILE_ROWS * tiles.rows[0];
        let own_vectors = (4 * own).max(TILE_ROWS * tiles.rows[GLU] / 2);
        let runs: usize = (0..PHASES).map(|phase| LAYERS[phase] * tiles.layer_runs(phase)).sum();
        let first = 8 * own_vectors + 8 + 4 * SLOTS * (2 * PHASES + runs);
        let region = (0..PHASES).map(|phase| tiles.region_bytes(phase)).max()?;
        let fixed = first.next_multiple_of(8).next_multiple_of(128) + region;
        let bytes = |stages: usize| fixed + stages * SLOTS * TILE_BYTES;
        let stages = STAGES.into_iter().find(|&stages| bytes(stages) <= shared_bytes)?;
        // Each thread brings four floats of the vectors.
        let is_small = own_vectors <= 4 * 32 * SLOTS;
        is_small.then(|| Self { teams, owners, stages, shared_bytes: bytes(stages) })
    }

    /// Sequences that it has room for.
    pub fn sequences(&self) -> usize {
        SLOTS * self.teams
    }

    pub fn constants(&self, shape: Shape) -> [Constant; 7] {
        [
            ("WIDTH", shape.width),
            ("INNER", shape.inner),
            ("VOCAB", shape.vocab),
            ("NUM_TEAMS", self.teams),
            ("NUM_OWNERS", self.owners),
            ("NUM_STAGES", self.stages),
            // The source compares it with its own.
            ("NUM_SHARED_BYTES", self.shared_bytes),
        ]
    }

    /// Floats of the messages: of each phase four from each owner to each sequence.
    pub fn messages(&self) -> usize {
        4 * PHASES * self.sequences() * self.owners
    }

    /// What the quantised rows are before any has been sent, in words of four channels: of each phase [layer][sequence][K].
    pub fn rows(&self, shape: Shape) -> Vec<u32> {
        let row = |inputs: usize| {
            // Zeros where there are no channels.
            let mut row = vec![0; inputs.next_multiple_of(TILE_COLS) / 4];
            for word in 0..inputs / 4 {
                row[place_of_word(word)] = NOTHING;
            }
            row
        };
        let rows = inputs(shape).into_iter().zip(LAYERS);
        rows.flat_map(|(inputs, layers)| row(inputs).repeat(layers * self.sequences())).collect()
    }
}

/// Of 32 words those that become a row of a matrix lie side by side.
fn place_of_word(word: usize) -> usize {
    word & !31 | (word & 3) << 3 | word & 4 | word >> 3 & 3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an H100 or H200: multiprocessors, bytes of shared memory.
    const HOPPER: (usize, usize) = (132, 232_448);

    #[test]
    fn published_sizes_are_divided_evenly() {
        for (width, inner, owners) in [
            (1024, 2816, [64, 64, 32, 16]),
            (2048, 5632, [128, 64, 32, 16]),
            (2560, 6912, [108, 62, 32, 0]),
        ] {
            let shape = Shape { layers: 2, width, inner, vocab: 32000 };
            for (teams, owners) in TEAMS.into_iter().zip(owners) {
                let division = Division::new(shape, teams, HOPPER.0, HOPPER.1);
                assert_eq!(division.is_some(), owners > 0, "{width}: {teams} teams");
                let Some(division) = division else { continue };
                assert_eq!(division.owners, owners, "{width}: {teams} teams");
                assert!(division.owners * teams <= HOPPER.0);
                assert!(division.shared_bytes <= HOPPER.1);
                assert!(division.stages >= 2, "{width}: {division:?}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let shape = |width, inner, vocab| Shape { layers: 2, width, inner, vocab };
        for shape in [shape(5120, 13824, 32000), shape(128, 160, 4_000_000)] {
            assert!(Division::new(shape, 4, HOPPER.0, HOPPER.1).is_none());
        }
        assert!(Division::new(shape(2048, 5632, 32000), 4, HOPPER.0, 1 << 16).is_none());
    }

    #[test]
    fn every_channel_has_a_place_of_its_own() {
        let mut places: Vec<usize> = (0..96).map(place_of_word).collect();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..96));
    }
}
