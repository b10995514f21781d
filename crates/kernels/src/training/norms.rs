//! Norms, alone and with the quantisers of BitLinear layers.

use super::rows::{ROW_BLOCKS, addresses, vector_blocks, vector_threads};
use super::{NORMS, THREADS, Training, View, ViewMut, address_or_null, quotient, require};
use crate::cuda::{Buffer, CudaError, Launch};

/// Rows that a block of the quantisers in registers takes.
const QUANTIZER_ROWS: usize = 8;
/// Registers of the kernels that go back through norms, by their number of layers, and through gates.
const BACKWARD_REGISTERS: [usize; 4] = [72, 128, 152, 160];
const SWIGLU_REGISTERS: usize = 80;
const NORM_GATE_REGISTERS: usize = 136;

/// Shared memory of a block of kernels in registers: places for `pieces` of 16 bytes of each of a thread's two vectors, for
/// the rows on their way. See `Pipeline` in the kernels.
fn place_bytes(ahead: usize, threads: usize, pieces: usize) -> usize {
    16 * ahead * threads * 2 * pieces
}

/// What the rows x [M, K] are made of.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// x.
    Plain(View<'a, u16>),
    /// `x = silu(a) ⊙ b`: [a b] [M, 2K], and the factor of each row.
    Swiglu(View<'a, u16>, Option<View<'a, f32>>),
    /// `RMSNorm(g; outer) ⊙ silu(h)`: g [M, K], the factor of each row, and h [M, K].
    NormGate(View<'a, u16>, Option<View<'a, f32>>, View<'a, u16>),
}

impl<'a> Rows<'a> {
    /// x, [a b] or g.
    fn first(self) -> View<'a, u16> {
        match self {
            Self::Plain(first) | Self::Swiglu(first, _) | Self::NormGate(first, ..) => first,
        }
    }

    fn h(self) -> Option<View<'a, u16>> {
        if let Self::NormGate(.., h) = self { Some(h) } else { None }
    }

    fn factors(self) -> Option<View<'a, f32>> {
        match self {
            Self::Plain(_) => None,
            Self::Swiglu(_, factors) | Self::NormGate(_, factors, _) => factors,
        }
    }

    fn h_address(self) -> u64 {
        self.h().map_or(0, View::address)
    }

    /// Columns of what [`first`](Self::first) is, for each of x.
    fn columns(self) -> usize {
        if let Self::Swiglu(..) = self { 2 } else { 1 }
    }

    /// Tensors that a row is made of.
    fn tensors(self) -> usize {
        if let Self::Plain(_) = self { 1 } else { 2 }
    }
}

/// How the quantised rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Integers {
    /// q, a byte each, two in an element of the buffer: what products of bytes take.
    Bytes,
    /// q as bf16: what products of bf16 take.
    Halves,
    /// q / s as bf16: what the gradient of the weights takes.
    Divided,
}

/// The input of BitLinear layers: `RMSNorm(x; outer)` or x itself, and what each layer makes of it.
#[derive(Clone, Copy, Debug)]
pub struct NormQuantize<'a> {
    /// [M, K]
    pub rows: Rows<'a>,
    /// Weight `[K]` and ε of the norm before the layers, or of the norm gate.
    pub outer: Option<(View<'a, f32>, f32)>,
    /// Weight `[K]` of the norm inside each layer, one to three; one behind a gate.
    pub inner: &'a [View<'a, f32>],
    /// γ of each layer's trits, one element each.
    pub gamma: &'a [View<'a, f32>],
}

impl NormQuantize<'_> {
    /// M and K.
    fn shape(&self) -> Result<(usize, usize), CudaError> {
        let width = self.width();
        let all = self.inner.iter().copied().chain(self.outer.map(|(weight, _)| weight));
        require(all.map(|weight| weight.len).all(|len| len == width), "a norm's weight")?;
        require(self.inner.len() <= 3, "the number of layers of one input")?;
        let gammas = self.gamma.len() == self.inner.len() && self.gamma.iter().all(|g| g.len == 1);
        require(gammas, "the number of scales")?;
        let rows = quotient(self.rows.first().len, width * self.rows.columns())?;
        require(self.rows.h().is_none_or(|h| h.len == rows * width), "h")?;
        require(self.rows.factors().is_none_or(|factors| factors.len >= rows), "factors")?;
        let gate = !matches!(self.rows, Rows::Plain(_));
        require(!gate || self.is_fused(), "a gate that is not fused")?;
        let outer = matches!(self.rows, Rows::NormGate(..));
        require(!gate || outer == self.outer.is_some(), "a gate's norm")?;
        Ok((rows, width))
    }

    fn width(&self) -> usize {
        let first = self.outer.map(|(weight, _)| weight).or(self.inner.first().copied());
        first.map_or(0, |weight| weight.len)
    }

    /// Whether gates can be part of the quantiser: one BitLinear, a row that fits in the registers of a block, aligned
    /// vectors.
    pub fn is_fused(&self) -> bool {
        self.inner.len() == 1 && vector_threads(self.width(), &self.pointers()).is_some()
    }

    fn pointers(&self) -> Vec<u64> {
        let inputs = [self.rows.first().address(), self.rows.h_address()];
        let weights = self.outer.map(|(weight, _)| weight.address());
        inputs.into_iter().chain(weights).chain(self.inner.iter().map(|w| w.address())).collect()
    }
}

