//! CUDA C++ to machine code, by NVRTC, with a cache on disk.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::hash::Hasher;
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{Ptx, result, sys};
use twox_hash::XxHash3_64;

use super::{COMMON, Constant, CudaError, Source};

/// Environment variable: folder of the cache; empty switches it off.
const CACHE_VARIABLE: &str = "MMFREE_CUDA_CACHE";
/// Environment variable: architecture to compile for, as in `sm_90a` or `compute_80`, instead of the device's.
pub(super) const ARCHITECTURE_VARIABLE: &str = "MMFREE_CUDA_ARCH";
/// Option of NVRTC 13.
const NO_CACHE: &str = "--no-cache";
/// Begins a cached file; followed by the code's length and its XXH3.
const MAGIC: [u8; 8] = *b"MMFCUDA1";

/// What every module is compiled with.
fn options(source: Source) -> [&'static str; 2] {
    ["--std=c++17", if source.contracts { "--fmad=true" } else { "--fmad=false" }]
}

/// A compiled module.
#[derive(Debug)]
pub struct Compiled {
    /// Machine code for `sm_` architectures, otherwise PTX.
    pub code: Vec<u8>,
    /// What compiler and assembler say, with registers and spills of each kernel.
    pub log: String,
}

/// Whether NVRTC can be loaded.
pub fn is_compiler_present() -> bool {
    // SAFETY: looks for a library by its well-known names.
    unsafe { sys::is_culib_present() }
}

/// Compiles a module for an architecture: `sm_90a` gives machine code, `compute_80` PTX. Always anew: NVRTC 13 may keep what
/// it has compiled, but not what it had to say about it.
///
/// # Errors
/// No compiler, or its complaints.
pub fn compile_for(source: Source, architecture: &str) -> Result<Compiled, CudaError> {
    compile_with(source, &[], architecture)
}

/// As [`compile_for`], for some sizes.
pub(crate) fn compile_with(
    source: Source,
    constants: &[Constant],
    architecture: &str,
) -> Result<Compiled, CudaError> {
    compile(source, constants, architecture, Some(NO_CACHE))
        // Older compilers keep nothing and do not know the option.
        .or_else(|_| compile(source, constants, architecture, None))
}

fn compile(
    source: Source,
    constants: &[Constant],
    architecture: &str,
    option: Option<&str>,
) -> Result<Compiled, CudaError> {
    if !is_compiler_present() {
        return Err(CudaError::NoCompiler { kernel: source.name });
    }
    let failed = |log: String| CudaError::Compile {
        kernel: source.name,
        target: architecture.to_owned(),
        log,
    };
    let text = CString::new([COMMON, source.text].concat()).map_err(|e| failed(e.to_string()))?;
    let name = CString::new(format!("{}.cu", source.name)).map_err(|e| failed(e.to_string()))?;
    let program = Program(
        result::create_program(&text, Some(&name)).map_err(|error| failed(error.to_string()))?,
    );
    let mut options: Vec<String> = options(source).map(str::to_owned).into();
    options.extend(constants.iter().map(define));
    options.push(format!("--gpu-architecture={architecture}"));
    options.push("--ptxas-options=-v".to_owned());
    options.extend(option.map(str::to_owned));
    // SAFETY: the program is alive.
    let outcome = unsafe { result::compile_program(program.0, &options) };
    // SAFETY: the program is alive and was compiled; the log ends with a zero byte.
    let log = unsafe { result::get_program_log(program.0) }.map_or_else(
        |_| String::new(),
        |log| {
            let bytes: Vec<u8> =
                log.iter().map(|c| c.to_ne_bytes()[0]).take_while(|&c| c != 0).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        },
    );
    if let Err(error) = outcome {
        return Err(failed(format!("{error}\n{log}")));
    }
    let code = if architecture.starts_with("sm_") {
        let mut size = 0;
        // SAFETY: the program is alive and was compiled; the buffer has the size that it asks for.
        unsafe {
            sys::nvrtcGetCUBINSize(program.0, &mut size)
                .result()
                .map_err(|error| failed(error.to_string()))?;
            let mut code = vec![0u8; size];
            sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>())
                .result()
                .map_err(|error| failed(error.to_string()))?;
            code
        }
    } else {
        // SAFETY: the program is alive and was compiled.
        let text = unsafe { result::get_ptx(program.0) };
        let text = text.map_err(|error| failed(error.to_string()))?;
        text.iter().map(|c| c.to_ne_bytes()[0]).collect()
    };
    Ok(Compiled { code, log })
}

