//! The program of one token.

use mmfree::config::ModelConfig;

use super::{Matrix, Parameter, Tile};
use crate::arith;
use crate::config::{Configuration, Packing};
use crate::isa::{ADDRESS_UNIT, Instruction, Opcode, VECTOR_LIMIT};
use crate::machine::moved_units;

/// ε inside a BitLinear, as in the engine.
const INNER_EPSILON: f64 = 1e-6;
/// Elements that any word size and address unit divides.
pub(super) const ALIGNED_ELEMENTS: usize = ADDRESS_UNIT as usize / 4;
/// Scales of a layer's dense layers, and elements that hold them.
const LAYER_SCALES: usize = 6;
const SCALE_ELEMENTS: usize = 2 * LAYER_SCALES;

/// Address registers of the program.
mod address {
    pub const WEIGHTS: u8 = 0;
    pub const PARAMETERS: u8 = 1;
    pub const STATE: u8 = 2;
    pub const EMBEDDINGS: u8 = 3;
    pub const LOGITS: u8 = 4;
}

/// Where things are in data memory, in bytes, and how long the streams are.
#[derive(Default)]
pub(super) struct Bases {
    pub parameters: u64,
    pub state: u64,
    pub embeddings: u64,
    pub logits: u64,
    pub beats: u32,
}

/// Every dense layer, in the order in which a token meets them.
pub(super) fn matrices(model: &ModelConfig) -> Vec<Matrix> {
    let (d, f) = (model.hidden_size, model.intermediate_size);
    let mut matrices = Vec::new();
    let mut push = |name: String, rows, cols| matrices.push(Matrix { name, rows, cols });
    for layer in 0..model.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for part in ["attn.i_proj", "attn.f_proj", "attn.g_proj", "attn.o_proj"] {
            push(name(part), d, d);
        }
        push(name("mlp.gate_proj"), 2 * f, d);
        push(name("mlp.down_proj"), d, f);
    }
    push("lm_head".to_owned(), model.vocab_size, d);
    matrices
}

/// Where vectors are, in words.
pub(super) struct Vectors {
    x: u16,
    scales: u16,
    u: u16,
    t: u16,
    i: u16,
    f: u16,
    g: u16,
    w: u16,
    h: u16,
    /// Channel mixer: `silu(a) * b`, and where tiles of a and b or the norm of down_proj are.
    v: u16,
    tile_a: u16,
    tile_b: u16,
    /// Rows of a tile of a, and of one of the logits.
    tile: usize,
    logits: u16,
    logits_tile: usize,
    pub used: usize,
}

impl Vectors {
    /// Places vectors in vector memory.
    pub fn place(
        model: &ModelConfig,
        configuration: &Configuration,
        packing: Packing,
    ) -> Result<Self, String> {
        let (d, f) = (model.hidden_size, model.intermediate_size);
        let words = |elements: usize| configuration.words(elements);
        let lanes = configuration.row_lanes as usize;
        let limit = configuration.vector_words as usize;
        let (dw, fw) = (words(d), words(f));
        let scales = dw;
        let base = scales + words(SCALE_ELEMENTS);
        let at = |index: usize| (base + index * dw) as u16;
        let mixer_end = base + 7 * dw;
        let tiles = base + fw;
        // The smallest tile serves the largest memory: one of whole address units.
        let needed = mixer_end.max(tiles + fw.max(2 * words(ALIGNED_ELEMENTS)));
        if needed > limit {
            let bytes = 4 * lanes;
            return Err(format!(
                "its vectors need {needed} words of {bytes} bytes of vector memory, vector_words is {limit}; \
                 choose at least {}",
                needed.next_power_of_two()
            ));
        }
        // Tiles of whole groups of rows waste no weight bandwidth.
        let whole_groups = ALIGNED_ELEMENTS * packing.trits() * configuration.cores as usize;
        let tile_of = |elements: usize, rows: usize| {
            let elements = elements.min(VECTOR_LIMIT);
            if rows <= elements {
                rows
            } else if elements >= whole_groups {
                elements / whole_groups * whole_groups
            } else {
                elements / ALIGNED_ELEMENTS * ALIGNED_ELEMENTS
            }
        };
        let tile = tile_of((limit - tiles) / 2 * lanes, f);
        let logits_tile = tile_of((limit - base) * lanes, model.vocab_size);
        let used = needed.max(tiles + 2 * words(tile)).max(base + words(logits_tile));
        Ok(Self {
            x: 0,
            scales: scales as u16,
            u: at(0),
            t: at(1),
            i: at(2),
            f: at(3),
            g: at(4),
            w: at(5),
            h: at(6),
            v: base as u16,
            tile_a: tiles as u16,
            tile_b: (tiles + words(tile)) as u16,
            tile,
            logits: base as u16,
            logits_tile,
            used,
        })
    }
}

