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
const MIX: usize = 0;
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
    teams: usize,
    /// Sequences of a team: a multiple of eight.
    slots: usize,
    /// Whether two blocks of a cluster, of two teams, multiply for the sequences of both, and four of their warps
    /// together; each warp alone otherwise.
    is_in_clusters: bool,
}

impl Size {
    const fn alone(teams: usize, slots: usize) -> Self {
        Self { teams, slots, is_in_clusters: false }
    }

    const fn in_clusters(teams: usize) -> Self {
        Self { teams, slots: 16, is_in_clusters: true }
    }

    /// Blocks that multiply for each other's sequences.
    pub fn sharing(self) -> usize {
        if self.is_in_clusters { 2 } else { 1 }
    }

    /// Warps that multiply together.
    fn together(self) -> usize {
        if self.is_in_clusters { 4 } else { 1 }
    }
}

/// In the order of what they have room for: the fewest teams that have, for each reads all weights. Of those that have room
/// for as many the first that fits is used.
const SIZES: [Size; 9] = [
    Size::alone(1, 8),
    AT_ONCE_ONLY,
    Size::alone(2, 8),
    Size::alone(2, 16),
    Size::in_clusters(4),
    Size::in_clusters(6),
    Size::in_clusters(8),
    Size::in_clusters(12),
    Size::in_clusters(16),
];
/// In parts or rounds it is slower than two teams whose blocks have eight sequences.
const AT_ONCE_ONLY: Size = Size::alone(1, 16);
/// Tiles on their way to a warp that multiplies alone: as many as fit.
const STAGES_ALONE: [usize; 5] = [16, 8, 6, 5, 4];
/// To one of four that multiply together. With 6 steps of 1.3 billion parameters and 192 or 256 sequences are 3 and 4 %
/// slower than with 4.
const STAGES_TOGETHER: [usize; 2] = [8, 4];
/// Cycles of a column of tiles of warps that multiply together (measured at 1.3 billion parameters), and of what each turn
/// takes besides: rows are received, warps wait for each other (an estimate). Only their ratio matters.
const TILE_CYCLES: usize = 340;
const TURN_CYCLES: usize = 2500;

/// What a block has room for at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    /// Columns of tiles whose activations it has; more are received and multiplied in parts.
    columns: usize,
    /// Rounds in which i, f and g, the gated unit's and the head's rows are multiplied, for the room that sums take.
    mix_rounds: usize,
    glu_rounds: usize,
    head_rounds: usize,
}

impl Room {
    const ALL: Self = Self { columns: usize::MAX, mix_rounds: 1, glu_rounds: 1, head_rounds: 1 };

