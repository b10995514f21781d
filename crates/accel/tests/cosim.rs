//! Lock-step co-simulation: the RTL under Verilator beside the functional simulator, memory and registers
//! compared after every instruction, with random latency and stalls of DRAM.

use mmfree::builtin;
use mmfree::checkpoint::Checkpoint;
use mmfree_accel::arith;
use mmfree_accel::asm::{assemble, listing};
use mmfree_accel::compiler::Plan;
use mmfree_accel::config::{Configuration, Packing};
use mmfree_accel::image::{Image, Region, Shape};
use mmfree_accel::isa::{Instruction, Opcode};
use mmfree_accel::machine::Machine;
use mmfree_accel::timing::{self, Memory};
use mmfree_accel::trace;

mod support;

use support::{Rtl, first_difference};

/// A small linear congruential generator: programs are the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// An element: mostly of the size that models have, sometimes extreme.
    fn element(&mut self) -> i32 {
        match self.below(16) {
            0 => i32::MIN,
            1 => i32::MAX,
            2 => 0,
            3 => (self.next() << 8) as i32,
            _ => self.below(16 << arith::FRACTION_BITS) as i32 - (8 << arith::FRACTION_BITS),
        }
    }
}

/// Vector memory is cut into slots; data memory holds elements to load, and room to store.
const SLOTS: u64 = 12;

/// A random program: vectors are loaded, then every opcode comes in random order and shape.
fn random_image(configuration: &Configuration, seed: u64) -> Image {
    let mut random = Random(seed);
    let lanes = u64::from(configuration.row_lanes);
    let slot_words = u64::from(configuration.vector_words) / SLOTS;
    let longest = (slot_words * lanes).min(u64::from(configuration.activation_bytes)).min(200);
    let mut program = Vec::new();
    let mut emit = |opcode, fill: &mut dyn FnMut(&mut Instruction)| {
        let mut instruction = Instruction::new(opcode);
        fill(&mut instruction);
        program.push(instruction);
    };
    let data_bytes = 1u64 << 16;
    let mut beats = 0u64;
    let slot = |index: u64| (index * slot_words) as u16;
    emit(Opcode::Stream, &mut |_| {});
    emit(Opcode::SetA, &mut |i| i.sd = 1);
    emit(Opcode::SetA, &mut |i| (i.sd, i.imm) = (2, (data_bytes / 2 / 128) as u32));
    for index in 0..SLOTS {
        let n = longest as u16;
        emit(Opcode::Load, &mut |i| (i.vd, i.sa, i.sd, i.n) = (slot(index), 1, 1, n));
    }
    // Scales of usual size for the quantiser and products.
    emit(Opcode::SetS, &mut |i| (i.sd, i.va, i.n) = (1, slot(0), random.below(longest - 1) as u16));
    let mut loops = 0;
    for _ in 0..60 {
        let n = 1 + random.below(longest) as u16;
        let mut slots = [0; 4];
        let first = random.below(SLOTS);
        for (i, slot) in slots.iter_mut().enumerate() {
            *slot = ((first + i as u64 * (1 + first % 3)) % SLOTS * slot_words) as u16;
        }
        let [d, a, b, c] = slots;
        // Sometimes in place.
        let a = if random.below(4) == 0 { d } else { a };
        let imm = random.below(1 << 20) as u32;
        match random.below(17) {
            0 => emit(Opcode::Add, &mut |i| (i.vd, i.va, i.vb, i.n) = (d, a, b, n)),
            1 => emit(Opcode::Mul, &mut |i| (i.vd, i.va, i.vb, i.n) = (d, a, b, n)),
            2 => emit(Opcode::Sigmoid, &mut |i| (i.vd, i.va, i.n) = (d, a, n)),
            3 => emit(Opcode::Silu, &mut |i| (i.vd, i.va, i.n) = (d, a, n)),
            4 => emit(Opcode::SwiGlu, &mut |i| (i.vd, i.va, i.vb, i.n) = (d, a, b, n)),
            5 => emit(Opcode::RmsNorm, &mut |i| (i.vd, i.va, i.vb, i.n, i.imm) = (d, a, b, n, imm)),
            6 => {
                emit(Opcode::Mlgru, &mut |i| (i.vd, i.va, i.vb, i.vc, i.n) = (d, slots[1], b, c, n))
            }
            7 => emit(Opcode::ArgMax, &mut |i| (i.va, i.n) = (a, n)),
            8 if imm.is_multiple_of(3) => emit(Opcode::ClearMax, &mut |_| {}),
            9 => emit(Opcode::Store, &mut |i| (i.va, i.sa, i.sd, i.n) = (a, 2, 1, n)),
            10 => {
                emit(Opcode::SetA, &mut |i| (i.sd, i.imm) = (3, imm % 100));
                emit(Opcode::Load, &mut |i| (i.vd, i.sa, i.n) = (d, 3, n));
            }
            11 => {
                let stride = imm % 4;
                emit(Opcode::Embed, &mut |i| (i.vd, i.sa, i.n, i.imm) = (d, 4, n, stride));
            }
            12 => emit(Opcode::SetS, &mut |i| {
                (i.sd, i.va, i.n) = ((imm % 16) as u8, a, (imm >> 4) as u16 % (longest - 1) as u16);
            }),
            13 if loops < 3 && random.below(2) == 0 => {
                loops += 1;
                let turns = 1 + imm % 3;
                emit(Opcode::SetO, &mut |i| i.imm = imm % 2);
                emit(Opcode::Loop, &mut |i| i.imm = turns);
                emit(Opcode::Silu, &mut |i| {
                    (i.vd, i.va, i.n, i.indexed) = (d, slots[1], 1 + n % 8, true)
                });
                emit(Opcode::AddO, &mut |i| i.imm = 1);
                emit(Opcode::End, &mut |_| {});
            }
            _ => {
                let packing = if imm.is_multiple_of(2) { Packing::T2 } else { Packing::T5 };
                let (rows, cols) = (n, 1 + (imm >> 3) as u16 % longest as u16);
                beats += configuration.beats(packing, rows.into(), cols.into()) as u64;
                let scale = (imm >> 20) as u8 % 16;
                emit(Opcode::Quant, &mut |i| (i.sd, i.va, i.sa, i.n) = (2, a, scale, cols));
                emit(Opcode::MatVec, &mut |i| {
                    (i.vd, i.sa, i.vc, i.n, i.sd) = (d, 2, cols, rows, packing.flag());
                });
            }
        }
    }
    emit(Opcode::Halt, &mut |_| {});
    program[0].imm = beats as u32;
    let data = (0..data_bytes / 8).flat_map(|_| random.element().to_le_bytes()).collect();
    let stream_bytes = beats as usize * configuration.weight_bytes as usize;
    let streams = (0..configuration.cores)
        .map(|_| (0..stream_bytes).map(|_| random.next() as u8).collect())
        .collect();
    Image {
        configuration: configuration.clone(),
        packing: Packing::T5,
        shape: Shape::default(),
        program,
        data,
        data_bytes,
        streams,
        state: Region::default(),
        logits: Region::default(),
    }
}