pub(super) struct Builder<'a> {
    configuration: &'a Configuration,
    packing: Packing,
    pub program: Vec<Instruction>,
    pub matrices: Vec<Matrix>,
    pub tiles: Vec<Tile>,
    pub parameters: Vec<Parameter>,
}

impl<'a> Builder<'a> {
    pub fn new(configuration: &'a Configuration, packing: Packing, matrices: Vec<Matrix>) -> Self {
        Self {
            configuration,
            packing,
            program: Vec::new(),
            matrices,
            tiles: Vec::new(),
            parameters: Vec::new(),
        }
    }

    fn emit(&mut self, opcode: Opcode, fill: impl FnOnce(&mut Instruction)) {
        let mut instruction = Instruction::new(opcode);
        fill(&mut instruction);
        self.program.push(instruction);
    }

    fn set_address(&mut self, register: u8, bytes: u64) {
        self.emit(Opcode::SetA, |i| {
            i.sd = register;
            i.imm = (bytes / ADDRESS_UNIT) as u32;
        });
    }

    fn load(&mut self, vd: u16, register: u8, n: usize, post: bool) {
        self.emit(Opcode::Load, |i| {
            (i.vd, i.sa, i.n, i.sd) = (vd, register, n as u16, post.into());
        });
    }

    fn parameter(&mut self, vd: u16, parameter: Parameter, n: usize) {
        self.load(vd, address::PARAMETERS, n, true);
        self.parameters.push(parameter);
    }

    fn vector(&mut self, opcode: Opcode, vd: u16, va: u16, vb: u16, n: usize) {
        self.emit(opcode, |i| (i.vd, i.va, i.vb, i.n) = (vd, va, vb, n as u16));
    }

    /// `vd = RMSNorm(va)` with a weight that is loaded into `w`.
    fn norm(&mut self, vd: u16, va: u16, w: u16, name: &str, n: usize, epsilon: f64) {
        let epsilon =
            (epsilon * f64::from(1u32 << arith::MEAN_FRACTION_BITS)).round().max(1.0) as u32;
        self.parameter(w, Parameter::Norm { name: format!("{name}.weight"), len: n }, n);
        self.emit(Opcode::RmsNorm, |i| {
            (i.vd, i.va, i.vb, i.n, i.imm) = (vd, va, w, n as u16, epsilon)
        });
    }

    /// The input of BitLinear: its norm and quantiser. `t` may be `va`.
    fn bit_input(&mut self, matrix: usize, scale: u8, va: u16, t: u16, w: u16) {
        let Matrix { name, cols, .. } = self.matrices[matrix].clone();
        self.norm(t, va, w, &format!("{name}.norm"), cols, INNER_EPSILON);
        self.emit(Opcode::Quant, |i| (i.sd, i.va, i.sa, i.n) = (0, t, scale, cols as u16));
    }

    fn matvec(&mut self, matrix: usize, vd: u16, first_row: usize, rows: usize) {
        let (cols, packing) = (self.matrices[matrix].cols, self.packing);
        self.emit(Opcode::MatVec, |i| {
            (i.vd, i.sa, i.vc, i.n, i.sd) = (vd, 0, cols as u16, rows as u16, packing.flag());
        });
        self.tiles.push(Tile { matrix, first_row, rows });
    }

    /// Runs `body` for tiles of `tile` rows, as a loop, and once more for what is left. The body gets the
    /// first row and the number of rows of each turn; instructions of all turns but the first and the
    /// last are dropped again.
    fn tiled(&mut self, rows: usize, tile: usize, mut body: impl FnMut(&mut Self, usize, usize)) {
        let whole = rows / tile;
        if whole > 1 {
            self.emit(Opcode::Loop, |i| i.imm = whole as u32);
        }
        for turn in 0..whole {
            let length = self.program.len();
            body(self, turn * tile, tile);
            if turn > 0 {
                self.program.truncate(length);
            }
        }
        if whole > 1 {
            self.emit(Opcode::End, |_| {});
        }
        if !rows.is_multiple_of(tile) {
            body(self, whole * tile, rows % tile);
        }
    }

    /// The whole program.
    pub fn token(&mut self, model: &ModelConfig, v: &Vectors, bases: &Bases) {
        let d = model.hidden_size;
        self.set_address(address::WEIGHTS, 0);
        self.emit(Opcode::Stream, |i| (i.sa, i.imm) = (address::WEIGHTS, bases.beats));
        self.set_address(address::PARAMETERS, bases.parameters);
        self.set_address(address::STATE, bases.state);
        self.set_address(address::EMBEDDINGS, bases.embeddings);
        self.set_address(address::LOGITS, bases.logits);
        let stride = moved_units(&Configuration { row_lanes: 32, ..self.configuration.clone() }, d);
        self.emit(Opcode::Embed, |i| {
            (i.vd, i.sa, i.n, i.imm) = (v.x, address::EMBEDDINGS, d as u16, stride);
        });
        self.emit(Opcode::ClearMax, |_| {});
        self.emit(Opcode::Loop, |i| i.imm = model.num_hidden_layers as u32);
        for layer in 0..model.num_hidden_layers {
            let length = self.program.len();
            self.layer(model, v, layer);
            if layer > 0 {
                self.program.truncate(length);
            }
        }
        self.emit(Opcode::End, |_| {});
        self.head(model, v);
        self.emit(Opcode::Halt, |_| {});
    }

