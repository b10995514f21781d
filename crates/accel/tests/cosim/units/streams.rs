//! Products, what streams to and from memories, and control.

use std::collections::VecDeque;

use mmfree_accel::config::Packing;
use mmfree_accel::isa::{Instruction, Opcode};

use super::{Outcome, random_scale, scale_bits};
use crate::Random;
use crate::bench::Bench;

/// Whether `found` are the sums of a group's rows; `weights` are those of all groups, a byte for each activation.
fn check_group(
    packing: Packing,
    group: usize,
    weights: &[u8],
    activations: &[i8],
    found: u128,
) -> Outcome {
    let bytes = &weights[group * activations.len()..][..activations.len()];
    let mut expected = [0; 5];
    for (&byte, &q) in bytes.iter().zip(activations) {
        for (sum, trit) in expected.iter_mut().zip(packing.decode(byte)) {
            *sum += i32::from(trit) * i32::from(q);
        }
    }
    ensure!(found == sum_bits(expected), "group {group}: {found:#x}, expected {expected:?}");
    Ok(())
}

fn sum_bits(sums: [i32; 5]) -> u128 {
    sums.iter().rev().fold(0, |bits, &sum| bits << 24 | u128::from(sum as u32 & 0xff_ffff))
}

/// Bytes as a unit's input has them, the first lowest.
fn byte_bits(bytes: &[u8]) -> u128 {
    bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u128::from(byte))
}

/// Activations of a product: often the largest of one sign, so that sums reach their limits.
fn random_activations(random: &mut Random, turn: usize, count: usize) -> Vec<i8> {
    (0..count)
        .map(|_| match turn % 4 {
            0 => 127,
            1 => -127,
            _ => (random.below(255) as i32 - 127) as i8,
        })
        .collect()
}

pub fn ternary(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 5] = [1, 1, 1, 120, 1];
    const WIDTH: usize = 8;
    for turn in 0..12 {
        let packing = [Packing::T2, Packing::T5][turn % 2];
        let cols = [1, 8, 9, 64, 1 + random.below(64) as usize][turn % 5];
        let rows = [1, 10, 11, 1 + random.below(60) as usize][turn % 4];
        let beats = cols.div_ceil(WIDTH);
        let groups = rows.div_ceil(packing.trits() * 2);
        let mut activations = random_activations(random, turn, cols);
        activations.resize(beats * WIDTH, 0);
        for (at, pair) in activations.as_chunks::<2>().0.iter().enumerate() {
            let bits = byte_bits(&pair.map(|q| q as u8));
            bench.cycle(&[(1, 1), (at as u128, 5), (bits, 16), (0, 66)], WIDTHS)?;
        }
        let weights: Vec<u8> = (0..groups * beats * WIDTH)
            .map(|_| match turn % 3 {
                0 => packing.encode(&[1; 5][..packing.trits()]),
                _ => random.next() as u8,
            })
            .collect();
        let command =
            [(1, 1), (packing.flag().into(), 1), (rows as u128, 16), (cols as u128, 16), (0, 88)];
        let [ready, ..] = bench.cycle(&command, WIDTHS)?;
        ensure!(ready == 1, "not ready for a product");
        let (mut sent, mut taken, mut offered) = (0, 0, false);
        for cycle in 0.. {
            ensure!(cycle < 4000, "{taken} of {groups} groups came");
            let left = sent < groups * beats;
            offered |= left && random.below(3) > 0;
            let beat = &weights[sent.min(groups * beats - 1) * WIDTH..][..WIDTH];
            let bits = byte_bits(beat);
            let sum_ready = turn % 3 == 0 || random.below(6) == 0;
            let fields = [(offered.into(), 1), (bits, 64), (sum_ready.into(), 1)];
            let [_, weight_ready, valid, sums, starved] = bench.cycle(&fields, WIDTHS)?;
            ensure!(
                starved == u128::from(weight_ready == 1 && !offered),
                "starved is {starved}, weights offered: {offered}"
            );
            if offered && weight_ready == 1 {
                sent += 1;
                offered = false;
            }
            if valid == 1 && sum_ready {
                check_group(packing, taken, &weights, &activations, sums)?;
                taken += 1;
                if taken == groups {
                    break;
                }
            }
        }
        ensure!(sent == groups * beats, "{sent} beats were taken, expected {}", groups * beats);
    }
    Ok(())
}

