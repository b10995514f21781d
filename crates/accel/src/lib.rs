//! An accelerator for MatMul-free language models: instruction set, assembler, compiler, simulator.
//!
//! | module | holds |
//! |---|---|
//! | [`isa`] | instructions and their encoding: the single source of `docs/isa.md` and of the RTL's package |
//! | [`arith`] | arithmetic, to the bit |
//! | [`config`] | [`Configuration`](config::Configuration): sizes of one accelerator; packing of trits |
//! | [`asm`] | assembler and disassembler |
//! | [`image`] | program images: files of a program and its memories |
//! | [`compiler`] | a model to a program image |
//! | [`machine`] | [`Machine`](machine::Machine): the functional simulator |
//! | [`generate`] | the host's part: tokens in, tokens out |
//! | [`compare`] | the accelerator beside the float engine |
//! | [`package`] | writes the SystemVerilog package |
//! | [`trace`] | digests of the state, for comparison with the RTL |
//! | [`timing`] | cycles of a program |
//! | [`energy`] | joules of a run, with the range of the estimate |
//! | [`report`] | a model on a board: speed, bandwidth, power |
//! | [`error`] | [`Error`](error::Error), the one error type of this crate |
//!
//! Letters: D hidden size, F intermediate size, L layers, V vocabulary; N rows and K columns of a matrix.
#![forbid(unsafe_code)]

pub mod arith;
pub mod asm;
pub mod compare;
pub mod compiler;
pub mod config;
pub mod energy;
pub mod error;
pub mod generate;
pub mod image;
pub mod isa;
pub mod machine;
pub mod package;
pub mod report;
pub mod timing;
pub mod trace;
