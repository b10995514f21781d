//! What lies between two products, on a GPU: one pass over a row instead of one for each operation.
//!
//! | function | computes |
//! |---|---|
//! | [`FusedRows::embed`] | `x = embeddings[token]` |
//! | [`FusedRows::residual`] | x += y; Q8(RMSNorm(RMSNorm(x; norm, ε); w, 1e-6)) for one or three w |
//! | [`FusedRows::gate`] | Q8(RMSNorm(RMSNorm(g; norm, ε) ⊙ silu(h); w, 1e-6)) |
//! | [`FusedRows::step`] | the same behind one step of the recurrence of each row |
//! | [`FusedRows::glu`] | Q8(RMSNorm(silu(a) ⊙ b; w, 1e-6)) |
//! | [`FusedRows::logits`] | y |
//!
//! where y, g, a and b are sums of the last product times γ / s. The same bits as the CPU's kernels.

use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};
use crate::mlgru::cuda::{Layer, Sequences};
use crate::ternary_gemm::cuda::{Quantized, SPLIT_MAX_TOKENS, Sums};

pub(crate) const SOURCE: Source = Source {
    name: "fused_rows",
    text: concat!(include_str!("row.cuh"), include_str!("rows.cu"), include_str!("many_rows.cu")),
    hopper_only: false,
    contracts: false,
};

/// Values of a row that a thread holds, in fours, as in the source.
const FOURS_OF_A_THREAD: [usize; 3] = [2, 4, 8];
/// Rows of a block where there are many, as in the source.
const MANY_ROWS: [usize; 2] = [1, 2];
/// Shared memory of those rows, if there is more than one.
const MANY_BYTES: usize = 64 << 10;
/// Threads of a block of many rows, and of rows of at least [`WIDE_ROW`] values. With numbers in between too few blocks are there at once.
const MANY_THREADS: [usize; 2] = [128, 256];
const WIDE_ROW: usize = 4096;
/// Threads of a row, at most.
const ROW_THREADS: usize = 512;
/// The same of the widest gated units.
const WIDE_GLU_THREADS: usize = 1024;
/// Of the other kernels.
const THREADS: usize = 256;
const BEST_THREADS: usize = 1024;
/// Shared memory that a kernel needs beside its row.
const OTHER_SHARED_BYTES: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct QuantizedArgs {
    values: u64,
    scales: u64,
    sums: u64,
    rows: u32,
    stride: u32,
    tile_tokens: u32,
}