/// Runs an image on both; `Err` says where they part.
fn compare(
    rtl: &Rtl,
    image: &Image,
    tokens: &[u32],
    options: &[(&str, u64)],
) -> Result<(), String> {
    let mut machine = Machine::new(image.clone());
    let mut ours = String::new();
    for &token in tokens {
        trace::run(&mut machine, token, &mut ours).map_err(|error| error.to_string())?;
    }
    let outcome = rtl.run(image, tokens, options, true);
    if outcome.exit_code != 0 {
        return Err(format!("the RTL did not finish: {}", outcome.report));
    }
    match first_difference(&ours, &outcome.trace) {
        None => Ok(()),
        Some((line, ours, theirs)) => Err(format!(
            "line {line}: simulator {ours:?}, RTL {theirs:?}; program:\n{}",
            listing(&image.program)
        )),
    }
}

#[test]
fn random_programs_leave_the_same_state_after_every_instruction() {
    let Some(verilator) = support::verilator() else { return };
    let rtl_folder = support::hardware().join("rtl");
    let one = Configuration {
        name: "one".to_owned(),
        cores: 1,
        weight_bytes: 4,
        row_lanes: 1,
        vector_words: 1024,
        activation_bytes: 64,
        fifo_beats: 8,
        burst_beats: 4,
    };
    let wide = Configuration {
        name: "wide".to_owned(),
        cores: 3,
        weight_bytes: 16,
        row_lanes: 8,
        vector_words: 512,
        activation_bytes: 256,
        fifo_beats: 16,
        burst_beats: 8,
    };
    for configuration in [Configuration::preset("tiny").unwrap(), one, wide] {
        configuration.check().unwrap();
        let rtl = support::build(&verilator, &rtl_folder, &configuration.name, &configuration);
        for seed in 0..12 {
            let image = random_image(&configuration, seed);
            let options = [
                ("--latency", [0, 3, 40][seed as usize % 3]),
                ("--stall", [0, 30, 70][seed as usize / 3 % 3]),
                ("--rate", [256, 100][seed as usize % 2]),
                ("--seed", seed),
            ];
            if let Err(difference) = compare(&rtl, &image, &[3, 0], &options) {
                panic!("{}, seed {seed}, {options:?}: {difference}", configuration.name);
            }
        }
    }
}