/// A memory behind an AXI read port: bursts are answered in order.
#[derive(Default)]
struct ReadMemory {
    /// Addresses of beats that were asked for.
    beats: VecDeque<u64>,
}

impl ReadMemory {
    fn request(&mut self, address: u128, length: u128, width: u64) -> Outcome {
        let (address, beats) = (address as u64, length as u64 + 1);
        ensure!(
            address / 4096 == (address + beats * width - 1) / 4096,
            "a burst of {beats} beats at {address} crosses a page"
        );
        self.beats.extend((0..beats).map(|beat| address + beat * width));
        Ok(())
    }
}

/// What lies at an address.
fn content(address: u64) -> u64 {
    (address + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub fn reader(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 8] = [1, 1, 40, 8, 1, 1, 64, 1];
    for turn in 0..10u64 {
        let beats = [1, 4, 5, 16, 33, 64][turn as usize % 6] + random.below(3);
        let base = 4096 - 64 + 32 * turn;
        let command = [(1, 1), (base.into(), 40), (beats.into(), 32), (0, 67)];
        let [ready, ..] = bench.cycle(&command, WIDTHS)?;
        ensure!(ready == 1, "not ready for a stream");
        let mut memory = ReadMemory::default();
        let (mut asked, mut taken, mut full_seen) = (0, 0, false);
        for cycle in 0.. {
            ensure!(cycle < 3000, "{taken} of {beats} beats came");
            // Nobody takes anything for a while: the reader runs ahead and stops.
            let takes = cycle > 120 && random.below(3) > 0;
            let arready = random.below(2) == 0;
            let answer = random.below(4) > 0;
            let address = memory.beats.front().copied().filter(|_| answer);
            let fields = [
                (arready.into(), 1),
                (address.is_some().into(), 1),
                (address.map_or(0, content).into(), 64),
                (takes.into(), 1),
            ];
            let [_, arvalid, araddr, arlen, rready, valid, data, full] =
                bench.cycle(&fields, WIDTHS)?;
            full_seen |= full == 1;
            ensure!(full == 0 || memory.beats.is_empty(), "full, while the memory owes weights");
            if address.is_some() {
                ensure!(rready == 1, "the memory has to wait");
                memory.beats.pop_front();
            }
            if arvalid == 1 && arready {
                ensure!(araddr == u128::from(base + 8 * asked), "address {araddr}, {asked} asked");
                memory.request(araddr, arlen, 8)?;
                asked += arlen as u64 + 1;
                ensure!(asked - taken <= 16, "{} beats for a FIFO of 16", asked - taken);
            }
            if valid == 1 && takes {
                ensure!(data == content(base + 8 * taken).into(), "beat {taken} is wrong");
                taken += 1;
                if taken == beats {
                    break;
                }
            }
        }
        ensure!(asked == beats, "{asked} beats were asked for, expected {beats}");
        ensure!(full_seen == (beats > 16), "{beats} beats, FIFO full: {full_seen}");
    }
    Ok(())
}

pub fn data(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 17] = [1, 1, 6, 1, 6, 64, 1, 40, 8, 1, 1, 40, 8, 1, 64, 1, 1];
    for turn in 0..16u64 {
        let is_store = turn % 2 == 1;
        let n = [1, 2, 127, 128, 1 + random.below(128)][turn as usize % 5];
        let words = n.div_ceil(2);
        let base = [0, 4096 - 128, 4096 - 8, 8192][turn as usize % 4];
        let first = random.below(64 - words + 1);
        let command = [
            (1, 1),
            (is_store.into(), 1),
            (base.into(), 40),
            (first.into(), 16),
            (n.into(), 16),
            (0, 133),
        ];
        let [ready, ..] = bench.cycle(&command, WIDTHS)?;
        ensure!(ready == 1, "not ready for a command");
        let mut memory = ReadMemory::default();
        let (mut read_data, mut moved) = (0, 0u64);
        // Writes: beats left of the burst, and whether it wants its response.
        let (mut write_left, mut wants_response) = (0u64, false);
        for cycle in 0.. {
            ensure!(cycle < 4000, "{moved} of {words} words were moved");
            let address = memory.beats.front().copied().filter(|_| random.below(3) > 0);
            let arready = random.below(2) == 0;
            let awready = write_left == 0 && !wants_response && random.below(2) == 0;
            let wready = write_left > 0 && random.below(2) == 0;
            let bvalid = wants_response && random.below(2) == 0;
            let fields = [
                (read_data, 64),
                (arready.into(), 1),
                (address.is_some().into(), 1),
                (address.map_or(0, content).into(), 64),
                (awready.into(), 1),
                (wready.into(), 1),
                (bvalid.into(), 1),
            ];
            let [
                _,
                done,
                raddr,
                we,
                waddr,
                wdata,
                arvalid,
                araddr,
                arlen,
                rready,
                awvalid,
                awaddr,
                awlen,
                wvalid,
                axi_wdata,
                wlast,
                bready,
            ] = bench.cycle(&fields, WIDTHS)?;
            read_data = u128::from(content(raddr as u64));
            if arvalid == 1 && arready {
                ensure!(!is_store, "a store reads");
                memory.request(araddr, arlen, 8)?;
            }
            if address.is_some() && rready == 1 {
                memory.beats.pop_front();
                let expected = content(base + 8 * moved);
                ensure!(
                    (we, waddr, wdata) == (1, (first + moved).into(), expected.into()),
                    "word {moved} goes to {waddr}: {wdata:#x}"
                );
                moved += 1;
            }
            if awvalid == 1 && awready {
                ensure!(
                    is_store && awaddr == u128::from(base + 8 * moved),
                    "write address {awaddr}"
                );
                write_left = awlen as u64 + 1;
                let (begin, end) = (awaddr as u64, awaddr as u64 + 8 * write_left - 1);
                ensure!(begin / 4096 == end / 4096, "a burst at {begin} crosses a page");
            } else if wvalid == 1 && wready {
                ensure!(
                    axi_wdata == content(first + moved).into(),
                    "word {moved} of a store is wrong"
                );
                ensure!(wlast == u128::from(write_left == 1), "wlast {wlast}, {write_left} left");
                moved += 1;
                write_left -= 1;
                wants_response = write_left == 0;
            } else if bvalid && bready == 1 {
                wants_response = false;
            }
            if done == 1 {
                break;
            }
        }
        ensure!(
            moved == words && memory.beats.is_empty() && write_left == 0 && !wants_response,
            "it ended after {moved} of {words} words"
        );
    }
    Ok(())
}