#[repr(C)]
struct QuantizeArgs {
    x: u64,
    h: u64,
    x_factors: u64,
    outer: u64,
    inner: [u64; 3],
    gamma: [u64; 3],
    q: [u64; 3],
    factors: [u64; 3],
    rows: u32,
    width: u32,
    eps: f32,
    divide: u32,
    bytes: u32,
}

/// Gradients of norms.
#[derive(Debug)]
pub struct NormBackward<'a> {
    /// The norms and their input. `inner` is empty for layers without quantiser.
    pub norms: NormQuantize<'a>,
    /// Gradients of the products' inputs [M, K], over γ: one for each layer, or one.
    pub d_products: &'a [View<'a, u16>],
    /// The gradient of x in f32 [M, K], if it is kept so.
    pub dx: Option<ViewMut<'a, f32>>,
    /// The gradient of what the rows are made of, x, [a b] or g, in bf16.
    pub dx_half: ViewMut<'a, u16>,
    /// That of a norm gate's h [M, K].
    pub dh: Option<ViewMut<'a, u16>>,
    /// Whether to add to `dx`.
    pub add: bool,
    /// Places of the gradients of the inner norms' weights, then of the outer one's.
    pub d_weights: &'a [usize],
}

#[repr(C)]
struct NormBackwardArgs {
    x: u64,
    h: u64,
    x_factors: u64,
    outer: u64,
    inner: [u64; 3],
    gamma: [u64; 3],
    dn: [u64; 3],
    dx: u64,
    dx_half: u64,
    dh: u64,
    partials: u64,
    rows: u32,
    width: u32,
    eps: f32,
    add: u32,
}

#[repr(C)]
struct NormArgs {
    x: u64,
    weight: u64,
    y: u64,
    rows: u32,
    width: u32,
    eps: f32,
}

/// Kernels by their number of layers; the quantiser has one at least.
const NORM_QUANTIZE: [&str; 3] = ["norm_quantize_1", "norm_quantize_2", "norm_quantize_3"];
const NORM_QUANTIZE_VECTORS: [&str; 3] =
    ["norm_quantize_vectors_1", "norm_quantize_vectors_2", "norm_quantize_vectors_3"];
const NORM_BACKWARD: [&str; 4] =
    ["norm_backward_0", "norm_backward_1", "norm_backward_2", "norm_backward_3"];
const NORM_BACKWARD_VECTORS: [&str; 4] = [
    "norm_backward_vectors_0",
    "norm_backward_vectors_1",
    "norm_backward_vectors_2",
    "norm_backward_vectors_3",
];

