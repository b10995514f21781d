//! Norms, alone and with the quantisers of BitLinear layers.

use super::rows::{ROW_BLOCKS, addresses, vector_threads};
use super::{NORMS, THREADS, Training, View, ViewMut, address_or_null, quotient, require};
use crate::cuda::{Buffer, CudaError, Launch};

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

impl Training {
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
        gradients: &mut Buffer<f32>,
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
}
