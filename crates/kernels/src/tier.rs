//! Kernel tiers: which instructions the kernels may use, decided at run time.

use std::fmt;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Whatever the target guarantees; runs everywhere.
    Scalar,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// x86-64 with the same and VBMI, which looks bytes up in a register.
    Avx512Vbmi,
    /// x86-64 with the same, GFNI, and AMX: tiles of 8-bit integers. On Linux.
    Amx,
    /// AArch64 with NEON and its dot products.
    Neon,
}

/// A tier was asked for that does not exist, or that this processor cannot run.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// No tier has this name.
    #[error(
        "unknown backend '{0}'; expected one of auto, cpu, scalar, avx2, avx512, avx512vbmi, amx, neon"
    )]
    Unknown(String),
    /// The processor lacks the instructions.
    #[error("backend '{wanted}' does not run on this processor; it offers {available}")]
    Unavailable {
        /// The tier asked for.
        wanted: Tier,
        /// The tiers that would run, separated by commas.
        available: String,
    },
}

impl Tier {
    /// Every tier, slowest first.
    pub const ALL: [Tier; 6] =
        [Tier::Scalar, Tier::Avx2, Tier::Avx512, Tier::Avx512Vbmi, Tier::Amx, Tier::Neon];

    /// The name that `--backend` takes.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Scalar => "scalar",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
            Tier::Avx512Vbmi => "avx512vbmi",
            Tier::Amx => "amx",
            Tier::Neon => "neon",
        }
    }

    /// Whether this processor can run the tier.
    pub fn is_available(self) -> bool {
        match self {
            Tier::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Vbmi => {
                Tier::Avx512.is_available() && is_x86_feature_detected!("avx512vbmi")
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Tier::Amx => {
                Tier::Avx512Vbmi.is_available()
                    && is_x86_feature_detected!("gfni")
                    && tiles::are_usable()
            }
            #[cfg(target_arch = "aarch64")]
            Tier::Neon => {
                std::arch::is_aarch64_feature_detected!("neon")
                    && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The tiers that this processor can run, slowest first.
    pub fn available() -> impl Iterator<Item = Tier> {
        Self::ALL.into_iter().filter(|tier| tier.is_available())
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tier that is known to run here: kernels take it as the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend(Tier);

impl Backend {
    /// The fastest tier of this processor.
    pub fn detect() -> Self {
        Self(Tier::available().last().unwrap_or(Tier::Scalar))
    }

    /// A given tier.
    ///
    /// # Errors
    /// [`TierError::Unavailable`] if the processor lacks its instructions.
    pub fn new(tier: Tier) -> Result<Self, TierError> {
        if tier.is_available() {
            return Ok(Self(tier));
        }
        let available = Tier::available().map(Tier::name).collect::<Vec<_>>().join(", ");
        Err(TierError::Unavailable { wanted: tier, available })
    }

    /// A tier by its name; `auto` and `cpu` are the fastest.
    ///
    /// # Errors
    /// An unknown name, or a tier that this processor lacks.
    pub fn from_name(name: &str) -> Result<Self, TierError> {
        if matches!(name, "auto" | "cpu") {
            return Ok(Self::detect());
        }
        let tier = Tier::ALL.into_iter().find(|tier| tier.name() == name);
        Self::new(tier.ok_or_else(|| TierError::Unknown(name.to_owned()))?)
    }

    /// The tier.
    pub fn tier(self) -> Tier {
        self.0
    }
}

/// Tile registers (AMX): the processor has them, the system saves them, and this process may use them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    use std::sync::OnceLock;

    /// CPUID leaf 7, EDX: AMX-TILE and AMX-INT8.
    const FEATURES: u32 = 1 << 24 | 1 << 25;
    /// The parts of a thread's state that hold the tiles' configuration and data.
    const STATES: u64 = 1 << 17 | 1 << 18;
    const SYS_ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    /// The number of the state for which Linux wants to be asked.
    const TILE_DATA: usize = 18;

    /// Asks once for the whole process.
    pub fn are_usable() -> bool {
        static USABLE: OnceLock<bool> = OnceLock::new();
        *USABLE.get_or_init(|| is_supported() && request_permission())
    }

    /// Wants a processor with AVX2, which has leaf 7 and whose system has enabled XGETBV.
    fn is_supported() -> bool {
        #[target_feature(enable = "xsave")]
        fn enabled_states() -> u64 {
            // SAFETY: register 0 exists wherever the instruction does.
            unsafe { _xgetbv(0) }
        }
        #[allow(unused_unsafe)] // Safe since Rust 1.93.
        // SAFETY: leaf 7 exists, by the demand above.
        let has_features = unsafe { __cpuid_count(7, 0) }.edx & FEATURES == FEATURES;
        // SAFETY: the system has enabled XGETBV, by the demand above.
        has_features && unsafe { enabled_states() } & STATES == STATES
    }

    /// Linux reserves room for the tiles' state in threads and signal frames only for those who ask.
    fn request_permission() -> bool {
        let status: isize;
        // SAFETY: a system call that reads no memory of this process; `syscall` overwrites RCX and R11.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") SYS_ARCH_PRCTL => status,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") TILE_DATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        status == 0
    }
}

/// Defines a function that runs one `#[inline(always)]` body, compiled once for each tier.
///
/// The body is ordinary Rust over fixed-width lane arrays, so every tier performs the same
/// floating-point operations in the same order and gives the same bits; only the width of the
/// instructions differs. Rust never contracts `a * b + c` into a fused operation by itself.
macro_rules! compiled_for_each_tier {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(backend: $crate::tier::Backend, $($arg: $ty),*) $(-> $ret)? {
            match backend.tier() {
                #[cfg(target_arch = "x86_64")]
                $crate::tier::Tier::Avx512
                | $crate::tier::Tier::Avx512Vbmi
                | $crate::tier::Tier::Amx => {
                    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
                    #[allow(clippy::too_many_arguments)]
                    fn run($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                    // SAFETY: a `Backend` of this tier exists only where its features were detected.
                    unsafe { run($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::tier::Tier::Avx2 => {
                    #[target_feature(enable = "avx2")]
                    #[allow(clippy::too_many_arguments)]
                    fn run($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                    // SAFETY: a `Backend` of this tier exists only where its features were detected.
                    unsafe { run($($arg),*) }
                }
                // NEON is part of every AArch64 target, so there the plain body is the NEON one.
                _ => $body($($arg),*),
            }
        }
    };
}
pub(crate) use compiled_for_each_tier;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for tier in Tier::available() {
            assert_eq!(Backend::from_name(tier.name()).unwrap().tier(), tier);
        }
        assert!(matches!(Backend::from_name("sse9"), Err(TierError::Unknown(_))));
        assert!(Tier::ALL.iter().any(|tier| Backend::new(*tier).is_err()), "no CPU runs all tiers");
    }
}