impl QuantizedArgs {
    pub(crate) fn of(q: &Quantized) -> Self {
        Self {
            values: q.values.address(0),
            scales: q.scales.address(0),
            sums: q.sums.address(0),
            rows: q.capacity as u32,
            stride: q.stride() as u32,
            tile_tokens: q.tile_tokens() as u32,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumsArgs {
    values: u64,
    scales: u64,
    gamma: f32,
    stride: u32,
    clear: u32,
}

/// Sums of a product and what turns them into floats: `y = sum · γ / s`.
#[derive(Debug)]
pub struct Output<'a> {
    /// Read, and cleared if the next product adds to them.
    pub sums: &'a mut Sums,
    /// Scales s of the product's input.
    pub input: &'a Quantized,
    /// Layer of the input.
    pub layer: usize,
    /// γ.
    pub gamma: f32,
}

impl Output<'_> {
    fn args(&self) -> SumsArgs {
        SumsArgs {
            values: self.sums.values.address(0),
            scales: self.input.scales.address(self.layer * self.input.capacity),
            gamma: self.gamma,
            stride: self.sums.stride as u32,
            clear: self.sums.adds.into(),
        }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        !self.sums.are_gated && self.has_room(rows, columns)
    }

    fn has_room(&self, rows: usize, columns: usize) -> bool {
        rows <= self.input.rows
            && self.layer < self.input.layers
            && columns <= self.sums.stride
            && self.input.rows * self.sums.stride <= self.sums.values.len()
    }
}

#[repr(C)]
struct ResidualArgs {
    x: u64,
    rows: u64,
    sums: SumsArgs,
    norm: u64,
    weights: [u64; 3],
    eps: f32,
    width: u32,
    q: QuantizedArgs,
    count: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GateArgs {
    g: SumsArgs,
    h: u64,
    norm: u64,
    weight: u64,
    eps: f32,
    width: u32,
    column: u32,
    q: QuantizedArgs,
    count: u32,
}

#[repr(C)]
struct StepArgs {
    gate: GateArgs,
    beta: u64,
    states: u64,
    state_offset: u64,
    i: SumsArgs,
    f: SumsArgs,
    f_column: u32,
}

#[repr(C)]
struct GluArgs {
    ab: SumsArgs,
    weight: u64,
    width: u32,
    q: QuantizedArgs,
    count: u32,
}

#[repr(C)]
struct LogitArgs {
    sums: SumsArgs,
    logits: u64,
    width: u32,
}

#[repr(C)]
struct BestArgs {
    logits: u64,
    tokens: u64,
    not_finite: u64,
    passes: u64,
    history: u64,
    capacity: u32,
    width: u32,
}

#[repr(C)]
struct EmbedArgs {
    table: u64,
    tokens: u64,
    x: u64,
    width: u32,
    kind: u32,
    passes: u64,
}

/// How embeddings are stored; all are widened to f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl EmbeddingType {
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// Offsets of weight vectors among a model's vectors.
#[derive(Clone, Copy, Debug)]
pub struct Norms<'a> {
    /// All vectors of the model.
    pub vectors: &'a Buffer<f32>,
    /// The norm before the BitLinear layers.
    pub norm: usize,
    /// The norms inside one or three BitLinear layers that share the input.
    pub inner: &'a [usize],
    /// ε of the first norm.
    pub eps: f32,
}

/// The kernels that take a row as a whole, for one number of values a thread.
#[derive(Debug)]
struct RowKernels {
    fours: usize,
    residual_1: Kernel,
    residual_3: Kernel,
    gate: Kernel,
    step: Kernel,
    glu: Kernel,
}

impl RowKernels {
    fn new(device: &Arc<Device>, fours: usize, row_bytes: usize) -> Result<Self, CudaError> {
        let kernel = |name: &str| device.kernel(SOURCE, &format!("{name}_{fours}"), row_bytes);
        Ok(Self {
            fours,
            residual_1: kernel("residual_1")?,
            residual_3: kernel("residual_3")?,
            gate: kernel("gate")?,
            step: kernel("step")?,
            glu: kernel("glu")?,
        })
    }
}

/// The kernels that take rows as a whole, for many rows; `rows` of them a block.
#[derive(Debug)]
struct ManyRowKernels {
    rows: usize,
    residual_1: Kernel,
    residual_3: Kernel,
    gate: Kernel,
    /// Of a gated unit whose product has left silu(a) ⊙ b.
    gated: Kernel,
}

impl ManyRowKernels {
    fn new(device: &Arc<Device>, rows: usize, row_bytes: usize) -> Result<Self, CudaError> {
        let bytes = if rows == 1 { row_bytes } else { MANY_BYTES };
        let kernel = |name: &str| device.kernel(SOURCE, &format!("{name}_many_{rows}"), bytes);
        Ok(Self {
            rows,
            residual_1: kernel("residual_1")?,
            residual_3: kernel("residual_3")?,
            gate: kernel("gate")?,
            gated: kernel("gated")?,
        })
    }
}

/// The kernels.
#[derive(Debug)]
pub struct FusedRows {
    /// For rows of different widths, few of them.
    rows: [RowKernels; FOURS_OF_A_THREAD.len()],
    /// The same for many rows.
    many: [ManyRowKernels; MANY_ROWS.len()],
    logits: Kernel,
    best: Kernel,
    embed: Kernel,
}

impl FusedRows {
    /// Compiles and loads for rows of up to `widest` values.
    ///
    /// # Errors
    /// Rows that do not fit into shared memory; no compiler, or its or the driver's complaints.
    pub fn new(device: &Arc<Device>, widest: usize) -> Result<Self, CudaError> {
        let (bytes, most) =
            (widest.saturating_mul(4), device.shared_bytes().saturating_sub(OTHER_SHARED_BYTES));
        if bytes > most {
            return Err(CudaError::Shape(format!(
                "rows of {widest} values take {bytes} bytes of shared memory; {} has {most}",
                device.name()
            )));
        }
        let rows = |fours| RowKernels::new(device, fours, bytes);
        let many = |rows| ManyRowKernels::new(device, rows, bytes);
        let [narrow, wide, widest] = FOURS_OF_A_THREAD;
        let [one, two] = MANY_ROWS;
        Ok(Self {
            rows: [rows(narrow)?, rows(wide)?, rows(widest)?],
            many: [many(one)?, many(two)?],
            logits: device.kernel(SOURCE, "logit_rows", 0)?,
            best: device.kernel(SOURCE, "best_rows", 0)?,
            embed: device.kernel(SOURCE, "embed_rows", 0)?,
        })
    }

