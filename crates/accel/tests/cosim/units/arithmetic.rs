//! Rounding, trits, trees, memories, lanes, the root-mean-square unit and the row-wise unit.

use std::collections::VecDeque;

use mmfree_accel::arith::{self, Scale, Sigmoid};
use mmfree_accel::config::Packing;
use mmfree_accel::isa::Opcode;

use super::{Outcome, random_scale, scale_bits, word};
use crate::Random;
use crate::bench::Bench;

pub fn round(bench: &mut Bench, random: &mut Random) -> Outcome {
    let wide = |random: &mut Random| (random.next() as i64) << 31 ^ random.next() as i64;
    for turn in 0..600 {
        let shift = random.below(64) as u32;
        let half = if shift == 0 { 0 } else { 1i64 << (shift - 1).min(61) };
        let value = match turn % 6 {
            0 => half,
            1 => -half,
            2 => (i64::from(i32::MAX) << shift.min(30)) + half,
            3 => (i64::from(i32::MIN) << shift.min(30)) - half - 1,
            _ => wide(random) >> random.below(62),
        }
        .clamp(-(1 << 62), 1 << 62);
        let [found] = bench.cycle(&[(u128::from(value as u64), 64), (shift.into(), 6)], [32])?;
        let half = if shift == 0 { 0 } else { 1i128 << (shift - 1) };
        let exact = (i128::from(value) + half) >> shift;
        let expected = exact.clamp(i32::MIN.into(), i32::MAX.into()) as i32;
        ensure!(
            found == word(expected),
            "{value} >> {shift}: {:#x}, expected {expected:#x}",
            found
        );
    }
    Ok(())
}

pub fn trits(bench: &mut Bench, _: &mut Random) -> Outcome {
    for packing in [Packing::T2, Packing::T5] {
        for byte in 0..=255u8 {
            let fields = [(packing.flag().into(), 1), (byte.into(), 8)];
            let [found] = bench.cycle(&fields, [10])?;
            // {is negative, is not zero} each.
            let expected = packing.decode(byte).iter().rev().fold(0, |bits, &trit| {
                bits << 2 | u128::from(trit < 0) << 1 | u128::from(trit != 0)
            });
            ensure!(found == expected, "{packing:?} {byte}: {found:#b}, expected {expected:#b}");
        }
    }
    Ok(())
}

pub fn tree(bench: &mut Bench, random: &mut Random) -> Outcome {
    let mut flight = VecDeque::new();
    for turn in 0..400 {
        let terms: [i8; 8] = std::array::from_fn(|_| match turn % 5 {
            0 => -127,
            1 => 127,
            _ => random.next() as i8,
        });
        let enabled = random.below(4) > 0;
        let bits = terms.iter().rev().fold(0, |bits, &term| bits << 8 | u128::from(term as u8));
        let [sum] = bench.cycle(&[(enabled.into(), 1), (bits, 64)], [11])?;
        if flight.len() == 3 {
            let expected: i32 = flight[0];
            ensure!(sum == word(expected) & 0x7ff, "sum {sum:#x}, expected {expected}");
        }
        if enabled {
            flight.push_back(terms.iter().map(|&term| i32::from(term)).sum());
            if flight.len() > 3 {
                flight.pop_front();
            }
        }
    }
    Ok(())
}

pub fn vectors(bench: &mut Bench, random: &mut Random) -> Outcome {
    let mut memory = [[0u32; 2]; 16];
    let mut expected = None;
    for turn in 0..600u64 {
        let filling = turn < 16;
        let addresses: [u64; 2] =
            std::array::from_fn(|_| if filling { turn } else { random.below(16) });
        let enables: [bool; 2] = std::array::from_fn(|_| filling || random.below(2) == 0);
        let values: [u32; 2] = std::array::from_fn(|_| random.next() as u32);
        // Often the address that is written: the old value comes.
        let reads: [u64; 3] = std::array::from_fn(|port| {
            if random.below(2) == 0 { addresses[port % 2] } else { random.below(16) }
        });
        let fields = [
            (reads[2].into(), 4),
            (reads[1].into(), 4),
            (reads[0].into(), 4),
            (enables[1].into(), 1),
            (enables[0].into(), 1),
            (addresses[1].into(), 4),
            (addresses[0].into(), 4),
            (values[1].into(), 32),
            (values[0].into(), 32),
        ];
        let found = bench.cycle(&fields, [32; 6])?;
        if let Some(expected) = expected {
            ensure!(found == expected, "cycle {turn}: {found:x?}, expected {expected:x?}");
        }
        let read = |port: usize, lane: usize| u128::from(memory[reads[port] as usize][lane]);
        expected = (turn >= 16)
            .then(|| [read(2, 1), read(2, 0), read(1, 1), read(1, 0), read(0, 1), read(0, 0)]);
        for lane in 0..2 {
            if enables[lane] {
                memory[addresses[lane] as usize][lane] = values[lane];
            }
        }
    }
    Ok(())
}

