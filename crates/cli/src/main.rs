//! `mmfree`: the command line. Arguments and glue only; everything else lives in the libraries.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod info;
mod pack;
mod progress;

/// MatMul-free language models
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Pack(pack::Args),
    Info(info::Args),
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Pack(args) => pack::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}
