//! The RTL, built and run by Verilator.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use mmfree_accel::config::Configuration;
use mmfree_accel::image::Image;

/// The RTL of one configuration as a program.
#[derive(Clone)]
pub struct Rtl {
    program: PathBuf,
    mutation: usize,
}

/// What a run printed.
#[derive(Debug)]
pub struct Outcome {
    pub report: serde_json::Value,
    pub trace: String,
    /// State dump, if the run did not end.
    pub errors: String,
    pub exit_code: i32,
}

/// The Verilator to use: `VERILATOR`, else the one on the PATH. `None`, with a loud word, if there is none;
/// an error if `MMFREE_REQUIRE_VERILATOR` is set.
pub fn verilator() -> Option<PathBuf> {
    let name = std::env::var_os("VERILATOR").map_or_else(|| "verilator".into(), PathBuf::from);
    if Command::new(&name).arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Some(name);
    }
    assert!(
        std::env::var_os("MMFREE_REQUIRE_VERILATOR").is_none(),
        "MMFREE_REQUIRE_VERILATOR is set, but {} does not run",
        name.display()
    );
    println!("!!! SKIPPED: no Verilator (set VERILATOR to its path)");
    None
}

pub fn hardware() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../hw").canonicalize().unwrap()
}

/// One build at a time; tests that want the same one share it.
static BUILT: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Builds the RTL of a configuration, which its name stands for.
pub fn build(verilator: &Path, configuration: &Configuration) -> Rtl {
    build_once(verilator, &hardware().join("rtl"), &configuration.name, configuration, &[])
}

/// Builds a copy of the RTL with faults in it.
pub fn build_mutated(verilator: &Path, rtl: &Path, configuration: &Configuration) -> Rtl {
    build_once(verilator, rtl, "faults", configuration, &[rtl.join("mmfree_mutation_pkg.sv")])
}

fn build_once(
    verilator: &Path,
    rtl: &Path,
    name: &str,
    c: &Configuration,
    packages: &[PathBuf],
) -> Rtl {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rtl-{name}"));
    let result = Rtl { program: target.join("Vmmfree_tb"), mutation: 0 };
    let mut built = BUILT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if built.iter().any(|done| done == name) {
        return result;
    }
    let sizes = [
        ("Cores", "CORES", c.cores),
        ("WeightBytes", "WEIGHT_BYTES", c.weight_bytes),
        ("RowLanes", "ROW_LANES", c.row_lanes),
        ("VectorWords", "VECTOR_WORDS", c.vector_words),
        ("ActivationBytes", "ACTIVATION_BYTES", c.activation_bytes),
        ("FifoBeats", "FIFO_BEATS", c.fifo_beats),
        ("BurstBeats", "BURST_BEATS", c.burst_beats),
    ];
    let mut command = verilate(verilator, &target, rtl, "mmfree_tb", packages);
    command.arg(hardware().join("dv/tb_main.cpp"));
    for (parameter, define, value) in sizes {
        command
            .arg(format!("-G{parameter}={value}"))
            .arg("-CFLAGS")
            .arg(format!("-D{define}={value}"));
    }
    finish(command);
    built.push(name.to_owned());
    result
}

/// Builds the bench of single modules from a copy of the RTL with faults in it.
pub fn build_units(verilator: &Path, rtl: &Path) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rtl-units");
    let _one_at_a_time = BUILT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let package = rtl.join("mmfree_mutation_pkg.sv");
    let mut command = verilate(verilator, &target, rtl, "mmfree_units_tb", &[package]);
    command.arg(hardware().join("dv/units_main.cpp"));
    finish(command);
    target.join("Vmmfree_units_tb")
}

/// Verilator with everything but the C++ program.
fn verilate(
    verilator: &Path,
    target: &Path,
    rtl: &Path,
    top: &str,
    packages: &[PathBuf],
) -> Command {
    let dv = hardware().join("dv");
    let mut command = Command::new(verilator);
    command
        .args(["--cc", "--exe", "--build", "-j", "2", "-O3"])
        .args(["--x-assign", "fast", "--x-initial", "fast"])
        .args(["--assert", "-DMMFREE_ASSERTIONS", "--no-timing", "-Wno-fatal"])
        .args(["--top-module", top, "-CFLAGS", "-O1 -std=c++17"])
        // PyPI's package leaves this unset: GCC then takes the precompiled header for a file to link.
        .args(["-MAKEFLAGS", "CFG_CXXFLAGS_PCH_I=-include"])
        .arg("--Mdir")
        .arg(target)
        .arg("-y")
        .arg(rtl)
        .arg("-y")
        .arg(&dv)
        .arg(hardware().join("lint/verilator.vlt"));
    if !packages.is_empty() {
        command.arg("-DMMFREE_MUTATIONS").args(packages);
    }
    command
        .arg(rtl.join("mmfree_pkg.sv"))
        .arg(rtl.join("mmfree_row_pkg.sv"))
        .arg(dv.join(format!("{top}.sv")));
    command
}

fn finish(mut command: Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "Verilator failed:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Rtl {
    /// The same with a fault of [`crate::mutations`].
    pub fn with_mutation(&self, mutation: usize) -> Self {
        Self { mutation, ..self.clone() }
    }

    /// Runs what may be no image at all; the exit code.
    pub fn run_bytes(&self, image: &[u8]) -> Option<i32> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("image.mma");
        std::fs::write(&file, image).unwrap();
        let mut command = Command::new(&self.program);
        command.arg("--image").arg(&file).args(["--tokens", "0"]);
        command.output().unwrap().status.code()
    }

    /// Runs an image for these tokens.
    pub fn run(
        &self,
        image: &Image,
        tokens: &[u32],
        options: &[(&str, u64)],
        traced: bool,
    ) -> Outcome {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("image.mma");
        let trace = directory.path().join("trace.txt");
        image.write(&file).unwrap();
        let tokens: Vec<_> = tokens.iter().map(u32::to_string).collect();
        let mut command = Command::new(&self.program);
        command.arg("--image").arg(&file).arg("--tokens").arg(tokens.join(","));
        command.arg("--mutation").arg(self.mutation.to_string());
        for (name, value) in options {
            command.arg(name).arg(value.to_string());
        }
        if traced {
            command.arg("--trace").arg(&trace);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let exit_code = output.status.code().unwrap_or(-1);
        let report = serde_json::from_str(text.trim()).unwrap_or_else(|error| {
            panic!(
                "the test bench printed {text:?} ({error}), {}",
                String::from_utf8_lossy(&output.stderr)
            )
        });
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let trace = std::fs::read_to_string(&trace).unwrap_or_default();
        Outcome { report, trace, errors, exit_code }
    }
}

/// Where two traces part: line number and both lines.
pub fn first_difference(ours: &str, theirs: &str) -> Option<(usize, String, String)> {
    let (mut ours, mut theirs) = (ours.lines(), theirs.lines());
    for line in 1.. {
        match (ours.next(), theirs.next()) {
            (None, None) => return None,
            (a, b) if a == b => {}
            (a, b) => {
                return Some((line, a.unwrap_or("nothing").into(), b.unwrap_or("nothing").into()));
            }
        }
    }
    None
}