    /// The kernels for many rows of a width, and how they are launched; none if they are few.
    fn for_many_rows(&self, count: usize, width: usize) -> Option<(&ManyRowKernels, Launch)> {
        (count > SPLIT_MAX_TOKENS).then(|| self.many_rows(count, width))
    }

    fn many_rows(&self, count: usize, width: usize) -> (&ManyRowKernels, Launch) {
        let fits = |kernels: &&ManyRowKernels| kernels.rows * 4 * width <= MANY_BYTES;
        let kernels = self.many.iter().rev().find(fits).unwrap_or(&self.many[0]);
        let threads = MANY_THREADS[usize::from(width >= WIDE_ROW)];
        let blocks = count.div_ceil(kernels.rows);
        (kernels, Launch::new([blocks, 1, 1], threads, 4 * width * kernels.rows))
    }

    /// The kernels for rows of a width, and how they are launched for some rows of at most so many threads.
    fn for_rows(
        &self,
        count: usize,
        width: usize,
        most_threads: usize,
    ) -> Result<(&RowKernels, Launch), CudaError> {
        let fours = width / 4;
        let fits = |kernels: &&RowKernels| fours <= kernels.fours * ROW_THREADS;
        let kernels = self.rows.iter().find(fits).unwrap_or(&self.rows[self.rows.len() - 1]);
        let threads = fours.div_ceil(kernels.fours).next_multiple_of(32);
        if threads > most_threads {
            let most = 4 * kernels.fours * most_threads;
            return Err(CudaError::Shape(format!("rows of {width} values; {most} are possible")));
        }
        Ok((kernels, Launch::new([count, 1, 1], threads, 4 * width).overlapping()))
    }

    /// Embeddings of the first `count` tokens to `x` [M, D]. `passes`, if given, counts one more.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's. Tokens must have been checked: `vocab` is what the
    /// table has.
    pub fn embed(
        &self,
        table: (&Buffer<u8>, EmbeddingType),
        tokens: (&Buffer<u32>, usize),
        passes: Option<&mut Buffer<u32>>,
        width: usize,
        x: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let ((table, kind), (tokens, count)) = (table, tokens);
        if count == 0 || count > tokens.len() || count * width > x.len() {
            return Err(CudaError::Shape(format!("embeddings of {count} tokens")));
        }
        let args = EmbedArgs {
            table: table.address(0),
            tokens: tokens.address(0),
            x: x.address(0),
            width: width as u32,
            kind: kind.code(),
            passes: passes.map_or(0, |passes| passes.address(0)),
        };
        // SAFETY: reads `count` tokens, writes `count` rows of x, and the counter.
        unsafe { self.embed.launch(Launch::new([count, 1, 1], THREADS, 0).overlapping(), &args) }
    }

    /// Adds a product's output to rows of `x`, and quantises them for the next products into `q`, which has
    /// the shape of the result. `rows` picks rows of `x`; without it they are all.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn residual(
        &self,
        x: &mut Buffer<f32>,
        rows: Option<&Buffer<u32>>,
        output: Option<Output<'_>>,
        norms: Norms<'_>,
        q: &mut Quantized,
    ) -> Result<(), CudaError> {
        let (count, width) = (q.rows, q.cols);
        check_norms(&norms, width, q)?;
        let fits = count > 0
            && count * width <= x.len()
            && rows.is_none_or(|rows| count <= rows.len())
            && output.as_ref().is_none_or(|output| output.holds(count, width));
        if !fits {
            return Err(CudaError::Shape(format!("a residual of {count} rows of {width}")));
        }
        let weight = |j: usize| norms.inner.get(j).map_or(0, |&at| norms.vectors.address(at));
        let none = SumsArgs { values: 0, scales: 0, gamma: 0.0, stride: 0, clear: 0 };
        let args = ResidualArgs {
            x: x.address(0),
            rows: rows.map_or(0, |rows| rows.address(0)),
            sums: output.as_ref().map_or(none, Output::args),
            norm: norms.vectors.address(norms.norm),
            weights: [weight(0), weight(1), weight(2)],
            eps: norms.eps,
            width: width as u32,
            q: QuantizedArgs::of(q),
            count: count as u32,
        };
        let is_three = norms.inner.len() == 3;
        let (kernel, launch) = match self.for_many_rows(count, width) {
            Some((kernels, launch)) if is_three => (&kernels.residual_3, launch),
            Some((kernels, launch)) => (&kernels.residual_1, launch),
            None => {
                let (kernels, launch) = self.for_rows(count, width, ROW_THREADS)?;
                (if is_three { &kernels.residual_3 } else { &kernels.residual_1 }, launch)
            }
        };
        // SAFETY: rows of x, sums and q were checked; `rows` holds numbers of rows of x.
        unsafe { kernel.launch(launch, &args) }
    }

