//! `mmfree accel asm`, `disasm` and `package`: programs as text, and the RTL's package.

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use mmfree::output::OutputFile;
use mmfree_accel::asm;
use mmfree_accel::image::{Image, PAGE, Region, Shape};
use mmfree_accel::package;

use super::HardwareArgs;
use crate::streamed_text::print;

/// Assemble a program
///
/// Writes a program image with zeroed data memory and no weights. docs/isa.md has the instructions.
#[derive(Debug, clap::Args)]
pub struct AsmArgs {
    /// Text of the program
    source: PathBuf,
    /// File to write; without it the text is only checked
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Bytes of data memory
    #[arg(long, value_name = "BYTES", default_value_t = 65_536, value_parser = clap::value_parser!(u64).range(..=1 << 28))]
    data_bytes: u64,
    #[command(flatten)]
    hardware: HardwareArgs,
}

/// Assembles.
pub fn assemble(args: &AsmArgs) -> Result<ExitCode> {
    let file = args.source.display().to_string();
    let text =
        std::fs::read_to_string(&args.source).with_context(|| format!("cannot read {file}"))?;
    let program = match asm::assemble(&file, &text) {
        Ok(program) => program,
        Err(error) => {
            // Every place at once, with its line; the plain error of other commands has no room for that.
            let theme = match stderr().is_terminal() {
                true => miette::GraphicalTheme::unicode(),
                false => miette::GraphicalTheme::none(),
            };
            let mut report = String::new();
            miette::GraphicalReportHandler::new_themed(theme)
                .render_report(&mut report, &*error)
                .context("cannot format the errors")?;
            eprintln!("error: {} in {file}", count(error.problems().len()));
            // For editors, a line each; then for readers, in the text.
            for problem in error.problems() {
                let (line, column) = asm::position(&text, problem.span.start);
                eprintln!("{file}:{line}:{column}: {}", problem.message);
            }
            eprint!("{report}");
            return Ok(ExitCode::from(2));
        }
    };
    let configuration = args.hardware.configuration()?;
    if let Some(path) = &args.output {
        let streams = vec![Vec::new(); configuration.cores as usize];
        let image = Image {
            configuration,
            packing: args.hardware.packing(),
            shape: Shape::default(),
            program,
            data: Vec::new(),
            data_bytes: args.data_bytes.next_multiple_of(PAGE),
            streams,
            state: Region::default(),
            logits: Region::default(),
        };
        image.write(path)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn count(errors: usize) -> String {
    if errors == 1 { "one error".to_owned() } else { format!("{errors} errors") }
}

/// Print the program of an image as assembly
#[derive(Debug, clap::Args)]
pub struct DisasmArgs {
    /// Program image
    image: PathBuf,
}

/// Disassembles.
pub fn disassemble(args: &DisasmArgs) -> Result<ExitCode> {
    let image = Image::read(&args.image)?;
    print(&asm::listing(&image.program))?;
    Ok(ExitCode::SUCCESS)
}

/// Write the SystemVerilog package that the RTL shares with this program
#[derive(Debug, clap::Args)]
pub struct PackageArgs {
    /// File to write [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the package.
pub fn package(args: &PackageArgs) -> Result<ExitCode> {
    let text = package::system_verilog();
    match &args.output {
        None => print(&text)?,
        Some(path) => {
            let mut file = OutputFile::create(path)?;
            file.put(text.as_bytes())?;
            file.commit()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