    /// Of as many turns those of fewer rounds first.
    fn choices() -> impl Iterator<Item = Self> {
        let rounds = [1, 3].into_iter().flat_map(|mix| [1, 2, 4].map(|glu| (mix, glu)));
        let rounds = rounds.flat_map(|(mix, glu)| [1, 2, 4, 8].map(|head| (mix, glu, head)));
        rounds.flat_map(|(mix_rounds, glu_rounds, head_rounds)| {
            let with = |columns| Self { columns, mix_rounds, glu_rounds, head_rounds };
            [usize::MAX, 43, 32, 27, 22, 16, 14, 10].map(with)
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Division {
    pub size: Size,
    /// Blocks of a team, each of which owns channels.
    pub owners: usize,
    room: Room,
    stages: usize,
    pub shared_bytes: usize,
}

/// Of a block's phases: columns of tiles, and rows of each layer and round, at most.
struct Tiles {
    /// Of each part.
    columns: [usize; PHASES],
    parts: [usize; PHASES],
    rows: [usize; PHASES],
    /// Of 16 channels of the gated unit, of all rounds.
    inner_groups: usize,
    size: Size,
    room: Room,
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
    fn new(shape: Shape, owners: usize, size: Size, room: Room) -> Self {
        let Shape { width, inner, vocab, .. } = shape;
        // The blocks of a cluster divide rows among them, or K.
        let is_by_rows = |phase| phase == GLU || phase == HEAD;
        let groups = |n: usize, owners: usize| n.div_ceil(TILE_ROWS).div_ceil(owners);
        let width_groups = groups(width, owners);
        let [inner_groups, head_groups] =
            [inner, vocab].map(|n| groups(n, owners * size.sharing()));
        let mut columns = inputs(shape).map(|n| n.div_ceil(TILE_COLS));
        let mut parts = [1; PHASES];
        for (phase, (columns, parts)) in columns.iter_mut().zip(&mut parts).enumerate() {
            *columns = if is_by_rows(phase) { *columns } else { columns.div_ceil(size.sharing()) };
            *parts = columns.div_ceil(room.columns);
            *columns = columns.div_ceil(*parts);
        }
        // In whole pairs of a lane.
        let glu_groups = if room.glu_rounds == 1 {
            inner_groups
        } else {
            4 * inner_groups.div_ceil(4 * room.glu_rounds)
        };
        let head_rows = head_groups.div_ceil(room.head_rounds);
        let rows = [width_groups, width_groups, 2 * glu_groups, width_groups, head_rows];
        Self { columns, parts, rows, size, room, inner_groups }
    }

    fn sets(&self, phase: usize) -> Sets {
        let together = self.size.together();
        let layers = self.layers_at_once(phase);
        let passes = if together > 1 { 1 } else { layers };
        let groups = WARPS / together;
        let sets = self.rows[phase].div_ceil(together) * (layers / passes);
        let shared = sets % groups;
        let most = self.columns[phase].max(together);
        let fits = |&parts: &usize| parts * shared <= groups && parts <= most;
        let powers = (0..).map(|bits| 1 << bits).take_while(|&parts| parts <= groups);
        // In a cluster sums have little room, and of layers that are multiplied together there are enough sets.
        let is_whole = shared == 0 || passes < layers;
        let parts = if is_whole { 1 } else { powers.filter(fits).last().unwrap_or(1) };
        Sets { whole: sets - shared, shared, parts, groups, passes }
    }

    fn region_bytes(&self, phase: usize) -> usize {
        let Sets { whole, shared, parts, passes, .. } = self.sets(phase);
        let sequences = self.size.sharing() * self.size.slots;
        let matrix_bytes = MATRIX_BYTES + if self.size.is_in_clusters { PAD_BYTES } else { 0 };
        let columns = self.layers_at_once(phase) * self.columns[phase];
        let rows = passes * self.size.together() * (whole + shared * parts);
        columns * sequences * matrix_bytes + rows * 4 * (sequences * TILE_ROWS + 16)
    }

    /// Layers of a round.
    fn layers_at_once(&self, phase: usize) -> usize {
        if phase == MIX { LAYERS[MIX] / self.room.mix_rounds } else { LAYERS[phase] }
    }

    fn rounds(&self, phase: usize) -> usize {
        match phase {
            MIX => self.room.mix_rounds,
            GLU => self.room.glu_rounds,
            HEAD => self.room.head_rounds,
            _ => 1,
        }
    }

    /// That a warp multiplies, at most.
    fn of_warp(&self, phase: usize) -> usize {
        let Sets { whole, shared, parts, groups, passes } = self.sets(phase);
        let columns = self.columns[phase];
        self.rounds(phase)
            * self.parts[phase]
            * passes
            * (whole / groups * columns
                + (shared * parts).div_ceil(groups) * columns.div_ceil(parts))
    }

    /// Cycles of a step of so many layers, as far as they depend on what there is room for.
    fn cycles(&self, layers: usize) -> usize {
        let of_phase = |phase| {
            let turns = self.rounds(phase) * self.parts[phase];
            self.of_warp(phase) * TILE_CYCLES + turns * TURN_CYCLES
        };
        layers * (0..HEAD).map(of_phase).sum::<usize>() + of_phase(HEAD)
    }

    /// That a block multiplies of a layer, at most.
    fn of_layer(&self) -> usize {
        let rows = |phase| self.layers_at_once(phase) * self.rounds(phase) * self.rows[phase];
        (0..HEAD).map(|phase| rows(phase) * self.parts[phase] * self.columns[phase]).sum()
    }

    /// What lies at the beginning of a block's shared memory. `None` if its threads cannot bring all vectors.
    fn first_bytes(&self, stages: usize) -> Option<usize> {
        let own = TILE_ROWS * self.rows[0];
        // Each thread brings four floats of the vectors.
        let vectors = (4 * own).max(TILE_ROWS * self.inner_groups);
        let inboxes = if self.size.is_in_clusters {
            WARPS * self.layers_at_once(MIX) * own.div_ceil(64)
        } else {
            1
        };
        let list = |tiles: usize| tiles.max(stages) + stages + 1;
        let lists =
            list((0..HEAD).map(|phase| self.of_warp(phase)).sum()) + list(self.of_warp(HEAD));
        let bytes = 2 * 4 * vectors
            + 8 * (1 + 2 * WARPS)
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

    /// What costs the fewest cycles of all that fits. `None` if nothing does.
    fn new(shape: Shape, size: Size, multiprocessors: usize, shared_bytes: usize) -> Option<Self> {
        // The fewest owners whose busiest one has as few tiles of a layer as with all of them.
        let tiles = |owners: usize, room| Tiles::new(shape, owners, size, room);
        let busiest = |owners: usize| tiles(owners, Room::ALL).of_layer();
        let most = (multiprocessors / size.teams).min(shape.width.div_ceil(TILE_ROWS));
        let owners = (1..=most).min_by_key(|&owners| (busiest(owners), owners))?;
        let with = |room: Room| {
            let tiles = tiles(owners, room);
            let region = (0..PHASES).map(|phase| tiles.region_bytes(phase)).max()?;
            let stages: &[usize] =
                if size.is_in_clusters { &STAGES_TOGETHER } else { &STAGES_ALONE };
            stages.iter().find_map(|&stages| {
                let bytes = tiles.first_bytes(stages)? + region + stages * WARPS * TILE_BYTES;
                let division = Self { size, owners, room, stages, shared_bytes: bytes };
                (bytes <= shared_bytes).then_some((tiles.cycles(shape.layers), division))
            })
        };
        let is_allowed = |room: &Room| size != AT_ONCE_ONLY || *room == Room::ALL;
        let fitting = Room::choices().filter(is_allowed).filter_map(with);
        fitting.min_by_key(|&(cycles, _)| cycles).map(|(_, division)| division)
    }

    /// Sequences that there is room for.
    pub fn sequences(&self) -> usize {
        self.size.slots * self.size.teams
    }

    pub fn blocks(&self) -> usize {
        self.size.teams * self.owners
    }

    pub fn constants(&self, shape: Shape) -> [Constant; 14] {
        [
            ("WIDTH", shape.width),
            ("INNER", shape.inner),
            ("VOCAB", shape.vocab),
            ("NUM_TEAMS", self.size.teams),
            ("NUM_OPERANDS", self.size.slots / 8),
            ("NUM_TOGETHER", self.size.together()),
            ("NUM_SHARING", self.size.sharing()),
            ("NUM_OWNERS", self.owners),
            ("NUM_MIX_ROUNDS", self.room.mix_rounds),
            ("NUM_GLU_ROUNDS", self.room.glu_rounds),
            ("NUM_HEAD_ROUNDS", self.room.head_rounds),
            ("NUM_COLUMNS", self.room.columns.min(shape.inner)),
            ("NUM_STAGES", self.stages),
            // The source compares it with its own.
            ("NUM_SHARED_BYTES", self.shared_bytes),
        ]
    }

    /// Blocks that make a row's channels.
    fn makers(&self) -> usize {
        self.owners * self.size.sharing()
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
        if self.size.is_in_clusters {
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
        // Of each size owners, parts of i f g, o, gated unit, down and head, rounds of i f g, gated unit and head.
        type Expected = (usize, usize, [usize; PHASES], [usize; 3]);
        const ONE: [usize; PHASES] = [1; PHASES];
        const SMALL: [Expected; 8] = [
            (8, 64, ONE, [1, 1, 1]),
            (16, 64, ONE, [1, 1, 1]),
            (32, 64, ONE, [1, 1, 1]),
            (64, 32, ONE, [1, 1, 1]),
            (96, 22, ONE, [1, 1, 1]),
            (128, 16, ONE, [1, 1, 1]),
            (192, 11, ONE, [1, 1, 2]),
            (256, 8, ONE, [1, 1, 4]),
        ];
        const MIDDLE: [Expected; 8] = [
            (8, 128, ONE, [1, 1, 1]),
            (16, 128, ONE, [1, 1, 1]),
            (32, 64, ONE, [1, 1, 1]),
            (64, 32, ONE, [1, 1, 1]),
            (96, 22, ONE, [1, 1, 2]),
            (128, 16, ONE, [1, 1, 2]),
            (192, 11, ONE, [3, 1, 4]),
            (256, 8, ONE, [3, 2, 4]),
        ];
        const LARGE: [Expected; 6] = [
            (8, 124, ONE, [1, 1, 1]),
            (16, 64, ONE, [1, 1, 1]),
            (32, 64, [1, 1, 1, 3, 1], [3, 1, 1]),
            (64, 32, [1, 1, 2, 2, 2], [3, 1, 1]),
            (96, 22, [2, 2, 4, 6, 4], [3, 1, 1]),
            (128, 16, [2, 2, 3, 4, 3], [3, 2, 2]),
        ];
        let published = [(1024, 2816, &SMALL[..]), (2048, 5632, &MIDDLE), (5120, 13824, &LARGE)];
        for (width, inner, expected) in published {
            let shape = Shape { layers: 24, width, inner, vocab: 32000 };
            let all = Division::all(shape, HOPPER.0, HOPPER.1);
            let found = all.iter().map(|one| {
                let Room { mix_rounds, glu_rounds, head_rounds, .. } = one.room;
                let parts = Tiles::new(shape, one.owners, one.size, one.room).parts;
                (one.sequences(), one.owners, parts, [mix_rounds, glu_rounds, head_rounds])
            });
            assert_eq!(found.collect::<Vec<_>>(), expected, "{width}");
        }
    }

    #[test]
    fn there_is_room_for_many_sequences() {
        for (width, inner, most) in [
            (256, 336, 256),
            (2560, 6912, 256),
            (3200, 8640, 256),
            (4096, 11008, 192),
            (5120, 13824, 128),
            (8192, 22016, 64),
        ] {
            let shape = Shape { layers: 32, width, inner, vocab: 32000 };
            let all = Division::all(shape, HOPPER.0, HOPPER.1);
            assert!(all.iter().map(Division::sequences).is_sorted());
            assert_eq!(all.last().map(Division::sequences), Some(most), "{width}");
            for division in all {
                assert!(division.blocks() <= HOPPER.0, "{width}: {division:?}");
                assert!(division.shared_bytes <= HOPPER.1, "{width}: {division:?}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let shape = |width, inner, vocab| Shape { layers: 2, width, inner, vocab };
        let all = |shape, bytes| Division::all(shape, HOPPER.0, bytes);
        assert_eq!(all(shape(128, 160, 4_000_000), HOPPER.1), []);
        assert_eq!(all(shape(65536, 43008, 32000), HOPPER.1), []);
        assert_eq!(all(shape(2048, 5632, 32000), 1 << 15), []);
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