    /// Quantises the gated state for the o projection. g lies at `column` of the sums.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn gate(
        &self,
        g: &Output<'_>,
        column: usize,
        h: &Buffer<f32>,
        norms: Norms<'_>,
        q: &mut Quantized,
    ) -> Result<(), CudaError> {
        let (count, width) = (q.rows, q.cols);
        check_norms(&norms, width, q)?;
        if count == 0 || !g.holds(count, column + width) || count * width > h.len() {
            return Err(CudaError::Shape(format!("a gate of {count} rows of {width}")));
        }
        let args = gate_args(g, column, h.address(0), &norms, q);
        let (kernel, launch) = match self.for_many_rows(count, width) {
            Some((kernels, launch)) => (&kernels.gate, launch),
            None => {
                let (kernels, launch) = self.for_rows(count, width, ROW_THREADS)?;
                (&kernels.gate, launch)
            }
        };
        // SAFETY: rows of sums, h and q were checked.
        unsafe { kernel.launch(launch, &args) }
    }

    /// One step of the recurrence for sequences of one token each, and [`gate`](Self::gate) of the new states: i, f and g
    /// lie in the sums one behind the other, as `layer` and `column` (of g) say.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn step(
        &self,
        g: &Output<'_>,
        column: usize,
        layer: Layer<'_>,
        sequences: &Sequences,
        norms: Norms<'_>,
        q: &mut Quantized,
    ) -> Result<(), CudaError> {
        let (count, width) = (q.rows, q.cols);
        check_norms(&norms, width, q)?;
        let fits = count > 0
            && g.holds(count, column + width)
            && g.input.layers == 3
            && layer.width == width
            && layer.beta.is_multiple_of(4)
            && layer.beta + width <= layer.vectors.len()
            && layer.f_offset.is_multiple_of(4)
            && layer.f_offset + width <= g.sums.stride
            && layer.state_offset + width <= sequences.state_len
            && sequences.are_single_tokens()
            && sequences.rows == count;
        if !fits {
            return Err(CudaError::Shape(format!("a step of {count} rows of {width}")));
        }
        let scales = |layer: usize| g.input.scales.address(layer * g.input.capacity);
        let args = StepArgs {
            gate: gate_args(g, column, 0, &norms, q),
            beta: layer.vectors.address(layer.beta),
            states: sequences.states.address(0),
            state_offset: layer.state_offset as u64,
            i: SumsArgs { scales: scales(0), gamma: layer.gamma_i, ..g.args() },
            f: SumsArgs { scales: scales(1), gamma: layer.gamma_f, ..g.args() },
            f_column: layer.f_offset as u32,
        };
        let (kernels, launch) = self.for_rows(count, width, ROW_THREADS)?;
        // SAFETY: rows of sums and q were checked; the states belong to the sequences and hold the layer.
        unsafe { kernels.step.launch(launch, &args) }
    }

    /// Quantises the gated linear unit's output for the down projection. The norm's weight is at `weight`. `ab` are the sums of a and
    /// b, or silu(a) ⊙ b, as [`Gemm::multiply_gated_unit`](crate::ternary_gemm::cuda::Gemm::multiply_gated_unit) left them.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn glu(
        &self,
        ab: &Output<'_>,
        vectors: &Buffer<f32>,
        weight: usize,
        q: &mut Quantized,
    ) -> Result<(), CudaError> {
        let (count, width) = (q.rows, q.cols);
        let columns = if ab.sums.are_gated { width } else { 2 * width };
        if count == 0 || !ab.has_room(count, columns) || weight + width > vectors.len() {
            return Err(CudaError::Shape(format!("a gated unit of {count} rows of {width}")));
        }
        check_multiple(width)?;
        let args = GluArgs {
            ab: ab.args(),
            weight: vectors.address(weight),
            width: width as u32,
            q: QuantizedArgs::of(q),
            count: count as u32,
        };
        let (kernel, launch) = if ab.sums.are_gated {
            let (kernels, launch) = self.many_rows(count, width);
            (&kernels.gated, launch)
        } else {
            let (kernels, launch) = self.for_rows(count, width, WIDE_GLU_THREADS)?;
            (&kernels.glu, launch)
        };
        // SAFETY: rows of sums and q were checked.
        unsafe { kernel.launch(launch, &args) }
    }

    /// A product's output as floats, [rows, width].
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn logits(
        &self,
        output: &Output<'_>,
        rows: usize,
        width: usize,
        logits: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        if rows == 0 || !output.holds(rows, width) || rows * width > logits.len() {
            return Err(CudaError::Shape(format!("logits of {rows} rows of {width}")));
        }
        let args =
            LogitArgs { sums: output.args(), logits: logits.address(0), width: width as u32 };
        let launch = Launch::new([width.div_ceil(THREADS), rows, 1], THREADS, 0).overlapping();
        // SAFETY: rows of sums and logits were checked.
        unsafe { self.logits.launch(launch, &args) }
    }
}