#[test]
fn a_hung_memory_ends_with_the_watchdog_and_the_state() {
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("tiny").unwrap();
    let rtl = support::build(&verilator, &support::hardware().join("rtl"), "tiny", &configuration);
    let image = random_image(&configuration, 1);
    let outcome = rtl.run(&image, &[0], &[("--hang-after", 300), ("--watchdog", 2000)], false);
    assert_eq!((outcome.exit_code, outcome.report["status"].as_str()), (3, Some("hung")));
    for field in ["pc", "instructions", "cycle", "starved_cycles"] {
        assert!(outcome.report[field].is_u64(), "{field}: {:?}", outcome.report);
    }
}

#[test]
fn a_program_that_the_hardware_cannot_run_raises_its_error() {
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("tiny").unwrap();
    let rtl = support::build(&verilator, &support::hardware().join("rtl"), "tiny", &configuration);
    let mut image = random_image(&configuration, 1);
    image.program = assemble("test", "halt").unwrap();
    image.program.insert(0, Instruction::new(Opcode::End));
    let outcome = rtl.run(&image, &[0], &[], false);
    assert_eq!((outcome.exit_code, outcome.report["status"].as_str()), (3, Some("error")));
}

/// A whole model, small enough for the smallest hardware.
fn small_model(packing: Packing) -> (Plan, Image) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny");
    let checkpoint = Checkpoint::open(folder).unwrap();
    let configuration = Configuration::preset("tiny").unwrap();
    let plan = Plan::new(checkpoint.config(), &configuration, packing).unwrap();
    let image = plan.image(&checkpoint, &mut |_, _| {}).unwrap();
    (plan, image)
}

#[test]
fn a_small_model_runs_in_lock_step_and_writes_the_same_sixteen_tokens() {
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("tiny").unwrap();
    let rtl = support::build(&verilator, &support::hardware().join("rtl"), "tiny", &configuration);
    for packing in [Packing::T5, Packing::T2] {
        let (_, image) = small_model(packing);
        let mut machine = Machine::new(image.clone());
        let (mut tokens, mut next) = (Vec::new(), 5);
        for _ in 0..16 {
            tokens.push(next);
            next = machine.run(next).unwrap();
        }
        if let Err(difference) = compare(&rtl, &image, &tokens, &[("--stall", 20)]) {
            panic!("{difference}");
        }
        let generated = rtl.run(&image, &tokens[..1], &[("--generate", 16)], false);
        let mut expected = tokens[1..].to_vec();
        expected.push(next);
        assert_eq!(generated.report["results"], serde_json::json!(expected));
    }
}