pub fn fifo(bench: &mut Bench, random: &mut Random) -> Outcome {
    let mut queue = VecDeque::new();
    let mut next = 0u16;
    let mut most = 0;
    for turn in 0..900 {
        // It fills up, runs empty, and both.
        let (push, pop) = match turn / 100 % 3 {
            0 => (true, random.below(8) == 0),
            1 => (random.below(8) == 0, true),
            _ => (random.below(2) == 0, random.below(2) == 0),
        };
        let fields = [(push.into(), 1), (pop.into(), 1), (next.into(), 16)];
        // The offer may not change before it is taken, so it is made until then.
        let [ready, valid, data] = bench.cycle(&fields, [1, 1, 16])?;
        if valid == 1 && pop {
            let expected = queue.pop_front();
            ensure!(expected == Some(data as u16), "found {data}, expected {expected:?}");
        }
        if push && ready == 1 {
            queue.push_back(next);
            next = next.wrapping_add(1);
        }
        most = most.max(queue.len());
    }
    // The eight of its memory, and the one in its output register.
    ensure!(most == 9, "it held {most} entries, expected 9");
    for _ in 0..12 {
        let [_, valid, data] = bench.cycle(&[(0, 1), (1, 1), (0, 16)], [1, 1, 16])?;
        if valid == 1 {
            ensure!(queue.pop_front() == Some(data as u16), "{data} came out of order");
        }
    }
    ensure!(queue.is_empty(), "{} entries were lost", queue.len());
    Ok(())
}

/// `pass_e` of `mmfree_row_pkg`.
mod pass {
    pub const SQUARE: u128 = 0;
    pub const NORM: u128 = 3;
    pub const QUANT: u128 = 4;
    pub const ADD: u128 = 5;
    pub const MUL: u128 = 6;
    pub const SIGMOID: u128 = 7;
    pub const SILU: u128 = 8;
    pub const SWIGLU: u128 = 9;
    pub const GATE: u128 = 10;
    pub const RECUR: u128 = 11;
}

pub fn lane(bench: &mut Bench, random: &mut Random) -> Outcome {
    const LATENCY: usize = 9;
    let sigmoid = Sigmoid::default();
    let one = arith::ONE;
    let corners = [
        0,
        1,
        -1,
        one,
        -one,
        i32::MAX,
        i32::MIN,
        -128,
        127,
        16 * one,
        16 * one - 1,
        -16 * one,
        one / 16,
    ];
    for pass in 0..=pass::RECUR {
        let scale = if pass == pass::QUANT {
            Scale { mantissa: 1, exponent: 0 }
        } else {
            random_scale(random)
        };
        let inputs: Vec<[i32; 3]> = (0..60)
            .map(|i| {
                let corner = |random: &mut Random| corners[random.below(13) as usize];
                match i {
                    0..13 => [corners[i], corner(random), corner(random)],
                    // The largest twice, for the search.
                    20 | 30 => [i32::MAX, 1, 1],
                    _ => [random.element(), random.element(), random.element()],
                }
            })
            .collect();
        let mut outputs = Vec::new();
        for cycle in 0..inputs.len() + LATENCY + 2 {
            let [a, b, c] =
                cycle.checked_sub(1).and_then(|i| inputs.get(i)).copied().unwrap_or_default();
            let counts = (1..=inputs.len()).contains(&cycle);
            let fields = [
                (pass, 4),
                (scale_bits(scale), 37),
                ((cycle == 0).into(), 1),
                (counts.into(), 1),
                (cycle as u128, 32),
                (word(a), 32),
                (word(b), 32),
                (word(c), 32),
            ];
            outputs.push(bench.cycle(&fields, [32, 8, 64, 32, 32, 32])?);
        }
        for (i, &[a, b, c]) in inputs.iter().enumerate() {
            let [result, quant, ..] = outputs[i + 1 + LATENCY];
            let expected = match pass {
                pass::NORM => arith::mul(scale.apply(a), b),
                pass::ADD => arith::add(a, b),
                pass::MUL => arith::mul(a, b),
                pass::SIGMOID => sigmoid.eval(a),
                pass::SILU => sigmoid.silu(a),
                pass::SWIGLU => arith::mul(sigmoid.silu(a), b),
                pass::GATE => arith::forget_gate(&sigmoid, a, b),
                pass::RECUR => arith::recurrence(&sigmoid, a, b, c),
                pass::QUANT => {
                    let expected = arith::quantize(a, scale);
                    ensure!(
                        quant as u8 as i8 == expected,
                        "quant {a}: {quant}, expected {expected}"
                    );
                    continue;
                }
                _ => continue,
            };
            ensure!(
                result == word(expected),
                "pass {pass}, {a} {b} {c}, {scale:?}: {result:#x}, expected {expected:#x}"
            );
        }
        let [_, _, sum, max, best, index] = outputs[outputs.len() - 1];
        let largest = inputs.iter().map(|x| x[0].unsigned_abs()).max().unwrap();
        ensure!(max == largest.into(), "pass {pass}: maximum {max}, expected {largest}");
        let (at, value) = inputs
            .iter()
            .enumerate()
            .rev()
            .max_by_key(|(_, x)| x[0])
            .map(|(i, x)| (i + 1, x[0]))
            .unwrap();
        ensure!(
            (best, index) == (word(value), at as u128),
            "pass {pass}: best {best:#x} at {index}, expected {value:#x} at {at}"
        );
        if pass == pass::SQUARE {
            let expected = inputs.iter().fold(0u64, |sum, x| sum.wrapping_add(arith::square(x[0])));
            ensure!(sum == expected.into(), "sum {sum}, expected {expected}");
        }
    }
    Ok(())
}