pub fn writeback(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 6] = [1, 1, 3, 4, 24, 128];
    for turn in 0..14 {
        let packing = [Packing::T5, Packing::T2][turn % 2];
        let group = packing.trits();
        let rows = [1, group * 3, group * 3 + 1, 1 + random.below(100) as usize][turn % 4];
        let groups = rows.div_ceil(group * 3);
        let first = random.below(30) as usize;
        let scale = random_scale(random);
        let fields = [
            (1, 1),
            (packing.flag().into(), 1),
            (rows as u128, 16),
            (first as u128, 6),
            (scale_bits(scale), 37),
            (0, 123),
        ];
        bench.cycle(&fields, WIDTHS)?;
        let sums: Vec<[i32; 5]> = (0..groups * 3)
            .map(|_| {
                std::array::from_fn(|_| match random.below(4) {
                    0 => (1 << 23) - 1,
                    1 => -(1 << 23),
                    _ => (random.next() as i32) >> 8,
                })
            })
            .collect();
        let mut found: Vec<Option<i32>> = vec![None; 256];
        let (mut at, mut valid) = (0, false);
        for cycle in 0.. {
            ensure!(cycle < 2000, "the last of {rows} rows does not come");
            valid |= at < sums.len() && random.below(2) == 0;
            let bits = sums.get(at).map_or(0, |&sums| sum_bits(sums));
            let offer = u128::from(valid) << (at % 3);
            let [_, done, ready, we, waddr, wdata] =
                bench.cycle(&[(offer, 3), (bits, 120)], WIDTHS)?;
            for lane in 0..4 {
                if we >> lane & 1 == 1 {
                    let element = (waddr >> (6 * lane) & 63) as usize * 4 + lane;
                    let old = found[element].replace((wdata >> (32 * lane)) as u32 as i32);
                    ensure!(old.is_none(), "element {element} is written twice");
                }
            }
            if valid && ready >> (at % 3) & 1 == 1 {
                (at, valid) = (at + 1, false);
            }
            if done == 1 {
                break;
            }
        }
        ensure!(at == sums.len(), "{at} groups were taken, expected {}", sums.len());
        let mut expected = vec![None; 256];
        for row in 0..rows {
            expected[4 * first + row] = Some(scale.apply(sums[row / group][row % group]));
        }
        ensure!(found == expected, "{rows} rows of {packing:?} at {first}, {scale:?}");
    }
    Ok(())
}