    /// One block. Scale `s(1 + m)` is that of its matrix m.
    fn layer(&mut self, model: &ModelConfig, v: &Vectors, layer: usize) {
        let (d, f) = (model.hidden_size, model.intermediate_size);
        let epsilon = f64::from(model.rms_norm_eps);
        let first = layer * LAYER_SCALES;
        let [i_proj, f_proj, g_proj, o_proj, gate_proj, down_proj]: [usize; LAYER_SCALES] =
            std::array::from_fn(|m| first + m);
        let name = |part: &str| format!("model.layers.{layer}.{part}");

        self.scales(v, (first..first + LAYER_SCALES).collect());
        self.norm(v.u, v.x, v.w, &name("attn_norm"), d, epsilon);
        for (m, (matrix, target)) in
            [(i_proj, v.i), (f_proj, v.f), (g_proj, v.g)].into_iter().enumerate()
        {
            self.bit_input(matrix, m as u8 + 1, v.u, v.t, v.w);
            self.matvec(matrix, target, 0, d);
        }
        // The lower bounds take the place of u, which is used up.
        self.parameter(v.u, Parameter::LowerBound { layer }, d);
        self.load(v.h, address::STATE, d, false);
        self.emit(Opcode::Mlgru, |i| {
            (i.vd, i.va, i.vb, i.vc, i.n) = (v.h, v.i, v.f, v.u, d as u16);
        });
        self.emit(Opcode::Store, |i| (i.va, i.sa, i.n, i.sd) = (v.h, address::STATE, d as u16, 1));
        self.norm(v.t, v.g, v.w, &name("attn.g_norm"), d, epsilon);
        self.vector(Opcode::SwiGlu, v.t, v.h, v.t, d);
        self.bit_input(o_proj, 4, v.t, v.t, v.w);
        self.matvec(o_proj, v.i, 0, d);
        self.vector(Opcode::Add, v.x, v.x, v.i, d);

        self.norm(v.u, v.x, v.w, &name("mlp_norm"), d, epsilon);
        self.bit_input(gate_proj, 5, v.u, v.t, v.w);
        let tile_words = self.configuration.words(v.tile) as u32;
        self.emit(Opcode::SetO, |_| {});
        self.tiled(f, v.tile, |builder, row, rows| {
            builder.matvec(gate_proj, v.tile_a, row, rows);
            builder.matvec(gate_proj, v.tile_b, f + row, rows);
            builder.emit(Opcode::SwiGlu, |i| {
                (i.vd, i.va, i.vb, i.n) = (v.v, v.tile_a, v.tile_b, rows as u16);
                i.indexed = true;
            });
            builder.emit(Opcode::AddO, |i| i.imm = tile_words);
        });
        self.bit_input(down_proj, 6, v.v, v.v, v.tile_a);
        self.matvec(down_proj, v.v, 0, d);
        self.vector(Opcode::Add, v.x, v.x, v.v, d);
    }

    /// The last norm and the head.
    fn head(&mut self, model: &ModelConfig, v: &Vectors) {
        let d = model.hidden_size;
        let lm_head = self.matrices.len() - 1;
        self.scales(v, vec![lm_head]);
        self.norm(v.u, v.x, v.w, "model.norm", d, f64::from(model.rms_norm_eps));
        self.bit_input(lm_head, 1, v.u, v.t, v.w);
        self.tiled(model.vocab_size, v.logits_tile, |builder, row, rows| {
            builder.matvec(lm_head, v.logits, row, rows);
            builder.emit(Opcode::Store, |i| {
                (i.va, i.sa, i.n, i.sd) = (v.logits, address::LOGITS, rows as u16, 1);
            });
            builder.emit(Opcode::ArgMax, |i| (i.va, i.n) = (v.logits, rows as u16));
        });
    }

    /// Loads the scales of matrices into s1, s2, ...
    fn scales(&mut self, v: &Vectors, matrices: Vec<usize>) {
        let count = matrices.len();
        self.parameter(v.scales, Parameter::Scales { matrices }, 2 * count);
        for m in 0..count {
            self.emit(Opcode::SetS, |i| (i.sd, i.va, i.n) = (m as u8 + 1, v.scales, 2 * m as u16));
        }
    }
}