pub fn rms(bench: &mut Bench, random: &mut Random) -> Outcome {
    let mut lengths = [0u32; 2];
    for turn in 0..48 {
        let is_quant = turn % 2 == 1;
        let sum = match turn {
            0 => 0,
            2 => u64::MAX,
            4 => 1,
            _ => (random.next() << 33 ^ random.next()) >> random.below(64),
        };
        let count = 1 + random.below(16_383) as u32;
        let epsilon = [0, 1, 268, random.next() as u32][turn % 4];
        let maximum = match turn {
            1 => 0,
            3 => 1 << 31,
            5 => 9,
            7 => 10,
            _ => random.next() as u32 >> random.below(31),
        };
        let factor = random_scale(random);
        let mut fields = [
            (1, 1),
            (is_quant.into(), 1),
            (sum.into(), 64),
            (count.into(), 16),
            (epsilon.into(), 32),
            (maximum.into(), 32),
            (scale_bits(factor), 37),
        ];
        let widths = [1, 1, 37, 37];
        let [ready, ..] = bench.cycle(&fields, widths)?;
        ensure!(ready == 1, "not ready for request {turn}");
        fields[0].0 = 0;
        let mut cycles = 1;
        let (inverse, dequant) = loop {
            let [_, done, inverse, dequant] = bench.cycle(&fields, widths)?;
            if done == 1 {
                break (inverse, dequant);
            }
            cycles += 1;
            ensure!(cycles < 400, "no answer");
        };
        let expected = if is_quant {
            let expected = arith::dequant_scale(maximum, factor);
            ensure!(
                dequant == scale_bits(expected),
                "{maximum} * {factor:?}: {dequant:#x}, {expected:?}"
            );
            arith::quant_factor(maximum)
        } else {
            arith::inverse_rms(sum, count, epsilon)
        };
        ensure!(
            inverse == scale_bits(expected),
            "quant {is_quant}, {sum} / {count} + {epsilon}, {maximum}: {inverse:#x}, expected {expected:?}"
        );
        let length = &mut lengths[usize::from(is_quant)];
        ensure!(*length == 0 || *length == cycles, "{cycles} cycles, before {length}");
        *length = cycles;
    }
    // What the timing model counts on.
    ensure!(lengths == [136, 39], "cycles of both modes: {lengths:?}");
    Ok(())
}

