//! Exact products of quantised activations and trits, a byte an element, on Hopper.

use cudarc::driver::sys;

use super::{INTEGERS, Training, View, ViewMut, quotient, require};
use crate::cuda::{CudaError, Launch};

/// Rows of a tile in shared memory, and bytes of k in it.
const TILE_ROWS: u32 = 128;
const TILE_BYTES: u32 = 128;
/// Rows and columns that a pair of blocks computes at a time.
const PAIR_ROWS: usize = 256;
const PAIR_COLUMNS: usize = 256;
/// Eight warps that compute, one that fetches.
const THREADS: usize = 288;
/// Four stages of 128 rows of q and 256 of t, aligned to 1024 bytes.
const SHARED_BYTES: usize = 4 * (128 + 256) * 128 + 1024;

#[repr(C)]
struct IntegerProductArgs {
    q: sys::CUtensorMap,
    t: sys::CUtensorMap,
    y: u64,
    m: u32,
    n: u32,
    k: u32,
}

impl Training {
    /// Whether this GPU multiplies bytes faster than bf16 here: Hopper, with rows of whole vectors.
    pub fn multiplies_bytes(&self, inputs: usize, outputs: usize) -> bool {
        let hopper = self.device.capability() == (9, 0);
        hopper && inputs.is_multiple_of(16) && outputs.is_multiple_of(8)
    }

    /// `y = q tᵀ`, exact, then rounded to bf16: q [M, K], t [N, K], two elements of a byte in each of a view, y [M, N].
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn multiply_bytes(
        &mut self,
        q: View<'_, u16>,
        t: View<'_, u16>,
        outputs: usize,
        y: ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let (len, y) = (y.len, y.address());
        self.integer_product("integer_product_half", q, t, outputs, len, y)
    }

    /// As [`multiply_bytes`](Self::multiply_bytes), with a result in f32.
    ///
    /// # Errors
    /// Shapes that do not fit; the driver's.
    pub fn multiply_bytes_full(
        &mut self,
        q: View<'_, u16>,
        t: View<'_, u16>,
        outputs: usize,
        y: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let (len, y) = (y.len, y.address());
        self.integer_product("integer_product_full", q, t, outputs, len, y)
    }

    fn integer_product(
        &mut self,
        kernel: &'static str,
        q: View<'_, u16>,
        t: View<'_, u16>,
        outputs: usize,
        len: usize,
        y: u64,
    ) -> Result<(), CudaError> {
        let k = 2 * quotient(t.len, outputs)?;
        let m = quotient(2 * q.len, k)?;
        require(len == m * outputs, "y")?;
        require(self.multiplies_bytes(k, outputs) && y.is_multiple_of(16), "a product of bytes")?;
        let args = IntegerProductArgs {
            q: tensor_map(q.address(), m, k)?,
            t: tensor_map(t.address(), outputs, k)?,
            y,
            m: m as u32,
            n: outputs as u32,
            k: k as u32,
        };
        self.mark("products, forward")?;
        let pairs = m.div_ceil(PAIR_ROWS) * outputs.div_ceil(PAIR_COLUMNS);
        let blocks = 2 * pairs.min(self.device.multiprocessors() / 2);
        let launch = Launch::new([blocks, 1, 1], THREADS, SHARED_BYTES);
        // SAFETY: the views lie in live buffers and have the sizes that were checked; tiles that stick out of a
        // matrix are filled with zeros and not stored.
        unsafe { self.launch(INTEGERS, kernel, launch, &args) }
    }
}

/// Tiles of a row-major matrix of bytes, swizzled by 128 bytes, zeros around it.
fn tensor_map(address: u64, rows: usize, columns: usize) -> Result<sys::CUtensorMap, CudaError> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (extent, stride) = ([columns as u64, rows as u64], [columns as u64]);
    let (tile, steps) = ([TILE_BYTES, TILE_ROWS], [1, 1]);
    // SAFETY: every pointer is to live memory of the size that the rank asks for; the matrix itself is not read.
    let outcome = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address as *mut std::ffi::c_void,
            extent.as_ptr(),
            stride.as_ptr(),
            tile.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    outcome.result().map_err(|error| CudaError::driver("cuTensorMapEncodeTiled", error))?;
    Ok(map)
}
