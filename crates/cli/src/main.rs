//! `mmfree`: the command line. Arguments and glue only; everything else lives in the libraries.
#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mmfree::error::Error;

mod accel;
mod bench;
mod chat;
mod eval;
mod generate;
mod gradients;
mod info;
mod interrupt;
mod logits;
mod model_arg;
mod pack;
mod plot;
mod processes;
mod progress;
mod prompt;
mod sampling_args;
mod scaling;
mod serve;
mod state_file;
mod streamed_text;
mod token_ids;
mod tokenize;
mod tokenizer;
mod train;

/// Run, pack and inspect MatMul-free language models
///
/// Their weights are -1, 0 and 1, and they remember a text in a state of constant size, so that a text
/// can be of any length. Where a command takes MODEL it may be left out: a small trained model is part
/// of this program.
///
/// Results go to standard output, everything else to standard error. Exit codes: 0 fine, 1 the answer is
/// no, 2 an error, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "mmfree", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(generate::Args),
    Chat(chat::Args),
    Serve(serve::Args),
    Logits(logits::Args),
    Gradients(gradients::Args),
    Pack(pack::Args),
    Info(info::Args),
    Bench(bench::Args),
    Eval(eval::Args),
    Train(train::Args),
    Accel(accel::Args),
    Tokenize(tokenize::Args),
    Tokenizer(tokenizer::Args),
    Plot(plot::Args),
    Scaling(scaling::Args),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Gradients(args) => gradients::run(&args),
        Command::Pack(args) => pack::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Accel(args) => accel::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Tokenizer(args) => tokenizer::run(&args),
        Command::Plot(args) => plot::run(&args),
        Command::Scaling(args) => scaling::run(&args),
    };
    result.unwrap_or_else(|error| report(&error))
}

/// Prints an error with its causes and chooses the exit code. A reader of our output that has seen
/// enough is no error.
fn report(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref() {
        Some(Error::Write { reason, .. }) if reason.kind() == ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Some(Error::Cancelled) => interrupt::EXIT_CODE.into(),
        _ => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
