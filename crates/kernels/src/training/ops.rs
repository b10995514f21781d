//! Everything that is not a product.

use super::{
    GATES, LOSS, NORMS, OPTIMIZER, RECURRENCE, THREADS, Training, View, ViewMut, quotient, require,
};
use crate::adamw::AdamW;
use crate::cuda::{CudaError, Launch};

/// Blocks of the sums for scales of weights.
pub(super) const WEIGHT_BLOCKS: usize = 256;
/// Blocks of kernels that sum over rows: fixed, so that the order of sums does not depend on the GPU.
const ROW_BLOCKS: usize = 1056;
/// Threads of a block that has a row in registers, at most, and elements that each has of it.
const VECTOR_THREADS: usize = 384;
const VECTOR_ELEMENTS: usize = 16;
/// Threads, or channels, of a block of the recurrence.
const CHANNELS: usize = 128;
/// Threads that a recurrence should have, by cutting time if need be.
const RECURRENCE_THREADS: usize = 1 << 17;
/// Steps that a chunk of time has at least.
const MIN_CHUNK: usize = 64;
const LOSS_THREADS: usize = 512;

/// The input of BitLinear layers: `RMSNorm(x; outer)` or x itself, and what each layer makes of it.
#[derive(Clone, Copy, Debug)]
pub struct NormQuantize<'a> {
    /// [M, K]
    pub x: View<'a, u16>,
    /// Weight `[K]` and ε of the norm before the layers.
    pub outer: Option<(View<'a, f32>, f32)>,
    /// Weight `[K]` of the norm inside each layer, one to three.
    pub inner: &'a [View<'a, f32>],
    /// γ of each layer's trits, one element each.
    pub gamma: &'a [View<'a, f32>],
}

#[repr(C)]
struct QuantizeArgs {
    x: u64,
    outer: u64,
    inner: [u64; 3],
    gamma: [u64; 3],
    q: [u64; 3],
    factors: [u64; 3],
    rows: u32,
    width: u32,
    eps: f32,
    divide: u32,
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
    /// The same in bf16.
    pub dx_half: ViewMut<'a, u16>,
    /// Whether to add to `dx`.
    pub add: bool,
    /// Places of the gradients of the inner norms' weights, then of the outer one's.
    pub d_weights: &'a [usize],
}

#[repr(C)]
struct NormBackwardArgs {
    x: u64,
    outer: u64,
    inner: [u64; 3],
    gamma: [u64; 3],
    dn: [u64; 3],
    dx: u64,
    dx_half: u64,
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

#[repr(C)]
struct ReduceArgs {
    partials: u64,
    out: [u64; 4],
    blocks: u32,
    sums: u32,
    width: u32,
}

#[repr(C)]
struct NormGateArgs {
    g: u64,
    g_factors: u64,
    h: u64,
    weight: u64,
    y: u64,
    dy: u64,
    dg: u64,
    dh: u64,
    partials: u64,
    rows: u32,
    width: u32,
    eps: f32,
}

#[repr(C)]
struct SwigluArgs {
    ab: u64,
    factors: u64,
    y: u64,
    dy: u64,
    d_ab: u64,
    rows: u32,
    width: u32,
}

#[repr(C)]
struct ResidualArgs {
    residual: u64,
    product: u64,
    factors: u64,
    out: u64,
    rows: u32,
    width: u32,
}

#[repr(C)]
struct EmbedArgs {
    table: u64,
    tokens: u64,
    x: u64,
    width: u32,
}

#[repr(C)]
struct EmbedBackwardArgs {
    dx: u64,
    order: u64,
    starts: u64,
    tokens: u64,
    gradients: u64,
    distinct: u32,
    width: u32,
}

#[repr(C)]
#[derive(Default)]
struct RecurrenceArgs {
    i: u64,
    f: u64,
    i_factors: u64,
    f_factors: u64,
    beta: u64,
    h: u64,
    dh: u64,
    di: u64,
    df: u64,
    carries: u64,
    partials: u64,
    sequences: u32,
    length: u32,
    width: u32,
    chunks: u32,
    chunk_length: u32,
}

/// Inputs of a recurrence over B sequences of T steps.
#[derive(Clone, Copy, Debug)]
pub struct Recurrence<'a> {
    /// B.
    pub sequences: usize,
    /// T.
    pub length: usize,
    /// [B, T, D], and the factor of each row.
    pub i: (View<'a, u16>, Option<View<'a, f32>>),
    /// [B, T, D], and the factor of each row.
    pub f: (View<'a, u16>, Option<View<'a, f32>>),
    /// β `[D]`.
    pub beta: View<'a, f32>,
}

