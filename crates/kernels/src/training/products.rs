//! Dense products, by cuBLASLt.

use super::blas::{Extent, Operand, Product, Result16Or32};
use super::{Training, View, ViewMut, quotient, require};
use crate::cuda::CudaError;

impl Training {
    /// `y = x Wᵀ` in bf16: x [M, K], w [N, K], y [M, N]; with `residual` [M, N] that is added.
    ///
    /// # Errors
    /// Shapes that do not fit; the library's.
    pub fn multiply(
        &mut self,
        x: View<'_, u16>,
        weight: View<'_, u16>,
        outputs: usize,
        residual: Option<View<'_, u16>>,
        y: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let extent = forward_extent(x.len, weight.len, outputs)?;
        require(y.len == extent.m * extent.n, "y")?;
        require(residual.is_none_or(|r| r.len == y.len), "residual")?;
        self.mark("products, forward")?;
        let (beta, c) = residual.map_or((0.0, y.address()), |r| (1.0, r.address()));
        let (a, b, result) = (plain(x), transposed(weight), Result16Or32::Half);
        let product = Product { extent, a, b, result, beta, c, d: y.address() };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.product(&product) }
    }

    /// As [`multiply`](Self::multiply), with a result in f32.
    ///
    /// # Errors
    /// Shapes that do not fit; the library's.
    pub fn multiply_full(
        &mut self,
        x: View<'_, u16>,
        weight: View<'_, u16>,
        outputs: usize,
        y: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let extent = forward_extent(x.len, weight.len, outputs)?;
        require(y.len == extent.m * extent.n, "y")?;
        self.mark("products, forward")?;
        let (a, b, d) = (plain(x), transposed(weight), y.address());
        let product = Product { extent, a, b, result: Result16Or32::Full, beta: 0.0, c: d, d };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.product(&product) }
    }

    /// `dx = dy W` in bf16: dy [M, N], w [N, K], dx [M, K].
    ///
    /// # Errors
    /// Shapes that do not fit; the library's.
    pub fn multiply_inputs(
        &mut self,
        dy: View<'_, u16>,
        weight: View<'_, u16>,
        outputs: usize,
        add: bool,
        dx: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let (m, k) = (quotient(dy.len, outputs)?, quotient(weight.len, outputs)?);
        require(dx.len == m * k, "dx")?;
        self.mark("products, gradients of inputs")?;
        let extent = Extent { m, n: k, k: outputs };
        let (a, b, d) = (plain(dy), plain(weight), dx.address());
        let beta = if add { 1.0 } else { 0.0 };
        let product = Product { extent, a, b, result: Result16Or32::Half, beta, c: d, d };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.product(&product) }
    }

    /// `dW += dyᵀ x` in f32: dy [M, N], x [M, K], dW [N, K].
    ///
    /// # Errors
    /// Shapes that do not fit; the library's.
    pub fn multiply_weights(
        &mut self,
        dy: View<'_, u16>,
        x: View<'_, u16>,
        outputs: usize,
        gradient: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let (m, k) = (quotient(dy.len, outputs)?, quotient(gradient.len, outputs)?);
        require(x.len == m * k, "x")?;
        self.mark("products, gradients of weights")?;
        let extent = Extent { m: outputs, n: k, k: m };
        let (a, b, d) = (transposed(dy), plain(x), gradient.address());
        let product = Product { extent, a, b, result: Result16Or32::Full, beta: 1.0, c: d, d };
        // SAFETY: the views lie in live buffers and have the sizes that were checked.
        unsafe { self.product(&product) }
    }
}

fn plain(view: View<'_, u16>) -> Operand {
    Operand { address: view.address(), transposed: false }
}

fn transposed(view: View<'_, u16>) -> Operand {
    Operand { address: view.address(), transposed: true }
}

fn forward_extent(x: usize, weight: usize, outputs: usize) -> Result<Extent, CudaError> {
    let k = quotient(weight, outputs)?;
    Ok(Extent { m: quotient(x, k)?, n: outputs, k })
}
