//! Dense products by cuBLASLt: bf16 operands, f32 sums, results in bf16 or f32.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use crate::cuda::{Buffer, CudaError, Device};

/// Scratch memory that a product may use.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Alignment that plans tell apart, at most.
const MAX_ALIGNMENT: u64 = 256;

/// Element type of a product's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Result16Or32 {
    /// bf16.
    Half,
    /// f32.
    Full,
}

/// A row-major bf16 matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub address: u64,
    /// Whether the product takes it transposed.
    pub transposed: bool,
}

/// `[m, k] x [k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Extent {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// `d = a b + beta c`, all row-major; `c` may be `d`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub extent: Extent,
    pub a: Operand,
    pub b: Operand,
    /// Element type of `c` and `d`.
    pub result: Result16Or32,
    pub beta: f32,
    /// Addresses.
    pub c: u64,
    pub d: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    extent: Extent,
    transposed: (bool, bool),
    result: Result16Or32,
    alignments: [u32; 4],
}

/// What a product of one kind needs, found once.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: all were created with the plan, and are destroyed once.
        unsafe {
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.description);
        }
    }
}

/// The library's handle, its scratch memory and the plans.
pub(super) struct Blas {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: HashMap<Key, Plan>,
}

impl Blas {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        // SAFETY: looks for a library by its well-known names.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoBlas);
        }
        let workspace = Buffer::zeros(device, WORKSPACE_BYTES)?;
        device.make_current()?;
        let handle = result::create_handle().map_err(|error| failed("cublasLtCreate", error))?;
        Ok(Self { device: Arc::clone(device), handle, workspace, plans: HashMap::new() })
    }

    /// Submits a product.
    ///
    /// # Safety
    /// The addresses must be of live memory of the device that holds the matrices.
    pub unsafe fn multiply(&mut self, product: &Product) -> Result<(), CudaError> {
        let Product { extent, a, b, result, beta, c, d } = *product;
        // Row-major matrices are the transposed column-major ones: d' = b' a'.
        let alignment =
            |address: u64| (1 << address.trailing_zeros().min(8)).min(MAX_ALIGNMENT) as u32;
        let key = Key {
            extent,
            transposed: (a.transposed, b.transposed),
            result,
            alignments: [b.address, a.address, c, d].map(alignment),
        };
        self.device.make_current()?;
        if !self.plans.contains_key(&key) {
            let plan = self.plan(key)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let alpha = 1.0f32;
        let pointer = |address: u64| address as *const c_void;
        // SAFETY: the caller's promise about the matrices; the factors are read before the call returns, and
        // handle, plan and workspace live as long as `self`.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(b.address),
                plan.layouts[0],
                pointer(a.address),
                plan.layouts[1],
                pointer(c),
                plan.layouts[2],
                d as *mut c_void,
                plan.layouts[2],
                &plan.algorithm,
                self.workspace.address(0) as *mut c_void,
                WORKSPACE_BYTES,
                self.device.stream().cu_stream().cast(),
            )
        }
        .map_err(|error| failed("cublasLtMatmul", error))
    }

    fn plan(&self, key: Key) -> Result<Plan, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let Extent { m, n, k } = key.extent;
        let stored = |rows: usize, columns: usize, transposed: bool| {
            if transposed { (rows, columns) } else { (columns, rows) }
        };
        let data = match key.result {
            Result16Or32::Half => CUDA_R_16BF,
            Result16Or32::Full => CUDA_R_32F,
        };
        let layout = |data, (rows, columns): (usize, usize)| {
            result::create_matrix_layout(data, rows as u64, columns as u64, rows as i64)
                .map_err(|error| failed("cublasLtMatrixLayoutCreate", error))
        };
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)
                .map_err(|error| failed("cublasLtMatmulDescCreate", error))?;
        // As column-major matrices: b' [n, k], a' [k, m], d' [n, m].
        let mut plan = Plan {
            description,
            layouts: [
                layout(CUDA_R_16BF, stored(k, n, key.transposed.1))?,
                layout(CUDA_R_16BF, stored(m, k, key.transposed.0))?,
                layout(data, (n, m))?,
            ],
            // SAFETY: plain bytes, overwritten below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        // SAFETY: the objects are alive, and every attribute is given a value of its type and size.
        unsafe {
            for (attribute, transposed) in [
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, key.transposed.1),
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, key.transposed.0),
            ] {
                let operation = i32::from(transposed);
                let value = std::ptr::from_ref(&operation).cast();
                result::set_matmul_desc_attribute(plan.description, attribute, value, 4)
                    .map_err(|error| failed("cublasLtMatmulDescSetAttribute", error))?;
            }
            let preference = result::create_matmul_pref()
                .map_err(|error| failed("cublasLtMatmulPreferenceCreate", error))?;
            let set = |attribute, value: *const c_void, size| {
                result::set_matmul_pref_attribute(preference, attribute, value, size)
            };
            let bytes = WORKSPACE_BYTES;
            let mut outcome = set(
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&bytes).cast(),
                size_of::<usize>(),
            );
            for (attribute, alignment) in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ]
            .into_iter()
            .zip(&key.alignments)
            {
                outcome = outcome.and_then(|()| {
                    set(attribute, std::ptr::from_ref(alignment).cast(), size_of::<u32>())
                });
            }
            let [first, second, third] = plan.layouts;
            let found = outcome.and_then(|()| {
                result::get_matmul_algo_heuristic(
                    self.handle,
                    plan.description,
                    first,
                    second,
                    third,
                    third,
                    preference,
                )
            });
            let _ = result::destroy_matmul_pref(preference);
            plan.algorithm =
                found.map_err(|error| failed("cublasLtMatmulAlgoGetHeuristic", error))?.algo;
        }
        Ok(plan)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle was created and is destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(what: &'static str, error: result::CublasError) -> CudaError {
    CudaError::Driver { what, reason: error.to_string() }
}