#[repr(C)]
struct BoundsArgs {
    bounds: u64,
    betas: u64,
    d_betas: u64,
    d_bounds: u64,
    layers: u32,
    width: u32,
}

#[repr(C)]
struct LossArgs {
    logits: u64,
    factors: u64,
    targets: u64,
    gradient: u64,
    losses: u64,
    vocabulary: u32,
    scale: f32,
}

#[repr(C)]
struct AddLossArgs {
    losses: u64,
    total: u64,
    rows: u32,
    scale: f32,
}

#[repr(C)]
struct AdamWArgs {
    p: u64,
    g: u64,
    m: u64,
    v: u64,
    len: u64,
    factors: crate::adamw::Factors,
}

#[repr(C)]
struct SquaresArgs {
    x: u64,
    sums: u64,
    len: u64,
    unit: u32,
}

#[repr(C)]
struct AddArgs {
    from: u64,
    into: u64,
    len: u64,
}

#[repr(C)]
struct WeightArgs {
    weights: u64,
    partials: u64,
    gamma: u64,
    out: u64,
    len: u64,
    blocks: u32,
}

/// Threads of a block that takes rows of `width` elements 16 bytes at a time, if width and addresses allow that.
fn vector_threads(width: usize, addresses: &[u64]) -> Option<usize> {
    let threads = width.div_ceil(VECTOR_ELEMENTS).next_multiple_of(32);
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    (width.is_multiple_of(8) && threads <= VECTOR_THREADS && aligned).then_some(threads)
}

/// As [`vector_threads`] for kernels without sums over rows, whose blocks may walk along a row.
fn walking_threads(width: usize, addresses: &[u64]) -> Option<usize> {
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    let threads = (width / 8).next_multiple_of(32).min(VECTOR_THREADS);
    (width.is_multiple_of(8) && aligned).then_some(threads)
}

/// One address each, zeros behind them.
fn addresses<const N: usize>(given: impl Iterator<Item = u64>) -> [u64; N] {
    let mut all = [0; N];
    all.iter_mut().zip(given).for_each(|(to, from)| *to = from);
    all
}

fn address_or_null(view: Option<View<'_, f32>>) -> u64 {
    view.map_or(0, View::address)
}

impl NormQuantize<'_> {
    /// M and K.
    fn shape(&self) -> Result<(usize, usize), CudaError> {
        let first = self.outer.map(|(weight, _)| weight).or(self.inner.first().copied());
        let width = first.map_or(0, |weight| weight.len);
        let all = self.inner.iter().copied().chain(self.outer.map(|(weight, _)| weight));
        require(all.map(|weight| weight.len).all(|len| len == width), "a norm's weight")?;
        require(self.inner.len() <= 3, "the number of layers of one input")?;
        let gammas = self.gamma.len() == self.inner.len() && self.gamma.iter().all(|g| g.len == 1);
        require(gammas, "the number of scales")?;
        Ok((quotient(self.x.len, width)?, width))
    }
}