fn define(&(name, value): &Constant) -> String {
    format!("--define-macro={name}={value}")
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and is destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// The module for a device, from the cache if it is there.
pub(super) fn load(
    source: Source,
    constants: &[Constant],
    capability: (i32, i32),
    driver_version: i32,
) -> Result<Ptx, CudaError> {
    // What only one architecture has cannot be compiled for another: it would be empty there.
    let architecture = std::env::var(ARCHITECTURE_VARIABLE).ok().filter(|_| !source.hopper_only);
    let architecture = architecture.unwrap_or_else(|| architecture_of(source, capability));
    let file = cache_folder().map(|folder| {
        let key = cache_key(source, constants, &architecture, driver_version);
        folder.join(format!("{}-{architecture}-{key:016x}.bin", source.name))
    });
    if let Some(code) = file.as_deref().and_then(read_cached) {
        return Ok(to_image(&architecture, code));
    }
    let compiled = compile(source, constants, &architecture, None)?;
    if let Some(file) = file {
        // A cache that cannot be written costs time, not results.
        let _ = write_cached(&file, &compiled.code);
    }
    Ok(to_image(&architecture, compiled.code))
}

fn to_image(architecture: &str, code: Vec<u8>) -> Ptx {
    if architecture.starts_with("sm_") {
        return Ptx::from_binary(code);
    }
    let text = CStr::from_bytes_until_nul(&code).map(|text| text.to_string_lossy().into_owned());
    Ptx::from_src(text.unwrap_or_else(|_| String::from_utf8_lossy(&code).into_owned()))
}

/// The device's own architecture if the compiler knows it, otherwise PTX for the latest one before it.
fn architecture_of(source: Source, (major, minor): (i32, i32)) -> String {
    let own = major * 10 + minor;
    if own == 90 {
        return "sm_90a".to_owned();
    }
    let known = supported_architectures();
    if known.is_empty() || known.contains(&own) {
        return format!("sm_{own}");
    }
    let latest = known.into_iter().filter(|&known| known <= own).max().unwrap_or(80);
    debug_assert!(!source.hopper_only);
    format!("compute_{latest}")
}

fn supported_architectures() -> Vec<i32> {
    if !is_compiler_present() {
        return Vec::new();
    }
    let mut count = 0;
    // SAFETY: the buffer has the size that the first call asks for.
    unsafe {
        if sys::nvrtcGetNumSupportedArchs(&mut count).result().is_err() {
            return Vec::new();
        }
        let mut known = vec![0; count.max(0) as usize];
        if sys::nvrtcGetSupportedArchs(known.as_mut_ptr()).result().is_err() {
            return Vec::new();
        }
        known
    }
}

/// A hash of everything that the code depends on.
fn cache_key(
    source: Source,
    constants: &[Constant],
    architecture: &str,
    driver_version: i32,
) -> u64 {
    let mut hash = XxHash3_64::with_seed(0);
    for part in [COMMON, source.text, architecture].into_iter().chain(options(source)) {
        hash.write(part.as_bytes());
        hash.write(&[0]);
    }
    for constant in constants {
        hash.write(define(constant).as_bytes());
        hash.write(&[0]);
    }
    hash.write(&driver_version.to_le_bytes());
    hash.finish()
}

fn cache_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os(CACHE_VARIABLE) {
        return (!folder.is_empty()).then(|| folder.into());
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))?;
    Some(base.join("mmfree").join("cuda"))
}

/// The code in a cached file, if it is whole.
fn read_cached(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let (hash, code) = rest.split_first_chunk::<8>()?;
    let is_whole = *magic == MAGIC
        && u64::from_le_bytes(*length) == code.len() as u64
        && u64::from_le_bytes(*hash) == XxHash3_64::oneshot(code);
    is_whole.then(|| code.to_vec())
}

/// Writes a cached file beside its name and then renames it, so that no reader sees a part.
fn write_cached(file: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut part = tempfile::NamedTempFile::new_in(folder)?;
    part.write_all(&MAGIC)?;
    part.write_all(&(code.len() as u64).to_le_bytes())?;
    part.write_all(&XxHash3_64::oneshot(code).to_le_bytes())?;
    part.write_all(code)?;
    part.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_is_not_used() {
        let folder = tempfile::tempdir().expect("folder");
        let file = folder.path().join("sub").join("kernel.bin");
        write_cached(&file, b"code").expect("writes");
        assert_eq!(read_cached(&file).as_deref(), Some(&b"code"[..]));
        let mut bytes = fs::read(&file).expect("reads");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(&file, &bytes).expect("writes");
        assert_eq!(read_cached(&file), None);
        bytes.truncate(10);
        fs::write(&file, &bytes).expect("writes");
        assert_eq!(read_cached(&file), None);
    }

    #[test]
    fn the_key_depends_on_source_constants_architecture_and_driver() {
        let source = |text| Source { name: "probe", text, hopper_only: false, contracts: false };
        let keys = [
            cache_key(source("a"), &[], "sm_80", 13000),
            cache_key(source("b"), &[], "sm_80", 13000),
            cache_key(source("a"), &[], "sm_90a", 13000),
            cache_key(source("a"), &[], "sm_80", 13010),
            cache_key(source("a"), &[("N", 1)], "sm_80", 13000),
            cache_key(source("a"), &[("N", 2)], "sm_80", 13000),
        ];
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[..at].contains(key));
        }
    }
}