/// The timing model beside the RTL's cycle counter: random programs and a whole model, memories of different
/// latency, rate and stalls.
#[test]
fn the_timing_model_is_near_the_rtl() {
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("tiny").unwrap();
    let rtl = support::build(&verilator, &support::hardware().join("rtl"), "tiny", &configuration);
    let mut images: Vec<(String, Image)> =
        (0..4).map(|seed| (format!("random {seed}"), random_image(&configuration, seed))).collect();
    images.push(("small model, t5".to_owned(), small_model(Packing::T5).1));
    images.push(("small model, t2".to_owned(), small_model(Packing::T2).1));
    let mut worst: f64 = 0.0;
    for (name, image) in &images {
        for (latency, rate, stall) in
            [(0u64, 256u64, 0u64), (20, 256, 0), (60, 64, 0), (20, 20, 0), (30, 200, 40)]
        {
            let stalled = stall as f64 / 100.0;
            let memory = Memory {
                latency: latency as f64,
                weight_rate: (rate as f64 / 256.0).min(1.0 - stalled),
                data_rate: 1.0,
                stall: stalled,
            };
            let expected = timing::estimate(&image.program, &configuration, memory).cycles;
            let options =
                [("--latency", latency), ("--rate", rate), ("--stall", stall), ("--seed", 9)];
            let outcome = rtl.run(image, &[1], &options, false);
            let found = outcome.report["cycles"][0].as_f64().unwrap();
            let error = expected / found - 1.0;
            println!(
                "{name}, latency {latency}, rate {rate}/256, stalls {stall} %: RTL {found}, model {expected:.0}, {:+.2} %",
                error * 100.0
            );
            worst = worst.max(error.abs());
        }
    }
    // Worst where latency and a slow memory meet; 5 % everywhere is the aim.
    assert!(worst < 0.07, "the model is off by {:.1} %", worst * 100.0);
}

/// Faults that are put into the RTL, each of which the comparison with the simulator must find.
#[test]
fn faults_in_the_rtl_are_found() {
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("tiny").unwrap();
    let faults = [
        (
            "sign of a trit",
            "mmfree_ternary_unit.sv",
            "? -act_q[k] : act_q[k]",
            "? act_q[k] : -act_q[k]",
        ),
        (
            "one beat too few",
            "mmfree_ternary_unit.sv",
            "beat_q + 1'b1 == beats_q",
            "beat_q + 2'd2 >= beats_q",
        ),
        (
            "ties rounded down",
            "mmfree_round_saturate.sv",
            "(value_i + half)",
            "(value_i + half - 64'sd1)",
        ),
    ];
    for (index, (what, file, from, to)) in faults.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(support::hardware().join("rtl")).unwrap() {
            let path = entry.unwrap().path();
            let mut text = std::fs::read_to_string(&path).unwrap();
            if path.ends_with(file) {
                assert_eq!(
                    text.matches(from).count(),
                    1,
                    "{file} has changed: choose another place"
                );
                text = text.replace(from, to);
            }
            std::fs::write(folder.path().join(path.file_name().unwrap()), text).unwrap();
        }
        let name = format!("fault-{index}");
        let rtl = support::build(&verilator, folder.path(), &name, &configuration);
        let options = [("--watchdog", 20_000)];
        let found = (0..4)
            .map(|seed| random_image(&configuration, seed))
            .chain([small_model(Packing::T5).1])
            .find_map(|image| compare(&rtl, &image, &[3], &options).err());
        let found = found.unwrap_or_else(|| panic!("{what}: nothing noticed it"));
        println!("{what}: {}", found.lines().next().unwrap_or_default());
    }
}

/// The built-in model in RTL, as many greedy tokens as MMFREE_RTL_TOKENS says: minutes, so only on demand.
#[test]
fn the_builtin_model_writes_the_same_tokens_in_rtl() {
    let Ok(count) = std::env::var("MMFREE_RTL_TOKENS") else {
        println!("!!! SKIPPED: set MMFREE_RTL_TOKENS to run the built-in model in RTL");
        return;
    };
    let count = count.parse().unwrap();
    let Some(verilator) = support::verilator() else { return };
    let configuration = Configuration::preset("sim").unwrap();
    let checkpoint = builtin::checkpoint().unwrap();
    let plan = Plan::new(checkpoint.config(), &configuration, Packing::T5).unwrap();
    let image = plan.image(&checkpoint, &mut |_, _| {}).unwrap();
    let mut machine = Machine::new(image.clone());
    let mut expected = Vec::new();
    let mut token = 1;
    for _ in 0..count {
        token = machine.run(token).unwrap();
        expected.push(token);
    }
    let rtl = support::build(&verilator, &support::hardware().join("rtl"), "sim", &configuration);
    let outcome = rtl.run(&image, &[1], &[("--generate", count), ("--latency", 60)], false);
    println!("{}", outcome.report);
    assert_eq!(outcome.report["results"], serde_json::json!(expected));
}