impl Training {
    /// Quantised inputs `q` [M, K] of BitLinear layers, and `γ / s` of each row in `factors`, unless it is divided already.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn norm_quantize(
        &mut self,
        norms: NormQuantize<'_>,
        form: Integers,
        q: Vec<ViewMut<'_, u16>>,
        factors: Vec<ViewMut<'_, f32>>,
    ) -> Result<(), CudaError> {
        let (rows, width) = norms.shape()?;
        let layers = norms.inner.len();
        let per_element = if form == Integers::Bytes { 2 } else { 1 };
        let fits = |q: &ViewMut<'_, u16>| q.len * per_element == rows * width;
        require(q.len() == layers && q.iter().all(fits), "q")?;
        let wanted = if form == Integers::Divided { 0 } else { layers };
        let fits = factors.len() == wanted && factors.iter().all(|factors| factors.len == rows);
        require(fits, "factors")?;
        require(layers > 0, "the number of layers")?;
        let args = QuantizeArgs {
            x: norms.rows.first().address(),
            h: norms.rows.h_address(),
            x_factors: address_or_null(norms.rows.factors()),
            outer: address_or_null(norms.outer.map(|(weight, _)| weight)),
            inner: addresses(norms.inner.iter().map(|view| view.address())),
            gamma: addresses(norms.gamma.iter().map(|view| view.address())),
            q: addresses(q.iter().map(ViewMut::address)),
            factors: addresses(factors.iter().map(ViewMut::address)),
            rows: rows as u32,
            width: width as u32,
            eps: norms.outer.map_or(0.0, |(_, eps)| eps),
            divide: (form == Integers::Divided).into(),
            bytes: (form == Integers::Bytes).into(),
        };
        self.mark(if norms.rows.tensors() == 1 { "norms and quantisers" } else { "gates" })?;
        let pointers = [&norms.pointers()[..], &args.q].concat();
        let (name, launch) = match vector_threads(width, &pointers) {
            Some(threads) => {
                let name = match norms.rows {
                    Rows::Plain(_) => NORM_QUANTIZE_VECTORS[layers - 1],
                    Rows::Swiglu(..) => "swiglu_quantize",
                    Rows::NormGate(..) => "norm_gate_quantize",
                };
                let pieces = norms.rows.tensors();
                let ahead = if pieces == 1 { 4 } else { 2 };
                let blocks = rows.div_ceil(QUANTIZER_ROWS);
                let shared_bytes = place_bytes(ahead, threads, pieces);
                (name, Launch::new([blocks, 1, 1], threads, shared_bytes))
            }
            None => (NORM_QUANTIZE[layers - 1], Launch::new([rows, 1, 1], THREADS, 4 * width)),
        };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(NORMS, name, launch, &args) }
    }

    /// `y = RMSNorm(x; weight)`, [M, K].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn norm(
        &mut self,
        x: View<'_, u16>,
        weight: View<'_, f32>,
        eps: f32,
        y: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let (width, rows) = (weight.len, quotient(x.len, weight.len)?);
        require(y.len == x.len, "y")?;
        let args = NormArgs {
            x: x.address(),
            weight: weight.address(),
            y: y.address(),
            rows: rows as u32,
            width: width as u32,
            eps,
        };
        self.mark("norms and quantisers")?;
        let launch = Launch::new([rows, 1, 1], THREADS, 4 * width);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(NORMS, "norm_rows", launch, &args) }
    }

    /// Gradients of the norms before a product. **Adds** to the gradients of the norms' weights.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn norm_backward(
        &mut self,
        arguments: NormBackward<'_>,
        gradients: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let NormBackward { norms, d_products, dx, dx_half, dh, add, d_weights } = arguments;
        let (rows, width) = norms.shape()?;
        let (layers, outer) = (norms.inner.len(), usize::from(norms.outer.is_some()));
        let len = rows * width;
        require(d_products.len() == layers.max(1), "the number of gradients")?;
        require(d_products.iter().all(|d| d.len == len), "a gradient")?;
        require(dx_half.len == norms.rows.first().len, "the gradient of the rows")?;
        let plain = matches!(norms.rows, Rows::Plain(_));
        require(dx.as_ref().map_or(!add, |dx| dx.len == len && plain), "dx")?;
        let gated = norms.rows.h().is_some();
        require(dh.as_ref().map_or(!gated, |dh| dh.len == len && gated), "dh")?;
        require(d_weights.len() == layers + outer && layers + outer > 0, "the norms' gradients")?;
        let sums = layers + outer;
        let mut args = NormBackwardArgs {
            x: norms.rows.first().address(),
            h: norms.rows.h_address(),
            x_factors: address_or_null(norms.rows.factors()),
            outer: address_or_null(norms.outer.map(|(weight, _)| weight)),
            inner: addresses(norms.inner.iter().map(|view| view.address())),
            gamma: addresses(norms.gamma.iter().map(|view| view.address())),
            dn: addresses(d_products.iter().map(|view| view.address())),
            dx: dx.as_ref().map_or(0, ViewMut::address),
            dx_half: dx_half.address(),
            dh: dh.as_ref().map_or(0, ViewMut::address),
            partials: 0,
            rows: rows as u32,
            width: width as u32,
            eps: norms.outer.map_or(0.0, |(_, eps)| eps),
            add: add.into(),
        };
        self.mark(if plain { "norms, backward" } else { "gates, backward" })?;
        let pointers =
            [&norms.pointers()[..], &[args.dx, args.dx_half, args.dh], &args.dn].concat();
        let (name, blocks, threads, shared_bytes) = match vector_threads(width, &pointers) {
            Some(threads) => {
                let (name, registers) = match norms.rows {
                    Rows::Plain(_) => (NORM_BACKWARD_VECTORS[layers], BACKWARD_REGISTERS[layers]),
                    Rows::Swiglu(..) => ("swiglu_norm_backward", SWIGLU_REGISTERS),
                    Rows::NormGate(..) => ("norm_gate_norm_backward", NORM_GATE_REGISTERS),
                };
                // dx is f32.
                let tensors = norms.rows.tensors() + d_products.len() + 2 * usize::from(plain);
                let blocks = vector_blocks(rows, threads, registers);
                (name, blocks, threads, place_bytes(2, threads, tensors))
            }
            None => {
                let blocks = ROW_BLOCKS.min(rows);
                (NORM_BACKWARD[layers], blocks, THREADS, 4 * width * (2 + sums))
            }
        };
        self.partials.reserve(blocks * sums * width)?;
        args.partials = self.partials.address(0);
        let launch = Launch::new([blocks, 1, 1], threads, shared_bytes);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(NORMS, name, launch, &args)? };
        let out: Vec<_> =
            d_weights.iter().map(|&at| ViewMut::new(gradients, at, width).address()).collect();
        self.reduce(blocks, width, &out)
    }
}
