//! Gates, the residual stream, embeddings: what goes element by element, or row by row.

use super::rows::{ROW_BLOCKS, walking_threads};
use super::{GATES, THREADS, Training, View, ViewMut, address_or_null, quotient, require};
use crate::cuda::{CudaError, Launch};

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

impl Training {
    /// `y = RMSNorm(g; weight) ⊙ silu(h)`, all [M, D]: for rows that the quantiser does not take itself, as
    /// [`Rows::NormGate`](super::Rows::NormGate).
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
        let launch = Launch::new([rows, 1, 1], THREADS, 4 * width);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, "norm_gate_forward", launch, &args) }
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
        let launch = Launch::new([blocks, 1, 1], THREADS, 4 * width * 3);
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.launch(GATES, "norm_gate_backward", launch, &args)? };
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
}