impl Training {
    /// Grows scratch memory ahead of the first step, for rows of at most `width` and `sequences` of `length`.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve(
        &mut self,
        width: usize,
        sequences: usize,
        length: usize,
    ) -> Result<(), CudaError> {
        let (chunks, _) = chunks(sequences, length, width);
        self.partials.reserve((ROW_BLOCKS * 4 * width).max(sequences * chunks * width))?;
        self.carries.reserve(2 * sequences * chunks * width).map(drop)
    }

    /// Quantised inputs `q` [M, K] of BitLinear layers, as bf16. With `factors` these get `γ / s` of each row,
    /// without `q / s` is written in place of q.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn norm_quantize(
        &mut self,
        norms: NormQuantize<'_>,
        q: Vec<ViewMut<'_, u16>>,
        factors: Option<Vec<ViewMut<'_, f32>>>,
    ) -> Result<(), CudaError> {
        let (rows, width) = norms.shape()?;
        let layers = norms.inner.len();
        require(q.len() == layers && q.iter().all(|q| q.len == norms.x.len), "q")?;
        let fits = factors
            .as_ref()
            .is_none_or(|f| f.len() == layers && f.iter().all(|factors| factors.len == rows));
        require(fits, "factors")?;
        require(layers > 0, "the number of layers")?;
        let args = QuantizeArgs {
            x: norms.x.address(),
            outer: address_or_null(norms.outer.map(|(weight, _)| weight)),
            inner: addresses(norms.inner.iter().map(|view| view.address())),
            gamma: addresses(norms.gamma.iter().map(|view| view.address())),
            q: addresses(q.iter().map(ViewMut::address)),
            factors: addresses(factors.iter().flatten().map(ViewMut::address)),
            rows: rows as u32,
            width: width as u32,
            eps: norms.outer.map_or(0.0, |(_, eps)| eps),
            divide: factors.is_none().into(),
        };
        self.mark("norms and quantisers")?;
        let pointers = [&[args.x, args.outer][..], &args.inner, &args.q].concat();
        let (names, launch) = match vector_threads(width, &pointers) {
            Some(threads) => (
                ["norm_quantize_vectors_1", "norm_quantize_vectors_2", "norm_quantize_vectors_3"],
                Launch::new([rows, 1, 1], threads, 0),
            ),
            None => (
                ["norm_quantize_1", "norm_quantize_2", "norm_quantize_3"],
                Launch::new([rows, 1, 1], THREADS, 4 * width),
            ),
        };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(NORMS, names[layers - 1], launch, &args) }
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
        gradients: &mut crate::cuda::Buffer<f32>,
    ) -> Result<(), CudaError> {
        let NormBackward { norms, d_products, dx, dx_half, add, d_weights } = arguments;
        let (rows, width) = norms.shape()?;
        let (layers, outer) = (norms.inner.len(), usize::from(norms.outer.is_some()));
        let len = norms.x.len;
        require(d_products.len() == layers.max(1), "the number of gradients")?;
        require(d_products.iter().all(|d| d.len == len) && dx_half.len == len, "a gradient")?;
        require(dx.as_ref().map_or(!add, |dx| dx.len == len), "dx")?;
        require(d_weights.len() == layers + outer && layers + outer > 0, "the norms' gradients")?;
        let (blocks, sums) = (ROW_BLOCKS.min(rows), layers + outer);
        self.partials.reserve(blocks * sums * width)?;
        let args = NormBackwardArgs {
            x: norms.x.address(),
            outer: address_or_null(norms.outer.map(|(weight, _)| weight)),
            inner: addresses(norms.inner.iter().map(|view| view.address())),
            gamma: addresses(norms.gamma.iter().map(|view| view.address())),
            dn: addresses(d_products.iter().map(|view| view.address())),
            dx: dx.as_ref().map_or(0, ViewMut::address),
            dx_half: dx_half.address(),
            partials: self.partials.address(0),
            rows: rows as u32,
            width: width as u32,
            eps: norms.outer.map_or(0.0, |(_, eps)| eps),
            add: add.into(),
        };
        self.mark("norms, backward")?;
        let pointers =
            [&[args.x, args.outer, args.dx, args.dx_half][..], &args.inner, &args.dn].concat();
        let (names, launch) = match vector_threads(width, &pointers) {
            Some(threads) => (
                [
                    "norm_backward_vectors_0",
                    "norm_backward_vectors_1",
                    "norm_backward_vectors_2",
                    "norm_backward_vectors_3",
                ],
                Launch::new([blocks, 1, 1], threads, 0),
            ),
            None => (
                ["norm_backward_0", "norm_backward_1", "norm_backward_2", "norm_backward_3"],
                Launch::new([blocks, 1, 1], THREADS, 4 * width * (2 + sums)),
            ),
        };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(NORMS, names[layers], launch, &args)? };
        let out: Vec<_> =
            d_weights.iter().map(|&at| ViewMut::new(gradients, at, width).address()).collect();
        self.reduce(blocks, width, &out)
    }

    /// Adds the partial sums of blocks to vectors.
    fn reduce(&mut self, blocks: usize, width: usize, out: &[u64]) -> Result<(), CudaError> {
        let sums = out.len();
        let args = ReduceArgs {
            partials: self.partials.address(0),
            out: addresses(out.iter().copied()),
            blocks: blocks as u32,
            sums: sums as u32,
            width: width as u32,
        };
        let launch = Launch::new([(sums * width).div_ceil(32), 1, 1], THREADS, 0);
        // SAFETY: the partial sums were written by the launch before; the callers checked the vectors.
        unsafe { self.launch(NORMS, "reduce_columns", launch, &args) }
    }

    /// `y = RMSNorm(g; weight) ⊙ silu(h)`, all [M, D].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn norm_gate(
        &mut self,
        (g, factors): (View<'_, u16>, Option<View<'_, f32>>),
        h: View<'_, u16>,
        (weight, eps): (View<'_, f32>, f32),
        y: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let (width, rows) = (weight.len, quotient(g.len, weight.len)?);
        require(h.len == g.len && y.len == g.len, "h or y")?;
        require(factors.is_none_or(|f| f.len >= rows), "factors")?;
        let args = NormGateArgs {
            g: g.address(),
            g_factors: address_or_null(factors),
            h: h.address(),
            weight: weight.address(),
            y: y.address(),
            dy: 0,
            dg: 0,
            dh: 0,
            partials: 0,
            rows: rows as u32,
            width: width as u32,
            eps,
        };
        self.mark("gates")?;
        let pointers = [args.g, args.h, args.weight, args.y];
        let (name, launch) = match vector_threads(width, &pointers) {
            Some(threads) => ("norm_gate_forward_vectors", Launch::new([rows, 1, 1], threads, 0)),
            None => ("norm_gate_forward", Launch::new([rows, 1, 1], THREADS, 4 * width)),
        };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, name, launch, &args) }
    }

    /// Gradients of [`norm_gate`](Self::norm_gate). Sets `dg` and `dh`, **adds** to the weight's at `d_weight`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    #[allow(clippy::too_many_arguments)]
    pub fn norm_gate_backward(
        &mut self,
        (g, factors): (View<'_, u16>, Option<View<'_, f32>>),
        h: View<'_, u16>,
        (weight, eps): (View<'_, f32>, f32),
        dy: View<'_, u16>,
        dg: ViewMut<'_, u16>,
        dh: ViewMut<'_, u16>,
        d_weight: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let (width, rows) = (weight.len, quotient(g.len, weight.len)?);
        require([h.len, dy.len, dg.len, dh.len].iter().all(|&len| len == g.len), "a tensor")?;
        require(factors.is_none_or(|f| f.len >= rows) && d_weight.len == width, "a vector")?;
        let blocks = ROW_BLOCKS.min(rows);
        self.partials.reserve(blocks * width)?;
        let args = NormGateArgs {
            g: g.address(),
            g_factors: address_or_null(factors),
            h: h.address(),
            weight: weight.address(),
            y: 0,
            dy: dy.address(),
            dg: dg.address(),
            dh: dh.address(),
            partials: self.partials.address(0),
            rows: rows as u32,
            width: width as u32,
            eps,
        };
        self.mark("gates, backward")?;
        let pointers = [args.g, args.h, args.weight, args.dy, args.dg, args.dh];
        let (name, launch) = match vector_threads(width, &pointers) {
            Some(threads) => {
                ("norm_gate_backward_vectors", Launch::new([blocks, 1, 1], threads, 0))
            }
            None => ("norm_gate_backward", Launch::new([blocks, 1, 1], THREADS, 4 * width * 3)),
        };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, name, launch, &args)? };
        self.reduce(blocks, width, &[d_weight.address()])
    }

    /// `y = silu(a) ⊙ b`: [a b] [M, 2F], y [M, F].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn swiglu(
        &mut self,
        (ab, factors): (View<'_, u16>, Option<View<'_, f32>>),
        inner: usize,
        y: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let rows = quotient(ab.len, 2 * inner)?;
        require(y.len == rows * inner && factors.is_none_or(|f| f.len >= rows), "y")?;
        let args = SwigluArgs {
            ab: ab.address(),
            factors: address_or_null(factors),
            y: y.address(),
            dy: 0,
            d_ab: 0,
            rows: rows as u32,
            width: inner as u32,
        };
        self.mark("gates")?;
        let (name, threads) = match walking_threads(inner, &[args.ab, args.y]) {
            Some(threads) => ("swiglu_forward_vectors", threads),
            None => ("swiglu_forward", THREADS),
        };
        let launch = Launch::new([rows, 1, 1], threads, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, name, launch, &args) }
    }

    /// Gradients of [`swiglu`](Self::swiglu). Sets `d_ab`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn swiglu_backward(
        &mut self,
        (ab, factors): (View<'_, u16>, Option<View<'_, f32>>),
        dy: View<'_, u16>,
        inner: usize,
        d_ab: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let rows = quotient(ab.len, 2 * inner)?;
        require(dy.len == rows * inner && d_ab.len == ab.len, "dy or d_ab")?;
        require(factors.is_none_or(|f| f.len >= rows), "factors")?;
        let args = SwigluArgs {
            ab: ab.address(),
            factors: address_or_null(factors),
            y: 0,
            dy: dy.address(),
            d_ab: d_ab.address(),
            rows: rows as u32,
            width: inner as u32,
        };
        self.mark("gates, backward")?;
        let (name, threads) = match walking_threads(inner, &[args.ab, args.dy, args.d_ab]) {
            Some(threads) => ("swiglu_backward_vectors", threads),
            None => ("swiglu_backward", THREADS),
        };
        let launch = Launch::new([rows, 1, 1], threads, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, name, launch, &args) }
    }

    /// `out = residual + product ⊙ factors`, [M, N] with a factor a row.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn add_residual(
        &mut self,
        residual: View<'_, u16>,
        product: View<'_, u16>,
        factors: View<'_, f32>,
        out: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let (rows, width) = (factors.len, quotient(product.len, factors.len)?);
        require(residual.len == product.len && out.len == product.len, "residual or result")?;
        let args = ResidualArgs {
            residual: residual.address(),
            product: product.address(),
            factors: factors.address(),
            out: out.address(),
            rows: rows as u32,
            width: width as u32,
        };
        self.mark("residual stream")?;
        let (name, threads) = match walking_threads(width, &[args.residual, args.product, args.out])
        {
            Some(threads) => ("add_residual_vectors", threads),
            None => ("add_residual", THREADS),
        };
        let launch = Launch::new([rows, 1, 1], threads, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, name, launch, &args) }
    }

    /// `x[m] = table[tokens[m]]`. Ids must be below V.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn embed(
        &mut self,
        table: View<'_, f32>,
        tokens: View<'_, u32>,
        x: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let width = quotient(x.len, tokens.len)?;
        quotient(table.len, width)?;
        let args = EmbedArgs {
            table: table.address(),
            tokens: tokens.address(),
            x: x.address(),
            width: width as u32,
        };
        self.mark("embeddings")?;
        let launch = Launch::new([tokens.len, 1, 1], THREADS, 0);
        // SAFETY: the views lie in live buffers of the sizes that were checked, and ids are below V.
        unsafe { self.launch(GATES, "embed_forward", launch, &args) }
    }

    /// `gradients[tokens[m]] += dx[m]`, in the order of m. `order` has the rows sorted by token, `starts` where
    /// the rows of each of `distinct` tokens begin in it, and the end.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn embed_backward(
        &mut self,
        dx: View<'_, f32>,
        tokens: View<'_, u32>,
        order: View<'_, u32>,
        starts: View<'_, u32>,
        gradients: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let width = quotient(dx.len, tokens.len)?;
        quotient(gradients.len, width)?;
        let distinct = starts.len.saturating_sub(1);
        require(order.len == tokens.len && distinct <= tokens.len, "order")?;
        let args = EmbedBackwardArgs {
            dx: dx.address(),
            order: order.address(),
            starts: starts.address(),
            tokens: tokens.address(),
            gradients: gradients.address(),
            distinct: distinct as u32,
            width: width as u32,
        };
        self.mark("embeddings")?;
        let launch = Launch::new([distinct, width.div_ceil(THREADS), 1], THREADS, 0);
        // SAFETY: the views lie in live buffers of the sizes that were checked, ids are below V, and the order
        // was made of the same ids.
        unsafe { self.launch(GATES, "embed_backward", launch, &args) }
    }

    /// `h_t = r ⊙ h_{t−1} + silu(i) ⊙ (1 − r)`, from zero.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn recurrence(
        &mut self,
        inputs: Recurrence<'_>,
        h: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let mut args = self.recurrence_args(inputs)?;
        require(h.len == inputs.i.0.len, "h")?;
        args.h = h.address();
        self.mark("recurrence")?;
        let launch = launch_of(&args);
        let across = Launch::new([launch.grid[0], 1, launch.grid[2]], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            if args.chunks > 1 {
                self.launch(RECURRENCE, "recurrence_chunks", launch, &args)?;
                self.launch(RECURRENCE, "recurrence_join", across, &args)?;
            }
            self.launch(RECURRENCE, "recurrence_forward", launch, &args)
        }
    }

    /// Gradients of [`recurrence`](Self::recurrence). Sets `di` and `df`, **adds** to `d_beta`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn recurrence_backward(
        &mut self,
        inputs: Recurrence<'_>,
        h: View<'_, u16>,
        dh: View<'_, u16>,
        di: ViewMut<'_, u16>,
        df: ViewMut<'_, u16>,
        d_beta: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let mut args = self.recurrence_args(inputs)?;
        let len = inputs.i.0.len;
        require([h.len, dh.len, di.len, df.len].iter().all(|&other| other == len), "a tensor")?;
        require(d_beta.len == inputs.beta.len, "d_beta")?;
        (args.h, args.dh) = (h.address(), dh.address());
        (args.di, args.df) = (di.address(), df.address());
        let parts = inputs.sequences * args.chunks as usize;
        self.partials.reserve(parts * inputs.beta.len)?;
        args.partials = self.partials.address(0);
        self.mark("recurrence, backward")?;
        let launch = launch_of(&args);
        let across = Launch::new([launch.grid[0], 1, launch.grid[2]], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            if args.chunks > 1 {
                self.launch(RECURRENCE, "recurrence_chunks_back", launch, &args)?;
                self.launch(RECURRENCE, "recurrence_join_back", across, &args)?;
            }
            self.launch(RECURRENCE, "recurrence_backward", launch, &args)?;
        }
        self.reduce(parts, inputs.beta.len, &[d_beta.address()])
    }

    fn recurrence_args(&mut self, inputs: Recurrence<'_>) -> Result<RecurrenceArgs, CudaError> {
        let Recurrence { sequences, length, i, f, beta } = inputs;
        let (rows, width) = (sequences * length, beta.len);
        require(i.0.len == rows * width && f.0.len == i.0.len && rows > 0, "i or f")?;
        let factors = [i.1, f.1];
        require(factors.iter().flatten().all(|factors| factors.len >= rows), "factors")?;
        require(sequences <= 65_535, "the number of sequences (at most 65,535)")?;
        let (chunks, chunk_length) = chunks(sequences, length, width);
        self.carries.reserve(2 * sequences * chunks * width)?;
        Ok(RecurrenceArgs {
            i: i.0.address(),
            f: f.0.address(),
            i_factors: address_or_null(i.1),
            f_factors: address_or_null(f.1),
            beta: beta.address(),
            carries: self.carries.address(0),
            sequences: sequences as u32,
            length: length as u32,
            width: width as u32,
            chunks: chunks as u32,
            chunk_length: chunk_length as u32,
            ..RecurrenceArgs::default()
        })
    }

    /// β of every layer of learned lower bounds, [L, D].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn lower_bounds(
        &mut self,
        bounds: View<'_, f32>,
        layers: usize,
        betas: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let width = quotient(bounds.len, layers)?;
        require(betas.len == bounds.len, "betas")?;
        let args = BoundsArgs {
            bounds: bounds.address(),
            betas: betas.address(),
            d_betas: 0,
            d_bounds: 0,
            layers: layers as u32,
            width: width as u32,
        };
        self.mark("recurrence")?;
        let launch = Launch::new([width.div_ceil(CHANNELS), 1, 1], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(RECURRENCE, "lower_bounds", launch, &args) }
    }

    /// Gradients of [`lower_bounds`](Self::lower_bounds): **adds** to `d_bounds`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn lower_bounds_backward(
        &mut self,
        bounds: View<'_, f32>,
        layers: usize,
        d_betas: View<'_, f32>,
        d_bounds: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let width = quotient(bounds.len, layers)?;
        require(d_betas.len == bounds.len && d_bounds.len == bounds.len, "gradients")?;
        let args = BoundsArgs {
            bounds: bounds.address(),
            betas: 0,
            d_betas: d_betas.address(),
            d_bounds: d_bounds.address(),
            layers: layers as u32,
            width: width as u32,
        };
        self.mark("recurrence, backward")?;
        let launch = Launch::new([width.div_ceil(CHANNELS), 1, 1], CHANNELS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(RECURRENCE, "lower_bounds_backward", launch, &args) }
    }

    /// Adds `scale · Σ_m −ln softmax(logits[m])[targets[m]]` to `total`, and writes `scale ·` the gradient of
    /// the logits. Targets must be below V or [`IGNORED`](crate::cross_entropy::IGNORED).
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    #[allow(clippy::too_many_arguments)]
    pub fn cross_entropy(
        &mut self,
        logits: View<'_, f32>,
        factors: Option<View<'_, f32>>,
        targets: View<'_, u32>,
        scale: f32,
        gradient: Option<ViewMut<'_, u16>>,
        losses: ViewMut<'_, f64>,
        total: ViewMut<'_, f64>,
    ) -> Result<(), CudaError> {
        let rows = targets.len;
        let vocabulary = quotient(logits.len, rows)?;
        require(factors.is_none_or(|f| f.len >= rows), "factors")?;
        require(gradient.as_ref().is_none_or(|g| g.len == logits.len), "gradient")?;
        require(losses.len >= rows && total.len == 1, "losses")?;
        let args = LossArgs {
            logits: logits.address(),
            factors: address_or_null(factors),
            targets: targets.address(),
            gradient: gradient.as_ref().map_or(0, ViewMut::address),
            losses: losses.address(),
            vocabulary: vocabulary as u32,
            scale,
        };
        let sum = AddLossArgs {
            losses: losses.address(),
            total: total.address(),
            rows: rows as u32,
            scale,
        };
        self.mark("loss")?;
        let launch = Launch::new([rows, 1, 1], LOSS_THREADS, 0);
        // SAFETY: the views lie in live buffers of the sizes that were checked, and targets are below V.
        unsafe {
            self.launch(LOSS, "cross_entropy_rows", launch, &args)?;
            self.launch(LOSS, "add_losses", Launch::new([1, 1, 1], LOSS_THREADS, 0), &sum)
        }
    }

    /// A step of the optimiser.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn adamw(
        &mut self,
        step: &AdamW,
        parameters: ViewMut<'_, f32>,
        gradients: View<'_, f32>,
        first_moment: ViewMut<'_, f32>,
        second_moment: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let len = parameters.len;
        let all = [gradients.len, first_moment.len, second_moment.len];
        require(all == [len; 3], "gradients or moments")?;
        let args = AdamWArgs {
            p: parameters.address(),
            g: gradients.address(),
            m: first_moment.address(),
            v: second_moment.address(),
            len: len as u64,
            factors: step.factors(),
        };
        self.mark("optimiser")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "adamw_step", elementwise(len), &args) }
    }

    /// `Σ x²` of each `unit` elements.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn sums_of_squares(
        &mut self,
        x: View<'_, f32>,
        unit: usize,
        sums: ViewMut<'_, f64>,
    ) -> Result<(), CudaError> {
        let units = x.len.div_ceil(unit.max(1));
        require(sums.len >= units && unit > 0 && unit < 1 << 31, "sums")?;
        let args = SquaresArgs {
            x: x.address(),
            sums: sums.address(),
            len: x.len as u64,
            unit: unit as u32,
        };
        self.mark("optimiser")?;
        let launch = Launch::new([units, 1, 1], THREADS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "sums_of_squares", launch, &args) }
    }

    /// `into += from`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn add(&mut self, from: View<'_, f32>, into: ViewMut<'_, f32>) -> Result<(), CudaError> {
        require(from.len == into.len, "what is added")?;
        let args = AddArgs { from: from.address(), into: into.address(), len: into.len as u64 };
        self.mark("optimiser")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "add_elements", elementwise(into.len), &args) }
    }

    /// The trits of weights as bf16, and `gamma = max(mean |w|, 1e-5)`.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn ternary_weights(
        &mut self,
        weights: View<'_, f32>,
        trits: ViewMut<'_, u16>,
        gamma: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        require(trits.len == weights.len && gamma.len == 1, "trits")?;
        let args = self.weight_args(weights, &trits, gamma.address());
        self.mark("weights")?;
        let sums = Launch::new([WEIGHT_BLOCKS, 1, 1], THREADS, 0);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe {
            self.launch(OPTIMIZER, "weight_sums", sums, &args)?;
            self.launch(OPTIMIZER, "weight_trits", elementwise(weights.len), &args)
        }
    }

    /// Weights as bf16.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn half_weights(
        &mut self,
        weights: View<'_, f32>,
        halves: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        require(halves.len == weights.len, "halves")?;
        let args = self.weight_args(weights, &halves, 0);
        self.mark("weights")?;
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(OPTIMIZER, "weight_halves", elementwise(weights.len), &args) }
    }

    fn weight_args(
        &self,
        weights: View<'_, f32>,
        out: &ViewMut<'_, u16>,
        gamma: u64,
    ) -> WeightArgs {
        WeightArgs {
            weights: weights.address(),
            partials: self.weight_partials.address(0),
            gamma,
            out: out.address(),
            len: weights.len as u64,
            blocks: WEIGHT_BLOCKS as u32,
        }
    }
}

/// Number and length of the chunks of time: enough threads for a GPU, whichever it is.
fn chunks(sequences: usize, length: usize, width: usize) -> (usize, usize) {
    let wanted = RECURRENCE_THREADS.div_ceil((sequences * width).max(1));
    let most = (length / MIN_CHUNK).clamp(1, 1024);
    let chunk_length = length.div_ceil(wanted.clamp(1, most)).max(1);
    (length.div_ceil(chunk_length), chunk_length)
}

fn launch_of(args: &RecurrenceArgs) -> Launch {
    let grid =
        [(args.width as usize).div_ceil(CHANNELS), args.chunks as usize, args.sequences as usize];
    Launch::new(grid, CHANNELS, 0)
}

fn elementwise(len: usize) -> Launch {
    Launch::new([len.div_ceil(THREADS).min(4096), 1, 1], THREADS, 0)
}
