//! `mmfree`: the command line. Arguments and glue only; everything else lives in the libraries.
#![forbid(unsafe_code)]

fn main() {}