pub fn core(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 10] = [1, 1, 1, 40, 8, 1, 1, 120, 1, 1];
    const WIDTH: usize = 4;
    for turn in 0..8 {
        let packing = [Packing::T5, Packing::T2][turn % 2];
        let (cols, rows) = (1 + random.below(32) as usize, 1 + random.below(40) as usize);
        let beats = cols.div_ceil(WIDTH);
        let groups = rows.div_ceil(packing.trits());
        let mut activations = random_activations(random, turn, cols);
        activations.resize(beats * WIDTH, 0);
        for (at, pair) in activations.as_chunks::<2>().0.iter().enumerate() {
            let bits = byte_bits(&pair.map(|q| q as u8));
            bench.cycle(&[(1, 1), (at as u128, 4), (bits, 16), (0, 35)], WIDTHS)?;
        }
        let weights: Vec<u8> = (0..groups * beats * WIDTH).map(|_| random.next() as u8).collect();
        bench.cycle(&[(1, 1), ((groups * beats) as u128, 32), (0, 90)], WIDTHS)?;
        // Weights come ahead of the product.
        let start = random.below(40);
        let mut memory = ReadMemory::default();
        let (mut taken, mut starved_seen) = (0, 0);
        for cycle in 0.. {
            ensure!(cycle < 6000, "{taken} of {groups} groups came");
            let address = memory.beats.front().copied().filter(|_| random.below(2) == 0);
            let beat =
                address.map_or(0, |address| byte_bits(&weights[address as usize..][..WIDTH]));
            let (arready, sum_ready) = (random.below(2) == 0, random.below(2) == 0);
            let fields = [
                ((cycle == start).into(), 1),
                (packing.flag().into(), 1),
                (rows as u128, 16),
                (cols as u128, 16),
                (0, 21),
                (arready.into(), 1),
                (address.is_some().into(), 1),
                (beat, 32),
                (sum_ready.into(), 1),
            ];
            let [_, _, arvalid, araddr, arlen, rready, valid, sums, starved, _] =
                bench.cycle(&fields, WIDTHS)?;
            starved_seen += starved;
            if address.is_some() {
                ensure!(rready == 1, "the memory has to wait");
                memory.beats.pop_front();
            }
            if arvalid == 1 && arready {
                memory.request(araddr, arlen, WIDTH as u64)?;
            }
            if valid == 1 && sum_ready {
                check_group(packing, taken, &weights, &activations, sums)?;
                taken += 1;
                if taken == groups {
                    break;
                }
            }
        }
        ensure!(groups * beats < 40 || starved_seen > 0, "a slow memory starved nobody");
    }
    Ok(())
}

