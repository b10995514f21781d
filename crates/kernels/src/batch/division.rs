//! How a step's work is divided among blocks, and a block's shared memory, as the source does it.

use super::PHASES;
use crate::cuda::Constant;
use crate::decode::Shape;
use crate::ternary_gemm::cuda::{TILE_COLS, TILE_ROWS};

// As in the source.
const TILE_BYTES: usize = 512;
const MATRIX_BYTES: usize = 128 + 16;
const SUM_WORDS: usize = SLOTS * TILE_ROWS + 16;
/// Layers that share a phase, each with activations of its own.
const LAYERS: [usize; PHASES] = [3, 1, 1, 1, 1];
const GLU: usize = 2;
/// A word of quantised channels that has not been sent: integers are never -128.
const NOTHING: u32 = 0x8080_8080;

/// Sequences that a block has room for, and warps.
pub(super) const SLOTS: usize = 16;

/// How many sequences take part in a step, and how they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Groups of sequences, each with blocks of its own.
    pub teams: usize,
    /// Operands of a block's products, of eight sequences each.
    pub operands: usize,
    /// Warps that multiply together: four if blocks have several rows of tiles.
    pub together: usize,
}

const fn size(teams: usize, operands: usize, together: usize) -> Size {
    Size { teams, operands, together }
}

/// In the order of what they have room for: the fewest teams that have, for each reads all weights.
pub(super) const SIZES: [Size; 5] =
    [size(1, 1, 1), size(1, 2, 1), size(2, 2, 1), size(4, 2, 4), size(8, 2, 4)];
/// Tiles on their way to a warp: as many as fit.
const STAGES: [usize; 4] = [16, 8, 4, 2];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Division {
    pub size: Size,
    /// Blocks of a team, each of which owns channels.
    pub owners: usize,
    stages: usize,
    pub shared_bytes: usize,
}

/// Of a block's phases: columns of tiles, and rows of each layer at most.
struct Tiles {
    columns: [usize; PHASES],
    rows: [usize; PHASES],
    /// Warps that multiply together.
    together: usize,
}

impl Tiles {
    fn new(shape: Shape, owners: usize, together: usize) -> Self {
        let Shape { width, inner, vocab, .. } = shape;
        let groups = |n: usize| n.div_ceil(TILE_ROWS).div_ceil(owners);
        let [width_groups, inner_groups] = [width, inner].map(groups);
        Self {
            columns: inputs(shape).map(|n| n.div_ceil(TILE_COLS)),
            rows: [width_groups, width_groups, 2 * inner_groups, width_groups, groups(vocab)],
            together,
        }
    }

    /// Of a layer's sets of rows that are multiplied together: those that a group of warps has each, those whose K the groups
    /// share, and in how many parts.
    fn sets(&self, phase: usize) -> (usize, usize, usize) {
        let groups = SLOTS / self.together;
        let sets = self.rows[phase].div_ceil(self.together);
        let shared = sets % groups;
        let most = self.columns[phase].max(self.together);
        let fits = |&parts: &usize| parts * shared <= groups && parts <= most;
        let powers = (0..).map(|bits| 1 << bits).take_while(|&parts| parts <= groups);
        let parts = match shared {
            0 => 1,
            _ if self.together > 1 && shared == groups - 1 => groups,
            _ => powers.filter(fits).last().unwrap_or(1),
        };
        (sets - shared, shared, parts)
    }

    /// What a group of warps multiplies of each layer, one after the other.
    fn layer_runs(&self, phase: usize) -> usize {
        let (whole, shared, parts) = self.sets(phase);
        (whole + shared * parts).div_ceil(SLOTS / self.together)
    }

    fn region_bytes(&self, phase: usize) -> usize {
        let (whole, shared, parts) = self.sets(phase);
        let inputs = self.columns[phase] * SLOTS * MATRIX_BYTES;
        let sums = self.together * (whole + shared * parts);
        LAYERS[phase] * (inputs + 4 * SUM_WORDS * sums)
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
    /// `None` if a model's rows do not fit.
    pub fn new(
        shape: Shape,
        size: Size,
        multiprocessors: usize,
        shared_bytes: usize,
    ) -> Option<Self> {
        // The fewest owners whose busiest one has as few tiles of a layer as with all of them.
        let tiles = |owners: usize| Tiles::new(shape, owners, size.together);
        let busiest = |owners: usize| tiles(owners).of_layer();
        let most = (multiprocessors / size.teams).min(shape.width.div_ceil(TILE_ROWS));
        let owners = (1..=most).min_by_key(|&owners| (busiest(owners), owners))?;
        let tiles = tiles(owners);
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
        is_small.then(|| Self { size, owners, stages, shared_bytes: bytes(stages) })
    }

    /// Sequences that it takes.
    pub fn most_sequences(&self) -> usize {
        8 * self.size.operands * self.size.teams
    }

    /// Sequences that blocks have room for.
    pub fn slots(&self) -> usize {
        SLOTS * self.size.teams
    }

    pub fn blocks(&self) -> usize {
        self.size.teams * self.owners
    }

    pub fn constants(&self, shape: Shape) -> [Constant; 9] {
        [
            ("WIDTH", shape.width),
            ("INNER", shape.inner),
            ("VOCAB", shape.vocab),
            ("NUM_TEAMS", self.size.teams),
            ("NUM_OPERANDS", self.size.operands),
            ("NUM_TOGETHER", self.size.together),
            ("NUM_OWNERS", self.owners),
            ("NUM_STAGES", self.stages),
            // The source compares it with its own.
            ("NUM_SHARED_BYTES", self.shared_bytes),
        ]
    }

    /// Floats of the messages: of each phase four from each owner to each sequence.
    pub fn messages(&self) -> usize {
        4 * PHASES * self.slots() * self.owners
    }

    /// What the quantised rows are before any has been sent, in words of four channels: of each phase [layer][sequence][K].
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
        rows.flat_map(|(inputs, layers)| row(inputs).repeat(layers * self.slots())).collect()
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
        for (width, inner, owners) in [
            (1024, 2816, [64, 64, 64, 32, 16]),
            (2048, 5632, [128, 128, 64, 32, 16]),
            (2560, 6912, [108, 108, 62, 32, 0]),
        ] {
            let shape = Shape { layers: 2, width, inner, vocab: 32000 };
            for (size, owners) in SIZES.into_iter().zip(owners) {
                let division = Division::new(shape, size, HOPPER.0, HOPPER.1);
                assert_eq!(division.is_some(), owners > 0, "{width}: {size:?}");
                let Some(division) = division else { continue };
                assert_eq!(division.owners, owners, "{width}: {size:?}");
                assert!(division.blocks() <= HOPPER.0);
                assert!(division.shared_bytes <= HOPPER.1);
                assert!(division.stages >= 4, "{width}: {division:?}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let shape = |width, inner, vocab| Shape { layers: 2, width, inner, vocab };
        for shape in [shape(5120, 13824, 32000), shape(128, 160, 4_000_000)] {
            assert!(Division::new(shape, SIZES[3], HOPPER.0, HOPPER.1).is_none());
        }
        assert!(Division::new(shape(2048, 5632, 32000), SIZES[3], HOPPER.0, 1 << 16).is_none());
    }

    #[test]
    fn every_channel_has_a_place_of_its_own() {
        let shape = Shape { layers: 1, width: 256, inner: 336, vocab: 100 };
        for size in SIZES {
            let division = Division::new(shape, size, HOPPER.0, HOPPER.1).expect("fits");
            let mut places: Vec<usize> = (0..96).map(|word| division.place_of_word(word)).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..96));
        }
    }
}