pub fn row(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 9] = [1, 1, 37, 32, 1, 5, 16, 32, 32];
    let sigmoid = Sigmoid::default();
    let mut memory: Vec<i32> = (0..128).map(|_| random.element()).collect();
    let fill = |bench: &mut Bench, at: usize, memory: &[i32], write: bool| {
        let fields = [
            (write.into(), 1),
            (at as u128, 6),
            (word(memory[2 * at + 1]), 32),
            (word(memory[2 * at]), 32),
        ];
        bench.cycle(&fields, WIDTHS)
    };
    for at in 0..64 {
        fill(bench, at, &memory, true)?;
    }
    let (mut best, mut best_index, mut next) = (i32::MIN, 0u32, 0u32);
    let opcodes = [
        Opcode::ClearMax,
        Opcode::RmsNorm,
        Opcode::Quant,
        Opcode::Add,
        Opcode::Mul,
        Opcode::Sigmoid,
        Opcode::Silu,
        Opcode::SwiGlu,
        Opcode::Mlgru,
        Opcode::ArgMax,
        Opcode::SetS,
    ];
    for turn in 0..3 * opcodes.len() {
        let opcode = opcodes[turn % opcodes.len()];
        let n = [1, 2, 1 + random.below(24) as usize][turn / opcodes.len()];
        // Four vectors of 16 words; sometimes in place.
        let [d, mut a, b, c] = [0usize, 16, 32, 48];
        if turn % 2 == 0 && opcode != Opcode::Mlgru {
            a = d;
        }
        let epsilon = random.below(1 << 16) as u32;
        let factor = random_scale(random);
        let fields = [
            (1, 1),
            (opcode as u128, 7),
            (d as u128, 16),
            (a as u128, 16),
            (b as u128, 16),
            (c as u128, 16),
            (n as u128, 16),
            (epsilon.into(), 32),
            (scale_bits(factor), 37),
            (0, 71),
        ];
        bench.cycle(&fields, WIDTHS)?;
        let mut activations = Vec::new();
        let mut cycles = 0;
        let scale = loop {
            let [_, done, scale, _, act_we, act_addr, act_data, ..] = bench.cycle(&[], WIDTHS)?;
            if act_we == 1 {
                ensure!(act_addr == activations.len() as u128 / 2, "activation word {act_addr}");
                activations.extend([act_data as u8 as i8, (act_data >> 8) as u8 as i8]);
            }
            if done == 1 {
                break scale;
            }
            cycles += 1;
            ensure!(cycles < 1000, "{opcode:?} does not end");
        };
        let (d, a, b, c) = (2 * d, 2 * a, 2 * b, 2 * c);
        let padded = n.next_multiple_of(2);
        let old = memory.clone();
        let mut each = |target: usize, f: &dyn Fn(usize) -> i32| {
            for j in 0..padded {
                memory[target + j] = f(j);
            }
        };
        match opcode {
            Opcode::RmsNorm => {
                let sum = old[a..a + n].iter().map(|&x| arith::square(x)).sum();
                let factor = arith::inverse_rms(sum, n as u32, epsilon);
                each(d, &|j| arith::mul(factor.apply(old[a + j]), old[b + j]));
            }
            Opcode::Quant => {
                let maximum = old[a..a + n].iter().map(|x| x.unsigned_abs()).max().unwrap();
                let quant = arith::quant_factor(maximum);
                let expected: Vec<i8> = (0..padded)
                    .map(|j| if j < n { arith::quantize(old[a + j], quant) } else { 0 })
                    .collect();
                ensure!(activations == expected, "{activations:?}, expected {expected:?}");
                let expected = arith::dequant_scale(maximum, factor);
                ensure!(scale == scale_bits(expected), "scale {scale:#x}, expected {expected:?}");
            }
            Opcode::Add => each(d, &|j| arith::add(old[a + j], old[b + j])),
            Opcode::Mul => each(d, &|j| arith::mul(old[a + j], old[b + j])),
            Opcode::Sigmoid => each(d, &|j| sigmoid.eval(old[a + j])),
            Opcode::Silu => each(d, &|j| sigmoid.silu(old[a + j])),
            Opcode::SwiGlu => each(d, &|j| arith::mul(sigmoid.silu(old[a + j]), old[b + j])),
            Opcode::Mlgru => {
                each(b, &|j| arith::forget_gate(&sigmoid, old[b + j], old[c + j]));
                let gate = memory.clone();
                for j in 0..padded {
                    memory[d + j] =
                        arith::recurrence(&sigmoid, old[a + j], gate[b + j], old[d + j]);
                }
            }
            Opcode::ArgMax => {
                for &value in &old[a..a + n] {
                    if value > best {
                        (best, best_index) = (value, next);
                    }
                    next += 1;
                }
            }
            Opcode::SetS => {
                let expected = Scale::from_words(old[a + n], old[a + n + 1]);
                ensure!(scale == scale_bits(expected), "scale {scale:#x}, expected {expected:?}");
            }
            _ => (best, best_index, next) = (i32::MIN, 0, 0),
        }
        for at in 0..=64usize {
            let [_, _, _, index, .., high, low] = fill(bench, at % 64, &memory, false)?;
            ensure!(index == best_index.into(), "{opcode:?}: best {index}, expected {best_index}");
            if at > 0 {
                let expected = (word(memory[2 * at - 1]), word(memory[2 * at - 2]));
                ensure!((high, low) == expected, "{opcode:?} of {n}: word {}", at - 1);
            }
        }
    }
    Ok(())
}