pub fn control(bench: &mut Bench, random: &mut Random) -> Outcome {
    const WIDTHS: [u32; 15] = [1, 1, 32, 1, 7, 16, 37, 40, 1, 1, 1, 1, 1, 8, 128];
    let instruction = |opcode, fill: &dyn Fn(&mut Instruction)| {
        let mut instruction = Instruction::new(opcode);
        fill(&mut instruction);
        instruction
    };
    let program = [
        instruction(Opcode::SetA, &|i| (i.sd, i.imm) = (2, 77)),
        instruction(Opcode::SetO, &|i| i.imm = 5),
        instruction(Opcode::Loop, &|i| i.imm = 3),
        instruction(Opcode::Loop, &|i| i.imm = 0),
        instruction(Opcode::AddO, &|i| i.imm = 65_530),
        instruction(Opcode::Load, &|i| (i.vd, i.indexed, i.sa, i.sd, i.n) = (9, true, 2, 1, 65)),
        instruction(Opcode::End, &|_| {}),
        instruction(Opcode::Loop, &|i| i.imm = 2),
        instruction(Opcode::Quant, &|i| (i.sd, i.sa, i.n) = (3, 3, 4)),
        instruction(Opcode::End, &|_| {}),
        instruction(Opcode::End, &|_| {}),
        instruction(Opcode::Embed, &|i| (i.vd, i.sa, i.n, i.imm) = (1, 2, 8, 3)),
        instruction(Opcode::Stream, &|i| (i.sa, i.imm) = (2, 9)),
        instruction(Opcode::MatVec, &|i| (i.vd, i.sa, i.vc, i.n) = (4, 3, 8, 8)),
        instruction(Opcode::Halt, &|_| {}),
    ];
    let write = |bench: &mut Bench, at: usize, bytes: [u8; 16]| {
        let fields = [(1, 1), (at as u128, 8), (u128::from_le_bytes(bytes), 128), (0, 103)];
        bench.cycle(&fields, WIDTHS).map(|_| ())
    };
    for (at, instruction) in program.iter().enumerate() {
        write(bench, at, instruction.encode())?;
    }
    let token = 11u32;
    let mut expected = vec![0, 1, 2];
    for _ in 0..3 {
        expected.extend([3, 4, 5, 6, 7, 8, 9, 8, 9, 10]);
    }
    expected.extend([11, 12, 13, 14]);
    bench.cycle(&[(1, 1), (token.into(), 32), (0, 70)], WIDTHS)?;
    let scale = scale_bits(random_scale(random));
    let best = random.next() as u32;
    let (mut retired, mut offset, mut units) = (Vec::new(), 5u16, 77u128);
    for cycle in 0.. {
        ensure!(cycle < 3000, "the program does not end: {retired:?}");
        let ready = random.below(3) == 0;
        let fields = [(ready.into(), 1), (scale, 37), (best.into(), 32)];
        let [
            _,
            done,
            _,
            error,
            opcode,
            vd,
            scalar,
            address,
            row,
            matvec,
            data,
            stream,
            retire,
            pc,
            _,
        ] = bench.cycle(&fields, WIDTHS)?;
        ensure!(error == 0, "an error is raised at {pc}");
        let issued = [row, matvec, data, stream].iter().sum::<u128>();
        ensure!(issued <= 1, "{issued} units are asked at a time");
        if data == 1 && ready && opcode == Opcode::Load as u128 {
            offset = offset.wrapping_add(65_530);
            ensure!(vd == u128::from(9u16.wrapping_add(offset)), "vd is {vd}, offset {offset}");
            ensure!(address == units << 7, "address {address}, expected {}", units << 7);
            // 65 elements of two a word: 264 bytes, three units.
            units += 3;
        }
        if data == 1 && opcode == Opcode::Embed as u128 {
            let expected = (units + 33) << 7;
            ensure!(address == expected, "the embedding is at {address}, expected {expected}");
        }
        if matvec == 1 {
            ensure!(scalar == scale, "s3 is {scalar:#x}, expected {scale:#x}");
        }
        if retire == 1 {
            retired.push(pc as usize);
        }
        if done == 1 {
            break;
        }
    }
    ensure!(retired == expected, "{retired:?}, expected {expected:?}");
    let [busy, _, result, ..] = bench.cycle(&[], WIDTHS)?;
    ensure!((busy, result) == (0, best.into()), "token {result}, expected {best}");
    Ok(())
}
