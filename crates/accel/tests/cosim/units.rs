//! Benches of single modules: random and corner inputs beside the simulator's arithmetic.

use mmfree_accel::arith::Scale;

use crate::Random;
use crate::bench::Bench;

/// `Err` says what is wrong.
type Outcome = Result<(), String>;
/// A module, its number in `mmfree_units_tb.sv`, and its bench.
pub type Unit = (&'static str, u8, fn(&mut Bench, &mut Random) -> Outcome);

/// Every module but the top, which whole programs test.
pub const ALL: [Unit; 14] = [
    ("round", 0, arithmetic::round),
    ("trits", 1, arithmetic::trits),
    ("tree", 2, arithmetic::tree),
    ("vectors", 3, arithmetic::vectors),
    ("fifo", 4, arithmetic::fifo),
    ("lane", 5, arithmetic::lane),
    ("rms", 6, arithmetic::rms),
    ("row", 7, arithmetic::row),
    ("ternary", 8, streams::ternary),
    ("reader", 9, streams::reader),
    ("data", 10, streams::data),
    ("writeback", 11, streams::writeback),
    ("core", 12, streams::core),
    ("control", 13, streams::control),
];

macro_rules! ensure {
    ($condition:expr, $($what:tt)*) => {
        if !$condition {
            return Err(format!($($what)*));
        }
    };
}

mod arithmetic;
mod streams;

fn word(value: i32) -> u128 {
    u128::from(value as u32)
}

fn scale_bits(scale: Scale) -> u128 {
    u128::from(scale.mantissa) << 6 | u128::from(scale.exponent)
}

fn random_scale(random: &mut Random) -> Scale {
    match random.below(6) {
        0 => Scale { mantissa: 1, exponent: 0 },
        1 => Scale { mantissa: (1 << 31) - 1, exponent: random.below(64) as u32 },
        _ => Scale {
            mantissa: random.next() as u32 & 0x7fff_ffff,
            exponent: 20 + random.below(30) as u32,
        },
    }
}
