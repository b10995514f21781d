//! What lies between two products, on a GPU: one pass over a row instead of one for each operation.
//!
//! | function | computes |
//! |---|---|
//! | [`FusedRows::embed`] | `x = embeddings[token]` |
//! | [`FusedRows::residual`] | x += y; Q8(RMSNorm(RMSNorm(x; norm, ε); w, 1e-6)) for one or three w |
//! | [`FusedRows::gate`] | Q8(RMSNorm(RMSNorm(g; norm, ε) ⊙ silu(h); w, 1e-6)) |
//! | [`FusedRows::glu`] | Q8(RMSNorm(silu(a) ⊙ b; w, 1e-6)) |
//! | [`FusedRows::logits`] | y |
//!
//! where y, g, a and b are sums of the last product times γ / s. The same bits as the CPU's kernels.

use std::sync::Arc;

use crate::cuda::{Buffer, CudaError, Device, Kernel, Launch, Source};
use crate::ternary_gemm::cuda::{Quantized, Sums};

pub(crate) const SOURCE: Source = Source {
    name: "fused_rows",
    text: include_str!("rows.cu"),
    hopper_only: false,
    contracts: false,
};

const THREADS: usize = 256;
/// Shared memory that a kernel needs beside its row.
const OTHER_SHARED_BYTES: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct QuantizedArgs {
    values: u64,
    scales: u64,
    sums: u64,
    rows: u32,
    stride: u32,
    tiled: u32,
}

impl QuantizedArgs {
    fn of(q: &Quantized) -> Self {
        Self {
            values: q.values.address(0),
            scales: q.scales.address(0),
            sums: q.sums.address(0),
            rows: q.capacity as u32,
            stride: q.stride() as u32,
            tiled: q.tiled.into(),
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
}

#[repr(C)]
struct GateArgs {
    g: SumsArgs,
    h: u64,
    norm: u64,
    weight: u64,
    eps: f32,
    width: u32,
    column: u32,
    q: QuantizedArgs,
}

#[repr(C)]
struct GluArgs {
    ab: SumsArgs,
    weight: u64,
    width: u32,
    q: QuantizedArgs,
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
    width: u32,
}

#[repr(C)]
struct EmbedArgs {
    table: u64,
    tokens: u64,
    x: u64,
    width: u32,
    kind: u32,
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

/// The kernels.
#[derive(Debug)]
pub struct FusedRows {
    residual_1: Kernel,
    residual_3: Kernel,
    gate: Kernel,
    glu: Kernel,
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
        let kernel = |name| device.kernel(SOURCE, name, bytes);
        Ok(Self {
            residual_1: kernel("residual_rows_1")?,
            residual_3: kernel("residual_rows_3")?,
            gate: kernel("gate_rows")?,
            glu: kernel("glu_rows")?,
            logits: device.kernel(SOURCE, "logit_rows", 0)?,
            best: device.kernel(SOURCE, "best_rows", 0)?,
            embed: device.kernel(SOURCE, "embed_rows", 0)?,
        })
    }

    /// Embeddings of tokens (buffer, first, count) to `x` [M, D].
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's. Tokens must have been checked: `vocab` is what the
    /// table has.
    pub fn embed(
        &self,
        table: (&Buffer<u8>, EmbeddingType),
        tokens: (&Buffer<u32>, usize, usize),
        width: usize,
        x: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let ((table, kind), (tokens, at, count)) = (table, tokens);
        if count == 0 || at + count > tokens.len() || count * width > x.len() {
            return Err(CudaError::Shape(format!("embeddings of {count} tokens")));
        }
        let args = EmbedArgs {
            table: table.address(0),
            tokens: tokens.address(at),
            x: x.address(0),
            width: width as u32,
            kind: kind.code(),
        };
        // SAFETY: reads `count` tokens, writes `count` rows of x.
        unsafe { self.embed.launch(Launch::new([count, 1, 1], THREADS, 0), &args) }
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
        };
        let kernel = if norms.inner.len() == 3 { &self.residual_3 } else { &self.residual_1 };
        // SAFETY: rows of x, sums and q were checked; `rows` holds numbers of rows of x.
        unsafe { kernel.launch(Launch::new([count, 1, 1], THREADS, 4 * width), &args) }
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
        let args = GateArgs {
            g: g.args(),
            h: h.address(0),
            norm: norms.vectors.address(norms.norm),
            weight: norms.vectors.address(norms.inner[0]),
            eps: norms.eps,
            width: width as u32,
            column: column as u32,
            q: QuantizedArgs::of(q),
        };
        // SAFETY: rows of sums, h and q were checked.
        unsafe { self.gate.launch(Launch::new([count, 1, 1], THREADS, 4 * width), &args) }
    }

    /// Quantises the gated linear unit's output for the down projection. The norm's weight is at `weight`.
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
        if count == 0 || !ab.holds(count, 2 * width) || weight + width > vectors.len() {
            return Err(CudaError::Shape(format!("a gated unit of {count} rows of {width}")));
        }
        check_multiple(width)?;
        let args = GluArgs {
            ab: ab.args(),
            weight: vectors.address(weight),
            width: width as u32,
            q: QuantizedArgs::of(q),
        };
        // SAFETY: rows of sums and q were checked.
        unsafe { self.glu.launch(Launch::new([count, 1, 1], THREADS, 4 * width), &args) }
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
        let launch = Launch::new([width.div_ceil(THREADS), rows, 1], THREADS, 0);
        // SAFETY: rows of sums and logits were checked.
        unsafe { self.logits.launch(launch, &args) }
    }
}

impl FusedRows {
    /// The most likely token of each row of logits [rows, width], of equals the lowest. Sets `not_finite` to 1
    /// if a logit is not finite.
    ///
    /// # Errors
    /// Shapes that do not fit together; the driver's.
    pub fn best(
        &self,
        logits: &Buffer<f32>,
        rows: usize,
        width: usize,
        tokens: (&mut Buffer<u32>, usize),
        not_finite: &mut Buffer<u32>,
    ) -> Result<(), CudaError> {
        let (tokens, at) = tokens;
        if rows == 0 || rows * width > logits.len() || at + rows > tokens.len() {
            return Err(CudaError::Shape(format!("best tokens of {rows} rows of {width}")));
        }
        let args = BestArgs {
            logits: logits.address(0),
            tokens: tokens.address(at),
            not_finite: not_finite.address(0),
            width: width as u32,
        };
        // SAFETY: rows of logits and tokens were checked.
        unsafe { self.best.launch(Launch::new([rows, 1, 1], THREADS, 0), &args) }
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
