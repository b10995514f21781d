//! NCCL's functions, loaded at first use.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
pub(super) use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use libloading::Library;

use crate::cuda::CudaError;

/// Names under which the library is installed; packages bring the first only.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclFloat32` of `nccl.h`.
pub(super) const FLOAT: c_int = 7;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// What `nccl.h` declares. Results are plain integers: a later library may have more of them than an enumeration here.
pub(super) struct Nccl {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int,
    pub destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub send:
        unsafe extern "C" fn(*const c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    pub receive:
        unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    pub group_start: unsafe extern "C" fn() -> c_int,
    pub group_end: unsafe extern "C" fn() -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    /// Keeps the functions loaded.
    _library: Library,
}

impl Nccl {
    /// The library, loaded at the first call.
    pub fn get() -> Result<&'static Self, CudaError> {
        static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let loaded = NCCL.get_or_init(Self::load);
        loaded.as_ref().map_err(|reason| CudaError::NoNccl { reason: reason.clone() })
    }

    fn load() -> Result<Self, String> {
        let mut reasons = Vec::new();
        for name in NAMES {
            // SAFETY: NVIDIA's library has no requirements for being loaded.
            match unsafe { Library::new(name) } {
                // SAFETY: the symbols have the types that `nccl.h` declares since version 2.13.
                Ok(library) => return unsafe { Self::resolve(library) }.map_err(|e| e.to_string()),
                Err(reason) => reasons.push(reason.to_string()),
            }
        }
        Err(reasons.join("; "))
    }

    /// # Safety
    /// The library must be NCCL.
    unsafe fn resolve(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the caller's promise; the fields' types are those of the declarations.
        unsafe {
            Ok(Self {
                get_version: *library.get(b"ncclGetVersion\0")?,
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                init_rank: *library.get(b"ncclCommInitRank\0")?,
                destroy: *library.get(b"ncclCommDestroy\0")?,
                abort: *library.get(b"ncclCommAbort\0")?,
                async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                send: *library.get(b"ncclSend\0")?,
                receive: *library.get(b"ncclRecv\0")?,
                group_start: *library.get(b"ncclGroupStart\0")?,
                group_end: *library.get(b"ncclGroupEnd\0")?,
                error_string: *library.get(b"ncclGetErrorString\0")?,
                last_error: *library.get(b"ncclGetLastError\0")?,
                _library: library,
            })
        }
    }

    /// Major, minor and patch.
    pub fn version(&self) -> (c_int, c_int, c_int) {
        let mut code = 0;
        // SAFETY: the pointer is to a live integer.
        if unsafe { (self.get_version)(&mut code) } != SUCCESS {
            code = 0;
        }
        (code / 10_000, code / 100 % 100, code % 100)
    }

    /// A name of a new group, for all its members.
    pub fn unique_id(&self) -> Result<ncclUniqueId, CudaError> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: the pointer is to a live structure.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", code)?;
        Ok(id)
    }

    /// Joins a group with the device that is current. Waits for all members.
    pub fn join(
        &self,
        id: ncclUniqueId,
        rank: usize,
        world_size: usize,
    ) -> Result<ncclComm_t, CudaError> {
        let mut communicator = std::ptr::null_mut();
        let count = |n: usize| c_int::try_from(n).unwrap_or(c_int::MAX);
        // SAFETY: the pointer is to a live pointer.
        let code =
            unsafe { (self.init_rank)(&mut communicator, count(world_size), id, count(rank)) };
        self.check("ncclCommInitRank", code)?;
        Ok(communicator)
    }

    /// The failure of earlier exchanges, if there was one.
    ///
    /// # Safety
    /// The communicator must be alive.
    pub unsafe fn check_earlier(&self, communicator: ncclComm_t) -> Result<(), CudaError> {
        let mut earlier = SUCCESS;
        // SAFETY: the caller's promise; the pointer is to a live integer.
        let code = unsafe { (self.async_error)(communicator, &mut earlier) };
        self.check("ncclCommGetAsyncError", code)?;
        self.check("an exchange", earlier)
    }

    /// A code as a result.
    pub fn check(&self, what: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let text = |pointer: *const c_char| {
            if pointer.is_null() {
                return String::new();
            }
            // SAFETY: NCCL returns text that ends with a zero and lives until the next call of this thread.
            unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
        };
        // SAFETY: both take any value; without a communicator the last error is the thread's.
        let (name, details) = unsafe {
            (text((self.error_string)(code)), text((self.last_error)(std::ptr::null_mut())))
        };
        let reason = if details.is_empty() { name } else { format!("{name} ({details})") };
        Err(CudaError::Nccl { what, reason })
    }
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nccl").field("version", &self.version()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `MMFREE_REQUIRE_NCCL` demands the library, for which no GPU is needed.
    #[test]
    fn the_library_has_every_function_or_its_absence_is_explained() {
        match Nccl::get() {
            Ok(nccl) => {
                let version = nccl.version();
                println!("NCCL {version:?}");
                assert!(version >= (2, 13, 0), "{version:?}");
                let error = nccl.check("a test", 4).unwrap_err().to_string();
                assert!(error.starts_with("NCCL, a test: invalid argument"), "{error}");
            }
            Err(reason) => {
                let reason = reason.to_string();
                assert!(std::env::var_os("MMFREE_REQUIRE_NCCL").is_none(), "{reason}");
                assert!(reason.contains("libnccl.so.2") && reason.contains("LD_LIBRARY_PATH"));
            }
        }
    }
}