impl FusedRows {
    /// The most likely token of each row of logits [rows, width], of equals the lowest. The tokens of pass p, counted from
    /// 1 by `passes`, also go to `history` from `(p - 1) * rows` on, if they fit. Sets `not_finite` to 1 if a logit
    /// is not finite.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn best(
        &self,
        logits: &Buffer<f32>,
        rows: usize,
        width: usize,
        tokens: &mut Buffer<u32>,
        (history, passes): (&mut Buffer<u32>, &Buffer<u32>),
        not_finite: &mut Buffer<u32>,
    ) -> Result<(), CudaError> {
        if rows == 0 || rows * width > logits.len() || rows > tokens.len() {
            return Err(CudaError::Shape(format!("best tokens of {rows} rows of {width}")));
        }
        let args = BestArgs {
            logits: logits.address(0),
            tokens: tokens.address(0),
            not_finite: not_finite.address(0),
            passes: passes.address(0),
            history: history.address(0),
            capacity: (history.len() / rows) as u32,
            width: width as u32,
        };
        // SAFETY: rows of logits and tokens were checked.
        unsafe { self.best.launch(Launch::new([rows, 1, 1], BEST_THREADS, 0).overlapping(), &args) }
    }
}

fn gate_args(g: &Output<'_>, column: usize, h: u64, norms: &Norms<'_>, q: &Quantized) -> GateArgs {
    GateArgs {
        g: g.args(),
        h,
        norm: norms.vectors.address(norms.norm),
        weight: norms.vectors.address(norms.inner[0]),
        eps: norms.eps,
        width: q.cols as u32,
        column: column as u32,
        q: QuantizedArgs::of(q),
        count: q.rows as u32,
    }
}

/// Widths that the GPU's row kernels handle: they work on four values at a time.
///
/// # Errors
/// [`CudaError::Shape`] for a width that is not a multiple of four.
pub fn check_multiple(width: usize) -> Result<(), CudaError> {
    if width.is_multiple_of(4) {
        return Ok(());
    }
    Err(CudaError::Shape(format!("a width of {width}: the GPU needs a multiple of 4")))
}

fn check_norms(norms: &Norms<'_>, width: usize, q: &Quantized) -> Result<(), CudaError> {
    check_multiple(width)?;
    let inside = |&at: &usize| at.is_multiple_of(4) && at + width <= norms.vectors.len();
    let count = norms.inner.len();
    if matches!(count, 1 | 3)
        && q.layers == count
        && norms.inner.iter().all(inside)
        && inside(&norms.norm)
    {
        return Ok(());
    }
    Err(CudaError::Shape(format!("norms {:?} for {} layers of {width}", norms.inner, q.layers)))
}
